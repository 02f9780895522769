"""Ids of tasks, languages and modalities: what they do to the routing, what is refused, and that they reach the routers."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, upcycle
from moe_hf.data import check_packing, load_text, tokenize_and_pack, train_tokenizer
from moe_hf.modeling.moe_block import MoEBlock
from moe_hf.modeling.router import Router
from moe_hf.modeling.routing_ids import prefix_sums
from tests.closeness import close
from tests.tiny_models import random_ids, randomise_, tiny_config, tiny_dense


LANGUAGES = {"language": [[0, 1, 2], [3, 4, 5, 6, 7]]}
TASKS = {"routing_level": "task", "num_tasks": 3}


def model_of(family: str = "llama", **fields) -> MoEForCausalLM:
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config(family), **{"num_experts": 8, **fields}))
    randomise_(model)
    return model.eval()


def chosen(model: MoEForCausalLM, tokens: torch.Tensor, **ids) -> torch.Tensor:
    """The experts of each token in each layer, (L, B, S, K)."""
    found, handles = [], []
    for router in model.modules():
        if isinstance(router, Router):
            handles.append(router.register_forward_hook(lambda module, args, output: found.append(output[2])))
    model(tokens, **ids)
    for handle in handles:
        handle.remove()
    return torch.stack(found).unflatten(1, tokens.shape)


def test_tokens_use_the_experts_of_their_id_alone():
    model = model_of(expert_groups=LANGUAGES, balance_strategy="bias")
    for router in model.modules():
        if isinstance(router, Router):  # a large bias does not open a closed expert
            router.e_score_correction_bias.copy_(torch.arange(8) - 4.0)
    tokens = random_ids(2, 9)
    by_row = chosen(model, tokens, language_ids=torch.tensor([0, 1]))
    assert (by_row[:, 0] <= 2).all() and (by_row[:, 1] >= 3).all()
    ids = torch.arange(18).view(2, 9) % 2
    by_token = chosen(model, tokens, language_ids=ids)
    assert ((by_token <= 2).all(-1) == (ids == 0)).all()


def test_experts_of_other_ids_get_no_gradient():
    model = model_of(
        expert_groups=LANGUAGES, router_loss_coefs={"local_entropy_loss": 0.1, "importance_loss": 0.1}
    ).train()
    tokens = random_ids(2, 9)
    model(tokens, labels=tokens, language_ids=torch.zeros(2, dtype=torch.long)).loss.backward()
    for block in model.modules():
        if isinstance(block, MoEBlock):
            for gradient in (block.experts.down_proj.grad, block.experts.gate_up_proj.grad, block.gate.weight.grad):
                assert (gradient[3:] == 0).all() and gradient[:3].abs().max() > 0 and gradient.isfinite().all()


@pytest.mark.numerics
def test_a_prior_goes_from_no_groups_to_closed_ones():
    tokens, ids = random_ids(2, 9), {"language_ids": torch.tensor([0, 1])}
    plain, closed = model_of()(tokens).logits, model_of(expert_groups=LANGUAGES)(tokens, **ids).logits

    def with_prior(prior: float) -> torch.Tensor:
        return model_of(expert_groups=LANGUAGES, expert_group_prior=prior)(tokens, **ids).logits

    assert close(with_prior(0), plain)
    assert torch.allclose(with_prior(1e3), closed, atol=1e-3)
    assert not torch.allclose(with_prior(1.0), plain, atol=1e-2)
    everyone = model_of(expert_groups={"language": [list(range(8))] * 2})
    assert close(everyone(tokens, **ids).logits, plain)


def test_all_tokens_of_a_task_use_the_same_experts():
    model, tokens = model_of(**TASKS), random_ids(2, 9)
    first, again, other = (chosen(model, tokens, task_ids=torch.tensor(ids)) for ids in ([0, 2], [0, 2], [1, 2]))
    for row in range(2):
        assert (first[:, row] == first[:, row, :1]).all()
    assert torch.equal(first, again) and torch.equal(first[:, 1], other[:, 1]) and not torch.equal(first, other)


def test_routers_of_tasks_start_as_one_and_part_in_training():
    model = upcycle(tiny_dense("llama"), num_experts=4, num_tasks=2, router_per_task=True).train()
    tokens, ids = random_ids(2, 9), {"task_ids": torch.tensor([0, 0])}
    gate = next(module for module in model.modules() if isinstance(module, Router))
    assert gate.task_weight.shape == (2, 4, 48) and (gate.task_weight == 0).all()
    model(tokens, labels=tokens, **ids).loss.backward()
    assert gate.task_weight.grad[0].abs().max() > 0 and (gate.task_weight.grad[1] == 0).all()


def test_prefix_mean_keeps_the_digits_of_late_documents():
    lengths = torch.tensor([1, 3000, 1, 500, 7])
    documents = torch.arange(5).repeat_interleave(lengths)
    values = 100 + torch.randn(len(documents), 2, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(len(documents), dtype=torch.bool)
    mask[3002:3100] = False
    sums = prefix_sums(values, documents, mask, longest=len(documents))
    found = sums[:, :-1] / sums[:, -1:].clamp_min(1)
    for document in range(5):
        own = documents == document
        real = mask[own].double()[:, None]
        expected = (values[own].double() * real).cumsum(0) / real.cumsum(0).clamp_min(1)
        assert torch.allclose(found[own].double(), expected, rtol=1e-6)


def test_the_mean_of_a_whole_sequence_sees_later_tokens_and_is_declared_to():
    model, tokens = model_of(routing_level="sequence", allow_noncausal_routing=True), random_ids(2, 9)
    by_row = chosen(model, tokens)
    assert (by_row[0] == by_row[0][:, :1]).all()
    changed = tokens.clone()
    changed[:, -1] += 1
    assert not torch.allclose(model(tokens).logits[:, :8], model(changed).logits[:, :8], atol=1e-3)
    with pytest.raises(MoEError, match="cannot generate"):
        model.generate(tokens)
    with pytest.raises(MoEError, match="takes a mean over the sequence"):
        model(tokens[:, :1], past_key_values=model(tokens).past_key_values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"routing_level": "document"}, "must be one of"),
        ({"routing_level": "sequence"}, "later tokens"),
        ({"routing_level": "prefix", "num_moe_heads": 2}, "mix the parts of tokens"),
        ({"num_tasks": -1}, "at least 0"),
        ({"num_tasks": 2}, "nothing else reads it"),
        ({"routing_level": "task"}, "num_tasks is 0"),
        ({"router_per_task": True, **TASKS}, "other than 'task'"),
        ({"router_per_task": True, "num_tasks": 2, "router_arch": "mlp"}, "router_arch='linear'"),
        ({"expert_groups": {"domain": [[0, 1]]}}, "may have"),
        ({"expert_groups": {"language": [[0, 8]]}}, r"in \[0, 8\)"),
        ({"expert_groups": {"language": [0, 1]}}, "a list of experts"),
        ({"expert_groups": {"language": []}}, "a list of experts"),
        ({"expert_groups": {"language": [[0, 1], [2]]}}, "opens 1 experts to .'language': 1., fewer"),
        ({"expert_groups": LANGUAGES | {"modality": [[0, 1, 3]]}}, "fewer than num_experts_per_tok=2"),
        ({"expert_groups": {"task": [[0, 1]]}, **TASKS}, "num_tasks is 3, and expert_groups has 1"),
        ({"expert_groups": LANGUAGES, "n_group": 2, "topk_group": 1}, "groups of its own"),
        ({"expert_groups": LANGUAGES, "router_type": "top_p"}, "no use for expert_groups"),
        ({"expert_group_prior": 1.0}, "goes with expert_groups"),
        ({"expert_groups": LANGUAGES, "expert_group_prior": float("inf")}, "finite"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(MoEError, match=message):
        model_of(**fields)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({}, "need language_ids"),
        ({"task_ids": torch.tensor([0, 0])}, "ids of .'task'., and its routers read those of .'language'"),
        ({"language_ids": torch.tensor([0, 2])}, r"hold 0 to 2; they must be in \[0, 2\)"),
        ({"language_ids": torch.tensor([-1, 0])}, "hold -1 to 0"),
        ({"language_ids": torch.tensor([0])}, r"of shape \(1,\)"),
        ({"language_ids": torch.tensor([0.0, 1.0])}, "float32"),
        ({"language_ids": torch.zeros(2, 4, dtype=torch.long)}, "do not cover"),
    ],
)
def test_ids_that_are_missing_or_wrong_are_refused_in_one_sentence(ids, message):
    model = model_of(expert_groups=LANGUAGES)
    for part in (model, model.model):
        with pytest.raises(MoEError, match=message):
            part(random_ids(2, 9), **ids)
    with pytest.raises(MoEError, match=message):
        model.generate(random_ids(2, 9), max_new_tokens=2, **ids)


@pytest.mark.parametrize("fields", [{"expert_groups": LANGUAGES}, {"num_tasks": 2, "router_per_task": True}, TASKS])
def test_a_block_outside_of_its_model_says_what_it_lacks(fields):
    block = next(module for module in model_of(**fields).modules() if isinstance(module, MoEBlock))
    with pytest.raises(MoEError, match="call the model"):
        block(torch.zeros(1, 3, 48))


def test_one_id_is_not_asked_for_and_padding_may_hold_any():
    model, tokens = model_of(expert_groups={"language": [[0, 1, 2]]}), random_ids(2, 9)
    assert (chosen(model, tokens) <= 2).all()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    ids = torch.where(mask.bool(), 0, -100)
    assert torch.equal(
        model(tokens, attention_mask=mask, language_ids=ids).logits, model(tokens, attention_mask=mask).logits
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "falcon"])
@pytest.mark.parametrize("per_token", [False, True], ids=["per_row", "per_token"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}],
    ids=lambda settings: next(iter(settings), "greedy"),
)
def test_ids_survive_generate(family, per_token, settings):
    model, tokens = model_of(family, expert_groups=LANGUAGES), random_ids(2, 9)
    mask, ids = torch.ones_like(tokens), torch.tensor([0, 1])
    mask[1, :3] = 0
    if per_token:
        ids = torch.tensor([[1] * 5 + [0] * 4, [0] * 5 + [1] * 4])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **settings}
    generated = model.generate(tokens, attention_mask=mask, language_ids=ids, **settings)
    if settings.get("num_beams"):
        # A beam's rows keep the ids of the prompt that they continue.
        alone = [
            model.generate(
                tokens[row : row + 1],
                attention_mask=mask[row : row + 1],
                language_ids=ids[row : row + 1],
                **settings,
            )[0]
            for row in range(2)
        ]
        assert all(torch.equal(row, other) for row, other in zip(generated, alone, strict=True))
        return
    whole = ids if not per_token else torch.cat([ids, ids[:, -1:].expand(-1, 5)], 1)
    for step in range(5):
        length = 9 + step
        full = torch.cat([mask, torch.ones(2, step, dtype=torch.long)], 1)
        positions = (full.cumsum(-1) - 1).clamp_min(0)
        more = {} if family == "falcon" else {"position_ids": positions}
        logits = model(
            generated[:, :length],
            attention_mask=full,
            language_ids=whole[:, :length] if per_token else whole,
            use_cache=False,
            **more,
        ).logits
        logits[:, :, model.config.eos_token_id] = -torch.inf  # min_new_tokens
        assert torch.equal(logits[:, -1].argmax(-1), generated[:, length])


def test_several_samples_of_a_prompt_have_its_id():
    model, tokens = model_of(**TASKS), random_ids(2, 5)
    rows = model.generate(
        tokens, task_ids=torch.tensor([0, 2]), max_new_tokens=3, do_sample=True, num_return_sequences=2
    )
    assert rows.shape == (4, 8)


def documents() -> Dataset:
    texts = ["the cat sat on the mat", "def function(argument): return argument", "mat " * 9]
    return Dataset.from_dict(
        {"text": texts, "domain": ["a", "b", "a"], "document": ["x", "y", "z"], "language_ids": [0, 1, 0]}
    )


@pytest.mark.parametrize("packed", [True, False])
def test_packing_gives_each_token_the_id_of_its_document(packed, tmp_path):
    documents().to_json(tmp_path / "rows.jsonl")
    loaded = load_text(str(tmp_path / "rows.jsonl"))
    assert loaded["language_ids"] == [0, 1, 0]
    tokenizer = train_tokenizer(loaded, 260)
    rows = tokenize_and_pack(loaded, tokenizer, 8, packed=packed)
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in loaded["text"]]
    expected = torch.tensor([0, 1, 0]).repeat_interleave(torch.tensor(lengths))
    found = rows["language_ids"][:].flatten()
    if not packed:
        found = found[rows["attention_mask"][:].flatten() == 1]
    assert torch.equal(found.long(), expected[: len(found)]) and len(found) > len(expected) - 8
    without = loaded.remove_columns("language_ids").add_column("language_ids", [0, None, 1])
    with pytest.raises(MoEError, match="language_ids of document 1 is None"):
        tokenize_and_pack(without, tokenizer, 8)


def test_packing_is_checked_on_models_that_need_ids():
    assert check_packing(model_of(expert_groups=LANGUAGES)) < 1e-5


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "lora"])
def test_ids_survive_the_trainer(wrapped, tmp_path):
    rows = tokenize_and_pack(documents(), train_tokenizer(documents(), 260), 8)
    rows = rows.add_column("moe_task_ids", [[1] * 8] * len(rows)).add_column("domain", ["a"] * len(rows))
    model = model_of(expert_groups=LANGUAGES, num_tasks=2, router_per_task=True)
    model.resize_token_embeddings(260)
    seen = []
    router = next(module for module in model.modules() if isinstance(module, Router))
    router.register_forward_hook(lambda module, args, output: seen.append(output[2]))
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=len(rows),
        max_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    in_first = (seen[0].view(len(rows), 8, 2) <= 2).all(-1)
    is_first = rows["language_ids"][:] == 0
    assert sorted(in_first.sum(-1).tolist()) == sorted(is_first.sum(-1).tolist())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_ids_survive_peft_where_task_ids_have_another_name():
    model, tokens = model_of(expert_groups=LANGUAGES, num_tasks=2, router_per_task=True), random_ids(2, 5)
    language, task = torch.tensor([0, 1]), torch.tensor([1, 0])
    expected = model(tokens, language_ids=language, task_ids=task).logits
    generated = model.generate(tokens, language_ids=language, task_ids=task, max_new_tokens=4, do_sample=False)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    assert torch.allclose(wrapped(tokens, language_ids=language, moe_task_ids=task).logits, expected, atol=1e-5)
    again = wrapped.generate(
        input_ids=tokens, language_ids=language, moe_task_ids=task, max_new_tokens=4, do_sample=False
    )
    assert torch.equal(again, generated)
    with pytest.raises(MoEError, match="moe_task_ids"):
        wrapped(tokens, language_ids=language, task_ids=task)
