"""The errors that moe_hf raises for a user's mistake, in one place to import from."""

from moe_hf.modeling.configuration_moe import MoEError


__all__ = ["MoEError"]
