"""What only a GPU shows: graphs, streams, sizes past 2³¹."""

from functools import partial

import pytest
import torch

import fastattn
from cases import Case, assert_same, run
from fastattn import BlockList

pytestmark = pytest.mark.gpu

# More tiles than an H100 has SMs: a thread block takes several.
CASE = Case(500, 700, heads=64, kv_heads=16, causal=True)


def attention(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return fastattn.attention(*tensors, causal=True, return_lse=True)


def test_graph_capture_and_replay() -> None:
    inputs, cotangents = CASE.inputs("cuda", torch.bfloat16), CASE.cotangents("cuda", torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(attention, inputs, cotangents)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(attention, inputs, cotangents)
    for seed in (1, 2):
        torch.manual_seed(seed)
        fresh = CASE.inputs("cuda", torch.bfloat16)
        for tensor, new in zip(inputs, fresh, strict=True):
            tensor.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        expected = run(attention, fresh, cotangents)
        assert_same(results, expected)


def sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Rows of blocks of every length, none of them included."""
    blocks = BlockList.from_predicate(
        lambda b, h, i, j: j * 7 % 5 < i % 6, seq_q=q.shape[1], seq_k=k.shape[1], block_size=(64, 128), device="cuda"
    )
    return fastattn.block_sparse_attention(q, k, v, blocks)


def neighborhood(*tensors: torch.Tensor) -> torch.Tensor:
    grids = (tensor.unflatten(1, (25, 30)) for tensor in tensors)
    return fastattn.neighborhood_attention(*grids, window=(9, 12), causal=(True, False)).flatten(1, 2)


OPS = {
    "attention": partial(fastattn.attention, causal=True),
    "sigmoid": partial(fastattn.sigmoid_attention, causal=True),
    "sparse": sparse,
    "neighborhood": neighborhood,
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("op", OPS)
def test_a_head_among_many_is_a_head_alone(op: str, head_dim: int) -> None:
    """Thread blocks take several tiles each, on two streams at once, and mix up none."""
    case = Case(750, 750, heads=48, kv_heads=48, head_dim=head_dim)
    calls = [case.inputs("cuda", torch.bfloat16) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    outs = []
    for stream, tensors in zip(streams, calls, strict=True):
        with torch.cuda.stream(stream):
            outs.append(OPS[op](*tensors))
    torch.cuda.synchronize()
    for out, tensors in zip(outs, calls, strict=True):
        for batch, head in ((0, 0), (0, 31), (1, 5), (1, 47)):
            alone = OPS[op](*(t[batch : batch + 1, :, head : head + 1] for t in tensors))
            assert torch.equal(out[batch : batch + 1, :, head : head + 1], alone)


def test_side_stream_is_honoured() -> None:
    """The op waits for what its stream holds: here a slow producer of q."""
    q, k, v = CASE.inputs("cuda", torch.bfloat16)
    expected, _ = attention(q, k, v)
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(q)
        out, _ = attention(late, k, v)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_no_synchronisation() -> None:
    inputs, cotangents = CASE.inputs("cuda", torch.bfloat16), CASE.cotangents("cuda", torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(attention, inputs, cotangents)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("far", ["batch", "seq"])
def test_offsets_past_32_bits(far: str) -> None:
    """Tensors whose last element lies more than 2³¹ elements after their first."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    if far == "batch":
        buffer = torch.empty(2, (1 << 31) + 64 * 1024, device="cuda", dtype=torch.bfloat16)
        q, k, v = (buffer.as_strided((2, 256, 2, 64), (buffer.stride(0), 128, 64, 1), i * 32768) for i in range(3))
    else:
        buffer = torch.empty(3, 256, 1 << 24, device="cuda", dtype=torch.bfloat16)
        q, k, v = (buffer[i, :, :128].unflatten(-1, (2, 64))[None] for i in range(3))
    for tensor in (q, k, v):
        tensor.normal_()
    cotangents = Case(256, 256, batch=q.shape[0], heads=2).cotangents("cuda", torch.bfloat16)
    results = run(attention, (q, k, v), cotangents)
    expected = run(attention, tuple(x.contiguous() for x in (q, k, v)), cotangents)
    assert_same(results, expected)


def test_contiguous_tensors_past_32_bits() -> None:
    """2³¹ + elements in q and out: the last rows against the same rows alone."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    heads, seq = 16, (1 << 21) + 200
    q = torch.randn(1, seq, heads, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 300, heads, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert q.numel() > 1 << 31
    out = fastattn.attention(q, k, v)
    assert torch.equal(out[:, -200:], fastattn.attention(q[:, -200:], k, v))


def far_tokens(count: int, tokens: int, heads: int) -> tuple[torch.Tensor, ...]:
    """Packed tensors, whose last token lies more than 2³¹ elements after the first."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    buffer = torch.empty(count, tokens, (1 << 31) // tokens * 2, device="cuda", dtype=torch.bfloat16)
    return tuple(x[:, : heads * 64].unflatten(-1, (heads, 64)).normal_() for x in buffer)


def test_sequences_past_32_bits() -> None:
    tensors = far_tokens(3, 256, 2)
    starts = torch.tensor([0, 90, 90, 256], device="cuda", dtype=torch.int32)

    def attend(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return fastattn.varlen_attention(*tensors, starts, starts, causal=True, return_lse=True)

    for result, expected in zip(attend(*tensors), attend(*(x.contiguous() for x in tensors)), strict=True):
        assert torch.equal(result, expected)


def test_parts_of_keys_past_32_bits() -> None:
    """One query over many keys, which are parted."""
    k, v = (x[None] for x in far_tokens(2, 2048, 2))
    q = torch.randn(1, 1, 8, 64, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(fastattn.attention(q, k, v), fastattn.attention(q, k.contiguous(), v.contiguous()))


def test_second_device_follows_its_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = CASE.inputs("cuda:1", torch.bfloat16)
    out, _ = attention(*inputs)
    assert out.device.index == 1
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(out.cpu(), attention(*(x.to("cuda:0") for x in inputs))[0].cpu())
