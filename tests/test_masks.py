"""Which scores an op keeps: probed through the op itself, and proved of the C++ schedule by attacking it directly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn import reference
from fastattn.attention import kept_scores

fastattn_core = pytest.importorskip(
    "fastattn_core", reason="the C++ core's test module is not on PYTHONPATH (make test)"
)

PROBES = [
    *((n, n, {}) for n in (1, 64, 65, 129)),
    (129, 193, {"causal": True}),
    (193, 129, {"causal": True}),
    (1, 200, {"causal": True}),
    (200, 1, {"causal": True}),
    (200, 200, {"window": (0, 0)}),
    (200, 200, {"window": (63, 0)}),
    (200, 200, {"window": (64, 65)}),
    (257, 130, {"window": (20, -1)}),
    (130, 257, {"window": (-1, 20)}),
    (190, 190, {"window": (300, 3), "causal": True}),
    (100, 40, {"window": (5, 5)}),
]


@pytest.mark.parametrize(("seq_q", "seq_k", "options"), PROBES)
def test_probe(seq_q: int, seq_k: int, options: dict, device, dtype) -> None:
    """With K = 0 all visible keys weigh the same, and one-hot values name them."""
    head_dim = 128
    keep = reference.band_mask(seq_q, seq_k, **options, device=device)
    visible = torch.zeros_like(keep)
    q = torch.randn(1, seq_q, 1, head_dim, device=device).to(dtype)
    k = torch.zeros(1, seq_k, 1, head_dim, device=device, dtype=dtype)
    for first in range(0, seq_k, head_dim):
        keys = range(first, min(first + head_dim, seq_k))
        v = torch.zeros_like(k)
        v[0, keys, 0, range(len(keys))] = 1
        out, lse = fastattn.attention(q, k, v, **options, return_lse=True)
        visible[:, first : first + len(keys)] = out[0, :, 0, : len(keys)] != 0
    assert torch.equal(visible, keep)
    torch.testing.assert_close(lse[0, 0], keep.sum(-1).float().log(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("seq_q", "seq_k", "options"), PROBES)
def test_count(seq_q: int, seq_k: int, options: dict) -> None:
    assert kept_scores(seq_q, seq_k, **options) == reference.band_mask(seq_q, seq_k, **options).sum().item()


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
