"""A chat as its template renders it, and the place of each answer in the text, from renderings alone.

An answer lies between two renderings of a part of the chat:

- it starts where `messages[:i]` with the generation prompt ends, and it ends where `messages[:i + 1]` ends, if both are the
  beginning of the whole (the **prefix** way);
- if one is not (templates that drop the reasoning of earlier turns, or write a think block into the last one), a word that
  nobody wrote is rendered in the answer's place, and what stands before and after it must be the beginning and the end of the
  whole (the **stand-in** way).

A chat that fits neither is refused. Nothing is found by looking for the answer's words, which may stand elsewhere too.
"""

import os
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from moe_hf.errors import MoEError


# In the marks of think blocks: <think>, [THINK], <|START_THINKING|>, <seed:think>, <|open|>think<|sep|>, <thought>, ...
THINKING = re.compile(r"think|thought|reason", re.IGNORECASE)
THINK_MARK = re.compile(r"[<\[][^<\[]*(?:think|thought|reason)", re.IGNORECASE)
EMPTY_BLOCK = re.compile(r"\s*(?:[<\[][^\s<>\[\]]*(?:think|thought|reason)[^\s<>\[\]]*[>\]]\s*){2}", re.IGNORECASE)
LONGEST_MARK = 80
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
# What a template raises for a chat that it does not take: its own refusal, or an operation on a field that is not there.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)


class UnmarkableChat(MoEError):
    """A chat whose answers cannot be told from the rest; the message says what does not fit."""


class RenderedChat:
    """A whole chat as text, and the place of its answers in it."""

    def __init__(
        self, render: Callable[..., str], messages: list[dict], ends: set[str], special: Iterable[str]
    ) -> None:
        self.render, self.messages, self.ends = render, messages, tuple(ends)
        self._special = special
        self._known: dict[tuple[int, bool], str | None] = {}
        try:
            self.text = render(messages)
        except TEMPLATE_ERRORS as error:
            raise UnmarkableChat(f"The chat template does not take this chat: {error}.") from error
        # Figures, which no template writes in capitals.
        self.stand_in = "80524917306"
        while self.stand_in in self.text:
            self.stand_in += "6"

    @cached_property
    def special(self) -> re.Pattern:
        """Any of the tokenizer's special tokens."""
        return re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or "(?!)")

    def answer(self, turn: int) -> tuple[int, int]:
        """Start and end of an answer in `text`, with what ends its turn.

        Raises:
            UnmarkableChat: it cannot be placed.
        """
        start = self._start(turn)
        return start, self._end(turn, start)

    def check_written(self, turn: int, written: str) -> bool:
        """Whether the template writes the words and the reasoning of a turn as they are.

        Raises:
            UnmarkableChat: it writes nothing of them, or not the tool calls.
        """
        message = self.messages[turn]
        for call in message.get("tool_calls") or ():
            name = (call.get("function") or call).get("name")
            if name and name not in written:
                raise UnmarkableChat(f"The chat template does not write the tool calls of turn {turn} ({name}).")
        reasoning = next((message[field] for field in REASONING_FIELDS if message.get(field)), "")
        if _words_of(message) in written:
            return not isinstance(reasoning, str) or reasoning.strip() in written
        if self._around(turn, message) is None:
            raise UnmarkableChat(
                f"The chat template does not write the words of turn {turn} (its content is "
                f"{type(message.get('content')).__name__}): give them in the form that it reads."
            )
        return False

    def _start(self, turn: int) -> int:
        prompt = self._rendered(self.messages[:turn], add_generation_prompt=True)
        if prompt is not None and self.text.startswith(prompt):
            start = len(prompt)
            # Some templates write the prompt into a turn before which they do not give it, such as one behind a tool's.
            header = self._header(next(i for i, turn in enumerate(self.messages) if turn["role"] == "assistant"))
            start += len(header) if header.strip() and self.text.startswith(header, start) else 0
            return self._past_own_marks(turn, start, header)
        for around in (self._around(turn, self.messages[turn]), self._around_calls(turn)):
            before = (
                None if around is None else next(filter(self.text.startswith, (around[0], around[0].rstrip())), None)
            )
            if before is not None:
                return self._after_prompt(turn, before)
        raise self._misfit(turn, "what stands before it")

    def _past_own_marks(self, turn: int, start: int, header: str) -> int:
        """`start`, or behind what the template itself writes there before any answer without reasoning: an empty think block,
        or the header of the turn where it gives no generation prompt.
        """
        if header.strip() and not THINKING.search(self.text, start, start + LONGEST_MARK):
            return start
        around = self._around(turn, _without(self.messages[turn], *REASONING_FIELDS), whole=True)
        own = around[0][start:] if around is not None and self.text.startswith(around[0]) else ""
        if THINKING.search(own) or (own.strip() and not header.strip()):
            return start + len(own)
        # Before tool calls, which leave no room for words.
        empty = EMPTY_BLOCK.match(self.text, start)
        return empty.end() if empty and empty[0].strip() not in _words_of(self.messages[turn]) else start

    def _header(self, turn: int) -> str:
        """The generation prompt before a turn; empty if the template has none."""
        history, prompt = (
            self._rendered(self.messages[:turn], add_generation_prompt=asked) for asked in (False, True)
        )
        return prompt[len(history) :] if prompt and history is not None and prompt.startswith(history) else ""

    def _after_prompt(self, turn: int, before: str) -> int:
        """Where the answer starts in `before`, which ends with its words: behind the generation prompt, if that is there."""
        header = self._header(turn)
        # The prompt may open, or fill, a think block that this turn has not, or has with words in it.
        headers = [header, THINK_MARK.split(header)[0]]
        place = next((before.rfind(one) + len(one) for one in headers if one.strip() and one in before), len(before))
        own = before[place:]
        # What is neither space nor the row's reasoning may be anything, another turn's words too.
        return place if not own.strip() or (self._reasons(turn) and THINKING.search(own)) else len(before)

    def _end(self, turn: int, start: int) -> int:
        until = self._rendered(self.messages[: turn + 1])
        if until is not None and self.text.startswith(until) and len(until) >= start:
            end = len(until)
        else:
            end = self._end_by_stand_in(turn, start)
        own = self.text[start:end]
        if own.rstrip().endswith(self.ends):
            return end
        if self.text.startswith(self.ends, end):
            return end + next(len(word) for word in self.ends if self.text.startswith(word, end))
        return self._without_next_prompt(turn, end) if any(word in own for word in self.ends) else end

    def _without_next_prompt(self, turn: int, end: int) -> int:
        """`end`, or where the turn ends before it: some templates write a generation prompt whether asked for or not."""
        around = self._around(turn, self.messages[turn])
        if around is None or not self.text.endswith(around[1]):
            return end
        words_end = len(self.text) - len(around[1])
        places = [place + len(word) for word in self.ends if (place := self.text.find(word, words_end, end)) >= 0]
        return min(places, default=end)

    def _end_by_stand_in(self, turn: int, start: int) -> int:
        # Without its tool calls, which the answer's end comes after.
        bare = _without(self.messages[turn], "tool_calls")
        among, alone = self._around(turn, bare), self._around(turn, bare, later=[])
        if among is None or not self.text.endswith(among[1]):
            return self._end_by_token(turn, start)
        closing = self._up_to_token(os.path.commonprefix([among[1], alone[1]]) if alone is not None else "")
        if not self.special.search(closing):
            # The last turn ends with another token than one amid the chat, or with none.
            token = self.special.match(among[1])
            closing = token[0] if token and self._ends_other_turns(turn, token[0]) else closing
        return len(self.text) - len(among[1]) + len(closing)

    def _up_to_token(self, closing: str) -> str:
        """`closing` up to its last whole token and the space behind it: what follows may be half a mark of the next turn."""
        tokens = list(self.special.finditer(closing))
        if not tokens:
            return closing
        end = tokens[-1].end()
        return closing[: end + len(closing[end:]) - len(closing[end:].lstrip())]

    def _end_by_token(self, turn: int, start: int) -> int:
        """The first token after `start` at which the assistant stops, if it comes before the next turn's words."""
        following = self._around(turn + 1, self.messages[turn + 1]) if turn + 1 < len(self.messages) else None
        if following is not None and self.text.startswith(following[0]):
            places = [self.text.find(word, start, len(following[0])) + len(word) for word in self.ends]
            places = [place for word, place in zip(self.ends, places, strict=True) if place >= start + len(word)]
            if places:
                return min(places)
        raise self._misfit(turn, "what stands after it")

    def _around_calls(self, turn: int) -> tuple[str, str] | None:
        """As `_around`, with words in place of tool calls and of what they lead to, up to the next request."""
        if not self.messages[turn].get("tool_calls"):
            return None
        places = [i for i in range(turn + 1, len(self.messages)) if self.messages[i]["role"] == "user"]
        later = self.messages[places[0] :] if places else []
        return self._around(turn, _without(self.messages[turn], "tool_calls"), later=later)

    def _ends_other_turns(self, turn: int, token: str) -> bool:
        """Whether the turn before ends with `token` too: else it may be the beginning of the next."""
        before = self._around(turn - 1, self.messages[turn - 1]) if turn else None
        return before is not None and before[1].startswith(token)

    def _around(
        self, turn: int, message: dict, *, later: list[dict] | None = None, whole: bool = False
    ) -> tuple[str, str] | None:
        """What the template writes before and after the words of `message`; None if it does not write them once.

        Args:
            later: the turns that follow; by default those of the chat.
            whole: reasoning that stands in `content` is replaced like the words behind it.
        """
        content = message.get("content")
        word = self.stand_in if whole else _reasoning_in(content) + self.stand_in
        word = word if not isinstance(content, list) else [{"type": "text", "text": self.stand_in}]
        later = self.messages[turn + 1 :] if later is None else later
        text = self._rendered([*self.messages[:turn], {**message, "content": word}, *later])
        parts = [] if text is None else text.split(self.stand_in)
        return (parts[0], parts[1]) if len(parts) == 2 else None

    def _rendered(self, messages: list[dict], add_generation_prompt: bool = False) -> str | None:
        # The beginnings of a chat are asked for more than once.
        key = (len(messages), add_generation_prompt) if messages == self.messages[: len(messages)] else None
        if key is None or key not in self._known:
            try:
                text = self.render(messages, add_generation_prompt=add_generation_prompt) if messages else None
            except TEMPLATE_ERRORS:
                text = None
            if key is None:
                return text
            self._known[key] = text
        return self._known[key]

    def _reasons(self, turn: int) -> bool:
        message = self.messages[turn]
        return any(message.get(name) for name in REASONING_FIELDS) or bool(_reasoning_in(message.get("content")))

    def _misfit(self, turn: int, what: str) -> UnmarkableChat:
        return UnmarkableChat(
            f"The answer of turn {turn} cannot be placed in what the chat template renders: {what} depends on its words, or they "
            "stand there twice or not at all."
        )


def _without(message: dict, *names: str) -> dict:
    return {name: value for name, value in message.items() if name not in names}


def _reasoning_in(content: Any) -> str:
    """The beginning of `content` up to the end of its think block and the space behind it; empty without one."""
    found = re.match(r".*</think>\s*", content, re.DOTALL) if isinstance(content, str) else None
    return found[0] if found else ""


def _words_of(message: dict) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return (content or "").strip()
