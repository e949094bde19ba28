"""Tokens in another order for each head: any layout, either direction, with gradients."""

import pytest
import torch
from torch import Tensor

from fastattn._permute import permute_tokens

BATCH, SEQ, HEADS = 2, 11, 3


def orders(batch: int, heads: int) -> Tensor:
    torch.manual_seed(0)
    return torch.rand(batch, heads, SEQ).argsort().int()


def layouts(head_dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same shape, in memory where eight bytes can be taken at a time and where they cannot."""
    return {
        "contiguous": torch.randn(BATCH, SEQ, HEADS, head_dim).to(dtype),
        "heads before tokens": torch.randn(BATCH, HEADS, SEQ, head_dim).to(dtype).transpose(1, 2),
        "from an odd place": torch.randn(1 + BATCH * SEQ * HEADS * head_dim).to(dtype)[1:].view(BATCH, SEQ, HEADS, -1),
        "odd strides": torch.randn(BATCH, SEQ, HEADS, head_dim + 1).to(dtype)[..., :head_dim],
        "across": torch.randn(BATCH, SEQ, head_dim, HEADS).to(dtype).transpose(2, 3),
        "every other": torch.randn(BATCH, SEQ, HEADS, 2 * head_dim).to(dtype)[..., ::2],
    }


@pytest.mark.parametrize("shape", [(1, 1), (1, HEADS), (BATCH, 1), (BATCH, HEADS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 7])
def test_each_token_comes_from_its_place(shape: tuple[int, int], dtype: torch.dtype, head_dim: int) -> None:
    tokens = orders(*shape)
    of_head = tokens.expand(BATCH, HEADS, SEQ)
    for name, x in layouts(head_dim, dtype).items():
        out = permute_tokens(x, tokens)
        assert out.dtype == dtype
        for batch in range(BATCH):
            for head in range(HEADS):
                assert torch.equal(out[batch, :, head], x[batch, of_head[batch, head].long(), head]), name


@pytest.mark.parametrize("with_places", [False, True])
def test_its_gradient_puts_each_token_back(with_places: bool) -> None:
    tokens = orders(1, HEADS)
    places = tokens.argsort().int() if with_places else None
    x = torch.randn(BATCH, SEQ, HEADS, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute_tokens(x, tokens, places), x)
    assert torch.autograd.gradgradcheck(lambda x: permute_tokens(x, tokens, places), x)
    assert torch.equal(permute_tokens(permute_tokens(x, tokens), tokens.argsort()), x)
