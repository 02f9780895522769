"""`moe-hf score-experts, select-experts, merge-deltas`: which experts a task uses, and what training them changed."""

import json
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_hf.cli.app import load_model, load_tokenizer, quiet_transformers, refuse_existing, user_errors


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# As in the ESFT authors' scripts.
ESFT_TOKENS = 131_072


def score_experts(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A MoE: a folder or a Hub id.")],
    data: Annotated[
        str, typer.Option(help="Text of the task: a file or folder, the name of a Hub dataset, or `builtin`.")
    ],
    split: Annotated[str, typer.Option(help="Split of a Hub dataset.")] = "train",
    text_column: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    domain: Annotated[list[str] | None, typer.Option(help="Take documents of this domain only; repeatable.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to count; 131072 is ESFT's.")] = ESFT_TOKENS,
    block_size: Annotated[int, typer.Option(help="Tokens per row.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the order of the documents.")] = 0,
    output: Annotated[Path | None, typer.Option(help="The JSON file; printed if not given.")] = None,
) -> None:
    """Count what each expert of each layer does for a text: its share of the tokens, and its mean weight (ESFT)."""
    with user_errors():
        if output is not None:
            refuse_existing(output)
        from moe_hf.data import load_text
        from moe_hf.errors import MoEError
        from moe_hf.finetuning import score_experts as score

        documents = load_text(data, split=split, text_column=text_column)
        if domain:
            known = sorted(set(documents["domain"]))
            unknown = sorted(set(domain) - set(known))
            if unknown:
                raise MoEError(f"No domain {unknown[0]!r} in {data!r}; it has {', '.join(known)}.")
            documents = documents.select([i for i, name in enumerate(documents["domain"]) if name in domain])
        with quiet_transformers():
            moe = load_model(model)
            tokenizer = load_tokenizer(model)
            if tokenizer is None:
                raise MoEError(f"{model} has no tokenizer, which --data needs.")
            blocks = _blocks(moe, tokenizer, documents.shuffle(seed=seed), block_size, max_tokens)
            scores = score(moe, _batches(blocks, batch_size), max_tokens=max_tokens)
        if output is None:
            typer.echo(json.dumps(scores.to_dict(), indent=1))
        else:
            scores.save(output)
            typer.echo(f"{output}: {scores.num_tokens:,} tokens, {len(scores.layers)} layers with experts")


def select_experts(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="A JSON file of `score-experts`.")],
    top_p: Annotated[
        float | None, typer.Option(help="In each layer the fewest experts that have this share of it; ESFT: 0.2.")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="So many experts in all layers together.")] = None,
    by: Annotated[str, typer.Option(help="token_share or gate_score.")] = "token_share",
    shared_experts: Annotated[bool, typer.Option("--shared-experts", help="Train the shared experts too.")] = False,
    non_expert_modules: Annotated[
        bool, typer.Option("--non-expert-modules", help="Train everything outside the MoE blocks too.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="The JSON file; printed if not given.")] = None,
) -> None:
    """Choose the experts to train, for `--scope selected --expert_selection FILE` of the training programs."""
    with user_errors():
        if output is not None:
            refuse_existing(output)
        from moe_hf.finetuning import ExpertScores
        from moe_hf.finetuning import select_experts as select

        table = ExpertScores.load(scores)
        switches = {"shared_experts": shared_experts, "non_expert_modules": non_expert_modules}
        selection = select(table, top_p=top_p, budget=budget, by=by, **switches)
        if output is None:
            typer.echo(json.dumps(selection.to_dict()))
        else:
            selection.save(output)
            typer.echo(f"{output}: {selection.num_experts} of {sum(table.num_experts)} experts")


def merge_deltas(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that was trained: a folder or a Hub id.")],
    deltas: Annotated[Path, typer.Argument(metavar="DELTAS", help="The file of `save_expert_deltas`.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder; must not exist.")],
) -> None:
    """Write the base model with its trained experts in place, as a plain checkpoint; another base is refused."""
    with user_errors():
        refuse_existing(destination)
        from moe_hf.finetuning import load_expert_deltas
        from moe_hf.hub import save_model

        with quiet_transformers():
            model = load_model(base)
            facts = load_expert_deltas(model, deltas)
            save_model(model, load_tokenizer(base), destination)
        typer.echo(
            f"{base} + {deltas} -> {destination}: {facts.num_experts} trained experts in {len(facts.experts)} layers"
        )


def _blocks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: "Dataset",
    block_size: int,
    max_tokens: int,
) -> "Dataset":
    """Enough rows for `max_tokens`: packed, or padded where documents of the family would see each other."""
    from moe_hf.data import check_packing, tokenize_and_pack
    from moe_hf.errors import MoEError

    positions = getattr(model.config, "max_position_embeddings", None)
    block_size = min(block_size, positions or block_size)
    # Few tokenizers have tokens of more than 8 characters in the mean.
    enough = 8 * (max_tokens + block_size)
    ends = accumulate(map(len, documents["text"]))
    documents = documents.select(range(min(len(documents), 1 + sum(end < enough for end in ends))))
    try:
        check_packing(model)
    except MoEError:
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenize_and_pack(documents, tokenizer, block_size, packed=False)
    return tokenize_and_pack(documents, tokenizer, block_size)


def _batches(blocks: "Dataset", batch_size: int) -> Iterator[dict[str, Any]]:
    rows = iter(blocks)
    while batch := list(islice(rows, batch_size)):
        import torch

        yield {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
