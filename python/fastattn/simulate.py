"""`fastattn simulate`: a plan as a table."""

from collections.abc import Iterable
from math import prod
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .plan import TilePlan, plan


def by_axis(values: Iterable[int]) -> str:
    """As the command line writes them: 30x48x80."""
    return "x".join(str(int(value)) for value in values)


def run(shape: tuple[int, ...], arguments: dict[str, Any], console: Console) -> None:
    """Shows what a problem costs in each candidate's tiles, as it is and with the stride recommended for them."""
    planned = plan(shape, **arguments)
    options = planned.options
    stride = by_axis(options.stride)
    console.print(
        f"{by_axis(shape)} = {prod(shape)} tokens, window {by_axis(options.window)}, "
        f"dilation {by_axis(options.dilation)}, causal {by_axis(options.causal)}",
        highlight=False,
    )
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("tiles of\nqueries, keys", "\nstride"):
        table.add_column(heading, no_wrap=True)
    for heading in ("visits\nmean", "\nmost", "\nof", "\nfull", "\nuseful", "speedup\nmean", "\nmost", "\nms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for candidate in planned.candidates:
        boxes = f"{by_axis(candidate.tiles.q)}, {by_axis(candidate.tiles.k)}"
        table.add_row(boxes, stride, *_figures(candidate), style="bold" if candidate is planned.best else None)
        if candidate.recommended_stride != planned.options.stride:
            changed = {**arguments, "stride": candidate.recommended_stride, "tiles": [candidate.tiles]}
            figures = _figures(plan(shape, **changed).best)
            table.add_row("  recommended", by_axis(candidate.recommended_stride), *figures, style="green")
    console.print(table)
    best = planned.best
    if best.seconds is not None:
        dense = best.seconds * best.speedup_by_mean
        console.print(
            "Times are predicted: a forward whose every visited tile costs what a dense one does. "
            f"All tiles: {dense * 1e3:.3g} ms.",
            highlight=False,
        )


def _figures(candidate: TilePlan) -> list[str]:
    return [
        f"{candidate.mean_visited:.4g}",
        str(candidate.most_visited),
        str(candidate.counts.key_tiles),
        f"{candidate.full_share:.0%}",
        f"{candidate.useful_share:.0%}",
        f"{candidate.speedup_by_mean:.2f}",
        f"{candidate.speedup_by_max:.2f}",
        "" if candidate.seconds is None else f"{candidate.seconds * 1e3:.3g}",
    ]
