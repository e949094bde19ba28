"""Softmax attention on listed blocks of scores: the public function and its two rows of the op table."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ._ops import Op, backward_flops_per_score, is_deterministic, needed_gradients, only_wanted, register
from .attention import backward_fake, forward_fake, kept_scores, save_inputs_and_outputs
from .block_list import BlockList


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float | None = ...,
    deterministic: bool | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float | None = ...,
    deterministic: bool | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList,
    *,
    scale: float | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention on the blocks of scores that ``blocks`` lists; the others are skipped.

    ``softmax(scale · q kᵀ) v`` over the keys that each query sees by ``blocks.token_mask()``, which is never made. A
    query that sees no key gets an output of 0, an LSE of -inf and gradients of 0.

    The list is read on the device at each call, and transposed there for the backward: nothing waits for the host, and
    a captured CUDA graph follows what is written into the list's tensors. Its contents are trusted: a list that
    ``blocks.validate()`` refuses may read or write anything.

    Args:
        q: ``[batch, seq_q, heads, head_dim]``; dtypes, strides, devices and head_dim as in ``fastattn.attention``.
        k, v: ``[batch, seq_k, kv_heads, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        blocks: the blocks that each query head keeps, made for ``seq_q`` queries and ``seq_k`` keys, on the device of
            ``q``. A ``BlockList`` may also hide the keys after each query, see ``causal`` there.
        scale: multiplies the scores, finite and positive; ``1 / sqrt(head_dim)`` if None.
        deterministic: the same gradients in every run, as in ``fastattn.attention``.
        return_lse: return the log-sum-exp of each row as well.

    Returns:
        The output, ``[batch, seq_q, heads, head_dim]``, contiguous, in the dtype of ``q``; with ``return_lse`` that and
        the natural log-sum-exp of the scaled, kept scores, float32 ``[batch, heads, seq_q]``. Both are differentiable;
        second derivatives are not available.

    Raises:
        TypeError, ValueError: if ``blocks`` is not a block list, or one for other lengths.
        RuntimeError: for an argument that cannot be run. The message names the argument, what came and what is allowed.

    Example:
        >>> q, k, v = torch.randn(3, 2, 1024, 8, 64).unbind()
        >>> blocks = BlockList.sink_and_window(1, 2, seq_q=1024, seq_k=1024)
        >>> block_sparse_attention(q, k, v, blocks).shape
        torch.Size([2, 1024, 8, 64])
    """
    if not isinstance(blocks, BlockList):
        raise TypeError(f"block_sparse_attention: blocks must be a fastattn.BlockList, got {type(blocks).__name__}")
    if q.dim() == k.dim() == 4 and (q.shape[1], k.shape[1]) != (blocks.seq_q, blocks.seq_k):
        raise ValueError(
            f"block_sparse_attention: blocks must be for {q.shape[1]} queries and {k.shape[1]} keys, "
            f"as q and k are, got a list for {blocks.seq_q} and {blocks.seq_k}"
        )
    out, lse = torch.ops.fastattn.block_sparse_attention(
        q,
        k,
        v,
        blocks.counts,
        blocks.indices,
        blocks.full,
        block_size=blocks.block_size,
        causal=blocks.causal,
        scale=scale,
        deterministic=is_deterministic(deterministic),
    )
    return (out, lse) if return_lse else out


def block_list(
    q: Tensor,
    k: Tensor,
    counts: Tensor,
    indices: Tensor,
    full: Tensor | None,
    block_size: Sequence[int],
    causal: bool,
) -> BlockList:
    """Of the tensors that an op was given."""
    size_q, size_k = block_size
    full = None if full is None else full.contiguous()
    return BlockList(counts.contiguous(), indices.contiguous(), q.shape[1], k.shape[1], (size_q, size_k), full, causal)


def _kept_scores(
    q: Tensor,
    k: Tensor,
    counts: Tensor,
    indices: Tensor,
    full: Tensor | None = None,
    *,
    block_size: Sequence[int],
    causal: bool = False,
    **_: Any,
) -> int:
    """Counting them waits for the device. Of tensors without data: as if every block were listed."""
    batch, seq_q, heads, _head_dim = q.shape
    if is_fake(counts) or counts.is_meta:
        return batch * heads * kept_scores(seq_q, k.shape[1], causal and full is None)
    per_head = block_list(q, k, counts, indices, full, block_size, causal).kept_scores
    return int(per_head.expand(batch, heads).sum())


def _forward_flops(q: Tensor, k: Tensor, v: Tensor, *blocks: Any, **options: Any) -> int:
    return 4 * q.shape[3] * _kept_scores(q, k, *blocks, **options)


def _backward_flops(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    counts: Tensor,
    indices: Tensor,
    full: Tensor | None,
    *columns: Tensor | None,
    wanted: Sequence[bool] = (True,) * 3,
    **options: Any,
) -> int:
    scores = _kept_scores(q, k, counts, indices, full, **options)
    return scores * backward_flops_per_score(wanted, q.shape[3], q.shape[3])


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return None, None, None, None, None, None
    q, k, v, counts, indices, full, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    block_size, causal = ctx.options["block_size"], ctx.options["causal"]
    columns = block_list(q, k, counts, indices, full, block_size, causal).transpose()
    wanted = needed_gradients(ctx)[:3]
    gradients = torch.ops.fastattn.block_sparse_attention_backward(
        dout, dlse, q, k, v, out, lse, counts, indices, full, *columns, **ctx.options, wanted=wanted
    )
    return *only_wanted(gradients, wanted), None, None, None


_OPTIONS = "int[] block_size, bool causal=False, float? scale=None, bool deterministic=False"

register(
    Op(
        name="block_sparse_attention",
        schema="(Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices, Tensor? full=None, *, "
        f"{_OPTIONS}) -> (Tensor out, Tensor lse)",
        fake=forward_fake,
        flops=_forward_flops,
        flops_read_data=True,
        setup_context=save_inputs_and_outputs,
        backward=_backward,
        autocast=3,
    )
)
register(
    Op(
        name="block_sparse_attention_backward",
        schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "Tensor counts, Tensor indices, Tensor? full, "
        "Tensor column_counts, Tensor column_indices, Tensor? column_full, *, "
        f"{_OPTIONS}, bool[3] wanted=[True, True, True]) -> (Tensor dq, Tensor dk, Tensor dv)",
        fake=backward_fake,
        flops=_backward_flops,
        flops_read_data=True,
    )
)
