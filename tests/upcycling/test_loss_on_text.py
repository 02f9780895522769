"""The loss before and after: it is the model's own, on disk as in memory, recorded, and a model that is ruined is told."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_hf import (
    MoEError,
    add_experts,
    drop_layers,
    grow_experts,
    replace_experts,
    upcycle,
    upcycle_checkpoint,
    verify,
)
from moe_hf.data import builtin_prose, train_tokenizer
from moe_hf.reporting.card import model_card
from moe_hf.upcycling import VerificationResult, verification
from moe_hf.upcycling.initialisers import Drop, Split
from moe_hf.upcycling.sample_text import BUILTIN_PROSE, GIVEN_IDS, sample_text
from tests.tiny_models import random_ids, tiny_dense


pytestmark = pytest.mark.numerics


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model that knows the prose, and its tokenizer; loss far below that of a uniform guess."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = train_tokenizer(builtin_prose().select(range(8)), 300)
    model = tiny_dense("llama", vocab_size=len(tokenizer), max_position_embeddings=64).train()
    ids = sample_text(model.config, lambda: tokenizer).input_ids
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def own_loss(model, ids):
    return float(model.eval()(input_ids=ids, labels=ids, use_cache=False).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_losses_are_those_of_transformers_however_many_rows_a_pass_takes(dtype, rows, monkeypatch):
    dense, ids = tiny_dense("gemma2").to(dtype), random_ids(4, 30)
    monkeypatch.setattr(verification, "LOGITS_PER_PASS", rows * 30 * 113)
    moe = upcycle(dense, num_experts=4, noise=0.3)
    result = verify(dense, moe, ids)
    # Casting a model rounds its rotary frequencies, which are computed anew for the comparison.
    allowed = 1e-4 if dtype == torch.float32 else 2e-3
    assert result.loss_before == pytest.approx(own_loss(dense.float(), ids), abs=allowed)
    assert result.loss_after == pytest.approx(own_loss(moe.float(), ids), abs=allowed)
    assert result.loss_before != result.loss_after
    assert (result.text, result.text_tokens) == (GIVEN_IDS, 4 * 29)
    assert result.uniform_loss == pytest.approx(torch.tensor(113.0).log().item())


def test_folders_and_models_have_the_same_losses_and_both_ways_of_upcycling_record_them(trained, tmp_path):
    moe = upcycle(trained, num_experts=4, noise=0.5)
    upcycle_checkpoint(trained, tmp_path / "moe", num_experts=4, noise=0.5)
    recorded = json.loads((tmp_path / "moe/config.json").read_text())["upcycling"]
    assert recorded["verification"] == moe.config.upcycling["verification"]
    assert recorded["verification"]["text"] == BUILTIN_PROSE and recorded["routing"]["can_tell_unreached"]
    on_disk, in_memory = verify(trained, tmp_path / "moe"), verify(load(trained), moe)
    assert on_disk == in_memory and on_disk.to_dict() == recorded["verification"]
    assert on_disk.loss_before < on_disk.loss_after
    assert f"the dense model {on_disk.loss_before:.3f}" in model_card(moe).text


def test_the_users_text_is_measured_where_it_is_given(trained, tmp_path):
    (tmp_path / "mine.txt").write_text("zzz qqq " * 40)
    first, mine = (
        upcycle(trained, num_experts=2, data=data).config.upcycling["verification"]
        for data in (None, tmp_path / "mine.txt")
    )
    assert mine["text"] == "mine.txt" and mine["loss_before"] > first["loss_before"] + 1
    assert verify(trained, trained, data=tmp_path / "mine.txt").loss_after == mine["loss_before"]
    with pytest.raises(MoEError, match="No file or folder"):
        upcycle_checkpoint(trained, tmp_path / "out", num_experts=2, data=tmp_path / "none.txt")
    with pytest.raises(MoEError, match="verify=False leaves that out"):
        upcycle_checkpoint(trained, tmp_path / "out", num_experts=2, data=tmp_path / "mine.txt", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt"]


def test_text_that_is_measured_on_changes_no_weight(trained, tmp_path):
    (tmp_path / "mine.txt").write_text("zzz qqq " * 40)
    fields = {"num_experts": 4, "num_experts_per_tok": 1, "allow_inexact": True}
    states = [upcycle(trained, data=data, **fields) for data in (None, tmp_path / "mine.txt")]
    assert states[0].config.upcycling["expected_weight_text"] == BUILTIN_PROSE
    first, second = (model.state_dict() for model in states)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_text_no_loss_is_invented(tmp_path):
    dense = tiny_dense("llama")
    result = verify(dense, upcycle(dense, num_experts=2))
    assert result.loss_before is None is result.loss_after and result.text is None and result.text_tokens == 0
    assert result.loss_warning is None and "not measured" in result.loss_text
    single = verify(dense, upcycle(dense, num_experts=2), random_ids(3, 1))
    assert single.loss_before is None and single.num_tokens == 2 * 64 + 3


def result(before, after, uniform=10.8):
    return VerificationResult(0.5, 1.0, 0.0, 9, None, before, after, uniform, "prose", 1020)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (2.92, 12.7, "rose from 2.92 to 12.70 nats/token, worse than a uniform guess over all tokens, 10.80"),
        (2.92, 8.6, "72% of the way to a uniform guess"),
        (2.92, 3.5, "7% of the way"),
        (10.6, 10.75, "75% of the way"),
        (11.0, 11.6, "worse than a uniform guess"),
    ],
)
def test_a_loss_that_rose_far_is_told_with_what_it_means(before, after, words):
    assert words in result(before, after).loss_warning


@pytest.mark.parametrize(("before", "after"), [(2.92, 2.92), (2.92, 3.4), (2.92, 2.5), (10.75, 10.79), (11.0, 11.05)])
def test_a_loss_that_is_as_it_was_is_no_reason_to_warn(before, after):
    assert result(before, after).loss_warning is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init": Drop(ratio=0.9)}, "draws 90% of all neurons anew: Drop-Upcycling trained up to 500 B tokens"),
        ({"init": "split"}, "lets a token use 2 of the 4 parts of each MLP"),
        ({"noise": 1.5}, "noise=1.5 hides the weights"),
        (
            {"num_experts_per_tok": 1, "routed_scaling_factor": 1.0, "allow_inexact": True, "noise": 1.5},
            "do not give weights that sum to 1",
        ),
    ],
    ids=["drop", "split", "noise", "K = 1"],
)
def test_an_initialiser_that_ruins_a_model_says_so_and_what_to_do(trained, caplog, fields, words):
    moe = upcycle(trained, num_experts=4, **fields)
    (message,) = (m for m in moe.config.upcycling["warnings"] if m.startswith("The loss on text rose"))
    assert words in message and caplog.text.count("The loss on text rose") == 1


def test_a_start_that_keeps_the_model_warns_of_nothing(trained, caplog):
    for init in ("copy", "permute", "granular", Drop(ratio=0.0)):
        assert "warnings" not in upcycle(trained, num_experts=4, init=init).config.upcycling
    assert upcycle(trained, num_experts=2, init=Split(), num_experts_per_tok=2).config.upcycling["verification"]
    assert "rose" not in upcycle(trained, num_experts=4).config.upcycling.get("warnings", [""])[0]


def test_surgery_measures_both_models_on_text(trained, caplog):
    moe = upcycle(trained, num_experts=4)
    grown = grow_experts(moe, inputs=random_ids(2, 40))
    check = grown.config.upcycling["surgery"][-1]["verification"]
    assert check["loss_before"] == pytest.approx(check["loss_after"], abs=2e-4) and check["text"] == GIVEN_IDS
    tokenizer = AutoTokenizer.from_pretrained(trained)
    worse = replace_experts(moe, dict.fromkeys(range(4), tiny_dense("llama", 7, vocab_size=300)), tokenizer=tokenizer)
    check = worse.config.upcycling["surgery"][-1]["verification"]
    assert check["loss_after"] > check["loss_before"] + 0.5 and "replace_experts: The loss on text rose" in caplog.text
    assert f"replace_experts (loss on text {check['loss_before']:.3f} before" in model_card(worse).text
    for made in (add_experts(moe, [0], tokenizer=tokenizer), drop_layers(moe, [1], tokenizer=tokenizer)):
        assert made.config.upcycling["surgery"][-1]["verification"]["text"] == BUILTIN_PROSE
