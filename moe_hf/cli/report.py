"""`moe-hf report`: what each expert of each layer does for a text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_hf.cli.app import load_model, load_tokenizer, quiet_transformers, refuse_existing, user_errors
from moe_hf.cli.printing import print_rows
from moe_hf.cli.text_blocks import batches_of, load_documents, text_blocks


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moe_hf.reporting.statistics import RoutingStatistics


def report(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A MoE: a folder or a Hub id.")],
    data: Annotated[
        str, typer.Option(help="Text: a file or folder, the name of a Hub dataset, or `builtin`.")
    ] = "builtin",
    output: Annotated[
        Path | None, typer.Option(help="Folder for routing.json, report.html and PNG files; must not exist.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another checkpoint of the model: how does its routing differ?")
    ] = None,
    origin: Annotated[
        str | None, typer.Option(help="The dense model it was upcycled from: how far has each expert moved?")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub dataset.")] = "train",
    text_column: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    domain: Annotated[list[str] | None, typer.Option(help="Take documents of this domain only; repeatable.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to look at, the same number of each domain.")] = 65_536,
    block_size: Annotated[int, typer.Option(help="Tokens per row.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 4,
    sample_tokens: Annotated[int, typer.Option(help="Tokens of each domain that the page shows.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the order of the documents.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Show load, entropy, dead and saturated experts and specialisation by layer, for ours and native MoEs."""
    with user_errors():
        if output is not None:
            refuse_existing(output)
        from moe_hf.errors import MoEError
        from moe_hf.reporting.routing_statistics import routing_statistics

        if max_tokens < 1 or batch_size < 1 or sample_tokens < 0:
            raise MoEError("--max-tokens and --batch-size are at least 1, --sample-tokens is at least 0.")
        documents = load_documents(data, split, text_column, domain).shuffle(seed=seed)
        with quiet_transformers():
            moe = _load(model)
            tokenizer = load_tokenizer(model)
            if tokenizer is None:
                raise MoEError(f"{model} has no tokenizer, which --data needs.")
            share = -(-max_tokens // len(set(documents["domain"])))
            statistics = routing_statistics(
                moe,
                dict(_domain_batches(moe, tokenizer, documents, block_size, batch_size, share)),
                tokenizer=tokenizer,
                sample_tokens=sample_tokens,
                against=None if against is None else _load(against),
                origin=None if origin is None else _load(origin),
            )
        if output is not None:
            _write(statistics, output)
    if as_json:
        from moe_hf.reporting.verdict import verdict

        typer.echo(
            json.dumps({"model": statistics.model, "verdict": verdict(statistics), **statistics.summary()}, indent=2)
        )
    else:
        _print(statistics, output)


def _load(path: str) -> "PreTrainedModel":
    model = load_model(path)
    # Not every model keeps it.
    model.name_or_path = path
    return model


def _domain_batches(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: "Dataset",
    block_size: int,
    batch_size: int,
    max_tokens: int,
) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    """By domain, the batches of its text."""
    of_document = documents["domain"]
    for domain in sorted(set(of_document)):
        own = documents.select([place for place, name in enumerate(of_document) if name == domain])
        blocks = text_blocks(model, tokenizer, own, block_size, max_tokens)
        yield domain, batches_of(blocks, batch_size, max_tokens)


def _write(statistics: "RoutingStatistics", output: Path) -> None:
    from moe_hf.reporting.report import write_report
    from moe_hf.saving import atomic_folder

    with atomic_folder(output) as folder:
        write_report(statistics, folder)


def _print(statistics: "RoutingStatistics", output: Path | None) -> None:
    from moe_hf.reporting.report import LAYER_COLUMNS, layer_rows
    from moe_hf.reporting.statistics import figure_text
    from moe_hf.reporting.verdict import verdict

    typer.echo(verdict(statistics))
    summary = statistics.summary()
    print_rows(statistics.model, [(name, figure_text(value)) for name, value in summary.items()])
    print_rows("By layer", layer_rows(statistics), header=LAYER_COLUMNS[1:])
    if output is not None:
        typer.echo(f"{output / 'report.html'} shows it by expert; beside it: routing.json and pictures.")
