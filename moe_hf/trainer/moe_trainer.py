"""`MoETrainer`: transformers' Trainer with checkpoints that can be trusted and losses that a MoE needs."""

import copy
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_lora import add_expert_lora, lora_adapters
from moe_hf.finetuning.lora_config import ExpertLoraConfig
from moe_hf.finetuning.lora_sharding import is_sharded as experts_are_sharded
from moe_hf.finetuning.model_to_save import model_to_save
from moe_hf.finetuning.save_guard import guard_saving
from moe_hf.finetuning.scopes import apply_scope, report_scope, scope_parameter_names
from moe_hf.finetuning.trained_tensors import has_peft, inner_model
from moe_hf.hub import push_model
from moe_hf.kernels import has_stored
from moe_hf.reporting.card import model_card
from moe_hf.reporting.card_chat import sample_chat
from moe_hf.reporting.card_facts import this_hardware, training_facts
from moe_hf.reporting.run_results import run_facts
from moe_hf.trainer.arguments import MoETrainingArguments
from moe_hf.trainer.card_arguments import take_card_arguments
from moe_hf.trainer.checkpoints import choose_checkpoint, resume_choice, weights_at_hand
from moe_hf.trainer.layouts import accelerate_shards, distribute, is_sharded
from moe_hf.trainer.learning_rates import DefaultRate, default_learning_rate
from moe_hf.trainer.resumable import ResumableTrainer
from moe_hf.trainer.step_trainer import StepTrainer


logger = logging.get_logger(__name__)

FINAL_FOLDER = "final"
LORA_SCOPE = "expert_lora"


class MoETrainer(StepTrainer, ResumableTrainer):
    """`transformers.Trainer` for MoE models: this package's, transformers' own, and their dense controls.

    What differs from `Trainer`:

    - `args.scope` freezes everything outside one part of the model before the optimizer is made (`scope_report`). With
      the scope `selected` checkpoints hold what trains (`expert_deltas.safetensors`), and `save_model` the whole model.
      With adapters of experts (the scope `expert_lora`, or `add_expert_lora` before) checkpoints hold these
      (`expert_lora.safetensors`), and `save_model` writes the whole model, merged, with the adapters beside it; the
      adapters alone where experts are sharded.
    - With adapters of PEFT checkpoints and `save_model` are PEFT's where these alone train. What else trains is never left
      out: checkpoints then hold all of it by name (`save_trained`), and `save_model` writes the whole model, merged.
    - Checkpoints appear whole, with a manifest of checksums, or not at all; resuming takes the newest one that is
      whole, says which, and loads every weight or refuses. `Trainer` loses the experts of a checkpoint that stores
      them one by one.
    - `save_model()` writes a new folder (`output_dir/final` by default), with the dtypes that the model came with.
    - A loss or a gradient that is not finite ends the run before the optimizer step, and is named (`check_finite`).
    - A run that names no `learning_rate` gets the one that was measured for the size of its model and its scope
      (`default_rate`), says so, and has it in its own `args`.
    - Router losses enter the loss once, per layer, weighted by labels, so that they do not change with accumulation, the
      number of processes, label smoothing, `compute_loss_func` or a fused head; also for the models of transformers,
      on by default with the model's own coefficient (`RouterLosses`).
    - Correction biases of the routers move after each optimizer step, and `balance_loss_scope="global_batch"` counts
      its micro-batches (`ExpertBalanceCallback`).
    - The load of the routers is in the training logs (`RoutingTelemetryCallback`).
    - Routers and experts may have a learning rate and a weight decay of their own, experts that saw no token may be left
      alone, and experts may have a dropout of their own: see `MoETrainingArguments`.

    Args:
        model (`PreTrainedModel`): the model to train.
        args (`MoETrainingArguments` or `TrainingArguments`): without a scope, the parameters that require gradients train.
        given_dtype (`torch.dtype`, *optional*): what `save_model` writes where the model was loaded in another dtype than
            its checkpoint has, as FSDP needs for float32 masters. By default each parameter's dtype.
        model_init (`Callable`, *optional*): makes a model instead, anew for each `train`, as `Trainer` takes it.
        kwargs: as `Trainer` takes them.
    """

    # Of the measured rate, where none is named: less where the objective moves a model faster than the loss of text.
    default_rate_share = 1.0

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *,
        given_dtype: torch.dtype | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        **kwargs,
    ) -> None:
        if args is None:
            args = MoETrainingArguments(output_dir="trainer_output")
        self._given_dtype, self.scope_report = given_dtype, None
        if (model is None) == (model_init is None):
            raise MoEError("MoETrainer needs a model or a model_init that makes one, and not both.")
        if model_init is not None:
            _refuse_made_in_shards(args)
            self.model_init = model_init
            set_seed(args.seed)
            model = StepTrainer.call_model_init(self)
        self._choose_what_trains(model, args)
        args.logging_nan_inf_filter = False
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        _make_dtypes_alike(model, args)
        if args.learning_rate is None:
            # The rate of this model is set in a copy: the arguments may be another run's too.
            args = copy.copy(args)
        super().__init__(model=model, args=args, **kwargs)
        self.model_init = model_init
        self.default_rate = self._default_rate()
        guard_saving(self._unwrapped())
        if self.scope_report is not None and self.is_world_process_zero():
            print(self.scope_report)

    def _default_rate(self) -> DefaultRate | None:
        """The rate of a run that names none, set in its arguments."""
        if self.args.learning_rate is not None:
            return None
        chosen = default_learning_rate(self.model, getattr(self.args, "scope", None), self.default_rate_share)
        self.args.learning_rate = chosen.rate
        return chosen

    def _choose_what_trains(self, model: PreTrainedModel, args: TrainingArguments) -> None:
        self._given_dtypes = {name: self._given_dtype or p.dtype for name, p in model.named_parameters()}
        if isinstance(args, MoETrainingArguments) and args.scope == LORA_SCOPE:
            layout = args.layout()
            if layout is not None and layout.tp_size > 1 and layout.ep_size == 1:
                raise MoEError(
                    "tp_size cuts each expert in pieces, which adapters do not follow. Use fsdp_size, or add ep_size."
                )
            if layout is not None and not is_sharded(model):
                # Adapters join experts that are spread over processes already.
                distribute(model, layout)
            add_expert_lora(model, _lora_config(args))
            self.scope_report = report_scope(model, LORA_SCOPE)
        elif isinstance(args, MoETrainingArguments) and args.scope is not None:
            _refuse_selected_in_shards(model, args)
            # DeepSpeed has masters of its own.
            master_dtype = torch.float32 if args.fp32_masters and args.deepspeed is None else None
            _refuse_late_masters(model, args, master_dtype)
            self.scope_report = apply_scope(
                model,
                args.scope,
                master_dtype=master_dtype,
                expert_selection=args.expert_selection,
                mlp_layers=args.mlp_layers,
            )
        _check_trainable(model)
        _choose_autocast(args, model, set(self._given_dtypes.values()))

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """As `Trainer.call_model_init`; what trains of the new model, and what follows its routers, is as before."""
        model = super().call_model_init(trial)
        self._choose_what_trains(model, self.args)
        self._wrapped_names = None
        self.follow(model)
        guard_saving(model)
        return model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train as `Trainer.train` does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint's folder, or `True` for the newest whole one;
                by default what `args` says.

        Raises:
            MoEError: nothing to resume from, a damaged checkpoint, or a fresh start among an earlier run's checkpoints.
        """
        if self.default_rate is not None and self.is_world_process_zero():
            print(self.default_rate)
        if resume_from_checkpoint is None:
            resume_from_checkpoint = resume_choice(self.args)
        checkpoint = self._agree(lambda: choose_checkpoint(self.args.output_dir, resume_from_checkpoint))
        if checkpoint is not None and self.is_world_process_zero():
            print(f"Resuming from {checkpoint}, whose manifest holds.")
        return super().train(checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model, code and tokenizer to a folder with a manifest, in the dtypes the model came with.

        Args:
            output_dir (`str`, *optional*): must not exist; `args.output_dir/final` by default. `args.output_dir` itself is
                allowed: the files go in beside the checkpoints, in the place of an earlier save.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        destination = output_dir or Path(self.args.output_dir) / FINAL_FOLDER
        with self._folder(destination) as folder, self._given_dtypes_restored():
            model, in_parts = self._unwrapped(), is_sharded(self.model)
            has_adapters = has_peft(model) or bool(lora_adapters(model))
            # Adapters of weights that are spread over processes, or quantized, are merged on a whole model, later.
            merges_later = has_adapters and (in_parts or experts_are_sharded(model) or has_stored(model))
            if merges_later or (lora_adapters(model) and not has_peft(model)):
                self._save_trained(folder)
            if in_parts and not has_adapters:
                self._save_gathered(folder)
            elif not merges_later:
                self._save_merged(folder)
            if self.args.should_save:
                tokenizer = self.processing_class
                card = model_card(inner_model(model), card_facts=self._card_facts(), tokenizer=tokenizer)
                card.save(folder / "README.md")
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """Push model, code, tokenizer and card in one commit (`moe_hf.hub.push_model`), from the main process.

        Args:
            blocking (`bool`): it always waits until the commit was compared; with False a `Future` that is done is returned.
            kwargs: as `push_model` takes them, and what `Trainer.push_to_hub` says on the card (`finetuned_from`,
                `language`, `license`, `tags`, `model_name`, `tasks`, `dataset_tags`, `dataset`, `dataset_args`).
        """
        facts, kwargs = take_card_arguments(kwargs, push_model)
        weights = self._weights_as_given() if is_sharded(self.model) else {}
        if not self.is_world_process_zero():
            return None
        at_hand = weights_at_hand(self._unwrapped(), weights)
        with self._given_dtypes_restored(), at_hand:
            commit = push_model(
                self._unwrapped(),
                self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
                self.processing_class if self.processing_class is not None else False,
                private=self.args.hub_private_repo if private is None else private,
                token=token or self.args.hub_token,
                commit_message=commit_message,
                revision=revision or self.args.hub_revision,
                **{"card_facts": self._card_facts(facts), **kwargs},
            )
        if blocking:
            return commit
        done = Future()
        done.set_result(commit)
        return done

    def _save_merged(self, folder: Path) -> None:
        """Write the model whole, or adapters of PEFT where these alone train."""
        model = self._unwrapped()
        with model_to_save(model) as saved:
            if saved is model:
                super().save_model(str(folder), _internal_call=True)
            elif self.args.should_save:
                saved.save_pretrained(folder)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)

    def _card_facts(self, given: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the card says about the run, once it has trained, and what else is given."""
        given = dict(given or {})
        found: dict[str, Any] = {"training": {}}
        if self.state.global_step > 0:
            found = run_facts(self.args.output_dir) | {"training": training_facts(vars(self.state), this_hardware())}
            if self.default_rate is not None:
                found["training"]["learning rate"] = str(self.default_rate).removeprefix("learning rate ")
        if "chat" not in given:
            found["chat"] = self._sample_chat()
        found["training"] |= given.pop("training", {})
        return {name: value for name, value in found.items() if value} | given

    def _sample_chat(self) -> list[dict[str, str]]:
        """What the model answers, for its card; nothing where this process has not all of it."""
        model = self._unwrapped()
        if is_sharded(self.model) or experts_are_sharded(model):
            return []
        try:
            return sample_chat(model, self.processing_class)
        except Exception as error:
            # A card without a chat is better than a model that is not saved.
            logger.warning(f"The card shows no chat, since the model could not be asked: {error}")
            return []

    def _weights_as_given(self) -> dict[str, torch.Tensor]:
        weights = self._whole_weights(copied=False)
        return {name: tensor.to(self._given_dtypes.get(name, tensor.dtype)) for name, tensor in weights.items()}

    def _save_gathered(self, folder: Path) -> None:
        weights = self._weights_as_given()
        if not self.args.should_save:
            return
        self._write_whole(weights, folder)
        # transformers writes the dtype of the parameters that the processes hold.
        file = folder / "config.json"
        config = json.loads(file.read_text("utf-8"))
        dtype = str(next(iter(self._given_dtypes.values()))).removeprefix("torch.")
        for part in (config, config.get("text_config")):
            if part is not None and "dtype" in part:
                part["dtype"] = dtype
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @contextmanager
    def _given_dtypes_restored(self) -> Iterator[None]:
        """Round float32 masters, for the time of a save, to the dtype that their parameter came with."""
        masters = {}
        if is_sharded(self.model):
            yield
            return
        for name, parameter in self._unwrapped().named_parameters():
            dtype = self._given_dtypes.get(name, parameter.dtype)
            if parameter.dtype != dtype:
                masters[parameter] = parameter.data
                parameter.data = parameter.data.to(dtype)
        try:
            yield
        finally:
            for parameter, data in masters.items():
                parameter.data = data


def _refuse_selected_in_shards(model: nn.Module, args: MoETrainingArguments) -> None:
    """Chosen experts are rows beside stacked tensors that each process must have whole."""
    in_shards = args.layout() or accelerate_shards(args) or args.deepspeed or is_sharded(model)
    if args.scope == "selected" and in_shards:
        raise MoEError(
            "The scope selected trains in one process or with DDP, not in shards. Leave fsdp_size, ep_size, tp_size and "
            "deepspeed out, or give the chosen experts adapters: scope expert_lora, with the same expert_selection."
        )


def _refuse_made_in_shards(args: TrainingArguments) -> None:
    """A layout is given to the one model that a trainer starts with."""
    layout = args.layout() if isinstance(args, MoETrainingArguments) else None
    if layout is not None or accelerate_shards(args) or args.deepspeed:
        raise MoEError(
            "model_init makes a new model for each run, in one process or with DDP, not in shards. Give the model itself, "
            "or leave fsdp_size, ep_size, tp_size and deepspeed out."
        )


def _refuse_late_masters(model: nn.Module, args: MoETrainingArguments, master_dtype: torch.dtype | None) -> None:
    """FSDP has fixed the dtype of what it sharded."""
    if master_dtype is None or not is_sharded(model):
        return
    names = set(scope_parameter_names(model, args.scope, args.mlp_layers))
    late = [name for name, p in model.named_parameters() if name in names and p.dtype != master_dtype]
    if late:
        raise MoEError(
            f"{late[0]!r} is sharded already and cannot become a float32 master. Load the model with dtype=torch.float32 "
            "and give MoETrainer given_dtype, the dtype to save in; or set fp32_masters=False."
        )


def _make_dtypes_alike(model: nn.Module, args: TrainingArguments) -> None:
    """FSDP gathers parameters of one dtype: beside float32 masters all become float32, before they are sharded."""
    layout = args.layout() if isinstance(args, MoETrainingArguments) else None
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if layout is not None and layout.dp_size > 1 and len(dtypes) > 1 and not is_sharded(model):
        model.float()
        logger.warning("FSDP shards parameters of one dtype: the frozen ones are float32 too, like the masters.")


def _lora_config(args: MoETrainingArguments) -> ExpertLoraConfig:
    return ExpertLoraConfig(
        r=args.expert_lora_r,
        alpha=args.expert_lora_alpha,
        dropout=args.expert_lora_dropout,
        experts=args.expert_selection,
        seed=args.seed,
    )


def _check_trainable(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise MoEError(f"No parameter of {type(model).__name__} requires gradients. Set a scope.")


def _choose_autocast(args: TrainingArguments, model: nn.Module, given: set[torch.dtype]) -> None:
    """Turn bf16 autocast on in `args` for float32 masters of a bf16 model: their products need one dtype."""
    has_masters = any(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    if not has_masters or torch.bfloat16 not in given or args.mixed_precision != "no" or args.deepspeed is not None:
        return
    args.bf16, args.mixed_precision = True, "bf16"
    logger.warning("Trained parameters are float32 masters of a bfloat16 model: bf16 autocast is on.")
