"""Text for a loss: whose it is, how it becomes rows, and that nothing is measured on what is no text."""

import json

import pytest
import torch
from datasets import Dataset

from moe_hf import MoEError
from moe_hf.data import builtin_prose, train_tokenizer
from moe_hf.upcycling.sample_text import BUILTIN_PROSE, GIVEN_IDS, sample_text, tokenizer_of
from tests.tiny_models import random_ids, tiny_config, tiny_dense


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(builtin_prose().select(range(8)), 300)


def config(tokenizer, **fields):
    return tiny_config("llama", **({"vocab_size": len(tokenizer), "max_position_embeddings": 512} | fields))


def sample(tokenizer, data=None, **fields):
    return sample_text(config(tokenizer, **fields), lambda: tokenizer, data)


def test_prose_is_four_rows_of_four_documents(tokenizer):
    text = sample(tokenizer)
    assert text.input_ids.shape == (4, 256) and text.name == BUILTIN_PROSE
    beginnings = {document[:40] for document in builtin_prose()["text"]}
    assert all(tokenizer.decode(row)[:40] in beginnings for row in text.input_ids)
    assert torch.equal(text.input_ids, sample(tokenizer).input_ids)


def test_rows_are_as_long_as_the_positions_allow(tokenizer):
    assert sample(tokenizer, max_position_embeddings=80).input_ids.shape == (4, 80)


def test_each_row_begins_as_the_tokenizer_begins_a_text(tokenizer):
    class WithStart:
        def __call__(self, text, **options):
            return {"input_ids": [1, *tokenizer(text, **options)["input_ids"]]}

        def __len__(self):
            return len(tokenizer)

    text = sample_text(config(tokenizer), WithStart)
    assert (text.input_ids[:, 0] == 1).all() and not (text.input_ids[:, 1:] == 1).any()


@pytest.mark.parametrize(
    ("texts", "shape"),
    {
        "one long document": (["word " * 9000], (4, 256)),
        "many short ones": ([f"line {i} of a chat " * 8 for i in range(300)], (4, 256)),
        "one short one": (["one two three"], (1, 13)),
        "a long and a short one": (["word " * 9000, "end"], (4, 256)),
    }.values(),
    ids=["long", "many short", "short", "both"],
)
def test_text_of_any_shape_becomes_rows(tokenizer, tmp_path, texts, shape):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    text = sample(tokenizer, file)
    assert text.name == "texts.jsonl"
    assert text.input_ids.shape[0] == shape[0] and (shape[1] < 256 or text.input_ids.shape[1] == 256)
    words = tokenizer.decode(text.input_ids[0])
    assert words.strip() and texts[0].startswith(words[:8])


def test_token_ids_of_the_user_need_no_tokenizer(tokenizer):
    ids = random_ids(6, 300)
    text = sample_text(config(tokenizer), lambda: pytest.fail("a tokenizer was looked for"), inputs=ids)
    assert torch.equal(text.input_ids, ids[:4, :256]) and text.name == GIVEN_IDS


def test_without_a_tokenizer_of_the_model_there_is_no_text_and_data_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one two three")
    assert sample(tokenizer, vocab_size=200) is None
    assert sample_text(config(tokenizer), lambda: None) is None
    with pytest.raises(MoEError, match="tokenizer of 300 tokens, and not 200,"):
        sample(tokenizer, tmp_path / "a.txt", vocab_size=200)
    with pytest.raises(MoEError, match="no tokenizer to read"):
        sample_text(config(tokenizer), lambda: None, tmp_path / "a.txt")
    with pytest.raises(MoEError, match="No file or folder"):
        sample(tokenizer, tmp_path / "b.txt")


def test_text_without_tokens_is_refused_where_it_was_asked_for(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("x")

    class Mute:
        def __call__(self, text, **options):
            return {"input_ids": []}

        def __len__(self):
            return 3

    assert sample_text(config(tokenizer), Mute) is None
    with pytest.raises(MoEError, match="fewer than two tokens"):
        sample_text(config(tokenizer), Mute, tmp_path / "a.txt")


def test_a_tokenizer_is_found_beside_the_weights_of_a_folder_or_a_loaded_model(tokenizer, tmp_path):
    model = tiny_dense("llama", vocab_size=len(tokenizer))
    assert tokenizer_of(model, tmp_path) is None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for found in (tokenizer_of(tmp_path), tokenizer_of(str(tmp_path)), tokenizer_of(model, loaded)):
        assert found.get_vocab() == tokenizer.get_vocab()


def test_prose_is_that_of_the_builtin_corpus():
    from moe_hf.data import builtin_corpus

    whole = builtin_corpus().filter(lambda row: row["domain"] == "prose")
    assert isinstance(whole, Dataset) and builtin_prose().to_list() == whole.to_list()
