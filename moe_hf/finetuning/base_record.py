"""Which model adapters were trained on: fingerprints of all that stays frozen, compared before they go onto a model.

A fingerprint is the sha256 of samples: 1024 evenly spaced values of each tensor, and of each expert's part of a stacked one.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.finetuning.lora_sharding import whole
from moe_hf.finetuning.moe_blocks import CORRECTION_BIAS, find_moe_blocks, whole_shape
from moe_hf.kernels import stored_names


logger = logging.get_logger(__name__)

SAMPLED_VALUES = 1024
# Of a model in 16 bits the values before they were rounded are not known: it is compared with another one rounded alike.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def sampled(rows: torch.Tensor) -> torch.Tensor:
    """Evenly spaced values of each row, (N, size) -> (N, at most 1024), in float32 on the CPU."""
    size = rows.shape[1]
    places = torch.linspace(0, max(size - 1, 0), min(SAMPLED_VALUES, size), dtype=torch.float64)
    return rows[:, places.long().to(rows.device)].float().cpu()


def base_record(model: nn.Module) -> dict[str, Any]:
    """What a file of adapters says of the model below them; a collective call where the model is sharded."""
    config = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    trained = sorted(name for name, parameter in _base_parameters(model).items() if parameter.requires_grad)
    return {
        # Where a folder lies on this machine is nobody's business.
        "name": Path(name).name if Path(name).is_dir() else name,
        "revision": str(getattr(config, "_commit_hash", None) or ""),
        "vocab_size": _vocab_size(model),
        "trained_beside": trained,
        **_fingerprints(model, trained),
    }


def check_base(model: nn.Module, record: dict[str, Any] | None, where: str | Path, named: str | None = None) -> None:
    """Refuse adapters whose base is another model; warn where that cannot be told.

    Args:
        record (`dict`, *optional*): of [`base_record`]; files of others have none.
        where (`str` or `Path`): the file, for messages.
        named (`str`, *optional*): the name of the base, where there is no record.

    Raises:
        MoEError: it is, or the record is damaged.
    """
    own_name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    if record is None:
        if named is None or named != own_name:
            logger.warning(
                f"{where} has no fingerprint of the weights that it was trained on ({named or 'without a name'}): that they "
                f"are those of {own_name} is not checked."
            )
        return
    try:
        own = _fingerprints(model, [str(name) for name in record["trained_beside"]])
        rounded = {*record["dtypes"], *own["dtypes"]} & {"bfloat16", "float16"}
        same = all(_same(record[part], own[part], rounded or {"float32"}) for part in ("rest", "experts"))
        name, vocab_size = record["name"] or "one without a name", record["vocab_size"]
        revision = f" at {record['revision']}" if record["revision"] else ""
        known = record["rest"] is not None and own["rest"] is not None
    except (KeyError, TypeError, AttributeError) as error:
        raise MoEError(f"What {where} says of its base model is damaged ({error!r}): use another copy.") from error
    if not known:
        logger.warning(f"The weights below the adapters in {where} are not at hand: they are not compared.")
    if same:
        return
    more = ""
    if vocab_size != _vocab_size(model):
        more = f" Its vocabulary has {vocab_size} tokens, and this one's {_vocab_size(model)}."
    raise MoEError(
        f"{where} was trained on another model than {own_name}: on {name}{revision}.{more} Load that one; or pass "
        "allow_other_base=True if you know that the adapters fit this one too."
    )


def _same(recorded: dict[str, str] | None, own: dict[str, str] | None, precisions: set[str]) -> bool:
    # Quantized and offloaded experts have no fingerprint.
    if recorded is None or own is None:
        return True
    return any(recorded[precision] == own[precision] for precision in precisions)


def _base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the model had before adapters, under the names that it had then."""
    return {
        name.replace(".base_layer", "").replace(".original_module", ""): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" not in name and ".modules_to_save." not in name and not name.endswith(CORRECTION_BIAS)
    }


def _fingerprints(model: nn.Module, without: Collection[str]) -> dict[str, Any]:
    """By precision, of the routed experts and of the rest; None where the numbers are not at hand."""
    prefixes = tuple(f"{name}.experts." for name in find_moe_blocks(model))
    parameters = {name: p for name, p in sorted(_base_parameters(model).items()) if name not in without}
    stored, dtypes = stored_names(model), set()
    digests = {part: {name: hashlib.sha256() for name in PRECISIONS} for part in ("rest", "experts")}
    for name, parameter in parameters.items():
        shape = whole_shape(parameter)
        part = "experts" if prefixes and name.startswith(prefixes) else "rest"
        if name in stored or shape != parameter.shape:  # quantized or offloaded; left empty by ZeRO-3
            digests[part] = None
        if digests[part] is None:
            continue
        values = whole(parameter.detach())
        dtypes.add(str(values.dtype).removeprefix("torch."))
        values = sampled(values.reshape(shape[0] if part == "experts" else 1, -1))
        for precision, digest in digests[part].items():
            digest.update(f"{name} {tuple(shape)}".encode())
            digest.update(values.to(PRECISIONS[precision]).float().numpy().tobytes())
    hexadecimal = {part: d and {name: digest.hexdigest() for name, digest in d.items()} for part, d in digests.items()}
    return {"dtypes": sorted(dtypes), **hexadecimal}


def _vocab_size(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "vocab_size", None)
