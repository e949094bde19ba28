"""With `deterministic=True`, results and gradients are the same bits in every run; `--repeats` says in how many."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from cases import Case, relative_error
from fastattn import BlockList

GRIDS = {"cpu": (10, 20), "cuda": (40, 50)}
"""Tokens of a problem: on a GPU enough for more thread blocks than run at once."""


def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    blocks = BlockList.from_predicate(
        lambda b, h, i, j: (h + i + j) % 3 < 2,
        seq_q=q.shape[1],
        seq_k=k.shape[1],
        heads=q.shape[2],
        block_size=(64, 64),
        device=q.device,
    )
    return fastattn.block_sparse_attention(q, k, v, blocks, deterministic=True)


def neighborhood(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grids = (x.unflatten(1, GRIDS[x.device.type]) for x in (q, k, v))
    return fastattn.neighborhood_attention(*grids, window=(9, 12), deterministic=True).flatten(1, 2)


def varlen(q: Tensor, k: Tensor, v: Tensor, used: float = 1.0, **options: Any) -> Tensor:
    """Tokens of all batch entries in sequences of unlike lengths, some of them empty, of which a share is used."""

    def ends(x: Tensor) -> Tensor:
        batch, seq, *_ = x.shape
        ends = torch.arange(batch + 1, dtype=torch.int32) * seq
        ends[1:-1:3] -= seq // 7
        ends[1:-1:5] = ends[:-2:5]
        return ends.to(x.device)

    lengths = {"cu_seqlens_q": ends(q), "cu_seqlens_k": ends(k)}
    if used < 1:
        lengths |= {f"seqused_{x}": (lengths[f"cu_seqlens_{x}"].diff() * used).int() for x in "qk"}
    return fastattn.varlen_attention(*(x.flatten(0, 1) for x in (q, k, v)), **lengths, **options).view_as(q)


def sigmoid(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return fastattn.sigmoid_attention(q, k, v, bias=bias, deterministic=True)


attention = partial(fastattn.attention, deterministic=True)
OPS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "attention": (attention, (64, 128, 256)),
    "causal": (partial(attention, causal=True), (64, 128, 256)),
    "block_sparse_attention": (sparse, (64, 128)),
    "neighborhood_attention": (neighborhood, (64, 128)),
    "sigmoid_attention": (sigmoid, (64, 128)),
    "varlen_attention": (partial(varlen, deterministic=True), (64, 128)),
}


def disturb(device: str, repeat: int) -> None:
    """Other work beside that of the op, so that its thread blocks do not begin in the same order each time."""
    if device == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):
            x = torch.randn(2048, 64 * (1 + repeat % 16), device=device)
            x @ x.T


@pytest.mark.parametrize(("op", "head_dim"), [(op, head_dim) for op, (_, dims) in OPS.items() for head_dim in dims])
def test_every_run_gives_the_same_bits(op: str, head_dim: int, device: str, dtype: torch.dtype, repeats: int) -> None:
    attend, _ = OPS[op]
    rows, columns = GRIDS[device]
    case = Case(rows * columns, rows * columns, heads=16, kv_heads=4, head_dim=head_dim)
    inputs = [*case.inputs(device, dtype)]
    if op == "sigmoid_attention":
        inputs.append(torch.randn(case.heads, device=device))  # its bias, whose gradient is a sum over a head's scores
    inputs = [x.requires_grad_() for x in inputs]
    dout, _ = case.cotangents(device, dtype)

    def results() -> tuple[Tensor, ...]:
        out = attend(*inputs)
        return out, *torch.autograd.grad(out, inputs, dout)

    first = results()
    for repeat in range(repeats):
        disturb(device, repeat)
        assert all(map(torch.equal, results(), first)), f"run {repeat}"


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("op", "options"),
    [
        *(("attention", x) for x in ({}, {"causal": True}, {"window": (100, 30)}, {"window": "of heads"})),
        ("sigmoid_attention", {"causal": True, "bias": -6.0}),
        *(("varlen_attention", x) for x in ({}, {"causal": True}, {"window": (100, 30)}, {"used": 0.6})),
    ],
    ids=str,
)
def test_key_tiles_take_turns(op: str, options: dict[str, Any], head_dim: int, repeats: int) -> None:
    """So many of them that they do: every run gives the same bits, and but for rounding what any order gives."""
    attend = varlen if op == "varlen_attention" else getattr(fastattn, op)
    case = Case(500, 540, batch=32, heads=32, kv_heads=16, head_dim=head_dim)
    if options.get("window") == "of heads":
        options = {"window": (torch.arange(0, 320, 10, dtype=torch.int32, device="cuda"), 30)}
    inputs = [x.requires_grad_() for x in case.inputs("cuda", torch.bfloat16)]
    dout, _ = case.cotangents("cuda", torch.bfloat16)

    def gradients(deterministic: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*inputs, **options, deterministic=deterministic), inputs, dout)

    out = attend(*inputs, **options, deterministic=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first = torch.autograd.grad(out, inputs, dout)
    beside = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in first)
    assert beside >= 4 * first[0].numel(), "two kernels, which keep no sums of dq in float32, were at work"
    for gradient, other in zip(first, gradients(False), strict=True):
        assert relative_error(gradient, other) <= 2**-8
    for repeat in range(repeats):
        disturb("cuda", repeat)
        assert all(map(torch.equal, gradients(True), first)), f"run {repeat}"
