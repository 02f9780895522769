"""TRL's trainers for instructions and preferences with what `MoETrainer` does: scope, router losses, whole checkpoints.

Needs trl: pip install 'moe-hf[trl]'.
"""

import copy
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase


try:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError("Instruction and preference training use trl: pip install 'moe-hf[trl]'.") from error

from moe_hf.chat.generation import answer_end_ids
from moe_hf.errors import MoEError
from moe_hf.trainer.arguments import FinetuneArguments
from moe_hf.trainer.labelled_chats import labelled_chats
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
    """`SFTTrainer` that is a `MoETrainer` too, and learns answers by any chat template.

    With `assistant_only_loss` the rows become token ids and labels here (`labelled_chats`), by the tokenizer's own template,
    whether it has `{% generation %}` or not; TRL takes them from there.

    Args:
        model (`PreTrainedModel`): a MoE of this package or of transformers, or a dense model.
        args (`MoESFTConfig`): as TRL and `MoETrainer` read them; with `peft_config`, `scope` must be None.
        kwargs: as `SFTTrainer` takes them.

    Raises:
        MoEError: with `assistant_only_loss`, the answers of a row cannot be told from the rest, or it has none.
    """

    def __init__(self, model: PreTrainedModel, args: MoESFTConfig, *, formatting_func=None, **kwargs) -> None:
        self._given_model = model
        # Rows that nobody prepares must bring their labels, which TRL checks.
        self._labels_answers = args.assistant_only_loss and not (args.dataset_kwargs or {}).get("skip_prepare_dataset")
        if self._labels_answers and formatting_func is not None:
            raise MoEError(
                "formatting_func makes text of a row, in which assistant_only_loss=True could not tell the answers: leave it "
                "out, or set assistant_only_loss=False."
            )
        # TRL would look for a template of its own to train with, and refuse most.
        args.assistant_only_loss = args.assistant_only_loss and not self._labels_answers
        try:
            super().__init__(model, args, formatting_func=formatting_func, **kwargs)
        finally:
            args.assistant_only_loss = args.assistant_only_loss or self._labels_answers
        # A copy, where a default rate was set in it.
        self.args.assistant_only_loss = args.assistant_only_loss
        if self._labels_answers and not isinstance(self.processing_class, PreTrainedTokenizerBase):
            raise MoEError(
                f"assistant_only_loss=True labels text, and the processing class is a {type(self.processing_class).__name__}: "
                "give its tokenizer, or set assistant_only_loss=False."
            )

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """As TRL's, which leaves rows with token ids and labels as they are but for their length."""
        if self._labels_answers and isinstance(processing_class, PreTrainedTokenizerBase):
            known = {"train": "train_dataset", "eval": "eval_dataset"}
            dataset = labelled_chats(
                dataset,
                processing_class,
                known.get(dataset_name, f"eval_dataset[{dataset_name!r}]"),
                kept=_kept_tokens(args, packing),
                learn_prompts=args.completion_only_loss is False,
                end_token_ids=answer_end_ids(processing_class, self._given_model),
                num_proc=args.dataset_num_proc,
            )
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)


def _kept_tokens(args: MoESFTConfig, packing: bool) -> slice:
    """The tokens of a row that TRL leaves."""
    if args.max_length is None or (packing and args.packing_strategy != "bfd"):
        return slice(None)
    return (
        slice(-args.max_length, None) if args.truncation_mode == "keep_end" and not packing else slice(args.max_length)
    )


class MoEDPOTrainer(_InTRL, MoETrainer, DPOTrainer):
    """`DPOTrainer` that is a `MoETrainer` too; the arguments are those of [`MoESFTTrainer`].

    Without `ref_model` the reference is a copy of the model as it is given, which need not have been saved anywhere.
    """

    # TRL's own default for preferences is a twentieth of its default for instructions.
    default_rate_share = 0.1

    def __init__(
        self, model: PreTrainedModel, args: MoEDPOConfig, *, ref_model: PreTrainedModel | None = None, **kwargs
    ):
        if ref_model is None and kwargs.get("peft_config") is None and not args.precompute_ref_log_probs:
            ref_model = copy.deepcopy(model)
        super().__init__(model, args, ref_model=ref_model, **kwargs)
