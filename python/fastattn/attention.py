"""Softmax attention, dense, causal or in a sliding window: the public function and its two rows of the op table."""

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ._ops import (
    Op,
    backward_flops_per_score,
    gradient_fake,
    is_deterministic,
    needed_gradients,
    only_wanted,
    register,
)

UNBOUNDED = -1
"""A side of a window without bound."""

Window = tuple[int | Tensor, int | Tensor]
"""Its left and its right side, for all heads or for each, int32 ``[heads]``."""

SegmentIds = Tensor | tuple[Tensor, Tensor]
"""Of queries and keys, int32 ``[batch or 1, seq_q]`` and ``[batch or 1, seq_k]``; one tensor is of both."""


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    key_bias: Tensor | None = ...,
    sinks: Tensor | None = ...,
    rectangles: Tensor | None = ...,
    segment_ids: SegmentIds | None = ...,
    deterministic: bool | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    key_bias: Tensor | None = ...,
    sinks: Tensor | None = ...,
    rectangles: Tensor | None = ...,
    segment_ids: SegmentIds | None = ...,
    deterministic: bool | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: Window | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    rectangles: Tensor | None = None,
    segment_ids: SegmentIds | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention, ``softmax(scale · q kᵀ) v``, computed tile by tile and never stored as a matrix.

    Query ``i`` sees key ``j`` when ``-left <= j - (i + seq_k - seq_q) <= right``: the band is aligned with the
    bottom-right corner, so that the last query sees the last key. It also sees the keys of each of the ``rectangles``
    that it is in, and of all these only those with its own ``segment_ids``. A query that sees no key gets an output of
    0, an LSE of -inf and gradients of 0. Sums are kept in float32 whatever the dtype.

    The algorithm is FlashAttention-2 (Dao, 2023, arXiv 2307.08691); on Hopper with the asynchronous tile pipeline of
    FlashAttention-3 (Shah et al., 2024, arXiv 2407.08608).

    Args:
        q: ``[batch, seq_q, heads, head_dim]``, float32 (CPU only), float16 or bfloat16. Any strides with a contiguous
            last dimension: slices of a fused QKV projection and transposed ``[batch, heads, seq, head_dim]`` views are
            read in place. (CUDA: in place where base and strides are multiples of 16 bytes, else from a copy.)
            ``head_dim`` is a multiple of 8 up to 256.
        k, v: ``[batch, seq_k, kv_heads, head_dim]``, dtype and device of ``q``. ``heads`` is a multiple of
            ``kv_heads``; query head ``h`` reads key head ``h // (heads // kv_heads)`` (grouped-query attention).
            ``v`` may have a ``head_dim`` of its own, which is then the output's.
        scale: multiplies the scores, finite and positive; ``1 / sqrt(head_dim)`` if None.
        causal: hide the keys after each query: caps ``right`` at 0.
        window: ``(left, right)``, the number of keys seen on either side of the diagonal; -1 is unbounded. Each of the
            two may be int32 ``[heads]``, with a number for each head, on the device of ``q``.
        softcap: scores become ``softcap · tanh(score / softcap)``, with the scale in them (Gemma 2, arXiv 2408.00118).
        key_bias: float32 ``[batch or 1, heads or 1, seq_k]``, added to the scores of a key after that. -inf hides the
            key from all queries: a padding mask.
        sinks: float32 ``[heads]``: a logit in the sum of each row of a head, to which no value belongs (gpt-oss, arXiv
            2508.10925). It is a part of the log-sum-exp.
        rectangles: int32 ``[batch or 1, 1 to 4, 4]``, rows ``(row_begin, row_end, key_begin, key_end)``, half open, on
            the device of ``q``: scores that are seen beside the band, such as those within an image or a prefix of a
            causal prompt. What reaches outside the scores is cut off; one whose end is not behind its beginning is
            empty.
        segment_ids: int32 ``[batch or 1, seq_q]`` and ``[batch or 1, seq_k]``, or one tensor for both where the lengths
            are equal, on the device of ``q``: a query sees only keys whose id is its own, in the band and in rectangles
            alike. Ids may come in any order; segments that are not cut into pieces are fast, for whole tiles are left
            out.
        deterministic: the same gradients, bit for bit, in every run; if None, as torch is told by
            ``torch.use_deterministic_algorithms``. The output always is, and on a CPU so are the gradients; on CUDA
            those up to ``head_dim`` 128 take up to a third more time then, the most where there are few heads.
        return_lse: return the log-sum-exp of each row as well.

    Returns:
        The output, ``[batch, seq_q, heads, head_dim of v]``, contiguous, in the dtype of ``q``; with ``return_lse``
        that and the natural log-sum-exp of the scaled, masked scores, float32 ``[batch, heads, seq_q]``. Both are
        differentiable in q, k, v, sinks and the key bias. Second derivatives are not available.

    Raises:
        RuntimeError: for an argument that cannot be run; rectangles and segments cannot be combined with a softcap or a
            key bias yet. The message names the argument, what came and what is allowed.
        ValueError: for a softcap that is not positive, and segment ids that are not of queries and keys.

    Example:
        >>> q, k, v = torch.randn(3, 2, 128, 8, 64).unbind()
        >>> attention(q, k, v, causal=True).shape
        torch.Size([2, 128, 8, 64])
    """
    of_all, left, right = windows_of(window)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap must be positive, or None, got {softcap}")
    segments = (segment_ids, segment_ids) if segment_ids is None or isinstance(segment_ids, Tensor) else segment_ids
    if len(segments) != 2:
        raise ValueError(f"attention: segment_ids must be those of queries and of keys, got {len(segments)} tensors")
    masks = (left, right, rectangles, *segments)
    out, lse = torch.ops.fastattn.attention(
        q,
        k,
        v,
        sinks,
        key_bias,
        *masks,
        scale=scale,
        causal=causal,
        window=of_all,
        softcap=softcap or 0.0,
        deterministic=is_deterministic(deterministic),
    )
    return (out, lse) if return_lse else out


def windows_of(window: Window | None) -> tuple[list[int] | None, Tensor | None, Tensor | None]:
    """The window of all heads, and the sides of each head's own, as the op takes them."""
    if window is None:
        return None, None, None
    left, right, *_ = [side if isinstance(side, Tensor) else None for side in (*window, None, None)]
    return [UNBOUNDED if isinstance(side, Tensor) else side for side in window], left, right


def kept_scores(seq_q: int, seq_k: int, causal: bool = False, window: Sequence[int] | None = None) -> int:
    """The number of (query, key) pairs that the mask keeps."""
    left, right = window or (UNBOUNDED, UNBOUNDED)
    right = 0 if causal else right

    def ramp_sum(first: int) -> int:
        """Σ clip(first + i, 0, seq_k) over the queries i."""

        def below(x: int) -> int:  # Σ min(j, seq_k) over 0 <= j < x
            linear = min(max(x, 0), seq_k + 1)
            return linear * (linear - 1) // 2 + (max(x, 0) - linear) * seq_k

        return below(first + seq_q) - below(first)

    diagonal = seq_k - seq_q
    ends = seq_q * seq_k if right == UNBOUNDED else ramp_sum(diagonal + right + 1)
    begins = 0 if left == UNBOUNDED else ramp_sum(diagonal - left)
    return ends - begins


def forward_flops(
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    *rest: Any,
    causal: bool = False,
    window: Sequence[int] | None = None,
    **_: Any,
) -> int:
    """Of the band: what rectangles add and segments take is written in data, which is not read."""
    batch, seq_q, heads, head_dim = q
    return 2 * batch * heads * (head_dim + v[3]) * kept_scores(seq_q, k[1], causal, window)


def _backward_flops(
    dout: Sequence[int],
    dlse: Sequence[int] | None,
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
    return scores * backward_flops_per_score(wanted, head_dim, v[3])


# What other ops that return an output and a log-sum-exp share; `rest` is what their masks are made of.


def forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None, **_: Any) -> tuple[Tensor, Tensor]:
    batch, seq_q, heads, _head_dim = q.shape
    return q.new_empty((batch, seq_q, heads, v.shape[3])), q.new_empty((batch, heads, seq_q), dtype=torch.float32)


def backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Tensor | None,
    wanted: Sequence[bool] = (True,) * 3,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return gradient_fake(q, wanted[0]), gradient_fake(k, wanted[1]), gradient_fake(v, wanted[2])


def save_inputs_and_outputs(
    ctx: Any, inputs: tuple[Tensor | None, ...], options: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)
    ctx.options = options


def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_bias: Tensor | None = None,
    *rest: Tensor | None,
    wanted: Sequence[bool] = (True,) * 4,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _seq_q, heads, _head_dim = q.shape
    has_bias = wanted[3] and key_bias is not None
    dkey_bias = q.new_empty((batch, heads, k.shape[1]) if has_bias else (0,), dtype=torch.float32)
    return *backward_fake(dout, dlse, q, k, v, wanted=wanted), dkey_bias


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 10
    q, k, v, sinks, key_bias, *masks, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    needs_q, needs_k, needs_v, needs_sinks, needs_bias, *_ = needed_gradients(ctx)
    wanted = (needs_q, needs_k, needs_v, needs_bias)
    dq = dk = dv = dkey_bias = None
    if any(wanted):
        gradients = torch.ops.fastattn.attention_backward(
            dout, dlse, q, k, v, out, lse, key_bias, *masks, **ctx.options, wanted=wanted
        )
        dq, dk, dv, dkey_bias = only_wanted(gradients, wanted)
    if dkey_bias is not None:
        dkey_bias = dkey_bias.sum_to_size(key_bias.shape)
    dsinks = sinks_gradient(sinks, dout, dlse, out, lse) if needs_sinks else None
    return dq, dk, dv, dsinks, dkey_bias, *(None,) * 5


def sinks_gradient(sinks: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
    """A sink is a score whose value is 0. Where nothing is kept a sink of -inf has no weight either."""
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    delta = delta if dlse is None else delta - dlse
    weight = (sinks[:, None] - lse).exp().masked_fill(lse == -math.inf, 0)
    return -(weight * delta).sum((0, 2))


_OPTIONS = "float? scale=None, bool causal=False, int[]? window=None, float softcap=0.0, bool deterministic=False"
_HEAD_WINDOWS = "Tensor? window_left=None, Tensor? window_right=None"
_REGIONS = "Tensor? rectangles=None, Tensor? segments_q=None, Tensor? segments_k=None"

register(
    Op(
        name="attention",
        schema=f"(Tensor q, Tensor k, Tensor v, Tensor? sinks=None, Tensor? key_bias=None, {_HEAD_WINDOWS}, "
        f"{_REGIONS}, *, {_OPTIONS}) -> (Tensor out, Tensor lse)",
        fake=forward_fake,
        flops=forward_flops,
        setup_context=save_inputs_and_outputs,
        backward=_backward,
        autocast=3,
    )
)
register(
    Op(
        name="attention_backward",
        schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"Tensor? key_bias=None, {_HEAD_WINDOWS}, {_REGIONS}, *, {_OPTIONS}, bool[4] wanted=[True, True, True, True]) "
        "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dkey_bias)",
        fake=_backward_fake,
        flops=_backward_flops,
    )
)
