"""Text of an unknown domain: the predictions under each id, weighted by how well each explained the text so far.

A model whose experts belong to domains, languages or tasks (`expert_groups`, `routing_level="task"`) needs an id for each
text. Where it is not known, the posterior over the ids, given the tokens so far, weighs a forward pass for each.

Letters: B batch, S sequence, N ids, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moe_hf.errors import MoEError
from moe_hf.modeling.modeling_moe import MoEForCausalLM
from moe_hf.modeling.routing_ids import id_counts
from moe_hf.unwrapping import unwrapped


@dataclass(frozen=True)
class MixedPrediction:
    """What `DomainMixture` predicts.

    Attributes:
        log_probs: log p(x_(t + 1) | x_1 ... x_t) of each token, (B, S, V) float32.
        posterior: p(id | x_1 ... x_t), the weights of these predictions, (B, S, N) float32; the last column of a row is
            about the whole text.
        loss: the mean of -log p over the predicted tokens, in nats/token, a scalar.
    """

    log_probs: torch.Tensor
    posterior: torch.Tensor
    loss: torch.Tensor


class DomainMixture:
    """Predicts and generates by p(x_(t+1) | x_<=t) = sum_j p(j | x_<=t) p(x_(t+1) | x_<=t, j) over ids j.

    p(j | x_<=t) is in proportion to prior_j prod_(s<=t) p(x_s | x_<s, j): it depends on earlier tokens alone. Where the
    domain of many texts is the same, `estimate_prior` learns a prior from some of them, so that the first tokens of
    the next one are predicted well too. It costs a forward pass for each id, and a cache for each in generating.

    Args:
        model (`MoEForCausalLM`): whose routers tell apart ids of one kind; it is put into evaluation mode.
        prior (`torch.Tensor`, *optional*): (N,), at least 0; only proportions matter. Uniform when not given.

    Raises:
        MoEError: the routers read no ids, or ids of several kinds; or a prior of another shape.

    Source: DEMix, section 4, mixtures of domain experts at inference (https://huggingface.co/papers/2108.05036).
    """

    def __init__(self, model: MoEForCausalLM, prior: torch.Tensor | None = None) -> None:
        model = unwrapped(model)
        counts = {kind: count for kind, count in id_counts(model.config).items() if count > 1}
        if len(counts) != 1:
            raise MoEError(
                f"A mixture goes over the ids of one kind, and the routers of this model tell apart {sorted(counts) or 'none'}: "
                "set expert_groups or num_tasks for one kind."
            )
        ((self.kind, self.num_ids),) = counts.items()
        self.model = model.eval()
        self.prior = torch.full((self.num_ids,), 1 / self.num_ids) if prior is None else self._checked(prior)

    def _checked(self, prior: torch.Tensor) -> torch.Tensor:
        prior = torch.as_tensor(prior, dtype=torch.float32)
        is_prior = prior.shape == (self.num_ids,) and bool(torch.isfinite(prior).all() and (prior >= 0).all())
        if not is_prior or prior.sum() == 0:
            raise MoEError(
                f"prior is {prior.tolist()}; it must have a number of at least 0 for each of {self.num_ids} ids, and one above."
            )
        return prior / prior.sum()

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> MixedPrediction:
        """Predict each next token of (B, S) token ids; padding, by `attention_mask` (B, S), says nothing about the domain."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        likelihoods = torch.stack(
            [self._log_probs(input_ids, mask, i) for i in range(self.num_ids)], 2
        )  # (B, S, N, V)
        # A token counts where it is real and one before it predicted it.
        is_scored = (mask[:, 1:] * mask[:, :-1]).bool()[..., None]
        own = likelihoods[:, :-1].gather(-1, input_ids[:, 1:, None, None].expand(-1, -1, self.num_ids, 1)).squeeze(-1)
        evidence = F.pad(own.masked_fill(~is_scored, 0).cumsum(1), (0, 0, 1, 0))  # (B, S, N)
        log_posterior = (self.prior.to(evidence.device).log() + evidence).log_softmax(-1)
        mixed = (log_posterior[..., None] + likelihoods).logsumexp(2)
        scored = mixed[:, :-1].gather(-1, input_ids[:, 1:, None])[is_scored]
        return MixedPrediction(mixed, log_posterior.exp(), -scored.mean())

    def estimate_prior(
        self, batches: Iterable[torch.Tensor | tuple[torch.Tensor, torch.Tensor]], decay: float = 0.3
    ) -> torch.Tensor:
        """Set the prior to a moving average of the posterior over texts, and return it, (N,).

        It starts at the present prior: prior <- (1 - decay) * prior + decay * posterior, text after text.

        Args:
            batches (`Iterable`): token ids (B, S), or pairs of them and an attention mask.
            decay (`float`): in (0, 1], the weight of the latest text.

        Source: DEMix, cached prior (https://huggingface.co/papers/2108.05036), which averages over texts of the domain.
        """
        if not 0 < decay <= 1:
            raise MoEError(f"decay is {decay}; it must be in (0, 1].")
        for batch in batches:
            ids, mask = batch if isinstance(batch, tuple) else (batch, None)
            for posterior in self(ids, mask).posterior[:, -1].cpu():
                self.prior = (1 - decay) * self.prior + decay * posterior
        return self.prior

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        **settings,
    ) -> torch.Tensor:
        """Continue (B, S) prompts, left-padded ones with their mask, by the mixture; returns token ids (B, S + new).

        Args:
            do_sample, temperature, top_k, top_p: as of `model.generate`, applied to the mixture.
            settings: further arguments of `model.generate`, such as `max_new_tokens`.

        Raises:
            MoEError: for beams or several sequences per prompt, which a mixture over rows does not have.
        """
        several = [name for name in ("num_beams", "num_return_sequences") if settings.get(name, 1) != 1]
        if several:
            raise MoEError(f"{several[0]} is {settings[several[0]]}; a domain mixture continues each prompt once.")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        warpers = LogitsProcessorList()
        if do_sample:
            warpers += [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
            warpers += [TopKLogitsWarper(top_k)] if top_k else []
            warpers += [TopPLogitsWarper(top_p)] if top_p is not None and top_p < 1 else []
        prompt = self(input_ids, mask)
        mixer = _MixRows(prompt.posterior[:, -1].log(), do_sample, warpers)
        ids = torch.arange(self.num_ids, device=input_ids.device).repeat(len(input_ids))
        # The rows of a prompt are neighbours, one for each id; all continue with the same token.
        rows = self.model.generate(
            input_ids.repeat_interleave(self.num_ids, dim=0),
            attention_mask=mask.repeat_interleave(self.num_ids, dim=0),
            logits_processor=LogitsProcessorList([mixer]),
            do_sample=False,
            **{f"{self.kind}_ids": ids},
            **settings,
        )
        return rows[:: self.num_ids]

    def _log_probs(self, input_ids: torch.Tensor, mask: torch.Tensor, value: int) -> torch.Tensor:
        """The model's prediction under one id, (B, S, V)."""
        ids = torch.full((len(input_ids),), value, device=input_ids.device)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        more = {"position_ids": positions} if "position_ids" in self.model._forward_names else {}
        logits = self.model(
            input_ids, attention_mask=mask, use_cache=False, **more, **{f"{self.kind}_ids": ids}
        ).logits
        return logits.float().log_softmax(-1)


class _MixRows(LogitsProcessor):
    """Gives the N rows of a prompt the scores of their mixture; sampled tokens are drawn here, once for all of them."""

    def __init__(self, log_posterior: torch.Tensor, do_sample: bool, warpers: LogitsProcessorList) -> None:
        self.log_posterior = log_posterior  # (B, N)
        self.do_sample, self.warpers = do_sample, warpers
        self.predicted: torch.Tensor | None = None  # the predictions of the token before, (B, N, V)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        num_ids = self.log_posterior.shape[1]
        if self.predicted is not None:
            latest = input_ids[::num_ids, -1].view(-1, 1, 1).expand(-1, num_ids, 1)
            evidence = self.predicted.gather(-1, latest).squeeze(-1)
            self.log_posterior = (self.log_posterior + evidence).log_softmax(-1)
        self.predicted = scores.float().log_softmax(-1).view(-1, num_ids, scores.shape[-1])
        mixed = (self.log_posterior[..., None] + self.predicted).logsumexp(1)  # (B, V)
        if self.do_sample:
            warped = self.warpers(input_ids[::num_ids], mixed)
            drawn = warped.softmax(-1).multinomial(1)
            mixed = torch.full_like(mixed, -torch.inf).scatter(1, drawn, 0.0)
        return mixed.repeat_interleave(num_ids, dim=0)
