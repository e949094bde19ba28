"""What the ops mean, literally: slow, exact transcriptions of the formulas, in any floating dtype.

Written for float64 and for comparison. Nothing here shares code with the kernels.
"""

import math

import torch
from torch import Tensor


def band_mask(
    seq_q: int,
    seq_k: int,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which key each query sees: bool ``[seq_q, seq_k]``."""
    left, right = (-1, -1) if window is None else window
    position = torch.arange(seq_q, device=device)[:, None] + (seq_k - seq_q)  # where a query stands among the keys
    offset = torch.arange(seq_k, device=device)[None, :] - position
    keep = torch.ones(seq_q, seq_k, dtype=torch.bool, device=device)
    if left != -1:
        keep &= offset >= -left
    if right != -1:
        keep &= offset <= right
    if causal:
        keep &= offset <= 0
    return keep


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of ``fastattn.attention``, in the dtype of ``q``; autograd differentiates it."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[2] // k.shape[2] if k.shape[2] else 1
    k = k.repeat_interleave(group, dim=2)
    v = v.repeat_interleave(group, dim=2)
    keep = band_mask(q.shape[1], k.shape[1], causal=causal, window=window, device=q.device)
    sees = keep.any(-1)  # [seq_q]: the others have no softmax
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores.masked_fill(~keep, -math.inf).masked_fill(~sees[:, None], 0)
    weights = scores.softmax(-1).masked_fill(~sees[:, None], 0)
    lse = scores.logsumexp(-1).masked_fill(~sees, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse
