"""Mixing predictions over unknown ids: Bayes' rule token by token, in predictions and in generated text."""

import math

import pytest
import torch

from moe_hf import DomainMixture, MoEConfig, MoEError, MoEForCausalLM
from tests.tiny_models import random_ids, randomise_, tiny_config


KINDS = {
    "groups": ("language", {"expert_groups": {"language": [[0, 1, 2], [3, 4, 5], [2, 6, 7]]}}),
    "tasks": ("task", {"routing_level": "task", "num_tasks": 3}),
    "router_per_task": ("task", {"router_per_task": True, "num_tasks": 3}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def model_of(kind: str, family: str = "llama") -> MoEForCausalLM:
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config(family), num_experts=8, **KINDS[kind][1]))
    randomise_(model)
    return model.eval()


@torch.no_grad()
def naive(model, kind: str, row: list[int], prior: list[float]) -> tuple[list[torch.Tensor], list[list[float]]]:
    """The mixture's distributions after each prefix of `row`, and the posteriors, by Bayes' rule on whole prefixes."""
    distributions, posteriors = [], []
    for length in range(1, len(row) + 1):
        joint, following = list(prior), []
        for value in range(3):
            logits = model(torch.tensor([row[:length]]), **{f"{kind}_ids": torch.tensor([value])}).logits[0].double()
            probabilities = logits.softmax(-1)
            for place in range(1, length):
                joint[value] *= float(probabilities[place - 1, row[place]])
            following.append(probabilities[-1])
        posteriors.append([weight / sum(joint) for weight in joint])
        distributions.append(sum(weight * p for weight, p in zip(posteriors[-1], following, strict=True)))
    return distributions, posteriors


@pytest.mark.parametrize("prior", [None, [3.0, 1.0, 0.0]], ids=["uniform", "given"])
@every_kind
def test_predictions_are_bayes_rule_on_every_prefix(kind, prior):
    model, ids = model_of(kind), random_ids(2, 7)
    weights = [1 / 3] * 3 if prior is None else [0.75, 0.25, 0.0]
    found = DomainMixture(model, None if prior is None else torch.tensor(prior))(ids)
    losses = []
    for row in range(2):
        distributions, posteriors = naive(model, KINDS[kind][0], ids[row].tolist(), weights)
        assert torch.allclose(found.log_probs[row].exp().double(), torch.stack(distributions), atol=1e-5)
        assert torch.allclose(found.posterior[row].double(), torch.tensor(posteriors).double(), atol=1e-4)
        losses += [-math.log(float(distributions[t][ids[row, t + 1]])) for t in range(6)]
    assert float(found.loss) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_posterior_depends_on_earlier_tokens_alone_and_padding_says_nothing():
    mixture, ids = DomainMixture(model_of("groups")), random_ids(2, 8)
    whole = mixture(ids)
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 7) % 110
    assert torch.allclose(mixture(changed).posterior[:, :5], whole.posterior[:, :5], atol=1e-5)
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    found = mixture(padded, mask)
    assert torch.allclose(found.posterior[:, 3:], whole.posterior, atol=1e-4)
    assert torch.allclose(found.log_probs[:, 3:], whole.log_probs, atol=1e-4)
    assert float(found.loss) == pytest.approx(float(whole.loss), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@every_kind
def test_generated_tokens_are_the_most_likely_of_the_mixture(kind, family):
    model, ids = model_of(kind, family), random_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mixture = DomainMixture(model, torch.tensor([0.2, 0.5, 0.3]))
    rows = mixture.generate(ids, mask, max_new_tokens=6, min_new_tokens=6)
    assert rows.shape == (2, 12)
    for row, start in ((0, 0), (1, 2)):
        for length in range(6, 12):
            expected = mixture(rows[row : row + 1, start:length]).log_probs[0, -1]
            expected[model.config.eos_token_id] = -torch.inf  # min_new_tokens
            assert int(expected.argmax()) == int(rows[row, length])


def test_sampled_tokens_follow_the_mixture():
    mixture, ids = DomainMixture(model_of("groups")), random_ids(1, 5)
    torch.manual_seed(0)
    prompt = ids.expand(2000, -1)
    drawn = mixture.generate(prompt, max_new_tokens=1, do_sample=True, temperature=0.5, top_k=4)[:, -1]
    expected = (mixture(ids).log_probs[0, -1] / 0.5).topk(4)
    shares = expected.values.softmax(-1)
    for token, share in zip(expected.indices.tolist(), shares.tolist(), strict=True):
        sigma = math.sqrt(share * (1 - share) / 2000)
        assert abs(float((drawn == token).float().mean()) - share) <= 4 * sigma
    assert set(drawn.tolist()) <= set(expected.indices.tolist())


def test_a_prior_from_texts_of_one_domain_improves_the_next_one():
    model = model_of("groups")
    # Texts of domain 1: drawn from the model under that id.
    torch.manual_seed(0)
    texts = model.generate(
        random_ids(6, 1),
        language_ids=torch.ones(6, dtype=torch.long),
        do_sample=True,
        max_new_tokens=30,
        min_new_tokens=30,
    )
    mixture = DomainMixture(model)
    before = float(mixture(texts[5:]).loss)
    prior = mixture.estimate_prior([texts[:5]], decay=0.5)
    expected = torch.full((3,), 1 / 3)
    for posterior in DomainMixture(model)(texts[:5]).posterior[:, -1]:
        expected = 0.5 * expected + 0.5 * posterior
    assert torch.allclose(prior, expected, atol=1e-5) and int(prior.argmax()) == 1
    assert float(mixture(texts[5:]).loss) < before


def test_what_cannot_be_mixed_is_refused():
    plain = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama")))
    with pytest.raises(MoEError, match="tell apart none"):
        DomainMixture(plain)
    for prior in ([1.0, 1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [float("nan"), 1.0, 1.0]):
        with pytest.raises(MoEError, match="for each of 3 ids"):
            DomainMixture(model_of("groups"), torch.tensor(prior))
    mixture = DomainMixture(model_of("groups"))
    with pytest.raises(MoEError, match="num_beams is 2"):
        mixture.generate(random_ids(1, 4), num_beams=2)
    with pytest.raises(MoEError, match="decay is 0"):
        mixture.estimate_prior([], decay=0)
