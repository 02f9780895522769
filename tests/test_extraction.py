"""Taking the experts of one id out of a model: the same logits from fewer experts, or a refusal."""

import pytest
import torch

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, extract_experts
from moe_hf.modeling.router import Router
from tests.tiny_models import random_ids, randomise_, tiny_config


LANGUAGES = {"language": [[0, 2, 5], [1, 2, 3, 4]]}


def model_of(family: str = "llama", **fields) -> MoEForCausalLM:
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config(family), **{"num_experts": 6, **fields}))
    randomise_(model)
    for router in model.modules():
        if isinstance(router, Router) and router.e_score_correction_bias is not None:
            router.e_score_correction_bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0, -0.3, 0.2]))
    return model.eval()


CASES = {
    "group": ({"expert_groups": LANGUAGES}, {"language": 1}, 4),
    "group_unnormalised": ({"expert_groups": LANGUAGES, "norm_topk_prob": False}, {"language": 0}, 3),
    "group_bias_sigmoid": (
        {"expert_groups": LANGUAGES, "balance_strategy": "bias", "scoring_func": "sigmoid"},
        {"language": 1},
        4,
    ),
    "two_groups": (
        {"expert_groups": LANGUAGES | {"modality": [[1, 2, 4, 5, 0], [0, 1, 2, 3, 5]]}},
        {"language": 1, "modality": 0},
        3,
    ),
    "group_and_own_router": (
        {"expert_groups": {"task": [[0, 1, 2], [3, 4, 5]]}, "num_tasks": 2, "router_per_task": True},
        {"task": 1},
        3,
    ),
    "own_router": ({"num_tasks": 3, "router_per_task": True}, {"task": 2}, 6),
    "task": ({"num_tasks": 3, "routing_level": "task"}, {"task": 2}, 2),
    "task_one_expert": ({"num_tasks": 3, "routing_level": "task", "num_experts_per_tok": 1}, {"task": 1}, 1),
    "task_bias": (
        {"num_tasks": 3, "routing_level": "task", "balance_strategy": "bias", "norm_topk_prob": False},
        {"task": 0},
        2,
    ),
    "task_mlp": ({"num_tasks": 3, "routing_level": "task", "router_arch": "mlp"}, {"task": 1}, 2),
    "task_in_group": (
        {"num_tasks": 3, "routing_level": "task", "expert_groups": LANGUAGES, "expert_group_prior": 0.5},
        {"task": 1, "language": 1},
        2,
    ),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", CASES)
def test_fewer_experts_give_the_logits_of_the_whole_model(name, family, tmp_path):
    fields, ids, experts = CASES[name]
    model = model_of(family, **fields)
    tokens = random_ids(2, 12)
    whole = model(tokens, **{f"{kind}_ids": torch.full((2,), id_) for kind, id_ in ids.items()}).logits
    small = extract_experts(model, **ids)
    assert small.config.num_experts == experts
    assert (small(tokens).logits - whole).norm() <= 1e-5 * whole.norm()
    small.save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(loaded(tokens).logits, small(tokens).logits, atol=1e-5)


def test_groups_of_other_ids_stay():
    model = model_of(
        expert_groups={"language": [[0, 1, 2, 3], [2, 3, 4, 5]], "modality": [[1, 2, 3, 5], [0, 2, 3, 4]]}
    )
    small = extract_experts(model, language=1)
    assert small.config.expert_groups == {"modality": [[0, 1, 3], [0, 1, 2]]}
    tokens, modality = random_ids(2, 12), torch.arange(24).view(2, 12) % 2
    whole = model(tokens, language_ids=torch.tensor([1, 1]), modality_ids=modality).logits
    assert (small(tokens, modality_ids=modality).logits - whole).norm() <= 1e-5 * whole.norm()


@pytest.mark.parametrize(
    ("fields", "ids", "message"),
    [
        ({}, {"task": 0}, "that the routers tell apart"),
        ({"expert_groups": LANGUAGES}, {}, "that the routers tell apart"),
        ({"expert_groups": LANGUAGES}, {"language": 2}, r"must be in \[0, 2\)"),
        ({"expert_groups": LANGUAGES, "expert_group_prior": 1.0}, {"language": 0}, "outside of their group"),
        ({"num_tasks": 2, "routing_level": "task", "router_type": "top_p"}, {"task": 0}, "router_type='top_k'"),
        ({"num_tasks": 2, "routing_level": "task", "expert_groups": LANGUAGES}, {"task": 0}, "missing: .'language'"),
        ({"expert_groups": LANGUAGES, "router_arch": "attention"}, {"language": 0}, "depend on each other"),
    ],
)
def test_what_cannot_be_taken_out_is_refused(fields, ids, message):
    with pytest.raises(MoEError, match=message):
        extract_experts(model_of(**fields), **ids)
