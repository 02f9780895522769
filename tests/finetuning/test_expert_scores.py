"""Scores say what the routers did, and selections what the scores say; ESFT's published selections come out."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import moe_hf
from moe_hf import MoEConfig, MoEError, MoEForCausalLM
from moe_hf.cli import app
from moe_hf.data import train_tokenizer
from moe_hf.finetuning import ExpertScores, ExpertSelection, find_moe_blocks, score_experts, select_experts
from tests.tiny_models import random_ids, tiny_config, tiny_dense, tiny_native_moe


ESFT = Path(__file__).resolve().parents[3] / "shared" / "data" / "esft"
TASKS = ("intent", "law", "summary", "translation")


def ours(**fields):
    return moe_hf.upcycle(tiny_dense("llama"), num_experts=4, noise=0.5, seed=1, allow_inexact=True, **fields)


def counted_by_hand(model, batch, keep):
    """Token share and gate score in two loops, from what the experts of each layer are given; (L, E) each."""
    given = {}
    handles = [
        block.experts.register_forward_pre_hook(lambda _, args, name=name: given.__setitem__(name, args[1:3]))
        for name, block in find_moe_blocks(model).items()
    ]
    with torch.no_grad():
        model(**batch)
    [handle.remove() for handle in handles]
    share, gate = (torch.zeros(len(given), 4, dtype=torch.float64) for _ in range(2))
    for layer, (index, weights) in enumerate(given.values()):
        for token, kept in enumerate(keep.flatten().tolist()):
            for expert, weight in zip(index[token].tolist(), weights[token].double().tolist(), strict=True):
                if kept:
                    share[layer, expert] += 1 / (index.shape[1] * int(keep.sum()))
                    gate[layer, expert] += weight / int(keep.sum())
    return share, gate


@pytest.fixture(scope="module")
def padded():
    ids, mask = random_ids(3, 10), torch.ones(3, 10, dtype=torch.long)
    mask[1, 6:] = 0
    labels = ids.masked_fill(torch.arange(10) < 4, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", ["ours", "mixtral", "qwen3_moe", "glm4_moe", "gpt_oss"])
def test_scores_are_those_of_a_count_token_by_token(family, padded):
    model = ours() if family == "ours" else tiny_native_moe(family)
    share, gate = counted_by_hand(model, {k: v for k, v in padded.items() if k != "labels"}, padded["attention_mask"])
    model.train()
    scores = score_experts(model, [padded])
    assert model.training
    torch.testing.assert_close(scores.token_share, share, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores.gate_score, gate, rtol=1e-6, atol=1e-7)
    assert scores.num_tokens == 26 and scores.layers == tuple(find_moe_blocks(model))


def test_labels_choose_the_tokens_whose_successor_is_scored(padded):
    model = tiny_native_moe()
    batch = {name: padded[name] for name in ("input_ids", "attention_mask")}
    keep = torch.zeros(3, 10, dtype=torch.bool)
    keep[:, 3:9] = True
    keep &= padded["attention_mask"].bool()
    share, _ = counted_by_hand(model, batch, keep)
    scores = score_experts(model, [padded], count="labels")
    torch.testing.assert_close(scores.token_share, share, rtol=1e-12, atol=1e-12)
    assert scores.num_tokens == int(keep.sum())
    with pytest.raises(MoEError, match="needs labels"):
        score_experts(model, [batch], count="labels")


def test_scores_do_not_depend_on_batches_and_packed_rows_score_as_their_documents():
    model, ids = tiny_native_moe("qwen3_moe"), random_ids(4, 8)
    whole = score_experts(model, [{"input_ids": ids}])
    rows = score_experts(model, ({"input_ids": row} for row in ids))
    packed = {"input_ids": ids.view(2, 16), "position_ids": torch.arange(8).repeat(2, 2)}
    packed = score_experts(model, [packed])
    for other in (rows, packed):
        assert torch.equal(other.token_share, whole.token_share)
        torch.testing.assert_close(other.gate_score, whole.gate_score, rtol=1e-5, atol=1e-7)
    assert score_experts(model, ({"input_ids": row} for row in ids), max_tokens=16).num_tokens == 16


@pytest.mark.parametrize(
    "fields",
    [
        {"router_type": "top_p"},
        {"capacity_factor": 0.5, "eval_capacity_factor": 0.5},
        {"num_moe_heads": 2},
        {"extra_experts": ["zero"]},
        {"num_experts_per_layer": [2, 4, 3]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_our_other_routers_are_scored_too(fields, padded):
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), num_experts=4, **fields)).eval()
    scores = score_experts(model, [padded])
    torch.testing.assert_close(scores.token_share.sum(-1), torch.ones(3, dtype=torch.float64))
    unpadded = [
        {"input_ids": row[keep.bool()]}
        for row, keep in zip(padded["input_ids"], padded["attention_mask"], strict=True)
    ]
    if "capacity_factor" not in fields:  # whose limits depend on the batch
        assert torch.equal(scores.token_share, score_experts(model, unpadded).token_share)
    assert scores.num_experts == tuple(fields.get("num_experts_per_layer", [4, 4, 4]))


@pytest.mark.parametrize("task", TASKS)
def test_esft_selections_come_out_of_their_scores(task, tmp_path):
    if not ESFT.is_dir():
        pytest.skip(f"the published scores of ESFT are not in {ESFT}")
    scores = ExpertScores.load(ESFT / f"scores_{task}.json")
    published = json.loads((ESFT / f"experts_{task}.json").read_text())
    selection = select_experts(scores, top_p=0.2)
    assert selection.to_dict() == published
    assert ExpertSelection.load(ESFT / f"experts_{task}.json") == selection
    scores.save(tmp_path / "scores.json")
    assert select_experts(ExpertScores.load(tmp_path / "scores.json"), top_p=0.2) == selection


TABLE = ExpertScores(
    ("a", "b"),
    torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.5, 0.0]], dtype=torch.float64),
    torch.tensor([[0.0, 0.2, 0.2], [2.0, 1.0, 0.0]], dtype=torch.float64),
    (3, 2),
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"top_p": 0.5}, {"a": (1,), "b": (0,)}),
        ({"top_p": 0.6}, {"a": (1,), "b": (0, 1)}),
        ({"top_p": 0.9}, {"a": (1, 2), "b": (0, 1)}),
        ({"top_p": 1.0}, {"a": (1, 2, 0), "b": (0, 1)}),
        ({"top_p": 0.6, "by": "gate_score"}, {"a": (1, 2), "b": (0,)}),
        ({"budget": 3}, {"a": (1,), "b": (0, 1)}),
        ({"budget": 1}, {"a": (1,), "b": ()}),
        ({"budget": 5}, {"a": (1, 2, 0), "b": (0, 1)}),
    ],
    ids=str,
)
def test_top_p_and_budget_choose_what_a_hand_would(arguments, expected):
    assert select_experts(TABLE, **arguments).experts == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of the two"),
        ({"top_p": 0.2, "budget": 2}, "one of the two"),
        ({"top_p": 0.0}, r"\(0, 1\]"),
        ({"budget": 6}, r"\[1, 5\]"),
        ({"top_p": 0.2, "by": "tokens"}, "token_share or gate_score"),
    ],
)
def test_bad_choices_are_refused(arguments, message):
    with pytest.raises(MoEError, match=message):
        select_experts(TABLE, **arguments)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"0": [4]}, "names expert 4"),
        ({"7": [0]}, "names the layer '7'"),
        ({"0": [1, 1]}, "different ids"),
        ({"0": "1"}, "different ids"),
        ({"0": []}, "names no expert"),
        ({"0": [1], "model.layers.0.mlp": [2]}, "twice"),
        ({"experts": {"0": [1]}, "router": True}, "'router' is unknown"),
        ({"experts": {"0": [1]}, "shared_experts": 1}, "true or false"),
    ],
    ids=str,
)
def test_selections_that_do_not_fit_are_refused(selection, message):
    with pytest.raises(MoEError, match=message):
        ExpertSelection.load(selection).resolve(tiny_native_moe())


def test_files_of_scores_and_selections_come_back_and_others_are_refused(tmp_path):
    model = tiny_native_moe()
    scores = score_experts(model, [{"input_ids": random_ids()}])
    scores.save(tmp_path / "scores.json")
    again = ExpertScores.load(tmp_path / "scores.json")
    assert torch.equal(again.token_share, scores.token_share) and torch.equal(again.gate_score, scores.gate_score)
    assert (again.layers, again.num_experts, again.num_tokens) == (scores.layers, scores.num_experts, 64)
    selection = select_experts(scores, budget=3, shared_experts=True)
    selection.save(tmp_path / "selection.json")
    assert ExpertSelection.load(tmp_path / "selection.json") == selection
    assert ExpertSelection.load((tmp_path / "selection.json").read_text()) == selection
    with pytest.raises(MoEError, match="no JSON"):
        ExpertSelection.load("{0: [1]")
    (tmp_path / "list.json").write_text("[1]")
    for read in (ExpertScores.load, ExpertSelection.load):
        with pytest.raises(MoEError, match="object is expected"):
            read(tmp_path / "list.json")
        with pytest.raises(MoEError, match="cannot be read"):
            read(tmp_path / "absent.json")
    with pytest.raises(MoEError, match="no expert scores"):
        ExpertScores.load(tmp_path / "selection.json")


def test_models_without_experts_and_data_without_tokens_are_refused():
    with pytest.raises(MoEError, match="no MoE block"):
        score_experts(tiny_dense("llama"), [])
    with pytest.raises(MoEError, match="No token"):
        score_experts(tiny_native_moe(), [])


def test_commands_score_and_select(tmp_path):
    from datasets import Dataset

    text = ["one two three four"] * 40
    tokenizer = train_tokenizer(Dataset.from_dict({"text": text}), vocab_size=257 + 8)
    tiny_native_moe(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    (tmp_path / "text.txt").write_text("\n".join(text))

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    scoring = ("score-experts", tmp_path / "moe", "--data", tmp_path / "text.txt", "--block-size", 16)
    done = run(*scoring, "--max-tokens", 50, "--output", tmp_path / "scores.json")
    assert done.exit_code == 0, done.output
    scores = ExpertScores.load(tmp_path / "scores.json")
    assert len(scores.layers) == 3 and scores.num_tokens == 50 and scores.model == str(tmp_path / "moe")
    printed = run("select-experts", tmp_path / "scores.json", "--top-p", 0.3)
    assert json.loads(printed.output) == select_experts(scores, top_p=0.3).to_dict()
    written = run("select-experts", tmp_path / "scores.json", "--budget", 2, "--output", tmp_path / "selection.json")
    assert "2 of 12 experts" in written.output
    assert ExpertSelection.load(tmp_path / "selection.json").num_experts == 2
    again = run("select-experts", tmp_path / "scores.json", "--budget", 2, "--output", tmp_path / "selection.json")
    assert again.exit_code == 2 and "exists" in again.stderr
