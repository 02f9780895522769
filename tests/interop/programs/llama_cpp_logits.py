"""Logits and greedy tokens of llama.cpp: GGUF ANSWERS OUT, OUT without its suffix."""

import json
import sys

import numpy
from llama_cpp import GGML_TYPE_F32, Llama


if __name__ == "__main__":
    gguf, answers, out = sys.argv[1:]
    with open(answers) as file:
        expected = json.load(file)
    # Keys and values in float32 too; by default they are kept in float16, which costs 5e-4 of the logits.
    float32 = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    model = Llama(gguf, n_ctx=256, logits_all=True, n_threads=1, verbose=False, **float32)
    logits, tokens, ids_of_texts = {}, [], []
    for number, (text, ids) in enumerate(zip(expected["texts"], expected["ids"], strict=True)):
        ids_of_texts.append(model.tokenize(text.encode(), add_bos=False))
        model.reset()
        model.eval(ids)
        logits[f"{number:03}"] = model.scores[: len(ids)].copy()
        row = []
        while len(row) < len(expected["tokens"][number]):
            row.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(row[-1:])
        tokens.append(row)
    numpy.savez(f"{out}.npz", **logits)
    with open(f"{out}.json", "w") as file:
        json.dump({"tokens": tokens, "ids": ids_of_texts}, file)
