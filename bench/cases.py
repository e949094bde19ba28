"""The benchmarked problems. A case is its name:

b<batch>_s<seq_q>[x<seq_k>]_h<heads>[_kv<kv_heads>]_d<head_dim>[_causal|_window<left>]

fastattn_bench reads the same names. A window is causal: `window1024` sees 1024 keys to the left of the diagonal.
"""

import re
from dataclasses import dataclass

from fastattn.attention import kept_scores

_GRAMMAR = re.compile(
    r"b(?P<batch>\d+)_s(?P<seq_q>\d+)(x(?P<seq_k>\d+))?_h(?P<heads>\d+)(_kv(?P<kv_heads>\d+))?_d(?P<head_dim>\d+)"
    r"(_(?P<causal>causal)|_window(?P<left>\d+))?"
)

MODES = ("fwd", "bwd", "fwd+bwd")
_FORWARDS = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}  # matrix products, in units of the forward's two


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    seq_q: int
    seq_k: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    window: tuple[int, int] | None

    @classmethod
    def parse(cls, name: str) -> "Case":
        match = _GRAMMAR.fullmatch(name)
        if match is None:
            raise ValueError(f"case {name!r} is not of the form b1_s4096[x8192]_h8[_kv2]_d64[_causal|_window512]")
        seq_q, heads = int(match["seq_q"]), int(match["heads"])
        return cls(
            name,
            batch=int(match["batch"]),
            seq_q=seq_q,
            seq_k=int(match["seq_k"] or seq_q),
            heads=heads,
            kv_heads=int(match["kv_heads"] or heads),
            head_dim=int(match["head_dim"]),
            causal=bool(match["causal"] or match["left"]),
            window=(int(match["left"]), 0) if match["left"] else None,
        )

    @property
    def shape(self) -> dict[str, int]:
        names = ("batch", "seq_q", "seq_k", "heads", "kv_heads", "head_dim")
        return {name: getattr(self, name) for name in names}

    @property
    def density(self) -> float:
        """The kept share of scores."""
        return kept_scores(self.seq_q, self.seq_k, self.causal, self.window) / (self.seq_q * self.seq_k)

    def flops(self, mode: str) -> float:
        scores = self.batch * self.heads * self.seq_q * self.seq_k * self.density
        return 4 * scores * self.head_dim * _FORWARDS[mode]


# Dense and causal at 16,384 tokens and hidden size 2048; then short sequences, grouped heads and a sliding window.
GPU_CASES = tuple(
    Case.parse(name)
    for name in (
        "b4_s4096_h32_d64",
        "b4_s4096_h32_d64_causal",
        "b4_s4096_h16_d128",
        "b4_s4096_h16_d128_causal",
        "b1_s16384_h32_d64",
        "b1_s16384_h32_d64_causal",
        "b1_s16384_h16_d128",
        "b1_s16384_h16_d128_causal",
        "b32_s512_h32_d64_causal",
        "b32_s512_h16_d128_causal",
        "b2_s8192_h32_kv8_d64_causal",
        "b2_s8192_h32_kv8_d128_causal",
        "b1_s16384_h16_d128_window1024",
    )
)
CPU_CASES = tuple(
    Case.parse(name)
    for name in (
        "b1_s4096_h8_d64",
        "b1_s4096_h8_d64_causal",
        "b8_s128_h8_d64",
        "b1_s4096_h8_kv2_d64_causal",
    )
)
