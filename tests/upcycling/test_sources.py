"""What is no whole dense text decoder is refused in one sentence, before a byte is written, whichever way it is given."""

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MoshiConfig,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from typer.testing import CliRunner

from moe_hf import MoEError, upcycle, upcycle_checkpoint
from moe_hf.cli import app
from moe_hf.planning import plan_upcycling
from moe_hf.upcycling.sources import check_dense_config
from tests.families import FAMILIES
from tests.tiny_models import tiny_config, tiny_dense


TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 88,
    "vocab_size": 113,
}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_IMAGE = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 40, "out_hidden_size": 48}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}


def gemma3() -> PreTrainedModel:
    """An image-text model that AutoModelForCausalLM loads whole."""
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=TEXT, vision_config=IMAGE, mm_tokens_per_image=4))


def qwen3_5() -> PreTrainedModel:
    """An image-text model of which AutoModelForCausalLM loads the text decoder alone."""
    config = Qwen3_5Config(text_config=TEXT | LINEAR, vision_config=QWEN_IMAGE)
    return Qwen3_5ForConditionalGeneration(config)


def git() -> PreTrainedModel:
    """A text decoder's configuration with an image encoder's inside, and both in one model."""
    return GitForCausalLM(GitConfig(vision_config=IMAGE, **TEXT))


PARTS = "parts beside a text decoder"
SOURCES = {
    "gemma3": (gemma3, PARTS),
    "qwen3_5": (qwen3_5, PARTS),
    "git": (git, PARTS),
    "vit": (lambda: ViTModel(ViTConfig(**IMAGE)), "no causal language model for ViTConfig"),
    "no head": (lambda: LlamaModel(tiny_config("llama")), "no language-modelling head|no tensors? for .*lm_head"),
    "another head": (
        lambda: LlamaForSequenceClassification(tiny_config("llama")),
        "no language-modelling head|no tensors? for .*lm_head",
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_it_is_refused_in_memory_from_a_folder_and_on_disk(case, tmp_path):
    make, message = SOURCES[case]
    model = make()
    folder = tmp_path / "dense"
    model.save_pretrained(folder)
    ways = {
        "a model": lambda: upcycle(model, num_experts=2),
        "its folder": lambda: upcycle(folder, num_experts=2),
        "on disk": lambda: upcycle_checkpoint(folder, tmp_path / "moe", num_experts=2),
    }
    for way in ways.values():
        with pytest.raises(MoEError, match=message):
            way()
    if "head" not in case:  # a plan reads no weights
        with pytest.raises(MoEError, match=message):
            plan_upcycling(folder)
    for options in ([], ["--dtype", "float32"]):
        result = CliRunner().invoke(app, ["upcycle", str(folder), str(tmp_path / "moe"), *options])
        assert result.exit_code == 2 and "moe-hf: " in result.output and "Traceback" not in result.output
    assert [entry.name for entry in tmp_path.iterdir()] == ["dense"]


def test_no_dense_family_has_parts_by_mistake():
    """Groups of a decoder's own fields, and parts that the class of a checkpoint never had, are none."""
    for family in FAMILIES:
        config = tiny_config(family)
        if config.is_encoder_decoder or getattr(config, "is_decoder", True) is False:
            config.is_encoder_decoder, config.is_decoder = False, True  # as its decoder alone saves it
        check_dense_config(config, family)
    whole = MoshiConfig(architectures=["MoshiForConditionalGeneration"])
    with pytest.raises(MoEError, match="audio_encoder_config, depth_decoder_config"):
        check_dense_config(whole, "moshi")


def offloaded(model: PreTrainedModel) -> PreTrainedModel:
    """As Accelerate's device_map to the processor's memory or the disk leaves it."""
    model.model.layers[1].to("meta")
    return model


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    """As bitsandbytes leaves it."""
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model.is_quantized = True
    return model


def packed(model: PreTrainedModel) -> PreTrainedModel:
    """As any method leaves it that stores whole numbers, whatever it says."""
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(2112, 1, dtype=torch.uint8), requires_grad=False
    )
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (offloaded, "is offloaded: load .* or give its folder"),
        (quantized, "is quantized"),
        (packed, "uint8.*quantized"),
    ],
)
def test_weights_that_are_not_there_as_numbers_are_refused(change, message):
    with pytest.raises(MoEError, match=message):
        upcycle(change(tiny_dense("llama")), num_experts=2)
