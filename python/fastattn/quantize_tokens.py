"""Tokens in 8 or 4 bits: the public function, what it returns, and its row of the op table."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ._ops import Op, register

Format = Literal["int8", "int4", "fp8"]


class _Storage(NamedTuple):
    """How a format lies in a tensor."""

    dtype: torch.dtype
    per_byte: int


_STORAGE = {
    "int8": _Storage(torch.int8, 1),
    "int4": _Storage(torch.uint8, 2),  # packed, that is
    "fp8": _Storage(torch.float8_e4m3fn, 1),
}


@dataclass(frozen=True, eq=False)
class QuantizedTokens:
    """What `quantize_tokens` made of ``[batch, tokens, heads, head_dim]``.

    Args:
        values: int8, float8_e4m3fn or, for int4, uint8 with two values in a byte, the first one in its low half, unless
            they were asked for unpacked. ``[batch, tokens, heads, head_dim]``; with ``transpose`` ``[batch, heads,
            head_dim, padded tokens]``, where the tokens are padded with zeros to a multiple of 32, and of each 16 come
            in the order 0, 1, 8, 9, 2, 3, 10, 11, …, 7, 14, 15, in which a GPU's matrix products take them. Packed, the
            last dimension is half as long.
        scales: float32 ``[batch, heads, groups]``; with ``transpose`` ``[batch, heads, head_dim]``. 0 for a group of
            zeros, NaN for one that was not finite.
        mean: float32 ``[batch, heads, head_dim]``, what was subtracted from every token; None without ``smooth``.
        format: "int8", "int4" or "fp8".
        group: how many tokens share a scale; None with ``transpose``: all.
        transpose: whether tokens are the last dimension.
        tokens: how many there are, without the padding.
    """

    values: Tensor
    scales: Tensor
    mean: Tensor | None
    format: Format
    group: int | None
    transpose: bool
    tokens: int

    def dequantize(self) -> Tensor:
        """The tokens again, float32 ``[batch, tokens, heads, head_dim]``, with their mean and in their new order."""
        values = _unpack(self.values) if self.values.dtype == torch.uint8 else self.values.float()
        if self.transpose:
            in_order: Tensor = values.unflatten(-1, (-1, 4, 2, 2)).transpose(-2, -3).flatten(-4)
            tokens = (in_order * self.scales[..., None])[..., : self.tokens].permute(0, 3, 1, 2)
        else:
            scales = self.scales[..., _group_of(self.tokens, self.group or 1, self.scales.device)]
            tokens = values * scales.transpose(1, 2)[..., None]
        return (tokens if self.mean is None else tokens + self.mean[:, None]).contiguous()


def quantize_tokens(
    x: Tensor,
    *,
    format: Format = "int8",
    group: int | None = None,
    smooth: bool = False,
    transpose: bool = False,
    packed: bool = True,
    permutation: Tensor | None = None,
) -> QuantizedTokens:
    r"""Tokens rounded to 8 or 4 bits, ``x ≈ scale · value (+ mean)``, as 8-bit matrix products read them.

    A scale maps the largest magnitude of its group to 127, 7 or, for fp8, 448; values are rounded to nearest, ties to
    even. It is off by at most half a step, ``scale / 2``, in int8 and int4.

    ``smooth`` subtracts the mean of all tokens first, which takes away what channels have in common and large
    (SageAttention, arXiv 2410.02367). Of keys that is exact: every score of a query changes by the same amount, so the
    softmax does not, and the log-sum-exp of the true scores is ``lse + scale · q · mean``. Of queries it takes a
    correction: ``scale · mean · k`` is missing from every score of key k.

    Args:
        x: ``[batch, tokens, heads, head_dim]``, float16 or bfloat16, on the CPU float32 as well; any strides as long as
            the last dimension is contiguous; head_dim a multiple of 8 up to 256. Given the mean, a Hopper GPU and a CPU
            give the same bits.
        format: "int8"; "int4", from -7 to 7, two in a byte; or "fp8", which is e4m3.
        group: how many tokens share a scale: 1, or 8, 16 or 32, for which the tokens of 32, 64 or 128 are dealt out in
            pairs to four groups: group g of the four has tokens 8 i + 2 g and 8 i + 2 g + 1. A thread that holds scores
            of a tile on a GPU then needs one scale. None is 1; with ``transpose`` a scale is of one channel and all
            tokens, and None is all there is.
        smooth: subtract each channel's mean over the tokens of a head.
        transpose: make tokens the last dimension, as the values of attention are multiplied.
        packed: with "int4", two values in a byte of a uint8; False: one, of int8, as 8-bit matrix products read them.
        permutation: token i of the result is token ``permutation[..., i]`` of x: int32 or int64, ``[tokens]`` or
            ``[batch or 1, heads or 1, tokens]``. An entry that names no token gives zeros.

    Returns:
        `QuantizedTokens`. Not differentiable: detach x.

    Raises:
        RuntimeError: for an argument that cannot be run. The message names the argument, what came and what is allowed.

    Example:
        >>> k = torch.randn(2, 300, 8, 64) + 5
        >>> quantized = quantize_tokens(k, format="int4", group=32, smooth=True)
        >>> quantized.values.shape, quantized.scales.shape
        (torch.Size([2, 300, 8, 32]), torch.Size([2, 8, 12]))
    """
    if permutation is not None:
        permutation = permutation[None, None] if permutation.dim() == 1 else permutation
        permutation = permutation.int() if permutation.dtype == torch.int64 else permutation
    values, scales, mean = torch.ops.fastattn.quantize_tokens(
        x, permutation, format=format, group=group, smooth=smooth, transpose=transpose, packed=packed
    )
    return QuantizedTokens(
        values, scales, mean if smooth else None, format, None if transpose else group or 1, transpose, x.shape[1]
    )


def _group_of(tokens: int, group: int, device: torch.device) -> Tensor:
    """The group of each token, int64 ``[tokens]``."""
    token = torch.arange(tokens, device=device)
    return token if group == 1 else token // (4 * group) * 4 + token % 8 // 2


def _unpack(packed: Tensor) -> Tensor:
    """The values of bytes of two, float32."""
    halves = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return ((halves ^ 8).to(torch.int8) - 8).float()  # extends the sign of 4 bits


def _fake(
    x: Tensor,
    permutation: Tensor | None = None,
    *,
    format: Format = "int8",
    group: int | None = None,
    smooth: bool = False,
    transpose: bool = False,
    packed: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, head_dim = x.shape
    dtype, per_byte = _STORAGE[format if packed else "int8"]
    if transpose:
        shape, groups = (batch, heads, head_dim, (tokens + 31) // 32 * 32 // per_byte), head_dim
    else:
        shape = (batch, tokens, heads, head_dim // per_byte)
        groups = tokens if group is None or group == 1 else (tokens + 4 * group - 1) // (4 * group) * 4
    return (
        x.new_empty(shape, dtype=dtype),
        x.new_empty((batch, heads, groups), dtype=torch.float32),
        x.new_empty((batch, heads, head_dim if smooth else 0), dtype=torch.float32),
    )


def _flops(*_: Any, **__: Any) -> int:
    return 0  # FLOPs are those of matrix products


register(
    Op(
        name="quantize_tokens",
        schema='(Tensor x, Tensor? permutation=None, *, str format="int8", int? group=None, bool smooth=False, '
        "bool transpose=False, bool packed=True) -> (Tensor values, Tensor scales, Tensor mean)",
        fake=_fake,
        flops=_flops,
        why_no_gradient="rounding has none. Detach x.",
    )
)

_LEAVES, _CONTEXT = ("values", "scales", "mean"), ("format", "group", "transpose", "tokens")


def _flatten(quantized: QuantizedTokens) -> tuple[list[Any], Any]:
    return [getattr(quantized, name) for name in _LEAVES], tuple(getattr(quantized, name) for name in _CONTEXT)


def _unflatten(leaves: Any, context: Any) -> QuantizedTokens:
    return QuantizedTokens(*leaves, *context)


pytree.register_pytree_node(QuantizedTokens, _flatten, _unflatten)
