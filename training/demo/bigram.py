"""A smoothed bigram model: what a language model has to beat before its losses mean anything.

Letters: V vocabulary, P pairs of neighbouring tokens.
"""

import numpy as np


class KneserNeyBigram:
    """Interpolated Kneser-Ney bigram model over token ids; memory grows with the distinct pairs only.

    p(w | v) = max(c(v, w) - d, 0) / c(v) + d * N(v, .) / c(v) * p(w), where p(w) is the share of distinct pairs that end
    in w, mixed with a little of the uniform distribution so that no token is impossible, and d = n1 / (n1 + 2 n2).

    Source: Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling, section 2.7
    (https://arxiv.org/abs/cmp-lg/9606011).

    Args:
        previous, following (`np.ndarray`): token ids of neighbours, (P,).
        vocab_size (`int`): V.
        uniform_share (`float`): weight of the uniform distribution in p(w).
    """

    def __init__(
        self, previous: np.ndarray, following: np.ndarray, vocab_size: int, uniform_share: float = 0.01
    ) -> None:
        self.vocab_size = vocab_size
        self.pairs, self.counts = np.unique(self._keys(previous, following), return_counts=True)
        first, last = self.pairs // vocab_size, self.pairs % vocab_size
        once, twice = (self.counts == 1).sum(), (self.counts == 2).sum()
        self.discount = float(once / max(once + 2 * twice, 1))
        self.totals = np.bincount(first, weights=self.counts, minlength=vocab_size)  # (V,)
        self.distinct = np.bincount(first, minlength=vocab_size)  # (V,)
        ends = np.bincount(last, minlength=vocab_size) / len(self.pairs)
        self.unigram = (1 - uniform_share) * ends + uniform_share / vocab_size  # (V,)

    def _keys(self, previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        return previous.astype(np.int64) * self.vocab_size + following.astype(np.int64)

    def probabilities(self, previous: np.ndarray, following: np.ndarray) -> np.ndarray:
        """p(following | previous), (P,)."""
        keys = self._keys(previous, following)
        place = np.searchsorted(self.pairs, keys).clip(max=len(self.pairs) - 1)
        count = np.where(self.pairs[place] == keys, self.counts[place], 0)
        total = self.totals[previous]
        seen = np.maximum(total, 1)
        backoff = np.where(total > 0, self.discount * self.distinct[previous] / seen, 1.0)
        return np.maximum(count - self.discount, 0) / seen + backoff * self.unigram[following]

    def token_loss(self, previous: np.ndarray, following: np.ndarray) -> float:
        """Mean negative log likelihood, in nats/token."""
        return float(-np.log(self.probabilities(previous, following)).mean())


def neighbours(input_ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (previous, following) that a causal model is scored on: (rows, S) blocks, labels of -100 left out."""
    scored = labels[:, 1:] != -100
    return input_ids[:, :-1][scored], input_ids[:, 1:][scored]
