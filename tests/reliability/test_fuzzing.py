"""Readers of what comes in from outside raise `MoEError` or succeed, whatever they are given, and change nothing on error.

Derandomised and small here; `MOE_HF_FUZZ_SECONDS=600` lets each test run for that long, in processor time, on new input.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import moe_hf
from moe_hf import MoEConfig, MoEError
from moe_hf.checksums import file_checksum, safetensors_header
from moe_hf.data import load_text
from moe_hf.finetuning import ExpertScores, ExpertSelection, score_experts
from moe_hf.inference import load_low_memory, quantize_experts, save_low_memory
from moe_hf.reporting.card_facts import training_facts
from moe_hf.resources import resource_path
from moe_hf.saving import MANIFEST_NAME, check_shard_index, verify_manifest, write_manifest
from moe_hf.trainer.arguments import DataArguments, FinetuneArguments, ModelArguments, MoEArgumentParser
from moe_hf.trainer.chats import ChatDataArguments, load_chats
from moe_hf.weight_checks import check_structure
from moe_hf.weight_files import CheckpointReader
from tests.reliability.mutations import JSON, damaged_safetensors, damaged_text, mutated, to_bytes
from tests.tiny_models import random_ids, tiny_config, tiny_native_moe


SECONDS = float(os.environ.get("MOE_HF_FUZZ_SECONDS", "0"))
DENSE = tiny_config("llama").to_dict()
OURS = MoEConfig(text_config=tiny_config("llama")).to_dict() | {"model_type": "moe_hf"}


def _run(strategy: st.SearchStrategy, test: Callable, examples: int = 60) -> None:
    """One round of examples, or rounds of new ones until the time is up: one long round would remember every example."""
    fuzzing = settings(
        max_examples=1000 if SECONDS else examples,
        derandomize=not SECONDS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    start, tried, refused = time.process_time(), 0, 0
    end = start + SECONDS

    def counted(example):
        nonlocal tried, refused
        # A round is not cut short by an exception, which would hide what the round has found and is making small.
        if not SECONDS or time.process_time() < end:
            tried += 1
            try:
                test(example)
            except MoEError:
                refused += 1

    try:
        fuzzing(given(strategy)(counted))()
        while time.process_time() < end:
            fuzzing(given(strategy)(counted))()
    finally:
        print(f"{tried:,} examples, {refused:,} refused, {time.process_time() - start:.0f} s of processor time")


@pytest.mark.timeout(0 if SECONDS else 900)
class TestReaders:
    def test_fields_of_a_configuration(self):
        fields = st.dictionaries(st.sampled_from(sorted(OURS)), JSON, min_size=1, max_size=3)
        given_fields = st.one_of(fields.map(lambda more: {"text_config": dict(DENSE)} | more), mutated(OURS))

        _run(given_fields, lambda fields: MoEConfig(**fields))

    def test_files_of_a_configuration(self, copy):
        ours = json.loads((copy / "config.json").read_text())

        def read(content):
            (copy / "config.json").write_bytes(content)
            check_structure(copy)

        _run(damaged_text(st.one_of(mutated(ours), mutated(ours), mutated(DENSE))), read)

    def test_indexes(self, tmp_path):
        shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for i, shard in enumerate(shards):
            save_file({f"a.{i}": torch.ones(2, 3), f"b.{i}": torch.ones(5)}, tmp_path / shard)
        weight_map = {f"{name}.{i}": shard for i, shard in enumerate(shards) for name in "ab"}

        def read(content):
            (tmp_path / "model.safetensors.index.json").write_bytes(content)
            check_shard_index(tmp_path)
            with CheckpointReader(tmp_path) as reader:
                assert {name: reader.read(name).shape for name in reader.tensors}.keys() <= weight_map.keys()

        _run(damaged_text(mutated({"metadata": {"total_size": 88}, "weight_map": weight_map}) | JSON), read)

    def test_manifests(self, tmp_path):
        (tmp_path / "inner").mkdir()
        (tmp_path / "inner" / "file").write_text("x")
        save_file({"a": torch.ones(2, 3)}, tmp_path / "model.safetensors")
        write_manifest(tmp_path)
        valid = json.loads((tmp_path / MANIFEST_NAME).read_text())

        def read(content):
            (tmp_path / MANIFEST_NAME).write_bytes(content)
            verify_manifest(tmp_path)

        _run(damaged_text(mutated(valid) | JSON), read)

    def test_weights(self, tmp_path):
        file = tmp_path / "model.safetensors"
        save_file({"a": torch.ones(2, 3), "b": torch.ones(5, dtype=torch.int8), "c": torch.ones(())}, file)

        def read(content):
            file.write_bytes(content)
            assert len(file_checksum(file)) == 1
            safetensors_header(file)
            with CheckpointReader(tmp_path) as reader:
                for name, spec in reader.tensors.items():
                    assert reader.read(name).nbytes == spec.nbytes <= len(content)

        _run(damaged_safetensors(file), read)

    def test_recipes(self, tmp_path):
        valid = yaml.safe_load(resource_path("training/recipes/finetune_moe.yaml").read_text())
        file, parser = tmp_path / "recipe.yaml", MoEArgumentParser((ModelArguments, DataArguments, FinetuneArguments))

        def read(content):
            file.write_bytes(to_bytes(content))
            parser.parse(["--config", str(file), "--output_dir", str(tmp_path)])

        scalars = st.sampled_from(
            ["2001-99-99", "!!python/object:x.Y {}", "!!int x", "1" * 5000, "&a [*a]", "{? [a] : b}"]
        )
        names = st.sampled_from(sorted(valid)) | st.text(max_size=8)
        lines = st.builds(lambda name, value: f"{name}: {value}\n", names, scalars | st.text(max_size=8))
        _run(st.one_of(mutated(valid), mutated(valid), st.text(), lines), read)

    def test_adapters_and_deltas(self, tmp_path):
        files = {kind: _saved_parts(kind, tmp_path / kind) for kind in ("moe_hf", "peft", "deltas")}
        model = tiny_native_moe("mixtral", num_hidden_layers=1)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        choices = []
        for file in (file for group in files.values() for file in group):
            is_json = file.suffix == ".json"
            content = damaged_text(mutated(json.loads(file.read_text()))) if is_json else damaged_safetensors(file)
            choices.append(st.tuples(st.just((file, file.read_bytes())), content))

        def read(example):
            (file, valid), content = example
            file.write_bytes(content)
            load = moe_hf.load_expert_deltas if file.parent.name == "deltas" else moe_hf.load_expert_lora
            try:
                load(model, file.parent)
                with suppress(MoEError):
                    moe_hf.remove_expert_lora(model)
                model.load_state_dict(before)
                model.requires_grad_(True)
            except MoEError:
                after = model.state_dict()
                assert after.keys() == before.keys(), "a refused file left adapters behind"
                assert all(torch.equal(after[name], before[name]) for name in before)
                assert all(parameter.requires_grad for parameter in model.parameters())
                raise
            finally:
                file.write_bytes(valid)

        _run(st.one_of(choices), read)

    def test_selections_scores_and_states(self, tmp_path):
        model = tiny_native_moe("mixtral", num_hidden_layers=1)
        scores = score_experts(model, [{"input_ids": random_ids()}])
        selection = {"experts": {"0": [1, 0]}, "shared_experts": False, "non_expert_modules": False}
        state = {"global_step": 3, "epoch": 0.5, "num_input_tokens_seen": 7, "log_history": [{"loss": 1.0}]}
        ours, theirs = scores.to_dict(), {"token_scores": {"0": {"0": 0.5, "1": 0.5}}}
        theirs["gate_scores"] = theirs["token_scores"]
        readers = [
            (selection, lambda file: ExpertSelection.load(file).resolve(model)),
            (ours, ExpertScores.load),
            (theirs, ExpertScores.load),
            (state, training_facts),
        ]
        file = tmp_path / "trainer_state.json"

        def read(example):
            reader, content = example
            file.write_bytes(content)
            reader(file)

        _run(st.one_of([st.tuples(st.just(r), damaged_text(mutated(valid))) for valid, r in readers]), read)

    def test_low_memory_folders(self, tmp_path):
        model, folder = tiny_native_moe("mixtral", num_hidden_layers=1), tmp_path / "int8"
        quantize_experts(model, "int8")
        save_low_memory(model, folder)
        files = {name: (folder / name).read_bytes() for name in ("low_memory.json", "config.json", MANIFEST_NAME)}
        weights = folder / "weights" / "model.safetensors"
        valid_weights = weights.read_bytes()
        changed = [
            damaged_text(mutated(json.loads(files[name]))).map(lambda c, name=name: {name: c}) for name in files
        ]
        changed.append(damaged_safetensors(weights).map(lambda content: {"weights/model.safetensors": content}))

        def read(example):
            for name, content in (files | {"weights/model.safetensors": valid_weights} | example).items():
                (folder / name).write_bytes(content)
            if MANIFEST_NAME not in example:
                # What was changed before the manifest was made.
                write_manifest(folder)
            load_low_memory(folder)

        _run(st.one_of(changed), read, examples=40)

    def test_lines_of_data(self, tmp_path, monkeypatch):
        datasets.disable_progress_bars()
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        text = {"text": "some words", "domain": "prose", "document": "a", "task_ids": 1}
        chat = {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]}
        file = tmp_path / "rows.jsonl"

        def read(example):
            as_chats, lines = example
            file.write_bytes(b"\n".join(lines) + b"\n")
            try:
                if as_chats:
                    load_chats(ChatDataArguments(dataset=str(file), held_out_share=0.5), ("messages",))
                else:
                    load_text(str(file))
            finally:
                shutil.rmtree(tmp_path / "cache", ignore_errors=True)

        def lines(valid):
            line = damaged_text(mutated(valid)).map(lambda text: text.replace(b"\n", b" ")) | st.just(to_bytes(valid))
            return st.lists(line, min_size=1, max_size=4)

        rows = st.tuples(st.just(False), lines(text)) | st.tuples(st.just(True), lines(chat))
        _run(rows, read, examples=20)


def _saved_parts(kind: str, folder: Path) -> list[Path]:
    """Adapters or deltas of a tiny Mixtral; the files of their folder."""
    model = tiny_native_moe("mixtral", num_hidden_layers=1)
    if kind == "deltas":
        moe_hf.apply_scope(model, "selected", expert_selection={"0": [1]})
        moe_hf.save_expert_deltas(model, folder / "expert_deltas.safetensors")
    else:
        moe_hf.save_expert_lora(moe_hf.add_expert_lora(model, moe_hf.ExpertLoraConfig(r=2)), folder, file_format=kind)
    return sorted(folder.iterdir())
