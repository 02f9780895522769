"""What adapters of PEFT do not reach in a MoE."""

from torch import nn
from transformers.utils import logging

from moe_hf.finetuning.moe_blocks import find_moe_blocks
from moe_hf.finetuning.trained_tensors import has_peft, inner_model, trained_tensors


logger = logging.get_logger(__name__)


def say_what_adapters_leave(model: nn.Module) -> None:
    """Warn where adapters of PEFT train and no expert does, as with `target_modules="all-linear"`."""
    if not has_peft(model) or any(".experts" in name for name in trained_tensors(model)):
        return
    if not any(".experts" in name for name, _ in inner_model(model).named_modules()) or not find_moe_blocks(model):
        return
    logger.warning(
        "The adapters of PEFT reach no expert and no router: these are stacked parameters and no nn.Linear, which is all that "
        'target_modules="all-linear" names. Train the experts too with moe_hf.add_expert_lora, or with target_parameters='
        '["experts.gate_up_proj", "experts.down_proj"] ("experts.up_proj" without a gate) in the LoraConfig.'
    )
