"""Text for the commands that run a model over some: documents, rows of tokens, batches."""

from collections.abc import Iterator
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_documents(data: str, split: str, text_column: str, domains: list[str] | None) -> "Dataset":
    """The documents of `--data`, of some domains alone where they are given."""
    from moe_hf.data import load_text
    from moe_hf.errors import MoEError

    documents = load_text(data, split=split, text_column=text_column)
    if not domains:
        return documents
    known = sorted(set(documents["domain"]))
    unknown = sorted(set(domains) - set(known))
    if unknown:
        raise MoEError(f"No domain {unknown[0]!r} in {data!r}; it has {', '.join(known)}.")
    return documents.select([i for i, name in enumerate(documents["domain"]) if name in domains])


def text_blocks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: "Dataset",
    block_size: int,
    max_tokens: int,
) -> "Dataset":
    """Enough rows for `max_tokens`: packed, or padded where documents of the family would see each other."""
    from moe_hf.data import check_packing, tokenize_and_pack
    from moe_hf.errors import MoEError

    positions = getattr(model.config, "max_position_embeddings", None)
    block_size = min(block_size, positions or block_size)
    # Few tokenizers have tokens of more than 8 characters in the mean.
    enough = 8 * (max_tokens + block_size)
    ends = accumulate(map(len, documents["text"]))
    documents = documents.select(range(min(len(documents), 1 + sum(end < enough for end in ends))))
    try:
        check_packing(model)
    except MoEError:
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenize_and_pack(documents, tokenizer, block_size, packed=False)
    return tokenize_and_pack(documents, tokenizer, block_size)


def batches_of(blocks: "Dataset", batch_size: int, max_tokens: int) -> Iterator[dict[str, Any]]:
    """Batches of `batch_size` rows, as a model takes them, with `max_tokens` in all; a row that is cut is a batch of its own."""
    import torch

    rows = iter(blocks)
    while max_tokens > 0 and (batch := list(islice(rows, batch_size))):
        whole = []
        for row in batch:
            count = len(row["input_ids"]) if "attention_mask" not in row else int(row["attention_mask"].sum())
            if count > max_tokens:
                break
            whole.append(row)
            max_tokens -= count
        if whole:
            yield {name: torch.stack([row[name] for row in whole]) for name in whole[0]}
        if len(whole) < len(batch):
            # Padding follows the text.
            if max_tokens:
                yield {name: values[None, :max_tokens] for name, values in row.items()}
            return
