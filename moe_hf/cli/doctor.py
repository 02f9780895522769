"""`moe-hf doctor`: find experts that were lost without a word."""

from pathlib import Path
from typing import Annotated

import typer

from moe_hf.cli.app import quiet_transformers, user_errors


def doctor(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="WHAT",
            help="A checkpoint folder or Hub id, a GGUF file, adapters, expert deltas, a quantized or low-memory folder, or the output "
            "folder of a run.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What it was made from: a MoE of the family, or its dense parent."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Adapters that are said to be merged into it; needs --base.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Text to run it on: a file, a folder, `builtin`, or a dataset of the Hub."),
    ] = None,
    environment: Annotated[
        bool, typer.Option("--environment", help="Test the installed versions instead, in some seconds.")
    ] = False,
    fail_on: Annotated[str, typer.Option(help="Exit with 1 from this severity on: error, warning or note.")] = "error",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look for experts and routers that were lost, scrambled or left alone; exit code 1 where there is an error."""
    with user_errors():
        from moe_hf.doctor import examine, examine_environment
        from moe_hf.doctor.findings import Report
        from moe_hf.errors import MoEError

        # Before anything is read.
        Report("", "").fails(fail_on)
        given = {"WHAT": what, "--base": base, "--adapter": adapter, "--data": data}
        named = [name for name, value in given.items() if value is not None]
        if environment and named:
            raise MoEError(
                f"--environment tests what is installed, and {', '.join(named)} is about a model: give one of the two."
            )
        if not environment and what is None:
            raise MoEError("Nothing to examine: give a folder, a file or a Hub id, or --environment.")
        with quiet_transformers():
            report = examine_environment() if environment else examine(what, base=base, adapter=adapter, data=data)
    typer.echo(report.to_json() if as_json else report.to_text())
    if report.fails(fail_on):
        raise typer.Exit(1)
