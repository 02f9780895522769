"""What training changed, as one small file: the trained experts' rows, and what else trained.

The file says which model it belongs to by a fingerprint of everything that did not train, so it goes onto that model or is
refused.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from moe_hf.errors import MoEError
from moe_hf.finetuning.base_record import sampled
from moe_hf.finetuning.expert_selection import ExpertSelection
from moe_hf.finetuning.moe_blocks import find_moe_blocks
from moe_hf.finetuning.selected_experts import CHILD, selected_modules, stacked_parameters
from moe_hf.saving import temporary_sibling
from moe_hf.unwrapping import unwrapped


DELTAS_NAME = "expert_deltas.safetensors"
FORMAT = "moe_hf.expert_deltas"


@dataclass(frozen=True)
class ExpertDeltas:
    """What a file of deltas says about itself.

    Attributes:
        experts: ids of the trained experts by the name of their MoE block.
        base_model: name of the model that was trained, as it was loaded.
        base_revision: its commit on the Hub, or empty.
        base_fingerprint: of all that did not train, see [`frozen_fingerprint`].
    """

    experts: dict[str, tuple[int, ...]]
    base_model: str
    base_revision: str
    base_fingerprint: str

    @property
    def num_experts(self) -> int:
        """Trained experts in all layers together."""
        return sum(map(len, self.experts.values()))


def frozen_fingerprint(model: nn.Module, experts: dict[str, tuple[int, ...]], others: set[str]) -> str:
    """sha256 over samples of all parameters but the rows of `experts` and the tensors named in `others`.

    1024 evenly spaced values of each tensor, and of each expert's part of a stacked tensor, as float32: the same for a model
    in bfloat16 and its copy in float32, another for one that was trained on, rounded or initialised anew.
    """
    rows = {
        f"{block}.experts.{name}": set(experts[block])
        for block, module in find_moe_blocks(model).items()
        if block in experts
        for name in stacked_parameters(module.experts)
    }
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name in others or f".experts.{CHILD}." in name:
            continue
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        parts = [parameter] if name not in rows else [p for i, p in enumerate(parameter) if i not in rows[name]]
        for part in parts:
            digest.update(sampled(part.detach().reshape(1, -1)).numpy().tobytes())
    return digest.hexdigest()


def save_expert_deltas(model: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write what trains in `model` (scope `selected`) to one safetensors file: the chosen experts, and what else has
    gradients; buffers such as correction biases, which training moves too.

    Args:
        path (`str` or `Path`): the file; replaced at once when it exists, whole or not at all.
        dtype (`torch.dtype`, *optional*): of the values; as they are in memory if not given, which resuming needs.

    Raises:
        MoEError: no expert of the model was chosen, or the file cannot be written.
    """
    model = unwrapped(model)
    chosen = {name.removesuffix(".experts"): module for name, module in selected_modules(model).items()}
    if not chosen:
        raise MoEError(f"No experts of {type(model).__name__} were chosen: apply_scope(model, 'selected', ...) first.")
    tensors = {
        f"{block}.experts.{name}": parameter
        for block, module in chosen.items()
        for name, parameter in module.get_submodule(CHILD).named_parameters()
    }
    experts = {block: module.get_submodule(CHILD).ids for block, module in chosen.items()}
    others = _other_tensors(model)
    tensors |= others
    tensors = {name: _for_file(tensor, dtype) for name, tensor in tensors.items()}
    facts = {
        "experts": experts,
        "base_model": str(getattr(model.config, "_name_or_path", "")),
        "base_revision": str(getattr(model.config, "_commit_hash", None) or ""),
        "base_fingerprint": frozen_fingerprint(model, experts, set(others)),
    }
    path = Path(path).expanduser()
    temporary = temporary_sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"format": FORMAT, "version": "1", "facts": json.dumps(facts)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise MoEError(f"{path} cannot be written: {error}.") from error
    return path


def _for_file(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor).contiguous()


def _other_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters that are no chosen experts, and the buffers that a state dict has."""
    tensors: dict[str, torch.Tensor] = {
        name: p for name, p in model.named_parameters() if p.requires_grad and f".experts.{CHILD}." not in name
    }
    for prefix, module in model.named_modules():
        lasting = set(module._buffers) - module._non_persistent_buffers_set
        tensors |= {
            f"{prefix}.{name}" if prefix else name: buffer
            for name, buffer in module._buffers.items()
            if name in lasting and buffer is not None
        }
    return tensors


@torch.no_grad()
def load_expert_deltas(model: nn.Module, path: str | Path) -> ExpertDeltas:
    """Put the values of a file of [`save_expert_deltas`] into `model`, in place.

    A plain model gets them in its stacked tensors, rounded to its dtype: that is the merged model. A model whose experts are
    chosen (scope `selected`) gets them in the parameters that train, and must have the same choice.

    Args:
        path (`str` or `Path`): the file, or a folder with `expert_deltas.safetensors`.

    Raises:
        MoEError: no such file, damaged, of another choice of experts, or trained on another base model (any value that did
            not train differs); the model is then unchanged.
    """
    path = Path(path).expanduser()
    path = path / DELTAS_NAME if path.is_dir() else path
    model = unwrapped(model)
    deltas, tensors = _read(path)
    blocks, named = find_moe_blocks(model), dict(model.named_parameters()) | dict(model.named_buffers())
    chosen = {n.removesuffix(".experts"): m.get_submodule(CHILD).ids for n, m in selected_modules(model).items()}
    if chosen and chosen != deltas.experts:
        raise MoEError(f"{path} holds other experts than those that were chosen in the model.")
    rows: list[tuple[torch.Tensor, tuple[int, ...] | None, torch.Tensor]] = []
    others = set()
    for name, values in tensors.items():
        block, _, parameter = name.rpartition(".experts.")
        if block in deltas.experts and block in blocks and parameter in stacked_parameters(blocks[block].experts):
            experts, ids = blocks[block].experts, deltas.experts[block]
            target = getattr(experts.get_submodule(CHILD) if chosen else experts, parameter)
            fits = (
                target.shape[1:] == values.shape[1:]
                and len(values) == len(ids)
                and all(i < experts.num_experts for i in ids)
            )
            rows.append((target, None if chosen else ids, values))
        else:
            target = named.get(name)
            fits = target is not None and target.shape == values.shape
            others.add(name)
            rows.append((target, None, values))
        if not fits:
            raise MoEError(f"{path} holds {name!r} of shape {tuple(values.shape)}, for which the model has no place.")
    _check_base(model, deltas, others, path)
    for target, ids, values in rows:
        values = values.to(target.device, target.dtype)
        if ids is None:
            target.data.copy_(values)
        else:
            target.data.index_copy_(0, torch.tensor(ids, device=target.device), values)
    return deltas


def _check_base(model: nn.Module, deltas: ExpertDeltas, others: set[str], path: Path) -> None:
    if set(deltas.experts) - set(find_moe_blocks(model)) or deltas.base_fingerprint != frozen_fingerprint(
        model, deltas.experts, others
    ):
        revision = f" at {deltas.base_revision}" if deltas.base_revision else ""
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        raise MoEError(
            f"{path} was trained on another model than {name}: on {deltas.base_model or 'one without a name'}{revision}. "
            "Load that one, in the dtype that it was trained in or a wider one."
        )


def _read(path: Path) -> tuple[ExpertDeltas, dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise MoEError(f"{path} is no file of expert deltas; make one with save_expert_deltas.")
            facts: dict[str, Any] = json.loads(metadata["facts"])
            # A selection's reader checks that these are lists of different ids.
            facts["experts"] = dict(ExpertSelection.load({"experts": facts["experts"]}).experts)
            return ExpertDeltas(**facts), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, MoEError):
            raise
        raise MoEError(f"{path} cannot be read as expert deltas: {error!r}.") from error
