"""What `quantized_attention` and its op refuse, and how they say so."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import BlockList, quantized_attention
from test_quantized_attention import OP, operands, tensors


def replaced(**changes: Callable[[Tensor], Tensor]) -> Callable[[], dict[str, Any]]:
    def arguments() -> dict[str, Any]:
        given = dict(zip("qkv", tensors(20, 20), strict=True))
        return {name: changes.get(name, lambda x: x)(x) for name, x in given.items()}

    return arguments


def with_options(**options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**replaced()(), **options}


def strided(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def repeated_heads(x: Tensor) -> Tensor:
    return x.repeat(1, 1, 3, 1)[:, :, :5]


BAD: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "qk": (with_options(qk="int2"), ValueError, r"qk must be 'int8', 'int4' or 'fp8', got 'int2'"),
    "pv": (with_options(pv="fp16"), ValueError, r"pv must be 'int8', 'fp8' or 'bf16', got 'fp16'"),
    "rank of q": (replaced(q=lambda x: x[0]), ValueError, r"q must have 4 dimensions, .*, got \[20, 4, 64\]"),
    "rank of v": (replaced(v=lambda x: x[None]), ValueError, r"v must have 4 dimensions, .*, got \[1, 2, 20, 2, 64\]"),
    "float64": (
        replaced(q=Tensor.double, k=Tensor.double, v=Tensor.double),
        ValueError,
        "q must be float32, float16 or bfloat16, got torch.float64",
    ),
    "k of another dtype": (
        replaced(k=Tensor.half),
        ValueError,
        "k must have the dtype of q, torch.float32, got torch.float16",
    ),
    "v of another device": (
        replaced(v=lambda x: x.to("meta")),
        ValueError,
        "v must be on the device of q, cpu, got meta",
    ),
    "strided q": (replaced(q=strided), ValueError, r"q must be contiguous in its last dimension, got strides \["),
    "strided v": (replaced(v=strided), ValueError, r"v must be contiguous in its last dimension, got strides \["),
    "batch": (replaced(k=lambda x: x[:1]), ValueError, "k must have the batch size of q, 2, got 1"),
    "head_dim of k": (replaced(k=lambda x: x[..., :32]), ValueError, "k must have the head_dim of q, 64, got 32"),
    "heads": (
        replaced(q=repeated_heads),
        ValueError,
        "the heads of q must be a multiple of those of k, got 5 and 2",
    ),
    "no heads of k": (
        replaced(k=lambda x: x[:, :, :0], v=lambda x: x[:, :, :0]),
        ValueError,
        "the heads of q must be a multiple of those of k, got 4 and 0",
    ),
    "shape of v": (
        replaced(v=lambda x: x[:, :19]),
        ValueError,
        r"v must have the shape of k, \[2, 20, 2, 64\], got \[2, 19, 2, 64\]",
    ),
    "head_dim": (
        replaced(q=lambda x: x[..., :12], k=lambda x: x[..., :12], v=lambda x: x[..., :12]),
        RuntimeError,
        "head_dim must be a multiple of 8 between 8 and 256, got 12",
    ),
    "scale 0": (with_options(scale=0.0), RuntimeError, "scale must be finite and positive, got 0"),
    "scale nan": (with_options(scale=math.nan), RuntimeError, "scale must be finite and positive, got nan"),
    "window": (
        with_options(window=(-2, 0)),
        RuntimeError,
        "window.left must be at least 0, or -1 for no bound, got -2",
    ),
    "window of three": (
        with_options(window=(1, 2, 3)),
        RuntimeError,
        r"window must be \(left, right\), got \[1, 2, 3\]",
    ),
    "blocks": (
        with_options(blocks=torch.ones(1)),
        TypeError,
        r"blocks must be a fastattn\.BlockList, got Tensor",
    ),
    "blocks of other lengths": (
        with_options(blocks=BlockList.dense(seq_q=21, seq_k=20)),
        ValueError,
        "blocks must be for 20 queries and 20 keys, as q and k are, got a list for 21 and 20",
    ),
    "blocks and causal": (
        with_options(blocks=BlockList.dense(seq_q=20, seq_k=20), causal=True),
        ValueError,
        "causal and window must be left out where blocks are given",
    ),
    "blocks and window": (
        with_options(blocks=BlockList.dense(seq_q=20, seq_k=20), window=(1, 1)),
        ValueError,
        "causal and window must be left out where blocks are given",
    ),
    "permutation of grouped heads": (
        with_options(permutation=torch.zeros(1, 4, 20, dtype=torch.int32)),
        ValueError,
        r"permutation needs q and k of equal lengths and, unless it is one for all heads, of equally many heads, got",
    ),
    "permutation's dtype": (
        with_options(permutation=torch.zeros(20)),
        RuntimeError,
        r"permutation must be Int .*, got Float \[1, 1, 20\]",
    ),
    "permutation's length": (
        with_options(permutation=torch.zeros(19, dtype=torch.int32)),
        RuntimeError,
        r"permutation must be Int .* = \[1, 1, 20\], got Int \[1, 1, 19\]",
    ),
    "permutation and straight-through": (
        with_options(permutation=torch.arange(20), straight_through=True),
        ValueError,
        "straight_through and permutation cannot be used together",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD.keys())
def test_refused(arguments: Callable[[], dict[str, Any]], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"^(quantized_attention|quantize_tokens): " + message):
        quantized_attention(**arguments())


PARAMETERS = [
    "q",
    "q_scales",
    "k",
    "k_scales",
    "v",
    "v_scales",
    "v_mean",
    "key_term",
    "counts",
    "indices",
    "full",
    "order",
    "block_size",
    "causal",
    "window",
    "scale",
    "dtype",
]
Given = dict[str, Any]


def changed(**changes: Callable[[Any], Any]) -> Callable[[Given], Given]:
    return lambda given: {**given, **{name: change(given[name]) for name, change in changes.items()}}


def put(**values: Any) -> Callable[[Given], Given]:
    return lambda given: {**given, **values}


COUNTS, INDICES = torch.zeros(2, 4, 2, dtype=torch.int32), torch.zeros(2, 4, 2, 4, dtype=torch.int32)
LISTED = {"counts": COUNTS, "indices": INDICES, "block_size": [64, 64]}

WRONG: dict[str, tuple[Callable[[Given], Given], str]] = {
    "rank of q": (changed(q=lambda x: x[0]), r"q must have 4 dimensions, .* got \[70, 4, 16\]"),
    "dtype of q": (changed(q=Tensor.float), "q must be int8 or float8_e4m3fn, got Float"),
    "dtype of k": (changed(k=Tensor.int), "k must be int8 or float8_e4m3fn, got Int"),
    "formats that differ": (
        changed(k=lambda x: x.view(torch.float8_e4m3fn)),
        "k must have the dtype of q, int8, got float8_e4m3fn",
    ),
    "strided q": (changed(q=strided), r"q must be contiguous in its last dimension, got strides \["),
    "strided v": (changed(v=strided), r"v must be contiguous in its last dimension, got strides \["),
    "integer v": (changed(v=Tensor.int), "v must be float32, float16 or bfloat16, got Int"),
    "rank of v": (changed(v=lambda x: x[0]), "v must have 4 dimensions"),
    "k's batch": (
        changed(k=lambda x: x[:1], k_scales=lambda x: x[:1], v_scales=lambda x: x[:1], v_mean=lambda x: x[:1]),
        "k must have the batch size of q, 2, got 1",
    ),
    "heads": (
        changed(q=lambda x: x[:, :, :3], q_scales=lambda x: x[:, :3]),
        "the heads of q must be a multiple of those of k, got 3 and 2",
    ),
    "head_dim of k": (changed(k=lambda x: x[..., :8]), "k must have the head_dim of q, 16, got 8"),
    "head_dim": (
        changed(
            q=lambda x: x[..., :4],
            k=lambda x: x[..., :4],
            v=lambda x: x[:, :, :4],
            v_scales=lambda x: x[..., :4],
            v_mean=lambda x: x[..., :4],
        ),
        "head_dim must be a multiple of 8 between 8 and 256, got 4",
    ),
    "padding of v": (
        changed(v=lambda x: x[..., :200].contiguous()),
        r"v of 8 bits must be contiguous \[2, 2, 16, 224\], got \[2, 2, 16, 200\]",
    ),
    "v not transposed": (
        changed(v=lambda x: x.transpose(1, 2).contiguous()),
        r"v of 8 bits must be contiguous \[2, 2, 16, 224\], got \[2, 16, 2, 224\]",
    ),
    "dtype of q_scales": (
        changed(q_scales=Tensor.double),
        r"q_scales must be Float \[batch, heads, seq_q\] = \[2, 4, 70\], got Double \[2, 4, 70\]",
    ),
    "shape of q_scales": (
        changed(q_scales=lambda x: x[..., :69]),
        r"q_scales must be Float \[batch, heads, seq_q\] = \[2, 4, 70\], got Float \[2, 4, 69\]",
    ),
    "groups of k_scales": (
        changed(k_scales=lambda x: x[..., :4]),
        r"k_scales must be Float \[batch, kv_heads, groups of 32 keys\] = \[2, 2, 8\], got Float \[2, 2, 4\]",
    ),
    "shape of v_scales": (
        changed(v_scales=lambda x: x[:, :1]),
        r"v_scales must be Float \[batch, kv_heads, head_dim\] = \[2, 2, 16\], got Float \[2, 1, 16\]",
    ),
    "no v_scales": (put(v_scales=None), "v_scales must be given where v has 8 bits, and only there"),
    "v_scales for nothing": (
        put(v=torch.zeros(2, 200, 2, 16)),
        "v_scales must be given where v has 8 bits, and only there",
    ),
    "shape of v as it is": (
        put(v=torch.zeros(2, 199, 2, 16), v_scales=None, v_mean=None),
        r"v must have the shape of k, \[2, 200, 2, 16\], got \[2, 199, 2, 16\]",
    ),
    "shape of v_mean": (
        put(v_mean=torch.zeros(2, 2, 8)),
        r"v_mean must be Float \[batch, kv_heads, head_dim\] = \[2, 2, 16\], got Float \[2, 2, 8\]",
    ),
    "v_mean of wide values": (
        put(v=torch.zeros(2, 200, 2, 16), v_scales=None, v_mean=torch.zeros(2, 2, 16)),
        "v_mean must be given only where v has 8 bits",
    ),
    "shape of key_term": (
        put(key_term=torch.zeros(2, 4, 200)),
        r"key_term must be Float \[batch, heads, padded seq_k\] = \[2, 4, 224\], got Float \[2, 4, 200\]",
    ),
    "dtype": (put(dtype=torch.float64), "dtype must be float32, float16 or bfloat16, got Double"),
    "dtype of values as they are": (
        put(v=torch.zeros(2, 200, 2, 16), v_scales=None, v_mean=None, dtype=torch.float16),
        "dtype must be that of v, Float, or left out, got Half",
    ),
    "counts alone": (put(counts=COUNTS), "counts, indices and block_size must be given together"),
    "block_size alone": (put(block_size=[64, 64]), "counts, indices and block_size must be given together"),
    "full alone": (put(full=INDICES.bool()), "full must be given only where counts is"),
    "window and blocks": (put(window=[1, 1], **LISTED), "window must be left out where counts is given"),
    "block_size of one": (
        put(**{**LISTED, "block_size": [64]}),
        r"block_size must be \(queries, keys\), 64, 128 or 192 and 64 or 128, got \[64\]",
    ),
    "block_size": (
        put(counts=COUNTS[..., :1], indices=INDICES[..., :1, :2], block_size=[70, 100]),
        "a block must have 64, 128 or 192 queries and 64 or 128 keys, got 70 x 100",
    ),
    "rows of counts": (
        put(**{**LISTED, "counts": COUNTS[..., :1]}),
        r"counts must be Int .* = \[2, 4, 2\], got Int \[2, 4, 1\]",
    ),
    "dtype of indices": (put(**{**LISTED, "indices": INDICES.long()}), r"indices must be Int .*, got Long"),
    "dtype of full": (put(**LISTED, full=INDICES), r"full must be Bool .*, got Int"),
    "shape of order": (
        put(order=torch.zeros(1, 1, 69, dtype=torch.int32)),
        r"order must be Int \[batch or 1, heads or 1, tokens\] = \[1, 1, 70\], got Int \[1, 1, 69\]",
    ),
    "dtype of order": (put(order=torch.zeros(1, 4, 70).long()), r"order must be Int .*, got Long \[1, 4, 70\]"),
    "scale": (put(scale=-1.0), "scale must be finite and positive, got -1"),
    "window": (put(window=[0, -3]), "window.right must be at least 0, or -1 for no bound, got -3"),
    "window of one": (put(window=[3]), r"window must be \(left, right\), got \[3\]"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_op_refuses(change: Callable[[Given], Given], message: str) -> None:
    tokens, _ = operands(*tensors(70, 200, head_dim=16), qk="int8", pv="int8")
    given = change({**dict.fromkeys(PARAMETERS), **dict(zip(PARAMETERS, tokens, strict=False)), "causal": False})
    with pytest.raises(RuntimeError, match="^quantized_attention: " + message):
        OP(**given)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_without_cuda() -> None:
    """A CPU-only fastattn, or a CPU-only torch, asked for CUDA."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    tokens, options = operands(*tensors(70, 200, head_dim=16), qk="int8", pv="int8")
    with pytest.raises(RuntimeError, match=r"built without CUDA; pass CPU tensors|this torch has no CUDA"):
        OP.default.redispatch(cuda, *tokens, **options)
