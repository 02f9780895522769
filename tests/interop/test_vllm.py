"""vLLM on a CPU: the native exports, and our own models through its Transformers backend, give the tokens of generate."""

import json
from pathlib import Path

import pytest

from tests.interop.environments import OVERLAY, Installed, installed
from tests.interop.models import NATIVE, Checkpoint


pytestmark = pytest.mark.interop
PROGRAM = Path(__file__).parent / "programs" / "vllm_generate.py"
# What does not run in this environment, how it says so, and why.
NEEDS = {"qwen3_5_moe_text": ("failed to be inspected", "torchvision, of which PyPI has no build for this torch")}
# One process for everything, and a cache of keys and values of 1 GiB.
VARIABLES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


def generate(
    environment: Installed, checkpoints: list[Checkpoint], folder: Path, model_impl: str, **more
) -> list[dict]:
    """What vLLM makes of each: `tokens` and their `logprobs`, or an `error`."""
    pairs: list[Path] = []
    for number, checkpoint in enumerate(checkpoints):
        pairs += [checkpoint.folder, checkpoint.write_answers(folder / f"{number}.json")]
    environment.output("python", PROGRAM, folder / "out.json", model_impl, *pairs, seconds=3600, **VARIABLES, **more)
    results = json.loads((folder / "out.json").read_text())
    return [results[str(checkpoint.folder)] for checkpoint in checkpoints]


def largest_difference(checkpoint: Checkpoint, result: dict) -> float:
    """Of the log-probabilities of the tokens, which are those of transformers; they must be the same tokens."""
    assert "error" not in result, result["error"]
    assert result["tokens"] == checkpoint.answers.tokens
    expected = checkpoint.log_probabilities_of_tokens()
    pairs = zip(sum(result["logprobs"], []), sum(expected, []), strict=True)
    return max(abs(one - other) for one, other in pairs)


@pytest.fixture(scope="module")
def of_native(native, tmp_path_factory) -> dict[str, dict]:
    """What vLLM makes of each native family."""
    checkpoints = [native(family) for family in NATIVE]
    results = generate(installed("vllm"), checkpoints, tmp_path_factory.mktemp("vllm"), "auto")
    return dict(zip(NATIVE, results, strict=True))


@pytest.mark.parametrize("family", NATIVE)
def test_an_export_gives_the_tokens_of_generate(family, native, of_native, record):
    if family in NEEDS:
        said, needs = NEEDS[family]
        assert said in of_native[family]["error"]
        record(installed("vllm"), f"export to {family}", f"does not run here: it needs {needs}")
        return
    difference = largest_difference(native(family), of_native[family])
    assert difference <= 1e-4
    record(installed("vllm"), f"export to {family}", f"tokens equal; log-probabilities {difference:.1e}")


def test_our_own_models_run_in_its_transformers_backend_with_a_newer_transformers(ours, record, tmp_path):
    environment = installed("vllm")
    overlay = {"PYTHONPATH": str(environment.folder / OVERLAY)}
    differences = []
    results = generate(environment, list(ours.values()), tmp_path, "transformers", **overlay)
    for checkpoint, result in zip(ours.values(), results, strict=True):
        differences.append(largest_difference(checkpoint, result))
    assert max(differences) <= 1e-4
    what = f"our folders ({', '.join(ours)}), Transformers backend, transformers 5.23 against its pin"
    record(environment, what, f"tokens equal; log-probabilities {max(differences):.1e}")


def test_our_own_models_are_refused_by_the_transformers_that_it_pins(llama, record, tmp_path):
    environment = installed("vllm")
    (result,) = generate(environment, [llama], tmp_path, "transformers")
    assert "moe_hf works with transformers >= 5.23.0" in result["error"]
    record(environment, "our folder, with the transformers that it pins", "does not run: our code needs 5.23")
