"""Tokens in another order for each head."""

from typing import Any

import torch
from torch import Tensor


def permute_tokens(x: Tensor, tokens: Tensor, places: Tensor | None = None) -> Tensor:
    """``x[b, tokens[b, h, i], h]`` for each batch entry b, place i and head h.

    Differentiable.

    Args:
        x: ``[batch, seq, heads, head_dim]``.
        tokens: int32 or int64 ``[batch or 1, heads or 1, seq]``, each token once.
        places: its inverse, which the gradient takes; sorted out of it if None.
    """
    out: Tensor = _Permute.apply(x, tokens, places)  # type: ignore[no-untyped-call]
    return out


class _Permute(torch.autograd.Function):
    """A gather whose gradient is one as well: torch's adds atomically."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, tokens: Tensor, places: Tensor | None) -> Tensor:
        words = _words(x)
        index = tokens.long().expand(x.shape[0], x.shape[2], -1).transpose(1, 2)[..., None]
        return words.gather(1, index.expand(-1, -1, -1, words.shape[3])).view(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        tokens, places = ctx.saved_tensors
        return permute_tokens(dout, tokens.argsort() if places is None else places, tokens), None, None


def _words(x: Tensor) -> Tensor:
    """The same bytes, eight to an element if they lie so: a gather takes its time for elements, whatever their size.

    CogVideoX's values, [2, 17776, 48, 64] in bfloat16, on an H100: 0.44 ms as they are, 0.19 ms so, 0.15 ms to copy.
    A compiler makes a kernel of its own, and cannot ask where a tensor lies.
    """
    if torch.compiler.is_compiling():
        return x
    each = 8 // x.element_size()
    sizes = (x.storage_offset(), *x.stride()[:-1], x.shape[-1])
    return x.view(torch.int64) if x.stride(-1) == 1 and all(size % each == 0 for size in sizes) else x
