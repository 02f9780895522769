"""What a training step costs in each scope, beside PEFT's expert LoRA and the pass that no method can do without.

    python -m benchmarks.finetuning --out DIR

builds a small MoE of ours (an upcycled Llama's architecture, random weights) and a Mixtral of the same sizes, and trains
copies of each, an arm each. A round takes one step of every arm, in random order, on the same random tokens; figures are
CPU seconds of the process on one thread, of which quartiles over the rounds are kept. Ratios are of one round.

- all, moe, experts, non_moe: scopes; forward, backward, AdamW.
- selected: one expert of each layer. expert LoRA: all experts, rank 8.
- PEFT expert LoRA: `target_parameters`, rank 8.
- frozen pass: forward and backward through the frozen model, from the inputs of the first MoE layer on, without an optimizer.
  Whoever trains anything in the experts of the first layer does this much.
- bound of selected: the frozen pass, and of what training all experts adds to it the share of the chosen experts' rows.

Memory is measured in a process per arm: the most that was resident during three steps, less what was before the model was
built. It has weights, gradients, optimizer state, activations and the workspaces of torch.
"""

import argparse
import copy
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.finetuning import apply_scope, find_moe_blocks


SIZES = {
    "full": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 2048, "experts": 8},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256, "experts": 8},
}
KINDS = ("ours", "mixtral")
MEASURES = ("steps", "memory")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANK = 8
CHOSEN = 0
LEARNING_RATE = 1e-4


def make_model(kind: str, size: str, dtype: torch.dtype) -> PreTrainedModel:
    """A MoE with random weights: 8 experts, 2 per token, in each layer."""
    torch.manual_seed(0)
    fields = dict(SIZES[size])
    experts = fields.pop("experts")
    heads = fields["hidden_size"] // 64
    fields |= {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2)}
    if kind == "mixtral":
        config = MixtralConfig(**fields, num_local_experts=experts, num_experts_per_tok=2)
        model = MixtralForCausalLM(config)
    else:
        config = MoEConfig(text_config=LlamaConfig(**fields).to_dict(), num_experts=experts, num_experts_per_tok=2)
        model = MoEForCausalLM(config)
    return model.to(dtype).train()


def in_scope(scope: str) -> Callable[[PreTrainedModel], nn.Module]:
    """An arm that trains a scope, in the model's own dtype."""

    def prepare(model: PreTrainedModel) -> nn.Module:
        chosen = {name: [CHOSEN] for name in find_moe_blocks(model)} if scope == "selected" else None
        apply_scope(model, scope, master_dtype=None, expert_selection=chosen)
        return model

    return prepare


def with_expert_lora(model: PreTrainedModel) -> nn.Module:
    """An arm that trains our expert LoRA, of all experts."""
    from moe_hf.finetuning import ExpertLoraConfig, add_expert_lora

    return add_expert_lora(model, ExpertLoraConfig(r=RANK, alpha=2 * RANK))


def with_peft_lora(model: PreTrainedModel) -> nn.Module:
    """An arm that trains PEFT's LoRA of the stacked tensors."""
    from peft import LoraConfig, get_peft_model

    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=parameters)
    return get_peft_model(model, config)


def frozen(model: PreTrainedModel) -> nn.Module:
    """The bound: nothing trains, and gradients flow down to the inputs of the first MoE layer."""
    model.requires_grad_(False)
    first = next(iter(find_moe_blocks(model).values()))
    first.register_forward_pre_hook(lambda _, args: (args[0].detach().requires_grad_(), *args[1:]))
    return model


ARMS: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "all": in_scope("all"),
    "moe": in_scope("moe"),
    "experts": in_scope("experts"),
    "selected": in_scope("selected"),
    "expert LoRA": with_expert_lora,
    "PEFT expert LoRA": with_peft_lora,
    "non_moe": in_scope("non_moe"),
    "frozen pass": frozen,
}


class Arm:
    """A model, what of it trains, and its optimizer, which takes steps."""

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.model = ARMS[name](model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True) if trained else None

    def step(self, ids: torch.Tensor) -> float:
        """CPU seconds of one step on the tokens `ids`, (1, T)."""
        start = time.process_time()
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return time.process_time() - start


@torch.no_grad()
def chosen_share(model: PreTrainedModel, batches: list[torch.Tensor]) -> float:
    """Share of all rows that the chosen experts got."""
    from moe_hf.finetuning import score_experts

    return float(score_experts(model, [{"input_ids": ids} for ids in batches]).token_share[:, CHOSEN].mean())


def measure_steps(kind: str, dtype: str, tokens: int, options: argparse.Namespace) -> dict:
    """Rounds of steps of all arms, interleaved; quartiles of seconds and of ratios."""
    base = make_model(kind, options.size, DTYPES[dtype])
    arms = {name: Arm(name, copy.deepcopy(base)) for name in options.arms}
    generator, order = torch.Generator().manual_seed(1), random.Random(1)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    batches = []
    for number in range(options.rounds + 2):
        ids = torch.randint(SIZES[options.size]["vocab_size"], (1, tokens), generator=generator)
        batches.append(ids)
        for name in order.sample(list(arms), len(arms)):
            used = arms[name].step(ids)
            if number >= 2:  # the first two touch memory for the first time
                seconds[name].append(used)
    share = chosen_share(base, batches[:4])
    bound = [f + share * (e - f) for f, e in zip(seconds["frozen pass"], seconds["experts"], strict=True)]
    table = {}
    for name, own in seconds.items():
        table[name] = {"trained": arms[name].trained, "milliseconds": quartiles([1000 * s for s in own])}
        for reference in ("all", "frozen pass"):
            table[name][f"over {reference}"] = quartiles([a / b for a, b in zip(own, seconds[reference], strict=True)])
    if "selected" in table:
        table["selected"]["over bound"] = quartiles([a / b for a, b in zip(seconds["selected"], bound, strict=True)])
        table["selected"]["chosen share"] = share
    return {"kind": kind, "dtype": dtype, "tokens": tokens, "rounds": options.rounds, "arms": table}


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values


def resident(field: str) -> int:
    """A figure of /proc/self/status in bytes: `VmRSS` is resident now, `VmHWM` the most so far."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def child(name: str, kind: str, dtype: str, tokens: str, size: str) -> None:
    """Peak memory of one arm in this process, printed as JSON."""
    torch.set_num_threads(1)
    # Imports of the model's file, of peft and of the optimizer are no part of the figure.
    warm = Arm(name, make_model(kind, "tiny", DTYPES[dtype]))
    warm.step(torch.zeros(1, 8, dtype=torch.long))
    del warm
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    arm = Arm(name, make_model(kind, size, DTYPES[dtype]))
    built = resident("VmRSS") - before
    # Building makes the weights in float32 first.
    Path("/proc/self/clear_refs").write_text("5")
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        arm.step(torch.randint(SIZES[size]["vocab_size"], (1, int(tokens)), generator=generator))
    print(json.dumps({"peak": resident("VmHWM") - before, "model": built}))


def measure_memory(kind: str, dtype: str, tokens: int, options: argparse.Namespace) -> dict:
    """Peak memory of each arm, in a fresh process each."""
    table = {}
    # Freed blocks go back at once, so that what is resident is what is used.
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    for name in options.arms:
        command = [
            sys.executable,
            "-m",
            "benchmarks.finetuning",
            "--child",
            name,
            kind,
            dtype,
            str(tokens),
            options.size,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        table[name] = json.loads(done.stdout.splitlines()[-1])
    for figures in table.values():
        figures["over all"] = figures["peak"] / table["all"]["peak"]
    return {"kind": kind, "dtype": dtype, "tokens": tokens, "arms": table}


def tables(results: dict) -> str:
    """The results as Markdown."""
    lines = []
    for run in results["steps"]:
        lines += [
            f"**{run['kind']}, {run['dtype']}, {run['tokens']} tokens**, {run['rounds']} rounds",
            "",
            "| arm | trained | ms (quartiles) | over all | over the frozen pass | over its bound |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in run["arms"].items():
            low, middle, high = row["milliseconds"]
            cells = [f"{row['trained']:,}", f"{middle:.0f} ({low:.0f}, {high:.0f})"]
            cells += [_ratio(row.get(key)) for key in ("over all", "over frozen pass", "over bound")]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    for run in results["memory"]:
        lines += [
            f"**Memory, {run['kind']}, {run['dtype']}, {run['tokens']} tokens**",
            "",
            "| arm | weights, MiB | peak, MiB | over all |",
            "|---|---|---|---|",
        ]
        for name, row in run["arms"].items():
            peak, model = row["peak"] / 2**20, row["model"] / 2**20
            lines.append(f"| {name} | {model:.0f} | {peak:.0f} | {row['over all']:.2f} |")
        lines.append("")
    return "\n".join(lines)


def write(results: dict, folder: Path | None) -> None:
    """Keep what was measured so far."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (folder / "table.md").write_text(tables(results), encoding="utf-8")


def _ratio(values: list[float] | None) -> str:
    return "" if values is None else f"{values[1]:.2f} ({values[0]:.2f}, {values[2]:.2f})"


def main(arguments: list[str] | None = None) -> dict:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 64])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="with all, experts, frozen pass")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--out", type=Path, help="folder for results.json and table.md; what is there is kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: dict = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "sizes": SIZES[options.size],
        "steps": [],
        "memory": [],
    }
    if options.out and (options.out / "results.json").exists():
        earlier = json.loads((options.out / "results.json").read_text(encoding="utf-8"))
        results |= {measure: earlier[measure] for measure in MEASURES}
    for dtype in options.dtypes:
        for tokens in options.tokens:
            for kind in options.kinds:
                for measure in options.measure:
                    run = {"steps": measure_steps, "memory": measure_memory}[measure](kind, dtype, tokens, options)
                    results[measure].append(run)
                    write(results, options.out)
    print(tables(results))
    return results


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
