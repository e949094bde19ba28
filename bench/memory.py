"""python -m bench.memory: GPU memory that attention takes beside its inputs and results, and that of its peers."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastattn.info import gpu_obstacle

from . import records
from .__main__ import OURS, absent_peers, determinism, prepare
from .attention import OP, AttentionCase
from .op import Contestant

NAME = "memory"
CASES = (
    "b4_s4096_h32_d64_causal",
    "b4_s4096_h16_d128_causal",
    "b4_s4096_h8_d256_causal",
    "b1_s16384_h32_d64_causal",
    "b1_s16384_h16_d128_causal",
    "b1_s16384_h8_d256_causal",
)
MODES = ("fwd", "bwd", "bwd_deterministic")
PEERS = ("cudnn", "fa2", "fa4")
MEANING = (
    "MiB that a call takes at the most beside its inputs and its results: the output of a forward whose inputs require "
    "grad, which also leaves what the backward needs of it; the gradients of a backward."
)


def measure(
    case: AttentionCase, mode: str, contestants: dict[str, Contestant], device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """MiB of each contestant, and why others have none."""
    q, k, v = (x.requires_grad_() for x in case.inputs(device, torch.bfloat16))
    dout = torch.ones_like(q)
    mib, troubles = {}, {}
    for name, contestant in contestants.items():
        try:
            with determinism(mode):
                call = prepare(contestant.build(case), q, k, v, dout, mode)
                call()  # what libraries allocate once and keep is not counted
                mib[name] = round(extra_bytes(call) / 2**20, 3)
        except Exception as error:  # a peer's failure, whatever it is, must not cost the others theirs
            troubles[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return mib, troubles


def extra_bytes(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> int:
    """The most that it asks for at once, without its results."""
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    result = call()
    results = (result,) if isinstance(result, Tensor) else result
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    return peak - before - sum(x.untyped_storage().nbytes() for x in results)


def main(output: Annotated[Path, typer.Option(help="Folder of the record.")] = records.RESULTS) -> None:
    """MiB of GPU memory that attention and its peers take beside inputs and results."""
    if obstacle := gpu_obstacle():
        typer.echo(f"torch counts a GPU's memory, not a CPU's: {obstacle}", err=True)
        raise typer.Exit(1)
    device = torch.device("cuda")
    console = Console() if sys.stdout.isatty() else Console(width=150)  # a log has room for the table
    peers = {name: OP.peers["cuda"][name] for name in PEERS}
    absent = absent_peers(peers)
    for name, reason in absent.items():
        console.print(f"Absent: {name} ({reason})", style="yellow", markup=False)
    racing = {OURS: OP.ours, **{name: peer for name, peer in peers.items() if name not in absent}}

    commit, machine = records.commit(), records.machine(device)
    path = records.path(output, NAME, machine)
    table = Table(title="attention: MiB beside inputs and results", header_style="bold")
    for heading in ("case", "mode"):
        table.add_column(heading, no_wrap=True)
    for name in racing:
        table.add_column(name, justify="right")
    for case in map(AttentionCase.parse, CASES):
        for mode in MODES:
            mib, troubles = measure(case, mode, racing, device)
            for name, text in troubles.items():
                console.print(f"{name} did not run {case.name} {mode}: {text}", style="yellow", markup=False)
            table.add_row(case.name, mode, *(f"{mib[name]:.3g}" if name in mib else "–" for name in racing))
            shared = {"case": case.name, "dtype": "bf16", "mode": mode, "shape": case.shape}
            records.merge(path, [{**shared, "mib": mib, "commit": commit, "machine": machine}])
    console.print(table)
    console.print(f"Record: {path}")


if __name__ == "__main__":
    typer.run(main)
