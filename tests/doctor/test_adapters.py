"""Adapters and merges: bugs of public issues, each rebuilt as a tiny adapter, and found."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import moe_hf
from moe_hf.doctor import examine
from tests.doctor.faults import found, is_silent, learnt, places, saved, trained


# PEFT asks for a deprecated name when it wraps a model.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved(learnt("qwen3_moe"), tmp_path_factory.mktemp("adapters") / "base")


def adapter(folder, change=None, config=None, **settings):
    """An adapter of PEFT with values, in a folder."""
    settings = {"r": 3, "target_modules": ["q_proj"], "target_parameters": TARGETS} | settings
    model = get_peft_model(learnt("qwen3_moe"), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    if change is not None:
        save_file({n: t.contiguous() for n, t in change(load_file(file)).items()}, file, metadata={"format": "pt"})
    if config is not None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_an_adapter_that_is_whole(base, tmp_path):
    report = examine(adapter(tmp_path / "a"), base=base)
    assert is_silent(report)
    assert report.kind == "adapter"


CASES = {
    # NVIDIA-NeMo/Automodel#1395: shapes and ranks of grouped adapters.
    "adapter-rank": ("error", lambda t: t, {"r": 4}),
    "adapter-incomplete": (
        "error",
        lambda t: {n: v for n, v in t.items() if "layers.1" not in n or "lora_B" not in n},
        None,
    ),
    "adapter-shape": ("error", lambda t: {n: v[:, :-8] if "q_proj.lora_A" in n else v for n, v in t.items()}, None),
    # unslothai/unsloth#5410: names of experts one by one, for a base that stacks them.
    "adapter-unknown": ("error", lambda t: {n.replace("q_proj", "experts.3.up_proj"): v for n, v in t.items()}, None),
    "not-finite": ("error", lambda t: {n: v / 0 if "lora_B" in n else v for n, v in t.items()}, None),
    "adapter-zero": ("warning", lambda t: {n: v * 0 if "lora_B" in n else v for n, v in t.items()}, None),
    # unslothai/unsloth#6930: lora_B in another order, in files that do not say so.
    "adapter-packing": ("warning", lambda t: t, {"auto_mapping": {"unsloth_fixed": True}}),
    # unslothai/unsloth#6936: asked for, and never attached.
    "adapter-not-reached": ("warning", lambda t: {n: v for n, v in t.items() if "experts" not in n}, {}),
}


@pytest.mark.parametrize("code", CASES)
def test_an_adapter_that_is_not(base, tmp_path, code):
    severity, change, config = CASES[code]
    assert found(examine(adapter(tmp_path / "a", change, config), base=base), code, severity)


def test_projections_that_are_no_modules_any_more(base, tmp_path):
    """unslothai/unsloth#6936, vllm-project/vllm#47088: up_proj and down_proj name shared experts, or nothing."""
    folder = adapter(
        tmp_path / "a", target_parameters=None, config={"target_modules": ["q_proj", "gate_proj", "up_proj"]}
    )
    assert "gate_proj" in found(examine(folder, base=base), "adapter-not-reached", "warning")[0].message


def test_all_linear_reaches_no_expert(base, tmp_path):
    """NVIDIA-NeMo/Automodel#1151: stacked experts are no nn.Linear."""
    folder = adapter(tmp_path / "a", target_parameters=None, config={"target_modules": "all-linear"})
    assert found(examine(folder, base=base), "adapter-experts-not-reached", "warning")


def test_merges(base, tmp_path):
    """unslothai/unsloth#5410 (the base is written), unslothai/unsloth#6930 (columns of other experts are added)."""
    model = learnt("qwen3_moe")
    moe_hf.add_expert_lora(model, moe_hf.ExpertLoraConfig(r=3, alpha=6.0))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = moe_hf.save_expert_lora(model, tmp_path / "adapter")
    peft = moe_hf.save_expert_lora(model, tmp_path / "peft", file_format="peft")
    assert is_silent(examine(folder, base=base)) and is_silent(examine(peft, base=base))
    moe_hf.merge_expert_lora(model)
    moe_hf.hub.save_model(model, None, tmp_path / "merged")
    for one in (folder, peft):
        assert is_silent(examine(tmp_path / "merged", base=base, adapter=one))
    unmerged = examine(base, base=base, adapter=folder)
    assert places(found(unmerged, "adapter-not-merged")) == {(layer, e) for layer in range(3) for e in range(8)}
    other = saved(trained(learnt("qwen3_moe"), only=".experts."), tmp_path / "other")
    assert len(places(found(examine(other, base=base, adapter=peft), "adapter-not-merged"))) == 24


def test_an_adapter_of_another_base(tmp_path):
    """An adapter goes onto the model that it was trained on, which its fingerprint tells."""
    model = learnt("qwen3_moe")
    moe_hf.add_expert_lora(model, moe_hf.ExpertLoraConfig(r=2))
    folder = moe_hf.save_expert_lora(model, tmp_path / "adapter")
    assert found(examine(folder, base=learnt("qwen3_moe", seed=4)), "adapter-other-base")
    assert not examine(folder, base=learnt("qwen3_moe")).errors


def test_expert_deltas(tmp_path):
    model = learnt("qwen3_moe")
    moe_hf.apply_scope(model, "selected", expert_selection={"1": [2, 5]})
    still = moe_hf.save_expert_deltas(model, tmp_path / "still" / "expert_deltas.safetensors")
    base = learnt("qwen3_moe")
    assert places(found(examine(still, base=base), "nothing-changed", "warning")) == {(1, 2), (1, 5)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    moved = moe_hf.save_expert_deltas(model, tmp_path / "moved" / "expert_deltas.safetensors")
    assert is_silent(examine(moved, base=base))
    assert found(examine(moved, base=learnt("qwen3_moe", seed=4)), "adapter-other-base")
