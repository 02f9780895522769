"""The study of scopes: texts do not leak, the loss is on answers alone, each scope trains what it names."""

import json
import shutil

import pytest
import torch
from datasets import Dataset

import moe_hf
from benchmarks.instructions import docstring_examples, instruction_rows, without_answers_of
from benchmarks.runs import interleaved_step_seconds, saved_rows
from benchmarks.scopes import TINY, distinct_scopes, main
from benchmarks.scopes_report import summary
from moe_hf.data import train_tokenizer
from moe_hf.errors import MoEError
from tests.tiny_models import tiny_dense


ARGUMENTS = ["--tiny", "--seeds", "2", "--models", "upcycled,sparse", "--tasks", "instructions"]
SOURCE = '''
def first(a, *, b=1):
    """Return the first.

    More about it.
    """
    return a + b

class Thing:
    async def second(self):
        """Do the
        second."""

    def third(self):
        return 3
'''


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("scopes") / "out"


@pytest.fixture(scope="module")
def results(output_dir) -> dict:
    return main([*ARGUMENTS, "--out", str(output_dir)])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Dataset.from_dict({"text": [SOURCE] * 3}), 300)


def test_examples_are_functions_without_their_docstring_and_its_first_paragraph():
    examples = docstring_examples(Dataset.from_dict({"text": [SOURCE, "print 'old'"]}))
    assert examples == [
        {"code": "def first(a, *, b=1):\n    return a + b", "answer": "Return the first."},
        {"code": "async def second(self):\n    pass", "answer": "Do the second."},
    ]
    assert without_answers_of(examples, [{"code": "other", "answer": "Return the first."}]) == examples[1:]


def test_loss_of_an_instruction_is_on_the_answer_and_the_end_alone(tokenizer):
    examples = [{"code": "def f(): pass", "answer": "Do it."}, {"code": "x = 1\n" * 200, "answer": "Set x."}]
    rows = instruction_rows(examples, tokenizer, 96)
    for row, example in zip(rows, examples, strict=True):
        scored = row["labels"] != -100
        assert tokenizer.decode(row["labels"][scored]) == example["answer"] + tokenizer.eos_token
        assert torch.equal(row["labels"][scored], row["input_ids"][scored])
        text = tokenizer.decode(row["input_ids"][row["attention_mask"] == 1])
        assert text.startswith("User: Write the docstring of this function.\n\n" + example["code"][:8])
        assert text.endswith("\n\nAssistant: " + example["answer"] + tokenizer.eos_token)
    assert rows[0]["attention_mask"].sum() < 96
    assert rows[1]["attention_mask"].sum() == 96


def test_answer_longer_than_a_third_of_a_row_is_left_out(tokenizer):
    examples = [{"code": "def f(): pass", "answer": "word " * 100}, {"code": "def g(): pass", "answer": "Do."}]
    assert len(instruction_rows(examples, tokenizer, 96)) == 1


def test_no_row_is_in_two_parts_of_the_texts(results, output_dir):
    parts = {
        name: {tuple(row) for row in saved_rows(output_dir / "data" / name)["input_ids"][:].tolist()}
        for name in results["data"]["rows"]
    }
    assert all(parts.values())
    names = sorted(parts)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not parts[a] & parts[b], (a, b)


def test_scopes_that_train_the_same_parameters_run_once(results):
    assert results["models"]["upcycled"]["same"]["ffn"] == "moe"
    assert results["models"]["sparse"]["same"]["ffn"] == "ffn"
    assert "ffn" not in results["models"]["upcycled"]["tasks"]["instructions"]
    for model in results["models"].values():
        assert "shared" not in model["same"]  # these models have no shared expert
        assert set(model["step_seconds"]) == {a for a, b in model["same"].items() if a == b}
    config = moe_hf.MoEConfig(text_config=tiny_dense("llama").config, shared_expert_intermediate_size=5)
    shared = moe_hf.MoEForCausalLM(config)
    assert "shared" in distinct_scopes(shared)


def test_trained_parameters_of_scopes_add_up(results):
    for model in results["models"].values():
        task = model["tasks"]["instructions"]
        trained = {scope: task[scope]["runs"][0]["trained_parameters"] for scope in task if scope != "before"}
        assert trained["moe"] == trained["experts"] + trained["router"]
        assert trained["all"] == trained["moe"] + trained["non_moe"] == task["all"]["runs"][0]["total_parameters"]
        assert trained["attention"] < trained["non_moe"]


def test_rate_of_each_scope_is_the_one_with_the_best_validation_loss(results):
    for model in results["models"].values():
        for scope, found in model["tasks"]["instructions"].items():
            if scope == "before":
                continue
            validation = {rate: losses["validation"] for rate, losses in found["tried"].items()}
            assert [float(rate) for rate in validation] == list(TINY["learning_rates"])
            assert validation[str(found["rate"])] == min(validation.values())
            assert found["runs"][0]["after"] == found["tried"][str(found["rate"])]


def test_upcycled_model_starts_at_the_loss_of_its_dense_parent_on_code(results):
    model = results["models"]["upcycled"]
    for seed in (0, 1):
        parent = model["first"][seed][-1]["loss"]["code"]
        assert model["tasks"]["instructions"]["before"][seed]["code"] == pytest.approx(parent, rel=1e-5)


def test_summary_is_that_of_the_losses_seed_by_seed(results):
    task = results["models"]["sparse"]["tasks"]["instructions"]
    found = summary(task)
    runs = [(task["moe"]["runs"][seed]["after"], task["before"][seed]) for seed in (0, 1)]
    assert found["moe"]["forgetting"]["per_seed"] == [after["code"] - before["code"] for after, before in runs]
    assert found["moe"]["gap"]["per_seed"] == [after["test"] - after["train"] for after, _ in runs]
    assert found["all"]["minus_all"]["per_seed"] == [0, 0]
    assert found["all"]["gain"]["per_seed"] == [1, 1]
    assert found["moe"]["gain"]["per_seed"][0] == pytest.approx(
        (runs[0][1]["test"] - runs[0][0]["test"]) / (runs[0][1]["test"] - task["all"]["runs"][0]["after"]["test"])
    )
    assert found["before"]["loss"]["per_seed"] == [before["test"] for _, before in runs]


def test_second_run_does_only_what_is_missing_and_writes_the_same(results, output_dir):
    shutil.rmtree(output_dir / "seed1/sparse/instructions/router")
    again = main([*ARGUMENTS, "--out", str(output_dir)])
    (built,) = again["built"]
    assert built.startswith("seed1/sparse/instructions/router/")
    assert again["models"] == results["models"]
    assert json.loads((output_dir / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(again))
    for picture in ("differences.png", "forgetting.png"):
        assert (output_dir / picture).read_bytes()[:4] == b"\x89PNG"
    table = (output_dir / "table.md").read_text(encoding="utf-8")
    assert table.count("\n| non_moe |") == 2
    assert table.count("the same parameters as moe") == 1


def test_prose_is_a_task_with_one_seed(output_dir, results):
    alone = main(["--tiny", "--seeds", "1", "--models", "upcycled", "--tasks", "prose", "--out", str(output_dir)])
    task = alone["models"]["upcycled"]["tasks"]["prose"]
    assert all(losses == losses for losses in task["all"]["runs"][0]["after"].values())
    assert "data" not in alone["built"]


def test_steps_are_timed_in_turns():
    models = {"a": tiny_dense("llama"), "b": tiny_dense("gpt2")}
    text = [{"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])}] * 3
    seconds = interleaved_step_seconds(models, text)
    assert list(seconds) == ["a", "b"]
    assert all(value > 0 for value in seconds.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "upcycled,spars"], "spars"),
        (["--tasks", "poems"], "poems"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--steps", "0"], "--steps is 0"),
    ],
    ids=["model", "task", "seeds", "steps"],
)
def test_study_refuses_what_it_cannot_do(arguments, message, tmp_path):
    with pytest.raises(MoEError, match=message):
        main(["--tiny", *arguments, "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
