"""Documents are put next to similar ones: each once, the same way every time."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from moe_hf import MoEConfig, MoEError, MoEForCausalLM
from moe_hf.batching import hashed_tfidf, order_by_similarity, similarity_path
from moe_hf.data import tokenize_and_pack, train_tokenizer
from tests.tiny_models import tiny_config


TOPICS = {
    "sea": ["tide", "harbour", "anchor", "gull", "sail", "wave", "keel", "mast", "drift", "reef"],
    "bread": ["flour", "yeast", "dough", "oven", "crust", "knead", "loaf", "salt", "rye", "proof"],
}
COMMON = ["the", "of", "and", "to", "in", "that", "it", "was", "for", "on"]


def two_topics(count: int = 60) -> Dataset:
    """Documents of two topics in turn, each of common words and some of its topic's."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        topic = list(TOPICS)[i % 2]
        words = [*rng.choice(TOPICS[topic], 8), *rng.choice(COMMON, 25)]
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "domain": topic, "document": str(i)})
    return Dataset.from_list(rows)


def purity(dataset: Dataset) -> float:
    """The share of neighbours that are about the same topic."""
    domains = dataset["domain"]
    return float(np.mean([a == b for a, b in zip(domains, domains[1:], strict=False)]))


def test_neighbours_are_about_the_same_topic():
    documents = two_topics()
    assert purity(documents) == 0
    assert purity(documents.shuffle(seed=0)) < 0.7
    # One change of topic is unavoidable.
    assert purity(order_by_similarity(documents)) > 0.95


def test_each_document_is_used_once_and_the_order_is_decided_by_the_seed():
    documents = two_topics()
    ordered = [order_by_similarity(documents, seed=seed)["document"] for seed in (0, 0, 1)]
    assert all(sorted(names) == sorted(documents["document"]) for names in ordered)
    assert ordered[0] == ordered[1] != ordered[2]


def test_the_path_goes_to_the_nearest_vector_that_is_left():
    angles = np.radians([0, 100, 10, 50, 22])
    path = similarity_path(np.stack([np.cos(angles), np.sin(angles)], 1) * [[1], [90], [3], [0.1], [5]]).tolist()
    left = set(range(5)) - {path[0]}
    for here, there in zip(path, path[1:], strict=False):
        assert there == min(left, key=lambda i: abs(angles[i] - angles[here]))
        left.remove(there)


def test_tfidf_gives_the_numbers_of_its_formula():
    vectors = hashed_tfidf(["a a b", "b c", "b"], dimensions=4096)
    assert vectors.shape == (3, 4096) and vectors.dtype == np.float32
    rare, twice = np.log(4 / 2), 1 + np.log(2)
    assert np.allclose(np.sort(np.abs(vectors[0]))[-2:], [0, twice * rare])
    # A word that all documents have says nothing.
    assert not vectors[2].any()


def test_edges_and_mistakes():
    assert len(order_by_similarity(two_topics().select([]))) == 0
    assert similarity_path(np.zeros((3, 2))).tolist() != []
    with pytest.raises(MoEError, match="one row for each"):
        order_by_similarity(two_topics(), embed=lambda texts: np.zeros((2, 3)))
    with pytest.raises(MoEError, match="finite"):
        similarity_path(np.full((2, 2), np.nan))


def test_blocks_of_ordered_documents_are_one_sequence_without_positions():
    documents = two_topics()
    tokenizer = train_tokenizer(documents, 300)
    blocks = tokenize_and_pack(order_by_similarity(documents), tokenizer, 64).remove_columns("position_ids")
    config = MoEConfig(
        text_config=tiny_config("llama", vocab_size=300),
        router_type="segment_merge",
        num_experts_per_tok=8,
        router_kwargs={"segment_length": 16},
    )
    torch.manual_seed(0)
    model, batch = MoEForCausalLM(config), blocks[:2]
    segments = []
    for layer in model.base_model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: segments.append(args[3]))
    model(**batch)
    # Four segments in each of two rows, wherever documents begin.
    assert all(segment.bincount().tolist() == [16] * 8 for segment in segments)
