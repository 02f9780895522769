"""The processes of test_deepspeed: the shipped settings of ZeRO on a CPU, where Accelerate starts no DeepSpeed by itself."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config

from moe_hf.trainer import MoETrainer
from tests.processes import ROOT, run_cases
from tests.trainer.layout_runs import build, data, error_of
from tests.trainer.runs import arguments, losses


STAGES = ("zero2", "zero3")
SETTINGS = ROOT / "training" / "deepspeed"


@contextmanager
def deepspeed_on_cpu() -> Iterator[None]:
    """Let Accelerate start DeepSpeed over gloo, without the C++ extension that DeepSpeed would compile for a CPU.

    Accelerate looks for no backend unless it is told of a CPU, and then it uses DDP; everything after that is its own.
    """

    def gloo(self, cpu=False, sagemaker_dp=False, backend=None):
        return "gloo", DistributedType.NO

    variables = {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "false"}
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(PartialState, "_prepare_backend", gloo),
        mock.patch("deepspeed.comm.torch.build_shm_op", lambda: None),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)


def run(model, stage: str, folder: Path, checkpoint: Path | None = None, **fields) -> MoETrainer:
    """Four clipped steps, or as `fields` say, with the settings of a stage; `model` is made after the arguments."""
    defaults = {"scope": "moe", "use_cpu": False, "per_device_train_batch_size": 2, "max_grad_norm": 0.05}
    args = arguments(folder, deepspeed=str(SETTINGS / f"{stage}.json"), **(defaults | fields))
    trainer = MoETrainer(model(), args, train_dataset=data())
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def weights_of(trainer: MoETrainer) -> dict[str, torch.Tensor]:
    import deepspeed

    model = trainer._unwrapped()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def summary(trainer: MoETrainer) -> dict[str, Any]:
    history = trainer.state.log_history
    return {
        "num_processes": trainer.accelerator.num_processes,
        "type": trainer.accelerator.distributed_type.value,
        "wrapper": type(trainer.model_wrapped).__name__,
        "stage": trainer.model_wrapped.zero_optimization_stage(),
        "weights": weights_of(trainer),
        "losses": losses(trainer),
        "norms": [float(entry["grad_norm"]) for entry in history if "grad_norm" in entry],
    }


def made(kind: str, **fields) -> PreTrainedModel:
    """A model in memory, whole on each process until the trainer has it."""
    with mock.patch("transformers.modeling_utils.is_deepspeed_zero3_enabled", lambda: False):
        return build(kind, **fields)


def steps(stage: str, kind: str, folder: Path, **fields) -> dict[str, Any]:
    with deepspeed_on_cpu():
        return summary(run(lambda: made(kind), stage, folder, **fields))


def resume(stage: str, folder: Path) -> dict[str, Any]:
    """3 + 3 steps with dropout and accumulation against 6, and what `from_pretrained` reads from a checkpoint."""
    fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 1}
    fields |= {"gradient_accumulation_steps": 2}
    model = partial(made, "ours", dropout=0.2, router_jitter_noise=0.1)
    with deepspeed_on_cpu():
        whole = summary(run(model, stage, folder / "whole", **fields))
        again = summary(run(model, stage, folder / "again", folder / "whole" / "checkpoint-3", **fields))
    plain = AutoModelForCausalLM.from_pretrained(folder / "whole" / "checkpoint-6").state_dict()
    equal = all(torch.equal(plain[name], tensor) for name, tensor in whole["weights"].items())
    return {"whole": whole, "again": again, "saved_is_equal": equal}


def all_cases() -> dict[str, Any]:
    """Every case by name."""
    cases = {f"steps-{stage}-{kind}": partial(steps, stage, kind) for stage in STAGES for kind in ("ours", "mixtral")}
    cases |= {f"resume-{stage}": partial(resume, stage) for stage in STAGES}
    return cases


if __name__ == "__main__":
    run_cases(all_cases(), Path(sys.argv[1]))
