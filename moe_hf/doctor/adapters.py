"""Adapters: what they reach and what not, ranks, shapes, zeros, packing, their base, and who can load them.

Letters: E experts, r rank, O outputs, I inputs.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_hf.doctor.adapter_files import AdapterFile, read_adapter
from moe_hf.doctor.findings import ERROR, NOTE, WARNING, Report, layer_numbers
from moe_hf.doctor.layout import inner_experts, is_of_experts
from moe_hf.doctor.names import listed
from moe_hf.doctor.opening import Opened
from moe_hf.errors import MoEError
from moe_hf.finetuning.base_record import check_base
from moe_hf.finetuning.moe_blocks import experts_in, find_moe_blocks
from moe_hf.finetuning.peft_files import WRITTEN_VERSION, layout_of, sizes


ALL_LINEAR = "all-linear"


def examine_adapter(report: Report, folder: Path, base: Opened | None) -> None:
    """Examine an adapter alone, and beside the base that it is for."""
    try:
        adapter = read_adapter(folder)
    except MoEError as error:
        report.add(ERROR, "unreadable", str(error))
        return
    report.examined |= {"adapted modules": len(adapter.halves), "other tensors": len(adapter.others)}
    _look_at_halves(report, adapter)
    _look_at_effect(report, adapter, base)
    if adapter.is_peft:
        _look_at_ranks(report, adapter)
        _look_at_packing(report, adapter)
        _look_at_targets(report, adapter, base)
    if base is not None and base.model is not None:
        _look_at_fit(report, adapter, base.model)
        _look_at_base(report, adapter, base, folder)
    _look_at_reach(report, adapter)


def _look_at_halves(report: Report, adapter: AdapterFile) -> None:
    alone = [name for name, halves in adapter.halves.items() if len(halves) < 2]
    if alone:
        report.add_by_name(
            ERROR,
            "adapter-incomplete",
            alone,
            f"Of {listed(alone)} the file has only one of A and B: loaders draw the other one, or leave both out. Save the adapter again.",
        )
    tensors = {f"{name}.{half}": t for name, halves in adapter.halves.items() for half, t in halves.items()}
    bad = [name for name, tensor in (tensors | adapter.others).items() if not _is_finite(tensor)]
    if bad:
        report.add_by_name(
            ERROR,
            "not-finite",
            bad,
            f"NaN or infinity in {listed(bad)}: the model computes nothing of use with this adapter. Take an earlier checkpoint.",
        )
    scale = adapter.config.get("lora_alpha", adapter.config.get("alpha"))
    if scale == 0 and adapter.halves:
        report.add(WARNING, "adapter-zero", "alpha is 0: the adapter has no effect, whatever it has learnt.", figure=0)


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


def _look_at_effect(report: Report, adapter: AdapterFile, base: Opened | None) -> None:
    complete = {name: halves for name, halves in adapter.halves.items() if len(halves) == 2}
    zero = [name for name, halves in complete.items() if not halves["A"].any() or not halves["B"].any()]
    if complete and len(zero) == len(complete) and not adapter.others:
        report.add(
            WARNING,
            "adapter-zero",
            "A or B is zero in every module: the adapter has no effect. It was saved before it trained, or its gradients did not "
            "arrive.",
            figure=len(zero),
        )
        return
    if zero:
        report.add_by_name(
            NOTE,
            "adapter-zero",
            zero,
            f"{listed(zero)} have no effect: A or B is zero.",
        )
    if not adapter.is_of_stacks:
        return
    idle: dict[int, list[int]] = {}
    counts = {} if base is None else {block.layer: block.num_experts for block in base.blocks}
    for name, halves in complete.items():
        layer = (layer_numbers([name]) or [0])[0]
        if ".experts" in name and name not in zero and (experts := _idle_experts(adapter, halves, counts.get(layer))):
            idle.setdefault(layer, []).extend(experts)
    if idle:
        report.add_by_layer(
            NOTE,
            "adapter-zero",
            idle,
            "The adapter has no effect on these experts: they got no token, or were not chosen.",
        )


def _idle_experts(adapter: AdapterFile, halves: dict[str, torch.Tensor], count: int | None) -> list[int]:
    first, second = halves["A"], halves["B"]
    if not adapter.is_peft:
        ids = next((ids for name, ids in (adapter.facts.get("experts") or {}).items()), None)
        rows = [row for row in range(len(second)) if not second[row].any()]
        return [ids[row] for row in rows] if isinstance(ids, list) and len(ids) == len(second) else rows
    rank = adapter.config.get("r")
    if not isinstance(rank, int) or rank < 1 or first.ndim != 2 or len(first) % rank:
        return []
    experts = len(first) // rank
    if count is not None and experts != count:
        return []
    # A holds the rows of an expert together; of B either packing shows an expert that is zero in both.
    return [e for e in range(experts) if not first[e * rank : (e + 1) * rank].any()]


def _look_at_ranks(report: Report, adapter: AdapterFile) -> None:
    rank = adapter.config.get("r")
    pattern = adapter.config.get("rank_pattern") or {}
    wrong = {}
    for name, halves in adapter.halves.items():
        if len(halves) < 2 or any(half.ndim != 2 for half in halves.values()):
            continue
        first, second = halves["A"].shape[0], halves["B"].shape[1]
        of_stack = name.split(".")[-1] in ("experts", "base_layer")
        expected = next((r for key, r in pattern.items() if name.endswith(key) or re.search(key, name)), rank)
        fits = isinstance(expected, int) and expected > 0 and (first == expected or of_stack and first % expected == 0)
        if first != second or not fits:
            wrong[name] = first, second
    if wrong:
        name, (first, second) = next(iter(wrong.items()))
        report.add(
            ERROR,
            "adapter-rank",
            f"adapter_config.json says r={rank}, and {name} has {first} rows in A and {second} columns in B: the scale alpha / r is "
            "another one than in training, or the adapter does not load. Take over the configuration that it was trained with.",
            layers=layer_numbers(wrong),
            figure=first,
        )


def _look_at_packing(report: Report, adapter: AdapterFile) -> None:
    if not adapter.is_of_stacks:
        return
    try:
        layout_of(adapter.config, adapter.facts.get("lora_B_layout"), None)
    except MoEError as error:
        report.add(
            WARNING,
            "adapter-packing",
            f"{error} Read the other way, every expert gets columns of others.",
            part="adapter_config.json",
        )


def _look_at_targets(report: Report, adapter: AdapterFile, base: Opened | None) -> None:
    modules = {adapter.module(name) for name in adapter.halves}
    targets, parameters = adapter.config.get("target_modules"), adapter.config.get("target_parameters") or []
    targets = [targets] if targets == ALL_LINEAR else targets
    if not isinstance(targets, list):
        return
    reaches_experts = any(".experts" in module for module in modules)
    is_moe = base is None or bool(base.blocks)
    has_experts = base is not None and bool(base.blocks)
    if ALL_LINEAR in targets and not reaches_experts and has_experts:
        report.add(
            WARNING,
            "adapter-experts-not-reached",
            "It was asked for all linear layers, and reaches no expert: stacked experts are parameters and no nn.Linear. Train them with "
            "moe_hf.add_expert_lora, or with target_parameters.",
        )
    lacking = []
    for target in targets:
        names = _named_in_base(base, str(target), adapter.config)
        if target == ALL_LINEAR or (names is not None and names and names <= modules):
            continue
        if names is None or not names:
            there = any(module == target or module.endswith(f".{target}") for module in modules)
            lacking += [] if there else [str(target)]
        else:
            lacking += sorted(names - modules)
    lacking += [str(p) for p in parameters if not _has_parameter(adapter, str(p))]
    if lacking and is_moe:
        report.add_by_name(
            WARNING,
            "adapter-not-reached",
            lacking,
            f"adapter_config.json names {listed(lacking)}, and the file has no tensors for them: they did not train, or were not saved. "
            "Projections of stacked experts are no modules; name them in target_parameters.",
        )


def _named_in_base(base: Opened | None, target: str, config: dict[str, Any]) -> set[str] | None:
    """The linear modules of the base that a target names; None without a base."""
    if base is None or base.model is None:
        return None
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    excluded = config.get("exclude_modules") or []
    names = set()
    for name, module in base.model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or not (name == target or name.endswith(f".{target}")):
            continue
        number = layer_numbers([name])
        if layers and number and number[0] not in layers:
            continue
        if isinstance(excluded, list) and any(name.endswith(str(one)) for one in excluded):
            continue
        names.add(name)
    return names


def _has_parameter(adapter: AdapterFile, parameter: str) -> bool:
    """Whether the file has a part for a stacked parameter; several of one module are nested in its order."""
    owner, _, _ = parameter.rpartition(".")
    wanted = [str(p) for p in adapter.config.get("target_parameters") or [] if str(p).rpartition(".")[0] == owner]
    depths = {name.count(".base_layer") for name in adapter.halves if adapter.module(name).endswith(owner)}
    return len(depths) >= len(wanted)


def _look_at_fit(report: Report, adapter: AdapterFile, model: nn.Module) -> None:
    modules = dict(model.named_modules())
    unknown, misfit = [], {}
    blocks = {f"{name}.experts": inner_experts(block) for name, block in find_moe_blocks(model).items()}
    for name, halves in adapter.halves.items():
        module = adapter.module(name)
        owner = module.rpartition(".")[0] if not adapter.is_peft else module
        if owner not in modules:
            unknown.append(name)
            continue
        if len(halves) < 2 or any(half.ndim < 2 for half in halves.values()):
            continue
        inputs, outputs = halves["A"].shape[-1], halves["B"].shape[-1 if not adapter.is_peft else 0]
        if owner in blocks:
            fits = _fits_stack(blocks[owner], halves, inputs, outputs)
        else:
            weight = getattr(modules[owner], "weight", None)
            fits = not isinstance(weight, torch.Tensor) or weight.ndim != 2 or {inputs, outputs} <= {*weight.shape}
            fits &= not isinstance(modules[owner], nn.Linear) or (outputs, inputs) == tuple(weight.shape)
        if not fits:
            misfit[name] = outputs, inputs
    if unknown:
        experts = sorted({int(m[1]) for m in (re.search(r"experts\.(\d+)\.", n) for n in unknown) if m})
        report.add_by_name(
            ERROR,
            "adapter-unknown",
            unknown,
            f"{type(model).__name__} has no module {listed(unknown)}: PEFT leaves these out with a warning. The adapter is of another "
            "model, or of a version of transformers that had experts one by one.",
            experts=experts,
        )
    if misfit:
        name, (outputs, inputs) = next(iter(misfit.items()))
        report.add_by_name(
            ERROR,
            "adapter-shape",
            misfit,
            f"{listed(misfit)} do not fit the base: {name} maps {inputs} to {outputs}. The adapter is of another model, or its halves are "
            "exchanged.",
        )


def _fits_stack(experts: nn.Module, halves: dict[str, torch.Tensor], inputs: int, outputs: int) -> bool:
    count = experts_in(experts)
    names = [name for name, parameter in experts.named_parameters(recurse=False) if parameter.ndim == 3]
    # Up to PEFT 0.19.0 the sides were exchanged.
    shapes = [sizes(experts, name) for name in names]
    right = (outputs, inputs) in shapes or (inputs, outputs) in shapes
    return right and (halves["A"].ndim == 3 or len(halves["A"]) % count == 0)


def _look_at_base(report: Report, adapter: AdapterFile, base: Opened, folder: Path) -> None:
    record = adapter.facts.get("base")
    if not record:
        return
    if base.folder is not None:
        report.add(
            NOTE,
            "not-examined",
            "The adapter has a fingerprint of its base, which is compared with a model in memory: give base=model for that.",
        )
        return
    try:
        check_base(base.model, record, folder)
    except MoEError as error:
        report.add(ERROR, "adapter-other-base", str(error))


def _look_at_reach(report: Report, adapter: AdapterFile) -> None:
    kinds = Counter(_kind(adapter.module(name)) for name in adapter.halves)
    text = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    report.add_by_name(
        NOTE,
        "adapter-reach",
        adapter.halves,
        f"It reaches {text or 'nothing'}; layers are named where they are not all.",
    )
    if not adapter.is_peft:
        message = "moe_hf.load_expert_lora reads it; PEFT does not. save_expert_lora(model, folder, file_format='peft') writes it for PEFT."
    elif adapter.is_of_stacks:
        message = (
            f"It has parts for stacked experts (target_parameters): moe_hf and PEFT from {WRITTEN_VERSION} load them in this order. Readers "
            "that know adapters of nn.Linear alone drop them, or refuse the file: compare the logits where you serve it."
        )
    elif any(re.search(r"experts\.\d+\.", name) for name in adapter.halves):
        message = "It has parts for experts one by one: it loads where experts are modules, as before transformers 5, and nowhere else."
    else:
        return
    report.add(NOTE, "adapter-readers", message)


def _kind(module: str) -> str:
    if ".experts" in module:
        return "experts' stacks" if not re.search(r"experts\.\d+", module) else "experts' projections"
    if "shared" in module:
        return "projections of shared experts"
    if is_of_experts(module) or module.endswith(".gate"):
        return "routers"
    return "projections of attention" if "attn" in module or "attention" in module else "other modules"
