"""`block_sparse_attention` and its gradients: the formula over the token mask of a list, in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from cases import Case, assert_same, relative_error, run
from fastattn import BlockList, reference

NAMES = ("out", "lse", "dq", "dk", "dv")
BLOCK_SIZES = [(64, 64), (64, 128), (128, 64), (128, 128), (192, 64), (192, 128)]
OP = torch.ops.fastattn.block_sparse_attention


@dataclass(frozen=True)
class Listed:
    """A problem, and a random list for it."""

    case: Case
    block_size: tuple[int, int] = (128, 128)
    batch: int = 1
    heads: int = 1
    causal: bool = False
    full: bool = False
    density: float = 0.5

    def __str__(self) -> str:
        name = f"{self.case}-blocks{self.block_size[0]}x{self.block_size[1]}-lists{self.batch}x{self.heads}"
        return name + ("-causal" if self.causal else "") + ("-full" if self.full else "")

    def blocks(self, device: str) -> BlockList:
        """Some rows and columns of blocks are empty."""
        seq_q, seq_k = self.case.seq_q, self.case.seq_k
        rows, columns = -(-seq_q // self.block_size[0]), -(-seq_k // self.block_size[1])
        shape = (self.batch, self.heads, rows, columns)
        used = torch.ones(rows, columns, dtype=torch.bool, device=device)
        used[1:2], used[:, 2:3] = False, False
        mask = (torch.rand(shape, device=device) < self.density) & used
        full = (torch.rand(shape, device=device) < 0.2) & used if self.full else None
        return BlockList.from_mask(
            mask, full=full, seq_q=seq_q, seq_k=seq_k, block_size=self.block_size, causal=self.causal
        )


def sparse(blocks: BlockList, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda q, k, v: fastattn.block_sparse_attention(q, k, v, blocks, return_lse=True, **options)


def formula(blocks: BlockList, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda q, k, v: reference.block_sparse_attention(q, k, v, blocks, **options)


def doubles(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


def arguments(blocks: BlockList) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """What the op takes of a list."""
    options = {"block_size": list(blocks.block_size), "causal": blocks.causal}
    return (blocks.counts, blocks.indices, blocks.full), options


SQUARE = Case(500, 500)
LISTED = [
    *(Listed(Case(500, 700, kv_heads=2), size, heads=4) for size in BLOCK_SIZES),
    *(Listed(SQUARE, size, batch=2, heads=4, causal=True, full=True) for size in BLOCK_SIZES),
    Listed(SQUARE),
    Listed(SQUARE, batch=2),
    Listed(SQUARE, heads=4, causal=True),
    Listed(Case(700, 300), (64, 64), heads=4, causal=True),  # the first 400 queries see nothing
    Listed(Case(300, 700), (64, 128), heads=4, causal=True, full=True),
    Listed(Case(512, 512, heads=8, kv_heads=1), (128, 64), heads=8, causal=True),
    Listed(Case(385, 640, head_dim=128), (192, 128), heads=4, causal=True, full=True),
    Listed(Case(1, 640), (64, 64), heads=4),
    Listed(Case(640, 1), (64, 128), density=0.9),
    Listed(Case(321, 447, head_dim=128, kv_heads=2), (64, 64), heads=4, density=0.2),
    Listed(Case(260, 260, head_dim=40), (64, 64), heads=4, causal=True, full=True),
    Listed(Case(260, 260, head_dim=96), (128, 64), heads=4),
]


@pytest.mark.parametrize("listed", LISTED, ids=str)
def test_values_and_gradients(listed: Listed, place) -> None:
    """At most twice the error of the plain formula in the same precision; the LSE always as in float32."""
    device, dtype = place
    blocks = listed.blocks(device)
    inputs, cotangents = listed.case.inputs(device, dtype), listed.case.cotangents(device, dtype)
    results = run(sparse(blocks), inputs, cotangents)
    exact = run(formula(blocks), doubles(inputs), cotangents)
    rivals = run(formula(blocks), inputs, cotangents)
    assert results[1].dtype == torch.float32
    slack = 1e-5 if dtype == torch.float32 else 1e-4  # a row of one key: dS is the difference of equal numbers
    for name, result, truth, rival in zip(NAMES, results, exact, rivals, strict=True):
        error = relative_error(result, truth)
        allowed = 1e-5 if name == "lse" else 2 * relative_error(rival, truth) + slack
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def test_widest_heads() -> None:
    """head_dim 256, on the CPU: the most scratch memory that a tile takes."""
    listed = Listed(Case(300, 300, head_dim=256, kv_heads=2), heads=4, causal=True, full=True)
    blocks, inputs = listed.blocks("cpu"), listed.case.inputs("cpu", torch.float32)
    cotangents = listed.case.cotangents("cpu", torch.float32)
    results, exact = run(sparse(blocks), inputs, cotangents), run(formula(blocks), doubles(inputs), cotangents)
    for result, truth in zip(results, exact, strict=True):
        assert relative_error(result, truth) < 1e-5


@given(
    seq_q=st.integers(1, 400),
    seq_k=st.integers(1, 400),
    block_size=st.sampled_from(BLOCK_SIZES),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    causal=st.booleans(),
    full=st.booleans(),
    kv_heads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=100)
def test_any_mask(
    seq_q: int,
    seq_k: int,
    block_size: tuple[int, int],
    density: float,
    causal: bool,
    full: bool,
    kv_heads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    case = Case(seq_q, seq_k, batch=1, heads=2, kv_heads=kv_heads, head_dim=16)
    blocks = Listed(case, block_size, heads=2, causal=causal, full=full, density=density).blocks("cpu")
    inputs, cotangents = case.inputs("cpu", torch.float32), case.cotangents("cpu", torch.float32)
    results, exact = run(sparse(blocks), inputs, cotangents), run(formula(blocks), doubles(inputs), cotangents)
    for name, result, truth in zip(NAMES, results, exact, strict=True):
        # float32: absolute, since what is left of a gradient may be a difference of equal numbers
        assert torch.equal(result.isfinite(), truth.isfinite()), name
        torch.testing.assert_close(
            result.double(), truth, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
def test_all_blocks_are_attention(causal: bool, block_size: tuple[int, int], device, dtype) -> None:
    case = Case(400, 450, kv_heads=2, causal=causal)
    blocks = BlockList.dense(seq_q=400, seq_k=450, block_size=block_size, causal=causal, device=device)
    inputs, cotangents = case.inputs(device, dtype), case.cotangents(device, dtype)
    results = run(sparse(blocks), inputs, cotangents)
    dense = run(lambda q, k, v: fastattn.attention(q, k, v, causal=causal, return_lse=True), inputs, cotangents)
    for name, result, truth in zip(NAMES, results, dense, strict=True):
        error, allowed = relative_error(result, truth), 2e-6 if dtype == torch.float32 else 5e-3
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def test_scale(device, dtype) -> None:
    listed = Listed(SQUARE, heads=4)
    blocks, inputs = listed.blocks(device), SQUARE.inputs(device, dtype)
    for result, truth in zip(
        sparse(blocks, scale=0.3)(*inputs), formula(blocks, scale=0.3)(*doubles(inputs)), strict=True
    ):
        assert relative_error(result, truth) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_empty_rows_and_columns(device, dtype) -> None:
    blocks = Listed(SQUARE, heads=4, density=0.9).blocks(device)  # without query block 1 and key block 2
    out, lse, dq, dk, dv = run(sparse(blocks), SQUARE.inputs(device, dtype), SQUARE.cotangents(device, dtype))
    assert torch.count_nonzero(out[:, 128:256]) == 0
    assert (lse[:, :, 128:256] == -torch.inf).all()
    for gradient, empty in ((dq, slice(128, 256)), (dk, slice(256, 384)), (dv, slice(256, 384))):
        assert gradient.isfinite().all()
        assert torch.count_nonzero(gradient[:, empty]) == 0


def test_nothing_is_listed(device, dtype) -> None:
    blocks = Listed(SQUARE, density=0.0).blocks(device)
    out, lse, *gradients = run(sparse(blocks), SQUARE.inputs(device, dtype), SQUARE.cotangents(device, dtype))
    assert (lse == -torch.inf).all()
    assert all(torch.count_nonzero(x) == 0 for x in (out, *gradients))


@pytest.mark.parametrize(
    "sizes", [(0, 5, 5, 2, 2), (2, 0, 5, 2, 2), (2, 5, 0, 2, 2), (2, 0, 0, 2, 2), (2, 5, 5, 0, 2), (2, 5, 5, 0, 0)]
)
def test_zero_sizes(sizes: tuple[int, ...], device, dtype) -> None:
    batch, seq_q, seq_k, heads, kv_heads = sizes
    case = Case(seq_q, seq_k, batch=batch, heads=heads, kv_heads=kv_heads)
    inputs, blocks = case.inputs(device, dtype), BlockList.dense(seq_q=seq_q, seq_k=seq_k, device=device)
    out, lse, *gradients = run(sparse(blocks), inputs, case.cotangents(device, dtype))
    assert (lse == -torch.inf).all()
    assert all(torch.count_nonzero(x) == 0 for x in (out, *gradients))


def test_gradient_of_lse_alone(device, dtype) -> None:
    blocks = Listed(SQUARE, heads=4, causal=True).blocks(device)
    q, k, v = (tensor.requires_grad_() for tensor in SQUARE.inputs(device, dtype))
    _, lse = sparse(blocks)(q, k, v)
    dq, dk, dv = torch.autograd.grad(lse[lse.isfinite()].sum(), (q, k, v))
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    _, exact = formula(blocks)(*exact_inputs)
    exact_dq, exact_dk = torch.autograd.grad(exact[exact.isfinite()].sum(), exact_inputs[:2])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(dq, exact_dq) < tolerance
    assert relative_error(dk, exact_dk) < tolerance
    assert torch.count_nonzero(dv) == 0


# Which scores are kept.


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_probe(block_size: tuple[int, int], causal: bool, device, dtype) -> None:
    """With K = 0 all visible keys weigh the same, and one-hot values name them."""
    head_dim, case = 128, Case(300, 420, batch=1, heads=2, kv_heads=1, head_dim=128)
    blocks = Listed(case, block_size, heads=2, causal=causal, full=causal).blocks(device)
    keep = blocks.token_mask()
    visible = torch.zeros_like(keep)
    q, k, _ = case.inputs(device, dtype)
    k.zero_()
    for first in range(0, case.seq_k, head_dim):
        keys = range(first, min(first + head_dim, case.seq_k))
        v = torch.zeros_like(k)
        v[0, keys, 0, range(len(keys))] = 1
        out, lse = sparse(blocks)(q, k, v)
        visible[..., keys] = out[..., : len(keys)].transpose(1, 2) != 0
    assert torch.equal(visible, keep)
    torch.testing.assert_close(lse, keep.sum(-1).float().log(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
def test_nan_in_a_block_that_is_not_listed(block_size: tuple[int, int], device, dtype) -> None:
    if device == "cuda" and block_size != (128, 128):
        pytest.skip("the GPU's tiles of 128 x 128 hold more than one such block")
    blocks = Listed(SQUARE, block_size, heads=4, density=0.9).blocks(device)  # without key block 2
    inputs, cotangents = SQUARE.inputs(device, dtype), SQUARE.cotangents(device, dtype)
    clean = run(sparse(blocks), inputs, cotangents)
    for tensor in inputs[1:]:
        tensor[:, 2 * block_size[1] : 3 * block_size[1]] = torch.nan
    assert_same(run(sparse(blocks), inputs, cotangents), clean)


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
def test_nan_in_a_query_stays_in_its_row(block_size: tuple[int, int], device, dtype) -> None:
    blocks = Listed(SQUARE, block_size, heads=4, density=0.9).blocks(device)
    q, k, v = SQUARE.inputs(device, dtype)
    clean, _ = sparse(blocks)(q, k, v)
    q[1, 7, 2, 5] = torch.nan
    out, _ = sparse(blocks)(q, k, v)
    assert out[1, 7, 2].isnan().all()
    out[1, 7, 2] = clean[1, 7, 2]
    assert torch.equal(out, clean)


# Lists and layouts.


def test_a_shared_list_is_the_same_for_all(device, dtype) -> None:
    shared = Listed(SQUARE, causal=True, full=True).blocks(device)
    copied = replace(
        shared,
        counts=shared.counts.expand(2, 4, -1).contiguous(),
        indices=shared.indices.expand(2, 4, -1, -1).contiguous(),
        full=shared.full.expand(2, 4, -1, -1).contiguous(),
    )
    inputs, cotangents = SQUARE.inputs(device, dtype), SQUARE.cotangents(device, dtype)
    assert_same(run(sparse(shared), inputs, cotangents), run(sparse(copied), inputs, cotangents))


def test_each_head_follows_its_own_list(device, dtype) -> None:
    blocks = Listed(SQUARE, heads=4).blocks(device)
    q, k, v = SQUARE.inputs(device, dtype)
    out, lse = sparse(blocks)(q, k, v)
    for h in range(4):
        own = replace(blocks, counts=blocks.counts[:, h : h + 1], indices=blocks.indices[:, h : h + 1])
        alone, lse_alone = sparse(own)(*(x[:, :, h : h + 1] for x in (q, k, v)))
        assert torch.equal(out[:, :, h : h + 1], alone)
        assert torch.equal(lse[:, h : h + 1], lse_alone)


def test_contents_are_read_at_each_call(device, dtype) -> None:
    blocks, other = (Listed(SQUARE, heads=4).blocks(device) for _ in range(2))
    inputs, cotangents = SQUARE.inputs(device, dtype), SQUARE.cotangents(device, dtype)
    run(sparse(blocks), inputs, cotangents)
    blocks.counts.copy_(other.counts)
    blocks.indices.copy_(other.indices)
    assert_same(run(sparse(blocks), inputs, cotangents), run(sparse(other), inputs, cotangents))


def test_a_list_changed_before_the_backward_is_noticed(device, dtype) -> None:
    blocks = Listed(SQUARE).blocks(device)
    out = fastattn.block_sparse_attention(*(x.requires_grad_() for x in SQUARE.inputs(device, dtype)), blocks)
    blocks.counts.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_strided_views(device, dtype) -> None:
    listed = Listed(SQUARE, (64, 64), batch=2, heads=4, causal=True, full=True)
    views = torch.randn(2, 500, 3, 4, 64, device=device).to(dtype).unbind(2)
    cotangents, (lists, options) = SQUARE.cotangents(device, dtype), arguments(listed.blocks(device))
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in lists]
    expected = run(lambda *x: OP(*x, *lists, **options), tuple(x.contiguous() for x in views), cotangents)
    assert_same(run(lambda *x: OP(*x, *strided, **options), views, cotangents), expected)


def test_forward_is_repeatable(place) -> None:
    device, dtype = place
    blocks = Listed(SQUARE, heads=4).blocks(device)
    inputs = SQUARE.inputs(device, dtype)
    for result, again in zip(sparse(blocks)(*inputs), sparse(blocks)(*inputs), strict=True):
        assert torch.equal(result, again)


# As torch sees it.

SMALL = Listed(Case(140, 200, kv_heads=2, head_dim=16), (64, 128), heads=4, causal=True, full=True)


@pytest.mark.parametrize("listed", [SMALL, replace(SMALL, causal=False, full=False, batch=2)], ids=str)
def test_opcheck(listed: Listed, device, dtype) -> None:
    blocks, inputs = listed.blocks(device), listed.case.inputs(device, dtype)
    lists, options = arguments(blocks)
    torch.library.opcheck(OP.default, (*(x.requires_grad_() for x in inputs), *lists), options)
    inputs = tuple(x.detach() for x in inputs)
    out, lse = OP(*inputs, *lists, **options)
    dout, dlse = listed.case.cotangents(device, dtype)
    torch.library.opcheck(
        torch.ops.fastattn.block_sparse_attention_backward.default,
        (dout, dlse, *inputs, out, lse, *lists, *blocks.transpose()),
        options,
    )


def test_double_backward_is_refused(device, dtype) -> None:
    blocks = SMALL.blocks(device)
    q, k, v = (tensor.requires_grad_() for tensor in SMALL.case.inputs(device, dtype))
    (dq,) = torch.autograd.grad(sparse(blocks)(q, k, v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        dq.sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str, device, dtype) -> None:
    """The list is an argument: one compiled function serves all lists of a shape, built inside or outside."""
    inputs, cotangents = SMALL.case.inputs(device, dtype), SMALL.case.cotangents(device, dtype)

    def block(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList) -> tuple[Tensor, Tensor]:
        near = BlockList.sink_and_window(1, 1, seq_q=140, seq_k=200, device=q.device)
        out, lse = fastattn.block_sparse_attention(q * 2, k, v, blocks, return_lse=True)
        return out + fastattn.block_sparse_attention(q, k, v, near), lse * 3

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for _ in range(2):
        blocks = SMALL.blocks(device)
        expected = run(lambda *x, blocks=blocks: block(*x, blocks), inputs, cotangents)
        results = run(lambda *x, blocks=blocks: compiled(*x, blocks), inputs, cotangents)
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_export(device, dtype) -> None:
    class Block(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            blocks = BlockList.from_mask(mask, seq_q=140, seq_k=200, block_size=(64, 128), causal=True)
            return fastattn.block_sparse_attention(q, k, v, blocks, return_lse=True)

    inputs, mask = SMALL.case.inputs(device, dtype), SMALL.blocks(device).to_mask()
    program = torch.export.export(Block(), (*inputs, mask))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(OP.default) == 1
    other = SMALL.blocks(device).to_mask()
    for a, b in zip(program.module()(*inputs, other), Block()(*inputs, other), strict=True):
        assert torch.equal(a, b)


def test_autocast(device) -> None:
    blocks = SMALL.blocks(device)
    inputs = SMALL.case.inputs(device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        out, lse = sparse(blocks)(*inputs)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, sparse(blocks)(*(x.bfloat16() for x in inputs))[0])


@pytest.mark.parametrize("lists_too", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_vmap(lists_too: bool, batch: int, device, dtype) -> None:
    """The lists may be mapped with the tensors or be the same for all, for each batch entry or shared."""
    inputs = [torch.stack(x) for x in zip(*(SMALL.case.inputs(device, dtype) for _ in range(3)), strict=True)]
    samples = [arguments(replace(SMALL, batch=batch).blocks(device))[0] for _ in range(3)]
    options = arguments(SMALL.blocks(device))[1]
    lists = [torch.stack(x, 1) for x in zip(*samples, strict=True)] if lists_too else samples[0]
    in_dims = (0, 0, 0, *(1 if lists_too else None for _ in range(3)))
    out, lse = torch.vmap(lambda *x: OP(*x, **options), in_dims)(*inputs, *lists)
    for i in range(3):
        expected, expected_lse = OP(*(x[i] for x in inputs), *samples[i if lists_too else 0], **options)
        assert torch.equal(out[i], expected)
        assert torch.equal(lse[i], expected_lse)


@pytest.mark.parametrize("listed", [SMALL, replace(SMALL, causal=False, full=False, heads=1)], ids=str)
def test_flops_count_kept_scores(listed: Listed, device, dtype) -> None:
    blocks = listed.blocks(device)
    q, k, v = (tensor.requires_grad_() for tensor in listed.case.inputs(device, dtype))
    with FlopCounterMode(display=False) as counter:
        out = fastattn.block_sparse_attention(q, k, v, blocks)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 4 * 16 * blocks.token_mask().expand(2, 4, -1, -1).sum().item()
    assert counter.get_total_flops() == forward * 7 // 2


def test_tensors_without_data(device) -> None:
    """Shapes come out, and the FLOPs are those of all blocks."""
    q, k, v = (x.to("meta") for x in SMALL.case.inputs("cpu", torch.float32))
    for causal in (False, True):
        blocks = BlockList.dense(seq_q=140, seq_k=200, causal=causal, device="meta")
        counts = []
        for function in (sparse(blocks), lambda *x, causal=causal: fastattn.attention(*x, causal=causal)):
            with FlopCounterMode(display=False) as counter:
                function(q, k, v)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1]
    out, lse = sparse(blocks)(q, k, v)
    assert (out.shape, out.device.type, lse.shape) == (q.shape, "meta", (2, 4, 140))


@pytest.mark.gpu
def test_graph_follows_the_list() -> None:
    """Forward and backward are captured once; the list is written anew before each replay."""
    listed = Listed(Case(700, 700, kv_heads=2), heads=4, causal=True, full=True)
    blocks = listed.blocks("cuda")
    inputs, cotangents = listed.case.inputs("cuda", torch.bfloat16), listed.case.cotangents("cuda", torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(sparse(blocks), inputs, cotangents)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(sparse(blocks), inputs, cotangents)
    for _ in range(3):
        other = listed.blocks("cuda")
        for name in ("counts", "indices", "full"):
            getattr(blocks, name).copy_(getattr(other, name))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(results, run(sparse(other), inputs, cotangents))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    blocks = Listed(SQUARE, heads=4, causal=True, full=True).blocks("cuda")
    inputs, cotangents = SQUARE.inputs("cuda", torch.bfloat16), SQUARE.cotangents("cuda", torch.bfloat16)
    run(sparse(blocks), inputs, cotangents)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(sparse(blocks), inputs, cotangents)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Refusals.


def test_refuses_what_is_no_list_for_these_tensors(device, dtype) -> None:
    q, k, v = SMALL.case.inputs(device, dtype)
    with pytest.raises(TypeError, match=r"blocks must be a fastattn\.BlockList, got Tensor"):
        fastattn.block_sparse_attention(q, k, v, torch.ones(1, device=device))
    blocks = BlockList.dense(seq_q=141, seq_k=200, device=device)
    with pytest.raises(
        ValueError, match="blocks must be for 140 queries and 200 keys, as q and k are, got a list for 141 and 200"
    ):
        fastattn.block_sparse_attention(q, k, v, blocks)
    blocks = BlockList.dense(seq_q=140, seq_k=200, device=device)
    with pytest.raises(RuntimeError, match="block_sparse_attention: q must have 4 dimensions"):
        fastattn.block_sparse_attention(q[0], k, v, blocks)
    with pytest.raises(RuntimeError, match="block_sparse_attention: scale must be finite and positive, got 0"):
        fastattn.block_sparse_attention(q, k, v, blocks, scale=0.0)


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "rank of counts": (
        lambda counts, indices, full: (counts[0], indices, full),
        r"counts must be Int \[batch or 1, heads or 1, query blocks\] = \[2, 4, 3\], got Int \[4, 3\]",
    ),
    "dtype of counts": (
        lambda counts, indices, full: (counts.long(), indices, full),
        r"counts must be Int .* = \[1, 4, 3\], got Long \[1, 4, 3\]",
    ),
    "heads of counts": (
        lambda counts, indices, full: (counts[:, :3], indices, full),
        r"counts must be Int .* = \[1, 4, 3\], got Int \[1, 3, 3\]",
    ),
    "rows of counts": (
        lambda counts, indices, full: (counts[..., :2], indices, full),
        r"counts must be Int .* = \[1, 4, 3\], got Int \[1, 4, 2\]",
    ),
    "width of indices": (
        lambda counts, indices, full: (counts, indices[..., :1], full),
        r"indices must be Int \[batch or 1, heads or 1, query blocks, key blocks\] = .*, 2\], got Int \[1, 4, 3, 1\]",
    ),
    "heads of indices": (
        lambda counts, indices, full: (counts[:, :1], indices, full),
        r"indices must be Int .* = \[1, 1, 3, 2\], got Int \[1, 4, 3, 2\]",
    ),
    "dtype of full": (
        lambda counts, indices, full: (counts, indices, full.int()),
        r"full must be Bool .* = \[1, 4, 3, 2\], got Int \[1, 4, 3, 2\]",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_op_refuses(change: Callable[..., Any], message: str, device, dtype) -> None:
    lists, options = arguments(SMALL.blocks(device))
    with pytest.raises(RuntimeError, match="block_sparse_attention: " + message):
        OP(*SMALL.case.inputs(device, dtype), *change(*lists), **options)


@pytest.mark.parametrize(
    ("block_size", "message"),
    [
        ([64], r"block_size must be \(queries, keys\), 64, 128 or 192 and 64 or 128, got \[64\]"),
        ([0, 64], r"block_size must be \(queries, keys\), 64, 128 or 192 and 64 or 128, got \[0, 64\]"),
        ([70, 100], "a block must have 64, 128 or 192 queries and .*, got 70 x 100"),  # three by two of them, too
    ],
)
def test_op_refuses_block_sizes(block_size: list[int], message: str, device, dtype) -> None:
    counts, indices, _ = arguments(SMALL.blocks(device))[0]
    lists = (counts[..., :2], indices[..., :2, :]) if block_size == [70, 100] else (counts, indices)
    with pytest.raises(RuntimeError, match="block_sparse_attention: " + message):
        OP(*SMALL.case.inputs(device, dtype), *lists, block_size=block_size)


def test_backward_refuses(device, dtype) -> None:
    blocks, inputs = SMALL.blocks(device), SMALL.case.inputs(device, dtype)
    lists, options = arguments(blocks)
    columns = tuple(blocks.transpose())
    out, lse = OP(*inputs, *lists, **options)

    def backward(*columns: Tensor | None, dlse: Tensor | None = None) -> None:
        torch.ops.fastattn.block_sparse_attention_backward(out, dlse, *inputs, out, lse, *lists, *columns, **options)

    name = "block_sparse_attention_backward: "
    with pytest.raises(
        RuntimeError, match=name + r"column_counts must be Int .*key blocks\] = \[1, 4, 2\], got Int \[1, 4, 3"
    ):
        backward(*lists)
    with pytest.raises(RuntimeError, match=name + "column_full must be given where full is, and only there"):
        backward(*columns[:2], None)
    with pytest.raises(RuntimeError, match=name + r"dlse must be Float \[batch, heads, seq_q\]"):
        backward(*columns, dlse=lse.double())


@pytest.mark.gpu
def test_lists_on_another_device() -> None:
    inputs = SMALL.case.inputs("cuda", torch.bfloat16)
    with pytest.raises(RuntimeError, match="counts must be on the device of q, cuda:0, got cpu"):
        fastattn.block_sparse_attention(*inputs, SMALL.blocks("cpu"))
