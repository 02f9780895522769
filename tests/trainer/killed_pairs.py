"""Kills one or both of two processes within a save: `python -m tests.trainer.killed_pairs FOLDER quick` writes what was left.

As `killed_saves`, with two forked children that train together; this process is their launcher, and ends a survivor that
does not end by itself.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

from moe_hf.trainer import MoETrainer
from moe_hf.trainer.checkpoints import newest_whole_checkpoint
from tests.trainer.killed_saves import Steps, distinct
from tests.trainer.layout_runs import MODES, build, data
from tests.trainer.runs import arguments


# At which step of a save which process is killed: parts are each process's own, and the first one publishes.
Kills = dict[int, str]
QUICK: tuple[Kills, ...] = (
    {0: "half of model.safetensors"},
    {1: "half of rng_state_1.pth"},
    {1: "open __1_0.distcp"},
    {0: "open trainer_state.json", 1: "half of rng_state_1.pth"},
    {0: "open moe_hf_manifest.json"},
)
PATIENCE_SECONDS = 20


def train(folder: Path, mode: str, steps: int, kill_at: str | None, **fields) -> None:
    """Train to `steps` in this process of two, with a save at each; killed at a step of the last save."""
    rank = int(os.environ["RANK"])
    watched = Steps(None, kill_at)

    class Killed(MoETrainer):
        def _save_checkpoint(self, model, trial):
            watched.active = self.state.global_step == steps
            super()._save_checkpoint(model, trial)
            self._writer.wait()
            watched.active = False

        def _load_from_checkpoint(self, folder, model=None):
            (Path(self.args.output_dir) / f"resumed_{rank}").write_text(Path(folder).name)
            super()._load_from_checkpoint(folder, model)

    saves = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", "scope": "moe"}
    args = arguments(folder, max_steps=steps, per_device_train_batch_size=2, **saves, **MODES[mode], **fields)
    trainer = Killed(build("ours"), args, train_dataset=data(16))
    assert trainer.accelerator.num_processes == 2
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)
    (folder / f"steps_{rank}.json").write_text(json.dumps(watched.names))


def pair(folder: Path, mode: str, steps: int, kills: Kills | None = None, **fields) -> dict:
    """Run two processes, and kill them as `kills` says; returns how each ended, and what it said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    children = {}
    for rank in range(2):
        child = os.fork()
        if child:
            children[child] = rank
            continue
        status = 1
        try:
            signal.alarm(180)
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            os.environ |= {name: str(value) for name, value in names.items()}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            said = os.open(folder / f"said_{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            train(folder, mode, steps, (kills or {}).get(rank), **fields)
            status = 0
        finally:
            sys.stderr.flush()
            if status:
                sys.excepthook(*sys.exc_info())
            os._exit(status)
    ends, patience = {}, None
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            ends[children.pop(child)] = os.waitstatus_to_exitcode(status)
            patience = time.monotonic() + PATIENCE_SECONDS
        elif patience is not None and time.monotonic() > patience:
            for child in children:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    said = {rank: (folder / f"said_{rank}").read_text() for rank in ends}
    return {"ends": [ends[0], ends[1]], "said": [said[0], said[1]]}


def killed_once(start: Path, mode: str, kills: Kills, **fields) -> dict:
    """Kill within the save of step 2, and look at the folder."""
    folder = shutil.copytree(start, start.parent / f"killed-{len(list(start.parent.iterdir()))}")
    found = pair(folder, mode, 2, kills, **fields)
    newest = newest_whole_checkpoint(folder)
    return found | {
        "folder": str(folder),
        "mode": mode,
        "kills": kills,
        "left": sorted(path.name for path in folder.glob(".*")),
        "newest": newest and newest.name,
        "folders": sorted(path.name for path in folder.glob("checkpoint-*")),
    }


def resumed(folder: Path, mode: str) -> dict:
    """Go on to step 3, and say from where each process did."""
    found = pair(folder, mode, 3)
    return found | {"from": [(folder / f"resumed_{rank}").read_text() for rank in range(2)], "folder": str(folder)}


def main(folder: Path, extent: str) -> None:
    """The quick kills, or all kinds of steps of both processes in three layouts."""
    result = {"killed": [], "resumed": {}}
    for mode in ("ep_fsdp",) if extent == "quick" else ("ep_fsdp", "ddp", "tp"):
        start = folder / mode / "start"
        start.mkdir(parents=True)
        assert pair(start, mode, 1)["ends"] == [0, 0]
        whole = shutil.copytree(start, folder / mode / "whole")
        assert pair(whole, mode, 2)["ends"] == [0, 0]
        own = [json.loads((whole / f"steps_{rank}.json").read_text()) for rank in range(2)]
        points = list(QUICK)
        if extent == "all":
            points = [{rank: own[rank][i]} for rank in range(2) for i in sorted(set(distinct(own[rank])))]
            points.append({rank: own[rank][len(own[rank]) // 2] for rank in range(2)})
        # Parts of a sharded optimizer are renamed too; the last one publishes.
        published = max(number for number, name in enumerate(own[0]) if name == "os.rename")
        before = {*own[0][: published + 1], *own[1]}
        kills = [killed_once(start, mode, point) | {"published": not set(point.values()) & before} for point in points]
        result["killed"] += kills
        survivor = Path(next(kill["folder"] for kill in kills if kill["left"]))
        result["resumed"][mode] = [resumed(whole, mode), resumed(survivor, mode)]
        weights = [(path / "checkpoint-3" / "model.safetensors").read_bytes() for path in (whole, survivor)]
        result["resumed"][mode][1]["is_equal"] = weights[0] == weights[1]
        damaged = shutil.copytree(folder / mode / "whole", folder / mode / "damaged")
        shutil.rmtree(damaged / "checkpoint-3")
        part = next((damaged / "checkpoint-2").rglob("rng_state_1.pth" if mode == "ddp" else "__1_0.distcp"))
        part.write_bytes(part.read_bytes()[:-9])
        result["resumed"][mode].append(resumed(damaged, mode))
    (folder / "found.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
