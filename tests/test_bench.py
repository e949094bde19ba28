"""The harness, its records, and what shows them."""

import json
from pathlib import Path

import pytest
import torch
from bench import readme, records
from bench.__main__ import Measurement, measure
from bench.cases import CPU_CASES, GPU_CASES, Case
from bench.contestants import CPU_PEERS, ours

from fastattn import measure as measuring
from fastattn import reference

MACHINE = {"cpu": "a CPU", "threads": 2, "instruction_set": "avx2", "torch": "2.11", "gemm_tflops": 0.2}


@pytest.mark.parametrize(
    "name", ["b2_s5x7_h4_kv2_d8_causal", "b1_s7x5_h1_d8_causal", "b1_s9_h1_d8_window3", "b1_s4x9_h2_d8"]
)
def test_a_cases_density_is_that_of_its_mask(name: str) -> None:
    case = Case.parse(name)
    mask = reference.band_mask(case.seq_q, case.seq_k, causal=case.causal, window=case.window)
    assert case.density == pytest.approx(float(mask.double().mean()))


def test_cases_are_named_once_in_python_and_in_cpp() -> None:
    program = (Path(__file__).parent.parent / "bench" / "fastattn_bench.cpp").read_text()
    for case in (*CPU_CASES, *GPU_CASES):
        assert f'"{case.name}"' in program


@pytest.mark.parametrize("name", ["s4096_h8_d64", "b1_s4096_h8_d64_diagonal", ""])
def test_a_case_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not of the form"):
        Case.parse(name)


@pytest.mark.parametrize("causal", [False, True])
def test_float64_sample_agrees_with_the_reference_and_notices_errors(causal: bool) -> None:
    torch.manual_seed(0)
    q, dout = (torch.randn(2, 1100, 4, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, 1300, 2, 8, dtype=torch.float64) for _ in range(2))
    sample = measuring.Float64Sample(q, k, v, dout, causal=causal)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, _ = reference.attention(*inputs, causal=causal)
    gradients = torch.autograd.grad(out, inputs, dout)
    assert sample.error(out.detach()) < 1e-12
    assert sample.gradient_error(gradients) < 1e-12
    assert sample.error(1.01 * out.detach()) == pytest.approx(0.01)
    assert sample.gradient_error([gradients[0], 1.1 * gradients[1], gradients[2]]) == pytest.approx(0.1)


def test_a_measurement_becomes_a_record_that_replaces_its_like(tmp_path: Path) -> None:
    path = tmp_path / "results" / "attention.cpu.json"
    case = Case.parse("b1_s64_h2_d16_causal")
    contestants = {"fastattn": ours, **CPU_PEERS}
    fwd, bwd = measure(case, "fp32", ["fwd", "bwd"], contestants, torch.device("cpu"), seconds=0)
    records.merge(path, [m.record(MACHINE, "first") for m in (fwd, bwd)])
    records.merge(path, [fwd.record(MACHINE, "second")])
    written = json.loads(path.read_text())
    assert [(r["mode"], r["commit"]) for r in written] == [("fwd", "second"), ("bwd", "first")]
    for record in written:
        assert record["error"] < 1e-5
        assert record["time_us"] > 0
        assert set(record["against"]) == {"sdpa"}
    assert "causal" in readme.table(written)


def test_a_failing_peer_is_reported_and_costs_the_others_nothing() -> None:
    def broken(case: Case) -> None:
        raise RuntimeError("no such kernel\nand a long story")

    contestants = {"fastattn": ours, "broken": broken}
    case = Case.parse("b1_s16_h1_d8")
    (result,) = measure(case, "fp32", ["fwd"], contestants, torch.device("cpu"), seconds=0)
    assert isinstance(result, Measurement)
    assert result.troubles == {"broken": "RuntimeError: no such kernel"}
    assert set(result.times) == {"fastattn"}


def test_readme_shows_the_records() -> None:
    assert readme.is_current(), "run `python -m bench.readme`"
