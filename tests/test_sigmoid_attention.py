"""`sigmoid_attention` and its gradients against the formula in float64."""

import math

import pytest
import torch
from torch import Tensor

import fastattn
from cases import CASES, Case, relative_error
from fastattn import reference

NAMES = ("out", "dq", "dk", "dv", "dbias")


def run(function, case: Case, tensors: list[Tensor], bias: Tensor | float | None, dout: Tensor) -> list[Tensor]:
    """[out, dq, dk, dv(, dbias)]"""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    if isinstance(bias, Tensor):
        bias = bias.detach().requires_grad_()
        leaves.append(bias)
    out = function(*leaves[:3], bias=bias, **case.options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def head_bias(case: Case, device: str) -> Tensor:
    return torch.randn(case.heads, device=device) - math.log(case.seq_k)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, place) -> None:
    """At most twice the error of the plain formula in the same precision."""
    device, dtype = place
    if device == "cuda" and case.head_dim > 128:
        pytest.skip(f"head_dim {case.head_dim} is not supported on {device}")
    tensors, dout, bias = case.inputs(device, dtype), case.cotangents(device, dtype)[0], head_bias(case, device)
    results = run(fastattn.sigmoid_attention, case, tensors, bias, dout)
    exact = run(reference.sigmoid_attention, case, [x.double() for x in tensors], bias.double(), dout.double())
    rivals = run(reference.sigmoid_attention, case, tensors, bias.to(dtype), dout)
    slack = 1e-6 if dtype == torch.float32 else 1e-3  # 1e-3: the Hopper kernels' quartic, for weights near a half
    for name, result, truth, rival in zip(NAMES, results, exact, rivals, strict=True):
        # dbias sums what cancels, over all queries and keys
        allowed = 2 * relative_error(rival, truth) + (slack if name != "dbias" else 20 * slack)
        error = relative_error(result, truth)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def worst_weight_error(out: Tensor, exact: Tensor) -> float:
    """The largest relative error of weights that show as outputs, beyond the rounding of these outputs."""
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}[out.dtype]
    return ((out.double() - exact) / exact).abs().max().item() - rounding


@pytest.mark.parametrize("n", [1024, 16384, 65536])
def test_weights_are_accurate_where_they_live(n: int, device, dtype) -> None:
    """One weight at a time: v is 1 for one key and 0 for the others. A form with tanh is off by 0.25 at 64k keys."""
    q = torch.randn(1, 256, 1, 64, device=device, dtype=dtype)
    k = torch.randn(1, 1, 1, 64, device=device, dtype=dtype)
    v = torch.ones(1, 1, 1, 64, device=device, dtype=dtype)
    bias = -math.log(n)
    out = fastattn.sigmoid_attention(q, k, v, bias=bias)
    exact = reference.sigmoid_attention(q.double(), k.double(), v.double(), bias=bias)
    assert worst_weight_error(out, exact) < (5e-4 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("bias", [0.0, -3.0, -6.0])
def test_small_and_large_weights_share_a_tile(bias: float, device, dtype) -> None:
    """Hopper weighs a warp's scores in a cheaper way if all weights are below 1/17 (x < -4 ln 2): here some rows of a
    tile allow it, some just do, some do not. v is the identity over the second tile, so that its weights show.
    """
    reach = torch.tensor([0.0, 0.1, 0.5, 1.0, 3.0, 0.0, 0.2, 1.5], device=device).repeat_interleave(32)
    q = (torch.randn(1, 256, 1, 128, device=device) * reach[:, None, None]).to(dtype)
    k = torch.randn(1, 256, 1, 128, device=device).to(dtype)
    v = torch.eye(256, device=device, dtype=dtype)[None, :, None, 128:]
    dout = torch.ones_like(q)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    exact_leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = fastattn.sigmoid_attention(*leaves, bias=bias)
    exact = reference.sigmoid_attention(*exact_leaves, bias=bias)
    assert worst_weight_error(out, exact) < (5e-4 if dtype == torch.float32 else 5e-3)
    gradients = torch.autograd.grad(out, leaves, dout)
    exact_gradients = torch.autograd.grad(exact, exact_leaves, dout.double())
    for name, result, truth in zip(NAMES[1:], gradients, exact_gradients, strict=False):
        assert relative_error(result, truth) < (1e-5 if dtype == torch.float32 else 1e-2), name


def test_float16_shows_what_the_formula_is_off_by(device) -> None:
    """Its roundings are an eighth of bfloat16's. Arguments from −9.4 to 5, so that no weight is subnormal: rows of
    small weights, rows of large ones, and between them every mixture in a group of eight.
    """
    q = torch.zeros(1, 256, 1, 64, device=device, dtype=torch.float16)
    q[0, :, 0, 0] = torch.linspace(-3.4, 8, 256).to(device)
    q[0, :, 0, 1] = 1
    k = torch.zeros(1, 64, 1, 64, device=device, dtype=torch.float16)
    k[0, :, 0, 0] = 1
    k[0, :, 0, 1] = (3 * torch.rand(64)).to(device)
    v = torch.eye(64, device=device, dtype=torch.float16)[None, :, None]
    out = fastattn.sigmoid_attention(q, k, v, bias=-6.0, scale=1.0)
    exact = reference.sigmoid_attention(q.double(), k.double(), v.double(), bias=-6.0, scale=1.0)
    assert worst_weight_error(out, exact) < 2**-11 + 7e-4


def test_default_bias_is_minus_log_of_the_keys(device, dtype) -> None:
    q, k, v = Case(40, 90).inputs(device, dtype)
    expected = fastattn.sigmoid_attention(q, k, v, bias=-math.log(90))
    assert torch.equal(fastattn.sigmoid_attention(q, k, v), expected)
    per_head = torch.full((4,), -math.log(90), device=device)
    assert relative_error(fastattn.sigmoid_attention(q, k, v, bias=per_head), expected) < 1e-3


def test_masked_scores_weigh_nothing(device, dtype) -> None:
    """Queries that see no key give exactly 0, and so do their gradients."""
    case = Case(seq_q=200, seq_k=70, causal=True)
    tensors = case.inputs(device, dtype)
    out, dq, *_ = run(fastattn.sigmoid_attention, case, tensors, 0.0, case.cotangents(device, dtype)[0])
    assert torch.count_nonzero(out[:, :130]) == 0
    assert torch.count_nonzero(dq[:, :130]) == 0
    assert out.isfinite().all()


def test_splitting_the_keys_adds_up(device, dtype) -> None:
    """Weights stand alone: the outputs over parts of the keys sum to the whole."""
    q, k, v = Case(100, 256).inputs(device, dtype)
    whole = fastattn.sigmoid_attention(q, k, v, bias=-3.0)
    parts = [fastattn.sigmoid_attention(q, k[:, s], v[:, s], bias=-3.0) for s in (slice(0, 77), slice(77, 256))]
    assert relative_error(sum(parts), whole.double()) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_opcheck(device, dtype) -> None:
    q, k, v = (x.requires_grad_() for x in Case(70, 90, kv_heads=2).inputs(device, dtype))
    bias = torch.randn(4, device=device, requires_grad=True)
    for args, options in [((q, k, v, bias), {"causal": True}), ((q, k, v), {"window": [9, 3], "constant_bias": -2.0})]:
        torch.library.opcheck(torch.ops.fastattn.sigmoid_attention.default, args, options, rtol=2e-2, atol=2e-2)


def test_compile_and_autocast(device) -> None:
    q, k, v = Case(70, 90).inputs(device, torch.float32)
    bias = torch.randn(4, device=device)

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return fastattn.sigmoid_attention(q, k, v, bias=bias, causal=True)

    out = function(q, k, v, bias)
    assert out.dtype == torch.bfloat16
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v, bias)
    assert torch.equal(compiled, out)


def test_vmap_shares_the_bias(device, dtype) -> None:
    q, k, v = (torch.randn(3, 2, 20, 4, 64, device=device, dtype=dtype) for _ in range(3))
    bias = torch.randn(4, device=device)
    mapped = torch.vmap(lambda q, k, v: fastattn.sigmoid_attention(q, k, v, bias=bias))(q, k, v)
    looped = torch.stack([fastattn.sigmoid_attention(*x, bias=bias) for x in zip(q, k, v, strict=True)])
    assert torch.equal(mapped, looped)


def test_flops_are_those_of_attention() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = Case(50, 60).inputs("cpu", torch.float32)
    counts = []
    for op in (fastattn.attention, fastattn.sigmoid_attention):
        with FlopCounterMode(display=False) as counter:
            op(q, k, v, causal=True)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (float("nan"), "bias must be finite, got nan"),
        (torch.zeros(3), r"bias must be contiguous Float \[heads\] = \[4\], got Float \[3\]"),
        (torch.zeros(4, 1), r"bias must be contiguous Float \[heads\] = \[4\]"),
    ],
)
def test_bad_bias_is_refused(bias: float | Tensor, message: str, device, dtype) -> None:
    q, k, v = Case(20, 20).inputs(device, dtype)
    bias = bias.to(device) if isinstance(bias, Tensor) else bias
    with pytest.raises(RuntimeError, match=message):
        fastattn.sigmoid_attention(q, k, v, bias=bias)


def test_refusals_name_the_op(device, dtype) -> None:
    q, k, v = Case(20, 20).inputs(device, dtype)
    with pytest.raises(RuntimeError, match="sigmoid_attention: the heads of q must be a multiple of those of k"):
        fastattn.sigmoid_attention(q, k[:, :, :3], v[:, :, :3])
    with pytest.raises(RuntimeError, match="sigmoid_attention: scale must be finite and positive"):
        fastattn.sigmoid_attention(q, k, v, scale=0.0)
