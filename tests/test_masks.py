"""Which scores an op keeps, probed through the op itself."""

import pytest
import torch

import fastattn
from fastattn import reference
from fastattn.attention import kept_scores

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
