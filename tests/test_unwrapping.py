"""Whatever a model is wrapped in, every function takes the model inside, or says in one sentence why not."""

import copy
import inspect

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PrefixTuningConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

import moe_hf
from moe_hf import MoEError
from moe_hf.reporting.card import model_card
from moe_hf.unwrapping import has_peft_layers, unwrapped
from tests.tiny_models import random_ids, tiny_dense


# PEFT reads a deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = random_ids(2, 7)
LORA = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def dense():
    return tiny_dense("llama")


@pytest.fixture(scope="module")
def moe(dense):
    return moe_hf.upcycle(dense, num_experts=4, noise=0.1)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    """As `add_adapter` of transformers does it, which asks for a newer PEFT in some versions."""
    return inject_adapter_in_model(LORA, model)


def prepared(model):
    """As Accelerate's prepare leaves a model in one process under bf16."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        return Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model, evaluation_mode=True)
    finally:
        AcceleratorState._reset_state(True)


def compiled_regions(model):
    from accelerate.utils import compile_regions

    return compile_regions(model, backend="eager")


PLAIN = {
    "compiled": compiled,
    "DataParallel": DataParallel,
    "compiled, parallel": lambda model: DataParallel(compiled(DataParallel(model))),
    "compiled regions": compiled_regions,
    "prepared": prepared,
}
WITH_PEFT = {
    "PEFT": lambda model: get_peft_model(model, LORA),
    "in place": in_place,
    "PEFT, compiled": lambda model: compiled(get_peft_model(model, LORA)),
    "modules_to_save": lambda model: get_peft_model(
        model, LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=["lm_head"])
    ),
}


@pytest.mark.parametrize("wrap", [*PLAIN.values(), *WITH_PEFT.values()], ids=[*PLAIN, *WITH_PEFT])
def test_the_model_inside_is_found_and_adapters_are_noticed(wrap, dense):
    model = copy.deepcopy(dense)
    given = wrap(model)
    assert unwrapped(given) is model
    assert has_peft_layers(model) == (wrap in WITH_PEFT.values())


def test_wrapped_for_several_processes(one_process, dense):
    model = copy.deepcopy(dense)
    parallel = DistributedDataParallel(model)
    assert unwrapped(compiled(parallel)) is model
    with pytest.raises(MoEError, match="DistributedDataParallel already"):
        unwrapped(parallel, changes_parameters=True)
    flat = FullyShardedDataParallel(copy.deepcopy(dense), device_id=torch.device("cpu"))
    with pytest.raises(MoEError, match="FSDP1"):
        unwrapped(flat)


def test_what_has_no_plain_model_inside_is_refused_in_a_sentence(dense):
    prompt = get_peft_model(copy.deepcopy(dense), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(MoEError, match="prompt"):
        unwrapped(prompt)
    part = copy.deepcopy(dense)
    part.model.layers[1] = compiled(part.model.layers[1])
    with pytest.raises(MoEError, match=r"model.layers.1 was compiled apart"):
        unwrapped(part)
    for other in (None, 3, "a-folder", (dense, "tokenizer")):
        with pytest.raises(MoEError, match="give the model itself"):
            unwrapped(other)
    with pytest.raises(MoEError, match="no model of transformers"):
        unwrapped(nn.Linear(2, 2), or_path=True)


def logits(model):
    with torch.no_grad():
        return unwrapped(model)(IDS).logits  # a wrapper runs what is inside, and compiling takes seconds


def numbers(model):
    """All parameters, in an order that names of adapters do not change."""
    return [parameter.detach().clone() for _, parameter in sorted(model.named_parameters())]


def adapted(model):
    return moe_hf.add_expert_lora(model, moe_hf.ExpertLoraConfig(r=2, alpha=4))


def merged(model):
    adapted(model)
    for name, parameter in unwrapped(model).named_parameters():
        if name.endswith("_B"):
            nn.init.constant_(parameter, 0.1)
    moe_hf.merge_expert_lora(model)
    moe_hf.unmerge_expert_lora(model)
    moe_hf.merge_expert_lora(model, unload=True)
    return logits(model)


def selected(model):
    layers = {"1": [0, 2]}
    return moe_hf.apply_scope(model, "selected", expert_selection={"experts": layers}).names


def merged_selection(model):
    selected(model)
    moe_hf.merge_selected_experts(model)
    return numbers(unwrapped(model))


def stored(model):
    moe_hf.quantize_experts(model, "int8")
    moe_hf.offload_experts(model, 1)
    hits = moe_hf.cache_report(model).hits
    return list(hits.values()), numbers(unwrapped(moe_hf.restore_experts(model)))


def through_files(model, folder):
    moe_hf.save_expert_lora(adapted(model), folder)
    moe_hf.remove_expert_lora(model)
    return [float(p.detach().sum()) for p in unwrapped(moe_hf.load_expert_lora(model, folder)).parameters()]


def deltas(model, folder):
    selected(model)
    path = moe_hf.save_expert_deltas(model, folder / "deltas.safetensors")
    return moe_hf.load_expert_deltas(model, path).experts


def trained(model, folder):
    moe_hf.apply_scope(model, "router")
    moe_hf.load_trained(model, moe_hf.save_trained(model, folder))
    return numbers(unwrapped(model))


def counted(model):
    handles = moe_hf.start_counting(model)
    unwrapped(model).train()(IDS)
    moe_hf.update_router_state(model)
    return len(handles)


def router_losses(model):
    losses = moe_hf.RouterLosses(model, router_aux_loss_coef=1.0)
    unwrapped(model).train()(IDS)
    return list(losses.reported.values())


def batches():
    return [{"input_ids": IDS}]


KEPT, REFUSED = "the adapters of PEFT stay", "the adapters of PEFT would be lost"
# By public name: a call, of a MoE unless the name is in OF_DENSE, as values to compare; and what PEFT in it means.
CALLS = {
    "RouterLosses": (lambda model, folder: router_losses(model), KEPT),
    "add_expert_dropout": (lambda model, folder: len(moe_hf.add_expert_dropout(model, 0.5)), KEPT),
    "add_expert_lora": (lambda model, folder: logits(adapted(model)), KEPT),
    "add_experts": (lambda model, folder: numbers(moe_hf.add_experts(model, [0])), REFUSED),
    "apply_scope": (lambda model, folder: moe_hf.apply_scope(model, "experts").names, KEPT),
    "cache_report": (lambda model, folder: stored(model), KEPT),
    "check_finite": (lambda model, folder: moe_hf.check_finite(model, 1), KEPT),
    "drop_layers": (lambda model, folder: numbers(moe_hf.drop_layers(model, [1])), REFUSED),
    "grow_experts": (lambda model, folder: numbers(moe_hf.grow_experts(model)), REFUSED),
    "inspect_model": (lambda model, folder: moe_hf.inspect_model(model).active_parameters, KEPT),
    "load_expert_deltas": (deltas, KEPT),
    "load_expert_lora": (through_files, KEPT),
    "load_trained": (trained, KEPT),
    "merge_expert_lora": (lambda model, folder: merged(model), KEPT),
    "merge_selected_experts": (lambda model, folder: merged_selection(model), KEPT),
    "model_bytes": (lambda model, folder: moe_hf.model_bytes(model).in_memory, KEPT),
    "model_card": (lambda model, folder: str(model_card(model)), KEPT),
    "parameter_groups": (
        lambda model, folder: [len(group["params"]) for group in moe_hf.parameter_groups(model, 1e-3)],
        KEPT,
    ),
    "probe_routing": (lambda model, folder: moe_hf.probe_routing(model, IDS).entropy, KEPT),
    "remove_experts": (lambda model, folder: numbers(moe_hf.remove_experts(model, [1])), REFUSED),
    "replace_experts": (lambda model, folder: numbers(moe_hf.replace_experts(model, {1: 0})), REFUSED),
    "routing_statistics": (
        lambda model, folder: moe_hf.routing_statistics(model, batches()).layers[0].load,
        KEPT,
    ),
    "save_low_memory": (
        lambda model, folder: numbers(moe_hf.load_low_memory(moe_hf.save_low_memory(model, folder / "low"))),
        REFUSED,
    ),
    "score_experts": (lambda model, folder: moe_hf.score_experts(model, batches()).gate_score, KEPT),
    "start_counting": (lambda model, folder: counted(model), KEPT),
    "to_dense": (lambda model, folder: numbers(moe_hf.to_dense(model)), REFUSED),
    "verify": (lambda model, folder: moe_hf.verify(model, model).relative_error, KEPT),
    "extract_experts": (lambda model, folder: numbers(moe_hf.extract_experts(model, task=1)), REFUSED),
    "DomainMixture": (lambda model, folder: moe_hf.DomainMixture(model)(IDS).log_probs, KEPT),
    "upcycle": (lambda model, folder: numbers(moe_hf.upcycle(model, num_experts=2)), REFUSED),
}
SAME_CALL = {
    "cache_report": ("offload_experts", "quantize_experts", "restore_experts"),
    "load_expert_deltas": ("save_expert_deltas",),
    "load_expert_lora": ("save_expert_lora", "remove_expert_lora"),
    "load_trained": ("save_trained",),
    "merge_expert_lora": ("unmerge_expert_lora",),
    "start_counting": ("update_router_state",),
}
# Those that are handed the model as part of something else, and those that only go through its modules.
OTHERS = {"ExpertScores", "MoETrainer", "leave_idle_experts_alone", "update_correction_bias"}
BY_TASK = ("extract_experts", "DomainMixture")


@pytest.fixture(scope="module")
def by_task(dense):
    groups = {"task": [[0, 1], [2, 3]]}
    return moe_hf.upcycle(dense, num_experts=4, num_experts_per_tok=2, noise=0.1, expert_groups=groups)


def test_the_table_has_every_public_function_that_takes_a_model():
    takes_one = {
        name
        for name in moe_hf.__all__
        if name != "MoEError" and {"model", "dense", "moe"} & set(inspect.signature(getattr(moe_hf, name)).parameters)
    }
    assert takes_one - set(CALLS) - {other for names in SAME_CALL.values() for other in names} == OTHERS


def assert_alike(found, expected, tolerance):
    if isinstance(expected, torch.Tensor | float):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    elif isinstance(expected, list | tuple):
        for own, other in zip(found, expected, strict=True):
            assert_alike(own, other, tolerance)
    else:
        assert found == expected


@pytest.mark.parametrize("name", CALLS)
def test_a_wrapped_model_is_what_is_in_it(name, dense, moe, by_task, tmp_path):
    call, with_peft = CALLS[name]
    model = {"upcycle": dense, **dict.fromkeys(BY_TASK, by_task)}.get(name, moe)
    expected = call(copy.deepcopy(model), tmp_path / "plain")
    for kind in ("compiled, parallel", "prepared"):
        found = call(PLAIN[kind](copy.deepcopy(model)), tmp_path / kind)
        # What runs the model as it was prepared runs in bfloat16.
        assert_alike(found, expected, 0.2 if kind == "prepared" else 1e-6)
    adapter = WITH_PEFT["PEFT"](copy.deepcopy(model))
    if with_peft == REFUSED:
        before = numbers(adapter)
        with pytest.raises(MoEError, match=r"merge_and_unload\(\)"):
            call(adapter, tmp_path / "PEFT")
        torch.testing.assert_close(numbers(adapter), before, rtol=0, atol=0)
        adapter = adapter.merge_and_unload()
    call(adapter, tmp_path / "PEFT")


def test_what_reads_folders_refuses_a_model_in_a_sentence(moe, tmp_path):
    calls = [
        lambda: moe_hf.upcycle_checkpoint(moe, tmp_path / "out"),
        lambda: moe_hf.plan_upcycling(moe),
        lambda: moe_hf.plan_training(moe),
        lambda: moe_hf.export_native(moe, tmp_path / "out"),
        lambda: moe_hf.import_native(moe, tmp_path / "out"),
        lambda: moe_hf.load_low_memory(moe),
        lambda: moe_hf.push_folder(moe, "me/mine"),
    ]
    for call in calls:
        with pytest.raises(MoEError, match="where a folder or a Hub id is read"):
            call()
    assert list(tmp_path.iterdir()) == []
