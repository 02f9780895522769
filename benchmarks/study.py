"""What the studies that go on from one dense parent share: its text and training, runs that are done once and kept.

A study trains arms: ways to go on from one small dense parent. Each run is a folder with one JSON; a run that was stopped
is done again, a finished one is read.
"""

import argparse
import platform
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedModel

from benchmarks.runs import (
    Pace,
    build_text,
    decayed_groups,
    even_points,
    held_out_rows,
    is_matrix,
    machine,
    rows_in_order,
    saved_rows,
    small_llama,
    token_losses,
    train_arm,
)
from moe_hf.data import builtin_corpus
from moe_hf.errors import MoEError
from moe_hf.inspection import forward_flops
from training.demo.stages import Stages
from training.demo.steps import batches


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


class Study(ABC):
    """All runs below one folder. The seed of a run varies its parent, the order of the text, routers and experts.

    Args:
        arms (`list[str]`): names of the arms to run, in order.
        seeds (`int`): runs of each arm.
    """

    def __init__(self, settings: Settings, output_dir: Path, arms: list[str], seeds: int) -> None:
        self.settings = settings
        self.output_dir = output_dir
        self.arms = arms
        self.seeds = seeds
        self.stages = Stages(output_dir, say=lambda line: print(line, flush=True))

    @abstractmethod
    def title(self, name: str) -> str:
        """What an arm is called in tables and pictures."""

    @abstractmethod
    def run_arm(self, name: str, parent: dict[str, Any], seed: int) -> dict[str, Any]:
        """Train one arm of one seed, as a stage; the stage's record."""

    def documents(self) -> datasets.Dataset:
        """The text that parents and arms train on: what every machine has."""
        return builtin_corpus()

    def is_decayed(self, name: str, parameter: torch.Tensor) -> bool:
        """Whether a parameter has weight decay: the matrices do."""
        return is_matrix(name, parameter)

    def after_step(self, model: PreTrainedModel, steps_left: int) -> None:
        """What else happens after a step of the optimizer; by default nothing."""
        return

    def data(self) -> dict[str, Any]:
        """Text -> tokenizer -> packed blocks; held-out documents of two domains."""
        names = ("vocab_size", "code_characters", "evaluation_tokens", "block_size")
        shared = {name: getattr(self.settings, name) for name in names}
        described = shared | {"python": platform.python_version()}
        return self.stages.run("data", described, lambda folder: build_text(folder, self.documents(), **shared))

    def rows(self, seed: int, first_step: int, steps: int) -> datasets.Dataset:
        """The text of some steps in the order of `seed`; the parent takes the first ones, no row is seen twice."""
        size = self.settings.batch_size
        return rows_in_order(saved_rows(self.stages.folder("data") / "train"), seed, first_step * size, steps * size)

    def held_out(self) -> dict[str, datasets.Dataset]:
        """Packed held-out rows by domain."""
        return held_out_rows(self.stages.folder("data") / "held_out")

    def optimizer(self, model: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer:
        """AdamW, with weight decay on what has it."""
        groups = decayed_groups(model, self.settings.weight_decay, self.is_decayed)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)

    def train(
        self,
        name: str,
        model: PreTrainedModel,
        rows: datasets.Dataset,
        held_out: dict[str, datasets.Dataset],
        learning_rate: float,
    ) -> list[dict[str, Any]]:
        """Train in place, one pass over `rows`; return points at equal shares of the run, whatever its length.

        Each point has the steps and tokens so far, and held-out losses in nats/token.
        """
        settings = self.settings
        steps = len(rows) // settings.batch_size
        return train_arm(
            name,
            model,
            batches(rows, settings.batch_size),
            steps,
            Pace(learning_rate, max(1, round(settings.warmup_share * steps)), settings.weight_decay),
            measure=lambda model: token_losses(model, held_out),
            measured_at=even_points(steps, settings.evaluations),
            is_decayed=self.is_decayed,
            after_step=self.after_step,
        )

    def parent(self, data: dict[str, Any], seed: int) -> dict[str, Any]:
        """The dense model that all arms of a seed start from."""
        settings = self.settings

        def build(folder: Path) -> dict[str, Any]:
            torch.manual_seed(seed)
            model = LlamaForCausalLM(small_llama(data["result"]["vocab_size"], settings))
            rows, held_out = self.rows(seed, 0, settings.parent_steps), self.held_out()
            points = self.train(f"seed {seed}, parent", model, rows, held_out, settings.parent_learning_rate)
            model.save_pretrained(folder)
            return {"points": points, "forward_flops_per_token": forward_flops(model, settings.block_size)}

        # The number of steps of the arms does not matter to the parent.
        shared = asdict(replace(settings, steps=0, learning_rate=0)) | {"seed": seed, "data": data["settings"]}
        return self.stages.run(f"seed{seed}/parent", shared, build)

    def run(self) -> dict[str, Any]:
        """Run what is missing, seed by seed, and return all results."""
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
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
            "arms": {name: {"title": self.title(name), "runs": runs[name]} for name in self.arms},
        }


def study_parser(description: str, defaults: Settings, arms: Collection[str]) -> argparse.ArgumentParser:
    """The command line that studies share; `parse_study` reads it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder of everything; finished runs in it are kept")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (3)")
    parser.add_argument("--steps", type=int, help=f"of an arm ({defaults.steps})")
    parser.add_argument("--arms", default=",".join(arms), help=f"some of {','.join(arms)}")
    parser.add_argument("--tiny", action="store_true", help="very small, to see that it works")
    return parser


def parse_study(given: argparse.Namespace, defaults: Settings, arms: Collection[str]) -> Settings:
    """The settings that the command line asks for; `given.arms` becomes a list.

    Raises:
        MoEError: an unknown arm, or no seeds or steps.
    """
    given.arms = given.arms.split(",")
    unknown = [name for name in given.arms if name not in arms]
    if unknown:
        raise MoEError(f"--arms has {unknown}; it takes some of {', '.join(arms)}, separated by commas.")
    if given.seeds < 1 or (given.steps is not None and given.steps < 1):
        raise MoEError(f"--seeds is {given.seeds} and --steps is {given.steps}: each must be at least 1.")
    settings = replace(defaults, **(TINY if given.tiny else {}))
    return settings if given.steps is None else replace(settings, steps=given.steps)
