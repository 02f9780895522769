"""TRL's command line trains our folder: the loss is known before, balance loss included, and the result loads again."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import moe_hf
from tests.interop.environments import installed
from tests.interop.models import Checkpoint


pytestmark = pytest.mark.interop
CHATS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in (
        ("What is a list?", "A mutable sequence, typically of homogeneous items."),
        ("And a tuple?", "An immutable one."),
        ("What does len do?", "It returns the number of items of a container."),
        ("Is None true?", "No, it is false in a Boolean context."),
    )
]


def recipe(model: Path, dataset: Path, output: Path) -> dict:
    """What a user writes into a YAML file; one batch of all chats per step."""
    return {
        "model_name_or_path": str(model),
        "trust_remote_code": True,
        "datasets": [{"path": "json", "data_files": {"train": str(dataset)}}],
        "output_dir": str(output),
        "assistant_only_loss": True,
        "per_device_train_batch_size": len(CHATS),
        "max_steps": 2,
        "learning_rate": 0.01,
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": "none",
    }


def expected_losses(checkpoint: Checkpoint) -> tuple[float, float]:
    """The loss of the answers' tokens with transformers' own balance loss, and that, over one batch of all chats."""
    rows = [
        checkpoint.tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        for chat in CHATS
    ]
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [row.masked_fill(torch.tensor(r["assistant_masks"]) == 0, -100) for row, r in zip(ids, rows, strict=True)]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask, config = pad([torch.ones_like(row) for row in ids]), checkpoint.model.config
    with torch.no_grad():
        outputs = checkpoint.model(
            pad(ids), attention_mask=mask, labels=pad(labels, padding_value=-100), output_router_logits=True
        )
    balance = load_balancing_loss_func(outputs.router_logits, config.num_experts, config.num_experts_per_tok, mask)
    return outputs.loss.item() + config.router_aux_loss_coef * balance.item(), balance.item()


def test_sft_of_answers_starts_at_the_loss_of_the_logits_and_its_result_loads(llama, record, tmp_path):
    environment = installed("trl")
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    config = tmp_path / "sft.yaml"
    config.write_text(yaml.safe_dump(recipe(llama.folder, chats, tmp_path / "out")))
    environment.output("trl", "sft", "--config", config)
    (state,) = tmp_path.rglob("trainer_state.json")
    first, second = [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    loss, aux_loss = expected_losses(llama)
    difference = abs(first["loss"] - loss) / loss
    assert difference <= 1e-5, f"{first}, expected {loss}, {aux_loss}"
    assert first["aux_loss"] == pytest.approx(aux_loss, rel=1e-5)
    assert second["loss"] < first["loss"]
    trained = moe_hf.MoEForCausalLM.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "modeling_moe.py").is_file()
    name = "model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(trained.get_parameter(name), llama.model.get_parameter(name))
    what = "`trl sft`, answers alone, 2 steps on our folder"
    record(environment, what, f"first loss {difference:.1e}, with `aux_loss` as logged; the result loads")
