"""Which experts a task uses: token share and gate score of every expert, while batches stream by.

Letters: B batch, S sequence, T = B * S tokens, K experts per token, L MoE layers, E experts, R rows that experts get.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_hf.errors import MoEError
from moe_hf.finetuning.moe_blocks import find_moe_blocks
from moe_hf.modeling.router import Router
from moe_hf.unwrapping import unwrapped


FORMAT = "moe_hf.expert_scores"
COUNTED = ("all", "labels")
IGNORED_LABEL = -100


@dataclass(frozen=True)
class ExpertScores:
    """What each expert of each MoE layer did for a text.

    Attributes:
        layers: names of the MoE blocks (of the numbers of their layers, in files of the ESFT authors), L.
        token_share: share of a layer's choices that an expert got, (L, E) float64; a layer sums to 1. ESFT's token selection
            ratio.
        gate_score: mean over tokens of the weight that an expert got, 0 where it was not chosen, (L, E) float64. ESFT's
            average gate score.
        num_experts: experts of each layer, L; entries beyond them are 0.
        num_tokens: tokens that were counted; 0 where a file does not say.
        model: name of the model, as it was loaded.

    Source: ESFT (https://huggingface.co/papers/2407.01906); means are over all tokens, as in its authors' code.
    """

    layers: tuple[str, ...]
    token_share: torch.Tensor
    gate_score: torch.Tensor
    num_experts: tuple[int, ...]
    num_tokens: int = 0
    model: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        tables = {"token_share": self.token_share.tolist(), "gate_score": self.gate_score.tolist()}
        rows = enumerate(zip(self.layers, self.num_experts, strict=True))
        layers = {name: {kind: table[i][:count] for kind, table in tables.items()} for i, (name, count) in rows}
        return {"format": FORMAT, "version": 1, "model": self.model, "num_tokens": self.num_tokens, "layers": layers}

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `load` reads."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "ExpertScores":
        """Read a JSON file of `save`, or one of the ESFT authors (`token_scores` and `gate_scores` by layer and expert).

        Raises:
            MoEError: there is no such file, or it is of neither kind.
        """
        content = read_json(path)
        try:
            if content.get("format") == FORMAT:
                rows = {name: (row["token_share"], row["gate_score"]) for name, row in content["layers"].items()}
                more = {"num_tokens": int(content["num_tokens"]), "model": str(content["model"])}
            else:
                gates = content["gate_scores"]
                rows = {
                    name: ([row[str(e)] for e in range(len(row))], [gates[name][str(e)] for e in range(len(row))])
                    for name, row in content["token_scores"].items()
                }
                more = {}
            token_share, gate_score = (_table([row[kind] for row in rows.values()]) for kind in (0, 1))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise MoEError(
                f"{path} holds no expert scores ({error!r}). Make them with `moe-hf score-experts`."
            ) from error
        return cls(tuple(rows), token_share, gate_score, tuple(len(row[0]) for row in rows.values()), **more)


def _table(rows: list[list[float]]) -> torch.Tensor:
    """Rows of different lengths as one table, filled up with zeros."""
    width = max(map(len, rows))
    table = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)
    if not table.isfinite().all():
        raise ValueError("a score is not finite")
    return table


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        MoEError: there is no such file, or something else in it.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MoEError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise MoEError(f"{path} holds a JSON {type(content).__name__}; an object is expected.")
    return content


@torch.no_grad()
def score_experts(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    *,
    count: str = "all",
    max_tokens: int | None = None,
) -> ExpertScores:
    """Run a MoE over a text and return what each expert did for it (ESFT's token share and gate score).

    Works on each MoE whose module `experts` gets the chosen experts and their weights: this package's and transformers'.
    Memory does not grow with the text. In a process group each process brings its own data, and gets the sums of all. The
    model is put back into the mode that it was in. A choice of weight 0 (dropped by a capacity limit) is not counted.

    Args:
        data (`Iterable[Mapping]`): batches of model inputs, (B, S), or single rows, (S,). Padding (`attention_mask` 0) is
            not counted; packed rows (`position_ids` that restart) are passed on as they are.
        count (`str`): `"all"` tokens, as ESFT does, or those whose next token has a label, `"labels"`: answers without
            their prompts.
        max_tokens (`int`, *optional*): stop at the batch that reaches so many counted tokens of this process (ESFT: 131072).

    Raises:
        MoEError: the model has no experts, calls them in a form that is not known, or no token was counted.
    """
    if count not in COUNTED:
        raise MoEError(f"count is {count!r}; it must be 'all' or 'labels'.")
    model = unwrapped(model)
    blocks = find_moe_blocks(model)
    if not blocks:
        raise MoEError(f"{type(model).__name__} has no MoE block: there are no experts to score.")
    device = next(model.parameters()).device
    scorer = _Scorer([_num_experts(name, block) for name, block in blocks.items()], device)
    handles = [h for layer, (name, block) in enumerate(blocks.items()) for h in scorer.attach(layer, name, block)]
    was_training = model.training
    model.eval()
    try:
        for batch in data:
            inputs = {name: _batched(value, device) for name, value in batch.items()}
            scorer.mask = _counted(inputs, count)
            model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
            scorer.num_tokens += scorer.mask.sum()
            if max_tokens is not None and scorer.num_tokens >= max_tokens:
                break
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return scorer.scores(tuple(blocks), str(getattr(model.config, "_name_or_path", "")))


def _num_experts(name: str, block: nn.Module) -> int:
    experts = block.experts
    if isinstance(experts, nn.ModuleList) or not hasattr(experts, "num_experts"):
        raise MoEError(f"The experts of {name} ({type(experts).__name__}) do not take their choices from a router.")
    return experts.num_experts


def _batched(value: Any, device: torch.device) -> torch.Tensor:
    tensor = torch.as_tensor(value).to(device)
    return tensor[None] if tensor.ndim == 1 else tensor


def _counted(inputs: Mapping[str, torch.Tensor], count: str) -> torch.Tensor:
    """Which tokens count, (T,) bool."""
    shape_of = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if shape_of is None:
        raise MoEError(f"A batch has no input_ids; it has {', '.join(inputs) or 'nothing'}.")
    mask = torch.ones(shape_of.shape[:2], dtype=torch.bool, device=shape_of.device)
    attention_mask = inputs.get("attention_mask")
    if attention_mask is not None and attention_mask.ndim == 2:
        mask &= attention_mask.bool()
    if count == "labels":
        if "labels" not in inputs:
            raise MoEError("count='labels' needs labels in each batch, -100 where a token is not scored.")
        # The model shifts labels: a token's output predicts the next one.
        mask[:, :-1] &= inputs["labels"][:, 1:] != IGNORED_LABEL
        mask[:, -1] = False
    return mask.flatten()


class _Scorer:
    """Sums over tokens, on the device of the model: (L, E) each."""

    def __init__(self, num_experts: list[int], device: torch.device):
        self.num_experts = tuple(num_experts)
        shape = (len(num_experts), max(num_experts))
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.choices = torch.zeros(shape, dtype=dtype, device=device)
        self.weights = torch.zeros(shape, dtype=dtype, device=device)
        self.num_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.mask = torch.zeros(0, dtype=torch.bool)
        self.token_index: torch.Tensor | None = None

    def attach(self, layer: int, name: str, block: nn.Module) -> list[Any]:
        def add(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = [*args, *kwargs.values()]
            if len(given) < 3 or given[1].is_floating_point() or given[1].shape != given[2].shape:
                raise MoEError(f"The experts of {name} ({type(module).__name__}) do not get (tokens, index, weights).")
            self._add(layer, given[1].detach(), given[2].detach())

        def note_rows(module: nn.Module, args: tuple, output: tuple) -> None:
            self.token_index = output[3] if len(output) > 3 else None

        handles = [block.experts.register_forward_pre_hook(add, with_kwargs=True)]
        # Our routers may give a varying number of experts per token, as rows.
        if isinstance(getattr(block, "gate", None), Router):
            handles.append(block.gate.register_forward_hook(note_rows))
        return handles

    def _add(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> None:
        if self.token_index is not None:
            mask = self.mask[self.token_index]
        else:
            # A router of sub-tokens has several rows per token.
            mask = self.mask.repeat_interleave(len(index) // len(self.mask))
        if len(mask) != len(index):
            raise MoEError(f"The experts of MoE layer {layer} got {len(index)} rows for {len(self.mask)} tokens.")
        keep = mask[:, None] & (weights != 0) & (index < self.num_experts[layer])  # (R, K)
        chosen, weights = index[keep], weights[keep].to(self.weights.dtype)
        self.choices[layer].index_add_(0, chosen, torch.ones_like(weights))
        self.weights[layer].index_add_(0, chosen, weights)

    def scores(self, layers: tuple[str, ...], model: str) -> ExpertScores:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for tensor in (self.choices, self.weights, self.num_tokens):
                torch.distributed.all_reduce(tensor)
        num_tokens = int(self.num_tokens)
        if num_tokens == 0:
            raise MoEError("No token was counted: the data are empty, or all of them padding or without labels.")
        choices = self.choices.cpu().double()
        return ExpertScores(
            layers=layers,
            token_share=choices / choices.sum(-1, keepdim=True).clamp_min(1),
            gate_score=self.weights.cpu().double() / num_tokens,
            num_experts=self.num_experts,
            num_tokens=num_tokens,
            model=model,
        )
