"""PARO: video tokens in an order in which a head's attention falls into blocks, and the blocks worth computing."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import _plan_file
from ._permute import permute_tokens
from .attention import attention
from .block_list import KEYS_OF_BLOCKS, QUERIES_OF_BLOCKS, BlockList
from .block_sparse_attention import block_sparse_attention
from .quantize_tokens import Format
from .quantized_attention import Values, quantized_attention

ORDERS = ("FHW", "FWH", "HFW", "HWF", "WFH", "WHF")
"""Orders of the axes of a video, frames, height and width, the outermost first. Tokens come as FHW."""


FORMAT = "fastattn.paro.2"


@dataclass(frozen=True)
class ParoLayer:
    """What ``paro_attention`` needs of a plan, on a device."""

    tokens: Tensor  # int64 [heads, seq]: the tokens of each head in its order
    places: Tensor  # int64 [heads, seq]: the place of each token in that order
    blocks: BlockList  # of tokens in order


@dataclass(frozen=True)
class ParoPlan:
    """An order and a block mask for each timestep bucket, layer and head, as ``calibrate_paro`` finds them.

    Text tokens, which come before the video's, move behind them, so that blocks of video begin with it whatever the
    length of the text; blocks that hold text are always kept.
    """

    grid: tuple[int, int, int]  # frames, height, width
    text: int  # tokens before the video
    block_size: tuple[int, int]  # queries and keys of a block
    orders: Tensor  # uint8 [buckets, layers, heads]: index into ORDERS
    masks: Tensor  # uint8 [buckets, layers, heads, query blocks, bytes]: key block j is bit j % 8 of byte j // 8

    @property
    def seq(self) -> int:
        frames, height, width = self.grid
        return self.text + frames * height * width

    def bucket_of(self, step: int, steps: int) -> int:
        """The bucket of one of the sampler's steps."""
        if not 0 <= step < steps:
            raise ValueError(f"ParoPlan: step must be in 0 ... {steps - 1}, got {step}")
        return bucket_of(step, steps, len(self.orders))

    def mask(self, bucket: int, layer: int) -> Tensor:
        """Bool ``[heads, query blocks, key blocks]``."""
        return _unpack(self.masks[bucket, layer], -(-self.seq // self.block_size[1]))

    def density(self, bucket: int, layer: int) -> Tensor:
        """The share of all scores that each head computes, float32 ``[heads]``."""
        queries, keys = (tokens_of_blocks(self.seq, size).double() for size in self.block_size)
        return (self.mask(bucket, layer).double() @ keys @ queries / self.seq**2).float()

    def layer(self, layer: int, *, bucket: int = 0, device: torch.device | str = "cpu") -> ParoLayer:
        """To be made once, and used in each step of the bucket."""
        every = torch.stack([token_order(order, self.grid, self.text) for order in ORDERS])
        tokens = every[self.orders[bucket, layer].long()].to(device)
        mask = self.mask(bucket, layer)[None].to(device)
        blocks = BlockList.from_mask(mask, seq_q=self.seq, seq_k=self.seq, block_size=self.block_size)
        return ParoLayer(tokens, tokens.argsort(), blocks)

    def save(self, path: Path | str) -> None:
        """As safetensors: a bit for each block of each head. Needs ``pip install 'fastattn[plans]'``."""
        sizes = {"grid": self.grid, "block_size": self.block_size}
        numbers = {"text": str(self.text), **{name: "x".join(map(str, size)) for name, size in sizes.items()}}
        _plan_file.save(path, "ParoPlan", FORMAT, numbers, {"orders": self.orders, "masks": self.masks})

    @classmethod
    def load(cls, path: Path | str) -> "ParoPlan":
        """A plan that ``save`` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        numbers, tensors = _plan_file.load(path, "ParoPlan", FORMAT)
        frames, height, width = map(int, numbers["grid"].split("x"))
        queries, keys = map(int, numbers["block_size"].split("x"))
        text = int(numbers["text"])
        return cls((frames, height, width), text, (queries, keys), tensors["orders"], tensors["masks"])


def paro_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: ParoLayer,
    *,
    qk: Format | None = None,
    pv: Values = "bf16",
    scale: float | None = None,
) -> Tensor:
    r"""Attention over the blocks that a plan keeps, of tokens in the order that it gives each head.

    PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual Generation Models
    (arXiv 2506.16054). Without ``qk`` tokens are gathered before and put back after. With it they are permuted as they
    are quantized, and put back as the output is stored.

    Args:
        q, k, v: ``[batch, seq, heads, head_dim]``, text before video, after rotary embedding; dtypes and devices as
            ``block_sparse_attention``.
        layer: of a ``ParoPlan``, on the device of ``q``.
        qk, pv: what queries and keys, and values, are rounded to, as in ``quantized_attention``; None: nothing is.
        scale: multiplies the scores; ``1 / sqrt(head_dim)`` if None.

    Returns:
        The output, like ``q``. Differentiable without ``qk``.

    Raises:
        ValueError: if q, k and v are not alike, or if the plan is for other lengths or heads.
    """
    heads, seq = layer.tokens.shape
    if not q.shape == k.shape == v.shape or q.dim() != 4 or (q.shape[1], q.shape[2]) != (seq, heads):
        raise ValueError(
            f"paro_attention: q, k and v must be [batch, {seq}, {heads}, head_dim], as the plan is, "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if qk is not None:
        options: dict[str, Any] = {"blocks": layer.blocks, "permutation": layer.tokens[None], "scale": scale}
        out: Tensor = quantized_attention(q, k, v, qk=qk, pv=pv, **options)
        return out
    tokens, places = layer.tokens[None], layer.places[None]
    q, k, v = (permute_tokens(x, tokens, places) for x in (q, k, v))
    out = block_sparse_attention(q, k, v, layer.blocks, scale=scale)
    return permute_tokens(out, places, tokens)


@torch.no_grad()
def calibrate_paro(
    samples: Iterable[tuple[int, int, Tensor, Tensor, Tensor]],
    *,
    grid: tuple[int, int, int],
    density: float,
    text: int = 0,
    block_size: tuple[int, int] = (64, 64),
    by: Literal["error", "blocks"] = "error",
    alpha: float = 0.5,
    epsilon: float = 1e-3,
    sparse_share: float = 0.9,
    scale: float | None = None,
) -> ParoPlan:
    r"""Finds the order and the blocks of each head from samples of its queries, keys and values.

    Every order is tried; the blocks with the greatest sums of attention weights are kept, whatever the order. Nothing
    of size ``seq²`` is ever held, only blocks' statistics.

    Args:
        samples: ``(bucket, layer, q, k, v)``; the tensors as for ``paro_attention``. Those of one bucket and layer come
            one after the other; buckets and layers are numbered from 0, and each pair of them comes.
        grid: frames, height and width of the video, in tokens.
        density: the share of blocks without text to keep, in (0, 1]; the best of each row is kept besides.
        text: tokens before the video's.
        block_size: queries and keys of a block, as in ``BlockList``. On a GPU (128, 128) is faster than (64, 64), and
            (192, 128) than that at head_dim 64 with values of 16 bits.
        by: what the order is chosen by. "error": the relative error of the output over the kept blocks. "blocks": the
            paper's objective, ``alpha`` · (1 − share of sparse blocks) + (1 − ``alpha``) · incoherence, each divided by
            its sum over the orders. (As printed, in 4.1, it would be smallest where the fewest blocks are sparse.)
        epsilon, sparse_share: a block is sparse if that share of its weights is below epsilon.
        scale: multiplies the scores; ``1 / sqrt(head_dim)`` if None.

    Raises:
        ValueError: for values that are not allowed, for tensors that do not fit ``grid`` and ``text``, and if a bucket
            lacks a layer or samples of one layer are parted by others.
    """
    if min(grid) < 1 or text < 0:
        raise ValueError(f"calibrate_paro: grid must be positive and text at least 0, got {grid} and {text}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"calibrate_paro: alpha must be in [0, 1], got {alpha}")
    if not 0 < density <= 1:
        raise ValueError(f"calibrate_paro: density must be in (0, 1], got {density}")
    if block_size[0] not in QUERIES_OF_BLOCKS or block_size[1] not in KEYS_OF_BLOCKS:
        raise ValueError(
            f"calibrate_paro: block_size must be one of {QUERIES_OF_BLOCKS} queries and one of {KEYS_OF_BLOCKS} keys, "
            f"got {tuple(block_size)}"
        )
    if by not in ("error", "blocks"):
        raise ValueError(f"calibrate_paro: by must be 'error' or 'blocks', got {by!r}")
    orders = [token_order(order, grid, text) for order in ORDERS]
    seq = len(orders[0])
    video = tuple((seq - text) // size if text > 0 else -(-seq // size) for size in block_size)

    def layer_of(tensors: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        sums: list[Tensor | float] = [0.0] * len(ORDERS)
        costs: list[Tensor] = []
        for q, k, v in tensors:
            if not q.shape == k.shape == v.shape or q.dim() != 4 or q.shape[1] != seq:
                raise ValueError(
                    f"calibrate_paro: q, k and v must be [batch, {seq}, heads, head_dim], as grid and text are, "
                    f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
                )
            factor = scale if scale is not None else q.shape[3] ** -0.5
            out, lse = attention(q, k, v, scale=factor, return_lse=True)
            found = []
            for i, order in enumerate(orders):
                tokens = order.to(q.device)
                of_blocks = block_statistics(q[:, tokens], k[:, tokens], lse[:, :, tokens], factor, block_size, epsilon)
                sums[i] = sums[i] + of_blocks.sum
                if by == "error":
                    mask = _mask(of_blocks.sum, density, video)
                    found.append(_error(q, k, v, out, tokens, mask, block_size, factor))
                else:
                    found.append(torch.stack([1 - of_blocks.sparse(sparse_share), of_blocks.incoherence]))
            cost = torch.stack(found)  # [orders, heads], or [orders, 2, heads]
            if by == "blocks":
                weights = torch.tensor([alpha, 1 - alpha], device=cost.device)[:, None]
                cost = (weights * cost / cost.sum(0).clamp(min=1e-30)).sum(1)
            costs.append(cost)
        choice = torch.stack(costs).mean(0).argmin(0)  # [heads]
        chosen = torch.stack([x for x in sums if isinstance(x, Tensor)])[choice, torch.arange(len(choice))]
        return choice.to("cpu", torch.uint8), _pack(_mask(chosen, density, video)).cpu()

    layers: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for at, group in groupby(samples, key=lambda x: (x[0], x[1])):
        if at in layers:
            raise ValueError(f"calibrate_paro: samples of bucket {at[0]}, layer {at[1]} must follow each other")
        layers[at] = layer_of(x[2:] for x in group)
    buckets, depth = (max((at[axis] for at in layers), default=-1) + 1 for axis in (0, 1))
    if not layers or len(layers) != buckets * depth:
        raise ValueError(
            f"calibrate_paro: samples must come for each bucket and layer, got {len(layers)} pairs of them "
            f"for {buckets} buckets and {depth} layers"
        )

    def table(part: int) -> Tensor:
        return torch.stack(
            [torch.stack([layers[bucket, layer][part] for layer in range(depth)]) for bucket in range(buckets)]
        )

    return ParoPlan(grid, text, block_size, table(0), table(1))


def bucket_of(step: int, steps: int, buckets: int) -> int:
    """Buckets are of equally many steps, but for rounding."""
    return step * buckets // steps


def token_order(order: str, grid: tuple[int, int, int], text: int = 0) -> Tensor:
    """The tokens, int64 ``[seq]``, in one of ``ORDERS``; text last."""
    frames, height, width = grid
    video = torch.arange(text, text + frames * height * width).view(grid)
    return torch.cat([video.permute(*("FHW".index(axis) for axis in order)).flatten(), torch.arange(text)])


@dataclass(frozen=True)
class BlockStatistics:
    """Of attention weights, ``[heads, query blocks, key blocks]``; of a batch, the mean but of max."""

    sum: Tensor
    max: Tensor
    small: Tensor  # how many are below epsilon
    count: Tensor  # [query blocks, key blocks]: how many there are

    def sparse(self, share: float) -> Tensor:
        """``[heads]``: the share of blocks in which so many weights are small."""
        return (self.small >= share * self.count).float().mean((1, 2))

    @property
    def incoherence(self) -> Tensor:
        """``[heads]``: the largest weight over the mean one, on average over blocks that have any."""
        ratio = self.max * self.count / self.sum.clamp(min=1e-30)
        weighs = self.sum > 0
        return (ratio * weighs).sum((1, 2)) / weighs.sum((1, 2)).clamp(min=1)


def block_statistics(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, block_size: tuple[int, int], epsilon: float, scores: int = 1 << 24
) -> BlockStatistics:
    """Of ``exp(scale · q kᵀ − lse)``, of which no more than about ``scores`` are held at a time."""
    batch, seq, heads, _ = q.shape
    queries_of_block, keys_of_block = block_size
    rows = max(scores // max(batch * heads * seq, 1) // queries_of_block, 1) * queries_of_block
    keys = k.float()
    parts = []
    for begin in range(0, seq, rows):
        end = min(begin + rows, seq)
        logits = scale * torch.einsum("bqhd,bkhd->bhqk", q[:, begin:end].float(), keys)
        weights = (logits - lse[:, :, begin:end, None]).exp()
        filled = pad(weights, (0, -seq % keys_of_block, 0, -(end - begin) % queries_of_block))
        cells = filled.unflatten(2, (-1, queries_of_block)).unflatten(4, (-1, keys_of_block))
        parts.append((cells.sum((0, 3, 5)), cells.amax((0, 3, 5)), (cells < epsilon).sum((0, 3, 5))))
    total, largest, small = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    queries, keys = (tokens_of_blocks(seq, size).to(q.device) for size in block_size)
    count = queries[:, None] * keys
    filling = queries_of_block * keys_of_block - count
    return BlockStatistics(total / batch, largest, small / batch - filling, count)


def tokens_of_blocks(seq: int, size: int) -> Tensor:
    """How many tokens each block of that size has, int64 ``[blocks]``; the last may have fewer."""
    return (seq - torch.arange(0, seq, size)).clamp(max=size)


def _error(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    tokens: Tensor,
    mask: Tensor,
    block_size: tuple[int, int],
    scale: float,
) -> Tensor:
    """``[heads]``: what the output over the blocks of a mask is off, relative and in norm."""
    blocks = BlockList.from_mask(mask[None], seq_q=len(tokens), seq_k=len(tokens), block_size=block_size)
    sparse = block_sparse_attention(q[:, tokens], k[:, tokens], v[:, tokens], blocks, scale=scale)

    def norm(x: Tensor) -> Tensor:
        of_heads: Tensor = torch.linalg.vector_norm(x, dim=(0, 1, 3))
        return of_heads

    return norm(sparse.float() - out[:, tokens].float()) / norm(out.float()).clamp(min=1e-30)


def _mask(sums: Tensor, density: float, video: tuple[int, ...]) -> Tensor:
    """Of blocks of video, so many of queries and of keys, the greatest, and the best of each row; all others."""
    rows, columns = video
    of_video = sums[:, :rows, :columns]
    flat = of_video.flatten(1)
    best = flat.topk(round(density * flat.shape[1])).indices
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, True).view(of_video.shape)
    if of_video.numel() > 0:
        chosen.scatter_(2, of_video.argmax(2, keepdim=True), True)
    mask = torch.ones_like(sums, dtype=torch.bool)
    mask[:, :rows, :columns] = chosen
    return mask


def _pack(mask: Tensor) -> Tensor:
    """Bool ``[..., n]`` as uint8 ``[..., ceil(n / 8)]``, the lowest bit first."""
    cells = pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return torch.sum(cells << torch.arange(8, dtype=torch.uint8, device=mask.device), -1, dtype=torch.uint8)


def _unpack(bits: Tensor, n: int) -> Tensor:
    cells = bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    return cells.flatten(-2)[..., :n].bool()
