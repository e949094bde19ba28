"""What all backwards promise: only what is wanted is computed, the same every time, and rows without scores get 0."""

import math
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from cases import Case, gradients, relative_error
from fastattn import reference

SEQ_Q, SEQ_K, HEADS = 130, 200, 4


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=q.device) for x in ([0, 50, 50, 130], [0, 90, 130, 200]))
    out, lse = fastattn.varlen_attention(q[0], k[0], v[0], cu_q, cu_k, causal=True, **options, return_lse=True)
    return out[None], lse[None]


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    lengths = {"seq_q": q.shape[1], "seq_k": k.shape[1]}
    blocks = fastattn.BlockList.sink_and_window(1, 1, **lengths, block_size=(64, 64), device=q.device)
    return fastattn.block_sparse_attention(q, k, v, blocks, **options, return_lse=True)


def neighborhood_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    k, v = (x[:, : q.shape[1]] for x in (k, v))
    return fastattn.neighborhood_attention(q, k, v, window=31, **options, return_lse=True)


def sigmoid_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    out = fastattn.sigmoid_attention(q, k, v, **options)
    return out, torch.zeros(1, HEADS, q.shape[1], device=q.device, requires_grad=True) + 0


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return fastattn.attention(q, k, v, causal=True, **options, return_lse=True)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return attention(q, k, v, softcap=2.0, **options)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    rectangle = torch.tensor([[[0, 70, 0, 150]]], dtype=torch.int32, device=q.device)
    return attention(q, k, v, rectangles=rectangle, **options)


# Each with the tensors that it takes beside q, k and v.
OPS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "attention": (attention, ("sinks",)),
    "softcap and key_bias": (capped_attention, ("key_bias", "sinks")),
    "rectangles": (prefix_attention, ()),
    "varlen_attention": (varlen_attention, ("sinks",)),
    "block_sparse_attention": (block_sparse_attention, ()),
    "neighborhood_attention": (neighborhood_attention, ()),
    "sigmoid_attention": (sigmoid_attention, ("bias",)),
}
each_op = pytest.mark.parametrize("name", OPS)


def inputs_of(name: str, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor], tuple[Tensor, Tensor]]:
    function, others = OPS[name]
    case = Case(SEQ_Q, SEQ_K, batch=1, heads=HEADS, kv_heads=2)
    q, k, v = case.inputs(device, dtype)
    of_heads = torch.randn(HEADS, device=device)
    tensors = {"sinks": of_heads, "bias": of_heads, "key_bias": torch.randn(1, 1, SEQ_K, device=device)}
    inputs = {"q": q, "k": k, "v": v, **{other: tensors[other] for other in others}}
    return function, inputs, case.cotangents(device, dtype)


@each_op
def test_what_is_wanted_is_what_it_is_beside_others(name: str, device, dtype) -> None:
    """Bit by bit; but on a GPU attention's dq by itself is another kernel's, which adds in another order."""
    rounding = 2**-8 if device == "cuda" and name == "attention" else 0.0
    function, inputs, cotangents = inputs_of(name, device, dtype)
    together = gradients(partial(function, deterministic=True), inputs, cotangents)
    for chosen in product([False, True], repeat=len(inputs)):
        wanted = [x for x, is_wanted in zip(inputs, chosen, strict=True) if is_wanted]
        if not wanted:
            continue
        constant = {x: tensor for x, tensor in inputs.items() if x not in wanted}
        leaves = {x: inputs[x] for x in wanted}
        alone = gradients(partial(function, **constant, deterministic=True), leaves, cotangents)
        for x in wanted:
            if x == "q" and rounding > 0:
                assert relative_error(alone[x], together[x]) <= rounding, wanted
            else:
                assert torch.equal(alone[x], together[x]), (x, wanted)


@each_op
def test_nothing_is_returned_for_what_is_not_wanted(name: str, device, dtype) -> None:
    function, inputs, cotangents = inputs_of(name, device, dtype)
    calls: list[tuple[dict[str, Any], Any]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = op(*args, **(kwargs or {}))
            if "_backward" in str(op) and "fastattn" in str(op):
                calls.append((kwargs, results))
            return results

    with Watch():
        gradients(lambda v: function(**{**inputs, "v": v}), {"v": inputs["v"]}, cotangents)
    ((options, results),) = calls
    assert options["wanted"] == [False, False, True, *([False] * (len(results) - 3))]
    assert [result.shape for result in results] == [
        result.shape if i == 2 else torch.Size([0]) for i, result in enumerate(results)
    ]
    assert results[2].shape[-3:] == inputs["v"].shape[-3:] or name == "neighborhood_attention"


@each_op
def test_deterministic(name: str, device, dtype) -> None:
    """Asked for by the argument, or by torch where that is None."""
    function, inputs, cotangents = inputs_of(name, device, dtype)
    asked: list[bool] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "_backward" in str(op) and "fastattn" in str(op):
                asked.append((kwargs or {}).get("deterministic", False))
            return op(*args, **(kwargs or {}))

    results = []
    try:
        for of_torch, argument in product([False, True], [None, False, True]):
            torch.use_deterministic_algorithms(of_torch)
            with Watch():
                results.append(gradients(partial(function, deterministic=argument), inputs, cotangents))
            assert asked == [of_torch if argument is None else argument]
            asked.clear()
    finally:
        torch.use_deterministic_algorithms(False)
    for result in (results[2], results[3], results[5]):  # those that were deterministic
        for x, gradient in result.items():
            assert torch.equal(gradient, results[5][x])


def test_deterministic_is_read_at_the_call_when_compiled(device, dtype) -> None:
    q, k, v = (x.requires_grad_() for x in Case(20, 30, head_dim=16).inputs(device, dtype))
    torch.compiler.reset()
    compiled = torch.compile(fastattn.attention, fullgraph=True, backend="aot_eager")
    try:
        for of_torch in (False, True):
            torch.use_deterministic_algorithms(of_torch)
            compiled(q, k, v).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_entry_of_a_batch_is_what_it_is_alone(dtype: torch.dtype) -> None:
    """A CPU's gradients have one order of summation, whatever the tiles are that so many heads suit."""
    case = Case(600, 600, batch=2, heads=8, kv_heads=8, causal=True)
    q, k, v = case.inputs("cpu", dtype)
    dout, dlse = case.cotangents("cpu", dtype)
    together = gradients(attention, {"q": q, "k": k, "v": v}, (dout, dlse))
    alone = gradients(attention, {"q": q[1:], "k": k[1:], "v": v[1:]}, (dout[1:], dlse[1:]))
    for x, gradient in alone.items():
        assert torch.equal(gradient, together[x][1:])


@pytest.mark.parametrize(
    ("wanted", "products"), [("q", 3), ("k", 3), ("v", 2), ("kv", 4), ("qk", 4), ("qv", 4), ("qkv", 5)]
)
@pytest.mark.parametrize("value_dim", [None, 32])
def test_flops_of_what_is_wanted(wanted: str, products: int, value_dim: int | None) -> None:
    inputs = dict(zip("qkv", Case(20, 28, batch=1, value_dim=value_dim).inputs("cpu", torch.float32), strict=True))
    for name in wanted:
        inputs[name].requires_grad_()
    out = fastattn.attention(**inputs, causal=True)
    kept = 4 * int(reference.band_mask(20, 28, causal=True).sum())
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    of_values = ("q" in wanted or "k" in wanted) + ("v" in wanted)
    assert counter.get_total_flops() == 2 * kept * (64 * (products - of_values) + (value_dim or 64) * of_values)


@pytest.mark.parametrize("name", [name for name in OPS if name != "sigmoid_attention"])
def test_gradients_are_derivatives(name: str) -> None:
    """Directional derivatives by central differences, which know no formula: of each input by itself."""
    function, inputs, cotangents = inputs_of(name, "cpu", torch.float32)
    results = gradients(function, inputs, cotangents)
    for x, gradient in results.items():
        direction, step = torch.randn_like(inputs[x]), 1e-3

        def loss(moved: Tensor, x: str = x) -> float:
            out, lse = function(**{**inputs, x: moved})
            seen = lse.isfinite()
            return ((out * cotangents[0]).double().sum() + (lse * cotangents[1])[seen].double().sum()).item()

        slope = (loss(inputs[x] + step * direction) - loss(inputs[x] - step * direction)) / (2 * step)
        predicted = (gradient * direction).double().sum().item()
        size = gradient.double().norm().item()
        assert abs(slope - predicted) < 5e-3 * (abs(predicted) + size), x


@pytest.mark.parametrize("sinks", [None, 0.5])
def test_hidden_keys_and_blind_rows_have_no_gradients(sinks: float | None, device, dtype) -> None:
    """Keys behind a bias of -inf, rows that see no others; with a sink such a row still has a weight, of no value."""
    case = Case(100, 300, heads=HEADS, kv_heads=2)
    q, k, v = case.inputs(device, dtype)
    bias = torch.randn(2, 1, 300, device=device)
    bias[0, :, 130:], bias[1] = -math.inf, -math.inf
    inputs = {"q": q, "k": k, "v": v, "key_bias": bias}
    options = {} if sinks is None else {"sinks": torch.full((HEADS,), sinks, device=device)}
    results = gradients(
        lambda **x: fastattn.attention(**x, **options, return_lse=True), inputs, case.cotangents(device, dtype)
    )
    for gradient in results.values():
        assert gradient.isfinite().all()
    assert torch.count_nonzero(results["q"][1]) == 0
    for x in ("k", "v"):
        assert torch.count_nonzero(results[x][0, 130:]) == 0
        assert torch.count_nonzero(results[x][1]) == 0
    assert torch.count_nonzero(results["key_bias"][bias == -math.inf]) == 0


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sinks": True}, {"rectangles": True}], ids=str)
def test_blind_rows_have_none_whatever_the_keys_are(options: dict[str, Any], device, dtype) -> None:
    """NaN in keys and values that a row does not see, in a tile that it shares with rows that do."""
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.randn(HEADS, device=device)
    if "rectangles" in options:
        options["rectangles"] = torch.tensor([[[0, 3, 5, 9]]], dtype=torch.int32, device=device)
    case = Case(200, 70, heads=HEADS, kv_heads=2)
    q, k, v = case.inputs(device, dtype)
    k[:, 40], v[:, 50] = math.nan, math.nan
    results = gradients(
        lambda **x: fastattn.attention(**x, causal=True, **options, return_lse=True),
        {"q": q, "k": k, "v": v},
        case.cotangents(device, dtype),
    )
    assert torch.count_nonzero(results["q"][:, 3:130]) == 0


def test_a_bias_of_its_own_shape_gets_a_gradient_of_that(device, dtype) -> None:
    case = Case(60, 70, heads=HEADS, kv_heads=1)
    q, k, v = case.inputs(device, dtype)
    whole = torch.zeros(2, HEADS, 70, device=device)

    def of(bias: Tensor) -> Tensor:
        return gradients(
            lambda key_bias: fastattn.attention(q, k, v, key_bias=key_bias, return_lse=True),
            {"key_bias": bias},
            cotangents,
        )["key_bias"]

    cotangents = case.cotangents(device, dtype)
    expected = of(whole)
    for shape in ((1, 1, 70), (2, 1, 70), (1, HEADS, 70)):
        gradient = of(torch.zeros(shape, device=device))
        assert relative_error(gradient, expected.double().sum_to_size(shape)) < 1e-5
    assert relative_error(of(whole[:1, :1].expand(2, HEADS, 70)), expected) < 1e-6


def gradients_of(function: Any, case: Case, dtype: torch.dtype, wanted: str, options: dict[str, Any]) -> list[Tensor]:
    """On the GPU, of the same bf16 inputs."""
    named = zip("qkv", case.inputs("cuda", torch.bfloat16), strict=True)
    leaves = [x.to(dtype).requires_grad_(name in wanted) for name, x in named]
    dout, _ = case.cotangents("cuda", torch.bfloat16)
    result = function(*leaves, **options)
    out = result[0] if isinstance(result, tuple) else result  # the formula's comes with its log-sum-exp
    return list(torch.autograd.grad(out, [x for x in leaves if x.requires_grad], dout.to(dtype)))


def assert_tiles_are_as_exact(results: list[Tensor], op: str, case: Case, wanted: str, options: dict[str, Any]) -> None:
    """As the formula in the same precision, in every tile of 128 tokens of each head."""
    formula = partial(gradients_of, getattr(reference, op), case, wanted=wanted, options=options)

    def norms(x: Tensor) -> Tensor:
        return x.double().unflatten(1, (-1, 128)).norm(dim=(2, 4))

    def largest(gradient: Tensor, exact: Tensor) -> float:
        return (norms(gradient - exact) / norms(exact)).nan_to_num(0.0, posinf=torch.inf).max().item()

    for result, rival, exact in zip(results, formula(torch.bfloat16), formula(torch.float64), strict=True):
        assert largest(result, exact) <= 2 * largest(rival, exact) + 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("op", "options"),
    [("attention", {}), ("attention", {"window": (600, 600)}), ("sigmoid_attention", {"bias": -6.0})],
    ids=str,
)
def test_key_tiles_that_are_left_over_are_shared(op: str, options: dict[str, Any], head_dim: int) -> None:
    """Several thread blocks take one of these, and dk and dv are sums of theirs."""
    heads = num_multiprocessors() // 8 + 1  # of eight key tiles
    case = Case(1024, 1024, batch=1, heads=heads, kv_heads=heads, head_dim=head_dim)
    with torch.profiler.profile() as profile:
        results = gradients_of(getattr(fastattn, op), case, torch.bfloat16, "qkv", options)
        torch.cuda.synchronize()
    assert any("finish_keys_kernel" in event.key for event in profile.key_averages()), "none was shared"
    assert_tiles_are_as_exact(results, op, case, "qkv", options)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("wanted", "deterministic"), [("qkv", False), ("qkv", True), ("kv", False)])
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (200, 0)}], ids=str)
def test_a_thread_block_takes_several_key_tiles(
    options: dict[str, Any], wanted: str, deterministic: bool, head_dim: int
) -> None:
    """One after the other, of different lengths; no query sees the first ones of the window."""
    heads = num_multiprocessors() * (12 if deterministic else 3) // 8 + 1  # of eight key tiles; in turns from 5 on
    case = Case(640, 1024, batch=1, heads=heads, kv_heads=heads, head_dim=head_dim)
    ours = partial(fastattn.attention, deterministic=deterministic)
    results = gradients_of(ours, case, torch.bfloat16, wanted, options)
    assert_tiles_are_as_exact(results, "attention", case, wanted, options)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq", [128, 256])
def test_many_short_sequences_take_no_sums_of_dq(seq: int, causal: bool) -> None:
    """They are not worth these at head_dim 128: two kernels compute their gradients."""
    case = Case(seq, seq, batch=num_multiprocessors(), heads=8, kv_heads=8, head_dim=128)
    with torch.profiler.profile() as profile:
        results = gradients_of(fastattn.attention, case, torch.bfloat16, "qkv", {"causal": causal})
        torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages()]
    assert any("QueryGradientKernel" in kernel for kernel in kernels), "there were not two kernels"
    assert not any("finish_kernel" in kernel for kernel in kernels), "there were sums"
    assert_tiles_are_as_exact(results, "attention", case, "qkv", {"causal": causal})


def num_multiprocessors() -> int:
    return torch.cuda.get_device_properties("cuda").multi_processor_count
