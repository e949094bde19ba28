"""sale_attention: structured inputs of a language model's shape, against our own dense attention of them."""

import re
from dataclasses import dataclass
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
    """`tau0.008` is the threshold of all heads; `theta0.05` calibrates each head's on these inputs. Causal.

    FLOPs and errors are those of the dense attention that this stands for: what is left out counts.
    """

    seq: int
    threshold: float | None
    theta: float | None
    bits: int
    query_stride: int
    causal = True

    FORM = "b1_s8192_h32[_kv8]_d128_tau0.008[_bits8][_stride2], with theta0.05 for tau0.008"
    TOKENS = r"s(?P<seq>\d+)"
    MASK = r"_(?P<by>tau|theta)(?P<value>\d+(\.\d+)?)(_bits(?P<bits>4|8))?(_stride(?P<stride>[1-9]\d*))?"

    @classmethod
    def _fields(cls, match: re.Match[str]) -> dict[str, Any]:
        value, by_threshold = float(match["value"]), match["by"] == "tau"
        return {
            "seq": int(match["seq"]),
            "threshold": value if by_threshold else None,
            "theta": None if by_threshold else value,
            "bits": int(match["bits"] or 4),
            "query_stride": int(match["stride"] or 1),
        }

    @property
    def options(self) -> dict[str, Any]:
        """8 bits need no smoothed queries: see csrc/ops/sale_attention.md."""
        return {"bits": self.bits, "smooth_queries": self.bits == 4, "query_stride": self.query_stride}

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
        chosen = f"τ {self.threshold:g}" if self.theta is None else f"θ {self.theta:g}"
        return f"structured, causal, {chosen}, {self.bits} bits{judged}"


def ours(case: EstimatedCase) -> Attention:
    threshold: float | Tensor | None = case.threshold

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal threshold
        if threshold is None:  # in the first call, which is not timed
            assert case.theta is not None
            threshold = fastattn.calibrate_sale([(0, q, k, v)], case.theta, **case.options).thresholds[0].to(q.device)
        return fastattn.sale_attention(q, k, v, threshold, **case.options)

    return attend


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
            "b1_s65536_h32_kv8_d128_theta0.05_bits8",
            "b1_s65536_h32_kv8_d128_theta0.05_bits8_stride2",
            "b1_s131072_h32_kv8_d128_tau0.008",
            "b1_s131072_h32_kv8_d128_tau0.008_bits8_stride2",
        ),
    },
)
