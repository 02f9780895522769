"""`MoETrainer`: transformers' Trainer with checkpoints that can be trusted and losses that a MoE needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_deltas import DELTAS_NAME, save_expert_deltas
from moe_hf.finetuning.expert_lora import add_expert_lora, lora_adapters, merge_expert_lora, unmerge_expert_lora
from moe_hf.finetuning.lora_config import ExpertLoraConfig
from moe_hf.finetuning.lora_files import LORA_NAME, save_expert_lora
from moe_hf.finetuning.lora_sharding import is_sharded
from moe_hf.finetuning.scopes import ScopeReport, apply_scope, report_scope
from moe_hf.hub import push_model
from moe_hf.kernels import has_stored
from moe_hf.reporting.card import model_card
from moe_hf.trainer.arguments import MoETrainingArguments
from moe_hf.trainer.checkpoints import agree, choose_checkpoint, load_weights_, shared_folder
from moe_hf.trainer.step_trainer import StepTrainer


logger = logging.get_logger(__name__)

FINAL_FOLDER = "final"
LORA_SCOPE = "expert_lora"
TRAINING_ARGS_PICKLE = "training_args.bin"
TRAINER_STATE = "trainer_state.json"


class MoETrainer(StepTrainer):
    """`transformers.Trainer` for MoE models: this package's, transformers' own, and their dense controls.

    What differs from `Trainer`:

    - `args.scope` freezes everything outside one part of the model before the optimizer is made (`scope_report`). With
      the scope `selected` checkpoints hold what trains (`expert_deltas.safetensors`), and `save_model` the whole model.
      With adapters of experts (the scope `expert_lora`, or `add_expert_lora` before) checkpoints hold these
      (`expert_lora.safetensors`), and `save_model` writes the whole model, merged, with the adapters beside it; the
      adapters alone where experts are sharded.
    - Checkpoints appear whole, with a manifest of checksums, or not at all; resuming takes the newest one that is
      whole, says which, and loads every weight or refuses. `Trainer` loses the experts of a checkpoint that stores
      them one by one.
    - `save_model()` writes a new folder (`output_dir/final` by default), with the dtypes that the model came with.
    - A loss or a gradient that is not finite ends the run before the optimizer step, and is named (`check_finite`).
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
        kwargs: as `Trainer` takes them.
    """

    def __init__(self, model: PreTrainedModel, args: TrainingArguments | None = None, **kwargs) -> None:
        if args is None:
            args = MoETrainingArguments(output_dir="trainer_output")
        self._given_dtypes = {name: p.dtype for name, p in model.named_parameters()}
        self.scope_report: ScopeReport | None = None
        if isinstance(args, MoETrainingArguments) and args.scope == LORA_SCOPE:
            add_expert_lora(model, _lora_config(args))
            self.scope_report = report_scope(model, LORA_SCOPE)
        elif isinstance(args, MoETrainingArguments) and args.scope is not None:
            master_dtype = torch.float32 if args.fp32_masters else None
            self.scope_report = apply_scope(
                model, args.scope, master_dtype=master_dtype, expert_selection=args.expert_selection
            )
        _check_trainable(model)
        _choose_autocast(args, model, set(self._given_dtypes.values()))
        args.logging_nan_inf_filter = False
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        super().__init__(model=model, args=args, **kwargs)
        if self._trains_selected() and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise MoEError("The scope selected trains in one process or with DDP, not with FSDP or DeepSpeed.")
        if self.scope_report is not None and self.is_world_process_zero():
            print(self.scope_report)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train as `Trainer.train` does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint's folder, or `True` for the newest whole one.

        Raises:
            MoEError: nothing to resume from, a damaged checkpoint, or a fresh start among an earlier run's checkpoints.
        """
        checkpoint = self._agree(lambda: choose_checkpoint(self.args.output_dir, resume_from_checkpoint))
        if checkpoint is not None and self.is_world_process_zero():
            print(f"Resuming from {checkpoint}, whose manifest holds.")
        return super().train(checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write model, code and tokenizer to a new folder with a manifest, in the dtypes the model came with.

        Args:
            output_dir (`str`, *optional*): must not exist; `args.output_dir/final` by default.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        destination = output_dir or Path(self.args.output_dir) / FINAL_FOLDER
        with self._folder(destination) as folder, self._given_dtypes_restored():
            has_adapters = bool(lora_adapters(self._unwrapped()))
            if has_adapters:
                self._save_lora(folder)
            # Adapters of experts that are spread over processes, or quantized, are merged on a whole model, later.
            if not (has_adapters and (is_sharded(self._unwrapped()) or has_stored(self._unwrapped()))):
                with self._adapters_merged():
                    super().save_model(str(folder), _internal_call=True)
            if self.args.should_save:
                card = model_card(self._unwrapped(), has_tokenizer=self.processing_class is not None)
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
    ) -> CommitInfo | None:
        """Push model, code, tokenizer and card in one commit (`moe_hf.hub.push_model`), from the main process.

        Args:
            kwargs: as `push_model` takes them.
        """
        if not self.is_world_process_zero():
            return None
        with self._given_dtypes_restored(), self._adapters_merged():
            return push_model(
                self._unwrapped(),
                self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
                self.processing_class if self.processing_class is not None else False,
                private=self.args.hub_private_repo if private is None else private,
                token=token or self.args.hub_token,
                commit_message=commit_message,
                revision=revision or self.args.hub_revision,
                **kwargs,
            )

    def _agree(self, action):
        return agree(action, self.is_world_process_zero(), self.accelerator.num_processes)

    def _folder(self, path: str | Path, replace: bool = False):
        return shared_folder(
            path,
            is_main=self.is_world_process_zero(),
            num_processes=self.accelerator.num_processes,
            replace=replace,
        )

    def _unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @contextmanager
    def _given_dtypes_restored(self) -> Iterator[None]:
        """Round float32 masters, for the time of a save, to the dtype that their parameter came with."""
        masters = {}
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

    @contextmanager
    def _adapters_merged(self) -> Iterator[None]:
        """Add adapters of experts to the weights, for the time of a save."""
        model = self._unwrapped()
        if not lora_adapters(model):
            yield
            return
        merge_expert_lora(model)
        try:
            yield
        finally:
            unmerge_expert_lora(model)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        # A pickle of local paths and settings that nothing reads again.
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_PICKLE).unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best_step = self.state.best_global_step
        if best_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{best_step}"
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        # A folder of this name is a damaged checkpoint that resuming skipped.
        with self._folder(final, replace=True) as folder:
            if self._trains_selected():
                self._save_deltas(folder)
            elif lora_adapters(self._unwrapped()):
                self._save_lora(folder)
            else:
                self.save_model(str(folder), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
            if self.args.should_save:
                self._record_callback_states()
                self.state.save_to_json(str(folder / TRAINER_STATE))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _trains_selected(self) -> bool:
        return self.scope_report is not None and self.scope_report.scope == "selected"

    def _save_deltas(self, folder: Path) -> None:
        if self.args.should_save:
            save_expert_deltas(self._unwrapped(), folder / DELTAS_NAME)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _save_lora(self, folder: Path) -> None:
        # Every process takes part: adapters of other processes' experts are gathered.
        save_expert_lora(self._unwrapped(), folder)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _record_callback_states(self) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if not isinstance(callback, ExportableState):
                continue
            name, state = type(callback).__name__, callback.state()
            if isinstance(self.state.stateful_callbacks[name], list):
                self.state.stateful_callbacks[name].append(state)
            else:
                self.state.stateful_callbacks[name] = state

    def _run_epoch(self, *args, **kwargs) -> None:
        # Trainer looks at max_steps after a step only: a run resumed at its end would train one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._loads_whole():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if (Path(resume_from_checkpoint) / DELTAS_NAME).is_file() != self._trains_selected():
            other = "another scope than selected" if self._trains_selected() else "the scope selected"
            raise MoEError(f"{resume_from_checkpoint} is of a run with {other}. Resume with the scope that it had.")
        if (Path(resume_from_checkpoint) / LORA_NAME).is_file() != bool(lora_adapters(self._unwrapped())):
            other = "without" if lora_adapters(self._unwrapped()) else "with"
            raise MoEError(f"{resume_from_checkpoint} is of a run {other} adapters of experts. Resume as it was.")
        load_weights_(self._unwrapped(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not self._loads_whole():
            super()._load_best_model()
            return
        best = self.state.best_model_checkpoint
        logger.info(f"Loading the best model from {best} (score: {self.state.best_metric}).")
        load_weights_(self._unwrapped(), best)

    def _loads_whole(self) -> bool:
        """Whether checkpoints hold a full model in `save_pretrained`'s form; FSDP, DeepSpeed and PEFT have their own."""
        return isinstance(self._unwrapped(), PreTrainedModel) and not (
            self.is_fsdp_enabled or self.is_deepspeed_enabled
        )


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
    if not has_masters or torch.bfloat16 not in given or args.mixed_precision != "no":
        return
    args.bf16, args.mixed_precision = True, "bf16"
    logger.warning("Trained parameters are float32 masters of a bfloat16 model: bf16 autocast is on.")
