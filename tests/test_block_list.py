"""Block lists: masks to lists and back, on the device without waiting for it, and the C++ schedule that reads them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils import _pytree as pytree

from fastattn import reference
from fastattn.block_list import BlockList, BlockRows

BLOCK_SIZES = [(64, 64), (64, 128), (128, 64), (128, 128), (192, 128)]


def grid(seq_q: int, seq_k: int, block_size: tuple[int, int]) -> tuple[int, int]:
    return -(-seq_q // block_size[0]), -(-seq_k // block_size[1])


def random_mask(*shape: int, density: float = 0.5, device: str = "cpu") -> Tensor:
    return torch.rand(shape, device=device) < density


def random_list(
    seq_q: int, seq_k: int, *, batch: int = 1, heads: int = 2, causal: bool = False, full: bool = False, **options: Any
) -> BlockList:
    shape = (batch, heads, *grid(seq_q, seq_k, options.get("block_size", (128, 128))))
    flags = random_mask(*shape, density=0.2) if full else None
    return BlockList.from_mask(random_mask(*shape), seq_q=seq_q, seq_k=seq_k, causal=causal, full=flags, **options)


def assert_same(a: BlockList, b: BlockList) -> None:
    assert torch.equal(a.to_mask(), b.to_mask())
    assert torch.equal(a.token_mask(), b.token_mask())
    assert (a.seq_q, a.seq_k, a.block_size, a.causal) == (b.seq_q, b.seq_k, b.block_size, b.causal)


# Masks.


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_mask_to_list_and_back(block_size: tuple[int, int], batch: int, heads: int, device: str) -> None:
    mask = random_mask(batch, heads, *grid(700, 500, block_size), device=device)
    mask[:, :, 2] = False
    blocks = BlockList.from_mask(mask, seq_q=700, seq_k=500, block_size=block_size)
    blocks.validate()
    assert torch.equal(blocks.to_mask(), mask)
    for row, count, indices in zip(
        mask.flatten(0, 2), blocks.counts.flatten(), blocks.indices.flatten(0, 2), strict=True
    ):
        assert indices[:count].tolist() == row.nonzero().flatten().tolist()
        assert sorted(indices.tolist()) == list(range(mask.shape[-1])), "what is past the count is in range as well"


@pytest.mark.parametrize(("seq_q", "seq_k"), [(0, 0), (0, 200), (200, 0), (1, 1), (129, 640), (640, 129), (512, 512)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_token_mask_and_density_are_the_definition(seq_q: int, seq_k: int, causal: bool, full: bool) -> None:
    rows, columns = grid(seq_q, seq_k, (64, 128))
    mask, flags = random_mask(1, 2, rows, columns), random_mask(1, 2, rows, columns, density=0.2)
    blocks = BlockList.from_mask(
        mask, seq_q=seq_q, seq_k=seq_k, block_size=(64, 128), causal=causal, full=flags if full else None
    )
    band = reference.band_mask(seq_q, seq_k, causal=causal)
    query, key = torch.arange(seq_q)[:, None] // 64, torch.arange(seq_k) // 128
    expected = mask[:, :, query, key] & band
    if full:
        expected = expected | flags[:, :, query, key]
    assert torch.equal(blocks.token_mask(), expected)
    torch.testing.assert_close(blocks.density, expected.sum((-2, -1)) / max(seq_q * seq_k, 1))
    assert BlockList.dense(seq_q=seq_q, seq_k=seq_k, causal=causal).token_mask().equal(band[None, None])


def test_blocks_beyond_the_diagonal_are_not_listed() -> None:
    blocks = BlockList.dense(seq_q=512, seq_k=512, causal=True)
    assert blocks.counts.tolist() == [[[1, 2, 3, 4]]]
    full = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    full[0, 0, 0, 3] = True
    blocks = BlockList.from_mask(full, full=full, seq_q=512, seq_k=512, causal=True)
    assert blocks.to_mask().equal(full)
    assert blocks.token_mask().sum() == 128 * 128


def test_predicate_sees_block_coordinates(device: str) -> None:
    blocks = BlockList.from_predicate(
        lambda b, h, i, j: (i + j + b) % (h + 2) == 0, seq_q=600, seq_k=400, batch=2, heads=3, device=device
    )
    expected = [
        [[[(i + j + b) % (h + 2) == 0 for j in range(4)] for i in range(5)] for h in range(3)] for b in range(2)
    ]
    assert blocks.to_mask().tolist() == expected
    constant = BlockList.from_predicate(lambda b, h, i, j: i == i, seq_q=600, seq_k=400, heads=3)
    assert constant.counts.tolist() == [[[4] * 5] * 3]


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize(("seq_q", "seq_k"), [(640, 640), (300, 1000), (1000, 300), (333, 450)])
@pytest.mark.parametrize("causal", [False, True])
def test_sink_and_window_against_brute_force(block_size: tuple[int, int], seq_q: int, seq_k: int, causal: bool) -> None:
    sinks, windows = [0, 1, 0, 2, 1], [1, 0, 3, 2, 100]
    blocks = BlockList.sink_and_window(
        torch.tensor(sinks), torch.tensor(windows), seq_q=seq_q, seq_k=seq_k, block_size=block_size, causal=causal
    )
    blocks.validate()
    rows, columns = grid(seq_q, seq_k, block_size)
    mask = blocks.to_mask()
    for h, (sink, window) in enumerate(zip(sinks, windows, strict=True)):
        alone = BlockList.sink_and_window(sink, window, seq_q=seq_q, seq_k=seq_k, block_size=block_size, causal=causal)
        assert alone.to_mask().equal(mask[:, h : h + 1])
        for i in range(rows):
            places = [q + seq_k - seq_q for q in range(i * block_size[0], min((i + 1) * block_size[0], seq_q))]
            own = {place // block_size[1] for place in places}
            near = {o + step for o in own for step in range(1 - window, 1 if causal else window)}
            kept = {j for j in range(columns) if j < sink or j in near}
            if causal:
                kept = {j for j in kept if j * block_size[1] <= max(places)}
            assert set(mask[0, h, i].nonzero().flatten().tolist()) == kept


def test_sink_and_window_are_built_where_their_tensors_are() -> None:
    heads = torch.ones(2, dtype=torch.int64, device="meta")
    for blocks in (
        BlockList.sink_and_window(heads, 1, seq_q=200, seq_k=300),
        BlockList.sink_and_window(1, heads, seq_q=200, seq_k=300),
        BlockList.sink_and_window(1, 1, seq_q=200, seq_k=300, device="meta"),
    ):
        assert blocks.counts.is_meta
        assert blocks.indices.is_meta


# Transposition.


def entries(rows: BlockRows) -> list[tuple[int, int, int, int, bool]]:
    """(batch, head, row, column, is it full) of every listed block, in the order of the list."""
    counts, indices, full = rows
    return [
        (b, h, i, indices[b, h, i, n].item(), full is not None and full[b, h, i, n].item())
        for b, h, i in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist()
        for n in range(counts[b, h, i])
    ]


@pytest.mark.parametrize("full", [False, True])
def test_transpose(full: bool) -> None:
    blocks = random_list(500, 700, batch=2, causal=full, full=full, block_size=(64, 128))
    rows = BlockRows(blocks.counts, blocks.indices, blocks.full)
    columns = blocks.transpose()
    assert entries(columns) == sorted((b, h, j, i, whole) for b, h, i, j, whole in entries(rows))
    turned = BlockList(columns.counts, columns.indices, 700, 500, (128, 64), columns.full)
    turned.validate()
    for before, after in zip(rows, turned.transpose(), strict=True):
        assert (before is None and after is None) or before.equal(after)


# FlexAttention's BlockMask.


def causal_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def token_mask_of(block_mask: BlockMask) -> Tensor:
    """What FlexAttention computes: mask_mod inside the partial blocks, everything inside the full ones."""
    seq_q, seq_k = block_mask.seq_lengths
    batch, heads, _ = block_mask.kv_num_blocks.shape
    size_q, size_k = block_mask.BLOCK_SIZE
    mask = torch.zeros(batch, heads, seq_q, seq_k, dtype=torch.bool)
    query, key = torch.arange(seq_q)[:, None], torch.arange(seq_k)
    cut = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), query, key).expand(seq_q, seq_k)
    for counts, indices, inside in (
        (block_mask.kv_num_blocks, block_mask.kv_indices, cut),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, torch.ones_like(cut)),
    ):
        for b, h, i in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
            for j in indices[b, h, i, : counts[b, h, i]].tolist():
                where = (slice(i * size_q, (i + 1) * size_q), slice(j * size_k, (j + 1) * size_k))
                mask[b, h][where] |= inside[where]
    return mask


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize(("causal", "full"), [(False, False), (True, False), (True, True)])
def test_block_mask_and_back(block_size: tuple[int, int], causal: bool, full: bool) -> None:
    blocks = random_list(320, 500, causal=causal, full=full, block_size=block_size)
    block_mask = blocks.to_block_mask()
    assert token_mask_of(block_mask).equal(blocks.token_mask())
    assert_same(BlockList.from_block_mask(block_mask, causal=causal), blocks)


def test_causal_block_mask_of_flex_attention() -> None:
    block_mask = create_block_mask(causal_mod, 1, 2, 500, 500, device="cpu")
    blocks = BlockList.from_block_mask(block_mask, causal=True)
    blocks.validate()
    assert blocks.token_mask()[0, 1].equal(reference.band_mask(500, 500, causal=True))
    with pytest.raises(ValueError, match=r"block_mask\.mask_mod must be none, or the causal mask with causal=True"):
        BlockList.from_block_mask(block_mask)


def test_block_mask_in_any_order() -> None:
    counts, indices = torch.tensor([[[2, 1]]]).int(), torch.tensor([[[[2, 0, 1], [1, 7, 7]]]]).int()
    block_mask = BlockMask((256, 384), counts, indices, None, None, None, None, None, None, BLOCK_SIZE=(128, 128))
    blocks = BlockList.from_block_mask(block_mask)
    blocks.validate()
    assert blocks.to_mask().int().tolist() == [[[[1, 0, 1], [0, 1, 0]]]]


# On the device, without waiting for it.

BUILDERS: dict[str, Callable[..., Any]] = {
    "from_mask": lambda x, n: BlockList.from_mask(x, seq_q=500, seq_k=300),
    "from_mask, causal, full": lambda x, n: BlockList.from_mask(x, full=~x, seq_q=500, seq_k=300, causal=True),
    "from_predicate": lambda x, n: BlockList.from_predicate(
        lambda b, h, i, j: (i - j) % n.view(1, -1, 1, 1) == 0, seq_q=500, seq_k=300, heads=2, device=x.device
    ),
    "sink_and_window": lambda x, n: BlockList.sink_and_window(n, 2, seq_q=500, seq_k=300),
    "dense": lambda x, n: BlockList.dense(seq_q=500, seq_k=300, device=x.device),
    "transpose": lambda x, n: BlockList.from_mask(x, full=~x, seq_q=500, seq_k=300, causal=True).transpose(),
    "to_mask": lambda x, n: BlockList.from_mask(x, seq_q=500, seq_k=300).to_mask(),
    "token_mask": lambda x, n: BlockList.from_mask(x, full=~x, seq_q=500, seq_k=300, causal=True).token_mask(),
    "density": lambda x, n: BlockList.from_mask(x, full=~x, seq_q=500, seq_k=300, causal=True).density,
    "block mask": lambda x, n: BlockList.from_block_mask(
        BlockList.from_mask(x, seq_q=500, seq_k=300, causal=True).to_block_mask(), causal=True
    ),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_nothing_waits_for_the_device(name: str) -> None:
    with FakeTensorMode():  # no data: what reads a value, or whose shape depends on one, raises
        BUILDERS[name](torch.ones(1, 2, 4, 3, dtype=torch.bool), torch.ones(2, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("name", BUILDERS)
def test_nothing_waits_for_the_gpu(name: str) -> None:
    mask, numbers = random_mask(1, 2, 4, 3, device="cuda"), torch.tensor([1, 3], device="cuda")
    BUILDERS[name](mask, numbers)
    torch.cuda.set_sync_debug_mode("error")
    try:
        BUILDERS[name](mask, numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", BUILDERS)
def test_builders_compile_without_a_graph_break(name: str) -> None:
    mask, numbers = random_mask(1, 2, 4, 3), torch.tensor([1, 3])
    expected = BUILDERS[name](mask, numbers)
    result = torch.compile(BUILDERS[name], fullgraph=True, backend="aot_eager")(mask, numbers)
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(result), strict=True):
        assert (a is None and b is None) or a.equal(b)


def test_passes_through_compile_and_pytrees() -> None:
    blocks = random_list(500, 300, causal=True, full=True)
    leaves, spec = pytree.tree_flatten(blocks)
    assert [leaf.dtype for leaf in leaves] == [torch.int32, torch.int32, torch.bool]
    assert_same(pytree.tree_unflatten(leaves, spec), blocks)
    pytree.tree_map(lambda leaf: None, blocks)  # leaves need not be tensors

    @torch.compile(fullgraph=True, backend="aot_eager")
    def through(blocks: BlockList, x: Tensor) -> tuple[Tensor, BlockList]:
        return x.masked_fill(~blocks.token_mask(), 0), pytree.tree_map(lambda leaf: leaf.clone(), blocks)

    x = torch.randn(1, 2, 500, 300)
    masked, copy = through(blocks, x)
    assert masked.equal(x * blocks.token_mask())
    assert_same(copy, blocks)


def test_contents_may_change_in_place() -> None:
    blocks, other = random_list(500, 300), random_list(500, 300)
    blocks.to_mask(), blocks.transpose()
    for buffer, value in zip((blocks.counts, blocks.indices), (other.counts, other.indices), strict=True):
        buffer.copy_(value)
    assert_same(blocks, other)
    for a, b in zip(blocks.transpose()[:2], other.transpose()[:2], strict=True):
        assert a.equal(b)


@pytest.mark.gpu
def test_graph_follows_its_buffers() -> None:
    mask = random_mask(1, 2, 8, 8, device="cuda")

    def build() -> tuple[BlockList, Any]:
        blocks = BlockList.from_mask(mask, seq_q=1000, seq_k=1000, causal=True)
        return blocks, blocks.transpose()

    build()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        blocks, columns = build()
    for _ in range(3):
        mask.copy_(random_mask(1, 2, 8, 8, device="cuda"))
        graph.replay()
        expected, expected_columns = build()
        assert_same(blocks, expected)
        assert columns.counts.equal(expected_columns.counts)
        assert columns.indices.equal(expected_columns.indices)


# Refusals.


def changed(**changes: Any) -> BlockList:
    blocks = BlockList.dense(seq_q=200, seq_k=300)
    fields: dict[str, Any] = {"counts": blocks.counts, "indices": blocks.indices, "seq_q": 200, "seq_k": 300}
    return BlockList(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_q": -1}, "seq_q must not be negative, got -1"),
        ({"block_size": (128, 32)}, r"block_size must be .*, one of \(64, 128, 192\) and one of \(64, 128\), got"),
        ({"counts": torch.zeros(1, 1, 2)}, r"counts must be int32 \[batch or 1, heads or 1, 2\] on cpu, got float32"),
        ({"counts": torch.zeros(1, 1, 3).int()}, r"counts must be int32 .*, 2\] on cpu, got int32 \[1, 1, 3\] on cpu"),
        ({"counts": torch.zeros(1, 2).int()}, r"counts must be .* got int32 \[1, 2\]"),
        (
            {"indices": torch.zeros(1, 1, 2, 4).int()},
            r"indices must be int32 \[1, 1, 2, 3\] on cpu, got int32 \[1, 1, 2",
        ),
        ({"indices": torch.zeros(1, 4, 2, 3).int()}, r"indices must be int32 \[1, 1, 2, 3\] on cpu, got int32 \[1, 4"),
        ({"indices": torch.zeros(1, 1, 2, 3).int().to("meta")}, r"indices must be .* on cpu, got .* on meta"),
        ({"indices": torch.zeros(1, 1, 3, 2).int().mT}, r"indices must be contiguous, got strides .*contiguous\(\)"),
        ({"full": torch.zeros(1, 1, 2, 3).int()}, r"full must be bool \[1, 1, 2, 3\] on cpu, got int32"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(**changes)


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("counts", (0, 0, 1), 4, r"counts\[0, 0, 1\] must be between 0 and 3, the number of key blocks, got 4"),
        ("counts", (0, 0, 0), -1, r"counts\[0, 0, 0\] must be between 0 and 3, the number of key blocks, got -1"),
        ("indices", (0, 0, 1, 2), 3, r"indices\[0, 0, 1, 2\] must be a key block, between 0 and 2, got 3"),
        ("indices", (0, 0, 0, 0), -2, r"indices\[0, 0, 0, 0\] must be a key block, between 0 and 2, got -2"),
        ("indices", (0, 0, 1, 1), 0, r"indices\[0, 0, 1, 1\] must be greater than the one before.*got 0"),
        ("indices", (0, 0, 0, 1), 2, r"indices\[0, 0, 0, 2\] must be greater than the one before.*got 2"),
    ],
)
def test_validate_names_the_first_wrong_entry(name: str, at: tuple[int, ...], value: int, message: str) -> None:
    blocks = BlockList.dense(seq_q=200, seq_k=300)
    blocks.validate()
    getattr(blocks, name)[at] = value
    with pytest.raises(ValueError, match=message):
        blocks.validate()


def test_validate_ignores_what_is_past_the_count() -> None:
    blocks = BlockList.dense(seq_q=200, seq_k=300)
    blocks.counts[0, 0, 0], blocks.counts[0, 0, 1] = 0, 1
    blocks.indices[0, 0, 0], blocks.indices[0, 0, 1, 1:] = -(2**31), 2**31 - 1
    blocks.validate()
    assert blocks.to_mask().int().tolist() == [[[[0, 0, 0], [1, 0, 0]]]]
    assert blocks.transpose().counts.tolist() == [[[1, 0, 0]]]


def test_refuses_masks_and_numbers_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"mask must be bool \[batch or 1, heads or 1, 2, 3\] on cpu, got bool \[1, 2"):
        BlockList.from_mask(random_mask(1, 2, 3), seq_q=200, seq_k=300)
    with pytest.raises(ValueError, match=r"full must be bool \[1, 1, 2, 3\] on cpu, got bool \[1, 2, 2, 3\]"):
        BlockList.from_mask(random_mask(1, 1, 2, 3), full=random_mask(1, 2, 2, 3), seq_q=200, seq_k=300)
    with pytest.raises(ValueError, match=r"sink must be an int or an integer tensor \[heads\], got float32 \[2\]"):
        BlockList.sink_and_window(torch.ones(2), 1, seq_q=200, seq_k=300)
    with pytest.raises(ValueError, match=r"sink and window must be for the same heads, got 2 and 3 heads"):
        BlockList.sink_and_window(torch.tensor([1, 1]), torch.tensor([1, 1, 1]), seq_q=200, seq_k=300)


def test_repr_reads_no_data() -> None:
    with FakeTensorMode():
        blocks = BlockList.dense(seq_q=200, seq_k=300, causal=True)
    assert repr(blocks) == "BlockList(1 x 1 heads, 200 x 300 tokens, blocks of 128 x 128, causal, cpu)"
