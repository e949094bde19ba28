"""`estimate_blocks` on a GPU: the bits of the CPU kernel."""

import math
from typing import Any

import pytest
import torch

from test_estimate_blocks import OP, OPTIONS, SIZES, Problem, each_bits, each_causal, each_size


def assert_same_on_gpu(problem: Problem, block_size: tuple[int, int], **options: Any) -> None:
    on_device = [x if x is None else x.cuda() for x in problem.arguments]
    want = OP(*problem.arguments, **problem.options, block_size=block_size, **options)
    got = OP(*on_device, **problem.options, block_size=block_size, **options)
    for name, mine, theirs in zip(("counts", "indices"), got, want, strict=True):
        assert torch.equal(mine.cpu(), theirs), name


@pytest.mark.gpu
@each_size
@each_causal
@each_bits
@pytest.mark.parametrize("group", [8, 16, 32])
@pytest.mark.parametrize("with_key_term", [True, False])
def test_gpu_lists_what_the_cpu_lists(
    block_size: tuple[int, int], causal: bool, bits: int, group: int, with_key_term: bool
) -> None:
    for head_dim, seq_q, seq_k in ((64, 700, 1000), (128, 1000, 700), (96, 515, 515)):
        problem = Problem.random(seq_q, seq_k, head_dim=head_dim, bits=bits, group=group, with_key_term=with_key_term)
        assert_same_on_gpu(problem, block_size, sink=1, window=1, causal=causal, scale=0.9)
        assert_same_on_gpu(problem, block_size, sink=0, window=0, causal=causal, scale=1.0)


@pytest.mark.gpu
@each_size
@each_causal
@pytest.mark.parametrize("query_stride", [2, 4, 8, 16, 64])
@pytest.mark.parametrize("with_key_term", [True, False])
def test_gpu_judges_the_same_queries(
    block_size: tuple[int, int], causal: bool, query_stride: int, with_key_term: bool
) -> None:
    for seq_q, seq_k in ((700, 1000), (1000, 700), (515, 515), (63, 65), (1, 300)):
        problem = Problem.random(seq_q, seq_k, with_key_term=with_key_term, query_stride=query_stride)
        for near in (0, 1):
            assert_same_on_gpu(problem, block_size, sink=near, window=near, causal=causal, scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("seq", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 4113])
def test_gpu_lengths_around_tiles_and_blocks(seq: int) -> None:
    for block_size in SIZES:
        problem = Problem.random(seq, seq, batch=1, heads=2, kv_heads=1, with_key_term=seq % 2 == 0)
        assert_same_on_gpu(problem, block_size, sink=0, window=seq % 3, causal=seq % 4 < 2, scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("with_key_term", [True, False])
def test_gpu_judges_what_is_not_finite_alike(with_key_term: bool) -> None:
    problem = Problem.random(300, 500, with_key_term=with_key_term)
    for x in (problem.q_scales, problem.k_scales, problem.floor):
        for value in (math.nan, 0.0):
            x[torch.rand(x.shape) < 0.01] = value
    problem.floor[torch.rand(problem.floor.shape) < 0.02] = math.inf
    problem.floor[torch.rand(problem.floor.shape) < 0.002] = -math.inf
    problem.k_scales[0, 0, 3] = math.inf
    for block_size in SIZES:
        for causal in (False, True):
            assert_same_on_gpu(problem, block_size, sink=0, window=0, causal=causal, scale=1.0)


@pytest.mark.gpu
def test_gpu_runs_in_a_graph() -> None:
    problem = Problem.random(1000, 1000)
    on_device = [x if x is None else x.cuda() for x in problem.arguments]
    OP(*on_device, **problem.options, **OPTIONS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts, indices = OP(*on_device, **problem.options, **OPTIONS)
    on_device[4].add_(1)
    graph.replay()
    want = OP(*problem.arguments[:4], problem.floor + 1, problem.key_term, **problem.options, **OPTIONS)
    assert torch.equal(counts.cpu(), want[0])
    assert torch.equal(indices.cpu(), want[1])


@pytest.mark.gpu
def test_gpu_refusals() -> None:
    problem = Problem.random(70, 130, group=1)
    with pytest.raises(RuntimeError, match="group must be 8, 16 or 32 on the GPU, got 1"):
        assert_same_on_gpu(problem, (64, 64), sink=1, window=1, causal=True, scale=1.0)
