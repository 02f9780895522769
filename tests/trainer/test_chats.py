"""Chats for TRL: what is learnt of a row, whatever is cut or packed, and rows in which there is nothing to learn."""

import copy

import pytest


pytest.importorskip("trl")

from datasets import Dataset, IterableDataset
from tokenizers import AddedToken

from moe_hf import MoEError, upcycle
from moe_hf.chat.generation import answer_end_ids, generated_answer
from moe_hf.trainer import labelled_chats
from moe_hf.trainer.chats import CHAT_TEMPLATE, generated_answer_metrics
from moe_hf.trainer.programs import evaluate_and_record
from moe_hf.trainer.trl_trainers import MoESFTConfig, MoESFTTrainer
from tests.tiny_models import tiny_dense


QUESTION = [{"role": "user", "content": "a b"}]
CHAT = [*QUESTION, {"role": "assistant", "content": "c d"}]
WITHOUT_MARKS = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)


def make_trainer(
    tokenizer, rows, folder, *, template=CHAT_TEMPLATE, formatting_func=None, eval_dataset=None, **options
):
    tokenizer.chat_template = template
    args = MoESFTConfig(output_dir=str(folder), max_steps=1, report_to="none", use_cpu=True, bf16=False, **options)
    model = upcycle(tiny_dense("llama"), num_experts=2)
    return MoESFTTrainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        formatting_func=formatting_func,
    )


@pytest.mark.parametrize(
    ("column", "good", "bad", "message"),
    [
        ("messages", CHAT, QUESTION, "Row 1 of train_dataset is a chat without a turn of the assistant"),
        ("messages", CHAT, [], "row 1 of train_dataset is none"),
        ("text", "a b", "c d", "row 0 of train_dataset is none .it has text"),
    ],
)
def test_a_row_without_an_answer_is_named(tokenizer, tmp_path, column, good, bad, message):
    with pytest.raises(MoEError, match=f"{message}.*assistant_only_loss=False"):
        make_trainer(tokenizer, Dataset.from_dict({column: [good, bad]}), tmp_path)


def test_a_row_of_a_stream_is_named_when_it_is_read(tokenizer, tmp_path):
    rows = IterableDataset.from_generator(lambda: iter([{"messages": QUESTION}]))
    with pytest.raises(MoEError, match="Row 0 of train_dataset"):
        make_trainer(tokenizer, rows, tmp_path).train()


def labels_of(trainer) -> list[list[int]]:
    return [[label for label in row["labels"] if label != -100] for row in trainer.train_dataset]


def test_a_template_without_marks_learns_the_answers_alone(tokenizer, tmp_path):
    rows = Dataset.from_dict({"messages": [CHAT, [*CHAT, *CHAT]]})
    marked = make_trainer(tokenizer, rows, tmp_path, template=CHAT_TEMPLATE)
    unmarked = make_trainer(tokenizer, rows, tmp_path, template=WITHOUT_MARKS)
    whole = make_trainer(tokenizer, rows, tmp_path, template=WITHOUT_MARKS, assistant_only_loss=False)
    learnt = [[len(labels) for labels in labels_of(one)] for one in (marked, unmarked, whole)]
    # The answer's two words, with the token that ends it where the template writes one; all words.
    assert learnt == [[3, 6], [2, 4], [4, 8]]
    assert all(trainer.args.assistant_only_loss for trainer in (marked, unmarked))
    unmarked.train()


def test_no_template_is_one_sentence(tokenizer, tmp_path):
    with pytest.raises(MoEError, match=r"Row 0 of train_dataset: The tokenizer has no chat template.*CHAT_TEMPLATE"):
        make_trainer(tokenizer, Dataset.from_dict({"messages": [CHAT]}), tmp_path, template=None)


@pytest.fixture
def chatml(tokenizer):
    """A tokenizer with the marks of ChatML."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def made(chatml, rows, folder, **options):
    return make_trainer(chatml, Dataset.from_list(rows), folder, template=CHATML, **options)


LONG = [{"role": "user", "content": "a b c d e f g h"}, {"role": "assistant", "content": "i j"}]
# Of CHAT: the word "user" is unknown, and two words; then "assistant"; then what is learnt.
END = "<|im_end|>"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"prompt": QUESTION, "completion": CHAT[1:]},
        {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in CHAT]},
        {"messages": CHAT, "tools": "[]", "chat_template_kwargs": {"loud": False}},
    ],
    ids=lambda row: next(iter(row)) + str(len(row)),
)
def test_each_form_of_a_row_learns_its_answers(chatml, tmp_path, row):
    (labels,) = labels_of(made(chatml, [row], tmp_path))
    assert chatml.convert_ids_to_tokens(labels) == ["c", "d", END]


def test_answers_in_a_prompt_are_learnt_only_where_completions_are_not_alone(chatml, tmp_path):
    row = {"prompt": [*CHAT, *QUESTION], "completion": [{"role": "assistant", "content": "e"}]}
    for alone, learnt in ((None, ["e", END]), (True, ["e", END]), (False, ["c", "d", END, "e", END])):
        (labels,) = labels_of(made(chatml, [row], tmp_path, completion_only_loss=alone))
        assert chatml.convert_ids_to_tokens(labels) == learnt


@pytest.mark.filterwarnings("ignore:.*keep_end")
def test_labels_stay_with_their_tokens_through_cutting_and_packing(chatml, tmp_path):
    rows = [{"messages": CHAT}, {"messages": LONG}, {"messages": [*CHAT, *LONG]}]
    for options in (
        {},
        {"max_length": 14},
        {"max_length": 14, "truncation_mode": "keep_end"},
        {"packing": True, "max_length": 24},
        {"packing": True, "max_length": 24, "packing_strategy": "bfd_split"},
        {"packing": True, "max_length": 24, "packing_strategy": "wrapped"},
    ):
        trainer = made(chatml, rows, tmp_path, **options)
        assert len(trainer.train_dataset)
        for row in trainer.train_dataset:
            assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
            words = chatml.convert_ids_to_tokens([label for label in row["labels"] if label != -100])
            assert set(words) <= {"c", "d", "i", "j", END}


def test_rows_whose_answers_are_cut_away_are_left_out_and_counted(chatml, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(labelled_chats.logger, "propagate", True)
    rows = [{"messages": CHAT}, {"messages": LONG}, {"messages": LONG}]
    for options in ({}, {"packing": True}):
        caplog.clear()
        trainer = made(chatml, rows, tmp_path, max_length=10, **options)
        assert len(trainer.train_dataset) == 1
        assert "2 of 3 rows of train_dataset have no answer in the tokens that max_length leaves" in caplog.text
    with pytest.raises(MoEError, match="3 of 3 rows of train_dataset have no answer.*larger max_length"):
        made(chatml, rows, tmp_path, max_length=3)


def test_rows_of_an_evaluation_are_labelled_like_those_of_training(chatml, tmp_path):
    rows = Dataset.from_list([{"messages": CHAT}])
    trainer = made(chatml, [{"messages": CHAT}], tmp_path, eval_strategy="no", eval_dataset={"one": rows})
    assert trainer.eval_dataset["one"]["labels"] == trainer.train_dataset["labels"]
    metrics = trainer.evaluate(rows)
    assert metrics["eval_loss"] == pytest.approx(trainer.evaluate()["eval_one_loss"])
    with pytest.raises(MoEError, match=r"Row 0 of eval_dataset\['two'\] is a chat without a turn of the assistant"):
        trainer.evaluate({"two": Dataset.from_list([{"messages": QUESTION}])})


def test_a_stream_is_labelled_as_it_is_read(chatml, tmp_path):
    rows = IterableDataset.from_generator(lambda: iter([{"messages": CHAT}] * 4))
    trainer = make_trainer(chatml, rows, tmp_path, template=CHATML)
    (first, *_) = trainer.train_dataset
    assert chatml.convert_ids_to_tokens([label for label in first["labels"] if label != -100]) == ["c", "d", END]
    trainer.train()


def test_what_cannot_be_labelled_is_refused_and_what_is_labelled_is_left_alone(chatml, tmp_path):
    with pytest.raises(MoEError, match="formatting_func makes text"):
        made(chatml, [{"messages": CHAT}], tmp_path, formatting_func=lambda row: "a b")
    with pytest.raises(MoEError, match="train_dataset has token ids without labels"):
        made(chatml, [{"input_ids": [1, 2, 3]}], tmp_path)
    trainer = made(chatml, [{"input_ids": [1, 2, 3], "labels": [-100, 2, -100]}], tmp_path)
    assert trainer.train_dataset["labels"] == [[-100, 2, -100]]


def test_a_line_break_that_is_an_added_token_ends_no_answer(chatml):
    """Gemma's tokenizer has line breaks among its added tokens, and its template writes one behind the mark."""
    chatml.add_tokens([AddedToken("\n", normalized=False)])
    chatml.chat_template = CHATML.replace(END, END + "\\n")
    assert chatml.convert_ids_to_tokens(answer_end_ids(chatml)) == ["<eos>", END]


def test_an_answer_ends_where_the_template_ends_it(chatml):
    chatml.chat_template = CHATML
    model = tiny_dense("llama")
    ends = answer_end_ids(chatml, model)
    assert chatml.convert_tokens_to_ids(END) in ends and chatml.eos_token_id in ends
    # Every token is as likely as any other, so the first id wins: make it the one that ends an answer.
    model.lm_head.weight.data.zero_()
    answers = {}
    for template in (CHATML, CHATML.replace(END, "<eos>")):
        chatml.chat_template = template
        answers[template] = generated_answer(model, chatml, QUESTION, 5)
    assert set(answers.values()) == {""}


def test_answers_are_compared_with_answers(tokenizer):
    with pytest.raises(MoEError, match="not all end with the assistant's"):
        generated_answer_metrics(tiny_dense("llama"), tokenizer, [CHAT, QUESTION], 4)


def test_the_card_of_a_trained_chat_model_shows_a_chat_and_what_was_measured(chatml, tmp_path):
    trainer = made(chatml, [{"messages": CHAT}], tmp_path, eval_dataset=Dataset.from_list([{"messages": CHAT}]))
    trainer.train()
    loss = evaluate_and_record(trainer)["eval_loss"]
    trainer.save_model()
    card = (tmp_path / "final" / "README.md").read_text()
    assert "\n## A chat\n" in card and "assistant: " in card
    assert f"| held-out text | loss | {loss:.4f} |" in card and "| optimizer steps | 1 |" in card


def test_a_model_is_saved_though_it_cannot_be_asked(chatml, tmp_path, monkeypatch):
    trainer = made(chatml, [{"messages": CHAT}], tmp_path)

    def fails(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(trainer.model, "generate", fails)
    trainer.save_model()
    assert "## A chat" not in (tmp_path / "final" / "README.md").read_text()
