"""transformers' `ModelTesterMixin` over our classes, as its own models run it; Mixtral runs in the same harness.

`make conformance` fetches the mixin. A failure of Mixtral here is a fault of this harness, not of a model.
"""

import unittest

import pytest
from transformers import MixtralForCausalLM, MixtralModel

from moe_hf import MoEConfig, MoEForCausalLM, MoEModel
from tests.conformance.upstream import load_common
from tests.tiny_models import random_ids, tiny_config


common = load_common()
pytestmark = pytest.mark.conformance

# test -> why it cannot hold for a MoE model of ours; transformers' reasons to skip a test are its own.
SKIPPED = {}


class ModelTester:
    """What the mixin asks of a family: a config, inputs and sizes."""

    batch_size = 3
    seq_length = 7
    is_training = True

    def __init__(self, parent: unittest.TestCase, family: str):
        self.family = family
        config = self.get_config()
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.num_hidden_layers, self.num_attention_heads = config.num_hidden_layers, config.num_attention_heads

    def get_config(self):
        # The mixin resizes embeddings by ten tokens at a time and wants no more than two layers.
        if self.family == "mixtral":
            return tiny_config("mixtral", num_hidden_layers=2, num_local_experts=4)
        return MoEConfig(text_config=tiny_config(self.family, num_hidden_layers=2), num_experts=4)

    def prepare_config_and_inputs_for_common(self):
        ids = random_ids(self.batch_size, self.seq_length, self.vocab_size).to(common.torch_device)
        return self.get_config(), {"input_ids": ids, "attention_mask": common.torch.ones_like(ids)}


class MoEConformance(common.ModelTesterMixin):
    """The mixin with our classes; a family's test adds its name."""

    all_model_classes = (MoEModel, MoEForCausalLM)
    # An expert that no token chose has no gradient.
    test_all_params_have_gradient = False
    family: str

    def setUp(self):
        if self._testMethodName in SKIPPED:
            self.skipTest(SKIPPED[self._testMethodName])
        self.model_tester = ModelTester(self, self.family)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is MoEForCausalLM:
            # The mixin gives labels to the classes that are listed in transformers' own mapping.
            inputs["labels"] = common.torch.zeros_like(inputs["input_ids"])
        return inputs


class LlamaConformance(MoEConformance, common.GenerationTesterMixin, unittest.TestCase):
    family = "llama"


class Qwen3Conformance(MoEConformance, common.GenerationTesterMixin, unittest.TestCase):
    family = "qwen3"


class GPT2Conformance(MoEConformance, common.GenerationTesterMixin, unittest.TestCase):
    family = "gpt2"


class Gemma3TextConformance(MoEConformance, common.GenerationTesterMixin, unittest.TestCase):
    family = "gemma3_text"


class MixtralControl(MoEConformance, common.GenerationTesterMixin, unittest.TestCase):
    family = "mixtral"
    all_model_classes = (MixtralModel, MixtralForCausalLM)
