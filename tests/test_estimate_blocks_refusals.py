"""What `estimate_blocks` and its op refuse, and how they say it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import estimate_blocks
from test_estimate_blocks import OP, OPTIONS, Problem, normal


def refused(message: str, change: Callable[[list[Tensor], dict[str, Any]], None]) -> Any:
    return pytest.param(message, change, id=message)


def put(at: int, new: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor], dict[str, Any]], None]:
    def change(tensors: list[Tensor], options: dict[str, Any]) -> None:
        tensors[at] = new(tensors[at])

    return change


def option(**new: Any) -> Callable[[list[Tensor], dict[str, Any]], None]:
    return lambda tensors, options: options.update(new)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        refused(r"q must have 4 dimensions, .*, got \[70, 4, 64\]", put(0, lambda x: x[0])),
        refused("q must be int8 .*, got Float", put(0, Tensor.float)),
        refused("q must be int8 .*, got Float8_e4m3fn", put(0, lambda x: x.float().to(torch.float8_e4m3fn))),
        refused(r"k must be int8 \(4-bit values: quantize with packed=False\), got Byte", put(2, Tensor.byte)),
        refused(
            r"k must be contiguous in its last dimension, got strides \[33280, 256, 128, 2\]",
            put(2, lambda x: x.repeat_interleave(2, 3)[..., ::2]),
        ),
        refused(
            r"q_scales must be Float \[batch, heads, queries of q\] = \[2, 4, 70\], got Double", put(1, Tensor.double)
        ),
        refused(r"q_scales must be Float .* got Float \[2, 4, 69\]", put(1, lambda x: x[..., 1:])),
        refused(
            r"k_scales must be Float \[batch, kv_heads, groups\] = \[2, 2, 20\], got Float \[2, 2, 19\]",
            put(3, lambda x: x[..., 1:]),
        ),
        refused(
            r"floor must be Float \[batch, heads, queries of q\] .* got Float \[2, 4, 1\]", put(4, lambda x: x[..., :1])
        ),
        refused(
            r"key_term must be Float \[batch, heads, padded seq_k\] = \[2, 4, 160\], got Float \[2, 4, 130\]",
            put(5, lambda x: x[..., :130]),
        ),
        refused("k must have the head_dim of q, 64, got 32", put(2, lambda x: x[..., :32])),
        refused("group must be 1, 8, 16 or 32, got 0", option(group=0)),
        refused(f"group must be 1, 8, 16 or 32, got {2**62}", option(group=2**62)),
        refused(r"block_size must be \(queries, keys\), each 64 or 128, got \[64\]", option(block_size=[64])),
        refused(r"block_size must be .*, got \[0, 64\]", option(block_size=[0, 64])),
        refused("a block must have 64 or 128 queries and 64 or 128 keys, got 64 x 96", option(block_size=[64, 96])),
        refused(r"block_size must be .*, each 64 or 128, got \[192, 64\]", option(block_size=[192, 64])),
        refused("query_stride must divide the queries of a block, 64, got 3", option(query_stride=3)),
        refused("query_stride must divide the queries of a block, 64, got 0", option(query_stride=0)),
        refused("query_stride must divide the queries of a block, 64, got 128", option(query_stride=128)),
        refused("seq_q must be between 0 and .*, got -1", option(seq_q=-1)),
        refused("seq_q must be between 0 and .*, got 1073741824", option(seq_q=2**30)),
        refused("q must hold 35 of 70 queries with query_stride 2, got 70", option(query_stride=2)),
        refused("q must hold 72 of 72 queries with query_stride 1, got 70", option(seq_q=72)),
        refused("sink must not be negative, got -1", option(sink=-1)),
        refused("window must not be negative, got -3", option(window=-3)),
        refused("scale must be finite and positive, got 0", option(scale=0.0)),
        refused("scale must be finite and positive, got nan", option(scale=math.nan)),
    ],
)
def test_bad_arguments_of_the_op_are_refused(
    message: str, change: Callable[[list[Tensor], dict[str, Any]], None]
) -> None:
    problem = Problem.random(70, 130)
    tensors, options = [x for x in problem.arguments if x is not None], {**problem.options, **OPTIONS}
    change(tensors, options)
    with pytest.raises(RuntimeError, match="estimate_blocks: " + message):
        OP(*tensors, **options)


def test_bad_shapes_of_the_op_are_refused() -> None:
    def of_keys(**changes: int) -> tuple[Tensor | None, ...]:
        good, other = Problem.random(70, 130), Problem.random(70, 130, **changes)
        return *good.arguments[:2], *other.arguments[2:4], *good.arguments[4:]

    for arguments, group, message in [
        (of_keys(batch=1), 8, "k must have the batch size of q, 2, got 1"),
        (of_keys(kv_heads=3, heads=3), 8, "the heads of q must be a multiple of those of k, got 4 and 3"),
        (of_keys(group=12), 12, "group must be 1, 8, 16 or 32, got 12"),
        (Problem.random(70, 130, head_dim=12).arguments, 8, "head_dim must be a multiple of 8 .*, got 12"),
        (Problem.random(70, 130, head_dim=264).arguments, 8, "head_dim must be a multiple of 8 .*, got 264"),
    ]:
        with pytest.raises(RuntimeError, match="estimate_blocks: " + message):
            OP(*arguments, group=group, seq_q=70, **OPTIONS)


def test_bad_arguments_are_refused() -> None:
    q, k = normal(70, 130)
    for arguments, message in [
        ((q, k, math.nan), "threshold must be a number, got nan"),
        ((q, k, torch.ones(3)), r"threshold must be .* \[heads\] = \[4\] on cpu, got float32 \[3\] on cpu"),
        ((q, k, torch.ones(4, dtype=torch.int32)), r"threshold must be .* got int32 \[4\]"),
        ((q[0], k, 0.1), r"q and k must have 4 dimensions, .*, got \[70, 4, 64\] and \[1, 130, 2, 64\]"),
    ]:
        with pytest.raises(ValueError, match="estimate_blocks: " + message):
            estimate_blocks(*arguments)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        estimate_blocks(q, k, 0.1, bits=3)  # type: ignore[arg-type]
    for query_stride in (0, -1, 3, 256):
        with pytest.raises(
            ValueError, match=f"query_stride must divide the queries of a block, 128, got {query_stride}"
        ):
            estimate_blocks(q, k, 0.1, query_stride=query_stride)
    with pytest.raises(ValueError, match="window must be at least 1 where causal queries have a query_stride, got 0"):
        estimate_blocks(q, k, 0.1, window=0, query_stride=2)
    with pytest.raises(ValueError, match=r"block_size must be .* and one of \(64, 128\), got"):
        estimate_blocks(q, k, 0.1, block_size=(64, 32))
    with pytest.raises(RuntimeError, match="the heads of q must be a multiple of those of k, got 4 and 3"):
        estimate_blocks(q, k[:, :, [0, 1, 1]], 0.1)
    with pytest.raises(RuntimeError, match="sink must not be negative, got -1"):
        estimate_blocks(q, k, 0.1, sink=-1)
    with pytest.raises(RuntimeError, match="q must be float32, float16 or bfloat16, got Double"):
        estimate_blocks(q.double(), k.double(), 0.1)
