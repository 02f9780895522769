"""Mixture-of-Experts for Hugging Face Transformers: upcycle a dense causal LM, fine-tune its experts, share it."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moe_hf.modeling.configuration_moe import MoEConfig, MoEError
from moe_hf.modeling.modeling_moe import MoEForCausalLM, MoEModel
from moe_hf.modeling.routing import register_router
from moe_hf.upcycling import upcycle, verify


__version__ = "0.1.0"

AutoConfig.register(MoEConfig.model_type, MoEConfig, exist_ok=True)
AutoModel.register(MoEConfig, MoEModel, exist_ok=True)
AutoModelForCausalLM.register(MoEConfig, MoEForCausalLM, exist_ok=True)


__all__ = ["MoEConfig", "MoEError", "MoEForCausalLM", "MoEModel", "register_router", "upcycle", "verify"]
