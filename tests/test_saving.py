"""Laws of `moe_hf.saving`: folders are whole or absent, and damage is named before anything is loaded."""

import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moe_hf
from moe_hf.checksums import file_sha256
from moe_hf.errors import MoEError
from moe_hf.hub import save_model
from moe_hf.resources import resource_path
from moe_hf.saving import (
    MANIFEST_NAME,
    atomic_folder,
    check_shard_index,
    publish_folder,
    publish_into,
    temporary_sibling,
    verify_manifest,
    write_manifest,
)
from tests.processes import PATIENCE_SECONDS
from tests.tiny_models import tiny_dense


INDEX_NAME = "model.safetensors.index.json"


def _written(path: Path) -> Path:
    with atomic_folder(path) as folder:
        (folder / "weights.bin").write_bytes(bytes(range(256)) * 40)
        (folder / "sub").mkdir()
        (folder / "sub" / "config.json").write_text("{}")
        (folder / "README.md").write_text("card")
    return path


def _sharded(path: Path) -> Path:
    path.mkdir()
    save_file({"a": torch.zeros(3, 5)}, path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(7), "c": torch.ones(2)}, path / "model-00002-of-00002.safetensors")
    _write_index(path, {"a": _shard(1), "b": _shard(2), "c": _shard(2)})
    return path


def _shard(number: int) -> str:
    return f"model-0000{number}-of-00002.safetensors"


def _write_index(path: Path, weight_map) -> None:
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_folder_appears_whole_with_its_manifest(tmp_path):
    path = _written(tmp_path / "new" / "model")
    assert sorted(file.name for file in path.iterdir()) == ["README.md", MANIFEST_NAME, "sub", "weights.bin"]
    listed = json.loads((path / MANIFEST_NAME).read_text())["files"]
    assert set(listed) == {"weights.bin", "sub/config.json"}
    assert listed["weights.bin"] == {"sha256": file_sha256(path / "weights.bin"), "size": 10240}
    verify_manifest(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]


def test_nothing_is_there_before_the_block_ends(tmp_path):
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "model").exists()
        assert folder == temporary_sibling(tmp_path / "model")
        assert folder.name == f".model.tmp-{os.getpid()}"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_block_leaves_nothing(tmp_path, error):
    def write():
        with atomic_folder(tmp_path / "new" / "model") as folder:
            (folder / "file").write_text("x")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_an_existing_destination_is_refused_and_untouched(tmp_path, kind):
    path = tmp_path / "model"
    if kind == "file":
        path.write_text("old")
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
        if kind == "folder":
            (path / "old").write_text("old")
    with pytest.raises(MoEError, match="exists: nothing was written"), atomic_folder(path):
        raise AssertionError("the block must not run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_destination_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "model"

    def write():
        with atomic_folder(path) as folder:
            (folder / "file").write_text("new")
            path.mkdir()

    with pytest.raises(MoEError, match="exists"):
        write()
    assert list(path.iterdir()) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_parent_that_is_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(MoEError, match="cannot be"), atomic_folder(tmp_path / "file" / "model"):
        raise AssertionError("the block must not run")


def test_a_killed_writer_leaves_no_destination_and_the_next_one_succeeds(tmp_path):
    script = (
        "import sys, time\nfrom moe_hf.saving import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'model.safetensors').write_bytes(b'half')\n"
        "    print('writing', flush=True)\n    time.sleep(60)\n"
    )
    path = tmp_path / "model"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
    finally:
        process.kill()
        process.stdout.close()
    assert not path.exists()
    assert all(entry.name.startswith(".model.tmp-") for entry in tmp_path.iterdir())
    verify_manifest(_written(path))


def test_a_writer_killed_at_any_moment_leaves_a_whole_folder_or_none(tmp_path):
    script = (
        "import sys\nfrom moe_hf.saving import atomic_folder\nprint('ready', flush=True)\n"
        "for i in range(10**6):\n"
        "    with atomic_folder(f'{sys.argv[1]}/model-{i}') as folder:\n"
        "        for name in 'abc':\n            (folder / name).write_bytes(name.encode() * 100_000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(list(tmp_path.glob("model-*"))) < 5 and time.monotonic() < deadline:
            time.sleep(0.003)
    finally:
        process.kill()
        process.wait(timeout=10)
        process.stdout.close()
    finished = list(tmp_path.glob("model-*"))
    assert len(finished) >= 5
    for path in finished:
        verify_manifest(path)
        assert len(list(path.iterdir())) == 4


def test_writers_of_one_folder_share_a_tagged_sibling(tmp_path):
    temporary = temporary_sibling(tmp_path / "model", tag="run")
    temporary.mkdir()
    (temporary / "rank0").write_text("0")
    (temporary / "rank1").write_text("1")
    publish_folder(temporary, tmp_path / "model")
    verify_manifest(tmp_path / "model")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "weights.bin").unlink(), "weights.bin is missing"),
        (lambda path: (path / "weights.bin").write_bytes(b"short"), "weights.bin is truncated: 5 bytes, 10240"),
        (lambda path: (path / "weights.bin").write_bytes(bytes(10241)), "weights.bin is changed: 10241 bytes"),
        (lambda path: (path / "weights.bin").write_bytes(bytes(10240)), "weights.bin is changed: its sha256"),
        (lambda path: (path / "sub" / "config.json").write_text("[]"), "config.json is changed"),
        (lambda path: (path / MANIFEST_NAME).unlink(), "has no moe_hf_manifest.json"),
        (lambda path: (path / MANIFEST_NAME).write_text("{"), "not valid JSON"),
        (lambda path: (path / MANIFEST_NAME).write_text("[]"), "an object is expected"),
        (lambda path: (path / MANIFEST_NAME).write_text('{"files": []}'), "no table 'files'"),
        (
            lambda path: (path / MANIFEST_NAME).write_text('{"files": {"weights.bin": 3}}'),
            "lacks the size or the sha256",
        ),
        (lambda path: (path / MANIFEST_NAME).write_text('{"files": {"../x": {}}}'), "outside of its folder"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_files_name(tmp_path, damage, message):
    path = _written(tmp_path / "model")
    damage(path)
    with pytest.raises(MoEError, match=message):
        verify_manifest(path)


def test_sizes_alone_find_a_truncation_and_not_a_changed_byte(tmp_path):
    path = _written(tmp_path / "model")
    (path / "weights.bin").write_bytes(bytes(10240))
    verify_manifest(path, sizes_only=True)
    (path / "weights.bin").write_bytes(bytes(10239))
    with pytest.raises(MoEError, match="truncated"):
        verify_manifest(path, sizes_only=True)


def test_an_edited_card_and_added_files_keep_a_folder_valid(tmp_path):
    path = _written(tmp_path / "model")
    (path / "README.md").write_text("a better card")
    (path / "notes.txt").write_text("mine")
    verify_manifest(path)


def test_a_manifest_does_not_depend_on_when_it_is_written(tmp_path):
    path = _written(tmp_path / "model")
    before = (path / MANIFEST_NAME).read_bytes()
    os.utime(path / "weights.bin", (0, 0))
    assert write_manifest(path).read_bytes() == before


@pytest.mark.parametrize("given", ["missing", "file"])
def test_what_is_no_folder_is_one_clear_error(tmp_path, given):
    (tmp_path / "file").write_text("x")
    for check in (verify_manifest, check_shard_index):
        with pytest.raises(MoEError, match="a folder with a checkpoint is expected"):
            check(tmp_path / given)


def test_whole_checkpoints_pass(tmp_path):
    check_shard_index(_sharded(tmp_path / "sharded"))
    (tmp_path / "single").mkdir()
    save_file({"a": torch.zeros(0), "b": torch.ones(3)}, tmp_path / "single" / "model.safetensors")
    check_shard_index(tmp_path / "single")


def test_links_into_a_cache_pass(tmp_path):
    blobs = _sharded(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in blobs.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    check_shard_index(tmp_path / "snapshot")


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/passwd", "x/../../a", "..\\a", "C:\\a", "C:a", "\\\\host\\a"]
)
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, name):
    path = _sharded(tmp_path / "model")
    _write_index(path, {"a": _shard(1), "b": name})
    with pytest.raises(MoEError, match="outside of its folder"):
        check_shard_index(path)


@pytest.mark.parametrize("name", [3, None, "", "a\0b", ["a"]])
def test_an_index_with_something_that_is_no_name_is_refused(tmp_path, name):
    path = _sharded(tmp_path / "model")
    _write_index(path, {"a": name})
    with pytest.raises(MoEError, match="a file name is expected"):
        check_shard_index(path)


@pytest.mark.parametrize(
    "content", ["", "{", "\xff", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 10**5]
)
def test_an_index_without_a_weight_map_is_refused(tmp_path, content):
    path = _sharded(tmp_path / "model")
    (path / INDEX_NAME).write_bytes(content.encode("latin-1"))
    with pytest.raises(MoEError, match=INDEX_NAME):
        check_shard_index(path)


def _truncate(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "model-00002-of-00002.safetensors is missing"),
        (lambda file: file.write_bytes(b""), "model-00002-of-00002.safetensors is truncated"),
        (lambda file: _truncate(file, 6), "truncated"),
        (lambda file: _truncate(file, 40), "truncated"),
        (lambda file: _truncate(file, file.stat().st_size - 1), "truncated"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "damaged"),
        (lambda file: file.write_bytes(struct.pack("<Q", 2**60) + bytes(99)), "truncated"),
        (lambda file: file.write_bytes(struct.pack("<Q", 9) + b"[1, 2, 3]"), "no safetensors file"),
        (lambda file: file.write_bytes(struct.pack("<Q", 9) + b"not json!"), "no safetensors file"),
        (lambda file: file.write_bytes(struct.pack("<Q", 8) + b'{"b": 3}'), "no safetensors file"),
        (lambda file: save_file({"b": torch.ones(7)}, file), "lacks 'c'"),
    ],
)
def test_a_damaged_shard_is_refused_with_its_name(tmp_path, damage, message):
    path = _sharded(tmp_path / "model")
    damage(path / _shard(2))
    with pytest.raises(MoEError, match=message):
        check_shard_index(path)


def test_a_truncated_single_file_is_refused(tmp_path):
    path = _sharded(tmp_path / "model")
    (path / INDEX_NAME).unlink()
    (path / _shard(1)).rename(path / "model.safetensors")
    _truncate(path / "model.safetensors", 100)
    with pytest.raises(MoEError, match="model.safetensors is truncated"):
        check_shard_index(path)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MoEError, match="has no weights"):
        check_shard_index(tmp_path)


def test_resources_are_found_and_never_outside(tmp_path):
    assert resource_path("model_cards/template.md").read_text(encoding="utf-8").startswith("---\n")
    for name in ("../secret", "/etc/passwd", "model_cards/../../x", "model_cards\\template.md"):
        with pytest.raises(MoEError, match="inside the project"):
            resource_path(name)
    with pytest.raises(MoEError, match="was not found"):
        resource_path("model_cards/none.md")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_what_is_published_has_the_modes_of_new_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        tiny_dense("llama").save_pretrained(tmp_path / "dense")
        moe_hf.upcycle_checkpoint(tmp_path / "dense", tmp_path / "streamed", num_experts=2)
        save_model(moe_hf.upcycle(tmp_path / "dense", num_experts=2), None, tmp_path / "saved")
        (tmp_path / "into").mkdir()
        tiny_dense("llama").save_pretrained(staging := Path(tempfile.mkdtemp(dir=tmp_path)))
        publish_into(staging, tmp_path / "into")
    finally:
        os.umask(before)
    for folder in ("streamed", "saved", "into"):
        for path in (tmp_path / folder, *(tmp_path / folder).rglob("*")):
            assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
    assert not list(tmp_path.rglob("*.modes"))
