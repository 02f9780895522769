"""Which part of a MoE to fine-tune: scopes side by side on a new domain and on instructions, with forgetting and cost.

    python -m benchmarks.scopes --out DIR                     # three seeds, three models, two tasks
    python -m benchmarks.scopes --out DIR --seeds 5           # two seeds more; what is finished is kept
    python -m benchmarks.scopes --out DIR --models upcycled --tasks prose --hidden-size 128 --steps 1000

Models learn CPython's library code first. Then each scope trains alone, on the language reference (`prose`) or on the
docstrings of functions (`instructions`), in files that the first stage did not see. Each scope's learning rate is the
one of a small grid, the same for all, with the best validation loss with seed 0.
"""

import argparse
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import moe_hf
from benchmarks.instructions import docstring_examples, instruction_rows, without_answers_of
from benchmarks.runs import (
    Pace,
    add_size_options,
    even_points,
    interleaved_step_seconds,
    machine,
    rows_in_order,
    run_study,
    saved_rows,
    sizes_given,
    small_llama,
    token_losses,
    train_arm,
    without_paragraphs_of,
    write_results,
)
from benchmarks.scopes_report import differences_plot, forgetting_plot, markdown_table
from moe_hf.data import builtin_corpus, corpus_fingerprint, split_by_document, tokenize_and_pack, train_tokenizer
from moe_hf.errors import MoEError
from moe_hf.finetuning import SCOPES, apply_scope, scope_parameter_names
from training.demo.stages import Stages
from training.demo.steps import batches, limit_code


TASKS = ("prose", "instructions")


@dataclass(frozen=True)
class Settings:
    """What all runs share; a run whose settings changed is done again."""

    steps: int = 120  # of fine-tuning
    task_rows: int = 160  # that are trained on, over and over
    batch_size: int = 4
    first_steps: int = 500  # of training on code
    first_batch_size: int = 8
    first_learning_rate: float = 3e-3
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    vocab_size: int = 512
    code_characters: int = 8_000_000
    evaluation_rows: int = 64  # at most, of test, of trained rows and of held-out code; half for validation
    block_size: int = 128
    hidden_size: int = 48
    intermediate_size: int = 144
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    warmup_share: float = 0.1
    weight_decay: float = 0.1
    timing_rounds: int = 16


TINY = {
    "steps": 4,
    "task_rows": 6,
    "batch_size": 2,
    "first_steps": 4,
    "first_batch_size": 2,
    "learning_rates": (1e-3, 1e-2),
    "vocab_size": 400,
    "code_characters": 1_500_000,
    "evaluation_rows": 4,
    "block_size": 96,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "timing_rounds": 2,
}


@dataclass(frozen=True)
class Kind:
    """A model that is fine-tuned: its title, and the fields of its configuration. All have 8 experts, 2 per token."""

    title: str
    upcycled: bool = False
    fields: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "upcycled": Kind("upcycled from a dense model, experts in each layer", upcycled=True),
    "scratch": Kind("MoE from scratch, experts in each layer"),
    "sparse": Kind("MoE from scratch, experts in each fourth layer", fields={"decoder_sparse_step": 4}),
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2}


def distinct_scopes(model: PreTrainedModel) -> dict[str, str]:
    """The scopes that the model has, each with the first one that trains the same parameters, itself if none does."""
    first: dict[tuple[str, ...], str] = {}
    scopes = {}
    for scope in SCOPES:
        try:
            names = scope_parameter_names(model, scope)
        except MoEError:  # no such part
            continue
        scopes[scope] = first.setdefault(names, scope)
    return scopes


def build_texts(folder: Path, settings: Settings) -> dict[str, Any]:
    """Write rows: `code/{train,held_out}`, and of each task `{train,validation,test}`; no document is in two of them."""
    corpus = limit_code(builtin_corpus(), settings.code_characters)
    code, prose = (corpus.filter(lambda row, domain=domain: row["domain"] == domain) for domain in ("code", "prose"))
    first, rest = split_by_document(code, 0.35)
    functions, first_held_out = split_by_document(rest, 0.3, seed=1)
    parts = {"instructions": _three_parts(functions), "prose": _three_parts(prose)}
    train, validation, test = parts["prose"].values()
    parts["prose"] |= {
        "validation": without_paragraphs_of(validation, train),
        "test": without_paragraphs_of(test, train, validation),
    }
    first_held_out = without_paragraphs_of(first_held_out, first)
    tokenizer = train_tokenizer(datasets.concatenate_datasets([first, parts["prose"]["train"]]), settings.vocab_size)
    rows = {
        "code/train": tokenize_and_pack(first, tokenizer, settings.block_size),
        "code/held_out": tokenize_and_pack(first_held_out.shuffle(seed=0), tokenizer, settings.block_size),
    }
    examples = {part: docstring_examples(documents) for part, documents in parts["instructions"].items()}
    for part, documents in parts["prose"].items():
        new = examples[part] if part == "train" else without_answers_of(examples[part], examples["train"])
        rows[f"instructions/{part}"] = instruction_rows(new, tokenizer, settings.block_size)
        rows[f"prose/{part}"] = tokenize_and_pack(documents.shuffle(seed=0), tokenizer, settings.block_size)
    for name, part in rows.items():
        part.save_to_disk(folder / name)
    return {
        "corpus_sha256": corpus_fingerprint(corpus),
        "vocab_size": len(tokenizer),
        "rows": {name: len(part) for name, part in rows.items()},
    }


def _three_parts(documents: datasets.Dataset) -> dict[str, datasets.Dataset]:
    train, others = split_by_document(documents, 0.4, seed=2)
    test, validation = split_by_document(others, 0.4, seed=3)
    return {"train": train, "validation": validation, "test": test}


class Study:
    """All runs below one folder. The seed varies first weights, text orders, routers, and the rows of a task."""

    def __init__(self, settings: Settings, output_dir: Path, models: list[str], tasks: list[str], seeds: int) -> None:
        self.settings = settings
        self.models = models
        self.tasks = tasks
        self.seeds = seeds
        self.stages = Stages(output_dir, say=lambda line: print(line, flush=True))

    def data(self) -> dict[str, Any]:
        """Rows of all texts."""
        names = ("vocab_size", "code_characters", "block_size")
        described = {name: getattr(self.settings, name) for name in names} | {"python": platform.python_version()}
        return self.stages.run("data", described, lambda folder: build_texts(folder, self.settings))

    def rows(self, name: str) -> datasets.Dataset:
        """One part of the texts."""
        return saved_rows(self.stages.folder("data") / name)

    def first_model(self, kind: str, seed: int, data: dict[str, Any]) -> dict[str, Any]:
        """Train on code: the dense model of `upcycled`, or a MoE of random weights."""
        settings = self.settings

        def build(folder: Path) -> dict[str, Any]:
            torch.manual_seed(seed)
            config = small_llama(data["result"]["vocab_size"], settings)
            fields = MOE | MODELS[kind].fields
            model = (
                LlamaForCausalLM(config)
                if MODELS[kind].upcycled
                else moe_hf.MoEForCausalLM(moe_hf.MoEConfig(text_config=config, **fields))
            )
            steps, held_out = settings.first_steps, {"code": self.evaluated("code/held_out")}
            rows = rows_in_order(self.rows("code/train"), seed, 0, steps * settings.first_batch_size)
            points = train_arm(
                f"seed {seed}, {kind}, code",
                model,
                batches(rows, settings.first_batch_size),
                steps,
                self.pace(settings.first_learning_rate, steps),
                measure=lambda model: token_losses(model, held_out),
                measured_at=even_points(steps, 4),
            )
            model.save_pretrained(folder)
            return {"points": points}

        not_read = {"steps", "task_rows", "batch_size", "learning_rates", "timing_rounds"}
        shared = {name: value for name, value in asdict(settings).items() if name not in not_read}
        shared |= {"seed": seed, "kind": asdict(MODELS[kind]), "data": data["settings"]}
        return self.stages.run(f"seed{seed}/{kind}/first", shared, build)

    def pace(self, rate: float, steps: int) -> Pace:
        """Warm-up over a share of the steps, then a cosine."""
        return Pace(rate, max(1, round(self.settings.warmup_share * steps)), self.settings.weight_decay)

    def model(self, kind: str, seed: int) -> PreTrainedModel:
        """The MoE before fine-tuning."""
        folder = self.stages.folder(f"seed{seed}/{kind}/first")
        first = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return moe_hf.upcycle(first, seed=seed, **MOE) if MODELS[kind].upcycled else first

    def evaluated(self, name: str, share: float = 1.0) -> datasets.Dataset:
        """The rows of a part that losses are taken over."""
        rows = self.rows(name)
        return rows.select(range(min(len(rows), max(1, round(share * self.settings.evaluation_rows)))))

    def task_rows(self, task: str, seed: int) -> datasets.Dataset:
        """The rows that a seed trains on."""
        return rows_in_order(self.rows(f"{task}/train"), seed, 0, self.settings.task_rows)

    def losses(self, model: PreTrainedModel, task: str, seed: int) -> dict[str, float]:
        """Losses in nats/token: of the task's three parts and of held-out code."""
        trained = self.task_rows(task, seed)
        parts = {
            "validation": self.evaluated(f"{task}/validation", 0.5),
            "test": self.evaluated(f"{task}/test"),
            "train": trained.select(range(min(len(trained), self.settings.evaluation_rows))),
            "code": self.evaluated("code/held_out"),
        }
        found = token_losses(model, parts)
        return {name: found[name] for name in parts}

    def task_text(self, task: str, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches without end: all rows in a new order, again and again."""
        rows, generator = self.task_rows(task, seed), np.random.default_rng(seed)
        size = self.settings.batch_size
        while True:
            order = generator.permutation(len(rows))
            for first in range(0, len(order) - size + 1, size):
                yield rows[order[first : first + size]]

    def before(self, kind: str, task: str, seed: int, first: dict[str, Any]) -> dict[str, Any]:
        """Losses before fine-tuning, which all scopes share."""
        shared = {"first": first["settings"], "task_rows": self.settings.task_rows}
        return self.stages.run(
            f"seed{seed}/{kind}/{task}/before", shared, lambda _: self.losses(self.model(kind, seed), task, seed)
        )["result"]

    def fine_tune(
        self, kind: str, task: str, seed: int, scope: str, rate: float, first: dict[str, Any]
    ) -> dict[str, Any]:
        """Train one scope on one task, and take the losses after it."""
        settings, name = self.settings, f"seed{seed}/{kind}/{task}/{scope}/{rate}"

        def build(folder: Path) -> dict[str, Any]:
            model = self.model(kind, seed)
            report = apply_scope(model, scope)
            (after,) = train_arm(
                name,
                model,
                self.task_text(task, seed),
                settings.steps,
                self.pace(rate, settings.steps),
                measure=lambda model: self.losses(model, task, seed),
                measured_at={settings.steps},
            )
            return {
                "after": after["loss"],
                "trained_parameters": report.trainable_parameters,
                "total_parameters": report.total_parameters,
            }

        shared = {name: getattr(settings, name) for name in ("steps", "task_rows", "batch_size")}
        return self.stages.run(name, shared | {"rate": rate, "first": first["settings"]}, build)["result"]

    def timing(self, kind: str, first: dict[str, Any]) -> dict[str, float]:
        """CPU seconds of a step on prose by scope, all scopes in turns."""

        def build(folder: Path) -> dict[str, Any]:
            models = {}
            for scope in self.scopes(kind):
                models[scope] = self.model(kind, 0)
                apply_scope(models[scope], scope)
            text = self.task_text("prose", 0)
            return interleaved_step_seconds(models, [next(text) for _ in range(self.settings.timing_rounds)])

        shared = {name: getattr(self.settings, name) for name in ("timing_rounds", "batch_size")}
        return self.stages.run(f"seed0/{kind}/timing", shared | {"first": first["settings"]}, build)["result"]

    def scopes(self, kind: str) -> list[str]:
        """The scopes that differ."""
        return [scope for scope, same in distinct_scopes(self.model(kind, 0)).items() if scope == same]

    def run(self) -> dict[str, Any]:
        """Run what is missing, seed by seed, and return all losses."""
        data = self.data()
        models = {
            kind: {"title": MODELS[kind].title, "tasks": {task: {} for task in self.tasks}} for kind in self.models
        }
        for seed in range(self.seeds):
            for kind, found in models.items():
                first = self.first_model(kind, seed, data)
                found.setdefault("first", []).append(first["result"]["points"])
                if seed == 0:
                    found["same"] = distinct_scopes(self.model(kind, 0))
                    found["step_seconds"] = self.timing(kind, first)
                for task, scopes in found["tasks"].items():
                    scopes.setdefault("before", []).append(self.before(kind, task, seed, first))
                    for scope in self.scopes(kind):
                        if seed == 0:
                            scopes[scope] = self.choose_rate(kind, task, scope, first)
                        run = self.fine_tune(kind, task, seed, scope, scopes[scope]["rate"], first)
                        scopes[scope]["runs"].append(run)
        return {
            "settings": asdict(self.settings) | {"seeds": self.seeds},
            "machine": machine(),
            "data": data["result"],
            "built": self.stages.built,
            "models": models,
        }

    def choose_rate(self, kind: str, task: str, scope: str, first: dict[str, Any]) -> dict[str, Any]:
        """The rate with the best validation loss with seed 0, and what was tried."""
        tried = {
            rate: self.fine_tune(kind, task, 0, scope, rate, first)["after"] for rate in self.settings.learning_rates
        }
        rate = min(tried, key=lambda rate: tried[rate]["validation"])
        return {"rate": rate, "tried": {str(rate): losses for rate, losses in tried.items()}, "runs": []}


def parse_arguments(arguments: list[str] | None) -> tuple[Settings, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of everything; finished runs in it are kept")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each scope (3)")
    parser.add_argument("--models", default=",".join(MODELS), help=f"some of {','.join(MODELS)}")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"some of {','.join(TASKS)}")
    add_size_options(parser, Settings)
    given = parser.parse_args(arguments)
    for name, known in (("models", MODELS), ("tasks", TASKS)):
        chosen = getattr(given, name).split(",")
        unknown = [value for value in chosen if value not in known]
        if unknown:
            raise MoEError(f"--{name} has {unknown}; it takes some of {', '.join(known)}, separated by commas.")
        setattr(given, name, chosen)
    if given.seeds < 1:
        raise MoEError(f"--seeds is {given.seeds}: it must be at least 1.")
    return replace(Settings(), **(TINY if given.tiny else {}) | sizes_given(given)), given


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the study, and write its results, table and pictures into the output folder."""
    settings, given = parse_arguments(arguments)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    results = Study(settings, given.out, given.models, given.tasks, given.seeds).run()
    differences_plot(results, given.out / "differences.png")
    forgetting_plot(results, given.out / "forgetting.png")
    write_results(results, markdown_table(results), given.out)
    return results


if __name__ == "__main__":
    run_study(main)
