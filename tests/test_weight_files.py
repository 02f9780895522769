"""Laws of `moe_hf.weight_files`: what transformers and safetensors write is read, and written byte for byte."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_hf import weight_writer
from moe_hf.checksums import file_checksum
from moe_hf.errors import MoEError
from moe_hf.weight_files import DTYPES, INDEX_NAME, CheckpointReader, TensorSpec
from moe_hf.weight_writer import FileWriter, StoredBytes, file_layouts, write_checkpoint
from tests.tiny_models import tiny_dense


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _every_dtype() -> dict[str, torch.Tensor]:
    tensors = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "name with spaces, \u00e9": torch.ones(3)}
    for number, (name, dtype) in enumerate(DTYPES.items()):
        raw = torch.randint(0, 2 if dtype == torch.bool else 255, (3, 5 + number, dtype.itemsize), dtype=torch.uint8)
        tensors[f"b.{name}"] = raw.view(dtype).squeeze(-1)
        tensors[f"a.{name}"] = raw[:1].clone().view(dtype).squeeze(-1)
    return tensors


def _specs(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _rows(tensor: torch.Tensor, step: int) -> list[torch.Tensor]:
    return list(tensor.split(step)) if tensor.dim() else [tensor]


def test_a_file_has_the_bytes_that_safetensors_writes(tmp_path):
    tensors = _every_dtype()
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_checkpoint(tmp_path, _specs(tensors), lambda name: _rows(tensors[name], 2))
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB", 30000])
def test_a_checkpoint_has_the_files_that_save_pretrained_writes(tmp_path, max_shard_size):
    model = tiny_dense("llama")
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model.save_pretrained(theirs, max_shard_size=max_shard_size)
    ours.mkdir()
    tensors, counted = dict(model.state_dict()), []
    write_checkpoint(
        ours,
        _specs(tensors),
        lambda name: _rows(tensors[name], 7),
        max_shard_size=max_shard_size,
        on_bytes=counted.append,
    )
    files = {file.name for file in theirs.iterdir() if "safetensors" in file.name}
    assert {file.name for file in ours.iterdir()} == files
    assert (len(files) > 1) == (max_shard_size != "5GB")
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in files)
    assert sum(counted) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
def test_each_tensor_and_any_rows_of_it_are_read_as_they_were_saved(tmp_path, max_shard_size):
    model = tiny_dense("gpt2")
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    with CheckpointReader(tmp_path) as reader:
        assert "lm_head.weight" not in reader.tensors
        for name, spec in reader.tensors.items():
            expected = model.get_parameter_or_buffer(name)
            assert (spec.dtype, spec.shape, spec.nbytes) == (expected.dtype, tuple(expected.shape), expected.nbytes)
            assert torch.equal(reader.read(name), expected)
            assert torch.equal(reader.read(name, 3, 11), expected[3:11])
            assert reader.read(name, 5, 5).shape == expected[5:5].shape


def test_each_dtype_is_read_as_it_was_saved(tmp_path):
    tensors = _every_dtype()
    save_file(tensors, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        assert reader.tensors == _specs(tensors)
        assert all(_bytes_of(reader.read(name)) == _bytes_of(tensor) for name, tensor in tensors.items())


def test_rows_and_names_that_are_not_there_are_refused(tmp_path):
    save_file({"a": torch.zeros(3, 5)}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        with pytest.raises(MoEError, match="it has 3"):
            reader.read("a", 1, 4)
        with pytest.raises(MoEError, match="no tensor 'b'"):
            reader.read("b")


def test_a_file_that_becomes_shorter_is_named(tmp_path):
    save_file({"a": torch.zeros(300, 5)}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        os.truncate(tmp_path / "model.safetensors", 200)
        with pytest.raises(MoEError, match="became shorter"):
            reader.read("a")


def test_the_file_without_an_index_wins_as_in_transformers(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with CheckpointReader(tmp_path) as reader:
        assert torch.equal(reader.read("a"), torch.ones(2))


def test_a_tensor_that_the_index_puts_elsewhere_is_not_read_from_here(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "two.safetensors")
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with CheckpointReader(tmp_path) as reader:
        assert torch.equal(reader.read("b"), torch.zeros(2))


def test_pickles_are_refused_with_what_to_do(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(MoEError, match="save_pretrained first"):
        CheckpointReader(tmp_path)


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_refused(tmp_path):
    save_file({"a": torch.ones(6, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    damaged = (tmp_path / "model.safetensors").read_bytes().replace(b'"shape":[6]', b'"shape":[5]')
    (tmp_path / "model.safetensors").write_bytes(damaged)
    with pytest.raises(MoEError, match="has 6 bytes, its shape and dtype tell 5"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ([torch.ones(2, 3)], "12 of 36 bytes were not written"),
        ([torch.ones(2, 3), torch.ones(2, 3)], "outside of a"),
        ([torch.ones(3, 3, dtype=torch.float16)], "gets torch.float16"),
    ],
    ids=["too few", "too many", "other dtype"],
)
def test_a_tensor_that_is_not_written_whole_is_an_error(tmp_path, chunks, said):
    with pytest.raises(AssertionError, match=said):
        write_checkpoint(tmp_path, {"a": TensorSpec(torch.float32, (3, 3))}, lambda name: chunks)


@pytest.mark.parametrize(
    ("starts", "said"), [((0, 8, 16), "written twice"), ((0, 16), "bytes .12, 16. were not written")]
)
def test_pieces_in_any_order_must_tile_the_tensor(tmp_path, starts, said):
    (layout,) = file_layouts({"a": TensorSpec(torch.float32, (7,))})
    piece = torch.ones(3)

    def write():
        with FileWriter(tmp_path, layout) as file:
            for start in reversed(starts):
                file.write("a", piece, start)

    with pytest.raises(AssertionError, match=said):
        write()


def test_stored_bytes_are_copied_to_all_their_places_and_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_writer, "_BUFFER_BYTES", 1000)
    data = os.urandom(5001)
    (tmp_path / "source").write_bytes(data)
    specs = {"a": TensorSpec(torch.uint8, (3, 1, 2450)), "b": TensorSpec(torch.uint8, (17,))}
    (layout,) = file_layouts(specs)
    with open(tmp_path / "source", "rb") as source:
        number = source.fileno()
        with FileWriter(tmp_path, layout) as file:
            file.copy(StoredBytes([("b", 0)], 17, number, 0))
            # The three entries of `a` are equal, and each is made of two pieces.
            file.copy(
                StoredBytes([("a", 2450 * entry) for entry in range(3)], 2000, number, 7),
                StoredBytes([("a", 2450 * entry + 2000) for entry in range(3)], 450, number, 3007),
            )
        written = load_file(file.path)
        assert written["a"].flatten(1).tolist() == 3 * [list(data[7:2007] + data[3007:3457])]
        assert bytes(written["b"].tolist()) == data[:17]
        assert file.checksum == file_checksum(file.path)
        with pytest.raises(MoEError, match="ended too early"), FileWriter(tmp_path, layout) as file:
            file.copy(StoredBytes([("a", 0)], 7350, number, 4000))


def test_a_file_that_cannot_be_made_is_named(tmp_path):
    with pytest.raises(MoEError, match="could not be written: No such file"):
        write_checkpoint(tmp_path / "absent", {"a": TensorSpec(torch.float32, (1,))}, lambda name: [torch.ones(1)])


def test_sizes_that_mean_nothing_are_refused():
    with pytest.raises(MoEError, match="max_shard_size is '5 apples'"):
        file_layouts({"a": TensorSpec(torch.float32, (1,))}, "5 apples")


MEMORY_PROGRAM = """
import re, sys, torch
from moe_hf.weight_files import CheckpointReader
def peak():
    return int(re.search(r"VmHWM:\\\\s+(\\\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
with CheckpointReader(sys.argv[1]) as reader:
    for _ in range(2):
        for name in reader.tensors:
            reader.read(name)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    size, count = 8 << 20, 24
    specs = {f"t{number}": TensorSpec(torch.uint8, (size,)) for number in range(count)}
    write_checkpoint(tmp_path, specs, lambda name: [torch.zeros(size, dtype=torch.uint8)])
    program = [sys.executable, "-c", MEMORY_PROGRAM.replace("\\\\", "\\"), str(tmp_path)]
    grown = int(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    # Two tensors: one that is read while the one before it is not yet freed; and what the allocator keeps, up to 6 MiB seen.
    assert grown < 2 * size + (8 << 20) < count * size // 4
