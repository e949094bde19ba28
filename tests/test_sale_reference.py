"""SALE as written down: its laws, and what its 4 bits find on inputs that have structure."""

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import reference
from fastattn.block_list import BlockList
from fastattn.reference.sale import (
    block_scores,
    calibrate_sale,
    estimate_blocks,
    estimated_scores,
    kept_blocks,
    l1_error,
    sale_attention,
)
from fastattn.structured import Structured

SIZE = (64, 64)
SHAPES = [(300, 300), (130, 333), (333, 130), (1, 200), (64, 64), (65, 129), (1, 1)]


def normal(seq_q: int, seq_k: int, *, batch: int = 1, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor]:
    q, k = torch.randn(batch, seq_q, heads, 64), torch.randn(batch, seq_k, kv_heads, 64)
    return q.double(), k.double()


def near(seq_q: int, seq_k: int, **options: Any) -> Tensor:
    return BlockList.sink_and_window(1, 2, seq_q=seq_q, seq_k=seq_k, block_size=SIZE, **options).to_mask()


# Estimates.


def test_query_mean_is_exact() -> None:
    q, k = normal(100, 150)
    mean = 10 * torch.randn(4, 64).double()
    shift = torch.einsum("hd,bkhd->bhk", mean, k.repeat_interleave(2, dim=2))[:, :, None]
    expected = estimated_scores(q, k, scale=1) + shift
    torch.testing.assert_close(estimated_scores(q + mean, k, scale=1), expected)


# Selection.


@pytest.mark.parametrize(("seq_q", "seq_k"), SHAPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bits", [None, 4])
def test_blocks_are_those_of_the_formula(seq_q: int, seq_k: int, causal: bool, bits: int | None) -> None:
    q, k = normal(seq_q, seq_k)
    threshold, scale = torch.tensor([0.02, 0.05, 0.1, 0.2]), 0.2
    mask = estimate_blocks(q, k, threshold, block_size=SIZE, causal=causal, bits=bits, scale=scale)

    k = k - k.mean(1, keepdim=True)
    exact = scale * torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, dim=2))
    estimate = exact if bits is None else estimated_scores(q, k, scale=scale, bits=bits)
    i, j = torch.arange(seq_q)[:, None] // 64, torch.arange(seq_k) // 64
    seen = reference.band_mask(seq_q, seq_k, causal=causal)
    expected = near(seq_q, seq_k, causal=causal).repeat(1, 4, 1, 1)
    mass = (exact.exp() * (expected[:, :, i, j] & seen)).sum(-1, keepdim=True)
    heavy = seen & (estimate.exp() / mass >= threshold.view(-1, 1, 1))
    batch, head, query, key = heavy.nonzero().unbind(-1)
    expected[batch, head, query // 64, key // 64] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(("seq_q", "seq_k"), SHAPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128), (128, 128)], ids=str)
def test_least_and_greatest_threshold(seq_q: int, seq_k: int, causal: bool, block_size: tuple[int, int]) -> None:
    q, k = normal(seq_q, seq_k)
    options = {"seq_q": seq_q, "seq_k": seq_k, "block_size": block_size, "causal": causal}
    scores = block_scores(q, k, block_size=block_size, causal=causal)
    assert not scores.isnan().any()
    for threshold in (0, -1, -math.inf):
        assert torch.equal(kept_blocks(scores, threshold), BlockList.dense(**options).to_mask().expand_as(scores))
    for threshold in (1e30, math.inf):
        always = BlockList.sink_and_window(1, 2, **options).to_mask()
        assert torch.equal(kept_blocks(scores, threshold), always.expand_as(scores))


def test_greater_threshold_keeps_no_more() -> None:
    scores = block_scores(*normal(500, 700), block_size=SIZE)
    masks = [kept_blocks(scores, threshold) for threshold in (0, 0.01, 0.05, 0.1, 0.2, 0.5, 1, math.inf)]
    for less, more in pairwise(masks):
        assert (more <= less).all()
    assert len({int(mask.sum()) for mask in masks}) > 4
    mixed = kept_blocks(scores, torch.tensor([0.0, 0.1, 0.2, math.inf]))
    for head, mask in enumerate((masks[0], masks[3], masks[4], masks[-1])):
        assert torch.equal(mixed[:, head], mask[:, head])


def test_without_sink_and_window_every_seen_block_is_kept() -> None:
    q, k = normal(300, 200)
    mask = estimate_blocks(q, k, 1.0, block_size=SIZE, sink=0, window=0)
    assert torch.equal(
        mask, BlockList.dense(seq_q=300, seq_k=200, block_size=SIZE, causal=True).to_mask().expand_as(mask)
    )


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_constant_added_to_the_keys_changes_nothing(bits: int | None) -> None:
    q, k = normal(300, 400, batch=2)
    offset = 20 * torch.randn(2, 1, 2, 64).double()
    scores = partial(block_scores, q, block_size=SIZE, bits=bits)
    torch.testing.assert_close(scores(k + offset), scores(k), atol=1e-9, rtol=0)


def test_batches_and_heads_are_each_for_themselves() -> None:
    q, k = normal(200, 300, batch=2, heads=6, kv_heads=2)
    scores = block_scores(q, k, block_size=SIZE)
    for b in range(2):
        for h in range(6):
            alone = block_scores(q[b, None, :, h, None], k[b, None, :, h // 3, None], block_size=SIZE)
            torch.testing.assert_close(scores[b, None, h, None], alone)


def test_exact_estimate_keeps_every_weight_of_at_least_the_threshold() -> None:
    q, k = normal(400, 400)
    blocks = block_scores(q, k, block_size=SIZE, bits=None)
    for threshold in (0.02, 0.05, 0.1):
        _, lse = reference.attention(q, k, k, causal=True)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, dim=2)) / 8
        heavy = ((scores - lse[..., None]).exp() >= threshold) & reference.band_mask(400, 400, causal=True)
        assert heavy.any()
        batch, head, i, j = heavy.nonzero().unbind(-1)
        assert kept_blocks(blocks, threshold)[batch, head, i // 64, j // 64].all()


def test_attention_sees_the_tokens_of_kept_blocks() -> None:
    q, k = normal(200, 300)
    v = torch.randn_like(k)
    mask = estimate_blocks(q, k, 0.3, block_size=SIZE, scale=0.2)
    query, key = torch.arange(200)[:, None] // 64, torch.arange(300) // 64
    keep = mask[:, :, query, key] & reference.band_mask(200, 300, causal=True)
    results = sale_attention(q, k, v, 0.3, block_size=SIZE, scale=0.2)
    for result, expected in zip(results, reference.masked_attention(q, k, v, keep, scale=0.2), strict=True):
        assert torch.equal(result, expected)
    for result, expected in zip(sale_attention(q, k, v, 0), reference.attention(q, k, v, causal=True), strict=True):
        assert torch.equal(result, expected)


# On structured inputs.

THRESHOLDS = (1, 0.1, 0.03, 0.008, 0.002)


@pytest.fixture(scope="module")
def structured() -> tuple[Tensor, Tensor, Tensor]:
    return Structured(1024, heads=4, kv_heads=2).inputs()


@pytest.fixture(scope="module")
def scores(structured: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return block_scores(*structured[:2], block_size=SIZE)


def kept_share(scores: Tensor, threshold: float) -> float:
    """Of the blocks that the threshold decides on."""
    free = scores.isfinite()
    return ((kept_blocks(scores, threshold) & free).sum() / free.sum()).item()


def output_error(inputs: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> Tensor:
    """What it does to each head's output that blocks are left out."""
    q, k, v = inputs
    blocks = BlockList.from_mask(mask, seq_q=q.shape[1], seq_k=k.shape[1], block_size=SIZE, causal=True)
    sparse, _ = reference.block_sparse_attention(q, k, v, blocks)
    dense, _ = reference.attention(q, k, v, causal=True)
    return l1_error(sparse, dense)[0]


def test_four_bits_recall_the_exact_choice(structured: tuple[Tensor, Tensor, Tensor], scores: Tensor) -> None:
    q, k, _ = structured
    exact = block_scores(q, k, block_size=SIZE, bits=None)
    for threshold in THRESHOLDS:
        found, true = (kept_blocks(x, threshold) & exact.isfinite() for x in (scores, exact))
        both = (found & true).sum()
        assert both / true.sum() > 0.9, f"recall at {threshold}"
        assert both / found.sum() > 0.9, f"precision at {threshold}"


def test_error_falls_with_the_threshold(structured: tuple[Tensor, Tensor, Tensor], scores: Tensor) -> None:
    errors = [output_error(structured, kept_blocks(scores, threshold)).mean() for threshold in (*THRESHOLDS, 0)]
    for error, next_error in pairwise(errors):
        assert next_error < error / 1.2
    assert errors[-1] == 0


def test_few_blocks_suffice_where_there_is_structure(structured: tuple[Tensor, Tensor, Tensor], scores: Tensor) -> None:
    share = kept_share(scores, 0.1)
    assert share < 0.2
    assert output_error(structured, kept_blocks(scores, 0.1)).max() < 0.05

    noise = tuple(torch.randn_like(x) for x in structured)
    noise_scores = block_scores(*noise[:2], block_size=SIZE)
    assert kept_share(noise_scores, 0.1) > 0.9, "all blocks are alike"
    threshold = noise_scores[noise_scores.isfinite()].quantile(1 - share).exp().item()
    assert kept_share(noise_scores, threshold) == pytest.approx(share, abs=0.01)
    assert output_error(noise, kept_blocks(noise_scores, threshold)).min() > 0.5, "and none can be left out"


# Calibration.


def test_calibration_halves_until_the_error_is_small() -> None:
    first, second = (Structured(512, heads=4, kv_heads=2, seed=seed).inputs() for seed in range(2))
    theta = 5e-4
    threshold = calibrate_sale([first], theta, block_size=SIZE)
    halvings = (0.008 / threshold).log2()
    assert torch.equal(halvings, halvings.round())
    assert threshold.unique().numel() > 1, "heads differ"

    def error(inputs: tuple[Tensor, Tensor, Tensor], threshold: Tensor) -> Tensor:
        return output_error(inputs, estimate_blocks(*inputs[:2], threshold, block_size=SIZE))

    assert (error(first, threshold) < theta).all()
    lowered = threshold < 0.008
    assert (error(first, 2 * threshold)[lowered] >= theta).all()

    both = calibrate_sale([first, second], theta, block_size=SIZE)
    assert (both <= threshold).all()
    assert (both < threshold).any()
    for sample in (first, second):
        assert (error(sample, both) < theta).all()


def test_calibration_ends_at_the_start_and_at_dense() -> None:
    sample = Structured(300, heads=4, kv_heads=2).inputs()
    assert calibrate_sale([sample], 10, block_size=SIZE).tolist() == [0.008] * 4
    assert calibrate_sale([sample], 0, block_size=SIZE).tolist() == [0] * 4
