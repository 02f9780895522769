"""The truth that the fast paths are held to: a double loop over tokens and choices, in float64."""

import copy

import torch
from torch import nn

from moe_hf import MoEConfig
from moe_hf.modeling.dense_mlp import activation_of, find_mlp_sites, holder_of
from moe_hf.modeling.experts import DenseMLP, Experts
from moe_hf.modeling.moe_block import MoEBlock
from tests.tiny_models import tiny_dense


# Kinds of MLP: gated, plain with biases, plain without.
KINDS = {"gated": "llama", "plain_biased": "gpt2", "plain": "nemotron"}


def make_block(kind: str, **fields) -> MoEBlock:
    """A block with random weights and a router that spreads tokens; the last of its experts gets none."""
    dense = tiny_dense(KINDS[kind])
    config = MoEConfig(text_config=dense.config, **{"num_experts": 5, **fields})
    config._experts_implementation_internal = "eager"
    site = find_mlp_sites(dense.base_model)[0]
    block = MoEBlock(config, site, activation_of(holder_of(dense.base_model, site), site))
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return block


def reference_expert(experts: Experts, expert: int, token: torch.Tensor) -> torch.Tensor:
    """What one expert makes of one token, (D,) -> (D,)."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    widths = getattr(experts, "widths", None)
    width = experts.down_proj.shape[-1] if widths is None else widths[expert]
    hidden = getattr(experts, first)[expert] @ token
    if experts.has_bias:
        hidden = hidden + getattr(experts, f"{first}_bias")[expert]
    if experts.has_gate:
        gate, up = hidden.chunk(2)
        hidden = experts.act_fn(gate[:width]) * up[:width]
    else:
        hidden = experts.act_fn(hidden[:width])
    hidden = experts.down_proj[expert][:, :width] @ hidden
    return hidden + experts.down_proj_bias[expert] if experts.has_bias else hidden


def reference_extra_expert(block: MoEBlock, place: int, sequence: torch.Tensor) -> torch.Tensor:
    """What the extra expert at `place` makes of the last token of a sequence (n, D), -> (D,)."""
    kind, expert, token = block.gate.config.extra_experts[place], block.extra_experts[place], sequence[-1]
    if kind == "zero":
        return torch.zeros_like(token)
    if kind == "copy":
        return token
    if kind == "constant":
        kept, replaced = (expert.mix_weight @ token).softmax(0)
        return kept * token + replaced * expert.value
    latest_first = sequence.flip(0)[: len(expert.weight)]
    return sum(weight * value for weight, value in zip(expert.weight, latest_first, strict=False))


def reference_mlp(mlp: DenseMLP, token: torch.Tensor) -> torch.Tensor:
    """A gated MLP without biases, (D,) -> (D,)."""
    hidden = mlp.act_fn(mlp.gate_proj.weight @ token) * (mlp.up_proj.weight @ token)
    return mlp.down_proj.weight @ hidden


def reference_shared(block: MoEBlock, token: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
    """The routed experts' output for one token and the shared expert's, together, (D,)."""
    gate, output = block.shared_expert_gate, reference_mlp(block.shared_expert, token)
    if gate is None:
        return routed + output
    if len(gate.weight) == 1:
        return routed + output / (1 + (-gate.weight[0] @ token).exp())
    first, second = (gate.weight @ token + gate.bias).exp()
    return (first * routed + second * output) / (first + second)


def reference_moe(block: MoEBlock, tokens: torch.Tensor) -> torch.Tensor:
    """What `block` should return for (T, D) tokens: one token and one choice at a time, softmax top-k, normalised."""
    outputs = []
    for token in tokens:
        probabilities = (block.gate.weight @ token).softmax(-1)
        weights, chosen = probabilities.topk(block.gate.config.num_experts_per_tok)
        weights = weights / weights.sum()
        output = torch.zeros_like(token)
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            output = output + weight * reference_expert(block.experts, expert, token)
        outputs.append(output)
    return torch.stack(outputs)


def in_float64(block: MoEBlock) -> MoEBlock:
    """A float64 copy of `block` with gradients of its own."""
    return copy.deepcopy(block).double()
