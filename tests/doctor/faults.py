"""Tiny models that have learnt something, in folders, and what goes wrong with them.

A model of independent random numbers looks fresh everywhere, so the sizes of rows and columns are made to differ here as training
makes them differ: the model's side of a layer's experts is shared by them, and differs between gate, up and down.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from moe_hf.doctor import Report
from moe_hf.doctor.layout import inner_experts, is_concatenated, is_transposed
from moe_hf.finetuning.moe_blocks import find_moe_blocks
from tests.tiny_models import tiny_native_moe


# No two sizes equal, but for `square`. Eight experts, so that most siblings are right where one is not.
SIZES = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "hidden_size": 64, "num_hidden_layers": 3}
WIDTHS = {"moe_intermediate_size": 56, "intermediate_size": 56}
Tensors = dict[str, torch.Tensor]


def learnt(family: str = "mixtral", seed: int = 0, **fields) -> PreTrainedModel:
    """A tiny native MoE whose rows and columns differ in size as after training."""
    from transformers import AutoConfig

    defaults = AutoConfig.for_model(family)
    names = set(defaults.to_dict()) | set(defaults.attribute_map)
    own = {name: value for name, value in (SIZES | WIDTHS).items() if name in names}
    model = tiny_native_moe(family, seed, **(own | fields))
    learn_(model, seed)
    return model


@torch.no_grad()
def learn_(model: PreTrainedModel, seed: int = 0) -> None:
    """Give the rows and columns of all matrices sizes of their own; the model's side of experts is their layer's."""
    generator = torch.Generator().manual_seed(seed + 1)
    width = model.config.get_text_config().hidden_size

    def sizes(count: int) -> torch.Tensor:
        return (0.8 * torch.randn(count, generator=generator)).exp()

    stacked = set()
    for block in find_moe_blocks(model).values():
        experts = inner_experts(block)
        turned, together = is_transposed(experts, width), is_concatenated(experts)
        for name, parameter in experts.named_parameters(recurse=False):
            stacked.add(id(parameter))
            if parameter.ndim != 3:
                continue
            weight = parameter.data.transpose(1, 2) if turned else parameter.data
            if name == "down_proj":
                weight.mul_(sizes(width)[:, None])
                continue
            half = weight.shape[1] // (2 if name == "gate_up_proj" else 1)
            parts = [weight[:, :half], weight[:, half:]] if together else [weight[:, ::2], weight[:, 1::2]]
            for part in parts if name == "gate_up_proj" else [weight]:
                part.mul_(sizes(width)).mul_(0.5 + torch.rand(part.shape[1], generator=generator)[:, None])
    for name, parameter in model.named_parameters():
        if name.endswith("correction_bias"):
            # A random one would bar some experts for good.
            parameter.mul_(0.1)
        if parameter.ndim == 2 and id(parameter) not in stacked and parameter.shape[0] > 16:
            parameter.mul_(sizes(parameter.shape[1])).mul_(sizes(parameter.shape[0])[:, None])


@torch.no_grad()
def trained(model: PreTrainedModel, seed: int = 5, by: float = 0.1, only: str = "") -> PreTrainedModel:
    """Move every parameter (whose name has `only` in it) by a part of its size, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if only in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(by * parameter.std().clamp_min(1e-3) * noise)
    return model


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """The model as transformers writes it."""
    model.save_pretrained(folder)
    return folder


def rewrite(folder: Path, change: Callable[[Tensors], Tensors | None]) -> Path:
    """Change the tensors of a folder with one file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors)
    tensors = tensors if changed is None else changed
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return folder


def reconfigure(folder: Path, **fields) -> Path:
    """Change fields of a folder's config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (config | fields).items() if v is not ...}))
    return folder


def renamed(tensors: Tensors, pattern: str, to: str) -> Tensors:
    """Names with what a pattern matches replaced."""
    return {re.sub(pattern, to, name): tensor for name, tensor in tensors.items()}


def found(report: Report, code: str, severity: str = "error") -> list:
    """The findings of a code and a severity; fails where there is none."""
    findings = [f for f in report.findings if f.code == code and f.severity == severity]
    assert findings, report.to_text()
    return findings


def places(findings: list) -> set[tuple[int, int]]:
    """(layer, expert) of all findings."""
    return {(layer, expert) for f in findings for layer in f.layers for expert in f.experts}


def is_silent(report: Report) -> bool:
    """Whether a report has neither errors nor warnings; fails with its text otherwise."""
    assert not report.errors and not report.warnings, report.to_text()
    return True
