"""Real checkpoints of the Hub through the command line: downloaded, upcycled, verified, exported, compared.

    make check-real                                   # 8 models, about 5 GB to download, 12 GB of memory
    python -m tests.check_real --only Qwen/Qwen3-0.6B
    python -m tests.check_real --folder ROOT          # ROOT/openai-community/gpt2, ... instead of the Hub

For each model the outcome is known before: the dense class, the parameters, logits and greedy tokens that stay, and the
native family that it can be exported to, or why there is none. Exit code 1 when one differs, 2 without a network.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_hf
from moe_hf.errors import MoEError


PROMPT = "The capital of France is Paris. The capital of Italy is"
NEW_TOKENS = 16
NUM_EXPERTS = 4
COMMAND = (sys.executable, "-m", "moe_hf.cli")
FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


@dataclass(frozen=True)
class RealModel:
    """What must come out for one dense checkpoint.

    Attributes:
        name: of the repository on the Hub.
        dense_class: of transformers.
        parameters: of the dense model; tied weights count once.
        target: `model_type` of the native family that holds the MoE exactly; None when there is none.
        refusal: words of the reason, when there is none.
    """

    name: str
    dense_class: str
    parameters: int
    target: str | None = None
    refusal: str = ""


# Ungated, in safetensors, without remote code, one per kind of decoder.
MODELS = (
    RealModel("openai-community/gpt2", "GPT2LMHeadModel", 124_439_808, refusal="LayerNorm with biases"),
    RealModel("HuggingFaceTB/SmolLM2-135M", "LlamaForCausalLM", 134_515_008, "mixtral"),
    RealModel("Qwen/Qwen2.5-0.5B", "Qwen2ForCausalLM", 494_032_768, "qwen2_moe"),
    RealModel("Qwen/Qwen3-0.6B", "Qwen3ForCausalLM", 596_049_920, "qwen3_moe"),
    RealModel("baidu/ERNIE-4.5-0.3B-PT", "Ernie4_5ForCausalLM", 360_748_032, "ernie4_5_moe"),
    RealModel("EleutherAI/pythia-160m", "GPTNeoXForCausalLM", 162_322_944, refusal="LayerNorm with biases"),
    RealModel("bigscience/bloom-560m", "BloomForCausalLM", 559_214_592, refusal="LayerNorm with biases"),
    RealModel("unsloth/gemma-3-270m", "Gemma3ForCausalLM", 268_098_176, refusal="norms around attention and MLP"),
)


@dataclass(frozen=True)
class Outcome:
    """What came out for one model: table cells, what differed from the expectation, seconds of all steps."""

    cells: tuple[str, ...]
    mistakes: tuple[str, ...]
    seconds: float


def fetch(name: str, root: Path | None) -> Path:
    """The folder of a model: below `root`, or downloaded into the Hub's cache.

    Raises:
        MoEError: when it is not there.
    """
    if root is not None:
        if not (root / name / "config.json").is_file():
            raise MoEError(f"{root / name} has no config.json: --folder takes a folder with one sub-folder per model.")
        return root / name
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES))
    except LocalEntryNotFoundError as error:
        raise MoEError(
            f"{name} cannot be downloaded, the Hub is not reachable ({str(error).splitlines()[0]}): connect this machine "
            "to a network, or give --folder with the models in it."
        ) from error
    except HfHubHTTPError as error:
        raise MoEError(f"{name} cannot be downloaded: {str(error).splitlines()[0]}") from error


def command(*arguments: object) -> subprocess.CompletedProcess:
    """Run `moe-hf` with these arguments in a process of its own."""
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)


@torch.no_grad()
def greedy_tokens(folder: Path) -> tuple[type, list[int]]:
    """The class and the greedy continuation of a checkpoint, loaded with plain `from_pretrained` in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    return type(model), output[0, inputs["input_ids"].shape[1] :].tolist()


def check(expected: RealModel, source: Path, work: Path) -> Outcome:
    """Take one model through the commands; `work` is a folder for what they write."""
    start = time.perf_counter()
    mistakes: list[str] = []

    def demand(holds: bool, message: str) -> bool:
        if not holds:
            mistakes.append(f"{expected.name}: {message}")
        return holds

    moe, native = work / "moe", work / "native"
    facts = json.loads(command("inspect", source, "--json").stdout or "{}")
    found = {"class": facts.get("architecture"), "parameters": facts.get("total_parameters")}
    wanted = {"class": expected.dense_class, "parameters": expected.parameters}
    demand(found == wanted, f"expected {wanted}, found {found}")
    error, exact, exported = "", "no", "not tried"
    done = command("upcycle", source, moe, "--num-experts", NUM_EXPERTS)
    if demand(done.returncode == 0, f"upcycle failed: {_last_lines(done)}"):
        verified = command("verify", source, moe, "--json")
        error = f"{json.loads(verified.stdout or '{}').get('relative_error', float('nan')):.1e}"
        _, dense_tokens = greedy_tokens(source)
        _, moe_tokens = greedy_tokens(moe)
        same_tokens = demand(
            moe_tokens == dense_tokens, f"greedy tokens {moe_tokens}, the dense model's {dense_tokens}"
        )
        if demand(verified.returncode == 0, f"logits differ: {_last_lines(verified)}") and same_tokens:
            exact = "yes"
        exported = _check_export(
            expected, command("export", moe, native, "--to", "auto"), native, dense_tokens, demand
        )
    cells = (expected.name, str(found["class"]), f"{found['parameters'] or 0:,}", exact, error, exported)
    return Outcome(cells, tuple(mistakes), time.perf_counter() - start)


def _check_export(expected: RealModel, done: subprocess.CompletedProcess, native: Path, tokens: list, demand) -> str:
    """What the export came to, for the table."""
    if expected.target is None:
        said = " ".join(done.stderr.split())
        refused = demand(done.returncode == 2, f"an export was made: {_last_lines(done)}")
        refused = refused and demand(
            expected.refusal in said, f"the refusal does not name {expected.refusal!r}: {said}"
        )
        return f"none: {expected.refusal}" if refused else "not refused"
    if not demand(done.returncode == 0, f"export failed: {_last_lines(done)}"):
        return "failed"
    model_type = json.loads((native / "config.json").read_text(encoding="utf-8"))["model_type"]
    demand(model_type == expected.target, f"exported to {model_type}, expected {expected.target}")
    native_class, native_tokens = greedy_tokens(native)
    demand(native_class.__module__.startswith("transformers."), f"{native_class} is not a class of transformers")
    demand(native_tokens == tokens, f"greedy tokens of the export {native_tokens}, the dense model's {tokens}")
    return model_type


def _last_lines(done: subprocess.CompletedProcess) -> str:
    return " ".join((done.stderr or done.stdout).split())[-600:]


def main(arguments: list[str] | None = None, models: tuple[RealModel, ...] = MODELS) -> int:
    """Check every model, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="take the models from its sub-folders, not from the Hub")
    parser.add_argument("--only", metavar="NAME", help="one model of the list")
    given = parser.parse_args(arguments)
    chosen = [model for model in models if given.only in (None, model.name)]
    if not chosen:
        parser.error(f"--only is {given.only!r}; the list has {', '.join(model.name for model in models)}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    outcomes = []
    for number, model in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {model.name}", flush=True)
        try:
            source = fetch(model.name, given.folder)
        except MoEError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2
        with tempfile.TemporaryDirectory(prefix="check-real-") as work:
            outcomes.append(check(model, source, Path(work)))
    print_outcomes(outcomes)
    return 1 if any(outcome.mistakes for outcome in outcomes) else 0


def print_outcomes(outcomes: list[Outcome]) -> None:
    """Print one row per model, what differed, and with which versions."""
    console = Console(width=None if Console().is_terminal else 140)
    table = Table(
        title=f"{NUM_EXPERTS} experts, 2 per token; logits and {NEW_TOKENS} greedy tokens against the dense model"
    )
    for header in ("model", "dense class", "parameters", "exact", "relative error", "native export", "seconds"):
        table.add_column(header)
    for outcome in outcomes:
        table.add_row(*outcome.cells, f"{outcome.seconds:.0f}")
    console.print(table)
    for outcome in outcomes:
        for mistake in outcome.mistakes:
            console.print(mistake, style="red", markup=False)
    versions = f"moe_hf {moe_hf.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    good = sum(not outcome.mistakes for outcome in outcomes)
    console.print(f"{good} of {len(outcomes)} as expected; {time.strftime('%Y-%m-%d')}, {versions}")


if __name__ == "__main__":
    sys.exit(main())
