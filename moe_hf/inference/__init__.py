"""Models whose experts take less memory: quantized, or away from the device until a pass needs them."""

from moe_hf.inference.folders import load_low_memory, save_low_memory
from moe_hf.inference.offload import CacheReport, cache_report, offload_experts
from moe_hf.inference.quantize import LowMemoryReport, model_bytes, quantize_experts, restore_experts
from moe_hf.inference.schemes import SCHEMES, QuantizationScheme


__all__ = [
    "SCHEMES",
    "CacheReport",
    "LowMemoryReport",
    "QuantizationScheme",
    "cache_report",
    "load_low_memory",
    "model_bytes",
    "offload_experts",
    "quantize_experts",
    "restore_experts",
    "save_low_memory",
]
