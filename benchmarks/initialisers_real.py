"""What each initialiser makes of a real pretrained model: its loss at the start, and after a short training.

    python -m benchmarks.initialisers_real --model FOLDER --out DIR
    python -m benchmarks.initialisers_real --model FOLDER --out DIR --arms copy,drop_0.5 --rates 1e-4,1e-3
    python -m benchmarks.initialisers_real --model FOLDER --out DIR --steps 0 --sparse-step 1   # the start alone

Text is the built-in corpus, half code and half prose, tokenised with the model's own tokenizer. Each run (an arm at a
rate) is a folder of DIR with one JSON; a run that was stopped is done again, a finished one is read, so a list of arms may
be given in pieces: the table has all that was run so far. An arm's rate is chosen on validation documents; the table has the loss on test documents.
"""

import argparse
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import moe_hf
from benchmarks.runs import (
    Pace,
    held_out_rows,
    machine,
    rows_in_order,
    run_study,
    saved_rows,
    token_losses,
    train_arm,
    write_results,
)
from moe_hf.data import builtin_corpus, split_by_document, tokenize_and_pack
from moe_hf.errors import MoEError
from moe_hf.upcycling.initialisers import make_initialiser
from training.demo.stages import Stages
from training.demo.steps import batches


DOMAINS = ("code", "prose")
SPECIALIST_RATE = 1e-4


@dataclass(frozen=True)
class Settings:
    """What all runs share; a run whose settings changed is done again."""

    steps: int = 32
    batch_size: int = 2
    block_size: int = 256
    held_out_rows: int = 6  # of each domain, for validation and again for the test
    sparse_step: int = 3  # each third layer has experts
    warmup_share: float = 0.1
    weight_decay: float = 0.0
    seed: int = 0


TINY = {"steps": 2, "block_size": 16, "held_out_rows": 1}


@dataclass(frozen=True)
class Arm:
    """One way to start the experts.

    Attributes:
        title: its name in the table.
        init: an initialiser's name.
        options: of the initialiser.
        num_experts, num_experts_per_tok: E and K.
        noise: of `moe_hf.upcycle`.
        specialists: whether one model is trained on each domain first, to be mixed.
    """

    title: str
    init: str
    options: dict[str, Any] = field(default_factory=dict)
    num_experts: int = 4
    num_experts_per_tok: int = 2
    noise: float = 0.0
    specialists: bool = False


def _split(experts: int, chosen: int, letters: str, scale: float) -> Arm:
    return Arm(f"split, {chosen} of {experts}, scale {letters}", "split", {"scale": scale}, experts, chosen)


ARMS = {
    "copy": Arm("copy", "copy"),
    "noise_0.1": Arm("copy, noise 0.1", "copy", noise=0.1),
    "noise_0.5": Arm("copy, noise 0.5", "copy", noise=0.5),
    "permute": Arm("permute", "permute"),
    "permute_0.5": Arm("permute, ratio 0.5", "permute", {"ratio": 0.5}),
    "drop_0.1": Arm("drop, ratio 0.1", "drop", {"ratio": 0.1}),
    "drop_0.5": Arm("drop, ratio 0.5", "drop", {"ratio": 0.5}),
    "granular": Arm("granular, 2 shards", "granular", {"shards": 2}, 8, 4),
    "mix": Arm("mix of the model and two specialists", "mix", specialists=True),
    **{
        f"split_{k}of{e}_{name}": _split(e, k, letters, scale)
        for e, k in ((4, 2), (8, 4), (8, 2), (16, 4))
        for name, letters, scale in (("E", "E", e), ("K", "K", k), ("mean", "sqrt(K E)", (k * e) ** 0.5))
    },
}


class RealStudy:
    """All runs of one model below one folder."""

    def __init__(self, model: str, settings: Settings, output_dir: Path, arms: list[str], rates: list[float]) -> None:
        self.source = model
        self.settings = settings
        self.arms = arms
        self.rates = rates if settings.steps else rates[:1]
        self.stages = Stages(output_dir, say=lambda line: print(line, flush=True))

    def data(self) -> dict[str, Any]:
        """Packed rows of documents that are different ones in each of three parts."""
        settings = self.settings
        needed = {"train": (settings.steps + 1) * settings.batch_size}
        needed |= dict.fromkeys(("validation", "test"), settings.held_out_rows)

        def build(folder: Path) -> dict[str, Any]:
            tokenizer = AutoTokenizer.from_pretrained(self.source)
            train, held_out = split_by_document(builtin_corpus(), 0.2)
            validation, test = split_by_document(held_out, 0.5)
            counts = {}
            for part, documents in (("train", train), ("validation", validation), ("test", test)):
                for domain in DOMAINS:
                    text = documents.filter(lambda row, domain=domain: row["domain"] == domain).shuffle(seed=0)
                    text = text.select(range(min(len(text), 4 * needed[part])))
                    rows = tokenize_and_pack(text, tokenizer, settings.block_size)
                    rows = rows.select(range(min(len(rows), needed[part])))
                    rows.save_to_disk(folder / part / domain)
                    counts[f"{part}/{domain}"] = len(rows)
            return counts

        described = {"block_size": settings.block_size, "rows": needed, "model": Path(self.source).name}
        return self.stages.run("data", described, build)

    def rows(self, part: str) -> dict[str, datasets.Dataset]:
        """Rows of a part by domain."""
        return held_out_rows(self.stages.folder("data") / part)

    def text(self, domains: tuple[str, ...] = DOMAINS) -> datasets.Dataset:
        """Training rows of all steps, as many of each of `domains`, mixed."""
        settings = self.settings
        count = settings.steps * settings.batch_size // len(domains)
        parts = [saved_rows(self.stages.folder("data") / "train" / name) for name in domains]
        mixed = datasets.concatenate_datasets([rows_in_order(part, settings.seed, 0, count) for part in parts])
        return mixed.shuffle(seed=settings.seed).with_format("torch")

    def dense(self) -> PreTrainedModel:
        """The pretrained model, in float32."""
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32)

    def train(self, name: str, model: PreTrainedModel, text: datasets.Dataset, rate: float) -> list[dict[str, Any]]:
        """Train in place, one pass over `text`; the validation loss at the end."""
        settings, rows = self.settings, self.rows("validation")
        steps = len(text) // settings.batch_size
        return train_arm(
            name,
            model,
            batches(text, settings.batch_size),
            steps,
            Pace(rate, max(1, round(settings.warmup_share * steps)), settings.weight_decay),
            measure=lambda model: token_losses(model, rows),
            measured_at={steps},
        )

    def specialist(self, domain: str) -> Path:
        """The folder of the dense model, trained on one domain for half the steps: the MLPs of the layers with experts."""

        def build(folder: Path) -> dict[str, Any]:
            model, step = self.dense(), self.settings.sparse_step
            for name, parameter in model.named_parameters():
                layer = next((int(part) for part in name.split(".") if part.isdecimal()), -1)
                parameter.requires_grad_(".mlp." in name and (layer + 1) % step == 0)
            text = self.text((domain,))
            half = text.select(range(len(text) // 2)).with_format("torch")
            points = self.train(f"specialist {domain}", model, half, SPECIALIST_RATE)
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(self.source).save_pretrained(folder)
            return {"points": points}

        name = f"specialists/{domain}"
        self.stages.run(name, asdict(self.settings) | {"rate": SPECIALIST_RATE}, build)
        return self.stages.folder(name)

    def model(self, arm: Arm) -> PreTrainedModel:
        """An arm's MoE at its first step; of it the experts and routers train."""
        options = dict(arm.options)
        if arm.specialists:
            options["sources"] = [str(self.specialist(domain)) for domain in DOMAINS]
            options["rest"] = "base"
        moe = moe_hf.upcycle(
            self.dense(),
            num_experts=arm.num_experts,
            num_experts_per_tok=arm.num_experts_per_tok,
            init=make_initialiser(arm.init, options),
            noise=arm.noise,
            seed=self.settings.seed,
            decoder_sparse_step=self.settings.sparse_step,
        )
        moe_hf.apply_scope(moe, "moe")
        return moe

    def run_arm(self, name: str, rate: float) -> dict[str, Any]:
        """Train one arm at one rate."""

        def build(folder: Path) -> dict[str, Any]:
            model, rows = self.model(ARMS[name]), self.rows("test")
            before = token_losses(model, rows)
            points = self.train(f"{name} at {rate:g}", model, self.text(), rate)
            return {
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "points": points,
                "test": [before, token_losses(model, rows)],
            }

        described = asdict(self.settings) | asdict(ARMS[name]) | {"rate": rate, "model": Path(self.source).name}
        return self.stages.run(f"runs/{name}/{rate:g}", described, build)

    def rates_run(self, name: str) -> set[float]:
        """The rates at which an arm was run by earlier calls."""
        folder = self.stages.folder(f"runs/{name}")
        # What begins with a dot is of a run that was killed.
        return {float(run.name) for run in folder.glob("[!.]*")}

    def dense_loss(self) -> dict[str, Any]:
        """Loss of the pretrained model on the test documents."""
        described = {"settings": self.settings.block_size, "rows": self.settings.held_out_rows}
        return self.stages.run("dense", described, lambda folder: token_losses(self.dense(), self.rows("test")))

    def run(self) -> dict[str, Any]:
        """Run what is missing, and return all results."""
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        data = self.data()
        dense = self.dense_loss()["result"]
        arms = {}
        for name in ARMS:
            rates = set(self.rates if name in self.arms else []) | self.rates_run(name)
            if not rates:
                continue
            runs = {f"{rate:g}": self.run_arm(name, rate)["result"] for rate in sorted(rates)}
            best = min(runs, key=lambda rate: runs[rate]["points"][-1]["loss"]["all"])
            arms[name] = {"title": ARMS[name].title, "runs": runs, "best_rate": best}
        return {
            "model": Path(self.source).name,
            "settings": asdict(self.settings),
            "machine": machine(),
            "data": data["result"],
            "dense": dense,
            "arms": arms,
        }


def markdown_table(results: dict[str, Any]) -> str:
    """Losses of each arm at its best rate, and what the other rates reached on the validation documents."""
    settings = results["settings"]
    tokens = settings["steps"] * settings["batch_size"] * settings["block_size"]
    lines = [
        f"{results['model']}: loss in nats/token on test documents; the dense model has {results['dense']['all']:.3f}. Trained: "
        f"{tokens:,} tokens, scope `moe`, experts in each layer whose number is a multiple of {settings['sparse_step']}.",
        "",
        "| initialiser | parameters | at the start | trained | rate | validation, all rates |",
        "|---|---|---|---|---|---|",
    ]
    for arm in results["arms"].values():
        best = arm["runs"][arm["best_rate"]]
        start, end = (losses["all"] for losses in best["test"])
        ends = ", ".join(f"{rate}: {run['points'][-1]['loss']['all']:.3f}" for rate, run in arm["runs"].items())
        size = f"{best['parameters'] / 1e6:.1f} M"
        lines.append(f"| {arm['title']} | {size} | {start:.3f} | {end:.3f} | {arm['best_rate']} | {ends} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the study, and write its results and table into the output folder."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the dense model: a folder, or a Hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything; finished runs in it are kept")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"some of {','.join(ARMS)}")
    parser.add_argument(
        "--rates", default="1e-4", help="learning rates that each arm tries, separated by commas (1e-4)"
    )
    parser.add_argument("--steps", type=int, help=f"of a run ({defaults.steps}); 0 for the losses at the start alone")
    parser.add_argument(
        "--sparse-step", type=int, help=f"experts in each layer of this multiple ({defaults.sparse_step})"
    )
    parser.add_argument("--tiny", action="store_true", help="very short, to see that it works")
    given = parser.parse_args(arguments)
    names = given.arms.split(",")
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise MoEError(f"--arms has {unknown}; it takes some of {', '.join(ARMS)}, separated by commas.")
    try:
        rates = [float(rate) for rate in given.rates.split(",")]
    except ValueError:
        rates = [0.0]
    if min(rates) <= 0:
        raise MoEError(
            f"--rates is {given.rates!r}; it takes numbers above 0, separated by commas, such as 1e-4,1e-3."
        )
    chosen = {"steps": given.steps, "sparse_step": given.sparse_step}
    if (given.steps or 0) < 0 or (given.sparse_step is not None and given.sparse_step < 1):
        raise MoEError(
            f"--steps is {given.steps} and --sparse-step is {given.sparse_step}: at least 0, and at least 1."
        )
    settings = replace(defaults, **(TINY if given.tiny else {}))
    settings = replace(settings, **{name: value for name, value in chosen.items() if value is not None})
    results = RealStudy(given.model, settings, given.out, names, rates).run()
    write_results(results, markdown_table(results), given.out)
    return results


if __name__ == "__main__":
    run_study(main)
