"""Stages of a long program: each has an output folder with its settings, and a second run reuses what fits."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_hf.errors import MoEError
from moe_hf.saving import atomic_folder, verify_manifest


RECORD_NAME = "stage.json"


class Stages:
    """Runs named stages below one folder, or reuses them when they are there with the same settings.

    Args:
        root (`Path`): the folder of all stages.
        say (`Callable`): told what happens, one line each.

    Attributes:
        reused, built: names of the stages of this run, in order.
        expected: seconds that each stage of the whole run takes, by name, where somebody knows; then what is left is told.
    """

    def __init__(self, root: Path, say: Callable[[str], None] = print) -> None:
        self.root = root
        self.say = say
        self.reused: list[str] = []
        self.built: list[str] = []
        self.expected: dict[str, float] = {}

    def folder(self, name: str) -> Path:
        """Where a stage keeps its files."""
        return self.root / name

    def run(self, name: str, settings: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Return the record of a stage: `settings`, `result`, `seconds` (wall time of its build).

        Args:
            name (`str`): folder name below the root; may hold slashes.
            settings (`dict`): all that the result depends on, earlier stages' settings included, as JSON values.
            build (`Callable`): writes its files into the folder it is given and returns the result as JSON values. The
                folder appears under its name when all is written.
        """
        folder = self.folder(name)
        settings = json.loads(json.dumps(settings))
        record = self._found(name, folder, settings)
        if record is not None:
            self.reused.append(name)
            return record
        shutil.rmtree(folder, ignore_errors=True)
        # What a run that was killed had written.
        for half in folder.parent.glob(f".{folder.name}.tmp-*"):
            shutil.rmtree(half, ignore_errors=True)
        self.say(f"{name}: running{self._progress(name)}")
        start = time.perf_counter()
        with atomic_folder(folder) as temporary:
            result = build(temporary)
            record = {"settings": settings, "result": result, "seconds": time.perf_counter() - start}
            (temporary / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        self.built.append(name)
        self.say(f"{name}: done in {record['seconds']:.1f} s")
        return json.loads(json.dumps(record))

    def _progress(self, name: str) -> str:
        """How many stages there are, which this is, and how long it takes until all are done."""
        if name not in self.expected:
            return ""
        done = {*self.reused, *self.built}
        left = sum(seconds for stage, seconds in self.expected.items() if stage not in done)
        number = len(done & self.expected.keys()) + 1
        return f", stage {number} of {len(self.expected)}, about {max(1, round(left / 60))} min to the end of all"

    def _found(self, name: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
        if not folder.exists():
            return None
        try:
            verify_manifest(folder, sizes_only=True)
            record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        except (MoEError, OSError, ValueError) as error:
            self.say(f"{name}: not whole, done again ({error})")
            return None
        if record["settings"] != settings:
            self.say(f"{name}: its settings changed, done again")
            return None
        self.say(f"{name}: reused")
        return record
