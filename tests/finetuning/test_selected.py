"""Chosen experts train as they would in the full model, alone; the model stays a plain one from the outside."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_hf
from moe_hf import MoEConfig, MoEError, MoEForCausalLM
from moe_hf.finetuning import apply_scope, find_moe_blocks, merge_selected_experts, scope_parameter_names
from tests.closeness import close
from tests.tiny_models import random_ids, tiny_config, tiny_dense, tiny_native_moe


# Layers differ in which and how many experts train; the middle one has none.
CHOICE = {"0": [1], "2": [3, 0]}
NATIVE = ("mixtral", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3", "granitemoe", "gpt_oss", "aria_text")
KINDS = ("ours", "ours plain biased", *NATIVE)


def tiny(kind):
    if kind == "ours":
        return moe_hf.upcycle(tiny_dense("llama"), num_experts=4, noise=0.5, seed=1)
    if kind == "ours plain biased":
        return moe_hf.upcycle(tiny_dense("gpt2"), num_experts=4, noise=0.5, seed=1)
    fields = {"glm4_moe": {"first_k_dense_replace": 0}}
    fields["aria_text"] = {"moe_num_experts": 4}
    fields["deepseek_v3"] = fields["glm4_moe"] | {"n_group": 2, "topk_group": 1}
    return tiny_native_moe(kind, **fields.get(kind, {}))


def choice(model):
    """`CHOICE` by the names of the model's blocks."""
    blocks = list(find_moe_blocks(model))
    return {blocks[int(layer)]: ids for layer, ids in CHOICE.items()}


def selected(model, **arguments):
    """A copy of `model` in which the experts of `CHOICE` train."""
    model = copy.deepcopy(model)
    apply_scope(model, "selected", expert_selection=choice(model), **arguments)
    return model


def step(model, ids):
    """Logits and gradients by name of one training pass."""
    model.zero_grad()
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def rows_of(gradients, model):
    """From gradients of a full model those of the chosen rows, under the names that they have in a selected one."""
    rows = {}
    for block, ids in choice(model).items():
        prefix = f"{block}.experts."
        for name, gradient in gradients.items():
            if name.startswith(prefix):
                rows[name.replace(prefix, f"{prefix}selected.")] = gradient[sorted(ids)]
    return rows


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def check_equal(model, full, ids, tolerance):
    logits, gradients = step(model, ids)
    expected_logits, expected = step(full, ids)
    expected = rows_of(expected, full)
    assert gradients.keys() == expected.keys() and expected
    assert error(logits, expected_logits) <= tolerance
    worst = max(error(gradients[name], gradient) for name, gradient in expected.items())
    assert worst <= tolerance, worst


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_full_model(kind):
    full = tiny(kind)
    check_equal(selected(full), full, random_ids(), 3e-6)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["ours", "mixtral", "gpt_oss"])
def test_every_experts_implementation_is_equalled(kind, implementation):
    full = tiny(kind)
    full.set_experts_implementation(implementation)
    check_equal(selected(full), full, random_ids(1, 24), 3e-6)


@pytest.mark.parametrize("kind", ["ours", "ours plain biased", "gpt_oss"])
def test_double_precision_equals_the_eager_experts(kind):
    full = tiny(kind).double()
    full.set_experts_implementation("eager")
    # Routers and norms of some families compute in float32 whatever the model's dtype.
    check_equal(selected(full, master_dtype=None), full, random_ids(1, 12), 1e-6 if kind == "gpt_oss" else 1e-10)


@pytest.mark.parametrize("kind", ["ours plain biased", "mixtral", "gpt_oss"])
def test_float32_masters_of_bfloat16_experts_compute_in_bfloat16(kind):
    full = tiny(kind).to(torch.bfloat16)
    model = selected(full)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    block = next(iter(choice(full)))
    tokens = torch.randn(64, full.get_submodule(block).experts.down_proj.shape[1 if kind != "gpt_oss" else 2])
    index = torch.rand(64, 4).argsort(-1)[:, :2]
    results = []
    for one in (model, full):
        experts = one.get_submodule(block).experts
        inputs = tokens.to(torch.bfloat16).requires_grad_()
        weights = torch.full((64, 2), 0.5).requires_grad_()
        output = experts(inputs, index, weights)
        output.backward(torch.ones_like(output))
        ids = sorted(choice(full)[block])
        grads = experts.selected.named_parameters() if one is model else experts.named_parameters()
        grads = {name: p.grad if one is model else p.grad[ids] for name, p in grads}
        results.append({"output": output, "inputs": inputs.grad, "weights": weights.grad} | grads)
    for name, expected in results[1].items():
        assert error(results[0][name].float(), expected.float()) <= 1e-2, name


@pytest.mark.parametrize("fields", [{"router_type": "top_p"}, {"extra_experts": ["zero", "copy"]}], ids=str)
def test_rows_and_ids_of_other_routers_are_served(fields):
    config = MoEConfig(text_config=tiny_config("llama"), num_experts=4, **fields)
    full = MoEForCausalLM(config).eval()
    check_equal(selected(full), full, random_ids(), 3e-6)


@pytest.mark.parametrize("kind", ["ours", "mixtral", "gpt_oss"])
def test_gradient_checkpointing_changes_nothing(kind):
    model, ids = selected(tiny(kind)).train(), random_ids()
    logits, expected = step(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": False})
    again, gradients = step(model, ids)
    assert torch.equal(logits, again)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def test_compiled_block_computes_the_same():
    block = selected(tiny("mixtral")).model.layers[0].mlp
    results = []
    for call in (block, torch.compile(block, backend="aot_eager")):
        inputs = torch.randn(1, 24, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
        block.zero_grad()
        output = call(inputs)
        output.square().sum().backward()
        results.append((output.detach(), inputs.grad, *(p.grad for p in block.experts.selected.parameters())))
    assert all(error(actual, expected) <= 1e-6 for expected, actual in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["ours", "ours plain biased", "mixtral"])
def test_only_the_chosen_rows_change_under_adamw_with_decay(kind):
    full = tiny(kind)
    model, before = selected(full), full.state_dict()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    for seed in range(4):
        step(model, random_ids(seed=seed))
        optimizer.step()
    after = model.state_dict()
    assert after.keys() == before.keys()
    chosen = choice(full)
    for name, tensor in before.items():
        block, _, part = name.rpartition(".experts.")
        ids = set(chosen.get(block, ())) if part else set()
        for row in range(len(tensor)):
            assert torch.equal(after[name][row], tensor[row]) == (row not in ids), (name, row)


def test_memory_gradients_and_optimizer_state_are_those_of_the_chosen_experts():
    full = tiny("mixtral")
    model, ids = selected(full), random_ids()
    _, gradients = step(model, ids)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    one = sum(p[0].numel() for p in full.model.layers[0].mlp.experts.parameters())
    count = sum(map(len, CHOICE.values()))
    assert sum(g.numel() for g in gradients.values()) == count * one
    state = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    assert sum(t.numel() for t in state) == 2 * count * one
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in full.parameters()) + count * one


def test_an_expert_without_tokens_has_zero_gradients():
    model = tiny("mixtral")
    unused = {2: 0}
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[0] = 0
        layer.mlp.gate.register_forward_hook(lambda *args: (args[2][0], args[2][1], args[2][2].clamp(min=1)))
    apply_scope(model, "selected", expert_selection={str(layer): [expert] for layer, expert in unused.items()})
    _, gradients = step(model, random_ids())
    assert len(gradients) == 2 and all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_model_is_a_plain_full_one(kind, tmp_path):
    model = selected(tiny(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".selected." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not any("selected" in name for name, _ in plain.named_parameters())
    ids = random_ids()
    with torch.no_grad():
        assert error(model(ids).logits, plain(ids).logits) <= 3e-6
        assert error(model(ids).logits, tiny(kind)(ids).logits) > 1e-3


@pytest.mark.numerics
def test_merging_gives_the_plain_module_back_and_other_scopes_merge():
    full = tiny("mixtral")
    model = selected(full)
    with torch.no_grad():
        model.model.layers[2].mlp.experts.selected.down_proj.add_(1.0)
    expected, ids = copy.deepcopy(model.state_dict()), random_ids()
    merge_selected_experts(model)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in full.named_parameters()}
    assert [type(m) for m in model.modules()] == [type(m) for m in full.modules()]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    full.load_state_dict(expected)
    assert close(model(ids).logits, full(ids).logits)
    model = selected(full)
    report = apply_scope(model, "experts")
    assert report.names == scope_parameter_names(full, "experts")


def test_state_dict_of_a_full_model_loads_into_the_chosen_experts():
    model, other = selected(tiny("mixtral")), tiny_native_moe("mixtral", seed=5)
    model.load_state_dict(other.state_dict())
    assert error(model(random_ids()).logits, other(random_ids()).logits) <= 1e-6
    weights = model.model.layers[2].mlp.experts.selected
    assert torch.equal(weights.down_proj, other.model.layers[2].mlp.experts.down_proj[[0, 3]])


@pytest.mark.numerics
def test_copies_and_pickles_compute_the_same():
    model, ids = selected(tiny("mixtral")), random_ids()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert close(other(ids).logits, model(ids).logits)
        other.model.layers[0].mlp.experts.selected.down_proj.data.zero_()
        assert error(other(ids).logits, model(ids).logits) > 1e-4


def test_greedy_decoding_is_that_of_the_full_model():
    full, prompt = tiny("mixtral"), random_ids(2, 6)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(selected(full).generate(prompt, **settings), full.generate(prompt, **settings))


def test_report_counts_chosen_experts_once():
    full = tiny("mixtral")
    report = apply_scope(copy.deepcopy(full), "selected", expert_selection=CHOICE)
    assert report.total_parameters == sum(p.numel() for p in full.parameters())
    assert report.trainable_parameters == 3 * sum(p[0].numel() for p in full.model.layers[0].mlp.experts.parameters())


def test_shared_experts_and_the_rest_train_when_the_selection_says_so():
    model = tiny("glm4_moe")
    names = {scope: set(scope_parameter_names(model, scope)) for scope in ("shared", "non_moe")}
    for switches in ({"shared_experts": True}, {"non_expert_modules": True}):
        report = apply_scope(model, "selected", expert_selection={"experts": CHOICE, **switches})
        scope = "shared" if "shared_experts" in switches else "non_moe"
        own = {name for name in report.names if ".selected." in name}
        assert len(own) == 4 and set(report.names) == own | names[scope]
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(report.names)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: tiny("mixtral"), {"scope": "selected"}, "needs expert_selection"),
        (lambda: tiny("mixtral"), {"scope": "moe", "expert_selection": CHOICE}, "needs expert_selection"),
        (lambda: tiny("mixtral"), {"scope": "selected", "expert_selection": {"0": [9]}}, "names expert 9"),
        (lambda: tiny_dense("llama"), {"scope": "selected", "expert_selection": CHOICE}, "no layer"),
        (lambda: tiny("mixtral"), {"scope": "selected", "expert_selection": {"experts": CHOICE, "shared_experts": True}},
         "matches no parameter"),
        (lambda: MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), num_experts=4, num_experts_per_tok=4, router_type="segment_merge")),
         {"scope": "selected", "expert_selection": CHOICE}, "mix the weights"),
    ],
)  # fmt: skip
def test_choices_that_cannot_train_are_refused_and_change_nothing(make, arguments, message):
    model = make()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(MoEError, match=message):
        apply_scope(model, **arguments)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
