"""`fastattn paro show`: what it draws is what the plan says."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from fastattn import ParoPlan
from fastattn.cli import app
from fastattn.paro import ORDERS, _pack
from fastattn.paro_show import draw, look

GRID, TEXT, SEQ = (3, 7, 11), 20, 251
BLOCK_SIZE, BLOCKS = (64, 128), (4, 2)  # the last ones are ragged


@pytest.fixture
def plan() -> ParoPlan:
    """Any blocks: 2 buckets of 2 layers of all orders."""
    masks = torch.rand(2, 2, 6, *BLOCKS) < 0.4
    return ParoPlan(GRID, TEXT, BLOCK_SIZE, torch.arange(6, dtype=torch.uint8).expand(2, 2, 6), _pack(masks))


def block_means(scores: Tensor) -> Tensor:
    """Of ``[seq, seq]``."""
    rows, columns = (torch.arange(SEQ).split(size) for size in BLOCK_SIZE)
    return torch.stack([torch.stack([scores[q][:, k].mean() for k in columns]) for q in rows])


def kept_scores(plan: ParoPlan, bucket: int, layer: int, head: int) -> Tensor:
    """``[seq, seq]``, of the tokens as they come."""
    made = plan.layer(layer, bucket=bucket)
    places = made.places[head]
    return made.blocks.token_mask()[0, head][places][:, places].float()


def test_blocks_and_densities_are_those_of_the_plan(plan: ParoPlan) -> None:
    for bucket, layer in ((0, 1), (1, 0)):
        heads = look(plan, bucket, layer, range(6))
        assert [head.order for head in heads] == list(ORDERS)
        torch.testing.assert_close(plan.density(bucket, layer), plan.layer(layer, bucket=bucket).blocks.density[0])
        for i, head in enumerate(heads):
            kept = kept_scores(plan, bucket, layer, i)
            assert torch.equal(head.in_order.bool(), plan.mask(bucket, layer)[i])
            torch.testing.assert_close(head.as_they_come, block_means(kept))
            assert head.density == pytest.approx(kept.mean().item())
            assert head.weights is None


def test_weights_are_those_of_attention(plan: ParoPlan) -> None:
    q, k = torch.randn(2, 1, SEQ, 6, 16).unbind()
    for i, head in enumerate(look(plan, 0, 0, range(6), (q, k))):
        assert head.weights is not None
        weights = (0.25 * q[0, :, i] @ k[0, :, i].T).softmax(1)
        tokens = plan.layer(0).tokens[i]
        torch.testing.assert_close(head.weights.as_they_come, SEQ * block_means(weights))
        torch.testing.assert_close(head.weights.in_order, SEQ * block_means(weights[tokens][:, tokens]))
        kept = (weights * kept_scores(plan, 0, 0, i)).sum() / SEQ
        assert head.weights.kept == pytest.approx(kept.item(), rel=1e-5)


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
def test_what_is_drawn(plan: ParoPlan) -> None:
    sample = torch.randn(2, 1, SEQ, 6, 16).unbind()
    for heads in (look(plan, 0, 0, [4, 0, 1, 2]), look(plan, 1, 1, [5], sample)):
        expected = []
        for head in heads:
            expected += [head.weights.as_they_come, head.weights.in_order] if head.weights else [head.as_they_come]
            expected.append(head.in_order)
        figure = draw(heads, "a caption")
        drawn = [panel for panel in figure.axes if panel.images]
        assert len(drawn) == len(expected)
        for panel, blocks in zip(drawn, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(panel.images[0].get_array().data), blocks)
        titles = " ".join(panel.get_title() for panel in drawn)
        assert all(f"head {head.head}" in titles and head.order in titles for head in heads)


def show(*arguments: object):
    return CliRunner().invoke(app, ["paro", "show", *map(str, arguments)])


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_command(plan: ParoPlan, tmp_path: Path) -> None:
    path, picture, samples = (tmp_path / name for name in ("plan.safetensors", "new/picture.png", "qk.safetensors"))
    plan.save(path)
    result = show(path, "--layer", 1, "--bucket", 1, "-o", picture)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "3x7x11 video tokens after 20 of text, blocks of 64x128, bucket 1 of 2" in result.output
    rows = [line.split() for line in result.output.splitlines()]
    density = plan.density(1, 1)
    assert ["1", *"111111", *(f"{x:.1%}" for x in (density.mean(), density.min(), density.max()))] in rows
    assert ["3", "HWF", f"{density[3]:.1%}"] in rows
    save_file(dict(zip("qk", torch.randn(2, 1, SEQ, 6, 16).bfloat16().unbind(), strict=True)), samples)
    result = show(path, "--head", 3, "--head", 1, "--samples", samples, "-o", picture)
    assert result.exit_code == 0, result.output
    kept = [line.split()[3:] for line in result.output.splitlines() if line.split()[1:2] in (["FWH"], ["HWF"])]
    assert all(len(each) == 1 and each[0].endswith("%") for each in kept)
    assert len(kept) == 2


def test_bad_input(plan: ParoPlan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, samples, text = (tmp_path / name for name in ("plan.safetensors", "qk.safetensors", "text"))
    plan.save(path)
    text.write_text("no tensors")
    save_file({"q": torch.zeros(1, SEQ, 6, 8), "k": torch.zeros(1, SEQ, 5, 8)}, samples)
    for arguments, message in (
        ((path, "--bucket", 2), "bucket must be in 0 ... 1, got 2"),
        ((path, "--layer", -1), "layer must be in 0 ... 1, got -1"),
        ((path, "--head", 0, "--head", 6), "head must be in 0 ... 5, got 6"),
        ((samples,), f"ParoPlan: {samples} must have format fastattn.paro.2, got None"),
        ((text,), f"ParoPlan: {text} must be a safetensors file"),
        ((path, "--samples", text), f"samples must be a safetensors file, got {text}"),
        (
            (path, "--samples", samples),
            "samples must be q and k of [batch, 251, 6, head_dim], got [1, 251, 6, 8] and [1, 251, 5, 8]",
        ),
        ((path, "--samples", path), "samples must be q and k of [batch, 251, 6, head_dim], got [] and []"),
    ):
        result = show(*arguments, "-o", tmp_path / "picture.png")
        assert result.exit_code == 1
        assert result.output.startswith(f"fastattn paro show: {message}")
        assert result.output.count("\n") == 1
    assert not (tmp_path / "picture.png").exists()
    assert show(tmp_path / "nothing").exit_code == 2
