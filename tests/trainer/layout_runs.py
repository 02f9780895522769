"""The processes of test_layouts: short runs in every layout, each a case of its own."""

import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_hf
from moe_hf import MoEError
from moe_hf.finetuning.lora_files import LORA_NAME
from moe_hf.trainer import MoETrainer
from moe_hf.trainer.layouts import distribute, is_sharded
from tests.processes import run_cases
from tests.tiny_models import random_ids, tiny_dense, tiny_native_moe
from tests.trainer.runs import BIASED, GLOBAL_BATCH, arguments, correction_biases, losses, rows


MODES = {
    "ddp": {},
    "fsdp": {"fsdp_size": 2},
    "ep_fsdp": {"ep_size": 2},
    "tp": {"tp_size": 2},
    "tp_ep": {"tp_size": 2, "ep_size": 2},
}
SHARDED = [mode for mode in MODES if mode != "ddp"]
KINDS = ("ours", "mixtral", "qwen3_moe")
SIZES = {"vocab_size": 112, "num_hidden_layers": 2}
GLOBAL_ROWS = 4


def data(count: int = 28):
    return rows(count).map(lambda row: {name: [min(i, 111) for i in ids] for name, ids in row.items()})


def build(kind: str, dropout: float = 0.0, **fields) -> PreTrainedModel:
    """An upcycled llama whose experts differ, or a native MoE of transformers, with sizes that two divides.

    Its balance loss, whose statistics are those of a process, is off unless `fields` say otherwise.
    """
    from moe_hf import upcycle

    if kind != "ours":
        return tiny_native_moe(kind, **SIZES, attention_dropout=dropout, router_aux_loss_coef=0.0)
    fields = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.1} | fields
    return upcycle(tiny_dense("llama", **SIZES, attention_dropout=dropout), num_experts=4, noise=0.5, seed=1, **fields)


def rows_per_process(mode: str, world_size: int) -> int:
    return GLOBAL_ROWS // (1 if "tp" in mode else world_size)


def trainer_of(model: PreTrainedModel, folder: Path, mode: str, **fields) -> MoETrainer:
    """A trainer of four steps, or as `fields` say, in the layout `mode`; `alone` is one process."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    accumulation = fields.get("gradient_accumulation_steps", 1)
    given = {name: fields.pop(name) for name in ("given_dtype", "eval_dataset", "compute_metrics") if name in fields}
    defaults = {
        "scope": "moe",
        "use_cpu": not torch.cuda.is_available(),
        "per_device_train_batch_size": rows_per_process(mode, world_size) // accumulation,
    }
    args = arguments(folder, **(defaults | MODES.get(mode, {}) | fields))
    return MoETrainer(model, args, train_dataset=data(), **given)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights_of(trainer: MoETrainer) -> dict[str, torch.Tensor]:
    """All weights, on every process, in host memory."""
    return {name: whole(tensor).clone().cpu() for name, tensor in trainer._unwrapped().state_dict().items()}


def summary(trainer: MoETrainer) -> dict[str, Any]:
    history = trainer.state.log_history
    return {
        "num_processes": trainer.accelerator.num_processes,
        "wrapper": type(trainer.model_wrapped).__mro__[0].__name__,
        "is_sharded": is_sharded(trainer.model),
        "weights": weights_of(trainer),
        "losses": losses(trainer),
        "norms": [float(entry["grad_norm"]) for entry in history if "grad_norm" in entry],
        "with_gradient": sorted(n for n, p in trainer._unwrapped().named_parameters() if p.requires_grad),
    }


def steps(kind: str, mode: str, folder: Path, model_fields: dict | None = None, **fields) -> dict[str, Any]:
    """Four steps in scope `moe` with clipping."""
    fields = {"max_grad_norm": 0.05} | fields
    trainer = trainer_of(build(kind, **(model_fields or {})), folder, mode, **fields)
    trainer.train()
    return summary(trainer)


def run_to(kind: str, mode: str, folder: Path, checkpoint: Path | None = None, **fields) -> MoETrainer:
    """Six steps with dropout, noise and a decaying rate, saving at 3 and 6; from `checkpoint` where given."""
    model = build(kind, dropout=0.2, **({"router_jitter_noise": 0.1} if kind == "ours" else {}))
    defaults = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "max_grad_norm": 1.0}
    trainer = trainer_of(model, folder, mode, gradient_accumulation_steps=2, **(defaults | fields))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def resume(kind: str, mode: str, folder: Path, **fields) -> dict[str, Any]:
    """3 + 3 steps against 6, and what `from_pretrained` reads from a checkpoint."""
    trainers = [run_to(kind, mode, folder / "whole", **fields)]
    trainers.append(run_to(kind, mode, folder / "again", folder / "whole" / "checkpoint-3", **fields))
    first, second = map(summary, trainers)
    plain = AutoModelForCausalLM.from_pretrained(folder / "whole" / "checkpoint-6").state_dict()
    return {
        "whole": first,
        "again": second,
        "saved_is_equal": all(torch.equal(plain[name], tensor) for name, tensor in first["weights"].items()),
        "rates": [[e["learning_rate"] for e in t.state.log_history if "learning_rate" in e] for t in trainers],
    }


@contextmanager
def accelerate_fsdp2():
    """Accelerate's own FSDP2 on a CPU, where it uses DDP without a word."""
    variables = {"USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    variables |= {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    variables = {(f"ACCELERATE_{name}" if name == "USE_FSDP" else name): value for name, value in variables.items()}
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        is_new = "fsdp_plugin" not in self._shared_state
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if is_new and fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    with mock.patch.dict(os.environ, variables), mock.patch.object(AcceleratorState, "__init__", init):
        AcceleratorState._reset_state()
        yield
    AcceleratorState._reset_state()


def resume_with_plugin(folder: Path) -> dict[str, Any]:
    """As `resume`, sharded by Accelerate."""
    with accelerate_fsdp2():
        found = resume("ours", "ddp", folder)
        together = error_of(lambda: trainer_of(build("ours"), folder, "fsdp"))
    return found | {"together": together}


def reshard(kind: str, folder: Path) -> dict[str, Any]:
    """Two steps in each of several layouts, each from the checkpoint of the one before."""
    checkpoint, words = None, []
    for number, mode in enumerate(("ddp", "ep_fsdp", "fsdp", "tp_ep", "ddp"), 1):
        step = 2 * number
        trainer = trainer_of(
            build(kind), folder / mode / str(number), mode, max_steps=step, save_strategy="steps", save_steps=step,
            lr_scheduler_type="constant",
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        checkpoint = str(folder / mode / str(number) / f"checkpoint-{step}")
        words.append(trainer._layout_words())
    return summary(trainer) | {"checkpoint": checkpoint, "words": words}


def starved(mode: str, folder: Path) -> dict[str, Any]:
    """Every token goes to experts 0 and 1, which are the first process's: one step, and its gradients."""
    fields = {"balance_strategy": "bias", "scoring_func": "sigmoid", "bias_update_rate": 0.0}
    model = build("ours", **fields)
    for bias in correction_biases(model.state_dict()).values():
        bias.copy_(torch.tensor([100.0, 100.0, 0.0, 0.0]))
    trainer = trainer_of(model, folder, mode, max_steps=1)
    gradients = {}
    trainer.create_optimizer()
    optimizer = trainer.optimizer

    def note(*_) -> None:
        for name, parameter in trainer._unwrapped().named_parameters():
            if parameter.grad is not None:
                gradients[name] = whole(parameter.grad).clone().cpu()

    optimizer.register_step_pre_hook(note)
    trainer.train()
    return summary(trainer) | {"gradients": gradients}


LORA = {"scope": "expert_lora", "expert_lora_r": 3, "expert_lora_alpha": 6.0}
# Expert 1 of layer 0 is the first process's alone: there the second has no adapter.
LORA |= {"expert_selection": {"0": [1], "1": [0, 2, 3]}}


def lora(kind: str, mode: str, folder: Path) -> dict[str, Any]:
    """Six clipped steps of adapters; again from the third; the adapters of both as they are saved."""
    saves = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0.05}
    fields = LORA | saves | {"gradient_accumulation_steps": 2}
    first = trainer_of(build(kind), folder / "whole", mode, **fields)
    first.train()
    first.save_model()
    second = trainer_of(build(kind), folder / "again", mode, **fields)
    second.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    frozen = build(kind).state_dict()
    return {
        "num_processes": first.accelerator.num_processes,
        "wrapper": type(first.model_wrapped).__mro__[0].__name__,
        "is_sharded": is_sharded(first.model),
        "losses": [losses(first), losses(second)],
        "norms": [float(e["grad_norm"]) for e in first.state.log_history if "grad_norm" in e],
        "adapters": load_file(folder / "whole" / "final" / LORA_NAME),
        "adapters_again": load_file(folder / "again" / "checkpoint-6" / LORA_NAME),
        "files": sorted(path.name for path in (folder / "whole" / "checkpoint-6").iterdir()),
        "frozen_is_equal": all(torch.equal(t, frozen[n]) for n, t in weights_of(first).items() if n in frozen),
    }


def kept(mode: str, folder: Path) -> dict[str, Any]:
    """Adapters of experts beside routers that were freed by hand, with DDP beside adapters of PEFT too: four steps, resumed."""
    saves = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "scope": None}

    def trainer(name: str) -> MoETrainer:
        model = build("ours")
        if mode == "ddp":
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        else:
            distribute(model, arguments(folder, **MODES[mode], use_cpu=True).layout())
        moe_hf.add_expert_lora(model, moe_hf.ExpertLoraConfig(r=2))
        for weight, parameter in model.named_parameters():
            if weight.endswith("gate.weight"):
                parameter.requires_grad_(True)
        return trainer_of(model, folder / name, mode, **saves)

    first, second = trainer("whole"), trainer("again")
    start = {name: whole(p.detach()).clone() for name, p in first._unwrapped().named_parameters() if p.requires_grad}
    first.train()
    second.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    ends = [
        {name: whole(p.detach()).clone() for name, p in t._unwrapped().named_parameters()} for t in (first, second)
    ]
    checkpoint = folder / "whole" / "checkpoint-2"
    return {
        "num_processes": first.accelerator.num_processes,
        "moved": sorted(name for name, value in start.items() if not torch.equal(value, ends[0][name])),
        "trains": sorted(start),
        "weights": ends,
        "files": sorted(path.name for path in checkpoint.glob("*.safetensors")),
    }


def upcycled(mode: str, folder: Path) -> float:
    """How far the logits of an upcycled model, distributed in memory without a trainer, are from the dense one's."""
    from moe_hf import upcycle

    dense = tiny_dense("llama", **SIZES)
    model, ids = upcycle(dense, num_experts=4), random_ids(2, 16).clamp_max(111)
    layout = arguments(folder, **MODES[mode]).layout()
    model = DistributedDataParallel(model) if layout is None else distribute(model, layout)
    with torch.no_grad():
        expected, logits = (
            dense.eval()(ids).logits,
            whole(model.eval()(ids.to(next(model.parameters()).device)).logits).cpu(),
        )
    return float((logits - expected).norm() / expected.norm())


def masters(mode: str, folder: Path) -> dict[str, Any]:
    """A bf16 checkpoint with float32 masters: what is trained, saved, resumed and given back."""
    first = trainer_of(
        build("ours").bfloat16(), folder / "whole", mode, max_steps=4, save_strategy="steps", save_steps=2
    )
    first.train()
    again = trainer_of(build("ours").bfloat16(), folder / "again", mode, max_steps=4)
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    first.save_model()
    final = AutoModelForCausalLM.from_pretrained(folder / "whole" / "final")
    return {
        "whole": summary(first),
        "again": summary(again),
        "trained_dtypes": {str(p.dtype) for p in first._unwrapped().parameters() if p.requires_grad},
        "final": final.state_dict(),
        "config_dtype": str(final.config.dtype),
        "autocast": first.accelerator.mixed_precision,
    }


def loaded_in_parts(mode: str, folder: Path) -> dict[str, Any]:
    """The way of large models: upcycled to disk, loaded in parts, in float32 from a bf16 checkpoint."""
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        build("ours").bfloat16().save_pretrained(folder / "model")
    dist.barrier()
    layout = arguments(folder, **MODES[mode]).layout()
    assert isinstance(layout, DistributedConfig)
    load = partial(AutoModelForCausalLM.from_pretrained, folder / "model", distributed_config=layout)
    trainer = trainer_of(load(dtype=torch.float32), folder, mode, given_dtype=torch.bfloat16)
    trainer.train()
    trainer.save_model()
    found = summary(trainer)
    late = error_of(lambda: trainer_of(load(dtype=torch.bfloat16), folder, mode))
    other = {"ep_fsdp": "fsdp", "tp": "ep_fsdp"}[mode]
    differs = error_of(lambda: trainer_of(load(dtype=torch.float32), folder, other))
    final = AutoModelForCausalLM.from_pretrained(folder / "final")
    return found | {"final": final.state_dict(), "late": late, "differs": differs}


def evaluated(mode: str, folder: Path) -> dict[str, float]:
    """Metrics of an evaluation whose last batch is short."""
    from moe_hf.metrics import LanguageModelMetrics, token_statistics

    trainer = trainer_of(
        build("ours"), folder, mode, eval_dataset=data(11), compute_metrics=LanguageModelMetrics(),
        per_device_eval_batch_size=rows_per_process(mode, 2 if dist.is_initialized() else 1),
    )  # fmt: skip
    trainer.preprocess_logits_for_metrics = token_statistics
    return {name: value for name, value in trainer.evaluate().items() if "token" in name}


def error_of(action) -> str:
    """The message of the `MoEError` that `action` raises."""
    try:
        action()
    except MoEError as error:
        return str(error)
    return "no error"


def refusals(folder: Path) -> dict[str, str]:
    """Mistakes that are refused in a sentence, in all processes alike."""
    from moe_hf import upcycle
    from moe_hf.finetuning import apply_scope

    def frozen_after_wrapping() -> None:
        trainer = trainer_of(build("ours"), folder / "late", "ddp", max_steps=1)
        trainer.train()
        apply_scope(trainer.model, "router")
        trainer.train()

    def separate_experts() -> PreTrainedModel:
        model = build("ours")
        for layer in model.model.layers:
            layer.mlp.experts = torch.nn.ModuleList(torch.nn.Linear(48, 48) for _ in range(4))
        return model

    def environment() -> None:
        os.environ["WORLD_SIZE"], before = "4", os.environ["WORLD_SIZE"]
        try:
            trainer_of(build("ours"), folder, "ddp")
        finally:
            os.environ["WORLD_SIZE"] = before

    selected = {"scope": "selected", "expert_selection": {"0": [1]}}
    actions = {
        **{f"selected, {mode}": partial(trainer_of, build("ours"), folder, mode, **selected) for mode in SHARDED},
        "adapters, tp": lambda: trainer_of(build("ours"), folder, "tp", **LORA),
        "frozen after wrapping": frozen_after_wrapping,
        "scope of a wrapped model": lambda: apply_scope(DistributedDataParallel(build("ours")), "moe"),
        "wrapped already": lambda: trainer_of(DistributedDataParallel(build("ours")), folder, "ddp", scope=None),
        "separate experts": lambda: trainer_of(separate_experts(), folder, "ddp", scope="all"),
        "separate experts, ep": lambda: trainer_of(separate_experts(), folder, "ep_fsdp", scope="all"),
        "experts do not divide": lambda: trainer_of(
            tiny_native_moe("mixtral", num_experts=3, num_local_experts=3), folder, "ep_fsdp"
        ),
        "ours do not divide": lambda: trainer_of(build("ours", num_experts_per_tok=1), folder, "ddp", ep_size=3),
        "heads": lambda: trainer_of(tiny_native_moe("mixtral", num_key_value_heads=1), folder, "tp"),
        "heads of ours": lambda: trainer_of(
            upcycle(tiny_dense("llama", num_key_value_heads=3, vocab_size=112), num_experts=4), folder, "tp"
        ),
        "processes": lambda: trainer_of(build("ours"), folder, "ddp", fsdp_size=4),
        "no plan": lambda: trainer_of(_gpt2(), folder, "tp"),
        "launched apart": environment,
        "unknown field": lambda: trainer_of(build("ours"), folder, "ddp", distributed_config={"ep_sise": 2}),
        "pipeline": lambda: trainer_of(build("ours"), folder, "ddp", distributed_config={"pp_size": 2}),
    }
    return {name: error_of(action) for name, action in actions.items()}


def _gpt2() -> PreTrainedModel:
    from moe_hf import upcycle

    return upcycle(tiny_dense("gpt2", vocab_size=112), num_experts=4)


def one_process_fails(mode: str, background: bool, folder: Path) -> dict[str, Any]:
    """The second process cannot write its part."""
    trainer = trainer_of(
        build("ours"), folder, mode, max_steps=2, save_strategy="steps", save_steps=1, async_save=background
    )
    if dist.get_rank() == 1:
        usual = trainer._weights_write
        # It gathers, with the other process, before it fails.
        trainer._weights_write = lambda folder: (usual(folder), _full_disk)[trainer.state.global_step == 2]
    message = "no error"
    try:
        trainer.train()
    except (MoEError, OSError) as error:
        message = str(error)
    messages: list = [None, None]
    dist.all_gather_object(messages, message)
    dist.barrier()
    return {"messages": messages, "left": sorted(path.name for path in folder.iterdir())}


def _full_disk(group) -> None:
    raise OSError("No space left on device")


def all_cases() -> dict[str, Any]:
    """Every case by name."""
    cases = {f"resume-{mode}-{kind}": partial(resume, kind, mode) for mode in MODES for kind in KINDS}
    cases |= {f"steps-{mode}-{kind}": partial(steps, kind, mode) for mode in MODES for kind in KINDS}
    cases |= {f"unclipped-{mode}": partial(steps, "ours", mode, max_grad_norm=0.0) for mode in ("ddp", "fsdp")}
    for mode in SHARDED:
        cases[f"accumulated-{mode}"] = partial(steps, "ours", mode, gradient_accumulation_steps=2)
        cases[f"biased-{mode}"] = partial(steps, "ours", mode, model_fields=BIASED)
        cases[f"global_batch-{mode}"] = partial(steps, "ours", mode, model_fields=GLOBAL_BATCH)
        cases[f"starved-{mode}"] = partial(starved, mode)
        cases[f"masters-{mode}"] = partial(masters, mode)
        cases[f"async-{mode}"] = partial(resume, "ours", mode, async_save=True)
    cases |= {f"lora-{mode}-{kind}": partial(lora, kind, mode) for mode in MODES if mode != "tp" for kind in KINDS}
    cases |= {f"kept-{mode}": partial(kept, mode) for mode in ("ddp", "fsdp", "ep_fsdp")}
    cases |= {f"upcycled-{mode}": partial(upcycled, mode) for mode in MODES}
    cases["plugin"] = resume_with_plugin
    cases["async-ddp"] = partial(resume, "ours", "ddp", async_save=True)
    cases |= {f"parts-{mode}": partial(loaded_in_parts, mode) for mode in ("ep_fsdp", "tp")}
    cases |= {f"evaluated-{mode}": partial(evaluated, mode) for mode in ("ep_fsdp", "tp")}
    cases |= {f"reshard-{kind}": partial(reshard, kind) for kind in KINDS}
    cases |= {f"fails-{mode}": partial(one_process_fails, mode, False) for mode in ("ddp", "ep_fsdp")}
    cases["fails-async"] = partial(one_process_fails, "ep_fsdp", True)
    cases["refusals"] = refusals
    return cases


if __name__ == "__main__":
    chosen = all_cases()
    run_cases({name: chosen[name] for name in sys.argv[2:]}, Path(sys.argv[1]))
