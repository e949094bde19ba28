"""SALE (arXiv 2505.24179): the blocks of scores that a 4-bit estimate finds worth computing.

Each query's score with a key is judged against the mass of a few blocks that are always computed: the sink, the first
blocks of keys, and the window, those nearest to the query's own. With S the scaled scores and l the sum of exp(S) over
the sink and the window,

    relative attention score  R_ij = exp(S_ij) / l_i,    a block is kept if  max_ij R_ij >= threshold,

where S within l is exact and S_ij an estimate from 4-bit queries and keys. l leaves out the other blocks, so R exceeds
the attention weight and can exceed 1: an exact estimate keeps every block with a weight of at least the threshold, and
only the quantization can miss one.

The published kernel differs where its own shape shows, and may by a variant add to l as it goes. Here the window is as
many blocks for each query block, and l never has a block that the estimate kept, so no choice depends on another.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..block_list import BlockList
from . import attention, band_mask, block_sparse_attention, quantize_tokens


def block_scores(
    q: Tensor,
    k: Tensor,
    *,
    block_size: tuple[int, int] = (128, 128),
    sink: int = 1,
    window: int = 2,
    causal: bool = True,
    scale: float | None = None,
    bits: int | None = 4,
    group: int = 8,
    key_dtype: torch.dtype | None = None,
    query_stride: int = 1,
) -> Tensor:
    """ln of each block's greatest relative attention score, ``[batch, heads, query blocks, key blocks]``.

    +inf in the sink and the window, which are kept by any threshold, and -inf where ``causal`` leaves nothing.

    Args:
        q, k: ``[batch, seq, heads or kv_heads, head_dim]``; float64 for comparison.
        sink, window: blocks, as in ``BlockList.sink_and_window``.
        bits: of the estimate; None estimates exactly.
        group: keys that share a scale, see ``quantize_tokens``. A query has one of its own.
        key_dtype: that smoothed keys are rounded to: an implementation keeps them in that of its inputs. None: not.
        query_stride: only the queries 0, ``query_stride``, 2 · ``query_stride``, … are judged, and smoothed by their
            mean; a divisor of ``block_size[0]``.
    """
    seq_q, seq_k = q.shape[1], k.shape[1]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    near = BlockList.sink_and_window(sink, window, seq_q=seq_q, seq_k=seq_k, block_size=block_size, causal=causal)

    # Smooth the keys: take away their mean, in which outlier channels have most of their magnitude. That lowers all
    # scores of a query alike, by q_i · mean, and changes no weight, if the exact scores below are of the smoothed keys
    # as well: R compares the two. The mean is over all keys, for causal too: what a query sees does not change, only
    # how it is rounded.
    k = k - k.mean(1, keepdim=True)
    k = k if key_dtype is None else k.to(key_dtype).to(k.dtype)
    exact = _scores(q, k, scale)
    judged = slice(None, None, query_stride)
    estimate = (
        exact[:, :, judged] if bits is None else estimated_scores(q[:, judged], k, scale=scale, bits=bits, group=group)
    )

    # ln l. A kernel has m, the row's maximum in the sink and the window, and l over exp(m); then S has to reach
    # m + ln(threshold · l), and the printed ln(threshold · l + m) is a slip. A query that sees no key of the sink or
    # the window has l = 0 and keeps every block that it sees.
    log_mass = exact.masked_fill(~near.token_mask(), -math.inf).logsumexp(-1, keepdim=True)

    seen = band_mask(seq_q, seq_k, causal=causal)
    log_relative = (estimate - log_mass[:, :, judged]).masked_fill(~seen[judged], -math.inf)
    judged_size = (block_size[0] // query_stride, block_size[1])
    return _block_max(log_relative, judged_size).masked_fill(near.to_mask(), math.inf)


def estimated_scores(q: Tensor, k: Tensor, *, scale: float, bits: int = 4, group: int = 8) -> Tensor:
    """Scaled scores of low-bit queries and keys, ``[batch, heads, seq_q, seq_k]``; ``k`` is smoothed already.

    Queries are smoothed here. Their mean does change the weights, so its scores are added to the low-bit product,
    exactly: the published kernel rounds them to the integers' grid, and the scales to half precision. There two queries
    share a scale, rows r and r + 8 of every 16: here each has its own, which costs a thread of WGMMA as much.
    """
    mean = q.mean(1, keepdim=True)
    low_q, low_k = (
        values * scales
        for values, scales, _ in (
            quantize_tokens(q - mean, format=f"int{bits}"),
            quantize_tokens(k, format=f"int{bits}", group=group),
        )
    )
    return _scores(low_q, low_k, scale) + _scores(mean, k, scale)


def kept_blocks(scores: Tensor, threshold: float | Tensor) -> Tensor:
    """The blocks whose score reaches the threshold, a float or ``[heads]``: bool, of the shape of ``scores``.

    0 or less keeps every block of which ``causal`` leaves something, inf the sink and the window alone.
    """
    threshold = torch.as_tensor(threshold, dtype=scores.dtype, device=scores.device).clamp(min=0).view(-1, 1, 1)
    return (scores >= threshold.log()) & (scores > -math.inf)


def estimate_blocks(q: Tensor, k: Tensor, threshold: float | Tensor, **options: Any) -> Tensor:
    """The blocks that SALE computes: bool ``[batch, heads, query blocks, key blocks]``; options of ``block_scores``."""
    return kept_blocks(block_scores(q, k, **options), threshold)


def sale_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    threshold: float | Tensor,
    *,
    block_size: tuple[int, int] = (128, 128),
    causal: bool = True,
    scale: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of attention on the blocks that SALE keeps, itself exact; options of ``block_scores``."""
    scores = block_scores(q, k, block_size=block_size, causal=causal, scale=scale, **options)
    return _attention_on(kept_blocks(scores, threshold), q, k, v, block_size, causal, scale)


def calibrate_sale(
    samples: Iterable[tuple[Tensor, Tensor, Tensor]],
    theta: float,
    *,
    start: float = 0.008,
    floor: float = 1e-4,
    block_size: tuple[int, int] = (128, 128),
    causal: bool = True,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """The threshold of each head, ``[heads]``: halved from ``start`` until its error is under ``theta``.

    One that has come down to ``floor`` becomes 0: its head is computed whole. The thresholds are carried from sample to
    sample and only fall. Those before will still be under ``theta``, as an error falls with its threshold, but for
    chance.

    Args:
        samples: q, k and v of each.
        theta: bounds ``l1_error``, which does not depend on the magnitude of v. The paper's bound, 0.4 for Llama 3.1
            8B, is absolute: of the sum of |out - expected| over tokens and channels, divided by the tokens.
        options: of ``block_scores``.
    """
    threshold = torch.tensor(start, dtype=torch.float64)
    for q, k, v in samples:
        threshold = threshold.expand(q.shape[2])
        scores = block_scores(q, k, block_size=block_size, causal=causal, scale=scale, **options)
        expected, _ = attention(q, k, v, causal=causal, scale=scale)
        while True:
            out, _ = _attention_on(kept_blocks(scores, threshold), q, k, v, block_size, causal, scale)
            wrong = (l1_error(out, expected).amax(0) >= theta) & (threshold > 0)
            if not wrong.any():
                break
            threshold = torch.where(wrong, threshold / 2, threshold)
            threshold = torch.where(threshold > floor, threshold, 0)
    return threshold


def l1_error(out: Tensor, expected: Tensor) -> Tensor:
    """Σ |out - expected| / Σ |expected| of each head, over its tokens and channels: ``[batch, heads]``."""
    return (out - expected).abs().sum((1, 3)) / expected.abs().sum((1, 3))


def _attention_on(
    mask: Tensor, q: Tensor, k: Tensor, v: Tensor, block_size: tuple[int, int], causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    blocks = BlockList.from_mask(mask, seq_q=q.shape[1], seq_k=k.shape[1], block_size=block_size, causal=causal)
    return block_sparse_attention(q, k, v, blocks, scale=scale)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return scale * torch.einsum("bqhd,bkhd->bhqk", q, k)


def _block_max(x: Tensor, block_size: tuple[int, int]) -> Tensor:
    """The maximum of each block of ``[..., queries, keys]``; the last ones may be ragged."""
    (size_q, size_k), (seq_q, seq_k) = block_size, x.shape[-2:]
    rows, columns = -(-seq_q // size_q), -(-seq_k // size_k)
    missing = (0, columns * size_k - seq_k, 0, rows * size_q - seq_q)
    x = torch.nn.functional.pad(x, missing, value=-math.inf)
    return x.reshape(*x.shape[:-2], rows, size_q, columns, size_k).amax((-3, -1))
