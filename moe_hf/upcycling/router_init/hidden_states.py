"""What a dense model's MLPs, and so the routers in their place, see on texts: their inputs, by layer.

Letters: B batch, S sequence, T tokens, D model width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_hf.errors import MoEError
from moe_hf.modeling.dense_mlp import MLPSite, find_mlp_sites, holder_of


# In one forward pass: few passes, since a model on the disk is read once for each, of little memory.
TOKENS_PER_PASS = 4096
# Kept for each layer: 64 MiB in bfloat16 at a width of 4096.
MAX_TOKENS = 8192


@torch.no_grad()
def collect_hidden_states(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
) -> dict[int, torch.Tensor]:
    """The inputs of each dense MLP on the given tokens, by the index of its layer.

    Args:
        model (`PreTrainedModel`): a dense causal LM, in memory or from `load_layerwise`.
        input_ids (`torch.Tensor`): (B, S).
        attention_mask (`torch.Tensor`, *optional*): (B, S), 0 for padding, which is left out.
        max_tokens (`int`): of more, rows are chosen at random that have as many, and tokens of these; the same in all
            layers.
        seed (`int`): of that choice.

    Returns:
        layer index to (T, D), in the model's dtype, on the CPU, in the order of the tokens.

    Raises:
        MoEError: when the arguments are not token ids and their mask, or nothing but padding.
    """
    check_token_ids("inputs", input_ids)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise MoEError(f"The attention mask is {tuple(mask.shape)} and the inputs are {tuple(input_ids.shape)}.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(mask), generator=generator)
    before = mask[order.to(mask.device)].bool().sum(-1).cumsum(0).cpu().roll(1)
    before[0] = 0
    kept = order[before < max_tokens].sort().values.to(mask.device)
    input_ids, mask = input_ids[kept], mask[kept]
    tokens = mask.flatten().nonzero()[:, 0].cpu()
    if len(tokens) == 0:
        raise MoEError("inputs have no tokens but padding.")
    if len(tokens) > max_tokens:
        tokens = tokens[torch.randperm(len(tokens), generator=generator)[:max_tokens]].sort().values
    rows, length = max(1, TOKENS_PER_PASS // input_ids.shape[1]), input_ids.shape[1]
    collected: dict[int, list[torch.Tensor]] = {}
    with _mlp_inputs(model) as seen:
        for start in range(0, len(input_ids), rows):
            part = slice(start, start + rows)
            # Without a mask where there is no padding: some families answer to one with other kernels.
            _run(model, input_ids[part], None if attention_mask is None else mask[part])
            first = start * length
            chosen = tokens[(tokens >= first) & (tokens < first + rows * length)] - first
            for layer, states in seen.items():
                collected.setdefault(layer, []).append(states[chosen])
            seen.clear()
    return {layer: torch.cat(parts) for layer, parts in collected.items()}


@torch.no_grad()
def collect_prompt_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> dict[int, list[torch.Tensor]]:
    """The inputs of each dense MLP on each prompt, run alone, by the index of its layer: (T, D) each, on the CPU.

    The tokenizer adds its special tokens as it does for any text.

    Raises:
        MoEError: for a prompt without tokens.
    """
    collected: dict[int, list[torch.Tensor]] = {}
    with _mlp_inputs(model) as seen:
        for prompt in prompts:
            input_ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long)
            if input_ids.numel() == 0:
                raise MoEError(f"The prompt {prompt!r} has no tokens.")
            _run(model, input_ids, None)
            for layer, states in seen.items():
                collected.setdefault(layer, []).append(states)
            seen.clear()
    return collected


def check_token_ids(argument: str, input_ids: object) -> None:
    """Refuse what is not a (B, S) tensor of token ids with at least one token.

    Raises:
        MoEError: naming the argument.
    """
    is_ids = isinstance(input_ids, torch.Tensor) and input_ids.dim() == 2 and not input_ids.is_floating_point()
    if not is_ids or input_ids.dtype == torch.bool or input_ids.numel() == 0:
        raise MoEError(f"{argument} must be a (B, S) tensor of token ids, with at least one.")


def _run(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    device = "cpu" if model.device.type == "meta" else model.device
    mask = None if attention_mask is None else attention_mask.to(device)
    was_training = model.training
    model.eval()
    try:
        model.base_model(input_ids=input_ids.to(device), attention_mask=mask, use_cache=False)
    finally:
        model.train(was_training)


@contextmanager
def _mlp_inputs(model: PreTrainedModel) -> Iterator[dict[int, torch.Tensor]]:
    """A dict that each forward pass fills: layer index to the input of its MLP, (B * S, D), on the CPU."""
    seen: dict[int, torch.Tensor] = {}

    def hook(site: MLPSite):
        def keep(module, args):
            # A copy: some layers go on to change the tensor in place.
            seen[site.layer_index] = args[0].reshape(-1, args[0].shape[-1]).to("cpu", copy=True)

        return keep

    sites = find_mlp_sites(model.base_model)
    handles = [
        getattr(holder_of(model.base_model, site), site.up).register_forward_pre_hook(hook(site)) for site in sites
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
