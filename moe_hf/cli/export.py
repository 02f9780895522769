"""`moe-hf export` and `moe-hf import`: our checkpoints as native MoEs of transformers, and native ones as ours."""

from pathlib import Path
from typing import Annotated

import typer

from moe_hf.cli.app import quiet_transformers, refuse_existing, user_errors


def export(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with a moe_hf checkpoint.")],
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="The native checkpoint's folder; without it, what is exact is listed."),
    ] = None,
    target: Annotated[str, typer.Option("--to", help="A native family, or auto: the first exact one.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
) -> None:
    """Write a checkpoint as a native MoE of transformers, that servers read without our code; exactly, or not at all."""
    with user_errors():
        if destination is None:
            _list_targets(source)
            return
        refuse_existing(destination)
        from transformers import AutoConfig

        from moe_hf.interchange import export_native

        folder = export_native(source, destination, target, max_shard_size=max_shard_size)
        typer.echo(f"{source} -> {folder}: {AutoConfig.from_pretrained(folder).model_type}")


def import_(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with a native MoE of transformers.")],
    destination: Annotated[
        Path, typer.Argument(metavar="OUT", help="The moe_hf checkpoint's folder; must not exist.")
    ],
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
) -> None:
    """Write a native MoE checkpoint of transformers as one of ours, without loss, or not at all."""
    with user_errors():
        refuse_existing(destination)
        from moe_hf.interchange import import_native
        from moe_hf.modeling.configuration_moe import MoEConfig

        with quiet_transformers():
            folder = import_native(source, destination, max_shard_size=max_shard_size)
        dense = MoEConfig.from_pretrained(folder).text_config.model_type
        typer.echo(f"{source} -> {folder}: {dense} with experts")


def _list_targets(source: Path) -> None:
    from moe_hf.interchange import exact_targets
    from moe_hf.interchange.transfer import moe_config_of

    for target, reason in exact_targets(moe_config_of(source)).items():
        typer.echo(f"{target:18} {'exact' if reason is None else f'no: {reason}'}")
