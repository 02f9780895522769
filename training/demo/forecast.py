"""What the demo of a source will take, said before it starts: minutes, memory and disk; and the rates of its arms."""

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_hf.errors import MoEError
from moe_hf.modeling.modeling_moe import MoEForCausalLM
from moe_hf.planning import dense_on_meta, plan_upcycling
from moe_hf.trainer.learning_rates import default_learning_rate
from moe_hf.training_plan.fit import PROCESS_BYTES
from moe_hf.training_plan.step_memory import step_memory
from moe_hf.upcycling.prepare import prepare

from .settings import ARMS, MOES, Settings, shape


# Of the toy, which trains its dense model itself; the README's figures are from this.
TOY_RATE = 1e-3
STEPS = 3
# What the shapes leave open.
METHOD = {
    "preset": None,
    "init": "copy",
    "router_init": "normal",
    "noise": 0.0,
    "shared_share": 0.5,
    "seed": 0,
    "allow_inexact": False,
    "config_fields": {},
}
# The logits of an evaluation, and what its statistics copy of them.
COPIES_OF_LOGITS = 3
# Saved models of one seed: the dense one and its arms, the MoEs and their arms, and the one to share.
DENSE_FOLDERS = 1 + sum(arm.start == "dense" for arm in ARMS.values())
MOE_FOLDERS = 1 + len(MOES) + sum(arm.start in MOES for arm in ARMS.values())


def continued_rate(settings: Settings, model: PreTrainedModel, scope: str) -> float:
    """The rate of an arm: what was named, the toy's own, or the measured one for the source's size, which is printed."""
    if settings.continued_learning_rate:
        return settings.continued_learning_rate
    if settings.source is None:
        return TOY_RATE
    chosen = default_learning_rate(model, scope)
    print(chosen, flush=True)
    return chosen.rate


def forecast(settings: Settings, output_dir: Path, evaluation_batch: int) -> dict[str, Any]:
    """Say what all stages will take; a few steps are taken, once it is known that they fit.

    Raises:
        MoEError: there is not enough memory, or not enough disk; with both figures.
    """
    source = (
        str(Path(settings.source).expanduser()) if Path(settings.source).expanduser().is_dir() else settings.source
    )
    facts = plan_upcycling(source, **shape("moe", settings))
    dense, moe = facts.dense.total_parameters, facts.moe.total_parameters
    builds = _builders(source, settings)
    step = step_memory(
        builds["moe"], batch=settings.batch_size, sequence=settings.block_size, scope="all", optimizer="adamw"
    )
    vocabulary = dense_on_meta(source).config.get_text_config().vocab_size
    logits = 4 * evaluation_batch * settings.block_size * vocabulary
    memory = PROCESS_BYTES + max(step.peak, 4 * (dense + moe), 4 * moe + COPIES_OF_LOGITS * logits)
    disk = 4 * settings.seeds * (DENSE_FOLDERS * dense + MOE_FOLDERS * moe)
    # Of a GPU's memory the process on the CPU says nothing.
    if not torch.cuda.is_available():
        _refuse_less(
            "memory", memory, psutil.virtual_memory().available, "a smaller --num-experts, or a smaller --batch-size"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    _refuse_less("disk", disk, shutil.disk_usage(output_dir).free, "another --output-dir, or a smaller --num-experts")
    seconds = {start: _seconds_of_step(build, settings) for start, build in builds.items()}
    steps = settings.continued_tokens / (settings.batch_size * settings.block_size)
    ratio = facts.relative_cost
    training = sum(steps * seconds[arm.start] * (ratio if arm.equal_flops else 1) for arm in ARMS.values())
    # Each model is evaluated on two domains without gradients, a third of a step's arithmetic.
    share = 2 * settings.evaluation_tokens / (settings.batch_size * settings.block_size) / 3
    evaluation = share * (DENSE_FOLDERS * seconds["dense"] + 2 * MOE_FOLDERS * seconds["moe"])
    minutes = settings.seeds * (training + evaluation) / 60
    print(
        f"This will take about {minutes:.0f} minutes ({seconds['dense']:.2f} s for a step of the dense model, "
        f"{seconds['moe']:.2f} s of the MoE), {memory / 2**30:.1f} GiB of memory and {disk / 2**30:.1f} GiB of disk.",
        flush=True,
    )
    return {"minutes": minutes, "memory_bytes": memory, "disk_bytes": disk, "seconds_of_step": seconds}


def _refuse_less(what: str, needed: int, free: int, instead: str) -> None:
    if needed > free:
        raise MoEError(
            f"This needs about {needed / 2**30:.1f} GiB of {what}, and {free / 2**30:.1f} GiB are free: take a smaller source, "
            f"{instead}."
        )


def _builders(source: str, settings: Settings) -> dict[str, Callable[[], PreTrainedModel]]:
    """What makes the dense model and the MoEs, with random weights, in float32."""
    dense = dense_on_meta(source).config
    builds = {"dense": lambda: AutoModelForCausalLM.from_config(dense, dtype=torch.float32)}
    for name in MOES:
        config = prepare(source, lambda _: (source, dense_on_meta(source)), **METHOD | shape(name, settings)).config
        builds[name] = partial(MoEForCausalLM._from_config, config, dtype=torch.float32)
    return builds


def _seconds_of_step(build: Callable[[], PreTrainedModel], settings: Settings) -> float:
    """The quickest of a few training steps on random tokens; the first one allocates what the others use."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (settings.batch_size, settings.block_size), device=device)
    taken = []
    for _ in range(STEPS):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
