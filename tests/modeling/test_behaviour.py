"""A MoE model does what transformers' own models do: load, save, generate, train, compile, adapt."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from moe_hf import MoEConfig, MoEForCausalLM, MoEModel, upcycle
from moe_hf.modeling.configuration_moe import check_transformers_version
from tests.processes import PATIENCE_SECONDS
from tests.sampling import sampled
from tests.tiny_models import random_ids, tiny_config, tiny_dense


IDS = random_ids(2, 12)


def make_moe(family: str = "llama", **overrides) -> MoEForCausalLM:
    return upcycle(tiny_dense(family, **overrides), num_experts=4, noise=0.3)


@pytest.fixture
def model() -> MoEForCausalLM:
    return make_moe()


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model.eval()(ids, **kwargs).logits


def same(first, second) -> bool:
    """Equal to rounding: a kernel's last bit depends on where in memory the weights lie."""
    return float((first - second).detach().norm() / second.detach().norm()) <= 1e-6


def equal_states(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_auto_classes_load_what_was_saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MoEConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MoEForCausalLM) and equal_states(loaded, model)
    assert same(logits(loaded), logits(model))
    assert loaded.config.upcycling == model.config.upcycling
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, MoEModel)
    assert same(base.eval()(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_base_model_saves_as_a_moe_and_loads_into_both_classes(model, tmp_path):
    model.model.save_pretrained(tmp_path)
    assert equal_states(MoEModel.from_pretrained(tmp_path), model.model)
    again = MoEForCausalLM.from_pretrained(tmp_path)
    assert equal_states(again.model, model.model)


def test_shards_and_safetensors(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert equal_states(AutoModelForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_survive_saving(tied, tmp_path):
    model = make_moe(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert same(logits(loaded), logits(model))


def test_dtype_auto_keeps_the_saved_dtype_and_router_stays_exact(tmp_path):
    model = make_moe().bfloat16()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16 and equal_states(loaded, model)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_meta_device_costs_no_memory_and_no_parameter_stays_uninitialised():
    config = MoEConfig(text_config=tiny_config("llama"), num_experts=4)
    with torch.device("meta"):
        assert all(p.is_meta for p in MoEForCausalLM(copy.deepcopy(config)).parameters())
    for family in ("llama", "gpt2", "opt"):
        model = MoEForCausalLM(MoEConfig(text_config=tiny_config(family), num_experts=4))
        for name, parameter in model.named_parameters():
            assert torch.isfinite(parameter).all(), name
            if "experts" in name and "bias" not in name:
                assert 0.1 < float(parameter.detach().std()) < 0.3, name


def test_device_map_and_disk_offload_give_the_same_logits(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    expected = logits(model)
    on_cpu = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="cpu")
    assert same(logits(on_cpu), expected)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    device_map |= {"model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert next(offloaded.model.layers[1].mlp.experts.parameters()).is_meta
    assert same(logits(offloaded), expected)


def test_resize_token_embeddings(model, tmp_path):
    expected = logits(model)
    model.resize_token_embeddings(130)
    assert model.config.vocab_size == model.config.text_config.vocab_size == 130
    assert same(logits(model)[..., :113], expected)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape[0] == 130


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_pickle_and_deepcopy(family):
    model = make_moe(family)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(twin) is type(model) and same(logits(twin), logits(model))
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    assert float(logits(model).abs().max()) > 0


def test_left_padded_generation_equals_unpadded(model):
    short = random_ids(1, 5)
    expected = model.generate(short, max_new_tokens=6, do_sample=False)[:, 5:]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)
    mask = (torch.arange(9) >= 4).long()[None]
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 9:], expected)


def test_beams_with_and_without_cache_agree(model):
    kwargs = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(IDS, **kwargs), model.generate(IDS, use_cache=False, **kwargs))


def test_text_generation_pipeline(model):
    vocabulary = {f"w{i}": i for i in range(113)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", pad_token="w0", eos_token="w2")
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    text = generator("w5 w6 w7", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("w5 w6 w7") and len(text.split()) > 3


def test_attention_and_experts_implementations_can_be_switched(model, tmp_path):
    expected = logits(model)
    assert model.config._experts_implementation == "grouped_mm" and model.config._attn_implementation == "sdpa"
    for experts in ("eager", "batched_mm", "grouped_mm"):
        for attention in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
            model.set_experts_implementation(experts)
            assert model.config._experts_implementation == experts
            assert model.model.layers[0].self_attn.config._attn_implementation == attention
            assert torch.allclose(logits(model), expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    chosen = AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="batched_mm", attn_implementation="eager"
    )
    assert chosen.config._experts_implementation == "batched_mm"
    assert chosen.model.layers[0].mlp.experts.config._experts_implementation == "batched_mm"
    assert chosen.config._attn_implementation == "eager"
    assert torch.allclose(logits(chosen), expected, atol=1e-5)


def test_the_experts_kernel_does_not_depend_on_which_class_was_used_first():
    code = (
        "from transformers import LlamaForCausalLM, LlamaConfig\n"
        "c = LlamaConfig(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1,"
        " intermediate_size=40, vocab_size=50)\n"
        "m = LlamaForCausalLM(c); m.get_correct_experts_implementation(None)\n"
        "import moe_hf\n"
        "print(moe_hf.upcycle(m, num_experts=2).config._experts_implementation)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.stdout.strip() == "grouped_mm", done.stderr


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    dropouts = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "opt": {"dropout": 0.0}}
    model = make_moe(family, **dropouts.get(family, {})).train()
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0

    def gradients():
        model.zero_grad()
        model(IDS, attention_mask=mask, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.activation_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize(
    ("implementation", "training"),
    sampled(["grouped_mm", "batched_mm"], {"train": True, "eval": False}, share=2),
)
def test_compiles_as_one_graph(model, implementation, training):
    torch.compiler.reset()
    model.train(training)
    model.set_experts_implementation(implementation)
    expected = model(IDS, labels=IDS, output_router_logits=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = compiled(IDS, labels=IDS, output_router_logits=True)
    assert torch.allclose(actual.loss, expected.loss, atol=1e-5)
    assert torch.allclose(actual.logits, expected.logits, atol=1e-4)
    assert len(actual.router_logits) == 3
    if training:
        actual.loss.backward()
        assert model.model.layers[0].mlp.gate.weight.grad is not None


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_lora_on_attention_and_on_experts(model, tmp_path):
    expected = logits(model)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    adapted = get_peft_model(copy.deepcopy(model), config)
    assert torch.allclose(logits(adapted), expected, atol=1e-6)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    adapted.train()(IDS, labels=IDS).loss.backward()
    grads = [n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any("experts" in n for n in grads) and any("q_proj" in n for n in grads)
    optimizer.step()
    trained = logits(adapted)
    assert not torch.allclose(trained, expected, atol=1e-4)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert torch.allclose(logits(loaded), trained, atol=1e-6)
    assert torch.allclose(logits(loaded.merge_and_unload()), trained, atol=1e-4)


def test_hidden_states_and_attentions_are_returned(model):
    output = model(IDS, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    model.config.output_hidden_states = True
    assert len(model(IDS).hidden_states) == 4
    model.set_attn_implementation("eager")
    assert len(model(IDS, output_attentions=True).attentions) == 3


@pytest.mark.parametrize(("version", "message"), [("5.22.9", "5.23.0"), ("6.0.0", "< 6")])
def test_an_unsupported_transformers_is_refused_in_one_sentence(version, message):
    check_transformers_version("5.23.0")
    with pytest.raises(ImportError, match=f"transformers.*{message}.*{version} is installed"):
        check_transformers_version(version)


@pytest.mark.parametrize(("width", "expected"), [(88, "grouped_mm"), (22, "eager")])
def test_experts_whose_rows_grouped_mm_refuses_use_another_implementation(width, expected, tmp_path):
    moe = upcycle(tiny_dense("llama", intermediate_size=width), num_experts=4).train()
    moe(random_ids(), labels=random_ids()).loss.backward()
    moe.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded(random_ids())
    assert moe.config._experts_implementation == loaded.config._experts_implementation == expected
    chosen = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="batched_mm")
    assert chosen.config._experts_implementation == "batched_mm"
