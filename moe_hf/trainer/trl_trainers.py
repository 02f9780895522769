"""TRL's trainers for instructions and preferences with what `MoETrainer` does: scope, router losses, whole checkpoints.

Needs trl: pip install 'moe-hf[trl]'.
"""

import copy
from dataclasses import dataclass, field

from transformers import PreTrainedModel


try:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.chat_template_utils import get_training_chat_template
except ImportError as error:
    raise ImportError("Instruction and preference training use trl: pip install 'moe-hf[trl]'.") from error

from moe_hf.errors import MoEError
from moe_hf.trainer.arguments import FinetuneArguments
from moe_hf.trainer.chats import marks_answers, with_answers
from moe_hf.trainer.moe_trainer import MoETrainer


@dataclass
class MoESFTConfig(FinetuneArguments, SFTConfig):
    """`SFTConfig` with the scope and the router options of `MoETrainingArguments`."""

    trust_remote_code: bool = field(default=False, init=False)  # `ModelArguments` has it
    assistant_only_loss: bool = field(default=True, metadata={"help": "Learn answers, not requests."})

    def __post_init__(self) -> None:
        SFTConfig.__post_init__(self)


@dataclass
class MoEDPOConfig(FinetuneArguments, DPOConfig):
    """`DPOConfig` with the scope and the router options of `MoETrainingArguments`."""

    trust_remote_code: bool = field(default=False, init=False)  # `ModelArguments` has it

    def __post_init__(self) -> None:
        DPOConfig.__post_init__(self)


class _InTRL:
    """What differs in TRL's trainers: their own router loss is off, which is pooled over layers and enters beside ours, and
    the adapters that they wrap around a model train alone.
    """

    def __init__(self, model: PreTrainedModel, args, **kwargs) -> None:
        if kwargs.get("peft_config") is not None and args.scope is not None:
            raise MoEError(
                f"peft_config and scope={args.scope!r} both say what trains: PEFT would freeze what the scope has freed. Set "
                "scope=None to train the adapters of peft_config alone; or leave peft_config out, and for a scope beside "
                "adapters give a model that get_peft_model has wrapped and whose parameters you have freed, with scope=None."
            )
        super().__init__(model, args, **kwargs)
        self.aux_loss_enabled = False
        self.model.config.get_text_config().output_router_logits = False


class MoESFTTrainer(_InTRL, MoETrainer, SFTTrainer):
    """`SFTTrainer` that is a `MoETrainer` too.

    Args:
        model (`PreTrainedModel`): a MoE of this package or of transformers, or a dense model.
        args (`MoESFTConfig`): as TRL and `MoETrainer` read them; with `peft_config`, `scope` must be None.
        kwargs: as `SFTTrainer` takes them.

    Raises:
        MoEError: with `assistant_only_loss`, nothing tells the answers from the rest, or a chat has none.
    """

    def __init__(self, model: PreTrainedModel, args: MoESFTConfig, *, processing_class=None, **kwargs) -> None:
        if args.assistant_only_loss:
            if processing_class is not None and not marks_answers(processing_class):
                _check_replaced_template(processing_class)
            for name in ("train_dataset", "eval_dataset"):
                kwargs[name] = with_answers(kwargs.get(name), name)
        super().__init__(model, args, processing_class=processing_class, **kwargs)


class MoEDPOTrainer(_InTRL, MoETrainer, DPOTrainer):
    """`DPOTrainer` that is a `MoETrainer` too; the arguments are those of [`MoESFTTrainer`].

    Without `ref_model` the reference is a copy of the model as it is given, which need not have been saved anywhere.
    """

    def __init__(
        self, model: PreTrainedModel, args: MoEDPOConfig, *, ref_model: PreTrainedModel | None = None, **kwargs
    ):
        if ref_model is None and kwargs.get("peft_config") is None and not args.precompute_ref_log_probs:
            ref_model = copy.deepcopy(model)
        super().__init__(model, args, ref_model=ref_model, **kwargs)


def _check_replaced_template(processing_class) -> None:
    """Refuse a chat template that says nothing of answers, unless TRL knows one to train with in its place."""
    try:
        if processing_class.chat_template is not None and get_training_chat_template(processing_class):
            return
    except ValueError:
        pass
    raise MoEError(
        "assistant_only_loss=True learns what is between {% generation %} and {% endgeneration %} in the tokenizer's chat "
        "template, and it has no such part: put the assistant's words between them, or set tokenizer.chat_template = "
        "moe_hf.trainer.chats.CHAT_TEMPLATE, or assistant_only_loss=False, which learns the requests too."
    )
