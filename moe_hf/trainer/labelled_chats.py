"""Rows of chats as what a trainer of TRL takes without touching it again: token ids, and labels of the answers alone."""

import json
from collections.abc import Iterable
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl import maybe_convert_to_chatml

from moe_hf.chat.answer_masks import MaskedChat, mask_answers, special_tokens
from moe_hf.chat.rendered_chat import UnmarkableChat
from moe_hf.errors import MoEError


# What a chat is read from; columns beside them stay.
CHAT_COLUMNS = ("messages", "conversations", "prompt", "completion", "tools", "chat_template_kwargs")

logger = logging.get_logger(__name__)


def labelled_chats(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    kept: slice = slice(None),
    learn_prompts: bool = False,
    end_token_ids: Iterable[int] = (),
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Chats as `input_ids` and `labels`, which are -100 for all that the assistant did not write; see `mask_answers`.

    Rows of which no answer lies in `kept` are left out, and their number is said; rows of a stream are looked at as it is read.

    Args:
        rows: with `messages`, or `prompt` and `completion`, or `conversations` (`from`, `value`); perhaps with `tools` and
            `chat_template_kwargs`. Other columns stay. Rows that have `input_ids` and `labels` are given back as they are.
        name (`str`): of the argument, for the errors.
        kept (`slice`): the tokens of a row that training will see.
        learn_prompts (`bool`): whether answers in a `prompt` are learnt too.
        end_token_ids: see `mask_answers`.
        num_proc (`int`, *optional*): processes, for a `Dataset`.

    Raises:
        MoEError: the rows are no chats, one has no turn of the assistant, or one whose answers cannot be told from the rest;
            or of none a label is left.
    """
    columns = rows.column_names or list(next(iter(rows)))
    if "input_ids" in columns:
        if "labels" not in columns:
            raise MoEError(
                f"assistant_only_loss=True learns the answers of chats, and {name} has token ids without labels: give rows "
                "with messages, or labels (-100 for what is not learnt), or set assistant_only_loss=False."
            )
        return rows

    special = special_tokens(tokenizer)

    def labelled(row: dict, index: int) -> dict:
        row = maybe_convert_to_chatml(dict(row))
        messages, first = _turns(row, f"row {index} of {name}")
        tools = row.get("tools")
        try:
            chat = mask_answers(
                tokenizer,
                messages,
                first=0 if learn_prompts else first,
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                end_token_ids=end_token_ids,
                special=special,
                **(row.get("chat_template_kwargs") or {}),
            )
        except UnmarkableChat as error:
            raise MoEError(f"Row {index} of {name}: {error}") from error
        _say_once(chat)
        return {"input_ids": chat.input_ids, "labels": chat.labels}

    options = {"with_indices": True, "remove_columns": [column for column in columns if column in CHAT_COLUMNS]}
    if isinstance(rows, IterableDataset):
        return rows.map(labelled, **options).filter(lambda row: _has_label(row, kept))
    done = rows.map(labelled, num_proc=num_proc, desc=f"Marking the answers of {name}", **options)
    left = done.filter(lambda row: _has_label(row, kept), num_proc=num_proc)
    lost = len(done) - len(left)
    if lost:
        words = f"{lost} of {len(done)} rows of {name} have no answer in the tokens that max_length leaves"
        if not len(left):
            raise MoEError(f"{words}: give a larger max_length, or shorter chats.")
        logger.warning(f"{words}: they are left out.")
    return left


def _has_label(row: dict, kept: slice) -> bool:
    return any(label != -100 for label in row["labels"][kept])


def _turns(row: dict, place: str) -> tuple[list[dict], int]:
    """The turns of a row, and how many of them are its prompt."""
    prompt = row.get("prompt") if "messages" not in row else None
    turns = row["messages"] if "messages" in row else row.get("completion")
    parts = [turns] if prompt is None else [prompt, turns]
    if not all(isinstance(part, list) and part and all(map(_is_turn, part)) for part in parts):
        raise MoEError(
            f"assistant_only_loss=True learns the answers of chats, and {place} is none (it has {', '.join(row)}): give rows "
            "with messages, or set assistant_only_loss=False."
        )
    if not any(turn["role"] == "assistant" for turn in turns):
        raise MoEError(
            f"{place[0].upper()}{place[1:]} is a chat without a turn of the assistant, so that there is nothing to learn in it: "
            "leave such rows out, or set assistant_only_loss=False, which learns the requests too."
        )
    return [*(prompt or []), *turns], len(prompt or [])


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") is not None


def _say_once(chat: MaskedChat) -> None:
    if not chat.ends:
        logger.warning_once(
            "The chat template writes no token of the tokenizer's own behind some answers: what is trained does not learn to "
            "stop there."
        )
    if chat.rewritten:
        logger.warning_once(
            "The chat template does not write all answers as the rows have them, for instance without the reasoning of earlier "
            "turns: what it leaves out is not learnt."
        )
