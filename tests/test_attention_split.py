"""Few queries over many keys: on a GPU the heads of a group share a tile, and thread blocks share the keys."""

import math
from typing import Any

import pytest
import torch

import fastattn
from cases import Case, relative_error
from fastattn import reference

CASES = [
    *(Case(1, seq_k, batch=1, heads=8, kv_heads=2, causal=True) for seq_k in (1023, 1024, 1025, 2047, 4096, 8191)),
    *(Case(seq_q, 3000, heads=8, kv_heads=1, causal=True) for seq_q in (1, 2, 7, 8, 9, 16)),
    *(Case(3, 2500, batch=1, heads=group, kv_heads=1, head_dim=128) for group in (1, 2, 3, 5, 16, 64, 65, 96, 128)),
    Case(1, 5000, batch=3, heads=6, kv_heads=6, head_dim=128, causal=True),
    Case(5, 2000, heads=12, kv_heads=4, head_dim=256, causal=True),
    Case(4, 2000, heads=8, kv_heads=2, head_dim=192, value_dim=128, causal=True),
    Case(4, 2000, heads=8, kv_heads=2, head_dim=40, value_dim=16),
    Case(7, 6000, heads=8, kv_heads=2, window=(2500, 3)),
    Case(16, 6000, batch=1, heads=8, kv_heads=2, head_dim=128, window=(1100, 0)),
    Case(100, 9000, batch=1, heads=4, kv_heads=2, causal=True),
    Case(200, 5000, batch=1, heads=2, kv_heads=2, head_dim=128, window=(1500, 700)),
    Case(64, 4000, batch=1, heads=3, kv_heads=1, head_dim=256),
]


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case, sinks: bool, place) -> None:
    """At most twice the error of the plain formula in the same precision; the LSE as in float32."""
    device, dtype = place
    inputs = case.inputs(device, dtype)
    options: dict[str, Any] = {**case.options}
    if sinks:
        options["sinks"] = torch.linspace(-3, 9, case.heads, device=device)
        options["sinks"][0] = -math.inf
    out, lse = fastattn.attention(*inputs, **options, return_lse=True)
    exact, exact_lse = reference.attention(*(x.double() for x in inputs), **options)
    rival, _ = reference.attention(*inputs, **options)
    assert relative_error(out, exact) <= 2 * relative_error(rival, exact) + (1e-6 if dtype == torch.float32 else 1e-4)
    assert relative_error(lse, exact_lse) < 1e-5


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_probed(head_dim: int, device, dtype) -> None:
    """With K = 0 all visible keys weigh the same; a value that is 1 in one channel names its run of keys."""
    case = Case(9, 4097, batch=1, heads=6, kv_heads=2, head_dim=head_dim, window=(3000, 4))
    q, k, v = case.inputs(device, dtype)
    run = 129
    v.zero_()
    for i in range(-(-case.seq_k // run)):
        v[:, i * run : (i + 1) * run, :, i] = 1
    out, lse = fastattn.attention(q, k * 0, v, window=case.window, return_lse=True)
    keep = reference.band_mask(case.seq_q, case.seq_k, window=case.window, device=device).double()
    expected = (keep / keep.sum(-1, keepdim=True)) @ v[0, :, 0].double()
    assert relative_error(out[0, :, 3], expected) < (1e-6 if dtype == torch.float32 else 5e-3)
    torch.testing.assert_close(lse[0, 3], keep.sum(-1).float().log(), atol=1e-5, rtol=0)


def test_keys_before_the_window_are_not_read(device, dtype) -> None:
    """Whole tiles of them: their values may be NaN."""
    case = Case(16, 4000, batch=1, heads=8, kv_heads=2, head_dim=128)
    q, k, v = case.inputs(device, dtype)
    window = (1084, 0)  # the first query sees from key 2900 on
    v[:, :2816] = math.nan
    out, lse = fastattn.attention(q, k, v, window=window, return_lse=True)
    exact, exact_lse = reference.attention(*(x.double() for x in (q, k, v.nan_to_num(0))), window=window)
    assert relative_error(out, exact) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert relative_error(lse, exact_lse) < 1e-5


def test_nan_in_one_query_row_stays_there(device, dtype) -> None:
    case = Case(4, 3000, heads=8, kv_heads=2, head_dim=128, causal=True)
    q, k, v = case.inputs(device, dtype)
    clean, clean_lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    q[1, 2, 5, 7] = math.nan
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    assert out[1, 2, 5].isnan().all()
    assert lse[1, 5, 2].isnan()
    out[1, 2, 5], lse[1, 5, 2] = clean[1, 2, 5], clean_lse[1, 5, 2]
    assert torch.equal(out, clean)
    assert torch.equal(lse, clean_lse)


def test_repeatable_and_as_many_queries_at_once(device, dtype) -> None:
    """A token after the other gives what all of them give together."""
    case = Case(12, 2200, batch=1, heads=8, kv_heads=2, head_dim=128)
    q, k, v = case.inputs(device, dtype)
    together = fastattn.attention(q, k, v, causal=True)
    assert torch.equal(together, fastattn.attention(q, k, v, causal=True))
    for i in range(12):
        end = 2200 - 11 + i
        alone = fastattn.attention(q[:, i : i + 1], k[:, :end], v[:, :end], causal=True)
        assert relative_error(alone[:, 0], together[:, i].double()) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_views_of_a_cache(device, dtype) -> None:
    """Keys of a cache that is longer, and queries of a fused projection."""
    cache = torch.randn(2, 4096, 2, 2, 128, device=device).to(dtype)
    k, v = cache[:, :3000].unbind(2)
    q = torch.randn(2, 8, 3, 128, device=device).to(dtype).transpose(1, 2)
    expected = fastattn.attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    assert torch.equal(fastattn.attention(q, k, v, causal=True), expected)


@pytest.mark.gpu
def test_graph_replay() -> None:
    q, k, v = Case(1, 8192, batch=1, heads=8, kv_heads=2, head_dim=128).inputs("cuda", torch.bfloat16)
    fastattn.attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastattn.attention(q, k, v)
    for _ in range(3):
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, fastattn.attention(q, k, v))
