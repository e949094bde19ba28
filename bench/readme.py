"""python -m bench.readme: writes what the records say: all of it beside them, in sum and in a chart into README.md.

With --check, tells if one of them is stale.
"""

from collections.abc import Iterator
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from . import call_overhead, chart, memory
from .attention import AttentionCase
from .op import MODES
from .ops import OPS
from .records import RESULTS, Record, of_bound, read

README = Path(__file__).parent.parent / "README.md"
FIGURES = RESULTS / "README.md"
CHART = RESULTS / "attention.svg"
BEGIN = "<!-- measured figures: written by `python -m bench.readme` from bench/results -->"
END = "<!-- end of measured figures -->"


def is_current() -> bool:
    text = README.read_text()
    return rendered(text) == text and FIGURES.read_text() == figures() and chart.newest().is_drawn_in(CHART)


def rendered(readme: str) -> str:
    """README's text with what stands between the markers written anew."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    picture = f"![{chart.newest().title}]({CHART.relative_to(README.parent)})"
    return f"{head}{BEGIN}\n\n{summary()}\n\n{picture}\n\n{END}{tail}"


def all_records() -> Iterator[tuple[str, list[Record]]]:
    """Of every op that has some, machine by machine."""
    for op in OPS:
        for path in sorted(RESULTS.glob(f"{op}.*.json")):
            if records := read(path):
                yield op, records


def summary() -> str:
    """A row for each op, machine and mode."""
    headings = ["op", "machine", "mode", "cases", "faster than the best peer", "than our dense attention"]
    rows = []
    for op, records in all_records():
        for mode in dict.fromkeys(record["mode"] for record in records):
            of_mode = [record for record in records if record["mode"] == mode]
            ratios = [ratio for record in of_mode if (ratio := over_peers(record))]
            speedups = [record["against"]["ours_dense"] / record["time_us"] for record in of_mode if has_dense(record)]
            if not (ratios or speedups):
                continue
            machine = of_mode[0]["machine"]
            name = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
            rows.append([f"`{op}`", name, mode, str(len(of_mode)), spread(ratios), spread(speedups)])
    return grid(headings, rows, words=3) if rows else "Not measured yet."


def spread(ratios: list[float]) -> str:
    """Their geometric mean, the least and the most."""
    if not ratios:
        return "–"
    return f"{exp(fmean(map(log, ratios))):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def over_peers(record: Record) -> float | None:
    """Times that the op is as fast as its fastest peer."""
    peers = [time for name, time in record["against"].items() if name not in YARDSTICKS]
    return min(peers) / record["time_us"] if peers else None


YARDSTICKS = ("ours_dense", "unquantized", "softmax", "eager")
"""Contestants that are no peers: ops of fastattn itself, and the plain formula."""


def has_dense(record: Record) -> bool:
    return "ours_dense" in record["against"]


def figures() -> str:
    """The tables of every op that has records."""
    parts = [
        "# Measured figures",
        "Written by `python -m bench.readme` from the records beside this file. Medians of runs in which fastattn and "
        "its peers took turns on the same inputs in one process; a ratio above 1 means that fastattn was faster. The "
        "error is relative, in norm, against float64. Figures compare only within one machine.",
    ]
    heading = ""
    for op, records in all_records():
        if op != heading:
            parts.append(f"## `{op}`")
            heading = op
        parts += tables(records)
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in call_overhead.PARTS.items())
    overhead = f"Microseconds of the CPU's time a call. {meanings}."
    parts += section("Call overhead", overhead, call_overhead.NAME, "times_us")
    parts += section("Memory", memory.MEANING, memory.NAME, "mib")
    return "\n\n".join(parts) + "\n"


def section(title: str, text: str, name: str, field: str) -> list[str]:
    """Records of attention's calls: for each machine a table with a row for each case and mode, or nothing."""
    machines = [records for path in sorted(RESULTS.glob(f"{name}.*.json")) if (records := read(path))]
    parts = [f"## {title}", text] if machines else []
    for records in machines:
        contestants = list(dict.fromkeys(name for record in records for name in record[field]))
        rows = [
            [
                AttentionCase.parse(record["case"]).described,
                record["dtype"],
                record["mode"],
                *(f"{record[field][name]:.3g}" if name in record[field] else "–" for name in contestants),
            ]
            for record in records
        ]
        parts += [f"**{machine_line(records)}**", grid(["case", "dtype", "mode", *contestants], rows, words=3)]
    return parts


PAIR = ("fwd", "bwd")
"""The modes that stand side by side."""


def tables(records: list[Record]) -> list[str]:
    """One op on one machine: a row for each case and dtype, forward and backward side by side; then other modes."""
    case_of = OPS[records[0]["op"]].kind.parse
    rows: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        rows.setdefault((record["case"], record["dtype"]), {})[record["mode"]] = record
    any_sparse = any(map(has_dense, records))
    results = ["TFLOP/s", *(["speedup over dense, of bound"] if any_sparse else []), "ratio to best peer", "error"]
    pairs, others = [], []
    for (case, dtype), modes in rows.items():
        named = [case_of(case).described, dtype]
        if any(mode in modes for mode in PAIR):
            pairs.append(named + [cell for mode in PAIR for cell in result_cells(modes.get(mode), any_sparse)])
        for mode, record in modes.items():
            if mode not in PAIR:
                share = f"{record['time_us'] / modes['bwd']['time_us']:.2f}" if "bwd" in modes else "–"
                others.append([*named, MODES[mode].title, *result_cells(record, any_sparse), share])
    return [
        f"**{machine_line(records)}**",
        *([grid(["case", "dtype", "forward", *results, "backward", *results], pairs, words=2)] if pairs else []),
        *([grid(["case", "dtype", "mode", "time", *results, "of backward"], others, words=3)] if others else []),
    ]


def grid(headings: list[str], rows: list[list[str]], words: int) -> str:
    """A table whose first columns are words and whose others are numbers."""
    heading, *lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return "\n".join([heading, f"|{'---|' * words}{'--:|' * (len(headings) - words)}", *lines])


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


def result_cells(record: Record | None, with_speedup: bool) -> list[str]:
    if record is None:
        return ["–"] * (5 if with_speedup else 4)
    speedup = record["against"]["ours_dense"] / record["time_us"] if "ours_dense" in record["against"] else None
    peers: dict[str, float] = record["against"]
    best = min(peers, key=lambda name: peers[name], default=None)
    ratio = "–" if best is None else f"{peers[best] / record['time_us']:.2f} × {best}"
    time = record["time_us"] / 1e3
    return [
        f"{time:.0f} ms" if time >= 1000 else f"{time:.3g} ms",
        f"{record['tflops']:.3g}",
        *([of_bound(speedup, record["bound_speedup"])] if with_speedup else []),
        ratio,
        f"{record['error']:.0e}",
    ]


def main(check: Annotated[bool, typer.Option(help="Write nothing; exit 1 if one is stale.")] = False) -> None:
    """Write the measured figures into README.md and bench/results/README.md, and draw their chart (with matplotlib)."""
    if not check:
        README.write_text(rendered(README.read_text()))
        FIGURES.write_text(figures())
        chart.draw(chart.newest(), CHART)
    elif not is_current():
        typer.echo("README.md or what is in bench/results is stale: run `python -m bench.readme`", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
