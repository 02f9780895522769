"""MoEs in GGUF files, expert by expert: llama.cpp stacks each projection as (E, out, in), in blocks of codes.

Letters: E experts, D model width, F expert width.
"""

import re
from pathlib import Path

import torch

from moe_hf.doctor.pieces import DOWN, FIRST, GATE, SECOND, UP, WHOLE, Block, Piece
from moe_hf.errors import MoEError
from moe_hf.weight_files import TensorSpec


KINDS = {"ffn_gate_exps": GATE, "ffn_up_exps": UP, "ffn_down_exps": DOWN}
NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)$")
DAMAGE = (ValueError, LookupError, ArithmeticError, TypeError, OSError, MemoryError, RuntimeError)


class GGUFTensors:
    """The tensors of a GGUF file, decoded a few rows at a time; a [`Tensors`].

    Attributes:
        tensors: names to what they are once decoded, float32.
        types: how each is stored, such as `Q4_K`.
        metadata: numbers and words of the file, without arrays.

    Raises:
        MoEError: the package gguf is missing, or the file is damaged.
    """

    def __init__(self, path: str | Path):
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise MoEError(
                f"{path} is read with the package gguf, which is missing: pip install 'moe-hf[gguf]'."
            ) from error
        try:
            reader = GGUFReader(str(path))
            self._found = {tensor.name: tensor for tensor in reader.tensors}
            self.metadata = {
                key: field.contents() for key, field in reader.fields.items() if len(field.data) == 1 and key[0] != "G"
            }
        except DAMAGE as error:
            raise MoEError(f"{path} cannot be read as a GGUF file: {error}.") from error
        shapes = {name: tuple(int(size) for size in t.shape[::-1]) for name, t in self._found.items()}
        self.tensors = {name: TensorSpec(torch.float32, shape) for name, shape in shapes.items()}
        self.types = {name: tensor.tensor_type.name for name, tensor in self._found.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of the first dimension of a tensor, or all, decoded."""
        from gguf.quants import dequantize

        tensor = self._found[name]
        shape = self.tensors[name].shape
        stop = shape[0] if stop is None else stop
        # The bytes lie by the first dimension of torch's order; a block of codes never crosses a row.
        rows = tensor.data.reshape(shape[0], -1)[start:stop] if len(shape) > 1 else tensor.data
        if tensor.tensor_type.name in ("F32", "F16", "F64"):
            values = torch.from_numpy(rows.astype("float32"))
        else:
            values = torch.from_numpy(dequantize(rows, tensor.tensor_type).astype("float32"))
        return values.reshape(stop - start, *shape[1:]) if len(shape) > 1 else values.flatten()[start:stop]

    def number(self, key: str) -> int | float | None:
        """A number of the architecture, such as `expert_count`, or None."""
        value = self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}")
        return value if isinstance(value, int | float) else None


def blocks_of_gguf(file: GGUFTensors) -> list[Block]:
    """The layers with experts."""
    count = int(file.number("expert_count") or 0)
    blocks: dict[int, Block] = {}
    for name, spec in file.tensors.items():
        match = NAME.match(name)
        if match is None:
            continue
        layer, leaf, kind = int(match[1]), match[2], match[3]
        stacked = (leaf in KINDS or leaf == "ffn_gate_up_exps") and kind == "weight" and len(spec.shape) == 3
        if not stacked and leaf not in ("ffn_gate_inp", "exp_probs_b"):
            continue
        block = blocks.setdefault(layer, Block(f"blk.{layer}", layer, count))
        if stacked:
            halves = ((GATE, FIRST), (UP, SECOND)) if leaf == "ffn_gate_up_exps" else ((KINDS[leaf], WHOLE),)
            for expert in range(spec.shape[0]):
                for projection, rows in halves:
                    block.pieces[expert, projection] = Piece(name, expert, rows)
        elif leaf == "ffn_gate_inp" and kind == "weight":
            block.router = name
        elif leaf == "exp_probs_b":
            block.bias = name
    return [blocks[layer] for layer in sorted(blocks)]
