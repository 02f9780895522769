"""Experts, routers and quantized folders that load and compute something else: bugs of public issues, and every way to scramble."""

import json

import pytest
import torch
from safetensors.torch import load_file

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.doctor import examine
from tests.doctor.faults import found, is_silent, learnt, places, reconfigure, rewrite, saved, trained
from tests.tiny_models import random_ids, tiny_config


SQUARE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}

EVERYWHERE = {(layer, expert) for layer in range(3) for expert in range(8)}


def per_expert(change):
    """A change of (gate, up, down) of each expert of qwen3_moe, as a change of a file."""

    def of_file(tensors):
        for layer in range(3):
            for expert in range(8):
                names = [f"model.layers.{layer}.mlp.experts.{expert}.{p}_proj.weight" for p in ("gate", "up", "down")]
                for name, tensor in zip(names, change(*(tensors[n] for n in names)), strict=True):
                    tensors[name] = tensor.contiguous()

    return of_file


def weave(gate, up, down):
    return *torch.stack([gate, up], 1).flatten(0, 1).chunk(2), down


def unweave(gate, up, down):
    both = torch.cat([gate, up])
    return both[::2], both[1::2], down


FAULTS = {
    "gate-up-swapped": lambda g, u, d: (u, g, d),
    "transposed": lambda g, u, d: (g, u, d.t()),
    "interleaved": weave,
    "neurons-reordered": lambda g, u, d: (g, u, d[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]),
    "scaled": lambda g, u, d: (g, u, d * 448),
}


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """A base whose matrices are square, and a function that writes a changed and trained copy of it."""
    root = tmp_path_factory.mktemp("scrambled")
    base = saved(learnt("qwen3_moe", **SQUARE), root / "base")
    counter = iter(range(1000))

    def copy(change=None, by=0.1):
        model = learnt("qwen3_moe", **SQUARE)
        folder = saved(trained(model, by=by) if by else model, root / f"copy{next(counter)}")
        return folder if change is None else rewrite(folder, change)

    return base, copy


@pytest.mark.parametrize("code", [*FAULTS, "unwoven"])
def test_a_scrambled_expert_is_named_beside_its_base(square, code):
    """thinking-machines-lab/tinker-cookbook#457 and the rest of its kind: the numbers are there, in other places."""
    base, copy = square
    change = unweave if code == "unwoven" else FAULTS[code]
    report = examine(copy(per_expert(change), by=0 if code == "scaled" else 0.1), base=base)
    assert places(found(report, "interleaved" if code == "unwoven" else code)) == EVERYWHERE


def test_what_changes_nothing_is_no_fault(square):
    """Neurons in another order in all three matrices, and a factor from up to down, give the same function."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    base, copy = square
    assert is_silent(examine(copy(per_expert(lambda g, u, d: (g[order], u[order], d[:, order]))), base=base))
    assert is_silent(examine(copy(per_expert(lambda g, u, d: (g, u * 4, d / 4)), by=0), base=base))


@pytest.mark.parametrize("code", ["gate-up-swapped", "transposed"])
def test_one_expert_that_is_not_like_its_siblings_needs_no_base(square, code):
    """NVIDIA-NeMo/Megatron-Bridge#3743: where siblings share the model's side, they tell."""

    def one(tensors):
        names = [f"model.layers.1.mlp.experts.3.{p}_proj.weight" for p in ("gate", "up", "down")]
        for name, tensor in zip(names, FAULTS[code](*(tensors[n] for n in names)), strict=True):
            tensors[name] = tensor.contiguous()

    report = examine(square[1](one))
    assert places(found(report, code)) == {(1, 3)}
    assert len(report.errors) == 1, report.to_text()


@pytest.mark.parametrize("change", [weave, unweave], ids=["woven", "unwoven"])
def test_rows_in_turns_need_neither_base_nor_siblings(square, change):
    """Gate and up differ, and the neurons of one have no order: one expert alone tells how its rows lie."""
    report = examine(square[1](per_expert(change)))
    assert {f.layers for f in found(report, "interleaved")} == {(0,), (1,), (2,)}


def test_a_part_of_a_matrix_that_was_never_filled(square):
    """One rank of two wrote its columns; neurons that are zero in all matrices are pruned, and no fault."""
    name = "model.layers.1.mlp.experts.2.{}_proj.weight"

    def lose(tensors):
        tensors[name.format("down")][:, 32:] = 0

    def prune(tensors):
        lose(tensors)
        tensors[name.format("gate")][32:] = 0
        tensors[name.format("up")][32:] = 0

    assert places(found(examine(square[1](lose)), "experts-zero", "warning")) == {(1, 2)}
    assert is_silent(examine(square[1](prune)))


def test_inputs_in_another_order_than_the_model_has_them(square):
    def roll(tensors):
        name = "model.layers.2.mlp.experts.3.gate_proj.weight"
        tensors[name] = tensors[name].roll(1, 1)

    base, copy = square
    assert places(found(examine(copy(roll), base=base), "neurons-reordered")) == {(2, 3)}


def permuted(tensors, order, with_router):
    result = dict(tensors)
    for name, tensor in tensors.items():
        if ".experts." in name:
            expert = int(name.split(".experts.")[1].split(".")[0])
            result[name.replace(f".experts.{expert}.", f".experts.{order[expert]}.")] = tensor
        elif name.endswith("mlp.gate.weight") and with_router:
            inverse = torch.tensor(order).argsort()
            result[name] = tensor[inverse]
    return result


@pytest.mark.parametrize("order", [[1, 2, 3, 4, 5, 6, 7, 0], [0, 4, 1, 5, 2, 6, 3, 7], [7, 6, 5, 4, 3, 2, 1, 0]])
def test_experts_in_another_order_than_their_router(square, order):
    """NVIDIA-NeMo/Automodel#2595 and its kind: names of expert-parallel ranks become other numbers."""
    base, copy = square
    wrong = {(layer, order[e]) for layer in range(3) for e in range(8) if order[e] != e}
    report = examine(copy(lambda t: permuted(t, order, False)), base=base)
    assert places(found(report, "experts-permuted")) == wrong
    assert is_silent(examine(copy(lambda t: permuted(t, order, True)), base=base))


def test_experts_of_other_layers(square):
    """Pipeline ranks that number their layers from 0: modelscope/ms-swift#6447 and its kind."""

    def exchange(tensors):
        return {
            n.replace("layers.0.", "layers.x.").replace("layers.2.", "layers.0.").replace("layers.x.", "layers.2.")
            if ".experts." in n
            else n: v
            for n, v in tensors.items()
        }

    base, copy = square
    report = examine(copy(exchange), base=base)
    assert sorted(f.layers for f in found(report, "layers-swapped")) == [(0,), (2,)]


def test_an_expert_that_was_written_over_another(square):
    """KempnerInstitute/KempnerForge#202 with some training after it: no two are equal, and one is lost."""

    def overwrite(tensors):
        for part in ("gate", "up", "down"):
            name = "model.layers.1.mlp.experts.{}." + f"{part}_proj.weight"
            tensors[name.format(5)] = tensors[name.format(2)] + 1e-3

    base, copy = square
    assert (1, 5) in places(found(examine(copy(overwrite), base=base), "experts-overwritten"))


def test_gate_and_up_exchanged_in_every_layer_are_told_by_the_loss(tmp_path):
    """Without a base or a sibling that is right, the loss on data tells, in a model that has learnt it."""
    model, ids = taught()
    assert is_silent(examine(model, data=ids))
    for layer in model.model.layers:
        weight = layer.mlp.experts.gate_up_proj
        weight.data.copy_(weight.data.roll(weight.shape[1] // 2, 1))
    report = examine(model, data=ids)
    assert found(report, "gate-up-swapped")[0].layers == (0, 1, 2)


def taught():
    """A tiny MoE that knows a text by heart, and the text."""
    config = MoEConfig(text_config=tiny_config("llama"), num_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    model = MoEForCausalLM(config)
    ids = random_ids(1, 12).repeat(8, 4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids[:2], labels=ids[:2]).loss.backward()
        optimizer.step()
    return model.eval(), ids


def router_of(layer):
    return f"model.layers.{layer}.mlp.gate.weight"


@pytest.mark.parametrize(
    ("code", "change", "where"),
    [
        ("router-zero", lambda w: w * 0, set()),
        ("router-row-zero", lambda w: w * (torch.arange(8) != 6)[:, None], {(1, 6)}),
        ("router-rows-alike", lambda w: w[[0, 1, 2, 3, 4, 5, 6, 2]], {(1, 2), (1, 7)}),
        ("router-saturated", lambda w: w * 1000, set()),
    ],
)
def test_routers_that_cannot_do_their_work(square, code, change, where):
    """huggingface/transformers#42306 and its kind: a router that nobody filled, or filled twice."""
    findings = found(examine(square[1](lambda t: t | {router_of(1): change(t[router_of(1)])})), code, "warning")
    assert findings[0].layers == (1,)
    assert places(findings) == where


def test_a_correction_bias_that_bars_an_expert(tmp_path):
    """A bias that was moved without end, NVIDIA/Megatron-LM#4785 and its kind: the expert is dead weight."""
    model = learnt("glm4_moe", moe_intermediate_size=56, num_hidden_layers=2)
    model.model.layers[1].mlp.gate.e_score_correction_bias.data[3] = -7.0
    assert places(found(examine(model), "bias-bars-expert", "warning")) == {(1, 3)}


@pytest.mark.parametrize(
    "fields",
    [{"num_local_experts": 4}, {"num_local_experts": 12}, {"num_experts_per_tok": 9}, {"intermediate_size": 48}],
)
def test_a_configuration_of_another_model(tmp_path, fields):
    """deepspeedai/DeepSpeed#2413 and its kind: config.json and weights that do not go together."""
    folder = reconfigure(saved(learnt(), tmp_path / "m"), **fields)
    codes = {finding.code for finding in examine(folder).errors}
    assert codes & {"config-contradicts-weights", "experts-missing", "wrong-shape"}


def quantized(folder, weights, router=False, scales=True):
    """A folder in float8 with a scale for each row, of the names that `weights` says."""

    def change(tensors):
        result = {}
        for name, tensor in tensors.items():
            if weights(name) or (router and name.endswith("gate.weight")):
                scale = tensor.abs().amax(1, keepdim=True) / 448
                result[name] = (tensor / scale).to(torch.float8_e4m3fn)
                if scales:
                    result[f"{name}_scale"] = scale
            else:
                result[name] = tensor
        return result

    settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head", "re:.*gate$"]}
    return reconfigure(rewrite(folder, change), quantization_config=settings)


def test_quantized_folders(tmp_path):
    """bitsandbytes-foundation/bitsandbytes#1849, NVIDIA/Model-Optimizer#1173: the experts stay in full precision."""
    is_expert, is_attention = (lambda n: ".experts." in n), (lambda n: "self_attn" in n and "proj" in n)
    model, base = learnt("qwen3_moe"), saved(learnt("qwen3_moe"), tmp_path / "base")
    make = lambda name, *rest, **more: quantized(saved(model, tmp_path / name), *rest, **more)  # noqa: E731
    skipped = examine(make("attention", is_attention))
    assert [f.layers for f in found(skipped, "experts-not-quantized", "warning")] == [(0,), (1,), (2,)]
    good = make("good", is_expert)
    report = examine(good, base=base)
    assert is_silent(report)
    assert found(report, "quantization-error", "note")[0].figure > 0.99
    # warpfront/hipfire#171, huggingface/transformers#48801: routing flips where the router is rounded.
    assert found(examine(make("router", is_expert, router=True)), "router-quantized", "warning")
    # NVIDIA/Model-Optimizer#1858: routers that the list of what is not quantized does not name.
    settings = json.loads((good / "config.json").read_text())["quantization_config"] | {"ignore": ["lm_head"]}
    unlisted = reconfigure(make("unlisted", is_expert), quantization_config=settings)
    assert found(examine(unlisted), "router-not-listed", "warning")
    assert found(examine(make("scales", is_expert, scales=False)), "scales-missing")
    untold = reconfigure(make("untold", is_expert), quantization_config=...)
    assert found(examine(untold), "quantization-untold")
    some = make("some", lambda n: ".experts." in n and ".experts.4." not in n)
    assert places(found(examine(some), "quantized-unevenly", "warning")) == {(layer, 4) for layer in range(3)}
    # NVIDIA-NeMo/Automodel#2682 in float8: an expert whose scales are another's.
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    broken = rewrite(make("broken", is_expert), lambda t: t | {name: t[name][:, torch.arange(55, -1, -1)]})
    assert (1, 2) in {(layer, e) for f in examine(broken, base=base).errors for layer in f.layers for e in f.experts}


def test_the_order_of_gate_and_up_of_interleaved_families_is_read_as_they_compute_it(tmp_path):
    """gpt_oss stores gate and up in turns, transposed: a piece is what the expert computes with."""
    from moe_hf.doctor.opening import open_folder

    model = learnt("gpt_oss")
    folder = saved(model, tmp_path / "m")
    opened = open_folder(folder, "m")
    matrices = opened.blocks[1].matrices(opened.tensors, 3)
    weight = load_file(folder / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj"][3]
    assert torch.equal(matrices["gate"], weight[:, ::2].t())
    assert torch.equal(matrices["up"], weight[:, 1::2].t())
