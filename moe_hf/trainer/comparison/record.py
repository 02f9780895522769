"""What of a comparison is finished: one small file, so that the same command goes on after any kill."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from moe_hf.errors import MoEError
from moe_hf.saving import read_json_object
from moe_hf.trainer.checkpoints import agree, list_checkpoints


RECORD_FILE, COMPARISON_FILE = "comparison_runs.json", "comparison.json"
# Arguments that do not change what a run learns: where and how often it is written, how it is spread.
FREE = (
    "output_dir", "logging", "log_", "report_to", "run_name", "disable_tqdm", "resume", "save_", "async_save", "push",
    "hub", "dataloader", "local_rank", "ddp", "use_cpu", "fsdp", "ep_size", "tp_size", "dp_replicate", "distributed",
    "per_device", "gradient_accumulation", "project", "trackio", "routing_telemetry", "debug", "skip_memory",
)  # fmt: skip


class Record:
    """The finished stages of a comparison in `folder`, by name, the same on all processes.

    Args:
        settings (`dict[str, str]`): what must be the same when it goes on.
        is_main, num_processes: as `agree` takes them; the main process reads and writes.

    Raises:
        MoEError: the comparison is finished, was begun with other settings, or the folder holds another run.
    """

    def __init__(self, folder: Path, settings: dict[str, str], *, is_main: bool, num_processes: int) -> None:
        self._file, self._settings = folder / RECORD_FILE, settings
        self._processes = {"is_main": is_main, "num_processes": num_processes}
        self.finished: dict[str, Any] = agree(self._read, **self._processes)

    def add(self, name: str, result: Callable[[], Any]) -> Any:
        """Write the result of a stage, which the main process knows; every process returns it."""

        def write() -> Any:
            found = _plain(result())
            content = {"settings": self._settings, "finished": self.finished | {name: found}}
            write_json(content, self._file)
            return found

        self.finished[name] = agree(write, **self._processes)
        return self.finished[name]

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Run an action on the main process, while the others wait."""
        return agree(action, **self._processes)

    def _read(self) -> dict[str, Any]:
        if not self._file.exists():
            return {}
        content = read_json_object(self._file)
        then = content.get("settings", {})
        for name in sorted(then.keys() | self._settings.keys()):
            was, now = then.get(name), self._settings.get(name)
            if was != now:
                raise MoEError(
                    f"{str(self._file.parent)!r} holds a comparison that was begun with {name}={was}, and {name} is {now} "
                    "now. Go on with the same command, or choose another output_dir."
                )
        return content.get("finished", {})


def check_folder(folder: str | Path, final: Path) -> None:
    """Refuse a folder in which a comparison can neither start nor go on.

    Raises:
        MoEError: one is finished there, or it holds a run that is not of a comparison.
    """
    folder = Path(folder)
    if (folder / COMPARISON_FILE).exists():
        raise MoEError(
            f"{str(folder / COMPARISON_FILE)!r} exists: a comparison was finished there. Choose another output_dir, or "
            "remove it."
        )
    if (folder / RECORD_FILE).exists():
        return
    found = [final] if final.exists() else list_checkpoints(folder)
    if found:
        raise MoEError(
            f"{str(found[0])!r} exists: it is of a run without this comparison, whose rate was not chosen as it chooses. "
            "Choose another output_dir, or remove it."
        )


def settings_of(*arguments: Any, rows_per_step: int) -> dict[str, str]:
    """What a comparison depends on, as text by name of the argument."""
    found = {
        f.name: str(getattr(group, f.name))
        for group in arguments
        for f in fields(group)
        if f.init and not f.name.startswith(FREE)
    }
    return found | {"rows per step": str(rows_per_step)}


def write_json(content: Any, path: Path) -> None:
    """Write a file whole or not at all; a number that is not finite is null in it.

    Raises:
        MoEError: it cannot be written.
    """
    text = json.dumps(_plain(content), indent=2, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # The other processes wait for this one, and hear of errors of ours.
        raise MoEError(f"Could not write {str(path)!r}: {error}") from error


def _plain(value: Any) -> Any:
    """`value` as JSON has it: a number that is not finite is None there."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
