"""Arguments of the training programs: dataclasses, a YAML recipe under `--config`, overrides on the command line."""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.distributed import DistributedConfig

from moe_hf.data import BUILTIN_CORPUS
from moe_hf.errors import MoEError
from moe_hf.resources import resource_path
from moe_hf.trainer.layouts import SIZES, choose_layout
from moe_hf.trainer.parameter_groups import PartRates


TELEMETRY = ("off", "brief", "detailed")


@dataclass
class MoETrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults that suit a MoE, and the scope that trains."""

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate. Unset: the one measured for the model's size and the scope, which is said."
        },
    )
    scope: str | None = field(
        default=None,
        metadata={
            "help": "What trains: moe, experts, selected, expert_lora, router, shared, non_moe, attention, ffn or all. "
            "Unset: the parameters that already require gradients."
        },
    )
    expert_selection: dict | str | None = field(
        default=None,
        metadata={
            "help": "For the scopes selected and expert_lora, which experts: a JSON file of `moe-hf select-experts`, or a map of layers to "
            "lists of ids."
        },
    )
    mlp_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Layers of a dense model whose MLPs `scope` takes for experts: those that have experts in a MoE "
            "which it is compared with."
        },
    )
    expert_lora_r: int = field(default=8, metadata={"help": "Rank of the adapters of the scope expert_lora."})
    expert_lora_alpha: float = field(default=16.0, metadata={"help": "Their scale times their rank."})
    expert_lora_dropout: float = field(default=0.0, metadata={"help": "Share of their inputs that is dropped."})
    fp32_masters: bool = field(
        default=True, metadata={"help": "Convert the parameters of `scope` to float32; the rest keeps its dtype."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={"help": "Coefficient of the load-balancing loss, in the model's own units. Unset: the model's own."},
    )
    router_z_loss_coef: float | None = field(
        default=None, metadata={"help": "Coefficient of the router z-loss. Unset: the model's own, or 0."}
    )
    balance_loss_scope: str | None = field(
        default=None,
        metadata={
            "help": "Over which tokens the load-balancing loss is taken: micro_batch, sequence or global_batch (all "
            "processes and micro-batches of a step). Unset: the model's own, or micro_batch."
        },
    )
    router_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the routers. Unset: that of the rest."}
    )
    expert_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the routed experts. Unset: that of the rest."}
    )
    router_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the routers. Unset: that of the rest."}
    )
    expert_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the routed experts. Unset: that of the rest."}
    )
    skip_idle_experts: bool = field(
        default=False,
        metadata={"help": "Experts that saw no token in a step are not moved by weight decay and momentum either."},
    )
    expert_dropout: float = field(
        default=0.0, metadata={"help": "Dropout inside the routed experts, in [0, 1), in this run only."}
    )
    routing_telemetry: str = field(
        default="brief",
        metadata={"help": "What is logged of the routers: off, brief (means, worst layer) or detailed (all)."},
    )
    # The filter reports a diverged run as loss 0.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and infinite losses from the log."}
    )
    # Fused experts always take part in the graph, starved ones with zero gradients.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Needed only where experts are separate modules."}
    )
    fsdp_size: int | None = field(
        default=None,
        metadata={"help": "Processes that share the weights by FSDP2; what the other sizes leave, when one is set."},
    )
    ep_size: int | None = field(
        default=None,
        metadata={"help": "Processes that share the experts; tokens travel to them (expert parallelism)."},
    )
    tp_size: int | None = field(
        default=None, metadata={"help": "Processes that share each matrix and the same rows (tensor parallelism)."}
    )
    dp_replicate_size: int | None = field(
        default=None, metadata={"help": "Copies of what fsdp_size shards, e.g. one per machine (HSDP)."}
    )
    distributed_config: dict | str | None = field(
        default=None,
        metadata={"help": "More fields of transformers' DistributedConfig, as a map or JSON, e.g. ep_implementation."},
    )
    async_save: bool = field(
        default=False,
        metadata={"help": "Write checkpoints beside training, from copies in CPU memory; the next one waits for it."},
    )
    batch_eval_metrics: bool = field(default=True, metadata={"help": "Metrics stream over evaluation batches."})
    hub_strategy: str = field(default="end", metadata={"help": "Only `end`: push when training has ended."})

    def __post_init__(self) -> None:
        if self.hub_strategy != "end":
            raise MoEError(
                f"hub_strategy={self.hub_strategy!r}: only 'end' carries the model's code. Set it to 'end'."
            )
        self.distributed_config = json_map("distributed_config", self.distributed_config)
        if self.routing_telemetry not in TELEMETRY:
            raise MoEError(f"routing_telemetry is {self.routing_telemetry!r}; it must be one of {list(TELEMETRY)}.")
        self.part_rates()
        if self.expert_selection is not None and self.scope not in ("selected", "expert_lora"):
            raise MoEError(f"expert_selection is for the scopes selected and expert_lora; scope is {self.scope!r}.")
        if self.mlp_layers is not None and self.scope in (None, "selected", "expert_lora"):
            raise MoEError(
                f"mlp_layers says what a scope takes for experts, not which of them; scope is {self.scope!r}."
            )
        super().__post_init__()
        if self.learning_rate is None and self.deepspeed and self.hf_deepspeed_config.get_value("optimizer"):
            raise MoEError(
                "learning_rate is unset, and DeepSpeed's configuration has an optimizer, which gets its rate before the model "
                "is known: set learning_rate."
            )

    def part_rates(self) -> PartRates:
        """The rates and decays that routers and experts have of their own."""
        return PartRates(**{f.name: getattr(self, f.name) for f in fields(PartRates)})

    def router_loss_arguments(self) -> dict[str, Any]:
        """What `RouterLosses` is given."""
        names = ("router_aux_loss_coef", "router_z_loss_coef", "balance_loss_scope")
        return {name: getattr(self, name) for name in names}

    def layout(self) -> DistributedConfig | None:
        """The layout that the sizes and `distributed_config` ask for; None for one process, or for DDP.

        Raises:
            MoEError: it does not fit the number of processes, or contradicts itself.
        """
        sizes = {name: getattr(self, name) for name in SIZES}
        return choose_layout(sizes, self.distributed_config, self.world_size)


@dataclass
class FinetuneArguments(MoETrainingArguments):
    """Training arguments whose scope is expert-only by default."""

    scope: str | None = field(
        default="moe",
        metadata={
            "help": "What trains: moe, experts, selected, expert_lora, router, shared, non_moe, attention, ffn or all."
        },
    )


@dataclass
class ModelArguments:
    """Which checkpoint is trained or evaluated."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of the checkpoint."})
    revision: str = field(default="main", metadata={"help": "Revision of a Hub checkpoint."})
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub id; the model's own when unset."})
    dtype: str = field(default="auto", metadata={"help": "dtype to load in: auto, float32 or bfloat16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    experts_implementation: str | None = field(default=None, metadata={"help": "eager, grouped_mm or batched_mm."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the checkpoint."})
    upcycle: dict | str | None = field(
        default=None,
        metadata={"help": "Turn `model`, a dense one, into a MoE first: arguments of moe_hf.upcycle, a map or JSON."},
    )

    def __post_init__(self) -> None:
        self.upcycle = json_map("upcycle", self.upcycle)


def json_map(name: str, value: dict | str | None) -> dict | None:
    """`value` as a map; on the command line it is JSON.

    Raises:
        MoEError: it is something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise MoEError(f"{name} is not JSON: {error}.") from error
    if value is not None and not isinstance(value, dict):
        raise MoEError(f"{name} is {value!r}; it must be a map of names and values.")
    return value


@dataclass
class ConfigArguments:
    """Which model is built from scratch."""

    model_config: dict | str | None = field(
        default=None,
        metadata={"help": "Fields of the config with its model_type (moe_hf nests text_config), as a map or JSON."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub id; unset, a byte-level BPE is trained on the text."}
    )
    tokenizer_vocab_size: int = field(default=4096, metadata={"help": "Vocabulary of the tokenizer that is trained."})

    def __post_init__(self) -> None:
        self.model_config = json_map("model_config", self.model_config)
        if self.model_config is None or "model_type" not in self.model_config:
            raise MoEError("model_config needs the fields of a config with its model_type, e.g. {model_type: llama}.")


@dataclass
class DataArguments:
    """Which text, how much is held out, and how it is cut."""

    dataset: str = field(
        default=BUILTIN_CORPUS,
        metadata={
            "help": "`builtin` or another built-in name, a file or folder of text, or the name of a Hub dataset."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    domains: list[str] | None = field(default=None, metadata={"help": "Keep these domains only."})
    ids_from_domain: str | None = field(
        default=None,
        metadata={
            "help": "Give each document the number of its domain (in alphabetical order) as this id for the routers: "
            "task_ids, language_ids or modality_ids."
        },
    )
    augment: list[str] | None = field(
        default=None,
        metadata={"help": "Change the text of training documents: see moe_hf.augmentation.AUGMENTATIONS."},
    )
    held_out_share: float = field(default=0.05, metadata={"help": "Share of each domain's documents for evaluation."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the choice of held-out documents."})
    block_size: int = field(default=256, metadata={"help": "Tokens per row."})
    packed: bool = field(default=True, metadata={"help": "Several documents per row, which do not see each other."})
    max_train_tokens: int | None = field(default=None, metadata={"help": "Train on at most this many tokens of text."})
    max_eval_tokens: int | None = field(default=None, metadata={"help": "Evaluate at most this many per domain."})


class MoEArgumentParser(HfArgumentParser):
    """`HfArgumentParser` with `--config`, as trl's: the recipe gives defaults, the command line wins."""

    def __init__(self, dataclass_types: Sequence[type], **kwargs) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.add_argument("--config", help="YAML recipe: a path, or the name of a shipped one.")

    def error(self, message: str) -> NoReturn:
        """Raise `MoEError` where argparse would print its usage and exit."""
        raise MoEError(f"{message[:1].upper()}{message[1:]}. See --help.")

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Parse `argv` (by default the command line) into one instance of each dataclass.

        Raises:
            MoEError: an unknown key or option (with the nearest known one), a recipe that is missing or not YAML, a
                value of the wrong type or not allowed.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        config_parser.add_argument("--config")
        try:
            recipe = config_parser.parse_known_args(argv)[0].config
        except argparse.ArgumentError as error:
            self.error(str(error))
        types = {f.name: f.type for dataclass_type in self.dataclass_types for f in fields(dataclass_type) if f.init}
        if recipe is not None:
            self.set_defaults(**read_recipe(recipe, types))
        _refuse_unknown_options(argv, self._option_string_actions)
        namespace = vars(self.parse_args(argv))
        instances = []
        for dataclass_type in self.dataclass_types:
            values = {f.name: namespace[f.name] for f in fields(dataclass_type) if f.init}
            try:
                instances.append(dataclass_type(**values))
            except MoEError:
                raise
            except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
                # Which one it is depends on the field: transformers computes with some before it looks at their types.
                raise MoEError(f"{dataclass_type.__name__}: {error}") from error
        return tuple(instances)


def find_recipe(name: str) -> Path:
    """Return the recipe at the path `name`, or the shipped one of that name (with or without `.yaml`)."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.parent == Path():
        try:
            return resource_path(f"training/recipes/{path.stem}.yaml")
        except MoEError:
            shipped = resource_path("training/recipes/finetune_moe.yaml").parent.glob("*.yaml")
            names = ", ".join(sorted(p.stem for p in shipped))
            raise MoEError(f"No recipe {name!r}: no such file, and shipped recipes are {names}.") from None
    raise MoEError(f"No recipe at {name!r}. Give the path of a YAML file or the name of a shipped recipe.")


def read_recipe(name: str, types: dict[str, Any]) -> dict[str, Any]:
    """Read a YAML recipe and check its keys against `types` (field name to type)."""
    path = find_recipe(name)
    try:
        text = path.read_text("utf-8")
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        # PyYAML lets pass what Python says of a date or a number that cannot be.
        raise MoEError(f"The recipe {str(path)!r} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise MoEError(f"The recipe {str(path)!r} is not a map of keys and values.")
    for key in recipe:
        if key not in types:
            # Shipped recipes, and copies of them, hold their command.
            command = re.search(r"^# (moe-hf \w+) ", text, re.MULTILINE)
            program = f" The recipe says that it is for `{command[1]}`." if command else ""
            raise MoEError(f"Unknown key {key!r} in the recipe {str(path)!r}.{_nearest(str(key), types)}{program}")
    return {key: _plain(key, value, types[key]) for key, value in recipe.items()}


def _plain(key: str, value: Any, expected: Any) -> Any:
    # YAML 1.1 reads a bare `no` as false, which is how these fields spell "never".
    if value is False and key.endswith("_strategy"):
        return "no"
    # argparse converts text only: numbers must go through the field's own type as well.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and expected not in (dict, list) else value


def _refuse_unknown_options(argv: Sequence[str], known: dict[str, Any]) -> None:
    for argument in argv:
        option = argument.split("=", 1)[0]
        if option.startswith("--") and option not in known:
            raise MoEError(f"Unknown option {option}.{_nearest(option, known)}")


def _nearest(name: str, known: dict[str, Any]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else " See --help for the known ones."
