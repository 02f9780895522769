"""What does not go together with DeepSpeed's ZeRO, which keeps weights, gradients and float32 masters to itself."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.integrations import deepspeed

from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_lora import lora_adapters


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Load or build models whole on each process, also where `TrainingArguments` with ZeRO-3 were made before.

    transformers then cuts weights while a model is built, and ours builds its blocks from whole ones. The trainer cuts them
    later; without ZeRO-3 nothing changes.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def zero_stage(args: TrainingArguments) -> int:
    """The stage of ZeRO that DeepSpeed's settings ask for; 0 without DeepSpeed."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return 0 if args.deepspeed is None or plugin is None else int(plugin.zero_stage)


def refuse_with_deepspeed(model: nn.Module, layout: DistributedConfig | None, args: TrainingArguments) -> None:
    """Refuse what DeepSpeed cannot train, or would train as something else.

    Args:
        layout (`DistributedConfig`, *optional*): sizes that are given beside DeepSpeed's settings.

    Raises:
        MoEError: a layout, checkpoints beside training, idle experts that are left alone, bfloat16 weights where DeepSpeed
            computes in float32, adapters of experts in ZeRO-3.
    """
    if layout is not None:
        raise MoEError("DeepSpeed and fsdp_size, ep_size or tp_size both spread the model: give one of them.")
    if getattr(args, "async_save", False):
        raise MoEError("async_save does not write the checkpoints of DeepSpeed. Leave it out.")
    if getattr(args, "skip_idle_experts", False):
        raise MoEError(
            "skip_idle_experts needs an optimizer's state by expert, and ZeRO cuts it elsewhere: leave it out."
        )
    if lora_adapters(model) and zero_stage(args) == 3:
        raise MoEError(
            "Adapters of experts train in DDP, FSDP2 and expert parallelism and with ZeRO-2, not with ZeRO-3, which gathers "
            "the parameters of the modules that are called. Use fsdp_size, ep_size or zero2.json."
        )
    narrow = {parameter.dtype for parameter in model.parameters()} & {torch.bfloat16, torch.float16}
    if narrow and not (args.bf16 or args.fp16):
        raise MoEError(
            f"DeepSpeed keeps float32 masters itself where it computes in 16 bits: set bf16=True for this model, whose weights "
            f"are {narrow.pop()}, or load it with dtype=torch.float32."
        )
