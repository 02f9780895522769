"""What users of transformers' Trainer are used to works with `MoETrainer` too, or is refused in a sentence."""

import functools
import os
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, EvalPrediction

import moe_hf
from moe_hf import MoEError, MoEForSequenceClassification
from moe_hf.reporting.card import model_card
from moe_hf.saving import verify_manifest
from moe_hf.trainer import moe_trainer
from tests.tiny_models import random_ids
from tests.trainer.runs import arguments, losses, rows, tiny_moe


def trainer_on(folder, model: nn.Module | None = None, kwargs: dict | None = None, **fields) -> moe_hf.MoETrainer:
    """A trainer of two steps in the order of its rows."""
    args = arguments(folder, **({"max_steps": 2, "train_sampling_strategy": "sequential"} | fields))
    model = tiny_moe() if model is None and "model_init" not in (kwargs or {}) else model
    return moe_hf.MoETrainer(model, args, train_dataset=rows(16), eval_dataset=rows(8), **(kwargs or {}))


@pytest.mark.parametrize("kind", ["ours", "mixtral", "classifier"])
def test_metrics_of_the_usual_form_see_the_logits_of_the_whole_evaluation(kind, tmp_path):
    seen = []

    def accuracy(given: EvalPrediction) -> dict[str, float]:
        seen.append(given.predictions)
        return {"accuracy": float((given.predictions.argmax(-1) == given.label_ids).mean())}

    if kind == "classifier":
        model, shape = MoEForSequenceClassification(tiny_moe().config), (8, 2)
        data = Dataset.from_dict({"input_ids": random_ids(8, 16).tolist(), "labels": [0, 1] * 4})
    else:
        model, shape, data = tiny_moe(kind), (8, 16, 113), rows(8)
    model.config.output_router_logits = True
    trainer = trainer_on(tmp_path, model, {"compute_metrics": accuracy}, per_device_eval_batch_size=3)
    assert 0 <= trainer.evaluate(data)["eval_accuracy"] <= 1
    assert [type(one) for one in seen] == [np.ndarray] and seen[0].shape == shape


def test_metrics_that_take_compute_result_see_batches(tmp_path):
    sizes = []

    def streamed(given: EvalPrediction, compute_result: bool) -> dict[str, float]:
        sizes.append(len(given.predictions))
        return {"rows": float(sum(sizes))} if compute_result else {}

    trainer = trainer_on(tmp_path, kwargs={"compute_metrics": streamed}, per_device_eval_batch_size=4)
    assert trainer.evaluate()["eval_rows"] == 8.0 and sizes == [4, 4]


def test_a_model_is_made_anew_for_each_run_and_trained_like_the_first(tmp_path):
    trials = []

    def make(trial):
        trials.append(trial)
        return tiny_moe()

    trainer = trainer_on(tmp_path, None, {"model_init": make}, scope="moe", expert_dropout=0.1)
    first_model, found = trainer.model, []
    for _ in range(2):
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        found.append([(entry["loss"], entry["load_balancing_loss"], entry["routing/entropy"]) for entry in entries])
        frozen = {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
        assert "model.embed_tokens.weight" in frozen and not any(".experts." in name for name in frozen)
        assert trainer.router_losses.model is trainer.model is not first_model
    assert found[0] == found[1] and len(found[0]) == 2
    assert trials == [None, None, None]
    trainer.save_model()
    assert (tmp_path / "final" / "model.safetensors").is_file()


def test_a_model_that_cannot_be_made_for_each_run_is_refused(tmp_path):
    for model, kwargs in ((None, {"model_init": None}), (tiny_moe(), {"model_init": lambda: tiny_moe()})):
        with pytest.raises(MoEError, match="and not both"):
            moe_hf.MoETrainer(model, arguments(tmp_path), **kwargs)
    args = arguments(tmp_path)
    args.layout = lambda: "two processes"
    with pytest.raises(MoEError, match="not in shards"):
        moe_hf.MoETrainer(args=args, model_init=lambda: tiny_moe())


@pytest.mark.parametrize("kind", ["ours", "mixtral"])
def test_a_batch_that_does_not_fit_is_tried_again_smaller_with_nothing_left_over(kind, tmp_path):
    found = []
    for rows_at_once in (4, 2):
        model = tiny_moe(kind)
        forward = model.forward

        @functools.wraps(forward)
        def limited(*args, forward=forward, model=model, **kwargs):
            outputs = forward(*args, **kwargs)
            if model.training and len(kwargs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return outputs

        model.forward = limited
        fields = {"auto_find_batch_size": True, "per_device_train_batch_size": rows_at_once}
        trainer = trainer_on(tmp_path / str(rows_at_once), model, **fields)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_arguments_say_where_to_resume(tmp_path):
    trainer_on(tmp_path, save_strategy="steps", save_steps=1).train()
    for resume in (str(tmp_path / "checkpoint-1"), "true"):
        trainer = trainer_on(tmp_path, resume_from_checkpoint=resume, max_steps=3)
        trainer.train()
        assert trainer.state.global_step == 3 and len(losses(trainer)) == 3
    with pytest.raises(MoEError, match="earlier run"):
        trainer_on(tmp_path).train()


def test_a_model_is_saved_beside_the_checkpoints_in_place_of_an_earlier_one(tmp_path, monkeypatch):
    trainer = trainer_on(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(1.0)
    replace, moved = os.replace, []

    def killed(source, destination):
        if len(moved) == 5:
            raise KeyboardInterrupt
        moved.append(destination)
        replace(source, destination)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_model(str(tmp_path))
    monkeypatch.undo()
    with pytest.raises(MoEError, match="manifest"):
        verify_manifest(tmp_path)
    assert not (tmp_path / "config.json").exists(), "none, where it is not whole"
    for found in (path for path in tmp_path.iterdir() if path.suffix == ".safetensors"):
        found.unlink()
    trainer.save_model(str(tmp_path))
    verify_manifest(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    for step in (1, 2):
        verify_manifest(tmp_path / f"checkpoint-{step}")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_weights_of_something_else_are_not_replaced(tmp_path):
    trainer = trainer_on(tmp_path)
    tiny_moe("mixtral").save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(MoEError, match="model.safetensors, which is no part of a save"):
        trainer.save_model(str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_card_s_arguments_of_a_push_are_on_the_card(tmp_path, monkeypatch):
    pushed = []

    def push(model, repo_id, tokenizer=None, *, tags=None, card_facts=None, **kwargs):
        pushed.append((model_card(model, repo_id="a/b", card_facts=card_facts), tags, kwargs))
        return "commit"

    monkeypatch.setattr(moe_trainer, "push_model", functools.wraps(moe_trainer.push_model)(push))
    trainer = trainer_on(tmp_path)
    trainer.train()
    given = {"finetuned_from": "org/dense", "language": "en", "license": "mit", "model_name": "A Name", "tags": "one"}
    given |= {"tasks": ["text-generation"], "dataset_tags": "org/data", "dataset": "Data", "dataset_args": "split: a"}
    done = trainer.push_to_hub(blocking=False, create_pr=True, **given)
    assert isinstance(done, Future) and done.result() == "commit"
    card, tags, rest = pushed[0]
    data = card.data.to_dict()
    assert (data["base_model"], data["language"], data["license"]) == ("org/dense", "en", "mit")
    assert data["datasets"] == ["org/data"] and tags == ["one", "text-generation"] and rest["create_pr"]
    for text in ("# A Name", "Data (split: a)", "optimizer steps"):
        assert text in card.text, text
    with pytest.raises(MoEError, match="no argument 'finetuned_form'; it knows .*finetuned_from"):
        trainer.push_to_hub(finetuned_form="org/dense")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(("kind", "is_said"), [("ours", True), ("mixtral", False)])
def test_adapters_that_reach_no_expert_are_said(kind, is_said, tmp_path, caplog):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_moe(kind), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer_on(tmp_path, model)
    assert ("reach no expert" in caplog.text) == is_said
    caplog.clear()
    own = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    trainer_on(tmp_path, peft.get_peft_model(tiny_moe(), peft.LoraConfig(task_type="CAUSAL_LM", **own)))
    assert "reach no expert" not in caplog.text
