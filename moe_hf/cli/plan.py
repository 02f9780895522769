"""`moe-hf plan`: what fine-tuning needs on each device, and what to change when it does not fit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_hf.cli.app import parse_fields, quiet_transformers, user_errors
from moe_hf.cli.printing import bytes_text, print_rows


if TYPE_CHECKING:
    from moe_hf.training_plan import TrainingPlan


FIGURES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "buffers": "buffers",
    "in all": "total",
    "all-to-all per step": "all_to_all",
    "other traffic per step": "reduction",
}


def plan(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A dense model or a MoE: a folder, a GGUF file or a Hub id.")
    ],
    num_experts: Annotated[int | None, typer.Option("--experts", help="Of a dense source; 8 if not given.")] = None,
    num_experts_per_tok: Annotated[int | None, typer.Option(help="Of a dense source; 2 if not given.")] = None,
    preset: Annotated[str | None, typer.Option(help="Of a dense source, the MoE of a paper.")] = None,
    scope: Annotated[str, typer.Option(help="What trains: moe, experts, all, ...")] = "moe",
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32, of frozen weights and arithmetic.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Sequences of a micro-batch on each GPU.")] = 1,
    sequence: Annotated[int, typer.Option("--seq", help="Tokens of a sequence.")] = 1024,
    gpus: Annotated[int, typer.Option(help="Number of GPUs.")] = 1,
    memory: Annotated[float, typer.Option(help="Of a GPU, in GiB; 92% of it are planned with.")] = 80.0,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Gradient checkpointing.")] = False,
    accumulation: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1,
    load: Annotated[
        Path | None, typer.Option(help="JSON with measured choices, a list of layers, each one count per expert.")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of MoEConfig, of a dense source."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show memory and traffic of a training step per GPU and layout; only the model's config is read."""
    with user_errors():
        chosen = parse_fields(fields, plan)
        from moe_hf.training_plan import plan_training

        with quiet_transformers():
            made = plan_training(
                source,
                num_experts=num_experts,
                num_experts_per_tok=num_experts_per_tok,
                preset=preset,
                scope=scope,
                optimizer=optimizer,
                dtype=dtype,
                batch=batch,
                sequence=sequence,
                gpus=gpus,
                memory=memory,
                checkpointing=checkpointing,
                accumulation=accumulation,
                load=load,
                **chosen,
            )
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=2))
    else:
        _print(made)


def _print(made: "TrainingPlan") -> None:
    settings = made.settings
    title = f"{made.source}: scope {settings.scope}, {settings.tokens} tokens per GPU and micro-batch"
    print_rows(title, _layout_rows(made), tuple(one.layout for one in made.layouts))
    if made.change is not None:
        change = made.change
        typer.echo(
            f"Nothing fits. The cheapest change that does: {change.describe(settings)} ({bytes_text(change.layout.total)})."
        )
    elif not any(map(made.fits, made.layouts)):
        typer.echo("Nothing fits, with smaller micro-batches, checkpointing and 8 times the GPUs neither.")
    if made.placement:
        rows = [
            (
                str(one.layer),
                " ".join(map(str, one.device_of)),
                " ".join(map(str, one.shadowed)) or "none",
                f"{one.imbalance_before:.2f}",
                f"{one.imbalance_after:.2f}",
                bytes_text(one.bytes_saved),
            )
            for one in made.placement
        ]
        header = ("GPU of each expert", "on every GPU", "imbalance before", "after", "saved per step")
        print_rows("Experts by measured load, by MoE layer", rows, header)


def _layout_rows(made: "TrainingPlan") -> Iterator[tuple[str, ...]]:
    for label in FIGURES:
        yield label, *(bytes_text(getattr(one, FIGURES[label])) for one in made.layouts)
    yield "", *(one.why_not or ("fits" if made.fits(one) else "does not fit") for one in made.layouts)
