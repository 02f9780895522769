"""What fuzzing has found, one case each: damaged files of every kind are one clear error, and change nothing."""

import json

import pytest
import torch
from safetensors.torch import save_file

import moe_hf
from moe_hf import MoEConfig, MoEError
from moe_hf.checksums import safetensors_header
from moe_hf.data import load_text
from moe_hf.finetuning import ExpertScores, ExpertSelection
from moe_hf.finetuning.lora_config import ExpertLoraConfig
from moe_hf.inference import load_low_memory, quantize_experts, save_low_memory
from moe_hf.saving import MANIFEST_NAME, write_manifest
from moe_hf.trainer.arguments import FinetuneArguments, MoEArgumentParser
from moe_hf.trainer.chats import ChatDataArguments, load_chats
from moe_hf.weight_checks import check_structure
from tests.reliability.folders import changed_json
from tests.reliability.mutations import packed, unpacked
from tests.tiny_models import tiny_config, tiny_native_moe


@pytest.mark.parametrize(
    "fact",
    [
        {"shape": [2, 3], "data_offsets": [0, 24]},
        {"dtype": "F32", "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": "../x", "data_offsets": [0, 24]},
        {"dtype": {}, "shape": [2, 3], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]},
        3,
    ],
    ids=str,
)
def test_a_tensor_without_dtype_shape_and_place_is_no_header(fact, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(packed({"w": fact}, b"x" * 24))
    with pytest.raises(MoEError, match="no dtype, shape and place for 'w'"):
        safetensors_header(file)


@pytest.fixture(scope="module")
def model():
    return tiny_native_moe("mixtral", num_hidden_layers=1)


def _lora(folder, file_format="moe_hf"):
    model = tiny_native_moe("mixtral", num_hidden_layers=1)
    return moe_hf.save_expert_lora(
        moe_hf.add_expert_lora(model, ExpertLoraConfig(r=2)), folder, file_format=file_format
    )


def _rewrite(file, change):
    header, data = unpacked(file)
    change(header["__metadata__"]["facts"])
    file.write_bytes(packed(header, data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts.pop("config"), "cannot be read as adapters"),
        (lambda facts: facts.update(config=0), "does not describe an adapter"),
        (lambda facts: facts.update(experts=3), "no selection of experts"),
        (lambda facts: facts["config"].update(target=0), "does not describe an adapter"),
        (lambda facts: facts["config"].update(alpha="1"), "must be a number"),
        (lambda facts: facts["config"].update(rank_pattern=[]), "a map of 'layer.expert' to ranks"),
        (lambda facts: facts["config"].update(r=1 << 40), "their tensors are not"),
        (lambda facts: facts["config"].update(r=1 << 63), "their tensors are not"),
        (lambda facts: facts["config"].update(experts="/etc/hostname"), "are in the file"),
        (lambda facts: facts["config"].update(experts=3), "is no selection of experts"),
    ],
)
def test_adapters_that_say_something_impossible_are_refused_and_leave_the_model(change, message, model, tmp_path):
    _rewrite(_lora(tmp_path / "lora") / "expert_lora.safetensors", change)
    names = set(model.state_dict())
    with pytest.raises(MoEError, match=message):
        moe_hf.load_expert_lora(model, tmp_path / "lora")
    assert set(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"target_parameters": 5},
        {"target_parameters": [1]},
        {"lora_alpha": None},
        {"lora_alpha": ""},
        {"r": None},
        {"r": 1 << 63},
    ],
    ids=str,
)
def test_a_config_of_peft_with_values_of_other_types_is_refused(change, model, tmp_path):
    folder = _lora(tmp_path / "peft", "peft")
    changed_json(folder / "adapter_config.json", lambda config: config.update(change))
    with pytest.raises(MoEError):
        moe_hf.load_expert_lora(model, folder)


def test_a_selection_is_a_map_or_a_file(model):
    for source in (3, None, [1]):
        with pytest.raises(MoEError, match="no selection of experts"):
            ExpertSelection.load(source)


NANS = {"token_share": [0.5, float("nan")], "gate_score": [0.5, 0.5]}


@pytest.mark.parametrize("change", [{"num_tokens": float("inf")}, {"num_tokens": None}, {"layers": {"0": NANS}}])
def test_scores_that_are_no_numbers_are_refused(change, tmp_path):
    content = ExpertScores(("0",), torch.ones(1, 2), torch.ones(1, 2), (2,)).to_dict()
    (tmp_path / "scores.json").write_text(json.dumps(content | change))
    with pytest.raises(MoEError, match="holds no expert scores"):
        ExpertScores.load(tmp_path / "scores.json")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", lambda c: c.update(hidden_act=0)),
        ("config.json", lambda c: c.update(hidden_act=[])),
        ("config.json", lambda c: c.update(vocab_size=-6)),
        ("config.json", lambda c: c.update(pad_token_id=1 << 31)),
        ("config.json", lambda c: c.update(vocab_size=1 << 70)),
        ("config.json", lambda c: c.update(num_hidden_layers=1 << 40)),
        ("config.json", lambda c: c.update(model_type="none")),
        ("config.json", lambda c: c.update(dtype="")),
        ("config.json", lambda c: c.update(rope_parameters={"rope_theta": "x", "rope_type": "default"})),
        ("config.json", lambda c: c.update(num_key_value_heads=1)),
        ("low_memory.json", lambda c: c.update(experts=[])),
        ("low_memory.json", lambda c: c.update({"class": "Linear"})),
    ],
)
def test_a_low_memory_folder_that_says_something_impossible_is_refused(file, change, tmp_path):
    model = tiny_native_moe("mixtral", num_hidden_layers=1)
    quantize_experts(model, "int8")
    folder = save_low_memory(model, tmp_path / "int8")
    changed_json(folder / file, change)
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder)
    with pytest.raises(MoEError):
        load_low_memory(folder)


@pytest.mark.parametrize("architectures", [3, [[]], [{}], "MoEForCausalLM_"], ids=str)
def test_an_architecture_that_is_no_name_is_refused(architectures, copy):
    changed_json(copy / "config.json", lambda config: config.update(architectures=architectures))
    with pytest.raises(MoEError):
        check_structure(copy)


def test_a_recipe_whose_numbers_no_run_can_have_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"logging_steps": float("inf"), "output_dir": str(tmp_path)}))
    with pytest.raises(MoEError):
        MoEArgumentParser(FinetuneArguments).parse(["--config", str(recipe)])


def test_deltas_of_no_expert_are_refused(tmp_path):
    model = tiny_native_moe("mixtral", num_hidden_layers=1)
    moe_hf.apply_scope(model, "selected", expert_selection={"0": [1]})
    file = moe_hf.save_expert_deltas(model, tmp_path / "expert_deltas.safetensors")
    for experts in ([], {"model.layers.0.mlp": [[]]}, {"model.layers.0.mlp": 5}, {"model.layers.0.mlp": []}):
        _rewrite(file, lambda facts, experts=experts: facts.update(experts=experts))
        with pytest.raises(MoEError):
            moe_hf.load_expert_deltas(tiny_native_moe("mixtral", num_hidden_layers=1), file)


def test_weights_that_are_no_safetensors_file_are_named(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 8 + b"x")
    with pytest.raises(MoEError, match="cannot be read"):
        safetensors_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("ids", [("a", 1), (1, 2.5), (1, True), (-1, 1), (1, 1 << 40), (1, None)], ids=str)
def test_ids_of_documents_that_are_none_are_refused(ids, tmp_path):
    rows = [{"text": "some words", "task_ids": id_} for id_ in ids]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(MoEError, match=r"task_ids of document \d in 'rows.jsonl' is .*; it must be a whole number"):
        load_text(str(tmp_path / "rows.jsonl"))


def test_a_dtype_that_is_none_is_refused_by_a_configuration():
    with pytest.raises(MoEError, match="wrong type or value"):
        MoEConfig(text_config=tiny_config("llama").to_dict() | {"dtype": 1e308})


@pytest.mark.parametrize("column", ["text", "domain", "document", "messages"])
@pytest.mark.parametrize("value", [{"\0": None, "": None}, {"\0": ["a", False]}, {"\0": {}}], ids=str)
def test_rows_that_a_table_cannot_hold_are_refused(value, column, tmp_path):
    row = {"text": "a", "messages": [], "document": "a"} | {column: value}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    for read in (load_text, lambda file: load_chats(ChatDataArguments(dataset=file), ("messages",))):
        with pytest.raises(MoEError, match="Could not read .*rows.jsonl"):
            read(str(tmp_path / "rows.jsonl"))


def test_documents_of_chats_may_have_any_name(tmp_path):
    rows = [{"messages": [], "document": {"page": page}} for page in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ChatDataArguments(dataset=str(tmp_path / "rows.jsonl"))
    assert [len(part) for part in load_chats(arguments, ("messages",))] == [2, 1]


@pytest.mark.parametrize("content", ["null", "\ufeff null", '{"text": "a"}\nnull', '{"text": "a"}\r\tnullx'])
def test_rows_of_null_which_end_the_process_in_pyarrow_are_refused(content, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8", newline="")

    def chats(file):
        load_chats(ChatDataArguments(dataset=file), ("text",))

    for read, name in ((load_text, "rows.jsonl"), (chats, "rows.jsonl"), (chats, "*.jsonl")):
        with pytest.raises(MoEError, match=r"Line \d of .*rows.jsonl' begins with null"):
            read(str(tmp_path / name))
