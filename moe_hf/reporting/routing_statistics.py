"""Run a MoE over a text and look at its routers, while batches stream by.

Letters: B batch, S sequence, T = B * S tokens, E experts, L MoE layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_hf.errors import MoEError
from moe_hf.finetuning.router_watch import RouterDecision, RouterWatch, are_probabilities, find_routers, log_scores
from moe_hf.modeling.routing_ids import ID_ARGUMENTS, id_counts
from moe_hf.reporting.drift import drift_from_origin
from moe_hf.reporting.layer_sums import ChangeSums, LayerSums, served_weights, summed_over_processes
from moe_hf.reporting.statistics import LayerChange, LayerStatistics, RoutingStatistics, TextSample
from moe_hf.reporting.token_groups import (
    TOKEN_CLASSES,
    ids_of_tokens,
    position_bins,
    position_names,
    positions_in_documents,
    token_classes,
    token_texts,
)
from moe_hf.unwrapping import unwrapped


Batches = Iterable[Mapping[str, Any]]
DEFAULT_DOMAIN = "text"


@torch.no_grad()
def routing_statistics(
    model: PreTrainedModel,
    data: Batches | Mapping[str, Batches],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    against: PreTrainedModel | None = None,
    origin: PreTrainedModel | None = None,
    max_tokens: int | None = None,
    sample_tokens: int = 300,
    all_processes: bool = False,
) -> RoutingStatistics:
    """Run a MoE over a text and return what each expert of each layer did for it.

    Works on this package's models and on transformers' own whose router returns logits, weights and choices (Mixtral,
    Qwen3-MoE, OLMoE, DeepSeek-V3, ...). Memory does not grow with the text. The model is put back into the mode that it was
    in. Each process counts its own data, and with `all_processes` each gets the figures of all data.

    Args:
        model (`PreTrainedModel`): a MoE.
        data (`Iterable` or `dict[str, Iterable]`): batches of model inputs, (B, S), or such batches for each domain. Padding
            (`attention_mask` 0) does not count; packed rows (`position_ids` that restart) are documents of their own;
            `labels` are not passed on. `language_ids`, `task_ids` and `modality_ids` are groups to compare, whether or not
            the model routes by them.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for the classes of tokens, and the text of the samples.
        against (`PreTrainedModel`, *optional*): another checkpoint with the same layers and numbers of experts, which runs
            on the same tokens.
        origin (`PreTrainedModel`, *optional*): the dense model that `model` was upcycled from; see [`drift_from_origin`].
        max_tokens (`int`, *optional*): of each domain, in each process; its last batch is counted whole.
        sample_tokens (`int`): of each domain, to be shown.
        all_processes (`bool`): all processes of `torch.distributed` call this with the same model and domains, each with a
            part of the text (which may be empty). Sums are added up before figures are made of them: counts are exactly
            those of one process on the whole text.

    Raises:
        MoEError: the model has no routers or one that cannot be read, no token was counted, a checkpoint to compare with
            does not fit; with `all_processes`, in all of them if in one.
    """
    model, against, origin = (one if one is None else unwrapped(one) for one in (model, against, origin))
    domains = data if isinstance(data, Mapping) else {DEFAULT_DOMAIN: data}
    drift = () if origin is None else drift_from_origin(model, origin)
    counter = _Counter(model, tuple(domains), tokenizer, against, sample_tokens)
    failure: MoEError | None = None
    try:
        for domain, batches in enumerate(domains.values()):
            counter.start_domain(domain)
            before = counter.num_tokens
            for batch in batches:
                counter.run(batch)
                if max_tokens is not None and counter.num_tokens - before >= max_tokens:
                    break
    except MoEError as error:
        if not all_processes:
            raise
        # The others would wait for this process.
        failure = error
    finally:
        counter.close()
    if all_processes:
        counter.add_other_processes(failure)
    return counter.result(origin=None if origin is None else _name(origin), drift=drift)


class _Counter:
    def __init__(
        self,
        model: PreTrainedModel,
        domains: tuple[str, ...],
        tokenizer: PreTrainedTokenizerBase | None,
        against: PreTrainedModel | None,
        sample_tokens: int,
    ) -> None:
        self.model, self.domains, self.tokenizer, self.against = model, domains, tokenizer, against
        self.sums: dict[str, LayerSums] = {}
        self.changes: list[ChangeSums] = []
        self.num_tokens, self.sample_tokens = 0, sample_tokens
        self.samples: list[_Sample] = []
        self.scoring: str | None = None
        self.classes: torch.Tensor | None = None
        if tokenizer is not None:
            self.classes = token_classes(tokenizer, model.get_input_embeddings().num_embeddings)
        models = [one for one in (model, against) if one is not None]
        for one in models:
            # Before the first hook, which would stay when the second model has no routers.
            find_routers(one)
        self.watches = [RouterWatch(one, training_only=False) for one in models]
        self._were_training = [(watch.model, watch.model.training) for watch in self.watches]
        for one, _ in self._were_training:
            one.eval()

    def close(self) -> None:
        for watch in self.watches:
            watch.remove()
        for one, was_training in self._were_training:
            one.train(was_training)

    def start_domain(self, domain: int) -> None:
        self.domain = domain
        self.samples.append(_Sample())

    def run(self, batch: Mapping[str, Any]) -> None:
        batch = _model_inputs(batch)
        for watch in self.watches:
            _forward(watch.model, batch)
        decisions, forward = self.watches[0].decisions, self.watches[0].forward_pass
        if self.scoring is None:
            given = are_probabilities(decisions[0].router_logits)
            self.scoring = "probabilities" if given else self.watches[0].scoring_func
        labels = self._labels(batch)
        real = _real_tokens(batch)
        tables = []
        for decision in decisions:
            logits = decision.router_logits
            sums = self.sums.setdefault(decision.name, LayerSums(logits.shape[-1]))
            scores = logits.float().log() if self.scoring == "probabilities" else log_scores(logits, self.scoring)
            weights = served_weights(decision)
            spread = {kind: forward.spread(values, len(logits)) for kind, values in labels.items()}
            sums.add(decision, scores, weights, spread)
            tables.append(weights)
        if self.against is not None:
            self._compare(decisions, tables)
        sample = self.samples[-1]
        if len(sample.token_ids) < self.sample_tokens:
            sample.add(batch["input_ids"], real, tables, self.sample_tokens)
        self.num_tokens += int(real.sum())

    def _labels(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = batch["input_ids"]
        bins = position_bins(positions_in_documents(batch, ids.shape)).reshape(-1)
        labels = {"domain": torch.full((ids.numel(),), self.domain), "position": bins}
        if self.classes is not None:
            labels["token class"] = self.classes[ids.reshape(-1)]
        return labels | ids_of_tokens(batch, ids.shape)

    def _compare(self, decisions: list[RouterDecision], tables: list[torch.Tensor]) -> None:
        others = self.watches[1].decisions
        shapes = [[tuple(one.router_logits.shape) for one in both] for both in (decisions, others)]
        if shapes[0] != shapes[1]:
            experts = [[shape[1] for shape in both] for both in shapes]
            raise MoEError(
                f"The routing of {_name(self.model)} (experts by layer: {experts[0]}) cannot be compared with that of "
                f"{_name(self.against)} ({experts[1]}): they need the same layers, experts and sub-tokens."
            )
        if not self.changes:
            self.changes = [ChangeSums(table.shape[1]) for table in tables]
        for change, table, other in zip(self.changes, tables, others, strict=True):
            change.add(table, served_weights(other).to(table.device), other.token_mask)

    def add_other_processes(self, failure: MoEError | None) -> None:
        """Take the sums of all processes, and the heads of their texts in the order of the processes."""
        if not (dist.is_available() and dist.is_initialized()):
            raise MoEError("all_processes=True needs processes: start the program with torchrun, or leave it out.")
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, (failure and str(failure), self.domains, self.num_tokens, self.samples))
        if failure is not None:
            raise failure
        for rank, (said, domains, _, _) in enumerate(states):
            if said is not None or domains != self.domains:
                reason = said or f"it has the domains {list(domains)}, this one {list(self.domains)}"
                raise MoEError(f"Process {rank} could not count its text: {reason}")
        self.num_tokens = sum(state[2] for state in states)
        self.samples = [
            _Sample.joined(parts, self.sample_tokens) for parts in zip(*(s[3] for s in states), strict=True)
        ]
        own = {("sums", name): sums.to_tensors() for name, sums in self.sums.items()}
        own |= {("changes", place): sums.to_tensors() for place, sums in enumerate(self.changes)}
        flat = {(*owner, name): tensor for owner, tensors in own.items() for name, tensor in tensors.items()}
        uses_gpu = dist.get_backend() == dist.Backend.NCCL
        found: dict[tuple, dict[str, torch.Tensor]] = {}
        for (*owner, name), tensor in summed_over_processes(
            flat, self.model.device if uses_gpu else torch.device("cpu")
        ).items():
            found.setdefault(tuple(owner), {})[name] = tensor
        self.sums = {name: LayerSums.from_tensors(t) for (what, name), t in found.items() if what == "sums"}
        self.changes = [ChangeSums.from_tensors(t) for (what, _), t in sorted(found.items()) if what == "changes"]

    def result(self, **more: Any) -> RoutingStatistics:
        if self.num_tokens == 0:
            raise MoEError("No token was counted: the data are empty, or all of them padding.")
        names = {"domain": self.domains, "position": position_names(), "token class": TOKEN_CLASSES}
        tables = {name: sums.groups for name, sums in self.sums.items()}
        groups = {}
        for kind in next(iter(tables.values())):
            count = max(len(of[kind]) for of in tables.values())
            padded = [nn.functional.pad(of[kind], (0, 0, 0, count - len(of[kind]))) for of in tables.values()]
            kept = torch.where(sum(table.sum(1) for table in padded) > 0)[0]
            groups[kind] = tuple(names[kind][group] if kind in names else str(group) for group in kept.tolist())
            for of, table in zip(tables.values(), padded, strict=True):
                of[kind] = table[kept]
        return RoutingStatistics(
            model=_name(self.model),
            num_tokens=self.num_tokens,
            layers=tuple(LayerStatistics.of(name, sums) for name, sums in self.sums.items()),
            groups=groups,
            samples=tuple(
                sample.result(domain, self.tokenizer)
                for domain, sample in zip(self.domains, self.samples, strict=True)
                if sample.token_ids
            ),
            against=None if self.against is None else _name(self.against),
            changes=tuple(map(LayerChange.of, self.changes)),
            **more,
        )


class _Sample:
    """The first real tokens of a domain."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.experts: list[torch.Tensor] = []

    def add(self, ids: torch.Tensor, real: torch.Tensor, tables: list[torch.Tensor], wanted: int) -> None:
        places = torch.where(real)[0][: wanted - len(self.token_ids)]
        self.token_ids += ids.reshape(-1)[places].tolist()
        rows = []
        for table in tables:
            # Of a token's parts, those together.
            weights = table.view(len(real), -1, table.shape[1]).sum(1)[places.to(table.device)]
            rows.append(torch.where(weights.amax(-1) > 0, weights.argmax(-1), -1).cpu())
        self.experts.append(torch.stack(rows))

    @classmethod
    def joined(cls, parts: "Sequence[_Sample]", wanted: int) -> "_Sample":
        """The parts one after the other, up to `wanted` tokens."""
        sample = cls()
        sample.token_ids = [token for part in parts for token in part.token_ids][:wanted]
        experts = [columns for part in parts for columns in part.experts]
        sample.experts = [torch.cat(experts, dim=1)[:, :wanted]] if experts else []
        return sample

    def result(self, domain: str, tokenizer: PreTrainedTokenizerBase | None) -> TextSample:
        tokens = None if tokenizer is None else token_texts(tokenizer, self.token_ids)
        return TextSample(domain, self.token_ids, tokens, torch.cat(self.experts, dim=1))


def _forward(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
    known = id_counts(getattr(model, "config", None))
    inputs = {
        name: value.to(model.device)
        for name, value in batch.items()
        if name not in ID_ARGUMENTS or ID_ARGUMENTS[name] in known
    }
    model(**inputs, use_cache=False)


def _model_inputs(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What the model is given: tensors, a single row as a batch of one."""
    if "input_ids" not in batch:
        raise MoEError(f"A batch has no input_ids; it has {', '.join(batch) or 'nothing'}.")
    tensors = {name: torch.as_tensor(value) for name, value in batch.items() if name != "labels"}
    if tensors["input_ids"].ndim == 1:
        tensors = {name: tensor[None] for name, tensor in tensors.items()}
    return tensors


def _real_tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    mask, ids = batch.get("attention_mask"), batch["input_ids"]
    if mask is None or mask.ndim != 2:
        return torch.ones(ids.numel(), dtype=torch.bool)
    return mask.reshape(-1).bool().cpu()


def _name(model: PreTrainedModel) -> str:
    """A Hub id, or of a folder its name only: where it lies on this machine is nobody's business."""
    name = str(getattr(model, "name_or_path", ""))
    return (Path(name).name if Path(name).exists() else name) or type(model).__name__
