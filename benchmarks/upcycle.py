"""Time and memory of `moe_hf.upcycle_checkpoint`, beside copying the same bytes and beside a model in memory.

    python -m benchmarks.upcycle --folder /some/disk

makes a dense checkpoint of 0.35 B random parameters (Llama, bfloat16, 0.7 GB), upcycles it in fresh processes, and prints a
table. A round runs every way once, so that a drift of the machine meets all of them; a ratio is of one round.

- seconds: of the call alone, manifest and flushing to the disk included, imports and verification not.
- over cp: divided by the seconds of `cp -r` and `sync` of the folder that was just made, whose pages are in memory.
- CPU: of all threads, user and system, and the same of `cp -r` and `sync`; on a machine that does other things too it says
  more than seconds do.
- peak: most resident memory during the call, less that after the imports of the same process.

The way "in memory" is `from_pretrained`, filling the MoE, and `save_pretrained`, without manifest, flushing or check.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table


SIZES = {
    "full": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 1000},
}
NOISE = 0.01
ROOM = 64 << 20


def make_dense(folder: Path, size: str) -> None:
    """Write a Llama with random weights in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = SIZES[size]["hidden_size"] // 64
    config = LlamaConfig(**SIZES[size], num_attention_heads=heads, num_key_value_heads=max(1, heads // 2))
    config.dtype = torch.bfloat16
    LlamaForCausalLM._from_config(config).save_pretrained(folder)


def memory(field: str) -> int:
    """A figure of /proc/self/status in bytes: `VmRSS` is resident now, `VmHWM` the most so far."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def streamed(source: Path, output: Path, num_experts: int, noise: float, verify: bool) -> None:
    """From folder to folder."""
    from moe_hf.streaming import upcycle_checkpoint

    upcycle_checkpoint(source, output, num_experts=num_experts, noise=noise, verify=verify)


def in_memory(source: Path, output: Path, num_experts: int, noise: float, verify: bool) -> None:
    """With the dense and the MoE model in memory."""
    from transformers import AutoModelForCausalLM

    from moe_hf import MoEForCausalLM
    from moe_hf.upcycling.fill import copy_other_weights, fill_blocks
    from moe_hf.upcycling.method import UpcyclingMethod
    from moe_hf.upcycling.prepare import moe_config, sites_of_experts

    dense = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    config = moe_config(dense, num_experts, 2, {})
    config.dtype = dense.dtype
    sites = [sites_of_experts(dense, config)]
    moe = MoEForCausalLM._from_config(config)
    copy_other_weights([dense], sites, moe, f"{moe.base_model_prefix}.")
    fill_blocks([dense.base_model], sites, moe.base_model, config, UpcyclingMethod(noise=noise))
    moe.save_pretrained(output)


WAYS = {"streamed": streamed, "in memory": in_memory}


def child(way: str, source: str, output: str, num_experts: str, noise: str, verify: str) -> None:
    """One measurement in this process; prints seconds and bytes as JSON."""
    # All that the call needs, so that what is measured are numbers and not code.
    import transformers.models.llama.modeling_llama
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    import moe_hf.streaming
    from moe_hf import MoEForCausalLM

    needed = (transformers, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, moe_hf.streaming, MoEForCausalLM)
    assert all(needed)
    transformers.utils.logging.disable_progress_bar()
    # Sets VmHWM to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before, start, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    WAYS[way](Path(source), Path(output), int(num_experts), float(noise), verify == "True")
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": memory("VmHWM") - before, "imports": before}))


def measure(way: str, *arguments: object) -> dict[str, float]:
    """A measurement in a fresh process."""
    subprocess.run(["sync"], check=True)
    command = [sys.executable, "-m", "benchmarks.upcycle", "--child", way, *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def copy(folder: Path) -> dict[str, float]:
    """Seconds, and seconds of CPU, of `cp -r` and `sync`, with the folder's pages in memory."""
    for file in folder.iterdir():
        if file.is_file():
            with open(file, "rb", buffering=0) as opened:
                while opened.read(1 << 22):
                    pass
    target = folder.with_name("copied")
    subprocess.run(["sync"], check=True)
    start, before = time.perf_counter(), os.times()
    subprocess.run(["cp", "-r", folder, target], check=True)
    subprocess.run(["sync"], check=True)
    seconds, after = time.perf_counter() - start, os.times()
    shutil.rmtree(target)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"cp": seconds, "cp_cpu": cpu}


def rounds(folder: Path, source: Path, arguments: argparse.Namespace) -> Iterator[dict]:
    """Measurements one by one."""
    for number in range(arguments.rounds):
        for num_experts in arguments.experts:
            for name, way, noise, verify in (
                ("copy", "streamed", 0.0, False),
                ("noise", "streamed", NOISE, False),
                ("copy, verified", "streamed", 0.0, True),
                ("copy, in memory", "in memory", 0.0, False),
            ):
                if num_experts > arguments.most_in_memory and name in ("copy, verified", "copy, in memory"):
                    continue
                output = folder / "moe"
                load = os.getloadavg()[0]
                figures = measure(way, source, output, num_experts, noise, verify)
                size = sum(file.stat().st_size for file in output.iterdir())
                figures |= {"round": number, "way": name, "experts": num_experts, "bytes": size, "load": load}
                figures |= copy(output)
                shutil.rmtree(output)
                print(json.dumps(figures), file=sys.stderr, flush=True)
                yield figures


def summary(measured: list[dict]) -> list[dict]:
    """Medians, and the least and the most of each ratio, by way and number of experts."""
    rows = []
    for key in dict.fromkeys((figures["way"], figures["experts"]) for figures in measured):
        own = [figures for figures in measured if (figures["way"], figures["experts"]) == key]
        ratios = [figures["seconds"] / figures["cp"] for figures in own]
        rows.append(
            {
                "way": key[0],
                "experts": key[1],
                "bytes": own[0]["bytes"],
                "seconds": statistics.median(figures["seconds"] for figures in own),
                "cp_seconds": statistics.median(figures["cp"] for figures in own),
                "over_cp": statistics.median(ratios),
                "over_cp_range": [min(ratios), max(ratios)],
                "cpu": statistics.median(figures["cpu"] for figures in own),
                "cp_cpu": statistics.median(figures["cp_cpu"] for figures in own),
                "peak": max(figures["peak"] for figures in own),
            }
        )
    return rows


def table(rows: list[dict]) -> Table:
    """The summary as a table."""
    result = Table()
    columns = (
        "way",
        "experts",
        "GB",
        "seconds",
        "cp + sync",
        "over cp (least, most)",
        "CPU",
        "CPU of cp",
        "peak, MiB",
    )
    for name in columns:
        result.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        least, most = row["over_cp_range"]
        result.add_row(
            row["way"],
            str(row["experts"]),
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['cp_seconds']:.2f}",
            f"{row['over_cp']:.2f} ({least:.2f}, {most:.2f})",
            f"{row['cpu']:.2f}",
            f"{row['cp_cpu']:.2f}",
            f"{row['peak'] / 2**20:.0f}",
        )
    return result


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; a folder in it is made")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most-in-memory", type=int, default=4, help="most experts to verify, and to make in memory")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args(arguments)
    folder = arguments.folder / f"upcycle-benchmark-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        source = folder / "dense"
        make_dense(source, arguments.size)
        measured = list(rounds(folder, source, arguments))
    finally:
        shutil.rmtree(folder)
    rows = summary(measured)
    sizes = SIZES[arguments.size]
    # The largest tensor of the source: an embedding, or a projection of an MLP.
    largest = 2 * sizes["hidden_size"] * max(sizes["vocab_size"], sizes["intermediate_size"])
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {', '.join(f'{x:.1f}' for x in os.getloadavg())}"
    console = Console(width=120)
    console.print(table(rows))
    console.print(
        f"{machine}; {arguments.rounds} rounds; the bound of the peak is {(ROOM + largest) / 2**20:.0f} MiB."
    )
    if arguments.json:
        content = {"machine": machine, "bound": ROOM + largest, "summary": rows, "measured": measured}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
