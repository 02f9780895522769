"""The steps of the demo that know nothing of stages: choose text, train, measure, reload."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TrainerCallback

from moe_hf.data import check_packing
from moe_hf.errors import MoEError
from moe_hf.metrics import LanguageModelMetrics, token_statistics
from moe_hf.reporting.card_facts import TRAINER_STATE
from moe_hf.saving import read_json_object
from moe_hf.trainer import MoETrainer, MoETrainingArguments


# What a MoE logs of its routers, and what that counts in the loss beside it.
ROUTER_LOSSES = {"load_balancing_loss": "router_aux_loss_coef", "router_z_loss": "router_z_loss_coef"}
# What a user does with a saved model, in a process of its own.
RELOAD_PROGRAM = """
import json, sys, torch
{imports}
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, probe, *prompts = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
saved, samples = torch.load(probe), []
with torch.no_grad():
    logits = model(input_ids=saved["input_ids"], use_cache=False).logits
for prompt in prompts:
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=20)
    samples.append(tokenizer.decode(output[0]))
difference = (logits - saved["logits"]).abs().max().item()
facts = {{"class": type(model).__name__, "max_abs_error": difference, "samples": samples}}
print(json.dumps(facts | {{"with_moe_hf": "moe_hf" in sys.modules}}))
"""


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters in total and outside the token embeddings."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": total, "non_embedding_parameters": total - model.get_input_embeddings().weight.numel()}


def batches(dataset: datasets.Dataset, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of a dataset in order, as batches of tensors."""
    for first in range(0, len(dataset), batch_size):
        yield dataset[first : first + batch_size]


@torch.no_grad()
def evaluate(model: PreTrainedModel, held_out: dict[str, datasets.Dataset], batch_size: int) -> dict[str, Any]:
    """Token loss, perplexity and accuracy per domain, and over the tokens of all domains (`all`)."""
    model.eval()
    totals, results = LanguageModelMetrics(), {}
    last_domain = list(held_out)[-1]
    for domain, rows in held_out.items():
        metrics = LanguageModelMetrics()
        for first, batch in enumerate(batches(rows, batch_size)):
            labels = batch.pop("labels")
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            statistics = token_statistics(model(**inputs, use_cache=False).logits, labels).cpu()
            is_last = (first + 1) * batch_size >= len(rows)
            prediction = transformers.EvalPrediction(predictions=statistics, label_ids=labels)
            if is_last:
                results[domain] = metrics(prediction, compute_result=True)
            else:
                metrics(prediction, compute_result=False)
            total = totals(prediction, compute_result=is_last and domain == last_domain)
    return results | {"all": total}


@torch.no_grad()
def batch_losses(model: PreTrainedModel, rows: datasets.Dataset, batch_size: int) -> list[float]:
    """The mean token loss of each batch of the rows, in nats/token."""
    model.eval()
    losses = []
    for batch in batches(rows, batch_size):
        losses.append(model(**{name: t.to(model.device) for name, t in batch.items()}, use_cache=False).loss.item())
    return losses


def train(
    model: PreTrainedModel,
    rows: datasets.Dataset,
    folder: Path,
    *,
    batch_size: int,
    learning_rate: float,
    warmup_share: float,
    weight_decay: float,
    seed: int,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> dict[str, Any]:
    """Train in place, one pass over `rows` in their order; warm-up, then cosine to a tenth of the learning rate."""
    steps = len(rows) // batch_size
    arguments = MoETrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=max(1, round(warmup_share * steps)),
        weight_decay=weight_decay,
        # The usual 0.999 remembers longer than so short a run lasts.
        adam_beta2=0.95,
        train_sampling_strategy="sequential",
        logging_steps=max(1, steps // 10),
        use_cache=False,
        include_num_input_tokens_seen="all",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    start = time.perf_counter()
    trainer = MoETrainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))
    output = trainer.train()
    # For the card: steps, tokens and time.
    trainer.save_state()
    # It and the model hold each other, and with them the optimizer's numbers.
    del trainer
    gc.collect()
    return {
        "tokens": steps * batch_size * len(rows[0]["input_ids"]),
        "steps": steps,
        "training_seconds": time.perf_counter() - start,
        "mean_training_loss": output.training_loss,
    }


def loss_curve(trainer: Path, config: PreTrainedConfig) -> list[tuple[int, float]]:
    """Steps and the mean loss of the text of the steps since the log before, just before each was trained on, in nats/token.

    What the losses of the routers added to it is taken away again: a dense model has none.
    """
    weights = {name: getattr(config, field, None) or 0.0 for name, field in ROUTER_LOSSES.items()}
    history = [row for row in read_json_object(trainer / TRAINER_STATE)["log_history"] if "loss" in row]
    return [
        (row["step"], row["loss"] - sum(weight * row.get(name, 0.0) for name, weight in weights.items()))
        for row in history
    ]


def limit_code(dataset: datasets.Dataset, characters: int) -> datasets.Dataset:
    """Shuffle documents, and keep code up to a number of characters and all of the prose, which is scarce."""
    dataset = dataset.shuffle(seed=0)
    left, chosen = characters, []
    for index, (domain, text) in enumerate(zip(dataset["domain"], dataset["text"], strict=True)):
        if domain == "code":
            left -= len(text)
            if left < 0:
                continue
        chosen.append(index)
    return dataset.select(chosen)


def can_pack(source: str) -> bool:
    """Whether a model keeps packed documents apart; says so when it does not."""
    try:
        check_packing(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    except MoEError as error:
        print(f"Documents are padded, not packed: {error}", flush=True)
        return False
    return True


@torch.no_grad()
def save_probe(model: PreTrainedModel, input_ids: torch.Tensor, path: Path) -> None:
    """Write token ids and the logits that a model on the CPU gives for them."""
    device = model.device
    model.cpu().eval()
    torch.save({"input_ids": input_ids, "logits": model(input_ids=input_ids, use_cache=False).logits}, path)
    model.to(device)


def reload_and_sample(
    folder: Path, prompts: tuple[str, ...], probe: Path | None = None, *, with_moe_hf: bool = True
) -> dict[str, Any]:
    """Load a saved model in a fresh process with plain `from_pretrained`, compare its logits with the probe's, sample.

    Args:
        folder (`Path`): the model, absolute.
        prompts (`tuple`): what is continued.
        probe (`Path`, *optional*): of `save_probe`; `probe.pt` of the folder if not given.
        with_moe_hf (`bool`): whether the process imports this package first.

    Raises:
        MoEError: the process failed; with the end of what it said.
    """
    source = RELOAD_PROGRAM.format(imports="import moe_hf" if with_moe_hf else "")
    program = [sys.executable, "-c", source, str(folder), str(probe or folder / "probe.pt"), *prompts]
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        raise MoEError(f"{folder} could not be loaded and sampled in a fresh process:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
