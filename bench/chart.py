"""The README's chart: rates of attention and of its peers, from the newest GPU's records."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.plot import EMPTY, FULL, INK, PARTIAL

from .records import RESULTS, Record, read

HEAD_DIMS = (64, 128, 256)
LENGTHS = {"4k": 4096, "16k": 16384}
MASKS = {"full": "", "causal": "_causal"}
MODES = {"fwd": "forward", "bwd": "backward"}
CONTESTANTS = {  # their names and colours, which differ in lightness too
    "fastattn": ("fastattn", FULL),
    "fa4": ("FlashAttention-4", PARTIAL),
    "cudnn": ("cuDNN", "#c3cad3"),
    "fa2": ("FlashAttention-2", "#8b5fa8"),
    "flex": ("FlexAttention", "#4b5563"),
}


@dataclass(frozen=True)
class Panel:
    mode: str
    head_dim: int
    rates: dict[str, dict[str, float]]
    """TFLOP/s of each contestant in each case."""


@dataclass(frozen=True)
class Chart:
    gpu: str
    panels: list[Panel]

    @property
    def title(self) -> str:
        return f"TFLOP/s of attention on {self.gpu}, bf16, 16,384 tokens, hidden size 2048"

    @property
    def text(self) -> str:
        """What it shows. The drawing carries it, so that a stale one is told without drawing anew."""
        lines = [self.title]
        for panel in self.panels:
            for case, rates in panel.rates.items():
                shown = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
                lines.append(f"{MODES[panel.mode]}, head_dim {panel.head_dim}, {case}: {shown}")
        return "; ".join(lines)

    def is_drawn_in(self, path: Path) -> bool:
        return path.exists() and self.text in path.read_text()


def newest() -> Chart:
    paths = sorted(RESULTS.glob("attention.h*.json"))  # generations of GPUs ascend in the alphabet
    records = {(record["case"], record["mode"]): record for record in read(paths[-1]) if record["dtype"] == "bf16"}
    panels = []
    for mode in MODES:
        for head_dim in HEAD_DIMS:
            cases = {
                f"{length} {mask}": f"b{16384 // seq}_s{seq}_h{2048 // head_dim}_d{head_dim}{suffix}"
                for length, seq in LENGTHS.items()
                for mask, suffix in MASKS.items()
            }
            rates = {label: rates_of(records[name, mode]) for label, name in cases.items() if (name, mode) in records}
            if rates:
                panels.append(Panel(mode, head_dim, rates))
    return Chart(next(iter(records.values()))["machine"]["gpu"], panels)


def rates_of(record: Record) -> dict[str, float]:
    work = record["tflops"] * record["time_us"]
    times = {"fastattn": record["time_us"], **record["against"]}
    return {name: work / times[name] for name in CONTESTANTS if name in times}


def draw(chart: Chart, path: Path) -> None:
    """Writes the same bytes each time."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(panel.mode for panel in chart.panels))
    with mpl.rc_context({"svg.hashsalt": path.stem, "font.size": 8, "text.color": INK, "axes.titlecolor": INK}):
        figure = Figure(figsize=(8.5, 0.7 + 1.9 * len(modes)), layout="constrained")
        axes = figure.subplots(len(modes), len(HEAD_DIMS), squeeze=False, sharey=True)
        for axis in axes.flat:
            axis.set_axis_off()  # unless there is something to draw
        for panel in chart.panels:
            draw_panel(axes[modes.index(panel.mode), HEAD_DIMS.index(panel.head_dim)], panel)
        handles = {bars.get_label(): bars for axis in axes.flat for bars in axis.containers}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
        figure.suptitle(chart.title, weight="bold", fontsize=9)
        figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": chart.text})


def draw_panel(axis: Any, panel: Panel) -> None:
    names = [name for name in CONTESTANTS if any(name in rates for rates in panel.rates.values())]
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        label, colour = CONTESTANTS[name]
        there = [(x, rates[name]) for x, rates in enumerate(panel.rates.values()) if name in rates]
        places = [x + (i - (len(names) - 1) / 2) * width for x, _ in there]
        bars = axis.bar(places, [rate for _, rate in there], 0.92 * width, color=colour, label=label)
        if i == 0:
            axis.bar_label(bars, fmt="%.0f", fontsize=7, padding=1, weight="bold", color=colour)
    axis.set_axis_on()
    axis.set_title(f"{MODES[panel.mode]}, head_dim {panel.head_dim}", fontsize=8.5)
    axis.set_xticks(range(len(panel.rates)), [label.replace(" ", "\n") for label in panel.rates])
    axis.tick_params(colors=INK, length=0)
    axis.yaxis.grid(True, color=EMPTY)
    axis.set_axisbelow(True)
    for spine in axis.spines.values():
        spine.set_visible(False)
