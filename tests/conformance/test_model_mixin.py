"""transformers' `ModelTesterMixin` over our classes, as its own models run it; Mixtral runs in the same harness.

`make conformance` fetches the mixin. A failure of Mixtral here is a fault of this harness, not of a model.

What the mixin skips by itself needs hardware or packages (accelerators, flash attention, DeepSpeed, kernels), a model
of another kind (vision, encoder-decoder, composite), or a feature that the family lacks. Where our classes differ from
transformers' on purpose, the test is replaced below by one of what holds instead, with the reason:

- `test_model_main_input_name`: the arguments are the dense model's, which the generic classes do not know.
- `test_training_gradient_checkpointing_use_reentrant_true`: refused, because it loses the gradient of router losses.
- `test_model_rope_scaling_*` of gemma3_text: skipped, see there.
- `test_moe_models_record_router_logits`: the mixin looks for the experts in the source file of the model; ours are in
  another file, and are recorded without transformers' hooks, which several families do not have.
"""

import inspect
import unittest

import pytest
from transformers import MixtralForCausalLM, MixtralModel

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, MoEModel
from tests.conformance.upstream import load_common
from tests.tiny_models import random_ids, tiny_config


common = load_common()
pytestmark = pytest.mark.conformance

_values_of_transformers = common.get_values


def _values_with_ours(mapping):
    """The mixin finds out what a class is for, labels or none, from transformers' lists of names."""
    names = list(_values_of_transformers(mapping))
    if mapping is common.MODEL_MAPPING_NAMES:
        names.append("MoEModel")
    if mapping is common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        names.append("MoEForCausalLM")
    return names


common.get_values = _values_with_ours


class ModelTester:
    """What the mixin asks of a family: a config, inputs, sizes, and the base model's class."""

    batch_size = 3
    seq_length = 7
    is_training = True

    def __init__(self, family: str, base_model_class: type):
        self.family, self.base_model_class = family, base_model_class
        config = self.get_config()
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.num_hidden_layers, self.num_attention_heads = config.num_hidden_layers, config.num_attention_heads

    def get_config(self):
        # Two layers are the most that the mixin accepts, and its tolerances are made for small weights.
        fields = {"num_hidden_layers": 2, "initializer_range": 0.02}
        if self.family == "mixtral":
            return tiny_config("mixtral", num_local_experts=4, **fields)
        return MoEConfig(text_config=tiny_config(self.family, **fields), num_experts=4)

    def prepare_config_and_inputs_for_common(self):
        ids = random_ids(self.batch_size, self.seq_length, self.vocab_size).to(common.torch_device)
        return self.get_config(), {"input_ids": ids, "attention_mask": common.torch.ones_like(ids)}


class Conformance(common.ModelTesterMixin, common.GenerationTesterMixin):
    """The mixin with what any MoE needs; a family's test adds its name."""

    # An expert that no token chose has no gradient.
    test_all_params_have_gradient = False
    family: str

    def setUp(self):
        self.model_tester = ModelTester(self.family, self.all_model_classes[0])


class MoEConformance(Conformance):
    all_model_classes = (MoEModel, MoEForCausalLM)

    def test_model_main_input_name(self):
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            arguments = list(inspect.signature(type(model).forward).parameters)
            assert arguments[1] == type(model).main_input_name

    def test_training_gradient_checkpointing_use_reentrant_true(self):
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            with pytest.raises(MoEError, match="use_reentrant"):
                model.activation_checkpointing_enable({"use_reentrant": True})

    def test_moe_models_record_router_logits(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).to(common.torch_device)
            assert len(model(**inputs, output_router_logits=True).router_logits) == config.num_hidden_layers


class LlamaConformance(MoEConformance, unittest.TestCase):
    family = "llama"


class Qwen3Conformance(MoEConformance, unittest.TestCase):
    family = "qwen3"


class GPT2Conformance(MoEConformance, unittest.TestCase):
    family = "gpt2"


ROPE_PER_LAYER_TYPE = "gemma3_text has rope parameters for each type of layer; the dense model fails these tests too."


class Gemma3TextConformance(MoEConformance, unittest.TestCase):
    family = "gemma3_text"

    @unittest.skip(ROPE_PER_LAYER_TYPE)
    def test_model_rope_scaling_frequencies(self):
        pass

    @unittest.skip(ROPE_PER_LAYER_TYPE)
    def test_model_rope_scaling_from_config_0_linear(self):
        pass

    @unittest.skip(ROPE_PER_LAYER_TYPE)
    def test_model_rope_scaling_from_config_1_dynamic(self):
        pass

    @unittest.skip(ROPE_PER_LAYER_TYPE)
    def test_model_rope_scaling_from_config_2_yarn(self):
        pass


class MixtralControl(Conformance, unittest.TestCase):
    family = "mixtral"
    all_model_classes = (MixtralModel, MixtralForCausalLM)
