"""The command line."""

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(help="Fused attention kernels.", no_args_is_help=True, add_completion=False)
plots = typer.Typer(help="Pictures.", no_args_is_help=True)
app.add_typer(plots, name="plot")
paros = typer.Typer(help="Plans of PARO.", no_args_is_help=True)
app.add_typer(paros, name="paro")

DeviceOption = Annotated[str, typer.Option(help="cpu or cuda; by default the GPU where its kernels run, else the CPU.")]


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The chart, a PNG file.")] = Path("fastattn_demo.png"),
    device: DeviceOption = "",
) -> None:
    """Embed real text with fastattn inside a pretrained model, then race long sequences against torch."""
    from . import demo as module

    try:
        module.run(output, device)
    except module.DemoError as error:
        _fail("demo", error)


@app.command()
def info() -> None:
    """Versions, the CPU kernels' instruction set, and whether the GPU kernels can be used here."""
    from rich.console import Console
    from rich.table import Table

    from .info import facts

    table = Table(show_header=False, box=None)
    for name, value in facts().items():
        table.add_row(name, value, style="bold" if name == "fastattn" else None)
    Console().print(table)


# Values for each axis are written 30x48x80; a single one is for all axes.

ShapeOption = Annotated[str, typer.Option(help="Lengths of the axes of tokens, such as 30x48x80.")]
WindowOption = Annotated[str, typer.Option(help="Keys along each axis, such as 18x24x24; -1 is the whole axis.")]
StrideOption = Annotated[str, typer.Option(help="Queries along each axis that share a window.")]
DilationOption = Annotated[str, typer.Option(help="Step between the keys of a window.")]
CausalOption = Annotated[str, typer.Option(help="Axes that hide later keys, such as 1x0x0.")]
KernelOption = Annotated[str, typer.Option(help="Whose tiles: cuda or cpu.")]


@app.command()
def simulate(
    shape: ShapeOption,
    window: WindowOption,
    stride: StrideOption = "1",
    dilation: DilationOption = "1",
    causal: CausalOption = "0",
    head_dim: int = 128,
    batch: int = 1,
    heads: int = 1,
    device: KernelOption = "cuda",
    tile: Annotated[
        list[str] | None, typer.Option(help="Tiles of queries and of keys, such as 4x8x4/2x8x8; may be repeated.")
    ] = None,
    dense_tflops: Annotated[
        float | None, typer.Option(help="Rate of a dense forward; by default what was measured on an H100.")
    ] = None,
) -> None:
    """What neighborhood attention costs: tiles visited, their use, bounds on the speedup, and a stride that helps."""
    from rich.console import Console

    from . import simulate as module

    try:
        arguments = {
            **_axis_arguments(window, stride, dilation, causal),
            "head_dim": head_dim,
            "batch": batch,
            "heads": heads,
            "device": device,
            "tiles": [_boxes(each) for each in tile] if tile else None,
            "dense_tflops": dense_tflops,
        }
        module.run(_extents("shape", shape), arguments, Console())
    except ValueError as error:
        _fail("simulate", error)


@plots.command()
def neighborhood(
    shape: ShapeOption,
    window: WindowOption,
    query: Annotated[str, typer.Option(help="Coordinates of the query to look from; by default the middle.")] = "",
    stride: StrideOption = "1",
    dilation: DilationOption = "1",
    causal: CausalOption = "0",
    device: KernelOption = "cuda",
    tile: Annotated[str, typer.Option(help="Tiles of queries and of keys, such as 4x4/4x8.")] = "",
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture, a PNG file.")] = Path("neighborhood.png"),
) -> None:
    """Draw the keys that a query sees, and the tiles that its tile visits."""
    from . import plot as module

    try:
        module.run(
            _extents("shape", shape),
            output,
            query=_extents("query", query) if query else None,
            device=device,
            tiles=_boxes(tile) if tile else None,
            **_axis_arguments(window, stride, dilation, causal),
        )
    except ValueError as error:
        _fail("plot neighborhood", error)


@paros.command()
def show(
    plan: Annotated[Path, typer.Argument(help="What ParoPlan.save wrote.", exists=True, dir_okay=False)],
    bucket: Annotated[int, typer.Option(help="Of timesteps.")] = 0,
    layer: int = 0,
    head: Annotated[list[int] | None, typer.Option(help="To draw; may be repeated; by default the first 12.")] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            help="Queries and keys of the layer, q and k in a safetensors file: draws attention weights.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture, a PNG file.")] = Path("paro.png"),
) -> None:
    """Show the order and the density of each head, and draw its blocks as tokens come and in its order."""
    from rich.console import Console

    from . import paro_show as module

    try:
        module.run(plan, output, Console(), bucket=bucket, layer=layer, heads=head, samples=samples)
    except (ImportError, ValueError) as error:
        _fail("paro show", error)


def _extents(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split("x"))
    except ValueError:
        raise ValueError(f"{name} must be integers joined by x, such as 30x48x80, got {text!r}") from None


def _axis_arguments(window: str, stride: str, dilation: str, causal: str) -> dict[str, Any]:
    given = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
    values = {name: _extents(name, text) for name, text in given.items()}
    return {name: value if len(value) > 1 else value[0] for name, value in values.items()}


def _boxes(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """One box is for queries and keys."""
    q, _, k = text.partition("/")
    return _extents("tile", q), _extents("tile", k or q)


def _fail(command: str, error: Exception) -> NoReturn:
    typer.echo(f"fastattn {command}: {error}", err=True)
    raise typer.Exit(1) from error
