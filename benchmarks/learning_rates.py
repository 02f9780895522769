"""Learning rates of a pretrained model: held-out loss before and after a short training, by scope and rate.

    OMP_NUM_THREADS=1 python -m benchmarks.learning_rates --model FOLDER --out DIR

upcycles a dense model (4 experts in each third layer, 2 per token) and trains it at each rate of a grid in each scope, on
the same rows of the built-in text in the same order; `ffn` is the dense control: the MLPs of the same layers, without experts.
Each run is one folder with one JSON (`stage.json`). A run that was stopped is done again, a finished one is read, so that the
same command goes on where it was. `--scopes` and `--rates` choose runs.

Held-out documents are cut in two: a rate is chosen on `validation`, and what it gives is reported on `test`.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from benchmarks.runs import (
    add_size_options,
    machine,
    rows_in_order,
    run_study,
    saved_rows,
    sizes_given,
    small_llama,
    write_results,
)
from moe_hf import upcycle
from moe_hf.data import builtin_corpus, split_by_document, tokenize_and_pack, train_tokenizer
from moe_hf.errors import MoEError
from moe_hf.finetuning import ExpertLoraConfig, add_expert_lora, apply_scope, find_moe_blocks
from moe_hf.inspection import inspect_model
from training.demo.stages import Stages
from training.demo.steps import can_pack, evaluate, limit_code, train


SCOPES = ("moe", "ffn", "all", "expert_lora", "router", "experts")
# Factors of 3, as near as two digits come.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
SHAPE = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 3}
EVALUATION_BATCH = 2
PARTS = ("validation", "test")


@dataclass(frozen=True)
class Settings:
    """What all runs share; a run whose settings changed is done again."""

    model: str | None = None
    steps: int = 32
    batch_size: int = 2
    block_size: int = 256
    evaluation_tokens: int = 2_048  # of each domain, in each of the two parts
    code_characters: int = 400_000
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    seed: int = 0
    # Of the model that --tiny makes, which is not trained.
    hidden_size: int = 16
    intermediate_size: int = 32
    num_hidden_layers: int = 3
    num_attention_heads: int = 2


TINY = {"steps": 2, "block_size": 32, "evaluation_tokens": 64, "code_characters": 60_000}


class Sweep:
    """All runs of one model below one folder."""

    def __init__(self, settings: Settings, output_dir: Path) -> None:
        self.settings = settings
        self.stages = Stages(output_dir, say=lambda line: print(line, flush=True))

    def data(self) -> dict[str, Any]:
        """Packed rows of the built-in text in the model's tokens: `train`, `validation/<domain>`, `test/<domain>`."""

        def build(folder: Path) -> dict[str, Any]:
            chosen = self.settings
            train_text, held_out = split_by_document(builtin_corpus(), 0.1)
            train_text, packed = limit_code(train_text, chosen.code_characters), True
            if chosen.model is None:
                tokenizer = train_tokenizer(train_text, 300)
                config = small_llama(len(tokenizer), chosen)
                torch.manual_seed(chosen.seed)
                LlamaForCausalLM(config).save_pretrained(folder / "model")
            else:
                tokenizer, packed = AutoTokenizer.from_pretrained(chosen.model), can_pack(chosen.model)
            tokenize_and_pack(train_text, tokenizer, chosen.block_size, packed=packed).save_to_disk(folder / "train")
            for part, documents in zip(PARTS, reversed(split_by_document(held_out, 0.5, seed=1)), strict=True):
                for domain in sorted(set(documents["domain"])):
                    text = documents.filter(lambda row, domain=domain: row["domain"] == domain).shuffle(seed=0)
                    text = text.select(range(min(len(text), 40)))
                    rows = tokenize_and_pack(text, tokenizer, chosen.block_size, packed=packed)
                    count = min(len(rows), chosen.evaluation_tokens // chosen.block_size)
                    rows.select(range(count)).save_to_disk(folder / part / domain)
            return {"packed": packed}

        names = ("model", "block_size", "evaluation_tokens", "code_characters", "hidden_size", "intermediate_size")
        names += ("num_hidden_layers", "num_attention_heads", "seed")
        return self.stages.run("data", {name: getattr(self.settings, name) for name in names}, build)

    def dense(self) -> PreTrainedModel:
        """The dense model, in float32."""
        source = self.settings.model or self.stages.folder("data") / "model"
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

    def model(self, scope: str) -> PreTrainedModel:
        """The model of a scope, with what trains of it: the MoE, or the dense control."""
        dense = self.dense()
        moe = upcycle(dense, seed=self.settings.seed, **SHAPE)
        if scope == "ffn":
            layers = tuple(f"{block}." for block in find_moe_blocks(moe))
            for name, parameter in dense.named_parameters():
                parameter.requires_grad_(name.startswith(layers))
            return dense
        if scope == "expert_lora":
            return add_expert_lora(moe, ExpertLoraConfig(seed=self.settings.seed))
        apply_scope(moe, scope)
        return moe

    def losses(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        """Nats/token of each domain and of all, on both parts of the held-out text."""
        found = {}
        for part in PARTS:
            folders = sorted((self.stages.folder("data") / part).iterdir())
            rows = {folder.name: saved_rows(folder) for folder in folders}
            measured = evaluate(model, rows, EVALUATION_BATCH)
            found[part] = {domain: values["token_loss"] for domain, values in measured.items()}
        return found

    def before(self, data: dict[str, Any]) -> dict[str, Any]:
        """Losses and sizes of the upcycled model, which is the dense one before it trains."""

        def build(folder: Path) -> dict[str, Any]:
            facts = inspect_model(upcycle(self.dense(), seed=self.settings.seed, **SHAPE))
            sizes = {name: getattr(facts, name) for name in ("total_parameters", "active_parameters")}
            return sizes | {"losses": self.losses(self.dense())}

        return self.stages.run("before", {"shape": SHAPE, "after": fingerprint(data)}, build)

    def run(self, data: dict[str, Any], scope: str, rate: float) -> dict[str, Any]:
        """Losses after a training of `scope` at `rate`."""
        chosen = self.settings
        recipe = {
            name: getattr(chosen, name) for name in ("steps", "batch_size", "warmup_share", "weight_decay", "seed")
        }

        def build(folder: Path) -> dict[str, Any]:
            model = self.model(scope)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            rows = saved_rows(self.stages.folder("data") / "train")
            rows = rows_in_order(rows, chosen.seed, 0, chosen.steps * chosen.batch_size)
            how = {name: value for name, value in recipe.items() if name != "steps"}
            found = train(model, rows, folder / "trainer", learning_rate=rate, **how)
            return found | {"trained_parameters": trained, "losses": self.losses(model)}

        settings = recipe | {"scope": scope, "rate": rate, "shape": SHAPE, "after": fingerprint(data)}
        return self.stages.run(f"{scope}/{rate:g}", settings, build)

    def all_runs(self, scopes: list[str], rates: list[float]) -> dict[str, Any]:
        """Runs of `scopes` at `rates`, with the time left; then all that are there, these among them."""
        data = self.data()
        before = self.before(data)
        runs = [(scope, rate) for scope in scopes for rate in rates]
        spent, done = 0.0, 0
        for number, (scope, rate) in enumerate(runs, start=1):
            start, built = time.perf_counter(), len(self.stages.built)
            record = self.run(data, scope, rate)
            if len(self.stages.built) > built:
                spent, done = spent + time.perf_counter() - start, done + 1
            changes = ", ".join(f"{part} {value:+.4f}" for part, value in changes_of(record, before).items())
            left = "" if not done else f", at most {(len(runs) - number) * spent / done / 60:.0f} min left"
            print(f"run {number} of {len(runs)}: {scope} at {rate:g}: {changes}{left}", flush=True)
        found = {
            scope: {
                f"{record['settings']['rate']:g}": record["result"] | {"change": changes_of(record, before)}
                for record in self._finished(scope, data)
            }
            for scope in SCOPES
        }
        return {
            "settings": asdict(self.settings) | {"shape": SHAPE},
            "machine": machine(),
            "before": before["result"],
            "runs": {scope: by_rate for scope, by_rate in found.items() if by_rate},
        }

    def _finished(self, scope: str, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
        files = self.stages.folder(scope).glob("*/stage.json")
        records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        for record in sorted(records, key=lambda record: record["settings"]["rate"]):
            if record["settings"]["after"] == fingerprint(data) and record["settings"]["steps"] == self.settings.steps:
                yield record


def fingerprint(record: dict[str, Any]) -> str:
    """Of the settings of a stage, for those that come after it."""
    return hashlib.sha256(json.dumps(record["settings"], sort_keys=True).encode()).hexdigest()[:16]


def changes_of(record: dict[str, Any], before: dict[str, Any]) -> dict[str, float]:
    """Loss over all tokens after minus before, by part of the held-out text."""
    then, now = before["result"]["losses"], record["result"]["losses"]
    return {part: now[part]["all"] - then[part]["all"] for part in PARTS}


def best_rate(by_rate: dict[str, dict[str, Any]]) -> str:
    """The rate whose validation loss is lowest."""
    return min(by_rate, key=lambda rate: by_rate[rate]["change"]["validation"])


def markdown_table(results: dict[str, Any]) -> str:
    """Test loss after minus before, by rate and scope; the rate that validation chooses in bold."""
    runs, before = results["runs"], results["before"]
    rates = sorted({rate for by_rate in runs.values() for rate in by_rate}, key=float)
    lines = [
        f"{before['total_parameters'] / 1e6:.1f} M parameters, {before['active_parameters'] / 1e6:.1f} M active; loss before "
        f"{before['losses']['test']['all']:.4f}.",
        "",
        f"| rate | {' | '.join(runs)} |",
        "|---|" + "---|" * len(runs),
    ]
    best = {scope: best_rate(by_rate) for scope, by_rate in runs.items()}
    for rate in rates:
        cells = []
        for scope, by_rate in runs.items():
            text = f"{by_rate[rate]['change']['test']:+.3f}" if rate in by_rate else ""
            cells.append(f"**{text}**" if rate == best[scope] else text)
        lines.append(f"| {rate} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse_arguments(arguments: list[str] | None) -> tuple[Settings, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id of a dense model")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything; finished runs in it are kept")
    parser.add_argument("--scopes", default=",".join(SCOPES), help=f"some of {','.join(SCOPES)}")
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in RATES), help="learning rates")
    add_size_options(parser, Settings)
    given = parser.parse_args(arguments)
    if given.model is None and not given.tiny:
        raise MoEError("--model is missing: give the folder or Hub id of a dense model, or --tiny.")
    given.scopes = given.scopes.split(",")
    unknown = [scope for scope in given.scopes if scope not in SCOPES]
    if unknown:
        raise MoEError(f"--scopes has {unknown}; it takes some of {', '.join(SCOPES)}, separated by commas.")
    try:
        given.rates = [float(rate) for rate in given.rates.split(",")]
    except ValueError:
        raise MoEError(
            f"--rates is {given.rates!r}; it takes numbers separated by commas, such as 1e-5,3e-5."
        ) from None
    if not all(0 < rate < 1 for rate in given.rates):
        raise MoEError(f"--rates is {given.rates}; each must lie between 0 and 1.")
    return replace(Settings(given.model), **(TINY if given.tiny else {}) | sizes_given(given)), given


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the sweep, and write its results and table into the output folder."""
    settings, given = parse_arguments(arguments)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    results = Sweep(settings, given.out).all_runs(given.scopes, given.rates)
    write_results(results, markdown_table(results), given.out)
    return results


if __name__ == "__main__":
    run_study(main)
