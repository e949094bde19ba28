"""A language model that a test can train: bytes of this repository's own notes, over the attention it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).parent.parent
BYTES = 256

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal, of q, k and v in [batch, seq, heads, head_dim]."""


@dataclass(frozen=True)
class Run:
    """Everything that a loss curve depends on, but for the attention and the text."""

    dim: int
    heads: int
    seq: int
    batch: int
    learning_rate: float
    dtype: torch.dtype
    """Of autocast; float32 is none."""
    device: str
    layers: int = 2
    steps: int = 200

    def losses(self, attention: Attention) -> Tensor:
        """The loss of each step, on the CPU."""
        torch.manual_seed(0)
        model = Model(self, attention).to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), self.learning_rate)
        losses = []
        for tokens in self.batches():
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                logits = model(tokens[:, :-1])
            loss = cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).cpu()

    def batches(self) -> Tensor:
        """[steps, batch, seq + 1], cut out of the text at random."""
        text = corpus()
        starts = torch.randint(len(text) - self.seq, (self.steps, self.batch, 1))
        return text[starts + torch.arange(self.seq + 1)].to(self.device)


def corpus() -> Tensor:
    """The notes, one after the other, as bytes."""
    paths = sorted([*ROOT.glob("*.md"), *ROOT.glob("csrc/**/*.md")])
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8).long()


class Model(nn.Module):
    def __init__(self, run: Run, attention: Attention) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(BYTES, run.dim), nn.Embedding(run.seq, run.dim)
        self.layers = nn.Sequential(*(Layer(run.dim, run.heads, attention) for _ in range(run.layers)))
        self.head = nn.Sequential(nn.LayerNorm(run.dim), nn.Linear(run.dim, BYTES))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.tokens(tokens) + self.places.weight))


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim))
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        x = x + self.out(self.attention(q, k, v).flatten(-2))
        return x + self.mlp(x)
