"""SALE: attention on the blocks that low-bit scores find, and the thresholds that make it good enough."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from rich.console import Console
from torch import Tensor

from . import _plan_file
from ._progress import progress_bar
from .attention import attention
from .block_sparse_attention import block_sparse_attention
from .estimate_blocks import estimate_blocks, selector

FORMAT = "fastattn.sale.1"


@dataclass(frozen=True)
class SalePlan:
    """The threshold of each layer and head, as ``calibrate_sale`` finds it, and the options that it was found for.

    Example:
        >>> q, k, v = torch.randn(3, 1, 512, 4, 64).unbind()
        >>> plan = calibrate_sale([(0, q, k, v)], theta=0.1)
        >>> sale_attention(q, k, v, plan.thresholds[0], **plan.options).shape
        torch.Size([1, 512, 4, 64])
    """

    thresholds: Tensor  # float32 [layers, heads]; 0: the head is computed whole
    block_size: tuple[int, int] = (128, 128)
    sink: int = 1
    window: int = 2
    causal: bool = True
    bits: Literal[4, 8] = 4
    smooth_queries: bool = True
    query_stride: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """Those of ``sale_attention`` and ``estimate_blocks``."""
        names = ("block_size", "sink", "window", "causal", "bits", "smooth_queries", "query_stride")
        return {name: getattr(self, name) for name in names}

    def save(self, path: Path | str) -> None:
        """As safetensors. Needs ``pip install 'fastattn[plans]'``."""
        options = {**self.options, "block_size": "x".join(map(str, self.block_size))}
        numbers = {name: str(int(x) if isinstance(x, bool) else x) for name, x in options.items()}
        _plan_file.save(path, "SalePlan", FORMAT, numbers, {"thresholds": self.thresholds})

    @classmethod
    def load(cls, path: Path | str) -> "SalePlan":
        """A plan that ``save`` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        numbers, tensors = _plan_file.load(path, "SalePlan", FORMAT)
        size_q, size_k = map(int, numbers["block_size"].split("x"))
        return cls(
            tensors["thresholds"],
            (size_q, size_k),
            int(numbers["sink"]),
            int(numbers["window"]),
            numbers["causal"] == "1",
            4 if numbers["bits"] == "4" else 8,
            numbers["smooth_queries"] == "1",
            int(numbers.get("query_stride", 1)),  # plans had none at first
        )


@overload
def sale_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    threshold: float | Tensor,
    *,
    block_size: tuple[int, int] = ...,
    sink: int = ...,
    window: int = ...,
    causal: bool = ...,
    scale: float | None = ...,
    bits: Literal[4, 8] = ...,
    smooth_queries: bool = ...,
    query_stride: int = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def sale_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    threshold: float | Tensor,
    *,
    block_size: tuple[int, int] = ...,
    sink: int = ...,
    window: int = ...,
    causal: bool = ...,
    scale: float | None = ...,
    bits: Literal[4, 8] = ...,
    smooth_queries: bool = ...,
    query_stride: int = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def sale_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    threshold: float | Tensor,
    *,
    block_size: tuple[int, int] = (128, 128),
    sink: int = 1,
    window: int = 2,
    causal: bool = True,
    scale: float | None = None,
    bits: Literal[4, 8] = 4,
    smooth_queries: bool = True,
    query_stride: int = 1,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention on the blocks of scores that ``estimate_blocks`` lists; on those it is exact.

    SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling (arXiv 2505.24179).

    Args:
        q: ``[batch, seq_q, heads, head_dim]``, dtypes and strides as in ``fastattn.attention``.
        k, v: ``[batch, seq_k, kv_heads, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        threshold: for all heads, or float ``[heads]``: the share of a query's mass in the sink and the window that a
            score is listed for. 0 computes all, as ``fastattn.attention`` does.
        block_size, sink, window, causal, scale, bits, smooth_queries, query_stride: as in ``estimate_blocks``.
        return_lse: return the log-sum-exp of each row as well.

    Returns:
        As ``fastattn.block_sparse_attention``. Differentiable; the choice of blocks is a constant.

    Raises:
        ValueError, RuntimeError: as ``estimate_blocks`` and ``block_sparse_attention``.
    """
    blocks = estimate_blocks(
        q,
        k,
        threshold,
        block_size=block_size,
        sink=sink,
        window=window,
        causal=causal,
        scale=scale,
        bits=bits,
        smooth_queries=smooth_queries,
        query_stride=query_stride,
    )
    out, lse = block_sparse_attention(q, k, v, blocks, scale=scale, return_lse=True)
    return (out, lse) if return_lse else out


@torch.no_grad()
def calibrate_sale(
    samples: Iterable[tuple[int, Tensor, Tensor, Tensor]],
    theta: float,
    *,
    start: float = 0.008,
    floor: float = 1e-4,
    block_size: tuple[int, int] = (128, 128),
    sink: int = 1,
    window: int = 2,
    causal: bool = True,
    scale: float | None = None,
    bits: Literal[4, 8] = 4,
    smooth_queries: bool = True,
    query_stride: int = 1,
    progress: bool = True,
) -> SalePlan:
    r"""Finds the threshold of each layer and head: halved from ``start`` until its error is under ``theta``.

    A threshold that has come down to ``floor`` becomes 0: its head is computed whole. Those of a layer are carried from
    sample to sample and only fall; the error of the samples before falls with them, but for chance.

    Args:
        samples: ``(layer, q, k, v)``, tensors as for ``sale_attention``, in any order. Layers are numbered from 0, and
            each of them comes.
        theta: bounds the relative error of a head's output, ``Σ |out - exact| / Σ |exact|`` over its tokens and
            channels, the worst of a batch; 0 makes every head dense. The bound in the paper is absolute, of
            ``Σ |out - exact| / tokens``, 0.4 for Llama 3.1 8B: it depends on how large a model's values are.
        start, floor: 0.008 and 1e-4 in the paper.
        block_size, sink, window, causal, scale, bits, smooth_queries, query_stride: as in ``estimate_blocks``; all but
            the scale are kept in the plan.
        progress: show a bar, where the standard error is a terminal.

    Raises:
        ValueError: for values that are not allowed, and if a layer lacks samples or has other heads than the others.
    """
    if not theta >= 0:
        raise ValueError(f"calibrate_sale: theta must be at least 0, got {theta}")
    if not 0 < floor < start:
        raise ValueError(f"calibrate_sale: floor must be positive and below start, got {floor} and {start}")
    options: dict[str, Any] = {
        "block_size": block_size,
        "sink": sink,
        "window": window,
        "causal": causal,
        "bits": bits,
        "smooth_queries": smooth_queries,
        "query_stride": query_stride,
    }
    found: dict[int, Tensor] = {}
    with progress_bar(Console(stderr=True, quiet=not progress)) as bar:
        for layer, q, k, v in bar.track(samples, description="SALE's thresholds"):
            select = selector(q, k, scale=scale, **options)
            exact = attention(q, k, v, causal=causal, scale=scale)
            threshold = found.get(layer, torch.full((q.shape[2],), start)).to(q.device)
            while True:
                out = block_sparse_attention(q, k, v, select(threshold), scale=scale)
                is_wrong = ~(_error(out, exact) < theta) & (threshold > 0)
                if not is_wrong.any():
                    break
                threshold = torch.where(is_wrong, threshold / 2, threshold)
                threshold = torch.where(threshold > floor, threshold, 0)
            found[layer] = threshold.cpu()
    thresholds = [found[layer] for layer in sorted(found)]
    if not found or sorted(found) != list(range(len(found))):
        raise ValueError(f"calibrate_sale: samples must come for layers 0, 1, …, each of them, got {sorted(found)}")
    if len({len(x) for x in thresholds}) != 1:
        raise ValueError(f"calibrate_sale: all layers must have as many heads, got {[len(x) for x in thresholds]}")
    return SalePlan(torch.stack(thresholds), **options)


def _error(out: Tensor, exact: Tensor) -> Tensor:
    """``[heads]``: Σ |out - exact| / Σ |exact| of each, the worst of a batch."""
    out, exact = out.float(), exact.float()
    errors: Tensor = (out - exact).abs().sum((1, 3)) / exact.abs().sum((1, 3)).clamp(min=1e-30)
    return errors.amax(0)
