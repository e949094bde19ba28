"""What torch must know of an op beside its kernels: one row of a table, one function that registers a row.

The kernels are C++ and come from the op library. Schema, shapes without data (fake), gradient, behaviour under autocast
and vmap, and the FLOP count are the fields of `Op`; each op's module fills in one row for its forward and one for its
backward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "fastattn"
_library = torch.library.Library(NAMESPACE, "DEF")
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}

OPS: dict[str, "Op"] = {}


@dataclass(frozen=True)
class Op:
    name: str
    schema: str
    """Parameters and results, as torch writes them. All-tensor parameters come first, options are keyword-only."""
    fake: Callable[..., Any]
    """Results without data. Strides are those of the kernels' results: contiguous."""
    flops: Callable[..., int]
    """Floating-point operations of a call, from the shapes of its tensors."""
    flops_read_data: bool = False
    """`flops` takes the tensors themselves: how much is computed is written in them."""
    setup_context: Callable[..., None] | None = None
    """Keeps what `backward` needs: of the context, all tensors, all options, and the results."""
    backward: Callable[..., Any] | None = None
    """Gradients of the tensor parameters; None: a call to differentiate the op is an error."""
    why_no_gradient: str = (
        "double backward is not supported. Call backward() without create_graph=True, or use "
        "torch.nn.functional.scaled_dot_product_attention with its math backend."
    )
    """Without `backward`: what that error says."""
    autocast: int = 0
    """Under autocast, so many of the first tensors are cast to autocast's dtype."""
    has_batch: bool = True
    """Do its tensors begin with one? Only then can vmap add to it."""


# What the ops' rows share.


def is_deterministic(deterministic: bool | None) -> bool:
    """What an op is told: None follows torch."""
    return torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic


def needed_gradients(ctx: Any) -> tuple[bool, ...]:
    """In `Op.backward`: which of the tensor parameters want a gradient."""
    _keys, _options, *needed = ctx.needs_input_grad
    return tuple(needed)


def gradient_fake(tensor: Tensor, wanted: bool) -> Tensor:
    """An op returns no elements for what is not wanted."""
    return tensor.new_empty(tensor.shape if wanted else (0,))


def only_wanted(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(gradient if is_wanted else None for gradient, is_wanted in zip(gradients, wanted, strict=True))


def backward_flops_per_score(wanted: Sequence[bool], head_dim: int, value_dim: int) -> int:
    """All of dq, dk and dv take five matrix products; `wanted` may go on with gradients that are sums."""
    dq, dk, dv, *sums = wanted
    of_scores = dq or dk or any(sums)
    return 2 * (head_dim * ((of_scores or dv) + dq + dk) + value_dim * (of_scores + dv))


def register(op: Op) -> None:
    name = f"{NAMESPACE}::{op.name}"
    _library.define(f"{op.name}{op.schema}", tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    torch.library.register_fake(name, op.fake, lib=_library)
    packet = getattr(getattr(torch.ops, NAMESPACE), op.name)
    _library.impl(op.name, _autograd(op, packet.default), "Autograd", with_keyset=True)
    rule = _merge_into_batch(op.name, packet) if op.has_batch else _refuse_vmap(op.name)
    torch.library.register_vmap(name, rule, lib=_library)
    register_flop_formula(packet, get_raw=op.flops_read_data)(op.flops)
    if op.autocast:
        for device, key in _AUTOCAST_KEYS.items():
            _library.impl(op.name, _autocast(packet.default, device, op.autocast), key)
    OPS[op.name] = op


def _autograd(op: Op, overload: Any) -> Callable[..., Any]:
    """As torch's own registration of gradients, which reads the schema anew in each call that needs them.

    That took 24 of the 42 µs of a call of one token on a CPU.
    """
    parameters = overload._schema.arguments
    tensors_of_op = sum(not parameter.kwarg_only for parameter in parameters)
    defaults = {parameter.name: parameter.default_value for parameter in parameters if parameter.kwarg_only}
    below = torch._C._after_autograd_keyset
    backward = op.backward or _refuse_gradient(op)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: Any, options: dict[str, Any], *tensors: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                results = overload.redispatch(keys & below, *tensors, **options)
            if op.setup_context is not None:
                op.setup_context(ctx, tensors, options, results)
            return results

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return None, None, *backward(ctx, *gradients)

    def kernel(keys: Any, *tensors: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
            # The dispatcher has left out what has its default value.
            missing = (None,) * (tensors_of_op - len(tensors))
            return Gradient.apply(keys, {**defaults, **options}, *tensors, *missing)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & below, *tensors, **options)

    return kernel


def _refuse_gradient(op: Op) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(f"fastattn::{op.name} has no gradient: {op.why_no_gradient}")

    return backward


def _merge_into_batch(name: str, packet: Any) -> Callable[..., Any]:
    """vmap: a tensor of an op has its batch in front, so the new dimension becomes a part of that.

    A vector, such as a bias for each head, has no batch: it is the same for all, and cannot be mapped. Block lists,
    permutations, rectangles, segments and biases of keys, which are int32 or bool or lack a dimension, may share one
    batch entry: it is repeated.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *tensors: Any, **options: Any) -> Any:
        size, batch = info.batch_size, tensors[0].shape[1 if in_dims[0] == 0 else 0]

        def merged(tensor: Any, dim: int | None) -> Any:
            if tensor is None:
                return None
            if tensor.dim() - (dim is not None) == 1:
                if dim is not None or (name.endswith("_backward") and tensor.is_floating_point()):
                    raise NotImplementedError(f"fastattn::{name}: vmap over a bias, or over its gradient")
                return tensor
            batched = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            if (tensor.dtype in (torch.int32, torch.bool) or batched.dim() < 5) and batched.shape[1] == 1:
                batched = batched.expand(-1, batch, *batched.shape[2:])
            return batched.flatten(0, 1)

        def split(result: Any) -> Any:
            return result.unflatten(0, (size, result.shape[0] // size))

        results = packet(*(merged(tensor, dim) for tensor, dim in zip(tensors, in_dims, strict=True)), **options)
        if isinstance(results, torch.Tensor):
            return split(results), 0
        return tuple(map(split, results)), (0,) * len(results)

    return rule


def _refuse_vmap(name: str) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *tensors: Any, **options: Any) -> Any:
        raise NotImplementedError(f"fastattn::{name} has no batch that vmap could add to")

    return rule


def _autocast(overload: Any, device: str, count: int) -> Callable[..., Any]:
    # torch.library.register_autocast takes one fixed dtype and refuses keyword arguments.
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _AUTOCAST_KEYS[device]))

    def cast(value: Any, dtype: torch.dtype) -> Any:
        castable = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if castable else value

    def kernel(*tensors: Any, **options: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(*(cast(tensor, dtype) for tensor in tensors[:count]), *tensors[count:], **options)

    return kernel
