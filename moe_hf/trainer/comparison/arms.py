"""The two models that are compared: which each is, and the arguments of one run of it."""

import copy
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from transformers import AutoConfig

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.trainer.arguments import ModelArguments, MoETrainingArguments
from moe_hf.trainer.fair_comparison import rate_grid
from moe_hf.trainer.layouts import SIZES, check_config
from moe_hf.trainer.parameter_groups import PartRates


OURS, CONTROL = "this model", "control"
CONTROL_FOLDER = "control"
DEFAULT_SWEEP = 3
# Scopes of parts that a dense model has not, by what its MLPs in the same layers stand for.
DENSE_SCOPES = {"shared": "experts", "selected": "experts"}
EXPERT_SCOPES = ("moe", "experts")


@dataclass
class ComparisonArguments:
    """Which dense model is trained beside the model, and how fairly."""

    control: str | None = field(
        default=None,
        metadata={
            "help": "A dense model that is trained beside it, for comparison: a folder, a Hub id, or `parent` for the one "
            "that the MoE was made from."
        },
    )
    control_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the control. Unset: a sweep finds it."}
    )
    sweep: int | None = field(
        default=None,
        metadata={
            "help": "Learning rates that are tried for each of the two, around the given ones; 0 tries none. Unset: 3, or "
            "0 with control_learning_rate."
        },
    )
    comparison_seeds: int = field(
        default=1, metadata={"help": "Seeds that both are trained with; 2 or more give an interval."}
    )

    def __post_init__(self) -> None:
        for name in ("control_learning_rate", "sweep", "comparison_seeds"):
            if self.control is None and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise MoEError(f"{name} is about a comparison: name the dense model in control too, or leave it out.")
        if self.sweep is not None and (self.sweep < 0 or self.sweep == 1):
            raise MoEError(f"sweep is {self.sweep}; it must be 2 or more rates to choose from, or 0 for none.")
        if self.comparison_seeds < 1:
            raise MoEError(f"comparison_seeds is {self.comparison_seeds}; it must be at least 1.")
        rate = self.control_learning_rate
        if rate is not None and not 0 <= rate < math.inf:
            raise MoEError(f"control_learning_rate is {rate}; it must be at least 0 and finite.")

    def rates_per_arm(self) -> int:
        """How many rates the sweep tries first; 0 for no sweep."""
        if self.sweep is not None:
            return self.sweep
        return DEFAULT_SWEEP if self.control_learning_rate is None else 0

    def chooses(self, args: MoETrainingArguments) -> bool:
        """Whether something is chosen by a loss on held-out text, which results may then not be reported on."""
        return self.control is not None and bool(self.rates_per_arm() or args.load_best_model_at_end)


@dataclass(frozen=True)
class Arm:
    """One of the two models: what it is loaded from and trained with, at the rate that it is given, below `folder`."""

    name: str
    model_args: ModelArguments
    training_args: MoETrainingArguments
    # Below the folder of the comparison.
    folder: str = ""

    def rates(self, count: int) -> list[float]:
        """The rates that a sweep tries first."""
        return rate_grid(self.training_args.learning_rate, count)

    def run(
        self, output_dir: Path, rate: float, seed: int = 0, *, share: float = 1.0
    ) -> tuple[ModelArguments, MoETrainingArguments]:
        """The arguments of one run.

        Args:
            rate (`float`): learning rate; those that routers and experts have of their own change by the same factor.
            seed (`int`): which one, from 0: order of the text, dropout, noise of the router, new experts.
            share (`float`): of the steps, of the warm-up and of what the schedule counts.
        """
        model_args, args = copy.copy(self.model_args), copy.copy(self.training_args)
        args.output_dir = str(output_dir)
        args.seed += seed
        if args.data_seed is not None:
            args.data_seed += seed
        if model_args.upcycle is not None and seed:
            model_args.upcycle = model_args.upcycle | {"seed": model_args.upcycle.get("seed", 0) + seed}
        if rate != args.learning_rate:
            factor = rate / args.learning_rate
            for name in ("router_learning_rate", "expert_learning_rate"):
                if getattr(args, name) is not None:
                    setattr(args, name, getattr(args, name) * factor)
            args.learning_rate = rate
        # The record of the comparison says that what lies there is of the same run.
        args.resume_from_checkpoint = "auto"
        return model_args, args if share == 1 else _shortened(args, share)


def _shortened(args: MoETrainingArguments, share: float) -> MoETrainingArguments:
    args.push_to_hub = False
    if args.max_steps > 0:
        args.max_steps = math.ceil(args.max_steps * share)
    else:
        args.num_train_epochs *= share
    # Below 1 it is a share of the steps already.
    if args.warmup_steps >= 1:
        args.warmup_steps = max(1, round(args.warmup_steps * share))
    given = args.lr_scheduler_kwargs
    if isinstance(given, dict):
        args.lr_scheduler_kwargs = {
            name: max(1, round(value * share)) if name.endswith("_steps") and isinstance(value, int) else value
            for name, value in given.items()
        }
    return args


def our_arm(model_args: ModelArguments, training_args: MoETrainingArguments) -> Arm:
    """The arm of the model itself."""
    return Arm(OURS, model_args, training_args)


def control_arm(
    model_args: ModelArguments, comparison: ComparisonArguments, training_args: MoETrainingArguments
) -> Arm:
    """The arm of the control, which trains what corresponds, in the same layout without expert parallelism.

    Its MLPs stand for the experts of the same layers (`of_layers` says which), also where it gets its rate and its weight
    decay from the experts'.

    Raises:
        MoEError: a control that is not known or cannot be read, a scope that no dense model has, or a layout that it cannot have.
    """
    dense = _dense_arguments(training_args)
    if comparison.control_learning_rate is not None:
        dense.learning_rate = comparison.control_learning_rate
    name = _parent_of(model_args) if comparison.control == "parent" else comparison.control
    chosen = replace(model_args, model=name, upcycle=None, experts_implementation=None)
    config = _config_of(chosen)
    check_config(config, dense.layout())
    return Arm(CONTROL, chosen, dense, CONTROL_FOLDER)


def at_rate(arm: Arm, rate: float) -> Arm:
    """The arm with the rate that it starts from, which may be the default of its model's size."""
    args = copy.copy(arm.training_args)
    args.learning_rate = rate
    return replace(arm, training_args=args)


def of_layers(arm: Arm, layers: list[int]) -> Arm:
    """The control of a MoE that has experts in `layers`, where its scope asks for them."""
    args = copy.copy(arm.training_args)
    args.mlp_layers = list(layers) if layers and args.scope in (*EXPERT_SCOPES, "non_moe") else None
    return replace(arm, training_args=args)


def _config_of(model_args: ModelArguments):
    common = {"revision": model_args.revision, "trust_remote_code": model_args.trust_remote_code}
    if model_args.model is None:
        raise MoEError("No model: set `model` in the recipe, or --model, to a folder or a Hub id.")
    try:
        return AutoConfig.from_pretrained(model_args.model, **common)
    except (OSError, ValueError) as error:
        raise MoEError(f"Could not load {model_args.model!r}: {error}") from error


def _parent_of(model_args: ModelArguments) -> str:
    config = _config_of(model_args)
    if model_args.upcycle is not None:
        return model_args.model
    name = (config.upcycling or {}).get("source") if isinstance(config, MoEConfig) else None
    if name is None:
        raise MoEError(f"{model_args.model!r} does not say which dense model it was made from; name it in control.")
    return name


def _dense_arguments(training_args: MoETrainingArguments) -> MoETrainingArguments:
    """The arguments of the control: what is about routers and experts alone has no place in them."""
    scope = training_args.scope
    if scope in ("router", "expert_lora"):
        part = "router to train" if scope == "router" else "experts that could have adapters"
        raise MoEError(f"A dense model has no {part}: leave control out, or choose another scope.")
    result = copy.copy(training_args)
    result.scope = DENSE_SCOPES.get(scope, scope)
    result.push_to_hub = False
    if scope in (*EXPERT_SCOPES, *DENSE_SCOPES):
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
