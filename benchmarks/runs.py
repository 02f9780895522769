"""What the studies that train share: text that every machine has, a training run with its curve, facts of the machine."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

import moe_hf
from moe_hf.data import corpus_fingerprint, split_by_document, tokenize_and_pack, train_tokenizer
from moe_hf.errors import MoEError
from moe_hf.inspection import forward_flops
from training.demo.steps import evaluate, limit_code


# A training step is a forward pass and a backward pass of twice its arithmetic.
PASSES_PER_STEP = 3
# Settings that the command line of a study can change.
SIZES = {
    "steps": "training steps of a run",
    "batch_size": "rows of a step",
    "hidden_size": "D",
    "intermediate_size": "F of the dense MLP and of an expert",
    "num_hidden_layers": "decoder layers",
    "num_attention_heads": "attention heads",
}


@dataclass(frozen=True)
class Pace:
    """How a run trains: AdamW (0.9, 0.95), decay of matrices only, gradients clipped at 1, a linear warm-up.

    Attributes:
        learning_rate: its peak.
        warmup_steps: at least one.
        weight_decay: of the parameters that `is_decayed` names; by default those of two dimensions and more.
        decays: whether a cosine takes the rate to a tenth at the last step; otherwise it stays at its peak, so that each
            point of the curve is the end of a run of that length.
    """

    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.1
    decays: bool = True


def build_text(
    folder: Path,
    documents: datasets.Dataset,
    *,
    vocab_size: int,
    code_characters: int,
    evaluation_tokens: int,
    block_size: int,
) -> dict[str, Any]:
    """Write packed rows: `train`, and `held_out/<domain>` from documents that `train` lacks."""
    train_text, held_out_text = split_by_document(documents, 0.1)
    train_text = limit_code(train_text, code_characters)
    tokenizer = train_tokenizer(train_text, vocab_size)
    rows = tokenize_and_pack(train_text, tokenizer, block_size)
    rows.save_to_disk(folder / "train")
    for domain in sorted(set(held_out_text["domain"])):
        text = held_out_text.filter(lambda row, domain=domain: row["domain"] == domain).shuffle(seed=0)
        held_out = tokenize_and_pack(text, tokenizer, block_size)
        held_out.select(range(evaluation_tokens // block_size)).save_to_disk(folder / "held_out" / domain)
    return {
        "corpus_sha256": corpus_fingerprint(train_text),
        "training_tokens": len(rows) * block_size,
        "vocab_size": len(tokenizer),
    }


def without_paragraphs_of(documents: datasets.Dataset, *known: datasets.Dataset) -> datasets.Dataset:
    """Drop the paragraphs of 80 characters and more that documents of `known` have too, and documents left empty.

    Documents repeat each other: some topics of the language reference hold others whole, licences are in many files.
    """
    paragraphs = {part.strip() for other in known for text in other["text"] for part in text.split("\n\n")}

    def is_new(part: str) -> bool:
        return len(part.strip()) < 80 or part.strip() not in paragraphs

    def shorten(row: dict[str, str]) -> dict[str, str]:
        return {"text": "\n\n".join(part for part in row["text"].split("\n\n") if is_new(part))}

    return documents.map(shorten).filter(lambda row: bool(row["text"].strip()))


def saved_rows(folder: Path) -> datasets.Dataset:
    """Rows that a stage saved, as tensors."""
    return datasets.load_from_disk(str(folder)).with_format("torch")


def held_out_rows(folder: Path) -> dict[str, datasets.Dataset]:
    """The saved rows of each sub-folder, by its name."""
    return {part.name: saved_rows(part) for part in sorted(folder.iterdir())}


def rows_in_order(rows: datasets.Dataset, seed: int, first: int, count: int) -> datasets.Dataset:
    """`count` rows from the place `first` on in the order of `seed`; no row is given twice.

    Raises:
        MoEError: there are not so many.
    """
    if first + count > len(rows):
        raise MoEError(
            f"{first + count} rows of {len(rows[0]['input_ids'])} tokens are needed and the text has {len(rows)}: take "
            "fewer steps."
        )
    return rows.select(np.random.default_rng(seed).permutation(len(rows))[first : first + count])


def small_llama(vocab_size: int, settings: Any, **fields: Any) -> LlamaConfig:
    """The dense model of the studies; sizes are read from `settings`, `fields` take precedence."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return LlamaConfig(
        **{name: getattr(settings, name) for name in sizes} | fields,
        vocab_size=vocab_size,
        max_position_embeddings=2 * settings.block_size,
        tie_word_embeddings=True,
        # Near 1 / sqrt(D); a model this narrow learns more slowly from the usual 0.02.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )


def token_losses(model: PreTrainedModel, held_out: dict[str, datasets.Dataset]) -> dict[str, float]:
    """Loss in nats/token of each part, and over the tokens of all parts (`all`); without router losses."""
    return {name: found["token_loss"] for name, found in evaluate(model, held_out, batch_size=32).items()}


def even_points(steps: int, evaluations: int) -> set[int]:
    """Steps at equal shares of a run, its first and last ones among them."""
    return {round(share * steps / evaluations) for share in range(evaluations + 1)}


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter has two dimensions or more."""
    return parameter.ndim >= 2


def decayed_groups(
    model: nn.Module, weight_decay: float, is_decayed: Callable[[str, torch.Tensor], bool] = is_matrix
) -> list[dict[str, Any]]:
    """What trains, in two groups for AdamW: with and without weight decay."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if is_decayed(name, parameter) else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def prepare_optimizer(
    model: nn.Module, pace: Pace, steps: int, is_decayed: Callable[[str, torch.Tensor], bool] = is_matrix
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW over what trains, and its schedule over `steps`."""
    groups = decayed_groups(model, pace.weight_decay, is_decayed)
    optimizer = torch.optim.AdamW(groups, lr=pace.learning_rate, betas=(0.9, 0.95), fused=True)
    if pace.decays:
        schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, pace.warmup_steps, steps, min_lr_rate=0.1
        )
    else:
        schedule = transformers.get_constant_schedule_with_warmup(optimizer, pace.warmup_steps)
    return optimizer, schedule


def training_step(
    model: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """One step in place; returns the CPU seconds that this process spent on it."""
    start = time.process_time()
    model(**batch, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return time.process_time() - start


def train_arm(
    name: str,
    model: PreTrainedModel,
    text: Iterable[dict[str, torch.Tensor]],
    steps: int,
    pace: Pace,
    *,
    measure: Callable[[PreTrainedModel], dict[str, float]],
    measured_at: set[int],
    is_decayed: Callable[[str, torch.Tensor], bool] = is_matrix,
    after_step: Callable[[PreTrainedModel, int], None] = lambda model, steps_left: None,
) -> list[dict[str, Any]]:
    """Train in place, and return the points of the curve: `step`, `tokens` so far, and `loss`.

    Args:
        name (`str`): said with each point.
        text (`Iterable`): one batch per step.
        measure (`Callable`): losses by name, for each step of `measured_at` (0 is before the first step).
        is_decayed (`Callable`): whether a parameter, by its name and itself, has weight decay.
        after_step (`Callable`): called after each step of the optimizer, with the steps that are left.
    """
    optimizer, schedule = prepare_optimizer(model, pace, steps, is_decayed)
    points, tokens, start, text = [], 0, time.perf_counter(), iter(text)
    for step in range(steps + 1):
        if step in measured_at:
            loss = measure(model)
            points.append({"step": step, "tokens": tokens, "loss": loss})
            left = f"{(time.perf_counter() - start) * (steps - step) / step:.0f} s left" if step else "starts"
            said = ", ".join(f"{part} {value:.4f}" for part, value in loss.items())
            print(f"  {name}: step {step}/{steps}, {said}, {left}", flush=True)
            model.train()
        if step < steps:
            batch = next(text)
            tokens += batch["input_ids"].numel()
            training_step(model, batch, optimizer, schedule)
            after_step(model, steps - step - 1)
    return points


def with_training_flops(points: list[dict[str, Any]], model: PreTrainedModel, block_size: int) -> list[dict[str, Any]]:
    """The points of a run that trained all parameters, each with its `training_flops` so far."""
    flops = PASSES_PER_STEP * forward_flops(model, block_size)
    return [point | {"training_flops": point["tokens"] * flops} for point in points]


def interleaved_step_seconds(
    models: dict[str, PreTrainedModel], text: list[dict[str, torch.Tensor]]
) -> dict[str, float]:
    """CPU seconds of a training step of each model, one batch after the other, all models in turns; the lower quartile.

    In turns, since whatever else runs on the machine then slows all of them alike. The first batch warms up.
    """
    prepared = {name: prepare_optimizer(model, Pace(1e-4, 1), len(text)) for name, model in models.items()}
    seconds = {name: [] for name in models}
    for batch in text:
        for name, model in models.items():
            seconds[name].append(training_step(model.train(), batch, *prepared[name]))
    return {name: float(np.quantile(values[1:], 0.25)) for name, values in seconds.items()}


def add_size_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Options for larger or smaller runs: the fields of SIZES, with their defaults in `settings`, and `--tiny`."""
    defaults = settings()
    for name, meaning in SIZES.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, help=f"{meaning} ({getattr(defaults, name)})")
    parser.add_argument("--tiny", action="store_true", help="very small, to see that it works")


def sizes_given(given: argparse.Namespace) -> dict[str, int]:
    """What of SIZES the command line sets.

    Raises:
        MoEError: a size below 1.
    """
    sizes = {name: getattr(given, name) for name in SIZES if getattr(given, name) is not None}
    wrong = {name: value for name, value in sizes.items() if value < 1}
    if wrong:
        name, value = next(iter(wrong.items()))
        raise MoEError(f"--{name.replace('_', '-')} is {value}: it must be at least 1.")
    return sizes


def machine() -> dict[str, Any]:
    """Cores, threads and versions, for the record."""
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "moe_hf": moe_hf.__version__,
    }


def write_results(results: dict[str, Any], table: str, folder: Path) -> None:
    """Write `results.json` and `table.md`, and show the table."""
    (folder / "results.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table, encoding="utf-8")
    print(table)


def run_study(main: Callable[[], Any]) -> None:
    """Run the `main` of a study; what it refuses is one sentence on the error output."""
    try:
        main()
    except MoEError as error:
        sys.exit(f"Error: {error}")
