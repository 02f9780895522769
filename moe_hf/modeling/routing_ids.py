"""Who decides about the experts: the token, its sequence, or an id of its task, language or modality.

Token routing promises no expert of a language or topic: some models have grown experts of languages (NLLB-200,
https://huggingface.co/papers/2212.09811), others none (ST-MoE, https://huggingface.co/papers/2202.08906). Where they are
wanted an id has to say so:

- `expert_groups` open to each id some of the experts (DEMix, https://huggingface.co/papers/2108.05036, and VLMo,
  https://huggingface.co/papers/2111.02358, have one per domain or modality); with `expert_group_prior` they are
  preferred to the others only.
- `routing_level="task"`: the router reads a learned embedding of the task, so that all tokens of a task use the same
  experts, which `extract_experts` makes a model of (TaskMoE, https://huggingface.co/papers/2110.03742).
- `router_per_task`: each task has a router over shared experts (MMoE, KDD 2018, doi 10.1145/3219819.3220007).
- `routing_level="prefix"`: the router reads the mean of the sequence so far, the causal form of the mean of the
  whole `"sequence"`, which sees later tokens.

Letters: B batch, S sequence, T = B * S tokens, D model width, E experts, K experts per token, N ids.
"""

import math
from itertools import product
from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils.import_utils import is_torchdynamo_compiling

from .config_checks import MoEError


# Arguments of the forward, and the kind of id that each gives. PEFT keeps `task_ids` to itself, hence a second name.
ID_ARGUMENTS = {
    "task_ids": "task",
    "moe_task_ids": "task",
    "language_ids": "language",
    "modality_ids": "modality",
}
KINDS = ("task", "language", "modality")
ROUTING_LEVELS = ("token", "prefix", "sequence", "task")


def id_counts(config: Any) -> dict[str, int]:
    """How many ids of each kind the routers of `config` tell apart, such as {"language": 2}; {} for other models."""
    counts = {kind: len(groups) for kind, groups in (getattr(config, "expert_groups", None) or {}).items()}
    tasks = getattr(config, "num_tasks", 0) if hasattr(config, "routing_level") else 0
    return counts | ({"task": tasks} if tasks else {})


def example_ids(config: Any, batch_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Arguments of the forward with which each of `batch_size` rows has the first id of each kind, (B,)."""
    return {f"{kind}_ids": torch.zeros(batch_size, dtype=torch.long, device=device) for kind in id_counts(config)}


def check_deciders(config: Any) -> None:
    """The level of routing, the tasks, and the groups of experts."""
    level = config.routing_level
    if level not in ROUTING_LEVELS:
        raise MoEError(f"routing_level is {level!r}; it must be one of {list(ROUTING_LEVELS)}.")
    if level == "sequence" and not config.allow_noncausal_routing:
        raise MoEError(
            "routing_level='sequence' lets a token's experts depend on later tokens. Use 'prefix', the mean of the "
            "sequence so far, or set allow_noncausal_routing=True."
        )
    if level in ("prefix", "sequence") and config.num_moe_heads > 1:
        raise MoEError(f"routing_level={level!r} would mix the parts of tokens: leave num_moe_heads out.")
    if config.num_tasks < 0:
        raise MoEError(f"num_tasks is {config.num_tasks}; it must be at least 0.")
    if (level == "task" or config.router_per_task) != (config.num_tasks > 0):
        raise MoEError(
            f"num_tasks is {config.num_tasks}; routing_level='task' and router_per_task=True need it, and nothing else "
            "reads it."
        )
    if config.router_per_task and (level == "task" or config.router_arch != "linear"):
        raise MoEError("router_per_task=True needs router_arch='linear', and a routing_level other than 'task'.")
    _check_expert_groups(config)


def _check_expert_groups(config: Any) -> None:
    groups_by_kind, prior, experts = config.expert_groups, config.expert_group_prior, config.num_experts
    if prior is not None and not (groups_by_kind and math.isfinite(prior) and prior >= 0):
        raise MoEError(
            f"expert_group_prior is {prior}; it must be finite and at least 0, and goes with expert_groups. None closes "
            "the other experts."
        )
    if not groups_by_kind:
        return
    unknown = sorted(set(groups_by_kind) - set(KINDS))
    if unknown:
        raise MoEError(f"expert_groups has {unknown}; it may have {list(KINDS)}.")
    for kind, groups in groups_by_kind.items():
        is_list = isinstance(groups, list) and groups and all(isinstance(group, list) for group in groups)
        members = [expert for group in groups for expert in group] if is_list else []
        if not is_list or not all(type(expert) is int and 0 <= expert < experts for expert in members):
            raise MoEError(
                f"expert_groups[{kind!r}] is {groups!r}; it must have for each id a list of experts in [0, {experts})."
            )
    if "task" in groups_by_kind and config.num_tasks not in (0, len(groups_by_kind["task"])):
        raise MoEError(f"num_tasks is {config.num_tasks}, and expert_groups has {len(groups_by_kind['task'])} tasks.")
    if prior is not None:
        return
    if config.n_group is not None:
        raise MoEError("n_group chooses among groups of its own: it does not go with expert_groups.")
    for ids in product(*(range(len(groups)) for groups in groups_by_kind.values())):
        common = set.intersection(*(set(groups[i]) for groups, i in zip(groups_by_kind.values(), ids, strict=True)))
        if len(common) < config.num_experts_per_tok:
            raise MoEError(
                f"expert_groups opens {len(common)} experts to {dict(zip(groups_by_kind, ids, strict=True))}, fewer than "
                f"num_experts_per_tok={config.num_experts_per_tok}."
            )


def decider_parameters(config: Any) -> dict[str, tuple[str, ...]]:
    """Shapes of what the routers have for tasks, by name, in the letters "N", "E" and "D"."""
    shapes = {"task_embedding": ("N", "D")} if config.routing_level == "task" else {}
    return shapes | ({"task_weight": ("N", "E", "D")} if config.router_per_task else {})


def own_task_logits(inputs: torch.Tensor, task_weight: torch.Tensor, task_ids: torch.Tensor) -> torch.Tensor:
    """What the router of each token's task adds to the logits of all tasks, (T, E); it starts at zero.

    Args:
        inputs (`torch.Tensor`): (T, D).
        task_weight (`torch.Tensor`): (N, E, D).
        task_ids (`torch.Tensor`): (T,).
    """
    of_all_tasks = F.linear(inputs, task_weight.flatten(0, 1)).unflatten(-1, task_weight.shape[:2])  # (T, N, E)
    index = task_ids.to(inputs.device)[:, None, None].expand(-1, 1, task_weight.shape[1])
    return of_all_tasks.gather(1, index).squeeze(1)


def take_ids(config: Any, named: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Take the ids out of the arguments of a forward, by kind.

    Raises:
        MoEError: ids that the routers need are missing, or none of them reads those that were given.
    """
    given = {}
    for argument, kind in ID_ARGUMENTS.items():
        values = named.pop(argument, None)
        if values is not None:
            given[kind] = values
    counts = id_counts(config)
    unread = sorted(set(given) - set(counts))
    if unread:
        raise MoEError(
            f"The model was given ids of {unread}, and its routers read those of {sorted(counts) or 'nothing'}: leave "
            "them out, or set expert_groups or num_tasks in its configuration."
        )
    missing = [f"{kind}_ids" for kind, count in counts.items() if count > 1 and kind not in given]
    if missing:
        raise MoEError(
            f"The routers of this model need {' and '.join(missing)}, whole numbers of shape (B,) or (B, S): pass them "
            "to the model and to generate(), or add such a column to the data. Under PEFT, task_ids are called "
            "moe_task_ids."
        )
    return given


def spread_ids(
    config: Any,
    given: dict[str, torch.Tensor],
    shape: tuple[int, int],
    past: Any,
    token_mask: torch.Tensor | None,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The id of each token, by kind, (T,) int64; padding has the first one.

    Args:
        given (`dict[str, torch.Tensor]`): by kind (B,), (B, S), or, with a cache, those of all tokens so far.
        shape (`tuple[int, int]`): B and S.
        past (`Cache`): the cache, or None.
        token_mask (`torch.Tensor`): (T,), True for real tokens; None without padding.
        device (`torch.device`): of the result.

    Raises:
        MoEError: ids of another shape or type, or out of range.
    """
    ids = {}
    for kind, count in id_counts(config).items():
        values = given.get(kind)
        values = torch.zeros(shape[0], dtype=torch.long) if values is None else values
        if values.is_floating_point() or values.dim() not in (1, 2) or len(values) != shape[0]:
            raise MoEError(
                f"{kind}_ids are {values.dtype} of shape {tuple(values.shape)}; give whole numbers, (B,) or (B, S)."
            )
        if values.dim() == 1:
            values = values[:, None].expand(shape)
        elif values.shape[1] != shape[1] and past is not None:
            start = past.get_seq_length()
            values = values[:, start : start + shape[1]]
        if values.shape != shape:
            raise MoEError(
                f"{kind}_ids of shape {tuple(given[kind].shape)} do not cover tokens of shape {tuple(shape)}."
            )
        flat = values.reshape(-1).to(device, torch.long)
        if token_mask is not None:
            flat = flat.where(token_mask, 0)
        if not is_torchdynamo_compiling() and flat.numel() and (flat.min() < 0 or flat.max() >= count):
            raise MoEError(f"{kind}_ids hold {int(flat.min())} to {int(flat.max())}; they must be in [0, {count}).")
        ids[kind] = flat
    return ids


def extend_ids(model_kwargs: dict[str, Any], num_new_tokens: int) -> None:
    """Give generated tokens the ids of the last token of their row, where ids are per token."""
    for argument in ID_ARGUMENTS:
        ids = model_kwargs.get(argument)
        if ids is not None and ids.dim() == 2:
            model_kwargs[argument] = torch.cat([ids, ids[:, -1:].expand(-1, num_new_tokens)], dim=1)


def open_experts(config: Any, ids: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Which experts are in the group of each token, (T, E) bool, from the ids (T,) by kind; None without groups."""
    result = None
    for kind, groups in (config.expert_groups or {}).items():
        members = torch.tensor([[expert in group for expert in range(config.num_experts)] for group in groups])
        of_token = members.to(ids[kind].device)[ids[kind]]
        result = of_token if result is None else result & of_token
    return result


def limit_logits(router_logits: torch.Tensor, is_open: torch.Tensor, prior: float | None) -> torch.Tensor:
    """Logits (T, E) with `prior` added for open experts; None closes the others.

    A closed one gets the least finite number: its probability is exactly 0, and no loss multiplies 0 by infinity.
    """
    if prior is None:
        return router_logits.masked_fill(~is_open, torch.finfo(router_logits.dtype).min)
    return router_logits + prior * is_open


def prefix_sums(
    hidden_states: torch.Tensor, sequence_ids: torch.Tensor, token_mask: torch.Tensor | None, longest: int
) -> torch.Tensor:
    """The sum of the real tokens of a sequence up to each token, itself included, and their number, (T, D + 1).

    By doubling steps, not as a difference of sums over the row, which would lose the digits of late documents.

    Args:
        hidden_states (`torch.Tensor`): (T, D).
        sequence_ids (`torch.Tensor`): (T,), equal for the neighbouring tokens of one sequence.
        token_mask (`torch.Tensor`): (T,), True for real tokens; None without padding.
        longest (`int`): at least the length of the longest sequence.
    """
    sums = _with_count(hidden_states, token_mask)
    step = 1
    while step < longest:
        is_same = sequence_ids[step:] == sequence_ids[:-step]
        sums = sums + F.pad(sums[:-step] * is_same[:, None], (0, 0, step, 0))
        step *= 2
    return sums


def add_to_first_document(
    sums: torch.Tensor, carried: torch.Tensor | None, sequence_ids: torch.Tensor, batch_size: int
) -> torch.Tensor:
    """`sums` (T, N) with `carried` (B, N), those of earlier tokens, added in the document that each row begins with."""
    if carried is None:
        return sums
    return sums + in_first_document(sequence_ids, batch_size)[:, None] * carried.repeat_interleave(
        len(sums) // batch_size, dim=0
    ).to(sums)


def in_first_document(sequence_ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Whether a token belongs to the document that its row begins with, (T,); with a cache it continues an earlier one."""
    by_row = sequence_ids.view(batch_size, -1)
    return (by_row == by_row[:, :1]).reshape(-1)


def sequence_mean(
    hidden_states: torch.Tensor, sequence_ids: torch.Tensor, token_mask: torch.Tensor | None
) -> torch.Tensor:
    """The mean over all real tokens of each token's sequence, (T, D); `sequence_ids` (T,) are in [0, T)."""
    values = _with_count(hidden_states, token_mask)
    sums = torch.zeros_like(values).index_add(0, sequence_ids, values)[sequence_ids]
    return sums[:, :-1] / sums[:, -1:].clamp_min(1)


def _with_count(hidden_states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """(T, D + 1): tokens and a 1, zeros for padding."""
    values = F.pad(hidden_states, (0, 1), value=1.0)
    return values if token_mask is None else values.where(token_mask[:, None], 0.0)
