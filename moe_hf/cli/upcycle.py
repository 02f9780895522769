"""`moe-hf upcycle`: a dense checkpoint in, a verified MoE checkpoint out, or a plan of it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_hf.cli.app import (
    DTYPES,
    Data,
    load_model,
    load_tokenizer,
    parse_assignments,
    parse_fields,
    print_loss,
    quiet_transformers,
    read_token_ids,
    refuse_existing,
    user_errors,
)
from moe_hf.cli.fit import Batch, Checkpointing, Fit, Scope, Sequence, fitted_shape, print_fit
from moe_hf.cli.printing import bytes_text, count_text, print_rows


if TYPE_CHECKING:
    from moe_hf.planning import UpcyclingPlan
    from moe_hf.training_plan import FittedShape
    from moe_hf.upcycling.initialisers import Initialiser
    from moe_hf.upcycling.router_init import RouterInit


Source = Annotated[str, typer.Argument(metavar="SRC", help="The dense model: a folder, a GGUF file or a Hub id.")]
Destination = Annotated[
    Path | None, typer.Argument(metavar="DST", help="The MoE's folder; must not exist. Not needed with --dry-run.")
]
NumExperts = Annotated[int | None, typer.Option(help="Experts per layer; 8, or the preset's.")]
NumExpertsPerTok = Annotated[int | None, typer.Option(help="Experts that each token uses; 2, or the preset's.")]
Preset = Annotated[str | None, typer.Option(help="The MoE of a paper, such as mixtral or switch; --set wins over it.")]
Init = Annotated[
    str | None, typer.Option(help="How the experts start: copy if not given, drop, permute, granular, split or mix.")
]
InitOptions = Annotated[
    list[str] | None, typer.Option("--init-set", metavar="OPTION=VALUE", help="An option of --init; repeatable.")
]
RouterInit = Annotated[str, typer.Option(help="How the routers start: normal, entropy, kmeans, prompts or zero.")]
RouterInitOptions = Annotated[
    list[str] | None,
    typer.Option("--router-init-set", metavar="OPTION=VALUE", help="An option of --router-init; repeatable."),
]
Noise = Annotated[float, typer.Option(help="Gaussian noise on each expert, in standard deviations.")]
SharedShare = Annotated[float, typer.Option(help="Part of the output that a shared expert starts with.")]
Inputs = Annotated[
    str | None,
    typer.Option(
        help="Text for methods that look at what the dense model does on your data: a file or folder, the name of a Hub "
        "dataset, or `builtin`."
    ),
]
Seed = Annotated[int, typer.Option(help="Of all random numbers, and of the check's tokens.")]
Dtype = Annotated[
    str, typer.Option(help="auto (as stored, streamed); float32, bfloat16 or float16 convert in memory.")
]
AllowInexact = Annotated[bool, typer.Option("--allow-inexact", help="Accept logits that differ.")]
Fields = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of MoEConfig; repeatable."),
]
MaxShardSize = Annotated[str, typer.Option(help="Largest file of weights.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not compare the logits.")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Throw away what an interrupted run with other arguments left.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only say what would be made: sizes, memory, native targets, cost.")
]
RequireExport = Annotated[
    str | None,
    typer.Option(metavar="TARGET", help="Refuse what this native family, or auto for any, cannot hold exactly."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def upcycle(
    source: Source,
    destination: Destination = None,
    num_experts: NumExperts = None,
    num_experts_per_tok: NumExpertsPerTok = None,
    preset: Preset = None,
    init: Init = None,
    init_options: InitOptions = None,
    router_init: RouterInit = "normal",
    router_init_options: RouterInitOptions = None,
    noise: Noise = 0.0,
    shared_share: SharedShare = 0.5,
    inputs: Inputs = None,
    data: Data = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    allow_inexact: AllowInexact = False,
    fields: Fields = None,
    max_shard_size: MaxShardSize = "5GB",
    no_verify: NoVerify = False,
    restart: Restart = False,
    dry_run: DryRun = False,
    require_export: RequireExport = None,
    fit: Fit = None,
    scope: Scope = None,
    batch: Batch = None,
    sequence: Sequence = None,
    checkpointing: Checkpointing = False,
    as_json: AsJson = False,
) -> None:
    """Turn a dense checkpoint into a MoE, tensor by tensor, check it, and save it with tokenizer and card.

    A run that was interrupted is continued by the same command.
    """
    with user_errors():
        if not dry_run:
            _check_destination(destination)
        dtype = _dtype(dtype)
        chosen = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok, "preset": preset}
        chosen |= {"noise": noise, "shared_share": shared_share, "seed": seed}
        chosen |= {"router_init": _router_init(router_init, router_init_options), **_fields(fields)}
        run = {"scope": scope, "batch": batch, "sequence": sequence, "checkpointing": checkpointing}
        run |= {"init": init, "init_options": init_options, "dtype": dtype, "allow_inexact": allow_inexact}
        fitted = fitted_shape(source, fit, chosen | run)
        chosen |= {"init": _init(init or "copy", init_options)} if fitted is None else fitted.shape.arguments()
        counted = _say_fit(fitted, as_json)
        if dry_run or require_export is not None:
            plan = _plan(source, chosen, require_export)
        if dry_run:
            _print_plan(plan, as_json, counted)
            return
        ids = None if inputs is None else read_token_ids(inputs, source)
        chosen |= {"allow_inexact": allow_inexact, "inputs": ids, "data": data}
        if dtype != "auto" or not _stream(source, destination, chosen, not no_verify, max_shard_size, restart):
            streamed_only = dtype != "auto" and (no_verify or restart)
            _in_memory(source, destination, chosen, dtype, max_shard_size, streamed_only)
        _print_result(source, destination, as_json, counted)


def _dtype(name: str) -> str:
    from moe_hf.dtypes import dtype_name

    return dtype_name(name, DTYPES)


def _init(name: str, assignments: list[str] | None) -> "Initialiser":
    options = parse_assignments("--init-set", assignments)
    from moe_hf.upcycling.initialisers import make_initialiser

    return make_initialiser(name, options)


def _router_init(name: str, assignments: list[str] | None) -> "RouterInit":
    options = parse_assignments("--router-init-set", assignments)
    from moe_hf.upcycling.router_init import make_router_init

    return make_router_init(name, options)


def _say_fit(fitted: "FittedShape | None", as_json: bool) -> dict[str, Any]:
    """Print what `--fit` counted, or return it for the JSON."""
    if fitted is None:
        return {}
    if not as_json:
        print_fit(fitted)
    return {"fit": fitted.to_dict()}


def _fields(assignments: list[str] | None) -> dict[str, Any]:
    from moe_hf.streaming import upcycle_checkpoint

    return parse_fields(assignments, upcycle, upcycle_checkpoint)


def _check_destination(destination: Path | None) -> None:
    if destination is None:
        from moe_hf.errors import MoEError

        raise MoEError("DST is missing: give the folder for the MoE, or --dry-run.")
    refuse_existing(destination)


def _plan(source: str, arguments: dict[str, Any], require_export: str | None) -> "UpcyclingPlan":
    from moe_hf.planning import plan_upcycling

    with quiet_transformers():
        plan = plan_upcycling(source, **arguments)
    if require_export is not None:
        plan.require_export(require_export)
    return plan


def _stream(
    source: str, destination: Path, arguments: dict[str, Any], verify: bool, max_shard_size: str, restart: bool
) -> bool:
    """False, with the reason on the error output, when only a whole model can be converted."""
    from moe_hf.streaming import upcycle_checkpoint
    from moe_hf.upcycling.on_disk.dense_checkpoint import NotStreamableError

    try:
        with quiet_transformers(), _progress_bar() as progress:
            upcycle_checkpoint(
                source,
                destination,
                verify=verify,
                max_shard_size=max_shard_size,
                restart=restart,
                progress=progress,
                **arguments,
            )
    except NotStreamableError as error:
        typer.echo(f"{error}\nThis is done now: converted in memory, where a result is always verified.", err=True)
        return False
    return True


def _in_memory(
    source: str, destination: Path, arguments: dict[str, Any], dtype: str, max_shard_size: str, streamed_only: bool
) -> None:
    from moe_hf.dense_sources import read_dense_config
    from moe_hf.errors import MoEError
    from moe_hf.hub import save_model
    from moe_hf.upcycling import upcycle as upcycle_model
    from moe_hf.upcycling.sources import check_dense_config

    if streamed_only:
        raise MoEError(f"--restart and --no-verify need --dtype auto; with {dtype} the model is converted in memory.")
    # With all its parts, of which loading a causal language model may leave some out.
    check_dense_config(read_dense_config(source), source)
    with quiet_transformers():
        tokenizer = load_tokenizer(source)
        moe = upcycle_model(load_model(source, dtype), tokenizer=tokenizer, **arguments)
        save_model(moe, tokenizer, destination, max_shard_size=max_shard_size)


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes with the time left, on the error output, for `progress(done, total)`."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("weights", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_result(source: str, destination: Path, as_json: bool, counted: dict[str, Any]) -> None:
    from moe_hf.inspection import inspect_model

    with quiet_transformers():
        facts = inspect_model(destination)
    check = facts.upcycling.get("verification")
    if as_json:
        typer.echo(json.dumps({"folder": str(destination), **facts.to_dict(), **counted}, indent=2))
        return
    typer.echo(f"{source} -> {destination}")
    typer.echo(
        f"parameters: {count_text(facts.total_parameters)} total, {count_text(facts.active_parameters)} active per token"
    )
    if "quantized_as" in facts.upcycling:
        typer.echo(f"its experts have quantized values: the source's weights were {facts.upcycling['quantized_as']}")
    if check is None:
        typer.echo("logits were not compared with the dense model's: moe-hf verify does that")
    else:
        typer.echo(f"logits differ from the dense model's by {check['relative_error']:.1e} (relative)")
        print_loss(check, facts.upcycling.get("warnings", []))
    if not (destination / "tokenizer_config.json").is_file():
        typer.echo(f"no tokenizer was found in {source}: none was saved", err=True)


def _print_plan(plan: "UpcyclingPlan", as_json: bool, counted: dict[str, Any]) -> None:
    if as_json:
        typer.echo(json.dumps(plan.to_dict() | counted, indent=2))
        return
    print_rows(f"{plan.source}, in {plan.dtype}", _plan_rows(plan), header=("dense", "MoE"))
    typer.echo(
        "\nTraining memory: 16 bytes per trained parameter (float32 weight, gradient, AdamW), the rest as stored;"
    )
    typer.echo("in none of these figures: activations, caches.")
    typer.echo(
        f"\nThe logits will differ from the dense model's: {plan.why_inexact}."
        if plan.why_inexact
        else "\nThe logits will be the dense model's."
    )
    _print_targets(plan)
    typer.echo("\nCost of training, and what others found about it:")
    for sentence in plan.advice():
        typer.echo(f"- {sentence}")


def _plan_rows(plan: "UpcyclingPlan") -> Iterator[tuple[str, ...]]:
    dense, moe = plan.dense, plan.moe
    yield "parameters", count_text(dense.total_parameters), count_text(moe.total_parameters)
    yield "  active per token", count_text(dense.active_parameters), count_text(moe.active_parameters)
    yield "layers with experts", "", f"{moe.num_moe_layers} of {moe.num_layers}"
    yield "experts", "", f"{moe.num_experts}, {moe.num_experts_per_tok} per token"
    yield "disk, memory to run", bytes_text(plan.dense_bytes), bytes_text(plan.moe_bytes)
    yield "memory to train all", "", bytes_text(plan.training_bytes["all"])
    yield "memory to train experts and routers", "", bytes_text(plan.training_bytes["moe"])
    yield "FLOPs per token", f"{dense.flops_per_token:.3g}", f"{moe.flops_per_token:.3g}"


def _print_targets(plan: "UpcyclingPlan") -> None:
    if plan.exact_targets:
        typer.echo(f"moe-hf export can write it, exactly, as: {', '.join(plan.exact_targets)}.")
        return
    typer.secho(
        "WARNING: no native family can hold this MoE exactly. It runs with transformers; vLLM, SGLang and llama.cpp will "
        "not know it.",
        fg="red",
        bold=True,
    )
    by_reason: dict[str, list[str]] = {}
    for target, reason in plan.targets.items():
        by_reason.setdefault(reason, []).append(target)
    for reason, targets in by_reason.items():
        typer.echo(f"- {', '.join(targets)}: {reason}")
