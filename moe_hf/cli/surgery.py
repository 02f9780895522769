"""`moe-hf grow-experts, add-experts, remove-experts, replace-experts, to-dense`: another model from a trained MoE."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_hf.cli.app import (
    Data,
    load_model,
    load_tokenizer,
    print_loss,
    quiet_transformers,
    read_token_ids,
    refuse_existing,
    user_errors,
)
from moe_hf.cli.printing import count_text


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moe_hf.upcycling import VerificationResult


Source = Annotated[str, typer.Argument(metavar="SRC", help="The MoE: a folder or a Hub id.")]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="The new model's folder; must not exist.")]
NumExpertsPerTok = Annotated[
    int | None, typer.Option(help="Experts that each token of the new model uses; as before if not given.")
]
RouterNoise = Annotated[float, typer.Option(help="Noise on each new router row, in standard deviations of the row.")]
Inputs = Annotated[
    str | None, typer.Option(help="Text to measure on: a file or folder, the name of a Hub dataset, or `builtin`.")
]
Seed = Annotated[int, typer.Option(help="Of all random numbers, and of the check's tokens.")]
EXPERT_SYNTAX = "an id, MOE:ID for an expert of another MoE, or DENSE for a dense model's MLPs"


def grow_experts(
    source: Source,
    destination: Destination,
    copies: Annotated[int, typer.Option(help="Copies of each expert.")] = 2,
    noise: Annotated[
        float, typer.Option(help="Makes the copies differ; in standard deviations, cancels over the copies.")
    ] = 0.0,
    num_experts_per_tok: Annotated[
        int | None, typer.Option(help="Other than copies times as many as before, which is exact.")
    ] = None,
    allow_inexact: Annotated[bool, typer.Option("--allow-inexact", help="Accept logits that differ.")] = False,
    inputs: Inputs = None,
    data: Data = None,
    seed: Seed = 0,
) -> None:
    """Make a bigger MoE that computes the same: every expert several times, and as many times more per token."""
    arguments = {"noise": noise, "num_experts_per_tok": num_experts_per_tok, "allow_inexact": allow_inexact}
    _operate("grow_experts", source, destination, inputs, data, copies=copies, seed=seed, **arguments)


def add_experts(
    source: Source,
    destination: Destination,
    experts: Annotated[list[str], typer.Option("--from", help=f"An expert to add: {EXPERT_SYNTAX}; repeatable.")],
    router_rows: Annotated[
        str, typer.Option(help="Router rows of new experts: source (those of their sources) or normal.")
    ] = "source",
    router_noise: RouterNoise = 0.0,
    num_experts_per_tok: NumExpertsPerTok = None,
    inputs: Inputs = None,
    data: Data = None,
    seed: Seed = 0,
) -> None:
    """Add experts to each MoE layer, and measure what that changes."""
    arguments = {"router_rows": router_rows, "router_noise": router_noise, "num_experts_per_tok": num_experts_per_tok}
    with user_errors():
        sources = [_expert(text) for text in experts]
    _operate("add_experts", source, destination, inputs, data, sources=sources, seed=seed, **arguments)


def remove_experts(
    source: Source,
    destination: Destination,
    experts: Annotated[list[int], typer.Option("--expert", help="Id of an expert to remove; repeatable.")],
    num_experts_per_tok: NumExpertsPerTok = None,
    inputs: Inputs = None,
    data: Data = None,
    seed: Seed = 0,
) -> None:
    """Remove experts from each MoE layer, and measure what that changes."""
    arguments = {"num_experts_per_tok": num_experts_per_tok, "seed": seed}
    _operate("remove_experts", source, destination, inputs, data, experts=experts, **arguments)


def replace_experts(
    source: Source,
    destination: Destination,
    experts: Annotated[
        list[str], typer.Option("--with", metavar="ID=SOURCE", help=f"What takes the place of ID: {EXPERT_SYNTAX}.")
    ],
    router_rows: Annotated[
        str, typer.Option(help="Router rows: kept (those of the replaced experts), source or normal.")
    ] = "kept",
    router_noise: RouterNoise = 0.0,
    inputs: Inputs = None,
    data: Data = None,
    seed: Seed = 0,
) -> None:
    """Put other experts in the places of some in each MoE layer, and measure what that changes."""
    arguments = {"router_rows": router_rows, "router_noise": router_noise, "seed": seed}
    with user_errors():
        sources = dict(_replacement(text) for text in experts)
    _operate("replace_experts", source, destination, inputs, data, sources=sources, **arguments)


def to_dense(
    source: Source,
    destination: Destination,
    method: Annotated[
        str, typer.Option(help="average of the experts, one expert, or merged: all of them side by side.")
    ] = "average",
    expert: Annotated[int | None, typer.Option(help="Id, for --method expert.")] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            help="Text to measure on how much each expert counts: a file or folder, the name of a Hub dataset, or `builtin`."
        ),
    ] = None,
    data: Data = None,
    seed: Annotated[int, typer.Option(help="Of the check's tokens.")] = 0,
) -> None:
    """Make a dense model of the original family, and measure how far it is from the MoE."""
    with user_errors():
        refuse_existing(destination)
        from moe_hf.upcycling import verify
        from moe_hf.upcycling.surgery.to_dense import to_dense as make_dense

        ids = None if inputs is None else read_token_ids(inputs, source)
        with quiet_transformers():
            moe = load_model(source)
            dense = make_dense(moe, method, expert=expert, inputs=ids)
            tokenizer = load_tokenizer(source)
            check = verify(moe, dense, ids, data=data, tokenizer=tokenizer, seed=seed)
        _save(dense, tokenizer, source, destination, check)


def _operate(
    operation: str, source: str, destination: Path, inputs: str | None, data: str | None, **arguments: Any
) -> None:
    """Run an operation of `upcycling.surgery` on a checkpoint, and save the result."""
    with user_errors():
        refuse_existing(destination)
        from moe_hf.upcycling import VerificationResult, surgery

        ids = None if inputs is None else read_token_ids(inputs, source)
        with quiet_transformers():
            tokenizer, operate = load_tokenizer(source), getattr(surgery, operation)
            model = operate(load_model(source), inputs=ids, data=data, tokenizer=tokenizer, **arguments)
        check = VerificationResult(**model.config.upcycling["surgery"][-1]["verification"])
        _save(model, tokenizer, source, destination, check)


def _save(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    source: str,
    destination: Path,
    check: "VerificationResult",
) -> None:
    from moe_hf.hub import save_model
    from moe_hf.inspection import inspect_model
    from moe_hf.upcycling.surgery.operations import MEND

    with quiet_transformers():
        save_model(model, tokenizer, destination)
        facts = inspect_model(model)
    typer.echo(f"{source} -> {destination}")
    typer.echo(
        f"parameters: {count_text(facts.total_parameters)} total, {count_text(facts.active_parameters)} active per token"
    )
    typer.echo(f"the two models' logits differ by {check.relative_error:.1e} (relative)")
    print_loss(check.to_dict(), [f"{check.loss_warning} {MEND}"] if check.loss_warning else [])


def _expert(text: str) -> Any:
    """What `EXPERT_SYNTAX` says."""
    if text.isdecimal():
        return int(text)
    path, _, expert = text.rpartition(":")
    with quiet_transformers():
        return (load_model(path), int(expert)) if path and expert.isdecimal() else load_model(text)


def _replacement(text: str) -> tuple[int, Any]:
    expert, equals, source = text.partition("=")
    if not (equals and expert.isdecimal()):
        from moe_hf.errors import MoEError

        raise MoEError(f"--with takes ID=SOURCE, and got {text!r}.")
    return int(expert), _expert(source)
