"""PARO: orders of video tokens, block masks, and what calibration makes of attention with a known structure."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from cases import relative_error
from fastattn import ParoPlan, calibrate_paro, paro_attention, reference
from fastattn.paro import ORDERS, _mask, _pack, block_statistics, token_order

GRID = (5, 12, 9)  # 540 tokens: no whole number of blocks


def local(axis: str, grid: tuple[int, int, int] = GRID, text: int = 0, dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """One head whose queries heed tokens at their own place along an axis, ``[1, seq, 1, dim]``."""
    i = "FHW".index(axis)
    place = torch.arange(grid[i]).view([-1 if j == i else 1 for j in range(3)]).expand(grid).flatten()
    code = 3.5 * torch.nn.functional.normalize(torch.randn(grid[i], dim), dim=-1)[place]
    seq = text + len(place)
    q, k, v = 0.3 * torch.randn(3, 1, seq, 1, dim)
    q[0, text:, 0] += code * 2
    k[0, text:, 0] += code * 2
    return q, k, v + torch.randn_like(v)


def heads(axes: str, **options) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = zip(*(local(axis, **options) for axis in axes), strict=True)
    return torch.cat(q, 2), torch.cat(k, 2), torch.cat(v, 2)


def everything(
    grid: tuple[int, int, int], text: int, orders: list[int], block_size: tuple[int, int] = (64, 64)
) -> ParoPlan:
    """A plan that keeps every block."""
    seq = text + grid[0] * grid[1] * grid[2]
    rows, columns = (-(-seq // size) for size in block_size)
    masks = torch.full((1, 1, len(orders), rows, -(-columns // 8)), 255, dtype=torch.uint8)
    return ParoPlan(grid, text, block_size, torch.tensor([[orders]], dtype=torch.uint8), masks)


@settings(deadline=None)
@given(st.tuples(*[st.integers(1, 7)] * 3), st.integers(0, 5), st.sampled_from(ORDERS))
def test_an_order_is_one_of_the_axes(grid: tuple[int, int, int], text: int, order: str) -> None:
    tokens = token_order(order, grid, text)
    video, last = tokens[: len(tokens) - text], tokens[len(tokens) - text :]
    assert torch.equal(last, torch.arange(text))
    places = torch.stack(torch.unravel_index(video - text, grid), 1)[:, ["FHW".index(axis) for axis in order]]
    key = places @ torch.tensor([64, 8, 1])
    assert len(key) == grid[0] * grid[1] * grid[2]
    assert (key.diff() > 0).all()  # lexicographic: each token once


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.integers(1, 6)] * 3), st.integers(0, 70), st.sampled_from([(64, 64), (128, 128), (192, 128)]))
def test_all_blocks_in_any_order_are_attention(
    grid: tuple[int, int, int], text: int, block_size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    plan = everything(grid, text, list(range(6)), block_size)
    q, k, v = torch.randn(3, 2, plan.seq, 6, 16).unbind()
    out = paro_attention(q, k, v, plan.layer(0))
    assert relative_error(out, fastattn.attention(q, k, v).double()) < 1e-6


@pytest.mark.parametrize("pv", ["int8", "fp8", "bf16"])
def test_quantized_over_all_blocks_is_quantized_attention_of_tokens_in_order(pv: str, device, dtype) -> None:
    plan = everything((5, 6, 7), 30, list(range(6)))
    q, k, v = torch.randn(3, 2, plan.seq, 6, 64, device=device, dtype=dtype).unbind()
    layer = plan.layer(0, device=device)
    out = paro_attention(q, k, v, layer, qk="int8", pv=pv)
    places = layer.places.t()[None, :, :, None].expand(q.shape)
    moved = (x.gather(1, layer.tokens.t()[None, :, :, None].expand(x.shape)) for x in (q, k, v))
    expected = fastattn.quantized_attention(*moved, pv=pv).gather(1, places)
    # Means are of the same tokens in another order: a value may fall on the other side of a tie.
    assert relative_error(out, expected.double()) < (1e-2 if dtype != torch.float32 else 3e-3)
    assert relative_error(out, fastattn.attention(q, k, v).double()) < 0.06


@pytest.mark.parametrize("qk", ["int8", "int4", "fp8"])
def test_quantizing_adds_what_it_costs_without_blocks(qk: str) -> None:
    sample = heads("FHW")
    plan = calibrate_paro([(0, 0, *sample)], grid=GRID, density=0.3)
    layer = plan.layer(0)
    exact = fastattn.attention(*sample).double()
    sparse = relative_error(paro_attention(*sample, layer), exact)
    dense = relative_error(fastattn.quantized_attention(*sample, qk=qk), exact)
    both = relative_error(paro_attention(*sample, layer, qk=qk), exact)
    assert both < 1.1 * (sparse**2 + dense**2) ** 0.5


def test_gradients_are_those_of_attention(device, dtype) -> None:
    plan = everything((3, 5, 7), 4, [1, 4])
    leaves = [x.requires_grad_() for x in torch.randn(3, 1, plan.seq, 2, 64, device=device, dtype=dtype).unbind()]
    dout = torch.randn(1, plan.seq, 2, 64, device=device, dtype=dtype)
    gradients = torch.autograd.grad(paro_attention(*leaves, plan.layer(0, device=device)), leaves, dout)
    expected = torch.autograd.grad(fastattn.attention(*leaves), leaves, dout)
    for gradient, truth in zip(gradients, expected, strict=True):
        assert relative_error(gradient, truth) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("block_size", [(64, 64), (192, 64), (64, 128)])
@pytest.mark.parametrize("seq", [64, 100, 193])
def test_block_statistics(seq: int, block_size: tuple[int, int]) -> None:
    """Against all weights at once, whatever part of them is held at a time."""
    q, k, v = torch.randn(3, 2, seq, 3, 16).unbind()
    _, lse = reference.attention(q, k, v)
    weights = (0.25 * torch.einsum("bqhd,bkhd->bhqk", q, k)).softmax(-1)
    for scores in (1, 1 << 15, 1 << 24):
        found = block_statistics(q, k, lse, 0.25, block_size, 1e-2, scores)
        rows, columns = (torch.arange(seq).split(size) for size in block_size)
        assert found.sum.shape == (3, len(rows), len(columns))
        for i, queries in enumerate(rows):
            for j, keys in enumerate(columns):
                cell = weights[:, :, queries][..., keys]
                torch.testing.assert_close(found.sum[:, i, j], cell.sum((0, 2, 3)) / 2)
                torch.testing.assert_close(found.max[:, i, j], cell.amax((0, 2, 3)))
                assert torch.equal(found.small[:, i, j], (cell < 1e-2).sum((0, 2, 3)) / 2)
                assert found.count[i, j] == cell.shape[2] * cell.shape[3]


@pytest.mark.parametrize("by", ["error", "blocks"])
@pytest.mark.parametrize("text", [0, 30])
def test_calibration_finds_the_axis(by: str, text: int, device, dtype) -> None:
    """Tokens at one place along an axis are neighbours when that axis is the outermost."""
    sample = [x.to(device, dtype) for x in heads("FHW", text=text)]
    plan = calibrate_paro([(0, 0, *sample)], grid=GRID, text=text, density=0.3, by=by, sparse_share=0.99)
    assert [ORDERS[i][0] for i in plan.orders[0, 0]] == ["F", "H", "W"]


@pytest.mark.parametrize("density", [0.5, 0.3, 0.2])
def test_reordering_pays(density: float) -> None:
    """The error against that of the tokens as they come, and of blocks chosen otherwise."""
    sample = heads("HW")
    q, k, v = sample
    exact = fastattn.attention(q, k, v)

    def pooled(x: Tensor) -> Tensor:
        """Averages of blocks, ``[heads, blocks, head_dim]``."""
        sums = torch.nn.functional.pad(x[0].transpose(0, 1), (0, 0, 0, 36)).unflatten(1, (9, 64)).sum(2)
        return sums / torch.tensor([64.0] * 8 + [28])[:, None]

    def with_blocks(plan: ParoPlan, weights: Tensor) -> ParoPlan:
        return replace(plan, masks=_pack(_mask(weights, density, (9, 9)))[None, None])

    def error(plan: ParoPlan) -> float:
        return relative_error(paro_attention(q, k, v, plan.layer(0)), exact)

    plan = calibrate_paro([(0, 0, *sample)], grid=GRID, density=density)
    as_they_come = calibrate_paro([(0, 0, *sample)], grid=(540, 1, 1), density=density)
    estimate = (pooled(q) @ pooled(k).transpose(1, 2) / 8).softmax(-1)
    assert error(plan) < 0.7 * error(as_they_come)
    assert error(plan) < 0.7 * error(with_blocks(as_they_come, estimate))
    assert error(plan) < 0.5 * error(with_blocks(plan, torch.rand(2, 9, 9)))


@pytest.mark.parametrize("block_size", [(64, 64), (192, 64), (64, 128)])
def test_density_and_what_is_always_kept(block_size: tuple[int, int]) -> None:
    sample = heads("FW", text=40)
    plan = calibrate_paro([(0, 0, *sample)], grid=GRID, text=40, density=0.25, block_size=block_size)
    mask = plan.mask(0, 0)
    rows, columns = (540 // size for size in block_size)  # of video alone
    assert mask.shape == (2, *(-(-580 // size) for size in block_size))
    assert mask[:, rows:].all()
    assert mask[:, :, columns:].all()
    video = mask[:, :rows, :columns]
    assert video.any(2).all()
    assert (video.sum((1, 2)) <= round(0.25 * rows * columns) + rows).all()
    assert (video.sum((1, 2)) >= round(0.25 * rows * columns)).all()
    torch.testing.assert_close(plan.density(0, 0), plan.layer(0).blocks.density[0])


def test_samples_of_buckets_and_layers() -> None:
    axes = {(0, 0): "F", (0, 1): "H", (1, 0): "W", (1, 1): "F"}
    samples = [(*at, *heads(axis)) for at, axis in axes.items() for _ in range(2)]
    plan = calibrate_paro(samples, grid=GRID, density=0.3)
    assert {at: ORDERS[plan.orders[at].item()][0] for at in axes} == axes
    assert [plan.bucket_of(step, 5) for step in range(5)] == [0, 0, 0, 1, 1]


def test_save_and_load(tmp_path: Path) -> None:
    plan = calibrate_paro([(0, 0, *heads("FH", text=7))], grid=GRID, text=7, density=0.4, block_size=(192, 128))
    plan.save(tmp_path / "plan.safetensors")
    loaded = ParoPlan.load(tmp_path / "plan.safetensors")
    assert (loaded.grid, loaded.text, loaded.block_size) == (plan.grid, plan.text, plan.block_size)
    assert torch.equal(loaded.orders, plan.orders)
    assert torch.equal(loaded.masks, plan.masks)


def test_bad_input(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    sample = (0, 0, *heads("F"))
    for options, message in [
        ({"density": 0.0}, "density must be in"),
        ({"density": 0.3, "block_size": (128, 192)}, r"block_size must be one of .* keys, got \(128, 192\)"),
        ({"density": 0.3, "by": "luck"}, "by must be 'error' or 'blocks', got 'luck'"),
        ({"density": 0.3, "alpha": 2.0}, r"alpha must be in \[0, 1\], got 2.0"),
        ({"density": 0.3, "text": -1}, "text at least 0"),
        ({"density": 0.3, "text": 1}, r"must be \[batch, 541, heads"),
    ]:
        with pytest.raises(ValueError, match=message):
            calibrate_paro([sample], grid=GRID, **options)
    for samples in ([], [(1, *sample[1:])]):
        with pytest.raises(ValueError, match="each bucket and layer"):
            calibrate_paro(samples, grid=GRID, density=0.3)
    with pytest.raises(ValueError, match="bucket 0, layer 0 must follow each other"):
        calibrate_paro([sample, (0, 1, *sample[2:]), sample], grid=GRID, density=0.3)
    plan = everything(GRID, 0, [0])
    with pytest.raises(ValueError, match=r"q, k and v must be \[batch, 540, 1, head_dim\]"):
        paro_attention(*torch.randn(3, 1, 540, 2, 16).unbind(), plan.layer(0))
    with pytest.raises(ValueError, match="step must be in"):
        plan.bucket_of(5, 5)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"must have format fastattn\.paro\.2, got None"):
        ParoPlan.load(tmp_path / "other.safetensors")
