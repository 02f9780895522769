"""The command `moe-hf`: upcycle a checkpoint, verify it, inspect a model.

Torch and transformers are imported inside the commands, so that help and mistakes in the arguments answer at once.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_hf import __version__


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moe_hf.inspection import ModelFacts
    from moe_hf.upcycling import VerificationResult


USER_ERROR = 2
app = typer.Typer(
    name="moe-hf",
    help="Turn dense transformers checkpoints into Mixture-of-Experts models, and look into them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command; a user's mistake prints one sentence and ends with exit code 2."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moe-hf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    # The help says what the application is; the commands do the work.
    pass


@app.command()
def upcycle(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The dense model: a folder or a Hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The MoE's folder; must not exist.")],
    num_experts: Annotated[int, typer.Option(help="Experts per layer.")] = 8,
    num_experts_per_tok: Annotated[int, typer.Option(help="Experts that each token uses.")] = 2,
    init: Annotated[str, typer.Option(help="How the experts start: copy.")] = "copy",
    noise: Annotated[float, typer.Option(help="Gaussian noise on each expert, in standard deviations.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the router, the noise and the check's tokens.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
    allow_inexact: Annotated[bool, typer.Option("--allow-inexact", help="Accept logits that differ.")] = False,
    fields: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of MoEConfig; may be given repeatedly."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
) -> None:
    """Turn a dense checkpoint into a MoE that computes the same, check it, and save it with tokenizer and card."""
    with _user_errors():
        if os.path.lexists(destination):
            from moe_hf.errors import MoEError

            raise MoEError(f"{destination} exists: nothing was written. Choose another folder, or remove it first.")
        config_fields = _parse_fields(fields or [])
        from moe_hf.hub import save_model
        from moe_hf.inspection import inspect_model
        from moe_hf.upcycling import upcycle as upcycle_model

        with _quiet_transformers():
            moe = upcycle_model(
                _load(source, dtype) if dtype != "auto" else source,
                num_experts=num_experts,
                num_experts_per_tok=num_experts_per_tok,
                init=init,
                noise=noise,
                seed=seed,
                allow_inexact=allow_inexact,
                **config_fields,
            )
            tokenizer = _load_tokenizer(source)
            folder = save_model(moe, tokenizer, destination, max_shard_size=max_shard_size)
        facts = inspect_model(moe)
    error = moe.config.upcycling["verification"]["relative_error"]
    typer.echo(f"{source} -> {folder}")
    typer.echo(
        f"parameters: {_count(facts.total_parameters)} total, {_count(facts.active_parameters)} active per token"
    )
    typer.echo(f"logits differ from the dense model's by {error:.1e} (relative)")
    if tokenizer is None:
        typer.echo(f"no tokenizer was found in {source}: none was saved", err=True)


@app.command()
def verify(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The dense model: a folder or a Hub id.")],
    moe: Annotated[str, typer.Argument(metavar="MOE", help="The MoE made from it: a folder or a Hub id.")],
    seed: Annotated[int, typer.Option(help="Of the tokens.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the logits of a dense model and of its MoE on the same tokens; exit code 1 when they differ."""
    with _user_errors():
        from moe_hf.upcycling import verify as verify_models

        with _quiet_transformers():
            result = verify_models(_load(source), _load(moe), seed=seed)
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else _verification_text(result))
    if not result.exact:
        raise typer.Exit(1)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id; only its config is read.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show parameters (total, active, per part), routing, memory per dtype and arithmetic per token."""
    with _user_errors():
        from moe_hf.inspection import inspect_model

        with _quiet_transformers():
            facts = inspect_model(model)
    if as_json:
        typer.echo(json.dumps(facts.to_dict(), indent=2))
    else:
        _print_facts(facts)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Print a mistake as one message without a traceback, and exit with code 2; MOE_HF_DEBUG=1 shows the traceback."""
    try:
        yield
    except Exception as error:
        if os.environ.get("MOE_HF_DEBUG") or not _is_user_error(error):
            raise
        typer.echo(f"moe-hf: {str(error).strip()}", err=True)
        raise typer.Exit(USER_ERROR) from None


def _is_user_error(error: Exception) -> bool:
    from safetensors import SafetensorError

    # What transformers and the Hub client raise for a bad path, name, config or file besides our own ValueErrors.
    return isinstance(error, ValueError | OSError | SafetensorError)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _load(path: str, dtype: str = "auto") -> Any:
    """A causal language model; the index of a local folder is checked first."""
    import torch
    from transformers import AutoModelForCausalLM

    from moe_hf.errors import MoEError
    from moe_hf.inspection import load_config
    from moe_hf.saving import check_shard_index

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise MoEError(f"dtype is {dtype!r}; it must be auto, float32, bfloat16 or float16.")
    load_config(path)
    folder = Path(path).expanduser()
    if folder.is_dir():
        path = str(folder)
        check_shard_index(folder)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype))


def _load_tokenizer(source: str) -> "PreTrainedTokenizerBase | None":
    from transformers import AutoTokenizer

    folder = Path(source).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        return None
    return AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else source)


def _parse_fields(assignments: list[str]) -> dict[str, Any]:
    """`["name=value", ...]` as keyword arguments; values are read as YAML, so numbers and lists have their types."""
    import yaml

    from moe_hf.errors import MoEError

    fields = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise MoEError(f"--set takes FIELD=VALUE, and got {assignment!r}.")
        try:
            fields[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise MoEError(f"--set {name}: {value!r} cannot be read as a value: {error}") from error
    return fields


def _verification_text(result: "VerificationResult") -> str:
    verdict = "equal" if result.exact else f"different, first in {result.first_difference}"
    return (
        f"{verdict}: relative error {result.relative_error:.1e}, largest difference {result.max_abs_error:.1e} "
        f"over {result.num_tokens} tokens; the dense checkpoint's own rounding {result.rounding_error:.1e}"
    )


def _print_facts(facts: "ModelFacts") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=facts.architecture, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in _fact_rows(facts):
        table.add_row(name, value)
    Console().print(table)


def _fact_rows(facts: "ModelFacts") -> Iterator[tuple[str, str]]:
    yield "parameters", _count(facts.total_parameters)
    yield "  active per token", _count(facts.active_parameters)
    for part, count in facts.parameters_per_part.items():
        yield f"  {part}", _count(count)
    yield "layers", f"{facts.num_layers}, {facts.num_moe_layers} with experts"
    if facts.num_moe_layers:
        yield "experts per layer", f"{facts.num_experts}, {facts.num_experts_per_tok} per token"
    for field, value in facts.routing.items():
        yield f"  {field}", str(value)
    for dtype, size in facts.memory_bytes.items():
        yield f"memory in {dtype}", _bytes(size)
    yield "FLOPs per token", f"{facts.flops_per_token:.3g}"
    if facts.upcycling:
        yield "upcycled from", str(facts.upcycling.get("source"))


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number:,} ({number / size:.2f} {unit})"
    return str(number)


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"


if __name__ == "__main__":
    main()
