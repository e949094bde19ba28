"""The core's conversions of 16- and 8-bit floats against torch's, for every value and for the floats between them."""

import math
import struct

import pytest
import torch

fastattn_core = pytest.importorskip(
    "fastattn_core", reason="the C++ core's test module is not on PYTHONPATH (make test)"
)

TYPES = [
    pytest.param(torch.bfloat16, fastattn_core.bfloat16_bits, fastattn_core.bfloat16_value, id="bfloat16"),
    pytest.param(torch.float16, fastattn_core.float16_bits, fastattn_core.float16_value, id="float16"),
    pytest.param(torch.float8_e4m3fn, fastattn_core.float8_bits, fastattn_core.float8_value, id="float8"),
]


def as_bits(values: torch.Tensor) -> list[int]:
    """Unsigned, one for each value."""
    size = values.dtype.itemsize
    return [bits & ((1 << 8 * size) - 1) for bits in values.view({1: torch.int8, 2: torch.int16}[size]).tolist()]


def all_values(dtype: torch.dtype) -> torch.Tensor:
    integer = {1: torch.int8, 2: torch.int16}[dtype.itemsize]
    limits = torch.iinfo(integer)
    return torch.arange(limits.min, limits.max + 1, dtype=torch.int32).to(integer).view(dtype)


@pytest.mark.parametrize(("dtype", "to_bits", "to_value"), TYPES)
def test_every_value_decodes(dtype: torch.dtype, to_bits, to_value) -> None:
    values = all_values(dtype)
    for bits, expected in zip(as_bits(values), values.float().tolist(), strict=True):
        value = to_value(bits)
        assert value == expected or (math.isnan(value) and math.isnan(expected))


@pytest.mark.parametrize(("dtype", "to_bits", "to_value"), TYPES)
def test_floats_round_to_nearest_even(dtype: torch.dtype, to_bits, to_value) -> None:
    values = all_values(dtype).float()
    values = values[values.isfinite()].sort().values.unique()
    middles = (values[1:].double() + values[:-1].double()).div(2).float()
    floats = torch.cat([values, middles, middles.nextafter(middles + 1), middles.nextafter(middles - 1)])
    if dtype != torch.float8_e4m3fn:  # torch's versions differ in what is too large for it
        floats = torch.cat([floats, torch.tensor([math.inf, -math.inf, 65519.0, 65520.0, 3.4e38])])
    floats = torch.cat([floats, torch.tensor([1e-45, -1e-45, 0.0, -0.0])])
    for x, bits in zip(floats.tolist(), as_bits(floats.to(dtype)), strict=True):
        assert to_bits(x) == bits, f"{x!r} ({struct.pack('>f', x).hex()})"


@pytest.mark.parametrize(("dtype", "to_bits", "to_value"), TYPES)
def test_nan_stays_nan(dtype: torch.dtype, to_bits, to_value) -> None:
    assert math.isnan(to_value(to_bits(math.nan)))


def test_float8_saturates() -> None:
    for x in (448.0, 464.1, 480.0, 3.4e38, math.inf):
        assert fastattn_core.float8_bits(x) == 0x7E
        assert fastattn_core.float8_bits(-x) == 0xFE
