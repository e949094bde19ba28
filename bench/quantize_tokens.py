"""python -m bench.quantize_tokens: the op, the same steps in torch, and a copy that moves as many bytes, in turns.

The op multiplies no matrices, so what counts are bytes, and the yardstick is the copy.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastattn import QuantizedTokens, quantize_tokens
from fastattn.info import best_device
from fastattn.measure import interleaved_times
from fastattn.quantize_tokens import Format

LARGEST = {"int8": 127, "int4": 7, "fp8": 448}


@dataclass(frozen=True)
class Case:
    name: str
    format: Format
    group: int | None = None
    smooth: bool = False
    transpose: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"format": self.format, "group": self.group, "smooth": self.smooth, "transpose": self.transpose}

    def bytes_moved(self, x: Tensor, results: QuantizedTokens) -> int:
        """What must be read and written: with a mean or a transposition the tokens are read twice."""
        reads = 2 if self.smooth or self.transpose else 1
        return reads * x.nbytes + results.values.nbytes + results.scales.nbytes


VIDEO = (1, 65536, 32, 128)  # [batch, tokens, heads, head_dim]; tokens are a multiple of 128
CASES = (
    Case("queries", "int8", group=1),
    Case("keys", "int8", group=32, smooth=True),
    Case("keys in 4 bits", "int4", group=16, smooth=True),
    Case("values", "fp8", transpose=True),
    Case("smoothed values", "int8", smooth=True, transpose=True),
)


def eager(x: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Values and scales as `quantize_tokens` lays them out, in torch."""
    x = x.float()
    if case.smooth:
        x = x - x.mean(1, keepdim=True)
    batch, tokens, heads, dim = x.shape
    if case.transpose:
        x = x.permute(0, 2, 3, 1)
        largest = x.abs().amax(-1, keepdim=True)
        scales = largest[..., 0]
    else:
        size = case.group or 1
        x = x.unflatten(
            1, (-1, 1, 1, 1) if size == 1 else (-1, size // 2, 4, 2)
        )  # runs, pairs in a group, groups, pairs
        largest = x.abs().amax((2, 4, 6), keepdim=True)
        scales = largest[:, :, 0, :, 0, :, 0].flatten(1, 2).transpose(1, 2)
    values = x * (LARGEST[case.format] / largest)
    values = values.to(torch.float8_e4m3fn) if case.format == "fp8" else values.round().to(torch.int8)
    if case.transpose:
        values = values.unflatten(-1, (-1, 2, 4, 2)).transpose(-2, -3).flatten(-4)  # tokens 0, 1, 8, 9, 2, … of each 16
    else:
        values = values.reshape(batch, tokens, heads, dim)
    if case.format == "int4":
        values = (values[..., ::2] & 15 | values[..., 1::2] << 4).view(torch.uint8)
    return values.contiguous(), scales / LARGEST[case.format]


def measure(case: Case, shape: tuple[int, ...], device: torch.device, seconds: float) -> tuple[int, dict[str, float]]:
    """Bytes that are moved, and microseconds of each contestant."""
    x = torch.randn(shape, device=device).to(torch.bfloat16)
    count = case.bytes_moved(x, quantize_tokens(x, **case.options))
    source, target = torch.empty(2, count // 2, device=device, dtype=torch.uint8)
    calls = {
        "fastattn": lambda: quantize_tokens(x, **case.options),
        "torch": lambda: eager(x, case),
        "copy": lambda: target.copy_(source),
    }
    return count, interleaved_times(calls, device, seconds)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda; the GPU if there is one that fastattn can use")] = "",
    seconds: Annotated[float, typer.Option(help="time spent on each case")] = 2,
) -> None:
    """Times of `quantize_tokens` of bf16 tokens beside torch's, and the share of the rate of a copy that it reaches."""
    place = torch.device(device) if device else best_device()
    shape = VIDEO if place.type == "cuda" else (1, 4096, 8, 128)
    table = Table(title=f"quantize_tokens of {list(shape)} on {place}: times in ms", header_style="bold")
    for heading in ("case", "fastattn", "GB/s", "of a copy", "torch", "torch / ours"):
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    for case in CASES:
        count, times = measure(case, shape, place, seconds)
        ours = times["fastattn"]
        table.add_row(
            f"{case.name}, {case.format}",
            f"{ours / 1e3:.4g}",
            f"{count / ours * 1e-3:.4g}",
            f"{times['copy'] / ours:.0%}",
            f"{times['torch'] / 1e3:.4g}",
            f"{times['torch'] / ours:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
