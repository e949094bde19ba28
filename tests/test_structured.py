"""The structure that the structured inputs promise, seen in their attention."""

import math

import pytest
import torch
from torch import Tensor

from fastattn import reference
from fastattn.structured import Structured

SEQ, NEAR = 1024, 32


def weights(q: Tensor, k: Tensor) -> Tensor:
    """Causal attention weights of the second half of the queries, which see enough: ``[heads, queries, keys]``."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("qhd,khd->hqk", q[0], k[0]) / math.sqrt(q.shape[-1])
    keep = reference.band_mask(len(q[0]), len(k[0]), causal=True)
    return scores.masked_fill(~keep, -math.inf).softmax(-1)[:, len(q[0]) // 2 :]


def shares(weights: Tensor) -> dict[str, Tensor]:
    """Of each head's weight: the first key, the nearest tokens, and the two heaviest other keys of a run of queries."""
    seq = weights.shape[-1]
    distance = torch.arange(seq // 2, seq)[:, None] - torch.arange(seq)
    near = (distance >= 0) & (distance < NEAR)
    far = weights.masked_fill(near, 0)[..., 1:]
    runs = far.unflatten(1, (-1, Structured.run)).mean(2)
    return {
        "sink": weights[..., 0].mean(-1),
        "local": (weights * near).sum(-1).mean(-1),
        "columns": runs.topk(Structured.heeded).values.sum(-1).mean(-1),
    }


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return Structured(SEQ, heads=8, kv_heads=2).inputs()


def test_default_shape_is_llamas() -> None:
    q, k, v = Structured(64, batch=2).inputs(dtype=torch.bfloat16)
    assert q.shape == (2, 64, 32, 128)
    assert k.shape == v.shape == (2, 64, 8, 128)
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16


def test_equal_fields_give_equal_tensors() -> None:
    for seq in (1, 2, 130):
        problems = [Structured(seq, heads=4, kv_heads=2, head_dim=64, seed=seed).inputs() for seed in (0, 0, 1)]
        for a, b, other in zip(*problems, strict=True):
            assert a.isfinite().all()
            assert torch.equal(a, b)
            assert not torch.equal(a, other)


def test_sink_local_and_columns_have_the_weight(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    parts = shares(weights(*inputs[:2]))
    for name, share in parts.items():
        assert share.mean() > 0.15, f"{name} has {share}"
    assert sum(parts.values()).min() > 0.7

    normal = shares(weights(torch.randn_like(inputs[0]), torch.randn_like(inputs[1])))
    assert sum(normal.values()).max() < 0.1


def test_heads_differ(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    for name, share in shares(weights(*inputs[:2])).items():
        assert share.max() > 2 * share.min(), f"{name} has {share}"
        assert share[:4].max() > 1.3 * share[:4].min(), "those of one group as well"


def test_columns_change_from_run_to_run(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    far = weights(*inputs[:2])[..., 1 : SEQ // 2 - NEAR]
    heaviest = far.unflatten(1, (-1, Structured.run)).mean(2).argmax(-1)
    assert (heaviest[:, 0] != heaviest[:, 1]).any()


def test_keys_have_outlier_channels_and_queries_a_mean(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, _ = inputs
    offsets = k[0].mean(0).abs()
    assert ((offsets > 6).sum(-1) == Structured.outlier_channels).all()
    assert offsets.median() < 0.5
    assert (q[0].mean(0).norm(dim=-1) > q[0].std(0).norm(dim=-1)).all()
