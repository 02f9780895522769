"""Chat templates to try, a tokenizer that fits any of them, and chats of each kind."""

import importlib.util
import re
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_hf.chat.answer_masks import MaskedChat


FILES = Path(__file__).parent / "templates"
# What is one token in the vocabularies of the models that these templates are of.
SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c]{1,40}\uff5c>|\[\|[a-z]+\|\]|</?s>|<(?:start|end)_of_turn>|\[/?[A-Z_]{3,20}\]"
    r"|\[gMASK\]|<\|?turn\|?>|<sop>|<eos>|<bos>|<seed:\w+>|\]~b\]|\[e~\[|<end_of_utterance>|<SPECIAL_\d+>"
)
ENDS = ("<|im_end|>", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>", "[|endofturn|]", "<end_of_turn>", "<|end|>", "<seed:eos>")
ENDS += ("[e~[", "<|end_of_text|>", "<|end_of_turn|>", "<|assistant_end|>", "<|user|>", "<turn|>")

QUESTIONS = ("Is it hot?", "Or cold?", "One and three?")
ANSWERS = ("Yes, it is.", "Not at all.", "They make four.")
REASONS = ("The sun is up.", "The snow is gone.")
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "add_up", "arguments": {"a": 1, "b": 3}}}
NUMBER = {"type": "number", "description": "A number."}
PARAMETERS = {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]}
TOOLS = [{"type": "function", "function": {"name": "add_up", "description": "Adds.", "parameters": PARAMETERS}}]


@cache
def template_files() -> dict[str, Path]:
    """By name: the templates of this folder, and those of TRL without the ones that it made for training."""
    files = {file.stem: file for file in sorted(FILES.glob("*.jinja"))}
    if importlib.util.find_spec("trl") is not None:
        folder = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
        files |= {f"trl/{f.stem}": f for f in sorted(folder.glob("*.jinja")) if not f.stem.endswith("_training")}
    return files


def training_template(file: Path) -> str | None:
    """The text of the template with markers that TRL puts in the place of `file`, if there is one."""
    marked = file.with_name(f"{file.stem}_training.jinja")
    return marked.read_text("utf-8") if marked.is_file() else None


def tokenizer_for(*templates: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes in which the marks of the templates are tokens; it has the first template."""
    marks = sorted({mark for template in templates for mark in SPECIAL.findall(template)} | {"<s>", "</s>"})
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    # Where the template writes `eos_token` itself, its model has another token for it than the marks in its text.
    end = "</s>" if "eos_token" in templates[0] else next((mark for mark in ENDS if mark in marks), "</s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=end,
        pad_token="</s>",
        additional_special_tokens=marks,
        chat_template=templates[0],
    )


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def _turns(first: dict, second: dict) -> list[dict]:
    return [user(QUESTIONS[0]), first, user(QUESTIONS[1]), second]


def chats() -> dict[str, tuple[list[dict], list | None, list[list[str]]]]:
    """By kind: a chat, its tools, and for each turn of the assistant the words that are to be learnt."""
    inline = [f"<think>\n{reason}\n</think>\n\n{answer}" for reason, answer in zip(REASONS, ANSWERS, strict=False)]
    with_tools = [
        *_turns(assistant(ANSWERS[0]), assistant(ANSWERS[1])),
        user(QUESTIONS[2]),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "name": "add_up", "content": "4", "tool_call_id": "abcdefghi"},
        assistant(ANSWERS[2]),
    ]
    two = [[ANSWERS[0]], [ANSWERS[1]]]
    return {
        "two turns": (_turns(assistant(ANSWERS[0]), assistant(ANSWERS[1])), None, two),
        "system": (
            [{"role": "system", "content": "Be brief."}, *_turns(assistant(ANSWERS[0]), assistant(ANSWERS[1]))],
            None,
            two,
        ),
        "reasoning": (
            _turns(*(assistant(a, reasoning_content=r) for a, r in zip(ANSWERS, REASONS, strict=False))),
            None,
            two,
        ),
        "reasoning in the answer": (_turns(assistant(inline[0]), assistant(inline[1])), None, two),
        "tools": (with_tools, TOOLS, [*two, ["add_up"], [ANSWERS[2]]]),
        "an answer that was asked": (
            [user(ANSWERS[0]), assistant(ANSWERS[0]), user(ANSWERS[0]), assistant(ANSWERS[0])],
            None,
            [[ANSWERS[0]], [ANSWERS[0]]],
        ),
        "white space": (_turns(assistant(f"\n {ANSWERS[0]} \n"), assistant(f" {ANSWERS[1]}")), None, two),
    }


def in_parts(messages: list[dict]) -> list[dict]:
    """The same chat with content as a list, as templates for images read it."""
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]


def learnt(tokenizer: PreTrainedTokenizerFast, chat: MaskedChat) -> list[str]:
    """The text of each run of tokens that are learnt."""
    runs, last = [], 0
    for token, is_learnt in zip(chat.input_ids, chat.mask, strict=True):
        if is_learnt and not last:
            runs.append([])
        if is_learnt:
            runs[-1].append(token)
        last = is_learnt
    return [tokenizer.decode(run) for run in runs]
