"""What each router architecture is, and how its parameters start; `test_router_properties.py` has what holds for all."""

import pytest
import torch

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, upcycle
from moe_hf.modeling.router_arch import LEAST_TEMPERATURE, ROUTER_ARCHITECTURES, attention, cosine, mlp
from tests.tiny_models import random_ids, tiny_config, tiny_dense


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine_parameters(log_scale: float = 0.0) -> dict[str, torch.Tensor]:
    return {"hidden_weight": drawn(3, 5, seed=1), "log_scale": torch.tensor([log_scale], dtype=torch.float64)}


def test_cosine_logits_ignore_lengths_and_are_bounded():
    tokens, weight = drawn(7, 5), drawn(4, 3, seed=2)
    logits = cosine(tokens, weight, cosine_parameters(), {"temperature": 0.2})
    assert torch.allclose(
        logits, cosine(9 * tokens, weight * drawn(4, 1).abs(), cosine_parameters(), {"temperature": 0.2})
    )
    assert logits.abs().max() <= 1 / 0.2
    assert torch.allclose(
        logits, cosine(tokens, weight, cosine_parameters(0.7), {"temperature": 0.2}) / 2.0137527074704766
    )
    huge = cosine(tokens, weight, cosine_parameters(50.0), {"temperature": 0.2})
    assert torch.allclose(huge, logits * 0.2 / LEAST_TEMPERATURE)


def test_cosine_of_a_zero_row_has_a_finite_gradient():
    weight = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    logits = cosine(drawn(7, 5), weight, cosine_parameters(), {"temperature": 0.2})
    logits.sum().backward()
    assert not logits.any() and torch.isfinite(weight.grad).all()


def test_attention_is_an_average_of_values_and_plain_where_keys_are_zero():
    tokens, weight = drawn(7, 5), drawn(4, 5, seed=2)
    logits = attention(tokens, weight, {"query_weight": drawn(4, 5, seed=3), "key_weight": drawn(4, 5, seed=4)}, {})
    values = tokens @ weight.T
    assert (logits <= values.max(-1, keepdim=True).values).all() and (
        logits >= values.min(-1, keepdim=True).values
    ).all()
    blind = attention(
        tokens, weight, {"query_weight": drawn(4, 5, seed=3), "key_weight": torch.zeros_like(weight)}, {}
    )
    assert torch.allclose(blind, values.mean(-1, keepdim=True).expand(-1, 4))


def test_an_mlp_is_not_linear():
    tokens, weight, parameters = drawn(7, 5), drawn(4, 3, seed=2), {"hidden_weight": drawn(3, 5, seed=1)}
    one, other = mlp(tokens, weight, parameters, {}), mlp(-tokens, weight, parameters, {})
    # silu(x) - silu(-x) = x: the odd half of it is linear, the even half is not.
    assert torch.allclose(one - other, tokens @ parameters["hidden_weight"].T @ weight.T)
    assert (one + other).abs().max() > 0.1


@pytest.mark.parametrize("name", ROUTER_ARCHITECTURES)
def test_parameters_start_drawn_or_at_zero_and_have_the_documented_shapes(name):
    config = MoEConfig(text_config=tiny_config("llama"), num_experts=6, router_arch=name)
    router = MoEForCausalLM(config).base_model.layers[0].mlp.gate
    width = config.router_arch_kwargs.get("hidden_size", 16)
    shapes = {
        "linear": {"weight": (6, 48)},
        "mlp": {"weight": (6, width), "hidden_weight": (width, 48)},
        "cosine": {"weight": (6, width), "hidden_weight": (width, 48), "log_scale": (1,)},
        "attention": {"weight": (6, 48), "query_weight": (6, 48), "key_weight": (6, 48)},
    }
    assert {key: tuple(value.shape) for key, value in router.named_parameters()} == shapes[name]
    for key, value in router.named_parameters():
        if key == "log_scale":
            assert not value.any()
        else:
            assert float(value.detach().std()) == pytest.approx(0.2, rel=0.3)


@pytest.mark.parametrize("name", ROUTER_ARCHITECTURES)
def test_all_parameters_of_an_upcycled_router_learn(name):
    model = upcycle(tiny_dense("llama"), num_experts=4, router_arch=name, noise=0.3).train()
    before = {key: value.detach().clone() for key, value in model.named_parameters() if ".mlp.gate." in key}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ids = random_ids(2, 12)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(not torch.equal(before[key], value) for key, value in model.named_parameters() if key in before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_arch": "forest"}, "router_arch is 'forest'; it must be one of"),
        ({"router_arch_kwargs": {"hidden_size": 8}}, "which router_arch='linear' does not read; it reads none"),
        ({"router_arch": "mlp", "router_arch_kwargs": {"temperature": 1}}, r"it reads \['hidden_size'\]"),
        ({"router_arch": "mlp", "router_arch_kwargs": {"hidden_size": 0}}, "must be a whole number >= 1"),
        ({"router_arch": "cosine", "router_arch_kwargs": {"temperature": 0}}, "must be a number >= 0.01"),
    ],
)
def test_mistakes_are_one_clear_error(fields, message):
    with pytest.raises(MoEError, match=message):
        MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), **fields))
