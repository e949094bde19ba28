"""What a neighborhood costs before anything runs it: the planner."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod

from ._schedule import MAX_AXES, MAX_SLOTS, Counts, Schedule, Tiles, compiled_tiles
from .axes import WHOLE_AXIS, AxisOptions, axis_options

MEASURED_TFLOPS = {64: 545.0, 128: 697.0}
"""Rate of `fastattn.attention`'s forward, by the head_dim that its kernel is compiled for: on an H100, bf16, no mask,
16384 tokens (bench/results/attention.h100.json at commit 0a6fe83)."""


@dataclass(frozen=True)
class TilePlan:
    """What a neighborhood costs in tiles of one shape."""

    tiles: Tiles
    """The boxes of queries and of keys."""
    counts: Counts
    seconds: float | None
    """Predicted; None where no rate is known."""
    recommended_stride: tuple[int, ...]
    """See `plan`."""

    @property
    def mean_visited(self) -> float:
        """Key tiles that a query tile visits."""
        return self.counts.visited / self.counts.query_tiles

    @property
    def most_visited(self) -> int:
        return self.counts.most_visited

    @property
    def full_share(self) -> float:
        """Of the visited tiles, those that need no mask."""
        return self.counts.full / self.counts.visited

    @property
    def computed_scores(self) -> int:
        return self.counts.visited * prod(self.tiles.q) * prod(self.tiles.k)

    @property
    def useful_share(self) -> float:
        """Of the computed scores, those that are kept."""
        return self.counts.kept / self.computed_scores

    @property
    def speedup_by_mean(self) -> float:
        """Bound on the speedup over visiting every tile, which a balanced grid approaches."""
        return self.counts.query_tiles * self.counts.key_tiles / self.counts.visited

    @property
    def speedup_by_max(self) -> float:
        """The bound where all query tiles run at once and the last one is waited for."""
        return self.counts.key_tiles / self.counts.most_visited


@dataclass(frozen=True)
class Plan:
    """A neighborhood, and what it costs in each of the tile shapes considered. Made by `plan`."""

    shape: tuple[int, ...]
    options: AxisOptions
    candidates: tuple[TilePlan, ...]

    @property
    def best(self) -> TilePlan:
        """The candidate that computes the fewest scores."""
        return min(self.candidates, key=lambda candidate: candidate.computed_scores)


def plan(
    shape: Sequence[int],
    *,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    head_dim: int = 128,
    batch: int = 1,
    heads: int = 1,
    device: str = "cuda",
    tiles: Sequence[tuple[Sequence[int], Sequence[int]]] | None = None,
    dense_tflops: float | None = None,
) -> Plan:
    """What neighborhood attention over ``shape`` costs: tiles visited, their use, bounds on the speedup, time.

    Nothing is estimated but the time: the schedule that the kernels walk is run over every query tile, and counted.

    A stride is recommended for each tile shape: of the strides up to the window, the one that leaves the largest share
    of the computed scores useful and, among equals, the smallest. Where no axis is causal every stride keeps as many
    scores, so that it is the stride whose query tiles visit the fewest key tiles on average; where its share is 1 the
    mask is perfectly block-sparse. Axes are counted one at a time, for the kept scores and the visited tiles of a
    neighborhood are both products over its axes. Along an axis, a stride longer than the query tile is considered if it
    is a multiple of it: others cut tiles in two.

    Args:
        shape: lengths of the one, two or three axes of tokens.
        window, stride, dilation, causal: as in neighborhood attention; one value, or one for each axis.
        head_dim: a multiple of 8 up to 128. The GPU kernels compute it as 64 or 128, whichever is next.
        batch, heads: query heads; they multiply the time.
        device: "cuda" or "cpu", whose compiled tile shapes are the candidates.
        tiles: other candidates: pairs of a box of queries and a box of keys, each with an extent for each axis.
        dense_tflops: the rate at which a dense forward runs, in TFLOP/s. By default, for "cuda", that of
            `fastattn.attention` on an H100, in bf16 and without a mask: 545 for head_dim 64 and 697 for 128.

    Returns:
        A `Plan`. Its predicted times are of one forward, and assume that every visited tile costs what a tile costs at
        that dense rate and that the work is spread evenly: masks, starting and waiting come on top.

    Raises:
        ValueError: for an argument that is not allowed, naming it, what came and what is.

    Example:
        >>> best = plan((30, 48, 80), window=(18, 24, 24), heads=24).best
        >>> round(best.speedup_by_mean, 2), round(best.useful_share, 2), best.recommended_stride
        (5.44, 0.49, (2, 8, 8))
    """
    if not 1 <= len(shape) <= MAX_AXES or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise ValueError(f"shape must be one to {MAX_AXES} lengths of at least 1, got {shape}")
    shape = tuple(shape)
    for name, value in (("batch", batch), ("heads", heads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if head_dim % 8 or not 8 <= head_dim <= 128:
        raise ValueError(f"head_dim must be a multiple of 8 from 8 to 128, got {head_dim}")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device must be cuda or cpu, got {device!r}")
    if dense_tflops is not None and not dense_tflops > 0:
        raise ValueError(f"dense_tflops must be positive, got {dense_tflops}")
    options = axis_options(len(shape), window, stride, dilation, causal)
    candidates = [compiled_tiles(shape, device)] if tiles is None else [_tiles_of(pair, shape) for pair in tiles]
    if not candidates:
        raise ValueError("tiles must be None or name at least one pair of boxes, got none")

    computed_dim = head_dim
    if device == "cuda":
        computed_dim = 64 if head_dim <= 64 else 128
        dense_tflops = dense_tflops or MEASURED_TFLOPS[computed_dim]
    flops_per_score = 4 * batch * heads * computed_dim

    def plan_in(tiles: Tiles) -> TilePlan:
        schedule = Schedule(shape, options, tiles)
        for box in tiles:
            if schedule.slots(box) > MAX_SLOTS:
                raise ValueError(
                    f"shape {shape} must have at most {MAX_SLOTS} tokens when padded to boxes of {box}, "
                    f"got {schedule.slots(box)}"
                )
        found = TilePlan(tiles, schedule.count(), None, _recommended_stride(schedule))
        if dense_tflops is None:
            return found
        return replace(found, seconds=flops_per_score * found.computed_scores / (dense_tflops * 1e12))

    return Plan(shape, options, tuple(map(plan_in, candidates)))


def _tiles_of(pair: tuple[Sequence[int], Sequence[int]], shape: Sequence[int]) -> Tiles:
    axes = len(shape)
    boxes = [tuple(box) for box in pair]
    if len(boxes) != 2 or any(len(box) != axes or min(box) < 1 for box in boxes):
        raise ValueError(
            f"tiles must be pairs of a box of queries and a box of keys, each {axes} extents of at least 1, got {pair}"
        )
    return Tiles(*boxes)


def _recommended_stride(schedule: Schedule) -> tuple[int, ...]:
    window, _, dilation, causal = schedule.options
    return tuple(map(_stride_along_axis, schedule.shape, window, dilation, causal, *schedule.tiles))


def _stride_along_axis(length: int, window: int, dilation: int, causal: bool, q_extent: int, k_extent: int) -> int:
    def useful_share(stride: int) -> Fraction:
        options = AxisOptions((window,), (stride,), (dilation,), (causal,))
        counts = Schedule((length,), options, Tiles((q_extent,), (k_extent,))).count()
        return Fraction(counts.kept, counts.visited)

    longest = 1 if window == WHOLE_AXIS else min(window, length)
    strides: list[int] = [*range(1, min(q_extent, longest) + 1), *range(2 * q_extent, longest + 1, q_extent)]
    return max(strides, key=useful_share)  # the first of equals
