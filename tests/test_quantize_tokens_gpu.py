"""`quantize_tokens` on a GPU: the bits of the CPU kernel."""

import math

import pytest
import torch
from torch import Tensor

from fastattn import QuantizedTokens, quantize_tokens
from test_quantize_tokens import (
    DTYPES,
    EDGES,
    FORMATS,
    GROUPS,
    LARGEST,
    each_format,
    each_group,
    permutations,
    tokens_of,
)

on_gpu = pytest.mark.gpu
each_gpu_dtype = pytest.mark.parametrize("dtype", DTYPES[1:], ids=["float16", "bfloat16"])


def bits(x: Tensor) -> Tensor:
    return x.cpu().view(torch.uint8)


def assert_same_bits(one: QuantizedTokens, other: QuantizedTokens) -> None:
    assert torch.equal(bits(one.values), bits(other.values))
    assert torch.equal(bits(one.scales), bits(other.scales))


def assert_as_on_the_cpu(x: Tensor, *, smooth: bool = False, permutation: Tensor | None = None, **options) -> None:
    """`x` is on the GPU. Its mean is that of the CPU but for the order of a sum; given the mean, every bit is."""
    order = None if permutation is None else permutation.to(x.device)
    got = quantize_tokens(x, smooth=smooth, permutation=order, **options)
    x = x.cpu()
    centred = x.float()
    if smooth:
        mean, got_mean = quantize_tokens(x, smooth=True, **options).mean, got.mean.cpu()
        finite = mean.isfinite()
        assert torch.equal(got_mean.isfinite(), finite)
        if x.numel() > 0:
            largest = torch.where(centred.isfinite(), centred, 0).abs().amax((1, 3))[..., None].expand_as(mean)
            assert ((got_mean - mean)[finite].abs() <= largest[finite] * 1e-6).all()
        centred = centred - got_mean[:, None]
    assert_same_bits(got, quantize_tokens(centred, permutation=permutation, **options))


@on_gpu
@each_format
@each_group
@each_gpu_dtype
@pytest.mark.parametrize("smooth", [False, True])
def test_gpu_gives_the_bits_of_the_cpu(format: str, group: dict, dtype: torch.dtype, smooth: bool) -> None:
    x = tokens_of(300, dtype=dtype).cuda()
    order = permutations(2, 3, 300)
    order[:, :, 5::40] = torch.tensor([-1, 300, 2**31 - 1, -(2**31)]).repeat(2)
    for permutation in (None, order[:1, :1], order):
        assert_as_on_the_cpu(x, format=format, smooth=smooth, permutation=permutation, **group)


@on_gpu
@each_group
@pytest.mark.parametrize("seq", [*EDGES, 255, 256, 383, 385, 16384, 16385, 40000])
def test_gpu_lengths_around_tiles_and_chunks(group: dict, seq: int) -> None:
    x = tokens_of(seq, batch=1, heads=2, head_dim=16, dtype=torch.bfloat16).cuda()
    for format in FORMATS:
        assert_as_on_the_cpu(x, format=format, smooth=seq % 2 == 0, **group)


@on_gpu
@each_group
@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 64, 72, 128, 136, 248, 256])
def test_gpu_head_dims(group: dict, head_dim: int) -> None:
    x = tokens_of(150, head_dim=head_dim, dtype=torch.bfloat16).cuda()
    for format in FORMATS:
        assert_as_on_the_cpu(x, format=format, smooth=True, **group)


@on_gpu
@each_group
def test_gpu_strided_views(group: dict) -> None:
    fused = torch.randn(2, 150, 3, 4, 32, device="cuda", dtype=torch.bfloat16)
    views = (
        fused[:, :, 1],
        fused[:, ::2, 0],
        fused[:, :, 2].transpose(1, 2),
        fused[:1, :, 0].expand(2, -1, -1, -1),
        torch.randn(2, 150, 4, 33, device="cuda", dtype=torch.bfloat16)[..., 1:],  # copied: not of 16-byte units
    )
    for view in views:
        for format in FORMATS:
            assert_as_on_the_cpu(view, format=format, smooth=True, **group)


@on_gpu
@each_format
@each_group
@pytest.mark.parametrize("smooth", [False, True])
def test_gpu_zeros_extremes_and_what_is_not_finite(format: str, group: dict, smooth: bool) -> None:
    x = tokens_of(200, batch=1, heads=6, dtype=torch.bfloat16)
    x[:, 70, 0, 11], x[:, 71, 1, 12], x[:, 72, 1, 12] = math.nan, math.inf, -math.inf
    x[:, :, 2] *= 1e-39  # denormals
    x[:, :150, 3] = 0
    x[:, :, 4] *= torch.finfo(torch.float32).max / x[:, :, 4].abs().amax() / 2
    x[:, :, 5] = 0.1
    assert x[:, :, 2].abs().amax() > 0
    assert_as_on_the_cpu(x.cuda(), format=format, smooth=smooth, **group)


@on_gpu
@each_format
@each_group
def test_gpu_rounds_every_number(format: str, group: dict) -> None:
    """All bfloat16 numbers that a scale of 1 leaves as they are, ties and subnormals among them."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[every.abs() <= LARGEST[format]]
    x = torch.full((len(every) // 7 + 2, 8), LARGEST[format], dtype=torch.bfloat16)  # a large one in each token …
    x[:-1, :7] = torch.nn.functional.pad(every, (0, 7 - len(every) % 7)).view(-1, 7)  # … and in each channel
    assert_as_on_the_cpu(x[None, :, None].cuda(), format=format, **group)


@on_gpu
@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)], ids=str)
@each_group
def test_gpu_has_nothing_to_quantize(shape: tuple[int, ...], group: dict) -> None:
    x = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
    assert_as_on_the_cpu(x, smooth=True, **group)


@on_gpu
@each_group
def test_gpu_gives_the_same_bits_every_time(group: dict) -> None:
    x = tokens_of(5000, dtype=torch.bfloat16).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one, other = (quantize_tokens(x, smooth=True, **group) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(one, other)
    assert torch.equal(bits(one.mean), bits(other.mean))


@on_gpu
@each_group
def test_gpu_graph_capture_and_replay(group: dict) -> None:
    x = tokens_of(300, dtype=torch.bfloat16).cuda()
    order = permutations(1, 3, 300).int().cuda()
    quantize_tokens(x, smooth=True, permutation=order, **group)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = quantize_tokens(x, smooth=True, permutation=order, **group)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        order.copy_(permutations(1, 3, 300))
        graph.replay()
        expected = quantize_tokens(x, smooth=True, permutation=order, **group)
        assert_same_bits(captured, expected)
        assert torch.equal(bits(captured.mean), bits(expected.mean))


@on_gpu
def test_gpu_offsets_past_32_bits() -> None:
    """The last tokens of 2³¹ and more elements against the same alone; and a stride that is as long."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    x = torch.randn(1, (1 << 21) + 200, 16, 64, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 1 << 31
    quantized = quantize_tokens(x)
    last = quantize_tokens(x[:, -200:])
    assert torch.equal(quantized.values[:, -200:], last.values)
    assert torch.equal(quantized.scales[..., -200:], last.scales)
    transposed = quantize_tokens(x, transpose=True)
    alone = quantize_tokens(x[:, :, -1:], transpose=True)
    assert torch.equal(transposed.values[:, -1:], alone.values)
    far = x.view(-1).as_strided((2, 100, 2, 64), ((1 << 31) - 4096, 128, 64, 1))
    for group in GROUPS:
        assert_as_on_the_cpu(far, smooth=True, **group)


@on_gpu
def test_float32_on_a_gpu_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match="quantize_tokens: dtype must be float16 or bfloat16 on the GPU, got float32"
    ):
        quantize_tokens(tokens_of(20).cuda())
