"""Tiny things in the place of what documents leave to the reader: models by the names that they are asked for, text, data.

Folders stand in the temporary directory where commands look for them, so that what is written runs as it is written. A
name of Python that a block reads and never sets comes from `NAMES`, anew for each page.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, TrainingArguments
from trl import SFTConfig

import moe_hf
from moe_hf import data
from moe_hf.data import tokenize_and_pack, train_tokenizer
from tests.documents.blocks import ROOT
from tests.tiny_models import tiny_dense


MOST_STEPS = 2
DENSE = ("HuggingFaceTB/SmolLM2-135M", "DENSE", "DENSE_PARENT", "DENSE_FOLDER_OR_HUB_ID")
MOES = ("MODEL", "OLDER_CHECKPOINT", "FOLDER")
LINKS = ("training", "examples", "benchmarks")
SIZES = {"vocab_size": 270, "max_position_embeddings": 512, "eos_token_id": 0, "bos_token_id": None}


@cache
def corpus() -> Dataset:
    """A few short documents of both domains, in the place of CPython's library."""
    code = "".join((ROOT / "moe_hf" / name).read_text() for name in ("data.py", "inspection.py"))
    prose = (ROOT / "ARCHITECTURE.md").read_text()
    # So many that recipes hold out two of each domain.
    pieces = [
        (name, text[i * 900 : (i + 1) * 900]) for name, text in (("code", code), ("prose", prose)) for i in range(24)
    ]
    return Dataset.from_dict(
        {
            "text": [text for _, text in pieces],
            "domain": [name for name, _ in pieces],
            "document": [str(number) for number in range(len(pieces))],
        }
    )


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Of the corpus, with 270 tokens."""
    return train_tokenizer(corpus(), vocab_size=SIZES["vocab_size"])


def dense(family: str = "llama") -> PreTrainedModel:
    """A tiny dense model, always the same."""
    return tiny_dense(family, **SIZES, pad_token_id=tokenizer().pad_token_id)


def moe(**fields: Any) -> PreTrainedModel:
    """A MoE with experts that differ."""
    return moe_hf.upcycle(dense(), num_experts=4, num_experts_per_tok=2, noise=0.1, **fields)


def rows() -> Dataset:
    """Packed rows of 64 tokens."""
    return tokenize_and_pack(corpus(), tokenizer(), block_size=64)


def input_ids() -> torch.Tensor:
    """Two rows of 16 tokens."""
    return torch.stack([torch.as_tensor(row["input_ids"][:16]) for row in rows().select(range(2))])


def batches() -> list[dict[str, torch.Tensor]]:
    """Two batches of two rows."""
    columns = rows().with_format("torch")
    return [{"input_ids": columns[i : i + 2]["input_ids"], "labels": columns[i : i + 2]["labels"]} for i in (0, 2)]


def arguments(kind: type[TrainingArguments] = moe_hf.MoETrainingArguments) -> TrainingArguments:
    """Of a run that writes nothing but its end."""
    fields = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no"}
    return kind(output_dir="run-of-args", **fields)


NAMES: dict[str, Callable[[], Any]] = {
    "accelerator": lambda: Accelerator(cpu=True),
    "args": arguments,
    "attention_mask": lambda: torch.ones(2, 16, dtype=torch.long),
    "base": moe,
    "batches": batches,
    "blocks": rows,
    "dense": dense,
    "dense_config": lambda: dense().config,
    "input_ids": input_ids,
    "loader": batches,
    "model": moe,
    "my_tokenised_blocks": rows,
    "others": batches,
    "rows": rows,
    "sft_args": lambda: arguments(SFTConfig),
    "steps": lambda: [batches()],
    "texts_of_the_domain": input_ids,
    "tokenizer": tokenizer,
}


def write_folders(folder: Path) -> None:
    """What commands find: models, text, and the programs of the checkout."""
    for name in LINKS:
        (folder / name).symlink_to(ROOT / name)
    for name in (*DENSE, "Qwen/Qwen3-0.6B"):
        dense("qwen3" if name.startswith("Qwen") else "llama").save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    for name in MOES:
        moe_hf.upcycle_checkpoint(folder / "DENSE", folder / name, num_experts=4, noise=0.1, verify=False)
    for row in corpus():
        path = folder / "my_texts" / row["domain"] / f"{row['document']}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(row["text"])
    (folder / "my_run").mkdir()
    state = TrainerState(global_step=2, max_steps=2, log_history=[{"loss": 3.0, "step": 2}])
    state.save_to_json(str(folder / "my_run" / "trainer_state.json"))


@contextmanager
def time_lapse() -> Iterator[None]:
    """Training ends after two steps, whatever it was asked for, the built-in text is short, and pictures are empty files.

    Checkpoints have the number of the step that was asked for.
    """
    init = TrainingArguments.__post_init__
    asked: dict[str, int] = {}

    def shortened(self: TrainingArguments) -> None:
        if self.max_steps != MOST_STEPS:
            asked[str(self.output_dir)] = self.max_steps
        self.max_steps, self.warmup_steps, self.logging_steps = MOST_STEPS, 0, 1
        self.save_steps = self.eval_steps = MOST_STEPS
        # TRL asks for it by a name of which transformers warns.
        self.gradient_checkpointing = None
        self.use_cpu, self.disable_tqdm, self.dataloader_pin_memory = True, True, False
        init(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingArguments, "__post_init__", shortened)
        patch.setattr(data, "builtin_corpus", corpus)
        # Drawing is most of a report's time, and what its own tests look at.
        patch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).touch())
        yield
    for output, steps in asked.items():
        checkpoint = Path(output) / f"checkpoint-{MOST_STEPS}"
        if checkpoint.is_dir() and steps > 0:
            checkpoint.rename(checkpoint.with_name(f"checkpoint-{steps}"))
