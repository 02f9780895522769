"""Write folders that are whole or absent, prove later that they still are, and check shards before they are loaded.

A folder is written under a temporary sibling name, flushed to the disk, described by a manifest (checksum and size of
each file) that is written last, and then renamed in one step.
"""

import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moe_hf.checksums import SHA256, SHA256_OF_PARTS, file_checksum, has_checksum, safetensors_header
from moe_hf.errors import MoEError
from moe_hf.modeling.index_names import refuse_outside


MANIFEST_NAME = "moe_hf_manifest.json"
# The card is a text that people edit after the save, so it is no part of what the manifest holds.
UNLISTED_NAMES = frozenset({MANIFEST_NAME, "README.md"})
CONFIG_NAME = "config.json"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


@contextmanager
def atomic_folder(path: str | os.PathLike, known: Mapping[str, Mapping[str, str]] | None = None) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, or vanishes when the block fails.

    Args:
        path (`str` or `os.PathLike`): the destination; it must not exist. Missing parents are made.
        known (`Mapping[str, Mapping]`, *optional*): what the block fills in, see [`write_manifest`].

    Yields:
        `pathlib.Path` of the temporary folder `.NAME.tmp-PID` beside the destination: write all files there.

    Raises:
        `MoEError`: the destination exists, or its parent cannot be written.

    Example:
        ```python
        with atomic_folder("my-moe") as folder:
            model.save_pretrained(folder)
        ```
    """
    destination = Path(os.path.abspath(path))
    refuse_existing(destination)
    made = _make_parents(destination)
    temporary = temporary_sibling(destination)
    try:
        _make_folder(temporary)
        yield temporary
        publish_folder(temporary, destination, known)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in reversed(made):
            _remove_if_empty(parent)
        raise


def temporary_sibling(path: str | os.PathLike, tag: str | int | None = None) -> Path:
    """Name of the temporary folder of a destination: `.NAME.tmp-TAG` beside it.

    Args:
        path (`str` or `os.PathLike`): the destination.
        tag (`str` or `int`, *optional*): the process id of this process by default; processes that write one folder
            together pass the same tag.
    """
    destination = Path(os.path.abspath(path))
    return destination.with_name(f".{destination.name}.tmp-{os.getpid() if tag is None else tag}")


def publish_folder(
    temporary: str | os.PathLike, path: str | os.PathLike, known: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """Flush a finished temporary folder, add its manifest and rename it to its destination.

    Args:
        temporary (`str` or `os.PathLike`): the folder with all files, on the same file system as `path`.
        path (`str` or `os.PathLike`): the destination, which must not exist.
        known (`Mapping[str, Mapping]`, *optional*): see [`write_manifest`].

    Raises:
        `MoEError`: the destination exists.
    """
    temporary, destination = Path(temporary), Path(os.path.abspath(path))
    write_manifest(temporary, known)
    _give_usual_modes(temporary)
    for folder, _, _ in os.walk(temporary, topdown=False):
        _fsync(folder)
    # os.replace puts a folder in the place of an empty one without a word, so the check is repeated here.
    refuse_existing(destination)
    try:
        os.replace(temporary, destination)
    except OSError as error:
        raise MoEError(f"{destination} could not be put in place: {error.strerror or error}.") from error
    _fsync(destination.parent)


def publish_into(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Put the files of a finished temporary folder into a folder that may exist, beside what else it holds.

    The files of an earlier save, which its manifest lists, go; all others stay. While files are moved the folder has no
    `config.json` and no manifest, which come last: a run that is killed leaves a model that is whole, or none.

    Args:
        temporary (`str` or `os.PathLike`): the folder with all files, on the same file system as `path`; it vanishes.
        path (`str` or `os.PathLike`): the folder.

    Raises:
        `MoEError`: it holds weights that no save with a manifest put there; nothing is changed.
    """
    temporary, destination = Path(temporary), Path(os.path.abspath(path))
    earlier = refuse_foreign_weights(destination)
    write_manifest(temporary)
    _give_usual_modes(temporary)
    last = (CONFIG_NAME, MANIFEST_NAME)
    names = sorted(file.relative_to(temporary).as_posix() for file in temporary.rglob("*") if file.is_file())
    names.sort(key=lambda name: last.index(name) + 1 if name in last else 0)
    destination.mkdir(parents=True, exist_ok=True)
    for name in (*last, *(earlier - set(names))):
        (destination / name).unlink(missing_ok=True)
    _fsync(destination)
    for name in names:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        if name == CONFIG_NAME:
            _fsync(destination)
        os.replace(temporary / name, destination / name)
    _fsync(destination)
    shutil.rmtree(temporary, ignore_errors=True)


def refuse_foreign_weights(folder: Path) -> set[str]:
    """The names of the files of an earlier save into a folder, as its manifest lists them.

    Raises:
        `MoEError`: there are weights beside them, which a save would mix with its own, or replace.
    """
    manifest, earlier = folder / MANIFEST_NAME, set()
    if manifest.is_file():
        earlier = set(read_json_object(manifest).get("files") or {})
        for name in earlier:
            refuse_outside(name, manifest)
    found = {file.name for pattern in WEIGHT_FILES for file in folder.glob(pattern)}
    foreign = sorted(found - earlier)
    if foreign:
        raise MoEError(
            f"{folder} holds {foreign[0]}, which is no part of a save that has a manifest: nothing was written. Move it "
            "away, or choose another folder."
        )
    return earlier


def write_manifest(folder: str | os.PathLike, known: Mapping[str, Mapping[str, str]] | None = None) -> Path:
    """Write `moe_hf_manifest.json`: the checksum and the size in bytes of each file of a folder, flushed to the disk.

    The manifest itself and `README.md` are not listed. `sha256` is of the whole file; of safetensors files it is
    `sha256_of_parts`, see [`moe_hf.checksums`].

    Args:
        folder (`str` or `os.PathLike`): the folder, taken with all its sub-folders.
        known (`Mapping[str, Mapping]`, *optional*): the checksums of files by name, as `file_checksum` gives them, from
            who wrote them; they are not read again.

    Returns:
        `pathlib.Path` of the manifest.
    """
    folder = Path(folder)
    files, known = {}, known or {}
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as pool:
        # The disk flushes many small files in the time of a few.
        list(pool.map(_fsync, found))
    for file in found:
        name = file.relative_to(folder).as_posix()
        if file.name not in UNLISTED_NAMES:
            files[name] = {**(known.get(name) or file_checksum(file)), "size": file.stat().st_size}
    manifest = folder / MANIFEST_NAME
    manifest.write_text(json.dumps({"format_version": 2, "files": files}, indent=2) + "\n", encoding="utf-8")
    _fsync(manifest)
    return manifest


def verify_manifest(
    folder: str | os.PathLike, *, sizes_only: bool = False, may_be_missing: Collection[str] = ()
) -> None:
    """Check that each file of a folder is as its manifest says; files that are not listed are not looked at.

    Args:
        folder (`str` or `os.PathLike`): a folder written by `atomic_folder` or `write_manifest`.
        sizes_only (`bool`, *optional*, defaults to `False`): compare sizes and do not read the files; finds missing
            and truncated files, not changed bytes.
        may_be_missing (`Collection[str]`): names of files that were left out on purpose.

    Raises:
        `MoEError`: there is no manifest, or it cannot be read; else names the first file that is missing, truncated or
            changed.
    """
    folder = _existing_folder(folder)
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        raise MoEError(f"{folder} has no {MANIFEST_NAME}: it was not written whole by moe_hf.")
    files = read_json_object(manifest).get("files")
    if not isinstance(files, dict):
        raise MoEError(f"{manifest} has no table 'files': it is damaged; use another copy of the folder.")
    for name, fact in files.items():
        refuse_outside(name, manifest)
        is_fact = isinstance(fact, dict) and type(fact.get("size")) is int
        if not is_fact or not {SHA256, SHA256_OF_PARTS} & fact.keys():
            raise MoEError(f"{manifest} lacks the size or the sha256 of {name!r}: it is damaged.")
        file = folder / name
        if name in may_be_missing and not file.exists():
            continue
        if not file.is_file():
            raise MoEError(f"{file} is missing: the manifest of its folder lists it. Use another copy of the folder.")
        size = file.stat().st_size
        if size != fact["size"]:
            kind = "truncated" if size < fact["size"] else "changed"
            raise MoEError(f"{file} is {kind}: {size} bytes, {fact['size']} when it was saved. Use another copy.")
        if not sizes_only and not has_checksum(file, fact):
            raise MoEError(f"{file} is changed: its sha256 is not the one it was saved with. Use another copy.")


def check_shard_index(folder: str | os.PathLike) -> None:
    """Check the weight files of a local checkpoint before it is loaded; only headers are read.

    `from_pretrained` follows a shard name that leads out of the folder, and its messages for damaged files do not name
    them all.

    Args:
        folder (`str` or `os.PathLike`): a local checkpoint folder.

    Raises:
        `MoEError`: the folder or its weights are missing; an index is no JSON, has no or an empty `weight_map`, names a
            file outside the folder or a file or tensor that is not there; a safetensors file is truncated or damaged.
    """
    folder = _existing_folder(folder)
    indexes = sorted(folder.glob("*.index.json"))
    singles = sorted(folder.glob("*.safetensors"))
    if not indexes and not singles and not any(folder.glob("*.bin")):
        raise MoEError(
            f"{folder} has no weights: expected model.safetensors, or model.safetensors.index.json with its shards."
        )
    for index in indexes:
        _check_index(index)
    if not indexes:
        for file in singles:
            safetensors_header(file)


def _check_index(index: Path) -> None:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MoEError(
            f"{index} has no entry in 'weight_map': it names no weights. Use another copy of the checkpoint."
        )
    tensors_of: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        refuse_outside(shard, index)
        tensors_of.setdefault(shard, set()).add(tensor)
    for shard, tensors in sorted(tensors_of.items()):
        file = index.parent / shard
        if not file.is_file():
            raise MoEError(f"Shard {shard} is missing from {index.parent}: {index.name} names it.")
        if file.suffix == ".safetensors":
            absent = sorted(tensors - safetensors_header(file)[1].keys())
            if absent:
                raise MoEError(
                    f"{file} lacks {absent[0]!r} and {len(absent) - 1} others that {index.name} puts there."
                )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        `MoEError`: no JSON, or something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MoEError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise MoEError(f"{path} holds a JSON {type(content).__name__}, an object is expected.")
    return content


def _existing_folder(folder: str | os.PathLike) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise MoEError(f"{folder} {what}: a folder with a checkpoint is expected.")
    return folder


def refuse_existing(destination: str | os.PathLike) -> None:
    """Refuse a destination that exists, as a file, a folder or a broken link.

    Raises:
        `MoEError`: nothing is overwritten.
    """
    if os.path.lexists(destination):
        raise MoEError(f"{destination} exists: nothing was written. Choose another folder, or remove it first.")


def _make_parents(destination: Path) -> list[Path]:
    missing = [parent for parent in destination.parents if not parent.exists()][::-1]
    made = []
    for parent in missing:
        try:
            parent.mkdir(exist_ok=True)
        except OSError as error:
            raise MoEError(f"{parent} cannot be made for {destination}: {error.strerror or error}.") from error
        made.append(parent)
    return made


def _make_folder(temporary: Path) -> None:
    # What lies under this name was left by a process of the same number that was killed.
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
    except OSError as error:
        raise MoEError(f"{temporary.parent} cannot be written: {error.strerror or error}.") from error


def _give_usual_modes(folder: Path) -> None:
    """Let others read what they could read of any new file: safetensors and tempfile make theirs for the owner alone.

    What that is, the umask and the folder's access lists decide; a new folder and a new file show it.
    """
    probe = folder.parent / f"{folder.name}.modes"
    shutil.rmtree(probe, ignore_errors=True)
    probe.mkdir()
    try:
        (probe / "file").touch()
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (probe, probe / "file")]
    finally:
        shutil.rmtree(probe)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(modes[path.is_file()])


def _remove_if_empty(folder: Path) -> None:
    # A folder that another process uses by then is not empty, and stays.
    with suppress(OSError):
        folder.rmdir()


def _fsync(path: str | os.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
