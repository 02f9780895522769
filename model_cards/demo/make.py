"""Make the card of a small model from a run: a dense model, its upcycling, training, evaluation, report, card.

python model_cards/demo/make.py OUT              everything into the new folder OUT
python model_cards/demo/make.py OUT --publish    and the card with its picture beside this file

Two minutes of one CPU core. The text is CPython's own.
"""

import argparse
import shutil
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

import moe_hf
from moe_hf.data import builtin_corpus, split_by_document, tokenize_and_pack, train_tokenizer
from moe_hf.hub import save_model
from moe_hf.metrics import LanguageModelMetrics, token_statistics
from moe_hf.reporting.card_facts import this_hardware, training_facts
from moe_hf.reporting.report import write_report


HERE = Path(__file__).resolve().parent
BLOCK, BATCH, VOCABULARY, EVALUATED = 128, 4, 1024, 96


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--publish", action="store_true")
    parser.add_argument("--steps", type=int, default=600, help="of each of the two trainings")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    set_seed(0)
    training, held_out = split_by_document(builtin_corpus(), 0.1, 0)
    tokenizer = train_tokenizer(training.shuffle(seed=0).select(range(150)), VOCABULARY)
    rows = tokenize_and_pack(training.shuffle(seed=0), tokenizer, BLOCK).select(range(2 * BATCH * arguments.steps))
    texts = {}
    for domain in sorted(set(held_out["domain"])):
        own = held_out.select([place for place, name in enumerate(held_out["domain"]) if name == domain])
        blocks = tokenize_and_pack(own.shuffle(seed=0), tokenizer, BLOCK)
        texts[domain] = blocks.select(range(min(EVALUATED, len(blocks))))
    half = BATCH * arguments.steps
    first, second = rows.select(range(half)), rows.select(range(half, 2 * half))
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.05, **sizes
        )
    )
    train(dense, first, arguments.output / "dense-run", scope="all")
    moe = moe_hf.upcycle(dense, num_experts=8, num_experts_per_tok=2)
    trainer = train(moe, second, arguments.output / "moe-run", scope="moe")
    statistics = moe_hf.routing_statistics(moe, as_batches(texts), tokenizer=tokenizer, origin=dense)
    (arguments.output / "report").mkdir()
    write_report(statistics, arguments.output / "report", title="tiny-code-moe")
    facts = {
        "title": "tiny-code-moe",
        "license": "apache-2.0",
        "language": "en",
        "training": training_facts(vars(trainer.state), this_hardware()),
        "results": results(measure(moe, texts), measure(dense, texts)),
        "routing_report": arguments.output / "report",
        "commands": ["python model_cards/demo/make.py OUT"],
        "limits": [
            "A demonstration: a few million parameters trained for minutes on the source and the manual of CPython. It "
            "writes no useful text.",
            "The dense parent got half of the tokens; the difference between the two is that of more training and of more "
            "parameters together.",
        ],
    }
    saved = save_model(moe, tokenizer, arguments.output / "model", card_facts=facts)
    if arguments.publish:
        for name in ("README.md", "routing.png"):
            shutil.copy(saved / name, HERE / name)


def train(model: PreTrainedModel, rows: Dataset, folder: Path, scope: str) -> moe_hf.MoETrainer:
    """One pass over the rows."""
    arguments = moe_hf.MoETrainingArguments(
        output_dir=str(folder),
        scope=scope,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3 if scope == "all" else 1e-3,
        warmup_steps=30,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        include_num_input_tokens_seen="all",
        disable_tqdm=True,
        seed=0,
    )
    trainer = moe_hf.MoETrainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return trainer


def as_batches(texts: dict[str, Dataset]) -> dict[str, list[dict[str, torch.Tensor]]]:
    """By domain, batches of 16 rows."""
    return {
        domain: [{name: rows[i : i + 16][name] for name in rows.column_names} for i in range(0, len(rows), 16)]
        for domain, rows in texts.items()
    }


@torch.no_grad()
def measure(model: PreTrainedModel, texts: dict[str, Dataset]) -> dict[str, dict[str, float]]:
    """Token loss and accuracy on held-out text of each domain."""
    found = {}
    for domain, batches in as_batches(texts).items():
        metrics = LanguageModelMetrics()
        for batch in batches:
            labels = batch.pop("labels")
            statistics = token_statistics(model.eval()(**batch).logits, labels)
            for metric in metrics.metrics:
                metric.add_batch(predictions=statistics, references=labels)
        found[domain] = {name: value for metric in metrics.metrics for name, value in metric.compute().items()}
    return found


def results(of_moe: dict, of_dense: dict) -> list[dict]:
    """Rows of the card, the dense parent's beside them."""
    names = {"token_loss": "nats/token", "accuracy": "next token accuracy"}
    return [
        {
            "dataset": f"CPython {domain}, held-out documents",
            "split": domain,
            "metric": shown,
            "value": round(of_moe[domain][name], 4),
            "parent": round(of_dense[domain][name], 4),
        }
        for domain in of_moe
        for name, shown in names.items()
    ]


if __name__ == "__main__":
    main()
