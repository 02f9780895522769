"""Training in every layout on two gloo processes: what it computes, saves, resumes, and refuses."""

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_hf import MoEError
from moe_hf.finetuning import save_expert_lora
from moe_hf.finetuning.lora_files import LORA_NAME
from moe_hf.trainer.checkpoints import newest_whole_checkpoint
from moe_hf.trainer.layouts import check_launch, choose_layout, describe_layout
from tests.processes import Cases, shared_folder
from tests.trainer.layout_runs import (
    KINDS,
    LORA,
    MODES,
    SHARDED,
    all_cases,
    build,
    evaluated,
    lora,
    starved,
    steps,
    summary,
    trainer_of,
)
from tests.trainer.runs import BIASED, GLOBAL_BATCH, correction_biases


# Models of transformers are run by `make test` where their experts are sharded, and everywhere by `make test-all`.
QUICK = ("ddp-ours", "fsdp-ours", "ep_fsdp-ours", "tp-ours", "tp_ep-ours", "ep_fsdp-mixtral", "tp-qwen3_moe")
SLOW = pytest.mark.slow
WRAPPERS = {
    "ddp": "DistributedDataParallel", "fsdp": "FSDP{}", "ep_fsdp": "FSDP{}", "tp": "{}", "tp_ep": "{}",
}  # fmt: skip
CLASSES = {"ours": "MoEForCausalLM", "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


def chosen(names: list[str], quick: tuple[str, ...]) -> list:
    """Parameters of a test, those that are not in `quick` marked slow."""
    return [pytest.param(name, marks=() if name in quick else SLOW, id=name) for name in names]


EVERYWHERE = chosen([f"{mode}-{kind}" for mode in MODES for kind in KINDS], QUICK)
LORA_QUICK = ("ddp-ours", "ep_fsdp-ours", "tp_ep-ours")
IN_SHARDS = chosen(SHARDED, ("ep_fsdp", "tp"))


def is_quick(case: str) -> bool:
    what, _, where = case.partition("-")
    if what in ("resume", "steps"):
        return where in QUICK
    if what in ("lora", "upcycled"):
        return what == "upcycled" or where in LORA_QUICK
    return case in ("async-ddp", "reshard-ours") or what in ("kept", "parts", "evaluated", "refusals", "fails", "unclipped", "plugin") or (
        what != "reshard" and where in ("ep_fsdp", "tp")
    )  # fmt: skip


class TwoLaunches:
    """The cases of `make test` in one launch of two processes, the slow ones in another."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._launches = {}
        for quick in (True, False):
            names = [name for name in all_cases() if is_quick(name) == quick]
            (folder / str(quick)).mkdir(exist_ok=True)
            self._launches[quick] = Cases("tests.trainer.layout_runs", folder / str(quick), arguments=names)

    def __getitem__(self, name: str):
        return self._launches[is_quick(name)][name]

    def folder_of(self, name: str) -> Path:
        return self.folder / str(is_quick(name)) / name


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> TwoLaunches:
    return TwoLaunches(shared_folder(tmp_path_factory, "layouts"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same four steps in one process, by their arguments."""
    known = {}

    def run(kind: str, **fields) -> dict:
        key = (kind, str(fields))
        if key not in known:
            known[key] = steps(kind, "alone", tmp_path_factory.mktemp("alone"), **fields)
        return known[key]

    return run


@pytest.fixture(scope="module")
def adapted_alone(tmp_path_factory):
    """The run of adapters in one process, by the kind of model."""
    return cache(lambda kind: lora(kind, "alone", tmp_path_factory.mktemp("adapted")))


def relative(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert actual.keys() == expected.keys()
    return max(float((actual[k] - v).norm() / v.norm().clamp_min(1e-12)) for k, v in expected.items())


def bitwise(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[k], v) for k, v in expected.items())


def assert_layout(found: dict, mode: str, kind: str = "ours") -> None:
    assert found["num_processes"] == 2
    assert found["wrapper"] == WRAPPERS[mode].format(CLASSES[kind])
    assert found["is_sharded"] == (mode != "ddp")


@pytest.mark.parametrize("case", EVERYWHERE)
def test_steps_of_two_processes_are_those_of_one(case, cases, alone):
    mode, _, kind = case.partition("-")
    two, one = cases[f"steps-{case}"], alone(kind)
    assert_layout(two, mode, kind)
    assert relative(two["weights"], one["weights"]) <= 2e-6
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    # Clipped, by a norm over several meshes.
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-5)
    assert min(one["norms"]) > 0.05


@pytest.mark.parametrize("case", EVERYWHERE)
def test_frozen_parameters_do_not_change(case, cases):
    mode, _, kind = case.partition("-")
    found, before = cases[f"steps-{case}"], build(kind).state_dict()
    frozen = [name for name in before if name not in found["with_gradient"]]
    assert frozen and all(torch.equal(found["weights"][name], before[name]) for name in frozen)
    assert all(not torch.equal(found["weights"][name], before[name]) for name in found["with_gradient"])


def test_fsdp_equals_ddp_bitwise(cases):
    # Without clipping, whose norm adds up in another order.
    ddp, fsdp = cases["unclipped-ddp"], cases["unclipped-fsdp"]
    assert_layout(fsdp, "fsdp")
    assert fsdp["losses"] == ddp["losses"]
    assert bitwise(fsdp["weights"], ddp["weights"])


@pytest.mark.parametrize("mode", IN_SHARDS)
@pytest.mark.parametrize(
    ("what", "model_fields"), [("accumulated", {}), ("biased", BIASED), ("global_batch", GLOBAL_BATCH)]
)
def test_what_looks_at_a_whole_step_sees_all_processes(what, model_fields, mode, cases, alone):
    fields = {"gradient_accumulation_steps": 2} if what == "accumulated" else {"model_fields": model_fields}
    two, one = cases[f"{what}-{mode}"], alone("ours", **({} if what == "accumulated" else fields))
    assert_layout(two, mode)
    assert relative(two["weights"], one["weights"]) <= 2e-6
    biases = correction_biases(one["weights"])
    assert len(biases) == (2 if what == "biased" else 0)
    assert all(torch.equal(two["weights"][name], bias) for name, bias in biases.items())


@pytest.mark.parametrize("mode", IN_SHARDS)
def test_process_that_gets_no_token_takes_part(mode, cases, tmp_path):
    found, one = cases[f"starved-{mode}"], starved("alone", tmp_path)
    assert_layout(found, mode)
    assert found["gradients"].keys() == set(found["with_gradient"])
    assert relative(found["gradients"], one["gradients"]) <= 1e-6
    # Experts 2 and 3, the second process's.
    assert all(not g[2:].any() and g[:2].any() for name, g in one["gradients"].items() if ".experts." in name)


@pytest.mark.parametrize("mode", MODES)
def test_upcycled_model_that_is_distributed_in_memory_computes_the_dense_one(mode, cases):
    assert cases[f"upcycled-{mode}"] <= 1e-6


ADAPTED = chosen([f"{mode}-{kind}" for mode in MODES if mode != "tp" for kind in KINDS], LORA_QUICK)


@pytest.mark.parametrize("case", ADAPTED)
def test_adapters_of_experts_train_as_in_one_process_and_resume(case, cases, adapted_alone):
    mode, _, kind = case.partition("-")
    two, one = cases[f"lora-{case}"], adapted_alone(kind)
    assert_layout(two, mode, kind)
    assert relative(two["adapters"], one["adapters"]) <= 3e-6
    assert two["losses"][0] == pytest.approx(one["losses"][0], rel=1e-6)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-6) and min(one["norms"]) > 0.05
    assert two["losses"][1] == two["losses"][0]
    assert bitwise(two["adapters_again"], two["adapters"])
    assert two["frozen_is_equal"] and "model.safetensors" not in two["files"]


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "ep_fsdp"])
def test_what_trains_beside_adapters_is_in_the_checkpoint_of_each_layout(mode, cases):
    found = cases[f"kept-{mode}"]
    assert found["num_processes"] == 2
    assert found["files"] == ["expert_lora.safetensors", "trained_parameters.safetensors"]
    assert found["moved"] == found["trains"] and any(name.endswith("gate.weight") for name in found["moved"])
    assert any("q_proj.lora_B" in name for name in found["moved"]) == (mode == "ddp")
    assert bitwise(*found["weights"])


def test_adapters_go_on_in_other_layouts_where_their_places_are_the_same(cases, adapted_alone, tmp_path):
    one, folders = adapted_alone("ours"), {m: cases.folder_of(f"lora-{m}-ours") / "whole" for m in ("ddp", "ep_fsdp")}
    assert cases["lora-ddp-ours"]["frozen_is_equal"] and cases["lora-ep_fsdp-ours"]["frozen_is_equal"]
    fields = LORA | {"max_steps": 6, "max_grad_norm": 0.05, "gradient_accumulation_steps": 2}
    again = trainer_of(build("ours"), tmp_path / "again", "alone", **fields)
    again.train(resume_from_checkpoint=str(folders["ddp"] / "checkpoint-3"))
    save_expert_lora(again.model, tmp_path)
    assert relative(load_file(tmp_path / LORA_NAME), one["adapters"]) <= 3e-6
    other = trainer_of(build("ours"), tmp_path / "other", "alone", **fields)
    with pytest.raises(MoEError, match="in other places .fsdp_size=2, ep_size=2"):
        other.train(resume_from_checkpoint=str(folders["ep_fsdp"] / "checkpoint-3"))


@pytest.mark.parametrize("case", EVERYWHERE)
def test_three_plus_three_steps_are_six(case, cases):
    mode, _, kind = case.partition("-")
    found = cases[f"resume-{case}"]
    whole, again = found["whole"], found["again"]
    assert_layout(again, mode, kind)
    assert again["losses"] == whole["losses"] and len(whole["losses"]) == 6
    assert bitwise(again["weights"], whole["weights"])
    rates, rates_again = found["rates"]
    assert rates == rates_again and len(set(rates)) == 6


@pytest.mark.parametrize("case", EVERYWHERE)
def test_checkpoint_is_a_plain_folder_of_the_whole_model(case, cases):
    assert cases[f"resume-{case}"]["saved_is_equal"]


def test_model_that_accelerate_shards_is_saved_and_resumed_alike(cases):
    found, usual = cases["plugin"], cases["resume-ddp-ours"]
    assert found["again"]["wrapper"] == "FSDPMoEForCausalLM" and found["again"]["num_processes"] == 2
    assert bitwise(found["again"]["weights"], found["whole"]["weights"]) and found["saved_is_equal"]
    assert relative(found["whole"]["weights"], usual["whole"]["weights"]) <= 2e-6
    assert "both shard the model" in found["together"]


@pytest.mark.parametrize("mode", [pytest.param("ddp", id="ddp"), *IN_SHARDS])
def test_checkpoints_written_beside_training_are_the_same(mode, cases):
    found, usual = cases[f"async-{mode}"], cases[f"resume-{mode}-ours"]
    assert found["saved_is_equal"]
    assert bitwise(found["again"]["weights"], usual["whole"]["weights"])
    assert found["again"]["losses"] == usual["whole"]["losses"]


@pytest.mark.parametrize("kind", chosen(list(KINDS), ("ours",)))
def test_run_goes_on_in_other_layouts_and_in_one_process(kind, cases, tmp_path):
    two = cases[f"reshard-{kind}"]
    assert len(set(two["words"])) == 4
    fields = {"max_steps": 12, "lr_scheduler_type": "constant"}
    whole = trainer_of(build(kind), tmp_path / "whole", "alone", **fields)
    whole.train()
    last = trainer_of(build(kind), tmp_path / "last", "alone", **fields)
    last.train(resume_from_checkpoint=two["checkpoint"])
    assert last.state.global_step == 12
    assert relative(last.model.state_dict(), whole.model.state_dict()) <= 2e-6
    assert summary(last)["losses"] == pytest.approx(summary(whole)["losses"], rel=1e-5)


def test_checkpoint_of_shards_goes_on_in_one_process(cases, tmp_path):
    # The folder with the parts of two processes, in the place of the one file.
    folder = cases.folder_of("masters-ep_fsdp") / "whole" / "checkpoint-2"
    expected = cases["masters-ep_fsdp"]["whole"]
    assert (folder / "optimizer" / ".metadata").is_file() and not (folder / "optimizer.pt").exists()
    again = trainer_of(build("ours").bfloat16(), tmp_path, "alone", max_steps=4)
    again.train(resume_from_checkpoint=str(folder))
    # bf16 products differ with the number of rows.
    assert relative(again.model.state_dict(), expected["weights"]) <= 2e-2
    assert again.state.global_step == 4


@pytest.mark.parametrize("mode", IN_SHARDS)
def test_float32_masters_of_a_bf16_model_are_resumed_and_saved_in_bf16(mode, cases):
    found = cases[f"masters-{mode}"]
    assert_layout(found["whole"], mode)
    assert found["trained_dtypes"] == {"torch.float32"} and found["autocast"] == "bf16"
    assert bitwise(found["again"]["weights"], found["whole"]["weights"])
    assert found["config_dtype"] == "torch.bfloat16"
    rounded = {name: tensor.bfloat16() for name, tensor in found["whole"]["weights"].items()}
    assert bitwise(found["final"], rounded)


@pytest.mark.parametrize("mode", ["ep_fsdp", "tp"])
def test_model_loaded_in_parts_trains_and_is_saved_as_it_came(mode, cases):
    found = cases[f"parts-{mode}"]
    assert_layout(found, mode)
    assert all(tensor.dtype == torch.bfloat16 for tensor in found["final"].values())
    assert bitwise(found["final"], {name: tensor.bfloat16() for name, tensor in found["weights"].items()})
    assert "cannot become a float32 master" in found["late"]
    assert "sharded already" in found["differs"]


@pytest.mark.parametrize("mode", ["ep_fsdp", "tp"])
def test_evaluation_counts_each_row_once(mode, cases, tmp_path):
    assert cases[f"evaluated-{mode}"] == pytest.approx(evaluated("alone", tmp_path), rel=1e-5)


@pytest.mark.parametrize("case", ["ddp", "ep_fsdp", "async"])
def test_save_that_one_process_cannot_finish_fails_in_all_and_leaves_nothing(case, cases):
    found = cases[f"fails-{case}"]
    assert all("No space left on device" in message for message in found["messages"])
    assert "Process 1 failed" in found["messages"][0]
    assert found["left"] == ["checkpoint-1"]


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing", "no manifest"])
def test_damaged_part_of_a_sharded_optimizer_is_noticed(fault, cases, tmp_path):
    assert cases["resume-ep_fsdp-ours"]["saved_is_equal"]
    for step in (3, 6):
        source = cases.folder_of("resume-ep_fsdp-ours") / "whole" / f"checkpoint-{step}"
        shutil.copytree(source, tmp_path / source.name)
    part = tmp_path / "checkpoint-6" / "optimizer" / "__1_0.distcp"
    content = bytearray(part.read_bytes())
    if fault in ("missing", "no manifest"):
        (part if fault == "missing" else tmp_path / "checkpoint-6" / "moe_hf_manifest.json").unlink()
    else:
        content[len(content) // 2] ^= 1
        part.write_bytes(content if fault == "flipped" else content[:-9])
    assert newest_whole_checkpoint(tmp_path).name == "checkpoint-3"


REFUSED = {
    **{f"selected, {mode}": "trains in one process or with DDP" for mode in SHARDED},
    "adapters, tp": "which adapters do not follow",
    "frozen after wrapping": "after the model was wrapped",
    "scope of a wrapped model": "before it is wrapped",
    "wrapped already": "wrapped in DistributedDataParallel already",
    "separate experts": "ddp_find_unused_parameters=True",
    "separate experts, ep": "stacked in one tensor",
    "experts do not divide": "does not divide the 3 experts",
    "ours do not divide": "ep_size=3",
    "heads": "does not divide num_key_value_heads, 1",
    "heads of ours": "does not divide num_key_value_heads, 3",
    "processes": "needs 4 processes, and this run has 2",
    "no plan": "no tensor-parallel plan for 'gpt2'",
    "launched apart": "each would train alone",
    "unknown field": "Did you mean 'ep_size'",
    "pipeline": "pipeline parallelism",
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistake_is_refused_in_a_sentence(mistake, cases):
    assert REFUSED[mistake] in cases["refusals"][mistake]


@pytest.mark.parametrize(
    ("sizes", "world_size", "words"),
    [
        ({}, 4, "DDP over 4 processes"),
        ({"ep_size": 4}, 4, "fsdp_size=4, ep_size=4 over 4 processes"),
        ({"tp_size": 2}, 8, "fsdp_size=4, tp_size=2 over 8 processes"),
        ({"tp_size": 2, "ep_size": 8}, 8, "fsdp_size=4, tp_size=2, ep_size=8 over 8 processes"),
        ({"dp_replicate_size": 2, "ep_size": 4}, 8, "dp_replicate_size=2, fsdp_size=4, ep_size=4 over 8 processes"),
        ({"fsdp_size": 1}, 1, "one process"),
    ],
)
def test_sizes_that_are_not_asked_for_follow(sizes, world_size, words):
    assert describe_layout(choose_layout(sizes, None, world_size), world_size) == words


@pytest.mark.parametrize(
    ("sizes", "options", "world_size", "message"),
    [
        ({"fsdp_size": 2}, None, 1, "needs 2 processes, and this run has one process.*ACCELERATE_USE_CPU"),
        ({"tp_size": 3}, None, 4, "needs 3 processes"),
        ({"ep_size": 3}, None, 4, "ep_size=3 must"),
        ({"tp_size": 2, "ep_size": 1}, {"ep_size": 2}, 2, "Give it once"),
        ({"fsdp_size": 0}, None, 2, "whole number from 1"),
        ({}, {"enable_expert_parallel": True}, 2, "give ep_size"),
        ({}, {"fsdp_size": 2, "ep_plan": "all"}, 2, "transformers refuses"),
    ],
)
def test_layout_that_cannot_be_is_refused(sizes, options, world_size, message):
    with pytest.raises(MoEError, match=message):
        choose_layout(sizes, options, world_size)


def test_process_that_finds_itself_alone_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MoEError, match="2 processes were started, and this one found 1"):
        check_launch(1)
