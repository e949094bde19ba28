"""python -m bench.call_overhead: what a call costs the CPU, beside its peers and its own parts, in turns.

The problem is so small that a GPU is done before it is asked for more. What counts is the time of a loop of calls until
the last has returned; the GPU is waited for before and after that, and no loop is long enough to fill its queue.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from timeit import timeit
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fastattn
from fastattn.measure import Call, interleaved_times

from . import records
from .__main__ import OURS, absent_peers, chosen_device, prepare
from .attention import OP, AttentionCase
from .op import Attention

NAME = "call_overhead"
CASES = {"cpu": "b1_s1_h1_d8", "cuda": "b1_s128_h16_d128"}
DTYPES = {"cpu": ("fp32", torch.float32), "cuda": ("bf16", torch.bfloat16)}
MODES = ("fwd", "fwd, grad", "fwd+bwd")
CALLS = 100
"""In a loop. A forward and a backward launch fewer than ten kernels, and a GPU's queue takes a thousand."""
PARTS = {
    "op": "the op by itself, or both ops without autograd",
    "overload": "the same, the overload named",
    "results": "memory for the results and nothing else",
}


def measure(
    mode: str, case: AttentionCase, device: torch.device, peers: dict[str, Attention], seconds: float
) -> dict[str, float]:
    """Microseconds of each contestant and each part."""
    q, k, v = case.inputs(device, DTYPES[device.type][1])
    dout = torch.ones_like(q)
    torchs = [x.transpose(1, 2).contiguous() for x in (q, k, v, dout)]  # in its own layout
    if mode == "fwd, grad":
        for x in (q, k, v, *torchs[:3]):
            x.requires_grad_()
    timed = "fwd+bwd" if mode == "fwd+bwd" else "fwd"
    calls = {
        **{name: prepare(each, q, k, v, dout, timed) for name, each in {OURS: fastattn.attention, **peers}.items()},
        "sdpa": prepare(scaled_dot_product_attention, *torchs, timed),
        **parts(q, k, v, dout, timed),
    }
    return interleaved_times(calls, device, seconds, clock=wall_clock(device))


def wall_clock(device: torch.device) -> Callable[[Call], float]:
    """Of one call until it returns, whatever the device has left to do."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def clock(call: Call) -> float:
        synchronize()
        elapsed = timeit(call, number=CALLS)
        synchronize()
        return elapsed / CALLS * 1e6

    return clock


def parts(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, timed: str) -> dict[str, Call]:
    """What a call of ours is made of; see PARTS."""
    forward, backward = torch.ops.fastattn.attention, torch.ops.fastattn.attention_backward

    def calling(forward: Any, backward: Any) -> Call:
        if timed == "fwd":
            return lambda: forward(q, k, v)
        return lambda: backward(dout, None, q, k, v, *forward(q, k, v))

    def results() -> Any:
        batch, seq, heads, _ = q.shape
        outputs = q.new_empty(q.shape), q.new_empty((batch, heads, seq), dtype=torch.float32)
        return outputs if timed == "fwd" else (outputs, *(x.new_empty(x.shape) for x in (q, k, v)))

    return {
        "op": calling(forward, backward),
        "overload": calling(forward.default, backward.default),
        "results": results,
    }


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda; by default the GPU where its kernels run.")] = "",
    seconds: Annotated[float, typer.Option(help="Time spent on timing each mode.")] = 5,
    output: Annotated[Path, typer.Option(help="Folder of the record.")] = records.RESULTS,
) -> None:
    """Microseconds of CPU time a call: fastattn, its peers and its parts."""
    place = chosen_device(device)
    torch.set_num_threads(1)  # waking others would be most of a call on a CPU
    case = AttentionCase.parse(CASES[place.type])
    console = Console() if sys.stdout.isatty() else Console(width=150)  # a log has room for the table
    peers = {name: peer for name, peer in OP.peers[place.type].items() if name == "fa4"}
    absent = absent_peers(peers)
    for name, reason in absent.items():
        console.print(f"Absent: {name} ({reason})", style="yellow", markup=False)
    racing = {name: peer.build(case) for name, peer in peers.items() if name not in absent}

    shared = {
        "case": case.name,
        "dtype": DTYPES[place.type][0],
        "shape": case.shape,
        "commit": records.commit(),
        "machine": records.machine(place),
    }
    table = Table(
        title=f"Call overhead on {place}, {case.described}: microseconds a call",
        caption="; ".join(f"{name}: {meaning}" for name, meaning in PARTS.items()),
        header_style="bold",
    )
    table.add_column("mode", no_wrap=True)
    for name in (OURS, *racing, "sdpa", *PARTS):
        table.add_column(name, justify="right")
    path = records.path(output, NAME, shared["machine"])
    for mode in MODES:
        times = measure(mode, case, place, racing, seconds)
        table.add_row(mode, *(f"{time:.3g}" for time in times.values()))
        records.merge(path, [{**shared, "mode": mode, "times_us": {n: round(time, 2) for n, time in times.items()}}])
    console.print(table)
    console.print(f"Record: {path}")


if __name__ == "__main__":
    typer.run(main)
