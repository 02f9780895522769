"""Which way to start the experts learns fastest: a small dense model, made a MoE in each way, trained on and compared.

    python -m benchmarks.initialisers --out DIR                     # three seeds, all arms
    python -m benchmarks.initialisers --out DIR --seeds 5           # two seeds more; what is finished is kept
    python -m benchmarks.initialisers --out DIR --arms copy,drop_0.5

Each run is a folder of DIR with one JSON of its curve; a run that was stopped is done again, a finished one is read.
`results.json`, `table.md` and `curves.png` are made from all runs at the end.
"""

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import moe_hf
from benchmarks.initialisers_report import curves_plot, markdown_table
from moe_hf.data import builtin_corpus, corpus_fingerprint, split_by_document, tokenize_and_pack, train_tokenizer
from moe_hf.errors import MoEError
from moe_hf.upcycling.initialisers import make_initialiser
from training.demo.stages import Stages
from training.demo.steps import batches, evaluate, forward_flops, limit_code


# A training step is a forward pass and a backward pass of twice its arithmetic.
PASSES_PER_STEP = 3
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

        def build(folder: Path) -> dict[str, Any]:
            train_text, held_out_text = split_by_document(builtin_corpus(), 0.1)
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

    def train(
        self, name: str, model: PreTrainedModel, rows: datasets.Dataset, learning_rate: float
    ) -> list[dict[str, Any]]:
        """Train in place, one pass over `rows`: linear warm-up, then cosine to a tenth; return the points of the curve.

        Each point has the steps, tokens and training FLOPs so far, and held-out losses in nats/token. Points lie at
        equal shares of a run, whatever its length.
        """
        settings = self.settings
        steps = len(rows) // settings.batch_size
        matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
        schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, max(1, round(settings.warmup_share * steps)), steps, min_lr_rate=0.1
        )
        flops = PASSES_PER_STEP * forward_flops(model, settings.block_size)
        measured_at = {round(share * steps / settings.evaluations) for share in range(settings.evaluations + 1)}
        held_out, points, start = self.held_out(), [], time.perf_counter()
        text = batches(rows, settings.batch_size)
        for step in range(steps + 1):
            if step in measured_at:
                losses = {k: v["token_loss"] for k, v in evaluate(model, held_out, batch_size=32).items()}
                tokens = step * settings.batch_size * settings.block_size
                points.append({"step": step, "tokens": tokens, "training_flops": tokens * flops, "loss": losses})
                left = f"{(time.perf_counter() - start) * (steps - step) / step:.0f} s left" if step else "starts"
                print(f"  {name}: step {step}/{steps}, held out {losses['all']:.4f}, {left}", flush=True)
                model.train()
            if step < steps:
                model(**next(text), use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
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
            "machine": {
                "cpus": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "python": platform.python_version(),
            }
            | {"torch": torch.__version__, "transformers": transformers.__version__, "moe_hf": moe_hf.__version__},
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
