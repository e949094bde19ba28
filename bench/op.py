"""What the harness knows of an op: its cases, its contestants, its formula. One `Op` in a module of the op's name."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastattn.measure import Formula, Part


@dataclass(frozen=True)
class Mode:
    """What is measured of an op."""

    title: str
    products: tuple[int, int]
    """Matrix products along head_dim and along that of values."""
    gradients: str = ""
    """Of which of q, k and v."""
    deterministic: bool = False


MODES = {
    "fwd": Mode("forward", (1, 1)),
    "bwd": Mode("backward", (3, 2), "qkv"),
    "fwd+bwd": Mode("forward and backward", (4, 3), "qkv"),
    "bwd_q": Mode("backward to q alone", (2, 1), "q"),
    "bwd_kv": Mode("backward to k and v alone", (2, 2), "kv"),
    "bwd_deterministic": Mode("deterministic backward", (3, 2), "qkv", deterministic=True),
}


@dataclass(frozen=True)
class Case(ABC):
    """A benchmarked problem is its name, b<batch>_<tokens>_h<heads>[_kv<kv_heads>]_d<head_dim>[v<value_dim>]<mask>.

    How tokens and mask are written depends on the kind of case. fastattn_bench reads the same names.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int

    FORM: ClassVar[str]
    """An example, with options in brackets."""
    TOKENS: ClassVar[str]
    MASK: ClassVar[str]
    """Regular expressions, whose named groups `_fields` reads."""

    @classmethod
    def parse(cls, name: str) -> "Case":
        sizes = r"h(?P<heads>\d+)(_kv(?P<kv_heads>\d+))?_d(?P<head_dim>\d+)(v(?P<value_dim>\d+))?"
        match = re.fullmatch(rf"b(?P<batch>\d+)_{cls.TOKENS}_{sizes}{cls.MASK}", name)
        if match is None:
            raise ValueError(f"case {name!r} is not of the form {cls.FORM}")
        heads, head_dim = int(match["heads"]), int(match["head_dim"])
        kv_heads, value_dim = int(match["kv_heads"] or heads), int(match["value_dim"] or head_dim)
        shared = (int(match["batch"]), heads, kv_heads, head_dim, value_dim)
        return cls(name, *shared, **cls._fields(match))

    @classmethod
    def is_name(cls, text: str) -> bool:
        try:
            cls.parse(text)
        except ValueError:
            return False
        return True

    @classmethod
    @abstractmethod
    def _fields(cls, match: re.Match[str]) -> dict[str, Any]:
        """The fields that this kind of case adds."""

    @property
    @abstractmethod
    def q_tokens(self) -> tuple[int, ...]:
        """Extents of the dimensions of q between batch and heads."""

    @property
    @abstractmethod
    def k_tokens(self) -> tuple[int, ...]: ...

    def modifiers(self, heads: int, device: torch.device) -> dict[str, Any]:
        """What the op and its formula take beside q, k, v and the mask, for so many of the heads."""
        return {}

    @property
    @abstractmethod
    def density(self) -> float:
        """The kept share of scores."""

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        random = torch.Generator(device).manual_seed(0)

        def normal(tokens: tuple[int, ...], heads: int, dim: int) -> Tensor:
            shape = (self.batch, *tokens, heads, dim)
            return torch.randn(shape, generator=random, device=device).to(dtype)

        return (
            normal(self.q_tokens, self.heads, self.head_dim),
            normal(self.k_tokens, self.kv_heads, self.head_dim),
            normal(self.k_tokens, self.kv_heads, self.value_dim),
        )

    def bound_speedup(self, device: torch.device) -> float | None:
        """How much faster than the dense op a sparse one could be there, by the tiles that it visits."""
        return None

    @abstractmethod
    def keep(self, part: Part, device: torch.device) -> Tensor:
        """The mask of a part of the problem, by the definition and not by the kernels' code."""

    @property
    @abstractmethod
    def described_tokens(self) -> str: ...

    @property
    @abstractmethod
    def described_mask(self) -> str: ...

    @property
    def described(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        dim = f"{self.head_dim}" if self.head_dim == self.value_dim else f"{self.head_dim}/{self.value_dim}"
        return f"B {self.batch}, {self.described_tokens}, H {heads}, D {dim}, {self.described_mask}"

    @property
    def shape(self) -> dict[str, int]:
        return {
            "batch": self.batch,
            "seq_q": math.prod(self.q_tokens),
            "seq_k": math.prod(self.k_tokens),
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "value_dim": self.value_dim,
        }

    @property
    def scores(self) -> int:
        """What the mask keeps and what it hides, of all heads."""
        return self.batch * self.heads * math.prod(self.q_tokens) * math.prod(self.k_tokens)

    def flops(self, mode: str) -> float:
        of_head_dim, of_value_dim = MODES[mode].products
        return 2 * self.scores * self.density * (of_head_dim * self.head_dim + of_value_dim * self.value_dim)


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of q, k and v in [batch, tokens, heads, head_dim]."""


class UnsupportedCaseError(Exception):
    """This contestant has no such case."""


@dataclass(frozen=True)
class Contestant:
    build: Callable[[Any], Attention]
    """From a case of the op."""
    module: str = "torch"
    """What must be there to import."""
    yardstick: bool = False
    """It computes something else, and is there for its time."""


@dataclass(frozen=True)
class Op:
    name: str
    kind: type[Case]
    formula: Formula
    ours: Contestant
    peers: Mapping[str, Mapping[str, Contestant]]
    """Of each type of device."""
    cases: Mapping[str, tuple[str, ...]]
    """Names of the listed cases, for each type of device; the C++ program lists the same."""
    modes: tuple[str, ...] = tuple(MODES)
    """What there is to measure."""
    forward_cases: tuple[str, ...] = ()
    """Listed cases of which there is a forward alone."""

    def modes_of(self, case: Case) -> tuple[str, ...]:
        return ("fwd",) if case.name in self.forward_cases else self.modes
