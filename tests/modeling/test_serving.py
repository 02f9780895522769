"""Engines that put tokens of several sequences into one row give the tokens of `generate`, or the model is refused."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModel,
    ContinuousBatchingConfig,
    GenerationMixin,
    configuration_utils,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, upcycle
from moe_hf.modeling.serving import VLLM_ATTENTION, _is_silu
from tests.tiny_models import random_ids, randomise_, tiny_config, tiny_dense


IN_ONE_ROW = {
    "prefix": ({"routing_level": "prefix"}, "decide by earlier tokens"),
    "capacity": ({"eval_capacity_factor": 1.0}, "eval_capacity_factor"),
    "tasks": ({"routing_level": "task", "num_tasks": 2}, r"need ids \(task\)"),
    "segments": ({"router_type": "segment_merge", "num_experts_per_tok": 4}, "decide by earlier tokens"),
}
IN_VLLM = {
    "zero experts": ("llama", {"extra_experts": ["zero"]}, "extra_experts adds"),
    "heads": ("llama", {"num_moe_heads": 2}, "num_moe_heads is 2"),
    "predictions": (
        "llama",
        {"router_type": "dense", "num_experts_per_tok": 4, "output_mixture": "likelihood"},
        "mixes predictions",
    ),
    "gelu": ("gemma3_text", {}, "another activation"),
    "no gate": ("nemotron", {}, "gated and without biases"),
    "biases": ("gpt2", {}, "gated and without biases"),
}


def config_of(family: str = "llama", **fields) -> MoEConfig:
    return MoEConfig(text_config=tiny_config(family), **({"num_experts": 4} | fields))


def test_continuous_batching_gives_the_tokens_of_generate():
    model = upcycle(tiny_dense("llama"), num_experts=4, noise=0.5)
    prompts = [
        ids.tolist() for ids in (random_ids(1, 9)[0], random_ids(1, 4, seed=1)[0], random_ids(1, 14, seed=2)[0])
    ]
    pages = ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=32)
    outputs = model.generate_batch(prompts, continuous_batching_config=pages, max_new_tokens=8)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert output.generated_tokens == expected.tolist()


def test_transformers_sees_that_it_generates():
    # It looks for the name among the direct bases, and warns of the end of `generate` where it is not.
    assert GenerationMixin in MoEForCausalLM.__bases__


@pytest.mark.parametrize(("fields", "message"), IN_ONE_ROW.values(), ids=IN_ONE_ROW)
def test_continuous_batching_is_refused_where_a_row_is_not_enough(fields, message):
    model = MoEForCausalLM(config_of(**fields)).eval()
    with pytest.raises(MoEError, match=message):
        model.generate_batch([[3, 4, 5]], max_new_tokens=2)


@pytest.fixture
def vllm_attention():
    """What vLLM registers before it makes a model."""
    AttentionInterface.register(VLLM_ATTENTION, sdpa_attention_forward)
    yield
    AttentionInterface._global_mapping.pop(VLLM_ATTENTION)


@pytest.mark.usefixtures("vllm_attention")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_vllm_is_refused_what_it_would_compute_differently(device):
    refused = IN_VLLM | {name: ("llama", *what) for name, what in IN_ONE_ROW.items()}
    for family, fields, message in refused.values():
        config = config_of(family, **fields)
        config._attn_implementation = VLLM_ATTENTION
        with torch.device(device), pytest.raises(MoEError, match=f"vLLM would not compute.*{message}"):
            AutoModel.from_config(config)


@pytest.mark.usefixtures("vllm_attention")
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_vllm_is_given_what_it_computes(family, device):
    fields = {"shared_expert_intermediate_size": 24, "scoring_func": "sigmoid", "balance_strategy": "bias"}
    config = config_of(family, num_experts_per_layer=[0, 4, 2], **fields)
    config._attn_implementation = VLLM_ATTENTION
    with torch.device(device):
        model = AutoModel.from_config(config)
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    # What its backend looks for, to put its own experts there: the name, and tensors of three dimensions alone.
    assert len(experts) == 2
    assert all(parameter.dim() == 3 for module in experts for parameter in module.parameters())


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (torch.nn.SiLU(), True),
        (torch.nn.functional.silu, True),
        # Its last bit may be another one.
        (lambda x: x / (1 + torch.exp(-x)), True),
        # As large as a SiLU at 1.
        (torch.sigmoid, False),
        (torch.nn.GELU(), False),
        (torch.nn.ReLU(), False),
    ],
)
def test_a_silu_is_known_by_its_values(activation, expected):
    assert _is_silu(activation) == expected


def test_code_that_travelled_names_the_versions_that_it_needs_before_it_fails_on_an_older_one(tmp_path, monkeypatch):
    model = MoEForCausalLM(config_of())
    randomise_(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.__version__", "5.19.0")
    monkeypatch.delattr(configuration_utils, "SubConfigSpec")
    with pytest.raises(ImportError, match=r"transformers >= 5.23.0, < 6, and 5.19.0 is installed"):
        get_class_from_dynamic_module("configuration_moe.MoEConfig", tmp_path)
