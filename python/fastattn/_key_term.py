"""What a mean that smoothing took from the queries adds to their scores with each key."""

import torch
import torch.nn.functional as F
from torch import Tensor


def key_term(mean: Tensor, k: Tensor, permutation: Tensor | None = None) -> Tensor:
    """``mean · k``, float32 ``[batch, heads, padded tokens]``: rows are of a multiple of 32, zeros past the last token.

    Args:
        mean: float32 ``[batch, heads, head_dim]``, times the scale.
        k: smoothed, ``[batch, tokens, kv_heads, head_dim]``.
        permutation: ``[batch or 1, heads or 1, tokens]``, the order of the keys in the result.
    """
    groups = (k.shape[2], mean.shape[1] // max(k.shape[2], 1))
    term = product(mean.unflatten(1, groups), k.float().contiguous().permute(0, 2, 3, 1)).flatten(1, 2)
    if permutation is not None:
        term = term.gather(2, permutation.long().expand(term.shape))
    return F.pad(term, (0, -k.shape[1] % 32))


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, whatever autocast says. Its bits depend on strides: callers make them contiguous."""
    if not torch.amp.is_autocast_available(a.device.type):
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
