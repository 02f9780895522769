"""Names and values of a configuration: what a user gives acts or is refused, what a file holds is kept, nothing is shared."""

import ast
import copy
import dataclasses
import inspect
import json
import pickle
import textwrap

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, upcycle
from moe_hf.data import train_tokenizer
from moe_hf.hub import save_model
from moe_hf.hub.model import _find_tokenizer
from moe_hf.modeling.config_fields import OF_LOADING
from tests.tiny_models import random_ids, tiny_config, tiny_dense


pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
FAMILIES = ("llama", "gpt2", "phi3", "opt", "falcon_h1", "gemma3_text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("moe")
    upcycle(tiny_dense("llama"), num_experts=4).save_pretrained(path)
    return path


# What nothing knows, and the name that the error has to suggest.
UNKNOWN = {
    "router": "router_type",
    "n_routed_experts": "num_experts",
    "hidden_sizes": "hidden_size",
    "rope_theta": "rope_parameters",
}
WAYS = {
    "constructor": lambda folder, **given: MoEConfig(text_config=tiny_config("llama"), **given),
    "by its type": lambda folder, **given: AutoConfig.for_model("moe_hf", text_config=tiny_config("llama"), **given),
    "preset": lambda folder, **given: MoEConfig.from_preset("mixtral", tiny_config("llama"), **given),
    "upcycle": lambda folder, **given: upcycle(tiny_dense("llama"), **given),
    "upcycle, preset": lambda folder, **given: upcycle(tiny_dense("llama"), preset="mixtral", **given),
    "a loaded configuration": lambda folder, **given: AutoConfig.from_pretrained(folder, **given),
    "a loaded dict": lambda folder, **given: MoEConfig.from_dict(
        json.loads((folder / "config.json").read_text()), **given
    ),
    "a loaded model": lambda folder, **given: AutoModelForCausalLM.from_pretrained(folder, **given),
    "a loaded model of ours": lambda folder, **given: MoEForCausalLM.from_pretrained(folder, **given),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_name_that_nothing_knows_is_refused_with_the_nearest_one(way, folder):
    for name, nearest in UNKNOWN.items():
        with pytest.raises(MoEError, match=f"no field '{name}'; the nearest is '{nearest}'"):
            WAYS[way](folder, **{name: 1})


def test_a_name_that_the_dense_class_does_not_know_is_refused_in_a_dict_of_it():
    with pytest.raises(MoEError, match="LlamaConfig has no field 'hidden_sizes'; the nearest is 'hidden_size'"):
        MoEConfig(text_config={"model_type": "llama", "hidden_sizes": 64})
    marked = tiny_config("llama")
    marked.mark_of_a_tool = 1
    assert MoEConfig(text_config=marked).mark_of_a_tool == 1
    assert MoEConfig(text_config=marked.to_dict()).mark_of_a_tool == 1


def test_fields_for_the_experts_of_a_dense_family_are_none_of_the_moe():
    with pytest.raises(MoEError, match="no field 'n_routed_experts'; the nearest is 'num_experts'"):
        MoEConfig(text_config=tiny_config("deepseek_v3"), n_routed_experts=4)


def test_what_generation_reads_is_said_to_be_set_there():
    with pytest.raises(MoEError, match="'temperature'.*generation_config"):
        MoEConfig(text_config=tiny_config("llama"), temperature=0.3)


def test_what_a_file_holds_and_nothing_knows_is_kept_with_one_warning(folder, tmp_path, caplog):
    file = json.loads((folder / "config.json").read_text()) | {
        "mark_of_a_tool": {"a": 1},
        "routr_type": "top_p",
        "pad_token_id": 7,
    }
    (tmp_path / "config.json").write_text(json.dumps(file))
    config = AutoConfig.from_pretrained(tmp_path)
    marks = [record.message for record in caplog.records if "does not read" in record.message]
    assert len(marks) == 1 and "mark_of_a_tool" in marks[0] and "nearest is 'router_type'" in marks[0]
    assert "pad_token_id=7 beside text_config" in caplog.text
    assert config.mark_of_a_tool == {"a": 1} and config.pad_token_id == config.text_config.pad_token_id == 0
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["mark_of_a_tool"] == {"a": 1}
    caplog.clear()
    copies = [copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))]
    assert all(one.to_dict() == config.to_dict() for one in copies) and not caplog.records


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dense_field_is_said_at_the_top_of_the_dict_and_once_in_the_file(family, tmp_path, caplog):
    config = MoEConfig(text_config=tiny_config(family))
    said, dense = config.to_dict(), config.text_config.to_dict()
    own = {field.name for field in dataclasses.fields(MoEConfig)}
    named = {"vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings", "bos_token_id"} & dense.keys()
    assert named <= said.keys() and all(
        said[name] == dense[name] for name in said.keys() & dense.keys() - own - {"model_type"}
    )
    config.save_pretrained(tmp_path)
    file = json.loads((tmp_path / "config.json").read_text())
    assert file.keys() <= own | {"model_type", "transformers_version", "output_attentions", "auto_map"}
    for again in (MoEConfig.from_dict(said), MoEConfig(**said), MoEConfig.from_pretrained(tmp_path)):
        assert {name: value for name, value in again.to_dict().items() if name != "auto_map"} == said
    assert not caplog.records


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dense_field_that_is_given_acts(family):
    dense = tiny_config(family)
    own = {field.name for field in dataclasses.fields(MoEConfig)}
    flags = {
        n: not v for n, v in vars(dense).items() if isinstance(v, bool) and n not in own and not n.startswith("_")
    }
    rates = {n: v + 0.125 for n, v in vars(dense).items() if type(v) is float and n not in own}
    given = {
        name: value for name, value in (flags | rates).items() if not any(w in name for w in ("expert", "router"))
    }
    assert len(given) > 3
    for name, value in given.items():
        config = MoEConfig(text_config=dense, **{name: value})
        assert getattr(config.text_config, name) == getattr(config, name) == value != getattr(dense, name)
        assert name not in vars(config)


def test_dense_fields_under_other_names_and_with_what_follows_from_them_act_or_are_refused():
    assert MoEConfig(text_config=tiny_config("gpt2"), num_hidden_layers=5).text_config.n_layer == 5
    assert MoEConfig(text_config={"model_type": "llama"}, hidden_size=96, num_attention_heads=6).head_dim == 16
    rope = MoEConfig(text_config=tiny_config("llama"), rope_parameters={"rope_theta": 5.0}).text_config.rope_parameters
    assert rope == {"rope_theta": 5.0, "rope_type": "default"}
    for given, message in [
        ({"num_hidden_layers": 7}, "layer_types"),
        ({"attention_dropout": "much"}, "attention_dropout"),
        ({"pad_token_id": 500}, "pad_token_id is 500; the ids of tokens are 0 to 112"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
    ]:
        with pytest.raises(MoEError, match=message):
            MoEConfig(text_config=tiny_config("qwen2"), **given)
    with pytest.raises(MoEError, match="vocab_size is 5, and 113 in text_config"):
        MoEConfig(text_config=tiny_config("llama").to_dict(), vocab_size=5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_configuration_of_a_live_model_is_copied(attention):
    dense, ids = tiny_dense("llama"), random_ids()
    dense.set_attn_implementation(attention)
    before, other = dense(ids).logits, ids.clone()
    other[:, -1] = 5
    config = MoEConfig(text_config=dense.config)
    torch.testing.assert_close(dense(ids).logits, before, rtol=0, atol=1e-6)
    torch.testing.assert_close(dense(other).logits[:, :-1], before[:, :-1], rtol=0, atol=1e-6)
    assert config.text_config is not dense.config and dense.config._attn_implementation == attention
    assert config._attn_implementation == attention
    config.hidden_act = "relu"
    config.text_config.rope_parameters["rope_theta"] = 1.0
    assert dense.config.hidden_act == "silu" and dense.config.rope_parameters["rope_theta"] == 10000.0


REFUSED_AT_LOAD = {
    "a field": ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
    "a field's type": ({"num_experts": "4"}, "num_experts"),
    "fields together": ({"num_experts_per_tok": 1}, "norm_topk_prob=True with num_experts_per_tok=1"),
    "a dense field": ({"vocab_size": 3.5}, "vocab_size"),
    "in text_config": ({"text_config": {"attention_dropuot": 0.1}}, "attention_dropuot"),
}


@pytest.mark.parametrize("case", REFUSED_AT_LOAD)
def test_other_values_at_load_are_checked_before_weights_are_read(case, folder, tmp_path):
    given, message = REFUSED_AT_LOAD[case]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())  # and no weights
    for loader in (AutoConfig, AutoModelForCausalLM, MoEForCausalLM):
        with pytest.raises(MoEError, match=message):
            loader.from_pretrained(tmp_path, **given)


def test_a_configuration_that_was_changed_is_checked_before_a_model_is_made(folder):
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(MoEError, match="num_experts_per_tok: set it in the config"):
        MoEForCausalLM.from_pretrained(folder, config=config, num_experts_per_tok=3)
    config.num_experts_per_tok = 9
    for load in (lambda: MoEForCausalLM(config), lambda: AutoModelForCausalLM.from_config(config)):
        with pytest.raises(MoEError, match="num_experts_per_tok is 9"):
            load()


def test_other_values_at_load_act(folder):
    given = {"num_experts_per_tok": 3, "attention_dropout": 0.25, "text_config": {"initializer_range": 0.5}}
    for loader in (AutoModelForCausalLM, MoEForCausalLM):
        config = loader.from_pretrained(folder, dtype=torch.bfloat16, low_cpu_mem_usage=True, **given).config
        assert (config.num_experts_per_tok, config.dtype) == (3, torch.bfloat16)
        assert (config.text_config.attention_dropout, config.text_config.initializer_range) == (0.25, 0.5)


def test_arguments_of_loading_models_pass_through_the_configurations():
    tree = ast.parse(textwrap.dedent(inspect.getsource(PreTrainedModel.from_pretrained)))
    taken = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "kwargs.pop"
        and isinstance(node.args[0], ast.Constant)
    }
    known = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {"torch_dtype", "quantization_config"}
    known |= {"attn_implementation", "experts_implementation"}
    assert len(taken) > 20 and taken - known - OF_LOADING == set()


def test_a_loaded_model_says_what_it_was_loaded_from(tmp_path, caplog):
    from datasets import Dataset

    own, other = (train_tokenizer(Dataset.from_dict({"text": [text] * 9}), 265) for text in ("one two", "three four"))
    dense = tiny_dense("llama", vocab_size=265)
    save_model(dense, other, tmp_path / "dense")
    save_model(upcycle(tmp_path / "dense", num_experts=2), own, tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    names = {model.name_or_path, model.model.name_or_path, model.config.name_or_path}
    assert names == {str(tmp_path / "moe")}
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "moe")
    assert _find_tokenizer(model).get_vocab() == own.get_vocab() != other.get_vocab()
    model.config.save_pretrained(tmp_path / "again")
    assert str(tmp_path / "moe") not in (tmp_path / "again" / "config.json").read_text()
    caplog.clear()
    assert AutoTokenizer.from_pretrained(tmp_path / "moe", padding_side="left").padding_side == "left"
    assert not caplog.records


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trained_tokens_of_an_adapter_survive_merging(tied):
    model = upcycle(tiny_dense("llama", tie_word_embeddings=tied), num_experts=4)
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 7], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
    ids = random_ids()
    ids[:, :2] = torch.tensor([5, 7])
    expected = adapted(ids).logits
    actual = adapted.merge_and_unload()(ids).logits
    assert float((actual - expected).detach().norm() / expected.detach().norm()) <= 1e-5


def test_a_model_can_be_made_of_the_configuration_of_a_saved_one(tmp_path):
    # Saving leaves the name of its dtype in a configuration; apertus computes with it.
    model = upcycle(tiny_dense("apertus"), num_experts=2)
    model.save_pretrained(tmp_path)
    assert model.config.text_config.dtype == torch.float32
    assert MoEForCausalLM(model.config).config.num_experts == 2
