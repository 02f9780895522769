"""The application, and what its commands share: mistakes as one message, quiet loading, `NAME=VALUE` arguments."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_hf import __version__
from moe_hf.versions import TESTED, installed_versions


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="TEXT",
        help="Text to measure the loss on, before and after: a file, a folder or a dataset of the Hub; prose of Python's "
        "documentation if not given.",
    ),
]
USER_ERROR = 2
DTYPES = ("auto", "float32", "bfloat16", "float16")
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
        for name, version in installed_versions().items():
            oldest, newest = TESTED[name]
            typer.echo(f"{name} {version} (tested {oldest}{'' if oldest == newest else f' to {newest}'})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the versions, installed and tested, and exit.",
        ),
    ] = False,
) -> None:
    # The help says what the application is; the commands do the work.
    pass


@contextmanager
def user_errors() -> Iterator[None]:
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
def quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings, and without its progress bars where nobody watches."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def refuse_existing(destination: Path) -> None:
    """Refuse a destination that exists, before anything is loaded."""
    from moe_hf.saving import refuse_existing as refuse

    refuse(destination)


def load_model(path: str, dtype: str = "auto") -> "PreTrainedModel":
    """A causal language model from a folder, a GGUF file or the Hub; the files of a local folder are checked first."""
    import torch

    from moe_hf.dense_sources import load_dense
    from moe_hf.dtypes import dtype_name
    from moe_hf.gguf_files import gguf_file_of
    from moe_hf.inspection import load_config
    from moe_hf.upcycling.sources import check_all_loaded
    from moe_hf.weight_checks import check_structure

    dtype = dtype_name(dtype, DTYPES)
    folder = Path(path).expanduser()
    if folder.is_dir() and gguf_file_of(folder) is None:
        load_config(path)
        check_structure(folder)
    model, report = load_dense(path, dtype if dtype == "auto" else getattr(torch, dtype))
    check_all_loaded(model, report, path)
    return model


def load_tokenizer(source: str) -> "PreTrainedTokenizerBase | None":
    """The tokenizer beside the weights of `source`, or None when a local folder has none."""
    from moe_hf.dense_sources import find_dense_tokenizer

    return find_dense_tokenizer(source)


def print_loss(check: dict[str, Any], warnings: list[str]) -> None:
    """Print what a verification found on text, and in red what is wrong with the model."""
    from moe_hf.upcycling import VerificationResult

    typer.echo(VerificationResult(**check).loss_text)
    for message in warnings:
        typer.secho(f"WARNING: {message}", fg="red", bold=True, err=True)


def read_token_ids(data: str, source: str) -> "torch.Tensor":
    """Text as rows of at most 512 tokens of the source's tokenizer, (B, S); 8192 tokens at most.

    Args:
        data: what every option with text takes: a file or a folder of text, `builtin`, or a dataset's name on the Hub.
        source: the model.
    """
    import torch

    from moe_hf.data import load_text
    from moe_hf.errors import MoEError
    from moe_hf.inspection import load_config

    rows, length = 16, 512
    documents = load_text(data).shuffle(seed=0)
    with quiet_transformers():
        tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise MoEError(f"{source} has no tokenizer, which --inputs needs.")
    ids: list[int] = []
    for text in documents["text"]:
        # About 4 characters are a token; more than enough are read.
        ids += tokenizer(text[: 16 * rows * length], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= rows * length:
            break
    if not ids:
        raise MoEError(f"--inputs {data} has no text.")
    ids = ids[: rows * length]
    # Some families have a row of an embedding for each position, and no more.
    positions = getattr(load_config(source), "max_position_embeddings", None)
    length = min(length, len(ids), positions or length)
    return torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)


def parse_assignments(option: str, assignments: list[str] | None) -> dict[str, Any]:
    """`["name=value", ...]` as keyword arguments; values are read as YAML, so numbers and lists have their types."""
    import yaml

    from moe_hf.errors import MoEError

    fields = {}
    for assignment in assignments or []:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise MoEError(f"{option} takes FIELD=VALUE, and got {assignment!r}.")
        try:
            fields[name] = yaml.safe_load(value)
        except (yaml.YAMLError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise MoEError(f"{option} {name}: {value!r} cannot be read as a value: {error}") from error
    return fields


def parse_fields(assignments: list[str] | None, *takers: Callable) -> dict[str, Any]:
    """What `--set` gives: fields of a configuration, and no arguments that `takers`, a command and what it calls, name."""
    import inspect

    from moe_hf.errors import MoEError

    fields = parse_assignments("--set", assignments)
    for name in fields:
        if any(name in inspect.signature(taker).parameters for taker in takers):
            raise MoEError(
                f"--set is for fields of MoEConfig, and got {name}: the command has options of its own, see --help."
            )
    return fields
