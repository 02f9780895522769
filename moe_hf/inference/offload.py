"""Experts away from the device that computes: a model runs with a few experts of each layer in its memory.

The scheme is that of Eliseev and Mazur (https://huggingface.co/papers/2312.17238): an LRU cache of experts per layer.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moe_hf.errors import MoEError
from moe_hf.finetuning import find_moe_blocks
from moe_hf.inference.expert_cache import PLAIN, Backing, CachedMatrices, DiskBacking, HostBacking
from moe_hf.inference.quantize import expert_modules, set_stored
from moe_hf.inference.schemes import Parts
from moe_hf.kernels import StoredExperts, describe_experts, leave_to_each_process, stored_maps
from moe_hf.unwrapping import unwrapped
from moe_hf.weight_files import CheckpointReader


WEIGHTS_FOLDER = "weights"


@dataclass(frozen=True)
class CacheReport:
    """How often a pass found an expert's matrix on the device (`hits`) or fetched it (`misses`), by MoE block."""

    hits: dict[str, int]
    misses: dict[str, int]

    @property
    def hit_rate(self) -> float:
        """Share of the matrices that were there, over all layers; 0 before the first pass."""
        hits, misses = sum(self.hits.values()), sum(self.misses.values())
        return hits / (hits + misses) if hits + misses else 0.0


@torch.no_grad()
def offload_experts(
    model: nn.Module,
    resident_per_layer: int,
    *,
    device: str | torch.device | None = None,
    from_disk: str | os.PathLike | None = None,
) -> nn.Module:
    """Keep the routed experts of `model` in host memory or on the disk, and `resident_per_layer` of each layer on `device`.

    The experts that were used last stay; a pass that needs more takes them in turns, so memory does not depend on the text.
    Outputs are those of the model with all experts there. Quantized experts are moved as codes. In place; for inference, and
    for adapters beside the frozen experts. `restore_experts` undoes it.

    Args:
        resident_per_layer (`int`): experts of a layer in the device's memory, at least 1.
        device (`str` or `torch.device`, *optional*): where the model computes; by default where it is. All but the experts
            is moved there.
        from_disk (`str` or `os.PathLike`, *optional*): a folder that holds this model's experts under their names, as
            `save_low_memory` writes it (or `save_pretrained`, for ours): experts are read from its files when they are
            needed, and leave host memory. The files must stay as they are.

    Returns:
        the same model.

    Raises:
        MoEError: the experts cannot be stored apart, are offloaded already, or the folder does not hold them; the model is then
            unchanged.
    """
    check_residents(resident_per_layer)
    given, model = model, unwrapped(model, changes_parameters=True)
    modules = expert_modules(model)
    target = torch.device(device if device is not None else next(model.parameters()).device)
    names = {id(module): name for name, module in model.named_modules()}
    reader = None if from_disk is None else experts_reader(from_disk)
    stored: list[tuple[nn.Module, str, StoredExperts]] = []
    for block, experts in modules.items():
        description = describe_experts(experts)
        for name in (description.first, description.second):
            weight = getattr(experts, name)
            source = weight.source if isinstance(weight, StoredExperts) else None
            if isinstance(source, CachedMatrices):
                raise MoEError(f"The experts of {block} are offloaded already: restore_experts(model) first.")
            parts = {PLAIN: weight.detach().contiguous()} if source is None else source.parts
            if reader is None:
                backing = HostBacking(parts, target)
            else:
                backing = _found(reader, f"{names[id(experts)]}.{name}", parts)
            scheme = None if source is None else source.scheme
            shape = tuple(weight.shape) if source is None else source.shape
            cached = CachedMatrices(backing, scheme, shape, weight.dtype, target, resident_per_layer)
            stored.append((experts, name, StoredExperts(cached, source is not None and weight.swapped)))
    for experts, name, weight in stored:
        set_stored(experts, name, weight)
    leave_to_each_process(model)
    model.to(target)
    return given


def cache_report(model: nn.Module, *, reset: bool = False) -> CacheReport:
    """Hits and misses of the experts of an offloaded model since it was offloaded; `reset` starts to count anew.

    Raises:
        MoEError: its experts are not offloaded.
    """
    hits, misses = {}, {}
    model = unwrapped(model)
    for block, experts in {name: block.experts for name, block in find_moe_blocks(model).items()}.items():
        sources = [w.source for w in stored_maps(experts).values() if isinstance(w.source, CachedMatrices)]
        if not sources:
            raise MoEError(f"The experts of {block} are not offloaded: offload_experts(model, ...) first.")
        hits[block] = sum(source.hits for source in sources)
        misses[block] = sum(source.misses for source in sources)
        if reset:
            for source in sources:
                source.hits = source.misses = 0
    return CacheReport(hits, misses)


def check_residents(resident_per_layer: int) -> None:
    """Refuse a number of resident experts that is none.

    Raises:
        MoEError: it is not an integer of at least 1.
    """
    if not isinstance(resident_per_layer, int) or isinstance(resident_per_layer, bool) or resident_per_layer < 1:
        raise MoEError(f"resident_per_layer is {resident_per_layer!r}; a number of experts of at least 1 is wanted.")


def experts_reader(folder: str | os.PathLike) -> CheckpointReader:
    """The weights of a checkpoint folder, or of one that `save_low_memory` wrote, read row by row."""
    folder = Path(folder)
    return CheckpointReader(folder / WEIGHTS_FOLDER if (folder / WEIGHTS_FOLDER).is_dir() else folder)


def tensor_names(weight: str, parts: Parts | dict) -> dict[str, str]:
    """The names in a file of the parts of an experts' weight: its own name, with the part's behind it where there are several."""
    return {part: weight if part == PLAIN else f"{weight}.{part}" for part in parts}


def _found(reader: CheckpointReader, weight: str, parts: Parts) -> Backing:
    """The parts in the files; the first and the last expert are compared with those in memory."""
    names = tensor_names(weight, parts)
    for part, name in names.items():
        spec = reader.tensors.get(name)
        if spec is None:
            raise MoEError(
                f"{reader.folder} has no tensor {name}: it holds the experts under other names, or in another form. Write "
                "the model with save_low_memory, and offload from that folder."
            )
        own = parts[part]
        if spec.shape != tuple(own.shape) or spec.dtype != own.dtype:
            raise MoEError(
                f"{name} in {reader.folder} is {spec.dtype} {spec.shape}, and {own.dtype} {tuple(own.shape)} in the model."
            )
        for expert in {0, len(own) - 1}:
            if not torch.equal(reader.read(name, expert, expert + 1)[0], own[expert].cpu()):
                raise MoEError(f"{name} in {reader.folder} has other numbers than the model: it is of another model.")
    return DiskBacking(reader, names)
