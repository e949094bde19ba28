"""Softmax attention over sequences of many lengths in the same tensors."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ._ops import Op, backward_flops_per_score, is_deterministic, needed_gradients, only_wanted, register
from .attention import Window, backward_fake, kept_scores, save_inputs_and_outputs, sinks_gradient, windows_of


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    seqused_q: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    deterministic: bool | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    seqused_q: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    deterministic: bool | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""``fastattn.attention`` of sequences of many lengths, which lie one after the other in the same tensors.

    Sequence ``s`` has the queries ``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1]`` and the keys ``cu_seqlens_k[s]`` to
    ``cu_seqlens_k[s + 1]``. Its queries see keys of its own alone; causality and windows are in each sequence aligned
    with its last used query and key. A sequence may be empty. Lengths are read where they are: nothing waits for a GPU,
    and a captured graph may be replayed with others.

    Args:
        q: ``[tokens_q, heads, head_dim]``, of the dtypes, strides and head_dims that ``fastattn.attention`` takes.
        k, v: ``[tokens_k, kv_heads, head_dim]``, dtype and device of ``q``; ``v`` may have a ``head_dim`` of its own.
        cu_seqlens_q, cu_seqlens_k: int32 ``[sequences + 1]`` on the device of ``q``: 0, then where each sequence ends.
            Ascending, and no more than there are tokens. (On a CPU anything else is an error; on a GPU, where nobody
            looks, it is cut off.) Queries after the last sequence see nothing.
        seqused_q, seqused_k: int32 ``[sequences]``: how many tokens of each sequence are used, from its first on; all
            if None. Unused keys and values are not looked at. Unused queries see nothing.
        max_seqlen_q, max_seqlen_k: about the greatest lengths, for the choice of tiles. No result depends on them.
        scale, causal, window, softcap, sinks, deterministic, return_lse: as in ``fastattn.attention``.

    Returns:
        The output, ``[tokens_q, heads, head_dim of v]``; with ``return_lse`` that and the log-sum-exp, float32
        ``[heads, tokens_q]``. A query that sees nothing has an output of 0 and an LSE of -inf, or its sink. Both are
        differentiable in q, k, v and sinks, with gradients of 0 for tokens that see nothing or are not seen;
        second derivatives are not available.

    Raises:
        RuntimeError: for an argument that cannot be run. The message names the argument, what came and what is allowed.

    Example:
        >>> q, k, v = torch.randn(3, 100, 8, 64).unbind()
        >>> cu_seqlens = torch.tensor([0, 30, 30, 100], dtype=torch.int32)
        >>> varlen_attention(q, k, v, cu_seqlens, cu_seqlens, causal=True).shape
        torch.Size([100, 8, 64])
    """
    of_all, left, right = windows_of(window)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"varlen_attention: softcap must be positive, or None, got {softcap}")
    out, lse = torch.ops.fastattn.varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        sinks,
        left,
        right,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        scale=scale,
        causal=causal,
        window=of_all,
        softcap=softcap or 0.0,
        deterministic=is_deterministic(deterministic),
    )
    return (out, lse) if return_lse else out


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None, **_: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _head_dim = q.shape
    return q.new_empty((tokens, heads, v.shape[2])), q.new_empty((heads, tokens), dtype=torch.float32)


def _kept_scores(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    *rest: Any,
    causal: bool = False,
    window: Sequence[int] | None = None,
    **_: Any,
) -> int:
    """Of one head. Reading the lengths waits for the device."""
    queries, keys = (
        (cu_seqlens.diff() if used is None else used).tolist()
        for cu_seqlens, used in ((cu_seqlens_q, seqused_q), (cu_seqlens_k, seqused_k))
    )
    return sum(kept_scores(seq_q, seq_k, causal, window) for seq_q, seq_k in zip(queries, keys, strict=True))


def _flops(q: Tensor, k: Tensor, v: Tensor, *sequences: Any, **options: Any) -> int:
    return 2 * q.shape[1] * (q.shape[2] + v.shape[2]) * _kept_scores(*sequences, **options)


def _backward_flops(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *sequences: Any,
    wanted: Sequence[bool] = (True,) * 3,
    **options: Any,
) -> int:
    scores = q.shape[1] * _kept_scores(*sequences, **options)
    return scores * backward_flops_per_score(wanted, q.shape[2], v.shape[2])


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 10
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, sinks, left, right, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    needed = needed_gradients(ctx)
    wanted, needs_sinks = needed[:3], needed[7]
    dq = dk = dv = dsinks = None
    if any(wanted):
        sequences = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
        gradients = torch.ops.fastattn.varlen_attention_backward(
            dout, dlse, q, k, v, out, lse, *sequences, left, right, **ctx.options, wanted=wanted
        )
        dq, dk, dv = only_wanted(gradients, wanted)
    if needs_sinks:
        dsinks = sinks_gradient(sinks, dout[None], None if dlse is None else dlse[None], out[None], lse[None])
    return dq, dk, dv, None, None, None, None, dsinks, None, None


_SEQUENCES = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seqused_q=None, Tensor? seqused_k=None"
_HEAD_WINDOWS = "Tensor? window_left=None, Tensor? window_right=None"
_OPTIONS = (
    "int? max_seqlen_q=None, int? max_seqlen_k=None, float? scale=None, bool causal=False, int[]? window=None, "
    "float softcap=0.0, bool deterministic=False"
)

register(
    Op(
        name="varlen_attention",
        schema=f"(Tensor q, Tensor k, Tensor v, {_SEQUENCES}, Tensor? sinks=None, {_HEAD_WINDOWS}, *, {_OPTIONS}) "
        "-> (Tensor out, Tensor lse)",
        fake=_fake,
        flops=_flops,
        flops_read_data=True,
        setup_context=save_inputs_and_outputs,
        backward=_backward,
        autocast=3,
        has_batch=False,
    )
)
register(
    Op(
        name="varlen_attention_backward",
        schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{_SEQUENCES}, {_HEAD_WINDOWS}, *, {_OPTIONS}, bool[3] wanted=[True, True, True]) "
        "-> (Tensor dq, Tensor dk, Tensor dv)",
        fake=backward_fake,
        flops=_backward_flops,
        flops_read_data=True,
        has_batch=False,
    )
)
