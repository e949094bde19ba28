"""The planner: what it counts, what it recommends, what it refuses, and its commands."""

from __future__ import annotations

import re
from importlib.util import find_spec
from itertools import islice, product
from math import ceil, prod
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fastattn import plan, reference
from fastattn._schedule import Schedule
from fastattn.axes import axis_options, per_axis
from fastattn.cli import app
from test_neighborhood import MODELS, Box, assert_figures, problem_of, problems


def arguments_of(problem: tuple[list, Box, Box]) -> tuple[tuple[int, ...], dict]:
    axes, q_box, k_box = problem
    lengths, window, stride, dilation, causal = zip(*axes, strict=True)
    options = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
    return lengths, {**options, "tiles": [(q_box, k_box)]}


# What is counted.


@MODELS
def test_figures_of_the_models(case: str, causal: bool) -> None:
    shape, arguments = arguments_of(problem_of(case, causal))
    best = plan(shape, **arguments).best
    assert_figures(
        case,
        by_max=best.speedup_by_max,
        by_mean=best.speedup_by_mean,
        full=best.full_share,
        useful=best.useful_share,
    )


def tokens_of_tiles(shape: tuple[int, ...], dilation: tuple[int, ...], box: Box) -> torch.Tensor:
    """The tokens of each tile, ``[tiles, slots]``; -1 is padding."""
    axes = []
    for length, step, extent in zip(shape, map(min, dilation, shape), box, strict=True):
        count = ceil(ceil(length / step) / extent) * extent
        groups = [[group + i * step for i in range(count)] for group in range(step)]
        axes.append([group[first : first + extent] for group in groups for first in range(0, count, extent)])
    index = torch.full([2 * n + max(box) * max(dilation) for n in shape], -1)
    index[tuple(slice(n) for n in shape)] = torch.arange(prod(shape)).view(shape)
    return torch.stack(
        [index[torch.meshgrid(*map(torch.tensor, tile), indexing="ij")].flatten() for tile in product(*axes)]
    )


@given(problems())
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_the_mask(problem: tuple[list, Box, Box]) -> None:
    shape, arguments = arguments_of(problem)
    tiles = arguments.pop("tiles")
    best = plan(shape, **arguments, tiles=tiles).best
    mask = reference.neighborhood_mask(shape, **arguments)
    queries, keys = (tokens_of_tiles(shape, arguments["dilation"], box) for box in tiles[0])
    padded = torch.nn.functional.pad(mask, (0, 1, 0, 1))
    kept = padded[queries.flatten()][:, keys.flatten()].view(*queries.shape, *keys.shape)
    visited = kept.any(3).any(1)
    assert (best.counts.query_tiles, best.counts.key_tiles) == visited.shape
    assert best.counts.visited == visited.sum()
    assert best.most_visited == visited.sum(1).max()
    assert best.counts.full == kept.all(3).all(1).sum()
    assert best.counts.kept == int(mask.sum())
    assert best.useful_share <= 1
    assert best.speedup_by_max <= best.speedup_by_mean * (1 + 1e-12)


def test_windows_that_are_the_axes_are_dense() -> None:
    for shape in ((256,), (16, 32), (4, 16, 24)):
        for window in (-1, shape, 1000):
            best = plan(shape, window=window, stride=5 if window == -1 else 1).best
            assert best.counts.visited == best.counts.query_tiles * best.counts.key_tiles
            assert best.useful_share == best.full_share == best.speedup_by_mean == best.speedup_by_max == 1
    ragged = plan((5, 17), window=-1).best
    assert ragged.speedup_by_mean == 1
    assert ragged.useful_share == pytest.approx((5 * 17) ** 2 / (8 * 32) ** 2)


@given(problems(), st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_a_wider_window_never_visits_less(problem: tuple[list, Box, Box], which: int) -> None:
    axes, *boxes = problem
    which %= len(axes)
    assume(axes[which].window != -1)
    wider = [*axes]
    wider[which] = axes[which]._replace(window=axes[which].window + 2)  # one more on either side
    (shape, narrow), (_, wide) = arguments_of((axes, *boxes)), arguments_of((wider, *boxes))
    before, after = plan(shape, **narrow).best.counts, plan(shape, **wide).best.counts
    assert before.visited <= after.visited
    assert before.full <= after.full
    assert before.kept <= after.kept


# What is recommended and predicted.


def recommended(shape: tuple[int, ...], **arguments) -> tuple[int, ...]:
    return plan(shape, **arguments).best.recommended_stride


def test_recommended_strides_of_known_masks() -> None:
    assert recommended((30, 48, 80), window=(18, 24, 24)) == (2, 8, 8)
    assert recommended((16, 44, 80), window=(-1, 12, 24), tiles=[((4, 4, 8), (4, 4, 8))]) == (1, 4, 8)
    assert recommended((256, 256), window=80) == (16, 16)
    assert recommended((32768,), window=2048) == (256,)
    assert recommended((1024,), window=256, causal=True) == (128,)
    assert recommended((64,), window=-1) == (1,)


@given(problems())
@settings(max_examples=60, deadline=None)
def test_no_stride_beats_the_recommended_one(problem: tuple[list, Box, Box]) -> None:
    shape, arguments = arguments_of(problem)
    stride = recommended(shape, **arguments)
    best = plan(shape, **{**arguments, "stride": stride}).best
    candidates = [
        {1} if window == -1 else {s for s in range(1, min(window, length) + 1) if s <= extent or s % extent == 0}
        for window, length, extent in zip(arguments["window"], shape, arguments["tiles"][0][0], strict=True)
    ]
    assert all(s in allowed for s, allowed in zip(stride, candidates, strict=True))
    for other in islice(product(*map(sorted, candidates)), 50):
        figures = plan(shape, **{**arguments, "stride": other}).best
        assert figures.useful_share <= best.useful_share
        if not any(arguments["causal"]):
            assert figures.counts.visited >= best.counts.visited
        if figures.useful_share == best.useful_share:
            assert prod(other) >= prod(stride)


def test_the_best_candidate_computes_the_fewest_scores() -> None:
    boxes = [((4, 4, 8), (4, 4, 8)), ((2, 8, 8), (2, 8, 8)), ((4, 4, 4), (4, 4, 8))]
    planned = plan((36, 48, 48), window=(18, 24, 24), stride=(6, 8, 8), tiles=boxes)
    assert [candidate.tiles for candidate in planned.candidates] == boxes
    assert planned.best.tiles.q == (2, 8, 8)
    assert planned.best.computed_scores == min(candidate.computed_scores for candidate in planned.candidates)


def test_times() -> None:
    problem = {"window": (18, 24, 24), "stride": (2, 8, 8), "heads": 24}
    best = plan((30, 48, 80), **problem).best
    flops = 4 * 24 * 128 * (30 * 48 * 80) * (18 * 24 * 24)
    assert best.seconds == pytest.approx(flops / 697e12)
    assert plan((30, 48, 80), **problem, head_dim=40).best.seconds == pytest.approx(flops / 2 / 545e12)
    assert plan((30, 48, 80), **problem, batch=2, dense_tflops=100).best.seconds == pytest.approx(2 * flops / 100e12)
    assert plan((30, 48, 80), **problem, device="cpu").best.seconds is None


def test_tiles_are_those_of_the_kernels() -> None:
    for device, slots in (("cuda", 128), ("cpu", 64)):
        for axes in (1, 2, 3):
            (candidate,) = plan((64,) * axes, window=8, device=device).candidates
            assert all(len(box) == axes and prod(box) == slots for box in candidate.tiles)


def test_leading_axes_of_length_1_do_not_count() -> None:
    for shape in [(64, 96), (200,)]:
        boxes = plan(shape, window=7).best.tiles
        led = plan((1, *shape), window=(-1,) + (7,) * len(shape)).best
        assert led.tiles == ((1, *boxes.q), (1, *boxes.k))
        assert led.counts == plan(shape, window=7).best.counts


# Options.


def test_options_for_each_axis() -> None:
    assert per_axis("window", 7, 2) == (7, 7)
    assert per_axis("causal", [True, False], 2) == (True, False)
    assert axis_options(2, (5, -1), stride=(5, 9), causal=True) == ((5, -1), (5, 9), (1, 1), (True, True))


BAD = {
    "no axes": ({"shape": ()}, "shape must be one to 3 lengths of at least 1, got ()"),
    "four axes": ({"shape": (2, 2, 2, 2)}, "shape must be one to 3 lengths of at least 1, got (2, 2, 2, 2)"),
    "empty axis": ({"shape": (8, 0)}, "shape must be one to 3 lengths of at least 1, got (8, 0)"),
    "too many tokens": ({"shape": (1 << 20, 1 << 20)}, "shape (1048576, 1048576) must have at most 2147483647 tokens"),
    "windows for three axes": (
        {"window": (3, 3, 3)},
        "window must be one value for all axes or a sequence of 2, one for each, got (3, 3, 3)",
    ),
    "fractional window": ({"window": 3.5}, "window must be one value for all axes or a sequence of 2"),
    "window of text": ({"window": "33"}, "window must be one value for all axes or a sequence of 2"),
    "window 0": ({"window": (3, 0)}, "window must be at least 1, or -1 for the whole axis, got 0 for axis 1"),
    "stride 0": ({"stride": (0, 1)}, "stride must be at least 1 and at most the window, 3, got 0 for axis 0"),
    "stride beyond the window": (
        {"stride": (1, 4)},
        "stride must be at least 1 and at most the window, 3, got 4 for axis 1",
    ),
    "stride 0 of a whole axis": ({"window": -1, "stride": 0}, "stride must be at least 1, got 0 for axis 0"),
    "dilation 0": ({"dilation": 0}, "dilation must be at least 1, got 0 for axis 0"),
    "head_dim 100": ({"head_dim": 100}, "head_dim must be a multiple of 8 from 8 to 128, got 100"),
    "no heads": ({"heads": 0}, "heads must be at least 1, got 0"),
    "no batch": ({"batch": 0}, "batch must be at least 1, got 0"),
    "device": ({"device": "tpu"}, "device must be cuda or cpu, got 'tpu'"),
    "no rate": ({"dense_tflops": 0.0}, "dense_tflops must be positive, got 0.0"),
    "no tiles": ({"tiles": []}, "tiles must be None or name at least one pair of boxes"),
    "tiles of three axes": ({"tiles": [((2, 8, 8), (2, 8, 8))]}, "each 2 extents of at least 1, got ((2, 8, 8), (2"),
    "empty tiles": ({"tiles": [((8, 8), (8, 0))]}, "each 2 extents of at least 1, got ((8, 8), (8, 0))"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD.keys())
def test_refusals(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(**{"shape": (24, 24), "window": 3, **changed})


# What a query sees.


@given(problems(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_view_is_the_row_of_the_mask(problem: tuple[list, Box, Box], data: st.DataObject) -> None:
    shape, arguments = arguments_of(problem)
    (tiles,) = arguments.pop("tiles")
    query = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    planned = plan(shape, **arguments, tiles=[tiles])
    view = Schedule(shape, planned.options, planned.best.tiles).view(query)
    seen = torch.zeros(shape, dtype=torch.bool)
    for key in product(*view.keys):
        seen[key] = True
    row = reference.neighborhood_mask(shape, **arguments).unflatten(0, shape)[query]
    assert torch.equal(seen.flatten(), row)
    assert len(view.visits) == prod(view.grid)
    for key in product(*view.keys):
        tile = 0
        for x, length, dilation, extent, count in zip(
            key, shape, arguments["dilation"], tiles[1], view.grid, strict=True
        ):
            tile = tile * count + x // min(dilation, length) // extent
        assert view.visits[tile] > 0


# Commands.


def invoke(*arguments: str):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_simulate_shows_the_plan_and_what_the_recommended_stride_makes_of_it() -> None:
    result = invoke("simulate", "--shape", "30x48x80", "--window", "18x24x24", "--heads", "24")
    assert result.exit_code == 0, result.output
    rows = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "2x8x8, 2x8x8 1x1x1 165.4 250 900 17% 49% 5.44 3.60 43" in rows
    assert "recommended 2x8x8 81 81 900 100% 100% 11.11 11.11 21.1" in rows
    assert "All tiles: 234 ms" in result.output


def test_simulate_compares_tiles() -> None:
    result = invoke("simulate", "--shape", "36x48x48", "--window", "-1x24x24", "--causal", "1x0x0", "--dilation", "1")
    assert result.exit_code == 0, result.output
    assert "causal 1x0x0" in result.output
    result = invoke("simulate", "--shape=64x64", "--window=16", "--tile=8x8", "--tile=8x8/16x8", "--device=cpu")
    assert result.exit_code == 0, result.output
    assert "8x8, 8x8 " in result.output
    assert "8x8, 16x8 " in result.output


@pytest.mark.parametrize("command", [("simulate",), ("plot", "neighborhood")], ids=" ".join)
def test_commands_refuse_with_one_line(command: tuple[str, ...]) -> None:
    for options, message in (
        (("--shape", "30x", "--window", "3"), "shape must be integers joined by x, such as 30x48x80, got '30x'"),
        (("--shape", "30", "--window", "3", "--stride", "4"), "stride must be at least 1 and at most the window, 3"),
        (("--shape", "30x30", "--window", "3", "--tile", "4x4/4"), "tiles must be pairs of a box"),
    ):
        result = invoke(*command, *options)
        assert result.exit_code == 1
        assert result.output.startswith(f"fastattn {' '.join(command)}: {message}")
        assert result.output.count("\n") == 1


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize(
    "options",
    [
        "--shape 300 --window 33 --stride 4 --tile 16 --causal 1",
        "--shape 24x24 --window 7x7 --stride 2 --query 10x10 --tile 4x4/4x8",
        "--shape 9x60 --window 3x13 --dilation 2x3 --query 1x34 --device cpu",
        "--shape 21x16x24 --window 5x8x8 --query 20x3x7 --dilation 2x1x1",
    ],
)
def test_plot(options: str, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "picture.png"
    result = invoke("plot", "neighborhood", *options.split(), "-o", picture)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_refuses_a_query_outside(tmp_path: Path) -> None:
    result = invoke("plot", "neighborhood", "--shape", "24x24", "--window", "7", "--query", "3x24")
    assert result.exit_code == 1
    assert "query must be the coordinates of one of 24x24 tokens, got 3x24" in result.output
