"""A little text, on which the loss of a model is measured before and after it becomes another one.

Letters: B batch, S sequence, V vocabulary.
"""

import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from moe_hf.dense_sources import find_dense_tokenizer
from moe_hf.errors import MoEError
from moe_hf.upcycling.router_init.hidden_states import check_token_ids


# A second of a small model on a CPU; the same tokens before and after, so that a difference needs no more.
NUM_ROWS, ROW_LENGTH = 4, 256
# Few tokenizers have tokens of more characters in the mean.
CHARACTERS_PER_TOKEN = 8
BUILTIN_PROSE = f"the language reference of Python {platform.python_version()}"
GIVEN_IDS = "the token ids given"
FIND_TOKENIZER = Callable[[], PreTrainedTokenizerBase | None]


@dataclass(frozen=True)
class SampleText:
    """Tokens of text.

    Attributes:
        input_ids: (B, S).
        name: of the text, for records.
        compared: rows, and tokens of each, whose logits are compared besides.
    """

    input_ids: torch.Tensor
    name: str
    compared: tuple[int, int] = (2, 64)


def sample_text(
    config: PreTrainedConfig,
    tokenizer: FIND_TOKENIZER,
    data: str | Path | None = None,
    inputs: torch.Tensor | None = None,
) -> SampleText | None:
    """The text to measure a loss on: the user's, or else prose that every Python carries.

    Args:
        config (`PreTrainedConfig`): of the model, for its vocabulary and positions.
        tokenizer (`Callable`): gives its tokenizer, or None where there is none; not called where no text is read.
        data (`str` or `Path`, *optional*): what `moe_hf.data.load_text` reads: a file, a folder, or a dataset of the Hub.
        inputs (`torch.Tensor`, *optional*): token ids of the user's text, (B, S), which are taken where `data` is not given.

    Returns:
        At most 4 x 256 tokens; None where there is neither a tokenizer of the model's nor token ids.

    Raises:
        MoEError: `data` without a tokenizer, with a tokenizer of another model, or without text.
    """
    if data is None and inputs is not None:
        check_token_ids("inputs", inputs)
        return SampleText(inputs[:NUM_ROWS, :ROW_LENGTH], GIVEN_IDS)
    words = tokenizer()
    fits = words is not None and len(words) <= config.vocab_size
    if data is None and not fits:
        return None
    if not fits:
        found = (
            "no tokenizer" if words is None else f"a tokenizer of {len(words)} tokens, and not {config.vocab_size},"
        )
        raise MoEError(f"The model has {found} to read {str(data)!r} with: pass tokenizer, the model's own.")
    # It takes a second to import.
    from moe_hf.data import builtin_prose, load_text

    documents = builtin_prose() if data is None else load_text(str(data))
    length = min(ROW_LENGTH, getattr(config, "max_position_embeddings", None) or ROW_LENGTH)
    passages = islice(_passages(documents["text"], CHARACTERS_PER_TOKEN * length), NUM_ROWS)
    rows = [words(text, return_attention_mask=False, verbose=False)["input_ids"][:length] for text in passages]
    longest = max(map(len, rows))
    if longest < 2:
        if data is None:  # a tokenizer of another script, which has no prose of ours
            return None
        raise MoEError(f"{str(data)!r} has fewer than two tokens: give more text.")
    ids = torch.tensor([row for row in rows if len(row) == longest])
    return SampleText(ids, BUILTIN_PROSE if data is None else Path(data).name)


def _passages(texts: Iterable[str], size: int) -> Iterator[str]:
    """Pieces of `size` characters, the last one shorter: the beginnings of documents, then what follows them."""
    text, rest = "", ""
    # Not all of a large dataset: it has documents enough.
    for document in islice(texts, 64 * NUM_ROWS):
        text += document + "\n\n"
        if len(text) >= size:
            yield text[:size]
            rest += text[size:]
            text = ""
    rest += text
    for start in range(0, len(rest), size):
        yield rest[start : start + size]


def tokenizer_of(*models: PreTrainedModel | str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the first model that has one beside its weights, in its folder or file or on the Hub."""
    for model in models:
        name = model
        if isinstance(model, PreTrainedModel):
            # The commit of the Hub that it was loaded from; a name alone may be anything.
            is_from_hub = getattr(model.config, "_commit_hash", None) is not None
            name = model.name_or_path
            if not (is_from_hub or (name and Path(name).exists())):
                continue
        path = Path(name).expanduser()
        try:
            found = find_dense_tokenizer(path if path.exists() else str(name))
        except (OSError, ValueError, KeyError, ImportError):
            continue
        if found is not None:
            return found
    return None
