"""Laws of what is learnt of a chat: the answers and what ends them, by any template, or a refusal that names what does not fit."""

import re

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moe_hf.chat.answer_masks import MARKER, mask_answers
from moe_hf.chat.rendered_chat import UnmarkableChat
from moe_hf.trainer.chats import CHAT_TEMPLATE
from tests.chat import template_table
from tests.chat.samples import (
    ANSWERS,
    QUESTIONS,
    REASONS,
    assistant,
    chats,
    learnt,
    template_files,
    tokenizer_for,
    training_template,
    user,
)


TEMPLATES = template_files()
HEADERS = re.compile(
    r"<\|?(?:im_)?start|<\|?turn\|?>model|\[/?INST|<\|assistant\|>|<\uff5cAssistant|USER:|###", re.IGNORECASE
)
THINKING = re.compile("think|thought", re.IGNORECASE)
TWO = chats()["two turns"][0]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PIECE = "<|im_start|>{{ m['role'] }}\\n{{ m['content'] }}<|im_end|>\\n"


def masked_or_refused(tokenizer, messages, tools):
    try:
        return mask_answers(tokenizer, messages, tools=tools, use_markers=False), ""
    except UnmarkableChat as error:
        return None, str(error)


@pytest.mark.parametrize("kind", list(chats()))
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answers_and_what_ends_them_are_learnt_and_nothing_else(name, kind):
    messages, tools, wanted = chats()[kind]
    tokenizer = tokenizer_for(TEMPLATES[name].read_text("utf-8"))
    masked, refusal = masked_or_refused(tokenizer, messages, tools)
    if masked is None:
        # Which these are stands in the table of docs/chat_templates.md.
        assert re.search("does not (take this chat|write the)", refusal)
        return
    whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert tokenizer.decode(masked.input_ids) == whole
    runs = learnt(tokenizer, masked)
    assert len(runs) == len(wanted)
    for run, words in zip(runs, wanted, strict=True):
        assert all(word in run for word in words)
    text = "".join(runs)
    if kind != "an answer that was asked":
        assert not any(words in text for words in (*QUESTIONS, "Be brief"))
    # gpt-oss and Muse open a second message, after their reasoning, within one answer.
    assert kind == "reasoning" or not HEADERS.search(text)
    assert THINKING.search(text) is None or (
        kind.startswith("reasoning") and any(reason in text for reason in REASONS)
    )


@pytest.mark.parametrize("name", [name for name, file in TEMPLATES.items() if MARKER.search(file.read_text("utf-8"))])
def test_what_a_template_marks_itself_is_what_is_found_without_its_marks(name):
    tokenizer = tokenizer_for(TEMPLATES[name].read_text("utf-8"))
    for messages, tools, _ in chats().values():
        try:
            found = mask_answers(tokenizer, messages, tools=tools, use_markers=False)
        except UnmarkableChat:
            continue
        marked = mask_answers(tokenizer, messages, tools=tools)
        assert (found.input_ids, found.mask) == (marked.input_ids, marked.mask)


def test_the_template_for_tokenizers_without_one_is_found_without_its_marks():
    tokenizer = tokenizer_for(CHAT_TEMPLATE)
    found, marked = (mask_answers(tokenizer, TWO, use_markers=marks) for marks in (False, True))
    assert found.mask == marked.mask and learnt(tokenizer, found) == [f"{ANSWERS[0]}</s>", f"{ANSWERS[1]}</s>"]


@pytest.mark.parametrize("name", [name for name, file in TEMPLATES.items() if training_template(file)])
def test_templates_that_trl_made_for_training_mark_no_answer_that_is_not_found(name):
    """They mark more: generation prompts, empty think blocks; `docs/chat_templates.md` says which."""
    text = training_template(TEMPLATES[name])
    tokenizer = tokenizer_for(text)
    try:
        found = mask_answers(tokenizer, TWO, use_markers=False)
    except UnmarkableChat:
        pytest.skip("a template for images")
    marked = mask_answers(tokenizer, TWO)
    assert found.input_ids == marked.input_ids
    assert all(their for our, their in zip(found.mask, marked.mask, strict=True) if our)
    more = [t for t, our, their in zip(found.input_ids, found.mask, marked.mask, strict=True) if their and not our]
    text = tokenizer.decode(more)
    assert not any(words in text for words in (*ANSWERS, *QUESTIONS))


def test_the_table_of_the_page_is_what_the_templates_do():
    pytest.importorskip("trl")
    page = template_table.PAGE.read_text("utf-8")
    made = template_table.page_with(page, template_table.table(template_table.rows(TEMPLATES)))
    assert page == made, "python -m tests.chat.template_table"


@pytest.mark.parametrize(
    "template",
    [
        # No generation prompt: the header of a turn is the template's all the same.
        "{% for m in messages %}" + PIECE + "{% endfor %}",
        # A generation prompt whether asked for or not.
        "{% for m in messages %}" + PIECE + "{% endfor %}<|im_start|>assistant\n",
        # A date that the template writes before the chat.
        "{{ strftime_now('%d %B %Y') }}\n" + CHATML,
        # A default system prompt.
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML,
        # A last turn that ends with another token, and one that does not end.
        CHATML.replace("'<|im_end|>\\n'", "('<|im_end|>\\n' if not loop.last else '<|return|>')"),
        CHATML.replace("'<|im_end|>\\n'", "('<|im_end|>\\n' if not loop.last else '')"),
        # A think block in the last turn alone, in each, and in the prompt.
        CHATML.replace("+ m['content']", "+ ('<think>\\n\\n</think>\\n\\n' if loop.last else '') + m['content']"),
        CHATML.replace("+ m['content']", "+ ('[THINK][/THINK]' if m['role'] == 'assistant' else '') + m['content']"),
        CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}"),
    ],
)
def test_a_template_of_any_make_is_placed(template):
    tokenizer = tokenizer_for(template)
    first, last = learnt(tokenizer, mask_answers(tokenizer, TWO))
    assert first.rstrip() == f"{ANSWERS[0]}<|im_end|>"
    assert re.fullmatch(re.escape(ANSWERS[1]) + r"(<\|im_end\|>|<\|return\|>)?\n?", last)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # Where a turn stands depends on its words.
        (CHATML.replace("in messages", "in messages | sort(attribute='content')"), "turn 1"),
        ("{{ messages | length }}" + CHATML.replace("m['content']", "m['content'] * 2"), "turn 1"),
        (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n<|im_end|>{% endfor %}",
            "does not write the words of turn 1",
        ),
        (CHATML + "{{ raise_exception('Not on Mondays') }}", "does not take this chat: Not on Mondays"),
    ],
)
def test_a_template_that_neither_way_can_place_is_refused_by_what_does_not_fit(template, message):
    with pytest.raises(UnmarkableChat, match=message):
        mask_answers(tokenizer_for(template), TWO)


def test_a_date_that_changes_between_two_renderings_is_rendered_again(monkeypatch):
    tokenizer = tokenizer_for("{{ strftime_now('%S') }}" + CHATML)
    apply, seconds = PreTrainedTokenizerFast.apply_chat_template, iter([*"112", *"3" * 99])

    def at_another_second(self, messages, **options):
        return apply(self, messages, **options, chat_template=next(seconds) + CHATML)

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", at_another_second)
    masked = mask_answers(tokenizer, TWO)
    assert tokenizer.decode(masked.input_ids).startswith("3<|im_start|>")
    assert learnt(tokenizer, masked) == [f"{ANSWERS[0]}<|im_end|>\n", f"{ANSWERS[1]}<|im_end|>\n"]


def test_answers_of_a_prompt_are_left_out():
    tokenizer = tokenizer_for(CHATML)
    assert learnt(tokenizer, mask_answers(tokenizer, TWO, first=3)) == [f"{ANSWERS[1]}<|im_end|>\n"]
    marked = tokenizer_for(CHAT_TEMPLATE)
    assert learnt(marked, mask_answers(marked, TWO, first=3)) == [f"{ANSWERS[1]}</s>"]


def test_what_is_left_out_by_the_template_is_told():
    tokenizer = tokenizer_for(TEMPLATES["smollm2"].read_text("utf-8"))
    assert mask_answers(tokenizer, TWO).rewritten == ()
    assert mask_answers(tokenizer, chats()["reasoning"][0]).rewritten == (1, 3)
    shouting = tokenizer_for(CHATML.replace("m['content']", "m['content'].upper()"))
    masked = mask_answers(shouting, TWO)
    assert masked.rewritten == (1, 3) and learnt(shouting, masked)[0] == f"{ANSWERS[0].upper()}<|im_end|>\n"
    assert (
        masked.ends
        and not mask_answers(tokenizer_for("{% for m in messages %}{{ m['content'] }} {% endfor %}"), TWO).ends
    )


@pytest.mark.parametrize("offsets", ["trimmed", "none"])
def test_tokens_are_found_whatever_offsets_a_tokenizer_gives(offsets):
    """Offsets without the space before a word, as Llama-3's; and a tokenizer that has none."""
    tokenizer = tokenizer_for(CHATML)
    text = f"{CHATML} abc \u00fc \U0001f642"
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if offsets == "trimmed":
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    marks = tokenizer.all_special_tokens
    other = type("Other", (PreTrainedTokenizerFast,), {"is_fast": offsets == "trimmed"})(
        tokenizer_object=backend, additional_special_tokens=marks, chat_template=CHATML
    )
    chat = [user("a  "), assistant("  \u00fc\U0001f642 b  "), user(text), assistant("\U0001f642")]
    found = [mask_answers(one, chat) for one in (tokenizer, other)]
    assert found[0].input_ids == found[1].input_ids and found[0].mask == found[1].mask
    assert learnt(other, found[1]) == ["  \u00fc\U0001f642 b  <|im_end|>\n", "\U0001f642<|im_end|>\n"]


@pytest.mark.parametrize(("edge", "expected"), [(" ", [" answer", "</s>"]), (":", ["</s>"])])
def test_a_token_over_the_edge_counts_where_only_white_space_sticks_out(edge, expected):
    words = ["<unk>", "ask", " answer", ":answer", "</s>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(words[1:])), "isolated")
    template = "{% for m in messages %}{{ m['content'] + ('EDGE' if m['role'] == 'user' else '</s>') }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", chat_template=template.replace("EDGE", edge)
    )
    masked = mask_answers(tokenizer, [user("ask"), assistant("answer")])
    kept = [token for token, is_learnt in zip(masked.input_ids, masked.mask, strict=True) if is_learnt]
    assert tokenizer.convert_ids_to_tokens(kept) == expected
