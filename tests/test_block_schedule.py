"""The C++ schedule of a block list, attacked directly: its runs and its mask are those of the list's token mask."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastattn.block_list import BlockList, BlockRows

fastattn_core = pytest.importorskip(
    "fastattn_core", reason="the C++ core's test module is not on PYTHONPATH (make test)"
)


def arrays(rows: BlockRows) -> tuple[Any, Any, Any]:
    counts, indices, full = rows
    return counts.numpy(), indices.numpy(), None if full is None else full.numpy()


def schedules_of(blocks: BlockList) -> Any:
    unbounded = blocks.seq_q + blocks.seq_k
    return fastattn_core.BlockLists(
        blocks.seq_q,
        blocks.seq_k,
        unbounded,
        0 if blocks.causal else unbounded,
        *blocks.block_size,
        arrays(BlockRows(blocks.counts, blocks.indices, blocks.full)),
        arrays(blocks.transpose()),
    )


def assert_visits(schedule: Any, mask: Tensor, tile_q: int, tile_k: int) -> None:
    """The runs are those of a mask: every tile that keeps something, once, and full where nothing is cut."""
    assert schedule.supports(tile_q, tile_k)
    seq_q, seq_k = mask.shape
    tiles_q, tiles_k = -(-seq_q // tile_q), -(-seq_k // tile_k)
    padded = torch.zeros(tiles_q * tile_q, tiles_k * tile_k, dtype=torch.bool)
    padded[:seq_q, :seq_k] = mask
    kept = padded.view(tiles_q, tile_q, tiles_k, tile_k).sum((1, 3))
    for q_tile in range(tiles_q):
        visited = [
            (tile, full)
            for first, count, full in schedule.runs(q_tile, tile_q, tile_k)
            for tile in range(first, first + count)
        ]
        expected = [(tile, n == tile_q * tile_k) for tile, n in enumerate(kept[q_tile].tolist()) if n > 0]
        assert visited == expected


sizes = st.sampled_from([64, 128])
tiles = st.sampled_from([64, 96, 128])
lengths = st.integers(1, 600)


@given(
    seq_q=lengths,
    seq_k=lengths,
    block_q=sizes,
    block_k=sizes,
    causal=st.booleans(),
    full=st.booleans(),
    density=st.floats(0, 1),
    tile_q=tiles,
    tile_k=tiles,
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_runs_and_keeps_are_the_token_mask(
    seq_q: int,
    seq_k: int,
    block_q: int,
    block_k: int,
    causal: bool,
    full: bool,
    density: float,
    tile_q: int,
    tile_k: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    shape = (2, 2, -(-seq_q // block_q), -(-seq_k // block_k))
    blocks = BlockList.from_mask(
        torch.rand(shape) < density,
        full=torch.rand(shape) < 0.2 if full else None,
        seq_q=seq_q,
        seq_k=seq_k,
        block_size=(block_q, block_k),
        causal=causal,
    )
    schedules, masks = schedules_of(blocks), blocks.token_mask()
    for b in range(2):
        for h in range(2):
            schedule, mask = schedules.at(b, h), masks[b, h]
            assert_visits(schedule, mask, tile_q, tile_k)
            assert_visits(schedule.transposed(), mask.T, tile_k, tile_q)
            for q, k in zip(torch.randint(seq_q, (50,)).tolist(), torch.randint(seq_k, (50,)).tolist(), strict=True):
                assert schedule.keeps(q, k) == schedule.transposed().keeps(k, q) == bool(mask[q, k])


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (1, 2)])
def test_an_extent_of_one_is_shared(batch: int, heads: int) -> None:
    blocks = BlockList.from_mask(torch.rand(batch, heads, 5, 4) < 0.5, seq_q=600, seq_k=500)
    schedules, masks = schedules_of(blocks), blocks.token_mask().expand(2, 2, 600, 500)
    for b in range(2):
        for h in range(2):
            assert_visits(schedules.at(b, h), masks[b, h], 128, 128)
            assert_visits(schedules.at(b, h).transposed(), masks[b, h].T, 128, 128)


def test_lists_made_by_hand_may_reach_beyond_the_diagonal() -> None:
    dense = BlockList.dense(seq_q=300, seq_k=500)
    blocks = BlockList(dense.counts, dense.indices, 300, 500, causal=True)
    schedule, mask = schedules_of(blocks).at(0, 0), blocks.token_mask()[0, 0]
    for tile_q in (64, 96, 128, 192, 256):
        for tile_k in (64, 96, 128, 192, 256):
            assert_visits(schedule, mask, tile_q, tile_k)
            assert_visits(schedule.transposed(), mask.T, tile_q, tile_k)
            assert schedule.is_exact(tile_q, tile_k)


def test_supports_tiles_that_meet_at_most_two_blocks() -> None:
    schedule = schedules_of(BlockList.dense(seq_q=300, seq_k=500, block_size=(64, 128))).at(0, 0)
    for of_queries, block in ((True, 64), (False, 128)):
        for tile in range(1, 300):
            most = max((start + tile - 1) // block - start // block + 1 for start in range(0, 64 * tile, tile))
            assert schedule.supports(*((tile, 128) if of_queries else (64, tile))) == (most <= 2 or tile == 1)


@pytest.mark.parametrize("causal", [False, True])
def test_empty_rows_and_empty_problems(causal: bool) -> None:
    mask = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    mask[0, 0, 2, 0] = True
    schedule = schedules_of(BlockList.from_mask(mask, seq_q=300, seq_k=500, causal=causal)).at(0, 0)
    assert [schedule.runs(q_tile, 128, 128) for q_tile in range(2)] == [[], []]
    for seq_q, seq_k in ((0, 0), (0, 500), (300, 0)):
        schedule = schedules_of(BlockList.dense(seq_q=seq_q, seq_k=seq_k, causal=causal)).at(0, 0)
        assert schedule.is_exact(128, 128)
        assert schedule.transposed().is_exact(128, 128)
