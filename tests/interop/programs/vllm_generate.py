"""Greedy tokens of vLLM for models one after another: OUT MODEL_IMPL (FOLDER ANSWERS)..., one entry of OUT per folder."""

import json
import sys
import traceback

import vllm
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory


def generate(folder: str, answers: str, model_impl: str) -> dict:
    """Tokens and their log-probabilities, or the error, for the prompts of `answers`, all of them in one batch."""
    with open(answers) as file:
        expected = json.load(file)
    try:
        engine = vllm.LLM(
            folder,
            model_impl=model_impl,
            trust_remote_code=True,
            dtype="float32",
            max_model_len=128,
            enforce_eager=True,
            # Its kernel for CPUs, which only eager runs use, turns the wrong numbers where heads have a dimension of
            # their own, as in LFM2; without it they get the rotation of compiled runs.
            compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
            # One process: importing torch in each of three takes longer than the rest.
            distributed_executor_backend="uni",
        )
        greedy = vllm.SamplingParams(temperature=0, max_tokens=len(expected["tokens"][0]), ignore_eos=True, logprobs=0)
        done = engine.generate([{"prompt_token_ids": ids} for ids in expected["ids"]], greedy)
        outputs = [output.outputs[0] for output in done]
        logprobs = [[step[t].logprob for t, step in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs]
        return {"tokens": [list(o.token_ids) for o in outputs], "logprobs": logprobs}
    except Exception as error:  # the caller compares what each model came to
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    out, impl, *pairs = sys.argv[1:]
    results = {}
    for folder, answers in zip(pairs[::2], pairs[1::2], strict=True):
        results[folder] = generate(folder, answers, impl)
        cleanup_dist_env_and_memory()
        with open(out, "w") as file:
            json.dump(results, file)
