"""Laws of the metrics: equal to torch's cross entropy, streaming, shifted inside, blind to ignored labels."""

import math

import evaluate
import pytest
import torch
from transformers import EvalPrediction

from moe_hf import MoEError
from moe_hf.metrics import LanguageModelMetrics, Perplexity, TokenAccuracy, TokenLoss, token_statistics


pytestmark = pytest.mark.numerics


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 9, 13, generator=generator)
    labels = torch.randint(13, (5, 9), generator=generator)
    labels[torch.rand(5, 9, generator=generator) < 0.3] = -100
    labels[2] = -100
    return logits, labels


def reference(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    targets, scores = labels[:, 1:].flatten(), logits[:, :-1].double().flatten(0, 1)
    kept = targets != -100
    loss = float(torch.nn.functional.cross_entropy(scores[kept], targets[kept]))
    accuracy = float((scores[kept].argmax(-1) == targets[kept]).double().mean())
    return {"token_loss": loss, "perplexity": math.exp(loss), "accuracy": accuracy, "tokens": int(kept.sum())}


@pytest.mark.parametrize(
    ("metric", "name"), [(TokenLoss, "token_loss"), (Perplexity, "perplexity"), (TokenAccuracy, "accuracy")]
)
def test_metric_equals_the_reference_whole_and_streamed(metric, name, batch):
    logits, labels = batch
    measure, expected = metric(), reference(*batch)
    assert isinstance(measure, evaluate.Metric)
    whole = measure.compute(predictions=logits, references=labels)
    assert whole == {name: pytest.approx(expected[name], rel=1e-6), "tokens": expected["tokens"]}
    measure.add_batch(predictions=logits[:2], references=labels[:2])
    measure.add(prediction=logits[2], reference=labels[2])
    measure.add_batch(predictions=token_statistics(logits[3:], labels[3:]).numpy(), references=labels[3:].numpy())
    assert measure.compute() == {name: pytest.approx(whole[name], rel=1e-12), "tokens": whole["tokens"]}


def test_compute_starts_anew_and_refuses_an_empty_measure(batch):
    measure = TokenLoss()
    measure.compute(predictions=batch[0], references=batch[1])
    with pytest.raises(MoEError, match="No token"):
        measure.compute()
    with pytest.raises(MoEError, match="No token"):
        measure.compute(predictions=batch[0], references=torch.full_like(batch[1], -100))


def test_shapes_that_do_not_fit_are_refused(batch):
    with pytest.raises(MoEError, match="do not fit"):
        TokenLoss().add_batch(predictions=batch[0][:, :-1], references=batch[1])


def test_what_the_trainer_keeps_does_not_grow_with_the_vocabulary(batch):
    logits, labels = batch
    statistics = token_statistics((logits, "router logits"), labels)
    assert statistics.shape == (*labels.shape, 2)
    metrics, expected = LanguageModelMetrics(), reference(*batch)
    metrics(EvalPrediction(statistics[:3], labels[:3]), compute_result=False)
    result = metrics(EvalPrediction(statistics[3:].numpy(), labels[3:].numpy()), compute_result=True)
    assert result == {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}


def test_uniform_guess_has_the_vocabulary_as_perplexity():
    logits, labels = torch.zeros(1, 4, 32), torch.arange(4)[None]
    assert Perplexity().compute(predictions=logits, references=labels)["perplexity"] == pytest.approx(32, rel=1e-6)
    logits[..., 0] = 2000.0
    assert Perplexity().compute(predictions=logits, references=labels)["perplexity"] == math.inf
