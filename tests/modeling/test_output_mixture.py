"""Experts of the last layer that predict one by one, and the mixture of their distributions."""

import math

import pytest
import torch

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, inspect_model, upcycle
from moe_hf.modeling import output_mixture
from moe_hf.modeling.output_mixture import mix_likelihoods, mix_logits
from tests.families import FAMILIES
from tests.tiny_models import random_ids, randomise_, tiny_config, tiny_dense


FIELDS = {"num_experts": 4, "num_experts_per_tok": 4, "router_type": "dense", "router_aux_loss_coef": 0.0}
LIKELIHOOD = {**FIELDS, "output_mixture": "likelihood"}


def model_of(family: str = "llama", **fields) -> MoEForCausalLM:
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config(family), **LIKELIHOOD | fields))
    randomise_(model)
    return model.eval()


def test_jacobs_error_and_responsibilities_are_the_golden_ones():
    # Squared distances 0 and 4, weights 1/2: -ln(1/2 + 1/2 e^-2) = 0.5662191, posterior 1 / (1 + e^-2) = 0.8807971;
    # the second error of the paper, sum_i p_i d_i^2, is 2.
    distances, weights = torch.tensor([0.0, 4.0], dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    likelihoods = (-0.5 * distances).requires_grad_()
    mixed = mix_likelihoods(weights.log(), likelihoods)
    mixed.backward()
    assert float(-mixed.detach()) == pytest.approx(0.5662191, abs=1e-7)
    assert likelihoods.grad.tolist() == pytest.approx([0.8807971, 0.1192029], abs=5e-8)
    assert float((weights * distances).sum()) == 2.0


def test_probabilities_are_mixed_and_not_logits():
    logits, weights = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64).log_softmax(0)
    expected = sum(weights[i].exp()[:, None] * logits[i].softmax(-1) for i in range(3))
    assert torch.allclose(mix_logits(logits, weights).softmax(-1), expected, atol=1e-12)
    same = logits[:1].expand(3, -1, -1)
    assert torch.allclose(mix_logits(same, weights), logits[0], atol=1e-12)


def predictions_one_by_one(model: MoEForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The weights of the last gate, (T, E), and log P_i of each of its experts: the whole decoder once per expert."""
    gate, found = model.base_model.layers[-1].mlp.gate, []
    for expert in range(4):

        def only(module, args, output, expert=expert):
            weights = torch.zeros_like(output[1])
            weights[:, expert] = 1
            return (output[0], weights, output[2])

        handle = gate.register_forward_hook(only)
        output = model.base_model(ids, output_router_logits=True, use_cache=False)
        handle.remove()
        logits = model.lm_head(output.last_hidden_state)
        cap = getattr(model.config, "final_logit_softcapping", None)
        found.append((logits if cap is None else cap * (logits / cap).tanh()).log_softmax(-1))
    return output.router_logits[-1].softmax(-1), found


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_loss_and_gradients_are_those_of_a_decoder_run_once_per_expert(family):
    model, ids = model_of(family, router_z_loss_coef=0.0).double().train(), random_ids(2, 9)
    model.set_experts_implementation("eager")
    weights, experts = predictions_one_by_one(model, ids)
    weights = weights.view(2, 9, 4)
    total, count = 0.0, 0
    for row in range(2):
        for place in range(8):
            label = ids[row, place + 1]
            total = total - sum(weights[row, place, i] * experts[i][row, place, label].exp() for i in range(4)).log()
            count += 1
    (total / count).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    output = model(ids, labels=ids)
    output.loss.backward()
    assert float(output.loss) == pytest.approx(float(total / count), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 1e-6 * expected[name].norm(), name
    mixed = sum(weights[..., i, None] * experts[i].exp() for i in range(4))
    assert torch.allclose(output.logits.softmax(-1), mixed, atol=1e-6)


def test_the_head_sees_few_tokens_at_a_time_and_the_result_does_not_depend_on_how_many(monkeypatch):
    model, ids, seen = model_of().train(), random_ids(2, 9), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.numel()))

    def step():
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    loss, gradients = step()
    assert max(seen) == 4 * 18 * 113
    monkeypatch.setattr(output_mixture, "PIECE", 5 * 4 * 113)
    seen.clear()
    again, by_piece = step()
    assert max(seen) == 5 * 4 * 113
    assert float(again) == pytest.approx(float(loss), rel=1e-6)
    assert all(torch.allclose(by_piece[name], value, rtol=1e-4, atol=1e-6) for name, value in gradients.items())


@torch.no_grad()
def test_kept_positions_and_hidden_states_have_the_shapes_of_a_dense_model():
    model, ids = model_of(), random_ids(2, 9)
    whole = model(ids, output_hidden_states=True)
    assert all(states.shape == (2, 9, 48) for states in whole.hidden_states)
    assert torch.allclose(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:], atol=1e-6)
    places = torch.tensor([1, 4])
    assert torch.allclose(model(ids, logits_to_keep=places).logits, whole.logits[:, places], atol=1e-6)
    # Without a head there is nothing to predict with: the experts' outputs are mixed.
    assert model.model(ids).last_hidden_state.shape == (2, 9, 48)


def test_labels_of_an_accumulated_batch_are_scaled_as_elsewhere():
    model, ids = model_of(router_z_loss_coef=0.0).train(), random_ids(2, 9)
    loss, half = model(ids, labels=ids).loss, model(ids, labels=ids, num_items_in_batch=torch.tensor(32)).loss
    assert float(half) == pytest.approx(float(loss) / 2, rel=1e-6)


# Those whose last layers reshape, or whose head calls a part of the decoder.
NOT_APART = ("bart", "gemma3n_text", "gpt_bigcode", "openai-gpt", "opt", "trocr", "whisper")
QUICK = ("gpt2", "qwen3", "gemma4_text", "bloom", "cohere2", "falcon_h1", "opt", "whisper", "gpt_bigcode")
by_family = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)


@by_family
def test_equal_experts_predict_what_the_dense_model_predicts_or_the_decoder_is_refused(family):
    dense, ids = tiny_dense(family), random_ids(2, 9)
    if family in NOT_APART:
        with pytest.raises(MoEError, match="ends with the last MoE layer"):
            upcycle(dense, **LIKELIHOOD)
        return
    moe = upcycle(dense, **LIKELIHOOD)
    with torch.no_grad():
        expected = dense(ids, labels=ids)
        found = moe(ids, labels=ids)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5 * float(expected.logits.abs().max()))
    assert float(found.loss) == pytest.approx(float(expected.loss), abs=1e-5)


def test_the_head_is_counted_once_per_expert():
    apart, mixed = (inspect_model(model_of(output_mixture=value)).flops_per_token for value in ("likelihood", None))
    assert apart - mixed == 3 * 2 * 48 * 113


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"output_mixture": "mean"}, "None or 'likelihood'"),
        ({"mlp_only_layers": [2]}, "that one has none"),
        ({"routed_scaling_factor": 2.0}, "leave num_moe_heads"),
        ({"router_type": "top_k"}, "has no use for output_mixture"),
    ],
)
def test_what_does_not_fit_is_refused(fields, match):
    with pytest.raises(MoEError, match=match):
        model_of(**fields)


def test_the_loss_of_a_mixture_is_below_that_of_its_experts_weighed_alone():
    # Jensen: -log sum_i p_i P_i <= -sum_i p_i log P_i, with equality where the experts agree.
    model, ids = model_of(), random_ids(2, 9)
    with torch.no_grad():
        weights, experts = predictions_one_by_one(model, ids)
        mixed = model(ids).logits.log_softmax(-1)
    alone = sum(weights.view(2, 9, 4)[..., i, None] * experts[i] for i in range(4))
    assert (mixed >= alone - 1e-5).all() and math.isfinite(float(mixed.sum()))


def test_float64_names_the_implementation_that_computes_it():
    """The last layer alone has experts, so that what fails in them could be taken for the decoder's end."""
    model, ids = model_of(mlp_only_layers=[0, 1]).double(), random_ids()
    with torch.no_grad():
        expected = model.float()(ids).logits
        model.double()
        if model.config._experts_implementation == "grouped_mm":
            with pytest.raises(MoEError, match="float64.*set_experts_implementation"):
                model(ids)
        model.set_experts_implementation("eager")
        torch.testing.assert_close(model(ids).logits, expected.double(), atol=1e-4, rtol=1e-4)
