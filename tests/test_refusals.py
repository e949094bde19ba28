"""Bad input: refused before anything runs; the message names the argument, what came and what is allowed."""

import re

import pytest
import torch

import fastattn


def tensors(device: str, dtype: torch.dtype, *, seq: int = 6, heads: int = 4, kv_heads: int = 2, head_dim: int = 64):
    def normal(heads: int) -> torch.Tensor:
        return torch.randn(2, seq, heads, head_dim, device=device).to(dtype)

    return {"q": normal(heads), "k": normal(kv_heads), "v": normal(kv_heads)}


def replaced(name: str, change):
    def arguments(device: str, dtype: torch.dtype):
        given = tensors(device, dtype)
        return {**given, name: change(given[name])}

    return arguments


def sized(**sizes: int):
    return lambda device, dtype: tensors(device, dtype, **sizes)


def with_option(**options):
    return lambda device, dtype: {**tensors(device, dtype), **options}


def transposed_storage(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT.contiguous().mT


BAD = {
    "rank 3": (replaced("q", lambda t: t[0]), "q must have 4 dimensions.*got [6, 4, 64]"),
    "rank 5": (replaced("k", lambda t: t[None]), "k must have 4 dimensions.*got [1, 2, 6, 2, 64]"),
    "float64": (replaced("q", lambda t: t.double()), "q must be float32, float16 or bfloat16, got Double"),
    "integers": (replaced("v", lambda t: t.int()), "v must be float32, float16 or bfloat16, got Int"),
    "k of another dtype": (
        replaced("k", lambda t: t.half() if t.dtype != torch.half else t),
        "k must have the dtype of q",
    ),
    "v of another dtype": (replaced("v", lambda t: t.half()), "v must have the dtype of q"),
    "strided last dim": (replaced("q", transposed_storage), "q must be contiguous in its last dimension, got strides"),
    "strided last dim of v": (replaced("v", transposed_storage), "v must be contiguous in its last dimension"),
    "heads": (sized(heads=5), "the heads of q must be a multiple of those of k, got 5 and 2"),
    "no kv heads": (sized(kv_heads=0), "the heads of q must be a multiple of those of k, got 4 and 0"),
    "batch": (replaced("k", lambda t: t[:1]), "k must have the batch size of q, 2, got 1"),
    "v's shape": (replaced("v", lambda t: t[:, :5]), "v must have the shape of k.*got [2, 5, 2, 64]"),
    "k's head_dim": (replaced("k", lambda t: t[..., :32]), "k must have the head_dim of q, 64, got 32"),
    "head_dim 0": (sized(head_dim=0), "head_dim must be a multiple of 8.*got 0"),
    "head_dim 4": (sized(head_dim=4), "head_dim must be a multiple of 8.*got 4"),
    "head_dim 12": (sized(head_dim=12), "head_dim must be a multiple of 8.*got 12"),
    "head_dim 264": (sized(head_dim=264), "head_dim must be.*got 264"),
    "scale nan": (with_option(scale=float("nan")), "scale must be finite and positive, got nan"),
    "scale inf": (with_option(scale=float("inf")), "scale must be finite and positive, got inf"),
    "scale past float32": (with_option(scale=1e300), "scale must be finite and positive, got inf"),
    "scale zero": (with_option(scale=0.0), "scale must be finite and positive, got 0"),
    "window left": (with_option(window=(-2, 0)), "window.left must be at least 0, or -1 for no bound, got -2"),
    "window right": (with_option(window=(0, -3)), "window.right must be at least 0, or -1 for no bound, got -3"),
    "window right under causal": (with_option(window=(0, -3), causal=True), "window.right must be.*got -3"),
    "window of three": (with_option(window=(1, 2, 3)), "window must be (left, right), got [1, 2, 3]"),
}


def pattern(message: str) -> str:
    return re.escape(message).replace(r"\.\*", ".*")


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_refused(arguments, message: str, device, dtype) -> None:
    with pytest.raises(RuntimeError, match="attention: " + pattern(message)):
        fastattn.attention(**arguments(device, dtype))


def test_refused_by_backward(device, dtype) -> None:
    given = tensors(device, dtype)
    out, lse = fastattn.attention(**given, return_lse=True)
    backward = torch.ops.fastattn.attention_backward

    with pytest.raises(RuntimeError, match="attention_backward: dout must have 4 dimensions"):
        backward(out[0], None, *given.values(), out, lse)
    with pytest.raises(RuntimeError, match="attention_backward: dout must have the shape of out"):
        backward(out[:, :3], None, *given.values(), out, lse)
    with pytest.raises(RuntimeError, match=r"attention_backward: dlse must be Float .*batch, heads, seq_q"):
        backward(out, lse.double(), *given.values(), out, lse)
    with pytest.raises(RuntimeError, match=r"attention_backward: lse must be Float .*batch, heads, seq_q"):
        backward(out, None, *given.values(), out, lse[:, :1])
    with pytest.raises(RuntimeError, match=r"attention_backward: window must be \(left, right\), got \[3\]"):
        backward(out, None, *given.values(), out, lse, window=[3])


def test_integer_gradients_are_impossible() -> None:
    with pytest.raises(RuntimeError, match="floating"):
        torch.ones(1, 1, 1, 8, dtype=torch.int32, requires_grad=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["k", "v"])
def test_devices_that_differ(name: str) -> None:
    given = tensors("cuda", torch.bfloat16)
    given[name] = given[name].cpu()
    with pytest.raises(RuntimeError, match=f"attention: {name} must be on the device of q, cuda:0, got cpu"):
        fastattn.attention(**given)


@pytest.mark.gpu
def test_queries_on_the_cpu() -> None:
    given = tensors("cuda", torch.bfloat16)
    given["q"] = given["q"].cpu()
    with pytest.raises(RuntimeError, match="attention: k must be on the device of q, cpu, got cuda:0"):
        fastattn.attention(**given)


@pytest.mark.gpu
def test_float32_on_cuda() -> None:
    with pytest.raises(RuntimeError, match=r"attention: .*float16 or bfloat16.*got float32"):
        fastattn.attention(**tensors("cuda", torch.float32))


@pytest.mark.gpu
def test_wide_heads_on_cuda() -> None:
    with pytest.raises(RuntimeError, match="head_dim must be at most 128 on the GPU, got 136"):
        fastattn.sigmoid_attention(**tensors("cuda", torch.bfloat16, head_dim=136))


def call_cuda_kernel(**given: torch.Tensor):
    """The op's CUDA implementation, whatever the tensors' device: what a CUDA tensor would reach."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return torch.ops.fastattn.attention.default.redispatch(cuda, *given.values())


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_without_cuda() -> None:
    """A CPU-only fastattn, or a CPU-only torch, asked for CUDA."""
    with pytest.raises(RuntimeError, match=r"built without CUDA; pass CPU tensors|this torch has no CUDA"):
        call_cuda_kernel(**tensors("cpu", torch.bfloat16))
