"""Times and errors one can trust, for the benchmarks and the demo.

Times: every contestant runs on the same inputs in the same process, in rounds that begin with another contestant each
time, so that clocks, temperature and neighbours treat all alike; the median counts. On a GPU each call starts with a
cold L2 cache. Errors: against float64 on the very inputs that the kernel read.
"""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

Call = Callable[[], object]
Formula = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""The output from q, k, v and a mask that says which key each query sees."""

SCORES_AT_ONCE = 1 << 24
"""Bounds the memory of a float64 sample."""


def interleaved_times(
    calls: Mapping[str, Call],
    device: torch.device,
    seconds: float,
    fewest_rounds: int = 5,
    clock: Callable[[Call], float] | None = None,
) -> dict[str, float]:
    """Median microseconds of each call, or of what `clock` tells. Rounds go on for about `seconds`."""
    clock = clock or (_cuda_clock() if device.type == "cuda" else _cpu_clock)
    for call in calls.values():
        call()
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < fewest_rounds or time.perf_counter() < end:
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(clock(calls[name]))
        rounds += 1
    return {name: median(times) for name, times in samples.items()}


def _cpu_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def _cuda_clock() -> Callable[[Call], float]:
    testing = importlib.import_module("triton.testing")

    def clock(call: Call) -> float:
        return float(testing.do_bench(call, warmup=5, rep=25, return_mode="median")) * 1e3

    return clock


def matmul_tflops(device: torch.device, seconds: float = 1) -> float:
    """The machine's rate at large matrix products: bf16 8192³ on a GPU, fp32 2048³ on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / interleaved_times({"matmul": lambda: a @ b}, device, seconds)["matmul"] * 1e-6


def relative_error(x: Tensor, expected: Tensor) -> float:
    """‖x − expected‖ / ‖expected‖."""
    return float((x.to(expected) - expected).norm() / expected.norm())


class Part(NamedTuple):
    """Some queries of the query heads that read one key head."""

    batch: int
    heads: slice
    queries: slice


class Float64Sample:
    """What an op and its gradients are in float64, for two key heads and the query heads that read them.

    ``keep`` gives the mask of a part, bool ``[queries, seq_k]``, by itself or for each of the part's heads. All of a
    head is computed, a part at a time, so that long sequences can be judged as well.
    """

    def __init__(
        self,
        formula: Formula,
        keep: Callable[[Part], Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor | None = None,
    ) -> None:
        self.group = q.shape[-2] // k.shape[-2]
        self.heads = sorted({(0, 0), (q.shape[0] - 1, k.shape[-2] - 1)})  # (batch, key head)
        self.expected = [self._expected(formula, keep, q, k, v, dout, head) for head in self.heads]

    def error(self, out: Tensor) -> float:
        """The output's relative error."""
        return max(
            relative_error(self._query_heads(out, head), expected[0])
            for head, expected in zip(self.heads, self.expected, strict=True)
        )

    def gradient_error(self, gradients: Sequence[Tensor], names: str = "qkv") -> float:
        """The largest relative error among the gradients of q, k and v, or of those that are named."""
        parts = {"q": self._query_heads, "k": self._key_head, "v": self._key_head}
        return max(
            relative_error(parts[name](gradient, head), expected[1 + "qkv".index(name)])
            for head, expected in zip(self.heads, self.expected, strict=True)
            for name, gradient in zip(names, gradients, strict=True)
        )

    def _expected(
        self,
        formula: Formula,
        keep: Callable[[Part], Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor | None,
        head: tuple[int, int],
    ) -> list[Tensor]:
        """The output, and the gradients if there is a `dout`."""
        inputs = [self._query_heads(q, head), self._key_head(k, head), self._key_head(v, head)]
        q, k, v = (x.requires_grad_(dout is not None) for x in inputs)
        dout = None if dout is None else self._query_heads(dout, head)
        seq_q, seq_k = q.shape[1], k.shape[1]
        count = max(SCORES_AT_ONCE // (self.group * seq_k), 1)
        outs = []
        for begin in range(0, seq_q, count):
            queries = slice(begin, min(begin + count, seq_q))
            out = formula(q[:, queries], k, v, keep(Part(head[0], self._group_of(head), queries)))
            if dout is not None:
                torch.autograd.backward(out, dout[:, queries])
            outs.append(out.detach())
        return [torch.cat(outs, 1), *(x.grad for x in inputs if x.grad is not None)]

    def _group_of(self, head: tuple[int, int]) -> slice:
        return slice(head[1] * self.group, (head[1] + 1) * self.group)

    def _query_heads(self, x: Tensor, head: tuple[int, int]) -> Tensor:
        return x.detach()[head[0], None, ..., self._group_of(head), :].flatten(1, -3).double()

    def _key_head(self, x: Tensor, head: tuple[int, int]) -> Tensor:
        return x.detach()[head[0], None, ..., head[1], None, :].flatten(1, -3).double()
