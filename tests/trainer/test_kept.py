"""What trains is what is kept: every state that a model trains in, and every way to keep it.

A cell holds if what is loaded again equals the model in memory, or if the refusal names a way that does, which is then gone.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

import moe_hf
from moe_hf import MoEError
from moe_hf.finetuning.trained_files import TRAINED_NAME
from moe_hf.finetuning.trained_tensors import inner_model, named_tensors, trained_tensors
from moe_hf.hub import model as hub_model
from tests.tiny_models import random_ids
from tests.trainer.kept_states import PEFT, REFUSED, STATES, base_model, prepared, train
from tests.trainer.runs import rows, tiny_moe


# PEFT asks for it when it wraps a model, and TRL sets it.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
KINDS = ("ours", "mixtral", "qwen3_moe")
COLUMNS = ("save_model", "save_pretrained", "hub", "push")
# Each state on one kind in every run, so that each kind has several; all pairs in `make test-all`.
CELLS = [
    pytest.param((name, kind), marks=[] if i % len(KINDS) == j else pytest.mark.slow, id=f"{name}-{kind}")
    for i, name in enumerate(STATES)
    for j, kind in enumerate(KINDS)
]


@pytest.fixture(scope="module", params=CELLS)
def cell(request, tmp_path_factory):
    name, kind = request.param
    if name == "peft-in-place" and Version(transformers.__version__) >= Version("5.24"):
        pytest.skip("add_adapter of transformers 5.24 asks for a PEFT that is not released")
    folder = tmp_path_factory.mktemp("kept")
    state = STATES[name]
    trainer = train(state, kind, folder / "base", folder / "run")
    yield state, kind, folder, trainer
    shutil.rmtree(folder)


def outputs(model):
    with torch.no_grad():
        return model.eval()(input_ids=random_ids(2, 12)).logits


def load(folder: Path, outcome: str, state, kind, base: Path):
    """The model that the folder gives to somebody who has it and the base."""
    if outcome == PEFT:
        return PeftModel.from_pretrained(base_model(state, kind, base), folder)
    name = "AutoModelForSequenceClassification" if state.classifies else "AutoModelForCausalLM"
    return getattr(transformers, name).from_pretrained(folder)


def refused_and_kept_otherwise(call, trainer, state, kind, folder: Path, work: Path) -> None:
    with pytest.raises(MoEError, match=r"moe_hf\.save_trained\(model, folder\) keeps all that trains") as refusal:
        call()
    assert len(str(refusal.value)) < 700
    moe_hf.save_trained(trainer.model, work)
    again = prepared(state, kind, folder / "base")
    if "scope" in state.fields:
        moe_hf.apply_scope(again, state.fields["scope"])
    moe_hf.load_trained(again, work)
    equal(again, held(trainer.model))


def held(model) -> dict[str, torch.Tensor]:
    """What the model holds, by name. Asking for the state dict puts chosen experts in their places first."""
    model.state_dict()
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


def equal(model, expected: dict[str, torch.Tensor]) -> None:
    found = held(model)
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]


def test_something_trained_and_all_that_trains_is_in_the_checkpoint(cell):
    state, kind, folder, trainer = cell
    checkpoint = folder / "run" / "checkpoint-2"
    weights = {file.name for file in checkpoint.glob("*.safetensors")} - {"adapter_model.safetensors"}
    weights |= {"adapter_config.json"} if (checkpoint / "adapter_config.json").is_file() else set()
    assert weights == state.checkpoint
    before, now = held(prepared(state, kind, folder / "base")), held(trainer.model)
    moved = {name for name in before if name in now and not torch.equal(before[name], now[name])}
    # What moved is what is said to train; every kind of part that trains did move.
    assert moved
    assert moved <= {name.replace(".selected.", ".") for name in trained_tensors(trainer.model)}


def test_the_best_checkpoint_is_loaded_and_resuming_starts_from_it_bit_by_bit(cell):
    state, kind, folder, trainer = cell
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    equal(trainer.model, trainer.best)
    resumed = train(
        state, kind, folder / "base", folder / "again", max_steps=1, resume=folder / "run" / "checkpoint-1"
    )
    assert resumed.state.global_step == 1
    equal(resumed.model, trainer.best)
    assert trained_tensors(resumed.model).keys() == trained_tensors(trainer.model).keys()


@pytest.mark.parametrize("column", COLUMNS)
def test_what_is_written_gives_the_model_back_or_the_call_is_refused(cell, column, tmp_path, monkeypatch):
    state, kind, folder, trainer = cell
    model, destination = trainer.model, tmp_path / "kept"

    def push():
        monkeypatch.setattr(hub_model, "HfApi", lambda token: type("Api", (), {"token": None}))
        monkeypatch.setattr(hub_model, "preflight_account", lambda api, repo_id: repo_id)
        monkeypatch.setattr(hub_model, "open_repository", lambda *args, **kwargs: None)
        monkeypatch.setattr(hub_model, "final_card", lambda api, repo_id, revision, card, *rest: card)
        monkeypatch.setattr(
            hub_model,
            "commit_files",
            lambda api, repo_id, files, **kwargs: [
                (destination / name).parent.mkdir(parents=True, exist_ok=True) or shutil.copy(file, destination / name)
                for name, file in files.items()
            ],
        )
        moe_hf.hub.push_model(model, "me/kept", False)

    call = {
        "save_model": lambda: trainer.save_model(str(destination)),
        "save_pretrained": lambda: model.save_pretrained(destination),
        "hub": lambda: moe_hf.hub.save_model(model, None, destination),
        "push": push,
    }[column]
    outcome = state.hub if column == "push" else getattr(state, column)
    before, expected = held(model), outputs(model)
    if outcome == REFUSED:
        refused_and_kept_otherwise(call, trainer, state, kind, folder, tmp_path / "parts")
        assert not destination.exists()
    else:
        call()
        found = outputs(load(destination, outcome, state, kind, folder / "base"))
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1.0) * 4
    # Keeping a model does not change it.
    equal(model, before)


def test_the_trainer_of_transformers_keeps_it_or_is_refused_with_the_same_words(cell, tmp_path):
    state, kind, folder, trainer = cell
    stock = transformers.Trainer(trainer.model, transformers.TrainingArguments(tmp_path / "run", use_cpu=True))
    destination = tmp_path / "stock"
    if state.save_pretrained == REFUSED:
        refused_and_kept_otherwise(
            lambda: stock.save_model(str(destination)), trainer, state, kind, folder, tmp_path / "parts"
        )
    else:
        stock.save_model(str(destination))
        found = outputs(load(destination, state.save_pretrained, state, kind, folder / "base"))
        expected = outputs(trainer.model)
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1.0) * 4


PEFT_KINDS = {
    "parameters of experts": lambda: LoraConfig(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    "embeddings": lambda: LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "single tokens": lambda: LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    "the prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "a router as a whole": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"]),
}


@pytest.mark.parametrize("what", PEFT_KINDS)
def test_adapters_of_peft_of_any_kind_are_resumed_and_saved(what, tmp_path):
    def prepare(model):
        torch.manual_seed(0)
        return get_peft_model(model, PEFT_KINDS[what]())

    state = replace(STATES["peft"], prepare=prepare)
    trainer = train(state, "ours", tmp_path / "base", tmp_path / "run")
    equal(trainer.model, trainer.best)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    equal(train(state, "ours", tmp_path / "base", tmp_path / "2", max_steps=1, resume=checkpoint).model, trainer.best)
    trainer.save_model(str(tmp_path / "kept"))
    again = load(tmp_path / "kept", PEFT, state, "ours", tmp_path / "base")
    assert (outputs(again) - outputs(trainer.model)).abs().max() <= 1e-5


def test_adapters_of_a_model_that_was_never_saved_are_said_to_need_it(tmp_path, caplog):
    model = get_peft_model(tiny_moe("ours"), LoraConfig(r=2, target_modules=["q_proj"]))
    with caplog.at_level("WARNING"):
        moe_hf.hub.save_model(model, None, tmp_path / "kept")
    assert "was never saved and has no name" in caplog.text


def test_a_run_with_other_parts_does_not_resume(tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    train(STATES["freed-beside-lora"], "ours", base, lora, max_steps=1)
    for name, message in (
        ("expert-lora", "with other parameters"),
        ("bare", "with adapters of experts|with other parameters"),
        ("peft", "with|without"),
    ):
        with pytest.raises(MoEError, match=message):
            train(STATES[name], "ours", base, tmp_path / name, max_steps=1, resume=lora / "checkpoint-1")


def test_a_scope_beside_peft_config_is_refused_and_each_alone_is_kept(tokenizer, tmp_path):
    trl_trainers = pytest.importorskip("moe_hf.trainer.trl_trainers", reason="needs trl")
    model = base_model(STATES["bare"], "ours", tmp_path / "base")
    fields = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "save_steps": 1,
        "learning_rate": 0.05,
        "use_cpu": True,
    }
    fields |= {"report_to": "none", "disable_tqdm": True, "assistant_only_loss": False, "bf16": False}
    fields |= {"dataset_kwargs": {"skip_prepare_dataset": True}}

    def trainer(name, scope, resume=None, **kwargs):
        args = trl_trainers.MoESFTConfig(tmp_path / name, scope=scope, **fields)
        given = {"train_dataset": rows(8), "processing_class": tokenizer, **kwargs}
        found = trl_trainers.MoESFTTrainer(base_model(STATES["bare"], "ours", tmp_path / "base"), args, **given)
        found.train(resume_from_checkpoint=resume)
        return found

    lora = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(MoEError, match="scope=None"):
        trainer("both", "moe", peft_config=lora)
    for name, scope, kwargs in (("scope", "moe", {}), ("adapters", None, {"peft_config": lora})):
        first = trainer(name, scope, **kwargs)
        moved = {
            n for n, p in named_tensors(inner_model(first.model)).items() if n not in dict(model.named_parameters())
        }
        assert bool(moved) == (scope is None)
        again = trainer(f"{name}-again", scope, str(tmp_path / name / "checkpoint-1"), **kwargs)
        equal(again.model, held(first.model))


def test_adapters_alone_of_a_checkpoint_that_has_more_are_loaded_with_a_warning(tmp_path, caplog):
    base = tmp_path / "base"
    moe_hf.save_trained(prepared(STATES["freed-beside-lora"], "ours", base), tmp_path / "parts")
    transformers.logging.get_logger("transformers").propagate = True
    with caplog.at_level("WARNING"):
        moe_hf.load_expert_lora(base_model(STATES["bare"], "ours", base), tmp_path / "parts")
    assert "what trained beside these adapters" in caplog.text


def test_files_that_do_not_fit_leave_the_model_unchanged(tmp_path):
    base = tmp_path / "base"
    state = STATES["freed-beside-peft"]
    model = prepared(state, "ours", base)
    moe_hf.save_trained(model, tmp_path / "parts")
    plain = base_model(state, "ours", base)
    before = held(plain)
    with pytest.raises(MoEError, match="same adapters"):
        moe_hf.load_trained(plain, tmp_path / "parts")
    equal(plain, before)
    (tmp_path / "parts" / TRAINED_NAME).write_bytes(b"0" * 64)
    with pytest.raises(MoEError, match="cannot be read"):
        moe_hf.load_trained(model, tmp_path / "parts")
    with pytest.raises(MoEError, match="none of"):
        moe_hf.load_trained(model, tmp_path)
    with pytest.raises(MoEError, match="Nothing trains"):
        moe_hf.save_trained(plain.requires_grad_(False), tmp_path / "none")
    assert isinstance(model, PeftModel) and inner_model(model) is model.get_base_model()
