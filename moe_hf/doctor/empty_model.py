"""The model that a configuration describes, without its numbers: what a loader would look for."""

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moe_hf.errors import MoEError
from moe_hf.inspection import config_errors
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.modeling_moe import (
    MoEForCausalLM,
    MoEForSequenceClassification,
    MoEForTokenClassification,
    MoEModel,
)


OURS = {
    cls.__name__: cls for cls in (MoEModel, MoEForCausalLM, MoEForSequenceClassification, MoEForTokenClassification)
}


def empty_model(config: PreTrainedConfig, name: str | Path) -> PreTrainedModel:
    """The model of a configuration on the meta device, of the class that its `architectures` name.

    Args:
        name (`str` or `Path`): of the model, for the error.

    Raises:
        MoEError: no class of transformers or of this package, or values that no model can have.
    """
    names = config.architectures or []
    names = [names] if isinstance(names, str) else list(names)
    classes = [OURS.get(one) if isinstance(config, MoEConfig) else getattr(transformers, one, None) for one in names]
    cls = next((one for one in classes if isinstance(one, type) and issubclass(one, PreTrainedModel)), None)
    with config_errors(name), torch.device("meta"):
        if cls is not None and isinstance(config, cls.config_class or PreTrainedConfig):
            model = cls(config)
        elif type(config) in AutoModelForCausalLM._model_mapping:
            model = AutoModelForCausalLM.from_config(config)
        else:
            raise MoEError(
                f"{name} is a {config.model_type} model, for which neither transformers nor moe_hf has a class."
            )
    model.tie_weights()
    return model
