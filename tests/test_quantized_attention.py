"""`quantized_attention`: the formula with the same rounding, the laws that it keeps, and the op as torch sees it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

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
@pytest.mark.parametrize("block_size", [(64, 64), (64, 128), (128, 64), (128, 128)], ids=str)
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
def test_an_order_that_is_none_neither_strays_nor_leaves_anything_unwritten(pv: str) -> None:
    """Its contents are not read before the kernel runs."""
    q, k, v = tensors(40, 40, heads=2)
    order = torch.arange(40, dtype=torch.int32)
    order[[3, 9, 20, 21]] = torch.tensor([-1, 40, 2**31 - 1, 22], dtype=torch.int32)
    tokens, options = operands(q, k, v, qk="int8", pv=pv)
    out, lse = OP(*tokens, order=order[None, None], **options)
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


# As torch sees it.


def operands(
    q: Tensor, k: Tensor, v: Tensor, *, qk: str, pv: str, blocks: BlockList | None = None, **options: Any
) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """What the op takes, without v_mean, key_term and order."""
    unpacked = {"packed": False} if qk == "int4" else {}
    low_q = quantize_tokens(q, format=qk, **unpacked)
    low_k = quantize_tokens(k, format=qk, group=KEY_GROUP, smooth=True, **unpacked)
    low_v = None if pv == "bf16" else quantize_tokens(v, format=pv, transpose=True)
    values = (v, None) if low_v is None else (low_v.values, low_v.scales)
    tokens = (low_q.values, low_q.scales, low_k.values, low_k.scales, *values, None, None)
    if blocks is None:
        return tokens, options
    lists = (blocks.counts, blocks.indices, blocks.full)
    return (*tokens, *lists), {"block_size": list(blocks.block_size), "causal": blocks.causal, **options}


def small_blocks(batch: int = 2) -> BlockList:
    mask = torch.rand(batch, 4, 2, 4) < 0.6
    return BlockList.from_mask(
        mask, full=mask & (torch.rand(mask.shape) < 0.5), seq_q=70, seq_k=200, block_size=(64, 64)
    )


@each_qk
@each_pv
def test_opcheck(qk: str, pv: str) -> None:
    q, k, v = tensors(70, 200, head_dim=16)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if "fp8" not in (qk, pv):  # torch cannot compare such tensors, which this one does
        checks.append("test_schema")
    tokens, options = operands(q, k, v, qk=qk, pv=pv, causal=True, window=[90, 4])
    torch.library.opcheck(OP.default, tokens, options, test_utils=checks)
    key_term, order = torch.randn(2, 4, 200), torch.rand(1, 4, 70).argsort(-1).int()
    tokens, options = operands(q, k, v, qk=qk, pv=pv, blocks=small_blocks(), scale=0.3, dtype=v.dtype)
    torch.library.opcheck(OP.default, (*tokens[:7], key_term, *tokens[8:], order), options, test_utils=checks)


@each_qk
@each_pv
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, None])
def test_fakes_are_what_comes_out(qk: str, pv: str, dtype: torch.dtype | None) -> None:
    """Without a dtype the output is bfloat16, or has that of values as they are."""
    q, k, v = tensors(70, 200, head_dim=16)
    v = v if dtype is None else v.to(dtype)
    tokens, options = operands(q, k, v, qk=qk, pv=pv, blocks=small_blocks(), dtype=dtype)
    real = OP(*tokens, **options)
    with FakeTensorMode() as mode:
        fake = OP(*(None if x is None else mode.from_tensor(x) for x in tokens), **options)
    assert real[0].dtype == dtype or (torch.float32 if pv == "bf16" else torch.bfloat16)
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
    meta = quantized_attention(
        *(x.to("meta") for x in (q.to(v.dtype), k.to(v.dtype), v)), qk=qk, pv=pv, return_lse=True
    )
    assert [x.device.type for x in meta] == ["meta", "meta"]
    assert (meta[0].dtype, meta[0].shape, meta[1].shape) == (v.dtype, q.shape, (2, 4, 70))


@each_qk
@each_pv
@pytest.mark.parametrize("blocked", [False, True])
def test_compile(qk: str, pv: str, blocked: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, blocks: BlockList | None) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {} if blocked else {"causal": True, "window": (90, 0)}
        out, lse = quantized_attention(q * 2, k, v, qk=qk, pv=pv, blocks=blocks, return_lse=True, **options)
        return out + 1, lse

    torch.compiler.reset()  # past a number of recompilations of one function torch would stop compiling it
    inputs = (*tensors(70, 200, head_dim=16), small_blocks() if blocked else None)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    for result, want in zip(compiled, function(*inputs), strict=True):
        assert torch.equal(result, want)


def test_compile_with_inductor() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        out = quantized_attention(q * 2, k, v, qk="int4", permutation=order)
        return out + quantized_attention(q, k, v, straight_through=True)

    q, k, v = tensors(70, 70, kv_heads=4, head_dim=16)
    order = torch.rand(4, 70).argsort(-1)[None]
    compiled = torch.compile(function, fullgraph=True)(q, k, v, order)
    assert relative_error(compiled, function(q, k, v, order)) < OUT_ERROR["int8"]


def test_compile_once_for_all_lengths() -> None:
    graphs = 0

    def count(graph_module: torch.fx.GraphModule, _inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph_module

    compiled = torch.compile(quantized_attention, fullgraph=True, dynamic=True, backend=count)
    for length in (17, 40, 65):
        q, k, v = tensors(length, length + 3, head_dim=16)
        assert torch.equal(compiled(q, k, v, causal=True), quantized_attention(q, k, v, causal=True))
    assert graphs == 1


def test_export() -> None:
    class Block(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return quantized_attention(q, k, v, window=(5, 5), return_lse=True)

    seq = torch.export.Dim("seq", min=2, max=512)
    example = tensors(32, 32, head_dim=16)
    program = torch.export.export(Block(), example, dynamic_shapes=({1: seq}, {1: seq}, {1: seq}))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(OP.default) == 1
    inputs = tensors(57, 57, head_dim=16)
    for a, b in zip(program.module()(*inputs), Block()(*inputs), strict=True):
        assert torch.equal(a, b)


@each_qk
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("straight_through", [False, True])
def test_autocast(qk: str, compiled: bool, straight_through: bool) -> None:
    """As under other ops; the products that put back what smoothing took stay in float32."""

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return quantized_attention(*inputs, qk=qk, straight_through=straight_through, return_lse=True)

    torch.compiler.reset()
    inputs = tensors(70, 200, head_dim=16)
    with torch.autocast("cpu", torch.bfloat16):
        call = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        out, lse = call(*inputs)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    for result, want in zip((out, lse), function(*(x.bfloat16() for x in inputs)), strict=True):
        assert torch.equal(result, want)


@each_qk
@each_pv
def test_vmap_of_the_op(qk: str, pv: str) -> None:
    """Lists and orders may be mapped or the same for all, for each batch entry or for one."""
    inputs = [tensors(70, 200, head_dim=16) for _ in range(3)]
    for batch in (1, 2):
        blocks = small_blocks(batch)
        samples = [operands(*x, qk=qk, pv=pv, blocks=blocks)[0] for x in inputs]
        options = operands(*inputs[0], qk=qk, pv=pv, blocks=blocks)[1]
        order = torch.rand(batch, 4, 70).argsort(-1).int()
        stacked = [None if x[0] is None else torch.stack(x) for x in zip(*samples, strict=True)]
        lists = [blocks.counts, blocks.indices, blocks.full]
        in_dims = (*(None if x is None else 0 for x in stacked[:8]), None, None, None, None)
        out, lse = torch.vmap(lambda *x, options=options: OP(*x, **options), in_dims)(*stacked[:8], *lists, order)
        for i, sample in enumerate(samples):
            want, want_lse = OP(*sample, order=order, **options)
            assert torch.equal(out[i], want)
            assert torch.equal(lse[i], want_lse)


@each_qk
@pytest.mark.parametrize("straight_through", [False, True])
def test_vmap(qk: str, straight_through: bool) -> None:
    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return quantized_attention(*inputs, qk=qk, straight_through=straight_through, return_lse=True)

    inputs = [tensors(70, 200, head_dim=16) for _ in range(3)]
    results = torch.vmap(function)(*(torch.stack(x) for x in zip(*inputs, strict=True)))
    for i, sample in enumerate(inputs):
        for result, want in zip(results, function(*sample), strict=True):
            torch.testing.assert_close(result[i], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (7, 2)}], ids=str)
@each_pv
def test_flops_count_kept_scores(pv: str, options: dict[str, Any]) -> None:
    kept = reference.band_mask(70, 200, **options).sum().item()
    with FlopCounterMode(display=False) as counter:
        quantized_attention(*tensors(70, 200, head_dim=16), pv=pv, **options)
    assert counter.get_total_flops() == 4 * 2 * 4 * 16 * kept


def test_flops_count_kept_scores_of_blocks() -> None:
    q, k, v = tensors(70, 200, head_dim=16)
    for blocks in (small_blocks(), small_blocks(1)):
        with FlopCounterMode(display=False) as counter:
            quantized_attention(q, k, v, blocks=blocks)
        kept = blocks.token_mask().expand(2, 4, -1, -1).sum().item()
        assert counter.get_total_flops() == 4 * 16 * kept
    dense = BlockList.dense(seq_q=70, seq_k=200, causal=True, device="meta")
    with FlopCounterMode(display=False) as counter:
        quantized_attention(*(x.to("meta") for x in (q, k, v)), blocks=dense)
    assert counter.get_total_flops() == 4 * 2 * 4 * 16 * reference.band_mask(70, 200, causal=True).sum().item()


def test_backward_of_straight_through_counts_as_that_of_attention() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(70, 200, head_dim=16))
    with FlopCounterMode(display=False) as counter:
        out = quantized_attention(q, k, v, straight_through=True, causal=True)
        forward = counter.get_total_flops()
        out.sum().backward()
    product = 2 * 2 * 4 * 70 * 16  # of each query and its head's mean of keys, for the log-sum-exp
    assert counter.get_total_flops() - forward == (forward - product) * 5 // 2


# Refusals.


def replaced(**changes: Callable[[Tensor], Tensor]) -> Callable[[], dict[str, Any]]:
    def arguments() -> dict[str, Any]:
        given = dict(zip("qkv", tensors(20, 20), strict=True))
        return {name: changes.get(name, lambda x: x)(x) for name, x in given.items()}

    return arguments


def with_options(**options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**replaced()(), **options}


def strided(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def repeated_heads(x: Tensor) -> Tensor:
    return x.repeat(1, 1, 3, 1)[:, :, :5]


BAD: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "qk": (with_options(qk="int2"), ValueError, r"qk must be 'int8', 'int4' or 'fp8', got 'int2'"),
    "pv": (with_options(pv="fp16"), ValueError, r"pv must be 'int8', 'fp8' or 'bf16', got 'fp16'"),
    "rank of q": (replaced(q=lambda x: x[0]), ValueError, r"q must have 4 dimensions, .*, got \[20, 4, 64\]"),
    "rank of v": (replaced(v=lambda x: x[None]), ValueError, r"v must have 4 dimensions, .*, got \[1, 2, 20, 2, 64\]"),
    "float64": (
        replaced(q=Tensor.double, k=Tensor.double, v=Tensor.double),
        ValueError,
        "q must be float32, float16 or bfloat16, got torch.float64",
    ),
    "k of another dtype": (
        replaced(k=Tensor.half),
        ValueError,
        "k must have the dtype of q, torch.float32, got torch.float16",
    ),
    "v of another device": (
        replaced(v=lambda x: x.to("meta")),
        ValueError,
        "v must be on the device of q, cpu, got meta",
    ),
    "strided q": (replaced(q=strided), ValueError, r"q must be contiguous in its last dimension, got strides \["),
    "strided v": (replaced(v=strided), ValueError, r"v must be contiguous in its last dimension, got strides \["),
    "batch": (replaced(k=lambda x: x[:1]), ValueError, "k must have the batch size of q, 2, got 1"),
    "head_dim of k": (replaced(k=lambda x: x[..., :32]), ValueError, "k must have the head_dim of q, 64, got 32"),
    "heads": (
        replaced(q=repeated_heads),
        ValueError,
        "the heads of q must be a multiple of those of k, got 5 and 2",
    ),
    "no heads of k": (
        replaced(k=lambda x: x[:, :, :0], v=lambda x: x[:, :, :0]),
        ValueError,
        "the heads of q must be a multiple of those of k, got 4 and 0",
    ),
    "shape of v": (
        replaced(v=lambda x: x[:, :19]),
        ValueError,
        r"v must have the shape of k, \[2, 20, 2, 64\], got \[2, 19, 2, 64\]",
    ),
    "head_dim": (
        replaced(q=lambda x: x[..., :12], k=lambda x: x[..., :12], v=lambda x: x[..., :12]),
        RuntimeError,
        "head_dim must be a multiple of 8 between 8 and 256, got 12",
    ),
    "scale 0": (with_options(scale=0.0), RuntimeError, "scale must be finite and positive, got 0"),
    "scale nan": (with_options(scale=math.nan), RuntimeError, "scale must be finite and positive, got nan"),
    "window": (
        with_options(window=(-2, 0)),
        RuntimeError,
        "window.left must be at least 0, or -1 for no bound, got -2",
    ),
    "window of three": (
        with_options(window=(1, 2, 3)),
        RuntimeError,
        r"window must be \(left, right\), got \[1, 2, 3\]",
    ),
    "blocks": (
        with_options(blocks=torch.ones(1)),
        TypeError,
        r"blocks must be a fastattn\.BlockList, got Tensor",
    ),
    "blocks of other lengths": (
        with_options(blocks=BlockList.dense(seq_q=21, seq_k=20)),
        ValueError,
        "blocks must be for 20 queries and 20 keys, as q and k are, got a list for 21 and 20",
    ),
    "blocks and causal": (
        with_options(blocks=BlockList.dense(seq_q=20, seq_k=20), causal=True),
        ValueError,
        "causal and window must be left out where blocks are given",
    ),
    "blocks and window": (
        with_options(blocks=BlockList.dense(seq_q=20, seq_k=20), window=(1, 1)),
        ValueError,
        "causal and window must be left out where blocks are given",
    ),
    "permutation of grouped heads": (
        with_options(permutation=torch.zeros(1, 4, 20, dtype=torch.int32)),
        ValueError,
        r"permutation needs q and k of equal lengths and, unless it is one for all heads, of equally many heads, got",
    ),
    "permutation's dtype": (
        with_options(permutation=torch.zeros(20)),
        RuntimeError,
        r"permutation must be Int .*, got Float \[1, 1, 20\]",
    ),
    "permutation's length": (
        with_options(permutation=torch.zeros(19, dtype=torch.int32)),
        RuntimeError,
        r"permutation must be Int .* = \[1, 1, 20\], got Int \[1, 1, 19\]",
    ),
    "permutation and straight-through": (
        with_options(permutation=torch.arange(20), straight_through=True),
        ValueError,
        "straight_through and permutation cannot be used together",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD.keys())
def test_refused(arguments: Callable[[], dict[str, Any]], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"^(quantized_attention|quantize_tokens): " + message):
        quantized_attention(**arguments())


PARAMETERS = [
    "q",
    "q_scales",
    "k",
    "k_scales",
    "v",
    "v_scales",
    "v_mean",
    "key_term",
    "counts",
    "indices",
    "full",
    "order",
    "block_size",
    "causal",
    "window",
    "scale",
    "dtype",
]
Given = dict[str, Any]


def changed(**changes: Callable[[Any], Any]) -> Callable[[Given], Given]:
    return lambda given: {**given, **{name: change(given[name]) for name, change in changes.items()}}


def put(**values: Any) -> Callable[[Given], Given]:
    return lambda given: {**given, **values}


COUNTS, INDICES = torch.zeros(2, 4, 2, dtype=torch.int32), torch.zeros(2, 4, 2, 4, dtype=torch.int32)
LISTED = {"counts": COUNTS, "indices": INDICES, "block_size": [64, 64]}

WRONG: dict[str, tuple[Callable[[Given], Given], str]] = {
    "rank of q": (changed(q=lambda x: x[0]), r"q must have 4 dimensions, .* got \[70, 4, 16\]"),
    "dtype of q": (changed(q=Tensor.float), "q must be int8 or float8_e4m3fn, got Float"),
    "dtype of k": (changed(k=Tensor.int), "k must be int8 or float8_e4m3fn, got Int"),
    "formats that differ": (
        changed(k=lambda x: x.view(torch.float8_e4m3fn)),
        "k must have the dtype of q, int8, got float8_e4m3fn",
    ),
    "strided q": (changed(q=strided), r"q must be contiguous in its last dimension, got strides \["),
    "strided v": (changed(v=strided), r"v must be contiguous in its last dimension, got strides \["),
    "integer v": (changed(v=Tensor.int), "v must be float32, float16 or bfloat16, got Int"),
    "rank of v": (changed(v=lambda x: x[0]), "v must have 4 dimensions"),
    "k's batch": (
        changed(k=lambda x: x[:1], k_scales=lambda x: x[:1], v_scales=lambda x: x[:1]),
        "k must have the batch size of q, 2, got 1",
    ),
    "heads": (
        changed(q=lambda x: x[:, :, :3], q_scales=lambda x: x[:, :3]),
        "the heads of q must be a multiple of those of k, got 3 and 2",
    ),
    "head_dim of k": (changed(k=lambda x: x[..., :8]), "k must have the head_dim of q, 16, got 8"),
    "head_dim": (
        changed(q=lambda x: x[..., :4], k=lambda x: x[..., :4], v=lambda x: x[:, :, :4], v_scales=lambda x: x[..., :4]),
        "head_dim must be a multiple of 8 between 8 and 256, got 4",
    ),
    "padding of v": (
        changed(v=lambda x: x[..., :200].contiguous()),
        r"v of 8 bits must be contiguous \[2, 2, 16, 224\], got \[2, 2, 16, 200\]",
    ),
    "v not transposed": (
        changed(v=lambda x: x.transpose(1, 2).contiguous()),
        r"v of 8 bits must be contiguous \[2, 2, 16, 224\], got \[2, 16, 2, 224\]",
    ),
    "dtype of q_scales": (
        changed(q_scales=Tensor.double),
        r"q_scales must be Float \[batch, heads, seq_q\] = \[2, 4, 70\], got Double \[2, 4, 70\]",
    ),
    "shape of q_scales": (
        changed(q_scales=lambda x: x[..., :69]),
        r"q_scales must be Float \[batch, heads, seq_q\] = \[2, 4, 70\], got Float \[2, 4, 69\]",
    ),
    "groups of k_scales": (
        changed(k_scales=lambda x: x[..., :4]),
        r"k_scales must be Float \[batch, kv_heads, groups of 32 keys\] = \[2, 2, 8\], got Float \[2, 2, 4\]",
    ),
    "shape of v_scales": (
        changed(v_scales=lambda x: x[:, :1]),
        r"v_scales must be Float \[batch, kv_heads, head_dim\] = \[2, 2, 16\], got Float \[2, 1, 16\]",
    ),
    "no v_scales": (put(v_scales=None), "v_scales must be given where v has 8 bits, and only there"),
    "v_scales for nothing": (
        put(v=torch.zeros(2, 200, 2, 16)),
        "v_scales must be given where v has 8 bits, and only there",
    ),
    "shape of v as it is": (
        put(v=torch.zeros(2, 199, 2, 16), v_scales=None),
        r"v must have the shape of k, \[2, 200, 2, 16\], got \[2, 199, 2, 16\]",
    ),
    "shape of v_mean": (
        put(v_mean=torch.zeros(2, 2, 8)),
        r"v_mean must be Float \[batch, kv_heads, head_dim\] = \[2, 2, 16\], got Float \[2, 2, 8\]",
    ),
    "v_mean of wide values": (
        put(v=torch.zeros(2, 200, 2, 16), v_scales=None, v_mean=torch.zeros(2, 2, 16)),
        "v_mean must be given only where v has 8 bits",
    ),
    "shape of key_term": (
        put(key_term=torch.zeros(2, 4, 70)),
        r"key_term must be Float \[batch, heads, seq_k\] = \[2, 4, 200\], got Float \[2, 4, 70\]",
    ),
    "dtype": (put(dtype=torch.float64), "dtype must be float32, float16 or bfloat16, got Double"),
    "dtype of values as they are": (
        put(v=torch.zeros(2, 200, 2, 16), v_scales=None, dtype=torch.float16),
        "dtype must be that of v, Float, or left out, got Half",
    ),
    "counts alone": (put(counts=COUNTS), "counts, indices and block_size must be given together"),
    "block_size alone": (put(block_size=[64, 64]), "counts, indices and block_size must be given together"),
    "full alone": (put(full=INDICES.bool()), "full must be given only where counts is"),
    "window and blocks": (put(window=[1, 1], **LISTED), "window must be left out where counts is given"),
    "block_size of one": (
        put(**{**LISTED, "block_size": [64]}),
        r"block_size must be \(queries, keys\), each 64 or 128, got \[64\]",
    ),
    "block_size": (
        put(counts=COUNTS[..., :1], indices=INDICES[..., :1, :2], block_size=[70, 100]),
        "a block must have 64 or 128 queries, and keys, got 70 x 100",
    ),
    "rows of counts": (
        put(**{**LISTED, "counts": COUNTS[..., :1]}),
        r"counts must be Int .* = \[2, 4, 2\], got Int \[2, 4, 1\]",
    ),
    "dtype of indices": (put(**{**LISTED, "indices": INDICES.long()}), r"indices must be Int .*, got Long"),
    "dtype of full": (put(**LISTED, full=INDICES), r"full must be Bool .*, got Int"),
    "shape of order": (
        put(order=torch.zeros(1, 1, 69, dtype=torch.int32)),
        r"order must be Int \[batch or 1, heads or 1, tokens\] = \[1, 1, 70\], got Int \[1, 1, 69\]",
    ),
    "dtype of order": (put(order=torch.zeros(1, 4, 70).long()), r"order must be Int .*, got Long \[1, 4, 70\]"),
    "scale": (put(scale=-1.0), "scale must be finite and positive, got -1"),
    "window": (put(window=[0, -3]), "window.right must be at least 0, or -1 for no bound, got -3"),
    "window of one": (put(window=[3]), r"window must be \(left, right\), got \[3\]"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_op_refuses(change: Callable[[Given], Given], message: str) -> None:
    tokens, _ = operands(*tensors(70, 200, head_dim=16), qk="int8", pv="int8")
    given = change({**dict.fromkeys(PARAMETERS), **dict(zip(PARAMETERS, tokens, strict=False)), "causal": False})
    with pytest.raises(RuntimeError, match="^quantized_attention: " + message):
        OP(**given)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_without_cuda() -> None:
    """A CPU-only fastattn, or a CPU-only torch, asked for CUDA."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    tokens, options = operands(*tensors(70, 200, head_dim=16), qk="int8", pv="int8")
    with pytest.raises(RuntimeError, match=r"built without CUDA; pass CPU tensors|this torch has no CUDA"):
        OP.default.redispatch(cuda, *tokens, **options)


# On a GPU: the CPU kernel's roundings, on the same operands.

GPU_FORMATS = [("int8", "int8"), ("int4", "int8"), ("int8", "fp8"), ("int8", "bf16"), ("fp8", "fp8")]
# Beside what bfloat16 leaves of an output, 1.7e-3: an exponential that is approximate moves weights over ties, sums of
# fp8 products keep 14 bits, and weights beside 16-bit values have 16 bits as well.
GPU_ERROR = {"int8": 4e-3, "fp8": 8e-3, "bf16": 5e-3}
on_gpu = pytest.mark.gpu
each_gpu_format = pytest.mark.parametrize(("qk", "pv"), GPU_FORMATS, ids="-".join)


def assert_gpu_agrees(
    q: Tensor, k: Tensor, v: Tensor, *, qk: str, pv: str, order: Tensor | None = None, **options: Any
) -> None:
    given, options = operands(q.bfloat16(), k.bfloat16(), v.bfloat16(), qk=qk, pv=pv, **options)
    if qk == "int4":
        given = (*given[:7], torch.randn(q.shape[0], q.shape[2], k.shape[1]), *given[8:])
    want, want_lse = OP(*given, order=order, **options, dtype=torch.bfloat16)
    on_device = [x if x is None else x.cuda() for x in (*given, order)]
    out, lse = OP(*on_device[:-1], order=on_device[-1], **options, dtype=torch.bfloat16)
    assert relative_error(out.cpu(), want.double()) < GPU_ERROR[pv] or not want.any()
    assert torch.equal(lse.cpu() == -math.inf, want_lse == -math.inf)
    seen = want_lse > -math.inf
    assert ((lse.cpu() - want_lse)[seen].abs() < 1e-4).all()


@on_gpu
@each_gpu_format
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_gpu_agrees_with_the_cpu(qk: str, pv: str, head_dim: int, causal: bool) -> None:
    q, k, v = tensors(300, 700, heads=4, kv_heads=2, head_dim=head_dim)
    assert_gpu_agrees(q, k, v, qk=qk, pv=pv, causal=causal)


@on_gpu
@each_gpu_format
@pytest.mark.parametrize("seq", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 4113])
def test_gpu_lengths_around_tiles_and_groups(qk: str, pv: str, seq: int) -> None:
    q, k, v = tensors(seq, seq, batch=1, heads=2, kv_heads=1)
    assert_gpu_agrees(q, k, v, qk=qk, pv=pv, causal=seq % 2 == 0)


@on_gpu
@each_gpu_format
@pytest.mark.parametrize("block_size", [(64, 64), (64, 128), (128, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.4, 1.0])
def test_gpu_blocks(qk: str, pv: str, block_size: tuple[int, int], density: float) -> None:
    seq = 1500
    q, k, v = tensors(seq, seq, head_dim=128)
    k[:, 128:256] *= 8  # scales differ from block to block
    mask = torch.rand(2, 4, -(-seq // block_size[0]), -(-seq // block_size[1])) < density
    causal = density == 0.4
    blocks = BlockList.from_mask(mask, seq_q=seq, seq_k=seq, block_size=block_size, causal=causal)
    assert_gpu_agrees(q, k, v, qk=qk, pv=pv, blocks=blocks)


@on_gpu
@each_gpu_format
def test_gpu_puts_tokens_back_in_order(qk: str, pv: str) -> None:
    q, k, v = tensors(520, 520)
    assert_gpu_agrees(q, k, v, qk=qk, pv=pv, order=torch.rand(2, 4, 520).argsort(-1).int())


@on_gpu
@each_gpu_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_is_as_precise_as_the_cpu(qk: str, pv: str, dtype: torch.dtype) -> None:
    """From end to end, quantized where it runs."""
    inputs = [x.to(dtype) for x in tensors(700, 1000, head_dim=128)]
    exact, _ = reference.attention(*(x.double() for x in inputs))
    of_cpu = relative_error(quantized_attention(*inputs, qk=qk, pv=pv), exact)
    out, lse = quantized_attention(*(x.cuda() for x in inputs), qk=qk, pv=pv, return_lse=True)
    assert relative_error(out.cpu(), exact) < 1.1 * of_cpu + 2e-3
    assert lse.isfinite().all()


@on_gpu
@each_gpu_format
def test_gpu_gives_the_same_bits_every_time_and_in_a_graph(qk: str, pv: str) -> None:
    q, k, v = (x.bfloat16().cuda() for x in tensors(3000, 3000, heads=16, kv_heads=4, head_dim=128))
    first = quantized_attention(q, k, v, qk=qk, pv=pv, causal=True)
    assert torch.equal(first, quantized_attention(q, k, v, qk=qk, pv=pv, causal=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = quantized_attention(q, k, v, qk=qk, pv=pv, causal=True)
    q.copy_(q.flip(1))
    graph.replay()
    assert torch.equal(out, quantized_attention(q, k, v, qk=qk, pv=pv, causal=True))


@on_gpu
@each_gpu_format
def test_gpu_shows_what_is_not_finite(qk: str, pv: str) -> None:
    q, k, v = (x.bfloat16() for x in tensors(200, 300))
    if qk != "int4":
        q[0, 7, 1, 3] = math.nan
    v[1, 9, 0, 5] = math.inf
    lost = ~quantized_attention(q.cuda(), k.cuda(), v.cuda(), qk=qk, pv=pv).isfinite().cpu()
    assert lost[1, :, :2, 5].all()
    assert lost[0, 7, 1].all() == (qk != "int4")
    assert lost.sum() == 2 * 200 + 64 * (qk != "int4")


@on_gpu
def test_gpu_refusals() -> None:
    q, k, v = (x.bfloat16().cuda() for x in tensors(64, 64))
    with pytest.raises(RuntimeError, match="on the GPU int8 q and k go with v of"):
        quantized_attention(q, k, v, qk="fp8", pv="int8")
    with pytest.raises(RuntimeError, match="head_dim must be a multiple of 16 on the GPU, got 24"):
        quantized_attention(*(x[..., :24] for x in (q, k, v)))
