"""Expert deltas: a file of `save_expert_deltas`, alone and beside its base."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moe_hf.doctor.findings import ERROR, NOTE, WARNING, Report
from moe_hf.doctor.names import listed
from moe_hf.doctor.opening import Opened
from moe_hf.finetuning.expert_deltas import DELTAS_NAME, FORMAT, frozen_fingerprint
from moe_hf.finetuning.router_watch import layer_label


def examine_deltas(report: Report, path: Path, base: Opened | None) -> None:
    """Examine a file of deltas: whole and finite, of this base, and different from it."""
    file = path / DELTAS_NAME if path.is_dir() else path
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            facts = json.loads(metadata.get("facts", "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            experts = {str(name): [int(e) for e in ids] for name, ids in facts["experts"].items()}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        report.add(ERROR, "unreadable", f"{file} cannot be read as expert deltas: {error!r}.")
        return
    if metadata.get("format") != FORMAT:
        report.add(ERROR, "unreadable", f"{file} is no file of expert deltas; save_expert_deltas makes one.")
        return
    report.examined["experts"] = sum(map(len, experts.values()))
    for block, ids in experts.items():
        label = layer_label(block)
        layer = [int(label)] if label.isdigit() else []
        own = {name: t for name, t in tensors.items() if name.startswith(f"{block}.experts.")}
        bad = [
            ids[row] for row in range(len(ids)) if any(not torch.isfinite(t[row].float()).all() for t in own.values())
        ]
        if bad:
            report.add(ERROR, "not-finite", "NaN or infinity in these experts' deltas.", layers=layer, experts=bad)
        short = [name for name, tensor in own.items() if len(tensor) != len(ids)]
        if short or not own:
            report.add(
                ERROR,
                "experts-missing",
                f"The file names {len(ids)} experts of this layer, and {listed(short) or 'no tensor'} has as many: it is damaged.",
                layers=layer,
                experts=ids,
            )
    if base is None or base.folder is not None:
        report.add(
            NOTE,
            "not-examined",
            "The file has a fingerprint of its base, which is compared with a model in memory: give base=model for that.",
        )
        return
    others = {name for name in tensors if not any(name.startswith(f"{block}.experts.") for block in experts)}
    fingerprint = frozen_fingerprint(base.model, {b: tuple(ids) for b, ids in experts.items()}, others)
    if fingerprint != facts.get("base_fingerprint"):
        report.add(
            ERROR,
            "adapter-other-base",
            f"The deltas were trained on another model than {base.name}: on {facts.get('base_model') or 'one without a name'}. Load that "
            "one, in the dtype that it was trained in or a wider one.",
        )
        return
    _look_at_effect(report, base, experts, tensors)


def _look_at_effect(
    report: Report, base: Opened, experts: dict[str, list[int]], tensors: dict[str, torch.Tensor]
) -> None:
    """Add experts whose deltas are what the base has."""
    state = base.model.state_dict()
    same: dict[int, list[int]] = {}
    for block, ids in experts.items():
        names = [name for name in tensors if name.startswith(f"{block}.experts.") and name in state]
        still = [
            expert
            for row, expert in enumerate(ids)
            if names and all(torch.equal(tensors[n][row].float(), state[n][expert].float()) for n in names)
        ]
        label = layer_label(block)
        if still and label.isdigit():
            same[int(label)] = still
    total = sum(map(len, experts.values()))
    if same:
        severity = WARNING if sum(map(len, same.values())) == total else NOTE
        report.add_by_layer(
            severity,
            "nothing-changed",
            same,
            "These experts' deltas are what the base has: training left no trace in them.",
        )
