"""`neighborhood_attention` and its gradients against the definition in float64, and as torch sees it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from cases import assert_same, relative_error, run
from fastattn import reference

NAMES = ("out", "lse", "dq", "dk", "dv")
MAX_GPU_STEP = 8
HEAD_DIMS = {"cpu": range(8, 257, 8), "cuda": (64, 128)}


@dataclass(frozen=True)
class Case:
    axes: tuple[int, ...]
    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    scale: float | None = None

    def __str__(self) -> str:
        def by_axis(values: Any) -> str:
            return "x".join(str(int(value)) for value in (values if isinstance(values, tuple) else (values,)))

        name = f"{by_axis(self.axes)}-window{by_axis(self.window)}"
        for option, usual in (("stride", 1), ("dilation", 1), ("causal", False)):
            value = getattr(self, option)
            name += "" if value == usual else f"-{option}{by_axis(value)}"
        return f"{name}-b{self.batch}-h{self.heads}x{self.kv_heads}-d{self.head_dim}"

    @property
    def step(self) -> int:
        """Between neighbours of a dilation group, along the axis where it is largest."""
        count = len(self.axes)
        dilation = self.dilation if isinstance(self.dilation, tuple) else (self.dilation,) * count
        return max(map(min, dilation, self.axes))

    @property
    def mask(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("window", "stride", "dilation", "causal")}

    @property
    def options(self) -> dict[str, Any]:
        return {**self.mask, "scale": self.scale}

    @property
    def op_options(self) -> dict[str, list]:
        """As the op takes them."""
        count = len(self.axes)
        return {k: list(x) if isinstance(x, tuple) else [x] * count for k, x in self.mask.items()}

    def keep(self) -> Tensor:
        return reference.neighborhood_mask(self.axes, **self.mask)

    def inputs(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        def normal(heads: int) -> Tensor:
            return torch.randn(self.batch, *self.axes, heads, self.head_dim, device=device).to(dtype)

        return normal(self.heads), normal(self.kv_heads), normal(self.kv_heads)

    def cotangents(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Gradients of the output and of the LSE, of unit variance."""
        out = torch.randn(self.batch, *self.axes, self.heads, self.head_dim, device=device).to(dtype)
        return out, torch.randn(self.batch, self.heads, *self.axes, device=device)

    def ours(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.neighborhood_attention(q, k, v, **self.options, return_lse=True)

    def plain(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return reference.neighborhood_attention(q, k, v, **self.options)


# Lengths on both sides of the tiles' extents in use (64 and 128 tokens; 8 x 8, 8 x 16; 2 x 4 x 8, 2 x 8 x 8).
CASES = [
    *(Case((length,), 20, batch=2) for length in (1, 2, 63, 64, 65, 127, 128, 129, 200)),
    Case((200,), -1),
    Case((200,), 1),
    Case((200,), 300),
    Case((200,), 33, stride=8),
    Case((200,), 64, stride=64),
    Case((201,), 11, dilation=7),
    Case((131,), 20, stride=6, dilation=2, causal=True),
    Case((201,), 5, dilation=8),
    Case((201,), 5, dilation=11),
    Case((40, 37), 3, dilation=(1, 9)),
    Case((5,), 3, dilation=9),
    Case((300,), 70, causal=True, heads=4, kv_heads=2, head_dim=128),
    Case((8, 16), (3, 5)),
    Case((16, 32), (8, 16), stride=(8, 16), batch=2),
    Case((17, 19), 7),
    Case((17, 19), (6, -1)),
    Case((17, 19), (1, 40)),
    Case((17, 19), 8, stride=(3, 8), heads=6, kv_heads=2),
    Case((23, 21), (5, 4), dilation=(2, 3)),
    Case((19, 18), (4, 5), stride=(1, 2), dilation=(4, 2), causal=(True, False)),
    Case((20, 33), (9, 8), causal=True, head_dim=128),
    Case((1, 40), 9),
    Case((40, 1), 9),
    Case((5, 9, 17), 3),
    Case((4, 8, 16), (-1, 3, 5), causal=(True, False, False), heads=4, kv_heads=1),
    Case((5, 11, 13), (3, 6, 4), stride=(2, 3, 4), batch=2),
    Case((6, 10, 9), (2, 3, 2), dilation=(2, 1, 3), head_dim=128),
    Case((1, 12, 20), (1, 5, 7)),
    Case((3, 1, 50), 3, scale=0.5),
    *(Case((12, 13), 5, head_dim=head_dim) for head_dim in (8, 24, 72, 256)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, place) -> None:
    """At most twice the error of the plain formula in the same precision; the LSE always as in float32."""
    device, dtype = place
    if case.head_dim not in HEAD_DIMS[device]:
        pytest.skip(f"head_dim {case.head_dim} is not supported on {device}")
    if device == "cuda" and case.step > MAX_GPU_STEP:
        pytest.skip(f"dilation {case.dilation} is not supported on {device}")
    inputs, cotangents = case.inputs(device, dtype), case.cotangents(device, dtype)
    results = run(case.ours, inputs, cotangents)
    exact = run(case.plain, tuple(x.double() for x in inputs), cotangents)
    rivals = run(case.plain, inputs, cotangents)
    assert results[1].dtype == torch.float32
    slack = 1e-5 if dtype == torch.float32 else 1e-4  # a row of one key: dS is the difference of equal numbers
    for name, result, truth, rival in zip(NAMES, results, exact, rivals, strict=True):
        assert result.is_contiguous()
        error = relative_error(result, truth)
        allowed = 1e-5 if name == "lse" else 2 * relative_error(rival, truth) + slack
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def test_gradient_of_lse_alone(device, dtype) -> None:
    case = Case((10, 13), (5, 4), stride=2, causal=(False, True), kv_heads=1)
    inputs = tuple(x.requires_grad_() for x in case.inputs(device, dtype))
    dq, dk, dv = torch.autograd.grad(case.ours(*inputs)[1].sum(), inputs)
    doubles = tuple(x.detach().double().requires_grad_() for x in inputs)
    exact_dq, exact_dk = torch.autograd.grad(case.plain(*doubles)[1].sum(), doubles[:2])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(dq, exact_dq) < tolerance
    assert relative_error(dk, exact_dk) < tolerance
    assert torch.count_nonzero(dv) == 0


# What is seen.

PROBES = [
    *(Case((length,), 20) for length in (1, 64, 65, 129, 200)),
    Case((130,), 33, stride=5),
    Case((130,), 6, dilation=4, causal=True),
    Case((17, 33), (5, 8)),
    Case((16, 16), 8, stride=8),
    Case((17, 18), (4, -1), stride=(2, 3), dilation=(3, 1)),
    Case((18, 17), 5, causal=(False, True)),
    Case((5, 9, 10), (3, 4, 5)),
    Case((4, 9, 8), (-1, 3, 4), stride=(1, 2, 2), causal=(True, False, False)),
    Case((6, 5, 7), 2, dilation=(2, 1, 3)),
]


@pytest.mark.parametrize("case", PROBES, ids=str)
def test_probe(case: Case, device, dtype) -> None:
    """With K = 0 all visible keys weigh the same, and one-hot values name them."""
    case = replace(case, heads=1, kv_heads=1, head_dim=128)
    keep = case.keep().to(device)
    visible = torch.zeros_like(keep)
    q, k, v = case.inputs(device, dtype)
    k.zero_()
    tokens = v.view(-1, 128)
    for first in range(0, len(keep), 128):
        keys = range(first, min(first + 128, len(keep)))
        tokens.zero_()
        tokens[keys, range(len(keys))] = 1
        out, lse = case.ours(q, k, v)
        visible[:, keys] = out.view(-1, 128)[:, : len(keys)] != 0
    assert torch.equal(visible, keep)
    torch.testing.assert_close(lse.flatten(), keep.sum(-1).float().log(), atol=1e-5, rtol=0)


def test_a_window_of_all_axes_is_dense(device, dtype) -> None:
    case = Case((5, 9, 7), -1, batch=2, heads=4, kv_heads=2)
    q, k, v = case.inputs(device, dtype)
    dout, dlse = case.cotangents(device, dtype)
    results = run(case.ours, (q, k, v), (dout, dlse))
    dense = run(
        lambda *x: fastattn.attention(*x, return_lse=True),
        tuple(x.flatten(1, 3) for x in (q, k, v)),
        (dout.flatten(1, 3), dlse.flatten(2)),
    )
    for result, truth in zip(results, dense, strict=True):
        assert relative_error(result.reshape(truth.shape), truth) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_a_stride_of_the_window_makes_blocks(device, dtype) -> None:
    """Each block by itself, as if in a batch of blocks."""
    case = Case((12, 20), (4, 5), stride=(4, 5))
    inputs = case.inputs(device, dtype)

    def blocks(x: Tensor) -> Tensor:
        return x.unflatten(2, (4, 5)).unflatten(1, (3, 4)).transpose(2, 3).flatten(0, 2)

    out, _ = case.ours(*inputs)
    alone, _ = replace(case, axes=(4, 5), window=-1, stride=1).ours(*(blocks(x) for x in inputs))
    assert relative_error(blocks(out), alone) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_dilation_is_attention_within_each_group(device, dtype) -> None:
    case = Case((23, 17), (5, 3), dilation=(3, 2))
    inputs = case.inputs(device, dtype)
    out, lse = case.ours(*inputs)
    for part in ((slice(i, None, 3), slice(j, None, 2)) for i in range(3) for j in range(2)):
        group = [x[(slice(None), *part)] for x in (*inputs, out)]
        alone, alone_lse = fastattn.neighborhood_attention(*group[:3], window=case.window, return_lse=True)
        assert torch.equal(group[3], alone)
        assert torch.equal(lse[(..., *part)], alone_lse)


def test_a_causal_axis_is_a_causal_window(device, dtype) -> None:
    case = Case((200,), 40, causal=True)
    inputs = case.inputs(device, dtype)
    out, lse = case.ours(*inputs)
    expected, expected_lse = fastattn.attention(*inputs, window=(39, 0), return_lse=True)
    assert relative_error(out, expected) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert relative_error(lse, expected_lse) < 1e-6


def test_nan_reaches_only_its_own_dilation_group(device, dtype) -> None:
    """Tiles hold tokens of one group, and at the end of an axis nothing: never those of its neighbor in memory."""
    case = Case((11, 13), (3, 5), dilation=(2, 3), heads=2, kv_heads=1)
    q, k, v = case.inputs(device, dtype)
    cotangents = case.cotangents(device, dtype)
    clean = run(case.ours, (q, k, v), cotangents)
    poisoned = [x.clone() for x in (q, k, v)]
    for x in (*poisoned, cotangents[0]):
        x[:, 1::2, 2::3] = torch.nan
    results = run(case.ours, tuple(poisoned), cotangents)
    seen = torch.ones(case.axes, dtype=torch.bool)
    seen[1::2, 2::3] = False

    def others(tensors: list[Tensor]) -> list[Tensor]:
        return [(x.movedim(1, 3) if name == "lse" else x)[:, seen] for name, x in zip(NAMES, tensors, strict=True)]

    assert_same(others(results), others(clean))


# Layouts.


STRIDED = Case((11, 14), (5, 4), stride=2, batch=2, heads=4, kv_heads=4)
Normal = Callable[..., Tensor]


def fused_qkv(normal: Normal) -> tuple[Tensor, ...]:
    return normal(2, 11, 14, 3, 4, 64).unbind(3)


def interleaved_heads(normal: Normal) -> tuple[Tensor, ...]:
    return normal(2, 11, 14, 4, 3 * 64).split(64, -1)


def heads_first(normal: Normal) -> tuple[Tensor, ...]:
    return tuple(normal(2, 4, 11, 14, 64).movedim(1, 3) for _ in range(3))


def part_of_an_image(normal: Normal) -> tuple[Tensor, ...]:
    """The axes do not lie in memory like one: a copy is made."""
    return tuple(normal(2, 14, 17, 4, 64)[:, 1:-2, 1:-2] for _ in range(3))


def axes_exchanged(normal: Normal) -> tuple[Tensor, ...]:
    return tuple(normal(2, 14, 11, 4, 64).transpose(1, 2) for _ in range(3))


def expanded_batch(normal: Normal) -> tuple[Tensor, ...]:
    return tuple(normal(1, 11, 14, 4, 64).expand(2, -1, -1, -1, -1) for _ in range(3))


def in_nan(normal: Normal) -> tuple[Tensor, ...]:
    """What lies around a tensor is never read."""
    buffers = [normal(4, 11, 14, 5, 64).fill_(torch.nan) for _ in range(3)]
    return tuple(buffer[1:-1, :, :, :4].copy_(normal(2, 11, 14, 4, 64)) for buffer in buffers)


@pytest.mark.parametrize(
    "maker",
    [fused_qkv, interleaved_heads, heads_first, part_of_an_image, axes_exchanged, expanded_batch, in_nan],
)
def test_strided_views(maker: Callable[[Normal], tuple[Tensor, ...]], place) -> None:
    device, dtype = place
    views = maker(lambda *shape: torch.randn(shape, device=device).to(dtype))
    cotangents = STRIDED.cotangents(device, dtype)
    results = run(STRIDED.ours, views, cotangents)
    contiguous = run(STRIDED.ours, tuple(view.contiguous() for view in views), cotangents)
    assert all(result.is_contiguous() for result in results)
    assert_same(results, contiguous)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
def test_output_gradients_of_any_layout(layout: str, device, dtype) -> None:
    inputs = STRIDED.inputs(device, dtype)
    dout, dlse = STRIDED.cotangents(device, dtype)
    if layout == "expanded":
        dout, dlse = dout[:1, :1, :1, :1, :1].expand_as(dout), dlse[:1, :1, :1, :1].expand_as(dlse)
    elif layout == "transposed":
        dout, dlse = dout.mT.contiguous().mT, dlse.mT.contiguous().mT
    else:
        dout, dlse = dout.repeat(1, 1, 1, 1, 2)[..., ::2], dlse.repeat(1, 1, 1, 2)[..., ::2]
    results = run(STRIDED.ours, inputs, (dout, dlse))
    assert_same(results, run(STRIDED.ours, inputs, (dout.contiguous(), dlse.contiguous())))


# Extra tokens.


def with_extra(case: Case, extra: int):
    """A function of (q, k, v, extra_k, extra_v), and the same by the definition."""

    def ours(q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor, extra_v: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.neighborhood_attention(
            q, k, v, **case.options, extra_k=extra_k, extra_v=extra_v, return_lse=True
        )

    def plain(q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor, extra_v: Tensor) -> tuple[Tensor, Tensor]:
        keep = case.keep()
        keep = torch.cat([keep, torch.ones(len(keep), extra, dtype=torch.bool)], 1).to(q.device)
        k, v = torch.cat([k.flatten(1, -3), extra_k], 1), torch.cat([v.flatten(1, -3), extra_v], 1)
        out, lse = reference.masked_attention(q.flatten(1, -3), k, v, keep, scale=case.scale)
        return out.unflatten(1, case.axes), lse.unflatten(2, case.axes)

    return ours, plain


@pytest.mark.parametrize("extra", [1, 77, 0])
def test_extra_tokens_are_seen_by_every_query(extra: int, place) -> None:
    device, dtype = place
    case = Case((10, 13), (5, 4), causal=(False, True), batch=2, heads=4, kv_heads=2, scale=0.2)
    inputs = (*case.inputs(device, dtype), *torch.randn(2, 2, extra, 2, 64, device=device).to(dtype))
    cotangents = case.cotangents(device, dtype)
    ours, plain = with_extra(case, extra)
    results = run(ours, inputs, cotangents)
    exact = run(plain, tuple(x.double() for x in inputs), cotangents)
    for result, truth in zip(results, exact, strict=True):
        assert relative_error(result, truth) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_extra_tokens_come_in_pairs(device, dtype) -> None:
    q, k, v = Case((10,), 5).inputs(device, dtype)
    with pytest.raises(ValueError, match="extra_k and extra_v must be given together"):
        fastattn.neighborhood_attention(q, k, v, window=5, extra_k=k)


# As torch sees it.

TORCH_CASE = Case((6, 11), (3, 4), stride=(1, 2), dilation=(2, 1), causal=(False, True), batch=2, heads=4, kv_heads=2)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_opcheck_forward(axes: int, requires_grad: bool, device, dtype) -> None:
    case = {1: Case((20,), 5), 2: TORCH_CASE, 3: Case((3, 4, 5), 2, stride=2)}[axes]
    inputs = [x.requires_grad_(requires_grad) for x in case.inputs(device, dtype)]
    op = torch.ops.fastattn.neighborhood_attention.default
    torch.library.opcheck(op, inputs, {**case.op_options, "scale": 0.3}, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("with_dlse", [False, True])
def test_opcheck_backward(with_dlse: bool, device, dtype) -> None:
    inputs = TORCH_CASE.inputs(device, dtype)
    dout, dlse = TORCH_CASE.cotangents(device, dtype)
    out, lse = torch.ops.fastattn.neighborhood_attention(*inputs, **TORCH_CASE.op_options)
    arguments = (dout, dlse if with_dlse else None, *inputs, out, lse)
    op = torch.ops.fastattn.neighborhood_attention_backward.default
    torch.library.opcheck(op, arguments, TORCH_CASE.op_options, rtol=2e-2, atol=2e-2)


def test_opcheck_strided(device, dtype) -> None:
    fused = torch.randn(2, 6, 11, 3, 4, 64, device=device).to(dtype)
    inputs = [view.detach().requires_grad_() for view in fused.unbind(3)]
    op = torch.ops.fastattn.neighborhood_attention.default
    torch.library.opcheck(op, inputs, TORCH_CASE.op_options, rtol=2e-2, atol=2e-2)


def test_op_called_directly_is_differentiable(device, dtype) -> None:
    inputs, cotangents = TORCH_CASE.inputs(device, dtype), TORCH_CASE.cotangents(device, dtype)
    direct = run(lambda *x: torch.ops.fastattn.neighborhood_attention(*x, **TORCH_CASE.op_options), inputs, cotangents)
    assert_same(direct, run(TORCH_CASE.ours, inputs, cotangents))


def test_double_backward_is_refused(device, dtype) -> None:
    q, k, v = (x.requires_grad_() for x in TORCH_CASE.inputs(device, dtype))
    (dq,) = torch.autograd.grad(TORCH_CASE.ours(q, k, v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        dq.sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("extra", [None, 7])
def test_compile(backend: str, extra: int | None, device, dtype) -> None:
    inputs, cotangents = TORCH_CASE.inputs(device, dtype), TORCH_CASE.cotangents(device, dtype)
    tokens = None if extra is None else torch.randn(2, extra, 2, 64, device=device).to(dtype)

    def block(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = fastattn.neighborhood_attention(
            q * 2, k, v, **TORCH_CASE.options, extra_k=tokens, extra_v=tokens, return_lse=True
        )
        return out + 1, lse * 3

    eager = run(block, inputs, cotangents)
    compiled = run(torch.compile(block, fullgraph=True, backend=backend), inputs, cotangents)
    for a, b in zip(compiled, eager, strict=True):
        assert relative_error(a, b.double()) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_compile_once_for_all_lengths(device, dtype) -> None:
    graphs = 0

    def count(graph_module, _inputs):
        nonlocal graphs
        graphs += 1
        return graph_module

    compiled = torch.compile(fastattn.neighborhood_attention, fullgraph=True, dynamic=True, backend=count)
    for length in (7, 12, 20):
        inputs = Case((length, length + 3), 5).inputs(device, dtype)
        assert torch.equal(compiled(*inputs, window=5), fastattn.neighborhood_attention(*inputs, window=5))
    assert graphs == 1


def test_export(device, dtype) -> None:
    class Block(torch.nn.Module):
        def forward(self, q, k, v):
            return fastattn.neighborhood_attention(q, k, v, window=(3, -1), stride=(2, 1), return_lse=True)

    rows, columns = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("columns", min=2, max=64)
    shapes = ({1: rows, 2: columns},) * 3
    program = torch.export.export(Block(), Case((8, 10), 1).inputs(device, dtype), dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.fastattn.neighborhood_attention.default) == 1
    inputs = Case((9, 21), 1).inputs(device, dtype)
    for a, b in zip(program.module()(*inputs), Block()(*inputs), strict=True):
        assert torch.equal(a, b)


def test_autocast(device) -> None:
    q, k, v = (x.requires_grad_() for x in TORCH_CASE.inputs(device, torch.float32))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device, dtype=dtype):
            out, lse = TORCH_CASE.ours(q, k, v)
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        assert torch.equal(out, TORCH_CASE.ours(*(x.detach().to(dtype) for x in (q, k, v)))[0])
        (dq,) = torch.autograd.grad(out.float().sum(), q)
        assert dq.dtype == torch.float32


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, None), (None, 2, 0)])
def test_vmap(in_dims: tuple, device, dtype) -> None:
    many = [torch.stack([x, x.flip(1), x * 2]) for x in TORCH_CASE.inputs(device, dtype)]
    batched = [x[0] if dim is None else x.movedim(0, dim).contiguous() for x, dim in zip(many, in_dims, strict=True)]
    out, lse = torch.vmap(TORCH_CASE.ours, in_dims=in_dims)(*batched)
    for i in range(3):
        sample = [x[0] if dim is None else x[i] for x, dim in zip(many, in_dims, strict=True)]
        expected_out, expected_lse = TORCH_CASE.ours(*sample)
        assert torch.equal(out[i], expected_out)
        assert torch.equal(lse[i], expected_lse)


@pytest.mark.parametrize("case", PROBES, ids=str)
def test_flops_count_kept_scores(case: Case) -> None:
    case = replace(case, batch=2, heads=4, head_dim=8)
    q, k, v = (x.requires_grad_() for x in case.inputs("cpu", torch.float32))
    with FlopCounterMode(display=False) as counter:
        out, _ = case.ours(q, k, v)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 4 * 2 * 4 * 8 * case.keep().sum().item()
    assert counter.get_total_flops() == forward * 7 // 2


def test_meta_tensors_give_shapes_without_data() -> None:
    q, k, v = (x.to("meta") for x in TORCH_CASE.inputs("cpu", torch.float32))
    out, lse = TORCH_CASE.ours(q, k, v)
    assert out.device.type == "meta"
    assert out.shape == q.shape
    assert lse.shape == (2, 4, 6, 11)


@pytest.mark.parametrize("sizes", [(0, 5, 4, 2, 2), (2, 0, 4, 2, 2), (2, 5, 0, 2, 2), (2, 5, 4, 0, 2), (2, 5, 4, 0, 0)])
def test_zero_sizes(sizes: tuple[int, ...], device, dtype) -> None:
    batch, *axes, heads, kv_heads = sizes
    case = Case(tuple(axes), 3, batch=batch, heads=heads, kv_heads=kv_heads)
    inputs = case.inputs(device, dtype)
    out, lse, *gradients = run(case.ours, inputs, case.cotangents(device, dtype))
    assert out.shape == (batch, *axes, heads, 64)
    assert lse.shape == (batch, heads, *axes)
    for tensor, gradient in zip(inputs, gradients, strict=True):
        assert gradient.shape == tensor.shape
        assert torch.count_nonzero(gradient) == 0


# Refusals.

BAD_OPTIONS = [
    ({"window": (3, 3, 3)}, "window must be one value for all axes or a sequence of 2, one for each, got (3, 3, 3)"),
    ({"window": (3, 0)}, "window must be at least 1, or -1 for the whole axis, got 0 for axis 1"),
    ({"window": (3, 4), "stride": (4, 1)}, "stride must be at least 1 and at most the window, 3, got 4 for axis 0"),
    ({"window": 3, "dilation": (1, 0)}, "dilation must be at least 1, got 0 for axis 1"),
    ({"window": 3, "causal": (True,)}, "causal must be one value for all axes or a sequence of 2"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_refused(options: dict, message: str, device, dtype) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fastattn.neighborhood_attention(*Case((6, 7), 1).inputs(device, dtype), **options)


BAD_OP_OPTIONS = [
    ({"window": [3]}, "window must have one value for each of the 2 axes, got 1"),
    ({"causal": [False] * 3}, "causal must have one value for each of the 2 axes, got 3"),
    ({"window": [0, 3]}, "window must be at least 1, or -1 for the whole axis, got 0 for axis 1 of 3"),
    ({"window": [3, -2]}, "window must be at least 1, or -1 for the whole axis, got -2 for axis 2 of 3"),
    ({"window": [3, 2**40]}, "window must be less than 2^31, got 1099511627776"),
    ({"stride": [4, 1]}, "stride must be between 1 and the window, 3, got 4 for axis 1 of 3"),
    ({"stride": [1, 0]}, "stride must be between 1 and the window, 3, got 0 for axis 2 of 3"),
    ({"dilation": [1, 0]}, "dilation must be at least 1, got 0 for axis 2 of 3"),
    ({"scale": 0.0}, "scale must be finite and positive, got 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OP_OPTIONS)
def test_the_op_refuses_bad_options_too(options: dict, message: str, device, dtype) -> None:
    case = Case((6, 7), 3)
    with pytest.raises(RuntimeError, match=re.escape(f"neighborhood_attention: {message}")):
        torch.ops.fastattn.neighborhood_attention(*case.inputs(device, dtype), **{**case.op_options, **options})


BAD_TENSORS = [
    ((2, 7, 4), None, "q must have 4 to 6 dimensions, [batch, X1(, X2(, X3)), heads, head_dim], got [2, 7, 4]"),
    (
        (2, 6, 7, 4, 64),
        (2, 6, 8, 4, 64),
        "k must have the axes of q, [6, 7], got [2, 6, 8, 4, 64]",
    ),
    ((2, 6, 7, 4, 64), (2, 42, 4, 64), "k must have the axes of q, [6, 7], got [2, 42, 4, 64]"),
    ((2, 6, 7, 4, 64), (1, 6, 7, 4, 64), "k must have the batch size of q, 2, got 1"),
    ((2, 6, 7, 4, 64), (2, 6, 7, 3, 64), "the heads of q must be a multiple of those of k, got 4 and 3"),
    ((2, 6, 7, 4, 12), None, "head_dim must be a multiple of 8"),
]


@pytest.mark.parametrize(("q_shape", "k_shape", "message"), BAD_TENSORS)
def test_bad_tensors_are_refused(q_shape: tuple, k_shape: tuple | None, message: str, device, dtype) -> None:
    q = torch.randn(q_shape, device=device).to(dtype)
    k = torch.randn(k_shape or q_shape, device=device).to(dtype)
    with pytest.raises(RuntimeError, match=re.escape(f"neighborhood_attention: {message}")):
        fastattn.neighborhood_attention(q, k, k, window=3)


def test_padding_beyond_all_bounds_is_refused() -> None:
    """Each dilation group is padded to whole tiles: 2^24 groups of one token to 64 slots each."""
    q = torch.zeros(1, 1, 1, 1, 8, dtype=torch.bfloat16).expand(1, 4096, 4096, 1, 8)
    message = "in tiles of 1 x 8 x 8, each of one dilation group, tokens take 1073741824 places; it must be fewer than"
    with pytest.raises(RuntimeError, match=message):
        fastattn.neighborhood_attention(q, q, q, window=1, dilation=4096)


@pytest.mark.gpu
def test_a_dilation_that_the_gpu_does_not_step() -> None:
    q = torch.zeros(1, 40, 20, 1, 64, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match="dilation must be at most 8 on the GPU, got 9"):
        fastattn.neighborhood_attention(q, q, q, window=2, dilation=(1, 9))
