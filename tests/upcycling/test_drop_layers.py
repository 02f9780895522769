"""Dropping layers: the new model computes what the old one does when those layers are skipped."""

import pytest
import torch

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, drop_layers
from moe_hf.upcycling.surgery.layers import spread_evenly
from tests.tiny_models import random_ids, randomise_, tiny_config


def tiny_moe(family: str, **fields) -> MoEForCausalLM:
    text_config = tiny_config(family, num_hidden_layers=4)
    model = MoEForCausalLM(MoEConfig(text_config=text_config, **({"num_experts": 3} | fields)))
    randomise_(model)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "smollm3", "opt"])
@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_the_new_model_skips_the_dropped_layers(family, layers):
    model = tiny_moe(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = drop_layers(model, layers)  # compares the logits itself
    assert student.config.num_hidden_layers == 4 - len(layers)
    assert student.config.upcycling["surgery"][-1]["layers"] == layers
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert student(ids).logits.shape == model(ids).logits.shape
        assert not torch.allclose(student(ids).logits, model(ids).logits, atol=1e-2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_layers_without_experts_stay_without(tmp_path):
    model = tiny_moe("llama", num_experts=4, first_k_dense_replace=1, num_experts_per_layer=[0, 4, 2, 3])
    student = drop_layers(model, [1])
    assert student.config.mlp_only_layers == [0]
    assert student.config.num_experts_per_layer == [0, 2, 3]
    student.save_pretrained(tmp_path)
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.allclose(MoEForCausalLM.from_pretrained(tmp_path)(ids).logits, student(ids).logits, atol=1e-6)


def test_a_number_of_layers_is_spread_evenly_and_keeps_the_ends():
    assert spread_evenly(1, 3) == [1]
    assert spread_evenly(3, 9) == [2, 4, 6]
    assert all(0 < i < 23 for i in spread_evenly(12, 24)) and len(set(spread_evenly(12, 24))) == 12
    assert drop_layers(tiny_moe("llama"), 2).config.num_hidden_layers == 2


@pytest.mark.parametrize("layers", [0, 3, [4], [-1], [], [0, 1, 2, 3]])
def test_layers_that_cannot_be_dropped_are_refused(layers):
    with pytest.raises(MoEError, match="layers"):
        drop_layers(tiny_moe("llama"), layers)


def test_the_last_moe_layer_stays():
    with pytest.raises(MoEError, match="none of them has experts"):
        drop_layers(tiny_moe("llama", first_k_dense_replace=3), [3])
