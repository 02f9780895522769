"""The model. The files beside this one travel to the Hub with each checkpoint; importing the folder registers them."""

from importlib import import_module

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.modeling_moe import (
    MoEForCausalLM,
    MoEForSequenceClassification,
    MoEForTokenClassification,
    MoEModel,
    MoEPreTrainedModel,
)


AutoConfig.register(MoEConfig.model_type, MoEConfig, exist_ok=True)
AutoModel.register(MoEConfig, MoEModel, exist_ok=True)
AutoModelForCausalLM.register(MoEConfig, MoEForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MoEConfig, MoEForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(MoEConfig, MoEForTokenClassification, exist_ok=True)


def _push(model: MoEPreTrainedModel, repo_id: str, **kwargs):
    # Named, not imported: the model works where nothing but this folder is, and most models are never pushed.
    return import_module("moe_hf.hub").push_model(model, repo_id, **kwargs)


def _check_save(model: MoEPreTrainedModel) -> None:
    import_module("moe_hf.finetuning.model_to_save").check_save(model)


MoEPreTrainedModel.push_hook = _push
MoEPreTrainedModel.save_check = staticmethod(_check_save)
