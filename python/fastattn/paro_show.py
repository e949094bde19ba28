"""`fastattn paro show`: the order and the density of each head of a plan, its blocks before reordering and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .attention import attention
from .paro import ORDERS, BlockStatistics, ParoPlan, block_statistics, token_order
from .plot import EMPTY, FULL, INK
from .simulate import by_axis

MOST_HEADS = 12


@dataclass(frozen=True)
class Weights:
    """Attention weights of blocks, ``[query blocks, key blocks]``: their mean over that of uniform attention."""

    as_they_come: Tensor
    in_order: Tensor
    kept: float  # the share of all weight that lies in the plan's blocks


@dataclass(frozen=True)
class Head:
    """What a plan makes of a head; blocks are ``[query blocks, key blocks]``."""

    head: int
    order: str
    density: float
    as_they_come: Tensor  # the share of scores kept, in blocks of the tokens' own order
    in_order: Tensor  # the blocks kept
    weights: Weights | None


def run(
    path: Path,
    output: Path,
    console: Console,
    *,
    bucket: int,
    layer: int,
    heads: Sequence[int] | None,
    samples: Path | None,
) -> None:
    if find_spec("matplotlib") is None:
        raise ValueError("it needs matplotlib: pip install 'fastattn[demo]'")
    plan = ParoPlan.load(path)
    counts = dict(zip(("bucket", "layer", "head"), plan.orders.shape, strict=True))
    chosen = list(range(min(MOST_HEADS, counts["head"]))) if heads is None else list(heads)
    for name, value in (("bucket", bucket), ("layer", layer), *(("head", head) for head in chosen)):
        if not 0 <= value < counts[name]:
            raise ValueError(f"{name} must be in 0 ... {counts[name] - 1}, got {value}")
    shown = look(plan, bucket, layer, chosen, _load(samples, plan) if samples else None)
    text, blocks = f" after {plan.text} of text" if plan.text else "", f"blocks of {by_axis(plan.block_size)}"
    console.print(
        f"{by_axis(plan.grid)} video tokens{text}, {blocks}, bucket {bucket} of {counts['bucket']}",
        highlight=False,
    )
    console.print(_layers(plan, bucket))
    console.print(_heads(plan, bucket, layer, {head.head: head for head in shown}))
    picture = draw(shown, f"{path.name}: bucket {bucket}, layer {layer}, {blocks}")
    output.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(output, dpi=150)
    console.print(f"{output}: heads {', '.join(map(str, chosen))}", highlight=False, soft_wrap=True)


def look(
    plan: ParoPlan, bucket: int, layer: int, heads: Sequence[int], sample: tuple[Tensor, Tensor] | None = None
) -> list[Head]:
    """Of the heads of a layer. The sample is the layer's q and k, ``[batch, seq, heads, head_dim]``."""
    masks, densities = plan.mask(bucket, layer), plan.density(bucket, layer)
    found = []
    for head in heads:
        order, mask = ORDERS[plan.orders[bucket, layer, head]], masks[head].float()
        tokens, natural = token_order(order, plan.grid, plan.text), torch.arange(plan.seq)
        of_queries, of_keys = (_shared(natural, tokens, size) for size in plan.block_size)
        weights = None
        if sample is not None:
            q, k = (x[:, :, head : head + 1] for x in sample)
            before, after = (_statistics(q[:, at], k[:, at], plan.block_size) for at in (natural, tokens))
            as_they_come, in_order = (of.sum[0] / of.count * plan.seq for of in (before, after))
            weights = Weights(as_they_come, in_order, float((after.sum[0] * mask).sum() / plan.seq))
        found.append(Head(head, order, float(densities[head]), of_queries @ mask @ of_keys.T, mask, weights))
    return found


def _shared(natural: Tensor, tokens: Tensor, size: int) -> Tensor:
    """The share of each block of tokens as they come that lies in each block of their order."""
    blocks = -(-len(tokens) // size)
    cells = tokens // size * blocks + natural // size
    shared = torch.bincount(cells, minlength=blocks * blocks).view(blocks, blocks).float()
    return shared / shared.sum(1, keepdim=True)


def _statistics(q: Tensor, k: Tensor, block_size: tuple[int, int]) -> BlockStatistics:
    scale = q.shape[3] ** -0.5
    _, lse = attention(q, k, k, scale=scale, return_lse=True)
    return block_statistics(q, k, lse, scale, block_size, epsilon=0.0)


def _load(path: Path, plan: ParoPlan) -> tuple[Tensor, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"samples must be a safetensors file, got {path}: {error}") from None
    q, k = (list(tensors[name].shape) if name in tensors else [] for name in ("q", "k"))
    wanted = [plan.seq, plan.orders.shape[2]]
    if q != k or len(q) != 4 or q[1:3] != wanted:
        raise ValueError(f"samples must be q and k of [batch, {wanted[0]}, {wanted[1]}, head_dim], got {q} and {k}")
    return tensors["q"], tensors["k"]


def _layers(plan: ParoPlan, bucket: int) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("\nlayer", *(f"{'heads in' if order == ORDERS[0] else ''}\n{order}" for order in ORDERS)):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("density\nmean", "\nleast", "\nmost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer, orders in enumerate(plan.orders[bucket].long()):
        density = plan.density(bucket, layer)
        figures = (density.mean(), density.min(), density.max())
        counts = torch.bincount(orders, minlength=len(ORDERS)).tolist()
        table.add_row(str(layer), *(str(n) if n else "" for n in counts), *(f"{x:.1%}" for x in figures))
    return table


def _heads(plan: ParoPlan, bucket: int, layer: int, shown: dict[int, Head]) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), title=f"Layer {layer}", title_justify="left")
    weighed = any(head.weights for head in shown.values())
    for heading in ("head", "order", "density", *(["weight kept"] if weighed else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for head, (order, density) in enumerate(
        zip(plan.orders[bucket, layer].tolist(), plan.density(bucket, layer).tolist(), strict=True)
    ):
        weights = shown[head].weights if head in shown else None
        kept = [f"{weights.kept:.1%}"] if weights else []
        table.add_row(str(head), ORDERS[order], f"{density:.1%}", *kept)
    return table


def draw(heads: Sequence[Head], caption: str) -> Any:
    """A matplotlib figure: for each head its panels, before reordering and after."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
    from matplotlib.figure import Figure

    colours = LinearSegmentedColormap.from_list("kept", [EMPTY, FULL])
    kept = {"cmap": colours, "norm": Normalize(0, 1)}
    weight = {"cmap": "magma", "norm": LogNorm(1e-2, 1e2, clip=True)}
    rows: list[list[tuple[str, Tensor, dict[str, Any]]]] = []
    for head in heads:
        name, after = f"head {head.head}", f"in order {head.order}, {head.density:.1%}"
        if head.weights is None:
            rows.append([(f"{name}, as tokens come", head.as_they_come, kept), (after, head.in_order, kept)])
        else:
            rows.append(
                [
                    (f"{name}, as tokens come", head.weights.as_they_come, weight),
                    (f"in order {head.order}", head.weights.in_order, weight),
                    (f"kept: {head.density:.1%}, {head.weights.kept:.1%} of weight", head.in_order, kept),
                ]
            )
    wide = len(rows[0])
    across = min(len(rows), 6 // wide)
    down = -(-len(rows) // across)
    figure = Figure(figsize=(2.6 * wide * across, 2.8 * down + 1.2), layout="constrained")
    panels = figure.subplots(down, wide * across, squeeze=False)
    images: dict[str, Any] = {}
    cells = [cell for row in rows for cell in row]
    for panel, (title, blocks, style) in zip(panels.flat, cells, strict=False):
        label = "share of scores kept" if style is kept else "weight over that of uniform attention"
        images[label] = panel.imshow(blocks.numpy(), **style)
        panel.set_title(title, fontsize=9, color=INK)
        panel.tick_params(labelsize=7, colors=INK, length=0)
        panel.locator_params(integer=True, nbins=4)
        for spine in panel.spines.values():
            spine.set_visible(False)
    for panel in list(panels.flat)[len(cells) :]:
        panel.set_axis_off()
    for label, image in images.items():
        bar = figure.colorbar(image, ax=list(panels.flat), location="bottom", shrink=0.4, aspect=40, pad=0.02)
        bar.set_label(label, fontsize=9, color=INK)
        bar.ax.tick_params(labelsize=8, colors=INK)
        bar.outline.set_visible(False)
    figure.suptitle(caption, fontsize=10, color=INK)
    return figure
