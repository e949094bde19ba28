"""What the ops mean, literally: slow, exact transcriptions of the formulas, in any floating dtype.

Written for float64 and for comparison. Nothing here shares code with the kernels.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..block_list import BlockList


def band_mask(
    seq_q: int,
    seq_k: int,
    *,
    causal: bool = False,
    window: tuple[int | Tensor, int | Tensor] | None = None,
    queries: slice = slice(None),
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which key each of the queries sees: bool ``[queries, seq_k]``, of each head if a side of the window is."""
    left, right = (_of_heads(side) for side in ((-1, -1) if window is None else window))
    position = torch.arange(seq_q, device=device)[queries, None] + (seq_k - seq_q)  # where a query is among the keys
    offset = torch.arange(seq_k, device=device)[None, :] - position
    keep = ((left < 0) | (offset >= -left)) & ((right < 0) | (offset <= right))
    return keep & (offset <= 0) if causal else keep


def regions_mask(
    band: Tensor, rectangles: Tensor | None = None, segment_ids: Tensor | tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Which key each query sees in a band, bool ``[(heads,) seq_q, seq_k]``, beside it in rectangles, and in segments.

    bool ``[batch or 1, heads or 1, seq_q, seq_k]``.
    """
    seq_q, seq_k = band.shape[-2:]
    keep = band[None] if band.dim() == 3 else band[None, None]
    if rectangles is not None:
        query = torch.arange(seq_q, device=band.device)[None, :, None]
        key = torch.arange(seq_k, device=band.device)[None, None, :]
        for row_begin, row_end, key_begin, key_end in rectangles.permute(1, 2, 0)[..., None, None]:
            inside = (row_begin <= query) & (query < row_end) & (key_begin <= key) & (key < key_end)
            keep = keep | inside[:, None]
    if segment_ids is not None:
        of_queries, of_keys = (segment_ids, segment_ids) if isinstance(segment_ids, Tensor) else segment_ids
        keep = keep & (of_queries[:, None, :, None] == of_keys[:, None, None, :])
    return keep


def _of_heads(side: int | Tensor) -> Tensor:
    return side[:, None, None] if isinstance(side, Tensor) else torch.tensor(side)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | Tensor, int | Tensor] | None = None,
    rectangles: Tensor | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of ``fastattn.attention``, in the dtype of ``q``; autograd differentiates it."""
    keep = band_mask(q.shape[1], k.shape[1], causal=causal, window=window, device=q.device)
    if rectangles is not None or segment_ids is not None:
        keep = regions_mask(keep, rectangles, segment_ids)
    return masked_attention(q, k, v, keep, scale=scale, **options)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of ``fastattn.block_sparse_attention``, in the dtype of ``q``."""
    return masked_attention(q, k, v, blocks.token_mask(), scale=scale)


def sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: float | Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Output of ``fastattn.sigmoid_attention``, in the dtype of ``q``; autograd differentiates it."""
    keep = band_mask(q.shape[1], k.shape[1], causal=causal, window=window, device=q.device)
    return masked_sigmoid_attention(q, k, v, keep, bias=bias, scale=scale)


def neighborhood_mask(
    axes: Sequence[int],
    *,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> Tensor:
    """Which key each query sees in ``neighborhood_attention``: bool ``[tokens, tokens]``, tokens in row-major order.

    A window of -1 is the whole axis, and so is one that is larger than the axis or its dilation group.
    """
    per_axis = [
        [value] * len(axes) if isinstance(value, int) else list(value) for value in (window, stride, dilation, causal)
    ]
    keep = torch.ones(1, 1, dtype=torch.bool)
    for axis in zip(axes, *per_axis, strict=True):
        along = _axis_mask(*axis)
        tokens = len(keep) * len(along)
        keep = (keep[:, None, :, None] & along[None, :, None, :]).reshape(tokens, tokens)
    return keep


def _axis_mask(length: int, window: int, stride: int, dilation: int, causal: bool) -> Tensor:
    keep = torch.zeros(length, length, dtype=torch.bool)
    for first in range(min(dilation, length)):
        group = range(first, length, dilation)  # a query sees keys of its own dilation group only
        last = len(group) - 1
        width = len(group) if window == -1 else min(window, len(group))
        for i, query in enumerate(group):
            # Queries of one stride group share the window of its leader.
            if causal:
                leader = min(i // stride * stride + stride - 1, last)
                start, end = max(leader - width + 1, 0), i + 1
            else:
                leader = min(i // stride * stride + stride // 2, last)
                start = max(min(leader - width // 2, len(group) - width), 0)
                end = start + width
            keep[query, list(group[start:end])] = True
    return keep


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
) -> tuple[Tensor, Tensor]:
    """Output ``[batch, X1(, X2(, X3)), heads, head_dim]`` and log-sum-exp ``[batch, heads, X1(, X2(, X3))]``."""
    axes = q.shape[1:-2]
    keep = neighborhood_mask(axes, window=window, stride=stride, dilation=dilation, causal=causal)
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    out, lse = masked_attention(q, k, v, keep.to(q.device), scale=scale)
    return out.unflatten(1, axes), lse.unflatten(2, axes)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the scores that ``keep``, bool ``[(batch, heads,) seq_q, seq_k]``, names."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[2] // k.shape[2] if k.shape[2] else 1
    k = k.repeat_interleave(group, dim=2)
    v = v.repeat_interleave(group, dim=2)
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if key_bias is not None:
        bias = key_bias[:, :, None, :].to(scores.dtype)
        scores, keep = scores + bias, keep & (bias > -math.inf)
    if sinks is not None:  # one key more, with a value of 0, which all see
        sink = sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
        keep = torch.cat([keep.expand(scores[..., :-1].shape), sink > -math.inf], -1)
        v = pad(v, (0, 0, 0, 0, 0, 1))
    sees = keep.any(-1)  # rows without a key have no softmax
    scores = scores.masked_fill(~keep, -math.inf).masked_fill(~sees[..., None], 0)
    weights = scores.softmax(-1).masked_fill(~sees[..., None], 0)
    lse = scores.logsumexp(-1).masked_fill(~sees, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def masked_sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    *,
    bias: float | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Sigmoid attention over the scores that ``keep``, bool ``[seq_q, seq_k]``, names."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if bias is None:
        bias = -math.log(k.shape[1]) if k.shape[1] else 0.0
    if isinstance(bias, Tensor):
        bias = bias[:, None, None]  # one for each head
    group = q.shape[2] // k.shape[2] if k.shape[2] else 1
    k = k.repeat_interleave(group, dim=2)
    v = v.repeat_interleave(group, dim=2)
    weights = torch.sigmoid(scale * torch.einsum("bqhd,bkhd->bhqk", q, k) + bias).masked_fill(~keep, 0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    *,
    pv: str,
    v_mean: Tensor | None = None,
    scale: float | None = None,
    key_tile: int = 128,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of queries and keys that are rounded already, with weights rounded for the values.

    Args:
        q, k, v: as numbers, that is dequantized; ``v`` in "int8" and "fp8" too, since its scales are of channels.
        keep: bool ``[seq_q, seq_k]``, or with any dimensions in front that expand to ``[batch, heads]``.
        pv: "int8" rounds weights to 255ths of the greatest of their row in a tile of ``key_tile`` keys. "fp8" rounds to
            e4m3, with 448 at four times the row's base, which follows a tile's greatest weight once that is larger;
            anything else leaves them. Their sum is of the weights before.
        v_mean: ``[batch, kv_heads, head_dim]``, what ``v`` lacks.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = (scale * torch.einsum("bqhd,bkhd->bhqk", q, k)).masked_fill(~keep, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.zeros_like(scores)
    base = torch.full_like(scores[..., :1], -math.inf)
    for first in range(0, k.shape[1], key_tile):
        tile = scores[..., first : first + key_tile]
        largest = tile.amax(-1, keepdim=True)
        base = torch.where(largest > base + math.log(4), largest, base)
        origin = (base if pv == "fp8" else largest).clamp(min=torch.finfo(q.dtype).min)
        weight = (tile - origin).exp()
        if pv == "int8":
            weight = (255 * weight).round() / 255
        elif pv == "fp8":
            weight = (112 * weight).to(torch.float8_e4m3fn).to(q.dtype) / 112
        share = torch.where(lse > -math.inf, (origin[..., 0] - lse).exp(), 0)
        weights[..., first : first + key_tile] = weight * share[..., None]
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    if v_mean is not None:
        mean = v_mean.repeat_interleave(group, dim=1)[:, None]
        out = out + torch.where((lse > -math.inf).transpose(1, 2)[..., None], mean, 0)
    return out, lse


def quantize_tokens(
    x: Tensor,
    *,
    format: str = "int8",
    group: int | None = None,
    smooth: bool = False,
    transpose: bool = False,
    permutation: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and their scales, both ``[batch, tokens, heads, head_dim]``, and the mean ``[batch, heads, head_dim]``.

    The values are numbers, and in the order of x whatever the layout: ``x = values * scales + mean`` but for rounding.
    """
    mean = x.mean(1) if smooth else x.new_zeros(x.shape[0], *x.shape[2:])
    x = x - mean[:, None]
    if permutation is not None:
        order = permutation.expand(x.shape[0], x.shape[2], -1).transpose(1, 2)[..., None].expand_as(x)
        names_a_token = (order >= 0) & (order < x.shape[1])
        x = torch.where(names_a_token, x.gather(1, order.long() * names_a_token), 0)
    magnitudes, tokens = x.abs(), range(x.shape[1])
    if transpose:
        largest = magnitudes.amax(1, keepdim=True) if x.shape[1] else magnitudes
    elif group is None or group == 1:
        largest = magnitudes.amax(3, keepdim=True)
    else:
        names = [(token // (4 * group), token % 8 // 2) for token in tokens]
        largest = torch.zeros_like(x)
        for name in set(names):
            members = [token for token in tokens if names[token] == name]
            largest[:, members] = magnitudes[:, members].amax((1, 3), keepdim=True)
    scales = (largest / {"int8": 127, "int4": 7, "fp8": 448}[format]).expand_as(x)
    values = torch.where(scales == 0, 0, x / scales)
    values = values.to(torch.float8_e4m3fn).to(x.dtype) if format == "fp8" else values.round()
    return values, scales, mean
