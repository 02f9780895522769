"""The load of the routers in the logs: what it says, that trackers get it, for whom, and that nothing else changes."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer

import moe_hf
from benchmarks import telemetry as telemetry_benchmark
from moe_hf.finetuning.router_watch import RouterWatch, layer_label
from moe_hf.trainer.telemetry import LoadCounts
from tests.tiny_models import random_ids
from tests.trainer.multiplier import HAS_TRL, trainer_of
from tests.trainer.runs import arguments, rows, tiny_moe


BRIEF = {
    "max_violation",
    "entropy",
    "dropped_share",
    "dead_experts",
    "max_violation_worst",
    "worst_layer",
}


def logged(trainer: Trainer) -> list[dict[str, float]]:
    """What is logged of the routers, by training log."""
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{k.removeprefix("routing/"): v for k, v in entry.items() if k.startswith("routing/")} for entry in history]


@pytest.mark.parametrize("kind", ["ours", "mixtral"])
def test_figures_are_those_of_a_naive_count_of_real_tokens(kind):
    model = tiny_moe(kind).train()
    counts, seen = LoadCounts(), []

    def add(watch: RouterWatch, outputs: object) -> None:
        counts.add(watch.decisions, watch.scoring_func)
        seen.append(list(watch.decisions))

    watch = RouterWatch(model, add)
    ids = random_ids(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    model(ids, attention_mask=mask)
    model(ids[:1])
    with torch.no_grad():
        model(ids)
    model.eval()(ids)
    assert len(seen) == 2, "evaluation and passes without gradients are not counted"
    watch.remove()
    real = [mask.flatten().bool(), torch.ones(10, dtype=torch.bool)]
    loads = counts.take()
    assert [layer_label(name) for name in loads] == ["0", "1", "2"]
    for layer, load in enumerate(loads.values()):
        chosen, entropies = [], []
        for decisions, is_real in zip(seen, real, strict=True):
            for token in is_real.nonzero()[:, 0].tolist():
                chosen += decisions[layer].routing.top_k_index[token].tolist()
                p = decisions[layer].router_logits[token].detach().double().softmax(-1)
                entropies.append(-float((p * p.log()).sum()))
        expected = [chosen.count(expert) * 4 / len(chosen) for expert in range(4)]
        assert len(chosen) == 24 * 2
        assert load.load.tolist() == pytest.approx(expected)
        assert load.max_violation == pytest.approx(max(expected) - 1)
        assert load.entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
        assert load.dead_experts == expected.count(0.0) and load.dropped_share == 0.0
    assert counts.take() == {}, "counting starts anew"


def test_collapse_and_drops_are_seen(tmp_path):
    model = tiny_moe(capacity_factor=0.5, min_expert_capacity=1, router_aux_loss_coef=0.0)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()  # equal logits: every token takes the first two experts
    trainer = moe_hf.MoETrainer(model, arguments(tmp_path, max_steps=1, scope="experts"), train_dataset=rows(4))
    trainer.train()
    (figures,) = logged(trainer)
    assert figures["worst_layer"] == 1 and figures["max_violation_worst"] == pytest.approx(1.0)
    assert figures["dead_experts"] >= 2 and figures["dropped_share"] > 0.3
    assert figures["max_violation"] < figures["max_violation_worst"]


def test_details_name_each_layer_and_expert(tmp_path):
    args = arguments(tmp_path, max_steps=1, routing_telemetry="detailed")
    trainer = moe_hf.MoETrainer(tiny_moe(), args, train_dataset=rows(4))
    trainer.train()
    (figures,) = logged(trainer)
    loads = [figures[f"layer_2/load/{expert}"] for expert in range(4)]
    assert sum(loads) == pytest.approx(4.0) and max(loads) - 1 == pytest.approx(figures["layer_2/max_violation"])
    assert figures["entropy"] == pytest.approx(sum(figures[f"layer_{i}/entropy"] for i in range(3)) / 3)
    assert 0 < figures["layer_0/entropy"] <= math.log(4)
    assert set(figures) > BRIEF


def test_brief_is_the_default_and_off_is_nothing(tmp_path):
    for telemetry, expected in ((None, BRIEF), ("off", set())):
        fields = {} if telemetry is None else {"routing_telemetry": telemetry}
        trainer = moe_hf.MoETrainer(tiny_moe(), arguments(tmp_path, max_steps=2, **fields), train_dataset=rows(8))
        trainer.train()
        assert [set(figures) for figures in logged(trainer)] == [expected, expected]
    with pytest.raises(moe_hf.MoEError, match="routing_telemetry"):
        arguments(tmp_path, routing_telemetry="loud")


def test_telemetry_changes_no_weight(tmp_path):
    weights = []
    for telemetry in ("off", "detailed"):
        model = tiny_moe("mixtral")
        moe_hf.MoETrainer(model, arguments(tmp_path, routing_telemetry=telemetry), train_dataset=rows(16)).train()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", ["trainer", "sft_trainer"])
def test_a_plain_callback_reaches_the_trackers(way, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model = tiny_moe("mixtral")
    if way == "trainer":
        args = arguments(tmp_path, max_steps=1, report_to="tensorboard")
        callback = moe_hf.RoutingTelemetryCallback()
        trainer = Trainer(model, args, train_dataset=rows(4), callbacks=[callback])
    else:
        if not HAS_TRL:
            pytest.skip("trl is not installed")
        trainer = trainer_of(way, model, tmp_path, accumulation=2, rows=2)
        trainer.add_callback(moe_hf.RoutingTelemetryCallback())
    trainer.train()
    (figures,) = logged(trainer)
    assert set(figures) == BRIEF
    if way == "trainer":
        board = EventAccumulator(str(tmp_path / "board"))
        board.Reload()
        for name, value in figures.items():
            assert board.Scalars(f"train/routing/{name}")[0].value == pytest.approx(value, rel=1e-6)


def test_the_worst_layer_is_named_by_its_number():
    assert layer_label("model.layers.12.mlp") == "12" and layer_label("block") == "block"


def test_its_cost_is_measured(capsys):
    telemetry_benchmark.main(["--rounds", "1", "--tokens", "256"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ours", "mixtral"] and all("tokens: step" in line for line in lines)
