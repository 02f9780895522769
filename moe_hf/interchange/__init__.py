"""Between our checkpoints and the MoE families that transformers itself has, without a changed number."""

from moe_hf.interchange.configs import exact_targets
from moe_hf.interchange.transfer import export_native, import_native


__all__ = ["exact_targets", "export_native", "import_native"]
