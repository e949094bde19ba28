"""Layouts: whatever the strides, the result is that of contiguous copies; what lies around a tensor is never read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastattn
from cases import Case, assert_same, run

CASE = Case(150, 150, heads=4, kv_heads=4, causal=True)

Maker = Callable[[str, torch.dtype], tuple[Tensor, Tensor, Tensor]]


def fused_qkv(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """One projection: [batch, seq, 3, heads, head_dim]."""
    return torch.randn(2, 150, 3, 4, 64, device=device).to(dtype).unbind(2)


def interleaved_heads(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """One projection: [batch, seq, heads, 3 · head_dim]."""
    return torch.randn(2, 150, 4, 3 * 64, device=device).to(dtype).split(64, -1)


def heads_first(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 4, 150, 64, device=device).to(dtype).transpose(1, 2) for _ in range(3))


def sequence_first(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.randn(150, 2, 4, 64, device=device).to(dtype).transpose(0, 1) for _ in range(3))


def every_second_token(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 300, 4, 64, device=device).to(dtype)[:, 1::2] for _ in range(3))


def wider_rows(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 150, 4, 80, device=device).to(dtype)[..., 8:72] for _ in range(3))


def misaligned_rows(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Odd strides and an odd base: on CUDA a copy is made."""
    return tuple(torch.randn(2, 150, 4, 67, device=device).to(dtype)[..., 1:65] for _ in range(3))


def expanded_batch(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Stride 0."""
    q = torch.randn(2, 150, 4, 64, device=device).to(dtype)
    return (q, *(torch.randn(1, 150, 4, 64, device=device).to(dtype).expand(2, -1, -1, -1) for _ in range(2)))


@pytest.mark.parametrize(
    "maker",
    [
        fused_qkv,
        interleaved_heads,
        heads_first,
        sequence_first,
        every_second_token,
        wider_rows,
        misaligned_rows,
        expanded_batch,
    ],
)
def test_strided_views(maker: Maker, place) -> None:
    device, dtype = place
    views = maker(device, dtype)
    cotangents = CASE.cotangents(device, dtype)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.attention(q, k, v, causal=True, return_lse=True)

    results = run(attention, views, cotangents)
    contiguous = run(attention, tuple(view.contiguous() for view in views), cotangents)
    assert all(result.is_contiguous() for result in results)
    assert_same(results, contiguous)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
def test_output_gradients_of_any_layout(layout: str, place) -> None:
    device, dtype = place
    inputs = CASE.inputs(device, dtype)
    dout, dlse = CASE.cotangents(device, dtype)
    if layout == "expanded":
        dout, dlse = dout[:1, :1, :1, :1].expand_as(dout), dlse[:1, :1, :1].expand_as(dlse)
    elif layout == "transposed":
        dout, dlse = dout.mT.contiguous().mT, dlse.mT.contiguous().mT
    else:
        dout, dlse = dout.repeat(1, 1, 1, 2)[..., ::2], dlse.repeat(1, 1, 2)[..., ::2]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.attention(q, k, v, causal=True, return_lse=True)

    results = run(attention, inputs, (dout, dlse))
    expected = run(attention, inputs, (dout.contiguous(), dlse.contiguous()))
    assert_same(results, expected)


@pytest.mark.parametrize("head_dim", [40, 64, 128])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (30, 10)}], ids=str)
def test_nothing_around_a_tensor_is_read(head_dim: int, options: dict, place) -> None:
    """q, k, v and their cotangents lie in NaN: after each sequence, between rows, before and after the buffer."""
    device, dtype = place
    case = Case(131, 203, heads=4, kv_heads=2, head_dim=head_dim, **options)
    clean = case.inputs(device, dtype)
    cotangents = case.cotangents(device, dtype)

    def in_nan(tensor: Tensor) -> Tensor:
        batch, seq, heads, dim = tensor.shape
        buffer = torch.full((batch + 2, seq + 200, heads + 1, dim + 8), torch.nan, device=device, dtype=dtype)
        view = buffer[1:-1, :seq, :heads, :dim]
        return view.copy_(tensor)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.attention(q, k, v, **case.options, return_lse=True)

    results = run(attention, tuple(in_nan(tensor) for tensor in clean), (in_nan(cotangents[0]), cotangents[1]))
    expected = run(attention, clean, cotangents)
    assert_same(results, expected)


def test_size_one_dimensions_may_have_any_stride(place) -> None:
    device, dtype = place
    q = torch.randn(1, 1, 1, 64, device=device).to(dtype)
    odd = q.as_strided(q.shape, (3, 5, 7, 1))
    assert torch.equal(fastattn.attention(odd, odd, odd), fastattn.attention(q, q, q))
