"""`moe-hf verify`: do a dense model and its MoE give the same logits?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_hf.cli.app import Data, load_model, print_loss, quiet_transformers, user_errors


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moe_hf.upcycling import VerificationResult


def verify(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The dense model: a folder, a GGUF file or a Hub id.")],
    moe: Annotated[str, typer.Argument(metavar="MOE", help="The MoE made from it: a folder or a Hub id.")],
    data: Data = None,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the logits and the loss of a dense model and of its MoE on the same tokens; exit code 1 when logits differ."""
    with user_errors():
        from moe_hf.upcycling import verify as verify_models

        with quiet_transformers():
            result = verify_models(_folder_or_model(source), _folder_or_model(moe), data=data, seed=seed)
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else _verification_text(result))
    if not as_json:
        print_loss(result.to_dict(), [result.loss_warning] if result.loss_warning else [])
    if not result.exact:
        raise typer.Exit(1)


def _folder_or_model(path: str) -> "Path | PreTrainedModel":
    """A local folder as it is, checked, which is then run layer by layer; anything else loaded."""
    from moe_hf.gguf_files import gguf_file_of
    from moe_hf.inspection import load_config
    from moe_hf.weight_checks import check_finite_weights, check_structure

    folder = Path(path).expanduser()
    if gguf_file_of(folder) is not None:
        return folder
    if not any(folder.glob("*.safetensors")):
        return load_model(path)
    load_config(path)
    check_structure(folder)
    check_finite_weights(folder)
    return folder


def _verification_text(result: "VerificationResult") -> str:
    verdict = "equal" if result.exact else f"different, first in {result.first_difference}"
    return (
        f"{verdict}: relative error {result.relative_error:.1e}, largest difference {result.max_abs_error:.1e} "
        f"over {result.num_tokens} tokens; the dense checkpoint's own rounding {result.rounding_error:.1e}"
    )
