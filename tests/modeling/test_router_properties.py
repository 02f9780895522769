"""What holds for every router with every option (`router_properties.CASES`), and what they declare not to hold."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

from moe_hf import MoEConfig, MoEError, upcycle
from moe_hf.finetuning.scopes import scope_parameter_names
from moe_hf.modeling.capacity import expert_capacity
from moe_hf.modeling.experts import Experts
from moe_hf.modeling.modeling_moe import MoEForCausalLM
from moe_hf.modeling.moe_block import MoEBlock
from moe_hf.modeling.routers import ROUTERS
from moe_hf.modeling.routing import router_scores
from moe_hf.modeling.routing_pass import routing_pass
from tests.modeling.reference import (
    in_float64,
    make_block,
    reference_expert,
    reference_extra_expert,
    reference_mlp,
    reference_shared,
)
from tests.modeling.router_inputs import block_pass, given_ids, make_logits_huge_, naive_logits
from tests.modeling.router_properties import CASES, NUM_EXPERTS, RouterCase, set_bias
from tests.sampling import sampled
from tests.tiny_models import random_ids, tiny_dense


# A law meets every third case and a case every third law; all pairs run in `make test-all`.
LAWS = itertools.count()


def every_case(law: Callable) -> Callable:
    """Parametrise a law over all cases."""
    return pytest.mark.parametrize("name", sampled(CASES.keys(), start=next(LAWS)))(law)


def without_draws(law: Callable) -> Callable:
    """As `every_case`, in both modes where the random numbers of a batch do not change the result.

    Batches of another shape get other ones.
    """
    both = sampled(CASES.keys(), {"eval": False, "train": True}, start=next(LAWS))
    cases = [case for case in both if not (case.values[1] and CASES[case.values[0]].draws)]
    return pytest.mark.parametrize(("name", "training"), cases)(law)


both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
# One model per case, used by the tests that do not change it.
MODELS: dict[str, MoEForCausalLM] = {}
ROWS, LENGTH = 3, 20


def model_of(name: str) -> MoEForCausalLM:
    if name not in MODELS:
        MODELS[name] = CASES[name].model()
    return MODELS[name]


@torch.no_grad()
def logits(model, ids, *, training: bool = False, **kwargs) -> torch.Tensor:
    torch.manual_seed(5)
    kwargs |= given_ids(model.config, ids, kwargs.get("position_ids"))
    return model.train(training)(ids, use_cache=False, **kwargs).logits


def close(actual, expected) -> bool:
    return float((actual - expected).abs().max() / expected.abs().max()) <= 5e-6


def block_of(case: RouterCase, seed: int = 0) -> tuple[MoEBlock, torch.Tensor]:
    """A block with random weights and (2, 12, D) tokens for it."""
    block = make_block("gated", **{"num_experts": NUM_EXPERTS, **case.fields})
    if block.gate.config.router_arch == "attention":
        # Experts that attend to the same one alone have equal logits: a tie.
        block.gate.key_weight.data.mul_(0.1)
    return set_bias(block), torch.randn(2, 12, 48, generator=torch.Generator().manual_seed(seed))


def routed_by(block: MoEBlock, tokens: torch.Tensor) -> torch.Tensor:
    """What the router of `block` gets for (B, S, D) tokens: the tokens, or their parts, one after the other."""
    flat = tokens.flatten(0, 1)
    if block.multi_head is None:
        return flat
    projected = [block.multi_head.head_proj.weight @ token + block.multi_head.head_proj.bias for token in flat]
    return torch.stack([part for token in projected for part in token.chunk(block.multi_head.heads)])


def in_sequences(block: MoEBlock, tokens: torch.Tensor) -> torch.Tensor:
    with routing_pass(block_pass(block.gate.config, *tokens.shape[:2])):
        return block(tokens)


def test_every_router_has_a_case():
    assert {CASES[name].config().router_type for name in CASES} == set(ROUTERS)


@both_modes
@every_case
def test_changing_later_tokens_changes_nothing_before(name, training):
    case, model = CASES[name], model_of(name)
    ids = random_ids(ROWS, LENGTH)
    full = logits(model, ids, training=training)
    same = True
    for place in (1, 7, 19):
        changed = ids.clone()
        changed[:, place:] = (changed[:, place:] + 5) % 110
        now = logits(model, changed, training=training)
        same &= close(now[:, :place], full[:, :place])
        assert not close(now[:, place:], full[:, place:])
    assert same != (case.leaks_always or (case.leaks_in_training and training))


@without_draws
def test_cutting_later_tokens_changes_nothing_before(name, training):
    case, model = CASES[name], model_of(name)
    ids = random_ids(ROWS, LENGTH)
    full = logits(model, ids, training=training)
    same = all(close(logits(model, ids[:, :cut], training=training), full[:, :cut]) for cut in (1, 7, 19))
    # A capacity factor counts the tokens of the sequence; in evaluation it is off unless it has a value of its own.
    assert same != (case.counts_tokens and (training or case.refuses_cache or case.leaks_always))


@without_draws
def test_rows_of_a_batch_do_not_see_each_other(name, training):
    model = model_of(name)
    ids = random_ids(ROWS, LENGTH)
    together = logits(model, ids, training=training)
    for row in range(ROWS):
        assert close(together[row : row + 1], logits(model, ids[row : row + 1], training=training))


@without_draws
def test_a_document_in_a_packed_row_gets_what_it_gets_alone(name, training):
    model = model_of(name)
    lengths = (9, 1, 14)
    documents = [random_ids(2, length, seed=i) for i, length in enumerate(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    packed = logits(model, torch.cat(documents, 1), training=training, position_ids=positions)
    for document, found in zip(documents, packed.split(lengths, dim=1), strict=True):
        # One token alone is one token of a sequence: with positions given, it is a document too.
        alone = logits(model, document, training=training)
        assert close(found, alone)


@without_draws
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(name, training, side):
    model = model_of(name)
    ids = random_ids(ROWS, LENGTH)
    padding, real = torch.zeros_like(ids[:, :4]), slice(4, None) if side == "left" else slice(None, LENGTH)
    padded = torch.cat([padding, ids] if side == "left" else [ids, padding], 1)
    mask = torch.zeros_like(padded)
    mask[:, real] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    now = logits(model, padded, training=training, attention_mask=mask, position_ids=positions)
    assert close(now[:, real], logits(model, ids, training=training))


@every_case
def test_cached_decoding_equals_the_full_forward_or_is_refused(name):
    case, model = CASES[name], model_of(name).eval()
    ids = random_ids(2, 8)
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings |= given_ids(model.config, ids)
    if case.leaks_always:
        with pytest.raises(MoEError, match="cannot generate"):
            model.generate(ids, **settings)
        return
    if case.refuses_cache:
        with pytest.raises(MoEError, match="use_cache=False"):
            model.generate(ids, **settings)
        settings["use_cache"] = False
    generated = model.generate(ids, **settings)
    steps = torch.stack(generated.logits, 1)
    for step in range(steps.shape[1]):
        prefix = generated.sequences[:, : 8 + step]
        assert close(steps[:, step], logits(model, prefix)[:, -1])
    if not case.refuses_cache:
        assert close(steps, logits(model, generated.sequences)[:, 7 : 7 + steps.shape[1]])


@every_case
def test_training_draws_only_where_declared_and_evaluation_never(name):
    case, model = CASES[name], model_of(name)
    ids = random_ids(2, LENGTH)
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            first, second = (model(ids, **given_ids(model.config, ids)).logits for _ in range(2))
        assert torch.equal(first, second) != (case.draws and training)


@every_case
def test_choices_are_valid_and_conserved_and_weights_sum_as_documented(name):
    case = CASES[name]
    block, tokens = block_of(case)
    config, flat = block.gate.config, routed_by(block, tokens)
    with routing_pass(block_pass(block.gate.config, 2, 12, record=True)) as current:
        _, weights, index, *_ = block.train().gate(flat)
    routing, count = current.layers[0].routing, len(flat)
    stats, token = routing.stats, routing.token_index
    varies = token is not None
    token = token if varies else torch.arange(count).repeat_interleave(index.shape[1])
    weights, index = weights.flatten(), index.flatten()
    assert index.min() >= 0 and index.max() < len(block.gate.weight)
    assert len(torch.stack([token, index]).unique(dim=1).T) == len(index), "a token uses an expert twice"
    assert case.weights_sum(torch.zeros(count).index_add(0, token, weights.detach()), config)
    used = weights > 0
    per_token = float(stats.get("experts_per_token", torch.tensor(float(config.num_experts_per_tok))))
    assert int(used.sum()) == round(per_token * count)
    if not varies:
        assert len(index) == config.num_experts_per_tok * count
        asked = per_token / (1 - float(stats.get("dropped_share", 0)))
        assert asked == pytest.approx(config.num_experts_per_tok) or config.router_type == "stochastic_top_k"
    if config.capacity_factor is not None:
        assert stats["dropped_share"] > 0 or config.overflow_policy == "reroute"
        length = count // 2
        limit = int(expert_capacity(torch.tensor(length), config, config.capacity_factor))
        for sequence in (token < length, token >= length):
            assert index[sequence & used].bincount().max() <= limit


def mixture(case: RouterCase) -> torch.Tensor:
    """The weight of every expert for every token in training, (T, E)."""
    block, tokens = block_of(case)
    with routing_pass(block_pass(block.gate.config, 2, 12, record=True)) as current, torch.no_grad():
        scores, weights, index, *_ = block.train().gate(routed_by(block, tokens))
    count, token = len(scores), current.layers[0].routing.token_index
    token = torch.arange(count) if token is None else token
    return torch.zeros(scores.shape).index_put((token[:, None].expand_as(index), index), weights)


@pytest.mark.parametrize("name", [name for name in CASES if name != "top_k"])
def test_every_option_does_something(name):
    mixed, plain = mixture(CASES[name]), mixture(CASES["top_k"])
    changes_weights = mixed.shape != plain.shape or (mixed - plain).abs().max() > 0.01
    outputs = [in_sequences(*block_of(CASES[case])) for case in (name, "top_k")]
    assert changes_weights or (outputs[0] - outputs[1]).abs().max() > 0.01


def merged(experts: Experts, choices: list) -> SimpleNamespace:
    """One expert whose weights are the mixture of those chosen."""
    tensors = {name: sum(w * tensor[e] for e, w in choices)[None] for name, tensor in experts.named_parameters()}
    return SimpleNamespace(has_gate=experts.has_gate, has_bias=experts.has_bias, act_fn=experts.act_fn, **tensors)


def reference_output(block: MoEBlock, tokens: torch.Tensor, case: RouterCase, training: bool) -> torch.Tensor:
    """What the block makes of (B, S, D) tokens in float64, one token after the other."""
    if block.dense_ffn is None:
        return reference_experts(block, tokens, case, training)

    def dense(inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([reference_mlp(block.dense_ffn, token) for token in inputs.flatten(0, 1)]).view_as(inputs)

    if block.gate.config.moe_dense_ffn == "before":
        added = dense(tokens)
        return added + reference_experts(block, tokens + added, case, training)
    output = reference_experts(block, tokens, case, training)
    return output + dense(tokens + output)


def reference_experts(block: MoEBlock, tokens: torch.Tensor, case: RouterCase, training: bool) -> torch.Tensor:
    """The double loop over tokens and their choices, for (B, S, D) tokens in float64."""
    config = block.gate.config
    if not training:
        config = MoEConfig.from_dict(config.to_dict() | {"capacity_factor": config.eval_capacity_factor})
    batch, flat = tokens.shape[0], routed_by(block, tokens)
    length = len(flat) // batch
    scores = router_scores(naive_logits(block.gate, flat, batch), config.scoring_func)
    groups = [list(range(row * length, (row + 1) * length)) for row in range(batch)]
    outputs = []
    for place, (token, choices) in enumerate(zip(flat, case.reference(scores, groups, config), strict=True)):
        if case.merges:
            outputs.append(reference_expert(merged(block.experts, choices), 0, token))
            continue
        mlps = block.experts.num_experts
        routed = [(expert, weight) for expert, weight in choices if expert < mlps]
        extra = [(expert - mlps, weight) for expert, weight in choices if expert >= mlps]
        terms = [weight * reference_expert(block.experts, expert, token) for expert, weight in routed]
        before = flat[place - place % length : place + 1]
        terms += [weight * reference_extra_expert(block, expert, before) for expert, weight in extra]
        outputs.append(sum(terms, torch.zeros_like(token)))
        if block.shared_expert is not None:
            outputs[-1] = reference_shared(block, token, outputs[-1])
    if block.multi_head is None:
        return torch.stack(outputs).view_as(tokens)
    merge = block.multi_head.merge_proj
    joined = [
        torch.cat(outputs[first : first + config.num_moe_heads]) for first in range(0, len(flat), config.num_moe_heads)
    ]
    return torch.stack([merge.weight @ token + merge.bias for token in joined]).view_as(tokens)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.numerics
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@every_case
def test_every_experts_implementation_equals_the_naive_reference(name, implementation):
    case = CASES[name]
    block, tokens = block_of(case, seed=1)
    block.train(not case.draws)
    block.gate.config._experts_implementation_internal = implementation
    upstream = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))

    truth, wide_tokens = in_float64(block), tokens.double().requires_grad_()
    expected = reference_output(truth, wide_tokens, case, block.training)
    (expected * upstream.double()).sum().backward()

    tokens.requires_grad_()
    actual = in_sequences(block, tokens)
    (actual * upstream).sum().backward()

    assert relative(actual, expected) <= 1e-5
    assert relative(tokens.grad, wide_tokens.grad) <= 1e-5
    for (parameter_name, parameter), true in zip(block.named_parameters(), truth.parameters(), strict=True):
        if true.grad is None:
            assert parameter.grad is None, f"{parameter_name} is read in training only"
        else:
            assert relative(parameter.grad, true.grad) <= 1e-5, parameter_name


@every_case
def test_gradients_are_those_of_finite_differences(name):
    case = CASES[name]
    block, _ = block_of(case)
    block.double().train(not case.draws)
    tokens = torch.randn(1, 4, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gaps = naive_logits(block.gate, routed_by(block, tokens), 1).sort(-1).values.diff()
    assert gaps.min() > 1e-3, "a tie would make the function discontinuous"
    assert gradcheck(lambda x: in_sequences(block, x), tokens.requires_grad_(), eps=1e-6, atol=1e-6, fast_mode=True)


@every_case
def test_gradient_checkpointing_draws_the_same_and_changes_nothing(name):
    model = CASES[name].model().train()
    ids = random_ids(2, 10)

    def step():
        model.zero_grad()
        torch.manual_seed(9)
        output = model(ids, labels=ids, **given_ids(model.config, ids))
        output.loss.backward()
        return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain, gradients = step()
    model.activation_checkpointing_enable()
    checkpointed, again = step()
    assert torch.equal(plain.loss, checkpointed.loss)
    assert (plain.router_stats or {}) == (checkpointed.router_stats or {})
    assert gradients.keys() == again.keys() == {n for n, _ in model.named_parameters()}
    for parameter_name, gradient in gradients.items():
        assert torch.allclose(gradient, again[parameter_name], rtol=1e-4, atol=1e-7), parameter_name
        if ".gate." in parameter_name:
            assert gradient.abs().max() > 0, f"{parameter_name} does not learn"


@every_case
def test_upcycled_copies_equal_the_dense_model_or_upcycling_says_that_they_cannot(name):
    case = CASES[name]
    fields = {"num_experts": NUM_EXPERTS, **case.fields}
    if not case.upcycles_exactly:
        with pytest.raises(MoEError, match="differ from the dense model's"):
            upcycle(tiny_dense("llama"), **fields)
        return
    assert upcycle(tiny_dense("llama"), **fields).config.upcycling["verification"]["relative_error"] <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_case
def test_logits_of_70000_stay_finite_in_half_precision(name, dtype):
    block, tokens = block_of(CASES[name])
    with torch.no_grad():
        make_logits_huge_(block, tokens)
    block, tokens = block.to(dtype).train(), tokens.to(dtype).requires_grad_()
    with routing_pass(block_pass(block.gate.config, 2, 12, record=True)) as current:
        output = block(tokens)
    # Cosines are bounded.
    assert block.gate.config.router_arch == "cosine" or current.layers[0].router_logits.abs().max() > 69_000
    (1e-3 * output.float()).sum().backward()
    assert output.dtype == dtype and torch.isfinite(output).all() and torch.isfinite(tokens.grad).all()
    for parameter_name, parameter in block.named_parameters():
        if CASES[name].learns_from_reward and parameter is block.gate.weight:
            assert parameter.grad is None
        else:
            assert torch.isfinite(parameter.grad).all(), parameter_name


@every_case
def test_saved_and_loaded_whole_and_in_scope_router(name, tmp_path):
    model = model_of(name).eval()
    model.save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path).eval()
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    for field, value in CASES[name].fields.items():
        assert getattr(loaded.config, field) == value
    ids = random_ids(2, 9)
    assert close(logits(loaded, ids), logits(model, ids))
    assert set(scope_parameter_names(model, "router")) == {n for n, _ in model.named_parameters() if ".mlp.gate." in n}


@pytest.mark.parametrize(("name", "implementation"), sampled(CASES.keys(), ["grouped_mm", "batched_mm"], share=13))
def test_compiles_as_one_graph_or_says_that_it_does_not(name, implementation):
    torch.compiler.reset()
    model = CASES[name].model(layers=1).train()
    model.set_experts_implementation(implementation)
    ids = random_ids(2, 10)
    more = given_ids(model.config, ids)

    def step(function):
        torch.manual_seed(0)
        return function(ids, labels=ids, **more)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if not CASES[name].compiles:
        with pytest.raises(Exception, match="[Dd]ata-dependent"):
            step(compiled)
        return
    expected, actual = step(model), step(compiled)
    assert torch.allclose(actual.loss, expected.loss, atol=1e-5)
    assert torch.allclose(actual.logits, expected.logits, atol=1e-4)
