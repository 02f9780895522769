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
import torch.distributed as dist
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config

from moe_hf.finetuning.lora_files import LORA_NAME
from moe_hf.trainer import MoETrainer, loaded_whole
from tests.processes import ROOT, run_cases
from tests.trainer.layout_runs import LORA, build, data, error_of
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
        mock.patch("transformers.training_args.is_torch_bf16_gpu_available", return_value=True),
        mock.patch("deepspeed.comm.torch.build_shm_op", return_value=None),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer_of(stage: str, folder: Path, model: PreTrainedModel | None = None, source: Path | None = None, **fields):
    """A trainer of four clipped steps, or as `fields` say, with the settings of a stage.

    `source` is loaded after the arguments were made, as the programs do.
    """
    defaults = {"scope": "moe", "use_cpu": False, "per_device_train_batch_size": 2, "max_grad_norm": 0.05}
    args = arguments(folder, deepspeed=str(SETTINGS / f"{stage}.json"), **(defaults | fields))
    if model is None:
        with loaded_whole():
            model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    return MoETrainer(model, args, train_dataset=data())


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


def steps(stage: str, kind: str, folder: Path) -> dict[str, Any]:
    model = build(kind)
    with deepspeed_on_cpu():
        trainer = trainer_of(stage, folder, model)
        trainer.train()
        return summary(trainer)


def resume(stage: str, folder: Path) -> dict[str, Any]:
    """3 + 3 steps with dropout and accumulation against 6, and what `from_pretrained` reads from a checkpoint."""
    fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 1}
    fields |= {"gradient_accumulation_steps": 2}
    found = {}
    for name, checkpoint in (("whole", None), ("again", str(folder / "whole" / "checkpoint-3"))):
        model = build("ours", dropout=0.2, router_jitter_noise=0.1)
        with deepspeed_on_cpu():
            trainer = trainer_of(stage, folder / name, model, **fields)
            trainer.train(resume_from_checkpoint=checkpoint)
            found[name] = summary(trainer)
    plain = AutoModelForCausalLM.from_pretrained(folder / "whole" / "checkpoint-6").state_dict()
    equal = all(torch.equal(plain[name], tensor) for name, tensor in found["whole"]["weights"].items())
    return found | {"saved_is_equal": equal}


def loaded(stage: str, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """A folder is loaded under DeepSpeed's settings, trained, evaluated and saved."""
    if dist.get_rank() == 0:
        build("ours").to(dtype).save_pretrained(folder / "model")
    dist.barrier()
    with deepspeed_on_cpu():
        trainer = trainer_of(stage, folder, source=folder / "model", bf16=dtype == torch.bfloat16)
        trainer.train()
        trainer.save_model()
        report, found = trainer.scope_report, summary(trainer)
    final = AutoModelForCausalLM.from_pretrained(folder / "final")
    return found | {"final": final.state_dict(), "trainable": report.trainable_parameters}


def lora(stage: str, folder: Path) -> dict[str, Any]:
    """Adapters of experts."""
    model = build("ours")
    with deepspeed_on_cpu():
        trainer = trainer_of(stage, folder, model, **LORA)
        trainer.train()
        trainer.save_model()
        return {"losses": losses(trainer), "adapters": load_file(folder / "final" / LORA_NAME)}


def refusals(folder: Path) -> dict[str, str]:
    """What does not go together with DeepSpeed, in all processes alike."""
    with deepspeed_on_cpu():
        trainer_of("zero3", folder, build("ours"))
        messages = {"built in parts": error_of(lambda: AutoModelForCausalLM.from_config(build("ours").config))}
    given = {
        "layout": ("zero2", {"fsdp_size": 2}),
        "async": ("zero2", {"async_save": True}),
        "idle": ("zero2", {"skip_idle_experts": True}),
        "selected": ("zero2", {"scope": "selected", "expert_selection": {"0": [1]}}),
        "adapters": ("zero3", LORA),
        "bfloat16": ("zero2", {}),
    }
    for name, (stage, fields) in given.items():
        model = build("ours").to(torch.bfloat16 if name == "bfloat16" else torch.float32)
        with deepspeed_on_cpu():
            messages[name] = error_of(partial(trainer_of, stage, folder, model, **fields))
    return messages


def all_cases() -> dict[str, Any]:
    """Every case by name."""
    cases = {f"steps-{stage}-{kind}": partial(steps, stage, kind) for stage in STAGES for kind in ("ours", "mixtral")}
    cases |= {f"resume-{stage}": partial(resume, stage) for stage in STAGES}
    cases |= {f"loaded-{stage}": partial(loaded, stage, torch.float32) for stage in STAGES}
    cases |= {f"bfloat16-{stage}": partial(loaded, stage, torch.bfloat16) for stage in STAGES}
    return cases | {"lora-zero2": partial(lora, "zero2"), "refusals": refusals}


if __name__ == "__main__":
    run_cases(all_cases(), Path(sys.argv[1]))
