"""`moe-hf push` and `moe-hf pull`: folders to the Hub and back, whole, once, and compared."""

from pathlib import Path
from typing import Annotated

import typer

from moe_hf.cli.app import quiet_transformers, user_errors


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model, adapters of experts, or expert deltas.")],
    repo_id: Annotated[str, typer.Argument(metavar="NAMESPACE/NAME", help="Made if it does not exist.")],
    target: Annotated[
        str | None,
        typer.Option("--as", help="Export one of our models first: a native family of transformers, or auto."),
    ] = None,
    private: Annotated[bool, typer.Option(help="Make a private repository; refuse one that is public.")] = False,
    revision: Annotated[
        str | None, typer.Option("--branch", help="Push to this branch; made if it is missing.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--pr", help="Propose the commit as a pull request.")] = False,
    message: Annotated[str | None, typer.Option("--message", help="First line of the commit.")] = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace a card that is in the repository; it stays otherwise.")
    ] = False,
) -> None:
    """Push a folder in one commit, after checks and with every checksum compared; the same command continues it."""
    with user_errors():
        from moe_hf.hub import push_folder

        with quiet_transformers():
            info = push_folder(
                folder,
                repo_id,
                target=target,
                private=private or None,
                revision=revision,
                create_pr=create_pr,
                commit_message=message,
                overwrite_card=overwrite_card,
            )
        typer.echo(f"{folder} -> {info.pr_url or info.commit_url}: whole, every checksum compared")


def pull(
    repo_id: Annotated[str, typer.Argument(metavar="NAMESPACE/NAME", help="A repository of the Hub.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Must not exist.")],
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit; main by default.")] = None,
) -> None:
    """Download a model, adapters or deltas into a folder that is proven, or absent; the same command continues it."""
    with user_errors():
        from moe_hf.hub import pull_folder

        with quiet_transformers():
            path = pull_folder(repo_id, folder, revision=revision)
        typer.echo(f"{repo_id} -> {path}: whole, every checksum compared, every number finite")
