"""`ResumableTrainer`: wrapping, saving and resuming in every layout."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_map
from transformers import Trainer, TrainingArguments
from transformers.distributed.utils import gather_full_state_dict
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_lora import lora_adapters
from moe_hf.finetuning.trained_files import needs_parts, refuse_other_parts, save_trained
from moe_hf.trainer import optimizer_states
from moe_hf.trainer.checkpoint_writer import CheckpointWriter, Write, together
from moe_hf.trainer.checkpoints import (
    agree,
    load_part_,
    load_shards_,
    load_weights_,
    prepare_folder,
    publish,
    read_weights,
    saving_allowed,
    shared_folder,
    weights_at_hand,
)
from moe_hf.trainer.deepspeed import zero_stage
from moe_hf.trainer.layouts import check_launch, describe_layout, is_sharded, layout_of, place


logger = logging.get_logger(__name__)

TRAINING_ARGS_PICKLE = "training_args.bin"
TRAINER_STATE = "trainer_state.json"
SCHEDULER = "scheduler.pt"
RUN_FILE, PLACES = "layout.json", "adapter_places"


class ResumableTrainer(Trainer):
    """`Trainer` whose checkpoints are whole or absent, and are resumed in the layout that wrote them or in another one.

    In every layout a checkpoint has the whole model as `save_pretrained` writes it. The optimizer's state is one file, or
    a part per process where the model is sharded (`optimizer_states`).

    Args:
        model (`PreTrainedModel`): whole on each process, or loaded with `from_pretrained(distributed_config=...)`.
        args (`TrainingArguments`): with the fields of `MoETrainingArguments` that say a layout, or without.
        kwargs: as `Trainer` takes them.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs) -> None:
        check_launch(args.world_size)
        layout = args.layout() if hasattr(args, "layout") else None
        model = place(model, layout, args)
        self._writer = CheckpointWriter(background=getattr(args, "async_save", False))
        self._wrapped_names: tuple[str, ...] | None = None
        with saving_allowed(args) if is_sharded(model) else nullcontext():
            super().__init__(model=model, args=args, **kwargs)
        self._refuse_unsupported()
        self._tell_batches_apart()
        if self.is_deepspeed_enabled and any(not p.requires_grad for p in model.parameters()):
            # ZeRO-3 fails in the backward pass of a layer whose inputs need no gradient.
            model.enable_input_require_grads()

    def _refuse_unsupported(self) -> None:
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise MoEError("Accelerate's FSDP version 1 is not supported: set fsdp_version: 2, or fsdp_size.")
        asked, got = self.args.deepspeed is not None, self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if asked and not got:
            raise MoEError(
                "Accelerate starts no DeepSpeed here, on a CPU or with use_cpu. Leave deepspeed out, or use GPUs."
            )

    def train(self, *args, **kwargs):
        """As `Trainer.train`; when it returns, the checkpoints are on the disk."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._writer.wait()

    # --- wrapping ---

    def _build_accelerator_args(self, **kwargs):
        arguments = super()._build_accelerator_args(**kwargs)
        if layout_of(self.model) is not None:
            # Accelerate has no parallelism on a CPU, and transformers has done it already: what is left to say is which
            # processes share a batch.
            arguments.pop("parallelism_config", None)
        return arguments

    def _tell_batches_apart(self) -> None:
        """Let the processes of a tensor-parallel group read the same batches."""
        layout = layout_of(self.model)
        if layout is not None and layout.tp_size > 1:
            self.accelerator.state.device_mesh = init_device_mesh(
                self.args.device.type,
                (layout.dp_replicate_size, layout.fsdp_size, layout.tp_size),
                mesh_dim_names=("dp_replicate", "dp_shard", "tp"),
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer.create_optimizer`, without groups that have no parameter: torch cannot load their sharded state."""
        optimizer = super().create_optimizer(model)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader=None) -> nn.Module:
        names = tuple(name for name, p in self._unwrapped().named_parameters() if p.requires_grad)
        if training and self._wrapped_names not in (None, names):
            raise MoEError(
                "Parameters were frozen or freed after the model was wrapped and its optimizer made. Choose what trains "
                "first, and make a new trainer for another choice."
            )
        self._wrapped_names = names if training else self._wrapped_names
        return super()._wrap_model(model, training, dataloader)

    def evaluation_loop(self, *args, **kwargs):
        """As `Trainer.evaluation_loop`; a batch that several processes share counts once."""
        with self._one_of_each_batch():
            return super().evaluation_loop(*args, **kwargs)

    @contextmanager
    def _one_of_each_batch(self) -> Iterator[None]:
        layout, gather = layout_of(self.model), self.accelerator.gather
        if layout is None or layout.tp_size == 1:
            yield
            return

        def first_of_groups(tensors):
            return tree_map(
                lambda t: t.unflatten(0, (-1, layout.tp_size, len(t) // self.args.world_size))[:, 0].flatten(0, 1),
                gather(tensors),
            )

        self.accelerator.gather = first_of_groups
        try:
            yield
        finally:
            self.accelerator.gather = gather

    # --- saving ---

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        self._writer.wait()
        self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best_step = self.state.best_global_step
        if best_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{best_step}"
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        # A folder of this name is a damaged checkpoint that resuming skipped.
        staging = self._agree(lambda: prepare_folder(final, replace=True))
        writes = [self._weights_write(staging), self._optimizer_write(staging)]
        try:
            together(partial(self._write_small_files, staging))
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        best_model = self.state.best_model_checkpoint
        self._writer.run(writes, staging, partial(self._publish, staging, final, best_model))

    def _publish(self, staging: Path, final: Path, best_model: str | None) -> None:
        publish(staging, final, replace=True)
        rotate_checkpoints(
            output_dir=str(final.parent),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=best_model,
            use_mtime=True,
        )

    def _weights_write(self, folder: Path) -> Write:
        """What writes the model, from weights that later steps do not change where that happens beside them."""
        if zero_stage(self.args) < 3 and needs_parts(self._unwrapped()):
            # Mostly small: written in step with training.
            together(partial(self._save_trained, folder))
            return lambda group: None
        if not (is_sharded(self.model) or self._writer.background):
            return lambda group: self.save_model(str(folder), _internal_call=True)
        weights = self._whole_weights(copied=self._writer.background)
        return lambda group: self._write_whole(weights, folder) if self.args.should_save else None

    def _save_trained(self, folder: Path) -> None:
        """Write what trains alone, and the tokenizer; all processes call it."""
        save_trained(self._unwrapped(), folder)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _optimizer_write(self, folder: Path) -> Write:
        """What writes the optimizer's state, likewise."""
        if self.args.save_only_model:
            return lambda group: None
        if self.is_deepspeed_enabled:
            return lambda group: self._save_optimizer_and_scheduler(str(folder))
        model, optimizer, background = self._unwrapped(), self._own_optimizer(), self._writer.background
        if is_sharded(model):
            state = optimizer_states.sharded_state(model, optimizer, copied=background)
            return lambda group: optimizer_states.write_sharded(state, folder, group)
        if not self.args.should_save:
            return lambda group: None
        state = optimizer.state_dict()
        state = optimizer_states.copies(state) if background else state
        return lambda group: torch.save(state, folder / optimizer_states.WHOLE)

    def _write_small_files(self, folder: Path) -> None:
        """Write everything but the weights and the optimizer's state."""
        is_main = self.args.should_save
        if not self.args.save_only_model:
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            if is_main and not self.is_deepspeed_enabled:
                names = optimizer_states.parameter_names(self._unwrapped(), self._own_optimizer())
                optimizer_states.write_names(names, folder)
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)
        if is_main:
            self._record_callback_states()
            self.state.save_to_json(str(folder / TRAINER_STATE))
            run = {"layout": self._layout_words(), "global_batch_size": self._global_batch_size()}
            run |= {PLACES: self._adapter_places()}
            (folder / RUN_FILE).write_text(json.dumps(run) + "\n", encoding="utf-8")

    def _whole_weights(self, *, copied: bool) -> dict[str, torch.Tensor]:
        """All weights on the main process, nothing on the others."""
        if is_sharded(self.model):
            weights = gather_full_state_dict(self._unwrapped())
        else:
            weights = self._unwrapped().state_dict() if self.args.should_save else {}
        return optimizer_states.copies(weights) if copied else weights

    def _write_whole(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write model, code and tokenizer from the main process alone."""
        with weights_at_hand(self._unwrapped(), weights):
            self._save(str(folder), state_dict=weights)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        # A pickle of local paths and settings that nothing reads again.
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_PICKLE).unlink(missing_ok=True)

    def _record_callback_states(self) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if not isinstance(callback, ExportableState):
                continue
            name, state = type(callback).__name__, callback.state()
            if isinstance(self.state.stateful_callbacks[name], list):
                self.state.stateful_callbacks[name].append(state)
            else:
                self.state.stateful_callbacks[name] = state

    # --- resuming ---

    def _run_epoch(self, *args, **kwargs) -> None:
        # Trainer looks at max_steps after a step only: a run resumed at its end would train one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._reads_checkpoints():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self._load_whole(resume_from_checkpoint)
        self._compare_runs(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._writer.wait()
        if not self._reads_checkpoints():
            super()._load_best_model()
            return
        best = self.state.best_model_checkpoint
        logger.info(f"Loading the best model from {best} (score: {self.state.best_metric}).")
        self._load_whole(best)

    def _load_whole(self, folder: str) -> None:
        model = self._unwrapped()
        refuse_other_parts(model, folder)
        if load_part_(model, folder):
            return
        if layout_of(model) is not None:
            load_shards_(model, folder)
        elif is_sharded(model):
            weights = read_weights(model, folder).state_dict() if self.args.process_index == 0 else {}
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(model, weights, options=options)
        else:
            load_weights_(model, folder)

    def _reads_checkpoints(self) -> bool:
        """Whether a checkpoint is read here; DeepSpeed reads its own."""
        return not self.is_deepspeed_enabled

    def _compare_runs(self, folder: Path) -> None:
        """Say it where this run is spread in another way than the one that is resumed."""
        if not (folder / RUN_FILE).is_file() or not self.is_world_process_zero():
            return
        then = json.loads((folder / RUN_FILE).read_text("utf-8"))
        now = self._layout_words()
        if then["layout"] != now:
            print(f"Saved in another layout: {then['layout']}; this run has {now}.")
        if then["global_batch_size"] != self._global_batch_size():
            logger.warning(
                f"A step of the saved run had {then['global_batch_size']} rows, and one of this run has "
                f"{self._global_batch_size()}: rows may be skipped or seen twice. Change per_device_train_batch_size or "
                "gradient_accumulation_steps to keep their product with the number of batches."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder, model = Path(checkpoint), self._unwrapped()
        self._check_adapter_places(folder)
        optimizer_states.load_state_(model, self._own_optimizer(), folder, sharded=is_sharded(model))
        state, groups = torch.load(folder / SCHEDULER, weights_only=True), self._own_optimizer().param_groups
        if len(state.get("base_lrs", groups)) != len(groups):
            # Another layout has its parameters in another number of groups; their rates came with the optimizer.
            state |= {"base_lrs": [group["initial_lr"] for group in groups], "lr_lambdas": [None] * len(groups)}
            state |= {"_last_lr": [group["lr"] for group in groups]}
        self.lr_scheduler.load_state_dict(state)

    def _adapter_places(self) -> dict[str, list[int | None]]:
        return {name: list(adapter.places) for name, adapter in lora_adapters(self._unwrapped()).items()}

    def _check_adapter_places(self, folder: Path) -> None:
        """The moments of adapters are found by their rows, whereas files of adapters have them by expert."""
        saved = json.loads((folder / RUN_FILE).read_text("utf-8")) if (folder / RUN_FILE).is_file() else {}
        if saved.get(PLACES, own := self._adapter_places()) != own:
            raise MoEError(
                f"{folder} has adapters of chosen experts in other places ({saved['layout']}): each process has as many as "
                "the fullest needs. Resume with the ep_size of that run, or adapt all experts."
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As in `Trainer`; with another number of processes each takes the state of one that was."""
        if checkpoint is None:
            return
        files = sorted(Path(checkpoint).glob("rng_state*.pth"), key=lambda path: (len(path.name), path.name))
        name = "rng_state.pth" if self.args.world_size <= 1 else f"rng_state_{self.args.process_index}.pth"
        if not files or (Path(checkpoint) / name).is_file():
            super()._load_rng_state(checkpoint)
            return
        if self.is_world_process_zero():
            logger.warning(
                f"{checkpoint} was saved by {len(files)} process(es), and {self.args.world_size} resume it: random "
                "numbers (dropout, noise of routers) go on from those states, in other places."
            )
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(files[self.args.process_index % len(files)], Path(folder) / name)
            super()._load_rng_state(folder)

    # --- what both need ---

    def _agree(self, action):
        return agree(action, self.is_world_process_zero(), self.accelerator.num_processes)

    def _folder(self, path: str | Path):
        main, count = self.is_world_process_zero(), self.accelerator.num_processes
        beside = Path(path).absolute() == Path(self.args.output_dir).absolute()
        return shared_folder(path, is_main=main, num_processes=count, beside=beside)

    def _unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _own_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _layout_words(self) -> str:
        if self.is_deepspeed_enabled:
            return f"DeepSpeed over {self.args.world_size} processes"
        if self.is_fsdp_enabled:
            return f"FSDP2 of accelerate over {self.args.world_size} processes"
        return describe_layout(layout_of(self._unwrapped()), self.args.world_size)

    def _global_batch_size(self) -> int:
        return self.get_total_train_batch_size(self.args)
