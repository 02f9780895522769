"""Greedy tokens of vLLM, in an environment that has no moe_hf: FOLDER ANSWERS OUT MODEL_IMPL."""

import json
import sys

import vllm


if __name__ == "__main__":
    folder, answers, out, model_impl = sys.argv[1:]
    with open(answers) as file:
        expected = json.load(file)
    # Pieces of the prompts are computed in one batch, and again in steps of decoding.
    engine = vllm.LLM(
        folder, model_impl=model_impl, trust_remote_code=True, dtype="float32", max_model_len=128, enforce_eager=True
    )
    greedy = vllm.SamplingParams(temperature=0, max_tokens=len(expected["tokens"][0]), ignore_eos=True, logprobs=0)
    done = engine.generate([{"prompt_token_ids": ids} for ids in expected["ids"]], greedy)
    # Log-probability of each chosen token: a figure that says more than that tokens are equal.
    outputs = [output.outputs[0] for output in done]
    logprobs = [[step[token].logprob for token, step in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs]
    with open(out, "w") as file:
        json.dump({"tokens": [list(o.token_ids) for o in outputs], "logprobs": logprobs}, file)
