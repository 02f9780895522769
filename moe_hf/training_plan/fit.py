"""`fit_shape`: the largest MoE of a dense model whose fine-tuning, or running, fits a given memory.

Letters: B batch, S sequence, V vocabulary.
"""

import math
import os
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import PreTrainedModel

from moe_hf.errors import MoEError
from moe_hf.finetuning import SCOPES, find_moe_blocks, scope_parameter_names
from moe_hf.modeling.modeling_moe import MoEForCausalLM
from moe_hf.planning import INSTEAD, TRAINING_BYTES, dense_on_meta
from moe_hf.training_plan.shapes import Shape, ladder
from moe_hf.training_plan.step_memory import StepMemory, forward_memory, step_memory
from moe_hf.unwrapping import path_of
from moe_hf.upcycling.prepare import Preparation, prepare


RUNNING = "none"
FITTED_SCOPES = (*(scope for scope in SCOPES if scope != "selected"), RUNNING)
FITTED_DTYPES = ("auto", "float32", "bfloat16", "float16")
# Python with torch, transformers and what a trainer imports, the workspaces of kernels, and what the allocator keeps: the most that
# four runs took beyond what is counted for them (docs/upcycling.md has them).
PROCESS_BYTES = 1_152 * 2**20
# Shares of a GiB that an error message names, rounded up: what it names is enough.
NAMED = 100


@dataclass(frozen=True)
class FitSettings:
    """What a shape has to fit: the run that is planned, and its memory in bytes."""

    memory: int
    scope: str
    batch: int
    sequence: int
    dtype: str
    checkpointing: bool

    def check(self) -> None:
        """Refuse what is no run.

        Raises:
            MoEError: naming the setting and what it may be.
        """
        for name in ("batch", "sequence"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise MoEError(f"{name} is {value!r}; it must be a whole number from 1.")
        if self.scope not in FITTED_SCOPES:
            raise MoEError(
                f"A shape is fitted to one of the scopes {', '.join(FITTED_SCOPES)}, and got {self.scope!r}."
            )
        if self.dtype not in FITTED_DTYPES:
            raise MoEError(f"dtype is {self.dtype!r}; it must be one of {', '.join(FITTED_DTYPES)}.")
        if self.scope == RUNNING and self.checkpointing:
            raise MoEError("checkpointing saves memory of a training step: leave it out, or give a scope that trains.")


@dataclass(frozen=True)
class FittedShape:
    """The shape that was chosen, and what was counted for it, in bytes.

    Attributes:
        source: the dense model.
        shape: what was chosen; `shape.arguments()` are arguments of `upcycle`.
        settings: what it fits.
        weights, gradients, optimizer: what stays; float32 masters of what trains are among the weights.
        activations: what else is alive at the worst moment of a step, logits among it.
        logits: B x S x V values of 4 bytes, once; a step holds some copies of them, which `activations` has.
        process: the program itself.
        larger: the next shape in the order of preference, which does not fit, or None.
    """

    source: str
    shape: Shape
    settings: FitSettings
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    process: int
    larger: Shape | None

    @property
    def passing(self) -> int:
        """Bytes at the worst moment of a step that are gone after it."""
        return self.gradients + self.activations

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.process

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        shape = {name: getattr(self.shape, name) for name in ("num_experts", "copies", "shards", "every")}
        return (
            asdict(self)
            | {"shape": shape | {"described": str(self.shape)}, "larger": str(self.larger or "")}
            | {"total": self.total}
        )


def fit_shape(
    source: str | os.PathLike,
    memory: int | str,
    *,
    scope: str = "moe",
    batch: int = 1,
    sequence: int = 1024,
    dtype: str = "auto",
    checkpointing: bool = False,
    allow_inexact: bool = False,
    **upcycling,
) -> FittedShape:
    """Choose the largest MoE of a dense model whose training step, or whose run, fits `memory`; weights are not read.

    Of the shapes in `moe_hf.training_plan.shapes` the most preferred one is taken that needs at most `memory`. The order does
    not depend on the memory, so more memory never gives a smaller model. Shapes whose logits would not be the dense model's
    are left out. What a step needs is counted as `plan_training` counts it, and the program itself comes on top.

    Args:
        source (`str` or `os.PathLike`): a folder with a config.json, or a Hub id, of a dense model.
        memory (`int` or `str`): bytes, or such as `"8GiB"` or `"8GB"`.
        scope (`str`): what trains (AdamW), or `"none"`: the model runs, with a cache and the logits of all tokens.
        batch, sequence (`int`): B and S of a micro-batch.
        dtype (`str`): of the MoE: `"auto"`, as the dense model is stored, or `"float32"`, `"bfloat16"`, `"float16"`.
        checkpointing (`bool`): gradient checkpointing of each layer.
        allow_inexact (`bool`): shapes are allowed whose logits are not the dense model's.
        upcycling: other arguments of `upcycle`.

    Raises:
        MoEError: no shape fits, with the smallest memory that would do; a source that has experts; settings that are no run.
    """
    settings = FitSettings(parse_memory(memory), scope, batch, sequence, dtype, checkpointing)
    settings.check()
    for name in ("num_experts", "num_experts_per_tok", "preset", "init", "decoder_sparse_step"):
        if upcycling.get(name) is not None:
            raise MoEError(
                f"A shape that is fitted to a memory has its own {name}: leave {name} out, or choose all of it."
            )
    dense = dense_on_meta(str(path_of(source, INSTEAD)))
    if find_moe_blocks(dense):
        raise MoEError(f"{source} has experts already: give a dense model.")
    if dtype != "auto":
        dense.to(getattr(torch, dtype))
    candidates = _candidates(str(source), dense, settings, allow_inexact, upcycling)
    fewest = [one for one in candidates if one.shape.weights == candidates[0].shape.weights]
    # A larger shape holds no fewer activations than the smallest: most that do not fit are known without running a step.
    passing = min(one.counted.passing for one in fewest)
    larger = None
    for candidate in reversed(candidates):
        if candidate.least(passing) <= settings.memory and candidate.counted.total <= settings.memory:
            return replace(candidate.counted, larger=larger)
        larger = candidate.shape
    smallest = min(fewest, key=lambda one: one.counted.total)
    raise MoEError(
        f"Nothing fits {_gib(settings.memory, math.floor)}: the smallest shape, {smallest.shape}, needs "
        f"{_gib(smallest.counted.total, math.ceil)}"
        f" with scope {scope}, batch {batch}, sequence {sequence}. Give more memory, a smaller batch or sequence, "
        "checkpointing, or a scope that trains less."
    )


def parse_memory(memory: int | str) -> int:
    """Bytes of a size in words: `"8GiB"`, `"8GB"`, `"512MiB"`; a number is bytes.

    Raises:
        MoEError: something else.
    """
    try:
        # accelerate takes a small last letter for bits.
        size = convert_file_size_to_int(memory.strip().upper() if isinstance(memory, str) else memory)
    except (ValueError, OverflowError, AttributeError):
        size = 0
    if isinstance(memory, bool) or size < 1:
        raise MoEError(f"The memory is {memory!r}; give a size with its unit, such as 8GiB, 8GB or 512MiB.")
    return size


def _gib(size: int, rounded) -> str:
    return f"{rounded(size / 2**30 * NAMED) / NAMED:.2f}GiB"


class _Candidate:
    """A shape of one dense model, whose step is run when it is asked for."""

    def __init__(self, source: str, shape: Shape, ready: Preparation, settings: FitSettings):
        self.source, self.shape, self.settings, self.config = source, shape, settings, ready.config
        self.dtype, moe = ready.config.dtype, ready.moe
        moe.tie_weights()
        trained = set() if settings.scope == RUNNING else set(scope_parameter_names(moe, settings.scope))
        self.gradients = sum(4 * p.numel() for name, p in moe.named_parameters() if name in trained)
        frozen = sum(p.numel() * p.element_size() for name, p in moe.named_parameters() if name not in trained)
        self.staying = frozen + self.gradients // 4 * (TRAINING_BYTES - 4)

    def build(self) -> PreTrainedModel:
        return MoEForCausalLM._from_config(self.config, dtype=self.dtype)

    def least(self, passing: int) -> int:
        """Bytes that it needs at least, where a step holds at least `passing` beside what stays."""
        return self.staying + max(self.gradients, passing) + PROCESS_BYTES

    @cached_property
    def counted(self) -> FittedShape:
        memory, settings = self._memory(), self.settings
        held = memory.weights + memory.gradients + memory.optimizer
        return FittedShape(
            source=self.source,
            shape=self.shape,
            settings=settings,
            weights=memory.weights,
            gradients=memory.gradients,
            optimizer=memory.optimizer,
            activations=max(0, memory.peak - held),
            logits=settings.batch * settings.sequence * self.config.get_text_config().vocab_size * 4,
            process=PROCESS_BYTES,
            larger=None,
        )

    def _memory(self) -> StepMemory:
        size = {"batch": self.settings.batch, "sequence": self.settings.sequence}
        if self.settings.scope == RUNNING:
            return forward_memory(self.build, **size)
        return step_memory(
            self.build,
            **size,
            scope=self.settings.scope,
            optimizer="adamw",
            checkpointing=self.settings.checkpointing,
        )


def _candidates(
    source: str, dense: PreTrainedModel, settings: FitSettings, allow_inexact: bool, upcycling: dict[str, Any]
) -> list[_Candidate]:
    """The shapes that this model can have, the least preferred one first.

    Raises:
        MoEError: it can have none; the reason of the last one that was refused.
    """
    fields = {name: value for name, value in upcycling.items() if value is not None}
    method = {"router_init": "normal", "noise": 0.0, "shared_share": 0.5, "seed": 0}
    method |= {name: fields.pop(name) for name in list(fields) if name in method}
    found, reason = [], f"{source} has no layer that could have experts."
    for shape in ladder(dense.config.get_text_config().num_hidden_layers):
        own = shape.arguments() | {"preset": None}
        sparse_step = {"decoder_sparse_step": own.pop("decoder_sparse_step")}
        try:
            ready = prepare(
                source,
                lambda given: (str(given), dense),
                **own,
                **method,
                allow_inexact=True,
                config_fields=fields | sparse_step,
            )
            inexact = ready.method.why_inexact(ready.config, ready.sites[0], dense.dtype)
            if not ready.method.exact:
                inexact = f"noise={method['noise']} changes the experts by design"
            if inexact and not allow_inexact:
                raise MoEError(f"The logits would not be the dense model's: {inexact}. allow_inexact accepts that.")
        except MoEError as error:
            # Of a way to cut that the model does not allow others say more.
            reason = str(error) if shape.shards == 1 else reason
            continue
        found.append(_Candidate(source, shape, ready, settings))
    if not found:
        raise MoEError(reason)
    return found
