"""Memory against speed of inference: experts in int8 and nf4, and a few of each layer resident.

    OMP_NUM_THREADS=1 python -m benchmarks.memory --out DIR

builds a MoE with random weights, and each arm from a copy of it. In a round every arm, in random order, reads a prompt and then
takes more tokens one by one; seconds are CPU time of the process on one thread, kept as quartiles of tokens/s over rounds.
Tokens are random, and so are the routers: how often a trained router finds its experts in a cache is another question. Reads
from the disk meet the operating system's cache.

Bytes are those of the tensors, `moe_hf.model_bytes`: experts in memory (codes, scales, the cache) and on the disk, and the rest.
The process itself is measured too, one per arm: the most that was resident while a saved model was loaded and took a few
tokens, less what was before (Linux).

The error of the logits is that of all experts quantized, and beside it that of the MLPs of a dense model whose copies the
experts are, their `nn.Linear` quantized in the same way.
"""

import argparse
import copy
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moe_hf import MoEConfig, MoEForCausalLM, upcycle
from moe_hf.inference import (
    QuantizationScheme,
    cache_report,
    load_low_memory,
    model_bytes,
    quantize_experts,
    save_low_memory,
)
from moe_hf.inference.footprint import logit_error, logits_of
from moe_hf.modeling.cache_names import named_cache


SIZES = {
    "full": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 2048},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256},
}
EXPERTS, PER_TOKEN = 8, 2
SCHEMES = {
    "int8": QuantizationScheme("int8"),
    "nf4": QuantizationScheme("nf4"),
    "nf4, double": QuantizationScheme("nf4", double_quant=True),
}
# Scheme, resident experts of each layer, whether the others are on the disk.
ARMS: dict[str, tuple[str | None, int | None, bool]] = {
    "plain": (None, None, False),
    "int8": ("int8", None, False),
    "nf4": ("nf4", None, False),
    "nf4, double": ("nf4, double", None, False),
    "disk, 8 resident": (None, 8, True),
    "disk, 4 resident": (None, 4, True),
    "disk, 2 resident": (None, 2, True),
    "disk, 1 resident": (None, 1, True),
    "host, 2 resident": (None, 2, False),
    "int8, disk, 2 resident": ("int8", 2, True),
    "nf4, disk, 2 resident": ("nf4", 2, True),
}
MIB = 2**20


def dense_config(size: str) -> LlamaConfig:
    """A Llama of the sizes of this benchmark."""
    heads = SIZES[size]["hidden_size"] // 32
    return LlamaConfig(**SIZES[size], num_attention_heads=heads, num_key_value_heads=max(1, heads // 2))


def make_model(size: str) -> PreTrainedModel:
    """A MoE with random weights: 8 experts, 2 per token, in each layer."""
    torch.manual_seed(0)
    config = MoEConfig(text_config=dense_config(size), num_experts=EXPERTS, num_experts_per_tok=PER_TOKEN)
    return MoEForCausalLM(config).eval()


def load_arm(name: str, folder: Path) -> PreTrainedModel:
    """The arm's model from `folder`, which has one sub-folder per scheme."""
    scheme, resident, on_disk = ARMS[name]
    if name == "plain":
        return AutoModelForCausalLM.from_pretrained(folder / "checkpoint").eval()
    return load_low_memory(folder / str(scheme), resident_per_layer=resident, from_disk=on_disk)


def write_folders(size: str, folder: Path, schemes: set[str | None]) -> None:
    """What the arms load: a plain checkpoint, and a low-memory folder for each scheme."""
    model = make_model(size)
    model.save_pretrained(folder / "checkpoint")
    for scheme in schemes:
        own = copy.deepcopy(model)
        if scheme is not None:
            quantize_experts(own, SCHEMES[scheme])
        save_low_memory(own, folder / str(scheme))


@torch.no_grad()
def run(model: PreTrainedModel, prompt: torch.Tensor, new: torch.Tensor) -> tuple[float, float]:
    """CPU seconds for the prompt, (1, S), and for the tokens of `new`, (1, N), one by one."""
    start = time.process_time()
    output = model(input_ids=prompt, use_cache=True)
    middle = time.process_time()
    for token in new.split(1, dim=1):
        output = model(input_ids=token, use_cache=True, **named_cache(output))
    return middle - start, time.process_time() - middle


def measure_speed(options: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """Tokens/s and bytes of all arms, in interleaved rounds."""
    models = {name: load_arm(name, folder) for name in options.arms}
    generator, order = torch.Generator().manual_seed(1), random.Random(1)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    logits, table = {}, {}
    for number in range(options.rounds + 1):
        length = options.prompt + options.new_tokens
        ids = torch.randint(SIZES[options.size]["vocab_size"], (1, length), generator=generator)
        prompt, new = ids[:, : options.prompt], ids[:, options.prompt :]
        for name in order.sample(list(models), len(models)):
            used = run(models[name], prompt, new)
            if number:  # the first round touches memory for the first time
                seconds[name].append(used)
            elif ARMS[name][1] is not None:
                cache_report(models[name], reset=True)
            if not number:
                logits[name] = logits_of(models[name], prompt)
    for name, model in models.items():
        table[name] = asdict(model_bytes(model))
        prompts, steps = zip(*seconds[name], strict=True)
        table[name]["prompt tokens/s"] = quartiles([options.prompt / s for s in prompts])
        table[name]["new tokens/s"] = quartiles([options.new_tokens / s for s in steps])
        table[name]["hit rate"] = None if ARMS[name][1] is None else cache_report(model).hit_rate
        table[name]["logit error"] = logit_error(logits["plain"], logits[name]).relative
    return table


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def measure_errors(size: str) -> dict[str, dict[str, float]]:
    """Relative error of the logits: all experts of an upcycled model quantized, and the linears of its dense parent's MLPs."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(dense_config(size)).eval()
    tokens = torch.randint(SIZES[size]["vocab_size"], (2, 64), generator=torch.Generator().manual_seed(2))
    moe = upcycle(dense, num_experts=EXPERTS, num_experts_per_tok=PER_TOKEN).eval()
    expected, errors = logits_of(dense, tokens), {}
    for name, scheme in SCHEMES.items():
        twin = copy.deepcopy(dense)
        for layer in twin.model.layers:
            for linear in (m for m in layer.mlp.modules() if isinstance(m, nn.Linear)):
                weight = linear.weight.data
                linear.weight.data = scheme.decode(scheme.encode(weight), tuple(weight.shape), weight.dtype)
        report = quantize_experts(copy.deepcopy(moe), scheme, tokens=tokens)
        linears = logit_error(expected, logits_of(twin, tokens))
        errors[name] = {"experts": report.error.relative, "linears": linears.relative}
    return errors


def resident_kib() -> int:
    """The most memory this program has had resident, in KiB (Linux; `getrusage` would tell that of the parent too)."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if line)
    return int(fields["VmHWM"].split()[0])


def measure_process(name: str, folder: Path) -> float:
    """MiB that loading and running an arm adds to this process."""
    before = resident_kib()
    run(load_arm(name, folder), torch.arange(1, 17)[None], torch.arange(17, 21)[None])
    return (resident_kib() - before) / 1024


def table_of(results: dict) -> str:
    """The results as two tables in Markdown."""
    lines = [
        "| arm | experts in memory, MiB | on the disk, MiB | the rest, MiB | process, MiB | prompt, tokens/s | new, tokens/s | "
        "hits | logit error |",
        "|" + "---|" * 9,
    ]
    for name, row in results["arms"].items():
        speeds = ["{1:.0f} ({0:.0f}, {2:.0f})".format(*row[key]) for key in ("prompt tokens/s", "new tokens/s")]
        held = [row["experts"].get(kind, 0) / MIB for kind in ("cpu", "disk")] + [row["rest"]["cpu"] / MIB]
        process = results["process MiB"].get(name)
        cells = [name, *(f"{h:.1f}" for h in held), "" if process is None else f"{process:.0f}", *speeds]
        cells += ["" if row["hit rate"] is None else f"{row['hit rate']:.2f}", f"{row['logit error']:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| logit error of | experts | linears of the dense twin |", "|---|---|---|"]
    lines += [f"| {name} | {e['experts']:.2e} | {e['linears']:.2e} |" for name, e in results["errors"].items()]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> dict:
    """Measure, and write `results.json` and `table.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--processes", nargs="*", choices=ARMS, default=list(ARMS), help="arms with a process of their own"
    )
    parser.add_argument("--one", nargs=2, metavar=("ARM", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.one is not None:
        print(measure_process(options.one[0], Path(options.one[1])))
        return {}
    if "plain" not in options.arms:
        options.arms = ["plain", *options.arms]
    with tempfile.TemporaryDirectory() as temporary:
        write_folders(options.size, Path(temporary), {ARMS[name][0] for name in (*options.arms, *options.processes)})
        processes = {}
        for name in options.processes:
            command = [sys.executable, "-m", "benchmarks.memory", "--one", name, temporary]
            processes[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        results = {
            "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
            "size": options.size,
            "prompt": options.prompt,
            "new_tokens": options.new_tokens,
            "rounds": options.rounds,
            "arms": measure_speed(options, Path(temporary)),
            "process MiB": processes,
            "errors": measure_errors(options.size),
        }
    print(table_of(results))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (options.out / "table.md").write_text(table_of(results))
    return results


if __name__ == "__main__":
    main()
