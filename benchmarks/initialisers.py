"""Which way to start the experts learns fastest: a small dense model, made a MoE in each way, trained on and compared.

    python -m benchmarks.initialisers --out DIR                     # three seeds, all arms
    python -m benchmarks.initialisers --out DIR --seeds 5           # two seeds more; what is finished is kept
    python -m benchmarks.initialisers --out DIR --arms copy,drop_0.5

Each run is a folder of DIR with one JSON of its curve; a run that was stopped is done again, a finished one is read.
`results.json`, `table.md` and `curves.png` are made from all runs at the end.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_hf
from benchmarks.initialisers_report import curves_plot, markdown_table
from benchmarks.runs import run_study, with_training_flops, write_results
from benchmarks.study import MOE, Settings, Study, parse_study, study_parser
from moe_hf.inspection import forward_flops
from moe_hf.upcycling.initialisers import make_initialiser


@dataclass(frozen=True)
class Arm:
    """One way to go on from the dense parent.

    Attributes:
        title: its name in tables and pictures.
        init: an initialiser's name; None for the dense model itself.
        options: of the initialiser.
        upcycling: further arguments of `moe_hf.upcycle`.
        from_scratch: whether a MoE of random weights takes the place of the upcycled one.
        equal_flops: whether steps are added up to the training FLOPs of `copy`.
    """

    title: str
    init: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    upcycling: dict[str, Any] = field(default_factory=dict)
    from_scratch: bool = False
    equal_flops: bool = False


ARMS = {
    "dense": Arm("continued dense, equal tokens"),
    "dense_equal_flops": Arm("continued dense, equal FLOPs", equal_flops=True),
    "copy": Arm("copy", "copy", upcycling=MOE),
    "noise": Arm("copy, noise 0.1", "copy", upcycling=MOE | {"noise": 0.1}),
    "drop_0.25": Arm("drop 0.25", "drop", {"ratio": 0.25}, MOE),
    "drop_0.5": Arm("drop 0.5", "drop", {"ratio": 0.5}, MOE),
    # Twice the experts of half the width: the same parameters and the same active width as the others.
    "granular": Arm("granular, 2 shards", "granular", {"shards": 2}, {"num_experts": 16, "num_experts_per_tok": 4}),
    "scratch": Arm("MoE from scratch", "copy", upcycling=MOE, from_scratch=True),
}


class InitialiserStudy(Study):
    """The study of initialisers."""

    table = ARMS

    def title(self, name: str) -> str:
        """An arm's title."""
        return self.table[name].title

    def model(self, arm: Arm, seed: int) -> PreTrainedModel:
        """An arm's model at its first step."""
        dense = AutoModelForCausalLM.from_pretrained(self.stages.folder(f"seed{seed}/parent"), dtype=torch.float32)
        if arm.init is None:
            return dense
        if arm.from_scratch:
            torch.manual_seed(seed)
            return moe_hf.MoEForCausalLM(moe_hf.MoEConfig(text_config=dense.config, **arm.upcycling))
        return moe_hf.upcycle(dense, init=make_initialiser(arm.init, arm.options), seed=seed, **arm.upcycling)

    def method(self, model: PreTrainedModel) -> dict[str, Any]:
        """What `upcycle` recorded, without the folder of the source; empty for a model that was not upcycled."""
        record = getattr(model.config, "upcycling", None) or {}
        return {name: value for name, value in record.items() if name != "source"}

    def run_arm(self, name: str, parent: dict[str, Any], seed: int) -> dict[str, Any]:
        """Train one arm of one seed."""
        settings, arm = self.settings, self.table[name]

        def build(folder: Path) -> dict[str, Any]:
            model = self.model(arm, seed)
            steps = settings.steps
            if arm.equal_flops:
                steps = round(steps * forward_flops(self.model(ARMS["copy"], seed), settings.block_size) / dense_flops)
            rows, held_out = self.rows(seed, settings.parent_steps, steps), self.held_out()
            points = self.train(f"seed {seed}, {name}", model, rows, held_out, settings.learning_rate)
            return {
                "points": with_training_flops(points, model, settings.block_size),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "forward_flops_per_token": forward_flops(model, settings.block_size),
                "method": self.method(model),
            }

        dense_flops = parent["result"]["forward_flops_per_token"]
        return self.stages.run(
            f"seed{seed}/{name}", asdict(settings) | asdict(arm) | {"parent": parent["settings"]}, build
        )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the study, and write its results, table and picture into the output folder."""
    given = study_parser(__doc__.splitlines()[0], Settings(), ARMS).parse_args(arguments)
    settings = parse_study(given, Settings(), ARMS)
    results = InitialiserStudy(settings, given.out, given.arms, given.seeds).run()
    write_results(results, markdown_table(results), given.out)
    curves_plot(results["arms"], given.out / "curves.png")
    return results


if __name__ == "__main__":
    run_study(main)
