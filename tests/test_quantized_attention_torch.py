"""`quantized_attention` as torch sees it: opcheck, fakes, compiled, exported, autocast and vmap, and its flops."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cases import relative_error
from fastattn import BlockList, quantized_attention, reference
from test_quantized_attention import OP, OUT_ERROR, each_pv, each_qk, operands, random_key_term, tensors


def small_blocks(batch: int = 2) -> BlockList:
    mask = torch.rand(batch, 4, 2, 4) < 0.6
    return BlockList.from_mask(
        mask, full=mask & (torch.rand(mask.shape) < 0.5), seq_q=70, seq_k=200, block_size=(64, 64)
    )


@each_qk
@each_pv
def test_opcheck(qk: str, pv: str) -> None:
    q, k, v = tensors(70, 200, head_dim=16)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if "fp8" not in (qk, pv):  # torch cannot compare such tensors, which this one does
        checks.append("test_schema")
    tokens, options = operands(q, k, v, qk=qk, pv=pv, causal=True, window=[90, 4])
    torch.library.opcheck(OP.default, tokens, options, test_utils=checks)
    key_term, order = random_key_term(2, 4, 200).nan_to_num(), torch.rand(1, 4, 70).argsort(-1).int()
    tokens, options = operands(q, k, v, qk=qk, pv=pv, blocks=small_blocks(), scale=0.3, dtype=v.dtype)
    torch.library.opcheck(OP.default, (*tokens[:7], key_term, *tokens[8:], order), options, test_utils=checks)


@each_qk
@each_pv
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, None])
def test_fakes_are_what_comes_out(qk: str, pv: str, dtype: torch.dtype | None) -> None:
    """Without a dtype the output is bfloat16, or has that of values as they are."""
    q, k, v = tensors(70, 200, head_dim=16)
    v = v if dtype is None else v.to(dtype)
    tokens, options = operands(q, k, v, qk=qk, pv=pv, blocks=small_blocks(), dtype=dtype)
    real = OP(*tokens, **options)
    with FakeTensorMode() as mode:
        fake = OP(*(None if x is None else mode.from_tensor(x) for x in tokens), **options)
    assert real[0].dtype == dtype or (torch.float32 if pv == "bf16" else torch.bfloat16)
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
    meta = quantized_attention(
        *(x.to("meta") for x in (q.to(v.dtype), k.to(v.dtype), v)), qk=qk, pv=pv, return_lse=True
    )
    assert [x.device.type for x in meta] == ["meta", "meta"]
    assert (meta[0].dtype, meta[0].shape, meta[1].shape) == (v.dtype, q.shape, (2, 4, 70))


@each_qk
@each_pv
@pytest.mark.parametrize("blocked", [False, True])
def test_compile(qk: str, pv: str, blocked: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList | None) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {} if blocked else {"causal": True, "window": (90, 0)}
        out, lse = quantized_attention(q * 2, k, v, qk=qk, pv=pv, blocks=blocks, return_lse=True, **options)
        return out + 1, lse

    torch.compiler.reset()  # past a number of recompilations of one function torch would stop compiling it
    inputs = (*tensors(70, 200, head_dim=16), small_blocks() if blocked else None)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    for result, want in zip(compiled, function(*inputs), strict=True):
        assert torch.equal(result, want)


def test_compile_with_inductor() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        out = quantized_attention(q * 2, k, v, qk="int4", permutation=order)
        return out + quantized_attention(q, k, v, straight_through=True)

    q, k, v = tensors(70, 70, kv_heads=4, head_dim=16)
    order = torch.rand(4, 70).argsort(-1)[None]
    compiled = torch.compile(function, fullgraph=True)(q, k, v, order)
    assert relative_error(compiled, function(q, k, v, order)) < OUT_ERROR["int8"]


def test_compile_once_for_all_lengths() -> None:
    graphs = 0

    def count(graph_module: torch.fx.GraphModule, _inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph_module

    compiled = torch.compile(quantized_attention, fullgraph=True, dynamic=True, backend=count)
    for length in (17, 40, 65):
        q, k, v = tensors(length, length + 3, head_dim=16)
        assert torch.equal(compiled(q, k, v, causal=True), quantized_attention(q, k, v, causal=True))
    assert graphs == 1


def test_export() -> None:
    class Block(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return quantized_attention(q, k, v, window=(5, 5), return_lse=True)

    seq = torch.export.Dim("seq", min=2, max=512)
    example = tensors(32, 32, head_dim=16)
    program = torch.export.export(Block(), example, dynamic_shapes=({1: seq}, {1: seq}, {1: seq}))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(OP.default) == 1
    inputs = tensors(57, 57, head_dim=16)
    for a, b in zip(program.module()(*inputs), Block()(*inputs), strict=True):
        assert torch.equal(a, b)


@each_qk
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("straight_through", [False, True])
def test_autocast(qk: str, compiled: bool, straight_through: bool) -> None:
    """As under other ops; the products that put back what smoothing took stay in float32."""

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return quantized_attention(*inputs, qk=qk, straight_through=straight_through, return_lse=True)

    torch.compiler.reset()
    inputs = tensors(70, 200, head_dim=16)
    with torch.autocast("cpu", torch.bfloat16):
        call = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        out, lse = call(*inputs)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    for result, want in zip((out, lse), function(*(x.bfloat16() for x in inputs)), strict=True):
        assert torch.equal(result, want)


@each_qk
@each_pv
def test_vmap_of_the_op(qk: str, pv: str) -> None:
    """Lists and orders may be mapped or the same for all, for each batch entry or for one."""
    inputs = [tensors(70, 200, head_dim=16) for _ in range(3)]
    for batch in (1, 2):
        blocks = small_blocks(batch)
        samples = [operands(*x, qk=qk, pv=pv, blocks=blocks)[0] for x in inputs]
        options = operands(*inputs[0], qk=qk, pv=pv, blocks=blocks)[1]
        order = torch.rand(batch, 4, 70).argsort(-1).int()
        stacked = [None if x[0] is None else torch.stack(x) for x in zip(*samples, strict=True)]
        lists = [blocks.counts, blocks.indices, blocks.full]
        in_dims = (*(None if x is None else 0 for x in stacked[:8]), None, None, None, None)
        out, lse = torch.vmap(lambda *x, options=options: OP(*x, **options), in_dims)(*stacked[:8], *lists, order)
        for i, sample in enumerate(samples):
            want, want_lse = OP(*sample, order=order, **options)
            assert torch.equal(out[i], want)
            assert torch.equal(lse[i], want_lse)


@each_qk
@pytest.mark.parametrize("straight_through", [False, True])
def test_vmap(qk: str, straight_through: bool) -> None:
    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return quantized_attention(*inputs, qk=qk, straight_through=straight_through, return_lse=True)

    inputs = [tensors(70, 200, head_dim=16) for _ in range(3)]
    results = torch.vmap(function)(*(torch.stack(x) for x in zip(*inputs, strict=True)))
    for i, sample in enumerate(inputs):
        for result, want in zip(results, function(*sample), strict=True):
            torch.testing.assert_close(result[i], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (7, 2)}], ids=str)
@each_pv
def test_flops_count_kept_scores(pv: str, options: dict[str, Any]) -> None:
    kept = reference.band_mask(70, 200, **options).sum().item()
    with FlopCounterMode(display=False) as counter:
        quantized_attention(*tensors(70, 200, head_dim=16), pv=pv, **options)
    assert counter.get_total_flops() == 4 * 2 * 4 * 16 * kept


def test_flops_count_kept_scores_of_blocks() -> None:
    q, k, v = tensors(70, 200, head_dim=16)
    for blocks in (small_blocks(), small_blocks(1)):
        with FlopCounterMode(display=False) as counter:
            quantized_attention(q, k, v, blocks=blocks)
        kept = blocks.token_mask().expand(2, 4, -1, -1).sum().item()
        assert counter.get_total_flops() == 4 * 16 * kept
    dense = BlockList.dense(seq_q=70, seq_k=200, causal=True, device="meta")
    with FlopCounterMode(display=False) as counter:
        quantized_attention(*(x.to("meta") for x in (q, k, v)), blocks=dense)
    assert counter.get_total_flops() == 4 * 2 * 4 * 16 * reference.band_mask(70, 200, causal=True).sum().item()


def test_backward_of_straight_through_counts_as_that_of_attention() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(70, 200, head_dim=16))
    with FlopCounterMode(display=False) as counter:
        out = quantized_attention(q, k, v, straight_through=True, causal=True)
        forward = counter.get_total_flops()
        out.sum().backward()
    product = 2 * 2 * 4 * 70 * 16  # of each query and its head's mean of keys, for the log-sum-exp
    assert counter.get_total_flops() - forward == (forward - product) * 5 // 2
