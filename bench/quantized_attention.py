"""quantized_attention: cases of attention and of block_sparse_attention, against the two without quantization.

A case's name ends with its formats: `_int8_fp8` is int8 queries and keys, fp8 values. What is timed begins with the
tokens as they are; with `_kernel` behind that, with operands that are made before.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import fastattn
from fastattn.measure import Part
from fastattn.quantized_attention import Format, Values, quantized_operands

from . import attention, block_sparse_attention
from .attention import BandCase
from .block_sparse_attention import ListedCase
from .op import Attention, Case, Contestant, Op


@dataclass(frozen=True)
class QuantizedCase(Case):
    of: BandCase | ListedCase
    """The same without formats."""
    qk: Format
    pv: Values
    kernel: bool

    FORM = "b1_s4096[x8192]_h8[_kv2]_d64[_causal|_window512|_blocks128x128_keep30[_causal]]_int8_fp8[_kernel]"
    TOKENS = BandCase.TOKENS
    MASK = (
        r"(?P<mask>(_causal|_window\d+)?|_blocks(64|128|192)x(64|128)_keep\d+(_causal)?)"
        r"_(?P<qk>int8|int4|fp8)_(?P<pv>int8|fp8|bf16)(?P<kernel>_kernel)?"
    )

    @classmethod
    def _fields(cls, match: re.Match[str]) -> dict[str, Any]:
        kind = ListedCase if "_blocks" in match["mask"] else BandCase
        name = match.string[: match.end("mask")]
        return {
            "of": kind.parse(name),
            "qk": match["qk"],
            "pv": match["pv"],
            "kernel": match["kernel"] is not None,
        }

    @property
    def q_tokens(self) -> tuple[int, ...]:
        return self.of.q_tokens

    @property
    def k_tokens(self) -> tuple[int, ...]:
        return self.of.k_tokens

    @property
    def density(self) -> float:
        return self.of.density

    def bound_speedup(self, device: torch.device) -> float | None:
        return self.of.bound_speedup(device)

    def keep(self, part: Part, device: torch.device) -> Tensor:
        return self.of.keep(part, device)

    @property
    def described_tokens(self) -> str:
        return self.of.described_tokens

    @property
    def described_mask(self) -> str:
        kernel = ", quantized before" if self.kernel else ""
        return f"{self.of.described_mask}, {self.qk}/{self.pv}{kernel}"

    @property
    def dense(self) -> BandCase:
        """All blocks, where some are listed."""
        if isinstance(self.of, BandCase):
            return self.of
        return BandCase.parse(re.sub(r"_blocks\d+x\d+_keep\d+", "", self.of.name))


def ours(case: QuantizedCase) -> Attention:
    # Lists and, for the kernel alone, operands are made by the first call, which is not timed.
    lists = cache(lambda device: case.of.blocks(device) if isinstance(case.of, ListedCase) else None)
    mask = case.of.mask if isinstance(case.of, BandCase) else {}
    operands = cache(lambda *inputs: quantized_operands(*inputs, qk=case.qk, pv=case.pv)[0])

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.quantized_attention(q, k, v, qk=case.qk, pv=case.pv, blocks=lists(q.device), **mask)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks, options = lists(q.device), dict[str, Any](mask)
        listed: tuple[Tensor | None, ...] = ()
        if blocks is not None:
            listed = (blocks.counts, blocks.indices, blocks.full)
            options = {"block_size": blocks.block_size, "causal": blocks.causal}
        out, _ = torch.ops.fastattn.quantized_attention(*operands(q, k, v), *listed, dtype=q.dtype, **options)
        return out

    return kernel if case.kernel else whole


def _unquantized(case: QuantizedCase) -> Attention:
    return attention.ours(case.of) if isinstance(case.of, BandCase) else block_sparse_attention.ours(case.of)


def _cudnn(case: QuantizedCase) -> Attention:
    return attention.sdpa(SDPBackend.CUDNN_ATTENTION)(case.dense)


PEERS = {
    "unquantized": Contestant(_unquantized),
    "ours_dense": Contestant(lambda case: attention.ours(case.dense), yardstick=True),
}

OP = Op(
    name="quantized_attention",
    kind=QuantizedCase,
    formula=attention.formula,
    ours=Contestant(ours),
    peers={"cpu": PEERS, "cuda": {**PEERS, "cudnn": Contestant(_cudnn, yardstick=True)}},
    cases={
        "cpu": (
            "b1_s2048_h8_d64_int8_int8",
            "b1_s2048_h8_d64_int8_int8_kernel",
            "b1_s2048_h8_d64_int8_fp8",
            "b1_s2048_h8_d64_int8_bf16",
            "b1_s2048_h8_d64_int4_int8",
            "b1_s2048_h4_d128_causal_int8_int8",
            "b1_s2048_h8_d64_blocks64x64_keep30_int8_int8",
        ),
        "cuda": (
            "b1_s16384_h16_d128_int8_int8",
            "b1_s16384_h16_d128_int8_int8_kernel",
            "b1_s16384_h16_d128_int8_fp8",
            "b1_s16384_h16_d128_int8_fp8_kernel",
            "b1_s16384_h16_d128_int8_bf16",
            "b1_s16384_h16_d128_int8_bf16_kernel",
            "b1_s16384_h16_d128_fp8_fp8_kernel",
            "b1_s16384_h16_d128_int4_int8",
            "b1_s16384_h16_d128_causal_int8_bf16",
            "b1_s65536_h16_d128_int8_fp8",
            "b1_s65536_h16_d128_int8_bf16",
            "b1_s16384_h16_d64_int8_int8",
            "b1_s16384_h16_d64_int8_fp8",
            "b1_s16384_h16_d64_int8_bf16",
            "b1_s16384_h16_d128_blocks128x128_keep30_int8_fp8",
            "b2_s17776_h48_d64_blocks128x128_keep30_int8_bf16",
            "b2_s17776_h48_d64_blocks192x128_keep30_int8_bf16",
        ),
    },
    modes=("fwd",),
)
