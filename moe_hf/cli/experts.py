"""`moe-hf score-experts, select-experts, merge-deltas`: which experts a task uses, and what training them changed."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moe_hf.cli.app import load_model, load_tokenizer, quiet_transformers, refuse_existing, user_errors
from moe_hf.cli.text_blocks import batches_of, load_documents, text_blocks


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
        from moe_hf.errors import MoEError
        from moe_hf.finetuning import score_experts as score

        documents = load_documents(data, split, text_column, domain)
        with quiet_transformers():
            moe = load_model(model)
            tokenizer = load_tokenizer(model)
            if tokenizer is None:
                raise MoEError(f"{model} has no tokenizer, which --data needs.")
            blocks = text_blocks(moe, tokenizer, documents.shuffle(seed=seed), block_size, max_tokens)
            scores = score(moe, batches_of(blocks, batch_size, max_tokens))
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
