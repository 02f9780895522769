"""The processes of test_parallel: each loads models sharded, compares them with the whole ones, and saves them."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from moe_hf import MoEConfig, MoEError, MoEForCausalLM, upcycle
from tests.processes import run_cases
from tests.tiny_models import randomise_, tiny_config, tiny_dense, tiny_native_moe


LAYOUTS = {
    "tp": {"tp_size": 2},
    "tp_ep": {"tp_size": 2, "ep_size": 2},
    "fsdp": {"fsdp_size": 2},
    "ep_fsdp": {"fsdp_size": 2, "ep_size": 2},
}
FOUR = {
    "fsdp4_ep2": {"fsdp_size": 4, "ep_size": 2},
    "fsdp4_ep4": {"fsdp_size": 4, "ep_size": 4},
    "fsdp2_tp2_ep2": {"fsdp_size": 2, "tp_size": 2, "ep_size": 2},
    "fsdp2_tp2_ep4": {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    "hsdp_ep2": {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
    "hsdp": {"dp_replicate_size": 2, "fsdp_size": 2},
}
# A vocabulary and heads that two divides.
SIZES = {"vocab_size": 112, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}


def block(family: str = "llama", **fields) -> PreTrainedModel:
    """A model of ours with random weights."""
    quiet = {"residual_dropout": 0.0, "embedding_dropout": 0.0} if family == "starcoder2" else {}
    text_config = tiny_config(family, **SIZES, **quiet)
    defaults = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    model = MoEForCausalLM(MoEConfig(text_config=text_config, **(defaults | fields)))
    randomise_(model)
    return model


EXTRA = {"extra_experts": ["zero", "copy", "constant"], "num_experts_per_tok": 3}
SHARED = {"shared_expert_intermediate_size": 24}
MERGED = {"router_type": "segment_merge", "num_experts_per_tok": 4, "router_kwargs": {"segment_length": 4}}
MERGED |= {"router_aux_loss_coef": 0.0}
MODELS = {
    "gated": lambda: upcycle(tiny_dense("llama", **SIZES), num_experts=4, noise=0.2),
    "biased": lambda: block("starcoder2"),
    "tied": lambda: block(tie_word_embeddings=True),
    "dense_layers": lambda: block(mlp_only_layers=[1]),
    "experts_per_layer": lambda: block(num_experts=6, num_experts_per_layer=[4, 2, 6]),
    "shared": lambda: block(**SHARED, shared_expert_gate=True),
    "residual": lambda: block("starcoder2", **SHARED, shared_expert_gate="softmax"),
    "extra": lambda: block(**EXTRA),
    "extra_biased": lambda: block("starcoder2", **EXTRA),
    "multi_head": lambda: block(num_moe_heads=2),
    "merged": lambda: block(**MERGED),
    "merged_biased": lambda: block("starcoder2", **MERGED),
    "top_p": lambda: block(router_type="top_p"),
    "expert_choice": lambda: block(router_type="expert_choice", allow_noncausal_routing=True),
    "correction_bias": lambda: block(balance_strategy="bias", scoring_func="sigmoid", router_aux_loss_coef=0.0),
    "gpt2": lambda: upcycle(tiny_dense("gpt2", vocab_size=112), num_experts=4, noise=0.2),
    "mixtral": lambda: tiny_native_moe("mixtral", **SIZES),
    "qwen3_moe": lambda: tiny_native_moe("qwen3_moe", **SIZES),
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm().clamp_min(1e-8))


def compare(kind: str, sizes: dict[str, int], folder: Path) -> dict[str, Any]:
    """Relative errors of logits and of each gradient, and what became of the layout and the saved weights."""
    rank, layout = dist.get_rank(), DistributedConfig(**sizes)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    reference = MODELS[kind]().train().to(device)
    if rank == 0:
        reference.save_pretrained(folder / "model")
    dist.barrier()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=layout).train()
    except MoEError as refusal:
        return {"refused": str(refusal)}
    ids = torch.randint(3, 112, (layout.dp_size, 11), generator=torch.Generator().manual_seed(0)).to(device)
    mine = rank // layout.tp_size
    output = model(ids[mine : mine + 1], labels=ids[mine : mine + 1])
    output.loss.backward()
    parts = [reference(row[None], labels=row[None]) for row in ids]
    (sum(part.loss for part in parts) / len(parts)).backward()
    true = dict(reference.named_parameters())
    # A sum over tokens that nearly cancels, as the gradient of the residual's bias is, has the errors of its terms.
    floor = 1e-2 * max(p.grad.norm() for p in true.values() if p.grad is not None)
    gradients = {
        name: float((whole(p.grad) - true[name].grad).norm() / true[name].grad.norm().clamp_min(floor))
        for name, p in model.named_parameters() if p.grad is not None
    }  # fmt: skip
    model.save_pretrained(folder / "saved")
    dist.barrier()
    saved = AutoModelForCausalLM.from_pretrained(folder / "saved").state_dict()
    config, files = json.loads((folder / "saved" / "config.json").read_text()), (folder / "saved").glob("*.py")
    plain = json.loads((folder / "model" / "config.json").read_text())
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "placements")]
    return {
        "is_fsdp": isinstance(model, FSDPModule),
        "auto_map_is_equal": config.get("auto_map") == plain.get("auto_map"),
        "code_is_equal": {f.name for f in files} == {f.name for f in (folder / "model").glob("*.py")},
        "expert_is_sharded": any(".experts." in name for name in sharded),
        "logits": relative(whole(output.logits), parts[mine].logits),
        "gradients": gradients,
        "without_gradient": [n for n, p in true.items() if p.grad is not None and n not in gradients],
        "saved_is_equal": all(
            torch.equal(saved[name], tensor.cpu()) for name, tensor in reference.state_dict().items()
        ),
    }


def cases(layouts: dict[str, dict[str, int]], kinds: list[str]) -> dict[str, Any]:
    """The cases by name, `LAYOUT-KIND`."""
    return {f"{layout}-{kind}": partial(compare, kind, sizes) for layout, sizes in layouts.items() for kind in kinds}


if __name__ == "__main__":
    chosen = cases(LAYOUTS | FOUR, list(MODELS))
    run_cases({name: chosen[name] for name in sys.argv[2:]}, Path(sys.argv[1]))
