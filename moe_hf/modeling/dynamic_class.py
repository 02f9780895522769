"""Classes made at run time: one of ours combined with a dense one of transformers, and layers with an inline block.

A combined class is the dense model's in everything that it does not define itself. It is made once per pair, and
pickled by its two parents.
"""

import inspect
from functools import cache

import torch
from torch import nn
from transformers import initialization as init

from .dense_classes import pickled_parents, unpickled_class
from .dense_mlp import INLINE_ATTRIBUTE, MLPSite
from .experts import DenseFFN, Experts
from .extra_experts import ExtraExpert
from .moe_block import MoEBlock
from .multi_head import HEAD_GAIN, MultiHead
from .router import Router
from .routing_ids import ID_ARGUMENTS


# Flags that transformers reads from the class; a combined class has the dense model's.
_CLASS_FLAGS = (
    "supports_gradient_checkpointing",
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_attention_backend",
    "_can_compile_fullgraph",
)


def _identity(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states


class Combined:
    """What each class combined with a dense one needs: weight initialisation of the MoE parts, and pickling."""

    _generic_class: type | None = None
    _dense_class: type | None = None

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: like transformers' own models this one initialises through `transformers.initialization`.

        Otherwise loading skips a module whose parameters were all loaded, and leaves its computed buffers undefined.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router | Experts):
            config = self.config
            std = getattr(config, "initializer_range", None) or getattr(config, "init_std", None) or 0.02
            for name, parameter in module.named_parameters(recurse=False):
                # What a router has besides its logits starts without effect.
                if name.endswith("_bias") or (isinstance(module, Router) and name in module.zero_parameters):
                    init.zeros_(parameter)
                else:
                    # An embedding of tasks is read in place of a normalised hidden state.
                    init.normal_(parameter, mean=0.0, std=1.0 if name == "task_embedding" else std)
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)
            if isinstance(module, Experts):
                module.zero_padding_()
        elif isinstance(module, ExtraExpert):
            module.reset_parameters()
        elif isinstance(module, DenseFFN):
            for parameter in module.down_proj.parameters():
                init.zeros_(parameter)
        elif isinstance(module, MultiHead):
            init.xavier_uniform_(module.head_proj.weight, gain=HEAD_GAIN)
            init.xavier_uniform_(module.merge_proj.weight)
            init.zeros_(module.head_proj.bias)
            init.zeros_(module.merge_proj.bias)

    def __reduce_ex__(self, protocol):
        # A class made at run time cannot be found by name; its two parents can.
        parents = (self._generic_class, *pickled_parents(self._dense_class))
        return (_rebuild, parents, *super().__reduce_ex__(protocol)[2:])


@cache
def combine(generic: type, dense: type) -> type:
    """The class that is both `generic`, one of ours, and `dense`, one of transformers; always the same object."""
    is_moe = generic is not Combined
    namespace = {
        "__module__": generic.__module__,
        # transformers keys the outputs that a class can record by str(class): it must tell families apart.
        "__qualname__": f"{generic.__name__}[{dense.__name__}]",
        "_generic_class": generic,
        "_dense_class": dense,
        # transformers would look for the answers in the source of this file, which has neither layer.
        "_can_set_attn_implementation_cached_value": dense._can_set_attn_implementation(),
        "_can_set_experts_implementation_cached_value": is_moe,
        **{flag: getattr(dense, flag) for flag in _CLASS_FLAGS},
    }
    if is_moe:
        signature = inspect.signature(dense.forward)
        namespace["_forward_names"] = tuple(signature.parameters)[1:]
        namespace["forward"] = _forward_with_signature(generic, signature)
    return type(generic.__name__ if is_moe else dense.__name__, (generic, dense), namespace)


def _forward_with_signature(generic: type, signature: inspect.Signature):
    """`generic.forward` under the dense model's signature, which Trainer, generate and tracers inspect."""

    def forward(self, *args, **kwargs):
        return generic.forward(self, *args, **kwargs)

    parameters = dict(signature.parameters)
    rest = [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    named = [p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    added = {"output_router_logits": bool | None} | dict.fromkeys(ID_ARGUMENTS, torch.Tensor | None)
    for name, annotation in added.items():
        if name not in parameters:
            kind = inspect.Parameter.KEYWORD_ONLY
            named.append(inspect.Parameter(name, kind, default=None, annotation=annotation))
    forward.__signature__ = signature.replace(parameters=[*named, *rest], return_annotation=inspect.Signature.empty)
    forward.__doc__ = generic.forward.__doc__
    return forward


def _rebuild(generic: type, *dense_parents: type):
    """Make an empty instance of a combined class, for unpickling."""
    cls = combine(generic, unpickled_class(*dense_parents))
    return cls.__new__(cls)


@cache
def _with_inline_block(layer: type, site_names: tuple[str, str | None, str]) -> type:
    """Subclass of a decoder layer whose inline projections lead to the block: up is the block, the rest does nothing."""
    up, activation, down = site_names
    namespace = {
        "__module__": layer.__module__,
        "__qualname__": layer.__qualname__,
        "__reduce_ex__": lambda self, protocol: (
            _rebuild_inline,
            (layer, site_names),
            *super(cls, self).__reduce_ex__(protocol)[2:],
        ),
        up: property(lambda self: getattr(self, INLINE_ATTRIBUTE)),
        down: property(lambda self: _identity),
    }
    if activation is not None:
        namespace[activation] = property(lambda self: _identity)
    cls = type(layer.__name__, (layer,), namespace)
    return cls


def _rebuild_inline(layer: type, site_names: tuple[str, str | None, str]):
    cls = _with_inline_block(layer, site_names)
    return cls.__new__(cls)


def put_block(base_model: nn.Module, site: MLPSite, block: MoEBlock) -> None:
    """Put `block` in the place of the MLP at `site`, which is dropped."""
    layer = base_model.get_submodule(site.layer)
    if site.attribute is not None:
        setattr(layer, site.attribute, block)
        return
    for name in filter(None, (site.up, site.activation, site.down)):
        delattr(layer, name)
    layer.__class__ = _with_inline_block(type(layer), (site.up, site.activation, site.down))
    setattr(layer, INLINE_ATTRIBUTE, block)
