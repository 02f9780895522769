"""Kills a run at each step of a save: `python -m tests.trainer.killed_saves FOLDER` writes what was left.

A step is a file that is opened for writing or closed, a flush, a rename or a removal in a checkpoint's folder. Each run is
a forked child that resumes at step 1, trains one more and kills itself within the save of step 2, with the file that it
last wrote cut in two where it was not finished; so transformers is imported once only.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch
import transformers.modeling_utils

from moe_hf.trainer import MoETrainer
from moe_hf.trainer.checkpoints import newest_whole_checkpoint
from tests.processes import PATIENCE_SECONDS
from tests.trainer.runs import arguments, rows, tiny_moe


def run(folder: Path, steps: int, trainer_class: type = MoETrainer, **fields) -> MoETrainer:
    """Train to `steps` with a save at each, from the newest whole checkpoint where there is one."""
    saves = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    args = arguments(folder, max_steps=steps, **saves, **fields)
    trainer = trainer_class(tiny_moe(), args, train_dataset=rows(8))
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)
    return trainer


class Steps:
    """Counts what changes the disk during a save, and kills the process at one of these steps, by number or by name."""

    def __init__(self, last: int | None, last_name: str | None = None):
        self.last, self.last_name, self.names, self.active = last, last_name, [], False
        self.file: str | None = None
        sys.addaudithook(self.audit)
        os.fsync = self.around("fsync", os.fsync)
        for module in (safetensors.torch, transformers.modeling_utils):
            name = "save_file" if module is safetensors.torch else "safe_save_file"
            setattr(module, name, self.writing(getattr(module, name)))
        torch.save = self.writing(torch.save)

    def audit(self, event: str, args: tuple) -> None:
        if not self.active:
            return
        if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax"):
            self.file = os.fspath(args[0]) if isinstance(args[0], str | os.PathLike) else None
            self.step(f"open {Path(self.file or '').name}")
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            self.step(event)

    def around(self, name: str, function):
        def call(*args, **kwargs):
            if self.active:
                self.step(name)
            return function(*args, **kwargs)

        return call

    def writing(self, function):
        """A function that writes a file: killed when it has, as if half of it were on the disk, and when all is."""

        def call(content, file, *args, **kwargs):
            result = function(content, file, *args, **kwargs)
            # Parts of a sharded optimizer go through streams.
            if self.active and isinstance(file, str | os.PathLike):
                self.file = os.fspath(file)
                self.step(f"half of {Path(self.file).name}", half=True)
                self.step(f"all of {Path(self.file).name}")
            return result

        return call

    def step(self, name: str, half: bool = False) -> None:
        if len(self.names) == self.last or name == self.last_name:
            if half:
                os.truncate(self.file, os.path.getsize(self.file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)


def forked(folder: Path, last: int | None, report: Path, background: bool) -> int:
    """Train step 2 in a child that is killed at step number `last` of its save; returns the child's status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        signal.alarm(PATIENCE_SECONDS)
        steps = Steps(last)

        class Killed(MoETrainer):
            def _save_checkpoint(self, model, trial):
                steps.active = True
                super()._save_checkpoint(model, trial)
                self._writer.wait()
                steps.active = False

        run(folder, 2, Killed, async_save=background)
        report.write_text(json.dumps(steps.names))
        status = 0
    finally:
        os._exit(status)


def distinct(names: list[str]) -> list[int]:
    """The first step of each kind, and the last; of the model's code one file."""
    first = {}
    for number, name in enumerate(names):
        first.setdefault(".py" if name.endswith(".py") else name, number)
    return [*first.values(), len(names) - 1]


def main(folder: Path) -> None:
    """Kill at every kind of step of a save, and at every third one beside training; resume after one."""
    run(folder / "start", 1)
    report, found = folder / "steps.json", []
    for background in (False, True):
        whole = shutil.copytree(folder / "start", folder / f"whole-{background}")
        assert forked(whole, None, report, background) == 0
        names = json.loads(report.read_text())
        for last in distinct(names)[:: 3 if background else 1]:
            copy = shutil.copytree(folder / "start", folder / f"{background}-{last}")
            status = forked(copy, last, report, background)
            newest = newest_whole_checkpoint(copy)
            found.append({
                "background": background,
                "step": names[last],
                "signal": status,
                "newest": newest and newest.name,
                "published": any(name == "os.rename" for name in names[:last]),
                "folders": sorted(path.name for path in copy.iterdir() if not path.name.startswith(".")),
            })  # fmt: skip
    expected = run(folder / "whole-False", 3).model.state_dict()
    killed = next(path for path in sorted(folder.glob("False-*")) if any(path.glob(".*")))
    resumed = run(killed, 3).model.state_dict()
    equal = all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    left = sorted(path.name for path in killed.iterdir())
    (folder / "found.json").write_text(json.dumps({"killed": found, "resumed_is_equal": equal, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
