"""`moe-hf card`: the model card from what was measured."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_hf.cli.app import load_model, load_tokenizer, quiet_transformers, user_errors


def card(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id.")],
    output: Annotated[Path, typer.Option(help="Folder for README.md and its picture; must have no README.md.")],
    repo_id: Annotated[str | None, typer.Option(help="NAMESPACE/NAME that the usage code loads.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder of `moe-hf report --output`.")] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the training run or of a checkpoint: steps, tokens, time, measurements; by default the one that "
            "the model lies in."
        ),
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON of what else is known: license, base_model, results, limits, commands, ..."),
    ] = None,
) -> None:
    """Write the model card: what is counted, read and measured, and a chat; what is not known is left out."""
    with user_errors():
        from moe_hf.errors import MoEError
        from moe_hf.reporting.card import model_card
        from moe_hf.reporting.card_chat import sample_chat
        from moe_hf.reporting.card_facts import training_facts
        from moe_hf.reporting.run_results import run_facts, run_folder

        destination = output / "README.md"
        if destination.exists():
            raise MoEError(f"{destination} exists: choose another --output, or remove it first.")
        given = _read_facts(facts)
        beside = run_folder(model) if run is None else run
        known = {} if beside is None or not beside.is_dir() else run_facts(beside)
        if run is not None:
            known["training"] = training_facts(run)
        known["training"] = known.get("training", {}) | (given.pop("training", None) or {})
        known |= given
        if report is not None:
            known["routing_report"] = report
        with quiet_transformers():
            loaded = load_model(model)
            tokenizer = load_tokenizer(model)
            if "chat" not in known:
                known["chat"] = sample_chat(loaded, tokenizer)
            made = model_card(loaded, repo_id=repo_id, card_facts=known, tokenizer=tokenizer)
        output.mkdir(parents=True, exist_ok=True)
        made.save(destination)
    typer.echo(", ".join(str(output / name) for name in ("README.md", *made.companions)))


def _read_facts(path: Path | None) -> dict[str, Any]:
    import yaml

    from moe_hf.errors import MoEError

    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MoEError(f"--facts {path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise MoEError(f"--facts {path} holds no names and values.")
    return content
