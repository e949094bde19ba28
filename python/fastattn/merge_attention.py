"""Partial results of attention, over parts of the keys, made whole."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    r"""The attention over all keys from attentions over disjoint parts of them.

    Each part weighs ``exp(lse_i - lse)``, with ``lse`` the log-sum-exp of the parts' own, as when keys are split or
    travel in a ring (FlashAttention, arXiv 2205.14135; Ring Attention, arXiv 2310.01889). A row that sees no key in any
    part has output 0, LSE -inf and gradients of 0.

    Args:
        outputs: one or more ``[batch, seq_q, heads, head_dim]``, alike in shape and dtype.
        lses: as many float32 ``[batch, heads, seq_q]``, natural logarithms, as ``fastattn.attention`` returns them.

    Returns:
        The output, in the dtype of the outputs, and the float32 LSE. Differentiable, any number of times.

    Raises:
        ValueError: if the numbers of outputs and LSEs differ or are 0, or if shapes or dtypes do not match.

    Example:
        >>> left = attention(q, k[:, :100], v[:, :100], return_lse=True)
        >>> right = attention(q, k[:, 100:], v[:, 100:], return_lse=True)
        >>> out, lse = merge_attention(*zip(left, right))
    """
    _check(outputs, lses)
    parts = torch.stack(tuple(lses))
    largest = parts.amax(0).detach()
    base = torch.where(largest == -math.inf, 0.0, largest)  # keep -inf - -inf out
    weights = torch.exp(parts - base)
    total = weights.sum(0)
    seen = total > 0
    divisor = torch.where(seen, total, 1.0)
    lse = torch.where(seen, base + divisor.log(), -math.inf)
    shares = (weights / divisor).transpose(2, 3).unsqueeze(-1)  # [parts, batch, seq_q, heads, 1]
    merged = shares[0] * outputs[0].float()
    for share, output in zip(shares[1:], outputs[1:], strict=True):
        merged = merged + share * output.float()
    return merged.to(outputs[0].dtype), lse


def _check(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if len(outputs) != len(lses) or not outputs:
        raise ValueError(f"merge_attention: as many outputs as lses, at least one; got {len(outputs)} and {len(lses)}")
    first = outputs[0]
    if first.dim() != 4:
        raise ValueError(f"merge_attention: outputs must be [batch, seq_q, heads, head_dim], got {list(first.shape)}")
    batch, seq_q, heads, _ = first.shape
    for i, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        if output.shape != first.shape or output.dtype != first.dtype:
            raise ValueError(
                f"merge_attention: outputs[{i}] must be {first.dtype} {list(first.shape)} like outputs[0], "
                f"got {output.dtype} {list(output.shape)}"
            )
        if lse.shape != (batch, heads, seq_q) or lse.dtype != torch.float32:
            raise ValueError(
                f"merge_attention: lses[{i}] must be torch.float32 [batch, heads, seq_q] = {[batch, heads, seq_q]}, "
                f"got {lse.dtype} {list(lse.shape)}"
            )
