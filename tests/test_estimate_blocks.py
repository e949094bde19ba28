"""`estimate_blocks`: the op bit for bit as defined, and SALE's choice as the reference makes it."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastattn import BlockList, estimate_blocks, quantize_tokens, reference
from fastattn.reference import sale
from fastattn.structured import Structured

OP = torch.ops.fastattn.estimate_blocks
SIZES = [(64, 64), (128, 64), (64, 128), (128, 128)]
THRESHOLDS = (1, 0.1, 0.03, 0.008, 0.002)
OPTIONS: dict[str, Any] = {"block_size": (64, 64), "sink": 1, "window": 1, "causal": True, "scale": 1.0}
each_size = pytest.mark.parametrize("block_size", SIZES, ids=str)
each_causal = pytest.mark.parametrize("causal", [True, False])
each_bits = pytest.mark.parametrize("bits", [4, 8])


# The op.


@dataclass
class Problem:
    """What the op takes."""

    q: Tensor
    q_scales: Tensor
    k: Tensor
    k_scales: Tensor
    floor: Tensor
    key_term: Tensor | None
    group: int
    seq_q: int
    query_stride: int

    @classmethod
    def random(
        cls,
        seq_q: int,
        seq_k: int,
        *,
        batch: int = 2,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        bits: int = 4,
        group: int = 8,
        with_key_term: bool = True,
        query_stride: int = 1,
    ) -> "Problem":
        """Every other block or so is below the floor."""
        limit = 2 ** (bits - 1) - 1

        def integers(seq: int, heads: int) -> Tensor:
            return torch.randint(-limit, limit + 1, (batch, seq, heads, head_dim), dtype=torch.int8)

        judged = -(-seq_q // query_stride)
        groups = seq_k if group == 1 else -(-seq_k // (4 * group)) * 4
        q_scales, k_scales = torch.rand(batch, heads, judged) / limit, torch.rand(batch, kv_heads, groups) / limit
        floor = (0.7 + 0.2 * torch.rand(batch, heads, judged)) * math.sqrt(head_dim)
        key_term = None
        if with_key_term:  # what is past its tokens is not looked at
            key_term = torch.full((batch, heads, -(-seq_k // 32) * 32), math.nan)
            key_term[..., :seq_k] = 0.1 * torch.randn(batch, heads, seq_k)
        q, k = integers(judged, heads), integers(seq_k, kv_heads)
        return cls(q, q_scales, k, k_scales, floor, key_term, group, seq_q, query_stride)

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        return self.q, self.q_scales, self.k, self.k_scales, self.floor, self.key_term

    @property
    def options(self) -> dict[str, int]:
        return {"group": self.group, "seq_q": self.seq_q, "query_stride": self.query_stride}

    def every(self, query_stride: int) -> "Problem":
        """The same with fewer queries judged."""
        own = (self.q[:, ::query_stride], self.q_scales[..., ::query_stride])
        floor = self.floor[..., ::query_stride]
        return replace(self, q=own[0], q_scales=own[1], floor=floor, query_stride=query_stride)

    def run(self, block_size: tuple[int, int], **options: Any) -> BlockList:
        counts, indices = OP(*self.arguments, **self.options, block_size=block_size, **options)
        return self.block_list(counts, indices, block_size, options["causal"])

    def block_list(self, counts: Tensor, indices: Tensor, block_size: tuple[int, int], causal: bool) -> BlockList:
        return BlockList(counts, indices, self.seq_q, self.k.shape[1], block_size, causal=causal)

    def expected(self, block_size: tuple[int, int], *, sink: int, window: int, causal: bool, scale: float) -> BlockList:
        """csrc/ops/estimate_blocks.md, operation by operation."""
        seq_q, seq_k = self.seq_q, self.k.shape[1]
        ratio = self.q.shape[2] // self.k.shape[2]
        token = torch.arange(seq_k)
        group_of_token = token if self.group == 1 else token // (4 * self.group) * 4 + token % 8 // 2
        k, k_scales = self.k.repeat_interleave(ratio, 2), self.k_scales[..., group_of_token].repeat_interleave(ratio, 1)

        product = torch.einsum("bqhd,bkhd->bhqk", self.q.double(), k.double())
        factor = (torch.tensor(scale) * self.q_scales)[..., None] * k_scales[:, :, None]
        term = torch.zeros(1) if self.key_term is None else self.key_term[:, :, None, :seq_k]
        reached = ~(fused_multiply_add(factor, product, term) < self.floor[..., None])

        options: dict[str, Any] = {"seq_q": seq_q, "seq_k": seq_k, "block_size": block_size, "causal": causal}
        seen = reference.band_mask(seq_q, seq_k, causal=causal)[:: self.query_stride]
        scores = torch.where(reached & seen, 0.0, -math.inf)
        mask = sale._block_max(scores, (block_size[0] // self.query_stride, block_size[1])) == 0
        return BlockList.from_mask(mask | BlockList.sink_and_window(sink, window, **options).to_mask(), **options)


def fused_multiply_add(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x · y + z of float32, rounded once. The product is exact in float64, and so is a sum that is rounded to odd."""
    product, z = x.double() * y, z.double()
    total = product + z
    taken = total - product
    lost = (product - (total - taken)) + (z - taken)
    is_even = total.view(torch.int64) % 2 == 0
    other = torch.nextafter(total, lost.sign() * math.inf)
    return torch.where(total.isfinite() & (lost != 0) & is_even, other, total).float()


def assert_same(got: BlockList, expected: BlockList) -> None:
    """What is behind the count too."""
    got.validate()
    assert torch.equal(got.counts, expected.counts.expand_as(got.counts))
    assert torch.equal(got.indices, expected.indices.expand_as(got.indices))


def test_fused_multiply_add_is_rounded_once() -> None:
    one, tiny = torch.tensor(1.0), torch.tensor(2.0**-24)
    assert fused_multiply_add(one + 2 * tiny, one.double(), tiny * (1 - 2.0**-20)) == one + 2 * tiny
    assert fused_multiply_add(one + 2 * tiny, one.double(), tiny * (1 + 2.0**-20)) == one + 4 * tiny
    far = torch.tensor(-(2.0**-70))  # decides a tie, and lies past what float64 holds beside 1
    assert fused_multiply_add(one + tiny.double(), torch.tensor(1.0).double(), far) == 1
    assert fused_multiply_add(one + tiny.double(), torch.tensor(1.0).double(), -far) == one + 2 * tiny


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_bit(data: st.DataObject) -> None:
    def draw(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    edges = [1, 5, 63, 64, 65, 127, 128, 129, 200, 257]
    torch.manual_seed(draw(0, 1, 2))
    heads, kv_heads = draw((4, 2), (3, 1), (2, 2))
    problem = Problem.random(
        draw(*edges),
        draw(*edges, 450),
        batch=draw(1, 2),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(8, 24, 64, 128),
        bits=draw(4, 8),
        group=draw(1, 8, 16, 32),
        with_key_term=draw(True, False),
        query_stride=draw(1, 2, 4, 8, 64),
    )
    options = {"sink": draw(0, 1, 2), "window": draw(0, 1, 2, 5), "causal": draw(True, False), "scale": draw(1.0, 0.3)}
    block_size = draw(*SIZES)
    assert_same(problem.run(block_size, **options), problem.expected(block_size, **options))


@each_bits
def test_half_of_the_blocks_reach_the_floor(bits: int) -> None:
    """Else the tests above and below would show little."""
    blocks = Problem.random(500, 900, bits=bits).run((64, 64), sink=0, window=0, causal=False, scale=1.0)
    assert 0.1 < blocks.counts.sum() / blocks.indices.numel() < 0.9


@pytest.mark.parametrize("head_dim", [8, 16, 40, 72, 136, 248, 256])
@each_bits
def test_head_dims(head_dim: int, bits: int) -> None:
    problem = Problem.random(130, 300, head_dim=head_dim, bits=bits)
    options: dict[str, Any] = {"sink": 1, "window": 1, "causal": True, "scale": 1.0}
    assert_same(problem.run((64, 64), **options), problem.expected((64, 64), **options))


def test_largest_integers_have_an_exact_product() -> None:
    problem = Problem.random(64, 64, head_dim=256, bits=8, batch=1, heads=1, kv_heads=1, with_key_term=False)
    problem.q[:], problem.k[:], problem.q_scales[:], problem.k_scales[:] = 127, 127, 1, 1
    problem.k[0, 7, 0, 3] = 126  # 127 less
    most = 256 * 127**2
    for floor, row in ((most - 127, True), (most, True), (most + 1, False)):
        problem.floor[:] = floor
        listed = problem.run((64, 64), sink=0, window=0, causal=False, scale=1.0).counts.item() == 1
        assert listed is row
    problem.k[:, :, :, 3] = 126
    problem.floor[:] = most - 126
    assert problem.run((64, 64), sink=0, window=0, causal=False, scale=1.0).counts.item() == 0


@pytest.mark.parametrize("group", [8, 16, 32])
@pytest.mark.parametrize("special", [None, math.nan, math.inf, 0.0, 3e38], ids=str)
def test_the_greatest_product_of_a_group_decides(group: int, special: float | None) -> None:
    """Without a key term, as a GPU's threads may judge: one comparison for the keys of a block that share a scale."""
    problem = Problem.random(130, 260, group=group, with_key_term=False)
    if special is not None:
        for scales in (problem.q_scales, problem.k_scales):
            scales[torch.rand(scales.shape) < 0.01] = special
    product = torch.einsum("bqhd,bkhd->bhqk", problem.q.double(), problem.k.repeat_interleave(2, 2).double())
    listed = []
    for block in torch.arange(260).split(64):
        groups = block // (4 * group) * 4 + block % 8 // 2
        reached = torch.zeros(2, 4, 130, dtype=torch.bool)
        for own in groups.unique():
            factor = problem.q_scales * problem.k_scales.repeat_interleave(2, 1)[..., own, None]
            greatest = product[..., block[groups == own]].amax(-1).float()
            reached |= ~(factor * greatest < problem.floor)
        listed.append(torch.stack([rows.any(-1) for rows in reached.split(64, -1)], -1))
    got = problem.run((64, 64), sink=0, window=0, causal=False, scale=1.0).to_mask()
    assert torch.equal(got, torch.stack(listed, -1))


SPECIAL = [math.nan, math.inf, 0.0, 2.0**-100, 3e38, 1e-40]


@pytest.mark.parametrize("where", ["q_scales", "k_scales", "floor", "key_term"])
@pytest.mark.parametrize("value", [*SPECIAL, -math.inf])
@each_causal
def test_what_is_not_finite_and_what_is_extreme(where: str, value: float, causal: bool) -> None:
    problem = Problem.random(200, 300, group=1)
    values = getattr(problem, where)
    values[torch.rand(values.shape) < 0.02] = abs(value) if where.endswith("scales") else value
    options: dict[str, Any] = {"sink": 0, "window": 0, "causal": causal, "scale": 1.0}
    assert_same(problem.run((64, 64), **options), problem.expected((64, 64), **options))


@each_size
@pytest.mark.parametrize("extent", [0, 1, 3, 2**62], ids=str)
@pytest.mark.parametrize("seqs", [(300, 300), (130, 500), (500, 130), (1, 1)], ids=str)
@each_causal
def test_sink_and_window_are_those_of_the_list(
    block_size: tuple[int, int], extent: int, seqs: tuple[int, int], causal: bool
) -> None:
    problem = Problem.random(*seqs, batch=1, heads=1, kv_heads=1, head_dim=8)
    problem.floor[:] = math.inf
    options: dict[str, Any] = {"seq_q": seqs[0], "seq_k": seqs[1], "block_size": block_size, "causal": causal}
    for sink, window in ((extent, 0), (0, extent), (1, extent)):
        got = problem.run(block_size, sink=sink, window=window, causal=causal, scale=1.0)
        bounded = min(sink, 100), min(window, 100)
        assert_same(got, BlockList.sink_and_window(*bounded, **options))


def test_a_key_that_causality_hides_counts_for_nothing() -> None:
    problem = Problem.random(130, 260, batch=1, heads=1, kv_heads=1, group=1, with_key_term=False)
    problem.q[:], problem.k[:], problem.floor[:] = 1, -1, 1e-6
    problem.q_scales[:], problem.k_scales[:] = 1, 1
    problem.k[0, 200] = 1  # seen by queries from 70 on
    listed = problem.run((64, 64), sink=0, window=0, causal=True, scale=1.0).to_mask()
    assert listed.nonzero()[:, 2:].tolist() == [[1, 3], [2, 3]]


@each_size
@each_causal
@pytest.mark.parametrize("seqs", [(500, 900), (900, 500), (257, 257), (63, 300), (1, 1)], ids=str)
def test_fewer_queries_list_no_more(block_size: tuple[int, int], causal: bool, seqs: tuple[int, int]) -> None:
    options: dict[str, Any] = {"sink": 1, "window": 1, "causal": causal, "scale": 1.0}
    problem = Problem.random(*seqs)
    problem.floor *= 1.3
    masks = [problem.every(stride).run(block_size, **options).to_mask() for stride in (1, 2, 4, 8, 64)]
    for more, less in pairwise(masks):
        assert (less <= more).all()
    if min(seqs) == 500:
        assert masks[-1].sum() < masks[0].sum()


def test_what_only_queries_in_between_see_or_need() -> None:
    problem = Problem.random(128, 200, batch=1, heads=1, kv_heads=1, group=1, with_key_term=False)
    problem.q[:], problem.k[:], problem.floor[:] = 1, 1, math.inf
    problem.q_scales[:], problem.k_scales[:] = 1, 1
    problem.floor[..., 5] = -math.inf  # of query 5, which sees keys up to 77

    def listed(query_stride: int) -> list[list[int]]:
        blocks = problem.every(query_stride).run((64, 64), sink=0, window=0, causal=True, scale=1.0)
        return blocks.to_mask()[0, 0].int().tolist()

    assert listed(1) == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert listed(2) == [[0, 0, 0, 0], [0, 0, 0, 0]]
    problem.floor[:] = -math.inf
    assert listed(1) == [[1, 1, 1, 0], [1, 1, 1, 1]]  # queries 56 to 63 see keys from 128 on
    assert listed(8) == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert listed(16) == [[1, 1, 0, 0], [1, 1, 1, 0]]  # 48 does not
    every = problem.every(16).run((64, 64), sink=0, window=1, causal=True, scale=1.0)
    assert every.to_mask()[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]  # blocks are near to all queries


def test_strided_arguments_and_threads() -> None:
    problem = Problem.random(200, 300)
    expected = OP(*problem.arguments, **problem.options, **OPTIONS)

    # Tokens are read in place, with any strides but the last; the others are copied.
    problem.q = torch.cat([problem.q, problem.q], 2)[:, :, :4]
    problem.k = torch.cat([problem.k, problem.k], 3).transpose(1, 2).contiguous().transpose(1, 2)[..., :64]
    for name in ("q_scales", "k_scales", "floor", "key_term"):
        x = getattr(problem, name)
        setattr(problem, name, torch.stack([x, torch.zeros_like(x)], -1)[..., 0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        got = OP(*problem.arguments, **problem.options, **OPTIONS)
    finally:
        torch.set_num_threads(threads)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)
        assert x.is_contiguous()


@pytest.mark.parametrize(
    ("seq_q", "seq_k", "batch", "heads"), [(0, 70, 1, 2), (70, 0, 1, 2), (70, 70, 0, 2), (70, 70, 1, 0), (0, 0, 1, 1)]
)
def test_nothing_to_estimate(seq_q: int, seq_k: int, batch: int, heads: int) -> None:
    problem = Problem.random(seq_q, seq_k, batch=batch, heads=heads, kv_heads=heads, head_dim=8)
    blocks = problem.run((64, 64), sink=1, window=1, causal=True, scale=1.0)
    blocks.validate()
    assert blocks.counts.shape == (batch, heads, -(-seq_q // 64))
    assert torch.count_nonzero(blocks.counts) == blocks.counts.numel() * (seq_k > 0)
    listed = estimate_blocks(torch.zeros(batch, seq_q, heads, 8), torch.zeros(batch, seq_k, heads, 8), 0.1)
    assert listed.counts.shape == (batch, heads, -(-seq_q // 128))


# The choice.


def normal(seq_q: int, seq_k: int, *, batch: int = 1, heads: int = 4, kv_heads: int = 2, head_dim: int = 64):
    return torch.randn(batch, seq_q, heads, head_dim), torch.randn(batch, seq_k, kv_heads, head_dim)


def assert_agrees(q: Tensor, k: Tensor, thresholds: tuple[float, ...] = THRESHOLDS, **options: Any) -> None:
    """With the reference in float64, but for blocks whose score is at the threshold up to rounding."""
    scores = sale.block_scores(q.double(), k.double(), key_dtype=k.dtype, **options)
    for threshold in thresholds:
        blocks = estimate_blocks(q, k, threshold, **options)
        blocks.validate()
        differs = blocks.to_mask() != sale.kept_blocks(scores, threshold)
        margin = (scores[differs] - math.log(threshold)).abs()
        assert (margin < 1e-4).all(), f"{len(margin)} blocks at {threshold}: {margin}"


@each_size
@each_causal
@each_bits
def test_agrees_with_the_reference_where_there_is_structure(
    block_size: tuple[int, int], causal: bool, bits: int
) -> None:
    q, k, _ = Structured(700, heads=4, kv_heads=2, head_dim=128).inputs(dtype=torch.float32)
    assert_agrees(q, k, block_size=block_size, causal=causal, bits=bits)


@each_causal
@each_bits
@pytest.mark.parametrize("smooth_queries", [True, False])
@pytest.mark.parametrize("query_stride", [2, 4, 16, 64])
def test_agrees_with_the_reference_where_fewer_queries_are_judged(
    causal: bool, bits: int, smooth_queries: bool, query_stride: int
) -> None:
    for seq_q, seq_k in ((500, 500), (333, 130), (130, 333), (1, 200)):
        q, k, _ = Structured(500, heads=4, kv_heads=2, head_dim=64).inputs(dtype=torch.float32)
        q, k = q[:, :seq_q], k[:, :seq_k]
        options: dict[str, Any] = {"causal": causal, "bits": bits, "query_stride": query_stride}
        if smooth_queries:
            for block_size in ((64, 64), (128, 64)):
                assert_agrees(q, k, block_size=block_size, **options)
        else:
            options = {"block_size": (64, 64), "smooth_queries": False, **options}
            for threshold in THRESHOLDS:
                few = estimate_blocks(q, k, threshold, **options).to_mask()
                assert (few <= estimate_blocks(q, k, threshold, **{**options, "query_stride": 1}).to_mask()).all()


@each_size
@pytest.mark.parametrize(("seq_q", "seq_k"), [(300, 300), (130, 333), (333, 130), (1, 200), (65, 129)])
@each_causal
def test_threshold_0_lists_all_whatever_is_judged(
    block_size: tuple[int, int], seq_q: int, seq_k: int, causal: bool
) -> None:
    options: dict[str, Any] = {"block_size": block_size, "causal": causal}
    every = BlockList.dense(seq_q=seq_q, seq_k=seq_k, **options)
    for query_stride in (2, 8, 64):
        for window in (1, 2):
            q, k = normal(seq_q, seq_k)
            assert_same(estimate_blocks(q, k, 0, window=window, query_stride=query_stride, **options), every)


SHAPES = [(300, 300), (130, 333), (333, 130), (1, 200), (64, 64), (65, 129), (257, 255), (1, 1)]


@pytest.mark.parametrize(("seq_q", "seq_k"), SHAPES)
@each_causal
def test_agrees_with_the_reference_where_there_is_none(seq_q: int, seq_k: int, causal: bool) -> None:
    q, k = normal(seq_q, seq_k, heads=6, kv_heads=2)
    for block_size in SIZES:
        assert_agrees(q, k, (0.3, 0.1, 0.03), block_size=block_size, causal=causal, scale=0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_agrees_with_the_reference_in_16_bits(dtype: torch.dtype) -> None:
    q, k, _ = Structured(500, heads=4, kv_heads=2, head_dim=64).inputs(dtype=dtype)
    assert_agrees(q, k, block_size=(64, 64))


@pytest.mark.parametrize("near", [(0, 0), (0, 1), (2, 0), (3, 4)], ids=str)
def test_agrees_with_the_reference_for_other_sinks_and_windows(near: tuple[int, int]) -> None:
    q, k, _ = Structured(500, heads=4, kv_heads=2, head_dim=64).inputs(dtype=torch.float32)
    assert_agrees(q, k, block_size=(64, 64), sink=near[0], window=near[1])


@each_causal
@pytest.mark.parametrize(("seq_q", "seq_k"), SHAPES)
def test_least_and_greatest_threshold(seq_q: int, seq_k: int, causal: bool) -> None:
    q, k = normal(seq_q, seq_k)
    for block_size in SIZES:
        options: dict[str, Any] = {"block_size": block_size, "causal": causal}
        shape = {"seq_q": seq_q, "seq_k": seq_k, **options}
        for threshold in (0, -1, -math.inf, torch.zeros(4)):
            assert_same(estimate_blocks(q, k, threshold, **options), BlockList.dense(**shape))
        # A query that sees no key of the sink or the window keeps all that it sees: every query of a block has to.
        first = max(seq_q - seq_k, 0) if causal else 0
        rows = range(-(-first // block_size[0]), -(-seq_q // block_size[0]))
        got, expected = (
            blocks.to_mask().expand(1, 4, -1, -1)[:, :, list(rows)]
            for blocks in (estimate_blocks(q, k, math.inf, **options), BlockList.sink_and_window(1, 2, **shape))
        )
        assert torch.equal(got, expected)


def test_greater_threshold_lists_no_more_and_heads_have_their_own() -> None:
    q, k, _ = Structured(600, heads=4, kv_heads=2, head_dim=64).inputs(dtype=torch.float32)
    thresholds = (0, 1e-4, 1e-3, 0.01, 0.1, 1, math.inf)
    masks = [estimate_blocks(q, k, threshold, block_size=(64, 64)).to_mask() for threshold in thresholds]
    for less, more in pairwise(masks):
        assert (more <= less).all()
    assert len({int(mask.sum()) for mask in masks}) > 4
    for dtype in (torch.float32, torch.float64):
        per_head = torch.tensor([0.0, 0.01, 0.1, math.inf], dtype=dtype)
        mixed = estimate_blocks(q, k, per_head, block_size=(64, 64)).to_mask()
        for head, i in enumerate((0, 3, 4, 6)):
            assert torch.equal(mixed[:, head], masks[i][:, head])


def test_without_sink_and_window_all_is_listed() -> None:
    q, k = normal(300, 200)
    got = estimate_blocks(q, k, 1.0, block_size=(64, 64), sink=0, window=0)
    assert_same(got, BlockList.dense(seq_q=300, seq_k=200, block_size=(64, 64), causal=True))


def test_an_offset_of_all_keys_changes_little_and_of_all_queries_too() -> None:
    """Estimates are of what differs from token to token."""
    q, k, _ = Structured(600, heads=4, kv_heads=2, head_dim=64, query_bias=0, outlier_channels=0).inputs()
    q, k = q.float(), k.float()
    expected = estimate_blocks(q, k, 0.01, block_size=(64, 64)).to_mask()
    keys = k + 20 * torch.randn(1, 1, 2, 64)
    assert (estimate_blocks(q, keys, 0.01, block_size=(64, 64)).to_mask() != expected).float().mean() < 1e-3
    queries = q + 2 * torch.randn(1, 1, 4, 64)
    exact = sale.estimate_blocks(queries.double(), k.double(), 0.01, block_size=(64, 64), bits=None)
    smooth, plain = (
        estimate_blocks(queries, k, 0.01, block_size=(64, 64), smooth_queries=smooth).to_mask() != exact
        for smooth in (True, False)
    )
    assert smooth.sum() < plain.sum() / 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_loses_no_block(bad: float) -> None:
    q, k = normal(300, 300)
    q[0, 200, 1, 3] = bad
    mask = estimate_blocks(q, k, math.inf, block_size=(64, 64)).to_mask()
    every = BlockList.dense(seq_q=300, seq_k=300, block_size=(64, 64), causal=True).to_mask()[0, 0]
    assert torch.equal(mask[0, 1], every)  # smoothed: the mean of the head's queries is not finite
    least = BlockList.sink_and_window(1, 2, seq_q=300, seq_k=300, block_size=(64, 64)).to_mask()[0, 0]
    assert torch.equal(mask[0, 0], least)
    alone = estimate_blocks(q, k, math.inf, block_size=(64, 64), smooth_queries=False).to_mask()[0, 1]
    assert torch.equal(alone[3], every[3])
    assert torch.equal(alone[[0, 1, 2, 4]], least[[0, 1, 2, 4]])
    k[0, 10, 0, 0] = bad
    assert torch.equal(estimate_blocks(q, k, math.inf, block_size=(64, 64)).to_mask()[0, :2], every.expand(2, -1, -1))


def test_keys_that_overflow_when_they_are_smoothed_are_listed() -> None:
    """Far from their mean, as float16 can be: infinite then, and judged as keys that were so before."""
    q, k = (x.half() for x in normal(400, 400))
    k[0, :, 0, 0] = 40000
    dense, least = (
        blocks.to_mask()[0, 0]
        for blocks in (
            BlockList.dense(seq_q=400, seq_k=400, block_size=(64, 64), causal=True),
            BlockList.sink_and_window(1, 2, seq_q=400, seq_k=400, block_size=(64, 64)),
        )
    )

    def listed() -> Tensor:
        return estimate_blocks(q, k, math.inf, block_size=(64, 64)).to_mask()[0]

    assert torch.equal(listed(), least.expand(4, -1, -1)), "an offset of all does not matter"
    k[0, 200, 0, 0] = -40000  # of block 3
    expected = least.clone()
    expected[:, 3] = dense[:, 3]
    expected[3:5] = dense[3:5]  # near it: some queries' mass is not finite
    assert torch.equal(listed(), torch.stack([expected, expected, least, least]))
    k[0, 10, 0, 0] = -40000  # of the sink
    assert torch.equal(listed(), torch.stack([dense, dense, least, least]))


def test_batches_and_heads_are_each_for_themselves() -> None:
    q, k = normal(200, 300, batch=2, heads=6, kv_heads=2)
    mask = estimate_blocks(q, k, 0.1, block_size=(64, 64)).to_mask()
    for b in range(2):
        for h in range(6):
            alone = estimate_blocks(q[b, None, :, h, None], k[b, None, :, h // 3, None], 0.1, block_size=(64, 64))
            assert torch.equal(mask[b, None, h, None], alone.to_mask())


def test_strided_views_are_read_as_they_are() -> None:
    fused = torch.randn(2, 200, 3, 4, 64)
    q, k = fused[:, :, 0], fused[:, :, 1, :2]
    options: dict[str, Any] = {"threshold": 0.2, "block_size": (64, 64)}
    assert_same(estimate_blocks(q, k, **options), estimate_blocks(q.contiguous(), k.contiguous(), **options))


# As torch sees it.


@pytest.mark.parametrize("with_key_term", [True, False])
@pytest.mark.parametrize("query_stride", [1, 4])
def test_opcheck(with_key_term: bool, query_stride: int) -> None:
    problem = Problem.random(70, 130, with_key_term=with_key_term, query_stride=query_stride)
    options = {**OPTIONS, "block_size": (64, 128)}
    torch.library.opcheck(OP.default, problem.arguments, {**problem.options, **options})


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    q, k = normal(200, 300)

    def function(q: Tensor, k: Tensor, threshold: Tensor) -> BlockList:
        return estimate_blocks(q, k, threshold, block_size=(64, 64))

    threshold = torch.tensor([0.02, 0.05, 0.1, 0.2])
    compiled = torch.compile(function, fullgraph=True, backend=backend)(q, k, threshold)
    assert_same(compiled, function(q, k, threshold))


def test_vmap() -> None:
    q, k = torch.randn(3, 2, 200, 4, 64), torch.randn(3, 2, 300, 2, 64)
    mapped = torch.vmap(lambda q, k: estimate_blocks(q, k, 0.1, block_size=(64, 64)).counts)(q, k)
    for i in range(3):
        assert torch.equal(mapped[i], estimate_blocks(q[i], k[i], 0.1, block_size=(64, 64)).counts)


def test_meta_tensors_give_shapes_without_data() -> None:
    q, k = (x.to("meta") for x in normal(200, 300))
    blocks = estimate_blocks(q, k, 0.1, block_size=(64, 128))
    assert blocks.counts.shape == (1, 4, 4)
    assert blocks.indices.shape == (1, 4, 4, 3)


def test_a_choice_is_a_constant() -> None:
    q, k = normal(200, 300)
    threshold = torch.full((4,), 0.1, requires_grad=True)
    blocks = estimate_blocks(q.requires_grad_(), k.requires_grad_(), threshold, block_size=(64, 64))
    assert not blocks.counts.requires_grad


def test_autocast_does_not_touch_the_floor() -> None:
    q, k, _ = Structured(500, heads=4, kv_heads=2, head_dim=64).inputs(dtype=torch.bfloat16)
    expected = estimate_blocks(q, k, 0.01, block_size=(64, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(estimate_blocks(q, k, 0.01, block_size=(64, 64)), expected)


@each_causal
@pytest.mark.parametrize("seqs", [(70, 100), (100, 70), (100, 1), (1, 1), (65, 64)], ids=str)
@pytest.mark.parametrize("query_stride", [1, 2, 64])
def test_flops_are_those_of_all_scores_seen(causal: bool, seqs: tuple[int, int], query_stride: int) -> None:
    problem = Problem.random(*seqs, query_stride=query_stride)
    with FlopCounterMode(display=False) as counter:
        problem.run((64, 64), sink=1, window=1, causal=causal, scale=1.0)
    seen = int(reference.band_mask(*seqs, causal=causal)[::query_stride].sum())
    assert counter.get_total_flops() == 2 * 2 * 4 * 64 * seen


def test_the_scales_of_quantize_tokens_fit() -> None:
    for group in (1, 8, 16, 32):
        low = quantize_tokens(torch.randn(2, 130, 2, 64), format="int4", group=group)
        assert low.scales.shape == Problem.random(70, 130, group=group).k_scales.shape
