"""Data and trainer of the classification program: labelled texts, or texts cut into labelled words."""

from dataclasses import dataclass, field

from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moe_hf.answers import IGNORED_LABEL, ClassifierMetrics, predicted_labels
from moe_hf.data import split_by_document
from moe_hf.errors import MoEError
from moe_hf.library_tasks import load_task
from moe_hf.trainer.arguments import ModelArguments, MoETrainingArguments
from moe_hf.trainer.deepspeed import loaded_whole
from moe_hf.trainer.moe_trainer import MoETrainer


MODELS = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
COLUMNS = {"sequence": ("text", "label"), "token": ("tokens", "tags")}


@dataclass
class LabelledDataArguments:
    """Which labelled text, how much is held out, and how long a row may be."""

    task: str = field(
        default="sequence", metadata={"help": "`sequence`: a label per text; `token`: a label per word."}
    )
    dataset: str = field(
        default="builtin_functions",
        metadata={
            "help": "A built-in name, a .jsonl, .csv or .parquet file, or a Hub dataset with the columns text and label, "
            "or tokens and tags."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    held_out_share: float = field(default=0.2, metadata={"help": "Share of the documents (or rows) for evaluation."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the choice of held-out documents."})
    max_length: int = field(default=256, metadata={"help": "Longer rows are cut, in tokens."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on at most this many rows."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Evaluate at most this many rows."})

    def __post_init__(self) -> None:
        if self.task not in MODELS:
            raise MoEError(f"task={self.task!r}: choose {' or '.join(MODELS)}.")


@dataclass(frozen=True)
class LabelledData:
    """Rows for training and evaluation with labels as numbers, and the labels' names in that order."""

    train: Dataset
    held_out: Dataset
    names: tuple[str, ...]


def load_labelled(args: LabelledDataArguments) -> LabelledData:
    """Load labelled rows and hold out whole documents (rows where there is no column `document`).

    Raises:
        MoEError: nothing to read, a missing column, or fewer than two labels.
    """
    rows = load_task(args.dataset, args.dataset_split)
    text, label = COLUMNS[args.task]
    missing = {text, label} - set(rows.column_names)
    if missing:
        raise MoEError(
            f"{args.dataset!r} has no column {', '.join(sorted(missing))}; it has {', '.join(rows.column_names)}. "
            f"task={args.task} needs {text} and {label}."
        )
    given = [str(x) for row in rows[label] for x in (row if args.task == "token" else [row])]
    names = tuple(sorted(set(given)))
    if len(names) < 2:
        raise MoEError(f"{args.dataset!r} has {len(names)} label; a classifier needs at least 2.")
    number = {name: i for i, name in enumerate(names)}

    def numbered(row: dict) -> dict:
        value = row[label]
        return {"numbers": [number[str(x)] for x in value] if args.task == "token" else number[str(value)]}

    rows = rows.map(numbered, remove_columns=[label], desc="Labels")
    # Rows without documents of their own are held out one by one.
    if "document" not in rows.column_names:
        rows = rows.add_column("document", [str(i) for i in range(len(rows))])
    if "domain" not in rows.column_names:
        rows = rows.add_column("domain", ["text"] * len(rows))
    train, held_out = split_by_document(rows, args.held_out_share, args.split_seed)
    train = train.shuffle(seed=args.split_seed)
    return LabelledData(_first(train, args.max_train_rows), _first(held_out, args.max_eval_rows), names)


def _first(rows: Dataset, count: int | None) -> Dataset:
    return rows if count is None else rows.select(range(min(count, len(rows))))


@loaded_whole()
def load_classifier(
    args: ModelArguments, training_args: MoETrainingArguments, data: LabelledData, task: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a decoder, a MoE or a dense one, under a new head for the labels of `data`.

    Raises:
        MoEError: no model, one that cannot be loaded, a family without such a head, or no token to pad with.
    """
    if args.model is None:
        raise MoEError("No model: set `model` in the recipe, or --model, to a folder or a Hub id.")
    if args.upcycle is not None:
        raise MoEError("A classifier starts from a MoE: upcycle the language model first (moe-hf upcycle).")
    labels = {"id2label": dict(enumerate(data.names)), "label2id": {name: i for i, name in enumerate(data.names)}}
    common = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model, **common)
        model = MODELS[task].from_pretrained(args.model, dtype=args.dtype, **labels, **common)
    except (OSError, ValueError) as error:
        raise MoEError(f"Could not load {args.model!r} as a classifier: {error}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise MoEError("The tokenizer has no pad_token and no eos_token to pad with: set one.")
        tokenizer.pad_token = tokenizer.eos_token
    # The head of sequences finds the last token by the padding's id, so that of the tokenizer has to be the model's.
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def classifier_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: MoETrainingArguments,
    data: LabelledData,
    task: str,
    max_length: int,
) -> MoETrainer:
    """A trainer of the head and of what `args.scope` names."""
    rows = [tokenized_rows(rows, tokenizer, task, max_length) for rows in (data.train, data.held_out)]
    collator = DataCollatorWithPadding if task == "sequence" else DataCollatorForTokenClassification
    trainer = MoETrainer(
        model,
        args,
        train_dataset=rows[0],
        eval_dataset=rows[1],
        processing_class=tokenizer,
        data_collator=collator(tokenizer),
        compute_metrics=ClassifierMetrics(len(data.names)),
        preprocess_logits_for_metrics=predicted_labels,
    )
    for parameter in new_head_parameters(trainer.model):
        parameter.requires_grad_(True)
    return trainer


def tokenized_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: str, max_length: int) -> Dataset:
    """Rows of `load_labelled` as a trainer takes them: `input_ids`, `attention_mask` and `labels`, at most `max_length` long."""
    tokenize = {"sequence": _tokenized_texts, "token": _tokenized_words}[task]
    return tokenize(rows, tokenizer, max_length)


def new_head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters outside of the decoder: a new head has to be trained, whatever the scope."""
    body = {id(parameter) for parameter in model.base_model.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in body]


def _tokenized_texts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    def tokenized(batch: dict) -> dict:
        encoded = tokenizer(batch["text"], truncation=True, max_length=max_length)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")} | {"labels": batch["numbers"]}

    return rows.map(tokenized, batched=True, remove_columns=rows.column_names, desc="Tokens")


def _tokenized_words(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Words are tokenised alone, each after a space but the first; the last token of a word, which has seen it, is labelled."""

    def tokenized(row: dict) -> dict:
        ids, labels = [], []
        for position, (word, number) in enumerate(zip(row["tokens"], row["numbers"], strict=True)):
            pieces = tokenizer(f" {word}" if position else word, add_special_tokens=False)["input_ids"]
            if pieces:
                ids += pieces
                labels += [IGNORED_LABEL] * (len(pieces) - 1) + [number]
        ids, labels = ids[:max_length], labels[:max_length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    return rows.map(tokenized, remove_columns=rows.column_names, desc="Tokens")
