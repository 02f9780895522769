"""What experts buy from scratch: MoEs of 2 to 16 experts beside dense models of equal arithmetic, size and time.

    python -m benchmarks.moe_vs_dense --out DIR                     # three seeds, E = 2, 4, 8, 16
    python -m benchmarks.moe_vs_dense --out DIR --seeds 5           # two seeds more; what is finished is kept
    python -m benchmarks.moe_vs_dense --out DIR --hidden-size 128 --intermediate-size 384 --steps 2000

Each token uses one expert as wide as the dense MLP (K = 1, as in Switch Transformer), so a MoE costs the arithmetic of
the dense model and its router. The learning rate is warmed up and then constant: each point of a curve is the end of a
run of that length, so arms can be compared at any cost.
"""

import argparse
import platform
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedModel

import moe_hf
from benchmarks.moe_vs_dense_report import curves_plot, markdown_table
from benchmarks.runs import (
    PASSES_PER_STEP,
    Pace,
    add_size_options,
    build_text,
    even_points,
    held_out_rows,
    interleaved_step_seconds,
    machine,
    rows_in_order,
    run_study,
    saved_rows,
    sizes_given,
    small_llama,
    token_losses,
    train_arm,
    with_training_flops,
    write_results,
)
from moe_hf.data import builtin_corpus
from moe_hf.errors import MoEError
from moe_hf.inspection import forward_flops
from training.demo.stages import Stages
from training.demo.steps import batches


@dataclass(frozen=True)
class Settings:
    """What all runs share; a run whose settings changed is done again."""

    steps: int = 800  # of a MoE, and of the dense model whose final loss is the target
    vocab_size: int = 512
    code_characters: int = 6_000_000
    evaluation_tokens: int = 4_096  # of each domain, for the curves; as many again choose the learning rates
    block_size: int = 128
    batch_size: int = 8
    hidden_size: int = 48
    intermediate_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    learning_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    rate_share: float = 0.5  # of a run's steps, to choose its learning rate
    warmup_share: float = 0.05  # of `steps`
    weight_decay: float = 0.1
    evaluations: int = 16
    dense_length: float = 2.0  # steps of the dense model over those of a MoE: it goes on, for equal time
    wide_budget: float = 1.5  # most FLOPs of a dense model with the MoE's parameters, over those of the target
    timing_rounds: int = 12


TINY = {
    "steps": 8,
    "vocab_size": 300,
    "code_characters": 60_000,
    "evaluation_tokens": 128,
    "block_size": 32,
    "batch_size": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "learning_rates": (1e-3, 4e-3),
    "evaluations": 4,
    "timing_rounds": 2,
}
EXPERTS = (2, 4, 8, 16)


def matched_width(moe: PreTrainedModel, dense: PreTrainedModel) -> int:
    """The MLP width that gives the dense model as many parameters as the MoE has, to the nearest.

    Raises:
        MoEError: the dense class has no gated MLP of three matrices, whose width this counts with.
    """
    config = dense.config
    per_unit = 3 * config.hidden_size * config.num_hidden_layers
    mlp = sum(parameter.numel() for name, parameter in dense.named_parameters() if ".mlp." in name)
    if mlp != per_unit * config.intermediate_size:
        raise MoEError(f"{type(dense).__name__} has {mlp} parameters in its MLPs: it takes gated ones without biases.")
    others = sum(parameter.numel() for parameter in dense.parameters()) - mlp
    return round((sum(parameter.numel() for parameter in moe.parameters()) - others) / per_unit)


class Study:
    """All runs below one folder. The seed of a run varies its weights and the order of the text."""

    def __init__(self, settings: Settings, output_dir: Path, experts: list[int], seeds: int) -> None:
        self.settings = settings
        self.experts = experts
        self.seeds = seeds
        self.stages = Stages(output_dir, say=lambda line: print(line, flush=True))
        self.arms = ["dense", *(f"{kind}_{e}" for e in experts for kind in ("moe", "wide"))]

    def data(self) -> dict[str, Any]:
        """Packed text; twice the held-out tokens, for curves and for the choice of learning rates."""
        settings = self.settings
        shared = {name: getattr(settings, name) for name in ("vocab_size", "code_characters", "block_size")}
        shared["evaluation_tokens"] = 2 * settings.evaluation_tokens
        described = shared | {"python": platform.python_version()}
        return self.stages.run("data", described, lambda folder: build_text(folder, builtin_corpus(), **shared))

    def text(self, seed: int, steps: int) -> datasets.Dataset:
        """The same rows in the same order for all arms of a seed."""
        rows = saved_rows(self.stages.folder("data") / "train")
        return rows_in_order(rows, seed, 0, steps * self.settings.batch_size)

    def held_out(self, *, validation: bool) -> dict[str, datasets.Dataset]:
        """The half of the held-out rows that draws the curves, or the one that chooses learning rates."""
        half = self.settings.evaluation_tokens // self.settings.block_size
        rows = held_out_rows(self.stages.folder("data") / "held_out")
        return {name: part.select(range(half * validation, half * (1 + validation))) for name, part in rows.items()}

    def model(self, arm: str, seed: int, vocab_size: int) -> PreTrainedModel:
        """A model of random weights: `dense`, `moe_E`, or `wide_E`, dense with the parameters of `moe_E`."""
        torch.manual_seed(seed)
        config = small_llama(vocab_size, self.settings)
        kind, _, experts = arm.partition("_")
        if kind == "dense":
            return LlamaForCausalLM(config)
        moe = moe_hf.MoEForCausalLM(
            moe_hf.MoEConfig(text_config=config, num_experts=int(experts), num_experts_per_tok=1)
        )
        if kind == "moe":
            return moe
        width = matched_width(moe, LlamaForCausalLM(config))
        torch.manual_seed(seed)
        return LlamaForCausalLM(small_llama(vocab_size, self.settings, intermediate_size=width))

    def sizes(self, vocab_size: int) -> dict[str, dict[str, Any]]:
        """Parameters, and FLOPs of a forward pass per token, by arm."""
        models = {arm: self.model(arm, 0, vocab_size) for arm in self.arms}
        return {
            arm: {
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "forward_flops_per_token": forward_flops(model, self.settings.block_size),
            }
            for arm, model in models.items()
        }

    def timing(self, vocab_size: int, shared: dict[str, Any]) -> dict[str, float]:
        """CPU seconds of a step by arm, all arms in turns."""

        def build(folder: Path) -> dict[str, Any]:
            models = {arm: self.model(arm, 0, vocab_size) for arm in self.arms}
            rows = self.text(0, self.settings.timing_rounds)
            return interleaved_step_seconds(models, list(batches(rows, self.settings.batch_size)))

        return self.stages.run("timing", shared | {"arms": self.arms}, build)["result"]

    def steps_of(self, arm: str, sizes: dict[str, Any]) -> int:
        """How long an arm runs; a wide one stops at equal tokens or at its budget of FLOPs, whichever comes first."""
        settings, flops = self.settings, {name: size["forward_flops_per_token"] for name, size in sizes.items()}
        if arm == "dense":
            return ceil(settings.steps * settings.dense_length)
        if arm.startswith("wide"):
            return min(settings.steps, ceil(settings.steps * settings.wide_budget * flops["dense"] / flops[arm]))
        return settings.steps

    def run_arm(self, name: str, seed: int, steps: int, rate: float, shared: dict[str, Any]) -> dict[str, Any]:
        """Train one arm of one seed; the validation loss at its end is kept beside the curve."""
        settings = self.settings
        arm = name.split("/")[-1]

        def build(folder: Path) -> dict[str, Any]:
            model = self.model(arm, seed, shared["data"]["vocab_size"])
            held_out = self.held_out(validation=False)
            # Points where the MoEs have theirs, as far as the run goes, so that curves of one seed share their text.
            measured_at = even_points(steps, settings.evaluations)
            if arm == "dense":
                measured_at |= {p for p in even_points(settings.steps, settings.evaluations) if p <= steps}
            pace = Pace(
                rate, max(1, round(settings.warmup_share * settings.steps)), settings.weight_decay, decays=False
            )
            points = train_arm(
                name,
                model,
                batches(self.text(seed, steps), settings.batch_size),
                steps,
                pace,
                measure=lambda model: token_losses(model, held_out),
                measured_at=measured_at,
            )
            return {
                "points": with_training_flops(points, model, settings.block_size),
                "validation": token_losses(model, self.held_out(validation=True))["all"],
            }

        return self.stages.run(name, shared | {"steps": steps, "rate": rate, "seed": seed}, build)["result"]

    def rate(self, kind: str, arm: str, steps: int, shared: dict[str, Any]) -> dict[str, Any]:
        """The learning rate of a kind: the best validation loss of one arm of it, seed 0, after a share of its steps."""
        steps = max(1, round(self.settings.rate_share * steps))
        losses = {
            rate: self.run_arm(f"rates/{rate}/{arm}", 0, steps, rate, shared)["validation"]
            for rate in self.settings.learning_rates
        }
        return {
            "kind": kind,
            "arm": arm,
            "steps": steps,
            "chosen": min(losses, key=losses.get),
            "validation": {str(rate): loss for rate, loss in losses.items()},
        }

    def run(self) -> dict[str, Any]:
        """Run what is missing, seed by seed, and return all curves."""
        settings, data = self.settings, self.data()
        vocab_size = data["result"]["vocab_size"]
        not_shared = ("steps", "learning_rates", "rate_share", "dense_length", "wide_budget", "timing_rounds")
        shared = {name: value for name, value in asdict(settings).items() if name not in not_shared}
        shared |= {"of_steps": settings.steps, "data": data["settings"] | {"vocab_size": vocab_size}}
        sizes = self.sizes(vocab_size)
        seconds = self.timing(vocab_size, shared | {"rounds": settings.timing_rounds})
        steps = {arm: self.steps_of(arm, sizes) for arm in self.arms}
        middle = self.experts[len(self.experts) // 2]
        rates = {
            kind: self.rate(kind, arm, min(steps[arm], settings.steps), shared)
            for kind, arm in (("dense", "dense"), ("moe", f"moe_{middle}"), ("wide", f"wide_{middle}"))
        }
        runs = {arm: [] for arm in self.arms}
        for seed in range(self.seeds):
            for arm in self.arms:
                rate = rates[arm.split("_")[0]]["chosen"]
                runs[arm].append(self.run_arm(f"seed{seed}/{arm}", seed, steps[arm], rate, shared))
        return {
            "settings": asdict(settings) | {"seeds": self.seeds, "experts": self.experts},
            "machine": machine(),
            "data": data["result"],
            "rates": rates,
            "built": self.stages.built,
            "arms": {
                arm: sizes[arm]
                | {
                    "training_flops_per_token": PASSES_PER_STEP * sizes[arm]["forward_flops_per_token"],
                    "step_seconds": seconds[arm],
                    "runs": runs[arm],
                }
                for arm in self.arms
            },
        }


def parse_arguments(arguments: list[str] | None) -> tuple[Settings, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of everything; finished runs in it are kept")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (3)")
    parser.add_argument("--experts", default=",".join(map(str, EXPERTS)), help=f"({','.join(map(str, EXPERTS))})")
    add_size_options(parser, Settings)
    given = parser.parse_args(arguments)
    try:
        given.experts = sorted({int(number) for number in given.experts.split(",")})
    except ValueError as error:
        raise MoEError(f"--experts is {given.experts!r}: it takes whole numbers, separated by commas.") from error
    if given.seeds < 1 or given.experts[0] < 2:
        raise MoEError(f"--seeds is {given.seeds} and --experts {given.experts}: at least 1, and each at least 2.")
    return replace(Settings(), **(TINY if given.tiny else {}) | sizes_given(given)), given


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the study, and write its results, table and picture into the output folder."""
    settings, given = parse_arguments(arguments)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    results = Study(settings, given.out, given.experts, given.seeds).run()
    curves_plot(results, given.out / "curves.png")
    write_results(results, markdown_table(results), given.out)
    return results


if __name__ == "__main__":
    run_study(main)
