"""`attention` and its gradients against the formula in float64."""

from typing import Any

import pytest
import torch

import fastattn
from cases import CASES, Case, assert_gradients_right, expected, plain, relative_error, run
from fastattn import reference

NAMES = ("out", "lse", "dq", "dk", "dv")


def ours(case: Case):
    return lambda q, k, v: fastattn.attention(q, k, v, **case.options, return_lse=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, place) -> None:
    """At most twice the error of the plain formula in the same precision; the LSE always as in float32."""
    device, dtype = place
    inputs, cotangents = case.inputs(device, dtype), case.cotangents(device, dtype)
    results = run(ours(case), inputs, cotangents)
    exact = expected(case, inputs, cotangents)
    rivals = plain(case, inputs, cotangents)
    assert results[1].dtype == torch.float32
    slack = 1e-5 if dtype == torch.float32 else 1e-4  # a row of one key: dS is the difference of equal numbers
    for name, result, truth, rival in zip(NAMES, results, exact, rivals, strict=True):
        error = relative_error(result, truth)
        allowed = 1e-5 if name == "lse" else 2 * relative_error(rival, truth) + slack
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


VALUE_DIMS = [(64, 8), (64, 16), (64, 32), (64, 40), (128, 32), (128, 8), (192, 128), (160, 104), (32, 64), (96, 256)]


@pytest.mark.parametrize(("head_dim", "value_dim"), VALUE_DIMS)
@pytest.mark.parametrize("shape", [{}, {"causal": True}, {"window": (40, 9)}], ids=str)
def test_values_of_their_own_width(head_dim: int, value_dim: int, shape: dict[str, Any], place) -> None:
    device, dtype = place
    case = Case(200, 300, kv_heads=2, head_dim=head_dim, value_dim=value_dim, **shape)
    inputs = case.inputs(device, dtype)
    out, lse = ours(case)(*inputs)
    exact, exact_lse = reference.attention(*(x.double() for x in inputs), **case.options)
    rival, _ = reference.attention(*inputs, **case.options)
    assert out.shape[-1] == value_dim
    assert relative_error(out, exact) <= 2 * relative_error(rival, exact) + 1e-5
    assert relative_error(lse, exact_lse) < 1e-5


def test_values_of_their_own_width_are_channels_of_wider_ones(device, dtype) -> None:
    case = Case(130, 150, causal=True, head_dim=128)
    q, k, v = case.inputs(device, dtype)
    out, _ = ours(case)(q, k, v)
    narrow, _ = ours(case)(q, k, v[..., 16:40])
    assert relative_error(narrow, out[..., 16:40].double()) < (1e-6 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize(("head_dim", "value_dim"), VALUE_DIMS)
@pytest.mark.parametrize("shape", [{}, {"causal": True}], ids=str)
def test_gradients_of_values_of_their_own_width(head_dim: int, value_dim: int, shape: dict[str, Any], place) -> None:
    device, dtype = place
    case = Case(200, 300, kv_heads=2, head_dim=head_dim, value_dim=value_dim, **shape)
    assert_gradients_right(
        lambda **x: ours(case)(**x),
        lambda **x: reference.attention(**x, **case.options),
        dict(zip("qkv", case.inputs(device, dtype), strict=True)),
        case.cotangents(device, dtype),
    )


def test_error_does_not_grow_with_length() -> None:
    """Sums over many key tiles: nothing may be rounded anew in each of them."""
    case = Case(seq_q=64, seq_k=16384, batch=1, heads=2, kv_heads=2)
    inputs, cotangents = case.inputs("cpu", torch.float32), case.cotangents("cpu", torch.float32)
    results, exact = run(ours(case), inputs, cotangents), expected(case, inputs, cotangents)
    rivals = plain(case, inputs, cotangents)
    for name, result, truth, rival in zip(NAMES, results, exact, rivals, strict=True):
        error, allowed = relative_error(result, truth), 2 * relative_error(rival, truth)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def test_gradient_of_lse_alone(device, dtype) -> None:
    case = Case(70, 90, causal=True, kv_heads=2)
    q, k, v = (tensor.requires_grad_() for tensor in case.inputs(device, dtype))
    _, lse = fastattn.attention(q, k, v, **case.options, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    doubles = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    _, exact = reference.attention(*doubles, **case.options)
    exact_dq, exact_dk = torch.autograd.grad(exact.sum(), doubles[:2])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(dq, exact_dq) < tolerance
    assert relative_error(dk, exact_dk) < tolerance
    assert torch.count_nonzero(dv) == 0


def test_gradients_are_derivatives() -> None:
    """A directional derivative by central differences, which knows no formula."""
    case = Case(40, 50, window=(20, 6), kv_heads=2, head_dim=16)
    inputs = case.inputs("cpu", torch.float32)
    cotangents = case.cotangents("cpu", torch.float32)
    gradients = run(ours(case), inputs, cotangents)[2:]

    def loss(step: float, directions: list[torch.Tensor]) -> float:
        out, lse = ours(case)(*(x + step * d for x, d in zip(inputs, directions, strict=True)))
        finite = lse.isfinite()
        return ((out * cotangents[0]).double().sum() + (lse * cotangents[1])[finite].double().sum()).item()

    directions = [torch.randn_like(x) for x in inputs]
    step = 1e-3
    slope = (loss(step, directions) - loss(-step, directions)) / (2 * step)
    predicted = sum((g * d).double().sum().item() for g, d in zip(gradients, directions, strict=True))
    assert abs(slope - predicted) < 2e-3 * abs(predicted)


def test_rows_that_see_nothing(device, dtype) -> None:
    case = Case(seq_q=200, seq_k=70, causal=True)
    blind = case.seq_q - case.seq_k
    out, lse, dq, dk, dv = run(ours(case), case.inputs(device, dtype), case.cotangents(device, dtype))
    assert torch.count_nonzero(out[:, :blind]) == 0
    assert (lse[:, :, :blind] == -torch.inf).all()
    assert torch.count_nonzero(dq[:, :blind]) == 0
    assert all(gradient.isfinite().all() for gradient in (dq, dk, dv))
    assert lse[:, :, blind:].isfinite().all()


@pytest.mark.parametrize(
    "sizes", [(0, 5, 5, 2, 2), (2, 0, 5, 2, 2), (2, 5, 0, 2, 2), (2, 0, 0, 2, 2), (2, 5, 5, 0, 2), (2, 5, 5, 0, 0)]
)
def test_zero_sizes(sizes: tuple[int, ...], device, dtype) -> None:
    batch, seq_q, seq_k, heads, kv_heads = sizes
    case = Case(seq_q, seq_k, batch=batch, heads=heads, kv_heads=kv_heads)
    inputs = case.inputs(device, dtype)
    out, lse, *gradients = run(ours(case), inputs, case.cotangents(device, dtype))
    assert out.shape == (batch, seq_q, heads, 64)
    assert lse.shape == (batch, heads, seq_q)
    assert torch.count_nonzero(out) == 0
    assert (lse == -torch.inf).all()
    for tensor, gradient in zip(inputs, gradients, strict=True):
        assert gradient.shape == tensor.shape
        assert torch.count_nonzero(gradient) == 0


def test_nan_in_one_query_row_stays_there(device, dtype) -> None:
    case = Case(200, 200, causal=True)
    q, k, v = case.inputs(device, dtype)
    clean, clean_lse = ours(case)(q, k, v)
    q[1, 77, 2, 5] = torch.nan
    out, lse = ours(case)(q, k, v)
    assert out[1, 77, 2].isnan().all()
    assert lse[1, 2, 77].isnan()
    out[1, 77, 2] = clean[1, 77, 2]
    lse[1, 2, 77] = clean_lse[1, 2, 77]
    assert torch.equal(out, clean)
    assert torch.equal(lse, clean_lse)


def test_large_scores_do_not_overflow(device, dtype) -> None:
    case = Case(100, 100, scale=30.0)
    q, k, v = case.inputs(device, dtype)
    out, lse = ours(case)(q, k, v)
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), **case.options)
    assert relative_error(lse, exact_lse) < 1e-5
    assert relative_error(out, exact) < (1e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(("head_dim", "causal"), [(64, False), (128, True)])
@pytest.mark.parametrize("rise", [-300.0, -30.0, 1.0, 3.0, 5.0, 30.0, 300.0])
def test_scores_that_drift_along_the_keys(rise: float, head_dim: int, causal: bool, place) -> None:
    """The softmax's base lags behind the row's maximum (rises of less than 4 log 2 a tile) or must follow it.

    With 300 a tile's weights relative to the base of the one before would overflow float32.
    """
    device, dtype = place
    case = Case(130, 1100, batch=1, scale=1.0, head_dim=head_dim, causal=causal)
    q, k, v = case.inputs(device, dtype)
    q, k = q / 8, k / 8
    q[..., 0], k[..., 0] = 1, (torch.arange(1100, device=device) * (rise / 128))[None, :, None]
    inputs, cotangents = (q, k, v), case.cotangents(device, dtype)
    results, exact = run(ours(case), inputs, cotangents), expected(case, inputs, cotangents)
    rivals = plain(case, inputs, cotangents)
    for name, result, truth, rival in zip(NAMES, results, exact, rivals, strict=True):
        error = relative_error(result, truth)
        allowed = 1e-5 if name == "lse" else 2 * relative_error(rival, truth) + 1e-5
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def test_forward_is_repeatable_and_independent_of_the_batch(place) -> None:
    device, dtype = place
    heads = 4 if device == "cpu" else 80  # more tiles than a GPU has SMs: a thread block takes several
    case = Case(300, 300, batch=3, causal=True, heads=heads, kv_heads=2)
    q, k, v = case.inputs(device, dtype)
    out, lse = ours(case)(q, k, v)
    again, lse_again = ours(case)(q, k, v)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    alone, _ = ours(case)(q[1:2], k[1:2], v[1:2])
    assert torch.equal(out[1:2], alone)


def test_grouped_heads_equal_repeated_heads(device, dtype) -> None:
    case = Case(130, 150, heads=6, kv_heads=2, causal=True)
    q, k, v = case.inputs(device, dtype)
    out, _ = ours(case)(q, k, v)
    repeated, _ = ours(case)(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2))
    assert torch.equal(out, repeated)
