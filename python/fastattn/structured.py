"""Queries, keys and values whose attention is like that of language models: sinks, locality, columns, odd channels."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad


@dataclass(frozen=True)
class Structured:
    """Shape and structure of a problem: equal fields give equal tensors on a kind of device.

    Each query head divides its weight otherwise among four parts: the sink, which is the first key; the tokens just
    before the query; heavy columns, single keys that runs of queries heed from any distance; and the rest, noise. A
    part is sized by its mass, the sum of its exp(scores) over that of the rest in a full row (both about), so that what
    a head looks at does not depend on the length. Masses are log-uniform over the heads, each part's in an own order.
    """

    seq: int
    batch: int = 1
    heads: int = 32  # the shape of Llama 3.1 8B
    kv_heads: int = 8
    head_dim: int = 128
    sink: tuple[float, float] = (1, 16)  # masses: of the head with the least, and of the one with the greatest
    local: tuple[float, float] = (1, 16)
    columns: tuple[float, float] = (0.5, 8)
    column_distance: int = 256  # one key of so many is a column
    run: int = 256  # so many queries in a row heed the same columns
    heeded: int = 2  # so many of them, drawn anew for each run and query head
    query_bias: float = 1  # RMS over the channels of a mean that says nothing, beside the one that heeds the sink
    outlier_channels: int = 4  # of the keys, others for each head
    outlier: float = 8  # what these are offset by; a key is noise of standard deviation 0.5, and its part
    seed: int = 0

    def inputs(self, device: str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, drawn on the device."""
        random = torch.Generator(device).manual_seed(self.seed)
        batch, seq, heads, kv_heads, dim = self.batch, self.seq, self.heads, self.kv_heads, self.head_dim
        group = torch.arange(heads, device=device) // (heads // kv_heads)  # the key head of each query head

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device)

        def directions(*shape: int) -> Tensor:
            """Of length 1, in the channels that have no position."""
            return pad(normalize(normal(*shape, dim - dim // 4 * 2), dim=-1), (dim // 4 * 2, 0))

        def scores(masses: tuple[float, float]) -> Tensor:
            """What the keys of a part have to score together: ``[heads, 1]``."""
            steps = torch.linspace(math.log(masses[0]), math.log(masses[1]), heads, device=device)
            rest = math.log(seq) + 1.5  # of scores whose variance is about 3
            return rest + steps[torch.randperm(heads, generator=random, device=device), None]

        q = 0.5 * normal(batch, seq, heads, dim) + self.query_bias * normal(heads, dim)
        k, v = 0.5 * normal(batch, seq, kv_heads, dim), normal(batch, seq, kv_heads, dim)

        # Each part is a direction: a key has it with the norm √dim, a query with that of the score that it gives.
        norm = math.sqrt(dim)

        sink = directions(kv_heads)
        k[:, 0] = norm * sink
        v[:, 0] *= 0.1  # a sink says little
        q += scores(self.sink) * sink[group]

        # Positions are angles, at speeds from one radian per token down: their products fall with the distance.
        angle = torch.arange(seq, device=device)[:, None] * torch.logspace(0, -2, dim // 4, device=device)
        position = normalize(torch.cat([angle.cos(), angle.sin()], dim=-1), dim=-1)
        position = pad(position, (0, dim - position.shape[-1]))[:, None]
        k[:, 1:] += norm * position[1:]
        q += (scores(self.local) - 1.5) * position  # about five keys are that near

        runs, columns = -(-seq // self.run), max(seq // self.column_distance, 1)
        place = torch.randint(min(seq - 1, 1), seq, (columns,), generator=random, device=device).sort().values
        column = directions(kv_heads, columns)
        k[:, place] += norm * column.transpose(0, 1)
        # A run heeds columns that it sees, where there are any.
        seen = (place < torch.arange(1, runs + 1, device=device)[:, None] * self.run).sum(-1).clamp(min=1)
        heeded = (torch.rand(self.heeded, heads, runs, generator=random, device=device) * seen).long()
        heed = column[group[:, None], heeded].sum(0).repeat_interleave(self.run, dim=1)[:, :seq]
        q += (scores(self.columns) - math.log(self.heeded))[None] * heed.transpose(0, 1)

        for head in range(kv_heads):
            odd = torch.randperm(dim, generator=random, device=device)[: self.outlier_channels]
            k[:, :, head, odd] += self.outlier * normal(len(odd)).sign()
        return q.to(dtype), k.to(dtype), v.to(dtype)
