"""Routers that decide by earlier tokens decode with a cache as they do without one."""

import copy
import logging

import pytest
import torch
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from moe_hf import MoEConfig, MoEError, MoEForCausalLM
from moe_hf.modeling.cache_names import CACHE_NAMES, named_cache
from moe_hf.modeling.routing_pass import RoutingPass, routing_pass
from tests.sampling import sampled
from tests.tiny_models import random_ids, randomise_, tiny_config


pytestmark = pytest.mark.numerics


CARRYING = {
    "prefix": {"routing_level": "prefix"},
    "prefix_top_p": {"routing_level": "prefix", "router_type": "top_p"},
    "segments": {
        "router_type": "segment_merge",
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.0,
        "router_kwargs": {"segment_length": 3},
    },
}
SETTINGS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static_cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4},
}
LIKELIHOOD = {"output_mixture": "likelihood", "router_type": "dense", "num_experts_per_tok": 8}
every_router = pytest.mark.parametrize("fields", CARRYING.values(), ids=CARRYING)


def model_of(family: str = "llama", **fields) -> MoEForCausalLM:
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config(family), num_experts=8, **fields))
    randomise_(model)
    return model.eval()


@pytest.mark.parametrize(
    ("fields", "settings", "family"), sampled(CARRYING, SETTINGS, ["llama", "gpt2", "falcon", "gemma2"], share=2)
)
def test_generating_with_a_cache_equals_generating_without(fields, settings, family):
    model, tokens = model_of(family, **fields), random_ids(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    common = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    common |= {"return_dict_in_generate": True, "output_scores": True}
    cached = model.generate(tokens, **common, **settings)
    whole = model.generate(tokens, **common, use_cache=False, num_beams=settings.get("num_beams", 1))
    assert torch.equal(cached.sequences, whole.sequences)
    for found, expected in zip(cached.scores, whole.scores, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


@every_router
@pytest.mark.parametrize("sizes", [(1, 1, 6, 3), (3, 3, 5), (2, 9), (8, 3)], ids=str)
@torch.no_grad()
def test_chunks_of_any_size_equal_the_whole(fields, sizes):
    model, tokens = model_of(**fields), random_ids(2, 11)
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in tokens.split(sizes, 1)]
    assert torch.allclose(torch.cat(parts, 1), model(tokens, use_cache=False).logits, atol=1e-5)


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_the_cache_is_read_under_either_name_without_a_warning(name, recwarn):
    model, tokens = model_of(**CARRYING["prefix"]), random_ids(2, 11)
    cache = DynamicCache(config=model.config)
    parts = [model(part, **{name: cache}).logits for part in tokens.split(4, 1)]
    assert torch.allclose(torch.cat(parts, 1), model(tokens, use_cache=False).logits, atol=1e-5)
    assert torch.equal(model(tokens, **{name: None}).logits, model(tokens).logits)
    assert [str(warning.message) for warning in recwarn if "deprecated" in str(warning.message)] == []
    with pytest.raises(MoEError, match="cache and past_key_values are two names of one argument"):
        model(tokens, cache=cache, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("fields", [{}, CARRYING["prefix"], LIKELIHOOD], ids=str)
@torch.no_grad()
def test_nothing_that_transformers_calls_deprecated_is_used(fields):
    model, tokens, messages = model_of(**fields), random_ids(2, 7), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    transformers_logging.warning_once.cache_clear()
    logging.getLogger("transformers").addHandler(handler)
    try:
        first = model(tokens)
        model(tokens[:, :1], **named_cache(first))
        model.generate(tokens, max_new_tokens=3, do_sample=False)
        model.model(tokens)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert [message for message in messages if "deprecated" in message] == []


@every_router
@torch.no_grad()
def test_the_last_document_of_a_packed_row_is_what_goes_on(fields):
    gate = model_of(**fields).model.layers[0].mlp.gate
    tokens = torch.randn(14, 48, generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([0] * 5 + [1] * 9)

    def run(part: slice, carried: dict, document_ids: torch.Tensor | None) -> tuple[torch.Tensor, dict]:
        length = len(tokens[part])
        with routing_pass(RoutingPass(1, length, document_ids=document_ids, carried=carried)) as current:
            weights = gate(tokens[part])[1]
        return weights, current.carry

    alone, expected = run(slice(5, 14), {}, None)
    _, carry = run(slice(0, 8), {}, documents[:8])
    rest, found = run(slice(8, 14), carry, None)
    assert torch.allclose(rest, alone[len(alone) - len(rest) :], atol=1e-6)
    for name, value in expected[0].items():
        assert torch.allclose(found[0][name], value, atol=1e-5), name


@every_router
@torch.no_grad()
def test_a_copied_cache_can_be_continued_twice(fields):
    model, prompt = model_of(**fields), random_ids(2, 7)
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    for seed in (1, 2):
        more = random_ids(2, 4, seed=seed)
        found = model(more, past_key_values=copy.deepcopy(cache)).logits
        assert torch.allclose(found, model(torch.cat([prompt, more], 1)).logits[:, 7:], atol=1e-5)


@every_router
@torch.no_grad()
def test_repeated_and_selected_rows_keep_what_is_known_about_them(fields):
    model, prompt, more = model_of(**fields), random_ids(2, 7), random_ids(3, 4, seed=1)
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    whole = torch.cat([prompt[[1, 0, 0]], more], 1)
    assert torch.allclose(model(more, past_key_values=cache).logits, model(whole).logits[:, 7:], atol=1e-5)


@every_router
def test_what_a_cache_cannot_give_back_is_refused(fields):
    model, prompt = model_of(**fields), random_ids(1, 9)
    with pytest.raises(MoEError, match="cannot be cropped"):
        model.generate(prompt.repeat(1, 3), prompt_lookup_num_tokens=3, max_new_tokens=12, do_sample=False)
    cache = DynamicCache(config=model.config)
    dense = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), num_experts=8)).eval()
    dense(prompt, past_key_values=cache)
    with pytest.raises(MoEError, match="filled by another model"):
        model(prompt, past_key_values=cache)
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    cache.reset()
    assert cache.carry == {}


def test_a_cache_of_a_router_that_looks_at_tokens_alone_is_left_as_it_is():
    cache = DynamicCache(config=tiny_config("llama"))
    model_of()(random_ids(1, 5), past_key_values=cache)
    assert type(cache) is DynamicCache
