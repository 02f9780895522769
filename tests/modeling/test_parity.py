"""Our model with the weights of transformers' own MoE families gives their logits and gradients."""

import pytest
import torch
from transformers import AutoConfig

from moe_hf import MoEConfig, MoEForCausalLM
from tests.tiny_models import random_ids, tiny_native_moe


pytestmark = pytest.mark.numerics


TWINS = {"mixtral": "mistral", "qwen3_moe": "qwen3"}


def ours_from(native) -> MoEForCausalLM:
    kind = native.config.model_type
    fields = {k: v for k, v in native.config.to_dict().items() if k not in ("model_type", "architectures")}
    dense = AutoConfig.for_model(TWINS[kind], **fields)
    dense.head_dim = native.model.layers[0].self_attn.head_dim
    if kind == "qwen3_moe":
        dense.intermediate_size = native.config.moe_intermediate_size
    config = MoEConfig(
        text_config=dense,
        num_experts=native.config.num_experts,
        num_experts_per_tok=native.config.num_experts_per_tok,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
        router_z_loss_coef=0.0,
    )
    model = MoEForCausalLM(config)
    model.load_state_dict(native.state_dict())
    return model


@pytest.mark.parametrize("family", TWINS)
def test_logits_and_gradients_equal_the_native_familys(family):
    native = tiny_native_moe(family, **({"norm_topk_prob": True} if family == "qwen3_moe" else {}))
    ours = ours_from(native)
    ids = random_ids()
    outputs = [model.train()(ids, labels=ids) for model in (native, ours)]
    for output in outputs:
        output.loss.backward()
    first, second = (output.logits.detach() for output in outputs)
    assert float((first - second).abs().max() / first.abs().max()) <= 1e-6
    expected = dict(native.named_parameters())
    for name, parameter in ours.named_parameters():
        true = expected[name].grad
        assert float((parameter.grad - true).norm() / true.norm().clamp_min(1e-12)) <= 1e-5, name
    assert torch.equal(native.eval().generate(ids[:1, :5], max_new_tokens=8, do_sample=False), _greedy(ours, ids))


def _greedy(model, ids):
    return model.eval().generate(ids[:1, :5], max_new_tokens=8, do_sample=False)
