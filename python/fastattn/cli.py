"""The command line: `fastattn demo` and `fastattn info`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

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
        typer.echo(f"fastattn demo: {error}", err=True)
        raise typer.Exit(1) from error


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
