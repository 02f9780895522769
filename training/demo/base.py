"""What the demonstrations share: stages that depend on each other, text, models on the disk, evaluation, reports."""

import hashlib
import json
import os
import platform
import resource
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import moe_hf
from moe_hf.data import builtin_corpus, corpus_fingerprint, split_by_document, tokenize_and_pack
from moe_hf.errors import MoEError
from moe_hf.inspection import forward_flops
from moe_hf.reporting.report import write_report
from moe_hf.reporting.routing_statistics import routing_statistics

from .settings import RealSettings, Settings
from .stages import Stages
from .steps import batches, count_parameters, evaluate, limit_code


class Job:
    """Stages below one folder; each returns its record and keeps its files there.

    Attributes:
        evaluation_batch: rows of a forward pass without gradients.
        probe_rows, probe_tokens: of each domain, and of each row, what logits are compared on.
        tokenizer_folder: where the tokenizer of all models is.
    """

    evaluation_batch = 16
    probe_rows, probe_tokens = 2, None
    tokenizer_folder = "data/tokenizer"

    def __init__(self, settings: Settings | RealSettings, output_dir: Path) -> None:
        self.settings = settings
        self.output_dir = output_dir
        self.stages = Stages(output_dir, say=lambda line: print(line, flush=True))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def stage(self, name: str, after: list[dict], build, **settings: Any) -> dict[str, Any]:
        """Run a stage whose results depend on `settings` and on the stages `after` which it comes."""
        earlier = [hashlib.sha256(json.dumps(r["settings"], sort_keys=True).encode()).hexdigest()[:16] for r in after]
        return self.stages.run(name, settings | {"after": earlier}, build)

    def pick(self, *names: str) -> dict[str, Any]:
        """Some of the settings."""
        return {name: getattr(self.settings, name) for name in names}

    def load(self, name: str) -> PreTrainedModel:
        """The model of a stage, in float32."""
        return AutoModelForCausalLM.from_pretrained(self.stages.folder(name), dtype=torch.float32).to(self.device)

    def held_out(self, split: str = "held_out") -> dict[str, datasets.Dataset]:
        """Rows by domain that nothing trains on."""
        folders = sorted((self.stages.folder("data") / split).iterdir())
        return {folder.name: datasets.load_from_disk(str(folder)).with_format("torch") for folder in folders}

    def evaluate(self, model: PreTrainedModel, split: str = "held_out") -> dict[str, Any]:
        """Token loss, perplexity and accuracy of each domain of a split, and of all."""
        return evaluate(model, self.held_out(split), self.evaluation_batch)

    def probe_ids(self) -> torch.Tensor:
        """Token ids of a few held-out rows of each domain."""
        rows = self.held_out().values()
        return torch.cat([part[: self.probe_rows]["input_ids"].long() for part in rows])[:, : self.probe_tokens]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of all models."""
        return AutoTokenizer.from_pretrained(self.stages.folder(self.tokenizer_folder))

    def recipe(self, seed: int) -> dict[str, Any]:
        """What all trainings share."""
        return {"seed": seed, **self.pick("batch_size", "warmup_share", "weight_decay")}

    def training_rows(self, seed: int, first_token: int, num_tokens: int) -> datasets.Dataset:
        """Rows of the training text in the order of `seed`, from the token `first_token` on; whole batches."""
        rows = datasets.load_from_disk(str(self.stages.folder("data") / "train")).with_format("torch")
        step = self.settings.batch_size * self.settings.block_size
        first, count = (tokens // step * self.settings.batch_size for tokens in (first_token, num_tokens))
        if first + count > len(rows):
            raise MoEError(
                f"{num_tokens:,} training tokens from token {first_token:,} on are asked for, the corpus has "
                f"{len(rows) * self.settings.block_size:,}: raise code_characters or lower the token counts."
            )
        return rows.select(np.random.default_rng(seed).permutation(len(rows))[first : first + count])

    def split_text(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Training documents, and those held out of it."""
        text, held_out = split_by_document(builtin_corpus(), self.settings.held_out_share)
        return limit_code(text, self.settings.code_characters), held_out

    def save_text(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        packed: bool,
        train: datasets.Dataset,
        held_out: dict[str, tuple[datasets.Dataset, int]],
    ) -> dict[str, Any]:
        """Write blocks of the training text, and of each split of held-out text so many tokens per domain; say what they are."""
        block_size = self.settings.block_size
        rows = tokenize_and_pack(train, tokenizer, block_size, packed=packed)
        rows.save_to_disk(folder / "train")
        result = {
            "corpus_sha256": corpus_fingerprint(train),
            "training_characters": sum(map(len, train["text"])),
            "training_tokens": len(rows) * block_size,
            "packed": packed,
        }
        for split, (text, tokens) in held_out.items():
            result[f"{split}_tokens"] = {}
            for domain in sorted(set(text["domain"])):
                of_domain = text.filter(lambda row, domain=domain: row["domain"] == domain).shuffle(seed=0)
                rows = tokenize_and_pack(of_domain, tokenizer, block_size, packed=packed)
                rows = rows.select(range(min(len(rows), tokens // block_size)))
                rows.save_to_disk(folder / split / domain)
                result[f"{split}_tokens"][domain] = len(rows) * block_size
        return result

    def versions(self) -> dict[str, str]:
        """What the text and its tokens depend on besides the settings."""
        return {"python": platform.python_version(), "moe_hf": moe_hf.__version__}

    def source_files(self) -> list[list]:
        """Names, sizes and times of the files of a source on this machine, so that a changed source is noticed."""
        path = Path(self.settings.source or "").expanduser()
        if self.settings.source is None or not path.exists():
            return []
        files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def sizes(self, model: PreTrainedModel) -> dict[str, Any]:
        """Parameters, and the arithmetic of a token."""
        return count_parameters(model) | {
            "forward_flops_per_token": forward_flops(model, self.settings.block_size),
        }

    def finish(self, model: PreTrainedModel, folder: Path) -> dict[str, Any]:
        """Save a model with its tokenizer, and measure it."""
        result = self.sizes(model) | {"held_out": self.evaluate(model)}
        self.save(model, folder)
        return result

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """An ordinary checkpoint with the tokenizer."""
        model.save_pretrained(folder)
        self.tokenizer().save_pretrained(folder)

    def report(self, folder: Path, moe: str, dense: str, title: str) -> dict[str, Any]:
        """Write a report on what the experts do with held-out text, and how far each is from its dense origin."""
        rows = {domain: batches(rows, self.evaluation_batch) for domain, rows in self.held_out().items()}
        statistics = routing_statistics(self.load(moe), rows, tokenizer=self.tokenizer(), origin=self.load(dense))
        write_report(statistics, folder, title=title)
        return statistics.summary()

    def machine(self) -> dict[str, Any]:
        """What this ran on, and the memory that this process needed at most."""
        return {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if self.device == "cuda" else platform.processor() or "cpu",
            "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "versions": {"python": platform.python_version(), "torch": torch.__version__}
            | {"transformers": transformers.__version__, "moe_hf": moe_hf.__version__},
        }

    def results(self, seconds: float, data: dict[str, Any], seeds: list[dict[str, Any]]) -> dict[str, Any]:
        """What every demonstration writes down."""
        settings = {field.name: getattr(self.settings, field.name) for field in fields(self.settings)}
        return {
            "settings": settings,
            "machine": self.machine(),
            "seconds_of_this_run": seconds,
            "reused": self.stages.reused,
            "built": self.stages.built,
            "data": data["result"] | {"seconds": data["seconds"]},
            "seeds": seeds,
        }
