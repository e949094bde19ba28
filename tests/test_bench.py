"""The harness, its records, and what shows them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from bench import call_overhead, chart, estimate_blocks, memory, readme, records
from bench import quantize_tokens as quantize_bench
from bench.__main__ import Measurement, chosen_cases, determinism, measure, prepare
from bench.attention import BandCase
from bench.op import MODES, Contestant, Op
from bench.ops import OPS
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import measure as measuring
from fastattn import quantize_tokens, reference
from fastattn.measure import Part, relative_error

MACHINE = {"cpu": "a CPU", "threads": 2, "instruction_set": "avx2", "torch": "2.11", "gemm_tflops": 0.2}


CPU = torch.device("cpu")
SMALL = {
    "attention": [
        "b2_s5x7_h4_kv2_d8_causal",
        "b1_s7x5_h1_d8_causal",
        "b1_s9_h1_d8_window3",
        "b1_s9x30_h4_kv2_d8_sinks",
        "b1_s4x9_h2_d8",
    ],
    "block_sparse_attention": [
        "b2_s150x260_h4_kv2_d8_blocks64x128_keep60_causal",
        "b1_s200_h2_d8_blocks128x64_keep40",
    ],
    "neighborhood_attention": [
        "b2_4x6x8_h4_kv2_d8_w3x4x5_s1x2x3_causal100",
        "b1_9x13_h2_d8_w3x4_dil2x3_causal01",
        "b1_40_h1_d8_w7_s4",
    ],
    "paro_attention": ["b1_2x9x13_text30_h7_d64_blocks64x128_keep40", "b2_3x8x9_h2_d64_blocks192x128_keep50_int8_bf16"],
    "quantized_attention": [
        "b2_s50x70_h4_kv2_d8_causal_int8_int8",
        "b1_s40_h2_d8_window9_fp8_fp8_kernel",
        "b2_s150x260_h4_kv2_d8_blocks64x128_keep60_causal_int8_fp8",
        "b1_s200_h2_d8_blocks128x64_keep40_int4_bf16_kernel",
        "b1_s200_h2_d8_int4_int8",
    ],
    "sale_attention": ["b1_s150_h4_kv2_d64_tau0_bits8", "b2_s300_h2_d64_theta0_stride4"],  # dense
    "sigmoid_attention": ["b2_s5x7_h4_kv2_d8_causal", "b1_s4x9_h2_d8"],
    "varlen_attention": ["b1_3x5+ramp4x30_h4_kv2_d8_causal", "b1_1x40+0x3+2x7_h2_d16v8"],
}
ROUNDING = {"quantized_attention": 0.3, "paro_attention": 0.03}
"""What an op's rounding may cost, where that is more than float32's."""
WITHOUT_PROGRAM = ("paro_attention", "sale_attention")
"""fastattn_bench has not these: they are put together of several ops by torch."""
op_and_case = pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in OPS.values() for name in SMALL[op.name]], ids=lambda x: getattr(x, "name", x)
)
each_op = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)


@op_and_case
def test_a_cases_density_is_that_of_its_mask(op: Op, name: str) -> None:
    case = op.kind.parse(name)
    kept = [
        case.keep(Part(batch, slice(head, head + 1), slice(None)), CPU).double().mean()
        for batch in range(case.batch)
        for head in range(case.heads)
    ]
    assert case.density == pytest.approx(float(sum(kept) / len(kept)))


@each_op
def test_cases_are_named_once_in_python_and_in_cpp(op: Op) -> None:
    program = Path(__file__).parent.parent / "bench" / f"{op.name}.cpp"
    for name in (*op.cases["cpu"], *op.cases["cuda"]):
        assert op.kind.parse(name).name == name
        assert f'"{name}"' in program.read_text() if program.exists() else op.name in WITHOUT_PROGRAM


@each_op
@pytest.mark.parametrize("name", ["s4096_h8_d64", "b1_s4096_h8_d64_diagonal", ""])
def test_a_case_that_is_none_is_refused(op: Op, name: str) -> None:
    with pytest.raises(ValueError, match="is not of the form"):
        op.kind.parse(name)
    with pytest.raises(typer.BadParameter, match="is not of the form"):
        chosen_cases([op], "cpu", "", [name])


@op_and_case
def test_every_contestant_that_runs_here_computes_the_op(op: Op, name: str) -> None:
    peers = op.peers["cpu"]
    for result in measure(op, op.kind.parse(name), "fp32", [*op.modes], peers, CPU, seconds=0):
        assert set(result.troubles) <= set(peers), result.troubles
        assert result.errors.pop("fastattn") < ROUNDING.get(op.name, 1e-5)
        assert max(result.errors.values(), default=0) < 1e-5
        assert all(name in result.errors or peers[name].yardstick for name in result.times if name != "fastattn")


@pytest.mark.parametrize("causal", [False, True])
def test_float64_sample_agrees_with_the_reference_and_notices_errors(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "SCORES_AT_ONCE", 1000)
    q, dout = (torch.randn(2, 110, 4, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, 130, 2, 8, dtype=torch.float64) for _ in range(2))

    def keep(part: Part) -> torch.Tensor:
        return reference.band_mask(110, 130, causal=causal, queries=part.queries)

    sample = measuring.Float64Sample(reference.masked_sigmoid_attention, keep, q, k, v, dout)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = reference.sigmoid_attention(*inputs, causal=causal)
    gradients = torch.autograd.grad(out, inputs, dout)
    assert sample.error(out.detach()) < 1e-12
    assert sample.gradient_error(gradients) < 1e-12
    assert sample.error(1.01 * out.detach()) == pytest.approx(0.01)
    assert sample.gradient_error([gradients[0], 1.1 * gradients[1], gradients[2]]) == pytest.approx(0.1)
    assert sample.gradient_error(gradients[:1], "q") < 1e-12
    assert sample.gradient_error([1.1 * gradients[1], gradients[2]], "kv") == pytest.approx(0.1)


@each_op
def test_a_measurement_becomes_a_record_that_replaces_its_like(op: Op, tmp_path: Path) -> None:
    path = records.path(tmp_path / "results", op.name, MACHINE)
    case, peers = op.kind.parse(SMALL[op.name][-1]), op.peers["cpu"]
    fwd, *others = measure(op, case, "fp32", [*op.modes], peers, CPU, seconds=0)
    records.merge(path, [m.record(MACHINE, "first") for m in (fwd, *others)])
    records.merge(path, [fwd.record(MACHINE, "second")])
    written = json.loads(path.read_text())
    assert [(r["mode"], r["commit"]) for r in written] == [
        ("fwd", "second"),
        *((mode, "first") for mode in op.modes[1:]),
    ]
    for record in written:
        assert record["op"] == op.name
        assert record["error"] < ROUNDING.get(op.name, 1e-5)
        assert record["time_us"] > 0
        assert set(record["against"]) == set(peers)
    shown = "".join(readme.tables(written))
    assert case.described in shown
    assert all(MODES[mode].title in shown for mode in op.modes)


def test_a_mode_asks_for_its_gradients_and_is_counted_as_torch_counts_it() -> None:
    case = OPS["attention"].kind.parse("b1_s64_h2_d8_causal")
    inputs, asked = case.inputs(CPU, torch.float32), []

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        asked.append("".join(name for name, x in zip("qkv", tensors, strict=True) if x.requires_grad))
        return fastattn.attention(*tensors, causal=True)

    for name, mode in MODES.items():
        with FlopCounterMode(display=False) as counter, determinism(name):
            assert torch.are_deterministic_algorithms_enabled() == mode.deterministic
            result = prepare(attend, *inputs, torch.ones_like(inputs[0]), name)()
        assert asked[-1] == mode.gradients
        assert len(result) == len(mode.gradients or "b")
        of_forward = case.flops("fwd") if name.startswith("bwd") else 0
        assert counter.get_total_flops() == pytest.approx(case.flops(name) + of_forward)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_failing_peer_is_reported_and_costs_the_others_nothing() -> None:
    def broken(case: BandCase) -> None:
        raise RuntimeError("no such kernel\nand a long story")

    op = OPS["attention"]
    peers = {"broken": Contestant(broken)}
    (result,) = measure(op, op.kind.parse("b1_s16_h1_d8"), "fp32", ["fwd"], peers, CPU, seconds=0)
    assert isinstance(result, Measurement)
    assert result.troubles == {"broken": "RuntimeError: no such kernel"}
    assert set(result.times) == {"fastattn"}


def test_readme_shows_the_records() -> None:
    assert readme.is_current(), "run `python -m bench.readme`"


def test_the_chart_shows_what_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"case": "b4_s4096_h32_d64_causal", "dtype": "bf16", "tflops": 400.0, "machine": {"gpu": "NVIDIA H100"}}
    forward = {**case, "mode": "fwd", "time_us": 100.0, "against": {"fa4": 125.0, "another": 1.0}}
    backward = {**case, "mode": "bwd", "time_us": 10.0, "against": {}}
    monkeypatch.setattr(chart, "RESULTS", tmp_path)
    records.merge(tmp_path / "attention.h100.json", [forward, backward])
    shown, drawings = chart.newest(), [tmp_path / "chart.svg", tmp_path / "again" / "chart.svg"]
    assert "forward, head_dim 64, 4k causal: fastattn 400, fa4 320; backward" in shown.text
    drawings[1].parent.mkdir()
    for drawing in drawings:
        assert not shown.is_drawn_in(drawing)
        chart.draw(shown, drawing)
        assert shown.is_drawn_in(drawing)
    assert drawings[0].read_bytes() == drawings[1].read_bytes()
    records.merge(tmp_path / "attention.h100.json", [{**forward, "tflops": 401.0}])
    assert not chart.newest().is_drawn_in(drawings[0])


def test_a_summary_is_of_peers() -> None:
    record = {"time_us": 2.0, "against": {"ours_dense": 1.0, "eager": 90.0, "fa4": 3.0, "cudnn": 5.0}}
    assert readme.over_peers(record) == 1.5
    assert readme.over_peers({**record, "against": {"eager": 90.0}}) is None
    assert readme.spread([2.0, 0.5]) == "1.00 (0.50 to 2.00)"
    assert readme.spread([]) == "–"


@pytest.mark.parametrize("case", quantize_bench.CASES, ids=lambda case: case.name)
def test_tokens_are_quantized_in_torch_as_by_the_op(case: quantize_bench.Case) -> None:
    x = torch.randn(2, 256, 3, 16)
    ours = quantize_tokens(x, **case.options)
    values, scales = quantize_bench.eager(x, case)
    theirs = replace(ours, values=values, scales=scales)
    assert values.shape == ours.values.shape
    torch.testing.assert_close(scales, ours.scales)
    assert relative_error(theirs.dequantize(), ours.dequantize()) < 1e-2  # ties fall as divisions are rounded
    count, times = quantize_bench.measure(case, (1, 128, 2, 16), CPU, seconds=0)
    assert count > 0
    assert min(times.values()) > 0


def test_the_steps_of_sale_are_timed() -> None:
    listed, times = estimate_blocks.measure(estimate_blocks.Case(512, heads=2, kv_heads=1, head_dim=64), CPU, seconds=0)
    assert 0 < listed <= 1
    assert len(times) == 4
    assert min(times.values()) > 0


def test_the_cost_of_a_call_is_recorded_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "machine", lambda device: MACHINE)
    monkeypatch.setattr(records, "commit", lambda: "a commit")
    monkeypatch.setattr(call_overhead, "CALLS", 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for _ in range(2):
        call_overhead.main("cpu", seconds=0, output=tmp_path)
    written = records.read(tmp_path / "call_overhead.cpu.json")
    assert [record["mode"] for record in written] == list(call_overhead.MODES)
    for record in written:
        assert set(record["times_us"]) == {"fastattn", "sdpa", *call_overhead.PARTS}
        assert min(record["times_us"].values()) > 0
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    shown = readme.figures()
    assert "Call overhead" in shown
    assert all(f"| {mode} | " in shown for mode in call_overhead.MODES)
    assert readme.summary() == "Not measured yet."


def test_the_memory_of_a_call_is_measured_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: BandCase) -> None:
        raise RuntimeError("no such kernel")

    calls = []
    monkeypatch.setattr(memory, "extra_bytes", lambda call: len(calls.append(call()) or calls) << 20)
    contestants = {"fastattn": OPS["attention"].ours, "broken": Contestant(broken)}
    case = OPS["attention"].kind.parse("b1_s16_h1_d8_causal")
    made = [memory.measure(case, mode, contestants, CPU) for mode in memory.MODES]
    assert [mib for mib, _ in made] == [{"fastattn": 1}, {"fastattn": 2}, {"fastattn": 3}]
    assert all(troubles == {"broken": "RuntimeError: no such kernel"} for _, troubles in made)
    assert [len(result) for result in calls] == [1, 3, 3]

    shared = {"case": case.name, "dtype": "bf16", "commit": "a commit", "machine": MACHINE}
    new = [{**shared, "mode": mode, "mib": mib} for mode, (mib, _) in zip(memory.MODES, made, strict=True)]
    records.merge(tmp_path / "memory.h200.json", new)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert f"| {case.described} | bf16 | bwd | 2 |" in readme.figures()


@pytest.mark.gpu
def test_memory_beside_results() -> None:
    def call() -> torch.Tensor:
        beside = torch.empty(3 << 20, dtype=torch.uint8, device="cuda")
        return beside[:5].clone()

    assert memory.extra_bytes(call) == 3 << 20


def test_memory_is_not_measured_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "gpu_obstacle", lambda: "there is no GPU")
    with pytest.raises(typer.Exit):
        memory.main()
    assert "not a CPU's: there is no GPU" in capsys.readouterr().err
