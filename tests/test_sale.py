"""SALE: attention on the blocks of an estimate, and its calibration."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastattn
from cases import relative_error
from fastattn import SalePlan, block_sparse_attention, calibrate_sale, estimate_blocks, reference, sale_attention
from fastattn.reference import sale
from fastattn.structured import Structured

SIZE = (64, 64)

Sample = tuple[Tensor, Tensor, Tensor]


def sample(seq: int = 500, *, seed: int = 0, batch: int = 1, heads: int = 4) -> Sample:
    problem = Structured(seq, batch=batch, heads=heads, kv_heads=2, head_dim=64, seed=seed)
    return problem.inputs(dtype=torch.float32)


def test_is_attention_on_the_estimated_blocks() -> None:
    q, k, v = sample(batch=2)
    threshold = torch.tensor([0.02, 0.05, 0.1, 0.2])
    for options in (
        {},
        {"bits": 8, "sink": 2, "window": 1, "scale": 0.1},
        {"causal": False, "smooth_queries": False},
        {"query_stride": 4},
    ):
        blocks = estimate_blocks(q, k, threshold, block_size=SIZE, **options)
        assert 0 < blocks.density.mean() < (0.45 if blocks.causal else 0.9)
        expected = block_sparse_attention(q, k, v, blocks, scale=options.get("scale"), return_lse=True)
        got = sale_attention(q, k, v, threshold, block_size=SIZE, return_lse=True, **options)
        for x, y in zip(got, expected, strict=True):
            assert torch.equal(x, y)
        assert torch.equal(sale_attention(q, k, v, threshold, block_size=SIZE, **options), got[0])


@pytest.mark.parametrize("causal", [True, False])
def test_threshold_0_is_attention(causal: bool) -> None:
    q, k, v = sample()
    out, lse = sale_attention(q, k, v, 0, causal=causal, return_lse=True)
    expected_out, expected_lse = fastattn.attention(q, k, v, causal=causal, return_lse=True)
    assert relative_error(out, expected_out) < 1e-6
    assert relative_error(lse, expected_lse) < 1e-6


def test_agrees_with_the_reference() -> None:
    q, k, v = sample(700)
    for threshold in (0.1, 0.01):
        out, lse = sale_attention(q, k, v, threshold, block_size=SIZE, return_lse=True)
        doubles = [x.double() for x in (q, k, v)]
        expected_out, expected_lse = sale.sale_attention(*doubles, threshold, block_size=SIZE)
        assert relative_error(out, expected_out) < 1e-6
        assert relative_error(lse, expected_lse) < 1e-6


def test_gradients_are_those_on_the_list() -> None:
    leaves = [x.requires_grad_() for x in sample(300)]
    q, k, v = leaves
    dout, dlse = torch.randn_like(q), torch.randn(1, 4, 300)
    results = sale_attention(q, k, v, 0.05, block_size=SIZE, return_lse=True)
    gradients = torch.autograd.grad(results, leaves, (dout, dlse))
    blocks = estimate_blocks(q, k, 0.05, block_size=SIZE)
    expected = torch.autograd.grad(block_sparse_attention(q, k, v, blocks, return_lse=True), leaves, (dout, dlse))
    for gradient, truth in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, truth)


def test_compile_forward_and_backward() -> None:
    leaves = [x.requires_grad_() for x in sample(300)]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sale_attention(q * 2, k, v, 0.05, block_size=SIZE)

    dout = torch.randn_like(leaves[0])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    eager = function(*leaves)
    assert torch.equal(compiled, eager)
    pairs = zip(*(torch.autograd.grad(out, leaves, dout) for out in (compiled, eager)), strict=True)
    for gradient, truth in pairs:
        assert torch.equal(gradient, truth)


def error(inputs: Sample, threshold: Tensor) -> Tensor:
    """Relative L1, in float64, of each head."""
    q, k, v = (x.double() for x in inputs)
    blocks = estimate_blocks(*inputs[:2], threshold, block_size=SIZE)
    sparse, _ = reference.block_sparse_attention(q, k, v, blocks)
    exact, _ = reference.attention(q, k, v, causal=True)
    return sale.l1_error(sparse, exact).amax(0)


def test_calibration_holds_its_bound_on_each_sample() -> None:
    samples = [sample(seed=seed, batch=1 + seed) for seed in range(2)]
    theta = 5e-4
    first = calibrate_sale([(0, *samples[0])], theta, block_size=SIZE).thresholds[0]
    halvings = (0.008 / first).log2()
    assert torch.equal(halvings, halvings.round())
    assert first.unique().numel() > 1, "heads differ"
    lowered = first < 0.008
    assert (error(samples[0], 2 * first)[lowered] >= theta).all(), "no more than needed"

    both = calibrate_sale([(0, *inputs) for inputs in samples], theta, block_size=SIZE).thresholds[0]
    assert (both <= first).all()
    assert (both < first).any()
    for inputs in samples:
        assert (error(inputs, both) < theta).all()


def test_calibration_agrees_with_the_reference() -> None:
    inputs = sample(300)
    for theta in (3e-4, 1e-3, 3e-3):
        for query_stride in (1, 2):
            options = {"block_size": SIZE, "query_stride": query_stride}
            got = calibrate_sale([(0, *inputs)], theta, **options).thresholds[0]
            expected = sale.calibrate_sale([tuple(x.double() for x in inputs)], theta, **options)
            assert torch.equal(got, expected.float())


def test_calibration_of_layers_in_any_order() -> None:
    samples = [(layer, *sample(300, seed=seed)) for seed, layer in enumerate((1, 0, 1))]
    plan = calibrate_sale(samples, 5e-4, block_size=SIZE, start=0.02)
    assert plan.thresholds.shape == (2, 4)
    for layer, own in ((0, samples[1:2]), (1, samples[::2])):
        alone = calibrate_sale([(0, *x[1:]) for x in own], 5e-4, block_size=SIZE, start=0.02)
        assert torch.equal(plan.thresholds[layer], alone.thresholds[0])


def test_calibration_ends_at_the_start_and_at_dense() -> None:
    inputs = sample(300)
    assert torch.equal(calibrate_sale([(0, *inputs)], 10).thresholds, torch.full((1, 4), 0.008))
    dense = calibrate_sale([(0, *inputs)], 0).thresholds
    assert dense.tolist() == [[0] * 4]
    zeros = calibrate_sale([(0, *inputs[:2], torch.zeros_like(inputs[2]))], 1e-6).thresholds
    assert (zeros == torch.tensor(0.008)).all(), "an output of zeros is exact"
    lost = calibrate_sale([(0, *inputs[:2], torch.full_like(inputs[2], math.nan))], 1).thresholds
    assert lost.tolist() == [[0] * 4], "NaN is under no bound"


def test_progress_is_shown_on_a_terminal_alone(capfd: pytest.CaptureFixture[str]) -> None:
    calibrate_sale(iter([(0, *sample(100))]), 1)
    assert capfd.readouterr() == ("", "")


def test_save_and_load(tmp_path: Path) -> None:
    inputs = sample(300)
    plan = calibrate_sale(
        [(0, *inputs)],
        1e-3,
        block_size=(64, 128),
        sink=2,
        window=3,
        causal=False,
        bits=8,
        smooth_queries=False,
        query_stride=8,
        start=0.05,
    )
    for each in (plan, SalePlan(torch.rand(3, 4))):
        each.save(tmp_path / "plan.safetensors")
        loaded = SalePlan.load(tmp_path / "plan.safetensors")
        assert loaded.options == each.options
        assert torch.equal(loaded.thresholds, each.thresholds)
        assert loaded.thresholds.dtype == torch.float32
    out = sale_attention(*inputs, loaded.thresholds[1], **loaded.options)
    assert torch.equal(out, sale_attention(*inputs, loaded.thresholds[1]))


def test_load_of_a_plan_without_a_stride(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    metadata = {"format": "fastattn.sale.1", "block_size": "64x64", "sink": "1", "window": "2", "causal": "1"}
    metadata |= {"bits": "8", "smooth_queries": "0"}
    save_file({"thresholds": torch.ones(1, 4)}, tmp_path / "old.safetensors", metadata=metadata)
    expected = SalePlan(torch.ones(1, 4), SIZE, bits=8, smooth_queries=False)
    assert SalePlan.load(tmp_path / "old.safetensors").options == expected.options
    assert expected.query_stride == 1


def test_bad_input(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    inputs = sample(100)
    for options, message in [
        ({"theta": -1}, "theta must be at least 0, got -1"),
        ({"theta": math.nan}, "theta must be at least 0, got nan"),
        ({"theta": 1, "start": 1e-5}, "floor must be positive and below start, got 0.0001 and 1e-05"),
        ({"theta": 1, "floor": 0}, "floor must be positive and below start, got 0 and 0.008"),
    ]:
        with pytest.raises(ValueError, match="calibrate_sale: " + message):
            calibrate_sale([(0, *inputs)], **options)
    for samples, message in [
        ([], r"samples must come for layers 0, 1, …, each of them, got \[\]"),
        ([(0, *inputs), (2, *inputs)], r"each of them, got \[0, 2\]"),
        ([(0, *inputs), (1, *sample(100, heads=2))], r"all layers must have as many heads, got \[4, 2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            calibrate_sale(samples, 1)
    with pytest.raises(ValueError, match="estimate_blocks: bits must be 4 or 8, got 2"):
        sale_attention(*inputs, 0.1, bits=2)
    with pytest.raises(RuntimeError, match=r"block_sparse_attention: v must have the shape of k"):
        sale_attention(*inputs[:2], inputs[2][:, 1:], 0.1)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"format": "fastattn.paro.2"})
    with pytest.raises(ValueError, match=r"SalePlan: .* must have format fastattn\.sale\.1, got fastattn\.paro\.2"):
        SalePlan.load(tmp_path / "other.safetensors")
