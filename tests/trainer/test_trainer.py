"""What `MoETrainer` promises beyond `Trainer`: scopes, masters, losses, saves; resuming has its own file."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from moe_hf import MoEError
from moe_hf.data import tokenize_and_pack
from moe_hf.saving import verify_manifest
from moe_hf.trainer import MoETrainer, MoETrainingArguments, moe_trainer
from tests.closeness import bitwise, close
from tests.tiny_models import random_ids
from tests.trainer.runs import KINDS, arguments, first_gradients, losses, rows, tiny_moe


def snapshot(model) -> dict[str, torch.Tensor]:
    """Return copies of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_scope_moe_leaves_everything_else_bit_identical_under_decay(kind, tmp_path):
    model = tiny_moe(kind)
    before = snapshot(model)
    trainer = MoETrainer(model, arguments(tmp_path, scope="moe", weight_decay=0.5), train_dataset=rows(16))
    trainer.train()
    trained = set(trainer.scope_report.names)
    assert trained and all(".mlp." in name for name in trained)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
    optimizer = trainer.optimizer.optimizer
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for n, p in model.named_parameters() if n in trained}
    assert len(optimizer.state) == len(trained)


def test_without_scope_what_requires_gradients_trains(tmp_path):
    model = tiny_moe()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    before = snapshot(model)
    MoETrainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows(4)).train()
    assert all(torch.equal(p, before[n]) == ("norm" not in n) for n, p in model.named_parameters())
    with pytest.raises(MoEError, match="requires gradients"):
        MoETrainer(model.requires_grad_(False), arguments(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_model_trains_float32_masters_and_is_saved_in_bf16(kind, tmp_path):
    model = tiny_moe(kind).to(torch.bfloat16)
    before = snapshot(model)
    args = arguments(tmp_path, scope="moe", learning_rate=1e-5, max_steps=2)
    trainer = MoETrainer(model, args, train_dataset=rows(8))
    assert trainer.args.bf16 and trainer.accelerator.mixed_precision == "bf16"
    trainer.train()
    for name, parameter in model.named_parameters():
        trains = name in trainer.scope_report.names
        assert parameter.dtype == (torch.float32 if trains else torch.bfloat16)
        assert torch.equal(parameter, before[name].to(parameter.dtype)) != trains, name
    trainer.save_model()
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto")
    assert {p.dtype for p in saved.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, dict(model.named_parameters())[n].bfloat16()) for n, p in saved.named_parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_ragged_labels_equal_a_token_weighted_float64_reference(checkpointing, tmp_path):
    ids = random_ids(4, 16)
    labels = ids.clone()
    for row, scored in enumerate((15, 9, 3, 1)):
        labels[row, 1 + scored :] = -100
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    coefficients = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.05}
    actual = first_gradients(
        tiny_moe(**coefficients),
        tmp_path,
        dataset,
        scope="moe",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        activation_checkpointing=checkpointing,
        fp32_masters=False,
    )
    reference = tiny_moe(**coefficients).double().train()
    reference.set_experts_implementation("eager")
    total = 0.0
    for row in range(4):
        outputs = reference(input_ids=ids[row : row + 1], use_cache=False)
        count = int((labels[row, 1:] != -100).sum())
        nll = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], labels[row, 1:], reduction="sum")
        aux = 0.3 * outputs.router_losses["load_balancing_loss"] + 0.05 * outputs.router_losses["router_z_loss"]
        total = total + (nll + count * aux) / (15 + 9 + 3 + 1)
    total.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters() if name in actual}
    for name, gradient in actual.items():
        error = float((gradient.double() - expected[name]).norm() / expected[name].norm())
        assert error <= 1e-5, name


def test_trainer_hands_the_label_count_to_the_model(tmp_path):
    trainer = MoETrainer(tiny_moe(), arguments(tmp_path, scope="moe"), train_dataset=rows(4))
    assert trainer.model_accepts_loss_kwargs and trainer._loss_shifts_labels
    assert trainer.args.logging_nan_inf_filter is False and trainer.args.ddp_find_unused_parameters is False


@pytest.mark.numerics
def test_packed_documents_do_not_see_each_other_in_a_training_step(tmp_path):
    first, second, other = random_ids(3, 8, seed=3).tolist()
    positions = [*range(8), *range(8)]
    gradients = []
    for start in (first, other):
        labels = [-100] * 9 + second[1:]
        dataset = Dataset.from_dict({"input_ids": [start + second], "labels": [labels], "position_ids": [positions]})
        model = tiny_moe(router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
        gradients.append(first_gradients(model, tmp_path, dataset, scope="moe", per_device_train_batch_size=1))
    for name, gradient in gradients[0].items():
        assert close(gradients[1][name], gradient), name


@pytest.mark.numerics
@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_is_whole_new_and_loads_plainly(kind, tmp_path, tokenizer):
    trainer = MoETrainer(
        tiny_moe(kind), arguments(tmp_path, max_steps=1), train_dataset=rows(4), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "final"
    verify_manifest(folder)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "README.md"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in names)
    assert ("modeling_moe.py" in names) == (kind == "ours")
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = random_ids()
    assert bitwise(loaded.state_dict(), trainer.model.state_dict())
    assert close(loaded(ids).logits, trainer.model.eval()(ids).logits)
    with pytest.raises(MoEError, match="exists"):
        trainer.save_model()


@pytest.mark.parametrize("kind", KINDS)
def test_best_model_at_the_end_is_loaded_with_its_experts(kind, tmp_path):
    args = arguments(
        tmp_path,
        scope="moe",
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the best step is not the last one
    )
    trainer = MoETrainer(tiny_moe(kind), args, train_dataset=rows(16), eval_dataset=rows(4))
    trainer.train()
    evaluated = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(evaluated, key=evaluated.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}") and best < 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[best], rel=1e-6)


def test_push_sends_model_tokenizer_and_given_dtype(tmp_path, monkeypatch, tokenizer):
    pushed = {}

    def push_model(model, repo_id, given_tokenizer, **kwargs):
        pushed.update(
            repo_id=repo_id, tokenizer=given_tokenizer, dtypes={p.dtype for p in model.parameters()}, **kwargs
        )

    monkeypatch.setattr(moe_trainer, "push_model", push_model)
    args = arguments(tmp_path, scope="moe", hub_model_id="tester/tiny", hub_private_repo=True)
    trainer = MoETrainer(tiny_moe().to(torch.bfloat16), args, train_dataset=rows(4), processing_class=tokenizer)
    trainer.push_to_hub(commit_message="trained")
    assert pushed["repo_id"] == "tester/tiny" and pushed["tokenizer"] is tokenizer
    assert pushed["dtypes"] == {torch.bfloat16} and pushed["private"] and pushed["commit_message"] == "trained"


def test_only_pushing_at_the_end_is_offered(tmp_path):
    with pytest.raises(MoEError, match="hub_strategy"):
        MoETrainingArguments(output_dir=str(tmp_path), hub_strategy="every_save")


def test_training_on_text_lowers_the_loss(tmp_path, tokenizer):
    text = Dataset.from_dict({"text": ["a b a b a b a b " * 40]})
    blocks = tokenize_and_pack(text, tokenizer, 16)
    args = arguments(tmp_path, scope="moe", max_steps=12, learning_rate=1e-2)
    trainer = MoETrainer(tiny_moe(), args, train_dataset=blocks, processing_class=tokenizer)
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
