"""What routers are given in the property tests, ids included, and the logits that naive code makes of it."""

from typing import Any

import torch

from moe_hf import MoEConfig
from moe_hf.modeling.moe_block import MoEBlock
from moe_hf.modeling.router import Router
from moe_hf.modeling.routing_ids import id_counts, open_experts
from moe_hf.modeling.routing_pass import RoutingPass


def given_ids(config: MoEConfig, input_ids: torch.Tensor, positions: torch.Tensor | None = None) -> dict[str, Any]:
    """Ids of tasks and the like for (B, S) tokens, where routers read them: by the first token of each document."""
    columns = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
    starts = columns == 0 if positions is None else positions.expand(input_ids.shape) == 0
    first = torch.where(starts, columns, 0).cummax(1).values
    tokens = input_ids.gather(1, first)
    return {f"{kind}_ids": tokens % count for kind, count in id_counts(config).items()}


def block_pass(config: MoEConfig, batch: int, length: int, record: bool = False) -> RoutingPass:
    """The pass in which a block sees (B, S) tokens alone; row b has id b, modulo how many there are."""
    rows = torch.arange(batch).repeat_interleave(length)
    ids = {kind: rows % count for kind, count in id_counts(config).items()}
    return RoutingPass(batch, length, ids=ids, open_experts=open_experts(config, ids), record=record)


def naive_inputs(router: Router, tokens: torch.Tensor, batch: int) -> list[torch.Tensor]:
    """What the router reads for each of the (T, D) tokens of `batch` rows."""
    config, length, inputs = router.config, len(tokens) // batch, []
    for row in range(batch):
        sequence = tokens[row * length : (row + 1) * length]
        for place, token in enumerate(sequence):
            if config.routing_level == "task":
                token = router.task_embedding[row % config.num_tasks]
            elif config.routing_level != "token":
                last = place + 1 if config.routing_level == "prefix" else length
                token = sum(sequence[i] for i in range(last)) / last
            inputs.append(token)
    return inputs


def naive_prior(config: MoEConfig, row: int) -> torch.Tensor:
    """What the groups of experts add to the logits of row `row`, (E,); so little for closed ones that they score 0."""
    added = torch.zeros(config.num_experts, dtype=torch.float64)
    for groups in (config.expert_groups or {}).values():
        for expert in range(config.num_experts):
            is_open = expert in groups[row % len(groups)]
            if config.expert_group_prior is not None:
                added[expert] += config.expert_group_prior * is_open
            elif not is_open:
                added[expert] -= 1e6 * (1 + expert)
    return added


def naive_logits(router: Router, tokens: torch.Tensor, batch: int) -> torch.Tensor:
    """The logits (T, E) of the (T, D) tokens of `batch` rows, one token and one expert at a time."""
    config, rows = router.config, []
    length = len(tokens) // batch
    for token in naive_inputs(router, tokens, batch):
        if config.router_arch == "mlp":
            hidden = router.hidden_weight @ token
            rows.append(torch.stack([row @ (hidden * hidden.sigmoid()) for row in router.weight]))
        elif config.router_arch == "cosine":
            hidden = router.hidden_weight @ token
            scale = router.log_scale.exp().squeeze() / config.router_arch_kwargs.get("temperature", 0.5)
            rows.append(torch.stack([scale * (row @ hidden) / row.norm() / hidden.norm() for row in router.weight]))
        elif config.router_arch == "attention":
            keys, values = router.key_weight @ token, router.weight @ token
            rows.append(torch.stack([((query @ token) * keys).softmax(0) @ values for query in router.query_weight]))
        elif config.router_per_task:
            own = router.task_weight[len(rows) // length % config.num_tasks]
            rows.append((router.weight + own) @ token)
        else:
            rows.append(router.weight @ token)
    if not config.expert_groups:
        return torch.stack(rows)
    return torch.stack([row + naive_prior(config, place // length).to(row) for place, row in enumerate(rows)])


@torch.no_grad()
def make_logits_huge_(block: MoEBlock, tokens: torch.Tensor) -> None:
    """Change a router and (B, S, D) tokens so that logits are as large as 70,000 where the architecture allows."""
    router, spread = block.gate, torch.linspace(-1, 1, len(block.gate.weight))
    if block.multi_head is not None:
        block.multi_head.head_proj.weight.copy_(torch.eye(tokens.shape[-1]))
        block.multi_head.head_proj.bias.zero_()
    tokens[..., :: tokens.shape[-1] // router.config.num_moe_heads] = 10.0
    router.weight[:, 0] = 7_000 * spread
    if "hidden_weight" in router.parameter_names:
        router.hidden_weight[0].zero_()
        router.hidden_weight[0, 0] = 1
    if router.config.routing_level == "task":
        router.task_embedding[:, 0] = 10.0
    if router.config.router_arch == "attention":
        router.query_weight[:, 0] = router.key_weight[:, 0] = 10 * spread
