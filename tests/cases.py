"""The problems the tests run, and what is expected of a result."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import reference


@dataclass(frozen=True)
class Case:
    seq_q: int
    seq_k: int
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    causal: bool = False
    window: tuple[int, int] | None = None
    scale: float | None = None
    value_dim: int | None = None
    """Of values that are not as wide as keys."""

    def __str__(self) -> str:
        name = f"b{self.batch}-s{self.seq_q}x{self.seq_k}-h{self.heads}x{self.kv_heads}-d{self.head_dim}"
        name += f"v{self.value_dim}" if self.value_dim else ""
        name += "-causal" if self.causal else ""
        name += "-window{}_{}".format(*self.window) if self.window else ""
        return name + (f"-scale{self.scale}" if self.scale else "")

    @property
    def options(self) -> dict[str, Any]:
        return {"causal": self.causal, "window": self.window, "scale": self.scale}

    def inputs(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        def normal(seq: int, heads: int, dim: int = self.head_dim) -> Tensor:
            return torch.randn(self.batch, seq, heads, dim, device=device).to(dtype)

        keys = self.seq_k, self.kv_heads
        return normal(self.seq_q, self.heads), normal(*keys), normal(*keys, self.value_dim or self.head_dim)

    def cotangents(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gradients of the output and of the LSE, of unit variance."""
        value_dim = self.value_dim or self.head_dim
        out = torch.randn(self.batch, self.seq_q, self.heads, value_dim, device=device).to(dtype)
        return out, torch.randn(self.batch, self.heads, self.seq_q, device=device)


# Lengths on both sides of the tile edges in use (queries 64, 128, 192; keys 64, 128) and far from them.
EDGES = [1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257]

CASES = [
    *(Case(length, length, batch=1, heads=2, kv_heads=2, causal=length % 2 == 1) for length in EDGES),
    *(
        Case(130, 130, batch=1, heads=2, kv_heads=1, head_dim=d)
        for d in (8, 16, 24, 32, 40, 64, 72, 96, 128, 136, 192, 200, 256)
    ),
    *(
        Case(257, length, batch=1, heads=2, kv_heads=1, head_dim=d, causal=True)
        for d in (32, 96, 192, 256)
        for length in (257, 300, 383, 385)
    ),
    Case(200, 190, batch=1, heads=2, kv_heads=1, head_dim=256),  # both kernels of its backward have the same slots
    Case(150, 150, heads=8, kv_heads=2),
    Case(150, 150, heads=6, kv_heads=1, causal=True),
    Case(1, 300, causal=True),
    Case(100, 260, causal=True),
    Case(260, 100, causal=True),  # the first 160 queries see nothing
    Case(100, 260),
    Case(260, 100),
    Case(200, 200, window=(17, 5)),
    Case(200, 200, window=(0, 0)),
    Case(200, 200, window=(64, -1)),
    Case(200, 200, window=(-1, 30)),
    Case(300, 300, window=(40, 7), causal=True),
    Case(90, 300, window=(70, 0)),
    Case(300, 90, window=(10, 10), kv_heads=2),  # queries before and after the keys see nothing
    Case(257, 384, head_dim=128, kv_heads=2, causal=True),
    Case(384, 257, head_dim=128, kv_heads=2, window=(100, 20)),
    # On a GPU dK and dV of so large groups are sums in memory.
    Case(257, 250, heads=8, kv_heads=1, causal=True),
    Case(300, 257, heads=16, kv_heads=2, head_dim=128, window=(100, 20)),
    Case(257, 250, heads=8, kv_heads=1, head_dim=72),
    Case(600, 650, heads=8, kv_heads=8),  # the wide tiles of a CPU's backward
    Case(650, 600, heads=16, kv_heads=8, causal=True),
    Case(70, 90, scale=0.02),
    Case(70, 90, scale=1.5, causal=True),
]


def relative_error(result: Tensor, expected: Tensor) -> float:
    """‖result − expected‖ / ‖expected‖, where entries that are not finite must agree exactly."""
    assert result.shape == expected.shape
    result = result.double()
    expected = expected.double()
    finite = expected.isfinite()
    assert torch.equal(result.isfinite(), finite)
    assert torch.equal(result[~finite], expected[~finite])
    difference = (result[finite] - expected[finite]).norm().item()
    norm = expected[finite].norm().item()
    return difference / norm if norm > 0 else (math.inf if difference > 0 else 0.0)


def run(function: Any, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, Tensor]) -> list[Tensor]:
    """[out, lse, dq, dk, dv] of an attention function that returns (out, lse)."""
    inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    out, lse = function(*inputs)
    cotangents = tuple(c.to(r.dtype) for c, r in zip(cotangents, (out, lse), strict=True))
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), inputs, cotangents)]


def expected(case: Case, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The same in float64."""
    doubles = tuple(tensor.double() for tensor in inputs)
    return run(lambda q, k, v: reference.attention(q, k, v, **case.options), doubles, cotangents)


def plain(case: Case, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The same by the plain formula in the precision of the inputs."""
    return run(lambda q, k, v: reference.attention(q, k, v, **case.options), inputs, cotangents)


def gradients(function: Any, inputs: dict[str, Tensor], cotangents: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Of all `inputs` of an attention function that returns (out, lse); an LSE of -inf has none."""
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out, lse = function(**inputs)
    seen = lse.isfinite()
    results, cotangents = (out, lse[seen]), (cotangents[0].to(out.dtype), cotangents[1].to(lse.dtype)[seen])
    return dict(zip(inputs, torch.autograd.grad(results, list(inputs.values()), cotangents), strict=True))


def assert_gradients_right(
    ours: Any, formula: Any, inputs: dict[str, Tensor], cotangents: tuple[Tensor, Tensor]
) -> None:
    """At most twice the error of the plain formula in the same precision, for each input."""
    results = gradients(ours, inputs, cotangents)
    exact = gradients(formula, {name: tensor.double() for name, tensor in inputs.items()}, cotangents)
    rivals = gradients(formula, inputs, cotangents)
    slack = (
        1e-5 if inputs["q"].dtype == torch.float32 else 1e-4
    )  # a row of one key: dS is the difference of equal numbers
    for name, result in results.items():
        error, allowed = relative_error(result, exact[name]), 2 * relative_error(rivals[name], exact[name]) + slack
        assert error <= allowed, f"d{name}: error {error:.2e}, allowed {allowed:.2e}"


def assert_same(results: list[Tensor], truths: list[Tensor]) -> None:
    """Bitwise, but for gradients on CUDA: their sums over tiles have no fixed order."""
    for i, (result, truth) in enumerate(zip(results, truths, strict=True)):
        if i < 2 or truth.device.type == "cpu":
            assert torch.equal(result, truth)
        else:
            assert relative_error(result, truth) < 1e-3
