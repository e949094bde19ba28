"""paro_attention: video tokens in each head's own order, and random blocks of them, against our own dense attention."""

import re
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.measure import Part
from fastattn.paro import ORDERS, ParoLayer, token_order, tokens_of_blocks

from . import attention
from .block_sparse_attention import DENSE
from .op import Attention, Case, Contestant, Op


@dataclass(frozen=True)
class VideoCase(Case):
    """`blocks128x128_keep30` lists that share of the blocks of video, others for each head, and all that hold text.

    Heads take the orders in turns. `_int8_fp8` is what queries and keys, and values, are rounded to.
    """

    grid: tuple[int, int, int]
    text: int
    block_size: tuple[int, int]
    percent: int
    formats: tuple[str, str] | None
    causal = False

    FORM = "b1_21x45x80[_text226]_h40_d128_blocks128x128_keep30[_int8_fp8]"
    TOKENS = r"(?P<grid>\d+x\d+x\d+)(_text(?P<text>\d+))?"
    MASK = (
        r"_blocks(?P<block_q>64|128|192)x(?P<block_k>64|128)_keep(?P<percent>\d+)"
        r"(_(?P<qk>int8|int4|fp8)_(?P<pv>int8|fp8|bf16))?"
    )

    @classmethod
    def _fields(cls, match: re.Match[str]) -> dict[str, Any]:
        return {
            "grid": tuple(map(int, match["grid"].split("x"))),
            "text": int(match["text"] or 0),
            "block_size": (int(match["block_q"]), int(match["block_k"])),
            "percent": int(match["percent"]),
            "formats": (match["qk"], match["pv"]) if match["qk"] else None,
        }

    @property
    def seq(self) -> int:
        frames, height, width = self.grid
        return self.text + frames * height * width

    @property
    def q_tokens(self) -> tuple[int, ...]:
        return (self.seq,)

    @property
    def k_tokens(self) -> tuple[int, ...]:
        return (self.seq,)

    @cached_property
    def mask(self) -> Tensor:
        """Which blocks are kept, bool ``[heads, query blocks, key blocks]``."""
        rows, columns = (-(-self.seq // size) for size in self.block_size)
        random = torch.Generator().manual_seed(0)
        kept = torch.rand(self.heads, rows, columns, generator=random) < self.percent / 100
        if self.text:
            first_row, first_column = ((self.seq - self.text) // size for size in self.block_size)
            kept[:, first_row:], kept[:, :, first_column:] = True, True
        return kept

    @cached_property
    def tokens(self) -> Tensor:
        """Those of each head in its order, ``[heads, seq]``."""
        orders = [token_order(ORDERS[head % len(ORDERS)], self.grid, self.text) for head in range(self.heads)]
        return torch.stack(orders)

    def layer(self, device: torch.device) -> ParoLayer:
        tokens = self.tokens.to(device)
        blocks = fastattn.BlockList.from_mask(
            self.mask.to(device)[None], seq_q=self.seq, seq_k=self.seq, block_size=self.block_size
        )
        return ParoLayer(tokens, tokens.argsort(), blocks)

    @property
    def density(self) -> float:
        queries, keys = (tokens_of_blocks(self.seq, size).double() for size in self.block_size)
        return float((self.mask.double() @ keys @ queries).mean()) / self.seq**2

    def bound_speedup(self, device: torch.device) -> float | None:
        return 1 / float(self.mask.double().mean())

    def keep(self, part: Part, device: torch.device) -> Tensor:
        places = self.tokens[part.heads].argsort()
        rows, columns = (places // size for size in self.block_size)  # the blocks that each token is in
        kept = zip(self.mask[part.heads], rows, columns, strict=True)
        return torch.stack([mask[row[part.queries]][:, column] for mask, row, column in kept]).to(device)

    @property
    def described_tokens(self) -> str:
        return "×".join(map(str, self.grid)) + (f" + {self.text}" if self.text else "")

    @property
    def described_mask(self) -> str:
        formats = f", {'/'.join(self.formats)}" if self.formats else ""
        return f"{self.percent} % of blocks {'×'.join(map(str, self.block_size))}{formats}"


def ours(case: VideoCase) -> Attention:
    layers = cache(case.layer)  # made by the first call, which is not timed
    formats: dict[str, Any] = dict(zip(("qk", "pv"), case.formats, strict=True)) if case.formats else {}
    return lambda q, k, v: fastattn.paro_attention(q, k, v, layers(q.device), **formats)


def _unquantized(case: VideoCase) -> Attention:
    layers = cache(case.layer)
    return lambda q, k, v: fastattn.paro_attention(q, k, v, layers(q.device))


PEERS = {"unquantized": Contestant(_unquantized), "ours_dense": DENSE}

OP = Op(
    name="paro_attention",
    kind=VideoCase,
    formula=attention.formula,
    ours=Contestant(ours),
    peers={"cpu": PEERS, "cuda": PEERS},
    cases={
        "cpu": (
            "b1_5x16x24_text100_h6_d64_blocks128x128_keep30",
            "b1_5x16x24_text100_h6_d64_blocks128x128_keep30_int8_int8",
        ),
        "cuda": (
            "b1_21x45x80_h40_d128_blocks128x128_keep30_int8_fp8",  # Wan 2.1, 720p
            "b1_21x45x80_h40_d128_blocks128x128_keep30_int8_bf16",
            "b2_13x30x45_text226_h48_d64_blocks128x128_keep30_int8_fp8",  # CogVideoX
            "b2_13x30x45_text226_h48_d64_blocks128x128_keep30_int8_bf16",
            "b2_13x30x45_text226_h48_d64_blocks192x128_keep30_int8_bf16",
        ),
    },
    modes=("fwd",),
)
