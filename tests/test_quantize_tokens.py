"""`quantize_tokens`: the laws of a round trip, the formula in float64, and every bit of the rounding as documented."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from cases import relative_error
from fastattn import QuantizedTokens, quantize_tokens, reference

FORMATS = ["int8", "int4", "fp8"]
LARGEST = {"int8": 127, "int4": 7, "fp8": 448}
GROUPS = [{"group": 1}, {"group": 8}, {"group": 16}, {"group": 32}, {"transpose": True}]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EDGES = [1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257]
each_format = pytest.mark.parametrize("format", FORMATS)
each_group = pytest.mark.parametrize("group", GROUPS, ids=lambda group: "-".join(map(str, group.values())))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def tokens_of(seq: int, *, batch: int = 2, heads: int = 3, head_dim: int = 64, dtype: torch.dtype = torch.float32):
    """Normal tokens with what quantizers meet: channels with an offset, channels and tokens that are large."""
    x = torch.randn(batch, seq, heads, head_dim)
    x[..., 1::5] += 4
    x[..., 3] *= 20
    x[:, 5::17] *= 6
    return x.to(dtype)


def numbers(quantized: QuantizedTokens) -> Tensor:
    """The values as they are, float64 [batch, tokens, heads, head_dim]."""
    values = quantized.values
    if values.dtype == torch.uint8:
        low, high = (values & 15).int(), (values >> 4).int()
        values = torch.stack([torch.where(half > 7, half - 16, half) for half in (low, high)], -1).flatten(-2)
    values = values.double()
    if quantized.transpose:
        place = torch.arange(values.shape[-1])  # of token 16 a + 8 b + 2 g + e: 16 a + 4 g + 2 b + e
        place = place - place % 16 + place % 8 // 2 * 4 + place % 16 // 8 * 2 + place % 2
        values = values[..., place[: quantized.tokens]].permute(0, 3, 1, 2)
    return values


def half_step(quantized: QuantizedTokens, x: Tensor, scales: Tensor) -> Tensor:
    """How far rounding may move what x holds (without its mean), with the float32 that it is computed in."""
    if quantized.format == "fp8":
        return torch.maximum(x.abs() * 2.0**-4, scales * 2.0**-10) * (1 + 1e-5)
    return scales * (0.5 + 1e-4)


def assert_within_half_a_step(x: Tensor, **options) -> None:
    quantized = quantize_tokens(x, **options)
    _, scales, mean = reference.quantize_tokens(x.double(), **options)
    centred = x.double() - mean[:, None]
    if options.get("permutation") is not None:
        centred = centred[:, options["permutation"]]
    slack = x.double().abs().amax() * 1e-5 if options.get("smooth") else 0  # the mean is a float32 sum
    error = (quantized.dequantize().double() - centred - mean[:, None]).abs()
    assert (error <= half_step(quantized, centred, scales) + slack).all()
    assert quantized.scales.isfinite().all()


@each_format
@each_group
@each_dtype
@pytest.mark.parametrize("smooth", [False, True])
def test_round_trip_is_within_half_a_step(format: str, group: dict, dtype: torch.dtype, smooth: bool) -> None:
    assert_within_half_a_step(tokens_of(150, dtype=dtype), format=format, smooth=smooth, **group)


@each_group
@pytest.mark.parametrize("seq", EDGES)
def test_lengths_around_groups_and_tiles(group: dict, seq: int) -> None:
    x = tokens_of(seq, batch=1, heads=2, head_dim=16)
    for format in FORMATS:
        assert_within_half_a_step(x, format=format, smooth=seq % 2 == 0, **group)


@each_group
@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 64, 72, 128, 136, 248, 256])
def test_head_dims(group: dict, head_dim: int) -> None:
    for format in FORMATS:
        assert_within_half_a_step(tokens_of(70, head_dim=head_dim), format=format, smooth=True, **group)


def expected_bits(x: Tensor, format: str, group: int | None, transpose: bool, mean: Tensor | None) -> Tensor:
    """csrc/ops/quantize_tokens.md in float32, operation by operation: numbers, [batch, tokens, heads, head_dim]."""
    x = x.float() if mean is None else x.float() - mean[:, None]
    magnitudes = x.abs()
    if transpose:
        largest = magnitudes.amax(1, keepdim=True)
    else:
        of_token = magnitudes.amax(3, keepdim=True)
        names = [t if group == 1 else (t // (4 * group), t % 8 // 2) for t in range(x.shape[1])]
        largest = torch.stack([of_token[:, [name == own for name in names]].amax(1) for own in names], 1)
    scale = (largest / LARGEST[format]).clamp(min=2.0**-100)
    inverse = 1 / scale
    if format == "fp8":
        return (x * inverse).to(torch.float8_e4m3fn).double()
    return (x.double() * inverse.double()).round()  # the product of two floats is exact in float64


@each_format
@each_group
@each_dtype
@pytest.mark.parametrize("smooth", [False, True])
def test_every_bit(format: str, group: dict, dtype: torch.dtype, smooth: bool) -> None:
    x = tokens_of(300, dtype=dtype)
    quantized = quantize_tokens(x, format=format, smooth=smooth, **group)
    expected = expected_bits(x, format, group.get("group"), group.get("transpose", False), quantized.mean)
    assert torch.equal(numbers(quantized), expected)
    assert numbers(quantized).abs().amax() == LARGEST[format]  # each group reaches its end
    if "transpose" in group and format != "int4":  # the padding is zeros
        assert torch.count_nonzero(quantized.values.float()) == torch.count_nonzero(expected)


@each_format
@each_group
def test_agrees_with_the_formula(format: str, group: dict) -> None:
    """In float64, a value may fall on the other side of a tie that float32 sees; never further."""
    x = tokens_of(90)
    quantized = quantize_tokens(x, format=format, smooth=True, **group)
    values, scales, mean = reference.quantize_tokens(x.double(), format=format, smooth=True, **group)
    assert relative_error(quantized.mean, mean) < 1e-6
    assert relative_error(quantized.dequantize(), values * scales + mean[:, None]) < (
        5e-3 if format == "int4" else 1e-3
    )
    assert (numbers(quantized) != values).double().mean() < 2e-3


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_values_are_fixed_points(format: str) -> None:
    """What a round trip gave is rounded to itself."""
    once = quantize_tokens(tokens_of(100), format=format)
    twice = quantize_tokens(once.dequantize(), format=format)
    assert torch.equal(once.values, twice.values)
    torch.testing.assert_close(once.scales, twice.scales, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=60)
@given(
    power=st.integers(-60, 60),
    format=st.sampled_from(FORMATS),
    group=st.sampled_from(GROUPS),
    smooth=st.booleans(),
    seq=st.integers(1, 140),
    head_dim=st.sampled_from([8, 24, 64]),
)
def test_scaling_scales_the_scales(power: int, format: str, group: dict, smooth: bool, seq: int, head_dim: int) -> None:
    x = tokens_of(seq, batch=1, heads=1, head_dim=head_dim)
    one = quantize_tokens(x, format=format, smooth=smooth, **group)
    other = quantize_tokens(x * 2.0**power, format=format, smooth=smooth, **group)
    assert torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))
    assert torch.equal(one.scales * 2.0**power, other.scales)
    flipped = quantize_tokens(-x, format=format, smooth=smooth, **group)
    assert torch.equal(one.scales, flipped.scales)
    assert torch.equal(numbers(one), -numbers(flipped))


def permutations(batch: int, heads: int, seq: int) -> Tensor:
    return torch.rand(batch, heads, seq).argsort(-1)


@each_format
@each_group
@pytest.mark.parametrize("shared", [(1, 1), (1, 3), (2, 1), (2, 3)], ids=str)
def test_permutation_is_of_the_tokens_that_come_in(format: str, group: dict, shared: tuple[int, int]) -> None:
    x = tokens_of(150)
    order = permutations(*shared, 150)
    index = order.expand(2, 3, 150).transpose(1, 2)[..., None].expand_as(x)
    moved = quantize_tokens(x, format=format, permutation=order, **group)
    expected = quantize_tokens(x.gather(1, index), format=format, **group)
    assert torch.equal(moved.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(moved.scales, expected.scales)


def test_permutation_and_its_inverse_are_the_identity() -> None:
    x = tokens_of(150)
    order = permutations(1, 1, 150)[0, 0]
    moved = quantize_tokens(x, permutation=order, smooth=True)
    still = quantize_tokens(x, smooth=True)
    assert torch.equal(moved.mean, still.mean)
    assert torch.equal(moved.dequantize()[:, order.argsort()], still.dequantize())
    assert torch.equal(quantize_tokens(x, permutation=order.int()).values, quantize_tokens(x, permutation=order).values)
    assert_within_half_a_step(x, permutation=order, smooth=True, group=16)


@each_group
def test_an_entry_that_names_no_token_gives_zeros(group: dict) -> None:
    order, named = torch.arange(40), [i for i in range(40) if i not in (3, 9, 39)]
    order[[3, 9, 39]] = torch.tensor([-1, 40, 2**31 - 1])
    result = numbers(quantize_tokens(tokens_of(40), permutation=order, smooth=True, **group))
    assert torch.count_nonzero(result[:, [3, 9, 39]]) == 0
    assert (result[:, named].abs().sum(-1) > 0).all()


def test_smoothing_keys_changes_no_softmax() -> None:
    q, k, v = (torch.randn(2, seq, heads, 64).double() for seq, heads in ((40, 4), (90, 2), (90, 2)))
    k[..., 7] += 30
    mean = quantize_tokens(k.float(), smooth=True).mean.double()
    out, lse = reference.attention(q, k, v, causal=True)
    smooth_out, smooth_lse = reference.attention(q, k - mean[:, None], v, causal=True)
    torch.testing.assert_close(smooth_out, out, rtol=0, atol=1e-12)
    shift = torch.einsum("bqhd,bhd->bhq", q, mean.repeat_interleave(2, 1)) / math.sqrt(64)
    torch.testing.assert_close(smooth_lse + shift, lse, rtol=0, atol=1e-12)


def test_smoothing_queries_takes_a_correction() -> None:
    q, k = torch.randn(1, 40, 2, 64) + 3, torch.randn(1, 50, 2, 64)
    quantized = quantize_tokens(q, format="int4", smooth=True)
    left = quantized.dequantize() - quantized.mean[:, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", left, k) + torch.einsum("bhd,bkhd->bhk", quantized.mean, k)[:, :, None]
    true = torch.einsum("bqhd,bkhd->bhqk", q, k)
    rough = torch.einsum("bqhd,bkhd->bhqk", quantize_tokens(q, format="int4").dequantize(), k)
    assert relative_error(scores, true) < 0.05
    assert relative_error(scores, true) < relative_error(rough, true) / 1.5


def test_smoothing_pays_where_channels_have_an_offset() -> None:
    k = torch.randn(1, 500, 2, 64)
    k[..., ::7] += 15
    errors = [
        relative_error(quantize_tokens(k, format="int4", group=32, smooth=smooth).dequantize(), k.double())
        for smooth in (False, True)
    ]
    assert errors[1] < errors[0] / 3


@each_format
@each_group
def test_a_constant_channel_leaves_nothing(format: str, group: dict) -> None:
    x = torch.full((1, 333, 1, 16), 0.1)
    quantized = quantize_tokens(x, format=format, smooth=True, **group)
    assert torch.count_nonzero(quantized.scales) == 0
    assert torch.equal(quantized.dequantize(), x)


@each_format
@each_group
@pytest.mark.parametrize("smooth", [False, True])
def test_zeros(format: str, group: dict, smooth: bool) -> None:
    quantized = quantize_tokens(torch.zeros(1, 50, 2, 16), format=format, smooth=smooth, **group)
    assert torch.count_nonzero(quantized.scales) == 0
    assert torch.count_nonzero(quantized.values.view(torch.uint8)) == 0
    assert torch.equal(quantized.dequantize(), torch.zeros(1, 50, 2, 16))


@each_format
@each_group
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-20, 1e20, 1e37, 3.4e38])
def test_extreme_sizes_stay_finite(format: str, group: dict, size: float) -> None:
    x = (torch.rand(1, 50, 2, 16) * 2 - 1) * size
    assert quantize_tokens(x, format=format, **group).dequantize().isfinite().all()
    assert quantize_tokens(x / 4, format=format, smooth=True, **group).dequantize().isfinite().all()
    largest = torch.full((1, 100, 1, 16), torch.finfo(torch.float32).max)
    assert torch.equal(quantize_tokens(largest, format=format, smooth=True, **group).dequantize(), largest)


@each_format
@each_group
def test_denormals_are_within_half_of_the_smallest_step(format: str, group: dict) -> None:
    x = torch.randn(1, 50, 2, 16) * 1e-39
    quantized = quantize_tokens(x, format=format, **group)
    assert (quantized.scales == 2.0**-100).all()
    assert torch.count_nonzero(quantized.dequantize()) == 0


@each_format
@each_group
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("smooth", [False, True])
def test_what_is_not_finite_shows_in_its_group_alone(format: str, group: dict, bad: float, smooth: bool) -> None:
    """Smoothing spreads it over its channel: the mean of the head's tokens is not finite either."""
    x = tokens_of(200)
    x[1, 70, 2, 11] = bad
    quantized = quantize_tokens(x, format=format, smooth=smooth, **group)
    lost = quantized.dequantize().isnan()
    expected = torch.zeros_like(lost)
    if group.get("transpose"):
        expected[1, :, 2, 11] = True
    elif smooth:
        expected[1, :, 2] = True
    else:
        size = group["group"]
        members = [
            t
            for t in range(200)
            if t == 70 or (size > 1 and (t // (4 * size), t % 8) in ((70 // (4 * size), 6), (70 // (4 * size), 7)))
        ]
        expected[1, members, 2] = True
    assert torch.equal(lost, expected)
    assert torch.count_nonzero(numbers(quantized)[expected]) == 0


@each_group
def test_unpacked_values_are_the_packed_ones(group: dict) -> None:
    x = tokens_of(150)
    packed = quantize_tokens(x, format="int4", **group)
    unpacked = quantize_tokens(x, format="int4", packed=False, **group)
    assert unpacked.values.dtype == torch.int8
    assert torch.equal(numbers(packed), numbers(unpacked))
    assert torch.equal(packed.scales, unpacked.scales)
    assert torch.equal(packed.dequantize(), unpacked.dequantize())


def test_two_values_in_a_byte() -> None:
    x = torch.arange(-7.0, 9.0).clamp(max=7)[None, None, None]
    assert quantize_tokens(x, format="int4").values.flatten().tolist() == [
        0xA9,
        0xCB,
        0xED,
        0x0F,
        0x21,
        0x43,
        0x65,
        0x77,
    ]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=16, max_size=16))
def test_any_token_survives(token: list[float]) -> None:
    x = torch.tensor(token)[None, None, None]
    for format in FORMATS:
        quantized = quantize_tokens(x, format=format)
        assert quantized.scales.isfinite().all()
        scale = torch.maximum(x.abs().amax() / LARGEST[format], torch.tensor(2.0**-100)).double()
        error = (quantized.dequantize().double() - x.double()).abs()
        assert (error <= half_step(quantized, x.double(), scale)).all()


@each_group
def test_strided_views_are_read_in_place(group: dict) -> None:
    fused = torch.randn(2, 70, 3, 4, 32)
    for view in (
        fused[:, :, 1],
        fused[:, ::2, 0],
        fused[:, :, 2].transpose(1, 2),
        fused[:1, :, 0].expand(2, -1, -1, -1),
    ):
        for format in FORMATS:
            got = quantize_tokens(view, format=format, smooth=True, **group)
            expected = quantize_tokens(view.contiguous(), format=format, smooth=True, **group)
            assert torch.equal(got.values.view(torch.uint8), expected.values.view(torch.uint8))
            assert torch.equal(got.scales, expected.scales)
            assert got.values.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)], ids=str)
@each_group
def test_nothing_to_quantize(shape: tuple[int, ...], group: dict) -> None:
    quantized = quantize_tokens(torch.empty(shape), smooth=True, **group)
    assert quantized.dequantize().shape == shape
    assert torch.count_nonzero(quantized.mean) == 0


def test_threads_change_nothing() -> None:
    x, threads = tokens_of(500), torch.get_num_threads()
    together = quantize_tokens(x, smooth=True, group=32)
    torch.set_num_threads(1)
    try:
        alone = quantize_tokens(x, smooth=True, group=32)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together.values, alone.values)
    assert torch.equal(together.scales, alone.scales)


BAD = {
    "format": ({"format": "int2"}, r'format must be "int8", "int4" or "fp8", got "int2"'),
    "group": ({"group": 64}, "group must be 1, 8, 16 or 32, got 64"),
    "group 0": ({"group": 0}, "group must be 1, 8, 16 or 32, got 0"),
    "negative group": ({"group": -8}, "group must not be negative, got -8"),
    "group of transposed": (
        {"group": 8, "transpose": True},
        "with transpose a scale is of all tokens and group must be left out, got 8",
    ),
    "packed int8": (
        {"packed": False},
        'packed must be left out where format is not "int4", got "int8"',
    ),
    "permutation's length": (
        {"permutation": torch.arange(9)},
        r"permutation must be Int \[batch or 1, heads or 1, tokens\] = \[1, 1, 20\], got Int \[1, 1, 9\]",
    ),
    "permutation's heads": (
        {"permutation": torch.zeros(1, 2, 20, dtype=torch.int32)},
        r"permutation must be .* = \[1, 3, 20\], got Int \[1, 2, 20\]",
    ),
    "permutation's dtype": ({"permutation": torch.zeros(20)}, r"permutation must be Int .*, got Float \[1, 1, 20\]"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match="quantize_tokens: " + message):
        quantize_tokens(tokens_of(20), **options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 8), r"x must have 4 dimensions.*got \[2, 3, 8\]"),
        (torch.zeros(1, 2, 3, 8, dtype=torch.float64), "x must be float32, float16 or bfloat16, got Double"),
        (torch.zeros(1, 2, 3, 12), "head_dim must be a multiple of 8 between 8 and 256, got 12"),
        (torch.zeros(1, 2, 3, 264), "head_dim must be a multiple of 8 between 8 and 256, got 264"),
        (torch.zeros(1, 2, 8, 3).mT, "x must be contiguous in its last dimension"),
    ],
)
def test_bad_tokens_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match="quantize_tokens: " + message):
        quantize_tokens(x)


def test_a_gradient_is_refused() -> None:
    x = tokens_of(20).requires_grad_()
    with pytest.raises(NotImplementedError, match=r"quantize_tokens has no gradient: rounding has none\. Detach x\."):
        quantize_tokens(x).dequantize().sum().backward()
    assert not quantize_tokens(x.detach()).scales.requires_grad


@each_format
@each_group
def test_opcheck(format: str, group: dict) -> None:
    options = {"format": format, "smooth": "transpose" not in group, **group}
    for permutation in (None, permutations(1, 3, 70).int()):
        torch.library.opcheck(torch.ops.fastattn.quantize_tokens.default, (tokens_of(70), permutation), options)


def test_compile_and_vmap() -> None:
    x, order = tokens_of(70), permutations(1, 3, 70)

    def function(x: Tensor) -> QuantizedTokens:
        return quantize_tokens(x * 2, format="int4", group=8, smooth=True, permutation=order)

    eager = function(x)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    mapped = torch.vmap(function)(torch.stack([x, x]))
    assert torch.equal(compiled.dequantize(), eager.dequantize())
    assert torch.equal(mapped.values[1], eager.values)
    assert torch.equal(mapped.mean[0], eager.mean)


def test_flops_are_none() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        fastattn.quantize_tokens(tokens_of(20))
    assert counter.get_total_flops() == 0
