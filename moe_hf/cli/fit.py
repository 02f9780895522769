"""`moe-hf upcycle --fit`: the shape for a memory that the user names, and what was counted for it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_hf.cli.app import quiet_transformers
from moe_hf.cli.printing import bytes_text, print_rows


if TYPE_CHECKING:
    from moe_hf.training_plan import FittedShape


Fit = Annotated[
    str | None,
    typer.Option(metavar="MEMORY", help="Choose the largest shape whose fine-tuning fits, such as 8GiB or 8GB."),
]
Scope = Annotated[str | None, typer.Option(help="With --fit, what trains; moe. With none, the model runs only.")]
Batch = Annotated[int | None, typer.Option(help="With --fit, sequences of a micro-batch; 1.")]
Sequence = Annotated[int | None, typer.Option("--seq", help="With --fit, tokens of a sequence; 1024.")]
Checkpointing = Annotated[bool, typer.Option("--checkpointing", help="With --fit, gradient checkpointing.")]
# Options of `upcycle` that choose a shape themselves, and those that say what is planned for.
OF_SHAPES = {
    "num_experts": "--num-experts",
    "num_experts_per_tok": "--num-experts-per-tok",
    "preset": "--preset",
    "init": "--init",
    "init_options": "--init-set",
}
OF_RUNS = {"scope": "--scope", "batch": "--batch", "sequence": "--seq", "checkpointing": "--checkpointing"}


def fitted_shape(source: str, memory: str | None, given: dict[str, Any]) -> "FittedShape | None":
    """The shape that `--fit` chooses, or None without it.

    Args:
        source (`str`): the dense model.
        memory (`str`, *optional*): what `--fit` says.
        given (`dict`): options of the command, with other arguments of `fit_shape` and of `upcycle` among them; None, or
            False, where they are not given.

    Raises:
        MoEError: an option that would have no effect, or nothing that fits.
    """
    from moe_hf.errors import MoEError

    named = {name: value for name, value in given.items() if value not in (None, False)}
    if memory is None:
        if useless := [option for name, option in OF_RUNS.items() if name in named]:
            raise MoEError(
                f"{', '.join(useless)} would have no effect: --fit, such as --fit 8GiB, has to name the memory to plan for."
            )
        return None
    if twice := [option for name, option in OF_SHAPES.items() if name in named]:
        raise MoEError(f"--fit chooses the shape: leave {', '.join(twice)} out, or --fit.")
    from moe_hf.training_plan import fit_shape

    with quiet_transformers():
        return fit_shape(source, memory, **named)


def print_fit(found: "FittedShape") -> None:
    """The shape, and what was counted, as a table."""
    settings = found.settings
    what = "running" if settings.scope == "none" else f"training scope {settings.scope}"
    title = f"{found.shape}: {what}, batch {settings.batch}, sequence {settings.sequence}, dtype {settings.dtype}"
    print_rows(title, _rows(found))
    if found.larger is not None:
        typer.echo(f"The next larger shape, {found.larger}, does not fit.")


def _rows(found: "FittedShape") -> Iterator[tuple[str, str]]:
    yield "weights", bytes_text(found.weights)
    if found.settings.scope != "none":
        yield "gradients", bytes_text(found.gradients)
        yield "AdamW", bytes_text(found.optimizer)
    yield "activations and logits beside these", bytes_text(found.activations)
    yield "  logits of batch x sequence x vocabulary, once", bytes_text(found.logits)
    yield "the program itself", bytes_text(found.process)
    yield "in all", bytes_text(found.total)
    yield "memory", bytes_text(found.settings.memory)
