"""What the training programs share: data from their arguments, and errors without a traceback."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from moe_hf.augmentation import augment
from moe_hf.data import (
    check_packing,
    load_text,
    split_by_document,
    tokenize_and_pack,
    train_tokenizer,
)
from moe_hf.dtypes import dtype_name
from moe_hf.errors import MoEError
from moe_hf.library_tasks import LIBRARY_TASKS, library_task
from moe_hf.metrics import LanguageModelMetrics, token_statistics
from moe_hf.modeling.config_fields import refuse_strays
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.routing_ids import ID_ARGUMENTS
from moe_hf.trainer.arguments import (
    ConfigArguments,
    DataArguments,
    FinetuneArguments,
    ModelArguments,
    MoEArgumentParser,
    MoETrainingArguments,
)
from moe_hf.trainer.checkpoints import agree, choose_checkpoint, resume_choice
from moe_hf.trainer.comparison import ComparisonArguments, train_beside_control
from moe_hf.trainer.comparison.arms import control_arm
from moe_hf.trainer.comparison.halves import validation_and_test
from moe_hf.trainer.comparison.record import check_folder
from moe_hf.trainer.deepspeed import loaded_whole
from moe_hf.trainer.layouts import check_config, check_launch, describe_layout
from moe_hf.trainer.moe_trainer import FINAL_FOLDER, MoETrainer
from moe_hf.upcycling import upcycle


DTYPES = ("auto", "float32", "bfloat16")

logger = logging.get_logger(__name__)


def run_program(main: Callable[[], None]) -> None:
    """Run `main`; a `MoEError` becomes one line on stderr and exit code 2.

    A launcher of several processes ends with a report of its own on the first that failed, which then has the sentence too.
    """
    try:
        main()
    except MoEError as error:
        print(f"Error: {error}", file=sys.stderr)
        _tell_launcher(f"Error: {error}")
        sys.exit(2)


def _tell_launcher(message: str) -> None:
    """torchrun, and accelerate with it, report on a failed process what stands in its error file, and no traceback if none does."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")


def load_documents(args: DataArguments) -> tuple[Dataset, Dataset]:
    """Return the `(train, held_out)` documents that `args` describe."""
    if args.dataset in LIBRARY_TASKS:
        documents = _text_of(library_task(args.dataset), args.dataset)
    else:
        documents = load_text(args.dataset, split=args.dataset_split, text_column=args.text_column)
    if args.domains:
        known = sorted(set(documents["domain"]))
        unknown = [name for name in args.domains if name not in known]
        if unknown:
            raise MoEError(f"No domain {unknown[0]!r} in {args.dataset!r}; it has {', '.join(known)}.")
        wanted = set(args.domains)
        documents = documents.select([i for i, name in enumerate(documents["domain"]) if name in wanted])
    if args.ids_from_domain is not None:
        documents = _with_domain_ids(documents, args.ids_from_domain)
    train, held_out = split_by_document(documents, args.held_out_share, args.split_seed)
    return augment(train, args.augment or (), args.split_seed), held_out


def evaluation_parts(
    held_out: Dataset, comparison: ComparisonArguments, args: MoETrainingArguments, seed: int
) -> tuple[Dataset, Dataset]:
    """The held-out rows that choices are made on, and those that results are reported on: the same where nothing is chosen.

    Raises:
        MoEError: a domain has too few documents for both.
    """
    return validation_and_test(held_out, seed) if comparison.chooses(args) else (held_out, held_out)


def _text_of(documents: Dataset, name: str) -> Dataset:
    if "text" not in documents.column_names:
        raise MoEError(
            f"{name!r} has no column of text, which this program trains on; see the recipes for its program."
        )
    return documents


def _with_domain_ids(documents: Dataset, name: str) -> Dataset:
    if name not in ID_ARGUMENTS:
        raise MoEError(f"ids_from_domain={name!r}: choose {', '.join(ID_ARGUMENTS)}.")
    domains = sorted(set(documents["domain"]))
    print(f"{name}: " + ", ".join(f"{i} {domain}" for i, domain in enumerate(domains)))
    if name in documents.column_names:
        documents = documents.remove_columns(name)
    return documents.add_column(name, [domains.index(domain) for domain in documents["domain"]])


def training_blocks(documents: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> Dataset:
    """Return packed blocks of documents in a seeded order, at most `max_train_tokens`."""
    blocks = tokenize_and_pack(documents.shuffle(seed=args.split_seed), tokenizer, args.block_size, packed=args.packed)
    return _at_most(blocks, args.max_train_tokens, args.block_size)


def evaluation_blocks(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments
) -> dict[str, Dataset]:
    """Return packed blocks per domain, at most `max_eval_tokens` each."""
    domains = documents["domain"]
    blocks = {}
    for domain in sorted(set(domains)):
        rows = documents.select([i for i, name in enumerate(domains) if name == domain])
        packed = tokenize_and_pack(rows, tokenizer, args.block_size, packed=args.packed)
        blocks[domain] = _at_most(packed, args.max_eval_tokens, args.block_size)
    empty = [domain for domain, rows in blocks.items() if len(rows) == 0]
    advice = f"less than a block of {args.block_size} tokens: raise held_out_share, or lower block_size"
    if len(empty) == len(blocks):
        raise MoEError(f"The text to evaluate on ({', '.join(empty)}) is {advice}.")
    if empty:
        logger.warning(f"Not evaluated: {', '.join(empty)}, of which there is {advice}.")
    return blocks


def _at_most(blocks: Dataset, max_tokens: int | None, block_size: int) -> Dataset:
    if max_tokens is None:
        return blocks
    if max_tokens < block_size:
        raise MoEError(f"At most {max_tokens} tokens are less than one block of {block_size}. Raise the limit.")
    return blocks.select(range(min(len(blocks), max_tokens // block_size)))


@loaded_whole()
def load_checkpoint(
    args: ModelArguments, training_args: MoETrainingArguments | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and the tokenizer that `args` name; with `args.upcycle` the model becomes a MoE.

    In a layout each process reads its part of the model. One that gets float32 masters is loaded in float32:
    `given_dtype` says what it is saved in. A model that becomes a MoE here is whole on each process first.
    """
    if args.model is None:
        raise MoEError("No model: set `model` in the recipe, or --model, to a folder or a Hub id.")
    dtype = dtype_name(args.dtype, DTYPES)
    if args.model.startswith((".", "/", "~")) and not Path(args.model).expanduser().exists():
        raise MoEError(f"No folder {args.model!r}. Give the folder of a checkpoint or a Hub id.")
    common = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    chosen = {"attn_implementation": args.attn_implementation, "experts_implementation": args.experts_implementation}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    layout = _layout_of_loading(args, training_args)
    if layout is not None:
        chosen["distributed_config"] = layout
        dtype = "float32" if training_args.scope is not None and training_args.fp32_masters else dtype
    try:
        if layout is not None:
            check_config(AutoConfig.from_pretrained(args.model, **common), layout)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, **common, **chosen)
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model, **common)
    except MoEError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise MoEError(f"Could not load {args.model!r}: {error}") from error
    vocab_size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocab_size:
        raise MoEError(
            f"The tokenizer has {len(tokenizer)} tokens, the model {vocab_size}. Give the model's own tokenizer."
        )
    if args.upcycle is not None:
        model = upcycle(model, **({"tokenizer": tokenizer} | args.upcycle))
    return model, tokenizer


def _layout_of_loading(args: ModelArguments, training_args: MoETrainingArguments | None) -> DistributedConfig | None:
    return None if training_args is None or args.upcycle else training_args.layout()


def given_dtype(args: ModelArguments, training_args: MoETrainingArguments) -> torch.dtype | None:
    """The dtype in which a checkpoint that is loaded in parts is saved again; None where the parameters tell."""
    if _layout_of_loading(args, training_args) is None:
        return None
    dtype = dtype_name(args.dtype, DTYPES)
    if dtype != "auto":
        return getattr(torch, dtype)
    common = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    return AutoConfig.from_pretrained(args.model, **common).dtype


@loaded_whole()
def build_model(args: ConfigArguments, documents: Dataset) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build a model with random weights, and load its tokenizer or train one on `documents`.

    The vocabulary and the special tokens of the config are the tokenizer's, unless `model_config` says otherwise.
    """
    if args.tokenizer is None:
        state = PartialState()
        # Every process gets the same object: two trainings need not order equal merges alike.
        tokenizer = agree(
            lambda: train_tokenizer(documents, args.tokenizer_vocab_size), state.is_main_process, state.num_processes
        )
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        except (OSError, ValueError) as error:
            raise MoEError(f"Could not load the tokenizer {args.tokenizer!r}: {error}") from error
    given = dict(args.model_config)
    model_type = given.pop("model_type")
    dense = dict(given.pop("text_config", {})) if model_type == MoEConfig.model_type else given
    dense = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **dense,
    }
    if dense["vocab_size"] < len(tokenizer):
        raise MoEError(f"vocab_size={dense['vocab_size']} is less than the tokenizer's {len(tokenizer)} tokens.")
    fields = given | {"text_config": dense} if model_type == MoEConfig.model_type else dense
    try:
        config = AutoConfig.for_model(model_type, **fields)
        if model_type != MoEConfig.model_type:
            refuse_strays(fields, config)
        model = AutoModelForCausalLM.from_config(config)
    except MoEError:
        raise
    except (TypeError, ValueError) as error:
        raise MoEError(f"model_config does not describe a causal language model: {error}") from error
    return model, tokenizer


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: MoETrainingArguments,
    data: DataArguments,
    documents: tuple[Dataset, Dataset],
    *,
    trainer_class: type[MoETrainer] = MoETrainer,
    only_evaluate: bool = False,
    given_dtype: torch.dtype | None = None,
    **kwargs,
) -> MoETrainer:
    """Pack `(train, held_out)` documents and build the trainer with its metrics; it gets the rest too."""
    if data.packed:
        check_packing(model)
    train, held_out = documents
    return trainer_class(
        model,
        args,
        train_dataset=None if only_evaluate else training_blocks(train, tokenizer, data),
        eval_dataset=evaluation_blocks(held_out, tokenizer, data),
        processing_class=tokenizer,
        given_dtype=given_dtype,
        compute_metrics=LanguageModelMetrics(),
        preprocess_logits_for_metrics=token_statistics,
        **kwargs,
    )


def finetune(
    description: str,
    arguments_class: type[FinetuneArguments],
    examiner_class: type,
    trainer_class: type[MoETrainer] = MoETrainer,
) -> None:
    """Run what the command line describes: load or upcycle a model, train it, and its control where one is asked for.

    Args:
        examiner_class (`type`): arguments whose `examined(make)` looks at a trainer before it trains, where they ask for it.
    """
    types = (ModelArguments, ComparisonArguments, DataArguments, examiner_class, arguments_class)
    parser = MoEArgumentParser(types, description=description)
    model_args, comparison, data_args, examiner, training_args = parser.parse()
    prepare_run(training_args, comparison, model_args)
    train, held_out = load_documents(data_args)
    validation, test = evaluation_parts(held_out, comparison, training_args, data_args.split_seed)

    def make(loaded_args, args):
        model, tokenizer = load_checkpoint(loaded_args, args)
        options = {"trainer_class": trainer_class, "given_dtype": given_dtype(loaded_args, args)}
        return make_trainer(model, tokenizer, args, data_args, (train, validation), **options)

    def measure(trainer):
        if test is validation:
            return trainer.evaluate()
        return trainer.evaluate(evaluation_blocks(test, trainer.processing_class, data_args))

    train_beside_control(model_args, comparison, training_args, examiner.examined(make), measure, data_args)


def trl_trainer(
    trainer_class: type[MoETrainer],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: MoETrainingArguments,
    train: Dataset,
    evaluation: tuple[Dataset, Dataset],
) -> tuple[MoETrainer, Dataset]:
    """A trainer of TRL that evaluates on the first of `evaluation`, and the second as that trainer's `evaluate` takes it.

    TRL prepares its rows when a trainer is made, and both parts are prepared then.
    """
    parts = dict(zip(("validation", "test"), evaluation, strict=True))
    trainer = trainer_class(model, args, train_dataset=train, eval_dataset=parts, processing_class=tokenizer)
    test, trainer.eval_dataset = trainer.eval_dataset["test"], trainer.eval_dataset["validation"]
    return trainer, test


def prepare_run(
    args: MoETrainingArguments,
    comparison: ComparisonArguments | None = None,
    model_args: ModelArguments | None = None,
) -> None:
    """Seed every generator, and refuse what cannot be before anything is loaded: a folder where training cannot start or go
    on, a launch, and, of a comparison, which gives its model too, the control.
    """
    final = Path(args.output_dir) / FINAL_FOLDER
    resume = resume_choice(args)
    if comparison is not None and comparison.control is not None:
        if isinstance(resume, str):
            raise MoEError(
                "A comparison finds its checkpoints by itself: leave resume_from_checkpoint out, or 'auto'."
            )
        check_folder(args.output_dir, final)
        control_arm(model_args, comparison, args)
    elif final.exists():
        raise MoEError(f"{str(final)!r} exists: a run was finished there. Choose another output_dir, or remove it.")
    elif not resume:
        choose_checkpoint(args.output_dir, None)
    set_seed(args.seed)
    check_launch(args.world_size)
    layout = args.layout()
    if args.process_index == 0:
        words = "" if layout is None else f", {describe_layout(layout, args.world_size)}"
        print(f"{args.world_size} process{'es' if args.world_size > 1 else ''} on {args.device.type}{words}")


def train_and_save(trainer: MoETrainer) -> dict[str, float]:
    """Train, evaluate on the held-out documents, save to `output_dir/final`, push if asked; returns the metrics."""
    trainer.train(resume_from_checkpoint=resume_choice(trainer.args))
    metrics = evaluate_and_record(trainer)
    trainer.save_state()
    trainer.save_model()
    return metrics


def evaluate_and_record(trainer: MoETrainer) -> dict[str, float]:
    """Evaluate on the held-out documents, print the metrics and write them to `output_dir/eval_results.json`."""
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics, combined=False)
    return metrics
