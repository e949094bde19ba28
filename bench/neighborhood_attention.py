"""neighborhood_attention: one to three dimensions, against our own dense attention and FlexAttention."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import fastattn
from fastattn.measure import Part

from . import attention
from .attention import compiled_flex_attention, transposed
from .op import Attention, Case, Contestant, Op

PER_AXIS = r"\d+(x\d+){0,2}"


@dataclass(frozen=True)
class Axis:
    """What a query sees along one axis."""

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool

    def span(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The positions that a query sees in its dilation group: the first, and the one past the last."""
        position = query // self.dilation
        length = (self.length - query % self.dilation + self.dilation - 1) // self.dilation
        width = length.clamp(max=self.window)
        offset = self.stride - 1 if self.causal else self.stride // 2
        leader = (position // self.stride * self.stride + offset).minimum(length - 1)  # whose window the group shares
        if self.causal:
            return (leader - width + 1).clamp(min=0), position + 1
        begin = (leader - width // 2).minimum(length - width).clamp(min=0)
        return begin, begin + width

    def keeps(self, query: Tensor, key: Tensor) -> Tensor:
        begin, end = self.span(query)
        position = key // self.dilation
        return (query % self.dilation == key % self.dilation) & (begin <= position) & (position < end)

    @property
    def density(self) -> float:
        begin, end = self.span(torch.arange(self.length))
        return float((end - begin).double().mean()) / self.length


@dataclass(frozen=True)
class NeighborhoodCase(Case):
    """`_s` is the stride, `_dil` the dilation, `_causal100` causal along the first of three axes."""

    axes: tuple[Axis, ...]

    FORM = "b1_30x48x80_h24[_kv8]_d128_w18x24x24[_s2x8x8][_dil1x2x2][_causal100]"
    TOKENS = rf"(?P<lengths>{PER_AXIS})"
    MASK = (
        rf"_w(?P<window>{PER_AXIS})(_s(?P<stride>{PER_AXIS}))?"
        rf"(_dil(?P<dilation>{PER_AXIS}))?(_causal(?P<causal>[01]{{1,3}}))?"
    )

    @classmethod
    def _fields(cls, match: re.Match[str]) -> dict[str, Any]:
        lengths = match["lengths"].split("x")
        ones, zeros = ["1"] * len(lengths), ["0"] * len(lengths)
        options = [text.split("x") if text else ones for text in match.group("window", "stride", "dilation")]
        options.append(list(match["causal"] or zeros))
        if any(len(values) != len(lengths) for values in options):
            raise ValueError(f"case {match.string!r} names different numbers of axes")
        axes = zip(lengths, *options, strict=True)
        return {"axes": tuple(Axis(*map(int, rest), causal == "1") for *rest, causal in axes)}

    def keeps(self, query: Tensor, key: Tensor) -> Tensor:
        """Of tokens in row-major order."""
        keep = torch.ones((), dtype=torch.bool, device=query.device)
        for axis in reversed(self.axes):
            keep = keep & axis.keeps(query % axis.length, key % axis.length)
            query, key = query // axis.length, key // axis.length
        return keep

    @property
    def q_tokens(self) -> tuple[int, ...]:
        return tuple(axis.length for axis in self.axes)

    @property
    def k_tokens(self) -> tuple[int, ...]:
        return self.q_tokens

    @property
    def density(self) -> float:
        return math.prod(axis.density for axis in self.axes)

    def keep(self, part: Part, device: torch.device) -> Tensor:
        tokens = torch.arange(math.prod(self.q_tokens), device=device)
        return self.keeps(tokens[part.queries, None], tokens)

    def bound_speedup(self, device: torch.device) -> float | None:
        plan = fastattn.plan(self.q_tokens, **self.mask, head_dim=self.head_dim, device=device.type)
        return plan.best.speedup_by_mean

    @property
    def described_tokens(self) -> str:
        return _product(self.q_tokens)

    @property
    def described_mask(self) -> str:
        words = [f"window {_product([axis.window for axis in self.axes])}"]
        words += [
            f"{word} {_product(values)}"
            for word, values in (
                ("stride", [axis.stride for axis in self.axes]),
                ("dilation", [axis.dilation for axis in self.axes]),
            )
            if set(values) != {1}
        ]
        words += [f"causal along axis {i}" for i, axis in enumerate(self.axes) if axis.causal]
        return ", ".join(words)

    @property
    def mask(self) -> dict[str, Any]:
        names = ("window", "stride", "dilation", "causal")
        return {name: tuple(getattr(axis, name) for axis in self.axes) for name in names}


def _product(values: Sequence[int]) -> str:
    return "×".join(map(str, values))


def ours(case: NeighborhoodCase) -> Attention:
    return partial(fastattn.neighborhood_attention, **case.mask)


def _of_sequences(case: NeighborhoodCase, attention: Attention) -> Attention:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(*(x.flatten(1, -3) for x in (q, k, v))).unflatten(1, case.q_tokens)

    return call


def _dense(case: NeighborhoodCase) -> Attention:
    return _of_sequences(case, fastattn.attention)


def _flex(case: NeighborhoodCase) -> Attention:
    compiled = compiled_flex_attention()
    tokens = math.prod(case.q_tokens)
    grouped = case.kv_heads != case.heads

    def keeps(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return case.keeps(q, k)

    @cache
    def block_mask(device: torch.device) -> BlockMask:
        # Compiled, for the mask of all scores does not fit into memory.
        return torch.compile(create_block_mask)(keeps, None, None, tokens, tokens, device=device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=block_mask(q.device), enable_gqa=grouped)

    return _of_sequences(case, transposed(call))


DENSE = Contestant(_dense, yardstick=True)

OP = Op(
    name="neighborhood_attention",
    kind=NeighborhoodCase,
    formula=attention.formula,
    ours=Contestant(ours),
    peers={"cpu": {"ours_dense": DENSE}, "cuda": {"ours_dense": DENSE, "flex": Contestant(_flex, module="triton")}},
    cases={
        "cpu": ("b1_8x16x32_h8_d64_w4x8x8_s2x4x4", "b1_4096_h8_d64_w512_s64"),
        "cuda": (
            "b1_30x48x80_h24_d128_w18x24x24_s2x8x8",
            "b1_30x48x80_h24_d128_w18x24x24",
            "b1_256x256_h24_d128_w80x80_s16x16",
            "b1_256x256_h24_d128_w80x80",
            "b1_32768_h24_d128_w2048_s256",
            "b1_32768_h24_d128_w2048",
            "b1_30x32x32_h24_d128_w30x32x32_causal100",
            "b1_30x32x32_h24_d128_w18x16x16_s2x8x8_causal100",
        ),
    },
)
