"""`moe-hf inspect`: what a model is made of."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from moe_hf.cli.app import quiet_transformers, user_errors
from moe_hf.cli.printing import bytes_text, count_text, print_rows


if TYPE_CHECKING:
    from moe_hf.inspection import ModelFacts


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file or a Hub id; no weights are read.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show parameters (total, active, per part), routing, memory per dtype and arithmetic per token."""
    with user_errors():
        from moe_hf.inspection import inspect_model

        with quiet_transformers():
            facts = inspect_model(model)
    if as_json:
        typer.echo(json.dumps(facts.to_dict(), indent=2))
    else:
        print_rows(facts.architecture, _fact_rows(facts))


def _fact_rows(facts: "ModelFacts") -> Iterator[tuple[str, str]]:
    yield "parameters", count_text(facts.total_parameters)
    yield "  active per token", count_text(facts.active_parameters)
    for part, count in facts.parameters_per_part.items():
        yield f"  {part}", count_text(count)
    yield "layers", f"{facts.num_layers}, {facts.num_moe_layers} with experts"
    if facts.num_moe_layers:
        yield "experts per layer", f"{facts.num_experts}, {facts.num_experts_per_tok} per token"
    for field, value in facts.routing.items():
        yield f"  {field}", str(value)
    for dtype, size in facts.memory_bytes.items():
        yield f"memory in {dtype}", bytes_text(size)
    yield "FLOPs per token", f"{facts.flops_per_token:.3g}"
    if facts.upcycling and "source" in facts.upcycling:
        yield "upcycled from", str(facts.upcycling["source"])
        if "quantized_as" in facts.upcycling:
            yield "  whose weights were", facts.upcycling["quantized_as"]
