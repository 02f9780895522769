"""A folder that takes long to write: it grows beside its destination, survives a kill, and appears in one step.

All of it lies in `.NAME.partial` beside the destination NAME: `lock`, held by the process that writes; `state.json`, what
the folder is made from and which files are finished; `folder`, which is renamed to NAME in the end; and `dense-0` and so on,
ordinary checkpoints of sources that are none.
"""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

from moe_hf.checksums import has_checksum
from moe_hf.errors import MoEError
from moe_hf.saving import publish_folder, refuse_existing


LOCK_NAME, STATE_NAME, FOLDER_NAME, CONVERTED_NAME = "lock", "state.json", "folder", "dense-"


class PartialFolder:
    """The unfinished state of `destination`; a context manager that holds its lock.

    `begin` continues what an interrupted process left, if that was made from equal facts. An error after it leaves what is
    there for the next time and says so, unless `discard` was called; an error before it leaves what there was.

    Args:
        destination (`str` or `os.PathLike`): must not exist.
        restart (`bool`): throw away what an interrupted process left.

    Attributes:
        folder (`Path`): where the files are written.
        finished (`dict[str, dict]`): names of finished files in it to their checksums.

    Raises:
        `MoEError`: on entering, when the destination exists, another process writes it, or its parent cannot be written.
    """

    def __init__(self, destination: str | os.PathLike, *, restart: bool = False):
        self.destination = Path(os.path.abspath(destination))
        self.path = self.destination.with_name(f".{self.destination.name}.partial")
        self.folder = self.path / FOLDER_NAME
        self.facts: dict[str, Any] | None = None
        self.finished: dict[str, dict[str, str]] = {}
        self._restart = restart
        self._lock: int | None = None

    def __enter__(self) -> "PartialFolder":
        refuse_existing(self.destination)
        try:
            self._lock = self._acquire()
            # What another process published while this one waited for its turn.
            refuse_existing(self.destination)
            self._remove_folders(but=(FOLDER_NAME, *self.converted()))
        except OSError as error:
            self._release()
            raise MoEError(f"{self.path} cannot be written: {error.strerror or error}.") from error
        except BaseException:
            self._release()
            raise
        return self

    def begin(self, facts: dict[str, Any]) -> None:
        """Continue what an interrupted process left, or begin.

        Args:
            facts (`dict`): all that decides the bytes of the folder, as plain values.

        Raises:
            `MoEError`: an interrupted process was making it from other facts.
        """
        # As it will be read back, so that tuples equal lists.
        self.facts = json.loads(json.dumps(facts, sort_keys=True))
        self._continue()

    def converted(self) -> list[str]:
        """Names of the ordinary checkpoints that lie here."""
        return [entry.name for entry in self.path.iterdir() if entry.name.startswith(CONVERTED_NAME)]

    def __exit__(self, kind, error, trace) -> None:
        if self.facts is None:
            # A process that is killed leaves what it has converted; a mistake in the arguments leaves nothing.
            if isinstance(error, Exception) and not (self.path / STATE_NAME).exists():
                self.discard()
            self._release()
            return
        self._release()
        if isinstance(error, MoEError | OSError) and self.path.exists():
            reason = str(error) if isinstance(error, MoEError) else f"{error.filename or self.path}: {error.strerror}."
            raise MoEError(
                f"{reason} What is finished stays in {self.path}: the same call continues there."
            ) from error

    def finish(self, name: str, checksum: dict[str, str]) -> None:
        """Record that a file of `folder` is whole and on the disk."""
        self.finished[name] = checksum
        self._write_state()

    def publish(self) -> None:
        """Write the manifest, put the folder in its place in one step, and remove what is left beside it."""
        publish_folder(self.folder, self.destination, self.finished)
        self.discard()

    def discard(self) -> None:
        """Remove all that is unfinished."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _acquire(self) -> int:
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The process that held it may have removed the file in the meantime.
                if os.path.exists(self.path / LOCK_NAME) and os.path.samestat(
                    os.fstat(lock), os.stat(self.path / LOCK_NAME)
                ):
                    os.ftruncate(lock, 0)
                    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                    return lock
            except BlockingIOError:
                holder = os.pread(lock, 200, 0).decode() or "another process"
                os.close(lock)
                raise MoEError(
                    f"{self.destination} is being written by {holder}: wait until it ends, or choose another folder."
                ) from None
            os.close(lock)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _continue(self) -> None:
        state_file = self.path / STATE_NAME
        state = self._read_state(state_file) if state_file.exists() and not self._restart else None
        if state is not None and state["facts"] != self.facts:
            raise MoEError(
                f"{self.path} holds an interrupted run that differs in {_differences(state['facts'], self.facts)}: repeat "
                "that run to continue it, or pass restart=True (--restart) to throw it away."
            )
        finished = (state or {}).get("finished", {})
        self.folder.mkdir(exist_ok=True)
        for entry in list(self.folder.iterdir()):
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in finished or not has_checksum(entry, finished[entry.name]):
                entry.unlink()
            else:
                self.finished[entry.name] = finished[entry.name]
        self._write_state()

    def _remove_folders(self, but: Collection[str]) -> None:
        """Remove what a killed process had only begun."""
        for entry in self.path.iterdir():
            if entry.is_dir() and entry.name not in but:
                shutil.rmtree(entry)

    def _read_state(self, file: Path) -> dict[str, Any] | None:
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            return state if {"facts", "finished"} <= state.keys() else None
        except (ValueError, AttributeError):
            # Only ever replaced as a whole; what cannot be read is worth nothing, and the work is done again.
            return None

    def _write_state(self) -> None:
        new = self.path / f"{STATE_NAME}.new"
        with open(new, "w", encoding="utf-8") as file:
            json.dump({"facts": self.facts, "finished": self.finished}, file, indent=2, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path / STATE_NAME)


def _differences(old: Any, new: Any, name: str = "") -> str:
    """Dotted names of the entries that differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return name
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return ", ".join(_differences(old.get(key), new.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
