"""Quantized experts: codes are the nearest, passes and adapters are those of the decoded weights, errors are reported."""

import copy

import pytest
import torch
from torch import nn

from moe_hf import MoEConfig, MoEError, MoEForCausalLM
from moe_hf.finetuning import (
    ExpertLoraConfig,
    add_expert_lora,
    apply_scope,
    find_moe_blocks,
    lora_adapters,
    merge_expert_lora,
    remove_expert_lora,
)
from moe_hf.inference import QuantizationScheme, model_bytes, quantize_experts, restore_experts
from moe_hf.inference.footprint import logit_error, logits_of
from moe_hf.inference.schemes import NF4_LEVELS
from moe_hf.kernels import StoredExperts, stored_maps
from tests.closeness import close
from tests.kernels.experts_modules import LAYOUTS, make_experts, reference, routed
from tests.kernels.test_grouped_experts import assert_same, outcome, relative_error
from tests.tiny_models import random_ids, randomise_, tiny_config, tiny_native_moe


SCHEMES = {
    "int8": QuantizationScheme("int8"),
    "int8 blocks": QuantizationScheme("int8", 32),
    "nf4": QuantizationScheme("nf4"),
    "nf4 double": QuantizationScheme("nf4", 64, double_quant=True),
}


class Block(nn.Module):
    """A model of one layer, number 0."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].experts = experts


def tiny_upcycled(family: str = "llama", **fields) -> MoEForCausalLM:
    """A MoE of ours with random weights, 4 experts, 2 per token."""
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config(family), num_experts=4, num_experts_per_tok=2, **fields))
    randomise_(model)
    return model.eval()


def matrix(rows: int = 24, columns: int = 40, seed: int = 0) -> torch.Tensor:
    return (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        * torch.logspace(-3, 2, rows)[:, None]
    )


def round_trip(scheme: QuantizationScheme, weight: torch.Tensor) -> torch.Tensor:
    return scheme.decode(scheme.encode(weight), tuple(weight.shape), torch.float64)


@pytest.mark.parametrize("block", [None, 32, 28])
def test_int8_is_within_half_a_step_of_its_block(block):
    weight = matrix()
    error = (round_trip(QuantizationScheme("int8", block), weight) - weight).abs().flatten()
    for start in range(0, weight.numel(), block or 40):
        piece = slice(start, start + (block or 40))
        assert error[piece].max() <= weight.flatten()[piece].abs().max() / 254 * (1 + 1e-5)


@pytest.mark.parametrize("size", [64, 28])
def test_nf4_is_the_nearest_of_the_sixteen_levels(size):
    weight, levels = matrix(), torch.tensor(NF4_LEVELS, dtype=torch.float64)
    decoded = round_trip(QuantizationScheme("nf4", size), weight).flatten()
    for start in range(0, weight.numel(), size):
        block = weight.flatten()[start : start + size].double()
        scale = block.abs().max()
        nearest = (block[:, None] / scale - levels).abs().min(1).values * scale
        error = (decoded[start : start + size] - block).abs()
        torch.testing.assert_close(error, nearest, rtol=1e-6, atol=1e-6 * scale.item())


def test_double_quantization_is_near_the_plain_one_and_smaller():
    weight = matrix(64, 320) / 10
    plain, double = QuantizationScheme("nf4"), QuantizationScheme("nf4", double_quant=True)
    bits = {s: 8 * sum(p.nbytes for p in s.encode(weight).values()) / weight.numel() for s in (plain, double)}
    assert bits[plain] == 4.5
    # 8 bits per 64 values, 32 per 256 of these, one mean.
    assert bits[double] == pytest.approx(4 + 8 / 64 + 32 * 2 / weight.numel() + 32 / weight.numel())
    flat = matrix(64, 320) / torch.logspace(-3, 2, 64)[:, None]
    errors = {s: (round_trip(s, flat) - flat).norm() for s in (plain, double)}
    assert errors[double] <= 1.02 * errors[plain]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_parts_are_those_that_a_file_must_have(scheme):
    for shape in ((3, 10), (24, 40), (80, 512)):
        parts = scheme.encode(torch.randn(shape))
        assert {name: (p.dtype, tuple(p.shape)) for name, p in parts.items()} == scheme.part_shapes(shape)
        assert (scheme.decode(scheme.encode(torch.zeros(shape)), shape, torch.float32) == 0).all()


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_passes_and_gradients_are_those_of_the_decoded_weights(layout, scheme):
    experts = make_experts(layout)
    model, inputs = Block(experts), routed(7, experts=[0, 1, 3, 4])
    quantize_experts(model, scheme)
    decoded = restore_experts(copy.deepcopy(model)).layers[0].experts
    assert type(decoded.down_proj) is nn.Parameter
    names = [name for name, p in experts.named_parameters() if not isinstance(p, StoredExperts)]
    expected, actual = outcome(reference, decoded, *inputs), outcome(type(experts).__call__, experts, *inputs)
    kept = ["output", "tokens", "weights", *names]
    assert_same({n: expected[n] for n in kept}, {n: actual[n] for n in kept}, 1e-13)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_adapters_train_over_quantized_experts_as_over_the_decoded_model(scheme, dora):
    quantized = tiny_native_moe("mixtral")
    quantize_experts(quantized, scheme)
    decoded = restore_experts(copy.deepcopy(quantized))
    grads, logits, ids = [], [], random_ids(2, 12)
    for model in (quantized, decoded):
        add_expert_lora(model, ExpertLoraConfig(r=4, experts={"0": [1, 3], "2": [0]}, use_dora=dora))
        generator = torch.Generator().manual_seed(3)
        for adapter in lora_adapters(model).values():
            for parameter in adapter.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        output = model(inputs_embeds=embeds, labels=ids)
        output.loss.backward()
        logits.append(output.logits.detach())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad} | {"inputs": embeds.grad})
    assert relative_error(logits[1], logits[0]) <= 1e-6
    assert_same(grads[1], grads[0], 1e-6)
    assert all(g.norm() > 0 for g in grads[0].values())
    with pytest.raises(MoEError, match="restore_experts"):
        merge_expert_lora(quantized)
    with pytest.raises(MoEError, match="adapters"):
        restore_experts(quantized)
    remove_expert_lora(quantized)
    remove_expert_lora(decoded)
    assert relative_error(logits_of(decoded, ids), logits_of(quantized, ids)) <= 1e-6


@pytest.mark.parametrize("build", [tiny_upcycled, tiny_native_moe, lambda: tiny_native_moe("qwen3_moe")])
def test_the_report_has_the_bytes_and_the_error_on_the_users_tokens(build):
    model, ids = build(), random_ids()
    plain = copy.deepcopy(model)
    report = quantize_experts(model, "nf4", double_quant=True, tokens=ids)
    modules = [block.experts for block in find_moe_blocks(plain).values()]
    assert sum(report.before.experts.values()) == sum(p.nbytes for m in modules for p in m.parameters())
    assert report.before.rest == report.after.rest
    assert 7 < report.before.experts["cpu"] / report.after.experts["cpu"] < 8
    parts = [
        part
        for b in find_moe_blocks(model).values()
        for w in stored_maps(b.experts).values()
        for part in w.source.parts.values()
    ]
    assert report.after.experts["cpu"] == sum(part.nbytes for part in parts)
    assert report.error == logit_error(logits_of(plain, ids), logits_of(model, ids))
    assert 0.005 < report.error.relative < 0.5
    assert f"{report.error.relative:.2e}" in str(report)
    errors = {s: quantize_experts(copy.deepcopy(plain), s, tokens=ids).error.relative for s in ("int8", "nf4")}
    assert errors["int8"] < errors["nf4"] / 5
    assert model.generate(ids[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)


def test_experts_lose_as_much_as_linears_of_the_same_numbers():
    """Quantized in the same way, the 3-D experts and the 2-D linears of their MLPs have the same error."""
    model = tiny_upcycled()
    for block in find_moe_blocks(model).values():
        experts = {name: parameter.detach().clone() for name, parameter in block.experts.named_parameters()}
        quantize_experts(Block(block.experts), "nf4")
        for name, weight in experts.items():
            for expert, linear in enumerate(weight):
                decoded = getattr(block.experts, name)[expert]
                assert torch.equal(decoded, round_trip(SCHEMES["nf4"], linear).float())


def test_modules_move_and_change_dtype():
    model = tiny_native_moe()
    quantize_experts(model, "int8")
    ids = random_ids(1, 8)
    before = model_bytes(model)
    logits = logits_of(model, ids)
    model.double()
    assert logits_of(model, ids).dtype == torch.float64
    assert relative_error(logits, logits_of(model, ids)) <= 1e-5
    # Codes and scales keep their size.
    assert model_bytes(model).experts == before.experts
    assert logits_of(model.bfloat16(), ids).dtype == torch.bfloat16


# safetensors asks a tensor that has no storage twice.
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_what_cannot_be_is_refused_and_leaves_the_model_alone(tmp_path):
    model, ids = tiny_native_moe(), random_ids(1, 8)
    for arguments in (
        {"scheme": "int3"},
        {"scheme": "nf4", "block_size": 7},
        {"scheme": "int8", "double_quant": True},
    ):
        with pytest.raises(MoEError):
            quantize_experts(model, **arguments)
    broken = copy.deepcopy(model)
    list(find_moe_blocks(broken).values())[-1].experts.down_proj.data[1, 2, 3] = float("nan")
    with pytest.raises(MoEError, match="infinite or NaN"):
        quantize_experts(broken, "int8")
    assert not any(isinstance(p, StoredExperts) for p in broken.parameters())
    quantize_experts(model, "int8")
    expected = logits_of(model, ids)
    with pytest.raises(MoEError, match="quantized or offloaded"):
        quantize_experts(model, "int8")
    with pytest.raises(MoEError, match="stay frozen"):
        apply_scope(model, "experts")
    with pytest.raises(MoEError, match="save_low_memory"):
        model.save_pretrained(tmp_path / "plain")
    with pytest.raises(MoEError, match="one at a time"):
        next(iter(find_moe_blocks(model).values())).experts.down_proj + 1
    assert torch.equal(logits_of(model, ids), expected)
    with pytest.raises(MoEError, match="no MoE block"):
        quantize_experts(nn.Linear(2, 2), "int8")


@pytest.mark.numerics
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_compiled_model_gives_the_same_logits_and_one_whole_graph_is_refused(scheme):
    model, ids = tiny_native_moe("mixtral", num_hidden_layers=1).eval(), random_ids(1, 8)
    quantize_experts(model, scheme)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        # The generated code of the default backend needs a compiler, and is not what is tested here.
        assert close(torch.compile(model, backend="aot_eager")(input_ids=ids).logits, expected)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True, or restore_experts"):
            torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids)
