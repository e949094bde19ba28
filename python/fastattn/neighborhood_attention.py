"""Neighborhood attention in one, two or three dimensions: the public function and its two rows of the op table."""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ._ops import Op, backward_flops_per_score, is_deterministic, needed_gradients, only_wanted, register
from .attention import attention, backward_fake, save_inputs_and_outputs
from .axes import WHOLE_AXIS, axis_options
from .merge_attention import merge_attention


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | Sequence[int],
    stride: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    causal: bool | Sequence[bool] = ...,
    scale: float | None = ...,
    extra_k: Tensor | None = ...,
    extra_v: Tensor | None = ...,
    deterministic: bool | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | Sequence[int],
    stride: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    causal: bool | Sequence[bool] = ...,
    scale: float | None = ...,
    extra_k: Tensor | None = ...,
    extra_v: Tensor | None = ...,
    deterministic: bool | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention in which each query sees a box of keys around itself, in one, two or three dimensions.

    Along each axis a query sees ``window`` positions, itself in their middle; at an edge the window moves inwards as a
    whole. What is seen along the axes together is a box. A token that a query does not see is not paid for: key tiles
    outside a query tile's neighborhood are skipped, and those inside it need no mask. `fastattn.plan` tells what a
    neighborhood costs before anything runs.

    Neighborhood Attention Transformer (Hassani et al., 2022, arXiv 2204.07143), with the strides of Generalized
    Neighborhood Attention (Hassani et al., 2025, arXiv 2504.16922) and the dilation of arXiv 2209.15001.

    Args:
        q: ``[batch, X1(, X2(, X3)), heads, head_dim]``; dtypes and devices as in `fastattn.attention`, and head_dim too
            but on CUDA, where it is 64 or 128. Slices of a fused QKV projection are read in place; where axes do not
            lie in memory like one (and on CUDA where heads do not follow one another), a copy is made.
        k, v: ``[batch, X1(, X2(, X3)), kv_heads, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        window: positions that a query sees along each axis: at least 1, or -1 for all. One longer than the axis, or
            than its dilation group, is cut to that. An even window has one position more before the query than after.
        stride: so many neighboring queries share the window of one of them, the middle one or, along a causal axis, the
            last; at most the window. ``stride = window`` makes blocks that see themselves; a stride of the tiles'
            extents saves masks.
        dilation: positions are counted among the tokens whose coordinates leave the same remainder on division by this;
            at most 8 on a GPU.
        causal: hide what comes after the query along an axis.
            The four take one value for all axes or a sequence with one for each, outermost first.
        scale: multiplies the scores, finite and positive; ``1 / sqrt(head_dim)`` if None.
        extra_k, extra_v: ``[batch, n, kv_heads, head_dim]``: context, such as text, that every query sees beside its
            neighborhood.
        deterministic: the same gradients in every run, as in `fastattn.attention`.
        return_lse: return the log-sum-exp of each row as well.

    Returns:
        The output, contiguous, in the shape and dtype of ``q``; with ``return_lse`` that and the natural log-sum-exp of
        the scaled scores seen, float32 ``[batch, heads, X1(, X2(, X3))]``. Both are differentiable; second derivatives
        are not available.

    Raises:
        ValueError: for a window, stride, dilation or causal that is not allowed, or one of ``extra_k`` and ``extra_v``
            without the other.
        RuntimeError: for any other argument that cannot be run. Messages name the argument, what came and what is
            allowed.

    Example:
        >>> q, k, v = torch.randn(3, 1, 16, 24, 8, 64).unbind()  # an image of 16 x 24 tokens
        >>> neighborhood_attention(q, k, v, window=7).shape
        torch.Size([1, 16, 24, 8, 64])
    """
    if (extra_k is None) != (extra_v is None):
        raise ValueError("neighborhood_attention: extra_k and extra_v must be given together, got one of them")
    options = axis_options(max(q.dim() - 3, 1), window, stride, dilation, causal)
    deterministic = is_deterministic(deterministic)
    out, lse = torch.ops.fastattn.neighborhood_attention(
        q, k, v, **options._asdict(), scale=scale, deterministic=deterministic
    )
    if extra_k is not None and extra_v is not None:
        tokens = attention(
            q.flatten(1, -3), extra_k, extra_v, scale=scale, deterministic=deterministic, return_lse=True
        )
        shapes = out.shape, lse.shape
        out, lse = merge_attention(*zip((out.flatten(1, -3), lse.flatten(2)), tokens, strict=True))
        out, lse = out.reshape(shapes[0]), lse.reshape(shapes[1])
    return (out, lse) if return_lse else out


def _kept_along(length: int, window: int, stride: int, dilation: int, causal: bool) -> int:
    """Pairs of a query and a key that it keeps, along one axis."""
    pairs = 0
    for group in range(min(dilation, length)):
        positions = (length - group + dilation - 1) // dilation
        width = positions if window == WHOLE_AXIS else min(window, positions)
        if not causal:
            pairs += positions * width
            continue
        pairs += positions * (positions + 1) // 2
        for first in range(0, positions, stride):  # less what lies before the window of a stride group
            end = min(first + stride, positions)
            pairs -= (end - first) * max(end - width, 0)
    return pairs


def _kept_scores(
    q: Sequence[int],
    *,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    **_: Any,
) -> int:
    batch, *axes, heads, _head_dim = q
    return batch * heads * prod(_kept_along(*axis) for axis in zip(axes, window, stride, dilation, causal, strict=True))


def _flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], **options: Any) -> int:
    return 4 * q[-1] * _kept_scores(q, **options)


def _backward_flops(
    dout: Sequence[int],
    dlse: Sequence[int] | None,
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    *rest: Any,
    wanted: Sequence[bool] = (True,) * 3,
    **options: Any,
) -> int:
    return _kept_scores(q, **options) * backward_flops_per_score(wanted, q[-1], q[-1])


def _fake(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    batch, *axes, heads, _head_dim = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, *axes), dtype=torch.float32)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return None, None, None
    q, k, v, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    wanted = needed_gradients(ctx)
    gradients = torch.ops.fastattn.neighborhood_attention_backward(
        dout, dlse, q, k, v, out, lse, **ctx.options, wanted=wanted
    )
    return only_wanted(gradients, wanted)


_OPTIONS = "int[] window, int[] stride, int[] dilation, bool[] causal, float? scale=None, bool deterministic=False"

register(
    Op(
        name="neighborhood_attention",
        schema=f"(Tensor q, Tensor k, Tensor v, *, {_OPTIONS}) -> (Tensor out, Tensor lse)",
        fake=_fake,
        flops=_flops,
        setup_context=save_inputs_and_outputs,
        backward=_backward,
        autocast=3,
    )
)
register(
    Op(
        name="neighborhood_attention_backward",
        schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, *, "
        f"{_OPTIONS}, bool[3] wanted=[True, True, True]) -> (Tensor dq, Tensor dk, Tensor dv)",
        fake=backward_fake,
        flops=_backward_flops,
    )
)
