"""Which way to start the experts learns fastest: a small dense model, made a MoE in each way, trained on and compared.

    python -m benchmarks.initialisers --out DIR                     # three seeds, all arms
    python -m benchmarks.initialisers --out DIR --seeds 5           # two seeds more; what is finished is kept
    python -m benchmarks.initialisers --out DIR --arms copy,drop_0.5

Each run is a folder of DIR with one JSON of its curve; a run that was stopped is done again, a finished one is read.
`results.json`, `table.md` and `curves.png` are made from all runs at the end.
"""

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import moe_hf
from benchmarks.initialisers_report import curves_plot, markdown_table
from benchmarks.runs import (
    Pace,
    build_text,
    even_points,
    held_out_rows,
    machine,
    rows_in_order,
    saved_rows,
    small_llama,
    token_losses,
    train_arm,
)
from moe_hf.errors import MoEError
from moe_hf.upcycling.initialisers import make_initialiser
from training.demo.stages import Stages
from training.demo.steps import batches, forward_flops


MOE = {"num_experts": 8, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Settings:
    """What all runs share; a run whose settings changed is done again."""

    steps: int = 480
    parent_steps: int = 1200
    vocab_size: int = 512
    code_characters: int = 6_000_000
    evaluation_tokens: int = 8_192  # of each domain
    block_size: int = 128
    batch_size: int = 8
    hidden_size: int = 96
    intermediate_size: int = 384
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    parent_learning_rate: float = 3e-3
    learning_rate: float = 1e-3
    warmup_share: float = 0.1
    weight_decay: float = 0.1
    evaluations: int = 12


TINY = {
    "steps": 4,
    "parent_steps": 4,
    "vocab_size": 300,
    "code_characters": 60_000,
    "evaluation_tokens": 256,
    "block_size": 32,
    "batch_size": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "evaluations": 2,
}


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


class Study:
    """All runs below one folder. The seed of a run varies its parent, the order of the text, routers and experts."""

    def __init__(self, settings: Settings, output_dir: Path, arms: list[str], seeds: int) -> None:
        self.settings = settings
        self.output_dir = output_dir
        self.arms = arms
        self.seeds = seeds
        self.stages = Stages(output_dir, say=lambda line: print(line, flush=True))

    def data(self) -> dict[str, Any]:
        """Text that every machine has -> tokenizer -> packed blocks; held-out documents of two domains."""
        settings = self.settings

        names = ("vocab_size", "code_characters", "evaluation_tokens", "block_size")
        shared = {name: getattr(settings, name) for name in names}
        described = shared | {"python": platform.python_version()}
        return self.stages.run("data", described, lambda folder: build_text(folder, **shared))

    def rows(self, seed: int, first_step: int, steps: int) -> datasets.Dataset:
        """The text of some steps in the order of `seed`; the parent takes the first ones, no row is seen twice."""
        size = self.settings.batch_size
        return rows_in_order(saved_rows(self.stages.folder("data") / "train"), seed, first_step * size, steps * size)

    def train(
        self, name: str, model: PreTrainedModel, rows: datasets.Dataset, learning_rate: float
    ) -> list[dict[str, Any]]:
        """Train in place, one pass over `rows`; return points at equal shares of the run, whatever its length."""
        settings = self.settings
        steps = len(rows) // settings.batch_size
        held_out = held_out_rows(self.stages.folder("data") / "held_out")
        run = train_arm(
            name,
            model,
            batches(rows, settings.batch_size),
            steps,
            Pace(learning_rate, max(1, round(settings.warmup_share * steps)), settings.weight_decay),
            measure=lambda model: token_losses(model, held_out),
            measured_at=even_points(steps, settings.evaluations),
        )
        return run["points"]

    def parent(self, data: dict[str, Any], seed: int) -> dict[str, Any]:
        """The dense model that all arms of a seed start from."""
        settings = self.settings

        def build(folder: Path) -> dict[str, Any]:
            torch.manual_seed(seed)
            model = LlamaForCausalLM(small_llama(data["result"]["vocab_size"], settings))
            rows = self.rows(seed, 0, settings.parent_steps)
            points = self.train(f"seed {seed}, parent", model, rows, settings.parent_learning_rate)
            model.save_pretrained(folder)
            return {"points": points, "forward_flops_per_token": forward_flops(model, settings.block_size)}

        # The number of steps of the arms does not matter to the parent.
        shared = asdict(replace(settings, steps=0, learning_rate=0)) | {"seed": seed, "data": data["settings"]}
        return self.stages.run(f"seed{seed}/parent", shared, build)

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
        settings, arm = self.settings, ARMS[name]

        def build(folder: Path) -> dict[str, Any]:
            model = self.model(arm, seed)
            steps = settings.steps
            if arm.equal_flops:
                steps = round(steps * forward_flops(self.model(ARMS["copy"], seed), settings.block_size) / dense_flops)
            points = self.train(
                f"seed {seed}, {name}", model, self.rows(seed, settings.parent_steps, steps), settings.learning_rate
            )
            return {
                "points": points,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "forward_flops_per_token": forward_flops(model, settings.block_size),
                "method": self.method(model),
            }

        dense_flops = parent["result"]["forward_flops_per_token"]
        return self.stages.run(
            f"seed{seed}/{name}", asdict(settings) | asdict(arm) | {"parent": parent["settings"]}, build
        )

    def run(self) -> dict[str, Any]:
        """Run what is missing, seed by seed, and return all curves."""
        data = self.data()
        runs = {name: [] for name in self.arms}
        for seed in range(self.seeds):
            parent = self.parent(data, seed)
            for name in self.arms:
                record = self.run_arm(name, parent, seed)
                runs[name].append({"seed": seed, "seconds": record["seconds"]} | record["result"])
        return {
            "settings": asdict(self.settings) | {"seeds": self.seeds},
            "machine": machine(),
            "data": data["result"],
            "built": self.stages.built,
            "arms": {name: {"title": ARMS[name].title, "runs": runs[name]} for name in self.arms},
        }


def parse_arguments(arguments: list[str] | None) -> tuple[Settings, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of everything; finished runs in it are kept")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (3)")
    parser.add_argument("--steps", type=int, help=f"of an arm ({Settings.steps})")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"some of {','.join(ARMS)}")
    parser.add_argument("--tiny", action="store_true", help="very small, to see that it works")
    given = parser.parse_args(arguments)
    given.arms = given.arms.split(",")
    unknown = [name for name in given.arms if name not in ARMS]
    if unknown:
        raise MoEError(f"--arms has {unknown}; it takes some of {', '.join(ARMS)}, separated by commas.")
    if given.seeds < 1 or (given.steps is not None and given.steps < 1):
        raise MoEError(f"--seeds is {given.seeds} and --steps is {given.steps}: each must be at least 1.")
    settings = replace(Settings(), **(TINY if given.tiny else {}))
    return settings if given.steps is None else replace(settings, steps=given.steps), given


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the study, and write its results, table and picture into the output folder."""
    settings, given = parse_arguments(arguments)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    results = Study(settings, given.out, given.arms, given.seeds).run()
    table = markdown_table(results)
    (given.out / "results.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    (given.out / "table.md").write_text(table, encoding="utf-8")
    curves_plot(results["arms"], given.out / "curves.png")
    print(table)
    return results


if __name__ == "__main__":
    try:
        main()
    except MoEError as error:
        sys.exit(f"Error: {error}")
