"""`quantized_attention`: the formula with the same rounding, what rounding costs, and the laws that it keeps."""

import math

import pytest
import torch
from torch import Tensor

from cases import relative_error
from fastattn import BlockList, attention, quantize_tokens, quantized_attention, reference
from fastattn.quantized_attention import KEY_GROUP

FORMATS = ["int8", "int4", "fp8"]
VALUES = ["int8", "fp8", "bf16"]
each_qk = pytest.mark.parametrize("qk", FORMATS)
each_pv = pytest.mark.parametrize("pv", VALUES)


# A weight may fall on the other side of a tie: of 8-bit integers, by a 255th of the greatest in its tile's row.
OUT_ERROR = {"int8": 5e-4, "fp8": 3e-3, "bf16": 1e-5}
LSE_ERROR = {"int8": 1 / 255, "fp8": 1e-5, "bf16": 1e-5}


def tensors(
    seq_q: int = 150, seq_k: int = 200, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """With channels of keys and queries that have an offset."""
    q = torch.randn(batch, seq_q, heads, head_dim)
    k, v = torch.randn(2, batch, seq_k, kv_heads, head_dim)
    q[..., 3::16] += 2
    k[..., 1::16] += 5
    return q, k, v


def expected(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *, qk: str, pv: str, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Of the same roundings, in float64, with the log-sum-exp of the keys as they were."""
    unpacked = {"packed": False} if qk == "int4" else {}
    low_q = quantize_tokens(q, format=qk, smooth=qk == "int4", **unpacked).dequantize().double()
    low_k = quantize_tokens(k, format=qk, group=KEY_GROUP, smooth=True, **unpacked)
    centred = low_k.dequantize().double() - low_k.mean[:, None].double()
    low_v = v.double() if pv == "bf16" else quantize_tokens(v, format=pv, transpose=True).dequantize().double()
    if qk == "int4":  # what smoothing took from the queries meets the keys as they were
        q_mean = quantize_tokens(q, format=qk, smooth=True, **unpacked).mean.double()[:, None]
        exact = (k.double() - low_k.mean[:, None].double()).repeat_interleave(q.shape[2] // k.shape[2], 2)
        wide_k = torch.cat([centred.repeat_interleave(q.shape[2] // k.shape[2], 2), exact], -1)
        wide_q = torch.cat([low_q - q_mean, q_mean.expand_as(low_q)], -1)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        low_v = low_v.repeat_interleave(q.shape[2] // k.shape[2], 2)
        out, lse = reference.quantized_attention(wide_q, wide_k, low_v, keep, pv=pv, scale=scale)
    else:
        out, lse = reference.quantized_attention(low_q, centred, low_v, keep, pv=pv, scale=scale)
    mean = low_k.mean.double().repeat_interleave(q.shape[2] // k.shape[2], 1)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return out, lse + factor * torch.einsum("bqhd,bhd->bhq", q.double(), mean)


@each_qk
@each_pv
@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_the_formula(qk: str, pv: str, causal: bool) -> None:
    q, k, v = tensors()
    out, lse = quantized_attention(q, k, v, qk=qk, pv=pv, causal=causal, return_lse=True)
    keep = reference.band_mask(150, 200, causal=causal)
    want, want_lse = expected(q, k, v, keep, qk=qk, pv=pv)
    assert relative_error(out, want) < OUT_ERROR[pv]
    assert (lse - want_lse).abs().max() < LSE_ERROR[pv]


@each_pv
@pytest.mark.parametrize("seq", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_lengths_around_tiles_and_groups(pv: str, seq: int) -> None:
    q, k, v = tensors(seq, seq, batch=1, heads=2, kv_heads=1, head_dim=24)
    out = quantized_attention(q, k, v, pv=pv, causal=seq % 2 == 0)
    want, _ = expected(q, k, v, reference.band_mask(seq, seq, causal=seq % 2 == 0), qk="int8", pv=pv)
    assert relative_error(out, want) < OUT_ERROR[pv]


@each_pv
@pytest.mark.parametrize("block_size", [(64, 64), (64, 128), (128, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("pattern", ["random", "alternating", "one", "none"])
def test_blocks(pv: str, block_size: tuple[int, int], pattern: str) -> None:
    """A kernel that advances wrongly over a skipped block reads other keys, or their scales."""
    seq = 700
    rows, columns = -(-seq // block_size[0]), -(-seq // block_size[1])
    place = torch.arange(rows)[:, None] + torch.arange(columns)
    mask = {
        "random": torch.rand(2, 4, rows, columns) < 0.4,
        "alternating": (place % 2 == 0).expand(2, 4, -1, -1),
        "one": (torch.arange(columns) == columns - 2).expand(2, 4, rows, -1),
        "none": torch.zeros(2, 4, rows, columns, dtype=torch.bool),
    }[pattern]
    blocks = BlockList.from_mask(mask, seq_q=seq, seq_k=seq, block_size=block_size, causal=pattern == "random")
    q, k, v = tensors(seq, seq)
    k[:, 128:256] *= 8  # scales differ from block to block
    out, lse = quantized_attention(q, k, v, pv=pv, blocks=blocks, return_lse=True)
    want, want_lse = expected(q, k, v, blocks.token_mask(), qk="int8", pv=pv)
    empty = want_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    if pattern == "none":
        assert torch.count_nonzero(out) == 0
    else:
        assert ((lse - want_lse)[~empty].abs() < LSE_ERROR[pv]).all()
        assert relative_error(out, want) < OUT_ERROR[pv]


@each_pv
def test_all_blocks_are_dense_attention(pv: str) -> None:
    q, k, v = tensors(300, 300)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    blocks = BlockList.from_mask(mask, seq_q=300, seq_k=300, block_size=(128, 128))
    assert torch.equal(quantized_attention(q, k, v, pv=pv, blocks=blocks), quantized_attention(q, k, v, pv=pv))


@each_qk
def test_values_that_are_all_alike_come_out_exactly(qk: str) -> None:
    """Rounded weights are summed up as they are: their shares add up to one."""
    q, k, _ = tensors()
    v = torch.tensor([127.0, -127.0, 0.0, 64.0]).repeat(16).expand_as(k)
    out = quantized_attention(q, k, v, qk=qk)
    want = v.repeat_interleave(2, 2)[:, :150]
    assert (out - want).abs().max() < 1e-4


@each_qk
@each_pv
def test_permutation_is_that_of_the_tokens(qk: str, pv: str) -> None:
    q, k, v = tensors(260, 260, kv_heads=4)
    order = torch.rand(2, 4, 260).argsort(-1)
    mask = torch.rand(1, 4, 3, 3) < 0.7
    blocks = BlockList.from_mask(mask, seq_q=260, seq_k=260, block_size=(128, 128))
    out, lse = quantized_attention(q, k, v, qk=qk, pv=pv, blocks=blocks, permutation=order, return_lse=True)

    def taken(x: Tensor) -> Tensor:
        return x.gather(1, order.transpose(1, 2)[..., None].expand_as(x))

    want, want_lse = quantized_attention(taken(q), taken(k), taken(v), qk=qk, pv=pv, blocks=blocks, return_lse=True)
    assert relative_error(taken(out), want) < OUT_ERROR[pv]
    assert (lse.gather(2, order) - want_lse).abs().max() < LSE_ERROR[pv]


INPUTS = {
    "normal": lambda q, k, v: (q, k, v),
    "keys with outlier channels": lambda q, k, v: (q, k + 10 * (torch.arange(128) % 16 == 0), v),
    "biased queries": lambda q, k, v: (q + torch.randn(128), k, v),
    "flat rows": lambda q, k, v: (q / 4, k, v),
}


@pytest.mark.parametrize(
    ("qk", "pv", "cosine", "l1"),
    [
        ("int8", "int8", 0.998, 0.05),
        ("int8", "fp8", 0.998, 0.05),
        ("int8", "bf16", 0.998, 0.05),
        # Of normal keys 4 bits leave 0.15, of queries 0.12; scores, and weights, are off by as much.
        ("int4", "int8", 0.97, 0.25),
    ],
)
@pytest.mark.parametrize("name", INPUTS)
def test_what_rounding_costs(qk: str, pv: str, cosine: float, l1: float, name: str) -> None:
    q, k, v = INPUTS[name](torch.randn(1, 128, 2, 128), torch.randn(1, 2048, 2, 128), torch.randn(1, 2048, 2, 128))
    out = quantized_attention(q, k, v, qk=qk, pv=pv).double()
    want, _ = reference.attention(q.double(), k.double(), v.double())
    assert torch.cosine_similarity(out.flatten(), want.flatten(), 0) > cosine
    assert (out - want).abs().sum() / want.abs().sum() < l1


@pytest.mark.parametrize("blocked", [False, True])
def test_straight_through_has_the_gradients_of_attention(blocked: bool) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    blocks = BlockList.sink_and_window(1, 1, seq_q=150, seq_k=200, block_size=(64, 64)) if blocked else None
    out, lse = quantized_attention(q, k, v, blocks=blocks, causal=not blocked, straight_through=True, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    keep = blocks.token_mask() if blocks else reference.band_mask(150, 200, causal=True)
    exact, exact_lse = reference.masked_attention(*(x.double() for x in (q, k, v)), keep)
    wanted = torch.autograd.grad((exact, exact_lse), (q, k, v), (dout.double(), dlse.double()))
    for gradient, want in zip(gradients, wanted, strict=True):
        assert relative_error(gradient, want) < 0.05


def test_without_straight_through_a_gradient_is_refused() -> None:
    q, k, v = tensors()
    out = quantized_attention(q.requires_grad_(), k, v)
    with pytest.raises(NotImplementedError, match="quantize"):
        out.sum().backward()


@each_qk
@each_pv
def test_extremes_are_finite(qk: str, pv: str) -> None:
    q, k, v = tensors()
    for factor in (0.0, 1e-30, 1e3, 1e4):
        out = quantized_attention(q * factor, k * factor, v * factor, qk=qk, pv=pv)
        assert out.isfinite().all()
    q[0, 3], k[0, 5] = 0, 0
    assert quantized_attention(q, k, v, qk=qk, pv=pv).isfinite().all()


@each_qk
@each_pv
def test_what_is_not_finite_shows(qk: str, pv: str) -> None:
    q, k, v = tensors()
    if qk != "int4":  # which smooths queries: their mean is of all of them
        q[0, 7, 1, 3] = math.nan
        lost = quantized_attention(q, k, v, qk=qk, pv=pv).isnan()
        assert lost[0, 7, 1].all()
        assert lost.sum() == 64
    q, k, v = tensors()
    v[1, 9, 0, 5] = math.inf
    lost = ~quantized_attention(q, k, v, qk=qk, pv=pv).isfinite()
    assert lost[1, :, :2, 5].all()
    assert lost.sum() == 2 * 150


def test_no_keys_and_no_queries() -> None:
    q, k, v = tensors(5, 0)
    out, lse = quantized_attention(q, k, v, return_lse=True)
    assert torch.count_nonzero(out) == 0
    assert (lse == -math.inf).all()
    assert quantized_attention(q[:, :0], k, v).shape == (2, 0, 4, 64)
    q, k, v = tensors(20, 5)  # causal: the first rows see nothing
    out, lse = quantized_attention(q, k, v, causal=True, return_lse=True)
    assert torch.count_nonzero(out[:, :15]) == 0
    assert (lse[:, :, :15] == -math.inf).all()
    assert lse[:, :, 15:].isfinite().all()


def test_agrees_with_attention_on_bfloat16() -> None:
    q, k, v = (x.bfloat16() for x in tensors())
    out = quantized_attention(q, k, v, pv="bf16")
    assert out.dtype == torch.bfloat16
    assert relative_error(out, attention(q, k, v).double()) < 0.03
