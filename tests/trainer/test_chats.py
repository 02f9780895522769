"""Chats in which there is nothing to learn, and templates that do not say what is: one clear error, before any training."""

import pytest


pytest.importorskip("trl")

from datasets import Dataset, IterableDataset

from moe_hf import MoEError, upcycle
from moe_hf.trainer.chats import CHAT_TEMPLATE, generated_answer_metrics
from moe_hf.trainer.trl_trainers import MoESFTConfig, MoESFTTrainer
from tests.tiny_models import tiny_dense


QUESTION = [{"role": "user", "content": "a b"}]
CHAT = [*QUESTION, {"role": "assistant", "content": "c d"}]
WITHOUT_MARKS = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def make_trainer(tokenizer, rows, folder, *, template=CHAT_TEMPLATE, **options):
    tokenizer.chat_template = template
    args = MoESFTConfig(output_dir=str(folder), max_steps=1, report_to="none", use_cpu=True, bf16=False, **options)
    model = upcycle(tiny_dense("llama"), num_experts=2)
    return MoESFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)


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


def test_a_template_that_marks_no_answer_is_refused_and_each_way_out_works(tokenizer, tmp_path):
    rows = Dataset.from_dict({"messages": [CHAT, CHAT]})
    for template in (WITHOUT_MARKS, None):
        with pytest.raises(MoEError, match="generation.*CHAT_TEMPLATE, or assistant_only_loss=False"):
            make_trainer(tokenizer, rows, tmp_path, template=template)
    marked = make_trainer(tokenizer, rows, tmp_path, template=CHAT_TEMPLATE)
    whole = make_trainer(tokenizer, rows, tmp_path, template=WITHOUT_MARKS, assistant_only_loss=False)
    learnt = [[sum(label != -100 for label in row["labels"]) for row in one.train_dataset] for one in (marked, whole)]
    # The answer's two words and the token that ends it; all four words.
    assert learnt == [[3, 3], [4, 4]]


def test_answers_are_compared_with_answers(tokenizer):
    with pytest.raises(MoEError, match="not all end with the assistant's"):
        generated_answer_metrics(tiny_dense("llama"), tokenizer, [CHAT, QUESTION], 4)
