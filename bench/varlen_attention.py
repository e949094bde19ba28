"""varlen_attention: sequences of many lengths, against their batch's peers where these take such."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fastattn
from fastattn.attention import kept_scores
from fastattn.measure import Part

from . import attention
from .op import Attention, Case, Contestant, Op


@dataclass(frozen=True)
class VarlenCase(Case):
    """`1x8192+64x128` are one sequence and 64 others, `ramp16x2048` are 16 that rise to 2048 tokens in equal steps."""

    runs: str
    causal: bool

    FORM = "b1_32x512_h8[_kv2]_d64[v32][_causal], with 1x8192+64x128 or ramp16x2048 for 32x512"
    TOKENS = r"(?P<runs>(ramp)?\d+x\d+(\+(ramp)?\d+x\d+)*)"
    MASK = r"(_(?P<causal>causal))?"

    def __post_init__(self) -> None:
        if self.batch != 1 or self.ends[-1] == 0:
            raise ValueError(f"case {self.name!r} must have one batch entry and at least one token")

    @classmethod
    def _fields(cls, match: re.Match[str]) -> dict[str, Any]:
        return {"runs": match["runs"], "causal": bool(match["causal"])}

    @cached_property
    def lengths(self) -> list[int]:
        def of_run(run: str) -> Iterator[int]:
            count, length = map(int, run.removeprefix("ramp").split("x"))
            return (length * (i + 1) // count if run.startswith("ramp") else length for i in range(count))

        return [length for run in self.runs.split("+") for length in of_run(run)]

    @cached_property
    def ends(self) -> list[int]:
        return [0, *accumulate(self.lengths)]

    def cu_seqlens(self, device: torch.device) -> Tensor:
        return torch.tensor(self.ends, dtype=torch.int32, device=device)

    @property
    def q_tokens(self) -> tuple[int, ...]:
        return (self.ends[-1],)

    @property
    def k_tokens(self) -> tuple[int, ...]:
        return self.q_tokens

    @property
    def density(self) -> float:
        return sum(kept_scores(n, n, self.causal) for n in self.lengths) / self.ends[-1] ** 2

    def keep(self, part: Part, device: torch.device) -> Tensor:
        lengths = torch.tensor(self.lengths, device=device)
        sequence = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        token = torch.arange(self.ends[-1], device=device)
        keep = sequence[part.queries, None] == sequence
        return keep & (token <= token[part.queries, None]) if self.causal else keep

    @property
    def described_tokens(self) -> str:
        return f"sequences {self.runs.replace('+', ' + ').replace('x', ' × ').replace('ramp', 'up to ')}"

    @property
    def described_mask(self) -> str:
        return "causal" if self.causal else "full"


def ours(case: VarlenCase) -> Attention:
    longest = max(case.lengths)
    options = {"max_seqlen_q": longest, "max_seqlen_k": longest, "causal": case.causal}
    ends = cache(case.cu_seqlens)  # made by the first call, which is not timed

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cu_seqlens = ends(q.device)
        return fastattn.varlen_attention(q[0], k[0], v[0], cu_seqlens, cu_seqlens, **options)[None]

    return attend


def _fa4(case: VarlenCase) -> Attention:
    from flash_attn.cute.interface import flash_attn_varlen_func

    longest = max(case.lengths)
    options = {"max_seqlen_q": longest, "max_seqlen_k": longest, "causal": case.causal}
    ends = cache(case.cu_seqlens)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths = {"cu_seqlens_q": ends(q.device), "cu_seqlens_k": ends(q.device)}
        deterministic = torch.are_deterministic_algorithms_enabled()
        result = flash_attn_varlen_func(q[0], k[0], v[0], **lengths, **options, deterministic=deterministic)
        return (result[0] if isinstance(result, tuple) else result)[None]

    return attend


def _sdpa(case: VarlenCase) -> Attention:
    """One sequence after the other."""
    options = {"is_causal": case.causal, "enable_gqa": case.kv_heads != case.heads}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            scaled_dot_product_attention(*(x[:, begin:end].transpose(1, 2) for x in (q, k, v)), **options)
            for begin, end in pairwise(case.ends)
        ]
        return torch.cat(parts, 2).transpose(1, 2)

    return attend


OP = Op(
    name="varlen_attention",
    kind=VarlenCase,
    formula=attention.formula,
    ours=Contestant(ours),
    peers={
        "cpu": {"sdpa": Contestant(_sdpa)},
        "cuda": {"fa4": Contestant(_fa4, module="flash_attn.cute.interface"), "sdpa": Contestant(_sdpa)},
    },
    cases={
        "cpu": ("b1_ramp16x512_h8_d64_causal", "b1_64x64_h8_d64"),
        "cuda": (
            "b1_4x4096_h32_d64_causal",
            "b1_4x4096_h16_d128_causal",
            "b1_32x512_h32_d64_causal",
            "b1_32x512_h16_d128_causal",
            "b1_ramp16x2048_h32_d64_causal",
            "b1_ramp16x2048_h16_d128_causal",
            "b1_1x8192+64x128_h16_d128_causal",
            "b1_256x64_h16_d128_causal",
        ),
    },
)
