"""block_sparse_attention: lists as a selector leaves them, against our own dense attention of the same inputs."""

import re
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import BlockList, reference
from fastattn.measure import Part

from . import attention
from .attention import compiled_flex_attention, transposed
from .op import Attention, Case, Contestant, Op, UnsupportedCaseError


@dataclass(frozen=True)
class ListedCase(Case):
    """`keep25` lists a quarter of the blocks, others for each head; which ones a hash decides, here as in C++."""

    seq_q: int
    seq_k: int
    block_size: tuple[int, int]
    percent: int
    causal: bool

    FORM = "b1_s4096[x8192]_h8[_kv2]_d64_blocks128x128_keep25[_causal]"
    TOKENS = r"s(?P<seq_q>\d+)(x(?P<seq_k>\d+))?"
    MASK = r"_blocks(?P<block_q>64|128|192)x(?P<block_k>64|128)_keep(?P<percent>\d+)(_(?P<causal>causal))?"

    @classmethod
    def _fields(cls, match: re.Match[str]) -> dict[str, Any]:
        return {
            "seq_q": int(match["seq_q"]),
            "seq_k": int(match["seq_k"] or match["seq_q"]),
            "block_size": (int(match["block_q"]), int(match["block_k"])),
            "percent": int(match["percent"]),
            "causal": bool(match["causal"]),
        }

    @property
    def q_tokens(self) -> tuple[int, ...]:
        return (self.seq_q,)

    @property
    def k_tokens(self) -> tuple[int, ...]:
        return (self.seq_k,)

    def is_listed(self, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        x = (head << 20 | row << 10) + column
        for _ in range(2):
            x = (x ^ (x >> 16)) * 0x45D9F3B & 0xFFFFFFFF
        return (x ^ (x >> 16)) % 100 < self.percent

    def blocks(self, device: torch.device) -> BlockList:
        return BlockList.from_predicate(
            lambda b, h, i, j: self.is_listed(h, i, j),
            seq_q=self.seq_q,
            seq_k=self.seq_k,
            heads=self.heads,
            block_size=self.block_size,
            causal=self.causal,
            device=device,
        )

    @property
    def density(self) -> float:
        return float(self.blocks(torch.device("cpu")).density.double().mean())

    def bound_speedup(self, device: torch.device) -> float | None:
        every = BlockList.dense(
            seq_q=self.seq_q, seq_k=self.seq_k, block_size=self.block_size, causal=self.causal
        ).counts.double()
        return float(every.mean() / self.blocks(torch.device("cpu")).counts.double().mean())

    def keep(self, part: Part, device: torch.device) -> Tensor:
        head = torch.arange(self.heads, device=device)[part.heads, None, None]
        row = torch.arange(self.seq_q, device=device)[part.queries, None] // self.block_size[0]
        column = torch.arange(self.seq_k, device=device) // self.block_size[1]
        band = reference.band_mask(self.seq_q, self.seq_k, causal=self.causal, queries=part.queries, device=device)
        return self.is_listed(head, row, column) & band

    @property
    def described_tokens(self) -> str:
        return f"S {self.seq_q}" if self.seq_q == self.seq_k else f"S {self.seq_q}×{self.seq_k}"

    @property
    def described_mask(self) -> str:
        size_q, size_k = self.block_size
        return f"{self.percent} % of blocks {size_q}×{size_k}" + (", causal" if self.causal else "")


def ours(case: ListedCase) -> Attention:
    blocks = cache(case.blocks)  # made by the first call, which is not timed
    return lambda q, k, v: fastattn.block_sparse_attention(q, k, v, blocks(q.device))


def _dense(case: ListedCase) -> Attention:
    return partial(fastattn.attention, causal=case.causal)


def _eager(case: ListedCase) -> Attention:
    if case.scores > 1 << 30:
        raise UnsupportedCaseError("its matrices of scores take too much memory")
    blocks = cache(case.blocks)
    return lambda q, k, v: reference.block_sparse_attention(q, k, v, blocks(q.device))[0]


def _flex(case: ListedCase) -> Attention:
    compiled = compiled_flex_attention()
    masks = cache(lambda device: case.blocks(device).to_block_mask())
    grouped = case.kv_heads != case.heads
    return transposed(lambda q, k, v: compiled(q, k, v, block_mask=masks(q.device), enable_gqa=grouped))


DENSE = Contestant(_dense, yardstick=True)

OP = Op(
    name="block_sparse_attention",
    kind=ListedCase,
    formula=attention.formula,
    ours=Contestant(ours),
    peers={
        "cpu": {"ours_dense": DENSE, "eager": Contestant(_eager)},
        "cuda": {"ours_dense": DENSE, "flex": Contestant(_flex, module="triton")},
    },
    cases={
        "cpu": (
            "b1_s4096_h8_d64_blocks128x128_keep25",
            "b1_s4096_h8_d64_blocks128x128_keep10",
            "b1_s4096_h8_d64_blocks128x128_keep25_causal",
            "b1_s4096_h8_d64_blocks64x64_keep25",
        ),
        "cuda": (
            "b1_s32768_h16_d128_blocks128x128_keep50",
            "b1_s32768_h16_d128_blocks128x128_keep25",
            "b1_s32768_h16_d128_blocks128x128_keep10",
            "b1_s32768_h16_d128_blocks128x128_keep5",
            "b1_s32768_h16_d128_blocks128x128_keep25_causal",
            "b1_s32768_h16_d128_blocks64x64_keep25",
            "b1_s32768_h16_d64_blocks128x128_keep10",
            "b1_s32768_h16_d64_blocks192x128_keep10",
            "b1_s32768_h16_d64_blocks64x64_keep25",
        ),
    },
)
