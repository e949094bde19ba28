"""python -m bench.estimate_blocks: where SALE's time goes, beside the dense attention that it replaces, in turns."""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastattn import BlockList, attention, block_sparse_attention
from fastattn.estimate_blocks import selector
from fastattn.info import best_device
from fastattn.measure import interleaved_times
from fastattn.structured import Structured


@dataclass(frozen=True)
class Case:
    """Structured inputs, causal, blocks of 128 x 128."""

    seq: int
    bits: Literal[4, 8] = 4
    smooth_queries: bool = True
    query_stride: int = 1
    threshold: float = 0.008
    heads: int = 32  # the shape of Llama 3.1 8B
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def name(self) -> str:
        plain = "" if self.smooth_queries else ", plain"
        judged = "" if self.query_stride == 1 else f", 1 of {self.query_stride}"
        return f"S {self.seq}, τ {self.threshold:g}, {self.bits} bits{plain}{judged}"


ESTIMATES: tuple[tuple[Literal[4, 8], bool], ...] = ((4, True), (8, False))  # where fewer queries are judged
SMALL = partial(Case, threshold=0.03, heads=4, kv_heads=1)
CASES = {
    "cpu": (SMALL(4096), SMALL(4096, smooth_queries=False), SMALL(4096, 8, False), SMALL(8192)),
    "cuda": (
        *(Case(seq) for seq in (8192, 16384, 32768)),
        *(Case(65536, *estimate, query_stride) for estimate in ESTIMATES for query_stride in (1, 2, 4)),
    ),
}


def measure(case: Case, device: torch.device, seconds: float) -> tuple[float, dict[str, float]]:
    """The share of the causal blocks that is listed, and the microseconds of each step."""
    sizes = {"heads": case.heads, "kv_heads": case.kv_heads, "head_dim": case.head_dim}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = Structured(case.seq, **sizes).inputs(str(device), dtype)
    prepare = partial(
        selector,
        q,
        k,
        block_size=(128, 128),
        sink=1,
        window=2,
        causal=True,
        scale=None,
        bits=case.bits,
        smooth_queries=case.smooth_queries,
        query_stride=case.query_stride,
    )
    select = prepare()
    blocks = select(case.threshold)
    every = BlockList.dense(seq_q=case.seq, seq_k=case.seq, causal=True, device=device)
    calls = {
        "prepare": prepare,
        "estimate": lambda: select(case.threshold),
        "attend": lambda: block_sparse_attention(q, k, v, blocks),
        "dense": lambda: attention(q, k, v, causal=True),
    }
    listed = float(blocks.counts.double().mean() / every.counts.double().mean())
    return listed, interleaved_times(calls, device, seconds, fewest_rounds=3)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda; the GPU if there is one that fastattn can use")] = "",
    seconds: Annotated[float, typer.Option(help="time spent on each case")] = 2,
) -> None:
    """Times of SALE's steps, and of dense attention."""
    place = torch.device(device) if device else best_device()
    table = Table(
        title=f"SALE on {place}: times in ms",
        caption="prepare: near blocks and quantization; attend: the listed blocks; plain: queries not smoothed; "
        "1 of 2: every second query is judged",
        header_style="bold",
    )
    for heading in ("case", "listed", "prepare", "estimate", "of dense", "attend", "dense", "speedup"):
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    for case in CASES[place.type]:
        listed, times = measure(case, place, seconds)
        dense = times["dense"]
        steps = {name: time for name, time in times.items() if name != "dense"}
        table.add_row(
            case.name,
            f"{listed:.0%}",
            f"{steps['prepare'] / 1e3:.4g}",
            f"{steps['estimate'] / 1e3:.4g}",
            f"{steps['estimate'] / dense:.0%}",
            f"{steps['attend'] / 1e3:.4g}",
            f"{dense / 1e3:.4g}",
            f"{dense / sum(steps.values()):.2f}",
        )
    console = Console() if sys.stdout.isatty() else Console(width=150)  # a log has room for the table
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
