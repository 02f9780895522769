"""MoE models: a dense decoder of transformers whose MLPs are replaced by MoE blocks.

`MoEForCausalLM(config)` returns an instance of a subclass of the dense class that `config.text_config` names, so that
attention, caches, generation, heads and weight names are the dense model's own.

Letters: B batch, S sequence, T = B * S tokens, E experts, V vocabulary.
"""

import inspect
import os

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .cache_names import cache_of, named_arguments
from .configuration_moe import MoEConfig, MoEError
from .custom_code import CUSTOM_CODE  # noqa: F401 - importing it registers them
from .dense_classes import LABEL_FIELDS, check_model_arguments, classifier_class, decoder_class
from .dense_mlp import activation_of, check_one_expert_reproduces, find_mlp_sites, holder_of
from .dynamic_class import Combined, combine, put_block
from .index_names import check_index_names, check_kernel_names
from .losses import loss_coefficients, reward_predictions
from .mixed_predictions import mix_predictions
from .moe_block import MoEBlock, rows_are_aligned
from .output_mixture import OutputMixture
from .outputs import (
    MoECausalLMOutput,
    MoEModelOutput,
    MoESequenceClassifierOutput,
    MoETokenClassifierOutput,
    extended,
    losses_by_name,
    mean_stats,
)
from .parallel_plans import block_plans, refuse_layout, without_blocks
from .routers import ROUTERS, carries_on, router_spec, save_custom_code, why_no_cache
from .routing_cache import carried_by, mask_of_tokens
from .routing_ids import extend_ids, open_experts, spread_ids, take_ids
from .routing_pass import RoutingPass, checkpointing, current_routing_pass, document_ids_of, routing_pass
from .serving import CheckedGeneration, check_vllm
from .step_labels import count_labels, share_of_step, zero_without_labels
from .travelling_code import auto_map_of, travelling_class


class MoEPreTrainedModel(Combined, PreTrainedModel):
    """Base of [`MoEModel`] and [`MoEForCausalLM`]: builds the dense model, then puts the MoE blocks in."""

    config: MoEConfig
    # Read from the generic class while the dense one is not known.
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_set_experts_implementation_cached_value = True

    _forward_names: tuple[str, ...] = ()

    # Called as `push_hook(model, repo_id, **kwargs)` in place of transformers' push. The installed package sets it, to
    # push tokenizer and card along; code that travelled with a checkpoint does without.
    push_hook = None
    # Called as `save_check(model)` before a save, likewise: it refuses to lose what trains.
    save_check = staticmethod(lambda model: None)

    def __new__(cls, config=None, *args, **kwargs):
        if cls._dense_class is None:
            # Not by class: transformers loads the two files of a local folder into modules that share no classes.
            if getattr(config, "model_type", None) != MoEConfig.model_type:
                raise MoEError(f"{cls.__name__} needs a MoEConfig, and got {type(config).__name__}.")
            cls = combine(cls, cls._find_dense_class(config))
        return super().__new__(cls)

    def __init__(self, config: MoEConfig, *args, **kwargs):
        text_config = config.text_config
        check_model_arguments(config, kwargs, self._dense_class)
        # The dense classes inside have no experts, and refuse a request for an implementation of them.
        text_config._experts_implementation_internal = "eager"
        self._dense_class.__init__(self, text_config, *args, **kwargs)
        self.config = config
        config._attn_implementation_internal = text_config._attn_implementation_internal
        requested = config._experts_implementation
        config._experts_implementation_internal = self._check_and_adjust_experts_implementation(requested)
        base_model = self.base_model
        if base_model is self and not isinstance(self, MoEModel):
            raise MoEError(f"{self._dense_class.__name__} has no base model apart from its head; it is not supported.")
        self._install_blocks(base_model)
        if requested is None and not rows_are_aligned(base_model):
            config._experts_implementation_internal = "eager"
        self._adopt_submodels(base_model)
        self.name_or_path = base_model.name_or_path = config.name_or_path
        # Compiled steps, which generate would make of static caches, cannot keep what routers carry on.
        self._can_compile_fullgraph &= not carries_on(config)
        self.post_init()

    def _install_blocks(self, base_model: nn.Module) -> None:
        config = self.config
        every = find_mlp_sites(base_model)
        sites = [site for site in every if config.is_moe_layer(site.layer_index)]
        if not sites:
            raise MoEError(f"None of the layers of {type(base_model).__name__} that have an MLP is a MoE layer.")
        widths = {site.intermediate_size for site in sites}
        if config.moe_intermediate_size is None and len(widths) == 1:
            # Tools that read the config alone need the number.
            config.moe_intermediate_size = widths.pop()
        check_vllm(config, base_model, sites)
        for site in sites:
            holder = holder_of(base_model, site)
            check_one_expert_reproduces(holder, site)
            block = MoEBlock(config, site, activation_of(holder, site))
            put_block(base_model, site, block.train(self.training))
        base_model._moe_sites, base_model._has_dense_sites = sites, len(every) > len(sites)

    def _adopt_submodels(self, base_model: nn.Module) -> None:
        """Give each dense model above the blocks a class that initialises them; the base model becomes a `MoEModel`."""
        submodels = [module for module in self.modules() if isinstance(module, PreTrainedModel) and module is not self]
        for module in reversed(submodels):
            if not any(isinstance(child, MoEBlock) for child in module.modules()):
                continue
            module.__class__ = combine(MoEModel if module is base_model else Combined, type(module))
            if module is base_model:
                module.config = self.config
            _CAN_RECORD_REGISTRY[module] = module._can_record_outputs
            module.post_init()

    def init_parallel_plans(self) -> None:
        """The dense model's plans without its MLPs, and a tensor- and expert-parallel plan for the experts."""
        super().init_parallel_plans()
        if (sites := self.__dict__.get("_moe_sites")) is None:
            return
        tensor, expert, sharded = block_plans(self.config, sites, router_spec(self.config).merges_experts)
        kept = self._tp_plan if self._has_dense_sites else without_blocks(self._tp_plan, sites)
        self._tp_plan = kept | tensor if kept else {}
        self._ep_plan, self._fsdp_plan = self._ep_plan | expert, sharded | self._fsdp_plan

    def _resolve_parallel_plans(self, distributed_config):
        """As in transformers; a layout that this model cannot have is refused."""
        refuse_layout(self, distributed_config, router_spec(self.config).merges_experts)
        return super()._resolve_parallel_plans(distributed_config)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, every_n_layers=1):
        function = checkpointing(gradient_checkpointing_func) if enable else gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable, function, every_n_layers)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; files that name weights outside of their folder or kernels of the Hub are refused."""
        if pretrained_model_name_or_path is not None:
            folder = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            check_index_names(folder)
            check_kernel_names(folder)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; the code that defines the model goes along, for all Auto classes.

        A subclass whose file does not import `.modeling_moe` from beside it loads as ours, with a warning.
        """
        MoEPreTrainedModel.save_check(self)
        travelling = travelling_class(type(self), __name__)
        self.config.auto_map = auto_map_of(type(self), travelling)
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.should_save_on_this_rank(kwargs.get("is_main_process", True)):
            save_custom_code(self.config, save_directory)
            if not self.is_remote_code():
                custom_object_save(travelling, save_directory)

    @classmethod
    def is_remote_code(cls) -> bool:
        """As in transformers; False where it would save the code of another class than `save_pretrained` does."""
        is_saved = not issubclass(cls, FSDPModule) and travelling_class(cls, __name__) is (cls._generic_class or cls)
        return super().is_remote_code() and is_saved

    def push_to_hub(self, repo_id: str, **kwargs):
        """As in transformers; where moe_hf is installed, `tokenizer` and the other arguments of `push_model` too."""
        hook = MoEPreTrainedModel.push_hook
        return super().push_to_hub(repo_id, **kwargs) if hook is None else hook(self, repo_id, **kwargs)

    def _named_arguments(self, args: tuple, kwargs: dict) -> dict:
        return named_arguments(self._forward_names, args, kwargs)

    def _take_flag(self, named: dict, name: str) -> bool:
        """Take a flag that the dense forward does not know out of its arguments; the config has the default."""
        value = named.pop(name, None)
        return getattr(self.config, name) if value is None else value

    def _wants_record(self, output_router_logits: bool) -> bool:
        follows = self.config.balance_strategy == "bias" or ROUTERS[self.config.router_type].state
        wanted = follows or any(loss_coefficients(self.config).values())
        return output_router_logits or (self.training and wanted)

    def _describe_batch(self, current: RoutingPass, named: dict, ids: dict[str, torch.Tensor] | None = None) -> None:
        if (tokens := named.get("inputs_embeds") if named.get("input_ids") is None else named["input_ids"]) is None:
            return
        shape = current.batch_size, current.sequence_length = tokens.shape[:2]
        reason, past = why_no_cache(self.config), cache_of(named)
        if reason is not None and past is not None and past.get_seq_length() > 0:
            raise MoEError(reason)
        attention_mask, position_ids = named.get("attention_mask"), named.get("position_ids")
        is_plain = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
        if is_plain or (attention_mask is not None and carries_on(self.config)):
            current.token_mask = mask_of_tokens(attention_mask, shape, past)
        elif attention_mask is None and position_ids is not None and position_ids.dim() == 2 and shape[1] > 1:
            current.document_ids = document_ids_of(position_ids, shape)
        current.place_tokens(self.config, position_ids, attention_mask, past)
        if carries_on(self.config) and not is_torchdynamo_compiling():
            current.carried = carried_by(past, position_ids)
        if ids is not None:
            current.ids = spread_ids(self.config, ids, shape, past, current.token_mask, tokens.device)
            current.open_experts = open_experts(self.config, current.ids)


class MoEModel(MoEPreTrainedModel):
    """The decoder without a head. Its forward has the dense model's arguments, and `output_router_logits`."""

    @staticmethod
    def _find_dense_class(config: MoEConfig) -> type:
        return decoder_class(config.text_config, MODEL_MAPPING)

    def forward(self, *args, **kwargs):
        """Run the dense model's forward; with recording, add the router logits and losses to its output."""
        named = self._named_arguments(args, kwargs)
        current = current_routing_pass()
        if current is not None and not current.has_model:
            # Called by a head, which opened the pass and reads what the routers recorded in it.
            current.has_model = True
            if current.replay is not None:
                return current.replay
            self._describe_batch(current, named)
            outputs = super().forward(**named)
            return outputs if current.mixture is None else current.mixture.take(outputs, current.batch_size)
        return_dict = self._take_flag(named, "return_dict")
        output_router_logits = self._take_flag(named, "output_router_logits")
        ids = take_ids(self.config, named)
        with routing_pass(RoutingPass(record=self._wants_record(output_router_logits), has_model=True)) as current:
            self._describe_batch(current, named, ids)
            outputs = super().forward(**named, return_dict=True)
        current.keep_carry(outputs)
        outputs = extended(
            MoEModelOutput,
            outputs,
            router_logits=tuple(layer.router_logits for layer in current.layers) if output_router_logits else None,
            router_losses=losses_by_name(current, self.config, self.training, output_router_logits),
            router_stats=mean_stats(current.layers),
        )
        return outputs if return_dict else outputs.to_tuple()


class _MoEWithHead(MoEPreTrainedModel):
    """A decoder with a head that knows a loss, to which the router losses are added."""

    _output_class: type = MoECausalLMOutput
    _predicts_tokens = False

    def run_dense(self, named: dict):
        """The dense model's own forward, with arguments by name."""
        return super().forward(**named, return_dict=True)

    def forward(self, *args, **kwargs):
        """Run the dense model's forward; in training add the weighted router losses to its loss, once.

        With `num_items_in_batch` (the labels of a whole accumulated batch) the router losses are weighted by this
        micro-batch's share of those labels, as the language-modelling loss is. Without a label to learn from, both are 0.
        """
        named = self._named_arguments(args, kwargs)
        return_dict = self._take_flag(named, "return_dict")
        output_router_logits = self._take_flag(named, "output_router_logits")
        ids = take_ids(self.config, named)
        mixture = OutputMixture() if self._predicts_tokens and self.config.output_mixture else None
        record = self._wants_record(output_router_logits)
        num_labels = count_labels(self, named, self._predicts_tokens)
        with routing_pass(RoutingPass(record=record, mixture=mixture)) as current:
            # Some heads call the decoder inside the base model, which then does not describe the batch itself.
            self._describe_batch(current, named, ids)
            outputs = self.run_dense(named) if mixture is None else mix_predictions(self, named, mixture)
        current.keep_carry(outputs)
        if self.training and self.config.router_loss_coefs.get("policy_gradient_loss"):
            reward_predictions(current.layers, outputs.logits, named.get("labels"), named.get("shift_labels"))
        loss, aux_loss = outputs.loss, None
        if self.training and loss is not None:
            loss = zero_without_labels(loss, num_labels)
        router_losses = losses_by_name(current, self.config, self.training, output_router_logits)
        if router_losses is not None:
            coefficients = loss_coefficients(self.config)
            aux_loss = sum(coefficients[name] * loss for name, loss in router_losses.items())
            if self.training:
                joint = torch.is_grad_enabled() and self.config.balance_loss_scope == "global_batch"
                share = share_of_step(current.num_tokens(), num_labels, named.get("num_items_in_batch"), joint)
                aux_loss = aux_loss * share
                if loss is not None:
                    loss = loss + aux_loss.to(loss.device, loss.dtype)
        outputs = extended(
            self._output_class,
            outputs,
            loss=loss,
            aux_loss=aux_loss,
            router_logits=tuple(layer.router_logits for layer in current.layers) if output_router_logits else None,
            router_losses=router_losses,
            router_stats=mean_stats(current.layers),
        )
        return outputs if return_dict else outputs.to_tuple()


class MoEForCausalLM(_MoEWithHead, CheckedGeneration, GenerationMixin):
    """The decoder with its language-modelling head; the dense model's arguments, and `output_router_logits`."""

    _predicts_tokens = True

    @staticmethod
    def _find_dense_class(config: MoEConfig) -> type:
        return decoder_class(config.text_config, MODEL_FOR_CAUSAL_LM_MAPPING)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, num_new_tokens=1, **kwargs):
        extend_ids(model_kwargs, num_new_tokens)
        return super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, num_new_tokens=num_new_tokens, **kwargs
        )


class _MoEClassifier(_MoEWithHead):
    """A decoder with a classifier's head: the dense family's own, or transformers' generic one."""

    # The dense heads average over a micro-batch and take no num_items_in_batch: Trainer has to divide by accumulation.
    accepts_loss_kwargs = False
    _label_mapping = None
    _generic_head: type

    @classmethod
    def _find_dense_class(cls, config: MoEConfig) -> type:
        decoder_class(config.text_config, MODEL_FOR_CAUSAL_LM_MAPPING)  # refuses what is no decoder
        dense = classifier_class(config.text_config, cls._label_mapping, cls._generic_head)
        if "decoder_input_ids" in inspect.signature(dense.forward).parameters:
            raise MoEError(f"{dense.__name__} of transformers reads an encoder too, and MoEForCausalLM is a decoder.")
        return dense

    def __init__(self, config: MoEConfig, *args, **kwargs):
        if config.router_loss_coefs.get("policy_gradient_loss"):
            raise MoEError("policy_gradient_loss rewards predictions, and a classifier makes none: leave it out.")
        for name in LABEL_FIELDS:
            setattr(config.text_config, name, getattr(config, name))
        if not hasattr(config, "pad_token_id"):
            config.pad_token_id = None  # heads ask for it, and some families have no such field
        super().__init__(config, *args, **kwargs)


class MoEForSequenceClassification(_MoEClassifier):
    """The decoder with a head that gives each sequence one of `config.num_labels` labels, read at its last token."""

    _output_class = MoESequenceClassifierOutput
    _label_mapping = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    _generic_head = GenericForSequenceClassification


class MoEForTokenClassification(_MoEClassifier):
    """The decoder with a head that gives each token one of `config.num_labels` labels."""

    _output_class = MoETokenClassifierOutput
    _label_mapping = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    _generic_head = GenericForTokenClassification


# A saved model carries this code, and so does one that was loaded with it.
MoEConfig.register_for_auto_class()
MoEModel.register_for_auto_class("AutoModel")
MoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
MoEForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
MoEForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "MoECausalLMOutput",
    "MoEConfig",
    "MoEForCausalLM",
    "MoEForSequenceClassification",
    "MoEForTokenClassification",
    "MoEModel",
    "MoEModelOutput",
    "MoEPreTrainedModel",
]
