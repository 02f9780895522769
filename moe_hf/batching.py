"""Puts similar documents next to each other, so that what a packed row holds is about one thing.

For routing by segments, where a segment decides the expert of the next one (`router_type="segment_merge"`), neighbouring
segments should be related also where one document ends and another begins. Order the training documents, then pack:

    blocks = tokenize_and_pack(order_by_similarity(train), tokenizer, block_size)
    blocks = blocks.remove_columns("position_ids")

Packed rows keep documents apart, in routing as in attention, and then their order decides nothing; without
`position_ids` a row is one sequence, as in the paper. Blocks can be shuffled: documents in a block keep their neighbours.
"""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from datasets import Dataset

from moe_hf.errors import MoEError


Embedding = Callable[[Sequence[str]], np.ndarray]
WORD = re.compile(r"\w+")


def hashed_tfidf(texts: Sequence[str], dimensions: int = 1024) -> np.ndarray:
    """Bags of words: (1 + ln tf) ln((1 + N) / (1 + df)) per word, hashed to `dimensions` columns with random signs.

    The same on every machine, and nothing is downloaded; a sentence encoder sees more. A hash of crc32 decides column and
    sign, so that words which share a column cancel on average (Weinberger et al., https://arxiv.org/abs/0902.2206).

    Args:
        texts (`Sequence[str]`): N documents.
        dimensions (`int`): columns.

    Returns:
        (N, dimensions) float32.
    """
    counts = [Counter(WORD.findall(text.lower())) for text in texts]
    documents_with = Counter(word for count in counts for word in count)
    columns = {word: zlib.crc32(word.encode()) for word in documents_with}
    result = np.zeros((len(texts), dimensions), dtype=np.float32)
    for row, count in zip(result, counts, strict=True):
        for word, times in count.items():
            code = columns[word]
            weight = (1 + np.log(times)) * np.log((1 + len(texts)) / (1 + documents_with[word]))
            row[(code >> 1) % dimensions] += weight if code & 1 else -weight
    return result


def similarity_path(vectors: np.ndarray, seed: int = 0) -> np.ndarray:
    """A path through all of N vectors that goes to the nearest one not yet visited, by cosine similarity.

    It starts at a random vector; of equally near ones the first is next. Time is of the order of N^2 D, memory of N D.

    Args:
        vectors (`np.ndarray`): (N, D).
        seed (`int`): of the start.

    Returns:
        (N,) int64, each of 0 ... N - 1 once.

    Raises:
        MoEError: `vectors` is not a table of finite numbers.

    Source: the greedy path of in-context pre-training (https://huggingface.co/papers/2310.10638), as Lory's
    similarity-based batching (https://huggingface.co/papers/2405.03133) has it, without their retrieval index.
    """
    vectors = np.asarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise MoEError(f"Embeddings have shape {vectors.shape}; one row of finite numbers per document is needed.")
    if len(vectors) == 0:
        return np.zeros(0, dtype=np.int64)
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    is_left = np.ones(len(units), dtype=bool)
    path = np.empty(len(units), dtype=np.int64)
    path[0] = np.random.default_rng(seed).integers(len(units))
    for place in range(1, len(units)):
        is_left[path[place - 1]] = False
        similarity = units @ units[path[place - 1]]
        path[place] = np.argmax(np.where(is_left, similarity, -np.inf))
    return path


def order_by_similarity(dataset: Dataset, embed: Embedding = hashed_tfidf, seed: int = 0) -> Dataset:
    """The documents of `dataset`, each once, in an order in which neighbours are similar.

    Args:
        dataset (`Dataset`): documents with a column `text`, as `moe_hf.data.load_text` returns them; only the training
            part, so that nothing held out decides the order.
        embed (`Callable`): from N texts to (N, D) numbers.
        seed (`int`): of the document that comes first.

    Raises:
        MoEError: `embed` returned something else.
    """
    texts = list(dataset["text"])
    vectors = np.asarray(embed(texts))
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise MoEError(f"embed returned shape {vectors.shape} for {len(texts)} documents; one row for each is needed.")
    return dataset.select(similarity_path(vectors, seed))
