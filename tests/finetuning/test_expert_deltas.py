"""Deltas carry what trained and nothing else, and go onto the model that they belong to, or are refused."""

import copy

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moe_hf import MoEError
from moe_hf.cli import app
from moe_hf.finetuning import apply_scope, load_expert_deltas, save_expert_deltas
from tests.finetuning.test_selected import CHOICE, choice, selected, step, tiny
from tests.tiny_models import random_ids, tiny_native_moe


def trained(base, selection=CHOICE, **arguments):
    """A copy of `base` whose chosen experts, and what else the selection names, made two steps."""
    model = copy.deepcopy(base)
    apply_scope(model, "selected", expert_selection=selection, **arguments)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(2):
        step(model, random_ids(seed=seed))
        optimizer.step()
    return model


def equal(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind", ["ours", "ours plain biased", "mixtral", "glm4_moe", "gpt_oss"])
def test_deltas_on_the_base_give_the_trained_model_and_hold_its_experts_only(kind, tmp_path):
    base = tiny(kind)
    model = trained(base, choice(base))
    path = save_expert_deltas(model, tmp_path / "deltas.safetensors")
    merged = copy.deepcopy(base)
    deltas = load_expert_deltas(merged, path)
    assert equal(merged, model) and not equal(base, model)
    assert deltas.experts == {name: tuple(sorted(ids)) for name, ids in choice(base).items()}
    own = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    buffers = sum(b.nbytes for name, b in model.named_buffers() if name in model.state_dict())
    header = 4096
    assert own <= path.stat().st_size <= own + buffers + header
    # Once more, onto what they made.
    load_expert_deltas(merged, path)
    assert equal(merged, model)


def test_other_trained_parts_and_buffers_travel_along(tmp_path):
    base = tiny("glm4_moe")
    model = trained(base, {"experts": CHOICE, "shared_experts": True, "non_expert_modules": True})
    model.model.layers[1].mlp.gate.e_score_correction_bias.add_(0.5)
    path = save_expert_deltas(model, tmp_path / "deltas.safetensors")
    merged = copy.deepcopy(base)
    load_expert_deltas(merged, path)
    assert equal(merged, model)


def test_float32_masters_come_back_bit_by_bit_and_round_when_merged(tmp_path):
    base = tiny("mixtral").to(torch.bfloat16)
    model = trained(base)
    path = save_expert_deltas(model, tmp_path / "deltas.safetensors")
    again = selected(base)
    load_expert_deltas(again, path)
    for (name, expected), (_, actual) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(actual, expected) and actual.dtype == expected.dtype, name
    merged = copy.deepcopy(base)
    load_expert_deltas(merged, path)
    assert merged.dtype == torch.bfloat16 and equal(merged, model)
    small = save_expert_deltas(model, tmp_path / "small.safetensors", dtype=torch.bfloat16)
    assert small.stat().st_size < 0.6 * path.stat().st_size
    from_small = copy.deepcopy(base)
    load_expert_deltas(from_small, small)
    assert equal(from_small, merged)
    # The base in float32 has the same values.
    load_expert_deltas(copy.deepcopy(base).float(), path)


def test_files_name_their_base(tmp_path):
    tiny("mixtral").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.config._commit_hash = "abc"
    path = save_expert_deltas(trained(base), tmp_path / "deltas.safetensors")
    deltas = load_expert_deltas(base, path)
    assert (deltas.base_model, deltas.base_revision) == (str(tmp_path / "base"), "abc")
    assert len(deltas.base_fingerprint) == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.model.layers[1].mlp.experts.down_proj.data[2].mul_(1.01),
        lambda m: m.model.layers[0].mlp.experts.gate_up_proj.data[3].mul_(1.01),
        lambda m: m.model.layers[0].mlp.gate.weight.data.mul_(1.01),
        lambda m: m.model.embed_tokens.weight.data.add_(1e-3),
        lambda m: m.to(torch.bfloat16).float(),
    ],
    ids=["expert of another layer", "other expert", "router", "embedding", "rounded"],
)
def test_another_base_is_refused_and_unchanged(change, tmp_path):
    base = tiny("mixtral")
    path = save_expert_deltas(trained(base), tmp_path / "deltas.safetensors")
    change(base)
    before = copy.deepcopy(base)
    with pytest.raises(MoEError, match="another model"):
        load_expert_deltas(base, path)
    assert equal(base, before)


def test_a_chosen_expert_that_differs_in_the_base_does_not_matter(tmp_path):
    base = tiny("mixtral")
    model = trained(base)
    path = save_expert_deltas(model, tmp_path / "deltas.safetensors")
    base.model.layers[0].mlp.experts.down_proj.data[1].zero_()
    load_expert_deltas(base, path)
    assert equal(base, model)


def test_what_is_no_file_of_deltas_or_does_not_fit_is_refused(tmp_path):
    base = tiny("mixtral")
    with pytest.raises(MoEError, match="were chosen"):
        save_expert_deltas(base, tmp_path / "deltas.safetensors")
    path = save_expert_deltas(trained(base), tmp_path / "deltas.safetensors")
    other = copy.deepcopy(base)
    apply_scope(other, "selected", expert_selection={"0": [2]})
    with pytest.raises(MoEError, match="other experts"):
        load_expert_deltas(other, path)
    fewer_experts = tiny_native_moe("mixtral", num_experts=2, num_local_experts=2)
    for model in (tiny("qwen3_moe"), tiny_native_moe("mixtral", num_hidden_layers=2), fewer_experts):
        with pytest.raises(MoEError, match="no place|another model"):
            load_expert_deltas(model, path)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    base.save_pretrained(tmp_path / "plain")
    for wrong in (tmp_path / "cut.safetensors", tmp_path / "absent", tmp_path / "plain" / "model.safetensors"):
        with pytest.raises(MoEError, match="expert deltas"):
            load_expert_deltas(base, wrong)


def test_command_merges(tmp_path):
    base = tiny("ours")
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = trained(base)
    save_expert_deltas(model, tmp_path / "deltas.safetensors")
    with safe_open(tmp_path / "deltas.safetensors", "pt") as file:
        assert file.metadata()["format"] == "moe_hf.expert_deltas"

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in ("merge-deltas", *arguments)])

    done = run(tmp_path / "base", tmp_path / "deltas.safetensors", tmp_path / "merged")
    assert done.exit_code == 0 and "3 trained experts in 2 layers" in " ".join(done.output.split())
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), model)
    tiny("mixtral").save_pretrained(tmp_path / "other")
    refused = run(tmp_path / "other", tmp_path / "deltas.safetensors", tmp_path / "wrong")
    assert refused.exit_code == 2 and not (tmp_path / "wrong").exists()
