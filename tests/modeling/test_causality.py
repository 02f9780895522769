"""Nothing later, no other row and no other document changes what a token gets."""

import pytest
import torch

from moe_hf import upcycle
from tests.closeness import close
from tests.tiny_models import random_ids, tiny_dense


pytestmark = pytest.mark.numerics


@pytest.fixture(params=["llama", "gpt2", "gemma3_text"], scope="module")
def model(request):
    torch.manual_seed(0)
    return upcycle(tiny_dense(request.param), num_experts=4, noise=0.5)


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


def test_changing_or_cutting_later_tokens_changes_nothing_before(model):
    ids = random_ids(2, 24)
    full = logits(model, ids)
    for cut in (1, 7, 23):
        changed = ids.clone()
        changed[:, cut:] = (changed[:, cut:] + 5) % 113
        assert close(logits(model, changed)[:, :cut], full[:, :cut])
        assert close(logits(model, ids[:, :cut]), full[:, :cut])
        assert not close(logits(model, changed)[:, cut:], full[:, cut:])


def test_rows_of_a_batch_do_not_see_each_other(model):
    ids = random_ids(3, 12)
    assert close(logits(model, ids)[1:2], logits(model, ids[1:2]))
    other = ids.clone()
    other[0] = (other[0] + 3) % 113
    assert close(logits(model, other)[1:], logits(model, ids)[1:])


def test_packed_documents_do_not_see_each_other(model):
    first, second = random_ids(1, 9), random_ids(1, 14, seed=1)
    packed = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    together = logits(model, packed, position_ids=positions)
    assert close(together[:, :9], logits(model, first))
    assert close(together[:, 9:], logits(model, second))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_decoding_equals_the_full_forward(model, cache):
    ids = random_ids(2, 8)
    kwargs = {"cache_implementation": "static"} if cache == "static" else {}
    generated = model.generate(
        ids, max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True, **kwargs
    )
    full = logits(model, generated.sequences)
    steps = torch.stack(generated.logits, 1)
    assert close(steps, full[:, 7 : 7 + steps.shape[1]])


def test_router_gradients_do_not_reach_earlier_tokens_from_later_routing(model):
    embeds = model.get_input_embeddings()(random_ids(1, 10)).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[:, 4].sum().backward()
    assert embeds.grad[:, 5:].abs().max() == 0
    assert embeds.grad[:, :5].abs().min(-1).values.min() >= 0 and embeds.grad[:, :5].abs().max() > 0
