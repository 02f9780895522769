"""Laws of the data: what is refused, what is held out, and that packed documents do not see each other."""

import json

import pytest
import torch
from datasets import Dataset

import moe_hf
from moe_hf import MoEError
from moe_hf.data import (
    builtin_corpus,
    check_packing,
    corpus_fingerprint,
    load_text,
    split_by_document,
    tokenize_and_pack,
    train_tokenizer,
)
from tests.tiny_models import tiny_dense, tiny_native_moe


@pytest.fixture(scope="module")
def corpus() -> Dataset:
    return builtin_corpus()


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["the cat sat on the mat", "def function(argument): return argument", "A sentence of prose. " * 5]
    return train_tokenizer(Dataset.from_dict({"text": texts}), 300)


def documents(*texts: str, domain: str = "text") -> Dataset:
    names = [f"document {i}" for i in range(len(texts))]
    return Dataset.from_dict({"text": list(texts), "domain": [domain] * len(texts), "document": names})


def test_builtin_corpus_has_code_and_prose_and_no_tests(corpus):
    assert corpus.column_names == ["text", "domain", "document"]
    sizes = {"code": 0, "prose": 0}
    for row in corpus:
        sizes[row["domain"]] += len(row["text"])
        assert row["text"].strip()
    assert sizes["code"] > 5e6 and sizes["prose"] > 3e5
    assert not any("test" in name.split("/")[:-1] for name in corpus["document"])
    assert len(set(zip(corpus["domain"], corpus["document"], strict=True))) == len(corpus)
    assert corpus_fingerprint(corpus) == corpus_fingerprint(builtin_corpus())


def test_split_holds_out_whole_documents_of_each_domain(corpus):
    train, held_out = split_by_document(corpus, 0.1, seed=3)
    keys = [set(zip(part["domain"], part["document"], strict=True)) for part in (train, held_out)]
    assert not keys[0] & keys[1] and len(keys[0]) + len(keys[1]) == len(corpus)
    for domain in ("code", "prose"):
        count = sum(name == domain for name in corpus["domain"])
        assert sum(name == domain for name in held_out["domain"]) == -(-count // 10)


def test_split_depends_on_names_and_seed_alone():
    rows = documents(*"abcdefghij")
    held_out = set(split_by_document(rows, 0.3, seed=0)[1]["document"])
    assert set(split_by_document(rows.shuffle(seed=1), 0.3, seed=0)[1]["document"]) == held_out
    assert set(split_by_document(rows, 0.3, seed=1)[1]["document"]) != held_out
    repeated = Dataset.from_dict({k: [*rows[k], *rows[k]] for k in rows.column_names})
    assert set(split_by_document(repeated, 0.3, seed=0)[1]["document"]) == held_out


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_share_outside_of_zero_and_one_is_refused(share):
    with pytest.raises(MoEError, match="held_out_share"):
        split_by_document(documents("a", "b"), share)


def test_domain_of_one_document_is_refused():
    with pytest.raises(MoEError, match="1 document"):
        split_by_document(documents("a"), 0.5)


def test_folder_is_read_with_domains_from_its_folders(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "one.py").write_text("x = 1\n")
    (tmp_path / "two.md").write_text("# Two\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "three"}\n{"text": "four"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    loaded = {(row["domain"], row["document"]): row["text"] for row in load_text(str(tmp_path))}
    assert loaded == {
        ("code", "code/one.py"): "x = 1\n",
        ("text", "two.md"): "# Two\n",
        ("text", "rows.jsonl:0"): "three",
        ("text", "rows.jsonl:1"): "four",
    }


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_tables_keep_domain_and_document_columns(suffix, tmp_path):
    rows = Dataset.from_dict({"body": ["one", "two"], "domain": ["x", "y"], "document": ["a", "b"]})
    path = tmp_path / f"rows.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows.to_list()))
    else:
        {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](path)
    loaded = load_text(str(path), text_column="body")
    assert loaded.to_dict() == {"text": ["one", "two"], "domain": ["x", "y"], "document": ["a", "b"]}
    with pytest.raises(MoEError, match="no column 'text'; it has body, document, domain"):
        load_text(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.md", b" \n\t\n", "is empty"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "not UTF-8"),
        ("latin.jsonl", '{"text": "caf\u00e9"}'.encode("latin-1"), "not UTF-8"),
        ("hole.jsonl", b'{"text": "a"}\n{"text": " "}\n', "row 1 of 'hole.jsonl' has no text"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "Could not read"),
        ("picture.png", b"\x89PNG", "No text in"),
    ],
)
def test_bad_file_is_named(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(MoEError, match=message) as caught:
        load_text(str(path))
    assert name in str(caught.value)


def test_missing_path_is_refused(tmp_path):
    with pytest.raises(MoEError, match="No file or folder"):
        load_text(str(tmp_path / "absent.txt"))
    with pytest.raises(MoEError, match="No text in"):
        load_text(str(tmp_path))


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "tab\t, caf\u00e9, \u65e5\u672c, \U0001f642\n  two  spaces\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|endoftext|>" and len(tokenizer) <= 300
    with pytest.raises(MoEError, match="at least 257"):
        train_tokenizer(documents("a"), 256)


def test_blocks_are_the_documents_in_order_with_positions_that_restart(tokenizer):
    texts = ["the cat", "def function(argument)", "mat " * 9]
    blocks = tokenize_and_pack(documents(*texts), tokenizer, 8)
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    flat = [token for document in ids for token in document]
    assert blocks["input_ids"][:].flatten().tolist() == flat[: len(blocks) * 8] and len(flat) - len(blocks) * 8 < 8
    starts = {sum(map(len, ids[:i])) for i in range(3)}
    position = 0
    for i, (label, actual) in enumerate(
        zip(blocks["labels"][:].flatten().tolist(), blocks["position_ids"][:].flatten().tolist(), strict=True)
    ):
        position = 0 if i in starts or i % 8 == 0 else position + 1
        assert actual == position
        assert label == (-100 if i in starts else flat[i])


def test_unpacked_blocks_hold_one_document_each(tokenizer):
    texts = ["the cat", "mat " * 9]
    blocks = tokenize_and_pack(documents(*texts), tokenizer, 8, packed=False)
    rows = [row["input_ids"][row["attention_mask"].bool()].tolist() for row in blocks]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    assert rows == [document[i : i + 8] for document in ids for i in range(0, len(document), 8)]
    assert all(((row["labels"] == -100) == (row["attention_mask"] == 0)).all() for row in blocks)


@pytest.mark.parametrize(("block_size", "message"), [(1, "at least 2"), (4096, "less than one block")])
def test_block_size_that_gives_no_block_is_refused(block_size, message, tokenizer):
    with pytest.raises(MoEError, match=message):
        tokenize_and_pack(documents("the cat"), tokenizer, block_size)


def packed_and_alone(model, lengths=(5, 1, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of documents in one row, and of each in a row of its own."""
    ids = [torch.randint(3, 100, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat(ids, 1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(input_ids=document, use_cache=False).logits for document in ids], 1)
    return packed, alone


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral", "qwen3_moe", "ours"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_equal_those_of_separate_documents(family, attention):
    if family == "ours":
        model = moe_hf.upcycle(tiny_dense("llama"), num_experts=4, noise=0.5)
    else:
        model = (tiny_native_moe if family in ("mixtral", "qwen3_moe") else tiny_dense)(family)
    model.set_attn_implementation(attention)
    packed, alone = packed_and_alone(model.eval())
    assert float((packed - alone).norm() / alone.norm()) <= 2e-6
    assert check_packing(model) <= 2e-6


@pytest.mark.parametrize("family", ["opt", "mamba"])
def test_family_whose_documents_see_each_other_when_packed_is_refused(family):
    model = tiny_dense(family)
    with pytest.raises(MoEError, match="packed documents see each other"):
        check_packing(model)
