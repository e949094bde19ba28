"""The blocks of scores that low-bit estimates find worth computing: the public function and its row of the op table."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ._key_term import key_term
from ._ops import Op, register
from .block_list import BlockList
from .block_sparse_attention import block_sparse_attention

KEY_GROUP = 8  # keys that share a scale, see quantize_tokens


def estimate_blocks(
    q: Tensor,
    k: Tensor,
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
) -> BlockList:
    r"""The blocks of scores that hold weight, found from queries and keys in 4 bits.

    SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling (arXiv 2505.24179). Blocks of
    the sink and the window are always listed. A query's mass in them, the sum of exp(scores), is computed exactly; any
    other block is listed if one of its estimated scores S has ``exp(S) >= threshold · mass``. The mass leaves the other
    blocks out, so that with an exact estimate every block with an attention weight of at least the threshold is listed.

    The threshold is met score by score, with one multiplication and no exponential for each.

    Args:
        q: ``[batch, seq_q, heads, head_dim]``, float32 (CPU only), float16 or bfloat16; strides and head_dim as in
            ``fastattn.attention``.
        k: ``[batch, seq_k, kv_heads, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        threshold: of the relative score, for all heads, or float ``[heads]`` on the device of ``q``. 0 or less lists
            all that ``causal`` leaves, inf the sink and the window alone. ``calibrate_sale`` finds it.
        block_size: queries and keys of a block, each 64 or 128.
        sink, window: blocks that are always listed, as in ``BlockList.sink_and_window``.
        causal: hide the keys after each query.
        scale: multiplies the scores, finite and positive; ``1 / sqrt(head_dim)`` if None.
        bits: of the estimate, 4 or 8.
        smooth_queries: round the queries less their mean, and add the mean's scores exactly. Without, an estimate
            costs less and is less accurate if the mean is large. Keys are always smoothed.
        query_stride: judge the scores of the queries 0, ``query_stride``, 2 · ``query_stride``, … alone, as if the
            others needed no block but those of the sink and the window, which has to be 1 or more if ``causal``.
            Divides ``block_size[0]``. The estimate costs as many times less, and misses what only the other queries
            need: see csrc/ops/sale_attention.md, and calibrate with it.

    Returns:
        A ``BlockList`` for each batch entry and head, a constant to autograd. Where something is NaN its row of blocks
        is listed whole, if it is judged.

    Raises:
        ValueError: for a threshold, a number of bits, a block size or a stride that is not allowed.
        RuntimeError: for an argument that cannot be run. The message names the argument, what came and what is allowed.

    Example:
        >>> q, k = torch.randn(1, 1024, 8, 64), torch.randn(1, 1024, 2, 64)
        >>> estimate_blocks(q, k, 0.05).counts.shape
        torch.Size([1, 8, 8])
    """
    select = selector(
        q,
        k,
        block_size=block_size,
        sink=sink,
        window=window,
        causal=causal,
        scale=scale,
        bits=bits,
        smooth_queries=smooth_queries,
        query_stride=query_stride,
    )
    return select(threshold)


@torch.no_grad()
def selector(
    q: Tensor,
    k: Tensor,
    *,
    block_size: tuple[int, int],
    sink: int,
    window: int,
    causal: bool,
    scale: float | None,
    bits: int,
    smooth_queries: bool,
    query_stride: int,
) -> Callable[[float | Tensor], BlockList]:
    """``estimate_blocks`` for any threshold: all that does not depend on it is done once."""
    if bits not in (4, 8):
        raise ValueError(f"estimate_blocks: bits must be 4 or 8, got {bits}")
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            "estimate_blocks: q and k must have 4 dimensions, [batch, seq, heads, head_dim], "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    q, k = q.detach(), k.detach()
    seq_q, seq_k = q.shape[1], k.shape[1]
    factor = 1 / math.sqrt(max(q.shape[3], 1)) if scale is None else scale
    near = BlockList.sink_and_window(
        sink, window, seq_q=seq_q, seq_k=seq_k, block_size=block_size, causal=causal, device=q.device
    )
    if query_stride < 1 or block_size[0] % query_stride != 0:
        raise ValueError(
            f"estimate_blocks: query_stride must divide the queries of a block, {block_size[0]}, got {query_stride}"
        )
    if query_stride > 1 and causal and window < 1:
        raise ValueError(
            "estimate_blocks: window must be at least 1 where causal queries have a query_stride, got 0: "
            "no query would list the blocks that only queries in between see"
        )
    # Keys less one vector lower all scores of a query alike, those of the mass too. So their mean may be rounded, and
    # nothing as long as the keys is ever held in float32.
    smooth_k = k - k.mean(1, keepdim=True, dtype=torch.float32).to(k.dtype)
    _, log_mass = block_sparse_attention(q, smooth_k, smooth_k, near, scale=factor, return_lse=True)
    q, log_mass = q[:, ::query_stride], log_mass[..., ::query_stride]

    # A byte for each value at 4 bits too.
    quantize = partial(torch.ops.fastattn.quantize_tokens, format=f"int{bits}", packed=bits != 4)
    low_q, q_scales, q_mean = quantize(q, group=1, smooth=smooth_queries)
    low_k, k_scales, _ = quantize(smooth_k, group=KEY_GROUP, smooth=False)
    term = key_term(factor * q_mean, smooth_k) if smooth_queries else None

    def select(threshold: float | Tensor) -> BlockList:
        counts, indices = torch.ops.fastattn.estimate_blocks(
            low_q,
            q_scales,
            low_k,
            k_scales,
            log_mass + _log_threshold(threshold, q)[:, None],
            term,
            group=KEY_GROUP,
            seq_q=seq_q,
            query_stride=query_stride,
            block_size=block_size,
            sink=sink,
            window=window,
            causal=causal,
            scale=factor,
        )
        return BlockList(counts, indices, seq_q, seq_k, block_size, causal=causal)

    return select


def _log_threshold(threshold: float | Tensor, q: Tensor) -> Tensor:
    """float32 ``[heads]``, or ``[1]`` for all of them."""
    if not isinstance(threshold, Tensor):
        if math.isnan(threshold):
            raise ValueError("estimate_blocks: threshold must be a number, got nan")
        log = math.log(threshold) if threshold > 0 else -math.inf
        return torch.full((1,), log, dtype=torch.float32, device=q.device)
    if threshold.shape != q.shape[2:3] or not threshold.is_floating_point() or threshold.device != q.device:
        raise ValueError(
            f"estimate_blocks: threshold must be a float, or floating-point [heads] = [{q.shape[2]}] on {q.device}, "
            f"got {str(threshold.dtype).removeprefix('torch.')} {list(threshold.shape)} on {threshold.device}"
        )
    return threshold.detach().float().clamp(min=0).log()


def _fake(
    q: Tensor,
    q_scales: Tensor,
    k: Tensor,
    k_scales: Tensor,
    floor: Tensor,
    key_term: Tensor | None = None,
    *,
    seq_q: int,
    block_size: Sequence[int],
    **_: Any,
) -> tuple[Tensor, Tensor]:
    batch, _seq, heads, _dim = q.shape
    rows, columns = (seq_q + block_size[0] - 1) // block_size[0], (k.shape[1] + block_size[1] - 1) // block_size[1]
    return (
        q.new_empty((batch, heads, rows), dtype=torch.int32),
        q.new_empty((batch, heads, rows, columns), dtype=torch.int32),
    )


def _flops(
    q: Tensor,
    q_scales: Tensor,
    k: Tensor,
    *rest: Tensor | None,
    seq_q: int,
    query_stride: int = 1,
    causal: bool = False,
    **_: Any,
) -> int:
    """Of all scores that the queries of ``q`` see, those of the sink and the window included."""
    batch, queries, heads, head_dim = q.shape
    seen = queries * k.shape[1]
    if causal:  # from a query to the next ``query_stride`` keys more, after those that see none
        hidden = seq_q - k.shape[1]
        blind = min(-(-max(hidden, 0) // query_stride), queries)
        least, most = (i * query_stride - hidden + 1 for i in (blind, queries - 1))
        seen = (queries - blind) * (least + most) // 2
    return 2 * batch * heads * head_dim * seen


register(
    Op(
        name="estimate_blocks",
        schema="(Tensor q, Tensor q_scales, Tensor k, Tensor k_scales, Tensor floor, Tensor? key_term=None, *, "
        "int group, int seq_q, int query_stride=1, int[] block_size, int sink, int window, bool causal=False, "
        "float scale) -> (Tensor counts, Tensor indices)",
        fake=_fake,
        flops=_flops,
        flops_read_data=True,
        why_no_gradient="a choice has none.",
    )
)
