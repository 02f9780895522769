"""What the tokens of a text are, so that the load of experts can be compared between them: domain, position, ids, class.

Letters: B batch, S sequence, T = B * S tokens, V vocabulary.
"""

from collections.abc import Mapping

import torch
from transformers import PreTrainedTokenizerBase

from moe_hf.errors import MoEError
from moe_hf.modeling.routing_ids import ID_ARGUMENTS


# Positions in a document, by powers of two: 0, 1, 2-3, 4-7, ...; the last one has all that follow.
POSITION_BINS = 16
TOKEN_CLASSES = ("word start", "inside a word", "digits", "punctuation", "white space", "special", "other")
LARGEST_ID = 1023


def position_names() -> tuple[str, ...]:
    """Names of the bins of positions."""
    starts = [0, *(2**power for power in range(POSITION_BINS - 1))]
    pairs = zip(starts, [*starts[1:], 0], strict=True)
    names = [str(first) if first + 1 == after else f"{first}-{after - 1}" for first, after in pairs]
    return (*names[:-1], f"{starts[-1]} and on")


def position_bins(positions: torch.Tensor) -> torch.Tensor:
    """The bin of each position, in the shape of `positions`."""
    # Exact where a float's logarithm would round: how many powers of two are not above the position.
    powers = 2 ** torch.arange(POSITION_BINS - 1, device=positions.device)
    return torch.bucketize(positions.clamp_min(0), powers, right=True)


def positions_in_documents(batch: Mapping[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """Place of each token in its document, (B, S): given by `position_ids`, else counted from the first real token."""
    given, mask = batch.get("position_ids"), batch.get("attention_mask")
    if given is not None and given.ndim == 2:
        return given.expand(shape)
    if mask is not None and mask.ndim == 2:
        return (mask[:, -shape[1] :].cumsum(-1) - 1).clamp_min(0)
    return torch.arange(shape[1]).expand(shape)


def ids_of_tokens(batch: Mapping[str, torch.Tensor], shape: torch.Size) -> dict[str, torch.Tensor]:
    """The id of each token, (T,), for each kind of id that the batch has.

    Raises:
        MoEError: ids that are no whole numbers from 0 to 1023, or of another shape.
    """
    found = {}
    for argument, kind in ID_ARGUMENTS.items():
        if argument not in batch:
            continue
        ids = torch.as_tensor(batch[argument])
        spread = ids[:, None].expand(shape) if ids.ndim == 1 and len(ids) == shape[0] else ids
        if spread.shape != shape or ids.is_floating_point() or ids.min() < 0 or ids.max() > LARGEST_ID:
            raise MoEError(
                f"{argument} are {ids.dtype} of shape {tuple(ids.shape)}; a report takes whole numbers from 0 to "
                f"{LARGEST_ID}, one per row or per token of {tuple(shape)}."
            )
        found[kind] = spread.reshape(-1).long()
    return found


def token_classes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """The class of each token of the vocabulary by its characters alone, (V,), an index into `TOKEN_CLASSES`.

    A word start is letters after a space (or the mark that a tokenizer has for one), inside a word are letters without one;
    parts of characters, mixtures, and ids that the tokenizer does not know, are "other".
    """
    known = min(len(tokenizer), vocab_size)
    special = set(tokenizer.all_special_ids)
    result = torch.full((vocab_size,), TOKEN_CLASSES.index("other"), dtype=torch.long)
    pieces = tokenizer.convert_ids_to_tokens(list(range(known)))
    for token_id, (piece, text) in enumerate(zip(pieces, token_texts(tokenizer, range(known)), strict=True)):
        name = "special" if token_id in special else _class_of(piece or "", text)
        result[token_id] = TOKEN_CLASSES.index(name)
    return result


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: "range | list[int]") -> list[str]:
    """The text of each token alone."""
    return tokenizer.batch_decode([[token_id] for token_id in token_ids], clean_up_tokenization_spaces=False)


def _class_of(piece: str, text: str) -> str:
    # Decoders drop a leading space of a text; pieces of SentencePiece and byte-level tokenizers keep their mark of one.
    spaced = text[:1].isspace() or piece[:1] in ("\u2581", "\u0120")
    bare = text.strip()
    if not bare:
        return "white space" if text or spaced else "other"
    if bare.isalpha() and not piece.startswith("##"):
        return "word start" if spaced else "inside a word"
    if bare.removeprefix("##").isalpha():
        return "inside a word"
    if bare.isdigit():
        return "digits"
    if "\ufffd" not in bare and not any(character.isalnum() for character in bare):
        return "punctuation"
    return "other"
