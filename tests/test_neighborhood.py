"""Neighborhood attention: its definition, and the C++ schedule and census against it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn import reference

fastattn_core = pytest.importorskip(
    "fastattn_core", reason="the C++ core's test module is not on PYTHONPATH (make test)"
)


class Axis(NamedTuple):
    length: int
    window: int = -1
    stride: int = 1
    dilation: int = 1
    causal: bool = False


Box = tuple[int, ...]


def schedule_of(axes: list[Axis], q_box: Box, k_box: Box):
    """A problem of fewer than three axes leads with axes of length 1."""
    missing = 3 - len(axes)
    return fastattn_core.Neighborhood([Axis(1)] * missing + axes, (1,) * missing + q_box, (1,) * missing + k_box)


def mask_of(axes: list[Axis]) -> torch.Tensor:
    lengths, window, stride, dilation, causal = zip(*axes, strict=True)
    return reference.neighborhood_mask(lengths, window=window, stride=stride, dilation=dilation, causal=causal)


def kept_pairs(mask: torch.Tensor) -> list[tuple[int, int]]:
    return [(q, k) for q, k in mask.nonzero().tolist()]


def windows(axis: Axis) -> list[tuple[int, int]]:
    """First key and end of the keys of each query, of a mask without dilation."""
    rows = [row.nonzero().flatten().tolist() for row in mask_of([axis])]
    assert all(row == list(range(row[0], row[-1] + 1)) for row in rows)
    return [(row[0], row[-1] + 1) for row in rows]


@pytest.mark.parametrize(
    ("axis", "starts"),
    [
        (Axis(8, 4), [0, 0, 0, 1, 2, 3, 4, 4]),
        (Axis(8, 5), [0, 0, 0, 1, 2, 3, 3, 3]),
        (Axis(8, 4, 2), [0, 0, 1, 1, 3, 3, 4, 4]),
        (Axis(9, 5, 3), [0, 0, 0, 2, 2, 2, 4, 4, 4]),
        (Axis(10, 4, 4), [0, 0, 0, 0, 4, 4, 4, 4, 6, 6]),
    ],
)
def test_worked_rows(axis: Axis, starts: list[int]) -> None:
    assert windows(axis) == [(start, start + axis.window) for start in starts]


def test_worked_rows_of_a_causal_axis() -> None:
    expected = [(0, 1), (0, 2), (0, 3), (2, 4), (2, 5), (2, 6), (4, 7), (4, 8)]
    assert windows(Axis(8, 4, 3, causal=True)) == expected
    assert windows(Axis(6, 3, 3, causal=True)) == [(0, 1), (0, 2), (0, 3), (3, 4), (3, 5), (3, 6)]


def test_dilation_is_attention_within_each_group() -> None:
    for dilation in (2, 3, 7):
        mask = mask_of([Axis(11, 3, 2, dilation)])
        for group in range(dilation):
            alone = mask[group::dilation, group::dilation]
            assert torch.equal(alone, mask_of([Axis(len(alone), 3, 2)]))
        assert mask.sum() == sum(mask[group::dilation, group::dilation].sum() for group in range(dilation))


def test_windows_beyond_the_axis_are_the_axis() -> None:
    for window in (-1, 9, 12, 1000):
        assert mask_of([Axis(9, window)]).all()
        assert torch.equal(mask_of([Axis(9, window, 4, causal=True)]), torch.ones(9, 9, dtype=torch.bool).tril())
    assert torch.equal(mask_of([Axis(9, 1), Axis(1)]), torch.eye(9, dtype=torch.bool))


def random_inputs(*axes: int, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, *axes, count, 8, dtype=torch.float64, generator=generator)
        for count in (heads, kv_heads, kv_heads)
    ]


def test_attention_with_the_axes_as_windows_is_dense() -> None:
    q, k, v = random_inputs(2, 3, 4)
    out, lse = reference.neighborhood_attention(q, k, v, window=-1)
    dense, dense_lse = reference.attention(*(x.flatten(1, 3) for x in (q, k, v)))
    torch.testing.assert_close(out.flatten(1, 3), dense)
    torch.testing.assert_close(lse.flatten(2), dense_lse)
    assert lse.shape == (2, 4, 2, 3, 4)


def test_attention_with_dilation_or_blocks_is_attention_in_parts() -> None:
    q, k, v = random_inputs(6, 4)
    dilated, dilated_lse = reference.neighborhood_attention(q, k, v, window=-1, dilation=(3, 1))
    blocked, blocked_lse = reference.neighborhood_attention(q, k, v, window=(2, -1), stride=(2, 4))
    for part in range(3):
        for (out, lse), places in (
            ((dilated, dilated_lse), slice(part, None, 3)),
            ((blocked, blocked_lse), slice(2 * part, 2 * part + 2)),
        ):
            alone, alone_lse = reference.attention(*(x[:, places].flatten(1, 2) for x in (q, k, v)))
            torch.testing.assert_close(out[:, places].flatten(1, 2), alone)
            torch.testing.assert_close(lse[:, :, places].flatten(2), alone_lse)


def test_attention_along_a_causal_axis_is_a_causal_window() -> None:
    q, k, v = random_inputs(9)
    out, lse = reference.neighborhood_attention(q, k, v, window=4, causal=True)
    expected, expected_lse = reference.attention(q, k, v, window=(3, 0))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def every_axis(longest: int) -> Iterator[Axis]:
    for length in range(1, longest + 1):
        for window in (-1, *range(1, length + 2)):
            for stride in range(1, (length if window == -1 else window) + 1):
                for dilation, causal in itertools.product((1, 2, 3, length + 1), (False, True)):
                    yield Axis(length, window, stride, dilation, causal)


@pytest.mark.parametrize(
    ("problems", "box"),
    [
        ([[axis] for axis in every_axis(10)], (3,)),
        ([list(axes) for axes in itertools.product(every_axis(3), repeat=2)][::3], (2, 2)),
    ],
    ids=["one axis", "two axes"],
)
def test_the_mask_is_the_definition_at_every_small_size(problems: list[list[Axis]], box: Box) -> None:
    for axes in problems:
        expected = kept_pairs(mask_of(axes))
        schedule = schedule_of(axes, box, (2,) * len(axes))
        assert sorted(schedule.kept_tokens()) == expected
        assert sorted((q, k) for k, q in schedule.transposed().kept_tokens()) == expected


@st.composite
def axis_of(draw, longest: int) -> Axis:
    length = draw(st.integers(1, longest))
    window = draw(st.one_of(st.just(-1), st.integers(1, length + 2)))
    stride = draw(st.integers(1, length if window == -1 else window))
    dilation = draw(st.one_of(st.just(1), st.integers(1, length + 1)))
    return Axis(length, window, stride, dilation, draw(st.booleans()))


@st.composite
def problems(draw) -> tuple[list[Axis], Box, Box]:
    dimensions = draw(st.integers(1, 3))
    longest = {1: 60, 2: 12, 3: 6}[dimensions]
    box = st.tuples(*[st.integers(1, {1: 16, 2: 6, 3: 4}[dimensions])] * dimensions)
    return [draw(axis_of(longest)) for _ in range(dimensions)], draw(box), draw(box)


@given(problems())
@settings(max_examples=150, deadline=None)
def test_runs_visit_every_kept_score_once(problem: tuple[list[Axis], Box, Box]) -> None:
    axes, q_box, k_box = problem
    mask = mask_of(axes)
    forward = schedule_of(axes, q_box, k_box)
    for schedule, expected in ((forward, mask), (forward.transposed(), mask.T)):
        tile_q, tile_k = schedule.tile_shape()
        queries = [schedule.query_token(slot) for slot in range(schedule.num_q)]
        keys = [schedule.key_token(slot) for slot in range(schedule.num_k)]
        for tokens in (queries, keys):
            assert sorted(token for token in tokens if token >= 0) == list(range(len(mask)))
        # The mask between slots, with one more row and column that stand for padding.
        padded = torch.nn.functional.pad(expected, (0, 1, 0, 1))
        kept = padded[queries][:, keys]
        visited = torch.zeros_like(kept)
        for q_tile in range(schedule.num_q // tile_q):
            rows = slice(q_tile * tile_q, (q_tile + 1) * tile_q)
            end_of_last = 0
            for first, count, full in schedule.runs(q_tile):
                assert count > 0
                assert first >= end_of_last, "runs ascend and do not overlap"
                end_of_last = first + count
                for k_tile in range(first, first + count):
                    columns = slice(k_tile * tile_k, (k_tile + 1) * tile_k)
                    tile = kept[rows, columns]
                    assert tile.any(), "an empty tile is never produced"
                    assert full == bool(tile.all()), "a tile is full when all its scores are kept, and only then"
                    visited[rows, columns] = True
        assert not (kept & ~visited).any(), "every kept score is visited"
        assert schedule.census().kept == int(mask.sum())
        assert schedule.census().visited == int(visited.sum()) // (tile_q * tile_k)
        assert sorted(schedule.kept_tokens()) == kept_pairs(expected)
        assert schedule.is_exact()


# Masks and tiles of well-known models: lengths, window, stride, query box and key box; then, as published or simulated
# before, the bounds on the speedup by the slowest query tile and by the mean, and the percentages of visited tiles that
# are full and of computed scores that are kept. The simulation called a tile full if padding queries
# alone were masked, so that its share of full tiles is met only where query tiles divide the axes.
TABLE = """
32768       2048      1       128     128    15.06  15.11  89    94.5
32768       2048      1       256     128    14.22  14.32  79    89.5
32768       2048      256     128     128    16     16     100   100
32768       2048      2048    128     128    16     16     100   100
256x256     80x80     1x1     16x8    16x8   6.65   7.51   49.5  73
256x256     80x80     1x1     16x16   16x8   6.10   7.06   43    69
256x256     80x80     16x1    16x8    16x8   9.31   9.58   87    94
256x256     80x80     16x16   16x8    16x8   10.24  10.24  100   100
256x256     80x80     16x16   16x16   16x8   10.24  10.24  100   100
128x128     32x32     1x1     16x8    16x8   8.53   9.80   31    61
64x64       32x32     1x1     16x8    16x8   2.13   2.84   47    71
64x64       16x16     1x1     16x8    16x8   3.56   4.65   0     29
256x256     16x16     1x1     16x8    16x8   56.9   60.6   0     24
256x256     32x32     1x1     16x8    16x8   34.1   36.5   25    57
30x48x80    18x24x24  1x1x1   2x8x8   2x8x8  3.60   5.44   17    49
30x48x80    18x24x24  1x1x1   4x8x8   2x8x8  3.27   5.24   15    44
30x48x80    18x24x24  2x1x1   2x8x8   2x8x8  4.00   5.68   18    51
30x48x80    18x24x24  1x1x8   2x8x8   2x8x8  6.00   7.98   46    72
30x48x80    18x24x24  2x1x8   2x8x8   2x8x8  6.67   8.33   50    75
30x48x80    18x24x24  1x8x8   2x8x8   2x8x8  10.0   10.64  91.5  96
30x48x80    18x24x24  2x8x8   2x8x8   2x8x8  11.11  11.11  100   100
30x48x80    18x24x24  2x8x8   4x8x8   2x8x8  10.0   10.67  92    90
30x48x80    30x40x40  1x1x1   2x8x8   2x8x8  1.43   1.88   58    78
30x48x80    30x40x40  1x1x8   2x8x8   2x8x8  2.0    2.25   88    94
30x48x80    30x40x40  1x32x8  2x8x8   2x8x8  2.4    2.4    100   100
33x45x80    19x25x25  1x1x1   4x4x8   4x4x8  4.41   5.49   16    41
33x45x80    18x24x24  2x8x8   2x8x8   2x8x8  8.50   10.97  75    79
16x44x80    16x32x48  1x1x1   4x4x8   4x4x8  1.75   2.08   82    91
16x44x80    16x32x48  1x8x16  4x4x8   4x4x8  2.29   2.29   100   100
16x44x80    16x24x16  1x1x1   4x4x8   4x4x8  5.24   6.09   37    66
16x44x80    16x24x16  1x8x16  4x4x8   4x4x8  9.17   9.17   100   100
16x44x80    -1x12x24  1x4x8   4x4x8   4x4x8  12.2   12.2   100   100
16x44x80    -1x12x24  1x4x8   2x8x8   2x8x8  6.67   7.5    38    52
16x44x80    -1x20x40  1x4x8   4x4x8   4x4x8  4.40   4.40   100   100
16x44x80    -1x20x40  1x4x8   2x8x8   2x8x8  4.0    4.0    50    76
16x44x80    -1x28x56  1x4x8   4x4x8   4x4x8  2.24   2.24   100   100
16x44x80    -1x28x56  1x4x8   2x8x8   2x8x8  1.71   1.98   69    74
16x44x80    -1x12x24  1x1x1   4x4x8   4x4x8  4.40   5.61   13    46
16x44x80    -1x20x40  1x1x1   4x4x8   4x4x8  2.24   3.01   43    68
21x45x80    11x23x39  1x1x1   4x4x8   4x4x8  2.94   4.27   15    37
21x45x80    12x24x24  1x1x1   4x4x8   4x4x8  4.11   5.82   12    36
21x45x80    12x24x24  2x8x8   2x8x8   2x8x8  7.86   9.81   63    72
21x30x52    11x16x16  1x1x1   4x4x8   4x4x8  4.48   5.94   10    30
36x48x48    18x24x24  6x8x8   2x8x8   2x8x8  8.0    8.0    100   100
36x48x48    18x24x24  6x8x8   4x4x8   4x4x8  5.14   6.89   74    86
79x192x192  11x11x11  1x1x1   4x4x4   4x4x8  307    345    0     15
79x192x192  11x11x11  1x1x1   2x4x8   2x8x8  366    395    0     18
16x80x32    11x11x11  1x1x1   4x4x4   4x4x8  5.3    7.8    1     25
18x32x48    3x7x7     1x1x1   4x4x4   2x8x8  13.5   19.8   0     9
36x64x96    3x5x5     1x1x1   4x4x4   2x8x8  108    127    0     4
56x56       7x7       1x1     8x8     16x8   4.67   5.55   0     8
256x256     7x7       1x1     8x8     16x8   85     90     0     7
128x128     17x17     1x1     16x8    16x8   14.2   15.5   0     27
"""
# The first axis is causal.
CAUSAL_TABLE = """
30x32x32    -1x-1x-1  1x1x1   2x8x8   2x8x8  1.00   1.88   88    97
60x64x64    -1x-1x-1  1x1x1   2x8x8   2x8x8  1.00   1.94   94    98
30x64x64    30x16x16  1x1x1   4x4x8   4x4x8  8.5    17.4   24    49
"""


MODELS = pytest.mark.parametrize(
    ("case", "causal"),
    [(case, False) for case in TABLE.strip().splitlines()]
    + [(case, True) for case in CAUSAL_TABLE.strip().splitlines()],
)


def problem_of(case: str, causal: bool) -> tuple[list[Axis], Box, Box]:
    lengths, window, stride, q_box, k_box = (tuple(int(x) for x in field.split("x")) for field in case.split()[:5])
    axes = [Axis(*axis) for axis in zip(lengths, window, stride, strict=True)]
    axes[0] = axes[0]._replace(causal=causal)
    return axes, q_box, k_box


def assert_figures(case: str, *, by_max: float, by_mean: float, full: float, useful: float) -> None:
    """The bounds and the shares are those of the table, as far as it rounds."""
    expected = case.split()[5:]
    rounding = [0.5 * 10.0 ** -len(figure.partition(".")[2]) + 1e-9 for figure in expected]
    axes, q_box, _ = problem_of(case, False)
    divides = all(axis.length % extent == 0 for axis, extent in zip(axes, q_box, strict=True))
    if not divides:
        assert 100 * full <= float(expected[2]) + rounding[2]
        full = float(expected[2]) / 100
    for figure, value, tolerance in zip(expected, (by_max, by_mean, 100 * full, 100 * useful), rounding, strict=True):
        assert value == pytest.approx(float(figure), abs=tolerance)


@MODELS
def test_census_of_the_models(case: str, causal: bool) -> None:
    census = schedule_of(*problem_of(case, causal)).census()
    assert_figures(
        case,
        by_max=census.speedup_by_max(),
        by_mean=census.speedup_by_mean(),
        full=census.full_share(),
        useful=census.useful_share(),
    )
