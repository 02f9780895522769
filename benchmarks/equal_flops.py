"""Does an upcycled MoE that costs what its dense parent costs per token learn more from the same tokens?

    python -m benchmarks.equal_flops --out DIR                            # three seeds, all arms and lengths
    python -m benchmarks.equal_flops --out DIR --seeds 5                  # two seeds more; what is finished is kept
    python -m benchmarks.equal_flops --out DIR --arms 2_16 --lengths 245760

The arm `G_E` cuts the dense MLP into G shards and copies each E / G times: E experts of width F / G, of which a token uses
G. So it costs the dense model's arithmetic and a router's, and starts with the dense model's logits. `k1_E` has E whole
experts of which a token uses one. Each length is a run of its own, whose rate falls to a tenth. Rates are chosen for each
kind of arm and each length, the weight of the balance loss for the MoEs, by the loss on text that the results do not use.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_hf
from benchmarks.equal_flops_report import curves_plot, markdown_table
from benchmarks.runs import interleaved_step_seconds, machine, run_study, token_losses, write_results
from benchmarks.study import TINY as TINY_STUDY
from benchmarks.study import Settings as StudySettings
from benchmarks.study import Study
from moe_hf.errors import MoEError
from moe_hf.inspection import forward_flops
from moe_hf.trainer.fair_comparison import choose_rate
from moe_hf.upcycling.initialisers import Granular
from training.demo.steps import batches


DENSE = "dense"
ARMS = (DENSE, "2_16", "2_32", "2_64", "4_32", "4_64", "k1_8")
# The arm that a kind's learning rates are chosen with.
REPRESENTATIVES = {DENSE: DENSE, "granular": "2_16", "k1": "k1_8"}


@dataclass(frozen=True)
class Settings(StudySettings):
    """The demo's dense model and text."""

    parent_steps: int = 1_960
    vocab_size: int = 1_024
    evaluation_tokens: int = 15_360  # of each domain; one half chooses rates, the other is reported
    batch_size: int = 4
    hidden_size: int = 192
    intermediate_size: int = 448
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    warmup_share: float = 0.05
    evaluations: int = 1
    lengths: tuple[int, ...] = (122_880, 245_760, 491_520, 983_040)  # tokens of a run
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    balance_coefficients: tuple[float, ...] = (0.01, 0.001, 0.1)
    timing_rounds: int = 40


TINY = TINY_STUDY | {
    "intermediate_size": 64,
    "lengths": (128, 256),
    "learning_rates": (1e-3, 2e-3),
    "balance_coefficients": (0.01, 0.1),
    "evaluations": 1,
    "timing_rounds": 2,
}


def kind_of(arm: str) -> str:
    """The kind that an arm shares its learning rates with."""
    return DENSE if arm == DENSE else "k1" if arm.startswith("k1") else "granular"


class EqualFlopsStudy(Study):
    """The study: runs of each arm, length and seed, at chosen rates."""

    def title(self, name: str) -> str:
        """What an arm is called."""
        if name == DENSE:
            return "dense"
        first, experts = name.split("_")
        return f"{experts} whole experts, 1 per token" if first == "k1" else f"{first} shards, {experts} experts"

    def half(self, *, validation: bool) -> dict[str, datasets.Dataset]:
        """The half of the held-out rows that chooses, or the one that is reported."""
        rows = self.settings.evaluation_tokens // self.settings.block_size // 2
        return {
            name: part.select(range(rows * validation, rows * (1 + validation)))
            for name, part in self.held_out().items()
        }

    def model(self, arm: str, seed: int, balance: float) -> PreTrainedModel:
        """An arm's model at its first step."""
        parent = self.stages.folder(f"seed{seed}/parent")
        dense = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
        if arm == DENSE:
            return dense
        first, experts = arm.split("_")
        common = {"num_experts": int(experts), "seed": seed, "router_aux_loss_coef": balance}
        if first == "k1":
            # Weights that are not normalised, or the router would learn nothing from the loss; the start is inexact.
            inexact = {"num_experts_per_tok": 1, "norm_topk_prob": False, "allow_inexact": True}
            return moe_hf.upcycle(dense, **common, **inexact)
        shards = int(first)
        return moe_hf.upcycle(dense, **common, num_experts_per_tok=shards, init=Granular(shards=shards))

    def run_arm(
        self, name: str, parent: dict[str, Any], seed: int, *, tokens: int, rate: float, balance: float
    ) -> dict[str, Any]:
        """Train one arm for some tokens: its losses before and after on the reported text, and on that which chooses."""
        settings = self.settings
        steps = tokens // (settings.batch_size * settings.block_size)
        choices = {"tokens": tokens, "rate": rate} | ({} if name == DENSE else {"balance": balance})

        def build(folder: Path) -> dict[str, Any]:
            model = self.model(name, seed, balance)
            rows = self.rows(seed, settings.parent_steps, steps)
            points = self.train(f"seed {seed}, {name}, {choices}", model, rows, self.half(validation=False), rate)
            return {"points": points, "validation": token_losses(model, self.half(validation=True))["all"]} | choices

        chosen = "".join(f"_{key}{value:g}" for key, value in choices.items() if key != "tokens")
        shared = not_of_the_grid(settings) | choices | {"seed": seed, "parent": parent["settings"]}
        return self.stages.run(f"seed{seed}/{name}/tokens{tokens}{chosen}", shared, build)

    def sizes(self) -> dict[str, dict[str, Any]]:
        """Parameters, FLOPs and CPU time of each arm; all arms are timed in turns."""
        settings = self.settings

        def build(folder: Path) -> dict[str, Any]:
            models = {arm: self.model(arm, 0, 0.01) for arm in self.arms}
            text = list(batches(self.rows(0, settings.parent_steps, settings.timing_rounds), settings.batch_size))
            seconds = interleaved_step_seconds(models, text)
            return {
                arm: {
                    "parameters": sum(parameter.numel() for parameter in model.parameters()),
                    "forward_flops_per_token": forward_flops(model, settings.block_size),
                    "step_seconds": seconds[arm],
                }
                for arm, model in models.items()
            }

        return self.stages.run("sizes", asdict(settings) | {"arms": self.arms}, build)["result"]

    def choices(self, parent: dict[str, Any]) -> dict[str, Any]:
        """The weight of the balance loss, and a rate for each kind of arm and each length; with seed 0."""
        settings = self.settings

        @cache
        def loss(arm: str, tokens: int, rate: float, balance: float) -> float:
            record = self.run_arm(arm, parent, 0, tokens=tokens, rate=rate, balance=balance)
            return record["result"]["validation"]

        middle = sorted(settings.lengths)[(len(settings.lengths) - 1) // 2]
        usual_rate = settings.learning_rates[len(settings.learning_rates) // 2]
        moe, usual_balance = REPRESENTATIVES["granular"], settings.balance_coefficients[0]
        balances = {usual_balance: None}
        if moe in self.arms:
            balances = {value: loss(moe, middle, usual_rate, value) for value in settings.balance_coefficients}
        balance = min(balances, key=balances.get)
        rates = {
            kind: {
                tokens: best_of_grid(settings.learning_rates, lambda rate, a=arm, t=tokens: loss(a, t, rate, balance))
                for tokens in settings.lengths
            }
            for kind, arm in REPRESENTATIVES.items()
            if arm in self.arms
        }
        return {"balance": {"chosen": balance, "validation": balances}, "rates": rates}

    def run(self) -> dict[str, Any]:
        """Run what is missing, and return all results."""
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        settings, data = self.settings, self.data()
        parent = self.parent(data, 0)
        sizes, chosen = self.sizes(), self.choices(parent)
        runs: dict[str, dict[int, list]] = {arm: {tokens: [] for tokens in settings.lengths} for arm in self.arms}
        for seed in range(self.seeds):
            parent = self.parent(data, seed)
            for arm in self.arms:
                for tokens in settings.lengths:
                    rate, balance = chosen["rates"][kind_of(arm)][tokens]["chosen"], chosen["balance"]["chosen"]
                    record = self.run_arm(arm, parent, seed, tokens=tokens, rate=rate, balance=balance)
                    runs[arm][tokens].append({"seed": seed} | record["result"])
        return {
            "settings": asdict(settings) | {"seeds": self.seeds},
            "machine": machine(),
            "data": data["result"],
            "choices": chosen,
            "built": self.stages.built,
            "arms": {
                arm: {"title": self.title(arm), **sizes[arm], "runs": list(runs[arm].values())} for arm in self.arms
            },
        }


def not_of_the_grid(settings: Settings) -> dict[str, Any]:
    """The settings that a run depends on: of the grid it has its own point."""
    grid = ("lengths", "learning_rates", "balance_coefficients", "timing_rounds", "steps", "learning_rate")
    return {name: value for name, value in asdict(settings).items() if name not in grid}


def best_of_grid(rates: tuple[float, ...], loss: Callable[[float], float], limit: int = 3) -> dict[str, Any]:
    """The rate with the least loss; one at an end of the grid is followed by the next beyond it, at most `limit` times."""
    tried = {rate: loss(rate) for rate in rates}
    best, at_edge = choose_rate(tried)
    for _ in range(limit if len(rates) > 1 else 0):
        if not at_edge:
            break
        lowest, second, *_ = sorted(tried)
        step = second / lowest
        beyond = best / step if best == lowest else best * step
        tried[beyond] = loss(beyond)
        best, at_edge = choose_rate(tried)
    return {"chosen": best, "validation": dict(sorted(tried.items()))}


def parse_arguments(arguments: list[str] | None) -> tuple[Settings, Namespace]:
    """The command line.

    Raises:
        MoEError: an unknown arm, a study without its dense arm or without a kind's representative, or no seeds.
    """
    defaults = Settings()
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of everything; finished runs in it are kept")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm and length (3)")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"dense and some of {','.join(ARMS[1:])}, or other G_E")
    lengths = ",".join(map(str, defaults.lengths))
    parser.add_argument("--lengths", help=f"tokens of the runs, separated by commas ({lengths})")
    parser.add_argument("--tiny", action="store_true", help="very small, to see that it works")
    given = parser.parse_args(arguments)
    given.arms = given.arms.split(",")
    if given.seeds < 1:
        raise MoEError(f"--seeds is {given.seeds}: it must be at least 1.")
    for arm in given.arms:
        first, _, experts = arm.partition("_")
        if arm != DENSE and not ((first == "k1" or first.isdigit()) and experts.isdigit()):
            raise MoEError(f"--arms has {arm!r}: it takes dense, G_E (such as 2_16) and k1_E (such as k1_8).")
    needed = {DENSE} | {REPRESENTATIVES[kind_of(arm)] for arm in given.arms}
    if not needed <= set(given.arms):
        raise MoEError(f"--arms lacks {', '.join(sorted(needed - set(given.arms)))}, with which rates are chosen.")
    settings = replace(defaults, **(TINY if given.tiny else {}))
    if given.lengths is not None:
        try:
            settings = replace(settings, lengths=tuple(sorted({int(text) for text in given.lengths.split(",")})))
        except ValueError as error:
            raise MoEError(f"--lengths is {given.lengths!r}: it takes whole numbers of tokens.") from error
    shortest = settings.batch_size * settings.block_size
    if min(settings.lengths) < shortest:
        raise MoEError(f"--lengths has {min(settings.lengths)}: a step has {shortest} tokens.")
    return settings, given


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the study, and write its results, table and picture into the output folder."""
    settings, given = parse_arguments(arguments)
    results = EqualFlopsStudy(settings, given.out, given.arms, given.seeds).run()
    write_results(results, markdown_table(results), given.out)
    curves_plot(results, given.out / "curves.png")
    return results


if __name__ == "__main__":
    run_study(main)
