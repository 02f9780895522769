"""Measures of answers and of labels: exact match and F1 of generated text, accuracy and macro F1 of classifiers."""

import re
import string
from collections import Counter

import numpy as np
import torch
from transformers import EvalPrediction

from moe_hf.errors import MoEError


IGNORED_LABEL = -100


def normal_form(answer: str) -> str:
    """Lower case, without punctuation, English articles and surplus white space, as SQuAD's evaluation does.

    Source: Rajpurkar et al., SQuAD (https://huggingface.co/papers/1606.05250), section 6.
    """
    text = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 if both have the same normal form, else 0."""
    return float(normal_form(prediction) == normal_form(answer))


def answer_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the words of both normal forms; 1 if both are empty."""
    predicted, expected = normal_form(prediction).split(), normal_form(answer).split()
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def answer_metrics(predictions: list[str], answers: list[str]) -> dict[str, float]:
    """Mean `exact_match` and `f1` over pairs, in [0, 1].

    Raises:
        MoEError: no pairs, or not as many predictions as answers.
    """
    if not answers or len(predictions) != len(answers):
        raise MoEError(
            f"{len(predictions)} predictions for {len(answers)} answers: give one for each, and at least one."
        )
    pairs = list(zip(predictions, answers, strict=True))
    return {
        "exact_match": float(np.mean([exact_match(*pair) for pair in pairs])),
        "f1": float(np.mean([answer_f1(*pair) for pair in pairs])),
    }


def predicted_labels(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """The most likely label, (..., L) -> (...); for `preprocess_logits_for_metrics`, so that no logits are kept."""
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    return logits.argmax(-1)


class ClassifierMetrics:
    """`compute_metrics` of a Trainer: accuracy, and F1 averaged over the labels that occur (macro).

    Keeps a table of counts, so it works with `batch_eval_metrics=True` and memory does not grow with the data. Labels
    of -100 are ignored. Give `predicted_labels` as `preprocess_logits_for_metrics`.

    Args:
        num_labels (`int`): labels, L; the table is (L, L), right label by predicted one.
    """

    def __init__(self, num_labels: int) -> None:
        self.table = np.zeros((num_labels, num_labels), dtype=np.int64)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        labels = np.asarray(prediction.label_ids).reshape(-1)
        predicted = np.asarray(prediction.predictions).reshape(-1)
        scored = labels != IGNORED_LABEL
        np.add.at(self.table, (labels[scored], predicted[scored]), 1)
        return self._result() if compute_result else {}

    def _result(self) -> dict[str, float]:
        table, self.table = self.table, np.zeros_like(self.table)
        if table.sum() == 0:
            raise MoEError("No label was scored: all are -100.")
        right, given, chosen = np.diag(table), table.sum(1), table.sum(0)
        occurs = given > 0
        f1 = 2 * right[occurs] / (given + chosen)[occurs]
        return {"accuracy": float(right.sum() / table.sum()), "macro_f1": float(f1.mean())}
