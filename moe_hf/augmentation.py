"""More training text from the text there is: words left out, exchanged, or repeated.

Source: Wei and Zou, EDA (https://huggingface.co/papers/1901.11196): random deletion and random swap; their synonyms need a
dictionary, and are left out.
"""

import random
import re
from collections.abc import Callable, Sequence

from datasets import Dataset, concatenate_datasets

from moe_hf.errors import MoEError


def drop_words(words: list[str], rate: float, generator: random.Random) -> list[str]:
    """Leave out each word with probability `rate`; one at least stays."""
    kept = [word for word in words if generator.random() >= rate]
    return kept or [generator.choice(words)]


def swap_words(words: list[str], rate: float, generator: random.Random) -> list[str]:
    """Exchange `rate` * (number of words) random pairs."""
    words = list(words)
    for _ in range(round(rate * len(words))):
        i, j = generator.randrange(len(words)), generator.randrange(len(words))
        words[i], words[j] = words[j], words[i]
    return words


def repeat_words(words: list[str], rate: float, generator: random.Random) -> list[str]:
    """Write each word twice with probability `rate`."""
    return [word for word in words for _ in range(2 if generator.random() < rate else 1)]


AUGMENTATIONS: dict[str, Callable[[list[str], float, random.Random], list[str]]] = {
    "drop_words": drop_words,
    "swap_words": swap_words,
    "repeat_words": repeat_words,
}


def augment(dataset: Dataset, options: Sequence[str], seed: int = 0) -> Dataset:
    """`dataset` and one changed copy of each document per option.

    Args:
        dataset (`Dataset`): documents; the column `text` changes, the others are copied.
        options (`list[str]`): `"name=rate"`, a name of `AUGMENTATIONS` and a share of words in (0, 1).
        seed (`int`): the same seed and documents give the same copies.

    Raises:
        MoEError: an option that is not of that form.
    """
    parts = [dataset]
    for option in options:
        function, rate = _parsed(option)
        generator = random.Random(f"{seed} {option}")
        texts = [_augmented(text, function, rate, generator) for text in dataset["text"]]
        parts.append(dataset.remove_columns("text").add_column("text", texts).cast(dataset.features))
    return concatenate_datasets(parts)


def _augmented(text: str, function: Callable, rate: float, generator: random.Random) -> str:
    """White space belongs to the word before it, so that lines stay lines."""
    words = re.findall(r"\S+\s*", text)
    return "".join(function(words, rate, generator)) if words else text


def _parsed(option: str) -> tuple[Callable, float]:
    name, _, rate = option.partition("=")
    try:
        share = float(rate)
    except ValueError:
        share = -1.0
    if name not in AUGMENTATIONS or not 0 < share < 1:
        raise MoEError(
            f"{option!r} is no augmentation: give NAME=RATE, NAME one of {', '.join(AUGMENTATIONS)}, RATE between 0 "
            "and 1, such as drop_words=0.1."
        )
    return AUGMENTATIONS[name], share
