"""Bugs of public issues in loading, saving, converting and resuming, each rebuilt as a tiny folder, and found."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_hf.doctor import examine
from tests.doctor.faults import found, learnt, places, reconfigure, renamed, rewrite, saved, trained


EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base in a folder, and a function that writes a trained copy of it."""
    root = tmp_path_factory.mktemp("lost")
    base = saved(learnt(), root / "base")
    counter = iter(range(1000))

    def copy(change=None, **fields):
        folder = saved(trained(learnt()), root / f"copy{next(counter)}")
        if change is not None:
            rewrite(folder, change)
        return reconfigure(folder, **fields) if fields else folder

    return base, copy


def test_a_converter_that_leaves_every_expert_as_it_was_drawn(models):
    """NVIDIA/Megatron-LM#5844: the saver's stacked names match no schema, and all experts stay random."""

    def draw(tensors):
        torch.manual_seed(0)
        return {n: 0.02 * torch.randn(t.shape) if ".experts." in n else t for n, t in tensors.items()}

    base, copy = models
    report = examine(copy(draw))
    assert places(found(report, "experts-fresh", "warning")) == {(layer, e) for layer in range(3) for e in range(8)}


def test_experts_of_one_layer_that_keep_their_random_start(models):
    """NVIDIA-NeMo/Automodel#2682, NVIDIA-NeMo/Automodel#2722: a copy was filled in the place of the experts."""

    def draw(tensors):
        torch.manual_seed(0)
        return {
            n: 0.02 * torch.randn(t.shape) if "layers.1.block_sparse_moe.experts." in n else t
            for n, t in tensors.items()
        }

    report = examine(models[1](draw))
    assert places(found(report, "experts-fresh", "warning")) == {(1, e) for e in range(8)}


def test_stacked_experts_under_names_that_no_loader_knows(models):
    """kekzl/imp#1192, 1CatAI/1Cat-vLLM#21: the experts are left out while loading, and the model runs on others."""
    report = examine(models[1](lambda t: renamed(t, r"experts\.(\d+)\.w1\.weight", r"experts.\1.gate.kernel")))
    assert found(report, "experts-unmapped")[0].layers == (0, 1, 2)
    assert found(report, "experts-missing")


def test_routers_under_names_that_no_loader_knows(models):
    """pjlab-sys4nlp/llama-moe#74: the gates are drawn at random."""
    report = examine(
        models[1](lambda t: renamed(t, r"block_sparse_moe\.gate\.weight", "block_sparse_moe.router.weight0"))
    )
    assert found(report, "router-missing")[0].layers == (0, 1, 2)
    assert found(report, "experts-unmapped")


def test_a_save_of_one_rank_of_two(models):
    """KempnerInstitute/KempnerForge#202: a checkpoint with the experts of one rank alone."""
    report = examine(
        models[1](lambda t: {n: v for n, v in t.items() if not any(f"experts.{e}." in n for e in range(4, 8))})
    )
    assert places(found(report, "experts-missing")) == {(layer, e) for layer in range(3) for e in range(4, 8)}


def test_a_resume_that_gives_each_rank_the_experts_of_one(models):
    """KempnerInstitute/KempnerForge#202: resumed, each rank has the same experts, without a word."""

    def repeat(tensors):
        for layer in range(3):
            for part in ("w1", "w2", "w3"):
                for expert in range(4):
                    tensors[EXPERT.format(layer, expert + 4, part)] = tensors[
                        EXPERT.format(layer, expert, part)
                    ].clone()

    base, copy = models
    folder = copy(repeat)
    assert places(found(examine(folder, base=base), "experts-alike")) == {(x, e) for x in range(3) for e in range(8)}
    assert found(examine(folder), "experts-alike", "warning")


def test_tensors_of_no_size(models):
    """deepspeedai/DeepSpeed#2413: ZeRO-3 saved what was left of the shards."""
    name = EXPERT.format(1, 2, "w1")
    report = examine(models[1](lambda t: t | {name: torch.empty(0)}))
    assert places(found(report, "wrong-shape")) == {(1, 2)}


def test_every_parameter_under_another_name(models):
    """deepspeedai/DeepSpeed#7848: everything is MISSING, and the model trains from random numbers."""
    report = examine(models[1](lambda t: {f"module._fsdp.{n.replace('layers', 'blocks')}": v for n, v in t.items()}))
    assert {"experts-missing", "router-missing", "weights-missing"} <= {f.code for f in report.errors}


def test_a_square_matrix_that_lies_transposed(tmp_path):
    """NVIDIA-NeMo/Megatron-Bridge#3743: down_proj of GPT-OSS is square, and its shape tells nothing."""
    make = lambda: learnt("gpt_oss", hidden_size=64, intermediate_size=64)  # noqa: E731
    base = saved(make(), tmp_path / "base")
    turn = lambda t: {n: v.transpose(1, 2) if n.endswith("experts.down_proj") else v for n, v in t.items()}  # noqa: E731
    report = examine(rewrite(saved(trained(make()), tmp_path / "turned"), turn), base=base)
    assert places(found(report, "transposed")) == {(layer, e) for layer in range(3) for e in range(8)}


def test_stacked_experts_with_inputs_and_outputs_exchanged(tmp_path):
    """thinking-machines-lab/tinker-cookbook#554: one family stores what another stores transposed."""
    turn = lambda t: {n: v.transpose(1, 2) if ".experts." in n else v for n, v in t.items()}  # noqa: E731
    report = examine(rewrite(saved(learnt("llama4_text", intermediate_size=56), tmp_path / "turned"), turn))
    assert found(report, "transposed")[0].layers == (0,)


def test_a_merge_that_writes_up_where_gate_is(tmp_path):
    """thinking-machines-lab/tinker-cookbook#457: the up half of a fused matrix never moves."""
    base = saved(learnt("qwen3_moe"), tmp_path / "base")
    moved = saved(trained(learnt("qwen3_moe"), only=".experts."), tmp_path / "moved")
    old = load_file(base / "model.safetensors")
    rewrite(moved, lambda t: {n: old[n] if ".up_proj." in n else v for n, v in t.items()})
    assert len(places(found(examine(moved, base=base), "changed-unevenly", "warning"))) == 24


def test_a_merge_that_falls_back_to_the_base_for_some_matrices(models):
    """unslothai/unsloth-zoo#779, unslothai/unsloth-zoo#809: some matrices of experts are merged, others the base's."""
    base, copy = models
    old = load_file(base / "model.safetensors")
    keep = {EXPERT.format(layer, e, part) for layer in range(3) for e in range(1, 8) for part in ("w1", "w3")}
    report = examine(copy(lambda t: {n: old[n] if n in keep else v for n, v in t.items()}), base=base)
    assert places(found(report, "changed-unevenly", "warning")) == {(x, e) for x in range(3) for e in range(1, 8)}


def test_a_correction_bias_that_was_not_loaded(tmp_path):
    """NVIDIA/TensorRT-LLM#15154: without its bias a router chooses by other scores."""
    model = learnt("glm4_moe", moe_intermediate_size=56)
    for block in model.model.layers[1:]:
        torch.nn.init.normal_(block.mlp.gate.e_score_correction_bias)
    base = saved(model, tmp_path / "base")
    without = saved(model, tmp_path / "without")
    rewrite(without, lambda t: {n: v for n, v in t.items() if not n.endswith("e_score_correction_bias")})
    assert found(examine(without), "router-missing")
    zeroed = saved(model, tmp_path / "zeroed")
    rewrite(zeroed, lambda t: {n: v * 0 if n.endswith("e_score_correction_bias") else v for n, v in t.items()})
    assert found(examine(zeroed, base=base), "bias-lost")[0].layers == (1, 2)


def test_weights_that_are_not_divided_by_their_sum(tmp_path):
    """pytorch/torchtitan#1448: norm_topk_prob is lost in a conversion."""
    base = saved(learnt("qwen3_moe", norm_topk_prob=True), tmp_path / "base")
    other = reconfigure(saved(learnt("qwen3_moe"), tmp_path / "other"), norm_topk_prob=False)
    assert found(examine(other, base=base), "routing-config-changed", "warning")


def test_experts_that_are_nan_after_training(models):
    """huggingface/transformers#48205: rows of memory that was never written make gradients NaN."""
    name = EXPERT.format(2, 5, "w2")

    def spoil(tensors):
        tensors[name][3, 7] = torch.nan

    assert places(found(examine(models[1](spoil)), "not-finite")) == {(2, 5)}


def test_a_run_that_resumes_from_other_weights(tmp_path):
    """NVIDIA/Megatron-LM#761: after a resume the loss begins where the run began."""
    losses = [5.0, 4.2, 3.6, 3.1, 2.8, 2.6, 4.9, 4.3]
    history = [{"step": 10 * (i + 1), "loss": loss, "grad_norm": 1.0} for i, loss in enumerate(losses)]
    checkpoint = saved(learnt(), tmp_path / "run" / "checkpoint-60")
    for folder in (checkpoint, checkpoint.parent):
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 80, "log_history": history}))
    assert "step 70" in found(examine(checkpoint.parent), "resumed-elsewhere")[0].where


def test_a_merge_that_writes_the_base(tmp_path):
    """unslothai/unsloth#5410: the merged checkpoint is the base's, bit by bit, and success is reported."""
    base = saved(learnt(), tmp_path / "base")
    merged = saved(learnt(), tmp_path / "merged")
    (merged / "adapter_config.json").write_text("{}")
    (merged / "trainer_state.json").write_text("{}")
    (merged / "adapter_config.json").unlink()
    assert found(examine(merged, base=base), "nothing-changed", "warning")


def test_a_shard_that_is_missing(models, tmp_path):
    """A shard that an index names and nobody has: pull and copy of parts of a checkpoint."""
    folder = models[1]()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(dict(list(tensors.items())[:20]), folder / "model-00001-of-00002.safetensors")
    shards = {n: f"model-0000{1 + (i >= 20)}-of-00002.safetensors" for i, n in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert found(examine(folder), "unreadable")


def test_a_run_whose_router_moved_and_whose_experts_did_not(tmp_path):
    """NVIDIA/Megatron-LM#4785: what is frozen drifts by its counts; unslothai/unsloth#5410: what trains stays."""
    base = saved(learnt(), tmp_path / "base")
    checkpoint = saved(trained(learnt(), only="mlp.gate"), tmp_path / "run" / "checkpoint-10")
    names = [[f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(3)]]
    (checkpoint / "optimizer_parameters.json").write_text(json.dumps(names))
    report = examine(checkpoint.parent, base=base)
    assert found(report, "router-moved", "warning")[0].layers == (0, 1, 2)
    assert found(report, "nothing-changed", "warning")[0].layers == (0, 1, 2)


def test_a_base_of_another_shape(models, tmp_path):
    other = saved(learnt(intermediate_size=48), tmp_path / "other")
    assert found(examine(models[1](), base=other), "other-base", "warning")
