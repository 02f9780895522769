"""The runs of a comparison, one after another, each recorded when it is finished: before, sweep, seeds, report.

A sweep tries each rate for a third of the steps with the first seed, schedule and all: a comparison then costs about twice what its
two models cost, where whole runs would cost four times as much. Short runs like rates that are a little higher, in both
arms alike.
"""

import gc
import shutil
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from moe_hf.finetuning.moe_blocks import find_moe_blocks
from moe_hf.finetuning.scopes import layer_of
from moe_hf.inspection import inspect_model, training_flops
from moe_hf.trainer.arguments import ModelArguments, MoETrainingArguments
from moe_hf.trainer.checkpoints import resume_choice
from moe_hf.trainer.comparison.arms import (
    CONTROL,
    OURS,
    Arm,
    ComparisonArguments,
    at_rate,
    control_arm,
    of_layers,
    our_arm,
)
from moe_hf.trainer.comparison.progress import Run, progress_line
from moe_hf.trainer.comparison.record import COMPARISON_FILE, Record, settings_of, write_json
from moe_hf.trainer.comparison.report import Metrics, mean_loss, print_summary, summary
from moe_hf.trainer.fair_comparison import choose_rate, rate_beyond
from moe_hf.trainer.guard import NotFiniteError
from moe_hf.trainer.moe_trainer import FINAL_FOLDER, MoETrainer


SWEEP_SHARE = 1 / 3
SWEEP_FOLDER = "sweep"
# So often a sweep goes on beyond its edge where the best rate lies: with three rates to 30 times the middle one, or a 30th.
MOST_BEYOND = 2

Make = Callable[[ModelArguments, MoETrainingArguments], MoETrainer]
Measure = Callable[[MoETrainer], Metrics]


def train_beside_control(
    model_args: ModelArguments,
    comparison: ComparisonArguments,
    training_args: MoETrainingArguments,
    make: Make,
    measure: Measure,
    data_args: Any,
) -> None:
    """Train a model, and, where `comparison.control` names a dense one, that too, as fairly as `comparison` says.

    Without a control the model is trained, measured and saved to `output_dir/final`. With one, both are measured before,
    tried at several rates, trained with each seed at the best one, and measured again; what was found is printed and
    written to `output_dir/comparison.json`. The models of the first seed are kept, in `output_dir/final` and
    `output_dir/control/final`. The same call goes on after a kill.

    Args:
        make: loads the model that arguments name and makes its trainer, which evaluates on the text that rates are chosen on.
        measure: evaluates the model of a trainer on the text that is reported, with metrics named `eval_...`.
        data_args: the arguments of the data, which the comparison must go on with.

    Raises:
        MoEError: a control that is not known, a scope that a dense model has not, or a layout that it cannot have; before
            anything is trained.
    """
    if comparison.control is None:
        trainer = make(model_args, training_args)
        trainer.train(resume_from_checkpoint=resume_choice(training_args))
        _save(trainer, measure(trainer))
        return
    ours = our_arm(model_args, training_args)
    control = control_arm(model_args, comparison, training_args)
    rows = _rows_per_step(training_args)
    record = Record(
        Path(training_args.output_dir),
        settings_of(model_args, comparison, data_args, training_args, rows_per_step=rows),
        is_main=training_args.process_index == 0,
        num_processes=training_args.world_size,
    )
    _Comparison(ours, control, comparison, record, make, measure).run()


class _Comparison:
    """The stages in their order; what is recorded is not done again."""

    def __init__(
        self,
        ours: Arm,
        control: Arm,
        comparison: ComparisonArguments,
        record: Record,
        make: Make,
        measure: Measure,
    ) -> None:
        self.arms = {OURS: ours, CONTROL: control}
        self.comparison, self.record, self.make, self.measure = comparison, record, make, measure
        self.folder = Path(ours.training_args.output_dir)
        self.is_main = ours.training_args.process_index == 0
        # Known once the models are: where no rate is named, it is that of their size.
        self.sweeps: dict[str, list[Run]] = {}
        self.seeds = [
            Run(f"seed {seed}, {name}", name, None, seed)
            for seed in range(comparison.comparison_seeds)
            for name in self.arms
        ]

    def run(self) -> None:
        """All stages that are left, and the report."""
        before = {OURS: self._before(OURS)}
        self.arms[CONTROL] = of_layers(self.arms[CONTROL], before[OURS]["moe_layers"])
        before[CONTROL] = self._before(CONTROL)
        count = self.comparison.rates_per_arm()
        for name in self.arms:
            self.arms[name] = at_rate(self.arms[name], before[name]["learning_rate"])
            self.sweeps[name] = [_trial(name, rate) for rate in self.arms[name].rates(count)] if count else []
        chosen = {name: self._choose(name) for name in self.arms}
        self.seeds = [Run(r.name, r.arm, chosen[r.arm]["learning_rate"], r.seed) for r in self.seeds]
        for run in self.seeds:
            self._train(run)
        args = self.arms[OURS].training_args
        found = {name: before[name] | chosen[name] | self._trained(name) for name in self.arms}
        seeds = [args.seed + seed for seed in range(self.comparison.comparison_seeds)]
        chooses = self.comparison.chooses(args)
        reported_on = "the test half of the held-out text, on which nothing was chosen" if chooses else "held-out text"
        result = summary(found, seeds, reported_on)
        if self.is_main:
            print_summary(result)
        self.record.on_main(lambda: write_json(result, self.folder / COMPARISON_FILE))

    def _before(self, name: str) -> dict[str, Any]:
        """Metrics of an arm before training, and what it is."""
        stage = f"before, {name}"
        if stage in self.record.finished:
            return self.record.finished[stage]
        arm = self.arms[name]
        model_args, args = arm.run(self.folder / arm.folder, arm.training_args.learning_rate)
        set_seed(args.seed)
        trainer = self.make(model_args, args)
        facts, scope = inspect_model(trainer.model), trainer.scope_report
        layers = {layer_of(block) for block in find_moe_blocks(trainer.model)}
        result = {
            # DeepSpeed evaluates what it has trained.
            "before": None if trainer.is_deepspeed_enabled else self.measure(trainer),
            "learning_rate": trainer.args.learning_rate,
            "trained": "the parameters that required gradients" if scope is None else str(scope),
            "moe_layers": sorted(layer for layer in layers if layer is not None),
            "total_parameters": facts.total_parameters if scope is None else scope.total_parameters,
            "active_parameters": facts.active_parameters,
        }
        result = self.record.add(stage, lambda: result)
        del trainer
        _free_memory()
        return result

    def _choose(self, name: str) -> dict[str, Any]:
        """The rate of an arm, by the loss on the validation half after a third of the steps at each that is tried."""
        if not self.sweeps[name]:
            rate = self.arms[name].training_args.learning_rate
            return {"learning_rate": rate, "sweep": {}, "rate_at_edge": False}
        losses = {run.rate: self._try(run) for run in self.sweeps[name]}
        best, at_edge = choose_rate(losses)
        for _ in range(MOST_BEYOND):
            if not at_edge:
                break
            run = _trial(name, rate_beyond(list(losses), best))
            self.sweeps[name].append(run)
            losses[run.rate] = self._try(run)
            best, at_edge = choose_rate(losses)
        tried = {f"{rate:g}": None if loss == inf else loss for rate, loss in sorted(losses.items())}
        return {"learning_rate": best, "sweep": tried, "rate_at_edge": at_edge}

    def _try(self, run: Run) -> float:
        """The loss on the validation half after a run of the sweep; infinite where it diverged."""
        folder = self.folder / SWEEP_FOLDER / f"{run.arm.replace(' ', '-')}-{run.rate:g}"
        if run.name not in self.record.finished:
            self._say(run)
            start = time.monotonic()
            try:
                trainer = self._run(run, folder)
                loss = mean_loss(trainer.evaluate())
                del trainer
            except NotFiniteError as error:
                self._print(f"It diverged. {error}")
                loss = inf
            self.record.add(run.name, lambda: {"loss": loss, "seconds": time.monotonic() - start})
        self._remove(folder)
        loss = self.record.finished[run.name]["loss"]
        return inf if loss is None else loss

    def _train(self, run: Run) -> None:
        """A run whose model is measured; that of the first seed is kept."""
        arm, is_kept = self.arms[run.arm], run.seed == 0
        folder = self.folder / (arm.folder if is_kept else f"seed-{run.seed}/{arm.folder}")
        is_recorded = run.name in self.record.finished
        if is_recorded and not is_kept:
            self._remove(folder)
            return
        if is_recorded and self.record.on_main((folder / FINAL_FOLDER).exists):
            return
        self._say(run)
        start = time.monotonic()
        trainer = self._run(run, folder)
        if not is_recorded:
            metrics = self.measure(trainer)
            found = {"metrics": metrics, **_costs(trainer), "seconds": time.monotonic() - start}
            self.record.add(run.name, lambda: found)
        if is_kept:
            # After the record: a model that is there has been measured.
            _save(trainer, self.record.finished[run.name]["metrics"])
        del trainer
        _free_memory()
        if not is_kept:
            self._remove(folder)

    def _run(self, run: Run, folder: Path) -> MoETrainer:
        _free_memory()
        model_args, args = self.arms[run.arm].run(folder, run.rate, run.seed, share=run.share)
        if args.include_num_input_tokens_seen == "no":
            args.include_num_input_tokens_seen = "non_padding"
        args.push_to_hub = args.push_to_hub and run.share == 1 and run.seed == 0
        set_seed(args.seed)
        trainer = self.make(model_args, args)
        trainer.train(resume_from_checkpoint=resume_choice(args))
        return trainer

    def _trained(self, name: str) -> dict[str, Any]:
        found = [self.record.finished[run.name] for run in self.seeds if run.arm == name]
        costs = {key: found[0][key] for key in ("trained_parameters", "training_tokens", "training_flops")}
        return {"per_seed": [one["metrics"] for one in found], **costs}

    def _say(self, run: Run) -> None:
        runs = [*self.sweeps[OURS], *self.sweeps[CONTROL], *self.seeds]
        self._print(progress_line(run, runs, self.record.finished))

    def _print(self, line: str) -> None:
        if self.is_main:
            print(line, flush=True)

    def _remove(self, folder: Path) -> None:
        """Nobody asks for the checkpoints of a run that was measured and is not kept."""

        def remove() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            if folder.parent != self.folder and folder.parent.is_dir() and not any(folder.parent.iterdir()):
                folder.parent.rmdir()

        self.record.on_main(remove)


def _trial(name: str, rate: float) -> Run:
    return Run(f"sweep, {name}, {rate:g}", name, rate, share=SWEEP_SHARE)


def _rows_per_step(args: MoETrainingArguments) -> int:
    layout = args.layout()
    groups = args.world_size // (1 if layout is None else layout.tp_size)
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * groups


def _costs(trainer: MoETrainer) -> dict[str, float]:
    """What a run took: parameters that trained, tokens without padding, FLOPs of these."""
    args, state = trainer.args, trainer.state
    rows = trainer.get_total_train_batch_size(args)
    # Processes that share rows count them each.
    times = args.train_batch_size * args.gradient_accumulation_steps * args.world_size / rows
    tokens = state.num_input_tokens_seen / times
    per_token = training_flops(trainer.model, tokens / max(1, state.global_step * rows))
    return {
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "training_tokens": round(tokens),
        "training_flops": tokens * per_token,
    }


def _save(trainer: MoETrainer, metrics: Metrics) -> None:
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics, combined=False)
    trainer.save_state()
    trainer.save_model()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
