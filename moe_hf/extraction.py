"""`extract_experts`: what one task, language or modality uses of a MoE model, as a smaller one.

Exact where an id decides which experts are open (`expert_groups`) or taken (`routing_level="task"`); TaskMoE serves its
tasks this way (https://huggingface.co/papers/2110.03742). The result needs no id of that kind any more.

Letters: D model width, E experts, K experts per token, N ids.
"""

import copy

import torch
from torch import nn

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.experts import Experts
from moe_hf.modeling.modeling_moe import MoEForCausalLM
from moe_hf.modeling.moe_block import MoEBlock
from moe_hf.modeling.routing_ids import example_ids, id_counts, open_experts
from moe_hf.modeling.routing_pass import RoutingPass, routing_pass
from moe_hf.unwrapping import whole_model


TOLERANCE = 1e-5
NUM_SEQUENCES, SEQUENCE_LENGTH = 2, 16


@torch.no_grad()
def extract_experts(
    model: MoEForCausalLM, *, task: int | None = None, language: int | None = None, modality: int | None = None
) -> MoEForCausalLM:
    """Return a model that has the experts of one id alone, and computes what `model` does with that id.

    - `expert_groups`: the experts of the group, or those common to the groups of several ids; groups of other kinds of
      ids stay, limited to them.
    - `routing_level="task"`: the K experts that each layer chose for the task; a router then weights all of them.
    - `router_per_task`: all experts that are open, with the task's own router.

    The logits of both are compared on random tokens.

    Args:
        model (`MoEForCausalLM`): the model; it is not changed.
        task, language, modality (`int`): which id; at least one.

    Returns:
        `MoEForCausalLM`: in evaluation mode, on the device and in the dtype of `model`.

    Raises:
        MoEError: an id that the routers do not tell apart, or a configuration for which the experts of an id are not
            fixed; or the logits differ.
    """
    model = whole_model(model, "Extraction")
    if not isinstance(model, MoEForCausalLM):
        raise MoEError(f"extract_experts needs a MoEForCausalLM, and got {type(model).__name__}.")
    given = {"task": task, "language": language, "modality": modality}
    ids = {kind: id_ for kind, id_ in given.items() if id_ is not None}
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, MoEBlock)}
    _check(model.config, ids, blocks)
    by_task = model.config.routing_level == "task" and "task" in ids
    kept = {name: _chosen(block, ids) if by_task else _open(model.config, ids) for name, block in blocks.items()}
    config = _smaller_config(model.config, ids, len(next(iter(kept.values()))))
    state = {}
    for name, tensor in model.state_dict().items():
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if block is None:
            state[name] = tensor
            continue
        part = _smaller_tensor(name.removeprefix(f"{block}."), tensor, kept[block], blocks[block], config, ids)
        state |= {} if part is None else {name: part}
    small = MoEForCausalLM._from_config(config).to(model.device).eval()
    small.load_state_dict(state)
    small.tie_weights()
    small.generation_config = copy.deepcopy(model.generation_config)
    if by_task:
        for name, block in blocks.items():
            _adjust_weights(small.get_submodule(name), block, ids, kept[name])
    _compare(model, small, ids)
    return small


def _check(config: MoEConfig, ids: dict[str, int], blocks: dict[str, MoEBlock]) -> None:
    counts = id_counts(config)
    if not ids or set(ids) - set(counts):
        raise MoEError(
            f"Experts are extracted for ids that the routers tell apart, {sorted(counts)}; given: {sorted(ids)}."
        )
    for kind, id_ in ids.items():
        if not 0 <= id_ < counts[kind]:
            raise MoEError(f"{kind} is {id_}; it must be in [0, {counts[kind]}).")
    kinds = config.num_experts_per_layer or config.expert_intermediate_sizes or config.extra_experts
    is_plain = not kinds and all(type(block.experts) is Experts for block in blocks.values())
    if not is_plain or config.router_arch == "attention":
        raise MoEError(
            "Experts can be taken out where they are of one kind and size, and their logits do not depend on each other."
        )
    if config.routing_level == "task" and "task" in ids:
        missing = sorted(set(config.expert_groups or {}) - set(ids))
        if config.router_type != "top_k" or missing:
            raise MoEError(
                f"The experts of a task are fixed with router_type='top_k' (here {config.router_type!r}) and an id of "
                f"each kind that has groups (missing: {missing})."
            )
    elif config.expert_group_prior is not None:
        raise MoEError(
            "With expert_group_prior tokens also use experts outside of their group: nothing can be left out."
        )


def _open(config: MoEConfig, ids: dict[str, int]) -> list[int]:
    kept = set(range(config.num_experts))
    for kind, id_ in ids.items():
        kept &= set((config.expert_groups or {}).get(kind, [kept] * (id_ + 1))[id_])
    return sorted(kept)


def _decide(block: MoEBlock, ids: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of a task and their weights, (K,) each, in the order of the experts."""
    config, device = block.gate.config, block.gate.weight.device
    rows = {kind: torch.full((1,), ids.get(kind, 0), device=device) for kind in id_counts(config)}
    token = torch.zeros(1, block.gate.task_embedding.shape[1], device=device, dtype=block.gate.weight.dtype)
    was_training = block.gate.training
    try:
        with routing_pass(RoutingPass(ids=rows, open_experts=open_experts(config, rows))):
            _, weights, index = block.gate.eval()(token)
    finally:
        block.gate.train(was_training)
    index, order = index[0].sort()
    return index, weights[0][order]


def _chosen(block: MoEBlock, ids: dict[str, int]) -> list[int]:
    return _decide(block, ids)[0].tolist()


def _smaller_config(config: MoEConfig, ids: dict[str, int], num_experts: int) -> MoEConfig:
    fields = config.to_dict()
    share = num_experts / config.num_experts
    fields |= {"num_experts": num_experts, "n_group": None, "topk_group": None}
    # An expert's capacity stays what it was.
    for name in ("capacity_factor", "eval_capacity_factor"):
        fields[name] = None if fields[name] is None else fields[name] * share
    if "task" in ids:
        fields |= {"num_tasks": 1 if config.routing_level == "task" else 0, "router_per_task": False}
    fields |= {"expert_groups": None, "expert_group_prior": None}
    others = {kind: groups for kind, groups in (config.expert_groups or {}).items() if kind not in ids}
    if others:
        kept = _open(config, ids)
        fields["expert_groups"] = {
            kind: [[kept.index(expert) for expert in group if expert in kept] for group in groups]
            for kind, groups in others.items()
        }
    smaller = MoEConfig.from_dict(fields)
    smaller.dtype = config.dtype
    return smaller


def _smaller_tensor(
    name: str, tensor: torch.Tensor, kept: list[int], block: MoEBlock, config: MoEConfig, ids: dict[str, int]
) -> torch.Tensor | None:
    """What is left of a tensor of a block, called `name` there; None when nothing is."""
    part, _, own = name.partition(".")
    if part == "experts":
        return tensor[kept]
    if part != "gate":
        return tensor
    if own == "task_weight" and "task" in ids:
        return None
    if own == "weight" and block.gate.config.router_per_task and "task" in ids:
        tensor = tensor + block.gate.task_weight[ids["task"]]
    letters = block.gate.shapes.get(own, ("E",))  # buffers are (E,)
    for dimension, letter in enumerate(letters):
        if letter == "E":
            tensor = tensor.index_select(dimension, torch.tensor(kept, device=tensor.device))
        elif letter == "N" and config.num_tasks == 1 and "task" in ids:
            tensor = tensor.narrow(dimension, ids["task"], 1)
    return tensor


def _adjust_weights(small: MoEBlock, block: MoEBlock, ids: dict[str, int], kept: list[int]) -> None:
    """Scale experts whose weight changed: a softmax over fewer experts is larger, unless it is normalised again."""
    factor = _decide(block, ids)[1] / _decide(small, {})[1]
    if torch.allclose(factor, torch.ones_like(factor), rtol=1e-6, atol=0):
        return
    experts: nn.Module = small.experts
    experts.down_proj.mul_(factor[:, None, None].to(experts.down_proj))
    if experts.has_bias:
        experts.down_proj_bias.mul_(factor[:, None].to(experts.down_proj_bias))


def _compare(model: MoEForCausalLM, small: MoEForCausalLM, ids: dict[str, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (NUM_SEQUENCES, SEQUENCE_LENGTH), generator=generator)
    outputs, was_training = [], model.training
    try:
        for one in (model, small):
            more = example_ids(one.config, len(tokens), model.device)
            if one is model:
                more |= {f"{kind}_ids": torch.full_like(more[f"{kind}_ids"], id_) for kind, id_ in ids.items()}
            outputs.append(one.eval()(tokens.to(model.device), use_cache=False, **more).logits.double())
    finally:
        model.train(was_training)
    error = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    limit = max(TOLERANCE, 4 * torch.finfo(model.dtype).eps)
    if not error <= limit:
        raise MoEError(
            f"The extracted model's logits differ from the whole model's by {error:.1e}, more than {limit:.1e}: its experts "
            "depend on the ones left out."
        )
