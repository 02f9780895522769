"""`plan_training`: memory and traffic of a training step on each device, by layout, and the cheapest change that fits.

Letters: B batch, S sequence, T = B * S tokens, N devices, E experts, K experts per token.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_hf.dtypes import dtype_name
from moe_hf.errors import MoEError
from moe_hf.finetuning import find_moe_blocks, scope_parameter_names
from moe_hf.inspection import load_config
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.modeling_moe import MoEForCausalLM
from moe_hf.planning import INSTEAD, dense_on_meta
from moe_hf.training_plan.layouts import LAYOUTS, PASSES, LayoutPlan, ModelSizes, model_sizes, plan_layout
from moe_hf.training_plan.placement import LayerPlacement, TrafficPrices, propose
from moe_hf.training_plan.step_memory import OPTIMIZERS, StepMemory, step_memory
from moe_hf.unwrapping import path_of
from moe_hf.upcycling.prepare import prepare


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Of a device's memory: the rest is for the driver's context, kernels' workspaces and gaps between tensors.
USABLE = 0.92
MOST_DEVICES_TIMES = 8


@dataclass(frozen=True)
class TrainingSettings:
    """What a run is planned with: B and S of a micro-batch on each device, N, scope, optimizer, and ways to save memory."""

    batch: int
    sequence: int
    gpus: int
    scope: str
    optimizer: str
    dtype: str
    checkpointing: bool
    accumulation: int

    def check(self) -> None:
        """Refuse what is no run.

        Raises:
            MoEError: naming the setting and what it may be.
        """
        for name in ("batch", "sequence", "gpus", "accumulation"):
            if getattr(self, name) < 1:
                raise MoEError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.optimizer not in OPTIMIZERS:
            raise MoEError(f"optimizer={self.optimizer!r}: choose one of {', '.join(OPTIMIZERS)}.")

    @property
    def tokens(self) -> int:
        """T of a micro-batch."""
        return self.batch * self.sequence


@dataclass(frozen=True)
class Change:
    """Other settings under which the same step of the same tokens fits."""

    settings: TrainingSettings
    layout: LayoutPlan

    def describe(self, given: TrainingSettings) -> str:
        """What to do, in words."""
        done = [self.layout.layout]
        if self.settings.batch != given.batch:
            done.append(f"batch {self.settings.batch} with accumulation {self.settings.accumulation}")
        if self.settings.checkpointing != given.checkpointing:
            done.append("gradient checkpointing")
        if self.settings.gpus != given.gpus:
            done.append(f"{self.settings.gpus} GPUs")
        return ", ".join(done)


@dataclass(frozen=True)
class TrainingPlan:
    """What a training step needs on each device.

    Attributes:
        source: the model.
        settings: of the run.
        memory: bytes of a device.
        layouts: figures of each layout, one when there is one device.
        change: the cheapest change when no layout fits, or None.
        placement: proposals by layer, when a load was given.
    """

    source: str
    settings: TrainingSettings
    memory: int
    layouts: tuple[LayoutPlan, ...]
    change: Change | None
    placement: tuple[LayerPlacement, ...]

    def fits(self, layout: LayoutPlan) -> bool:
        """Whether a layout can be used and needs at most 92% of a device's memory."""
        return layout.why_not is None and layout.total <= USABLE * self.memory

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "source": self.source,
            "settings": asdict(self.settings),
            "memory": self.memory,
            "layouts": [one.to_dict() | {"fits": self.fits(one)} for one in self.layouts],
            "change": None if self.change is None else self.change.describe(self.settings),
            "placement": [asdict(one) for one in self.placement],
        }


def plan_training(
    source: str | os.PathLike,
    *,
    num_experts: int | None = None,
    num_experts_per_tok: int | None = None,
    preset: str | None = None,
    scope: str = "moe",
    optimizer: str = "adamw",
    dtype: str = "bfloat16",
    batch: int = 1,
    sequence: int = 1024,
    gpus: int = 1,
    memory: float = 80.0,
    checkpointing: bool = False,
    accumulation: int = 1,
    load: str | os.PathLike | Sequence[Sequence[float]] | None = None,
    **config_fields,
) -> TrainingPlan:
    """Say what fine-tuning needs on each device and what it sends, from the config alone.

    The step is run on tensors without numbers (`step_memory`), with `grouped_mm` experts and even routing; trained
    parameters are float32 masters and the rest has `dtype`, as `MoETrainer` keeps them. Layouts are derived from that.

    Args:
        source (`str` or `os.PathLike`): a folder with a config.json, or a Hub id: a dense model to upcycle, one of this
            package's, or a native MoE of transformers.
        num_experts, num_experts_per_tok, preset, config_fields: of the upcycling (8 and 2 by default); for dense sources only.
        scope (`str`): what trains.
        optimizer (`str`): `"adamw"` (fused) or `"sgd"`.
        dtype (`str`): `"bfloat16"` or `"float32"`, of frozen weights and of the arithmetic.
        batch, sequence (`int`): B and S of one micro-batch on each device.
        gpus (`int`): N.
        memory (`float`): of a device, in GiB; 92% of it are planned with.
        checkpointing (`bool`): gradient checkpointing of each layer.
        accumulation (`int`): micro-batches of a step.
        load (*optional*): measured choices per layer and expert, (L, E), or a JSON file with them; adds a proposal where
            to place experts and which to hold on every device, whose memory is not in the figures of the layouts.

    Raises:
        MoEError: for a source without experts or settings that do not fit.
    """
    dtype = dtype_name(dtype, tuple(DTYPES))
    settings = TrainingSettings(batch, sequence, gpus, scope, optimizer, dtype, checkpointing, accumulation)
    settings.check()
    planner = _Planner(
        _builder(source, DTYPES[dtype], num_experts, num_experts_per_tok, preset, config_fields), settings
    )
    limit = round(memory * 2**30)
    layouts = planner.layouts(settings)
    plan = TrainingPlan(str(source), settings, limit, tuple(layouts), None, ())
    if not any(map(plan.fits, layouts)):
        found = (Change(other, one) for other in planner.cheaper() for one in planner.layouts(other) if plan.fits(one))
        plan = replace(plan, change=next(found, None))
    if load is not None:
        plan = replace(plan, placement=tuple(planner.placement(_read_load(load))))
    return plan


class _Planner:
    """Plans of one model; a step is run once for all that it is asked for."""

    def __init__(self, build: Callable[[], PreTrainedModel], settings: TrainingSettings):
        self.build, self.given = build, settings
        self._memories: dict[tuple[int, bool, bool], StepMemory] = {}
        self._devices = tuple(settings.gpus * times for times in _doublings(1, MOST_DEVICES_TIMES))

    @cached_property
    def sizes(self) -> ModelSizes:
        with torch.device("meta"):
            model = self.build()
        model.tie_weights()
        # Masters of trained parameters have 4 bytes.
        return model_sizes(model, dict.fromkeys(scope_parameter_names(model, self.given.scope), 4))

    def memory(self, settings: TrainingSettings) -> StepMemory:
        """Of one device that holds everything."""
        key = settings.batch, settings.checkpointing, settings.accumulation > 1
        if key not in self._memories:
            self._memories[key] = step_memory(
                self.build,
                batch=settings.batch,
                sequence=settings.sequence,
                scope=settings.scope,
                optimizer=settings.optimizer,
                checkpointing=settings.checkpointing,
                accumulation=settings.accumulation,
                devices=self._devices,
            )
        return self._memories[key]

    def layouts(self, settings: TrainingSettings) -> list[LayoutPlan]:
        """Of each layout, those that send least first."""
        plans = [
            plan_layout(
                layout,
                self.memory(settings),
                self.sizes,
                gpus=settings.gpus,
                tokens=settings.tokens,
                value_bytes=DTYPES[settings.dtype].itemsize,
                checkpointing=settings.checkpointing,
                accumulation=settings.accumulation,
            )
            for layout in (LAYOUTS if settings.gpus > 1 else LAYOUTS[:1])
        ]
        return sorted(plans, key=lambda plan: plan.all_to_all + plan.reduction)

    def cheaper(self) -> Iterator[TrainingSettings]:
        """Other settings for the same tokens per step and device, those that cost least time first.

        More and smaller micro-batches do the same arithmetic; checkpointing does a third more; more devices cost money.
        """
        given = self.given
        for gpus in self._devices:
            for checkpointing in sorted({given.checkpointing, True}):
                for parts in _doublings(1, given.batch):
                    if given.batch % parts == 0:
                        yield replace(
                            given,
                            gpus=gpus,
                            checkpointing=checkpointing,
                            batch=given.batch // parts,
                            accumulation=given.accumulation * parts,
                        )

    def placement(self, counts: Sequence[Sequence[float]]) -> list[LayerPlacement]:
        """Where experts should lie under expert parallelism."""
        sizes, given = self.sizes, self.given
        shape = sizes.num_moe_layers, sizes.num_experts
        if (len(counts), len(counts[0]) if counts else 0) != shape:
            raise MoEError(
                f"The load has {len(counts)} layers; the model has {shape[0]} MoE layers of {shape[1]} experts."
            )
        others = (given.gpus - 1) / given.gpus
        row = PASSES * others * sizes.hidden_size * DTYPES[given.dtype].itemsize
        rows = given.tokens * given.accumulation * given.gpus * sizes.experts_per_token
        # Experts that do not train have no gradients to sum.
        shadow = 2 * others * sizes.expert if sizes.trained_experts else 0.0
        return propose(counts, given.gpus, rows, TrafficPrices(row, shadow))


def _doublings(start: int, most: int) -> Iterator[int]:
    while start <= most:
        yield start
        start *= 2


def _builder(
    source: str | os.PathLike,
    dtype: torch.dtype,
    num_experts: int | None,
    num_experts_per_tok: int | None,
    preset: str | None,
    config_fields: dict[str, Any],
) -> Callable[[], PreTrainedModel]:
    """What makes the MoE, in `dtype`."""
    config = load_config(str(path_of(source, INSTEAD)))
    if isinstance(config, MoEConfig):
        make = MoEForCausalLM._from_config
    else:
        dense = dense_on_meta(str(source))
        make = AutoModelForCausalLM.from_config
        if not find_moe_blocks(dense):
            config = prepare(
                source,
                lambda given: (str(given), dense),
                num_experts=num_experts,
                num_experts_per_tok=num_experts_per_tok,
                preset=preset,
                init="copy",
                router_init="normal",
                noise=0.0,
                shared_share=0.5,
                seed=0,
                allow_inexact=True,
                config_fields=config_fields,
            ).config
            num_experts = num_experts_per_tok = preset = None
            config_fields, make = {}, MoEForCausalLM._from_config
    if num_experts or num_experts_per_tok or preset or config_fields:
        raise MoEError(f"{source} has experts already: leave out num_experts, preset and the fields of an upcycling.")
    config.dtype = dtype
    return lambda: make(config, dtype=dtype)


def _read_load(load: str | os.PathLike | Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
    if not isinstance(load, str | os.PathLike):
        return load
    try:
        counts = json.loads(Path(load).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoEError(f"{load} is no JSON file with a list of layers, each a list of counts: {error}") from error
    if not isinstance(counts, list) or not all(
        isinstance(layer, list) and all(isinstance(count, int | float) for count in layer) for layer in counts
    ):
        raise MoEError(f"{load} must hold a list of layers, each a list of counts, one per expert.")
    return counts
