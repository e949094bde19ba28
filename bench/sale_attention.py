"""sale_attention: structured inputs of a language model's shape, against our own dense attention of them."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.attention import kept_scores
from fastattn.measure import Part
from fastattn.structured import Structured

from . import attention
from .block_sparse_attention import DENSE
from .op import Attention, Case, Contestant, Op


@dataclass(frozen=True)
class EstimatedCase(Case):
    """`tau0.008` is the threshold of all heads. Causal.

    FLOPs and errors are those of the dense attention that this stands for: what is left out counts.
    """

    seq: int
    threshold: float
    bits: int
    query_stride: int
    causal = True

    FORM = "b1_s8192_h32[_kv8]_d128_tau0.008[_bits8][_stride2]"
    TOKENS = r"s(?P<seq>\d+)"
    MASK = r"_tau(?P<threshold>\d+(\.\d+)?)(_bits(?P<bits>4|8))?(_stride(?P<stride>[1-9]\d*))?"

    @classmethod
    def _fields(cls, match: re.Match[str]) -> dict[str, Any]:
        bits, query_stride = int(match["bits"] or 4), int(match["stride"] or 1)
        fields = {"threshold": float(match["threshold"]), "bits": bits, "query_stride": query_stride}
        return {"seq": int(match["seq"]), **fields}

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return Structured(self.seq, self.batch, **sizes).inputs(str(device), dtype)

    @property
    def q_tokens(self) -> tuple[int, ...]:
        return (self.seq,)

    @property
    def k_tokens(self) -> tuple[int, ...]:
        return (self.seq,)

    @property
    def density(self) -> float:
        return kept_scores(self.seq, self.seq, causal=True) / self.seq**2

    def keep(self, part: Part, device: torch.device) -> Tensor:
        return reference.band_mask(self.seq, self.seq, causal=True, queries=part.queries, device=device)

    @property
    def described_tokens(self) -> str:
        return f"S {self.seq}"

    @property
    def described_mask(self) -> str:
        judged = "" if self.query_stride == 1 else f", 1 of {self.query_stride} queries"
        return f"structured, causal, τ {self.threshold:g}, {self.bits} bits{judged}"


def ours(case: EstimatedCase) -> Attention:
    # 8 bits need no smoothed queries: see csrc/ops/sale_attention.md.
    smooth_queries = case.bits == 4
    options: dict[str, Any] = {
        "bits": case.bits,
        "smooth_queries": smooth_queries,
        "query_stride": case.query_stride,
    }
    return partial(fastattn.sale_attention, threshold=case.threshold, **options)


OP = Op(
    name="sale_attention",
    kind=EstimatedCase,
    formula=attention.formula,
    ours=Contestant(ours),
    peers={"cpu": {"ours_dense": DENSE}, "cuda": {"ours_dense": DENSE}},
    cases={
        "cpu": ("b1_s4096_h8_kv2_d64_tau0.03", "b1_s8192_h4_kv1_d128_tau0.03", "b1_s8192_h4_kv1_d128_tau0.03_bits8"),
        "cuda": (  # Llama 3.1 8B
            "b1_s8192_h32_kv8_d128_tau0.008",
            "b1_s16384_h32_kv8_d128_tau0.008",
            "b1_s32768_h32_kv8_d128_tau0.008",
            "b1_s65536_h32_kv8_d128_tau0.008",
            "b1_s65536_h32_kv8_d128_tau0.008_bits8",
            "b1_s65536_h32_kv8_d128_tau0.008_stride2",
            "b1_s65536_h32_kv8_d128_tau0.008_bits8_stride2",
            "b1_s131072_h32_kv8_d128_tau0.008",
            "b1_s131072_h32_kv8_d128_tau0.008_bits8_stride2",
        ),
    },
)
