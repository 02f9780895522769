"""Text for training and evaluation: load documents, hold some out, tokenise, pack into blocks.

Packed rows: several documents share one block. `position_ids` restart at 0 where a document begins; transformers builds
the block-diagonal attention mask from that when no `attention_mask` and no cache is given (so evaluate with
`use_cache=False`). `check_packing` proves it for one model.
"""

import contextlib
import glob
import hashlib
import json
import math
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from pyarrow import ArrowException
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moe_hf.errors import MoEError
from moe_hf.modeling.routing_ids import ID_ARGUMENTS, example_ids


BUILTIN_CORPUS = "builtin"
COLUMNS = ("text", "domain", "document")
TEXT_SUFFIXES = (".txt", ".md", ".py")
TABLE_SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
NULL_ROW = re.compile(rb"(?:\A|[\r\n])[ \t\xef\xbb\xbf]*null")
END_OF_TEXT = "<|endoftext|>"
IGNORED_LABEL = -100
NOT_LIBRARY_CODE = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "ensurepip",
    "lib2to3",
}


def load_text(source: str = BUILTIN_CORPUS, *, split: str = "train", text_column: str = "text") -> Dataset:
    """Load documents as a dataset with the columns `text`, `domain`, `document`.

    Args:
        source (`str`): `"builtin"` (see `builtin_corpus`), a file or folder (.txt, .md, .py: one document per file;
            .jsonl, .json, .csv, .parquet: one document per row), or the name of a dataset on the Hub.
        split (`str`): split of a Hub dataset.
        text_column (`str`): column that holds the text of tabular data; `domain`, `document` and id columns
            (`task_ids`, ...) are kept where present, otherwise the domain is the first sub-folder (or `"text"`) and each row is a document.

    Raises:
        MoEError: nothing to read, a missing column, or text that is empty or not UTF-8, naming the file.
    """
    if source == BUILTIN_CORPUS:
        return builtin_corpus()
    path = Path(source).expanduser()
    if path.exists():
        return _load_local(path, text_column)
    if source.startswith((".", "/", "~")) or path.suffix in (*TEXT_SUFFIXES, *TABLE_SUFFIXES):
        raise MoEError(
            f"No file or folder {source!r}. Give an existing path, a Hub dataset name, or {BUILTIN_CORPUS!r}."
        )
    return _as_documents(load_rows(source, split), text_column, source, "text")


def load_rows(source: str, split: str = "train") -> Dataset:
    """Load the rows of a .jsonl, .json, .csv or .parquet file, or of a dataset on the Hub.

    Raises:
        MoEError: there is no such file or dataset, or it cannot be read.
    """
    kind = TABLE_SUFFIXES.get(Path(source).suffix)
    try:
        if kind is None:
            return load_dataset(source, split=split)
        if kind == "json":
            _refuse_null_rows(source)
        rows = load_dataset(kind, data_files=source, split="train")
        # A row that pyarrow holds and Python cannot is found here, not in the middle of a training.
        for _ in rows.iter(batch_size=1000):
            pass
        return rows
    except MoEError:
        raise
    # Which one it is depends on what is in the rows.
    except (DatasetsError, ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        raise MoEError(
            f"Could not read {source!r}: {error.__cause__ or error}. Check the file, or give the name and a split of a "
            "dataset of the Hub."
        ) from error


def _refuse_null_rows(source: str) -> None:
    """Where a block of a file begins with null, pyarrow's reader of JSON ends the process (seen in pyarrow 26.0.1)."""
    for file in [source] if Path(source).is_file() else glob.glob(source):
        content = Path(file).read_bytes()
        found = NULL_ROW.search(content)
        if found is not None:
            line = content.count(b"\n", 0, found.end()) + 1
            raise MoEError(
                f"Line {line} of {file!r} begins with null, which is no row. Write one JSON object per line."
            )


def builtin_corpus() -> Dataset:
    """Return text that every CPython carries: its library source (`code`) and its language reference (`prose`).

    Licence: PSF. The files differ between Python versions; `corpus_fingerprint` tells two corpora apart.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if NOT_LIBRARY_CODE.intersection(name.parts) or name.parts[0] == "pydoc_data":
            continue
        with contextlib.suppress(UnicodeDecodeError):  # a few library modules declare another encoding
            documents.append({"text": path.read_text("utf-8"), "domain": "code", "document": name.as_posix()})
    return _from_documents([document for document in documents + _builtin_prose() if document["text"].strip()])


def builtin_prose() -> Dataset:
    """Return the `prose` of `builtin_corpus` alone, which is there at once."""
    return _from_documents(_builtin_prose())


def _builtin_prose() -> list[dict[str, str]]:
    from pydoc_data.topics import topics

    return [{"text": text, "domain": "prose", "document": name} for name, text in sorted(topics.items())]


def corpus_fingerprint(dataset: Dataset) -> str:
    """Return a sha256 over domains, names and texts, in order."""
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps([row[name] for name in COLUMNS]).encode())
    return digest.hexdigest()


def _from_documents(documents: list[dict[str, str]]) -> Dataset:
    return Dataset.from_dict({name: [document[name] for document in documents] for name in COLUMNS})


def _load_local(path: Path, text_column: str) -> Dataset:
    allowed = (*TEXT_SUFFIXES, *TABLE_SUFFIXES)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in allowed)
    files = [
        file for file in files if file.is_file() and not any(p.startswith(".") for p in file.parts[len(path.parts) :])
    ]
    if not files or files[0].suffix not in allowed:
        raise MoEError(f"No text in {str(path)!r}: files ending in {', '.join(allowed)} are read.")
    texts, tables = [], []
    for file in files:
        relative = file.relative_to(path) if path.is_dir() else Path(file.name)
        domain = relative.parts[0] if len(relative.parts) > 1 else "text"
        if file.suffix in TEXT_SUFFIXES:
            texts.append({"text": _read_utf8(file), "domain": domain, "document": relative.as_posix()})
        else:
            tables.append(_load_table(file, relative.as_posix(), text_column, domain))
    parts = ([_from_documents(texts)] if texts else []) + tables
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _read_utf8(file: Path) -> str:
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise MoEError(
            f"{str(file)!r} is not UTF-8 text ({error}). Convert it, or take it out of the folder."
        ) from error
    if not text.strip():
        raise MoEError(f"{str(file)!r} is empty. Put text in it, or take it out of the folder.")
    return text


def _load_table(file: Path, name: str, text_column: str, domain: str) -> Dataset:
    if file.suffix != ".parquet":
        _read_utf8(file)
    return _as_documents(load_rows(str(file)), text_column, name, domain)


def _as_documents(rows: Dataset, text_column: str, name: str, domain: str) -> Dataset:
    if text_column not in rows.column_names:
        raise MoEError(
            f"{name!r} has no column {text_column!r}; it has {', '.join(sorted(rows.column_names))}. Set text_column."
        )
    texts = list(rows[text_column])
    empty = next((i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()), None)
    if empty is not None or len(rows) == 0:
        where = f"row {empty} of {name!r}" if len(rows) else repr(name)
        raise MoEError(f"{where} has no text in column {text_column!r}. Remove such rows.")
    columns = {"text": texts}
    columns["domain"] = [str(x) for x in rows["domain"]] if "domain" in rows.column_names else [domain] * len(rows)
    if "document" in rows.column_names:
        columns["document"] = [str(x) for x in rows["document"]]
    else:
        columns["document"] = [f"{name}:{i}" for i in range(len(rows))]
    for ids in set(ID_ARGUMENTS).intersection(rows.column_names):
        columns[ids] = list(rows[ids])
        _check_ids(columns[ids], ids, f" in {name!r}")
    return Dataset.from_dict(columns)


def split_by_document(dataset: Dataset, held_out_share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Hold out whole documents of each domain; returns `(train, held_out)`.

    Documents of a domain are ranked by a hash of (seed, domain, name) and the first `ceil(share * count)` are held out:
    the same for the same names and seed on every machine, whatever the order of rows.

    Args:
        held_out_share (`float`): share of each domain's documents, in (0, 1); both sides keep at least one.

    Raises:
        MoEError: the share is not in (0, 1), or a domain has fewer than two documents.
    """
    if not 0 < held_out_share < 1:
        raise MoEError(f"held_out_share={held_out_share} is not between 0 and 1 (both excluded).")
    # As texts: names in a user's rows can be anything.
    keys = list(zip(map(str, dataset["domain"]), map(str, dataset["document"]), strict=True))
    by_domain: dict[str, set[str]] = {}
    for domain, document in keys:
        by_domain.setdefault(domain, set()).add(document)
    held_out = set()
    for domain, documents in by_domain.items():
        if len(documents) < 2:
            raise MoEError(
                f"The domain {domain!r} has {len(documents)} document, at least 2 are needed to hold one out. "
                "Add documents, or give an evaluation set of its own."
            )
        ranked = sorted(documents, key=lambda name: hashlib.sha256(f"{seed}\n{domain}\n{name}".encode()).digest())
        count = min(math.ceil(held_out_share * len(ranked)), len(ranked) - 1)
        held_out.update((domain, name) for name in ranked[:count])
    is_held_out = np.array([key in held_out for key in keys])
    return dataset.select(np.flatnonzero(~is_held_out)), dataset.select(np.flatnonzero(is_held_out))


def tokenize_and_pack(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int, *, packed: bool = True
) -> Dataset:
    """Tokenise documents, close each with the end-of-text token, and cut blocks of `block_size` tokens.

    Columns that hold an id per document for the routers (`task_ids`, `language_ids`, `modality_ids`) become columns with
    the id of each token, `(block_size,)`.

    Packed: documents follow each other; rows have `input_ids`, `labels`, `position_ids`, all `(block_size,)`.
    `position_ids` restart at 0 where a document or a block begins; `labels` (shifted by the model) are -100 at a
    document's first token, which nothing before it may predict. The last tokens, fewer than a block, are dropped.
    Not packed: no block holds two documents; rows are padded and have `input_ids`, `labels`, `attention_mask`. For
    families that `check_packing` refuses.

    Raises:
        MoEError: `block_size` below 2, an id that is no whole number, no end-of-text token, less than one block of text, or no pad token to pad with.
    """
    if block_size < 2:
        raise MoEError(f"block_size={block_size}: a block needs at least 2 tokens.")
    if tokenizer.eos_token_id is None:
        raise MoEError("The tokenizer has no eos_token: set tokenizer.eos_token, it marks where a document ends.")
    documents = list(_token_ids(dataset["text"], tokenizer))
    columns = _packed(documents, block_size) if packed else _padded(documents, block_size, tokenizer)
    for name in set(ID_ARGUMENTS).intersection(dataset.column_names):
        ids = _ids_of_tokens(dataset[name], documents, name)
        columns[name] = _packed(ids, block_size)["input_ids"] if packed else _padded_rows(ids, block_size, 0)[0]
    features = Features({name: List(Value("int32")) for name in columns})
    return Dataset.from_dict(columns, features=features).with_format("torch")


def _ids_of_tokens(ids: Sequence[int], documents: list[np.ndarray], name: str) -> list[np.ndarray]:
    """The id of each document once per token."""
    _check_ids(ids, name)
    return [np.full(len(document), id_, dtype=np.int32) for document, id_ in zip(documents, ids, strict=True)]


def _check_ids(ids: Sequence[int], name: str, where: str = "") -> None:
    wrong = next((i for i, id_ in enumerate(ids) if type(id_) is not int or not 0 <= id_ < 1 << 31), None)
    if wrong is not None:
        raise MoEError(
            f"{name} of document {wrong}{where} is {ids[wrong]!r}; it must be a whole number from 0, as of every document."
        )


def _packed(documents: list[np.ndarray], block_size: int) -> dict[str, np.ndarray]:
    num_tokens = sum(map(len, documents))
    num_blocks = num_tokens // block_size
    if num_blocks == 0:
        raise MoEError(f"The text has {num_tokens} tokens, less than one block of {block_size}. Lower block_size.")
    shape = (num_blocks, block_size)
    ids = np.concatenate(documents)[: num_blocks * block_size].reshape(shape)
    is_start = np.zeros(num_tokens, dtype=bool)
    is_start[np.cumsum([0, *map(len, documents[:-1])])] = True
    is_start = is_start[: num_blocks * block_size].reshape(shape)
    column = np.arange(block_size, dtype=np.int32)
    return {
        "input_ids": ids,
        "labels": np.where(is_start, np.int32(IGNORED_LABEL), ids),
        "position_ids": column - np.maximum.accumulate(np.where(is_start, column, 0), axis=1, dtype=np.int32),
    }


def _padded(documents: list[np.ndarray], block_size: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, np.ndarray]:
    if tokenizer.pad_token_id is None:
        raise MoEError("The tokenizer has no pad_token: set tokenizer.pad_token, or pack documents.")
    ids, is_token = _padded_rows(documents, block_size, tokenizer.pad_token_id)
    labels = np.where(is_token, ids, np.int32(IGNORED_LABEL))
    return {"input_ids": ids, "labels": labels, "attention_mask": is_token.astype(np.int32)}


def _padded_rows(documents: list[np.ndarray], block_size: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents cut into rows of `block_size`, filled up with `padding`, and which places hold a token."""
    pieces = [ids[i : i + block_size] for ids in documents for i in range(0, len(ids), block_size)]
    lengths = np.array(list(map(len, pieces)))
    is_token = np.arange(block_size) < lengths[:, None]
    rows = np.full(is_token.shape, padding, dtype=np.int32)
    rows[is_token] = np.concatenate(pieces)
    return rows, is_token


def _token_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, batch_size: int = 256
) -> Iterator[np.ndarray]:
    end = tokenizer.eos_token_id
    for first in range(0, len(texts), batch_size):
        batch = list(texts[first : first + batch_size])
        for ids in tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]:
            yield np.array(ids if ids and ids[-1] == end else [*ids, end], dtype=np.int32)


def train_tokenizer(dataset: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (any text round-trips, no unknown token) that ends documents with `<|endoftext|>`.

    Raises:
        MoEError: `vocab_size` below 257 (256 bytes and the end-of-text token).
    """
    if vocab_size < 257:
        raise MoEError(f"vocab_size={vocab_size}: a byte-level tokenizer needs at least 257 (256 bytes, end of text).")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(dataset["text"], trainer, length=len(dataset))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


@torch.no_grad()
def check_packing(model: PreTrainedModel, length: int = 6) -> float:
    """Return how far a document's logits depend on what is packed before it (relative norm, 0 when it does not).

    Raises:
        MoEError: they differ by more than rounding: the family does not read documents from `position_ids`
            (state-space layers, absolute positions without `position_ids`, remote code).
    """
    training = model.training
    model.eval()
    vocab_size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    positions = torch.arange(length, device=model.device)[None]
    try:
        more = {"use_cache": False, **example_ids(model.config, 1, model.device)}
        alone = model(input_ids=ids[1:], position_ids=positions, **more).logits.float()
        packed = model(input_ids=ids.view(1, -1), position_ids=positions.repeat(1, 2), **more).logits.float()
    finally:
        model.train(training)
    difference = float((packed[:, length:] - alone).norm() / alone.norm())
    if not difference <= (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1):
        raise MoEError(
            f"{type(model).__name__} lets packed documents see each other (logits differ by {difference:.1e}): it does "
            "not read documents from position_ids. Choose another family, or do not pack (packed=False)."
        )
    return difference
