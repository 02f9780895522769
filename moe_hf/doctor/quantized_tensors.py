"""Quantized checkpoints as named tensors: what belongs together is one name, and is decoded where that needs no library.

Decoded are codes of 8 bits (float8, int8) times scales of a tensor, of rows or of blocks. What is packed tighter keeps its place and
its name, and is not read.

Letters: O outputs, I inputs.
"""

import re

import torch

from moe_hf.weight_files import CheckpointReader, TensorSpec


# The part behind the name of the weight; "" stands for the weight itself.
PARTS = (
    "qweight|qzeros|scales|g_idx|weight_packed|weight_scale_inv|weight_scale_2|weight_scale|weight_zero_point|weight_shape|"
    "weight_global_scale|weight_g_idx|input_scale|input_global_scale|SCB|weight_format|"
    r"weight\.absmax|weight\.quant_map|weight\.nested_absmax|weight\.nested_quant_map|weight\.quant_state\.\w+"
)
OF_LINEAR = re.compile(rf"^(.*)\.({PARTS})$")
OF_STACK = re.compile(
    r"^(.*\.(?:gate_up_proj|up_proj|down_proj|gate_proj))_(blocks|scales|scale_inv|scale|absmax|codes)$"
)
OF_LOW_MEMORY = re.compile(r"^(.*\.(?:gate_up_proj|up_proj|down_proj))\.(codes|scales|absmax|zeros)$")
SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scale")
# Of formats with packed codes: without these nothing can be decoded.
NEEDED = {"qweight": ("scales",), "weight_packed": ("weight_scale", "weight_global_scale"), "blocks": ("scales",)}
CODES_8 = {torch.int8, torch.float8_e4m3fn, torch.float8_e5m2}


class QuantizedTensors:
    """The tensors of a quantized checkpoint by the names of the weights that they are; a [`Tensors`].

    Attributes:
        tensors: weights to what they are once decoded, in float32; what cannot be decoded here keeps a dtype of whole numbers.
        parts: weights to the parts that the file has of each: part to name. Plain tensors have one part, `""`.
        kinds: weights to `"plain"`, `"codes"` (decoded here) or `"packed"`.
    """

    def __init__(self, reader: CheckpointReader):
        self.reader = reader
        self.parts: dict[str, dict[str, str]] = {}
        for name in reader.tensors:
            weight, part = split_name(name)
            self.parts.setdefault(weight, {})[part] = name
        self.kinds = {weight: self._kind(parts) for weight, parts in self.parts.items()}
        self.tensors = {weight: self._spec(weight) for weight in self.parts}

    def _kind(self, parts: dict[str, str]) -> str:
        own = self.reader.tensors.get(parts.get("", ""))
        if own is None:
            return "packed"
        is_code = own.dtype in CODES_8
        if not is_code and len(parts) == 1 and own.dtype.is_floating_point:
            return "plain"
        return "codes" if is_code and self._scale(parts) is not None else "packed"

    def _scale(self, parts: dict[str, str]) -> str | None:
        return next((parts[part] for part in SCALES if part in parts), None)

    def _spec(self, weight: str) -> TensorSpec:
        parts, kind = self.parts[weight], self.kinds[weight]
        if kind == "packed":
            first = self.reader.tensors[next(iter(parts.values()))]
            own = self.reader.tensors.get(parts.get("", ""), first)
            return TensorSpec(own.dtype if not own.dtype.is_floating_point else torch.uint8, own.shape)
        own = self.reader.tensors[parts[""]]
        return own if kind == "plain" else TensorSpec(torch.float32, own.shape)

    def is_quantized(self, weight: str) -> bool:
        """Whether a weight is stored in codes."""
        return self.kinds.get(weight) in ("codes", "packed")

    def lacks(self, weight: str) -> list[str]:
        """Parts without which the codes of a weight mean nothing."""
        parts = self.parts[weight]
        own = self.reader.tensors.get(parts.get("", ""))
        if own is not None and own.dtype in CODES_8 and self._scale(parts) is None and "SCB" not in parts:
            return ["scale"]
        return [
            needed[0] for part, needed in NEEDED.items() if part in parts and not any(name in parts for name in needed)
        ]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of the first dimension of a weight, or all, decoded where it is stored in codes."""
        parts = self.parts[name]
        rows = self.reader.read(parts[""], start, stop)
        if self.kinds[name] == "plain":
            return rows
        shape = self.reader.tensors[parts[""]].shape
        scale = self.reader.read(self._scale(parts)).float()
        stop = shape[0] if stop is None else stop
        return rows.float() * _spread(scale, shape, start, stop)

    def close(self) -> None:
        """Close the files."""
        self.reader.close()


def split_name(name: str) -> tuple[str, str]:
    """The weight that a tensor is part of, and which part it is."""
    for pattern in (OF_LOW_MEMORY, OF_STACK):
        match = pattern.match(name)
        if match:
            return match[1], match[2]
    match = OF_LINEAR.match(name)
    return (f"{match[1]}.weight", match[2]) if match else (name, "")


def _spread(scale: torch.Tensor, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    """Scales as large as rows [start, stop) of a weight: of the whole, of rows, or of blocks in any dimension."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim < len(shape):
        scale = scale.reshape(*scale.shape, *[1] * (len(shape) - scale.ndim))
    for dimension, size in enumerate(shape):
        have = scale.shape[dimension]
        if have not in (1, size):
            block = -(-size // have)
            scale = scale.repeat_interleave(block, dim=dimension).narrow(dimension, 0, size)
    return scale[start:stop] if scale.shape[0] != 1 else scale
