"""A model beside its dense control: what trains, at which rate, on which text it is judged, and after a kill."""

import json
import math
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import concatenate_datasets
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moe_hf
from moe_hf import MoEError
from moe_hf.data import load_text, split_by_document
from moe_hf.inspection import forward_flops, inspect_model, training_flops
from moe_hf.trainer import MoETrainer
from moe_hf.trainer.arguments import FinetuneArguments, ModelArguments
from moe_hf.trainer.comparison import ComparisonArguments, record, runs
from moe_hf.trainer.comparison.arms import control_arm, our_arm
from moe_hf.trainer.comparison.halves import validation_and_test
from moe_hf.trainer.comparison.progress import Run, duration, progress_line, seconds_left
from moe_hf.trainer.comparison.report import mean_loss, summary
from moe_hf.trainer.guard import NotFiniteError
from tests.trainer.program_runs import run


QUICK = [
    "--block_size=16", "--max_steps=3", "--save_steps=1", "--eval_steps=3", "--per_device_train_batch_size=2",
    "--disable_tqdm=true", "--use_cpu=true", "--held_out_share=0.5", "--warmup_steps=1", "--learning_rate=1e-3",
]  # fmt: skip
UPCYCLE = {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1]}


class Killed(BaseException):
    """What no handler of errors stops."""


@pytest.fixture(scope="module")
def dense(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    config = LlamaConfig(
        vocab_size=113, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=0, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compare(dense: Path, text: Path, out: Path, *more: str) -> dict:
    argv = [f"--model={dense}", f"--upcycle={json.dumps(UPCYCLE)}", "--control=parent", f"--dataset={text}"]
    run("finetune", "--config=finetune_moe", *argv, f"--output_dir={out}", *QUICK, *more)
    return json.loads((out / "comparison.json").read_text())


@pytest.fixture(scope="module")
def compared(dense, text, tmp_path_factory) -> Path:
    """A comparison with a sweep and two seeds, without a kill."""
    out = tmp_path_factory.mktemp("compared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "MOST_BEYOND", 1)
        compare(dense, text, out, "--sweep=2", "--comparison_seeds=2")
    return out


def result_of(out: Path) -> dict:
    return json.loads((out / "comparison.json").read_text())


def test_control_trains_the_mlps_of_the_layers_that_have_experts(compared, dense):
    start, after = (AutoModelForCausalLM.from_pretrained(f) for f in (dense, compared / "control" / "final"))
    for name, before in start.state_dict().items():
        is_trained = ".mlp." in name and ".layers.1." not in name
        assert torch.equal(after.state_dict()[name], before) != is_trained, name
    assert "MLPs of layers 0, 2" in result_of(compared)["control"]["trained"]


def test_both_are_measured_before_and_start_equal(compared):
    result = result_of(compared)
    ours, control = result["this model"]["before"], result["control"]["before"]
    losses = [name for name in ours if name.endswith("token_loss")]
    assert len(losses) == 2
    assert [ours[name] for name in losses] == pytest.approx([control[name] for name in losses], abs=1e-5)
    for arm in ("this model", "control"):
        assert set(losses) <= result[arm]["after"].keys()


def test_each_has_the_best_rate_of_its_own_sweep(compared):
    for arm in ("this model", "control"):
        found = result_of(compared)[arm]
        losses = {float(rate): loss for rate, loss in found["sweep"].items()}
        assert {3.2e-4, 1e-3} <= losses.keys() and len(losses) == 3, "it goes on beyond an edge"
        assert found["learning_rate"] == min(losses, key=losses.get)
        assert found["rate_at_edge"] == (found["learning_rate"] in (min(losses), max(losses)))


def test_difference_is_paired_by_seed_and_the_headline_says_what_it_cost(compared):
    result = result_of(compared)
    losses = {arm: [mean_loss(m) for m in result[arm]["per_seed"]] for arm in ("this model", "control")}
    expected = [a - b for a, b in zip(losses["this model"], losses["control"], strict=True)]
    difference = result["difference"]
    assert difference["per_seed"] == expected and expected[0] != expected[1]
    assert difference["low"] < difference["mean"] < difference["high"]
    # Three steps of two rows of 16 tokens; the padding token ends documents, and is not counted.
    assert 80 < result["this model"]["training_tokens"] <= 96
    assert result["this model"]["training_flops"] > result["control"]["training_flops"]
    for part in ("tokens of training", "95% interval", "training FLOPs", "active of"):
        assert part in result["headline"]


def test_models_of_the_first_seed_are_kept_and_what_was_tried_is_not(compared):
    assert {path.name for path in compared.iterdir() if path.is_dir()} >= {"final", "control"}
    assert not list(compared.glob("seed-*")) and not (compared / "sweep").exists()


def test_finished_comparison_is_refused_as_a_finished_run_is(compared, dense, text):
    with pytest.raises(MoEError, match="a comparison was finished there"):
        compare(dense, text, compared, "--sweep=2", "--comparison_seeds=2")


class Killer:
    """Ends the process, as far as a test can, at moments of `kinds`, each once; every `every`-th of them."""

    def __init__(self, kinds: set[str], every: int, patch: pytest.MonkeyPatch) -> None:
        self.kinds, self.every, self.seen, self.kills = kinds, every, [], 0
        write, save, checkpoint = record.write_json, runs._save, MoETrainer._save_checkpoint

        def killing_write(content, path):
            stage = f"{path.name} {len(content.get('finished', ()))}"
            self.at("before_write", stage)
            write(content, path)
            self.at("after_write", stage)

        def killing_save(trainer, metrics):
            self.at("before_save", trainer.args.output_dir)
            save(trainer, metrics)

        def killing_checkpoint(trainer, *args, **kwargs):
            checkpoint(trainer, *args, **kwargs)
            self.at("in_training", trainer.args.output_dir)

        for module in (record, runs):
            patch.setattr(module, "write_json", killing_write)
        patch.setattr(runs, "_save", killing_save)
        patch.setattr(MoETrainer, "_save_checkpoint", killing_checkpoint)

    def at(self, kind: str, place: str) -> None:
        if kind in self.kinds and (kind, place) not in self.seen:
            self.seen.append((kind, place))
            if len(self.seen) % self.every == 0:
                self.kills += 1
                raise Killed


KINDS = ("before_write", "after_write", "in_training", "before_save")


@pytest.mark.parametrize(
    ("kinds", "every"),
    [pytest.param(KINDS, 6), *(pytest.param([kind], 1, marks=pytest.mark.slow) for kind in KINDS)],
)
def test_killed_comparison_goes_on_by_the_same_command_to_the_same_result(
    kinds, every, compared, dense, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(runs, "MOST_BEYOND", 1)
    killer = Killer(set(kinds), every, monkeypatch)
    while not (tmp_path / "out" / "comparison.json").exists():
        with suppress(Killed):
            compare(dense, text, tmp_path / "out", "--sweep=2", "--comparison_seeds=2")
        assert killer.kills < 40
    # 2 before, 6 of the sweep, 4 of the seeds; and comparison.json.
    moments = {"before_write": 13, "after_write": 13, "in_training": 10, "before_save": 2}
    assert len(killer.seen) == sum(moments[kind] for kind in kinds) and killer.kills == len(killer.seen) // every
    found, expected = result_of(tmp_path / "out"), result_of(compared)
    assert found["difference"] == expected["difference"] and found["headline"] == expected["headline"]
    for arm in ("this model", "control"):
        assert found[arm]["sweep"] == expected[arm]["sweep"]
    for folder in ("final", "control/final"):
        ends = [
            AutoModelForCausalLM.from_pretrained(out / folder).state_dict() for out in (tmp_path / "out", compared)
        ]
        assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert not list((tmp_path / "out").glob("seed-*")) and not (tmp_path / "out" / "sweep").exists()


def test_comparison_goes_on_with_its_own_settings_alone(dense, text, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(MoETrainer, "train", killed)
    with pytest.raises(Killed):
        compare(dense, text, tmp_path, "--sweep=0")
    with pytest.raises(MoEError, match="begun with weight_decay="):
        compare(dense, text, tmp_path, "--sweep=0", "--weight_decay=0.5")
    with pytest.raises(MoEError, match="finds its checkpoints by itself"):
        compare(dense, text, tmp_path, "--sweep=0", "--resume_from_checkpoint=somewhere")


def test_run_without_a_control_is_not_taken_for_one_of_a_comparison(dense, text, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(MoEError, match="a run without this comparison"):
        compare(dense, text, tmp_path)


def test_rate_that_diverges_was_tried_and_cannot_win(dense, text, tmp_path, monkeypatch, capsys):
    train = MoETrainer.train

    def diverging(trainer, *args, **kwargs):
        if trainer.args.learning_rate > 1e-3:
            raise NotFiniteError("The loss is nan at step 1.")
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(MoETrainer, "train", diverging)
    monkeypatch.setattr(runs, "MOST_BEYOND", 0)
    result = compare(dense, text, tmp_path, "--sweep=3", "--learning_rate=1e-3", "--max_steps=1")
    assert "It diverged. The loss is nan" in capsys.readouterr().out
    for arm in ("this model", "control"):
        assert result[arm]["sweep"]["0.0032"] is None and result[arm]["learning_rate"] <= 1e-3
    assert "one seed proves nothing" in result["headline"] and "low" not in result["difference"]


def test_control_has_the_rate_that_it_is_given_and_nothing_is_held_back(dense, text, tmp_path):
    result = compare(dense, text, tmp_path, "--control_learning_rate=0", "--max_steps=1")
    control = result["control"]
    assert control["learning_rate"] == 0 and control["sweep"] == {} and result["reported_on"] == "held-out text"
    assert mean_loss(control["before"]) == mean_loss(control["after"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sweep": 3}, "sweep is about a comparison"),
        ({"comparison_seeds": 3}, "comparison_seeds is about a comparison"),
        ({"control_learning_rate": 1e-3}, "control_learning_rate is about a comparison"),
        ({"control": "x", "sweep": 1}, "sweep is 1"),
        ({"control": "x", "sweep": -2}, "sweep is -2"),
        ({"control": "x", "comparison_seeds": 0}, "at least 1"),
        ({"control": "x", "control_learning_rate": -1.0}, "at least 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused(given, message):
    with pytest.raises(MoEError, match=message):
        ComparisonArguments(**given)


def test_sweep_is_the_default_where_the_control_has_no_rate():
    assert ComparisonArguments(control="x").rates_per_arm() == 3
    assert ComparisonArguments(control="x", control_learning_rate=1e-4).rates_per_arm() == 0
    assert ComparisonArguments(control="x", control_learning_rate=1e-4, sweep=2).rates_per_arm() == 2
    assert ComparisonArguments(control="x", sweep=0).rates_per_arm() == 0


def test_run_of_a_sweep_is_a_third_in_all_that_counts_steps(dense, tmp_path):
    args = FinetuneArguments(
        output_dir=str(tmp_path), max_steps=100, warmup_steps=30, learning_rate=1e-3, expert_learning_rate=4e-3,
        lr_scheduler_kwargs={"num_cycles": 1, "num_decay_steps": 30}, data_seed=7, use_cpu=True,
    )  # fmt: skip
    model_args = ModelArguments(model=str(dense), upcycle={"num_experts": 4, "seed": 5})
    loaded, short = our_arm(model_args, args).run(tmp_path / "trial", 2e-3, 1, share=1 / 3)
    assert (short.max_steps, short.warmup_steps, short.lr_scheduler_kwargs["num_decay_steps"]) == (34, 10, 10)
    assert (short.learning_rate, short.expert_learning_rate) == (2e-3, 8e-3)
    assert (short.seed, short.data_seed, loaded.upcycle["seed"]) == (args.seed + 1, 8, 6)
    assert (args.max_steps, args.learning_rate, model_args.upcycle["seed"]) == (100, 1e-3, 5)
    args.max_steps, args.num_train_epochs, args.warmup_steps = -1, 3, 0.1
    short = our_arm(model_args, args).run(tmp_path / "trial", 1e-3, share=1 / 3)[1]
    assert short.num_train_epochs == pytest.approx(1) and short.warmup_steps == 0.1


@pytest.mark.parametrize(
    ("scope", "expected"), [("moe", "moe"), ("experts", "experts"), ("selected", "experts"), ("non_moe", "non_moe")]
)
def test_scope_of_the_control_corresponds(scope, expected, dense, tmp_path):
    selection = {"experts": {"0": [1]}} if scope == "selected" else None
    args = FinetuneArguments(
        output_dir=str(tmp_path), scope=scope, expert_selection=selection, learning_rate=1e-3, expert_learning_rate=2e-3,
        use_cpu=True,
    )  # fmt: skip
    control = control_arm(ModelArguments(model=str(dense)), ComparisonArguments(control=str(dense)), args)
    assert control.training_args.scope == expected and control.training_args.expert_learning_rate is None
    assert control.training_args.learning_rate == (1e-3 if scope == "non_moe" else 2e-3)


def test_halves_of_the_held_out_text_share_no_document(text):
    held_out = split_by_document(load_text(str(text)), 0.5)[1]
    validation, test = validation_and_test(held_out)
    documents = [set(zip(part["domain"], part["document"], strict=True)) for part in (validation, test)]
    assert not documents[0] & documents[1] and len(validation) + len(test) == len(held_out)
    assert {domain for domain, _ in documents[0]} == {domain for domain, _ in documents[1]} == {"letters", "numbers"}
    single = split_by_document(load_text(str(text)), 0.2)[1]
    with pytest.raises(MoEError, match="Raise held_out_share"):
        validation_and_test(single)
    numbers = held_out.filter(lambda row: row["domain"] == "numbers")
    letter = single.filter(lambda row: row["domain"] == "letters")
    validation, test = validation_and_test(concatenate_datasets([numbers, letter]))
    assert set(validation["domain"]) == {"numbers"} and set(test["domain"]) == {"letters", "numbers"}


def test_time_left_is_by_arm_and_share():
    plan = [Run("a", "moe", 1e-3, share=1 / 3), Run("b", "control", 1e-3, share=1 / 3), Run("c", "moe", None)]
    plan.append(Run("d", "control", None))
    assert seconds_left(plan, {}) is None and "known after this run" in progress_line(plan[0], plan, {})
    assert seconds_left(plan, {"a": {"seconds": 10}}) == pytest.approx(10 + 30 + 30)
    finished = {"a": {"seconds": 10}, "b": {"seconds": 5}}
    assert seconds_left(plan, finished) == pytest.approx(30 + 15)
    line = progress_line(plan[2], plan, finished)
    assert line == "Comparison, run 3 of 4: seed 0, moe; about 45 s left."
    assert [duration(s) for s in (12, 600, 7200)] == ["12 s", "10 min", "2.0 h"]


def test_loss_of_an_evaluation_is_over_all_its_tokens():
    assert mean_loss({"eval_loss": 2.0, "eval_a_token_loss": 1.0}) == 2.0
    metrics = {"eval_a_token_loss": 1.0, "eval_a_tokens": 1, "eval_b_token_loss": 4.0, "eval_b_tokens": 2}
    assert mean_loss(metrics) == pytest.approx(3.0)
    assert math.isnan(mean_loss(metrics | {"eval_a_token_loss": None}))
    with pytest.raises(MoEError, match="no loss"):
        mean_loss({"eval_accuracy": 1.0})


def test_what_spoils_a_comparison_is_noted():
    arm = {
        "before": {"eval_loss": 2.0}, "per_seed": [{"eval_loss": 2.5}], "sweep": {"0.1": 1.0, "0.2": 2.0},
        "learning_rate": 0.1, "rate_at_edge": True, "training_tokens": 10, "training_flops": 1e9,
        "active_parameters": 5, "total_parameters": 9,
    }  # fmt: skip
    notes = summary({"this model": arm, "control": arm}, [0], "held-out text")["notes"]
    assert len(notes) == 4 and "lowest of 2" in notes[0] and "worse" in notes[1]


def test_flops_of_a_step_count_the_weights_that_train_and_attention(dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    weights = inspect_model(model).flops_per_token
    attention = 4 * 3 * 10 * 16
    assert forward_flops(model, 10) == weights + attention
    assert training_flops(model, 10) == 3 * (weights + attention)
    moe_hf.apply_scope(model, "moe", mlp_layers=[0, 2])
    assert training_flops(model, 10) == 2 * weights + 2 * (2 * 3 * 16 * 24) + 3 * attention


def test_every_option_of_a_comparison_may_stand_in_a_recipe(dense, text, tmp_path):
    options = {"control": "parent", "control_learning_rate": 1e-3, "sweep": 0, "comparison_seeds": 1}
    assert options.keys() == {f.name for f in fields(ComparisonArguments)}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("".join(f"{name}: {value}\n" for name, value in options.items()) + f"upcycle: {UPCYCLE}\n")
    argv = [f"--model={dense}", f"--dataset={text}", f"--output_dir={tmp_path / 'out'}", *QUICK, "--max_steps=1"]
    run("finetune", f"--config={recipe}", *argv)
    assert result_of(tmp_path / "out")["control"]["learning_rate"] == 1e-3
