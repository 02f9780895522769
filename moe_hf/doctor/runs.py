"""The output folder of a training run: its logs over time, its checkpoints, and whether they hold what trained.

Letters: E experts.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from moe_hf.doctor.checkpoints import examine_checkpoint
from moe_hf.doctor.findings import ERROR, NOTE, WARNING, Report
from moe_hf.doctor.names import listed
from moe_hf.doctor.opening import Opened, open_folder
from moe_hf.errors import MoEError
from moe_hf.finetuning.trained_files import holds_trained
from moe_hf.saving import MANIFEST_NAME, verify_manifest
from moe_hf.trainer.checkpoints import list_checkpoints
from moe_hf.trainer.moe_trainer import FINAL_FOLDER
from moe_hf.trainer.optimizer_states import NAMES
from moe_hf.trainer.telemetry import PREFIX


STATE_NAME = "trainer_state.json"
WINDOW = 8
# A jump in nats/token that noise of batches does not make, and how many times the usual step between logs it must be.
LEAST_JUMP, TIMES_USUAL = 0.5, 6.0
# How near to the first loss a jump must come to be a start anew.
BACK_TO_START = 0.8
BALANCE_KEYS = ("load_balancing_loss", "aux_loss", "router_aux_loss", "router_losses")


def examine_run(report: Report, folder: Path, base: Opened | None) -> None:
    """Examine a run: its checkpoints, newest first, its logs, and its last weights beside the base or its first ones."""
    checkpoints = list_checkpoints(folder)
    whole = [path for path in checkpoints if _is_whole(report, path)]
    final = [folder / FINAL_FOLDER] if (folder / FINAL_FOLDER / "config.json").is_file() else []
    final += [folder] if (folder / "config.json").is_file() else []
    history = _history(report, [folder, *checkpoints])
    steps = sorted(int(path.name.rsplit("-", 1)[-1]) for path in checkpoints)
    report.examined |= {"checkpoints": len(checkpoints), "logs": len(history)}
    look_at_history(report, history, steps)
    weights = [path for path in [*final, *whole] if any(path.glob("*.safetensors"))]
    for path in whole:
        _look_at_what_trained(report, path)
    if weights:
        _look_at_weights(report, weights, base, history)
    elif any(map(holds_trained, whole)):
        report.add(NOTE, "not-examined", "The checkpoints hold what trained alone: examine one of them with its base.")
    else:
        report.add(
            ERROR, "trained-not-saved", "No checkpoint of the run holds weights: what it trained is in no file."
        )


def _is_whole(report: Report, path: Path) -> bool:
    if not (path / MANIFEST_NAME).is_file():
        return True
    try:
        verify_manifest(path)
    except MoEError as error:
        report.add(ERROR, "checkpoint-damaged", f"{error} Resume from an earlier one.", part=path.name)
        return False
    return True


def _history(report: Report, folders: Sequence[Path]) -> list[dict[str, Any]]:
    for folder in folders:
        file = folder / STATE_NAME
        if not file.is_file():
            continue
        try:
            history = json.loads(file.read_text(encoding="utf-8")).get("log_history", [])
            return [entry for entry in history if isinstance(entry, dict)]
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            report.add(ERROR, "unreadable", f"{file} cannot be read: {error}.", part=file.name)
    return []


def _numbers(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    found = [(entry.get("step"), entry.get(key)) for entry in history]
    return [(int(s), float(v)) for s, v in found if isinstance(s, int) and isinstance(v, int | float)]


def look_at_history(report: Report, history: Sequence[Mapping[str, Any]], saved_at: Sequence[int] = ()) -> None:
    """Add what the logs of a run tell.

    Args:
        history: `log_history` of `trainer_state.json`.
        saved_at: the steps of the checkpoints, after which a run may have gone on from others.
    """
    losses, norms = _numbers(history, "loss"), _numbers(history, "grad_norm")
    broken = [s for s, value in losses + norms if not math.isfinite(value)]
    hidden = {s for s, v in losses if v == 0} & {s for s, v in norms if not math.isfinite(v) or v == 0}
    if broken or hidden:
        first = min([*broken, *hidden])
        report.add(
            ERROR,
            "run-not-finite",
            f"The loss or its gradient was NaN, infinite, or hidden as 0 from step {first} on: the weights behind it are of no use. Resume "
            "from a checkpoint before it, with a smaller rate.",
            part=f"step {first}",
            figure=first,
        )
    elif len(norms) > 1 and all(value == 0 for _, value in norms):
        report.add(
            ERROR,
            "no-gradient-norm",
            "The gradient was 0 in every log: nothing trained. Look at what requires gradients.",
        )
    finite = [(s, v) for s, v in losses if math.isfinite(v)]
    _look_at_jumps(report, finite, saved_at)
    _look_at_balance(report, history)
    dead = _numbers(history, f"{PREFIX}/dead_experts")
    third = max(1, len(dead) // 3)
    if len(dead) > 2:
        before, after = (sum(v for _, v in part) / len(part) for part in (dead[:third], dead[-third:]))
        if after >= before + 1 and after >= 1.5 * before:
            report.add(
                WARNING,
                "experts-died",
                f"Experts without tokens went from {before:.1f} to {after:.1f} over the run, all layers together: the routers collapse. Raise "
                "router_aux_loss_coef, or lower the routers' rate.",
                figure=after,
            )


def _look_at_jumps(report: Report, losses: Sequence[tuple[int, float]], saved_at: Sequence[int]) -> None:
    usual = median([b[1] - a[1] for a, b in zip(losses, losses[1:], strict=False) if b[1] > a[1]] or [0.0])
    highest = [max(0.0, b[1] - a[1]) for a, b in zip(losses, losses[1:], strict=False)]
    # One jump alone is no noise.
    usual = 0.0 if sum(rise > 0 for rise in highest) == 1 else usual
    steps = [step for step, _ in losses]
    for index in range(2, len(losses)):
        before = median([v for _, v in losses[max(0, index - WINDOW) : index]])
        step, value = losses[index]
        jump = value - max(before, losses[index - 1][1])
        if jump < max(LEAST_JUMP, TIMES_USUAL * usual):
            continue
        fallen = losses[0][1] - losses[index - 1][1]
        at_save = any(steps[index - 1] <= saved < step for saved in saved_at)
        if at_save and fallen > LEAST_JUMP and value >= losses[index - 1][1] + BACK_TO_START * fallen:
            report.add(
                ERROR,
                "resumed-elsewhere",
                f"After the checkpoint the loss went from {losses[index - 1][1]:.2f} back to {value:.2f}, where the run began "
                f"({losses[0][1]:.2f}): it went on from other weights than it had saved. Resume with MoETrainer, which loads every weight "
                "or refuses.",
                part=f"step {step}",
                figure=jump,
            )
        else:
            report.add(
                WARNING,
                "loss-spike",
                f"The loss jumped from {losses[index - 1][1]:.2f} to {value:.2f}: a bad batch, or a rate that is too high.",
                part=f"step {step}",
                figure=jump,
            )
        return


def _look_at_balance(report: Report, history: Sequence[Mapping[str, Any]]) -> None:
    for key in BALANCE_KEYS:
        values = [value for _, value in _numbers(history, key)]
        if len(values) > 2 and len(set(values)) == 1:
            report.add(
                WARNING,
                "balance-loss-silent",
                f"{key} is {values[0]:.4g} in all {len(values)} logs: it is computed from something that does not move, and balances "
                "nothing.",
                figure=values[0],
            )


def _look_at_what_trained(report: Report, path: Path) -> None:
    """What the optimizer held, beside what the weights of a checkpoint hold."""
    file = path / NAMES
    if not file.is_file() or holds_trained(path):
        return
    try:
        opened = open_folder(path, path.name)
    except (MoEError, OSError) as error:
        report.add(NOTE, "not-examined", f"What trained is not compared with what was saved: {error}", part=path.name)
        return
    trained = _trained_names(path)
    lost = sorted(trained.intersection(opened.layout.missing))
    lost += sorted(name for name in trained - opened.layout.model.state_dict().keys() if "lora_" in name)
    opened.close()
    if lost:
        report.add(
            ERROR,
            "trained-not-saved",
            f"{listed(lost)} trained, and the checkpoint has no tensors for them. Save with MoETrainer, or with moe_hf.save_trained.",
            part=path.name,
            figure=len(lost),
        )


def _look_at_weights(report: Report, weights: list[Path], base: Opened | None, history: Sequence[Mapping]) -> None:
    newest, oldest = weights[0], weights[-1]
    beside = base
    try:
        opened = open_folder(newest, newest.name)
    except (MoEError, OSError) as error:
        report.add(ERROR, "unreadable", str(error), part=newest.name)
        return
    try:
        if beside is None and oldest != newest:
            beside = open_folder(oldest, oldest.name)
        examine_checkpoint(report, opened, beside)
        if beside is not None:
            holder = next((path for path in [newest, *weights] if (path / NAMES).is_file()), newest)
            _look_at_frozen_and_trained(report, opened, beside, holder)
        _look_at_own_balance(report, opened, history)
    except (MoEError, OSError) as error:
        report.add(ERROR, "unreadable", str(error), part=oldest.name)
    finally:
        opened.close()
        if beside is not None and beside is not base:
            beside.close()


def _look_at_frozen_and_trained(report: Report, opened: Opened, base: Opened, folder: Path) -> None:
    """What the optimizer held, beside what moved: routers that did and should not, experts that should and did not."""
    trained = _trained_names(folder)
    if not trained:
        return
    others = {block.layer: block for block in base.blocks}
    moved, still = [], []
    for block in opened.blocks:
        other = others.get(block.layer)
        if other is None:
            continue
        own = [name for name in trained if name.startswith(f"{block.name}.")]
        trains_router = any(".experts." not in name and "shared" not in name for name in own)
        pairs = [(block.router, other.router), (block.bias, other.bias)]
        if not trains_router and any(_differ(opened, base, *pair) for pair in pairs if all(pair)):
            moved.append(block.layer)
        trains_experts = any(".experts." in name for name in own)
        pieces = {(p.stored, q.stored) for key, p in block.pieces.items() if (q := other.pieces.get(key)) is not None}
        if trains_experts and pieces and not any(_differ(opened, base, *pair) for pair in pieces):
            still.append(block.layer)
    if moved:
        report.add(
            WARNING,
            "router-moved",
            "The optimizer did not hold these routers, and their weights or correction biases are not the base's: something else moved them, "
            "such as the counts of a balance by bias.",
            layers=moved,
            part="router",
        )
    if still:
        report.add(
            WARNING,
            "nothing-changed",
            "The optimizer held the experts of these layers, and they are bitwise the base's: their gradients did not arrive, or what was "
            "saved is not what trained.",
            layers=still,
        )


def _differ(opened: Opened, base: Opened, mine: str, other: str) -> bool:
    one, two = opened.tensors.read(mine), base.tensors.read(other)
    return one.shape != two.shape or one.dtype != two.dtype or not bool((one == two).all())


def _trained_names(folder: Path) -> set[str]:
    """The parameters that the optimizer of a checkpoint held; empty where nobody wrote them down."""
    try:
        content = json.loads((folder / NAMES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    return {str(name) for group in content if isinstance(group, list) for name in group}


def _look_at_own_balance(report: Report, opened: Opened, history: Sequence[Mapping]) -> None:
    """A native MoE under a plain Trainer computes its balance loss only where its router logits are asked for."""
    text = opened.config.get_text_config()
    asked = getattr(text, "router_aux_loss_coef", 0) or 0
    logged = any(key in entry or any(k.startswith(PREFIX) for k in entry) for entry in history for key in BALANCE_KEYS)
    if not history or not asked or logged or opened.config.model_type == "moe_hf":
        return
    if getattr(text, "output_router_logits", None) is False:
        report.add(
            WARNING,
            "balance-loss-silent",
            f"router_aux_loss_coef is {asked}, and output_router_logits is false: this family then computes no balance loss, and no log of "
            "the run has one. Train with MoETrainer or moe_hf.add_router_losses, or set output_router_logits.",
            figure=asked,
        )
