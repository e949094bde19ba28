"""Which blocks of scores each head keeps.

A block list is data: its tensors live on the device, are built there without the host waiting for it, and are read anew
at each call, so a captured CUDA graph follows what is written into them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, noop_mask

QUERIES_OF_BLOCKS, KEYS_OF_BLOCKS = (64, 128, 192), (64, 128)


class BlockRows(NamedTuple):
    """The blocks of each row of blocks, as `BlockList` holds those of its query blocks."""

    counts: Tensor
    indices: Tensor
    full: Tensor | None


@dataclass(frozen=True, eq=False, repr=False)
class BlockList:
    """The blocks of scores that block-sparse attention computes, for every head.

    A query sees a key if their block is listed and, with ``causal``, the key is not ahead of the query or the block is
    full. Rows of blocks without an entry are allowed: their queries see nothing.

    Most lists come from `from_mask`, `from_predicate`, `sink_and_window`, `from_block_mask` or `dense`. Nothing here
    waits for the device but `validate`.

    Args:
        counts: int32 ``[batch or 1, heads or 1, query blocks]``, how many blocks each query block keeps. An extent of 1
            is shared by the whole batch or by all query heads.
        indices: int32 ``[..., query blocks, key blocks]``, the kept key blocks: ascending, none twice. Entries past
            the count are ignored.
        seq_q, seq_k: the number of tokens. The last blocks may be ragged.
        block_size: queries and keys of a block: 64, 128 or 192, and 64 or 128. Tiles on a GPU are 128 x 128, and those
            of 192 x 128 blocks in a forward at head_dim 64 with values of 16 bits; other blocks cost more.
        full: bool, beside ``indices``: which of the kept blocks ``causal`` does not cut. None: it cuts all.
        causal: query i sees key j of a block that is not full only if ``j <= i + seq_k - seq_q``. Blocks beyond that
            diagonal may be listed and are skipped.

    Raises:
        ValueError: if shapes, dtypes or sizes do not fit each other. The contents are checked by `validate`.

    Example:
        >>> blocks = BlockList.sink_and_window(1, torch.tensor([2, 4]), seq_q=1024, seq_k=1024)
        >>> blocks.counts.shape, blocks.to_mask().shape
        (torch.Size([1, 2, 8]), torch.Size([1, 2, 8, 8]))
    """

    counts: Tensor
    indices: Tensor
    seq_q: int
    seq_k: int
    block_size: tuple[int, int] = (128, 128)
    full: Tensor | None = None
    causal: bool = False

    def __post_init__(self) -> None:
        grid = _grid(self.seq_q, self.seq_k, self.block_size)
        _check_tensor("counts", self.counts, torch.int32, (grid[0],))
        _check_tensor("indices", self.indices, torch.int32, grid, beside=self.counts)
        if self.full is not None:
            _check_tensor("full", self.full, torch.bool, grid, beside=self.counts)

    # Constructors.

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        *,
        seq_q: int,
        seq_k: int,
        block_size: tuple[int, int] = (128, 128),
        full: Tensor | None = None,
        causal: bool = False,
    ) -> "BlockList":
        """The blocks that are set in a mask, bool ``[batch or 1, heads or 1, query blocks, key blocks]``.

        ``full``, of the same shape: blocks that ``causal`` does not cut, kept whether ``mask`` has them or not. Other
        blocks of which ``causal`` leaves nothing are not listed.
        """
        grid = _grid(seq_q, seq_k, block_size)
        _check_tensor("mask", mask, torch.bool, grid, contiguous=False)
        if full is not None:
            _check_tensor("full", full, torch.bool, grid, beside=mask, contiguous=False)
        if causal:
            mask = mask & _causal_blocks(seq_q, seq_k, block_size, mask.device)[0]
        if full is not None:
            mask = mask | full
        rows = _compact(mask, full if causal else None)  # without causal no block is cut
        return cls(rows.counts, rows.indices, seq_q, seq_k, block_size, rows.full, causal)

    @classmethod
    def from_predicate(
        cls,
        predicate: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        *,
        seq_q: int,
        seq_k: int,
        batch: int = 1,
        heads: int = 1,
        block_size: tuple[int, int] = (128, 128),
        causal: bool = False,
        device: torch.device | str | None = None,
    ) -> "BlockList":
        """The blocks for which ``predicate(b, h, i, j)`` is true: batch, head, query block and key block.

        It is called once, with int64 tensors that broadcast against each other, and returns a bool tensor that
        broadcasts to ``[batch, heads, query blocks, key blocks]``.

        Example:
            >>> BlockList.from_predicate(lambda b, h, i, j: (i - j) % (h + 1) == 0, seq_q=512, seq_k=512, heads=4)
            BlockList(1 x 4 heads, 512 x 512 tokens, blocks of 128 x 128, cpu)
        """
        shape = (batch, heads, *_grid(seq_q, seq_k, block_size))
        b, h, i, j = (
            torch.arange(size, device=device).view([-1 if axis == own else 1 for axis in range(4)])
            for own, size in enumerate(shape)
        )
        mask = predicate(b, h, i, j).expand(shape)
        return cls.from_mask(mask, seq_q=seq_q, seq_k=seq_k, block_size=block_size, causal=causal)

    @classmethod
    def sink_and_window(
        cls,
        sink: int | Tensor,
        window: int | Tensor,
        *,
        seq_q: int,
        seq_k: int,
        block_size: tuple[int, int] = (128, 128),
        causal: bool = True,
        device: torch.device | str | None = None,
    ) -> "BlockList":
        """The first ``sink`` key blocks, and the ``window`` ones nearest to each query block.

        A query block's own key blocks are those that hold its tokens' positions, bottom-right aligned; a window of 1
        is these, one of 2 has a block more before them and, if not causal, one after. Ints, or integer tensors
        ``[heads]``.
        """
        device = next((x.device for x in (sink, window) if isinstance(x, Tensor)), device)
        sinks, windows = _per_head("sink", sink, device), _per_head("window", window, device)
        if sinks.shape[0] != windows.shape[0] and 1 not in (sinks.shape[0], windows.shape[0]):
            raise ValueError(
                f"sink and window must be for the same heads, got {sinks.shape[0]} and {windows.shape[0]} heads"
            )
        (heads,) = torch.broadcast_shapes(sinks.shape, windows.shape)

        def keep(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            sink, window = sinks.view(-1, 1, 1), windows.view(-1, 1, 1)
            first_query, last_query = i * block_size[0], ((i + 1) * block_size[0]).clamp(max=seq_q) - 1
            first_own = (first_query + seq_k - seq_q) // block_size[1]
            last_own = (last_query + seq_k - seq_q) // block_size[1]
            near = (j > first_own - window) & (j < last_own + window) & (window > 0)
            return near | (j < sink)

        return cls.from_predicate(
            keep, seq_q=seq_q, seq_k=seq_k, heads=heads, block_size=block_size, causal=causal, device=sinks.device
        )

    @classmethod
    def dense(
        cls,
        *,
        seq_q: int,
        seq_k: int,
        block_size: tuple[int, int] = (128, 128),
        causal: bool = False,
        device: torch.device | str | None = None,
    ) -> "BlockList":
        """Every block, or with ``causal`` every block that it leaves anything of."""
        mask = torch.ones(1, 1, *_grid(seq_q, seq_k, block_size), dtype=torch.bool, device=device)
        return cls.from_mask(mask, seq_q=seq_q, seq_k=seq_k, block_size=block_size, causal=causal)

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask, *, causal: bool = False) -> "BlockList":
        """The blocks of FlexAttention's ``BlockMask``, in any order within a row.

        Its ``mask_mod``, which cuts the blocks that are not full, is code and cannot be read: it must be none at all,
        or ``causal`` says that it is the causal mask, bottom-right aligned.
        """
        if not causal and block_mask.mask_mod is not noop_mask:
            raise ValueError(
                f"block_mask.mask_mod must be none, or the causal mask with causal=True, got {block_mask.mask_mod}"
            )
        seq_q, seq_k = block_mask.seq_lengths
        block_size = (block_mask.BLOCK_SIZE[0], block_mask.BLOCK_SIZE[1])
        width = _grid(seq_q, seq_k, block_size)[1]
        mask, full = _scatter(block_mask.kv_num_blocks, block_mask.kv_indices, None, width), None
        if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
            full = _scatter(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, None, width)
        return cls.from_mask(mask, seq_q=seq_q, seq_k=seq_k, block_size=block_size, full=full, causal=causal)

    # Other forms.

    def to_block_mask(self) -> BlockMask:
        """The same mask for a compiled ``flex_attention``; uncompiled, that asks ``mask_mod`` alone everywhere."""
        mask = full = self.to_mask()
        diagonal = self.seq_k - self.seq_q
        if self.causal:
            some, every = _causal_blocks(self.seq_q, self.seq_k, self.block_size, mask.device)
            mask, full = mask & (some | self._full_mask()), mask & (every | self._full_mask())

        def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k <= q + diagonal

        partial_rows, full_rows = _compact(mask & ~full, None), _compact(full, None)
        return BlockMask.from_kv_blocks(
            partial_rows.counts,
            partial_rows.indices,
            full_rows.counts,
            full_rows.indices,
            BLOCK_SIZE=self.block_size,
            mask_mod=causal if self.causal else None,
            seq_lengths=(self.seq_q, self.seq_k),
        )

    def to_mask(self) -> Tensor:
        """The listed blocks, bool ``[batch or 1, heads or 1, query blocks, key blocks]``."""
        return _scatter(self.counts, self.indices, None, self.indices.shape[-1])

    def token_mask(self) -> Tensor:
        """Which key each query sees, bool ``[batch or 1, heads or 1, seq_q, seq_k]``. For tests: it is large."""

        def tokens(blocks: Tensor) -> Tensor:
            rows = blocks.repeat_interleave(self.block_size[0], dim=2)[:, :, : self.seq_q]
            return rows.repeat_interleave(self.block_size[1], dim=3)[..., : self.seq_k]

        mask = tokens(self.to_mask())
        if not self.causal:
            return mask
        query = torch.arange(self.seq_q, device=mask.device)[:, None]
        key = torch.arange(self.seq_k, device=mask.device)
        return mask & ((key <= query + (self.seq_k - self.seq_q)) | tokens(self._full_mask()))

    def transpose(self) -> BlockRows:
        """The query blocks that each key block is kept by, as the backward walks them.

        Shapes are those of the fields with query blocks and key blocks exchanged.
        """
        full = None if self.full is None else self._full_mask().transpose(-2, -1)
        return _compact(self.to_mask().transpose(-2, -1), full)

    @property
    def kept_scores(self) -> Tensor:
        """The number of scores that each head computes, int64 ``[batch or 1, heads or 1]``."""
        mask, device = self.to_mask(), self.counts.device
        query = torch.arange(mask.shape[-2], device=device)[:, None] * self.block_size[0]
        key = torch.arange(mask.shape[-1], device=device) * self.block_size[1]
        queries = (self.seq_q - query).clamp(max=self.block_size[0])
        keys = (self.seq_k - key).clamp(max=self.block_size[1])
        scores = queries * keys
        if self.causal:
            first_row = query + (self.seq_k - self.seq_q) + 1 - key  # keys of the block that its first query sees
            cut = _ramp_sum(first_row + queries, keys) - _ramp_sum(first_row, keys)
            scores = torch.where(self._full_mask(), scores, cut)
        return torch.where(mask, scores, 0).sum((-2, -1))

    @property
    def density(self) -> Tensor:
        """The share of all scores that each head computes, float32 ``[batch or 1, heads or 1]``."""
        return self.kept_scores / max(self.seq_q * self.seq_k, 1)

    def validate(self) -> None:
        """Check the contents. This waits for the device: call it to find a mistake, not at each step.

        Raises:
            ValueError: naming the first count or index that is out of range, out of order or there twice.
        """
        counts, indices, width = self.counts, self.indices, self.indices.shape[-1]
        valid = _valid(counts, width)
        outside = (indices < 0) | (indices >= width)
        unordered = torch.nn.functional.pad(indices.diff(dim=-1) <= 0, (1, 0))
        for name, values, wrong, rule in (
            ("counts", counts, (counts < 0) | (counts > width), f"between 0 and {width}, the number of key blocks"),
            ("indices", indices, valid & outside, f"a key block, between 0 and {width - 1}"),
            ("indices", indices, valid & unordered, "greater than the one before: a row ascends, naming none twice"),
        ):
            if wrong.any():
                at = wrong.nonzero()[0].tolist()
                raise ValueError(f"{name}{at} must be {rule}, got {values[tuple(at)].item()}")

    def __repr__(self) -> str:
        batch, heads, _ = self.counts.shape
        return (
            f"BlockList({batch} x {heads} heads, {self.seq_q} x {self.seq_k} tokens, "
            f"blocks of {self.block_size[0]} x {self.block_size[1]}{', causal' if self.causal else ''}, "
            f"{self.counts.device})"
        )

    def _full_mask(self) -> Tensor:
        """The blocks that ``causal`` does not cut."""
        if self.full is None:
            return torch.zeros_like(self.indices, dtype=torch.bool)
        return _scatter(self.counts, self.indices, self.full, self.indices.shape[-1])


def _grid(seq_q: int, seq_k: int, block_size: tuple[int, int]) -> tuple[int, int]:
    """Query blocks and key blocks."""
    if len(block_size) != 2 or block_size[0] not in QUERIES_OF_BLOCKS or block_size[1] not in KEYS_OF_BLOCKS:
        allowed = f"one of {QUERIES_OF_BLOCKS} and one of {KEYS_OF_BLOCKS}"
        raise ValueError(f"block_size must be (queries, keys), {allowed}, got {block_size}")
    for name, seq in (("seq_q", seq_q), ("seq_k", seq_k)):
        if seq < 0:
            raise ValueError(f"{name} must not be negative, got {seq}")
    return -(-seq_q // block_size[0]), -(-seq_k // block_size[1])


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _check_tensor(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    blocks: tuple[int, ...],
    *,
    beside: Tensor | None = None,
    contiguous: bool = True,
) -> None:
    leading = ("batch or 1", "heads or 1") if beside is None else tuple(beside.shape[:2])
    device = tensor.device if beside is None else beside.device
    shape = tuple(tensor.shape)
    fits = len(shape) == 2 + len(blocks) and shape[2:] == blocks and (beside is None or shape[:2] == leading)
    if not fits or tensor.dtype != dtype or tensor.device != device:
        wanted = ", ".join(str(extent) for extent in (*leading, *blocks))
        raise ValueError(
            f"{name} must be {str(dtype).removeprefix('torch.')} [{wanted}] on {device}, got {_describe(tensor)}"
        )
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}: call .contiguous()")


def _per_head(name: str, x: int | Tensor, device: torch.device | str | None) -> Tensor:
    if not isinstance(x, Tensor):
        return torch.full((1,), x, device=device)
    if x.dim() != 1 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{name} must be an int or an integer tensor [heads], got {_describe(x)}")
    return x


def _valid(counts: Tensor, width: int) -> Tensor:
    """Which entries of a row are within its count."""
    return torch.arange(width, device=counts.device) < counts[..., None]


def _compact(mask: Tensor, full: Tensor | None) -> BlockRows:
    """The set columns of each row in front, the others behind them, both ascending."""
    counts = mask.sum(-1, dtype=torch.int32)
    place = torch.where(mask, mask.cumsum(-1), counts[..., None] + (~mask).cumsum(-1)) - 1
    columns = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    indices = torch.empty_like(place, dtype=torch.int32).scatter_(-1, place, columns.expand_as(place))
    if full is not None:
        full = torch.empty_like(place, dtype=torch.bool).scatter_(-1, place, full)
    return BlockRows(counts.contiguous(), indices.contiguous(), None if full is None else full.contiguous())


def _scatter(counts: Tensor, indices: Tensor, values: Tensor | None, width: int) -> Tensor:
    """Bool mask of the listed columns; with values, of those whose value is set."""
    valid = _valid(counts, indices.shape[-1])
    column = torch.where(valid, indices, width).long()  # what is past the count goes to a column that is cut off
    mask = torch.zeros(*indices.shape[:-1], width + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, column, valid if values is None else valid & values)[..., :width]


def _causal_blocks(seq_q: int, seq_k: int, block_size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks of which the causal mask leaves something, and everything: bool ``[query blocks, key blocks]``."""
    rows, columns = _grid(seq_q, seq_k, block_size)
    first_query = torch.arange(rows, device=device)[:, None] * block_size[0] + (seq_k - seq_q)
    last_query = (first_query + block_size[0] - 1).clamp(max=seq_k - 1)
    first_key = torch.arange(columns, device=device) * block_size[1]
    last_key = (first_key + block_size[1] - 1).clamp(max=seq_k - 1)
    return first_key <= last_query, last_key <= first_query


def _ramp_sum(end: Tensor, top: Tensor) -> Tensor:
    """Σ min(x, top) over 0 <= x < end."""
    linear = end.clamp(min=0).minimum(top + 1)
    return linear * (linear - 1) // 2 + (end.clamp(min=0) - linear) * top


_LEAVES, _CONTEXT = ("counts", "indices", "full"), ("seq_q", "seq_k", "block_size", "causal")


def _flatten(blocks: BlockList) -> tuple[list[Any], Any]:
    return [getattr(blocks, name) for name in _LEAVES], tuple(getattr(blocks, name) for name in _CONTEXT)


def _unflatten(leaves: Any, context: Any) -> BlockList:
    blocks = object.__new__(BlockList)  # past __post_init__: the leaves of a tree need not be tensors
    for name, value in zip(_LEAVES + _CONTEXT, (*leaves, *context), strict=True):
        object.__setattr__(blocks, name, value)
    return blocks


pytree.register_pytree_node(BlockList, _flatten, _unflatten)
