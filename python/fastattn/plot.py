"""`fastattn plot neighborhood`: the keys that a query sees, and the tiles that its tile visits."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil, prod, sqrt
from pathlib import Path
from typing import Any

from ._schedule import Schedule, View, ceil_div, with_three_axes
from .plan import Plan, plan
from .simulate import by_axis

EMPTY, PARTIAL, FULL, QUERY, INK = "#e8ecf1", "#f3b94d", "#3f7cac", "#c9184a", "#1f2933"
MOST_SLICES = 9


@dataclass(frozen=True)
class Grid:
    """Cells along three axes, each of a class; seen as slices along the first. Coordinates are those of tokens."""

    title: str
    edges: tuple[Sequence[int], ...]
    class_of: Callable[..., int]
    colours: dict[str, str]
    """Name and colour of each class."""
    query: tuple[int, ...]
    outlines: dict[str, tuple[Sequence[range], Any]]
    """Name, box and line style."""

    @property
    def own_slice(self) -> int:
        """The one that the query is in."""
        return bisect_right(self.edges[0], self.query[0]) - 1


def run(shape: tuple[int, ...], output: Path, *, query: tuple[int, ...] | None, tiles: Any, **arguments: Any) -> None:
    planned = plan(shape, tiles=[tiles] if tiles else None, **arguments)
    query = query or tuple(n // 2 for n in shape)
    if len(query) != len(shape) or not all(0 <= x < n for x, n in zip(query, shape, strict=True)):
        raise ValueError(f"query must be the coordinates of one of {by_axis(shape)} tokens, got {by_axis(query)}")
    if find_spec("matplotlib") is None:
        raise ValueError("it needs matplotlib: pip install 'fastattn[demo]'")
    view = Schedule(shape, planned.options, planned.best.tiles).view(query)
    _draw([_tokens(planned, query, view), _tiles(planned, query, view)], _caption(planned, query, view), output)


def _tokens(planned: Plan, query: Sequence[int], view: View) -> Grid:
    keys = with_three_axes(view.keys, range(1))
    return Grid(
        f"Keys that query {by_axis(query)} sees",
        tuple(range(n + 1) for n in with_three_axes(planned.shape, 1)),
        lambda *token: int(all(x in seen for x, seen in zip(token, keys, strict=True))),
        {"not seen": EMPTY, "seen": FULL},
        with_three_axes(query, 0),
        {},
    )


def _tiles(planned: Plan, query: Sequence[int], view: View) -> Grid:
    """In a dilation group, whose tokens stand one beside the other."""
    tiles = planned.best.tiles
    dilation = tuple(map(min, planned.options.dilation, planned.shape))
    group = tuple(x % d for x, d in zip(query, dilation, strict=True))
    lengths = [ceil_div(n - g, d) for n, g, d in zip(planned.shape, group, dilation, strict=True)]
    keys = [range(seen.start // d, seen.start // d + len(seen)) for seen, d in zip(view.keys, dilation, strict=True)]
    position = [x // d for x, d in zip(query, dilation, strict=True)]
    first = [x // extent * extent for x, extent in zip(position, tiles.q, strict=True)]
    own = [range(x, min(x + extent, n)) for x, extent, n in zip(first, tiles.q, lengths, strict=True)]
    edges = [[*range(0, n, extent), n] for extent, n in zip(tiles.k, lengths, strict=True)]
    grid = with_three_axes(view.grid, 1)
    where = f", in dilation group {by_axis(group)}" if any(d > 1 for d in dilation) else ""
    return Grid(
        f"Key tiles that its query tile visits{where}",
        with_three_axes(edges, [0, 1]),
        lambda a, b, c: view.visits[(a * grid[1] + b) * grid[2] + c],
        {"empty": EMPTY, "partial": PARTIAL, "full": FULL},
        with_three_axes(position, 0),
        {
            "its tile": (with_three_axes(own, range(1)), "-"),
            "its keys": (with_three_axes(keys, range(1)), ":"),
        },
    )


def _caption(planned: Plan, query: Sequence[int], view: View) -> str:
    best, options = planned.best, planned.options
    tokens, seen = prod(planned.shape), prod(map(len, view.keys))
    full, visited = view.visits.count(2), len(view.visits) - view.visits.count(0)
    return (
        f"{by_axis(planned.shape)} tokens, window {by_axis(options.window)}, stride {by_axis(options.stride)}, "
        f"dilation {by_axis(options.dilation)}, causal {by_axis(options.causal)}; "
        f"tiles of {by_axis(best.tiles.q)} queries and {by_axis(best.tiles.k)} keys\n"
        f"This query sees {seen} of {tokens} keys, {seen / tokens:.1%}; its tile visits {visited} of "
        f"{best.counts.key_tiles} key tiles, {visited / best.counts.key_tiles:.1%}, {full} of them full\n"
        f"All queries: {1 / best.speedup_by_mean:.1%} of all tiles visited, {best.full_share:.0%} of these full, "
        f"{best.useful_share:.0%} of the computed scores useful"
    )


def _draw(grids: Sequence[Grid], caption: str, output: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows, columns = (grids[0].edges[axis][-1] for axis in (1, 2))
    is_line = rows == 1
    shown = [_slices(len(grid.edges[0]) - 1, grid.own_slice) for grid in grids]
    across = ceil(sqrt(max(map(len, shown))))
    down = max(ceil_div(len(slices), across) for slices in shown)
    parts: Any
    if is_line:
        figure = pyplot.figure(figsize=(10, 4.2), layout="constrained")
        parts = figure.subfigures(2, 1)
    else:
        height = 5 * min(1.3, max(0.45, rows / columns * down / across))
        figure = pyplot.figure(figsize=(11, height + 1.6), layout="constrained")
        parts = figure.subfigures(1, 2, wspace=0.04)
    for part, grid, slices in zip(parts, grids, shown, strict=True):
        part.suptitle(grid.title, fontsize=12, color=INK, weight="bold")
        panels = part.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat
        for panel, index in zip(panels, slices, strict=False):
            panel.set_aspect("auto" if is_line else "equal")
            _draw_slice(panel, grid, index, 360 / across)
            if len(grid.edges[0]) > 2:
                begin, end = grid.edges[0][index : index + 2]
                where = f"{begin}" if end == begin + 1 else f"{begin} to {end - 1}"
                panel.set_title(f"first axis: {where}", fontsize=9, color=INK)
        for panel in list(panels)[len(slices) :]:
            panel.set_axis_off()
        legend: list[Any] = [
            Patch(facecolor=colour, edgecolor="white", label=name) for name, colour in grid.colours.items()
        ]
        legend.append(Line2D([], [], color=QUERY, linestyle="", marker="o", label="the query"))
        legend += [
            Line2D([], [], color=QUERY, linewidth=2, linestyle=style, label=name)
            for name, (_, style) in grid.outlines.items()
        ]
        part.legend(
            handles=legend,
            loc="outside lower center",
            ncols=len(legend),
            frameon=False,
            fontsize=9,
            columnspacing=1.2,
            handletextpad=0.5,
            handlelength=1.6,
        )
    figure.supxlabel(caption, fontsize=9, color=INK)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    pyplot.close(figure)


def _slices(count: int, own: int) -> list[int]:
    """All, or as many as there is room for and `own` among them."""
    if count <= MOST_SLICES:
        return list(range(count))
    spread = [round(i * (count - 1) / (MOST_SLICES - 1)) for i in range(MOST_SLICES)]
    spread[round(own * (MOST_SLICES - 1) / (count - 1))] = own
    return spread


def _draw_slice(panel: Any, grid: Grid, index: int, points: float) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    _, rows, columns = grid.edges
    cells = [[grid.class_of(index, r, c) for c in range(len(columns) - 1)] for r in range(len(rows) - 1)]
    panel.pcolormesh(
        columns,
        rows,
        cells,
        cmap=ListedColormap(list(grid.colours.values())),
        vmin=0,
        vmax=len(grid.colours) - 1,
        edgecolors="white" if points / len(columns) > 4 else "none",
        linewidth=0.8,
    )
    begin, end = grid.edges[0][index : index + 2]
    for (first, down, right), style in grid.outlines.values():
        if first.start < end and begin < first.stop:
            corner, width, height = (right.start, down.start), len(right), len(down)
            panel.add_patch(
                Rectangle(
                    corner, width, height, fill=False, edgecolor=QUERY, linewidth=2, linestyle=style, clip_on=False
                )
            )
    if index == grid.own_slice:
        panel.plot(grid.query[2] + 0.5, grid.query[1] + 0.5, "o", color=QUERY, markeredgecolor="white")
    panel.set_ylim(rows[-1], 0)
    panel.tick_params(labelsize=8, colors=INK, length=0)
    panel.locator_params(integer=True, nbins=5)
    if len(rows) == 2:
        panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set_visible(False)
