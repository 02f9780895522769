"""Time and memory of `moe_hf.upcycle_checkpoint`, beside copying the same bytes and beside a model in memory.

    python -m benchmarks.upcycle --folder /some/disk

makes a dense checkpoint of 0.35 B random parameters (Llama, bfloat16, 0.7 GB), upcycles it in fresh processes, and prints a
table. A round runs every way once, so that a drift of the machine meets all of them; a ratio is of one round.

- seconds: of the call alone, manifest and flushing to the disk included, imports and verification not.
- over cp: divided by the seconds of `cp -r` and `sync` of the folder that was just made, whose pages are in memory.
  Before each of both the page cache is filled up with pages of a sparse file, so that both write into memory that the
  machine has: in a virtual machine, memory that was free for seconds is taken from it, and costs seconds to get back.
- bound: what the same bytes need at least on this machine, over the same `cp` and `sync`: the longer of flushing them at
  the disk's rate, and of the processors' work divided by their number (sha256 of each different byte, Gaussians,
  writing into the page cache), at the rates that are measured in the same run and printed.
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
    command = [sys.executable, "-m", "benchmarks.upcycle", "--child", way, *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


class PageCache:
    """Keeps the page cache full, with a sparse file that is read where it is not in memory."""

    def __init__(self, folder: Path):
        self._path, self._position = folder / "sparse", 0
        self._size = memory_info("MemTotal")
        with open(self._path, "wb") as file:
            file.truncate(self._size)

    def fill(self) -> None:
        """Read until no memory is free, but for what the kernel keeps."""
        # The kernel keeps some pages free; when it does not get below this within one pass, it is full.
        for _ in range(self._size >> 26):
            if memory_info("MemFree") < 1 << 30:
                return
            with open(self._path, "rb", buffering=0) as file:
                file.seek(self._position)
                for _ in range(16):
                    file.read(1 << 22)
            self._position = (self._position + (1 << 26)) % self._size


def memory_info(field: str) -> int:
    """A figure of /proc/meminfo in bytes."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024


def copy(folder: Path, cache: PageCache) -> dict[str, float]:
    """Seconds, and seconds of CPU, of `cp -r` and `sync`, with the folder's pages in memory."""
    for file in folder.iterdir():
        if file.is_file():
            with open(file, "rb", buffering=0) as opened:
                while opened.read(1 << 22):
                    pass
    target = folder.with_name("copied")
    subprocess.run(["sync"], check=True)
    cache.fill()
    start, before = time.perf_counter(), os.times()
    subprocess.run(["cp", "-r", folder, target], check=True)
    copied = time.perf_counter()
    subprocess.run(["sync"], check=True)
    seconds, after = time.perf_counter() - start, os.times()
    shutil.rmtree(target)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"cp": seconds, "cp_cpu": cpu, "flush": seconds - (copied - start)}


def rates() -> dict[str, float]:
    """What one core does per second: bytes through sha256, and Gaussians added to bfloat16 numbers."""
    import hashlib

    import torch

    from moe_hf.upcycling.recipes import DensePiece, ExpertRecipe, Slot, slot_rows

    torch.set_num_threads(1)
    data = os.urandom(1 << 25)
    piece = DensePiece(torch.randn(1024, 1024).bfloat16())
    slot = Slot(0, 1024, "up", ExpertRecipe(noise=NOISE, key=(0,)))

    def least(work) -> float:
        work()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    hashed = len(data) / least(lambda: hashlib.sha256(data).digest())
    drawn = piece.tensor.numel() / least(lambda: sum(1 for _ in slot_rows(slot, piece, torch.bfloat16)))
    return {"sha256": hashed, "gaussians": drawn}


def bound(figures: dict, size: str, rate: dict[str, float]) -> float:
    """The least seconds for the bytes of one measurement, at the rates of this machine."""
    sizes = SIZES[size]
    expert = 3 * sizes["hidden_size"] * sizes["intermediate_size"] * sizes["num_hidden_layers"]
    drawn = figures["experts"] * expert if figures["way"] == "noise" else 0
    different = figures["bytes"] if drawn else figures["bytes"] - (figures["experts"] - 1) * expert * 2
    work = different / rate["sha256"] + drawn / rate["gaussians"] + figures["cp_cpu"]
    return max(figures["flush"], work / (os.cpu_count() or 1))


def rounds(folder: Path, source: Path, arguments: argparse.Namespace) -> Iterator[dict]:
    """Measurements one by one."""
    cache = PageCache(folder)
    for number in range(arguments.rounds):
        for num_experts in arguments.experts:
            for name, way, noise, verify in (
                ("copy", "streamed", 0.0, False),
                ("noise", "streamed", NOISE, False),
                ("copy, verified", "streamed", 0.0, True),
                ("copy, in memory", "in memory", 0.0, False),
            ):
                is_other = name in ("copy, verified", "copy, in memory")
                if is_other and (num_experts > arguments.most_in_memory or number > 0):
                    continue
                output = folder / "moe"
                subprocess.run(["sync"], check=True)
                source.joinpath("model.safetensors").read_bytes()
                cache.fill()
                load = os.getloadavg()[0]
                figures = measure(way, source, output, num_experts, noise, verify)
                size = sum(file.stat().st_size for file in output.iterdir())
                figures |= {"round": number, "way": name, "experts": num_experts, "bytes": size, "load": load}
                figures |= copy(output, cache)
                shutil.rmtree(output)
                print(json.dumps(figures), file=sys.stderr, flush=True)
                yield figures


def summary(measured: list[dict], size: str, rate: dict[str, float]) -> list[dict]:
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
                "bound_over_cp": statistics.median(bound(figures, size, rate) / figures["cp"] for figures in own),
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
        "bound",
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
            f"{row['bound_over_cp']:.2f}" if row["way"] in ("copy", "noise") else "",
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
        rate = rates()
        measured = list(rounds(folder, source, arguments))
    finally:
        shutil.rmtree(folder)
    rows = summary(measured, arguments.size, rate)
    sizes = SIZES[arguments.size]
    # The largest tensor of the source: an embedding, or a projection of an MLP.
    largest = 2 * sizes["hidden_size"] * max(sizes["vocab_size"], sizes["intermediate_size"])
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {', '.join(f'{x:.1f}' for x in os.getloadavg())}"
    console = Console(width=120)
    console.print(table(rows))
    console.print(
        f"{machine}; {arguments.rounds} rounds; the bound of the peak is {(ROOM + largest) / 2**20:.0f} MiB; one core: "
        f"sha256 {rate['sha256'] / 1e9:.2f} GB/s, noise on experts {rate['gaussians'] / 1e9:.2f} G numbers/s."
    )
    if arguments.json:
        content = {"machine": machine, "bound": ROOM + largest, "rates": rate, "summary": rows, "measured": measured}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
