"""Measures of answers and labels, against values worked out by hand."""

import numpy as np
import pytest
from transformers import EvalPrediction

from moe_hf import MoEError
from moe_hf.answers import ClassifierMetrics, answer_f1, answer_metrics, exact_match, normal_form


def test_normal_form_drops_case_punctuation_articles_and_space():
    assert normal_form("  The  Name, of (a) File. ") == "name of file"


@pytest.mark.parametrize(
    ("prediction", "answer", "match", "f1"),
    [
        ("the name of file", "name of a file", 1.0, 1.0),
        ("name", "name of file", 0.0, 0.5),  # precision 1, recall 1/3
        ("name name of", "name of", 0.0, 0.8),  # 2 common words of 3 and 2
        ("nothing", "name", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("", "name", 0.0, 0.0),
    ],
)
def test_exact_match_and_f1(prediction, answer, match, f1):
    assert exact_match(prediction, answer) == match
    assert answer_f1(prediction, answer) == pytest.approx(f1)


def test_answer_metrics_are_means_and_refuse_pairs_that_do_not_fit():
    assert answer_metrics(["a x", "y"], ["x", "z"]) == {"exact_match": 0.5, "f1": 0.5}
    with pytest.raises(MoEError, match="1 predictions for 2"):
        answer_metrics(["x"], ["x", "y"])
    with pytest.raises(MoEError):
        answer_metrics([], [])


def test_classifier_metrics_over_batches_equal_those_of_all_at_once():
    labels = np.array([[0, 0, 1, -100], [2, 2, 2, -100]])
    predicted = np.array([[0, 1, 1, 2], [2, 2, 0, 0]])
    metrics = ClassifierMetrics(4)
    assert metrics(EvalPrediction(predicted[:1], labels[:1]), compute_result=False) == {}
    result = metrics(EvalPrediction(predicted[1:], labels[1:]))
    assert result["accuracy"] == pytest.approx(4 / 6)
    # F1: label 0: 2*1/(2+2); label 1: 2*1/(1+2); label 2: 2*2/(3+2); label 3 does not occur.
    assert result["macro_f1"] == pytest.approx((1 / 2 + 2 / 3 + 4 / 5) / 3)
    assert metrics(EvalPrediction(predicted, labels)) == result
    with pytest.raises(MoEError, match="No label"):
        metrics(EvalPrediction(predicted, np.full_like(labels, -100)))
