"""Fixtures of the trainer's tests."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of a few words, within the tiny models' vocabulary of 113."""
    words = ["<eos>", "<unk>", *"abcdefghij", "the", "of", "class"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder of two domains with a few documents each."""
    folder = tmp_path_factory.mktemp("text")
    for domain, words in (("letters", "a b c d e f g "), ("numbers", "one two three four ")):
        (folder / domain).mkdir()
        for i in range(4):
            (folder / domain / f"{i}.txt").write_text(words * (30 + i))
    return folder
