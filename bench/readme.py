"""python -m bench.readme: writes the measured figures into README.md; with --check, tells if they are stale."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .ops import OPS
from .records import RESULTS, Record, of_bound, read

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- measured figures: written by `python -m bench.readme` from bench/results -->"
END = "<!-- end of measured figures -->"


def is_current() -> bool:
    text = README.read_text()
    return rendered(text) == text


def rendered(readme: str) -> str:
    """README's text with the figures between the markers written anew."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n\n{figures()}\n\n{END}{tail}"


def figures() -> str:
    """The tables of every op that has records."""
    parts = []
    for op in OPS:
        if tables := [table(records) for path in sorted(RESULTS.glob(f"{op}.*.json")) if (records := read(path))]:
            parts += [f"### `{op}`", *tables]
    return "\n\n".join(parts) or "Not measured yet."


def table(records: list[Record]) -> str:
    """One op on one machine: a row for each case and dtype, with forward and backward side by side."""
    case_of = OPS[records[0]["op"]].kind.parse
    rows: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        rows.setdefault((record["case"], record["dtype"]), {})[record["mode"]] = record
    is_sparse = any("ours_dense" in record["against"] for record in records)
    results = ["TFLOP/s", *(["speedup over dense, of bound"] if is_sparse else []), "ratio to best peer", "error"]
    headings = ["case", "dtype", "forward", *results, "backward", *results]
    lines = [
        f"**{machine_line(records)}**",
        "",
        f"| {' | '.join(headings)} |",
        f"|---|---{'|--:' * (len(headings) - 2)}|",
    ]
    for (case, dtype), modes in rows.items():
        cells = [cell for mode in ("fwd", "bwd") for cell in result_cells(modes.get(mode), is_sparse)]
        lines.append(f"| {case_of(case).described} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine_line(records: list[Record]) -> str:
    machines: list[dict[str, Any]] = [record["machine"] for record in records]
    commits = sorted({record["commit"] for record in records})
    names = sorted({m.get("gpu") or f"{m['cpu']}, {m['threads']} threads, {m['instruction_set']}" for m in machines})
    rates = sorted(m["gemm_tflops"] for m in machines)
    rate = f"{rates[0]:.3g}" if rates[0] == rates[-1] else f"{rates[0]:.3g} to {rates[-1]:.3g}"
    torches = sorted({m["torch"] for m in machines})
    return (
        f"{'; '.join(names)} · torch {', '.join(torches)} · matrix products {rate} TFLOP/s · "
        f"commit {', '.join(commits)}"
    )


def result_cells(record: Record | None, is_sparse: bool) -> list[str]:
    if record is None:
        return ["–"] * (5 if is_sparse else 4)
    speedup = record["against"]["ours_dense"] / record["time_us"] if "ours_dense" in record["against"] else None
    peers: dict[str, float] = record["against"]
    best = min(peers, key=lambda name: peers[name], default=None)
    ratio = "–" if best is None else f"{peers[best] / record['time_us']:.2f} × {best}"
    time = record["time_us"] / 1e3
    return [
        f"{time:.0f} ms" if time >= 1000 else f"{time:.3g} ms",
        f"{record['tflops']:.3g}",
        *([of_bound(speedup, record["bound_speedup"])] if is_sparse else []),
        ratio,
        f"{record['error']:.0e}",
    ]


def main(check: Annotated[bool, typer.Option(help="Write nothing; exit 1 if README.md is stale.")] = False) -> None:
    """Write the measured figures into README.md."""
    if not check:
        README.write_text(rendered(README.read_text()))
    elif not is_current():
        typer.echo("README.md does not show the records of bench/results: run `python -m bench.readme`", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
