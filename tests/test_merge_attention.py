"""Attention over parts of the keys, merged, is attention over all of them."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from cases import Case, relative_error
from fastattn import reference

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def split_attention(q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> tuple[Tensor, Tensor]:
    edges = [0, *cuts, k.shape[1]]
    parts = [fastattn.attention(q, k[:, begin:end], v[:, begin:end], return_lse=True) for begin, end in pairwise(edges)]
    outputs, lses = zip(*parts, strict=True)
    return fastattn.merge_attention(outputs, lses)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 150), max_size=5).map(sorted), seed=st.integers(0, 99))
def test_any_split_gives_the_whole(cuts: list[int], seed: int) -> None:
    """Parts without keys included."""
    torch.manual_seed(seed)
    q, k, v = Case(40, 150, batch=1, heads=2, kv_heads=2, head_dim=16).inputs("cpu", torch.float32)
    out, lse = split_attention(q, k, v, cuts)
    whole, whole_lse = reference.attention(q.double(), k.double(), v.double())
    assert relative_error(out, whole) < TOLERANCE[torch.float32]
    assert relative_error(lse, whole_lse) < TOLERANCE[torch.float32]


def test_gradients_are_those_of_the_whole(device, dtype) -> None:
    case = Case(100, 230, kv_heads=2)
    tensors = case.inputs(device, dtype)
    dout, dlse = case.cotangents(device, dtype)
    leaves = [x.detach().requires_grad_() for x in tensors]
    gradients = torch.autograd.grad(split_attention(*leaves, [70, 130]), leaves, (dout, dlse))
    doubles = [x.double().requires_grad_() for x in tensors]
    exact = torch.autograd.grad(reference.attention(*doubles), doubles, (dout.double(), dlse.double()))
    for gradient, truth in zip(gradients, exact, strict=True):
        assert relative_error(gradient, truth) < 2 * TOLERANCE[dtype]


def test_rows_that_see_nothing_in_any_part(device, dtype) -> None:
    """Output 0, LSE -inf, and gradients without NaN."""
    q, k, v = (x.requires_grad_() for x in Case(100, 30).inputs(device, dtype))
    parts = [fastattn.attention(q, k, v, causal=True, return_lse=True) for _ in range(2)]
    out, lse = fastattn.merge_attention(*zip(*parts, strict=True))
    assert torch.count_nonzero(out[:, :70]) == 0
    assert (lse[:, :, :70] == -math.inf).all()
    gradients = torch.autograd.grad(out.sum() + lse[:, :, 70:].sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_one_part_is_itself() -> None:
    q, k, v = Case(20, 30).inputs("cpu", torch.float32)
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    merged, merged_lse = fastattn.merge_attention([out], [lse])
    assert torch.equal(merged, out)
    assert torch.equal(merged_lse, lse)


def test_compiles() -> None:
    q, k, v = Case(20, 30).inputs("cpu", torch.float32)
    compiled = torch.compile(split_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, [11])[0], split_attention(q, k, v, [11])[0])


@pytest.mark.parametrize(
    ("outputs", "lses", "message"),
    [
        ([], [], "at least one; got 0 and 0"),
        ([torch.zeros(1, 2, 3, 8)], [], "got 1 and 0"),
        ([torch.zeros(2, 3, 8)], [torch.zeros(1, 3, 2)], r"must be \[batch, seq_q, heads, head_dim\]"),
        (
            [torch.zeros(1, 2, 3, 8)],
            [torch.zeros(1, 2, 3)],
            r"\[batch, heads, seq_q\] = \[1, 3, 2\], got .* \[1, 2, 3\]",
        ),
        ([torch.zeros(1, 2, 3, 8)], [torch.zeros(1, 3, 2).double()], "got torch.float64"),
        (
            [torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 16)],
            [torch.zeros(1, 3, 2)] * 2,
            r"outputs\[1\] must be torch.float32 \[1, 2, 3, 8\] like outputs\[0\]",
        ),
    ],
)
def test_what_does_not_match_is_refused(outputs: list[Tensor], lses: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastattn.merge_attention(outputs, lses)
