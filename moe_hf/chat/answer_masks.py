"""Which tokens of a chat are the assistant's answers, by its chat template, which need not be known or patched.

Where the template has `{% generation %}`, it says so itself; elsewhere see `rendered_chat.py`.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe_hf.chat.rendered_chat import TEMPLATE_ERRORS, RenderedChat, UnmarkableChat


MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class MaskedChat:
    """A chat as tokens.

    Attributes:
        input_ids: token ids, as `apply_chat_template` gives them, (S,).
        mask: 1 for the tokens of an answer and of what ends its turn, else 0, (S,).
        ends: whether each answer ends with a token of the tokenizer's own, such as `<|im_end|>`.
        rewritten: turns of which the template writes other words than the row has.
    """

    input_ids: list[int]
    mask: list[int]
    ends: bool = True
    rewritten: tuple[int, ...] = ()

    @property
    def labels(self) -> list[int]:
        """`input_ids` where the mask is 1, else -100, (S,)."""
        return [token if learnt else -100 for token, learnt in zip(self.input_ids, self.mask, strict=True)]


def marks_answers(tokenizer: PreTrainedTokenizerBase, tools: list | None = None) -> bool:
    """Whether the tokenizer's chat template (the one for `tools`, where it has several) says itself what an answer is."""
    return tokenizer.chat_template is not None and bool(MARKER.search(tokenizer.get_chat_template(tools=tools)))


def mask_answers(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    *,
    first: int = 0,
    tools: list | None = None,
    end_token_ids: Iterable[int] = (),
    special: Mapping[int, str] | None = None,
    use_markers: bool = True,
    **template_kwargs,
) -> MaskedChat:
    """The tokens of a chat, and which of them the assistant would have written.

    That is each answer as the template renders it (with its tool calls, and its reasoning where the row has some and the
    template shows it), and what ends its turn. Not: other turns, the generation prompt, a think block that the template adds
    by itself.

    Args:
        messages: the chat, in any form that the template takes.
        first (`int`): answers of earlier turns are not marked.
        end_token_ids: tokens that end an answer beside the tokenizer's own `eos_token`, where a template leaves it to the next
            turn to end it (`generation_config.eos_token_id`).
        special: what `special_tokens` gives of the tokenizer, found once where many chats are masked.
        use_markers (`bool`): whether `{% generation %}` is read where the template has it.
        template_kwargs: of the template, such as `enable_thinking`.

    Raises:
        UnmarkableChat: the template does not take this chat, or it renders an answer in a way that neither way can place.
    """
    if tokenizer.chat_template is None:
        raise UnmarkableChat(
            "The tokenizer has no chat template: set tokenizer.chat_template, for instance to "
            "moe_hf.trainer.chats.CHAT_TEMPLATE, or assistant_only_loss=False with rows of text."
        )

    def render(part: list[dict], **more) -> str:
        return tokenizer.apply_chat_template(part, tools=tools, tokenize=False, **template_kwargs, **more)

    if use_markers and marks_answers(tokenizer, tools):
        return _marked_by_template(tokenizer, messages, first, {"tools": tools, **template_kwargs})
    special = special_tokens(tokenizer) if special is None else special
    # A model's configuration may name an id that is a word of this tokenizer.
    ends = {tokenizer.eos_token, *(special[i] for i in end_token_ids if i in special)} - {None}
    chat = RenderedChat(render, messages, ends, special.values())
    turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant" and i >= first]
    try:
        spans = {i: chat.answer(i) for i in turns}
    except UnmarkableChat:
        # A template that writes the date may have been read on both sides of midnight.
        chat = RenderedChat(render, messages, ends, special.values())
        spans = {i: chat.answer(i) for i in turns}
    _check_order(spans)
    ids, mask = _mask_of_spans(tokenizer, chat.text, list(spans.values()))
    written = {i: chat.text[start:end] for i, (start, end) in spans.items()}
    rewritten = tuple(i for i, text in written.items() if not chat.check_written(i, text))
    return MaskedChat(
        ids,
        mask,
        ends=all(text.rstrip().endswith((*special.values(), *ends)) for text in written.values()),
        rewritten=rewritten,
    )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens by their ids. Some tokenizers have thousands of added ones (Gemma), line breaks among them."""
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _check_order(spans: Mapping[int, tuple[int, int]]) -> None:
    done = 0
    for turn, (start, end) in spans.items():
        if not done <= start <= end:
            raise UnmarkableChat(f"The chat template does not render turn {turn} behind the turns before it.")
        done = end


def _marked_by_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], first: int, options: dict[str, Any]
) -> MaskedChat:
    try:
        whole = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
        ids, mask = list(whole["input_ids"]), list(whole["assistant_masks"])
        if first:
            prompt = tokenizer.apply_chat_template(
                messages[:first], add_generation_prompt=True, return_dict=True, **options
            )
            before = len(os.path.commonprefix([list(prompt["input_ids"]), ids]))
            mask[:before] = [0] * before
    except TEMPLATE_ERRORS as error:
        raise UnmarkableChat(f"The chat template does not take this chat: {error}.") from error
    return MaskedChat(ids, mask)


def _mask_of_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """Token ids of `text`, and 1 for those that lie in a span; a token over its edge counts if only white space sticks out."""
    if not tokenizer.is_fast:
        return _mask_without_offsets(tokenizer, text, spans)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask, reached, place = [], 0, 0
    for first, last in encoded["offset_mapping"]:
        # Some tokenizers leave the space before a word out of its offsets.
        first, reached = min(first, reached) if first < last else reached, max(reached, last)
        while place < len(spans) and spans[place][1] <= first:
            place += 1
        start, end = spans[place] if place < len(spans) else (len(text), len(text))
        is_inside = start < last and not text[first:start].strip() and not text[end:last].strip()
        mask.append(int(is_inside))
    return list(encoded["input_ids"]), mask


def _mask_without_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    mask = [0] * len(ids)
    for span in spans:
        parts = [list(tokenizer(text[:place], add_special_tokens=False)["input_ids"]) for place in span]
        if any(ids[: len(part)] != part for part in parts):
            raise UnmarkableChat(
                f"{type(tokenizer).__name__} gives no offsets, and its tokens run over the edges of an answer: use a fast "
                "tokenizer."
            )
        first, last = map(len, parts)
        mask[first:last] = [1] * (last - first)
    return ids, mask
