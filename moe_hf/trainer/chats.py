"""Data of chats and preferences: rows, a template for tokenizers that have none, and answers that a model generates."""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_hf.answers import answer_metrics
from moe_hf.chat.generation import generated_answer
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


def generated_answer_metrics(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[list[dict]], max_new_tokens: int
) -> dict[str, float]:
    """Exact match and F1 of greedy answers to chats, without their last message, which is the right answer.

    Args:
        chats: each a list of messages; the last one is the assistant's.
        max_new_tokens (`int`): longest answer, in tokens.

    Raises:
        MoEError: a chat ends with another turn, or the chat template does not take it.
    """
    if any(not chat or chat[-1]["role"] != "assistant" for chat in chats):
        raise MoEError(
            "Answers are compared with a chat's last turn, and not all end with the assistant's: leave those out."
        )
    predictions = [generated_answer(model, tokenizer, chat[:-1], max_new_tokens) for chat in chats]
    return answer_metrics(predictions, [chat[-1]["content"] for chat in chats])
