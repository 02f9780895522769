"""The main job on real text: train a small dense model, make it a MoE, fine-tune it, compare it with dense controls.

    python -m training.demo                  # or: make demo
    python -m training.demo --seeds 3        # or: make demo SEEDS=3
    python -m training.demo --source FOLDER  # a dense model of yours, by folder or Hub id, instead of a new one

Everything goes to one folder, `demo` by default: the files of each stage, among them a report on the experts and the
fine-tuned MoE with its card, ready for `moe-hf push`; and `results.json`. A second run reuses the stages whose settings are the
same.
"""

import json
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import moe_hf
from moe_hf.data import train_tokenizer
from moe_hf.finetuning import apply_scope
from moe_hf.hub import save_model

from .base import Job
from .bigram import KneserNeyBigram, neighbours
from .card import card_facts
from .forecast import continued_rate, forecast
from .real import RealDemo
from .real_tables import write_results
from .settings import ARMS, MOES, RealSettings, Settings, dense_config, parse_arguments, shape
from .steps import can_pack, reload_and_sample, save_probe, train
from .tables import print_results, summary


PROMPTS = ("def __init__(self, ", "import os\n", "The following ")


class Demo(Job):
    """The toy: a dense model from scratch, or a source, its MoE, and the arms of both."""

    def data(self) -> dict[str, Any]:
        """Corpus -> documents held out -> tokenizer -> blocks."""

        def build(folder: Path) -> dict[str, Any]:
            settings = self.settings
            train_text, held_out_text = self.split_text()
            packed = True
            if settings.source is None:
                tokenizer = train_tokenizer(train_text, settings.vocab_size)
            else:
                tokenizer = AutoTokenizer.from_pretrained(settings.source)
                packed = can_pack(settings.source)
            tokenizer.save_pretrained(folder / "tokenizer")
            held_out = {"held_out": (held_out_text, settings.evaluation_tokens)}
            return self.save_text(folder, tokenizer, packed, train_text, held_out)

        names = ("source", "vocab_size", "code_characters", "held_out_share", "evaluation_tokens", "block_size")
        more = self.versions() | {"source_files": self.source_files()}
        return self.stage("data", [], build, **self.pick(*names), **more)

    def bigram(self, data: dict, seed: int) -> dict[str, Any]:
        """The baseline: a smoothed bigram model of the tokens that the dense model, or a source's MoE, is trained on."""
        name = "continued_tokens" if self.settings.source else "pretraining_tokens"

        def build(folder: Path) -> dict[str, Any]:
            rows = self.training_rows(seed, 0, getattr(self.settings, name)).with_format("numpy")
            held_out = self.held_out()
            vocab_size = len(self.tokenizer())
            model = KneserNeyBigram(*neighbours(rows["input_ids"][:], rows["labels"][:]), vocab_size)
            pairs = {
                domain: neighbours(rows["input_ids"][:].numpy(), rows["labels"][:].numpy())
                for domain, rows in held_out.items()
            }
            pairs["all"] = tuple(np.concatenate(parts) for parts in zip(*pairs.values(), strict=True))
            return {"held_out": {domain: {"token_loss": model.token_loss(*pair)} for domain, pair in pairs.items()}}

        return self.stage(f"seed{seed}/bigram", [data], build, seed=seed, **self.pick(name, "batch_size"))

    def dense(self, data: dict, seed: int) -> dict[str, Any]:
        """The dense model: trained from scratch, or the source; saved as an ordinary checkpoint."""
        settings = self.settings

        def build(folder: Path) -> dict[str, Any]:
            transformers.set_seed(seed)
            result: dict[str, Any] = {}
            if settings.source is None:
                model = LlamaForCausalLM(dense_config(settings, self.tokenizer())).to(self.device)
                rows = self.training_rows(seed, 0, settings.pretraining_tokens)
                result = train(
                    model,
                    rows,
                    folder / "trainer",
                    learning_rate=settings.pretraining_learning_rate,
                    **self.recipe(seed),
                )
            else:
                source = Path(settings.source).expanduser()
                model = AutoModelForCausalLM.from_pretrained(
                    source if source.is_dir() else settings.source, dtype=torch.float32
                ).to(self.device)
            return result | self.finish(model, folder)

        names = [field.name for field in fields(Settings) if field.name.startswith(("pretraining", "hidden", "num_h"))]
        names += ["intermediate_size", "num_attention_heads", "batch_size", "warmup_share", "weight_decay", "source"]
        return self.stage(f"seed{seed}/dense", [data], build, seed=seed, device=self.device, **self.pick(*names))

    def upcycle(self, name: str, dense: dict, seed: int) -> dict[str, Any]:
        """Dense checkpoint -> MoE checkpoint of the shape that `name` says, verified."""

        def build(folder: Path) -> dict[str, Any]:
            model = moe_hf.upcycle(
                self.stages.folder(f"seed{seed}/dense"),
                **shape(name, self.settings),
                noise=self.settings.expert_noise,
                seed=seed,
                verify_inputs=self.probe_ids(),
            ).to(self.device)
            return {"verification": model.config.upcycling["verification"]} | self.finish(model, folder)

        names = ("num_experts", "num_experts_per_tok", "expert_noise")
        return self.stage(f"seed{seed}/{name}", [dense], build, seed=seed, **self.pick(*names))

    def arm(self, name: str, records: dict[str, dict], seed: int) -> dict[str, Any]:
        """Continue the training of one of the models in a scope."""
        settings, arm = self.settings, ARMS[name]
        flops = {start: records[start]["result"]["forward_flops_per_token"] for start in ("dense", "moe")}
        tokens = settings.continued_tokens * (flops["moe"] / flops["dense"] if arm.equal_flops else 1)

        def build(folder: Path) -> dict[str, Any]:
            transformers.set_seed(seed)
            model = self.load(f"seed{seed}/{arm.start}")
            report = apply_scope(model, arm.scope)
            print(report, flush=True)
            rows = self.training_rows(seed, 0 if settings.source else settings.pretraining_tokens, int(tokens))
            rate = continued_rate(settings, model, arm.scope)
            result = train(model, rows, folder / "trainer", learning_rate=rate, **self.recipe(seed))
            result["learning_rate"] = rate
            result |= self.finish(model, folder) | asdict(arm)
            result["trainable_parameters"] = report.trainable_parameters
            if arm.start != "dense":
                save_probe(model, self.probe_ids(), folder / "probe.pt")
            return result

        names = ("continued_tokens", "continued_learning_rate", "batch_size", "warmup_share", "weight_decay")
        own = {"arm": asdict(arm), "tokens": int(tokens), "seed": seed, "device": self.device}
        return self.stage(f"seed{seed}/{name}", [records[arm.start]], build, **own, **self.pick(*names))

    def reload(self, arm: dict, name: str, seed: int) -> dict[str, Any]:
        """Load a fine-tuned MoE in a fresh process with plain `from_pretrained`, compare its logits and sample."""

        def build(folder: Path) -> dict[str, Any]:
            result = reload_and_sample(self.stages.folder(f"seed{seed}/{name}").resolve(), PROMPTS)
            (folder / "samples.txt").write_text("\n\n----\n\n".join(result["samples"]) + "\n", encoding="utf-8")
            return result

        return self.stage(f"seed{seed}/{name}-reload", [arm], build)

    def routing(self, arm: dict, name: str, seed: int) -> dict[str, Any]:
        """Report on what the experts do with held-out text, and how far each is from its dense origin."""

        def build(folder: Path) -> dict[str, Any]:
            title = f"{name}, seed {seed}, held-out text"
            return self.report(folder, f"seed{seed}/{name}", f"seed{seed}/dense", title)

        return self.stage(f"seed{seed}/{name}-routing", [arm], build)

    def share(self, records: dict[str, dict], name: str, control: str, seed: int) -> dict[str, Any]:
        """The fine-tuned MoE as others get it: weights, code, tokenizer, and a card of what was measured."""

        def build(folder: Path) -> dict[str, Any]:
            own = self.stages.folder(f"seed{seed}/{name}")
            facts = card_facts(
                records, name, control, self.settings, seed, own / "trainer", own.with_name(f"{name}-routing")
            )
            save_model(self.load(f"seed{seed}/{name}"), self.tokenizer(), folder / "model", card_facts=facts)
            return {"files": sorted(file.name for file in (folder / "model").iterdir())}

        return self.stage(f"seed{seed}/{name}-shared", list(records.values()), build)

    def forecast(self) -> dict[str, Any]:
        """What the stages of a source will take, said before the first one."""
        names = ("source", "seeds", "block_size", "batch_size", "num_experts", "num_experts_per_tok")
        names += ("continued_tokens", "evaluation_tokens")

        def build(folder: Path) -> dict[str, Any]:
            return forecast(self.settings, self.output_dir, self.evaluation_batch)

        return self.stage(
            "forecast", [], build, **self.pick(*names), device=self.device, source_files=self.source_files()
        )

    def run_seed(self, data: dict, seed: int) -> dict[str, Any]:
        """All stages of one seed."""
        records = {"bigram": self.bigram(data, seed), "dense": self.dense(data, seed)}
        records |= {name: self.upcycle(name, records["dense"], seed) for name in MOES}
        for name in ARMS:
            records[name] = self.arm(name, records, seed)
        records["moe_all-reload"] = self.reload(records["moe_all"], "moe_all", seed)
        for name in (name for name, arm in ARMS.items() if arm.start in MOES):
            records[f"{name}-routing"] = self.routing(records[name], name, seed)
        records["moe_all-shared"] = self.share(records, "moe_all", "dense_all", seed)
        return {"seed": seed, "seconds": sum(r["seconds"] for r in records.values())} | {
            name: record["result"] | {"seconds": record["seconds"]} for name, record in records.items()
        }

    def run(self) -> dict[str, Any]:
        """Run what is not there yet and return the results of all seeds."""
        start = time.perf_counter()
        if self.settings.source is not None:
            self.forecast()
        data = self.data()
        seeds = [self.run_seed(data, seed) for seed in range(self.settings.seeds)]
        return self.results(time.perf_counter() - start, data, seeds) | {
            "seconds_of_all_stages": data["seconds"] + sum(seed["seconds"] for seed in seeds),
            "summary": summary(seeds),
        }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the demo that the arguments ask for, write `results.json` and print the tables; returns the results."""
    settings, output_dir = parse_arguments(arguments, __doc__.splitlines()[0])
    is_real = isinstance(settings, RealSettings)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    results = (RealDemo if is_real else Demo)(settings, output_dir).run()
    (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if is_real:
        write_results(results, settings, output_dir)
    else:
        print_results(results, output_dir)
    return results
