"""PARO in diffusers' video transformers: samples and plans from a model that runs, and a model that runs by a plan.

``CogVideoXTransformer3DModel`` and ``WanTransformer3DModel``. The model's own processors project, normalize and rotate;
only the ``scaled_dot_product_attention`` that they end in is taken over, in self-attention, so that fused projections,
LoRA and other versions of the processors make no difference.
"""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ..paro import ParoLayer, ParoPlan, bucket_of, calibrate_paro, paro_attention
from ..quantize_tokens import Format
from ..quantized_attention import Values

HOOK = "fastattn"


@dataclass(frozen=True)
class _Run:
    """One run of a model."""

    bucket: int
    grid: tuple[int, int, int]  # frames, height, width
    text: int  # tokens before the video
    device: torch.device


_Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]
"""Of a layer and its q, k and v, ``[batch, seq, heads, head_dim]``: the output, or None for the model's own."""

_Begin: TypeAlias = Callable[[_Run], _Attend | None]
"""Called before each run: what attends in it, or None for the model as it is."""


def apply_paro(
    model: nn.Module, plan: ParoPlan, *, scheduler: Any = None, qk: Format | None = None, pv: Values = "bf16"
) -> ExitStack:
    """Runs a model's self-attention by a plan, and leaves all else as it is.

    What is returned takes it off again: by its ``close()``, or at the end of a ``with``. The layers of one bucket of
    the plan are held on the device of the latents and make place for those of the next: 1.2 GB for CogVideoX-5B on 49
    frames, 11 GB for Wan 2.1 14B on 81 frames of 720p.

    Args:
        model: a ``CogVideoXTransformer3DModel`` or ``WanTransformer3DModel``, with the attention backend "native".
            Compile it, or its blocks, after this and without ``fullgraph``: self-attention runs uncompiled.
        plan: for its layers and heads, and for the videos and the length of text that it will be run on.
        scheduler: the pipeline's, which tells the step, and so the bucket, by the timestep that the model gets. The
            host waits for the device once in each run for that. May be None for a plan of one bucket.
        qk, pv: what queries and keys, and values, are rounded to, as in ``paro_attention``; None: nothing is.

    Raises:
        ValueError: if the plan does not fit the model; when it runs, if the plan is for another video or text.
        ImportError: without diffusers.
    """
    blocks = _blocks(model)
    buckets, *extents = plan.orders.shape
    if extents != [len(blocks), blocks[0].attn1.heads]:
        raise ValueError(
            f"apply_paro: plan must be for the model's {len(blocks)} layers of {blocks[0].attn1.heads} heads, "
            f"got {extents[0]} of {extents[1]}"
        )
    held: dict[tuple[int, torch.device], list[ParoLayer]] = {}

    def begin(run: _Run) -> _Attend:
        if (run.grid, run.text) != (plan.grid, plan.text):
            raise ValueError(
                f"apply_paro: the model must run on the plan's grid {plan.grid} and text {plan.text}, "
                f"got {run.grid} and {run.text}"
            )
        at = run.bucket, run.device
        if at not in held:
            held.clear()
            held[at] = [plan.layer(i, bucket=run.bucket, device=run.device) for i in range(len(blocks))]
        layers = held[at]
        return lambda layer, q, k, v: paro_attention(q, k, v, layers[layer], qk=qk, pv=pv)

    return _attach(model, begin, buckets, scheduler)


def record_attention(
    model: nn.Module,
    sink: Callable[[tuple[int, int, Tensor, Tensor, Tensor]], object],
    *,
    buckets: int = 1,
    scheduler: Any = None,
) -> ExitStack:
    """Hands samples for ``calibrate_paro`` to ``sink`` while a model runs, such as to the ``append`` of a list.

    They come from the first run in each bucket of timesteps, layer by layer: ``(bucket, layer, q, k, v)``, after norms
    and rotary embedding, on the model's device. The model's results keep their bits. A run of CogVideoX-5B on 49
    frames makes 28 GB of them with guidance, one of Wan 2.1 14B on 81 frames of 720p 93 GB; ``calibrate_model`` holds
    one layer at a time.

    Arguments, what is returned and what is raised as for ``apply_paro``.

    Example:
        >>> samples = []
        >>> with record_attention(pipe.transformer, samples.append):
        ...     pipe(prompt, num_inference_steps=1)
        >>> bucket, layer, q, k, v = samples[3]
        >>> save_file({"q": q.contiguous(), "k": k.contiguous()}, "layer3.safetensors")  # paro show --layer 3 --samples
    """
    seen: set[int] = set()

    def begin(run: _Run) -> _Attend | None:
        if run.bucket in seen:
            return None
        seen.add(run.bucket)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
            sink((run.bucket, layer, q.detach(), k.detach(), v.detach()))

        return attend

    return _attach(model, begin, buckets, scheduler)


def calibrate_model(
    model: nn.Module,
    generate: Callable[[], object],
    *,
    density: float,
    buckets: int = 1,
    scheduler: Any = None,
    **options: Any,
) -> ParoPlan:
    """A plan for a model, found while ``generate()`` runs it, such as ``lambda: pipe(prompt)``.

    From the first run of the model in each bucket. Each layer is calibrated as its queries, keys and values come, and
    none is kept; the model waits meanwhile. Grid and text are those of the videos that it is run on.

    Args:
        model, buckets, scheduler: as for ``apply_paro``. The model must run in each bucket, so there are no more of
            them than steps, and one for a model that has some of the steps to itself, as each of Wan 2.2 14B's.
        density, options: as for ``calibrate_paro``.

    Raises:
        ValueError: as ``apply_paro`` and ``calibrate_paro``; if ``generate`` leaves out a bucket, or if it changes
            grid or text.
    """
    parts: dict[tuple[int, int], ParoPlan] = {}

    def begin(run: _Run) -> _Attend | None:
        if (run.bucket, 0) in parts:
            return None

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
            parts[run.bucket, layer] = calibrate_paro(
                [(0, 0, q, k, v)], grid=run.grid, text=run.text, density=density, **options
            )

        return attend

    with _attach(model, begin, buckets, scheduler):
        generate()
    layers = range(len(_blocks(model)))
    ran = [bucket for bucket in range(buckets) if all((bucket, layer) in parts for layer in layers)]
    if len(ran) < buckets:
        raise ValueError(
            f"calibrate_model: generate must run all layers in each of buckets 0 ... {buckets - 1}, got {ran}"
        )
    videos = sorted({(part.grid, part.text) for part in parts.values()})
    if len(videos) > 1:
        raise ValueError(f"calibrate_model: generate must keep to one grid and text, got {videos}")
    rows = [[parts[bucket, layer] for layer in layers] for bucket in range(buckets)]
    orders = torch.cat([torch.cat([part.orders for part in row], 1) for row in rows])
    masks = torch.cat([torch.cat([part.masks for part in row], 1) for row in rows])
    return ParoPlan(*videos[0], parts[0, 0].block_size, orders, masks)


def _attach(model: nn.Module, begin: _Begin, buckets: int, scheduler: Any) -> ExitStack:
    """Has ``begin`` called before each run of the model, and what it returns in each layer's self-attention."""
    blocks = _blocks(model)
    if buckets < 1 or (buckets > 1 and scheduler is None):
        raise ValueError(
            f"buckets must be at least 1, and scheduler be given if there are several, got {buckets} and {scheduler}"
        )
    from diffusers.hooks import HookRegistry, ModelHook

    signature = inspect.signature(type(model).forward)
    attend: _Attend | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal attend
        attend = begin(_run(model, signature.bind(model, *args, **kwargs).arguments, buckets, scheduler))

    class Hook(ModelHook):  # type: ignore[misc]
        def __init__(self, layer: int) -> None:
            super().__init__()
            self.layer = layer

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if attend is None:
                return self.fn_ref.original_forward(*args, **kwargs)
            with _TakeOver(self.layer, attend) as products:
                out = self.fn_ref.original_forward(*args, **kwargs)
            if products.count != 1:
                raise RuntimeError(
                    f"layer {self.layer} must call scaled_dot_product_attention once, got {products.count} calls: "
                    "the attention backend must be 'native', and hooks that skip attention be applied after this one"
                )
            return out

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        for layer, block in enumerate(blocks):
            registry = HookRegistry.check_if_exists_or_initialize(block.attn1)
            registry.register_hook(Hook(layer), HOOK)
            stack.callback(registry.remove_hook, HOOK, recurse=False)
        return stack.pop_all()


class _TakeOver(TorchFunctionMode):
    """Asks ``attend`` for each ``scaled_dot_product_attention``, and counts them."""

    def __init__(self, layer: int, attend: _Attend) -> None:
        super().__init__()
        self.layer, self.attend, self.count = layer, attend, 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            self.count += 1
            out = self.attend(self.layer, *_operands(*args, **kwargs))
            if out is not None:
                return out.transpose(1, 2)
        return function(*args, **kwargs)


def _operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``[batch, seq, heads, head_dim]`` of what ``scaled_dot_product_attention`` gets."""
    if attn_mask is not None or dropout_p or is_causal or scale is not None or enable_gqa:
        raise ValueError(
            "self-attention must have no mask, dropout, causality, scale or grouped heads, "
            f"got attn_mask {None if attn_mask is None else list(attn_mask.shape)}, dropout_p {dropout_p}, "
            f"is_causal {is_causal}, scale {scale}, enable_gqa {enable_gqa}"
        )
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _blocks(model: nn.Module) -> Any:
    if find_spec("diffusers") is None:
        raise ImportError("PARO in diffusers' models needs diffusers: pip install 'fastattn[diffusers]'")
    from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel

    if isinstance(model, CogVideoXTransformer3DModel):
        return model.transformer_blocks
    if isinstance(model, WanTransformer3DModel):
        return model.blocks
    raise ValueError(
        f"model must be a CogVideoXTransformer3DModel or WanTransformer3DModel, got {type(model).__name__}"
    )


def _run(model: Any, arguments: dict[str, Any], buckets: int, scheduler: Any) -> _Run:
    from diffusers import WanTransformer3DModel

    latents, config = arguments["hidden_states"], model.config
    if isinstance(model, WanTransformer3DModel):
        extents, patch, text = latents.shape[2:], config.patch_size, 0
    else:
        extents = latents.shape[1], *latents.shape[3:]
        patch = config.patch_size_t or 1, config.patch_size, config.patch_size
        text = arguments["encoder_hidden_states"].shape[1]
    frames, height, width = (extent // size for extent, size in zip(extents, patch, strict=True))
    bucket = _bucket(arguments["timestep"], scheduler, buckets) if buckets > 1 else 0
    return _Run(bucket, (frames, height, width), text, latents.device)


def _bucket(timestep: Any, scheduler: Any, buckets: int) -> int:
    now = torch.as_tensor(timestep).max().item()  # tokens of a frame that is given have 0, not the step's
    steps = [] if scheduler.timesteps is None else scheduler.timesteps.tolist()
    if now not in steps:
        raise ValueError(f"timestep must be one of the {len(steps)} of scheduler, got {now}")
    return bucket_of(steps.index(now), len(steps), buckets)
