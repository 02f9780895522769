"""Every recipe runs, tiny, from a dense model or a MoE to metrics beside the dense parent."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import moe_hf
from moe_hf import MoEError
from moe_hf.data import load_text, train_tokenizer
from moe_hf.trainer.arguments import DataArguments
from moe_hf.trainer.programs import load_documents
from tests.small_library import library_of
from tests.trainer.program_runs import run


RECIPES = Path(__file__).parents[2] / "training" / "recipes"
# The program of each recipe that has another one than finetune, or pretrain by its name.
PROGRAMS = {
    "classify_sequences": "classify",
    "classify_tokens": "classify",
    "distill_dense": "distill",
    "distill_moe": "distill",
    "harden": "harden",
    "instructions": "sft",
    "preferences": "dpo",
    "questions": "sft",
}
# Those whose rates are chosen too, for one program of Trainer and one of TRL; finetune has tests of its own.
SWEPT = ("classify_sequences", "instructions")
FROM_MOE = ("classify_sequences", "classify_tokens", "distill_dense", "distill_moe")
QUICK = [
    "--max_steps=4", "--warmup_steps=1", "--per_device_train_batch_size=4", "--per_device_eval_batch_size=4",
    "--disable_tqdm=true", "--use_cpu=true", "--logging_steps=2",
]  # fmt: skip
LABELLED = ["--max_length=48", "--max_train_rows=40", "--max_eval_rows=12"]
CHATS = ["--max_length=384", "--max_train_rows=24", "--max_eval_rows=6"]
TEXT = ["--block_size=32", "--held_out_share=0.3", "--max_train_tokens=800", "--max_eval_tokens=200"]


def program_of(recipe: str) -> str:
    return PROGRAMS.get(recipe, "pretrain" if recipe.startswith("pretrain") else "finetune")


@pytest.fixture(scope="module", autouse=True)
def small_library():
    """The functions of a few packages stand for the whole library, which takes seconds to read."""
    with library_of("email", "json", "logging", "xml"):
        yield


@pytest.fixture(scope="module")
def dense(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    tokenizer = train_tokenizer(load_text(str(text)), 270)
    config = LlamaConfig(
        vocab_size=270, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def moe(dense, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "moe"
    moe_hf.upcycle_checkpoint(dense, folder, num_experts=4)
    return folder


def run_recipe(recipe: str, model: Path, text: Path, out: Path, *more: str) -> dict:
    program = program_of(recipe)
    data = {"classify": LABELLED, "sft": CHATS, "dpo": CHATS}.get(program, [*TEXT, f"--dataset={text}"])
    if recipe == "multi_task":
        data = TEXT
    fair = [] if program in ("distill", "pretrain") else ["--sweep=2" if recipe in SWEPT else "--sweep=0"]
    run(program, f"--config={recipe}", f"--model={model}", f"--output_dir={out}", *QUICK, *data, *fair, *more)
    return json.loads((out / "comparison.json").read_text())


@pytest.mark.parametrize(
    "recipe", ["continue_pretraining", "domain_conditioned", "multilingual", "multi_task", "augmented", "harden"]
)
def test_recipe_upcycles_trains_and_compares_with_the_dense_parent(recipe, dense, text, tmp_path):
    comparison = run_recipe(recipe, dense, text, tmp_path)
    own, control = comparison["this model"]["after"], comparison["control"]["after"]
    losses = [name for name in own if name.endswith("token_loss")]
    assert len(losses) == (3 if recipe == "multi_task" else 2)
    for metrics in (own, control):
        assert all(0 < metrics[name] < 7 for name in losses)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert saved.config.num_experts == 8 and saved.config.upcycling["source"]
    dense_after = AutoModelForCausalLM.from_pretrained(tmp_path / "control" / "final")
    assert type(dense_after) is LlamaForCausalLM
    if recipe == "harden":
        assert sum(name.endswith("loss_attacked") for name in own) == 2


@pytest.mark.parametrize("recipe", ["classify_sequences", "classify_tokens"])
def test_recipe_classifies_beside_the_dense_parent(recipe, moe, text, tmp_path):
    comparison = run_recipe(recipe, moe, text, tmp_path)
    assert {"this model", "control", "headline"} <= set(comparison)
    for metrics in (comparison[arm][when] for arm in ("this model", "control") for when in ("before", "after")):
        assert 0 <= metrics["eval_accuracy"] <= 1 and "eval_macro_f1" in metrics
    if recipe == "classify_sequences":
        saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
        assert set(saved.config.label2id) == {"email", "json", "logging", "xml"}
        start = AutoModelForSequenceClassification.from_pretrained(moe, num_labels=4)
        assert not torch.equal(saved.score.weight, start.score.weight)


@pytest.mark.filterwarnings(
    "ignore:.*is deprecated and will be removed in v6:FutureWarning"
)  # trl 1.16 uses old names
@pytest.mark.parametrize("recipe", ["instructions", "questions", "preferences"])
def test_recipe_tunes_on_chats_beside_the_dense_parent(recipe, dense, text, tmp_path):
    pytest.importorskip("trl", reason="the recipes of chats need trl: pip install 'moe-hf[trl]'")
    more = ["--generated_answers=2", "--max_new_tokens=3"] if recipe == "questions" else []
    comparison = run_recipe(recipe, dense, text, tmp_path, *more)
    expected = {"questions": {"exact_match", "f1"}, "preferences": {"eval_rewards/accuracies"}}.get(recipe, set())
    for metrics in (comparison[arm][when] for arm in ("this model", "control") for when in ("before", "after")):
        assert {"eval_loss"} | expected <= set(metrics)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert saved.config.num_experts == 8 and saved.config.output_router_logits is False
    start = AutoModelForCausalLM.from_pretrained(dense)
    names = dict(saved.named_parameters())
    assert torch.equal(names["model.layers.0.self_attn.q_proj.weight"], start.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize("recipe", ["distill_moe", "distill_dense"])
def test_recipe_distils_a_smaller_student(recipe, moe, text, tmp_path):
    comparison = run_recipe(recipe, moe, text, tmp_path, "--kd_stop_step=3")
    assert set(comparison) == {"student", "untrained student", "teacher"}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert saved.config.num_hidden_layers == (2 if recipe == "distill_moe" else 3)
    assert hasattr(saved.config, "num_experts") == (recipe == "distill_moe")


def test_every_recipe_names_its_program_and_is_run_by_a_test():
    for path in RECIPES.glob("*.yaml"):
        assert f"# moe-hf {program_of(path.stem)} --config {path.stem} " in path.read_text(), path.name


@pytest.mark.parametrize(
    ("recipe", "argv", "message"),
    [
        ("finetune_moe", ["--control=parent"], "does not say which dense model"),
        ("finetune_moe", ["--control=parent", "--scope=router", "--upcycle={}"], "no router"),
        ("finetune_moe", ["--upcycle=[1]"], "upcycle is"),
        ("finetune_moe", ["--ids_from_domain=domain"], "ids_from_domain='domain'"),
        ("finetune_moe", ["--augment", "shuffle=0.1"], "no augmentation"),
        ("finetune_moe", ["--augment", "drop_words=2"], "no augmentation"),
        ("finetune_moe", ["--dataset=builtin_questions"], "no column of text"),
        ("classify_sequences", ["--task=both"], "task='both'"),
        ("classify_sequences", ["--dataset=builtin_question"], "No built-in dataset"),
        ("classify_sequences", ["--dataset=builtin_tasks"], "no column label"),
        ("distill_moe", ["--kd_temperature=0"], "kd_temperature=0.0"),
        ("harden", ["--adv_steps=0"], "adv_steps=0"),
    ],
)
def test_mistakes_are_refused_before_anything_is_trained(recipe, argv, message, dense, text, tmp_path):
    if "--dataset" not in argv[0] and program_of(recipe) == "finetune":
        argv = [*argv, f"--dataset={text}"]
    if program_of(recipe) == "classify":
        # The dense model was made from none, which is a mistake of its own.
        argv = [*argv, f"--control={dense}"]
    with pytest.raises(MoEError, match=message):
        run(
            program_of(recipe),
            f"--config={recipe}",
            f"--model={dense}",
            f"--output_dir={tmp_path / 'out'}",
            *QUICK,
            *argv,
        )
    assert not (tmp_path / "out").exists()


def test_domain_ids_are_numbers_in_alphabetical_order(text):
    train, held_out = load_documents(DataArguments(dataset=str(text), ids_from_domain="language_ids"))
    for rows in (train, held_out):
        assert set(zip(rows["domain"], rows["language_ids"], strict=True)) == {("letters", 0), ("numbers", 1)}


def test_augmentation_adds_changed_copies_of_training_documents_alone(text):
    plain, _ = load_documents(DataArguments(dataset=str(text)))
    train, held_out = load_documents(DataArguments(dataset=str(text), augment=["drop_words=0.5", "swap_words=0.2"]))
    assert len(train) == 3 * len(plain) and list(train["text"])[: len(plain)] == list(plain["text"])
    again, _ = load_documents(DataArguments(dataset=str(text), augment=["drop_words=0.5", "swap_words=0.2"]))
    assert list(again["text"]) == list(train["text"])
    dropped, swapped = train["text"][len(plain)], train["text"][2 * len(plain)]
    assert 0.3 < len(dropped.split()) / len(plain["text"][0].split()) < 0.7
    assert sorted(swapped.split()) == sorted(plain["text"][0].split()) and swapped != plain["text"][0]
    assert len(held_out) == 2
