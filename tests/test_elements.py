"""The core's 16-bit conversions against torch's, for every 16-bit value and for the floats between them."""

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
]


def all_values(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize(("dtype", "to_bits", "to_value"), TYPES)
def test_every_value_decodes(dtype: torch.dtype, to_bits, to_value) -> None:
    values = all_values(dtype)
    for bits, expected in zip(values.view(torch.int16).tolist(), values.float().tolist(), strict=True):
        value = to_value(bits & 0xFFFF)
        assert value == expected or (math.isnan(value) and math.isnan(expected))


@pytest.mark.parametrize(("dtype", "to_bits", "to_value"), TYPES)
def test_floats_round_to_nearest_even(dtype: torch.dtype, to_bits, to_value) -> None:
    values = all_values(dtype).float()
    values = values[values.isfinite()].sort().values.unique()
    middles = (values[1:].double() + values[:-1].double()).div(2).float()
    floats = torch.cat([values, middles, middles.nextafter(middles + 1), middles.nextafter(middles - 1)])
    floats = torch.cat([floats, torch.tensor([math.inf, -math.inf, 65519.0, 65520.0, 3.4e38, 1e-45])])
    expected = floats.to(dtype).view(torch.int16).tolist()
    for x, bits in zip(floats.tolist(), expected, strict=True):
        assert to_bits(x) == bits & 0xFFFF, f"{x!r} ({struct.pack('>f', x).hex()})"


@pytest.mark.parametrize(("dtype", "to_bits", "to_value"), TYPES)
def test_nan_stays_nan(dtype: torch.dtype, to_bits, to_value) -> None:
    assert math.isnan(to_value(to_bits(math.nan)))
