"""Experts modules of every layout that transformers has, tiny, and the double loop that defines what they compute."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.integrations import use_experts_implementation


D, WIDTH, E = 24, 40, 6
LAYOUTS = {
    "gated": {},
    "plain": {"has_gate": False},
    "transposed": {"is_transposed": True},
    "biased": {"has_bias": True},
    "plain_biased": {"has_gate": False, "has_bias": True},
    "interleaved": {"is_concatenated": False, "is_transposed": True, "has_bias": True},
    "normed": {"has_post_expert_norm": True},
    "own_parameters": {},
}


class PiecewiseSlope(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, x * self.slope)


def limited_interleaved_gate(self, hidden: torch.Tensor) -> torch.Tensor:
    gate, up = hidden[..., ::2].clamp(max=1.5), hidden[..., 1::2].clamp(-1.5, 1.5)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def make_experts(layout: str, dtype: torch.dtype = torch.float64, seed: int = 0, num_experts: int = E) -> nn.Module:
    """Return random experts of `layout`: D 24, F 40, E 6, behind the experts interface, run by `eager`."""
    options = LAYOUTS[layout]

    class Stacked(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = num_experts
            first = "gate_up_proj" if options.get("has_gate", True) else "up_proj"
            outputs = 2 * WIDTH if options.get("has_gate", True) else WIDTH
            for name, rows, columns in ((first, outputs, D), ("down_proj", D, WIDTH)):
                shape = (columns, rows) if options.get("is_transposed") else (rows, columns)
                self.register_parameter(name, nn.Parameter(torch.randn(num_experts, *shape) * columns**-0.5))
                if options.get("has_bias"):
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(num_experts, rows) * 0.3))
            self.act_fn = PiecewiseSlope() if layout == "own_parameters" else nn.SiLU()
            if layout == "plain":
                self.act_fn = nn.GELU(approximate="tanh")
            if options.get("has_post_expert_norm"):
                self.post_expert_norm = nn.RMSNorm(D, eps=1e-6)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return reference(self, hidden_states, top_k_index, top_k_weights)

    if layout == "interleaved":
        Stacked._apply_gate = limited_interleaved_gate
    decorated = use_experts_implementation(Stacked, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return decorated(PreTrainedConfig(experts_implementation="eager")).to(dtype)


def reference(experts: nn.Module, hidden_states, top_k_index, top_k_weights, extra=None) -> torch.Tensor:
    """The definition: one token and one choice at a time; `extra(name, expert, x)` is added to a map's output."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"

    def linear(name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(experts, name)[expert]
        bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
        y = F.linear(x, weight.t() if experts.is_transposed else weight, bias)
        return y if extra is None else y + extra(name, expert, x)

    outputs = []
    for token in range(hidden_states.shape[0]):
        total = torch.zeros_like(hidden_states[0])
        for choice in range(top_k_index.shape[1]):
            expert = int(top_k_index[token, choice])
            if expert >= experts.num_experts:
                continue
            hidden = linear(first, expert, hidden_states[token][None])
            hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
            output = linear("down_proj", expert, hidden)
            if experts.has_post_expert_norm:
                output = experts.post_expert_norm(output)
            total = total + output[0] * top_k_weights[token, choice]
        outputs.append(total)
    return torch.stack(outputs) if outputs else hidden_states * 1.0


def routed(num_tokens: int, num_choices: int = 2, experts: range = range(E), dtype=torch.float64, seed: int = 1):
    """Return tokens (T, D), distinct choices among `experts` (T, K) and weights (T, K), all seeded."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(num_tokens, D, generator=generator, dtype=torch.float64).to(dtype)
    scores = torch.rand(num_tokens, len(experts), generator=generator)
    index = torch.tensor(list(experts))[scores.argsort(1)[:, :num_choices]].view(num_tokens, num_choices)
    weights = torch.rand(num_tokens, num_choices, generator=generator, dtype=torch.float64).to(dtype)
    return tokens, index, weights
