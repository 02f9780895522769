"""An instruction task from text that every machine has: the docstring of a function, asked for in a chat-like turn."""

import ast
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from moe_hf.data import IGNORED_LABEL


QUESTION = "User: Write the docstring of this function.\n\n"
TURN = "\n\nAssistant: "


def docstring_examples(documents: datasets.Dataset) -> list[dict[str, str]]:
    """Each documented function of Python files as `code`, without its docstring, and `answer`, its first paragraph."""
    examples = []
    for text in documents["text"]:
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a few library files hold old or broken code on purpose
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if answer:
                node.body = node.body[1:] or [ast.Pass()]
                examples.append({"code": ast.unparse(node), "answer": answer})
    return examples


def without_answers_of(examples: list[dict[str, str]], known: list[dict[str, str]]) -> list[dict[str, str]]:
    """The examples whose answer none of `known` has: methods repeat the docstrings of their base classes."""
    answers = {example["answer"] for example in known}
    return [example for example in examples if example["answer"] not in answers]


def instruction_rows(
    examples: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> datasets.Dataset:
    """One row per example: question, code, answer, end of text; the loss is on the answer and the end alone.

    Code is cut where a row would exceed `block_size`; examples whose answer takes more than a third of it are left out.

    Returns:
        `input_ids`, `labels` (-100 outside the answer) and `attention_mask`, each `(block_size,)`.
    """
    question, turn = (tokenizer(part)["input_ids"] for part in (QUESTION, TURN))
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for example in examples:
        answer = [*tokenizer(example["answer"])["input_ids"], tokenizer.eos_token_id]
        room = block_size - len(question) - len(turn) - len(answer)
        if len(answer) > block_size // 3 or room < 1:
            continue
        prompt = [*question, *tokenizer(example["code"])["input_ids"][:room], *turn]
        padding = block_size - len(prompt) - len(answer)
        columns["input_ids"].append([*prompt, *answer, *[tokenizer.eos_token_id] * padding])
        columns["labels"].append([*[IGNORED_LABEL] * len(prompt), *answer, *[IGNORED_LABEL] * padding])
        columns["attention_mask"].append([*[1] * (block_size - padding), *[0] * padding])
    columns = {name: np.array(rows, dtype=np.int32).reshape(-1, block_size) for name, rows in columns.items()}
    return datasets.Dataset.from_dict(columns).with_format("torch")
