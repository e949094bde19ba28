"""Rectangles and segments: what `attention` sees in addition to a band, and what of all it keeps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from cases import Case, assert_gradients_right, gradients, relative_error
from fastattn import reference

HEADS, SEQ_Q, SEQ_K = 4, 150, 210


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed(*lengths: int) -> Tensor:
    """Segments one after the other, ``[1, tokens]``."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int()


def shuffled(tokens: int, segments: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(-segments // 2, segments, (batch, tokens), dtype=torch.int32, generator=generator)


PREFIX = int32([[0, 130, 0, 190]])
EACH_OF_BATCH = int32(
    [[3, 60, 100, 170], [70, 140, 0, 210], [0, 0, 0, 0]],
    [[-5, 65, 150, 1000], [140, 100, 0, 210], [149, 150, 209, 210]],
)
SORTED = packed(40, 90, 20), packed(64, 100, 46)
OPTIONS: dict[str, dict[str, Any]] = {
    "prefix": {"rectangles": PREFIX, "causal": True},
    "rectangles of each batch entry": {"rectangles": EACH_OF_BATCH, "causal": True},
    "rectangles alone": {"rectangles": EACH_OF_BATCH, "window": (0, 0)},
    "segments": {"segment_ids": SORTED},
    "segments, causal": {"segment_ids": SORTED, "causal": True},
    "segments in any order": {"segment_ids": (shuffled(SEQ_Q, 3, 2), shuffled(SEQ_K, 3)), "causal": True},
    "segments, one of keys": {"segment_ids": (shuffled(SEQ_Q, 3), torch.zeros(2, SEQ_K, dtype=torch.int32))},
    "windows of heads": {
        "rectangles": PREFIX,
        "segment_ids": SORTED,
        "window": (int32(3, -1, 70, 0), int32(0, 5, -1, 130)),
    },
    "sinks": {"segment_ids": SORTED, "causal": True, "sinks": torch.tensor([0.3, -math.inf, 9.0, -7.0])},
    "all": {
        "rectangles": EACH_OF_BATCH,
        "segment_ids": (shuffled(SEQ_Q, 2, 2), shuffled(SEQ_K, 2)),
        "window": (int32(30, -1, 70, 0), int32(0, 5, -1, 130)),
        "sinks": torch.tensor([0.3, -1.0, 4.0, 0.0]),
        "scale": 0.2,
    },
}
each_option = pytest.mark.parametrize("name", OPTIONS)


def on(device: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: on(device, x) for key, x in value.items()}
    if isinstance(value, tuple):
        return tuple(on(device, x) for x in value)
    return value.to(device) if isinstance(value, Tensor) else value


@each_option
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_values(name: str, head_dim: int, place) -> None:
    """At most twice the error of the plain formula in the same precision; the LSE as in float32."""
    device, dtype = place
    options, case = on(device, OPTIONS[name]), Case(SEQ_Q, SEQ_K, heads=HEADS, kv_heads=2, head_dim=head_dim)
    inputs = case.inputs(device, dtype)
    out, lse = fastattn.attention(*inputs, **options, return_lse=True)
    exact, exact_lse = reference.attention(*(x.double() for x in inputs), **options)
    rival, _ = reference.attention(*inputs, **options)
    assert relative_error(out, exact) <= 2 * relative_error(rival, exact) + (1e-6 if dtype == torch.float32 else 1e-4)
    assert relative_error(lse, exact_lse) < 1e-5


def assert_sees(seq_q: int, seq_k: int, options: dict[str, Any], device: str, dtype: torch.dtype) -> None:
    """With K = 0 all visible keys weigh the same, and one-hot values name them."""
    masks = [x for x in (options.get("rectangles"), *segments_of(options)) if x is not None]
    batch, heads, head_dim = max([len(x) for x in masks], default=1), 4, 128
    band = reference.band_mask(
        seq_q, seq_k, causal=options.get("causal", False), window=options.get("window"), device=device
    )
    keep = reference.regions_mask(band, options.get("rectangles"), options.get("segment_ids"))
    keep = keep.expand(batch, heads, seq_q, seq_k)
    visible = torch.zeros_like(keep)
    q = torch.randn(batch, seq_q, heads, head_dim, device=device).to(dtype)
    k = torch.zeros(batch, seq_k, heads, head_dim, device=device, dtype=dtype)
    for first in range(0, seq_k, head_dim):
        keys = range(first, min(first + head_dim, seq_k))
        v = torch.zeros_like(k)
        v[:, keys, :, range(len(keys))] = 1
        out, lse = fastattn.attention(q, k, v, **options, return_lse=True)
        visible[..., first : first + len(keys)] = out.transpose(1, 2)[..., : len(keys)] != 0
    assert torch.equal(visible, keep)
    torch.testing.assert_close(lse, keep.sum(-1).float().log(), atol=1e-5, rtol=0)


def segments_of(options: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    ids = options.get("segment_ids")
    return (ids, ids) if ids is None or isinstance(ids, Tensor) else ids


BANDS: dict[str, dict[str, Any]] = {
    "nothing else": {"window": (int32(0, 0, 0, 0), int32(0, 0, 0, 0))},
    "causal": {"causal": True},
    "window": {"window": (20, 70)},
    "windows of heads": {"window": (int32(0, 63, -1, 300), int32(0, 64, 20, -1))},
}
# Edges of the tiles in use, and their neighbours: queries 64, 96, 128; keys 64, 128.
AROUND_TILES = [
    int32([[128 + a, 256 + b, 128 + c, 256 + d]])
    for a, b, c, d in [(0, 0, 0, 0), (1, -1, -1, 1), (-1, 1, 1, -1), (-1, -1, 1, 1), (0, 1, 0, 1), (1, 0, 1, 0)]
]
RECTANGLES: dict[str, Tensor] = {
    **{f"around tiles {i}": rectangle for i, rectangle in enumerate(AROUND_TILES)},
    "tiles of the CPU": int32([[96, 192, 0, 129], [191, 288, 127, 300]]),
    "one score": int32([[200, 201, 290, 291]]),
    "everything": int32([[0, 260, 0, 300]]),
    "more than everything": int32([[-(2**31), 2**31 - 1, -(2**31), 2**31 - 1]]),
    "outside": int32([[260, 400, 0, 300], [0, 260, 300, 301], [-9, 0, 0, 300], [0, 260, -9, 0]]),
    "empty and inverted": int32([[100, 100, 0, 300], [90, 20, 0, 300], [0, 260, 70, 60], [5, 9, 8, 8]]),
    "nested": int32([[0, 250, 10, 290], [64, 192, 64, 256], [128, 130, 128, 192], [129, 130, 128, 129]]),
    "overlapping": int32([[0, 140, 0, 140], [100, 240, 100, 300], [130, 200, 60, 130], [0, 260, 255, 257]]),
    "a checkerboard": int32([[0, 130, 128, 300], [130, 260, 0, 128]]),
    "of each batch entry": int32([[0, 64, 64, 300], [0, 0, 0, 0]], [[200, 260, 0, 64], [0, 64, 128, 192]]),
}


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("name", RECTANGLES)
def test_rectangles_probed(name: str, band: str, device, dtype) -> None:
    assert_sees(260, 300, on(device, {**BANDS[band], "rectangles": RECTANGLES[name]}), device, dtype)


SEGMENTS: dict[str, tuple[Tensor, Tensor]] = {
    "one": (torch.zeros(1, 260, dtype=torch.int32), torch.zeros(1, 300, dtype=torch.int32)),
    "none in common": (torch.zeros(1, 260, dtype=torch.int32), torch.ones(1, 300, dtype=torch.int32)),
    "sorted": (packed(63, 66, 1, 130), packed(129, 63, 0, 108)),
    "tile after tile": (packed(64, 64, 64, 64, 4), packed(64, 64, 64, 64, 44)),
    "backwards": (3 - packed(96, 64, 100), packed(120, 80, 100)),
    "far and negative": (packed(100, 160) * 2**31 - 2**31, packed(150, 150).neg() * 2**31),
    "interleaved": (torch.arange(260).int()[None] % 3, torch.arange(300).int()[None] % 4),
    "in any order": (shuffled(260, 5), shuffled(300, 5)),
    "keys of a padded batch": (packed(260), 1 - (torch.arange(300) < torch.tensor([[300], [70], [129]])).int()),
    "of each batch entry": (shuffled(260, 3, 2), torch.cat([packed(200, 100), packed(64, 236)])),
}


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_probed(name: str, band: str, device, dtype) -> None:
    assert_sees(260, 300, on(device, {**BANDS[band], "segment_ids": SEGMENTS[name]}), device, dtype)


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("name", ["sorted", "interleaved", "of each batch entry"])
def test_both_probed(name: str, band: str, device, dtype) -> None:
    masks = {"segment_ids": SEGMENTS[name], "rectangles": RECTANGLES["overlapping"]}
    assert_sees(260, 300, on(device, {**BANDS[band], **masks}), device, dtype)


@pytest.mark.parametrize("length", [1, 31, 33, 63, 64, 65, 95, 97, 127, 128, 129, 193, 257])
def test_lengths_around_tiles(length: int, device, dtype) -> None:
    ids = packed(length // 3, length - length // 3)
    options = {"rectangles": int32([[0, length - 1, length // 2, length]]), "segment_ids": ids, "causal": True}
    assert_sees(length, length, on(device, options), device, dtype)


def test_long_sequences_of_short_segments(device, dtype) -> None:
    """Longer than a cursor looks ahead, and than a warp surveys at a time."""
    ids = packed(*[300] * 16)
    q, k, v = Case(4800, 4800, batch=1, heads=2, kv_heads=1).inputs(device, dtype)
    out, lse = fastattn.attention(q, k, v, segment_ids=ids.to(device), causal=True, return_lse=True)
    for first in range(0, 4800, 300):
        alone, alone_lse = fastattn.attention(
            *(x[:, first : first + 300] for x in (q, k, v)), causal=True, return_lse=True
        )
        assert relative_error(out[:, first : first + 300], alone.double()) < (1e-6 if dtype == torch.float32 else 5e-3)
        torch.testing.assert_close(lse[..., first : first + 300], alone_lse, atol=1e-4, rtol=1e-5)


def test_rows_without_keys(device, dtype) -> None:
    q, k, v = Case(200, 130, heads=HEADS).inputs(device, dtype)
    ids = torch.zeros(1, 200, dtype=torch.int32), torch.zeros(1, 130, dtype=torch.int32)
    ids[0][0, 20:170] = 1
    sinks = torch.tensor([0.5, -3.0, -math.inf, 80.0], device=device)
    out, lse = fastattn.attention(q, k, v, segment_ids=on(device, ids), return_lse=True)
    assert torch.count_nonzero(out[:, 20:170]) == 0
    assert (lse[..., 20:170] == -math.inf).all()
    assert lse[..., :20].isfinite().all()
    out, lse = fastattn.attention(q, k, v, segment_ids=on(device, ids), sinks=sinks, return_lse=True)
    assert torch.count_nonzero(out[:, 20:170]) == 0
    torch.testing.assert_close(lse[..., 20:170], sinks[None, :, None].expand(2, -1, 150))


def test_one_tensor_of_ids_is_of_both(device, dtype) -> None:
    q, k, v = Case(150, 150).inputs(device, dtype)
    ids = shuffled(150, 3, 2).to(device)
    assert torch.equal(
        fastattn.attention(q, k, v, segment_ids=ids), fastattn.attention(q, k, v, segment_ids=(ids, ids))
    )


@pytest.mark.parametrize(("seq_q", "seq_k"), [(0, 50), (50, 0), (0, 0)])
def test_nothing_to_attend(seq_q: int, seq_k: int, device, dtype) -> None:
    q, k, v = Case(seq_q, seq_k).inputs(device, dtype)
    ids = on(device, (packed(seq_q), packed(seq_k)))
    out, lse = fastattn.attention(q, k, v, segment_ids=ids, rectangles=on(device, PREFIX), return_lse=True)
    assert torch.count_nonzero(out) == 0
    assert (lse == -math.inf).all()


def test_masks_that_are_strided(device, dtype) -> None:
    q, k, v = Case(SEQ_Q, SEQ_K).inputs(device, dtype)
    options = on(device, {"rectangles": EACH_OF_BATCH, "segment_ids": (shuffled(SEQ_Q, 2, 2), shuffled(SEQ_K, 2))})
    strided = {
        "rectangles": options["rectangles"].mT.contiguous().mT,
        "segment_ids": tuple(x.repeat_interleave(2, 1)[:, ::2] for x in options["segment_ids"]),
    }
    assert torch.equal(fastattn.attention(q, k, v, **strided), fastattn.attention(q, k, v, **options))


@each_option
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_gradients(name: str, head_dim: int, place) -> None:
    device, dtype = place
    options, case = on(device, OPTIONS[name]), Case(SEQ_Q, SEQ_K, heads=HEADS, kv_heads=2, head_dim=head_dim)
    q, k, v = case.inputs(device, dtype)
    inputs = {"q": q, "k": k, "v": v, **({"sinks": options.pop("sinks")} if "sinks" in options else {})}
    assert_gradients_right(
        lambda **x: fastattn.attention(**x, **options, return_lse=True),
        lambda **x: reference.attention(**x, **options),
        inputs,
        case.cotangents(device, dtype),
    )


@pytest.mark.parametrize("name", SEGMENTS)
def test_gradients_of_segments(name: str, device, dtype) -> None:
    """Also of keys that no query shares a segment with: 0, whatever is in them."""
    of_queries, of_keys = on(device, SEGMENTS[name])
    case = Case(260, 300, batch=max(len(of_queries), len(of_keys)), heads=2, kv_heads=1)
    q, k, v = case.inputs(device, dtype)
    inputs, cotangents = {"q": q, "k": k, "v": v}, case.cotangents(device, dtype)
    options = {"segment_ids": (of_queries, of_keys)}

    def ours(**x: Tensor) -> Any:
        return fastattn.attention(**x, **options, return_lse=True)

    assert_gradients_right(ours, lambda **x: reference.attention(**x, **options), inputs, cotangents)
    shared = (of_queries[:, :, None] == of_keys[:, None, :]).any(1)
    lonely = ~shared.expand(case.batch, -1)
    k[lonely], v[lonely] = torch.nan, torch.nan
    poisoned = gradients(ours, inputs, cotangents)
    assert torch.count_nonzero(poisoned["k"][lonely]) == 0
    assert torch.count_nonzero(poisoned["v"][lonely]) == 0


@each_option
def test_opcheck_and_compile(name: str, device, dtype) -> None:
    options = on(device, OPTIONS[name])
    q, k, v = Case(SEQ_Q, SEQ_K, heads=HEADS, kv_heads=2, head_dim=16).inputs(device, dtype)
    window = options.get("window", ())
    tensors = (
        options.get("sinks"),
        None,
        *(window if window and isinstance(window[0], Tensor) else (None, None)),
        options.get("rectangles"),
        *segments_of(options),
    )
    scalars = {"causal": options.get("causal", False), "scale": options.get("scale")}
    torch.library.opcheck(torch.ops.fastattn.attention.default, (q, k, v, *tensors), scalars)
    torch.compiler.reset()  # past a number of recompilations torch would stop compiling
    compiled = torch.compile(lambda *x: fastattn.attention(*x, **options), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), fastattn.attention(q, k, v, **options))


def test_opcheck_backward(device, dtype) -> None:
    case = Case(SEQ_Q, SEQ_K, heads=HEADS, kv_heads=2, head_dim=16)
    inputs, masks = case.inputs(device, dtype), on(device, (EACH_OF_BATCH, *SORTED))
    out, lse = torch.ops.fastattn.attention(*inputs, None, None, None, None, *masks, causal=True)
    arguments = (*case.cotangents(device, dtype), *inputs, out, lse, None, None, None, *masks)
    torch.library.opcheck(torch.ops.fastattn.attention_backward.default, arguments, {"causal": True})


@pytest.mark.parametrize("shared", [False, True])
def test_vmap(shared: bool, device, dtype) -> None:
    """Over the masks too; an entry that a batch shares stays one for all of it."""
    q, k, v = (x.unflatten(0, (2, 2)) for x in Case(60, 70, batch=4).inputs(device, dtype))
    batch = 1 if shared else 2
    rectangles = torch.randint(0, 70, (2, batch, 3, 4), dtype=torch.int32, device=device)
    of_queries = torch.randint(0, 2, (2, batch, 60), dtype=torch.int32, device=device)
    of_keys = torch.randint(0, 2, (1, 70), dtype=torch.int32, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor, rectangles: Tensor, of_queries: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, causal=True, rectangles=rectangles, segment_ids=(of_queries, of_keys))

    out = torch.vmap(attend)(q, k, v, rectangles, of_queries)
    for i in range(2):
        assert torch.equal(out[i], attend(q[i], k[i], v[i], rectangles[i], of_queries[i]))


def test_autocast_leaves_masks_alone(device) -> None:
    q, k, v = Case(SEQ_Q, SEQ_K).inputs(device, torch.float32)
    options = on(device, {"rectangles": PREFIX, "segment_ids": SORTED})
    with torch.autocast(device, dtype=torch.bfloat16):
        out = fastattn.attention(q, k, v, causal=True, **options)
    half = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, fastattn.attention(*half, causal=True, **options))


IDS = torch.zeros(2, 60, dtype=torch.int32), torch.zeros(1, 70, dtype=torch.int32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rectangles": PREFIX[0]},
            r"rectangles must be Int \[batch or 1, 1 to 4, 4\] = \[1, 4, 4\], got Int \[1, 4\]",
        ),
        ({"rectangles": torch.zeros(2, 5, 4).int()}, r"rectangles must be .* = \[2, 4, 4\], got Int \[2, 5, 4\]"),
        ({"rectangles": torch.zeros(1, 0, 4).int()}, r"rectangles must be .* = \[1, 1, 4\], got Int \[1, 0, 4\]"),
        ({"rectangles": torch.zeros(1, 2, 3).int()}, r"rectangles must be .* = \[1, 2, 4\], got Int \[1, 2, 3\]"),
        ({"rectangles": torch.zeros(3, 2, 4).int()}, r"rectangles must be .* = \[2, 2, 4\], got Int \[3, 2, 4\]"),
        ({"rectangles": PREFIX.long()}, r"rectangles must be Int .* got Long"),
        ({"segment_ids": IDS[::-1]}, r"segments_q must be Int \[batch or 1, seq_q\] = \[1, 60\], got Int \[1, 70\]"),
        ({"segment_ids": IDS[0]}, r"segments_k must be Int \[batch or 1, seq_k\] = \[2, 70\], got Int \[2, 60\]"),
        ({"segment_ids": (IDS[0].float(), IDS[1])}, "segments_q must be Int .* got Float"),
        ({"segment_ids": (IDS[0][0], IDS[1])}, r"segments_q must be .* = \[2, 60\], got Int \[60\]"),
        ({"segment_ids": (*IDS, IDS[0])}, "segment_ids must be those of queries and of keys, got 3 tensors"),
        ({"segment_ids": (IDS[0], None)}, "segments must be of queries and of keys, got those of queries alone"),
        ({"rectangles": PREFIX, "softcap": 2.0}, "rectangles cannot be combined with softcap yet"),
        ({"rectangles": PREFIX, "key_bias": torch.zeros(1, 1, 70)}, "rectangles cannot be combined with key_bias yet"),
        ({"segment_ids": IDS, "softcap": 2.0}, "segments cannot be combined with softcap yet"),
        ({"segment_ids": IDS, "key_bias": torch.zeros(1, 1, 70)}, "segments cannot be combined with key_bias yet"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, device, dtype) -> None:
    with pytest.raises((ValueError, RuntimeError), match="attention: " + message):
        fastattn.attention(*Case(60, 70, heads=HEADS).inputs(device, dtype), **on(device, options))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"rectangles": PREFIX}, {"segment_ids": IDS}])
def test_devices_that_differ(options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="must be on the device of q, cuda:0, got cpu"):
        fastattn.attention(*Case(60, 70, heads=HEADS).inputs("cuda", torch.bfloat16), **options)
