"""Evaluation in 16 bits (`bf16_full_eval`, `fp16_full_eval`), beside float32 masters that stay what they are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import Trainer

from moe_hf.finetuning.lora_sharding import is_sharded


@contextmanager
def full_eval(trainer: Trainer) -> Iterator[None]:
    """Let `trainer` evaluate in the 16 bits that its arguments ask for; `Trainer` itself rounds the masters, for good.

    Weights are rounded and put back bit by bit, as the same parameters. Where they are sharded, autocast rounds what is computed.
    Buffers, such as frequencies of positions and correction biases, stay in float32, as in a model that is loaded in 16 bits.
    """
    args, model = trainer.args, trainer.model
    given = {"bf16_full_eval": args.bf16_full_eval, "fp16_full_eval": args.fp16_full_eval}
    if not any(given.values()):
        yield
        return
    dtype = torch.bfloat16 if args.bf16_full_eval else torch.float16
    if is_sharded(model) or trainer.is_deepspeed_enabled:
        rounded = torch.autocast(args.device.type, dtype)
    else:
        # With these arguments Trainer leaves the model where it is, to move it when it rounds it.
        trainer._move_model_to_device(model, args.device)
        rounded = _rounded(model, dtype)
    vars(args).update(dict.fromkeys(given, False))
    try:
        with rounded:
            yield
    finally:
        vars(args).update(given)


@contextmanager
def _rounded(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The parameters of `model` in `dtype`; afterwards they are the objects that they were, with the numbers that they had."""
    modules = list(model.modules())
    parameters = [(own, name, p, p.data) for own in modules for name, p in own._parameters.items() if p is not None]
    buffers = [(own, name, buffer) for own in modules for name, buffer in own._buffers.items()]
    model.to(dtype)
    for own, name, buffer in buffers:
        own._buffers[name] = buffer
    try:
        yield
    finally:
        for own, name, parameter, data in parameters:
            if parameter.dtype != data.dtype:
                parameter.data = data
            own._parameters[name] = parameter
