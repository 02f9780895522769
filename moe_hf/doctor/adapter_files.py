"""Adapters as they lie in files: PEFT's, and this package's, by the module that each half belongs to.

Letters: E experts, r rank.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moe_hf.errors import MoEError
from moe_hf.finetuning.lora_files import LORA_NAME, PEFT_FACTS
from moe_hf.finetuning.peft_files import PEFT_CONFIG, PEFT_WEIGHTS, PREFIX
from moe_hf.saving import read_json_object


HALF = re.compile(r"^(?:base_model\.model\.)?(.*?)\.lora_(?:embedding_)?([AB])(?:\.[^.]+)?(?:\.weight)?$")
OURS = re.compile(r"^(.*)\.(gate_up_proj|up_proj|down_proj)_([AB])$")


@dataclass
class AdapterFile:
    """The tensors of an adapter.

    Attributes:
        path: of the file with the tensors.
        config: PEFT's adapter_config.json, or this package's own configuration.
        is_peft: whose form it is.
        facts: what the header says besides.
        halves: module (PEFT's, with `base_layer` for the inner ones) to its A and B.
        others: tensors that are no halves, such as whole modules that are saved along.
    """

    path: Path
    config: dict[str, Any]
    is_peft: bool
    facts: dict[str, Any]
    halves: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)

    def module(self, name: str) -> str:
        """The module of the base that the halves of `name` are for."""
        return name.replace(".base_layer", "")

    @property
    def is_of_stacks(self) -> bool:
        """Whether it has parts for stacked experts."""
        return not self.is_peft or bool(self.config.get("target_parameters"))


def read_adapter(folder: Path) -> AdapterFile:
    """Read an adapter; it is small beside its base.

    Raises:
        MoEError: a file is missing or damaged, or of another form.
    """
    path = folder if folder.is_file() else folder / LORA_NAME
    is_peft = not path.is_file()
    config: dict[str, Any] = {}
    if is_peft:
        path, config = folder / PEFT_WEIGHTS, read_json_object(folder / PEFT_CONFIG)
    if not path.is_file():
        raise MoEError(f"{folder} has no {path.name}; adapters in other files, pickles for example, are not read.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            facts = json.loads(metadata.get(PEFT_FACTS if is_peft else "facts", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise MoEError(f"{path} cannot be read as an adapter: {error}.") from error
    if not isinstance(facts, dict):
        raise MoEError(f"{path} cannot be read as an adapter: its header holds no facts.")
    adapter = AdapterFile(path, config if is_peft else facts.get("config") or {}, is_peft, facts)
    for name, tensor in tensors.items():
        match = HALF.match(name) if is_peft else OURS.match(name)
        if match is None:
            adapter.others[name.removeprefix(PREFIX)] = tensor
        elif is_peft:
            adapter.halves.setdefault(match[1], {})[match[2]] = tensor
        else:
            adapter.halves.setdefault(f"{match[1]}.experts.{match[2]}", {})[match[3]] = tensor
    return adapter
