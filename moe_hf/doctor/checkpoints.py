"""A checkpoint, a GGUF file or a model in memory, read expert by expert, alone and beside a base.

Letters: E experts.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moe_hf.doctor import against_base, alone
from moe_hf.doctor.against_base import BaseExperts
from moe_hf.doctor.config_fields import look_at_fields, look_at_servers
from moe_hf.doctor.dense_base import DenseBase
from moe_hf.doctor.findings import ERROR, NOTE, WARNING, Report, layer_numbers
from moe_hf.doctor.matching import Verdict, compare
from moe_hf.doctor.names import is_plain, look_at_counts, look_at_names
from moe_hf.doctor.opening import Opened
from moe_hf.doctor.pieces import Block
from moe_hf.doctor.quantized import look_at_errors, look_at_quantized
from moe_hf.doctor.quantized_tensors import QuantizedTensors
from moe_hf.doctor.routers import look_at_bias, look_at_router
from moe_hf.doctor.sketches import Sketch, signature_of, sketch, spaced_numbers
from moe_hf.doctor.tensors import Tensors
from moe_hf.errors import MoEError
from moe_hf.finetuning.moe_blocks import CORRECTION_BIAS
from moe_hf.kernels import stored_names


# Of a tensor that is no expert; a few at a time.
CHUNK_BYTES = 32 << 20
# A matrix is looked at for order from this size on.
LEAST_ROWS = 16
# Written by trainers; beside weights they say that these are the result of training.
TRACES = ("trainer_state.json", "training_args.bin", "optimizer.pt", "adapter_config.json", "train_results.json")


def examine_checkpoint(report: Report, opened: Opened, base: Opened | None, adapter_given: bool = False) -> None:
    """Examine what was opened, and add the findings.

    Args:
        base (`Opened`, *optional*): what it was made from, a MoE or a dense model.
        adapter_given (`bool`): an adapter is said to be merged into it.
    """
    if opened.layout is not None:
        look_at_names(report, opened.layout, opened.tensors.tensors)
        look_at_counts(report, opened.config, opened.blocks)
        look_at_fields(report, opened.config, base.config if base is not None else None)
        look_at_servers(report, opened.config)
    if not opened.blocks:
        report.add(NOTE, "not-examined", f"{opened.name} has no layer with experts: nothing else was looked at.")
        return
    look_at_quantized(report, opened)
    pass_ = _Pass(report, opened, base)
    pass_.over_experts()
    pass_.over_the_rest()
    pass_.conclude(_is_trained(opened.folder) or adapter_given)


def _is_trained(folder: Path | None) -> bool:
    places = [] if folder is None or not folder.is_dir() else [folder, folder.parent]
    return any((folder / name).is_file() for name in TRACES) if places else False


class _Pass:
    """One reading of all tensors of a model, and of those of its base beside them."""

    def __init__(self, report: Report, opened: Opened, base: Opened | None):
        self.report, self.opened, self.base = report, opened, base
        self.record = getattr(opened.config and opened.config.get_text_config(), "upcycling", None)
        self.seen = BaseExperts()
        self.sketches: dict[int, alone.Sketches] = {}
        self.row_groups: dict[int, list[list[int]]] = {}
        self.zeros: dict[int, list[int]] = {}
        self.parts: dict[str, tuple[int, int]] = {}
        self.base_equal: dict[int, list[list[int]]] = {}
        self.dense: DenseBase | None = None
        # Of the experts of the base's layer that were read already.
        self.base_numbers: dict[int, torch.Tensor] = {}
        self.base_blocks = {} if base is None else {block.layer: block for block in base.blocks}
        if base is not None and not self.base_blocks:
            try:
                self.dense = DenseBase(base)
            except MoEError as error:
                report.add(NOTE, "not-examined", f"Experts are not compared with the dense base: {error}")

    def over_experts(self) -> None:
        """Look at each layer with experts, one expert at a time."""
        total = sum(len(block.whole_experts()) for block in self.opened.blocks)
        with tqdm(total=total, desc="experts", unit="", disable=None) as bar:
            for block in self.opened.blocks:
                self._over_block(block, bar.update)
        self.report.examined |= {"layers with experts": len(self.opened.blocks), "experts": total}

    def _over_block(self, block: Block, step: Callable[[], Any]) -> None:
        tensors, layer = self.opened.tensors, block.layer
        sketches: alone.Sketches = {}
        other = self._base_block(block)
        if block.opaque is not None:
            self.report.add(NOTE, "not-examined", f"Experts are not read one by one: {block.opaque}.", layers=[layer])
        elif _all_plain(block, tensors):
            dense = {} if self.dense is None else self.dense.matrices(layer)
            for expert in block.whole_experts():
                matrices = block.matrices(tensors, expert)
                sketches[expert] = {name: sketch(matrix) for name, matrix in matrices.items()}
                self._compare(block, expert, matrices, other, dense, sketches[expert])
                del matrices
                step()
        self.sketches[layer] = sketches
        if sketches:
            finite = {e: parts for e, parts in sketches.items() if all(part.finite for part in parts.values())}
            own = {e: signature_of(part.signature for part in parts.values()) for e, parts in finite.items()}
            self.seen.signatures[layer] = _stacked(own, block.num_experts)
        alone.look_at_numbers(self.report, block, sketches)
        self.seen.equal[layer] = alone.equal_groups(block, sketches, tensors)
        width = next((p.shape[1] for parts in sketches.values() for n, p in parts.items() if n != "down"), 0)
        if self.record is None or "init" not in self.record:
            alone.look_at_siblings(self.report, block, sketches, max(width, 1))
        alone.look_at_order_of_rows(self.report, block, sketches)
        router, groups = look_at_router(self.report, block, tensors, self.seen.equal[layer], self.record)
        self.row_groups[layer] = groups
        if router is not None:
            self.seen.routers[layer] = router
        bias = None if self.opened.config is None else look_at_bias(self.report, block, tensors, self.opened.config)
        if bias is not None:
            self.seen.biases[layer] = bias
        if other is not None:
            self._read_base(other)
        self.base_numbers = {}

    def _base_block(self, block: Block) -> Block | None:
        other = self.base_blocks.get(block.layer)
        if other is None or other.opaque or not _all_plain(other, self.base.tensors):
            return None
        return other if other.projections() == block.projections() else None

    def _compare(
        self,
        block: Block,
        expert: int,
        matrices: Mapping[str, torch.Tensor],
        other: Block | None,
        dense: Mapping[str, torch.Tensor],
        sketches: Mapping[str, Sketch],
    ) -> None:
        beside: Mapping[str, torch.Tensor] = {}
        if other is not None and other.num_experts == block.num_experts and expert in other.whole_experts():
            beside = other.matrices(self.base.tensors, expert)
            self.base_numbers[expert] = signature_of(map(spaced_numbers, beside.values()))
        elif dense:
            beside = dense
        if not beside or any(matrices[name].shape != beside[name].shape for name in matrices if name in beside):
            return
        if matrices.keys() != beside.keys() or not all(part.finite for part in sketches.values()):
            return
        verdict = compare(matrices, beside)
        if dense and verdict.code == "scaled":
            # How an upcycling divides what the experts' weights sum to.
            verdict = Verdict(verdict.changed, cosine=verdict.cosine)
        self.seen.verdicts.setdefault(block.layer, {})[expert] = verdict
        flat = [name for name, part in sketches.items() if part.constant is not None]
        if flat and all(not bool((beside[name] == beside[name].flatten()[0]).all()) for name in flat):
            self.zeros.setdefault(block.layer, []).append(expert)

    def _read_base(self, block: Block) -> None:
        """What of the base's layer is compared at the end."""
        tensors, layer = self.base.tensors, block.layer
        numbers = self.base_numbers
        for expert in block.whole_experts():
            if expert not in numbers:
                numbers[expert] = signature_of(map(spaced_numbers, block.matrices(tensors, expert).values()))
        if numbers:
            self.seen.base_signatures[layer] = _stacked(numbers, block.num_experts)
        if self.seen.equal.get(layer):
            own = {e: {n: sketch(m) for n, m in block.matrices(tensors, e).items()} for e in block.whole_experts()}
            self.base_equal[layer] = alone.equal_groups(block, own, tensors)
        if block.router is not None:
            self.seen.base_routers[layer] = tensors.read(block.router).float()
        if block.bias is not None:
            self.seen.base_biases[layer] = tensors.read(block.bias).float().flatten()

    def over_the_rest(self) -> None:
        """Look at the tensors that are no experts: what is finite, how far they have learnt, and what of them changed."""
        taken = {piece.stored for block in self.opened.blocks for piece in block.pieces.values()}
        names = [name for name in self.opened.tensors.tensors if name not in taken]
        beside = self._names_in_base()
        self.orders: list[float] = []
        routers = {block.router for block in self.opened.blocks} | {block.bias for block in self.opened.blocks}
        bad = []
        for name in names:
            spec = self.opened.tensors.tensors[name]
            if not is_plain(spec) or 0 in spec.shape:
                continue
            finite, equal = True, True
            for rows, other in self._chunks(name, beside.get(name)):
                low, high = (float(value) for value in rows.aminmax())
                finite &= bool(torch.isfinite(torch.tensor([low, high])).all())
                equal &= other is not None and rows.dtype == other.dtype and torch.equal(rows, other)
                if len(spec.shape) == 2 and min(rows.shape) >= LEAST_ROWS and finite and name not in routers:
                    self.orders.append(sketch(rows).learnt)
            if not finite and name not in routers:
                bad.append(name)
            if name in beside:
                self._count(name, equal)
        for name in bad:
            self.report.add(
                ERROR,
                "not-finite",
                f"NaN or infinity in {name}: the model computes nothing of use. Take an earlier checkpoint.",
                layers=layer_numbers([name]),
                part=name,
            )
        self.report.examined["other tensors"] = len(names)

    def _chunks(self, name: str, other: str | None) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        tensors, spec = self.opened.tensors, self.opened.tensors.tensors[name]
        count = spec.shape[0] if spec.shape else 1
        step = max(1, CHUNK_BYTES // max(1, spec.row_bytes)) if spec.shape else 1
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            base = None if other is None else self.base.tensors.read(other, rows.start, rows.stop)
            yield tensors.read(name, rows.start, rows.stop), base

    def _names_in_base(self) -> dict[str, str]:
        """Names in my file to those in the base's of the same tensor of the model, where the shapes agree."""
        if self.base is None or self.base.layout is None or self.opened.layout is None:
            return {}
        mine, theirs = self.opened.layout, self.base.layout
        pairs = ((mine.stored(name), theirs.stored(name)) for name in mine.found.keys() & theirs.found.keys())
        specs, others = self.opened.tensors.tensors, self.base.tensors.tensors
        return {a: b for a, b in pairs if a is not None and b is not None and specs[a].shape == others[b].shape}

    def _count(self, name: str, equal: bool) -> None:
        part = _part_of(name, self.opened.blocks)
        changed, total = self.parts.get(part, (0, 0))
        self.parts[part] = changed + (not equal), total + 1

    def conclude(self, trained: bool) -> None:
        """Look at what only all layers together tell."""
        counts = {block.layer: block.num_experts for block in self.opened.blocks}
        alone.look_for_fresh(self.report, self.sketches, self.orders)
        lost: set[int] = set()
        if self.base is not None and self.base_blocks:
            lost = self._conclude_beside_experts(trained)
        elif self.dense is not None:
            against_base.look_at_verdicts(self.report, self.seen, {})
            against_base.look_at_changes(self.report, self.seen, trained=trained, parts=self.parts)
            self.dense.close()
        groups = {layer: groups for layer, groups in self.seen.equal.items() if layer not in lost}
        alone.look_at_equal_experts(self.report, groups, counts, self.row_groups, self.record)

    def _same_counts(self) -> bool:
        both = [(block, self.base_blocks.get(block.layer)) for block in self.opened.blocks if block.pieces]
        return any(other is not None and other.num_experts == block.num_experts for block, other in both)

    def _conclude_beside_experts(self, trained: bool) -> set[int]:
        if not self.seen.base_signatures:
            self.report.add(
                NOTE, "not-examined", "No layer of the base has experts in a form that could be compared with these."
            )
        elif not self.seen.verdicts and self._same_counts():
            self.report.add(
                WARNING,
                "other-base",
                f"No matrix of an expert has the shape that {self.base.name} gives it: it is another model's base, or one that was cut.",
            )
        against_base.look_at_zero_against_base(self.report, self.zeros)
        lost = against_base.look_at_equal_against_base(self.report, self.seen, self.base_equal)
        moved = against_base.look_at_places(self.report, self.seen)
        against_base.look_at_verdicts(self.report, self.seen, moved)
        against_base.look_at_bias_against_base(self.report, self.seen)
        if is_quantized(self.opened):
            look_at_errors(self.report, self.seen.verdicts)
            return lost
        against_base.look_at_changes(self.report, self.seen, trained=trained, parts=self.parts)
        return lost


def is_quantized(opened: Opened) -> bool:
    """Whether experts are stored in codes that are decoded while they are read."""
    if isinstance(opened.tensors, QuantizedTensors):
        return any(map(opened.tensors.is_quantized, opened.tensors.parts))
    return opened.model is not None and bool(stored_names(opened.model))


def _all_plain(block: Block, tensors: Tensors) -> bool:
    return all(is_plain(tensors.tensors[piece.stored]) for piece in block.pieces.values())


def _stacked(vectors: Mapping[int, torch.Tensor], count: int) -> torch.Tensor:
    """Signatures (E, n); zeros for an expert that the file lacks, or that is not finite."""
    size = max((len(vector) for vector in vectors.values()), default=1)
    return torch.stack([vectors.get(expert, torch.zeros(size)) for expert in range(count)])


def _part_of(name: str, blocks: list[Block]) -> str:
    if any(name == block.router for block in blocks):
        return "routers"
    if name.endswith(CORRECTION_BIAS) or any(name == block.bias for block in blocks):
        return "correction biases"
    if any(name in block.shared for block in blocks):
        return "shared experts"
    for part, words in (
        ("embeddings and head", ("embed", "lm_head", "wte", "wpe")),
        ("norms", ("norm", "ln_")),
        ("attention", ("attn", "attention", "mixer", "mamba")),
    ):
        if any(word in name for word in words):
            return part
    return "the rest"
