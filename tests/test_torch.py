"""The ops as torch sees them: dispatch, autograd, compile, export, autocast, vmap, FLOP counting."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from cases import Case, assert_same, relative_error, run
from fastattn import _library, reference

OPTIONS = [{}, {"causal": True}, {"causal": True, "window": [9, 4], "scale": 0.3}]
CASE = Case(20, 28, heads=4, kv_heads=2, head_dim=16, causal=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_forward(options: dict, requires_grad: bool, device, dtype) -> None:
    inputs = [tensor.requires_grad_(requires_grad) for tensor in CASE.inputs(device, dtype)]
    torch.library.opcheck(torch.ops.fastattn.attention.default, inputs, options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_dlse", [False, True])
def test_opcheck_backward(options: dict, with_dlse: bool, device, dtype) -> None:
    inputs = CASE.inputs(device, dtype)
    dout, dlse = CASE.cotangents(device, dtype)
    out, lse = torch.ops.fastattn.attention(*inputs, **options)
    arguments = (dout, dlse if with_dlse else None, *inputs, out, lse)
    torch.library.opcheck(torch.ops.fastattn.attention_backward.default, arguments, options)


def test_opcheck_strided(device, dtype) -> None:
    fused = torch.randn(2, 20, 3, 4, 16, device=device).to(dtype)
    inputs = [view.detach().requires_grad_() for view in fused.unbind(2)]
    torch.library.opcheck(torch.ops.fastattn.attention.default, inputs, {"causal": True})


def test_op_called_directly_is_differentiable(device, dtype) -> None:
    inputs, cotangents = CASE.inputs(device, dtype), CASE.cotangents(device, dtype)
    direct = run(lambda *x: torch.ops.fastattn.attention(*x, causal=True), inputs, cotangents)
    public = run(lambda *x: fastattn.attention(*x, causal=True, return_lse=True), inputs, cotangents)
    assert_same(direct, public)


def test_double_backward_is_refused(device, dtype) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in CASE.inputs(device, dtype))
    (dq,) = torch.autograd.grad(fastattn.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        dq.sum().backward()


def test_only_some_inputs_need_gradients(device, dtype) -> None:
    q, k, v = CASE.inputs(device, dtype)
    k.requires_grad_()
    fastattn.attention(q, k, v).sum().backward()
    assert k.grad is not None
    with torch.inference_mode():
        assert not fastattn.attention(q, k, v).requires_grad


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str, device, dtype) -> None:
    inputs, cotangents = CASE.inputs(device, dtype), CASE.cotangents(device, dtype)

    def block(q, k, v):
        out, lse = fastattn.attention(q * 2, k, v, causal=True, window=(11, 0), return_lse=True)
        return out + 1, lse * 3

    eager = run(block, inputs, cotangents)
    compiled = run(torch.compile(block, fullgraph=True, backend=backend), inputs, cotangents)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_once_for_all_lengths(device, dtype) -> None:
    graphs = 0

    def count(graph_module, _inputs):
        nonlocal graphs
        graphs += 1
        return graph_module

    compiled = torch.compile(fastattn.attention, fullgraph=True, dynamic=True, backend=count)
    for length in (17, 40, 65):
        q, k, v = Case(length, length + 3, head_dim=16).inputs(device, dtype)
        assert torch.equal(compiled(q, k, v, causal=True), fastattn.attention(q, k, v, causal=True))
    assert graphs == 1


def test_export(device, dtype) -> None:
    class Block(torch.nn.Module):
        def forward(self, q, k, v):
            return fastattn.attention(q, k, v, window=(5, 5), return_lse=True)

    seq = torch.export.Dim("seq", min=2, max=512)
    example = Case(32, 32, head_dim=16).inputs(device, dtype)
    program = torch.export.export(Block(), example, dynamic_shapes=({1: seq}, {1: seq}, {1: seq}))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.fastattn.attention.default) == 1
    inputs = Case(57, 57, head_dim=16).inputs(device, dtype)
    for a, b in zip(program.module()(*inputs), Block()(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled: bool, device) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in CASE.inputs(device, torch.float32))
    k = k.detach().to(torch.bfloat16).requires_grad_()

    def block(q, k, v):
        return fastattn.attention(q, k, v, causal=True, return_lse=True)

    block = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype=dtype):
            out, lse = block(q, k, v)
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        half = [x.detach().to(dtype) for x in (q, k, v)]
        assert torch.equal(out, fastattn.attention(*half, causal=True))
        dq, dk = torch.autograd.grad(out.float().sum(), (q, k))
        assert (dq.dtype, dk.dtype) == (torch.float32, torch.bfloat16)


def test_autocast_takes_options_by_position_too(device) -> None:
    q, k, v = CASE.inputs(device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        out, _ = torch.ops.fastattn.attention(q, k, v, scale=0.5, window=[3, 3])
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, None), (None, 2, 0)])
def test_vmap(in_dims: tuple, device, dtype) -> None:
    q, k, v = (torch.randn(3, 2, s, h, 16, device=device).to(dtype) for s, h in ((20, 4), (28, 2), (28, 2)))
    batched = [
        x[0] if dim is None else x.movedim(0, dim).contiguous() for x, dim in zip((q, k, v), in_dims, strict=True)
    ]
    out, lse = torch.vmap(lambda *x: fastattn.attention(*x, causal=True, return_lse=True), in_dims=in_dims)(*batched)
    for i in range(3):
        sample = [x[0] if dim is None else x[i] for x, dim in zip((q, k, v), in_dims, strict=True)]
        expected_out, expected_lse = fastattn.attention(*sample, causal=True, return_lse=True)
        assert torch.equal(out[i], expected_out)
        assert torch.equal(lse[i], expected_lse)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (7, 2)}, {"window": (7, 2), "causal": True}])
def test_flops_count_kept_scores(options: dict, device, dtype) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in CASE.inputs(device, dtype))
    kept = reference.band_mask(20, 28, **options).sum().item()
    with FlopCounterMode(display=False) as counter:
        out = fastattn.attention(q, k, v, **options)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 4 * 2 * 4 * 16 * kept
    assert counter.get_total_flops() == forward * 7 // 2


def test_meta_tensors_give_shapes_without_data() -> None:
    q, k, v = (x.to("meta") for x in CASE.inputs("cpu", torch.float32))
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert out.device.type == "meta"
    assert out.shape == q.shape
    assert lse.shape == (2, 4, 20)


def test_threads_do_not_change_results() -> None:
    case = Case(300, 300, causal=True, kv_heads=1)
    inputs, cotangents = case.inputs("cpu", torch.float32), case.cotangents("cpu", torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(lambda *x: fastattn.attention(*x, causal=True, return_lse=True), inputs, cotangents)
        torch.set_num_threads(3)
        together = run(lambda *x: fastattn.attention(*x, causal=True, return_lse=True), inputs, cotangents)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone[0], together[0])
    for a, b in zip(together, alone, strict=True):
        assert relative_error(a, b) < 1e-6


def test_missing_library_is_explained(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(_library, "path", tmp_path / "fastattn_torch.so")
    with pytest.raises(ImportError, match="op library is missing"):
        _library.load()
