"""Experts in host memory or in a file, and a cache of some of them on the device that computes.

Letters: E experts, O outputs, I inputs of a map.
"""

from collections import OrderedDict
from collections.abc import Collection
from typing import Any, Protocol

import torch

from moe_hf.errors import MoEError
from moe_hf.inference.schemes import Parts, QuantizationScheme
from moe_hf.kernels import MatrixSource
from moe_hf.weight_files import CheckpointReader


PLAIN = "matrix"


class Backing(Protocol):
    """Where all experts of a map lie: `specs` are dtype and shape of the parts of one expert."""

    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]]

    def copy(self, expert: int, part: str, out: torch.Tensor) -> None:
        """Copy a part of one expert into `out`, on any device."""

    def nbytes(self) -> dict[str, int]:
        """Bytes of all experts, by the kind of memory."""


class HostBacking:
    """Parts (E, ...) in host memory, pinned where the device is a GPU, so that copies need not wait for the processor."""

    def __init__(self, parts: Parts, device: torch.device) -> None:
        parts = {name: part.cpu() for name, part in parts.items()}
        self.parts = {name: part.pin_memory() if device.type == "cuda" else part for name, part in parts.items()}
        self.specs = {name: (part.dtype, tuple(part.shape[1:])) for name, part in parts.items()}

    def copy(self, expert: int, part: str, out: torch.Tensor) -> None:
        out.copy_(self.parts[part][expert], non_blocking=True)

    def nbytes(self) -> dict[str, int]:
        return {"cpu": sum(part.nbytes for part in self.parts.values())}


class DiskBacking:
    """Parts (E, ...) in safetensors files, `names` their tensors there; rows are read into their place, nothing is mapped."""

    def __init__(self, reader: CheckpointReader, names: dict[str, str]) -> None:
        self.reader, self.names = reader, names
        found = {part: reader.tensors[name] for part, name in names.items()}
        self.specs = {part: (spec.dtype, spec.shape[1:]) for part, spec in found.items()}
        self._total = sum(spec.nbytes for spec in found.values())

    def copy(self, expert: int, part: str, out: torch.Tensor) -> None:
        if out.device.type == "cpu":
            self.reader.read(self.names[part], expert, expert + 1, out=out)
        else:
            out.copy_(self.reader.read(self.names[part], expert, expert + 1)[0])

    def nbytes(self) -> dict[str, int]:
        return {"disk": self._total}


class CachedMatrices(MatrixSource):
    """The matrices of a map, of which the `capacity` that were used last are on `device`; counts `hits` and `misses`.

    Memory is taken once, for `capacity` experts: it does not depend on what a pass chooses. What is quantized stays so in the
    cache. A pass that chooses more experts than fit takes them in turns, those first that are there already.
    """

    def __init__(
        self,
        backing: Backing,
        scheme: QuantizationScheme | None,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        capacity: int,
    ) -> None:
        self.backing, self.scheme, self.shape, self.dtype, self.device = backing, scheme, shape, dtype, device
        self.capacity = min(capacity, shape[0])
        self.slots = {
            part: torch.empty(self.capacity, *rest, dtype=kind, device=device)
            for part, (kind, rest) in backing.specs.items()
        }
        self.places: OrderedDict[int, int] = OrderedDict()
        self.free = list(range(self.capacity))[::-1]
        self.hits = self.misses = 0

    def matrix(self, expert: int) -> torch.Tensor:
        place = self.places.get(expert)
        if place is None:
            self.misses += 1
            if not self.free:
                self.free.append(self.places.popitem(last=False)[1])
            place = self.free[-1]
            for part, slots in self.slots.items():
                self.backing.copy(expert, part, slots[place])
            # Only now: a place whose copy failed is nobody's.
            self.places[expert] = self.free.pop()
        else:
            self.hits += 1
            self.places.move_to_end(expert)
        parts = {part: slots[place] for part, slots in self.slots.items()}
        if self.scheme is None:
            return parts[PLAIN]
        return self.scheme.decode(parts, self.shape[1:], self.dtype)

    def at_hand(self) -> Collection[int]:
        return self.places.keys()

    def to(self, device: torch.device, dtype: torch.dtype) -> MatrixSource:
        # "cuda" is the device of an index too.
        if dtype == self.dtype and device.type == self.device.type and None in (device.index, self.device.index):
            return self
        raise MoEError(
            "Offloaded experts stay on their devices and in their dtype. restore_experts(model) first, move or cast the "
            "model, and offload again."
        )

    def nbytes(self) -> dict[str, int]:
        held = self.backing.nbytes()
        own = sum(slots.nbytes for slots in self.slots.values())
        return held | {self.device.type: held.get(self.device.type, 0) + own}

    def __deepcopy__(self, memo: dict[int, Any]) -> "CachedMatrices":
        """The numbers behind are shared: nothing writes to them. The copy has a cache of its own."""
        return CachedMatrices(self.backing, self.scheme, self.shape, self.dtype, self.device, self.capacity)
