"""`varlen_attention`: each sequence is what `attention` makes of it alone, whatever lies around it."""

import math
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from cases import assert_gradients_right, gradients, relative_error
from fastattn import reference

HEADS, KV_HEADS = 4, 2
LENGTHS: dict[str, tuple[list[int], list[int]]] = {
    "one": ([200], [200]),
    "around tiles": ([1, 63, 64, 65, 127, 128, 129, 191, 192, 193], [1, 63, 64, 65, 127, 128, 129, 191, 192, 193]),
    "empty ones": ([0, 70, 0, 0, 130, 0], [0, 70, 0, 0, 130, 0]),
    "queries or keys alone": ([100, 0, 64, 200], [0, 90, 300, 128]),
    "keys of other lengths": ([1, 130, 260, 5], [300, 200, 100, 129]),
    "many short ones": ([5] * 60, [5] * 60),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (40, 3)},
    "windows of heads": {"window": (torch.tensor([3, -1, 70, 0]), torch.tensor([0, 5, -1, 130])), "scale": 0.3},
    "softcap": {"softcap": 2.0, "causal": True},
    "sinks": {"sinks": torch.tensor([0.3, -math.inf, 9.0, -7.0]), "window": (-1, 20)},
}


def on(device: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: on(device, x) for name, x in value.items()}
    if isinstance(value, tuple):
        return tuple(on(device, x) for x in value)
    if isinstance(value, Tensor):
        return value.to(device) if value.is_floating_point() else value.to(device, torch.int32)
    return value


def ends(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def inputs(
    lengths: tuple[list[int], list[int]],
    place: tuple[str, torch.dtype],
    head_dim: int = 64,
    value_dim: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    device, dtype = place
    queries, keys = map(sum, lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    q, k = normal(queries, HEADS, head_dim), normal(keys, KV_HEADS, head_dim)
    return q, k, normal(keys, KV_HEADS, value_dim or head_dim), ends(lengths[0], device), ends(lengths[1], device)


def alone(function: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, **options: Any) -> Any:
    """Output and log-sum-exp by a function of one batch entry, sequence after sequence."""
    results = [
        function(q[None, a:b], k[None, c:d], v[None, c:d], **options)
        for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    ]
    return torch.cat([out[0] for out, _ in results]), torch.cat([lse[0] for _, lse in results], -1)


def assert_right(tensors: Any, dtype: torch.dtype, **options: Any) -> None:
    """At most twice the error of the plain formula in the same precision; the LSE as in float32."""
    out, lse = fastattn.varlen_attention(*tensors, **options, return_lse=True)
    doubles = [x.double() for x in tensors[:3]]
    exact, exact_lse = alone(reference.attention, *doubles, *tensors[3:], **options)
    rival, _ = alone(reference.attention, *tensors, **options)
    assert relative_error(out, exact) <= 2 * relative_error(rival, exact) + (1e-6 if dtype == torch.float32 else 1e-4)
    assert relative_error(lse, exact_lse) < 1e-5


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("option", OPTIONS)
def test_values(lengths: str, option: str, place) -> None:
    assert_right(inputs(LENGTHS[lengths], place), place[1], **on(place[0], OPTIONS[option]))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(32, 32), (96, 96), (128, 128), (192, 128), (256, 256), (64, 16)])
def test_head_dims(head_dim: int, value_dim: int, place) -> None:
    assert_right(inputs(LENGTHS["around tiles"], place, head_dim, value_dim), place[1], causal=True)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=12),
    causal=st.booleans(),
)
def test_any_lengths(lengths: list[tuple[int, int]], causal: bool) -> None:
    queries, keys = map(list, zip(*lengths, strict=True))
    assert_right(inputs((queries, keys), ("cpu", torch.float32), 16), torch.float32, causal=causal)


def test_equal_lengths_are_a_batch(device, dtype) -> None:
    tensors = inputs(([150] * 3, [170] * 3), (device, dtype))
    out, lse = fastattn.varlen_attention(*tensors, causal=True, return_lse=True)
    q, k, v = (x.unflatten(0, (3, -1)) for x in tensors[:3])
    batched, batched_lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    assert relative_error(out, batched.flatten(0, 1).double()) < (1e-6 if dtype == torch.float32 else 5e-3)
    torch.testing.assert_close(lse, batched_lse.transpose(0, 1).flatten(1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_probed(causal: bool, device, dtype) -> None:
    """With K = 0 all visible keys weigh the same, and one-hot values name them."""
    lengths = [3, 0, 130, 65, 40]
    q, k, v, cu, _ = inputs((lengths, lengths), (device, dtype), 128)
    keep = torch.block_diag(*(reference.band_mask(n, n, causal=causal).float() for n in lengths)).bool()
    visible = torch.zeros_like(keep)
    for first in range(0, len(keep), 128):
        keys = range(first, min(first + 128, len(keep)))
        v.zero_()
        v[keys, :, range(len(keys))] = 1
        out = fastattn.varlen_attention(q, k * 0, v, cu, cu, causal=causal)
        visible[:, first : first + len(keys)] = (out[:, 1, : len(keys)] != 0).cpu()
    assert torch.equal(visible, keep)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_nan_of_one_sequence_stays_there(head_dim: int, device, dtype) -> None:
    """Its rows lie in the last tiles of its neighbours, where they would be multiplied by weights of 0."""
    lengths = [70, 33, 200, 128, 90]
    tensors = inputs((lengths, lengths), (device, dtype), head_dim)
    clean, clean_lse = fastattn.varlen_attention(*tensors, return_lse=True)
    q, k, v, cu, _ = tensors
    for poisoned in (0, 2, 4):
        begin, end = cu[poisoned : poisoned + 2].tolist()
        bad = [x.clone() for x in (q, k, v)]
        for x in bad:
            x[begin:end] = math.nan
        out, lse = fastattn.varlen_attention(*bad, cu, cu, return_lse=True)
        assert out[begin:end].isnan().all()
        out[begin:end], lse[:, begin:end] = clean[begin:end], clean_lse[:, begin:end]
        assert torch.equal(out, clean)
        assert torch.equal(lse, clean_lse)


@pytest.mark.parametrize("option", ["causal", "sinks"])
def test_unused_tokens(option: str, device, dtype) -> None:
    """They are not looked at; unused queries, and those after the last sequence, see nothing."""
    lengths, used = ([70, 200, 0, 130], [90, 129, 64, 200]), ([50, 200, 0, 1], [64, 100, 0, 200])
    options = on(device, OPTIONS[option])
    q, k, v, cu_q, cu_k = inputs(lengths, (device, dtype))
    q, k, v = (torch.cat([x, torch.full_like(x[:40], math.nan)]) for x in (q, k, v))
    rows, kept = [], []
    for tokens, cu, of_one in ((rows, cu_q, used[0]), (kept, cu_k, used[1])):
        tokens += [first + i for first, n in zip(cu.tolist(), of_one, strict=False) for i in range(n)]
    packed = (q[rows], k[kept], v[kept], ends(used[0], device), ends(used[1], device))
    wanted, wanted_lse = fastattn.varlen_attention(*packed, **options, return_lse=True)
    for x, tokens in ((q, rows), (k, kept), (v, kept)):
        unused = torch.ones(len(x), dtype=torch.bool)
        unused[tokens] = False
        x[unused] = math.nan
    seqused_q, seqused_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in used)
    out, lse = fastattn.varlen_attention(
        q, k, v, cu_q, cu_k, seqused_q=seqused_q, seqused_k=seqused_k, **options, return_lse=True
    )
    assert torch.equal(out[rows], wanted)
    assert torch.equal(lse[:, rows], wanted_lse)
    blind = torch.ones(len(q), dtype=torch.bool)
    blind[rows] = False
    assert torch.count_nonzero(out[blind]) == 0
    sinks = options.get("sinks", torch.full((HEADS,), -math.inf, device=device))
    torch.testing.assert_close(lse[:, blind], sinks[:, None].expand(-1, int(blind.sum())))


def test_greatest_lengths_change_no_result(device, dtype) -> None:
    tensors = inputs(([300, 20], [400, 30]), (device, dtype))
    expected = fastattn.varlen_attention(*tensors, causal=True)
    for longest in (1, 300, 5000):
        out = fastattn.varlen_attention(*tensors, causal=True, max_seqlen_q=longest, max_seqlen_k=longest)
        assert relative_error(out, expected.double()) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_strided_views(device, dtype) -> None:
    fused = torch.randn(200, 3, HEADS, 64, device=device).to(dtype)
    cu = ends([30, 120, 50], device)
    q, k, v = fused.unbind(1)
    expected = fastattn.varlen_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu, cu)
    assert torch.equal(fastattn.varlen_attention(q, k, v, cu, cu), expected)


@pytest.mark.parametrize("lengths", [([0], [0]), ([0, 0], [5, 7]), ([5, 7], [0, 0])], ids=str)
def test_zero_sizes(lengths: tuple[list[int], list[int]], device, dtype) -> None:
    tensors = inputs(lengths, (device, dtype))
    out, lse = fastattn.varlen_attention(*tensors, return_lse=True)
    assert out.shape == tensors[0].shape
    assert torch.count_nonzero(out) == 0
    assert (lse == -math.inf).all()


def cotangents_of(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.randn(*q.shape[:2], v.shape[2], device=q.device).to(q.dtype)
    return out, torch.randn(q.shape[1], q.shape[0], device=q.device)


def assert_varlen_gradients_right(tensors: Any, **options: Any) -> None:
    q, k, v, *cu_seqlens = tensors
    leaves = {"q": q, "k": k, "v": v, **({"sinks": options.pop("sinks")} if "sinks" in options else {})}
    assert_gradients_right(
        lambda q, k, v, **x: fastattn.varlen_attention(q, k, v, *cu_seqlens, **x, **options, return_lse=True),
        lambda q, k, v, **x: alone(reference.attention, q, k, v, *cu_seqlens, **x, **options),
        leaves,
        cotangents_of(q, v),
    )


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("option", OPTIONS)
def test_gradients(lengths: str, option: str, place) -> None:
    assert_varlen_gradients_right(inputs(LENGTHS[lengths], place), **on(place[0], OPTIONS[option]))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 16), (128, 128), (128, 64), (64, 16)])
def test_gradients_of_head_dims(head_dim: int, value_dim: int, place) -> None:
    assert_varlen_gradients_right(inputs(LENGTHS["around tiles"], place, head_dim, value_dim), causal=True)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=12),
    causal=st.booleans(),
)
def test_gradients_of_any_lengths(lengths: list[tuple[int, int]], causal: bool) -> None:
    queries, keys = map(list, zip(*lengths, strict=True))
    assert_varlen_gradients_right(inputs((queries, keys), ("cpu", torch.float32), 16), causal=causal)


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_of_unused_tokens(option: str, device, dtype) -> None:
    """They are 0, those after the last sequence among them, and what is in unused tokens changes no other."""
    lengths = [90, 0, 64, 130, 200], [130, 40, 64, 100, 200]
    used = [50, 0, 64, 0, 129], [130, 10, 33, 70, 65]
    q, k, v, cu_q, cu_k = inputs(tuple([*x, 70] for x in lengths), (device, dtype))
    cu_q, cu_k = cu_q[:-1], cu_k[:-1]
    options = on(device, OPTIONS[option])
    kept = [
        torch.cat([torch.arange(first, first + n) for first, n in zip(cu.tolist(), of_one, strict=False)])
        for cu, of_one in zip((cu_q, cu_k), used, strict=True)
    ]
    dout, dlse = cotangents_of(q, v)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return fastattn.varlen_attention(
            q, k, v, ends(used[0], device), ends(used[1], device), **options, return_lse=True
        )

    leaves = {"q": q[kept[0]], "k": k[kept[1]], "v": v[kept[1]]}
    expected = gradients(packed, leaves, (dout[kept[0]], dlse[:, kept[0]]))
    tokens = {"q": kept[0], "k": kept[1], "v": kept[1]}
    seqused_q, seqused_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in used)
    unused = {name: ~torch.isin(torch.arange(len(x)), tokens[name]) for name, x in {"q": q, "k": k, "v": v}.items()}
    for x, of_x in ((q, "q"), (k, "k"), (v, "v"), (dout, "q")):
        x[unused[of_x]] = math.nan

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return fastattn.varlen_attention(
            q, k, v, cu_q, cu_k, seqused_q=seqused_q, seqused_k=seqused_k, **options, return_lse=True
        )

    results = gradients(whole, {"q": q, "k": k, "v": v}, (dout, dlse))
    for name, result in results.items():
        assert relative_error(result[tokens[name]], expected[name].double()) < 1e-6
        assert torch.count_nonzero(result[unused[name]]) == 0


def test_gradients_of_strided_views(device, dtype) -> None:
    fused = torch.randn(200, 3, HEADS, 67, device=device).to(dtype)
    q, k, v = fused[..., 1:65].unbind(1)
    dout = torch.randn(200, 1, 1, device=device).to(dtype).expand(200, HEADS, 64)
    cu = ends([70, 0, 130], device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return fastattn.varlen_attention(q, k, v, cu, cu, causal=True, return_lse=True)

    _, dlse = cotangents_of(q, v)
    strided = gradients(attend, {"q": q, "k": k, "v": v}, (dout, dlse))
    plain = gradients(
        attend, {"q": q.contiguous(), "k": k.contiguous(), "v": v.contiguous()}, (dout.contiguous(), dlse)
    )
    for name, gradient in strided.items():
        assert relative_error(gradient, plain[name]) < 1e-6


@pytest.mark.gpu
def test_graph_replay_with_other_lengths() -> None:
    place = ("cuda", torch.bfloat16)
    q, k, v, cu_q, cu_k = inputs(([100, 156, 0, 44], [100, 156, 0, 44]), place)
    fastattn.varlen_attention(q, k, v, cu_q, cu_k, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastattn.varlen_attention(q, k, v, cu_q, cu_k, causal=True)
    for lengths in ([300, 0, 0, 0], [1, 99, 150, 50], [10, 20, 30, 40]):
        cu_q.copy_(ends(lengths))
        cu_k.copy_(ends(lengths))
        graph.replay()
        assert torch.equal(out, fastattn.varlen_attention(q, k, v, cu_q, cu_k, causal=True))


@pytest.mark.gpu
def test_lengths_that_contradict_the_tensors_are_cut_off() -> None:
    """Nothing outside the tensors is read or written (compute-sanitizer would tell)."""
    q, k, v, _, _ = inputs(([200], [200]), ("cuda", torch.bfloat16))
    for lengths in ([0, 900], [-70, 90, 200], [0, 150, 20, 200], [0, 2**31 - 1, 5]):
        cu = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        fastattn.varlen_attention(q, k, v, cu, cu)
    torch.cuda.synchronize()


def test_opcheck_and_compile(device, dtype) -> None:
    lengths = ([20, 0, 40], [30, 10, 20])
    tensors = inputs(lengths, (device, dtype), 16)
    used = torch.tensor([20, 0, 30], dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.fastattn.varlen_attention.default, (*tensors, used), {"causal": True})
    torch.compiler.reset()
    out, lse = torch.ops.fastattn.varlen_attention(*tensors, used)
    arguments = (torch.randn_like(out), torch.randn_like(lse), *tensors[:3], out, lse, *tensors[3:], used)
    for wanted in ([True] * 3, [False, True, False]):
        torch.library.opcheck(
            torch.ops.fastattn.varlen_attention_backward.default, arguments, {"causal": True, "wanted": wanted}
        )
    compiled = torch.compile(fastattn.varlen_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors, softcap=3.0), fastattn.varlen_attention(*tensors, softcap=3.0))
    tensors[0].requires_grad_()
    for function in (compiled, fastattn.varlen_attention):
        tensors[0].grad, before = None, tensors[0].grad
        function(*tensors, softcap=3.0).sum().backward()
    assert torch.equal(before, tensors[0].grad)


def test_flops() -> None:
    tensors = inputs(([20, 0, 40], [30, 10, 20]), ("cpu", torch.float32), 16)
    with FlopCounterMode(display=False) as counter:
        fastattn.varlen_attention(*tensors)
    forward = 4 * HEADS * 16 * (20 * 30 + 40 * 20)
    assert counter.get_total_flops() == forward
    tensors[1].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        fastattn.varlen_attention(*tensors).sum().backward()
    assert counter.get_total_flops() == forward + 3 * forward // 2  # two products, and three for dk alone


def test_no_vmap(device, dtype) -> None:
    q, k, v, cu_q, cu_k = inputs(([20], [30]), (device, dtype))
    with pytest.raises(NotImplementedError, match="varlen_attention has no batch that vmap could add to"):
        torch.vmap(lambda q: fastattn.varlen_attention(q, k, v, cu_q, cu_k))(q.detach()[None])


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"q": torch.randn(1, 20, 4, 64)},
            r"q must have 3 dimensions, \[tokens, heads, head_dim\], got \[1, 20, 4, 64\]",
        ),
        ({"k": torch.randn(20, 3, 64)}, "the heads of q must be a multiple of those of k, got 4 and 3"),
        ({"v": torch.randn(19, 2, 64)}, r"v must have the shape of k"),
        ({"v": torch.randn(20, 2, 4)}, "the head_dim of v must be a multiple of 8 between 8 and 256, got 4"),
        ({"cu_seqlens_q": ints(0)}, r"cu_seqlens_q must be Int \[sequences \+ 1\], of at least one, got Int \[1\]"),
        ({"cu_seqlens_q": ints(0, 20).long()}, r"cu_seqlens_q must be Int .* got Long \[2\]"),
        ({"cu_seqlens_k": ints(0, 3, 20)}, r"cu_seqlens_k must be Int \[sequences \+ 1\] = \[2\], got Int \[3\]"),
        ({"cu_seqlens_q": ints(1, 20)}, "cu_seqlens_q must begin with 0, got 1"),
        ({"cu_seqlens_k": ints(0, 21)}, "cu_seqlens_k must not end after the last token, 20, got 21"),
        (
            {"cu_seqlens_q": ints(0, 9, 8), "cu_seqlens_k": ints(0, 3, 20)},
            "cu_seqlens_q must not descend, got 8 after 9",
        ),
        ({"seqused_k": ints(21)}, "seqused_k must be between 0 and the length of the sequence, 20, got 21"),
        ({"seqused_q": ints(1, 2)}, r"seqused_q must be Int \[sequences\] = \[1\], got Int \[2\]"),
        ({"max_seqlen_q": -1}, "max_seqlen_q and max_seqlen_k must be at least 0, got -1 and 20"),
        ({"softcap": 0.0}, "softcap must be positive, or None, got 0.0"),
        ({"window": (-2, 0)}, "window.left must be at least 0, or -1 for no bound, got -2"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    q, k, v, cu_q, cu_k = inputs(([20], [20]), ("cpu", torch.float32))
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **changes}
    with pytest.raises((ValueError, RuntimeError), match=f"varlen_attention: {message}"):
        fastattn.varlen_attention(**arguments)
