"""python -m bench: fastattn and its peers on the same inputs, in turns; a table, and records in bench/results."""

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from fastattn.info import best_device, gpu_obstacle
from fastattn.measure import Float64Sample, interleaved_times

from . import records
from .op import MODES, Attention, Case, Contestant, Op, UnsupportedCaseError
from .ops import OPS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OURS, OURS_DENSE = "fastattn", "ours_dense"


@dataclass
class Measurement:
    op: str
    case: Case
    mode: str
    dtype: str
    bound_speedup: float | None
    times: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Times that fastattn is as fast as its fastest peer."""
        peers = [time for name, time in self.times.items() if name != OURS]
        return min(peers) / self.times[OURS] if peers and OURS in self.times else None

    @property
    def speedup(self) -> float | None:
        """Of a sparse op over our own dense attention."""
        timed = OURS in self.times and OURS_DENSE in self.times
        return self.times[OURS_DENSE] / self.times[OURS] if timed else None

    @property
    def tflops(self) -> float:
        return self.case.flops(self.mode) / self.times[OURS] * 1e-6

    def record(self, machine: dict[str, Any], commit: str) -> records.Record:
        return {
            "op": self.op,
            "case": self.case.name,
            "mode": self.mode,
            "dtype": self.dtype,
            "shape": self.case.shape,
            "density": round(self.case.density, 4),
            "time_us": round(self.times[OURS], 2),
            "tflops": float(f"{self.tflops:.4g}"),
            "percent_of_roofline": round(100 * self.tflops / machine["gemm_tflops"], 1),
            "error": float(f"{self.errors[OURS]:.3g}"),
            "against": {name: round(time, 2) for name, time in self.times.items() if name != OURS},
            "bound_speedup": self.bound_speedup and round(self.bound_speedup, 3),
            "commit": commit,
            "machine": machine,
        }


def measure(
    op: Op,
    case: Case,
    dtype: str,
    modes: list[str],
    peers: Mapping[str, Contestant],
    device: torch.device,
    seconds: float,
) -> list[Measurement]:
    """One case in every mode, all contestants on the same inputs."""
    q, k, v = case.inputs(device, DTYPES[dtype])
    dout = torch.randn(
        (*q.shape[:-1], v.shape[-1]), generator=torch.Generator(device).manual_seed(1), device=device
    ).to(q.dtype)
    backward = any(MODES[mode].gradients for mode in modes)
    keep = partial(case.keep, device=device)

    def formula(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return op.formula(q, k, v, keep, **case.modifiers(q.shape[-2], device))

    sample = Float64Sample(formula, keep, q, k, v, dout if backward else None)

    def error_of(result: Any, mode: str) -> float:
        gradients = MODES[mode].gradients
        return sample.gradient_error(result, gradients) if gradients else sample.error(result)

    measurements = []
    for mode in modes:
        measurement = Measurement(op.name, case, mode, dtype, case.bound_speedup(device))
        calls = {}
        with determinism(mode):
            for name, contestant in {OURS: op.ours, **peers}.items():
                try:
                    call = prepare(contestant.build(case), q, k, v, dout, mode)
                    result = call()
                    if not contestant.yardstick:
                        measurement.errors[name] = error_of(result, mode)
                    calls[name] = call
                except UnsupportedCaseError as error:
                    measurement.troubles[name] = str(error)
                except Exception as error:  # a peer's failure, whatever it is, must not cost the others theirs
                    measurement.troubles[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            if calls:
                measurement.times = interleaved_times(calls, device, seconds)
        measurements.append(measurement)
    return measurements


@contextmanager
def determinism(mode: str) -> Iterator[None]:
    """Tells torch if the mode wants it, which ours and its peers follow."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would be timed
    torch.use_deterministic_algorithms(MODES[mode].deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def prepare(attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mode: str) -> Callable[[], Any]:
    """The call to be timed. Its result is the output, or the mode's gradients."""
    if mode == "fwd":
        return lambda: attention(q, k, v)
    named = zip("qkv", (q, k, v), strict=True)
    inputs = [x.detach().requires_grad_(name in MODES[mode].gradients) for name, x in named]
    wanted = [x for x in inputs if x.requires_grad]
    if mode == "fwd+bwd":
        return lambda: torch.autograd.grad(attention(*inputs), wanted, dout)
    out = attention(*inputs)
    return lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)


def main(
    op: Annotated[list[str] | None, typer.Option(help="Measure this op; may be repeated; all by default.")] = None,
    cases: Annotated[str, typer.Option(help="Run the listed cases whose name matches this regular expression.")] = "",
    case: Annotated[list[str] | None, typer.Option(help="Run this case, listed or not; may be repeated.")] = None,
    modes: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(MODES)}.")] = "fwd,bwd",
    dtypes: Annotated[str, typer.Option(help="Comma-separated; bf16 on a GPU and fp32,bf16 on a CPU by default.")] = "",
    peers: Annotated[str, typer.Option(help="Comma-separated; all that can be imported by default.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda; by default the GPU where its kernels run.")] = "",
    seconds: Annotated[float, typer.Option(help="Time spent on timing each case in each mode.")] = 2,
    output: Annotated[Path, typer.Option(help="Folder of the records.")] = records.RESULTS,
    show: Annotated[bool, typer.Option("--list", help="Print the names of the cases and stop.")] = False,
) -> None:
    """Measure fastattn's ops and their peers on the same inputs, in turns."""
    where = chosen_device(device)
    ops = [OPS[name] for name in pick("--op", op or list(OPS), OPS)]
    chosen = chosen_cases(ops, where.type, cases, case or [])
    if show:
        for its_op, each in chosen:
            typer.echo(f"{its_op.name} {each.name}")
        return
    console = Console() if sys.stdout.isatty() else Console(width=150)  # a log has room for the table
    racing = chosen_peers(ops, where.type, peers, console)
    chosen_modes = pick("--modes", modes.split(","), MODES)
    default_dtypes = "bf16" if where.type == "cuda" else "fp32,bf16"
    chosen_dtypes = pick("--dtypes", (dtypes or default_dtypes).split(","), DTYPES)
    if where.type == "cpu" and (load := os.getloadavg()[0]) > 0.5:
        console.print(f"This machine is busy (load {load:.1f}): times will vary, ratios less so", style="yellow")
    commit, machine = records.commit(), records.machine(where)
    console.print(f"{machine.get('gpu') or machine['cpu']}: matrix products at {machine['gemm_tflops']:.4g} TFLOP/s")

    measurements: list[Measurement] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(chosen) * len(chosen_dtypes))
        for dtype in chosen_dtypes:
            for its_op, each in chosen:
                progress.update(task, description=f"{its_op.name} {each.name} {dtype}")
                its_modes = [mode for mode in chosen_modes if mode in its_op.modes_of(each)]
                new = measure(its_op, each, dtype, its_modes, racing[its_op.name], where, seconds)
                path = records.path(output, its_op.name, machine)
                records.merge(path, [m.record(machine, commit) for m in new if OURS in m.times])
                measurements += new
                progress.advance(task)
    for name in dict.fromkeys(m.op for m in measurements):
        console.print(table([m for m in measurements if m.op == name], [OURS, *racing[name]]))
        console.print(f"Records: {records.path(output, name, machine)}")

    troubles = [(m, name, text) for m in measurements for name, text in m.troubles.items()]
    for m, name, text in troubles:
        console.print(
            f"{name} did not run {m.op} {m.case.name} {m.mode} {m.dtype}: {text}", style="yellow", markup=False
        )
    if any(name == OURS or name in peers.split(",") for _, name, _ in troubles):
        raise typer.Exit(1)


def chosen_device(name: str) -> torch.device:
    pick("--device", [name or "cpu"], ("cpu", "cuda"))
    if name == "cuda" and (obstacle := gpu_obstacle()):
        raise typer.BadParameter(obstacle, param_hint="--device")
    return torch.device(name) if name else best_device()


def chosen_cases(ops: list[Op], device: str, pattern: str, names: list[str]) -> list[tuple[Op, Case]]:
    """The cases named, each for every op that has such; or the listed ones that match the pattern."""
    for name in names:
        if not any(op.kind.is_name(name) for op in ops):
            forms = " or ".join(dict.fromkeys(op.kind.FORM for op in ops))
            raise typer.BadParameter(f"case {name!r} is not of the form {forms}", param_hint="--case")
    if names:
        return [(op, op.kind.parse(name)) for op in ops for name in names if op.kind.is_name(name)]
    chosen = [(op, op.kind.parse(name)) for op in ops for name in op.cases[device] if re.search(pattern, name)]
    if not chosen:
        raise typer.BadParameter(f"{pattern!r} matches no case of --list", param_hint="--cases")
    return chosen


def pick(option: str, names: list[str], allowed: Iterable[str]) -> list[str]:
    for name in names:
        if name not in allowed:
            raise typer.BadParameter(f"{name!r}; allowed: {', '.join(allowed)}", param_hint=option)
    return names


def chosen_peers(ops: list[Op], device: str, text: str, console: Console) -> dict[str, dict[str, Contestant]]:
    """For each op, those of the peers asked for that race it, which must be there; or all that are there."""
    known = {name: peer for op in ops for name, peer in op.peers[device].items()}
    absent = absent_peers(known)
    names = pick("--peers", text.split(","), known) if text else [name for name in known if name not in absent]
    for name in names:
        if name in absent:
            raise typer.BadParameter(f"{name} cannot be imported: {absent[name]}", param_hint="--peers")
    if not text:
        for name, reason in absent.items():
            console.print(f"Absent: {name} ({reason})", style="yellow", markup=False)
    return {op.name: {name: peer for name, peer in op.peers[device].items() if name in names} for op in ops}


def absent_peers(peers: Mapping[str, Contestant]) -> dict[str, str]:
    """Those of the peers that cannot be imported here, and why."""
    absent = {}
    for name, peer in peers.items():
        try:
            importlib.import_module(peer.module)
        except ImportError as error:
            absent[name] = str(error)
    return absent


def table(measurements: list[Measurement], names: list[str]) -> Table:
    title = f"{measurements[0].op}: times in ms, and relative errors against float64"
    result = Table(title=title, header_style="bold")
    for heading in ("case", "mode", "dtype"):
        result.add_column(heading, no_wrap=True)
    for heading in ("TFLOP/s", *names):
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("best peer / ours", justify="right")
    is_sparse = OURS_DENSE in names
    if is_sparse:
        result.add_column("dense / ours, of bound", justify="right")
    for m in measurements:
        ratio = m.ratio
        result.add_row(
            m.case.name,
            m.mode,
            m.dtype,
            f"{m.tflops:.4g}" if OURS in m.times else "–",
            *(cell(m, name) for name in names),
            "–" if ratio is None else f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}[/]",
            *([records.of_bound(m.speedup, m.bound_speedup)] if is_sparse else []),
        )
    return result


def cell(measurement: Measurement, name: str) -> str:
    if name not in measurement.times:
        return "–"
    time = f"{measurement.times[name] / 1e3:.4g}"
    return f"{time}\n{measurement.errors[name]:.1e}" if name in measurement.errors else time


if __name__ == "__main__":
    typer.run(main)
