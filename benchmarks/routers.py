"""What each router does to a small upcycled model: loss, load, what it drops, time, all beside plain top-k.

    python -m benchmarks.routers --out DIR                        # three seeds, all routers
    python -m benchmarks.routers --out DIR --seeds 5              # two seeds more; what is finished is kept
    python -m benchmarks.routers --out DIR --arms switch,top_p    # some of them, and plain top-k
    python -m benchmarks.routers --out DIR --steps 1000 --hidden-size 128 --intermediate-size 512 --layers 4

Each run is a folder of DIR with one JSON; a run that was stopped is done again, a finished one is read. `results.json`,
`table.md` and `routers.png` are made from all runs at the end. Time is measured with the threads that torch has: set
OMP_NUM_THREADS=1 for one.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.router_arms import REFERENCE, Arm, router_arms, start_model
from benchmarks.routers_report import markdown_table, routers_plot
from benchmarks.routing_measures import (
    LoadRecorder,
    calibrate,
    choices_that_differ,
    forward_flops,
    router_change,
    router_parameters,
    time_ratio,
    update_routers,
)
from benchmarks.runs import run_study, write_results
from benchmarks.study import Settings, Study, parse_study, study_parser
from moe_hf.data import builtin_corpus


DEFAULTS = Settings(steps=200, parent_steps=800, hidden_size=64, intermediate_size=256, evaluations=2)
TASKS = {"code": 0, "prose": 1}
# The last part of a run over which the load is taken, the turns in which steps are timed, and the held-out rows of each
# domain on which choices are compared.
LOAD_SHARE, ROUNDS, COMPARED_ROWS = 0.25, 5, 8


class RouterStudy(Study):
    """The study of routers. Text has the id of its domain, for the routers that read it."""

    def __init__(self, settings: Settings, output_dir: Path, arms: list[str], seeds: int) -> None:
        super().__init__(settings, output_dir, list(dict.fromkeys([REFERENCE, *arms])), seeds)
        self.table = router_arms(settings)
        self.recorder: LoadRecorder | None = None

    def title(self, name: str) -> str:
        """An arm's title."""
        return self.table[name].title

    def documents(self) -> datasets.Dataset:
        """The built-in corpus, with a task per domain."""
        text = builtin_corpus()
        return text.add_column("task_ids", [TASKS[domain] for domain in text["domain"]])

    def is_decayed(self, name: str, parameter: torch.Tensor) -> bool:
        """As in all studies, but not the routers: what moves them is what they learn."""
        return super().is_decayed(name, parameter) and ".gate." not in name

    def after_step(self, model: PreTrainedModel, steps_left: int) -> None:
        """Let routers follow the load, and record it towards the end."""
        update_routers(model)
        if self.recorder is not None:
            self.recorder.is_on = steps_left <= LOAD_SHARE * self.settings.steps

    def rows(self, seed: int, first_step: int, steps: int, reads_task: bool = False) -> datasets.Dataset:
        """The text of some steps."""
        return _for_arm(super().rows(seed, first_step, steps), reads_task)

    def held_out(self, reads_task: bool = False) -> dict[str, datasets.Dataset]:
        """Held-out rows by domain."""
        return {domain: _for_arm(rows, reads_task) for domain, rows in super().held_out().items()}

    def run_arm(self, name: str, parent: dict[str, Any], seed: int) -> dict[str, Any]:
        """Train one router from the parent of a seed, and measure it beside the reference of that seed."""
        arm = self.table[name]

        def build(folder: Path) -> dict[str, Any]:
            dense = AutoModelForCausalLM.from_pretrained(self.stages.folder(f"seed{seed}/parent"), dtype=torch.float32)
            model = start_model(arm, dense, seed)
            rows = self.rows(seed, self.settings.parent_steps, self.settings.steps, arm.reads_task)
            sums = calibrate(model, rows[: self.settings.batch_size])
            before = router_parameters(model)
            self.recorder = LoadRecorder(model) if arm.fields is not None else None
            # Noise and drawn gates are the seed's, whatever was run before.
            torch.manual_seed(seed)
            points = self.train(
                f"seed {seed}, {name}", model, rows, self.held_out(arm.reads_task), self.settings.learning_rate
            )
            result = {"points": points, "parameters": sum(parameter.numel() for parameter in model.parameters())}
            experts = 0.0
            if self.recorder is not None:
                result["routing"], self.recorder = self.recorder.result(), None
                result["weight_sums_at_start"] = sums
                result["router_change"] = router_change(before, router_parameters(model))
                experts = result["routing"]["experts_per_token"]
            if name == REFERENCE:
                model.save_pretrained(folder / "model")
            result["flops_per_token"] = forward_flops(model, self.settings.block_size, experts)
            result["is_causal"] = arm.is_causal
            where = folder / "model" if name == REFERENCE else self.stages.folder(f"seed{seed}/{REFERENCE}/model")
            return result | self._beside(arm, model, AutoModelForCausalLM.from_pretrained(where), seed)

        described = {key: value for key, value in asdict(arm).items() if key not in ("title", "changes")}
        shared = asdict(self.settings) | described | {"parent": parent["settings"]}
        return self.stages.run(f"seed{seed}/{name}", shared, build)

    def _beside(self, arm: Arm, model: PreTrainedModel, reference: PreTrainedModel, seed: int) -> dict[str, Any]:
        """Choices and time of a trained arm beside those of the trained reference."""
        result = {}
        if arm.fields is not None:
            has_same_experts = arm.init == "copy" and not arm.new_experts
            texts = [rows[:COMPARED_ROWS] for rows in self.held_out(arm.reads_task).values()]
            torch.manual_seed(seed)
            result["differs"] = choices_that_differ(model, reference if has_same_experts else None, texts)
        # Rows that both have trained on: their steps change nothing that is measured after them.
        timed = [
            (one, self.optimizer(one, 1e-6), self.rows(seed, self.settings.parent_steps, 1, reads_task)[:])
            for one, reads_task in ((reference, False), (model, arm.reads_task))
        ]
        return result | {"time_ratio": time_ratio(timed, ROUNDS)}


def _for_arm(rows: datasets.Dataset, reads_task: bool) -> datasets.Dataset:
    return rows if reads_task else rows.remove_columns("task_ids")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the study, and write its results, table and picture into the output folder."""
    parser = study_parser(__doc__.splitlines()[0], DEFAULTS, router_arms(DEFAULTS))
    sizes = {
        "hidden_size": "--hidden-size",
        "intermediate_size": "--intermediate-size",
        "num_hidden_layers": "--layers",
    }
    sizes |= {"batch_size": "--batch-size", "parent_steps": "--parent-steps"}
    for name, option in sizes.items():
        parser.add_argument(option, type=int, dest=name, help=f"({getattr(DEFAULTS, name)})")
    given = parser.parse_args(arguments)
    settings = parse_study(given, DEFAULTS, router_arms(DEFAULTS))
    settings = replace(settings, **{name: getattr(given, name) for name in sizes if getattr(given, name) is not None})
    study = RouterStudy(settings, given.out, given.arms, given.seeds)
    results = study.run()
    write_results(results, markdown_table(results), given.out)
    routers_plot(results, given.out / "routers.png")
    return results


if __name__ == "__main__":
    run_study(main)
