"""Runs a decoder whose last experts predict one by one: the decoder once, then the head for each of them.

Letters: B batch, S sequence, D model width, E experts, V vocabulary.
"""

import torch
from torch import OutOfMemoryError
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .config_checks import MoEError
from .output_mixture import NOT_HERE, OutputMixture
from .routing_pass import RoutingPass, routing_pass


# Arguments of a head's forward that its loss alone reads.
LABELS = ("labels", "shift_labels", "num_items_in_batch")


def mix_predictions(model: PreTrainedModel, named: dict, mixture: OutputMixture) -> ModelOutput:
    """The dense model's output, with the logits of the mixture of the last layer's experts, and their loss.

    Args:
        model (`PreTrainedModel`): a causal language model of this package, inside the routing pass that has `mixture`.
        named (`dict`): the arguments of its forward, by name.
        mixture (`OutputMixture`): filled here.

    Raises:
        MoEError: the decoder cannot carry the experts apart to its end.
    """
    rest = {name: value for name, value in named.items() if name not in (*LABELS, "logits_to_keep")}
    try:
        outputs = model.run_dense(rest)
    except RuntimeError as error:
        if model.dtype == torch.float64 and model.config._experts_implementation == "grouped_mm":
            raise MoEError(
                "experts_implementation='grouped_mm' does not compute in float64: call "
                "model.set_experts_implementation('eager') first."
            ) from error
        if mixture.log_weights is None or mixture.hidden_states is not None or isinstance(error, OutOfMemoryError):
            raise
        raise MoEError(NOT_HERE) from error  # the dense layers have no place for (E, B, S, D)
    if mixture.hidden_states is None:
        raise MoEError(NOT_HERE)

    def head(states: torch.Tensor) -> torch.Tensor:
        tokens = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        with routing_pass(RoutingPass(replay=mixture.ending_with(states))):
            return model.run_dense({"input_ids": tokens, "use_cache": False}).logits

    outputs["logits"] = mixture.logits(head, model.config.vocab_size, named.get("logits_to_keep", 0))
    if named.get("labels") is not None:
        labels = {name: named[name] for name in LABELS if named.get(name) is not None}
        outputs["loss"] = model.loss_function(logits=outputs["logits"], vocab_size=model.config.vocab_size, **labels)
    return outputs
