"""A MoE beside its dense parent: the same recipe trains both, and the metrics stand next to each other."""

import copy
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.trainer.arguments import ModelArguments, MoETrainingArguments
from moe_hf.trainer.layouts import SIZES, check_config
from moe_hf.trainer.parameter_groups import PartRates


# What a dense model trains where a MoE trains a part that it has not.
DENSE_SCOPES = {"moe": "ffn", "experts": "ffn", "shared": "ffn", "selected": "ffn"}
COMPARISON_FILE, CONTROL_FOLDER = "comparison.json", "control"

Load = Callable[[ModelArguments, MoETrainingArguments], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
TrainOne = Callable[[PreTrainedModel, PreTrainedTokenizerBase, MoETrainingArguments], dict[str, float]]


def train_beside_control(
    model_args: ModelArguments, training_args: MoETrainingArguments, load: Load, train_one: TrainOne
) -> None:
    """Run `train_one` on the model, and, where `model_args.control` names a dense one, on that too.

    The control trains the scope that corresponds (`DENSE_SCOPES`), on the same rows in the same order, below
    `output_dir/control`: at the rates of the experts where it trains the MLPs in their place, and in the same layout
    without expert parallelism. Both metrics are printed and written to `output_dir/comparison.json`.

    Args:
        load: loads the model and tokenizer that arguments name.
        train_one: trains and evaluates one model with the given arguments and returns its metrics.

    Raises:
        MoEError: a control that is not known, a scope that a dense model has not, or a layout that it cannot have; before
            anything is trained.
    """
    model, tokenizer = load(model_args, training_args)
    control_args = _control_arguments(model_args, model)
    dense_args = None if control_args is None else _dense_arguments(training_args)
    if control_args is not None:
        _check_control(control_args, dense_args)
    metrics = train_one(model, tokenizer, training_args)
    if control_args is None:
        return
    del model
    dense, tokenizer = load(control_args, dense_args)
    dense_metrics = train_one(dense, tokenizer, dense_args)
    if training_args.process_index == 0:
        print_comparison({"this model": metrics, "control": dense_metrics}, Path(training_args.output_dir))


def _check_control(model_args: ModelArguments, args: MoETrainingArguments) -> None:
    """Find what is wrong with the control before its MoE is trained."""
    common = {"revision": model_args.revision, "trust_remote_code": model_args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(model_args.model, **common)
    except (OSError, ValueError) as error:
        raise MoEError(f"Could not load the control {model_args.model!r}: {error}") from error
    check_config(config, args.layout())


def print_comparison(columns: dict[str, dict[str, float]], output_dir: Path) -> None:
    """Print the metrics that all `columns` have side by side, and write them to `output_dir/comparison.json`."""
    names = [name for name in next(iter(columns.values())) if all(_is_compared(name, c) for c in columns.values())]
    width = max(map(len, names), default=0)
    print("  ".join([" " * width, *(f"{title:>17}" for title in columns)]))
    for name in names:
        print("  ".join([f"{name:{width}}", *(f"{metrics[name]:17.4f}" for metrics in columns.values())]))
    record = {title: {name: metrics[name] for name in names} for title, metrics in columns.items()}
    (output_dir / COMPARISON_FILE).write_text(json.dumps(record, indent=2) + "\n")


def _is_compared(name: str, metrics: dict[str, float]) -> bool:
    is_cost = name.endswith(("runtime", "preparation_time", "per_second", "epoch", "tokens"))
    return isinstance(metrics.get(name), int | float) and not is_cost


def _control_arguments(model_args: ModelArguments, model: PreTrainedModel) -> ModelArguments | None:
    name = model_args.control
    if name is None:
        return None
    if name == "parent":
        config = model.config
        origin = (config.upcycling or {}).get("source") if isinstance(config, MoEConfig) else None
        name = model_args.model if model_args.upcycle else origin
        if name is None:
            raise MoEError(
                f"{model_args.model!r} does not say which dense model it was made from; name it in control."
            )
    result = copy.copy(model_args)
    result.model, result.upcycle, result.control, result.experts_implementation = name, None, None, None
    return result


def _dense_arguments(training_args: MoETrainingArguments) -> MoETrainingArguments:
    """The arguments of the control: what is about routers and experts alone has no place in them."""
    scope = training_args.scope
    if scope in ("router", "expert_lora"):
        part = "router to train" if scope == "router" else "experts that could have adapters"
        raise MoEError(f"A dense model has no {part}: leave control out, or choose another scope.")
    result = copy.copy(training_args)
    result.scope = DENSE_SCOPES.get(scope, scope)
    result.output_dir = str(Path(training_args.output_dir) / CONTROL_FOLDER)
    result.push_to_hub = False
    if result.scope != scope:
        for name in ("learning_rate", "weight_decay"):
            of_experts = getattr(training_args, f"expert_{name}")
            setattr(result, name, getattr(result, name) if of_experts is None else of_experts)
    for name in ("expert_selection", *(f.name for f in fields(PartRates))):
        setattr(result, name, None)
    result.skip_idle_experts = False
    layout = training_args.layout()
    if layout is not None:
        for name in SIZES:
            setattr(result, name, getattr(layout, name))
        result.ep_size = None
        others = training_args.distributed_config or {}
        result.distributed_config = {k: v for k, v in others.items() if k not in SIZES and not k.startswith("ep_")}
    return result
