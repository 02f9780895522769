"""Surgery on MoE models: what must stay equal stays equal, what changes is measured, and the given model is untouched."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, upcycle, verify
from moe_hf.finetuning import apply_scope
from moe_hf.upcycling.surgery import add_experts, grow_experts, remove_experts, replace_experts
from moe_hf.upcycling.verification import relative_error
from tests.closeness import bitwise, close
from tests.tiny_models import random_ids, randomise_, tiny_config, tiny_dense


def tiny_moe(family: str = "llama", seed: int = 0, num_experts: int = 4, **fields) -> MoEForCausalLM:
    """A random MoE whose experts, routers and biases all differ."""
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config(family), num_experts=num_experts, **fields))
    randomise_(model, seed)
    return model.eval()


@torch.no_grad()
def logits(model, ids=None):
    return model(random_ids() if ids is None else ids).logits


def blocks(model):
    return [model.base_model.get_submodule(site.block) for site in model.base_model._moe_sites]


def last_step(model):
    return model.config.upcycling["surgery"][-1]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 1},
        {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5},
        {"scoring_func": "sigmoid", "norm_topk_prob": False},
        {"shared_expert_intermediate_size": 24, "shared_expert_gate": True, "first_k_dense_replace": 1},
    ],
    ids=["softmax", "not normalised", "one per token", "sigmoid", "sigmoid not normalised", "shared expert"],
)
@pytest.mark.parametrize("copies", [2, 3])
def test_growing_all_experts_keeps_the_logits(fields, copies):
    model = tiny_moe(**fields)
    grown = grow_experts(model, copies, noise=0.3)
    assert relative_error(logits(grown), logits(model)) <= 1e-6
    assert grown.config.num_experts == 4 * copies
    assert grown.config.num_experts_per_tok == model.config.num_experts_per_tok * copies
    assert last_step(grown)["verification"]["relative_error"] <= 1e-6


@pytest.mark.parametrize("family", ["gpt2", "phi3", "starcoder2", "gemma2"])
def test_growing_works_with_biases_fused_gates_and_ties(family):
    model = tiny_moe(family)
    assert relative_error(logits(grow_experts(model)), logits(model)) <= 1e-6


@torch.no_grad()
def test_noise_makes_copies_differ_by_the_asked_amount_and_cancels():
    model = tiny_moe()
    before = blocks(model)[0].experts.down_proj
    grown = blocks(grow_experts(model, 3, noise=0.2))[0].experts.down_proj
    difference = grown - before.repeat(3, 1, 1)
    assert float(difference.reshape(3, 4, -1).sum(0).abs().max()) <= 1e-5
    assert float(difference.std() / before.std()) == pytest.approx(0.2, rel=0.05)


def test_copies_with_noise_get_different_gradients_and_equal_ones_the_same():
    for noise in (0.0, 0.2):
        grown = grow_experts(tiny_moe(), 2, noise=noise)
        grown(input_ids=random_ids(), labels=random_ids()).loss.backward()
        for name in ("experts.gate_up_proj", "gate.weight"):
            first, second = blocks(grown)[0].get_parameter(name).grad.chunk(2)
            difference = relative_error(first, second)
            assert difference <= 1e-3 if noise == 0 else difference > 1e-2


def test_growing_with_k_held_fixed_is_measured_and_not_exact():
    grown = grow_experts(tiny_moe(), 2, num_experts_per_tok=2)
    assert grown.config.num_experts_per_tok == 2
    assert last_step(grown)["verification"]["relative_error"] > 1e-2


def test_ties_between_different_experts_are_not_exact_and_say_so():
    model = tiny_moe()
    with torch.no_grad():
        for block in blocks(model):
            block.gate.weight.zero_()
    with pytest.raises(MoEError, match="tie"):
        grow_experts(model)


def test_16_bit_noise_that_does_not_cancel_is_an_error_unless_allowed():
    model = tiny_moe().bfloat16()
    with pytest.raises(MoEError, match="16-bit"):
        grow_experts(model, 2, noise=0.2)
    assert last_step(grow_experts(model, 2, noise=0.2, allow_inexact=True))["verification"]["relative_error"] > 1e-5
    assert last_step(grow_experts(model, 2))["verification"]["relative_error"] <= 1e-6


@torch.no_grad()
def starve_last(model) -> None:
    """Let no token choose expert 4 of 5: its logit is the mean of two others, each of which comes twice, and K is 2."""
    for block in blocks(model):
        rows = block.gate.weight
        rows[2], rows[3], rows[4] = rows[0].clone(), rows[1].clone(), (rows[0] + rows[1]) / 2


@pytest.mark.parametrize(
    ("fields", "is_exact"),
    [({}, True), ({"scoring_func": "sigmoid", "norm_topk_prob": False}, True), ({"norm_topk_prob": False}, False)],
    ids=["normalised", "sigmoid", "softmax not normalised"],
)
def test_removing_an_expert_that_no_token_chooses_is_exact_where_weights_do_not_depend_on_it(fields, is_exact):
    model = tiny_moe(num_experts=5, **fields)
    starve_last(model)
    smaller = remove_experts(model, [4])
    for error in (
        relative_error(logits(smaller), logits(model)),
        last_step(smaller)["verification"]["relative_error"],
    ):
        assert error <= 1e-6 if is_exact else error > 1e-4


def test_removing_takes_other_experts_in_each_layer_and_keeps_their_order():
    model = tiny_moe()
    smaller = remove_experts(model, {0: [0], 1: [3], 2: [1]})
    kept = ([1, 2, 3], [0, 1, 2], [0, 2, 3])
    for own, new, ids in zip(blocks(model), blocks(smaller), kept, strict=True):
        assert torch.equal(new.gate.weight, own.gate.weight[ids])
        assert torch.equal(new.experts.down_proj, own.experts.down_proj[ids])
        assert torch.equal(new.experts.gate_up_proj, own.experts.gate_up_proj[ids])


def test_adding_and_removing_again_gives_the_same_bits():
    model = tiny_moe("gpt2")
    other = tiny_moe("gpt2", seed=1)
    back = remove_experts(add_experts(model, [1, (other, 2)]), [4, 5])
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())
    assert [step["operation"] for step in back.config.upcycling["surgery"]] == ["add_experts", "remove_experts"]


def test_added_experts_compute_what_their_sources_do():
    model, other, dense = tiny_moe("starcoder2"), tiny_moe("starcoder2", seed=1), tiny_dense("starcoder2")
    larger = add_experts(model, [2, (other, 3), dense], router_rows=torch.randn(3, 3, 48))
    tokens = torch.randn(6, 48)
    one = torch.ones(6, 1)
    for layer, block in enumerate(blocks(larger)):
        first, second = (blocks(m)[layer].experts for m in (model, other))
        mlp = dense.model.layers[layer].mlp
        expected = [f(tokens, torch.full((6, 1), e), one) for f, e in ((first, 2), (second, 3))] + [mlp(tokens)]
        for position, output in enumerate(expected):
            actual = block.experts(tokens, torch.full((6, 1), 4 + position), one)
            assert relative_error(actual, output) <= 1e-6


@pytest.mark.parametrize(
    "fields",
    [{}, {"routed_scaling_factor": 2.5}, {"shared_expert_intermediate_size": 88, "shared_expert_gate": True}],
    ids=["plain", "scaled", "shared expert"],
)
def test_the_dense_mlp_as_a_further_expert_leaves_an_upcycled_model_exact(fields):
    dense = tiny_dense("llama")
    model = add_experts(upcycle(dense, num_experts=4, **fields), [dense], router_rows="normal")
    assert verify(dense, model).relative_error <= 1e-6
    model = replace_experts(model, {0: dense})
    assert verify(dense, model).relative_error <= 1e-6


@pytest.mark.numerics
def test_replacing_an_expert_by_itself_changes_nothing_and_by_another_only_that_one():
    model, other = tiny_moe(), tiny_moe(seed=1)
    same = replace_experts(model, {2: 2})
    assert bitwise(same.state_dict(), model.state_dict()) and close(logits(same), logits(model))
    new = replace_experts(model, {2: (other, 0)})
    taken = replace_experts(model, {2: (other, 0)}, router_rows="source")
    for own, their, kept, source in zip(*map(blocks, (model, other, new, taken)), strict=True):
        assert torch.equal(kept.experts.down_proj[[0, 1, 3]], own.experts.down_proj[[0, 1, 3]])
        assert torch.equal(kept.experts.down_proj[2], their.experts.down_proj[0])
        assert torch.equal(kept.gate.weight, own.gate.weight)
        assert torch.equal(source.gate.weight[2], their.gate.weight[0])


def test_router_rows_of_new_experts_have_the_asked_spread():
    model = tiny_moe()
    drawn = torch.cat([b.gate.weight[4:] for b in blocks(add_experts(model, [0] * 40, router_rows="normal"))])
    assert float(drawn.std()) == pytest.approx(48**-0.5, rel=0.05)
    noisy = torch.cat(
        [b.gate.weight[4:] - b.gate.weight[0] for b in blocks(add_experts(model, [0] * 40, router_noise=0.1))]
    )
    rows = torch.stack([b.gate.weight[0].std() for b in blocks(model)])
    assert float(noisy.std() / rows.square().mean().sqrt()) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    "operate",
    [
        lambda model: add_experts(model, [0]),
        lambda model: remove_experts(model, [1]),
        lambda model: replace_experts(model, {0: 1}),
        lambda model: grow_experts(model, noise=0.1, allow_inexact=True),
    ],
    ids=["add", "remove", "replace", "grow"],
)
def test_the_given_model_is_unchanged_and_shares_nothing(operate):
    model = tiny_moe("gpt2").bfloat16()
    model.generation_config.max_new_tokens = 7
    report = apply_scope(model, "experts")
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    new = operate(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    pointers = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not any(tensor.data_ptr() in pointers for tensor in new.state_dict().values())
    # Masters in float32 beside a rest in bfloat16, and what is frozen, stay as they are.
    assert {name: p.dtype for name, p in new.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert {name for name, p in new.named_parameters() if p.requires_grad} == set(report.names)
    assert new.generation_config.max_new_tokens == 7
    assert new.lm_head.weight is new.get_input_embeddings().weight


@pytest.mark.numerics
def test_result_is_saved_and_loaded_as_it_is(tmp_path):
    new = add_experts(tiny_moe(), [0, 1], router_noise=0.1, num_experts_per_tok=3)
    new.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert bitwise(loaded.state_dict(), new.state_dict()) and close(logits(loaded), logits(new))
    assert last_step(loaded) == last_step(new)
    assert last_step(new)["num_experts"] == [4, 6] and last_step(new)["num_experts_per_tok"] == [2, 3]


def test_card_names_the_operations_and_a_model_from_scratch_has_one(tmp_path):
    from moe_hf.hub import save_model

    new = remove_experts(add_experts(tiny_moe(), [0]), [0])
    card = (save_model(new, None, tmp_path / "out") / "README.md").read_text()
    assert "add_experts, remove_experts" in card


def test_learned_activation_that_differs_is_refused():
    model, other = tiny_moe("apertus"), tiny_moe("apertus", seed=1)
    assert add_experts(model, [(model, 0)]).config.num_experts == 5
    with pytest.raises(MoEError, match="activation"):
        add_experts(model, [(other, 0)])


@pytest.mark.parametrize(
    ("operate", "message"),
    [
        (lambda m: add_experts(m, []), "at least one"),
        (lambda m: add_experts(m, [4]), "0 to 3"),
        (lambda m: add_experts(m, ["0"]), "no source"),
        (lambda m: add_experts(m, [tiny_dense("llama")]), "no router rows"),
        (lambda m: add_experts(m, [m]), "needs its id"),
        (lambda m: add_experts(m, [(tiny_moe("gpt2"), 0)]), "does not fit"),
        (lambda m: add_experts(m, [(tiny_moe(first_k_dense_replace=1), 0)]), "layers"),
        (lambda m: add_experts(m, [0], router_rows="best"), "router_rows"),
        (lambda m: add_experts(m, [0], router_rows=torch.zeros(3, 2, 48)), "shape"),
        (lambda m: add_experts(m, [0], router_noise=-1), "router_noise"),
        (lambda m: add_experts(m, [0], num_experts_per_tok=6), "num_experts_per_tok"),
        (lambda m: remove_experts(m, [0, 1, 2]), "num_experts_per_tok"),
        (lambda m: remove_experts(m, [0, 0]), "twice"),
        (lambda m: remove_experts(m, {0: [1], 1: [1]}), "each must be named"),
        (lambda m: remove_experts(m, {0: [1], 1: [1], 2: [1, 2]}), "same number"),
        (lambda m: remove_experts(m, [0, 1, 2], num_experts_per_tok=0), "num_experts_per_tok"),
        (lambda m: replace_experts(m, {}), "at least one"),
        (lambda m: replace_experts(m, {7: 0}), "0 to 3"),
        (lambda m: grow_experts(m, 1), "at least 2"),
        (lambda m: grow_experts(m, noise=-1), "noise"),
        (lambda m: grow_experts(tiny_dense("llama")), "MoEForCausalLM"),
    ],
)
def test_mistakes_are_one_clear_error(operate, message):
    with pytest.raises(MoEError, match=message):
        operate(tiny_moe())
