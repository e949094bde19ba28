"""Softmax attention on 8-bit and 4-bit operands: the public function and its row of the op table."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ._key_term import key_term, product
from ._ops import Op, is_deterministic, only_wanted, register
from ._permute import permute_tokens
from .attention import kept_scores
from .block_list import BlockList
from .block_sparse_attention import block_list
from .quantize_tokens import Format, quantize_tokens

Values = Literal["int8", "fp8", "bf16"]

KEY_GROUP = 32
"""Keys that share a scale, see ``quantize_tokens``."""


@overload
def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qk: Format = ...,
    pv: Values = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: tuple[int, int] | None = ...,
    blocks: BlockList | None = ...,
    permutation: Tensor | None = ...,
    straight_through: bool = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qk: Format = ...,
    pv: Values = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: tuple[int, int] | None = ...,
    blocks: BlockList | None = ...,
    permutation: Tensor | None = ...,
    straight_through: bool = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qk: Format = "int8",
    pv: Values = "bf16",
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    blocks: BlockList | None = None,
    permutation: Tensor | None = None,
    straight_through: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""``attention``, or ``block_sparse_attention``, with queries, keys and values rounded to 8 or 4 bits.

    Keys are smoothed first, their mean over the tokens taken away, which changes no weight (SageAttention, arXiv
    2410.02367); with ``qk="int4"`` queries are too, and what that takes from the scores is put back (SageAttention2,
    arXiv 2411.10958). Each query has a scale, and 32 keys share one. Values may be rounded too, relative to the
    greatest of their channel, and the weights with them: for int8 relative to the greatest of their row in each tile of
    128 keys. Values of int8 are smoothed as well, and their mean is added to the output.

    Args:
        q: ``[batch, seq_q, heads, head_dim]``, float32 (CPU only), float16 or bfloat16, any strides as long as the last
            dimension is contiguous; ``head_dim`` a multiple of 8 up to 256 on the CPU, of 16 up to 128 on CUDA.
        k, v: ``[batch, seq_k, kv_heads, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        qk: what queries and keys are rounded to: "int8"; "int4", from -7 to 7, which is as fast as int8 and less
            precise; or "fp8", which is e4m3.
        pv: what values are rounded to: "bf16": not at all, they and the weights keep the dtype of ``v``; "fp8", which
            is less precise and the fastest with very many tokens; or "int8", with weights from 0 to 255.
        scale: multiplies the scores, finite and positive; ``1 / sqrt(head_dim)`` if None.
        causal, window: as in ``attention``; without ``blocks``.
        blocks: compute these blocks only, see ``block_sparse_attention``.
        permutation: the order in which tokens are taken: token i is token ``permutation[..., i]`` of q, k and v, whose
            lengths are equal; int32 or int64, ``[seq]`` or ``[batch or 1, heads or 1, seq]``, each token once. The
            mask is that of tokens in this order; the output is not: its tokens are where those of q were. A token that
            is left out gets zeros.
        straight_through: differentiable as if nothing had been rounded: the gradients are those of ``attention``.
        return_lse: return the log-sum-exp of each row as well.

    Returns:
        The output, ``[batch, seq_q, heads, head_dim]``, contiguous, in the dtype of ``q``; with ``return_lse`` that and
        the natural log-sum-exp of the scores, float32 ``[batch, heads, seq_q]``.

    Raises:
        TypeError, ValueError, RuntimeError: for an argument that cannot be run. The message names the argument, what
            came and what is allowed.

    Example:
        >>> q, k, v = torch.randn(3, 2, 1024, 8, 64).unbind()
        >>> quantized_attention(q, k, v, causal=True).shape
        torch.Size([2, 1024, 8, 64])
    """
    if qk not in ("int8", "int4", "fp8"):
        raise ValueError(f"quantized_attention: qk must be 'int8', 'int4' or 'fp8', got {qk!r}")
    if pv not in ("int8", "fp8", "bf16"):
        raise ValueError(f"quantized_attention: pv must be 'int8', 'fp8' or 'bf16', got {pv!r}")
    q, k, v = _cast_under_autocast(q, k, v)
    _check_inputs(q, k, v)
    if blocks is not None:
        _check_blocks(blocks, q, k, causal, window)
    if permutation is not None:
        permutation = _checked_permutation(permutation, q, k)
    if straight_through:
        if permutation is not None:
            raise ValueError("quantized_attention: straight_through and permutation cannot be used together")
        lists = (None, None, None) if blocks is None else (blocks.counts, blocks.indices, blocks.full)
        options = (None, causal) if blocks is None else (blocks.block_size, blocks.causal)
        out, lse = _StraightThrough.apply(q, k, v, *lists, *options, window, scale, qk, pv)  # type: ignore[no-untyped-call]
        return (out, lse) if return_lse else out
    out, lse = _run(q, k, v, blocks, permutation, qk, pv, scale, causal, window, return_lse)
    return (out, lse) if return_lse else out


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockList | None,
    permutation: Tensor | None,
    qk: Format,
    pv: Values,
    scale: float | None,
    causal: bool,
    window: Sequence[int] | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Quantizes and attends; the log-sum-exp is right only with ``with_lse``."""
    operands, k_mean = quantized_operands(q, k, v, qk=qk, pv=pv, scale=scale, permutation=permutation)
    out, lse = torch.ops.fastattn.quantized_attention(
        *operands,
        *((None, None, None) if blocks is None else (blocks.counts, blocks.indices, blocks.full)),
        permutation,
        block_size=None if blocks is None else blocks.block_size,
        causal=causal if blocks is None else blocks.causal,
        window=window,
        scale=scale,
        dtype=q.dtype,
    )
    if with_lse:  # of the keys as they were: each score is less by q · mean
        mean = k_mean.repeat_interleave(_group(q, k), 1)[..., None]
        lse = lse + _scale(q, scale) * product(q.float().contiguous().transpose(1, 2), mean)[..., 0]
    return out, lse


def quantized_operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    qk: Format,
    pv: Values,
    scale: float | None = None,
    permutation: Tensor | None = None,
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """What the op takes first, q … key_term, and the mean that was taken from the keys."""
    unpacked = {"packed": False} if qk == "int4" else {}
    low_q = quantize_tokens(q, format=qk, smooth=qk == "int4", permutation=permutation, **unpacked)
    low_k = quantize_tokens(k, format=qk, group=KEY_GROUP, smooth=True, permutation=permutation, **unpacked)
    assert low_k.mean is not None
    term = None
    of_values: tuple[Tensor, Tensor | None, Tensor | None]
    if low_q.mean is not None:
        term = key_term(_scale(q, scale) * low_q.mean, k.float() - low_k.mean[:, None], permutation)
    if pv == "bf16":
        of_values = (v if permutation is None else permute_tokens(v, permutation), None, None)
    else:
        # e4m3 keeps small weights and loses nothing by a mean: see the design note.
        low_v = quantize_tokens(v, format=pv, transpose=True, smooth=pv == "int8", permutation=permutation)
        of_values = (low_v.values, low_v.scales, low_v.mean)
    return (low_q.values, low_q.scales, low_k.values, low_k.scales, *of_values, term), low_k.mean


def _group(q: Tensor, k: Tensor) -> int:
    """Query heads of each key head."""
    return q.shape[2] // max(k.shape[2], 1)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[3] ** -0.5 if scale is None else scale


def _cast_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autocast does with the inputs of the other ops. Of this op it sees what they were rounded to."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What is asked of the three together. Quantizing sees one at a time, and calls it x."""
    op = "quantized_attention"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} must have 4 dimensions, [batch, seq, heads, head_dim], got {[*x.shape]}")
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{op}: {name} must be float32, float16 or bfloat16, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{op}: {name} must be on the device of q, {q.device}, got {x.device}")
        if x.numel() > 0 and x.shape[3] > 1 and x.stride(3) != 1:
            raise ValueError(f"{op}: {name} must be contiguous in its last dimension, got strides {[*x.stride()]}")
    for what, axis in (("batch size", 0), ("head_dim", 3)):
        if k.shape[axis] != q.shape[axis]:
            raise ValueError(f"{op}: k must have the {what} of q, {q.shape[axis]}, got {k.shape[axis]}")
    if q.shape[2] > 0 and (k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0):
        raise ValueError(f"{op}: the heads of q must be a multiple of those of k, got {q.shape[2]} and {k.shape[2]}")
    if v.shape != k.shape:
        raise ValueError(f"{op}: v must have the shape of k, {[*k.shape]}, got {[*v.shape]}")


def _check_blocks(blocks: BlockList, q: Tensor, k: Tensor, causal: bool, window: Sequence[int] | None) -> None:
    if not isinstance(blocks, BlockList):
        raise TypeError(f"quantized_attention: blocks must be a fastattn.BlockList, got {type(blocks).__name__}")
    if (q.shape[1], k.shape[1]) != (blocks.seq_q, blocks.seq_k):
        raise ValueError(
            f"quantized_attention: blocks must be for {q.shape[1]} queries and {k.shape[1]} keys, as q and k are, "
            f"got a list for {blocks.seq_q} and {blocks.seq_k}"
        )
    if causal or window is not None:
        raise ValueError("quantized_attention: causal and window must be left out where blocks are given")


def _checked_permutation(permutation: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """int32 ``[batch or 1, heads or 1, seq]``."""
    permutation = permutation[None, None] if permutation.dim() == 1 else permutation
    shared_by_heads = permutation.dim() == 3 and permutation.shape[1] == 1
    if q.shape[1] != k.shape[1] or not (shared_by_heads or q.shape[2] == k.shape[2]):
        raise ValueError(
            "quantized_attention: permutation needs q and k of equal lengths and, unless it is one for all heads, "
            f"of equally many heads, got {[*q.shape]} and {[*k.shape]}"
        )
    return permutation.int() if permutation.dtype == torch.int64 else permutation


class _StraightThrough(torch.autograd.Function):
    """Forward on few bits, backward as if there had been all."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        counts: Tensor | None,
        indices: Tensor | None,
        full: Tensor | None,
        block_size: tuple[int, int] | None,
        causal: bool,
        window: Sequence[int] | None,
        scale: float | None,
        qk: Format,
        pv: Values,
    ) -> tuple[Tensor, Tensor]:
        blocks = _blocks(q, k, counts, indices, full, block_size, causal)
        return _run(q, k, v, blocks, None, qk, pv, scale, causal, window, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, counts, indices, full, block_size, causal, window, scale, *_ = inputs
        ctx.save_for_backward(q, k, v, counts, indices, full, *output)
        ctx.set_materialize_grads(False)
        ctx.block_size, ctx.causal, ctx.window, ctx.scale = block_size, causal, window, scale

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 12
        q, k, v, counts, indices, full, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        blocks = _blocks(q, k, counts, indices, full, ctx.block_size, ctx.causal)
        wanted = ctx.needs_input_grad[:3]
        options = {"scale": ctx.scale, "deterministic": is_deterministic(None)}
        if blocks is None:
            *gradients, _ = torch.ops.fastattn.attention_backward(
                dout,
                dlse,
                q,
                k,
                v,
                out,
                lse,
                causal=ctx.causal,
                window=ctx.window,
                wanted=(*wanted, False),
                **options,
            )
        else:
            gradients = torch.ops.fastattn.block_sparse_attention_backward(
                dout,
                dlse,
                q,
                k,
                v,
                out,
                lse,
                counts,
                indices,
                full,
                *blocks.transpose(),
                block_size=blocks.block_size,
                causal=blocks.causal,
                wanted=wanted,
                **options,
            )
        return (*only_wanted(gradients, wanted), *(None,) * 9)


def _blocks(
    q: Tensor,
    k: Tensor,
    counts: Tensor | None,
    indices: Tensor | None,
    full: Tensor | None,
    block_size: Sequence[int] | None,
    causal: bool,
) -> BlockList | None:
    if counts is None or indices is None or block_size is None:
        return None
    return block_list(q, k, counts, indices, full, block_size, causal)


def _fake(
    q: Tensor, q_scales: Tensor, k: Tensor, k_scales: Tensor, v: Tensor, v_scales: Tensor | None = None,
    *lists: Tensor | None, dtype: torch.dtype | None = None, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, seq_q, heads, _head_dim = q.shape
    dtype = dtype or (v.dtype if v_scales is None else torch.bfloat16)
    return q.new_empty(q.shape, dtype=dtype), q.new_empty((batch, heads, seq_q), dtype=torch.float32)


def _flops(
    q: Tensor,
    q_scales: Tensor,
    k: Tensor,
    k_scales: Tensor,
    v: Tensor,
    v_scales: Tensor | None = None,
    v_mean: Tensor | None = None,
    key_term: Tensor | None = None,
    counts: Tensor | None = None,
    indices: Tensor | None = None,
    full: Tensor | None = None,
    order: Tensor | None = None,
    *,
    block_size: Sequence[int] | None = None,
    causal: bool = False,
    window: Sequence[int] | None = None,
    **_: Any,
) -> int:
    """As many as ``attention`` or ``block_sparse_attention`` do on such scores, whatever the bits."""
    batch, seq_q, heads, head_dim = q.shape
    if counts is None:
        kept = batch * heads * kept_scores(seq_q, k.shape[1], causal, window)
    elif is_fake(counts) or counts.is_meta:
        kept = batch * heads * kept_scores(seq_q, k.shape[1], causal and full is None)
    else:
        blocks = _blocks(q, k, counts, indices, full, block_size, causal)
        assert blocks is not None
        kept = int(blocks.kept_scores.expand(batch, heads).sum())
    return 4 * head_dim * kept


register(
    Op(
        name="quantized_attention",
        schema="(Tensor q, Tensor q_scales, Tensor k, Tensor k_scales, Tensor v, Tensor? v_scales=None, "
        "Tensor? v_mean=None, Tensor? key_term=None, Tensor? counts=None, Tensor? indices=None, Tensor? full=None, "
        "Tensor? order=None, *, int[]? block_size=None, bool causal=False, int[]? window=None, float? scale=None, "
        "ScalarType? dtype=None) -> (Tensor out, Tensor lse)",
        fake=_fake,
        flops=_flops,
        flops_read_data=True,
        why_no_gradient="rounding has none. Use fastattn.quantized_attention(…, straight_through=True), or detach.",
    )
)
