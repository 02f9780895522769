"""Data of chats and preferences: rows, a template for tokenizers that have none, and answers that a model generates."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_hf.answers import answer_metrics
from moe_hf.data import split_by_document
from moe_hf.errors import MoEError
from moe_hf.library_tasks import load_task
from moe_hf.trainer.arguments import ModelArguments, MoETrainingArguments
from moe_hf.trainer.programs import load_checkpoint


# For base models: no token is added, and what is in `generation` (the answer and the token that ends it) is learnt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '### Answer\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '### Request\\n' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Answer\\n' }}{% endif %}"
)


@dataclass
class ChatDataArguments:
    """Which chats, how much is held out, and how many answers are generated to be measured."""

    dataset: str = field(
        default="builtin_instructions",
        metadata={
            "help": "A built-in name, a .jsonl file or a Hub dataset with a column messages, or prompt, chosen and rejected."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    held_out_share: float = field(default=0.1, metadata={"help": "Share of the documents (or rows) for evaluation."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the choice of held-out documents."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on at most this many rows."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Evaluate at most this many rows."})
    generated_answers: int = field(
        default=0, metadata={"help": "Generate answers to this many held-out requests: exact match and F1."}
    )
    max_new_tokens: int = field(default=32, metadata={"help": "Longest generated answer."})


def load_chats(args: ChatDataArguments, columns: tuple[str, ...]) -> tuple[Dataset, Dataset]:
    """Rows for training and evaluation; whole documents are held out, or rows where there is no column `document`.

    Args:
        columns: what every row must have; `domain` and `document`, by which rows can be held out, stay beside them.

    Raises:
        MoEError: nothing to read, or a missing column.
    """
    rows = load_task(args.dataset, args.dataset_split)
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise MoEError(f"{args.dataset!r} has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}.")
    if "document" not in rows.column_names:
        rows = rows.add_column("document", [str(i) for i in range(len(rows))])
    rows = rows.remove_columns("domain") if "domain" in rows.column_names else rows
    rows = rows.add_column("domain", ["chats"] * len(rows))
    train, held_out = split_by_document(rows, args.held_out_share, args.split_seed)
    parts = (
        (train.shuffle(seed=args.split_seed), args.max_train_rows),
        (
            held_out.shuffle(seed=args.split_seed),
            args.max_eval_rows,
        ),
    )
    return tuple(
        part.select_columns([*columns, "domain", "document"]).select(range(min(len(part), limit or len(part))))
        for part, limit in parts
    )


def load_chat_model(
    args: ModelArguments, training_args: MoETrainingArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_checkpoint`; a tokenizer without a chat template gets `CHAT_TEMPLATE`.

    Raises:
        MoEError: no token that ends an answer.
    """
    model, tokenizer = load_checkpoint(args, training_args)
    if tokenizer.eos_token is None:
        raise MoEError("The tokenizer has no eos_token, which ends an answer: set one.")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template says which part of a chat is the assistant's answer."""
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return template is not None and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def with_answers(dataset: Any, name: str) -> Any:
    """`dataset` of chats, of which each has an answer to learn; of one that is read as it goes, rows are looked at then.

    Args:
        dataset (`Dataset`, `IterableDataset`, a `dict` of them, or `None`): rows with `messages`, or `prompt` and
            `completion`.
        name (`str`): of the argument, for the errors.

    Raises:
        MoEError: the rows are no chats, or one has no turn of the assistant.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {part: with_answers(rows, f"{name}[{part!r}]") for part, rows in dataset.items()}

    def checked(row: dict, index: int) -> dict:
        turns = row["messages"] if "messages" in row else [row.get("completion")]
        turns = turns[0] if turns and isinstance(turns[0], list) else turns
        if not all(isinstance(turn, dict) and "role" in turn for turn in turns or [None]):
            raise MoEError(
                f"assistant_only_loss=True learns the answers of chats, and row {index} of {name} is none (it has "
                f"{', '.join(row)}): give rows with messages, or set assistant_only_loss=False."
            )
        if not any(turn["role"] == "assistant" for turn in turns):
            raise MoEError(
                f"Row {index} of {name} is a chat without a turn of the assistant, so that there is nothing to learn in it: "
                "leave such rows out, or set assistant_only_loss=False, which learns the requests too."
            )
        return row

    if not isinstance(dataset, Dataset):
        return dataset.map(checked, with_indices=True)
    for index, row in enumerate(dataset):
        checked(row, index)
    return dataset


@torch.no_grad()
def generated_answer_metrics(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[list[dict]], max_new_tokens: int
) -> dict[str, float]:
    """Exact match and F1 of greedy answers to chats, without their last message, which is the right answer.

    Args:
        chats: each a list of messages; the last one is the assistant's.
        max_new_tokens (`int`): longest answer, in tokens.

    Raises:
        MoEError: a chat ends with another turn.
    """
    if any(not chat or chat[-1]["role"] != "assistant" for chat in chats):
        raise MoEError(
            "Answers are compared with a chat's last turn, and not all end with the assistant's: leave those out."
        )
    predictions = []
    training = model.training
    model.eval()
    try:
        for chat in chats:
            prompt = tokenizer.apply_chat_template(
                chat[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(model.device)
            output = model.generate(
                **prompt,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            answer = output[0, prompt["input_ids"].shape[1] :]
            predictions.append(tokenizer.decode(answer, skip_special_tokens=True))
    finally:
        model.train(training)
    return answer_metrics(predictions, [chat[-1]["content"] for chat in chats])
