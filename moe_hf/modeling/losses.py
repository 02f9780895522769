"""The losses of the router: each for one layer, unweighted, without padding, in float32 (float64 logits keep theirs).

A loss is a function of what one router decided in one forward pass, `fn(layer: LayerRouting) -> scalar`; `LOSSES` maps
names to functions. They read the raw logits, before noise and before any choice is dropped. The model takes the mean
over its layers, so that a coefficient does not depend on depth; papers that sum over L layers have coefficients of
1 / L of ours.

Letters: T tokens, E experts, K experts per token, R rows, N sequences.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import distributed as dist
from torch.nn import functional as F

from .configuration_moe import MoEConfig
from .routing import RouterNoise, Routing, router_scores, wide


@dataclass
class LayerRouting:
    """What the router of one layer decided in one forward pass.

    Attributes:
        config: the model's configuration.
        layer_index: the decoder layer, from 0.
        router_logits: raw logits, (T, E), any float dtype.
        routing: the choice: `top_k_index` and `top_k_weights`, (T, K), or (R, 1) with a `token_index`, (R,).
        token_mask: (T,), True for real tokens; None without padding.
        sequence_ids: (T,), in [0, T): equal for tokens of one sequence (one document, when packed); None: one sequence.
        noise: the noise that the choice was made with, in training with `router_noise`; otherwise None.
        step_counts: (E,) int64, choices per expert since the last optimizer step, this pass included, where the router
            keeps them; otherwise None.
        global_counts: (E,), the counts that `balance_loss_scope="global_batch"` scores; None: this layer's own.
        rewards: (T,), how good the prediction at each token was, without a gradient, NaN where nothing was predicted;
            None without labels.
    """

    config: MoEConfig
    layer_index: int
    router_logits: torch.Tensor
    routing: Routing
    token_mask: torch.Tensor | None = None
    sequence_ids: torch.Tensor | None = None
    noise: RouterNoise | None = None
    step_counts: torch.Tensor | None = None
    global_counts: torch.Tensor | None = None
    rewards: torch.Tensor | None = None

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """1 for real tokens, 0 for padding, (T,)."""
        logits = self.router_logits
        mask = self.token_mask
        return logits.new_ones(logits.shape[0], dtype=dtype) if mask is None else mask.to(logits.device, dtype)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over real tokens, (T, ...) -> (...)."""
        if self.token_mask is None:
            return values.mean(0)
        mask = self.mask(values.dtype)
        return (values * mask.view(-1, *[1] * (values.dim() - 1))).sum(0) / mask.sum().clamp_min(1)

    def probabilities(self) -> torch.Tensor:
        """Scores that add up to 1 per token, (T, E): of a sigmoid, divided by their sum (DeepSeek-V3, eq. 19)."""
        scores = router_scores(self.router_logits, self.config.scoring_func)
        if self.config.scoring_func == "sigmoid":
            scores = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
        return scores

    def choices(self, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Every choice, dropped ones included: its token, its expert, and `mask` (T,) at its token, (R * K,) each."""
        routing = self.routing
        index = routing.top_k_index if routing.preferred_index is None else routing.preferred_index
        token = routing.token_index
        token = torch.arange(len(index), device=index.device) if token is None else token
        token = token[:, None].expand(index.shape).reshape(-1)
        return token, index.reshape(-1), mask[token]

    def choice_counts(self) -> torch.Tensor:
        """Choices per expert by real tokens, (E,), int64."""
        _, expert, real = self.choices(self.mask(torch.long))
        return real.new_zeros(self.router_logits.shape[-1]).scatter_add(0, expert, real)


def load_balancing_loss(layer: LayerRouting) -> torch.Tensor:
    """Penalise uneven use of the experts: E * sum_e f_e P_e.

    f_e is the share of the choices that went to expert e and P_e its mean score; only P carries a gradient. It is 1 at
    perfect balance and E / K when K experts take all; it can be a little below 1. `balance_loss_scope` says over which
    tokens f and P are taken:

    - `"micro_batch"`: all of this forward pass on this process.
    - `"sequence"`: each sequence (each document of packed rows) by itself, then the mean over sequences, weighted by
      their tokens: it is the same however sequences are spread over micro-batches. Sequences of one token are left
      out. With a correction bias, f counts the choices as they were without it.
    - `"global_batch"`: in training f counts all processes; where the router keeps counts (`reset_step_counts`; a
      `MoETrainer` sees to it), also the earlier micro-batches of the optimizer step. P is that of this forward pass:
      weighted by tokens, the terms of all processes add up to the loss of their joint batch.

    With `extra_experts`, `router_loss_kwargs["extra_expert_penalty"]`, c, multiplies the terms of those: the loss is
    (E + X / c) * (sum over routed experts f_e P_e + c * sum over extra ones f_e P_e), which is 1 where an extra expert
    gets 1 / c times the tokens of a routed one. c below 1 spares arithmetic.

    Source: Switch Transformer, eq. 4-6 (https://huggingface.co/papers/2101.03961), with f divided by K; `"sequence"`
    DeepSeek-V3, eq. 17-20 (https://huggingface.co/papers/2412.19437); `"global_batch"` Qiu et al.
    (https://huggingface.co/papers/2501.11873); c MoE++, heterogeneous load balance loss
    (https://huggingface.co/papers/2410.07348).
    """
    if layer.config.balance_loss_scope == "sequence":
        return _sequence_balance(layer)
    choice_share, mean_score = _shares(layer)
    penalty = _penalty(choice_share, layer)
    return (1 / penalty).sum() * (penalty * choice_share * mean_score).sum()


def _penalty(like: torch.Tensor, layer: LayerRouting) -> torch.Tensor:
    """What multiplies the term of each expert in the load-balancing loss, (E,), in the dtype of `like`."""
    penalty = like.new_ones(like.shape[-1])
    extra = len(layer.config.extra_experts)
    if extra:
        penalty[-extra:] = layer.config.router_loss_kwargs.get("extra_expert_penalty", 1.0)
    return penalty


def _shares(layer: LayerRouting) -> tuple[torch.Tensor, torch.Tensor]:
    """The share of the choices that each expert took, and its mean score, (E,) each; both add up to 1."""
    probabilities = layer.probabilities()
    counts = layer.choice_counts() if layer.global_counts is None else layer.global_counts
    counts = counts.to(probabilities)
    return counts / counts.sum().clamp_min(1), layer.mean(probabilities)


def _sequence_balance(layer: LayerRouting) -> torch.Tensor:
    """The load-balancing loss of each sequence, averaged over the tokens of sequences of at least two."""
    probabilities = layer.probabilities()  # (T, E)
    mask = layer.mask(probabilities.dtype)
    ids = layer.sequence_ids
    ids = torch.zeros_like(mask, dtype=torch.long) if ids is None else ids.to(mask.device)
    if layer.config.balance_strategy == "bias":
        index = probabilities.topk(layer.config.num_experts_per_tok, dim=-1).indices
        token, expert, real = replace(layer, routing=Routing(index, index)).choices(mask)
    else:
        token, expert, real = layer.choices(mask)
    # At most T sequences: rows without tokens stay zero.
    counts = torch.zeros_like(probabilities).index_put((ids[token], expert), real, accumulate=True)  # (N, E)
    scores = torch.zeros_like(probabilities).index_add(0, ids, probabilities * mask[:, None])
    tokens = torch.zeros_like(mask).index_add(0, ids, mask)  # (N,)
    shares = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    penalty = _penalty(shares, layer)
    balance = (1 / penalty).sum() * (penalty * shares * scores).sum(-1)  # times the tokens of the sequence
    long_enough = tokens > 1
    return (balance * long_enough).sum() / (tokens * long_enough).sum().clamp_min(1)


def device_balance_loss(layer: LayerRouting) -> torch.Tensor:
    """Penalise uneven use of groups of experts that share a device: D * sum_d f_d P_d over D groups.

    f_d and P_d are the shares of the choices and the mean scores of the E / D neighbouring experts of group d, added up.
    It is 1 at balance and D when one group takes all; within a group experts may differ. D is
    `router_loss_kwargs["num_device_groups"]`, and `balance_loss_scope="global_batch"` counts as for the load-balancing
    loss.

    Source: DeepSeekMoE, device-level balance loss (https://huggingface.co/papers/2401.06066).
    """
    groups = layer.config.router_loss_kwargs["num_device_groups"]
    choice_share, mean_score = (share.unflatten(0, (groups, -1)).sum(-1) for share in _shares(layer))
    return groups * (choice_share * mean_score).sum()


def router_z_loss(layer: LayerRouting) -> torch.Tensor:
    """Keep the logits small, in squared logits: the mean over tokens of logsumexp(logits) squared.

    With softmax scores it is (ln E)^2 for logits of zero, and 0 where the logits are logarithms of probabilities. A
    sigmoid has no logsumexp: there it is the mean of the squared logits, 0 for logits of zero.

    Source: ST-MoE, eq. 5 (https://huggingface.co/papers/2202.08906).
    """
    logits = wide(layer.router_logits)
    if layer.config.scoring_func == "sigmoid":
        return layer.mean(logits.square().mean(-1))
    return layer.mean(torch.logsumexp(logits, dim=-1).square())


def squared_variation(values: torch.Tensor) -> torch.Tensor:
    """The squared coefficient of variation of (E,) values, var / mean^2 with the population's variance.

    0 when they are equal, E / K - 1 when K of them share everything.
    """
    return values.var(correction=0) / (values.mean().square() + 1e-10)


def importance_loss(layer: LayerRouting) -> torch.Tensor:
    """Penalise uneven weight on the experts: the squared variation of the weights that tokens gave each of them.

    0 at balance, E / K - 1 when K experts take all. With `load_estimator="shazeer"` these are the mixing weights, so
    experts that were not chosen get no gradient; with `"vmoe"` the scores of all experts.

    Source: Shazeer et al., section 4 (https://huggingface.co/papers/1701.06538); V-MoE, auxiliary losses
    (https://huggingface.co/papers/2106.05974).
    """
    if _load_estimator(layer) == "vmoe":
        return squared_variation(layer.mean(layer.probabilities()))
    weights = layer.routing.top_k_weights.reshape(-1)
    _, expert, real = layer.choices(layer.mask(weights.dtype))
    return squared_variation(weights.new_zeros(layer.router_logits.shape[-1]).scatter_add(0, expert, weights * real))


def load_loss(layer: LayerRouting) -> torch.Tensor | None:
    """Penalise uneven load: the squared variation of how many tokens an expert would get on average over the noise.

    With gaussian noise that is sum_t Phi((logit - threshold) / std), which has a gradient for experts that were not
    chosen too. The threshold is that to be among the K: for `load_estimator="shazeer"` the K-th highest noisy logit of
    the other experts, so the (K + 1)-th of all for one that was chosen; for `"vmoe"` the K-th highest of all, which
    may be the expert's own. 0 at balance, about E / K - 1 at collapse.

    Returns:
        None where there is no noise, as in evaluation.

    Source: Shazeer et al., appendix A (https://huggingface.co/papers/1701.06538); V-MoE, auxiliary losses
    (https://huggingface.co/papers/2106.05974).
    """
    if layer.noise is None:
        return None
    return squared_variation(layer.mean(chance_of_choice(layer)))


def chance_of_choice(layer: LayerRouting) -> torch.Tensor:
    """The chance that an expert is among a token's K, over its own noise with that of the others fixed, (T, E)."""
    noisy, num_chosen = layer.noise.logits, layer.config.num_experts_per_tok
    if _load_estimator(layer) == "vmoe":
        threshold = noisy.topk(num_chosen, dim=-1).values[:, -1:]
    elif num_chosen == noisy.shape[-1]:
        return torch.ones_like(noisy)
    else:
        best = noisy.topk(num_chosen + 1, dim=-1).values
        if_chosen, if_not = best[:, -1:], best[:, -2:-1]
        threshold = torch.where(noisy > if_chosen, if_chosen, if_not)
    return torch.special.ndtr((wide(layer.router_logits) - threshold) / layer.noise.std)


def local_entropy_loss(layer: LayerRouting) -> torch.Tensor:
    """Make tokens decisive: the mean entropy of a token's scores, in nats; 0 when one expert has all, ln E at most.

    Source: LIMoE, local entropy loss (https://huggingface.co/papers/2206.02770); the dynamic loss of top-p routing
    (https://huggingface.co/papers/2403.07652), which keeps the number of experts per token from growing.
    """
    logits = wide(layer.router_logits)
    # A softmax of ln(sigmoid) is a sigmoid divided by its sum.
    logits = F.logsigmoid(logits) if layer.config.scoring_func == "sigmoid" else logits
    return layer.mean(-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1))


def global_entropy_loss(layer: LayerRouting) -> torch.Tensor:
    """Spread tokens over experts: max(0, ln S - H) with H the entropy of the mean scores, in nats.

    0 as soon as the mean scores are as spread as over S experts, ln S when one expert has all. S is
    `router_loss_kwargs["global_entropy_min_experts"]`, E by default, which differs from -H by a constant. The mean is
    over the tokens of this forward pass on this process.

    Source: LIMoE, global entropy loss with threshold (https://huggingface.co/papers/2206.02770).
    """
    mean_score = layer.mean(layer.probabilities())
    # The logarithm of an underflown score has no finite gradient.
    entropy = -(mean_score * mean_score.clamp_min(torch.finfo(mean_score.dtype).tiny).log()).sum()
    least = layer.config.router_loss_kwargs.get("global_entropy_min_experts", mean_score.numel())
    return (math.log(least) - entropy).clamp_min(0)


def sparsity_loss(layer: LayerRouting) -> torch.Tensor:
    """Hold independent gates open at a rate of tau = K / E: sum_e (mean_t p_te - tau)^2 + mean_t (mean_e p_te - tau)^2.

    The first term is about each expert over the tokens, the second about each token over the experts.

    Source: Bengio et al., conditional computation, L_b and L_e (https://huggingface.co/papers/1511.06297), squared.
    """
    opening = router_scores(layer.router_logits, layer.config.scoring_func)
    rate = layer.config.num_experts_per_tok / opening.shape[-1]
    return (layer.mean(opening) - rate).square().sum() + layer.mean((opening.mean(-1) - rate).square())


def gate_variance_loss(layer: LayerRouting) -> torch.Tensor:
    """Make gates differ between tokens: minus the sum over experts of the variance of p over the tokens.

    Source: Bengio et al., conditional computation, L_v (https://huggingface.co/papers/1511.06297).
    """
    opening = router_scores(layer.router_logits, layer.config.scoring_func)
    return -layer.mean((opening - layer.mean(opening)).square()).sum()


def policy_gradient_loss(layer: LayerRouting) -> torch.Tensor | None:
    """Make choices likelier that were followed by good predictions: -mean_t (r_t - b_t) log p(choice_t).

    The reward r_t is the log-probability that the model gave to the next token, and the baseline b_t the mean reward of
    the other tokens, so that the gradient is on average that of the expected reward (REINFORCE). A token's choice is
    credited with its own prediction alone, not with later ones that attend to it.

    Returns:
        None where nothing was drawn or there are no labels, as in evaluation.

    Source: Bengio et al., conditional computation (https://huggingface.co/papers/1511.06297); Williams 1992
    (https://doi.org/10.1007/BF00992696).
    """
    rewards, log_prob = layer.rewards, layer.routing.log_prob
    if rewards is None or log_prob is None:
        return None
    counts = ~rewards.isnan()
    number = counts.sum()
    rewards = rewards.nan_to_num()
    # r - (sum - r) / (n - 1) = n / (n - 1) (r - mean)
    advantage = (rewards - rewards.sum() / number.clamp_min(1)) * number / (number - 1).clamp_min(1)
    return -(advantage * log_prob * counts).sum() / number.clamp_min(1)


def reward_predictions(
    layers: list[LayerRouting], logits: torch.Tensor, labels: torch.Tensor | None, shift_labels: torch.Tensor | None
) -> None:
    """Give each layer its `rewards` from the model's logits (B, S, V) and labels (B, S); nothing without labels."""
    if labels is None and shift_labels is None:
        return
    following = F.pad(labels[:, 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
    following = following.reshape(-1).to(logits.device)
    loss = F.cross_entropy(logits.detach().flatten(0, 1).float(), following, ignore_index=-100, reduction="none")
    rewards = -loss.masked_fill(following == -100, torch.nan)
    for layer in layers:
        sub_tokens = len(layer.router_logits) // len(rewards)
        layer.rewards = rewards.to(layer.router_logits.device).repeat_interleave(sub_tokens)


def _load_estimator(layer: LayerRouting) -> str:
    return layer.config.router_loss_kwargs.get("load_estimator", "shazeer")


LOSSES: dict[str, Callable[[LayerRouting], torch.Tensor | None]] = {
    "load_balancing_loss": load_balancing_loss,
    "router_z_loss": router_z_loss,
    "importance_loss": importance_loss,
    "load_loss": load_loss,
    "local_entropy_loss": local_entropy_loss,
    "global_entropy_loss": global_entropy_loss,
    "device_balance_loss": device_balance_loss,
    "sparsity_loss": sparsity_loss,
    "gate_variance_loss": gate_variance_loss,
    "policy_gradient_loss": policy_gradient_loss,
}


def loss_coefficients(config: MoEConfig) -> dict[str, float]:
    """The coefficient of each loss that the configuration names, zeros included."""
    return {
        "load_balancing_loss": config.router_aux_loss_coef,
        "router_z_loss": config.router_z_loss_coef,
        **config.router_loss_coefs,
    }


def sum_over_ranks(counts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The sum over all processes of each of some (E,) counts, in one collective; what was given stays as it is.

    Processes that hold the same tokens (tensor parallelism) count them alike, which changes no share.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return counts
    joint = torch.cat([count.to(counts[0].device) for count in counts])
    dist.all_reduce(joint)
    return list(joint.split([len(count) for count in counts]))
