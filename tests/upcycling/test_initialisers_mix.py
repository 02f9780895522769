"""Experts from several checkpoints: who gives what, what is averaged, and which sources do not fit."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from moe_hf import MoEError, upcycle
from moe_hf.upcycling.initialisers import Mix
from moe_hf.upcycling.initialisers.mix import average
from moe_hf.upcycling.method import UpcyclingMethod
from tests.tiny_models import random_ids, tiny_dense


def family(name="llama", count=3, **overrides):
    return [tiny_dense(name, seed=seed, **overrides) for seed in range(count)]


def down(model, layer=1):
    return model.model.layers[layer].mlp.down_proj.weight


@pytest.mark.parametrize("rest", ["average", "base"])
def test_experts_come_in_turn_and_the_rest_is_averaged_or_the_bases(rest):
    dense = family()
    moe = upcycle(dense[0], init=Mix(sources=dense[1:], rest=rest), num_experts=5)
    experts = moe.model.layers[1].mlp.experts
    assert moe.config.upcycling["init"]["options"]["assignment"] == [0, 1, 2, 0, 1]
    assert all(torch.equal(experts.down_proj[e], down(dense[e % 3])) for e in range(5))
    gates = torch.stack([one.model.layers[1].mlp.gate_proj.weight for one in dense])
    assert torch.equal(experts.gate_up_proj[4, :88], gates[1])
    expected, weights = moe.state_dict(), [one.state_dict() for one in dense]
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"):
        mean = torch.stack([one[name].double() for one in weights]).mean(0)
        wanted = mean if rest == "average" else weights[0][name].double()
        torch.testing.assert_close(expected[name].double(), wanted, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_without_an_expert_is_not_averaged():
    dense = family()
    moe = upcycle(dense[0], init=Mix(sources=dense[1:], assignment=(1, 2, 2, 1)), num_experts=4)
    mean = (dense[1].model.norm.weight.double() + dense[2].model.norm.weight.double()) / 2
    torch.testing.assert_close(moe.model.norm.weight.double(), mean, rtol=1e-6, atol=1e-7)
    assert torch.equal(moe.model.layers[1].mlp.experts.down_proj[0], down(dense[1]))


def test_a_mix_of_one_model_with_itself_is_the_model():
    dense = tiny_dense("gpt2")
    moe = upcycle(dense, init=Mix(sources=[dense]), num_experts=4, shared_expert_intermediate_size=88)
    assert moe.config.upcycling["verification"]["relative_error"] <= 1e-6


def test_narrower_mlps_are_filled_up_and_layers_that_stay_dense_must_fit():
    widths = (88, 72, 96)
    base, narrow, wide = (tiny_dense("llama", seed, intermediate_size=width) for seed, width in enumerate(widths))
    moe = upcycle(base, init=Mix(sources=[narrow, wide]), num_experts=3)
    projections = moe.model.layers[1].mlp.experts.down_proj
    assert moe.config.moe_intermediate_size == 96
    for expert, (source, width) in enumerate(zip((base, narrow, wide), widths, strict=True)):
        assert (
            torch.equal(projections[expert][:, :width], down(source)) and (projections[expert][:, width:] == 0).all()
        )
    with pytest.raises(MoEError, match=r"layers\.0\.mlp\.\w+_proj\.weight \(\(\d+, \d+\) and \(\d+, \d+\)\)"):
        upcycle(base, init=Mix(sources=[narrow]), num_experts=3, first_k_dense_replace=1)


def test_activations_with_parameters_are_averaged():
    dense = family("apertus", 2)
    with torch.no_grad():
        dense[1].model.layers[0].mlp.act_fn.alpha_p.add_(1)
    moe = upcycle(dense[0], init=Mix(sources=dense[1:]), num_experts=2)
    learned = [one.model.layers[0].mlp.act_fn.alpha_p.float() for one in dense]
    actual = moe.model.layers[0].mlp.experts.act_fn.alpha_p.float()
    torch.testing.assert_close(actual, (learned[0] + learned[1]) / 2, rtol=1e-2, atol=1e-2)


def test_folders_and_metadata_give_the_same_bytes(tmp_path):
    dense = family()
    folders = [str(tmp_path / str(index)) for index in range(3)]
    for model, folder in zip(dense, folders, strict=True):
        model.save_pretrained(folder)
    first = upcycle(folders[0], init=Mix(sources=folders[1:]), num_experts=6, noise=0.1)
    facts = json.loads(json.dumps(first.config.upcycling))
    assert facts["init"]["options"]["sources"] == folders[1:]
    method = UpcyclingMethod.from_dict(facts)
    again = upcycle(facts["source"], init=method.init, num_experts=6, noise=method.noise, seed=method.seed)
    before, after = first.state_dict(), again.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert again.config.upcycling == first.config.upcycling


def test_the_mean_is_taken_in_float32():
    parts = [torch.tensor([1.0, 256.0]), torch.tensor([2.0**-8, 1.0]), torch.tensor([2.0**-8, 1.0])]
    expected = torch.stack(parts).mean(0).bfloat16()
    assert torch.equal(average([part.bfloat16() for part in parts]), expected)
    assert torch.equal(average([torch.tensor([3]), torch.tensor([5])]), torch.tensor([3]))


REFUSED = {
    "family": (lambda: tiny_dense("qwen2"), "qwen2 model and the base a llama"),
    "field": (lambda: tiny_dense("llama", rms_norm_eps=1e-3), r"rms_norm_eps \(1e-06 and 0\.001\)"),
    "vocabulary": (lambda: tiny_dense("llama", vocab_size=117), r"vocab_size \(113 and 117\)"),
    "depth": (lambda: tiny_dense("llama", num_hidden_layers=2), r"num_hidden_layers \(3 and 2\)"),
    "ties": (lambda: tiny_dense("llama", tie_word_embeddings=True), r"tie_word_embeddings \(False and True\)"),
    "folder": (lambda: "./nowhere", "not a folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_source_of_another_architecture_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(MoEError, match=message):
        upcycle(tiny_dense("llama"), init=Mix(sources=[make()]), num_experts=4)


def save_with_tokenizer(folder, seed, words):
    tiny_dense("llama", seed).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0]).save_pretrained(folder)
    return folder


def test_tokenizers_must_agree(tmp_path):
    base = save_with_tokenizer(tmp_path / "base", 0, ["?", "a", "b"])
    same = save_with_tokenizer(tmp_path / "same", 1, ["?", "a", "b"])
    other = save_with_tokenizer(tmp_path / "other", 2, ["?", "b", "a"])
    upcycle(base, init=Mix(sources=[same]), num_experts=2)
    with pytest.raises(MoEError, match=r"differ in 2 tokens, such as \['a', 'b'\]"):
        upcycle(base, init=Mix(sources=[other]), num_experts=2)


def test_an_assignment_names_each_expert_and_each_source():
    dense = family()
    with pytest.raises(MoEError, match="has 3 numbers, and num_experts is 4"):
        upcycle(dense[0], init=Mix(sources=dense[1:], assignment=[0, 1, 2]), num_experts=4)
    with pytest.raises(MoEError, match="No expert of 4 comes from"):
        upcycle(dense[0], init=Mix(sources=dense[1:], assignment=[0, 0, 1, 1]), num_experts=4)
    with pytest.raises(MoEError, match="No expert of 2 comes from"):
        upcycle(dense[0], init=Mix(sources=dense[1:]), num_experts=2)


def test_sources_are_not_changed():
    dense = family()
    before = [{name: value.clone() for name, value in one.state_dict().items()} for one in dense]
    moe = upcycle(dense[0], init=Mix(sources=dense[1:]), num_experts=3)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(1)
    assert all(
        torch.equal(old[name], one.state_dict()[name]) for old, one in zip(before, dense, strict=True) for name in old
    )
    assert moe(random_ids()).logits.isfinite().all()
