"""Upcycling keeps the function of every dense family, and refuses what it cannot keep."""

import copy
import gc

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import moe_hf
from moe_hf.modeling.moe_block import MoEBlock
from tests.closeness import close
from tests.families import FAMILIES, MOE_LAYERS, REFUSED, SLICE, VARIANTS, WITHOUT_CHECKPOINTING
from tests.tiny_models import random_ids, tiny_config, tiny_dense


EVERY = {name: (name, {}) for name in FAMILIES} | VARIANTS
CASES = [pytest.param(name, id=name, marks=() if name in SLICE else pytest.mark.slow) for name in EVERY]


class Pair:
    """A dense model, the MoE model made from it, and that one with experts that differ from each other."""

    def __init__(self, name: str):
        self.name = name
        self.family, fields = EVERY[name]
        self.dense = tiny_dense(self.family, **fields)
        self.moe = moe_hf.upcycle(self.dense, num_experts=4, num_experts_per_tok=2, noise=0.0)
        self.ids = random_ids()


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    yield Pair(request.param)
    gc.collect()


def _different_experts(moe: torch.nn.Module) -> torch.nn.Module:
    """A copy whose experts and routers matter: losses reach the routers, and a swap of two experts shows."""
    moe = copy.deepcopy(moe)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in (module for module in moe.modules() if isinstance(module, MoEBlock)):
            for parameter in block.experts.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return moe


def _gradients(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@torch.no_grad()
def test_logits_equal_the_dense_models(pair):
    expected = pair.dense(input_ids=pair.ids).logits
    assert expected.std() > 0.01
    assert _relative(pair.moe(input_ids=pair.ids).logits, expected) <= 1e-5


@torch.no_grad()
def test_every_moe_layer_gives_router_logits(pair):
    blocks = [module for module in pair.moe.modules() if isinstance(module, MoEBlock)]
    assert len(blocks) == MOE_LAYERS.get(pair.family, pair.dense.config.num_hidden_layers)
    router_logits = pair.moe(input_ids=pair.ids, output_router_logits=True).router_logits
    assert [tuple(logits.shape) for logits in router_logits] == [(pair.ids.numel(), 4)] * len(blocks)
    assert len({float(logits.sum()) for logits in router_logits}) == len(blocks)


@torch.no_grad()
def test_greedy_tokens_equal_the_dense_models(pair):
    prompt = pair.ids[:, :14]
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = pair.dense.generate(prompt, **arguments)
    assert expected.shape == (2, 22)
    assert torch.equal(pair.moe.generate(prompt, **arguments), expected)


@pytest.mark.numerics
@torch.no_grad()
def test_a_saved_model_loads_equal(pair, tmp_path):
    moe = _different_experts(pair.moe)
    moe.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    state, loaded_state = moe.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    assert [name for name in state if not torch.equal(state[name], loaded_state[name])] == []
    assert close(loaded(input_ids=pair.ids).logits, moe(input_ids=pair.ids).logits)


def test_gradients_with_checkpointing_equal_those_without(pair):
    if pair.family in WITHOUT_CHECKPOINTING:
        assert not pair.dense.supports_gradient_checkpointing
        pytest.skip("the dense family cannot checkpoint")
    moe = _different_experts(pair.moe).train()
    # Large enough that a lost or doubled router loss shows.
    moe.config.router_aux_loss_coef = moe.config.router_z_loss_coef = 1.0
    expected = _gradients(moe, pair.ids)
    moe.activation_checkpointing_enable()
    actual = _gradients(moe, pair.ids)
    routers = [f"{name}.gate.weight" for name, module in moe.named_modules() if isinstance(module, MoEBlock)]
    assert len(routers) == MOE_LAYERS.get(pair.family, pair.dense.config.num_hidden_layers)
    assert all(expected[name].norm() > 1e-4 for name in routers)
    assert actual.keys() == expected.keys()
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((actual[name] - gradient).norm()) <= 1e-6 * max(float(gradient.norm()), 1e-2 * scale), name


def test_at_least_sixty_families_are_held():
    assert len(set(FAMILIES)) == len(FAMILIES) >= 60
    assert set(SLICE) <= set(EVERY)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused_with_the_reason(name):
    refusal = REFUSED[name]
    dense = tiny_dense(refusal.family, **refusal.fields)
    with pytest.raises(moe_hf.MoEError, match=refusal.reason):
        moe_hf.upcycle(dense, num_experts=4, num_experts_per_tok=2)


def test_an_encoder_decoder_is_refused():
    dense = AutoModelForSeq2SeqLM.from_config(tiny_config("t5"))
    with pytest.raises(moe_hf.MoEError, match="not a decoder"):
        moe_hf.upcycle(dense, num_experts=4, num_experts_per_tok=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(FAMILIES)))
def test_every_other_causal_type_is_refused_or_built_whole(family):
    """Of any size, for nothing is allocated: one clear error, or one block for each layer."""
    try:
        text_config = tiny_config(family)
    except Exception as error:
        pytest.skip(f"transformers cannot make the tiny config: {error}")
    with torch.device("meta"):
        try:
            AutoModelForCausalLM.from_config(copy.deepcopy(text_config))
        except Exception as error:
            pytest.skip(f"transformers cannot build the tiny dense model: {error}")
        try:
            moe = moe_hf.MoEForCausalLM(moe_hf.MoEConfig(text_config=text_config, num_experts=4))
        except moe_hf.MoEError:
            return
    assert sum(isinstance(module, MoEBlock) for module in moe.modules()) == text_config.num_hidden_layers
