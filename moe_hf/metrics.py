"""Measures of a causal language model as `evaluate.Metric` classes: token loss, perplexity, accuracy.

They stream: a batch is reduced to two sums and a count when it is added, so memory does not grow with the text. They
shift inside and ignore labels of -100. In a `Trainer`:

    Trainer(
        ..., compute_metrics=LanguageModelMetrics(), preprocess_logits_for_metrics=token_statistics,
    )  # with batch_eval_metrics=True in the arguments

Letters: B batch, S sequence, V vocabulary.
"""

import math
from abc import ABC, abstractmethod

import datasets
import evaluate
import torch
from torch.nn import functional as F
from transformers import EvalPrediction

from moe_hf.errors import MoEError


IGNORED_LABEL = -100


def token_statistics(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """Reduce logits to what the metrics need, `(B, S, 2)` in float32; for `preprocess_logits_for_metrics`.

    Args:
        logits (`torch.Tensor`): `(B, S, V)`; of a tuple the first is taken.
        labels (`torch.Tensor`): `(B, S)`, not shifted, -100 where ignored.

    Returns:
        At position i the negative log likelihood (nats) of `labels[:, i]` given what comes before, and whether it was
        the most likely token. Ignored positions and position 0 hold zeros.
    """
    if isinstance(logits, tuple | list):
        logits = logits[0]
    targets = labels[:, 1:].to(logits.device)
    scored = targets != IGNORED_LABEL
    statistics = torch.zeros((*labels.shape, 2), device=logits.device)
    for row, (row_logits, row_targets, row_scored) in enumerate(zip(logits[:, :-1], targets, scored, strict=True)):
        # One row at a time: a float32 copy of all logits would be the largest tensor of an evaluation.
        chosen = row_logits[row_scored].float()
        statistics[row, 1:, 0][row_scored] = F.cross_entropy(chosen, row_targets[row_scored].long(), reduction="none")
        statistics[row, 1:, 1][row_scored] = (chosen.argmax(-1) == row_targets[row_scored]).float()
    return statistics


class _TokenMetric(evaluate.Metric, ABC):
    """Adds up token statistics; `compute` returns the result and starts anew."""

    def __init__(self, **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)
        self._reset()

    def _reset(self) -> None:
        self._loss = self._correct = 0.0
        self._tokens = 0

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description=(
                "predictions: logits (B, S, V), or what token_statistics made of them (B, S, 2); references: labels "
                "(B, S), not shifted, -100 where ignored."
            ),
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.List(datasets.Value("float32"))),
                    "references": datasets.List(datasets.Value("int64")),
                }
            ),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """Add a batch. `(B, S, 2)` predictions are token statistics; else logits `(B, S, V)`."""
        predictions, references = torch.as_tensor(predictions), torch.as_tensor(references)
        if predictions.shape[:-1] != references.shape or references.ndim != 2:
            raise MoEError(
                f"predictions {tuple(predictions.shape)} do not fit references {tuple(references.shape)}: expected "
                "(B, S, V) or (B, S, 2), and (B, S)."
            )
        if predictions.shape[-1] != 2:
            predictions = token_statistics(predictions, references)
        scored = references[:, 1:] != IGNORED_LABEL
        loss, correct = predictions[:, 1:].double()[scored.to(predictions.device)].sum(0).tolist()
        self._loss += loss
        self._correct += correct
        self._tokens += int(scored.sum())

    def add(self, *, prediction=None, reference=None, **kwargs) -> None:
        """Add one row: `(S, V)` or `(S, 2)`, and `(S,)`."""
        self.add_batch(predictions=torch.as_tensor(prediction)[None], references=torch.as_tensor(reference)[None])

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict[str, float]:
        """Return the result over all that was added, and the number of tokens scored.

        Raises:
            MoEError: no token was scored.
        """
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        if self._tokens == 0:
            raise MoEError("No token was scored: add batches with labels other than -100 first.")
        result = self._result(self._loss / self._tokens, self._correct / self._tokens)
        tokens = self._tokens
        self._reset()
        return {**result, "tokens": tokens}

    @abstractmethod
    def _result(self, loss: float, accuracy: float) -> dict[str, float]:
        """The metric, by name, from the mean loss and the share of right guesses."""


class TokenLoss(_TokenMetric):
    """Mean negative log likelihood of a token, in nats/token."""

    def _result(self, loss: float, accuracy: float) -> dict[str, float]:
        return {"token_loss": loss}


class Perplexity(_TokenMetric):
    """exp of the token loss: 1 at best, V for a uniform guess; infinite where a float cannot hold it."""

    def _result(self, loss: float, accuracy: float) -> dict[str, float]:
        return {"perplexity": math.exp(loss) if loss < 709 else math.inf if loss == loss else math.nan}


class TokenAccuracy(_TokenMetric):
    """Share of tokens that were the most likely one, in [0, 1]."""

    def _result(self, loss: float, accuracy: float) -> dict[str, float]:
        return {"accuracy": accuracy}


class LanguageModelMetrics:
    """`compute_metrics` of a Trainer: the three metrics over the statistics of `token_statistics`.

    Works with `batch_eval_metrics=True` (streaming) and without.
    """

    def __init__(self) -> None:
        self.metrics = (TokenLoss(), Perplexity(), TokenAccuracy())

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        statistics = torch.as_tensor(prediction.predictions)
        result = {}
        for metric in self.metrics:
            metric.add_batch(predictions=statistics, references=prediction.label_ids)
            if compute_result:
                result |= metric.compute()
        return result
