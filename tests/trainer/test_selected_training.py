"""MoETrainer in the scope `selected`: checkpoints hold what trains, resuming is exact, the final model is a plain one."""

import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_hf import MoEError
from moe_hf.finetuning import ExpertSelection, apply_scope, find_moe_blocks, load_expert_deltas, score_experts
from moe_hf.finetuning.expert_deltas import DELTAS_NAME
from moe_hf.trainer import MoETrainer
from moe_hf.trainer.arguments import FinetuneArguments, MoEArgumentParser
from tests.processes import launch, torchrun
from tests.tiny_models import random_ids
from tests.trainer.runs import KINDS, GradientRecorder, arguments, losses, rows, tiny_moe


CHOICE = {"0": [1], "2": [0, 3]}


def train(kind, output_dir, dtype=torch.float32, resume=None, dropout=0.2, **fields):
    """Six steps, saved at 3 and 6."""
    fields = {
        "scope": "selected",
        "expert_selection": CHOICE,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
    } | fields
    args = arguments(output_dir, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2, **fields)
    recorder = GradientRecorder()
    # The statistics of the balance loss are those of a micro-batch: two processes have others than one.
    model = tiny_moe(kind, dropout=dropout, router_aux_loss_coef=0.0).to(dtype)
    trainer = MoETrainer(model, args, train_dataset=rows(28), callbacks=[recorder])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder.gradients


def equal(model, other):
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_exact_and_checkpoints_hold_the_chosen_experts_only(kind, dtype, tmp_path):
    whole, _ = train(kind, tmp_path / "whole", dtype)
    again, _ = train(kind, tmp_path / "again", dtype, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert equal(whole.model, again.model) and losses(whole)[3:] == losses(again)[3:]
    folder = tmp_path / "whole" / "checkpoint-6"
    assert not list(folder.glob("model*.safetensors"))
    trained = sum(p.nbytes for p in whole.model.parameters() if p.requires_grad)
    assert (folder / DELTAS_NAME).stat().st_size <= trained + 4096
    assert (folder / "optimizer.pt").stat().st_size <= 2 * trained + 8192

    whole.save_model()
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "final", dtype="auto")
    assert final.dtype == dtype and type(final) is type(whole.model)
    base = tiny_moe(kind, dropout=0.2).to(dtype)
    before = base.state_dict()
    frozen = {name: tensor.clone() for name, tensor in before.items() if "experts" not in name}
    assert all(torch.equal(final.state_dict()[name], tensor) for name, tensor in frozen.items())
    load_expert_deltas(base, folder)
    assert all(torch.equal(final.state_dict()[name], tensor) for name, tensor in base.state_dict().items())


def test_best_model_is_loaded_from_its_deltas(tmp_path):
    fields = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 0.5}
    args = arguments(
        tmp_path, scope="selected", expert_selection=CHOICE, max_steps=6, save_strategy="steps", save_steps=3, **fields
    )
    trainer = MoETrainer(tiny_moe("mixtral"), args, train_dataset=rows(28), eval_dataset=rows(4))
    trainer.train()
    best = tiny_moe("mixtral")
    load_expert_deltas(best, trainer.state.best_model_checkpoint)
    assert all(torch.equal(trainer.model.state_dict()[name], tensor) for name, tensor in best.state_dict().items())


def test_selection_is_read_from_a_file_and_misfits_are_refused(tmp_path):
    ExpertSelection(CHOICE).save(tmp_path / "selection.json")
    trainer, _ = train("ours", tmp_path / "run", expert_selection=str(tmp_path / "selection.json"), max_steps=3)
    assert trainer.scope_report.scope == "selected" and len(trainer.scope_report.names) == 4
    for fields, message in (
        ({"scope": "moe"}, "for the scopes selected"),
        ({"expert_selection": None}, "needs expert_selection"),
        ({"expert_selection": {"0": [2]}}, "other experts"),
        ({"scope": "experts", "expert_selection": None}, "the scope selected"),
    ):
        with pytest.raises(MoEError, match=message):
            train("ours", tmp_path / "other", resume=str(tmp_path / "run" / "checkpoint-3"), **fields)
    train("ours", tmp_path / "moe", scope="moe", expert_selection=None, max_steps=3)
    with pytest.raises(MoEError, match="without the scope selected"):
        train("ours", tmp_path / "other", resume=str(tmp_path / "moe" / "checkpoint-3"))


def test_programs_take_a_selection_from_the_command_line_and_from_a_recipe(tmp_path):
    parser = MoEArgumentParser([FinetuneArguments])
    common = ["--output_dir", str(tmp_path), "--scope", "selected"]
    (args,) = parser.parse([*common, "--expert_selection", "selection.json"])
    assert args.expert_selection == "selection.json"
    (tmp_path / "recipe.yaml").write_text("expert_selection: {experts: {0: [1]}}\n")
    (args,) = MoEArgumentParser([FinetuneArguments]).parse([*common, "--config", str(tmp_path / "recipe.yaml")])
    assert ExpertSelection.load(args.expert_selection).experts == {"0": (1,)}


def two_processes(folder: Path) -> None:
    """One run of this process group, and its scores of two halves of a text; the main process writes `results.pt`."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = {}
    for kind in KINDS:
        trainer, gradients = train(kind, folder / kind, dropout=0.0, per_device_train_batch_size=1)
        checkpoint = str(folder / kind / "checkpoint-3")
        again, _ = train(kind, folder / f"{kind}_again", dropout=0.0, per_device_train_batch_size=1, resume=checkpoint)
        results[kind] = {
            "wrapper": type(trainer.model_wrapped).__name__,
            "processes": trainer.accelerator.num_processes,
            "gradients": gradients,
            "weights": dict(trainer.model.state_dict()),
            "resumed": dict(again.model.state_dict()),
        }
        results[f"scores_{kind}"] = score_experts(tiny_moe(kind), [{"input_ids": random_ids(4)[rank::world_size]}])
    results["world_size"], results["backend"] = torch.distributed.get_world_size(), torch.distributed.get_backend()
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def relative(actual, expected):
    assert actual.keys() == expected.keys()
    return max(float((actual[k] - v).norm() / v.norm().clamp_min(1e-12)) for k, v in expected.items())


def test_two_processes_train_and_score_as_one(tmp_path):
    launch(torchrun("tests.trainer.test_selected_training", str(tmp_path)))
    results = torch.load(tmp_path / "results.pt", weights_only=False)
    assert (results["world_size"], results["backend"]) == (2, "gloo")
    for kind in KINDS:
        two = results[kind]
        one, gradients = train(kind, tmp_path / f"one_{kind}", dropout=0.0)
        assert (two["processes"], two["wrapper"]) == (2, "DistributedDataParallel")
        assert relative(two["gradients"], gradients) <= 1e-6
        assert relative(two["weights"], one.model.state_dict()) <= 2e-6
        assert all(torch.equal(two["resumed"][name], tensor) for name, tensor in two["weights"].items())
        scores = score_experts(tiny_moe(kind), [{"input_ids": random_ids(4)}])
        assert torch.equal(results[f"scores_{kind}"].token_share, scores.token_share)
        torch.testing.assert_close(results[f"scores_{kind}"].gate_score, scores.gate_score, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_ones_own_trains_the_chosen_experts(kind):
    from accelerate import Accelerator

    model = tiny_moe(kind)
    report = apply_scope(model, "selected", expert_selection=CHOICE)
    blocks = list(find_moe_blocks(model))
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    history = []
    for _ in range(5):
        loss = prepared(random_ids(), labels=random_ids()).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert history[-1] < history[0]
    parts = ("gate_up_proj", "down_proj")
    assert set(report.names) == {f"{blocks[int(i)]}.experts.selected.{part}" for i in CHOICE for part in parts}


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
