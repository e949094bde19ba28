"""attention: its cases, and its peers.

Peers that want [batch, heads, seq, head_dim] get a transposed view of the same memory: the layout in which a model's
projections leave their results.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import fastattn
from fastattn import reference
from fastattn.attention import kept_scores
from fastattn.measure import Part

from .op import Attention, Case, Contestant, Op, UnsupportedCaseError


@dataclass(frozen=True)
class BandCase(Case):
    """A window is causal: `window1024` sees 1024 keys to the left of the diagonal."""

    seq_q: int
    seq_k: int
    causal: bool
    window: tuple[int, int] | None

    FORM = "b1_s4096[x8192]_h8[_kv2]_d64[_causal|_window512]"
    TOKENS = r"s(?P<seq_q>\d+)(x(?P<seq_k>\d+))?"
    MASK = r"(_(?P<causal>causal)|_window(?P<left>\d+))?"

    @classmethod
    def _fields(cls, match: re.Match[str]) -> dict[str, Any]:
        return {
            "seq_q": int(match["seq_q"]),
            "seq_k": int(match["seq_k"] or match["seq_q"]),
            "causal": bool(match["causal"] or match["left"]),
            "window": (int(match["left"]), 0) if match["left"] else None,
        }

    @property
    def q_tokens(self) -> tuple[int, ...]:
        return (self.seq_q,)

    @property
    def k_tokens(self) -> tuple[int, ...]:
        return (self.seq_k,)

    @property
    def density(self) -> float:
        return kept_scores(self.seq_q, self.seq_k, **self.mask) / (self.seq_q * self.seq_k)

    def keep(self, part: Part, device: torch.device) -> Tensor:
        return reference.band_mask(self.seq_q, self.seq_k, **self.mask, queries=part.queries, device=device)

    @property
    def described_tokens(self) -> str:
        return f"S {self.seq_q}" if self.seq_q == self.seq_k else f"S {self.seq_q}×{self.seq_k}"

    @property
    def described_mask(self) -> str:
        return f"window {self.window[0]}" if self.window else "causal" if self.causal else "full"

    @property
    def mask(self) -> dict[str, Any]:
        return {"causal": self.causal, "window": self.window}


@dataclass(frozen=True)
class AttentionCase(BandCase):
    """`bias` is of keys, some of which it hides, the same for all heads; `sinks` are 1 for each head."""

    softcap: float | None
    bias: bool
    sinks: bool

    FORM = "b1_s4096[x8192]_h8[_kv2]_d64[v32][_causal|_window512][_softcap50][_bias][_sinks]"
    MASK = rf"{BandCase.MASK}(_softcap(?P<softcap>\d+))?(?P<bias>_bias)?(?P<sinks>_sinks)?"

    @classmethod
    def _fields(cls, match: re.Match[str]) -> dict[str, Any]:
        softcap = float(match["softcap"]) if match["softcap"] else None
        return {
            **super()._fields(match),
            "softcap": softcap,
            "bias": bool(match["bias"]),
            "sinks": bool(match["sinks"]),
        }

    def modifiers(self, heads: int, device: torch.device) -> dict[str, Any]:
        options: dict[str, Any] = {} if self.softcap is None else {"softcap": self.softcap}
        if self.bias:
            key = torch.arange(self.seq_k, device=device)
            bias = (key * 37 % 64) / 16 - 2
            options["key_bias"] = bias.where(key % 7 != 6, -torch.inf)[None, None]
        if self.sinks:
            options["sinks"] = torch.ones(heads, device=device)
        return options

    @property
    def described_mask(self) -> str:
        parts = [f"softcap {self.softcap:g}"] if self.softcap else []
        parts += ["key bias"] if self.bias else []
        return ", ".join([super().described_mask, *parts, *(["sinks"] if self.sinks else [])])

    @property
    def is_plain(self) -> bool:
        return not (self.softcap or self.bias or self.sinks)


def formula(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, **options: Any) -> Tensor:
    return reference.masked_attention(q, k, v, keep, **options)[0]


def ours(case: BandCase) -> Attention:
    modifiers = cache(case.modifiers)  # made by the first call, which is not timed
    return lambda q, k, v: fastattn.attention(q, k, v, **case.mask, **modifiers(q.shape[2], q.device))


def of_plain_scores(build: Callable[[AttentionCase], Attention]) -> Callable[[AttentionCase], Attention]:
    """A peer that is asked for nothing else."""

    def build_if_plain(case: AttentionCase) -> Attention:
        if not case.is_plain:
            raise UnsupportedCaseError("not asked for a softcap, biases or sinks")
        return build(case)

    return build_if_plain


def transposed(attention: Attention) -> Attention:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return call


def sdpa(backend: SDPBackend) -> Callable[[BandCase], Attention]:
    def build(case: BandCase) -> Attention:
        if case.window is not None:
            raise UnsupportedCaseError("no sliding window")
        if case.causal and case.seq_q != case.seq_k:
            raise UnsupportedCaseError("its causal mask is aligned with the first key")
        options = {"is_causal": case.causal, "enable_gqa": case.kv_heads != case.heads}

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, **options)

        return transposed(call)

    return build


def compiled_flex_attention() -> Callable[..., Tensor]:
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # each case is compiled afresh; past a number of recompilations torch would stop compiling
    torch._functorch.config.donated_buffer = False  # a backward is timed many times over one forward
    return torch.compile(flex_attention, dynamic=False)


def _flex(case: BandCase) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask

    diagonal = case.seq_k - case.seq_q
    left = case.seq_k if case.window is None else case.window[0]

    def keeps(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q + diagonal) & (k >= q + diagonal - left)

    mask = create_block_mask(keeps, None, None, case.seq_q, case.seq_k, device="cuda") if case.causal else None
    return transposed(partial(compiled_flex_attention(), block_mask=mask, enable_gqa=case.kv_heads != case.heads))


def _fa4(case: BandCase) -> Attention:
    from flash_attn.cute.interface import flash_attn_func

    options = {"causal": True} if case.window is None and case.causal else {"window_size": case.window or (None, None)}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v, **options, deterministic=torch.are_deterministic_algorithms_enabled())
        return result[0] if isinstance(result, tuple) else result

    return call


# Dense and causal at 16,384 tokens and hidden size 2048.
DENSE_GPU_CASES = (
    "b4_s4096_h32_d64",
    "b4_s4096_h32_d64_causal",
    "b4_s4096_h16_d128",
    "b4_s4096_h16_d128_causal",
    "b1_s16384_h32_d64",
    "b1_s16384_h32_d64_causal",
    "b1_s16384_h16_d128",
    "b1_s16384_h16_d128_causal",
)

# Of few queries, as one has them at inference.
FORWARD_GPU_CASES = (
    "b16_s1x8192_h64_kv8_d128",
    "b1_s1x131072_h64_kv8_d128",
    "b8_s16x8192_h32_kv8_d128_causal",
    "b16_s4x8192_h64_kv8_d64_causal",
    "b1_s512x65536_h8_kv2_d128_causal",
)

OP = Op(
    name="attention",
    kind=AttentionCase,
    formula=formula,
    ours=Contestant(ours),
    peers={
        "cpu": {"sdpa": Contestant(of_plain_scores(sdpa(SDPBackend.FLASH_ATTENTION)))},
        "cuda": {
            "fa4": Contestant(of_plain_scores(_fa4), module="flash_attn.cute.interface"),
            "cudnn": Contestant(of_plain_scores(sdpa(SDPBackend.CUDNN_ATTENTION))),
            "fa2": Contestant(of_plain_scores(sdpa(SDPBackend.FLASH_ATTENTION))),
            "flex": Contestant(of_plain_scores(_flex), module="triton"),
        },
    },
    cases={
        "cpu": (
            "b1_s4096_h8_d64",
            "b1_s4096_h8_d64_causal",
            "b8_s128_h8_d64",
            "b1_s4096_h8_kv2_d64_causal",
            "b1_s2048_h8_d64",
        ),
        "cuda": (  # then short and long sequences, images, grouped heads, a sliding window and other sizes of heads
            *DENSE_GPU_CASES,
            "b4_s4096_h8_d256",
            "b4_s4096_h8_d256_causal",
            "b1_s16384_h8_d256",
            "b1_s16384_h8_d256_causal",
            "b32_s512_h32_d64_causal",
            "b32_s512_h16_d128_causal",
            "b16_s1024_h32_d64_causal",
            "b16_s1024_h16_d128_causal",
            "b8_s2048_h16_d128_causal",
            "b2_s8192_h16_d128_causal",
            "b1_s32768_h16_d128_causal",
            "b4_s4113_h16_d128_causal",
            "b64_s197_h16_d64",
            "b64_s577_h16_d64",
            "b2_s8192_h64_kv8_d128_causal",
            "b2_s8192_h32_kv4_d128_causal",
            "b2_s8192_h32_kv8_d64_causal",
            "b2_s8192_h32_kv8_d128_causal",
            "b1_s16384_h16_d128_window1024",
            "b1_s16384_h64_d32",
            "b1_s16384_h20_d96_causal",
            "b1_s16384_h16_d128_causal_sinks",
            "b1_s16384_h10_d192",
            *FORWARD_GPU_CASES,
            "b1_s16384_h16_d192v128_causal",
            "b1_s16384_h16_d128v32",
            "b1_s16384_h16_d128_causal_bias",
            "b1_s16384_h16_d128_causal_softcap50",
            "b1_s16384_h32_d64_causal_softcap50_bias_sinks",
        ),
    },
    forward_cases=FORWARD_GPU_CASES,
)
