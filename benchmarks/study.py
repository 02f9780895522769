"""What the training studies share: text, dense parents, one way to train, runs that are done once and kept.

A study trains arms: ways to go on from one small dense parent. Each run is a folder with one JSON; a run that was stopped
is done again, a finished one is read.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import moe_hf
from moe_hf.data import builtin_corpus, corpus_fingerprint, split_by_document, tokenize_and_pack, train_tokenizer
from moe_hf.errors import MoEError
from training.demo.stages import Stages
from training.demo.steps import batches, evaluate, forward_flops, limit_code


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


class Study:
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

    def title(self, name: str) -> str:
        """What an arm is called in tables and pictures."""
        raise NotImplementedError

    def run_arm(self, name: str, parent: dict[str, Any], seed: int) -> dict[str, Any]:
        """Train one arm of one seed, as a stage; the stage's record."""
        raise NotImplementedError

    def documents(self) -> datasets.Dataset:
        """The text that parents and arms train on: what every machine has."""
        return builtin_corpus()

    def is_decayed(self, name: str, parameter: torch.Tensor) -> bool:
        """Whether a parameter has weight decay: the matrices do."""
        return parameter.ndim >= 2

    def after_step(self, model: PreTrainedModel, steps_left: int) -> None:
        """What else happens after a step of the optimizer."""

    def data(self) -> dict[str, Any]:
        """Text -> tokenizer -> packed blocks; held-out documents of two domains."""
        settings = self.settings

        def build(folder: Path) -> dict[str, Any]:
            train_text, held_out_text = split_by_document(self.documents(), 0.1)
            train_text = limit_code(train_text, settings.code_characters)
            tokenizer = train_tokenizer(train_text, settings.vocab_size)
            rows = tokenize_and_pack(train_text, tokenizer, settings.block_size)
            rows.save_to_disk(folder / "train")
            for domain in sorted(set(held_out_text["domain"])):
                text = held_out_text.filter(lambda row, domain=domain: row["domain"] == domain).shuffle(seed=0)
                held_out = tokenize_and_pack(text, tokenizer, settings.block_size)
                held_out.select(range(settings.evaluation_tokens // settings.block_size)).save_to_disk(
                    folder / "held_out" / domain
                )
            return {
                "corpus_sha256": corpus_fingerprint(train_text),
                "training_tokens": len(rows) * settings.block_size,
                "vocab_size": len(tokenizer),
            }

        names = ("vocab_size", "code_characters", "evaluation_tokens", "block_size")
        shared = {name: getattr(settings, name) for name in names}
        return self.stages.run("data", shared | {"python": platform.python_version()}, build)

    def rows(self, seed: int, first_step: int, steps: int) -> datasets.Dataset:
        """The text of some steps in the order of `seed`; the parent takes the first ones, no row is seen twice."""
        rows = datasets.load_from_disk(str(self.stages.folder("data") / "train")).with_format("torch")
        first, count = (number * self.settings.batch_size for number in (first_step, steps))
        if first + count > len(rows):
            raise MoEError(
                f"{first + count} rows of {self.settings.block_size} tokens are needed and the text has {len(rows)}: take "
                "fewer steps."
            )
        return rows.select(np.random.default_rng(seed).permutation(len(rows))[first : first + count])

    def held_out(self) -> dict[str, datasets.Dataset]:
        """Packed held-out rows by domain."""
        folders = sorted((self.stages.folder("data") / "held_out").iterdir())
        return {folder.name: datasets.load_from_disk(str(folder)).with_format("torch") for folder in folders}

    def optimizer(self, model: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer:
        """AdamW, with weight decay on what has it."""
        decayed, others = [], []
        for name, parameter in model.named_parameters():
            (decayed if self.is_decayed(name, parameter) else others).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))

    def train(
        self,
        name: str,
        model: PreTrainedModel,
        rows: datasets.Dataset,
        held_out: dict[str, datasets.Dataset],
        learning_rate: float,
    ) -> list[dict[str, Any]]:
        """Train in place, one pass over `rows`: linear warm-up, then cosine to a tenth; return the points of the curve.

        Each point has the steps and tokens so far, and held-out losses in nats/token. Points lie at equal shares of a
        run, whatever its length.
        """
        settings = self.settings
        steps = len(rows) // settings.batch_size
        optimizer = self.optimizer(model, learning_rate)
        schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, max(1, round(settings.warmup_share * steps)), steps, min_lr_rate=0.1
        )
        measured_at = {round(share * steps / settings.evaluations) for share in range(settings.evaluations + 1)}
        points, start = [], time.perf_counter()
        text = batches(rows, settings.batch_size)
        for step in range(steps + 1):
            if step in measured_at:
                losses = {k: v["token_loss"] for k, v in evaluate(model, held_out, batch_size=32).items()}
                tokens = step * settings.batch_size * settings.block_size
                points.append({"step": step, "tokens": tokens, "loss": losses})
                left = f"{(time.perf_counter() - start) * (steps - step) / step:.0f} s left" if step else "starts"
                print(f"  {name}: step {step}/{steps}, held out {losses['all']:.4f}, {left}", flush=True)
                model.train()
            if step < steps:
                model(**next(text), use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                self.after_step(model, steps - step - 1)
        return points

    def parent(self, data: dict[str, Any], seed: int) -> dict[str, Any]:
        """The dense model that all arms of a seed start from."""
        settings = self.settings

        def build(folder: Path) -> dict[str, Any]:
            torch.manual_seed(seed)
            config = LlamaConfig(
                vocab_size=data["result"]["vocab_size"],
                hidden_size=settings.hidden_size,
                intermediate_size=settings.intermediate_size,
                num_hidden_layers=settings.num_hidden_layers,
                num_attention_heads=settings.num_attention_heads,
                max_position_embeddings=2 * settings.block_size,
                tie_word_embeddings=True,
                # Near 1 / sqrt(D); a model this narrow learns more slowly from the usual 0.02.
                initializer_range=0.1,
                bos_token_id=None,
                eos_token_id=None,
            )
            model = LlamaForCausalLM(config)
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
            "machine": {
                "cpus": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "python": platform.python_version(),
            }
            | {"torch": torch.__version__, "transformers": transformers.__version__, "moe_hf": moe_hf.__version__},
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


def write_results(results: dict[str, Any], table: str, folder: Path) -> None:
    """Write `results.json` and `table.md`, and show the table."""
    (folder / "results.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table, encoding="utf-8")
    print(table)
