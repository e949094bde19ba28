"""Low-bit tokens: symmetric integers with one scale for each small group of tokens of a head."""

import torch
from torch import Tensor


def query_groups(tokens: int) -> Tensor:
    """The group of each query, int64 ``[tokens]``: rows r and r + 8 of every 16 share a scale.

    These, and the columns of ``key_groups``, are what one thread holds of a tensor core's tile of scores, so that it
    meets one scale of each and turns its integer sums into scores with one product.
    """
    row = torch.arange(tokens)
    return row // 16 * 8 + row % 8


def key_groups(tokens: int, tile: int = 32) -> Tensor:
    """The group of each key, int64 ``[tokens]``: columns 2g and 2g + 1 of every 8, through ``tile`` keys."""
    column = torch.arange(tokens)
    return column // tile * 4 + column % 8 // 2


def quantize(x: Tensor, groups: Tensor, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Integers of the dtype and shape of ``x``, ``[batch, tokens, heads, head_dim]``, and scales ``[..., heads, 1]``.

    Their product is the tokens again, each within half a scale. The integers are symmetric, ±7 for 4 bits: -8 is never
    used. Ties go to the even one. Each token has the scale of its group, its largest magnitude over 7: that of the
    tokens that are there, where the last group has fewer. A group of zeros has the scale 0, and stays zeros.
    """
    limit = 2 ** (bits - 1) - 1
    largest = x.abs().amax(-1)
    group = groups.to(x.device)[:, None].expand_as(largest)
    scale = (torch.zeros_like(largest).scatter_reduce(1, group, largest, "amax") / limit).gather(1, group)[..., None]
    return (x / torch.where(scale == 0, 1, scale)).round(), scale


def round_trip(x: Tensor, groups: Tensor, bits: int = 4) -> Tensor:
    """What ``quantize`` leaves of the tokens."""
    integers, scale = quantize(x, groups, bits)
    return integers * scale
