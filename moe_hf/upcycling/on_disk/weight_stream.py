"""Makes the tensors of a MoE from a dense checkpoint on disk, file by file, with one dense tensor in memory at a time.

Numbers are those of `fill_blocks`, which makes a model in memory: both read the same recipes. What a destination has in
common with the source byte by byte is copied.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from moe_hf.modeling.dense_mlp import MLPSite
from moe_hf.modeling.modeling_moe import MoEForCausalLM
from moe_hf.upcycling.fill import check_same_names, outside_mlps
from moe_hf.upcycling.initialisers.mix import average
from moe_hf.upcycling.method import LayerStates, UpcyclingMethod
from moe_hf.upcycling.on_disk.dense_checkpoint import IN_MEMORY, DenseCheckpoint, NotStreamableError, row_ranges
from moe_hf.upcycling.recipes import BlockTensor, DensePiece, Slot, block_tensors, slot_rows
from moe_hf.weight_files import TensorSpec
from moe_hf.weight_writer import FileWriter, StoredBytes


# Each works on a few blocks of `recipes.BLOCK_BYTES`, which bounds the memory.
_WORKERS = min(4, os.cpu_count() or 1)


class WeightStream:
    """The weights that a method makes of dense checkpoints.

    Args:
        dense (`Sequence[DenseCheckpoint]`): the sources; the first is the one that is upcycled.
        sites (`Sequence[Sequence[MLPSite]]`): for each of them, the MLPs that become experts.
        moe (`MoEForCausalLM`): the destination, on the meta device.
        method (`UpcyclingMethod`): how.
        hidden_states (`Mapping[int, LayerStates]`, *optional*): by layer, what the MLP sees.

    Attributes:
        tensors (`dict[str, TensorSpec]`): names in the files to what will be there, as `save_pretrained` would write
            them, in its order.

    Raises:
        MoEError: a tensor has no counterpart; `NotStreamableError` when it has another layout on disk than in memory.
    """

    def __init__(
        self,
        dense: Sequence[DenseCheckpoint],
        sites: Sequence[Sequence[MLPSite]],
        moe: MoEForCausalLM,
        method: UpcyclingMethod,
        hidden_states: Mapping[int, LayerStates] | None = None,
    ):
        self.dense, self.moe, self.method = dense, moe, method
        self._hidden_states = hidden_states or {}
        prefix = f"{moe.base_model_prefix}."
        self._sites = {f"{prefix}{layer[0].block}.": layer for layer in zip(*sites, strict=True)}
        self._averaged = [dense[index] for index in method.init.averaged(moe.config)]
        state = moe.state_dict()
        outside = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(self._sites))}
        for one, own in zip(dense, sites, strict=True):
            check_same_names(outside_mlps(one.model.state_dict(), own, prefix), outside)
        name_of = {id(tensor): name for name, tensor in state.items()}
        saved = revert_weight_conversion(moe, remove_tied_weights_from_state_dict(dict(state), moe))
        converted = [name for name, tensor in saved.items() if id(tensor) not in name_of]
        if converted:
            raise NotStreamableError(f"{converted[0]} is saved in another layout than it has in memory. {IN_MEMORY}")
        self._in_memory = {name: name_of[id(tensor)] for name, tensor in saved.items()}
        self.tensors = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in saved.items()}
        self._described: tuple[str, tuple] | None = None

    def write(self, file: FileWriter) -> None:
        """Fill one file; what is copied may come until it is closed."""
        with _one_thread_each(), ThreadPoolExecutor(_WORKERS) as pool:
            for block, group in groupby(file.layout.tensors, self._block_of):
                if block is not None:
                    self._write_block(file, block, list(group), pool)
                    continue
                for name in group:
                    self._write_other(file, name)

    def _block_of(self, name: str) -> str | None:
        return next((block for block in self._sites if self._in_memory[name].startswith(block)), None)

    def _write_other(self, file: FileWriter, name: str) -> None:
        """A tensor outside of the blocks: the dense model's, or the mean over several."""
        spec, own, dense = self.tensors[name], self._in_memory[name], self._averaged
        as_stored = dense[0].reader.tensors[dense[0].stored_name(own)].dtype == dense[0].dtype(own) == spec.dtype
        if as_stored and len(dense) == 1:
            file.copy(StoredBytes([(name, 0)], spec.nbytes, *dense[0].reader.place(dense[0].stored_name(own))))
            return
        for start, stop in row_ranges(spec):
            rows = average([one.read(own, start, stop) for one in dense])
            file.write(name, rows.to(spec.dtype), start * spec.row_bytes)

    def _describe(self, block: str) -> tuple[dict[str, BlockTensor], dict[str, torch.Tensor]]:
        """What the block's tensors are made of: those of experts as slots, small ones as they are."""
        if self._described is not None and self._described[0] == block:
            return self._described[1]
        sites, config, method = self._sites[block], self.moe.config, self.method
        hidden = self._hidden_states.get(sites[0].layer_index)

        def read(piece: str, source: int = 0) -> torch.Tensor:
            return self.dense[source].piece(sites[source], piece)

        recipes, shared = method.recipes(
            sites[0],
            config,
            read,
            dense_widths=tuple(site.intermediate_size for site in sites),
            hidden_states=hidden,
            act_fn=self.dense[0].activation(sites[0]),
        )
        module = self.moe.base_model.get_submodule(sites[0].block)
        router = method.router_tensors(module.gate, sites[0], config, hidden)
        small = {f"gate.{name}": tensor for name, tensor in router.items()}
        if module.shared_expert_gate is not None:
            zeros = module.shared_expert_gate.state_dict().items()
            small |= {f"shared_expert_gate.{name}": torch.zeros(tensor.shape) for name, tensor in zeros}
        small |= self._activation(sites)
        self._described = block, (block_tensors(recipes, shared, config, sites[0]), small)
        return self._described[1]

    def _activation(self, sites: Sequence[MLPSite]) -> dict[str, torch.Tensor]:
        """What the activation has learned, for each part of the block."""
        indices = self.method.init.averaged(self.moe.config)
        activations = [self.dense[index].activation(sites[index]) for index in indices]
        if not isinstance(activations[0], nn.Module):
            return {}
        learned = [activation.state_dict() for activation in activations]
        mean = {name: average([state[name] for state in learned]) for name in learned[0]}
        return {
            f"{part}.act_fn.{name}": mean[name] for part in ("experts", "shared_expert", "dense_ffn") for name in mean
        }

    def _write_block(self, file: FileWriter, block: str, names: list[str], pool: ThreadPoolExecutor) -> None:
        of_slots, small = self._describe(block)
        slots: list[tuple[str, Slot]] = []
        for name in names:
            own = self._in_memory[name].removeprefix(block)
            if own in of_slots:
                slots += [(name, slot) for slot in of_slots[own].slots]
            else:
                file.write(name, small[own].to(self.tensors[name].dtype).contiguous())

        def origin(entry: tuple[str, Slot]) -> tuple[int, str]:
            return entry[1].recipe.source, entry[1].piece

        copies: dict[str, list[StoredBytes]] = {}
        for (source, piece), group in groupby(sorted(slots, key=origin), origin):
            writer = _PieceWriter(self.dense[source], self._sites[block][source], piece, file, pool)
            for stored in writer.write(list(group)):
                copies.setdefault(stored.places[0][0], []).append(stored)
        # A tensor's pieces in their order, so that an expert is hashed on the way.
        for stored in copies.values():
            file.copy(*sorted(stored, key=lambda one: one.places[0]))


class _PieceWriter:
    """Writes all slots of a file that are made from one piece of a dense MLP."""

    def __init__(self, dense: DenseCheckpoint, site: MLPSite, piece: str, file: FileWriter, pool: ThreadPoolExecutor):
        self.dense, self.site, self.piece, self.file, self.pool = dense, site, piece, file, pool

    def write(self, slots: list[tuple[str, Slot]]) -> list[StoredBytes]:
        """Write `slots`, pairs of a tensor's name and one of its slots, but for those returned, which are copies."""
        stored = self._stored_place()
        # Slots of equal numbers together; a random one by itself.
        groups: dict[object, list[tuple[str, Slot]]] = {}
        for name, slot in slots:
            groups.setdefault((slot.recipe.fingerprint or id(slot), self._spec(name).dtype), []).append((name, slot))
        made, copies = [], []
        for (_, dtype), group in groups.items():
            if stored is not None and stored[2] == dtype and _is_plain(group[0][1]):
                places = [(name, self._span(name, slot)[0]) for name, slot in group]
                copies.append(StoredBytes(places, self._span(*group[0])[1], *stored[:2]))
            else:
                made.append(group)
        if made:
            self._make(made)
        return copies

    def _make(self, groups: list[list[tuple[str, Slot]]]) -> None:
        piece = DensePiece(self.dense.piece(self.site, self.piece), self.pool.map)
        if any(group[0][1].recipe.noise > 0 for group in groups):
            # Computed and kept before the threads start, which would each compute it.
            piece.std  # noqa: B018
        for _ in self.pool.map(lambda group: self._make_one(group, piece), groups):
            pass

    def _make_one(self, group: list[tuple[str, Slot]], piece: DensePiece) -> None:
        places = [(name, self._span(name, slot)[0]) for name, slot in group]
        for rows in slot_rows(group[0][1], piece, self._spec(places[0][0]).dtype):
            count = self.file.write_same(places, rows)
            places = [(name, start + count) for name, start in places]

    def _spec(self, name: str) -> TensorSpec:
        return self.file.layout.tensors[name]

    def _span(self, name: str, slot: Slot) -> tuple[int, int]:
        """First byte within the tensor, and number of bytes, of a slot."""
        spec = self._spec(name)
        row_bytes = spec.dtype.itemsize * (1 if slot.piece.endswith("_bias") else spec.shape[-1])
        return slot.start * row_bytes, slot.rows * row_bytes

    def _stored_place(self) -> tuple[int, int, torch.dtype] | None:
        """File descriptor, position and dtype of the piece, where it is stored as it is in memory."""
        place = self.dense.piece_place(self.site, self.piece)
        if place is None or place[3]:
            return None
        name, start, *_ = place
        stored = self.dense.stored_name(name)
        spec = self.dense.reader.tensors[stored]
        if spec.dtype != self.dense.dtype(name):
            return None
        descriptor, position = self.dense.reader.place(stored)
        return descriptor, position + start * spec.row_bytes, spec.dtype


def _is_plain(slot: Slot) -> bool:
    """Whether the slot's numbers are the piece's own."""
    recipe = slot.recipe
    scale = {"down": recipe.output_scale, "down_bias": recipe.bias_scale}.get(slot.piece, 1.0)
    return recipe.fingerprint is not None and recipe.neurons is None and scale == 1


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep torch from starting threads of its own below those that work on experts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
