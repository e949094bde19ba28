"""What `attention` takes beside a band: windows of each head, a softcap, biases of keys, sinks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from cases import Case, assert_gradients_right, relative_error
from fastattn import reference

HEADS, SEQ_Q, SEQ_K = 4, 150, 210


def sides(*of_heads: int) -> Tensor:
    return torch.tensor(of_heads, dtype=torch.int32)


def key_bias(batch: int, heads: int) -> Tensor:
    """Some keys are hidden, for some heads a whole tile of them."""
    bias = torch.randn(batch, heads, SEQ_K, generator=torch.Generator().manual_seed(0))  # at import, before any test
    bias[..., ::7] = -math.inf
    bias[:, 0, :130] = -math.inf
    return bias


OPTIONS: dict[str, dict[str, Any]] = {
    "windows of heads": {"window": (sides(3, -1, 70, 0), sides(0, 5, -1, 130))},
    "windows of heads, causal": {"window": (sides(3, -1, 70, 0), sides(0, 5, -1, 130)), "causal": True},
    "left sides of heads": {"window": (sides(3, 200, 70, 0), 4)},
    "softcap": {"softcap": 0.7},
    "softcap, causal": {"softcap": 3.0, "causal": True},
    "softcap, far": {"softcap": 50.0},
    "key_bias": {"key_bias": key_bias(2, HEADS)},
    "key_bias of all heads": {"key_bias": key_bias(2, 1), "causal": True},
    "key_bias of all": {"key_bias": key_bias(1, 1)},
    "sinks": {"sinks": torch.tensor([0.3, -math.inf, 9.0, -7.0])},
    "sinks, causal": {"sinks": torch.tensor([0.3, -1.0, 90.0, -200.0]), "causal": True},
    "all": {
        "window": (sides(30, -1, 70, 0), sides(0, 5, -1, 130)),
        "softcap": 2.0,
        "key_bias": key_bias(1, HEADS),
        "sinks": torch.tensor([0.3, -1.0, 4.0, 0.0]),
    },
}
each_option = pytest.mark.parametrize("name", OPTIONS)


def options_on(device: str, name: str) -> dict[str, Any]:
    def put(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(put(x) for x in value)
        return value.to(device) if isinstance(value, Tensor) else value

    return {key: put(value) for key, value in OPTIONS[name].items()}


@each_option
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_values(name: str, head_dim: int, place) -> None:
    """At most twice the error of the plain formula in the same precision; the LSE as in float32."""
    device, dtype = place
    options, case = options_on(device, name), Case(SEQ_Q, SEQ_K, heads=HEADS, kv_heads=2, head_dim=head_dim)
    inputs = case.inputs(device, dtype)
    out, lse = fastattn.attention(*inputs, **options, return_lse=True)
    exact, exact_lse = reference.attention(*(x.double() for x in inputs), **options)
    rival, _ = reference.attention(*inputs, **options)
    assert relative_error(out, exact) <= 2 * relative_error(rival, exact) + (1e-6 if dtype == torch.float32 else 1e-4)
    assert relative_error(lse, exact_lse) < 1e-5


@pytest.mark.parametrize("seq_k", [1, 31, 32, 33, 127, 128, 129, 192, 193, 257])
def test_lengths_around_tiles(seq_k: int, device, dtype) -> None:
    """What lies past the last term is not looked at."""
    case = Case(130, seq_k, heads=HEADS, kv_heads=1)
    inputs = case.inputs(device, dtype)
    options = {"softcap": 5.0, "key_bias": torch.randn(2, 1, seq_k, device=device)}
    out, lse = fastattn.attention(*inputs, **options, return_lse=True)
    exact, exact_lse = reference.attention(*(x.double() for x in inputs), **options)
    assert relative_error(out, exact) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert relative_error(lse, exact_lse) < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_windows_of_heads_probed(causal: bool, device, dtype) -> None:
    """With K = 0 all visible keys weigh the same, and one-hot values name them."""
    window = (sides(0, 63, 64, 65, -1, 300).to(device), sides(0, 64, 0, 65, 20, -1).to(device))
    keep = reference.band_mask(200, 190, causal=causal, window=window, device=device)
    visible = torch.zeros_like(keep)
    q = torch.randn(1, 200, 6, 128, device=device).to(dtype)
    k = torch.zeros(1, 190, 6, 128, device=device, dtype=dtype)
    for first in range(0, 190, 128):
        keys = range(first, min(first + 128, 190))
        v = torch.zeros_like(k)
        v[0, keys, :, range(len(keys))] = 1
        out, lse = fastattn.attention(q, k, v, causal=causal, window=window, return_lse=True)
        visible[..., first : first + len(keys)] = out[0].transpose(0, 1)[..., : len(keys)] != 0
    assert torch.equal(visible, keep)
    torch.testing.assert_close(lse[0], keep.sum(-1).float().log(), atol=1e-5, rtol=0)


@each_option
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_gradients(name: str, head_dim: int, place) -> None:
    device, dtype = place
    options, case = options_on(device, name), Case(SEQ_Q, SEQ_K, heads=HEADS, kv_heads=2, head_dim=head_dim)
    q, k, v = case.inputs(device, dtype)
    inputs = {"q": q, "k": k, "v": v, **{x: options.pop(x) for x in ("key_bias", "sinks") if x in options}}
    assert_gradients_right(
        lambda **x: fastattn.attention(**x, **options, return_lse=True),
        lambda **x: reference.attention(**x, **options),
        inputs,
        case.cotangents(device, dtype),
    )


def test_hidden_keys_are_keys_that_are_not_there(device, dtype) -> None:
    """A padding mask; what is behind it may be anything that is finite."""
    q, k, v = Case(100, 300, heads=HEADS, kv_heads=2).inputs(device, dtype)
    bias = torch.zeros(2, 1, 300, device=device)
    bias[0, :, 201:], bias[1] = -math.inf, -math.inf
    k[0, 201:] *= 1000
    v[0, 201:] *= 1000
    out, lse = fastattn.attention(q, k, v, key_bias=bias, return_lse=True)
    alone, lse_alone = fastattn.attention(q[:1], k[:1, :201], v[:1, :201], return_lse=True)
    assert relative_error(out[:1], alone.double()) < (1e-6 if dtype == torch.float32 else 5e-3)
    torch.testing.assert_close(lse[:1], lse_alone, atol=1e-4, rtol=1e-5)
    assert torch.count_nonzero(out[1]) == 0
    assert (lse[1] == -math.inf).all()


def test_a_row_without_keys_has_its_sink_alone(device, dtype) -> None:
    q, k, v = Case(200, 70, heads=HEADS).inputs(device, dtype)
    sinks = torch.tensor([0.5, -3.0, -math.inf, 80.0], device=device)
    out, lse = fastattn.attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert torch.count_nonzero(out[:, :130]) == 0
    torch.testing.assert_close(lse[..., :130], sinks[None, :, None].expand(2, -1, 130))
    assert out.isfinite().all()


def test_a_far_softcap_changes_nothing_and_a_near_one_bounds(device, dtype) -> None:
    q, k, v = Case(90, 120).inputs(device, dtype)
    plain, lse = fastattn.attention(q, k, v, return_lse=True)
    out, far = fastattn.attention(q, k, v, softcap=1e4, return_lse=True)
    assert relative_error(out, plain.double()) < (1e-3 if dtype == torch.float32 else 5e-3)
    torch.testing.assert_close(far, lse, atol=2e-3, rtol=0)
    _, near = fastattn.attention(100 * q, k, v, softcap=0.01, return_lse=True)
    assert ((near - math.log(120)).abs() < 0.01 + 1e-4).all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "scores",
    [
        pytest.param([0.98, 0.99], id="below the cap"),
        pytest.param([1.0, 1.01], id="above the cap"),
        pytest.param([0.99, 1.01], id="around the cap"),
        pytest.param([0.0, 0.01, 0.3, 0.999, 1.0, 1.001, 3.0, 50.0, 6e4], id="of any size"),
    ],
)
def test_scores_around_the_cap(scores: list[float], head_dim: int, device, dtype) -> None:
    """Where a GPU takes another way to the hyperbolic tangent, for some of a tile or for all of it."""
    cap = 8.0
    q = torch.zeros(1, 130, 1, head_dim, device=device, dtype=dtype)
    k, v = torch.zeros(1, 300, 1, head_dim, device=device, dtype=dtype), torch.randn(1, 300, 1, head_dim, device=device)
    q[..., 0], q[0, 100:, 0, 0] = 1, -1
    choice = torch.randint(len(scores), (300,), generator=torch.Generator().manual_seed(0))
    k[0, :, 0, 0] = (torch.tensor(scores)[choice] * (cap if scores[-1] < 6e4 else 1)).to(device, dtype)
    v = v.to(dtype)
    out, lse = fastattn.attention(q, k, v, scale=1.0, softcap=cap, return_lse=True)
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), scale=1.0, softcap=cap)
    assert relative_error(out, exact) < (1e-5 if dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-5, rtol=0)


@pytest.mark.parametrize("softcap", [1e-3, 1e-20, 1e-40])
def test_a_cap_near_0_makes_all_weights_equal(softcap: float, device, dtype) -> None:
    q, k, v = Case(100, 200).inputs(device, dtype)
    k[:, ::3] = 0
    out, lse = fastattn.attention(q, k, v, softcap=softcap, return_lse=True)
    assert relative_error(out, v.double().mean(1, keepdim=True).expand_as(out)) < 1e-2
    assert ((lse - math.log(200)).abs() <= softcap + 1e-5).all()


@pytest.mark.parametrize("size", [1e-2, 1e2])
def test_a_key_that_is_no_number_shows(size: float, device, dtype) -> None:
    """Whichever way the scores beside its own take."""
    q, k, v = Case(100, 200).inputs(device, dtype)
    q, k = q * size, k.clone()
    k[:, 150, :, 0] = math.nan
    out, lse = fastattn.attention(q, k, v, softcap=5.0, causal=True, return_lse=True)
    seen = torch.arange(100, device=device) >= 50
    assert out[:, seen].isnan().all()
    assert out[:, ~seen].isfinite().all()
    assert lse[..., ~seen].isfinite().all()


def test_large_scores_and_biases_do_not_overflow(device, dtype) -> None:
    q, k, v = Case(100, 300, scale=30.0).inputs(device, dtype)
    bias = 1e4 * torch.randn(1, 4, 300, device=device)
    options = {"key_bias": bias, "sinks": 1e4 * torch.randn(4, device=device), "scale": 30.0}
    out, lse = fastattn.attention(q, k, v, **options, return_lse=True)
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), **options)
    assert out.isfinite().all()
    assert relative_error(lse, exact_lse) < 1e-5
    assert relative_error(out, exact) < (1e-2 if dtype == torch.float32 else 2e-2)


@each_option
def test_opcheck_and_compile(name: str, device, dtype) -> None:
    options = options_on(device, name)
    q, k, v = Case(SEQ_Q, SEQ_K, heads=HEADS, kv_heads=2, head_dim=16).inputs(device, dtype)
    left, right = options.get("window", (None, None))
    tensors = (
        options.get("sinks"),
        options.get("key_bias"),
        *(x if isinstance(x, Tensor) else None for x in (left, right)),
    )
    scalars = {"causal": options.get("causal", False), "softcap": options.get("softcap", 0.0)}
    torch.library.opcheck(torch.ops.fastattn.attention.default, (q, k, v, *tensors), scalars)
    torch.compiler.reset()  # past a number of recompilations torch would stop compiling
    compiled = torch.compile(lambda *x: fastattn.attention(*x, **options), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), fastattn.attention(q, k, v, **options))


@pytest.mark.parametrize("wanted", [[True] * 4, [False, True, False, True]], ids=str)
def test_opcheck_and_compile_backward(wanted: list[bool], device, dtype) -> None:
    case = Case(SEQ_Q, SEQ_K, heads=HEADS, kv_heads=2, head_dim=16)
    inputs, bias = case.inputs(device, dtype), key_bias(2, 1).to(device)
    out, lse = torch.ops.fastattn.attention(*inputs, None, bias, softcap=2.0)
    arguments = (*case.cotangents(device, dtype), *inputs, out, lse, bias)
    options = {"softcap": 2.0, "wanted": wanted}
    torch.library.opcheck(torch.ops.fastattn.attention_backward.default, arguments, options)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, softcap=2.0, key_bias=bias)

    leaves = [x.requires_grad_(is_wanted) for x, is_wanted in zip((*inputs, bias), wanted, strict=True)]
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    wanted_leaves = [x for x in leaves if x.requires_grad]
    results, expected = (
        torch.autograd.grad(function(*leaves).float().sum(), wanted_leaves) for function in (compiled, attend)
    )
    for result, truth in zip(results, expected, strict=True):
        assert torch.equal(result, truth)


def test_vmap(device, dtype) -> None:
    q, k, v = (x.unflatten(0, (2, 1)) for x in Case(60, 70, heads=HEADS).inputs(device, dtype))
    bias, sinks = torch.randn(2, 1, 1, 70, device=device), torch.randn(HEADS, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, key_bias=bias, sinks=sinks, window=(sides(3, 4, 5, 6).to(device), -1))

    out = torch.vmap(attend)(q, k, v, bias)
    for i in range(2):
        assert torch.equal(out[i], attend(q[i], k[i], v[i], bias[i]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "attention: softcap must be positive, or None, got 0.0"),
        ({"softcap": math.inf}, "attention: softcap must be finite and positive, or 0 for none, got inf"),
        ({"sinks": torch.zeros(3)}, r"attention: sinks must be contiguous Float \[heads\] = \[4\], got Float \[3\]"),
        ({"sinks": torch.zeros(4).double()}, "sinks must be contiguous Float .* got Double"),
        ({"key_bias": torch.zeros(2, 4, 71)}, r"attention: key_bias must be Float .* = \[2, 4, 70\], got Float"),
        (
            {"key_bias": torch.zeros(2, 2, 70)},
            r"key_bias must be Float \[batch or 1, heads or 1, seq_k\] = \[2, 4, 70\]",
        ),
        ({"key_bias": torch.zeros(2, 4, 70).half()}, "key_bias must be Float .* got Half"),
        ({"window": (sides(1, 2), 0)}, r"attention: window_left must be Int \[heads\] = \[4\], got Int \[2\]"),
        ({"window": (0, sides(1, 2, 3, 4).long())}, r"window_right must be Int \[heads\] = \[4\], got Long \[4\]"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        fastattn.attention(*Case(60, 70, heads=HEADS).inputs("cpu", torch.float32), **options)
