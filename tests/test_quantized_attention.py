"""`quantized_attention`: the formula with the same rounding, the laws that it keeps, and the op as torch sees it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import relative_error
from fastattn import BlockList, attention, quantize_tokens, quantized_attention, reference
from fastattn.quantized_attention import KEY_GROUP

FORMATS = ["int8", "int4", "fp8"]
VALUES = ["int8", "fp8", "bf16"]
OP = torch.ops.fastattn.quantized_attention
each_qk = pytest.mark.parametrize("qk", FORMATS)
each_pv = pytest.mark.parametrize("pv", VALUES)


# A weight may fall on the other side of a tie: of 8-bit integers, by a 255th of the greatest in its tile's row.
OUT_ERROR = {"int8": 5e-4, "fp8": 3e-3, "bf16": 1e-5}
LSE_ERROR = 1e-5  # weights are summed up before they are rounded


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
    low_v, v_mean = v.double(), None
    if pv != "bf16":
        of_v = quantize_tokens(v, format=pv, transpose=True, smooth=pv == "int8")
        low_v = of_v.dequantize().double()
        if of_v.mean is not None:
            v_mean = of_v.mean.double()
            low_v = low_v - v_mean[:, None]
    if qk == "int4":  # what smoothing took from the queries meets the keys as they were
        q_mean = quantize_tokens(q, format=qk, smooth=True, **unpacked).mean.double()[:, None]
        exact = (k.double() - low_k.mean[:, None].double()).repeat_interleave(q.shape[2] // k.shape[2], 2)
        wide_k = torch.cat([centred.repeat_interleave(q.shape[2] // k.shape[2], 2), exact], -1)
        wide_q = torch.cat([low_q - q_mean, q_mean.expand_as(low_q)], -1)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        low_v = low_v.repeat_interleave(q.shape[2] // k.shape[2], 2)
        v_mean = None if v_mean is None else v_mean.repeat_interleave(q.shape[2] // k.shape[2], 1)
        out, lse = reference.quantized_attention(wide_q, wide_k, low_v, keep, pv=pv, v_mean=v_mean, scale=scale)
    else:
        out, lse = reference.quantized_attention(low_q, centred, low_v, keep, pv=pv, v_mean=v_mean, scale=scale)
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
    assert (lse - want_lse).abs().max() < LSE_ERROR


@each_pv
@pytest.mark.parametrize("seq", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_lengths_around_tiles_and_groups(pv: str, seq: int) -> None:
    q, k, v = tensors(seq, seq, batch=1, heads=2, kv_heads=1, head_dim=24)
    out = quantized_attention(q, k, v, pv=pv, causal=seq % 2 == 0)
    want, _ = expected(q, k, v, reference.band_mask(seq, seq, causal=seq % 2 == 0), qk="int8", pv=pv)
    assert relative_error(out, want) < OUT_ERROR[pv]


@each_pv
@pytest.mark.parametrize("block_size", [(64, 64), (64, 128), (128, 64), (128, 128), (192, 128)], ids=str)
@pytest.mark.parametrize("pattern", ["random", "alternating", "one", "none"])
def test_blocks(pv: str, block_size: tuple[int, int], pattern: str) -> None:
    """A kernel that advances wrongly over a skipped block reads other keys, or their scales."""
    seq = 400
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
        assert ((lse - want_lse)[~empty].abs() < LSE_ERROR).all()
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
    assert (lse.gather(2, order) - want_lse).abs().max() < LSE_ERROR


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


@each_qk
@pytest.mark.parametrize("pv", ["int8", "bf16"])
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(0, 5, 5, 2, 2), (2, 0, 5, 2, 2), (2, 5, 0, 2, 2), (2, 0, 0, 2, 2), (2, 5, 5, 0, 2), (2, 5, 5, 0, 0)],
    ids=str,
)
def test_zero_sizes(sizes: tuple[int, ...], straight_through: bool, qk: str, pv: str) -> None:
    batch, seq_q, seq_k, heads, kv_heads = sizes
    inputs = tensors(seq_q, seq_k, batch=batch, heads=heads, kv_heads=kv_heads)
    q, k, v = (x.requires_grad_(straight_through) for x in inputs)
    out, lse = quantized_attention(q, k, v, qk=qk, pv=pv, straight_through=straight_through, return_lse=True)
    assert out.shape == q.shape
    assert (lse.shape, torch.count_nonzero(out)) == ((batch, heads, seq_q), 0)
    assert (lse == -math.inf).all()
    if straight_through:
        assert not any(x.any() for x in torch.autograd.grad(out.sum(), (q, k, v)))


# Layouts, dtypes, heads, threads.


def views(kind: str) -> tuple[Tensor, ...]:
    """q, k and v of 150 tokens and 4 heads of 64."""
    if kind == "fused":
        return torch.randn(2, 150, 3, 4, 64).unbind(2)
    if kind == "heads first":
        return torch.randn(3, 2, 4, 150, 64).transpose(2, 3).unbind()
    if kind == "sequence first":
        return torch.randn(3, 150, 2, 4, 64).transpose(1, 2).unbind()
    if kind == "every second token":
        return torch.randn(3, 2, 300, 4, 64)[:, :, 1::2].unbind()
    if kind == "misaligned":
        return torch.randn(3, 2, 150, 4, 67)[..., 1:65].unbind()
    return torch.randn(3, 1, 150, 4, 64).expand(-1, 2, -1, -1, -1).unbind()


@each_pv
@pytest.mark.parametrize(
    "kind", ["fused", "heads first", "sequence first", "every second token", "misaligned", "expanded"]
)
@pytest.mark.parametrize("qk", ["int8", "int4"])
def test_strided_views_give_the_bits_of_copies(qk: str, pv: str, kind: str) -> None:
    given = views(kind)
    results = quantized_attention(*given, qk=qk, pv=pv, causal=True, return_lse=True)
    copies = quantized_attention(*(x.contiguous() for x in given), qk=qk, pv=pv, causal=True, return_lse=True)
    for result, want in zip(results, copies, strict=True):
        assert result.is_contiguous()
        assert torch.equal(result, want)


@each_qk
@each_pv
def test_op_reads_strided_operands_in_place(qk: str, pv: str) -> None:
    tokens, options = operands(*tensors(), qk=qk, pv=pv)
    expected = OP(*tokens, **options)

    def spread(x: Tensor | None) -> Tensor | None:
        """Rows apart from each other, with something else between them."""
        if x is None or x.dim() < 4:
            return x
        wide = torch.cat([x.view(torch.uint8), torch.full_like(x, 1).view(torch.uint8)], -2).view(x.dtype)
        return wide[..., : x.shape[-2], :]

    for result, want in zip(OP(*map(spread, tokens), **options), expected, strict=True):
        assert torch.equal(result, want)


@each_qk
@each_pv
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(qk: str, pv: str, dtype: torch.dtype) -> None:
    """Inputs are rounded from their dtype, the result to it."""
    q, k, v = (x.to(dtype) for x in tensors())
    out, lse = quantized_attention(q, k, v, qk=qk, pv=pv, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    exact = quantized_attention(q.float(), k.float(), v.float(), qk=qk, pv=pv, return_lse=True)
    assert torch.equal(out, exact[0].to(dtype))
    assert torch.equal(lse, exact[1])


@each_qk
@each_pv
def test_a_head_among_many_is_a_head_alone(qk: str, pv: str) -> None:
    q, k, v = tensors()
    blocks = BlockList.from_mask(torch.rand(2, 4, 2, 2) < 0.7, seq_q=150, seq_k=200, block_size=(128, 128))
    out, lse = quantized_attention(q, k, v, qk=qk, pv=pv, blocks=blocks, return_lse=True)
    for b in range(2):
        for h in range(4):
            own = BlockList(
                blocks.counts[b : b + 1, h : h + 1], blocks.indices[b : b + 1, h : h + 1], 150, 200, (128, 128)
            )
            one = [x[b : b + 1, :, i : i + 1] for x, i in ((q, h), (k, h // 2), (v, h // 2))]
            alone, lse_alone = quantized_attention(*one, qk=qk, pv=pv, blocks=own, return_lse=True)
            if qk == "int4":  # torch's product of the mean and the keys rounds in another order
                assert relative_error(out[b : b + 1, :, h : h + 1], alone) < OUT_ERROR[pv]
            else:
                assert torch.equal(out[b : b + 1, :, h : h + 1], alone)
            assert (lse[b, h] - lse_alone[0, 0]).nan_to_num().abs().max() < LSE_ERROR


@each_qk
@each_pv
def test_the_same_bits_every_time_and_with_any_threads(qk: str, pv: str) -> None:
    tokens, options = operands(*tensors(300, 300), qk=qk, pv=pv, causal=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (threads, threads, 1, 3):
            torch.set_num_threads(count)
            results.append(OP(*tokens, **options))
    finally:
        torch.set_num_threads(threads)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@each_pv
def test_an_order_that_is_none_neither_strays_nor_leaves_anything_unwritten(device: str, pv: str) -> None:
    """Its contents are not read before the kernel runs."""
    q, k, v = (x.to(device, torch.float32 if device == "cpu" else torch.bfloat16) for x in tensors(40, 40, heads=2))
    order = torch.arange(40, dtype=torch.int32)
    order[[3, 9, 20, 21]] = torch.tensor([-1, 40, 2**31 - 1, 22], dtype=torch.int32)
    tokens, options = operands(q, k, v, qk="int8", pv=pv)
    unwritten = [q.new_full(q.shape, math.nan) for _ in range(16)]
    del unwritten  # what is allocated next lies there
    out, lse = OP(*tokens, order=order[None, None].to(device), **options)
    straight, straight_lse = OP(*tokens, **options)
    unnamed = [3, 9, 20, 21]
    kept = [i for i in range(40) if i not in (*unnamed, 22)]  # two rows go to 22, one after the other or both at once
    assert torch.equal(out[:, kept], straight[:, kept])
    assert torch.equal(lse[:, :, kept], straight_lse[:, :, kept])
    assert torch.count_nonzero(out[:, unnamed]) == torch.count_nonzero(lse[:, :, unnamed]) == 0


# Straight-through.


@each_qk
@each_pv
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_computes_the_same_forward(qk: str, pv: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors())
    results = quantized_attention(q, k, v, qk=qk, pv=pv, straight_through=True, return_lse=True)
    plain = quantized_attention(q.detach(), k.detach(), v.detach(), qk=qk, pv=pv, return_lse=True)
    for result, want in zip(results, plain, strict=True):
        assert result.requires_grad
        assert torch.equal(result, want)
    gradients = torch.autograd.grad(results[0].float().sum(), (q, k, v))
    assert [x.dtype for x in gradients] == [dtype] * 3


def trained(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[float]:
    """Losses of an attention layer that learns to copy the token before, by its position."""
    torch.manual_seed(1)
    tokens = torch.randint(8, (8, 48))
    weights = [torch.randn(*shape) / 6 for shape in ((8, 32), (48, 32), (32, 96), (32, 8))]
    embed, place, project, read = (w.requires_grad_() for w in weights)
    optimizer = torch.optim.Adam(weights, 0.02)
    losses = []
    for _ in range(40):
        qkv = ((embed[tokens] + place) @ project).unflatten(-1, (3, 2, 16))
        logits = attend(*qkv.unbind(2)).flatten(2) @ read
        loss = torch.nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), tokens[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("qk", "pv", "compiled"),
    [("int8", "int8", False), ("int8", "fp8", False), ("int4", "int8", False), ("int8", "int8", True)],
)
def test_straight_through_trains(qk: str, pv: str, compiled: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return quantized_attention(q, k, v, qk=qk, pv=pv, causal=True, straight_through=True)

    losses = trained(torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend)
    exact = trained(lambda q, k, v: attention(q, k, v, causal=True))
    assert losses[0] == pytest.approx(exact[0], rel=0.02)
    assert exact[-1] < exact[0] / 20
    assert losses[-1] < losses[0] / 20, losses


def test_straight_through_has_no_second_derivatives() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = quantized_attention(q, k, v, straight_through=True)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        dq.sum().backward()


def operands(
    q: Tensor, k: Tensor, v: Tensor, *, qk: str, pv: str, blocks: BlockList | None = None, **options: Any
) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """What the op takes, without key_term and order."""
    unpacked = {"packed": False} if qk == "int4" else {}
    low_q = quantize_tokens(q, format=qk, **unpacked)
    low_k = quantize_tokens(k, format=qk, group=KEY_GROUP, smooth=True, **unpacked)
    low_v = None if pv == "bf16" else quantize_tokens(v, format=pv, transpose=True, smooth=pv == "int8")
    values = (v, None, None) if low_v is None else (low_v.values, low_v.scales, low_v.mean)
    tokens = (low_q.values, low_q.scales, low_k.values, low_k.scales, *values, None)
    if blocks is None:
        return tokens, options
    lists = (blocks.counts, blocks.indices, blocks.full)
    return (*tokens, *lists), {"block_size": list(blocks.block_size), "causal": blocks.causal, **options}


def random_key_term(batch: int, heads: int, seq_k: int) -> Tensor:
    """What is past its tokens is not looked at."""
    key_term = torch.full((batch, heads, -(-seq_k // 32) * 32), math.nan)
    key_term[..., :seq_k] = torch.randn(batch, heads, seq_k)
    return key_term


@each_pv
@pytest.mark.parametrize("seq", [1, 31, 32, 33, 127, 129, 200])
def test_what_is_past_the_key_terms_is_not_looked_at(pv: str, seq: int) -> None:
    tokens, _ = operands(*tensors(70, seq, head_dim=16), qk="int4", pv=pv)
    padded = random_key_term(2, 4, seq)
    assert padded.isnan().any() == (seq % 32 > 0)
    got, expected = (OP(*tokens[:7], term) for term in (padded, padded.nan_to_num()))
    for x, y in zip(got, expected, strict=True):
        assert x.isfinite().all()
        assert torch.equal(x, y)
