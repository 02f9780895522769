"""Matrices as 8- or 4-bit codes and scales: int8 with a symmetric absmax scale, and the 4-bit NormalFloat.

Letters: E experts, O outputs, I inputs of a map, N = O * I, G blocks of an expert, B values per block.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from moe_hf.errors import MoEError


# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero: QLoRA, appendix E
# (https://huggingface.co/papers/2305.14314).
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
SCHEMES = ("int8", "nf4")
SCALES_PER_BLOCK = 256
Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class QuantizationScheme:
    """How the matrix of an expert becomes codes.

    `int8`: round(127 w / absmax), one absmax per output row, or per `block_size` values in the order of the rows. `nf4`: the
    nearest of 16 levels times the absmax of `block_size` values (64 by default), two codes in a byte. `double_quant` stores
    the absmaxes themselves in 8 bits: their mean, and what differs from it in blocks of 256 (QLoRA, section 3).
    """

    name: str
    block_size: int | None = None
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.name not in SCHEMES:
            raise MoEError(f"Experts cannot be quantized to {self.name!r}; choose one of {list(SCHEMES)}.")
        if self.name == "nf4" and self.block_size is None:
            object.__setattr__(self, "block_size", 64)
        size = self.block_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 2 or size % 2):
            raise MoEError(f"block_size is {size!r}; an even number of values of at least 2 is wanted, such as 64.")
        if self.double_quant and size is None:
            raise MoEError("double_quant needs blocks: give a block_size. One scale per output row is small already.")

    def encode(self, matrix: torch.Tensor) -> Parts:
        """(O, I) -> `codes` (int8 or uint8), and `scales` (G,) float32 or their codes; all are contiguous.

        Raises:
            MoEError: a value is not finite.
        """
        flat = matrix.detach().float().reshape(-1)
        size = self.block_size or matrix.shape[1]
        blocks = F.pad(flat, (0, -len(flat) % size)).view(-1, size)
        absmax = blocks.abs().amax(1)
        if not torch.isfinite(absmax).all():
            raise MoEError("A weight of an expert is infinite or NaN: it has no scale. Mend the checkpoint first.")
        parts = _encode_scales(absmax) if self.double_quant else {"scales": absmax}
        # A code is the nearest under the scale that will be multiplied with it.
        scales = self._scales(parts)
        divisor = torch.where(scales > 0, scales, torch.ones_like(scales))[:, None]
        if self.name == "int8":
            codes = (blocks * 127 / divisor).round_().clamp_(-127, 127).to(torch.int8)
            return {"codes": codes.view(-1)[: len(flat)].contiguous(), **parts}
        levels = torch.tensor(NF4_LEVELS, device=flat.device)
        codes = torch.bucketize(blocks / divisor, (levels[1:] + levels[:-1]) / 2).view(-1, 2).to(torch.uint8)
        return {"codes": codes[:, 0] | (codes[:, 1] << 4), **parts}

    def decode(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """The matrix (O, I) in `dtype`: level times scale, in float32 or wider, rounded once."""
        wide = torch.promote_types(dtype, torch.float32)
        size, count = self.block_size or shape[1], math.prod(shape)
        scales = self._scales(parts).to(wide)
        if self.name == "int8":
            values, scales = parts["codes"].to(wide), scales / 127
        else:
            levels = torch.tensor(NF4_LEVELS, device=scales.device, dtype=wide)
            pairs = torch.stack([levels.repeat(16), levels.repeat_interleave(16)], dim=1)  # (256, 2)
            values = pairs.index_select(0, parts["codes"].int()).view(-1)
        if len(values) == len(scales) * size:
            values.view(-1, size).mul_(scales[:, None])
        else:
            values.mul_(scales.repeat_interleave(size)[: len(values)])
        return values[:count].view(shape).to(dtype)

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of what `encode` makes of a matrix of `shape`."""
        count, size = math.prod(shape), self.block_size or shape[1]
        groups = -(-count // size)
        codes = (torch.int8, (count,)) if self.name == "int8" else (torch.uint8, (groups * size // 2,))
        if not self.double_quant:
            return {"codes": codes, "scales": (torch.float32, (groups,))}
        outer = -(-groups // SCALES_PER_BLOCK)
        return {
            "codes": codes,
            "scale_codes": (torch.int8, (groups,)),
            "scale_absmax": (torch.float32, (outer,)),
            "scale_mean": (torch.float32, (1,)),
        }

    def _scales(self, parts: Parts) -> torch.Tensor:
        if not self.double_quant:
            return parts["scales"]
        codes = parts["scale_codes"]
        steps = parts["scale_absmax"].repeat_interleave(SCALES_PER_BLOCK)[: len(codes)] / 127
        return (codes.float() * steps + parts["scale_mean"]).clamp_min_(0)


def _encode_scales(absmax: torch.Tensor) -> Parts:
    mean = absmax.mean().view(1)
    centred = F.pad(absmax - mean, (0, -len(absmax) % SCALES_PER_BLOCK)).view(-1, SCALES_PER_BLOCK)
    outer = centred.abs().amax(1)
    divisor = torch.where(outer > 0, outer, torch.ones_like(outer))[:, None]
    codes = (centred * 127 / divisor).round_().to(torch.int8).view(-1)[: len(absmax)]
    return {"scale_codes": codes.contiguous(), "scale_absmax": outer, "scale_mean": mean}
