"""`quantized_attention` on a GPU: the CPU kernel's roundings, on the same operands."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import relative_error
from fastattn import BlockList, quantized_attention, reference
from test_quantized_attention import OP, operands, random_key_term, tensors

GPU_FORMATS = [("int8", "int8"), ("int4", "int8"), ("int8", "fp8"), ("int8", "bf16"), ("fp8", "fp8")]
# Beside what bfloat16 leaves of an output, 1.7e-3: an exponential that is approximate moves weights over ties, sums of
# fp8 products keep 14 bits, and weights beside 16-bit values have 16 bits as well.
GPU_ERROR = {"int8": 4e-3, "fp8": 8e-3, "bf16": 5e-3}
# Integer products are exact. A sum of fp8 products keeps 14 bits: in four steps, at head_dim 128, 2^-11 of |q| |k|.
LSE_ERROR = 1e-4
FP8_LSE_ERROR = 2**-11
on_gpu = pytest.mark.gpu
each_gpu_format = pytest.mark.parametrize(("qk", "pv"), GPU_FORMATS, ids=["-".join(x) for x in GPU_FORMATS])


def assert_gpu_agrees(
    q: Tensor, k: Tensor, v: Tensor, *, qk: str, pv: str, order: Tensor | None = None, **options: Any
) -> None:
    given, options = operands(q.bfloat16(), k.bfloat16(), v.bfloat16(), qk=qk, pv=pv, **options)
    if qk == "int4":
        given = (*given[:7], random_key_term(q.shape[0], q.shape[2], k.shape[1]), *given[8:])
    want, want_lse = OP(*given, order=order, **options, dtype=torch.bfloat16)
    on_device = [x if x is None else x.cuda() for x in (*given, order)]
    out, lse = OP(*on_device[:-1], order=on_device[-1], **options, dtype=torch.bfloat16)
    assert relative_error(out.cpu(), want.double()) < GPU_ERROR[pv] or not want.any()
    assert torch.equal(lse.cpu() == -math.inf, want_lse == -math.inf)
    seen = want_lse > -math.inf
    error = LSE_ERROR
    if qk == "fp8":
        error += FP8_LSE_ERROR * float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) / math.sqrt(q.shape[-1])
    assert ((lse.cpu() - want_lse)[seen].abs() < error).all()


@on_gpu
@each_gpu_format
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_gpu_agrees_with_the_cpu(qk: str, pv: str, head_dim: int, causal: bool) -> None:
    q, k, v = tensors(300, 700, heads=4, kv_heads=2, head_dim=head_dim)
    assert_gpu_agrees(q, k, v, qk=qk, pv=pv, causal=causal)


@on_gpu
@each_gpu_format
@pytest.mark.parametrize("seq", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 4113])
def test_gpu_lengths_around_tiles_and_groups(qk: str, pv: str, seq: int) -> None:
    q, k, v = tensors(seq, seq, batch=1, heads=2, kv_heads=1)
    assert_gpu_agrees(q, k, v, qk=qk, pv=pv, causal=seq % 2 == 0)


@on_gpu
@each_gpu_format
@pytest.mark.parametrize("block_size", [(64, 64), (64, 128), (128, 64), (128, 128), (192, 128)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.4, 1.0])
def test_gpu_blocks(qk: str, pv: str, block_size: tuple[int, int], head_dim: int, density: float) -> None:
    seq = 1500
    q, k, v = tensors(seq, seq, head_dim=head_dim)
    k[:, 128:256] *= 8  # scales differ from block to block
    mask = torch.rand(2, 4, -(-seq // block_size[0]), -(-seq // block_size[1])) < density
    causal = density == 0.4
    blocks = BlockList.from_mask(mask, seq_q=seq, seq_k=seq, block_size=block_size, causal=causal)
    assert_gpu_agrees(q, k, v, qk=qk, pv=pv, blocks=blocks)


@on_gpu
@each_gpu_format
def test_gpu_puts_tokens_back_in_order(qk: str, pv: str) -> None:
    q, k, v = tensors(520, 520)
    assert_gpu_agrees(q, k, v, qk=qk, pv=pv, order=torch.rand(2, 4, 520).argsort(-1).int())


@on_gpu
@each_gpu_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_is_as_precise_as_the_cpu(qk: str, pv: str, dtype: torch.dtype) -> None:
    """From end to end, quantized where it runs."""
    inputs = [x.to(dtype) for x in tensors(700, 1000, head_dim=128)]
    exact, _ = reference.attention(*(x.double() for x in inputs))
    of_cpu = relative_error(quantized_attention(*inputs, qk=qk, pv=pv), exact)
    out, lse = quantized_attention(*(x.cuda() for x in inputs), qk=qk, pv=pv, return_lse=True)
    assert relative_error(out.cpu(), exact) < 1.1 * of_cpu + 2e-3
    assert lse.isfinite().all()


@on_gpu
@each_gpu_format
def test_gpu_gives_the_same_bits_every_time_and_in_a_graph(qk: str, pv: str) -> None:
    q, k, v = (x.bfloat16().cuda() for x in tensors(3000, 3000, heads=16, kv_heads=4, head_dim=128))
    first = quantized_attention(q, k, v, qk=qk, pv=pv, causal=True)
    assert torch.equal(first, quantized_attention(q, k, v, qk=qk, pv=pv, causal=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = quantized_attention(q, k, v, qk=qk, pv=pv, causal=True)
    q.copy_(q.flip(1))
    graph.replay()
    assert torch.equal(out, quantized_attention(q, k, v, qk=qk, pv=pv, causal=True))


@on_gpu
@each_gpu_format
def test_gpu_shows_what_is_not_finite(qk: str, pv: str) -> None:
    q, k, v = (x.bfloat16() for x in tensors(200, 300))
    if qk != "int4":
        q[0, 7, 1, 3] = math.nan
    v[1, 9, 0, 5] = math.inf
    lost = ~quantized_attention(q.cuda(), k.cuda(), v.cuda(), qk=qk, pv=pv).isfinite().cpu()
    assert lost[1, :, :2, 5].all()
    assert lost[0, 7, 1].all() == (qk != "int4")
    assert lost.sum() == 2 * 200 + 64 * (qk != "int4")


@on_gpu
def test_gpu_refusals() -> None:
    q, k, v = (x.bfloat16().cuda() for x in tensors(64, 64))
    with pytest.raises(RuntimeError, match="on the GPU int8 q and k go with v of"):
        quantized_attention(q, k, v, qk="fp8", pv="int8")
    with pytest.raises(RuntimeError, match="head_dim must be a multiple of 16 on the GPU, got 24"):
        quantized_attention(*(x[..., :24] for x in (q, k, v)))
