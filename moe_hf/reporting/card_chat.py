"""A chat for the card of a chat model: one request, and what the model itself answers."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_hf.chat.generation import generated_answer
from moe_hf.chat.rendered_chat import UnmarkableChat
from moe_hf.errors import MoEError


REQUEST = "Write one sentence about the sea."
LONGEST_ANSWER = 60


def sample_chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[dict[str, str]]:
    """A request and the model's greedy answer of at most 60 tokens, by the tokenizer's template; empty where there is none, or
    it refuses the request, or the weights are not here.
    """
    if not has_chats(tokenizer) or model.device.type == "meta":
        return []
    request = {"role": "user", "content": REQUEST}
    try:
        answer = generated_answer(model, tokenizer, [request], LONGEST_ANSWER)
    except UnmarkableChat:
        return []
    return [request, {"role": "assistant", "content": answer}]


def has_chats(tokenizer: Any) -> bool:
    """Whether it is a tokenizer with a chat template."""
    return isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.chat_template is not None


def check_chat(chat: Any) -> list[dict[str, str]]:
    """`card_facts['chat']`: turns with `role` and `content`.

    Raises:
        MoEError: another form.
    """
    turns = chat if isinstance(chat, list) else [chat]
    if not all(
        isinstance(turn, dict) and all(isinstance(turn.get(n), str) for n in ("role", "content")) for turn in turns
    ):
        raise MoEError("card_facts['chat'] is a list of turns, each a dict with the texts role and content.")
    return turns


def shown_chat(chat: list[dict[str, str]]) -> str:
    """The turns as a block of Markdown, whatever they contain."""
    text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in chat)
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}" if chat else ""
