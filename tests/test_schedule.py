"""The C++ schedule, attacked directly: it is the mask's definition, and its tiles hold every kept score once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn import reference
from fastattn.attention import kept_scores

fastattn_core = pytest.importorskip(
    "fastattn_core", reason="the C++ core's test module is not on PYTHONPATH (make test)"
)


def band(seq_q: int, seq_k: int, left: int, right: int):
    return fastattn_core.Band(seq_q, seq_k, seq_q + seq_k if left < 0 else left, seq_q + seq_k if right < 0 else right)


def kept_pairs(schedule) -> set[tuple[int, int]]:
    return {(i, j) for i in range(schedule.num_q) for j in range(schedule.num_k) if schedule.keeps(i, j)}


def test_band_is_the_definition_at_every_small_size() -> None:
    for seq_q in range(5):
        for seq_k in range(5):
            for left in range(-1, 6):
                for right in range(-1, 6):
                    keep = reference.band_mask(seq_q, seq_k, window=(left, right))
                    expected = {(i, j) for i, j in keep.nonzero().tolist()}
                    assert kept_pairs(band(seq_q, seq_k, left, right)) == expected
                    assert kept_scores(seq_q, seq_k, window=(left, right)) == len(expected)


sizes = st.integers(0, 70)
sides = st.integers(-1, 90)
tiles = st.integers(1, 24)


@given(sizes, sizes, sides, sides, tiles, tiles)
@settings(max_examples=400, deadline=None)
def test_runs_visit_every_kept_score_once(
    seq_q: int, seq_k: int, left: int, right: int, tile_q: int, tile_k: int
) -> None:
    schedule = band(seq_q, seq_k, left, right)
    visited: set[tuple[int, int]] = set()
    for q_tile in range(-(-seq_q // tile_q)):
        rows = range(q_tile * tile_q, (q_tile + 1) * tile_q)
        end_of_last = 0
        for first, count, full in schedule.runs(q_tile, tile_q, tile_k):
            assert count > 0
            assert first >= end_of_last, "runs ascend and do not overlap"
            end_of_last = first + count
            for k_tile in range(first, first + count):
                columns = range(k_tile * tile_k, (k_tile + 1) * tile_k)
                kept = {(i, j) for i in rows for j in columns if schedule.keeps(i, j)}
                assert kept, "an empty tile is never produced"
                assert not full or len(kept) == tile_q * tile_k, "a full tile holds only kept scores"
                visited |= kept
    assert visited == kept_pairs(schedule)
    assert schedule.is_exact(tile_q, tile_k)


@given(sizes, sizes, sides, sides)
@settings(max_examples=100, deadline=None)
def test_transposed_exchanges_queries_and_keys(seq_q: int, seq_k: int, left: int, right: int) -> None:
    schedule = band(seq_q, seq_k, left, right)
    assert kept_pairs(schedule.transposed()) == {(j, i) for i, j in kept_pairs(schedule)}
