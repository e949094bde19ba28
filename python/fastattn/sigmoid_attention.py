"""Sigmoid attention, dense, causal or in a sliding window: the public function and its two rows of the op table."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._ops import Op, backward_flops_per_score, is_deterministic, needed_gradients, only_wanted, register
from .attention import backward_fake, forward_flops, kept_scores


def sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: float | Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    r"""Sigmoid attention, ``sigmoid(scale · q kᵀ + bias) v``: each weight stands alone, rows do not sum to 1.

    A score that the mask hides weighs exactly 0. Nothing but the inputs is kept for the backward. Weights are right in
    relative terms where they live, near ``1 / seq_k``: on a GPU within 3.5e-4, and far better when they are small,
    before they are rounded to the dtype of ``v``.

    Theory, Analysis, and Best Practices for Sigmoid Self-Attention (Ramapuram et al., 2024, arXiv 2409.04431).

    Args:
        q: ``[batch, seq_q, heads, head_dim]``; dtypes, strides, devices and head_dim as in ``fastattn.attention``.
        k, v: ``[batch, seq_k, kv_heads, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        bias: added to the scaled scores: a number, or a float tensor ``[heads]`` that may require grad;
            ``-ln(seq_k)`` if None, with which the weights of a row sum to about 1 at first.
        scale: multiplies the scores, finite and positive; ``1 / sqrt(head_dim)`` if None.
        causal: hide the keys after each query.
        window: ``(left, right)``, the number of keys seen on either side of the diagonal; -1 is unbounded.
        deterministic: the same gradients in every run, as in ``fastattn.attention``.

    Returns:
        The output, ``[batch, seq_q, heads, head_dim]``, contiguous, in the dtype of ``q``; 0 for a query that sees no
        key. Differentiable once.

    Raises:
        RuntimeError: for an argument that cannot be run. The message names the argument, what came and what is allowed.

    Example:
        >>> q, k, v = torch.randn(3, 2, 128, 8, 64).unbind()
        >>> sigmoid_attention(q, k, v, causal=True).shape
        torch.Size([2, 128, 8, 64])
    """
    if isinstance(bias, Tensor):
        tensor, constant = bias.float(), None
    else:
        tensor, constant = None, bias
    out: Tensor = torch.ops.fastattn.sigmoid_attention(
        q,
        k,
        v,
        tensor,
        constant_bias=constant,
        scale=scale,
        causal=causal,
        window=window,
        deterministic=is_deterministic(deterministic),
    )
    return out


def _flops(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], bias: Sequence[int] | None = None, **options: Any
) -> int:
    return forward_flops(q, k, v, **options)


def _backward_flops(
    dout: Sequence[int],
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    *rest: Any,
    wanted: Sequence[bool] = (True,) * 4,
    causal: bool = False,
    window: Sequence[int] | None = None,
    **_: Any,
) -> int:
    batch, seq_q, heads, head_dim = q
    scores = batch * heads * kept_scores(seq_q, k[1], causal, window)
    return scores * backward_flops_per_score(wanted, head_dim, head_dim)


def _fake(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    wanted: Sequence[bool] = (True,) * 4,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    biases = q.shape[2] if bias is not None and wanted[3] else 0
    return *backward_fake(dout, None, q, k, v, wanted=wanted), q.new_empty((biases,), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], options: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = options


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bias = ctx.saved_tensors
    wanted = needed_gradients(ctx)
    gradients = torch.ops.fastattn.sigmoid_attention_backward(dout, q, k, v, bias, **ctx.options, wanted=wanted)
    return only_wanted(gradients, wanted)


_OPTIONS = (
    "float? constant_bias=None, float? scale=None, bool causal=False, int[]? window=None, bool deterministic=False"
)

register(
    Op(
        name="sigmoid_attention",
        schema=f"(Tensor q, Tensor k, Tensor v, Tensor? bias=None, *, {_OPTIONS}) -> Tensor",
        fake=_fake,
        flops=_flops,
        setup_context=_setup_context,
        backward=_backward,
        autocast=3,
    )
)
register(
    Op(
        name="sigmoid_attention_backward",
        schema=f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias, *, {_OPTIONS}, "
        "bool[4] wanted=[True, True, True, True]) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
        fake=_backward_fake,
        flops=_backward_flops,
    )
)
