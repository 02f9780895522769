"""The rate of a run that names none: measured for what trains and for the model's size, said, and nobody else's."""

import dataclasses
import json
import re
import warnings
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from moe_hf import MoETrainer, MoETrainingArguments, apply_scope
from moe_hf.finetuning import SCOPES
from moe_hf.trainer import learning_rates
from moe_hf.trainer.arguments import FinetuneArguments, MoEArgumentParser
from moe_hf.trainer.learning_rates import MEASURED, PARTS, active_parameters, default_learning_rate, trained_part
from tests.tiny_models import tiny_dense
from tests.trainer.runs import arguments, rows, tiny_moe


SMALL = MEASURED[0].rates
DOCUMENT = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.mark.parametrize("scope", ["moe", "router", "all", "expert_lora", "attention"])
def test_a_run_without_a_rate_gets_the_one_of_its_scope_and_says_so(scope, tmp_path, capsys):
    args = arguments(tmp_path, scope=scope, learning_rate=None, max_steps=1, lr_scheduler_type="constant")
    trainer = MoETrainer(tiny_moe(), args, train_dataset=rows(4))
    trainer.train()
    rate = SMALL[PARTS[scope]]
    assert trainer.state.log_history[0]["learning_rate"] == trainer.args.learning_rate == rate
    assert f"learning rate {rate:g}: measured for" in capsys.readouterr().out
    assert args.learning_rate is None, "the next run with these arguments may have another model"


def test_a_rate_that_is_named_wins_and_nothing_is_said(tmp_path, capsys):
    for named in (5e-5, 0.25):
        trainer = MoETrainer(tiny_moe(), arguments(tmp_path, scope="moe", learning_rate=named), train_dataset=rows(4))
        trainer.train()
        assert trainer.args.learning_rate == named and trainer.default_rate is None
    assert "measured" not in capsys.readouterr().out


def test_the_rate_follows_what_trains_where_no_scope_is_named():
    moe = tiny_moe()
    for scope, part in (
        ("router", "router"),
        ("experts", "experts"),
        ("moe", "moe"),
        ("non_moe", "all"),
        ("all", "all"),
    ):
        apply_scope(moe, scope)
        assert trained_part(moe) == part
    dense = tiny_dense("llama")
    apply_scope(dense, "ffn")
    assert trained_part(dense) == "ffn"


def test_adapters_of_peft_have_the_rate_of_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads what transformers deprecates
        model = peft.get_peft_model(tiny_dense("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert MoETrainer(model, arguments(tmp_path, learning_rate=None)).args.learning_rate == SMALL["expert_lora"]


def test_every_scope_has_a_rate_at_every_size_and_larger_models_have_no_higher_ones():
    assert set(PARTS) == set(SCOPES) | {"expert_lora"}
    assert [row.below for row in MEASURED] == sorted(row.below for row in MEASURED)
    assert MEASURED[-1].below == float("inf")
    for smaller, larger in zip(MEASURED, MEASURED[1:], strict=False):
        assert max(smaller.sizes) < smaller.below < min(larger.sizes)
        assert all(larger.rates[part] <= smaller.rates[part] for part in set(PARTS.values()))
        for part in larger.derived:
            ratio = smaller.rates[part] / smaller.rates["moe"]
            assert larger.rates[part] == pytest.approx(ratio * larger.rates["moe"], rel=0.12)


def test_experts_that_a_token_does_not_use_do_not_count():
    dense = sum(p.numel() for p in tiny_dense("llama").parameters())
    assert active_parameters(tiny_dense("llama")) == dense
    for experts in (4, 8):
        moe = tiny_moe(num_experts_per_tok=2) if experts == 4 else tiny_moe("mixtral", num_local_experts=8)
        assert active_parameters(moe) < sum(p.numel() for p in moe.parameters())


def test_a_model_beyond_what_was_measured_is_told_so(monkeypatch):
    monkeypatch.setattr(learning_rates, "active_parameters", lambda model: 7e9)
    found = default_learning_rate(tiny_moe(), "moe")
    assert found.rate == MEASURED[-1].rates["moe"] and "not measured" in str(found)
    assert "derived from scope moe" in str(default_learning_rate(tiny_moe(), "all"))
    tenth = default_learning_rate(tiny_moe(), "moe", 0.1)
    assert tenth.rate == pytest.approx(found.rate / 10) and "0.1 of what was measured" in str(tenth)


def test_unset_stays_unset_through_json_parsers_and_recipes(tmp_path):
    args = MoETrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert json.loads(args.to_json_string())["learning_rate"] is None
    assert (
        MoETrainingArguments(**{"output_dir": "x", "learning_rate": args.to_dict()["learning_rate"]}).learning_rate
        is None
    )
    for parse in (
        HfArgumentParser(FinetuneArguments).parse_args_into_dataclasses,
        MoEArgumentParser([FinetuneArguments]).parse,
    ):
        assert parse(["--output_dir", "x"])[0].learning_rate is None
        assert parse(["--output_dir", "x", "--learning_rate", "2e-4"])[0].learning_rate == 2e-4
    (tmp_path / "recipe.yaml").write_text("learning_rate: null\n")
    parser = MoEArgumentParser([FinetuneArguments])
    assert parser.parse(["--output_dir", "x", "--config", str(tmp_path / "recipe.yaml")])[0].learning_rate is None


def test_arguments_for_trl_leave_the_rate_unset_and_preferences_take_a_tenth(tmp_path):
    pytest.importorskip("trl")
    from moe_hf.trainer.trl_trainers import MoEDPOConfig, MoEDPOTrainer, MoESFTConfig

    for kind in (MoESFTConfig, MoEDPOConfig):
        args = kind(output_dir=str(tmp_path), use_cpu=True, bf16=False)
        assert args.learning_rate is None and args.to_dict()["learning_rate"] is None
        assert dataclasses.replace(args, learning_rate=1e-3).learning_rate == 1e-3
    assert MoEDPOTrainer.default_rate_share == 0.1


def test_a_resumed_run_goes_on_at_the_rates_of_one_that_was_not_stopped(tmp_path):
    fields = {"scope": "moe", "learning_rate": None, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def rates(folder, **more):
        trainer = MoETrainer(tiny_moe(), arguments(folder, **fields, **more), train_dataset=rows())
        trainer.train()
        return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]

    whole = rates(tmp_path / "run")
    for checkpoint in (tmp_path / "run").glob("checkpoint-4"):
        checkpoint.rename(tmp_path / "last")
    assert rates(tmp_path / "run", resume_from_checkpoint=True) == whole


def test_the_documented_rates_are_the_ones_that_are_used():
    table = re.search(r"\| what trains \|.*?\n\n", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL).group().strip()
    for line in table.splitlines()[2:]:
        names, *rates = [cell.strip() for cell in line.strip("|").split("|")]
        for part in re.findall(r"`(\w+)`", names):
            assert [float(rate) for rate in rates] == [row.rates[part] for row in MEASURED], part
    documented = set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines()[2:])))
    assert documented == set(PARTS.values())
