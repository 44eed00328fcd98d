"""`shoulders demo`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from shoulders.cli.common import check_outputs, emit_json, quiet_libraries, stdout
from shoulders.errors import ShouldersError


def demo(
    out: Annotated[Path | None, typer.Option(help="Default: runs/demo-DATE-TIME.")] = None,
    steps: Annotated[int, typer.Option(min=3, help="Training steps of each method.")] = 75,
    seed: Annotated[int, typer.Option(min=0, help="Of rows and weights.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Also write the results here.")] = None,
) -> None:
    """Watch one frozen LM learn twelve tasks through a small trained network (minutes)."""
    from shoulders.demo.run import run_demo

    quiet_libraries()
    folder = out or Path("runs") / datetime.now().strftime("demo-%Y%m%d-%H%M%S")
    if folder.exists() and any(folder.iterdir()):
        raise ShouldersError(f"{folder}: is not empty; choose another --out")
    check_outputs(json)
    emit_json(json, run_demo(folder, steps=steps, seed=seed, console=stdout()))
