"""A push that is killed with SIGKILL, at any point, and run again: nothing lost, nothing twice, nothing sent again that is there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.checksums import file_sha256
from moe_hf.hub import save_model
from tests.hub.fake_hub import TOKEN, FakeHub
from tests.hub.test_push_pull import MODES
from tests.processes import PATIENCE_SECONDS
from tests.tiny_models import randomise_, tiny_config


ROOT = Path(__file__).resolve().parents[2]


class _Client:
    """Pushes in processes of their own, over one transfer mode."""

    def __init__(self, mode: str, work: Path):
        self.hub = FakeHub(work / "cas" if mode == "xet" else None)
        self.mode, self.work, self.store, self.seed = mode, work, work / "cas", 0
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env |= {
            "HF_ENDPOINT": self.hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(work / "home"),
            "HF_HUB_DISABLE_XET": str(int(mode == "lfs")),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "tests.hub.killed_pushes"]
        self.process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def new_model(self) -> None:
        """A model whose bytes nobody has sent yet."""
        self.seed += 1
        self.folder = self.work / f"ours-{self.seed}"
        model = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), num_experts=4))
        randomise_(model, self.seed)
        save_model(model, None, self.folder, max_shard_size="200KB")
        self.shards = sorted(self.folder.glob("*.safetensors"))

    def start(self, repo_id: str) -> int:
        """The process id of a push."""
        self.process.stdin.write(json.dumps([str(self.folder), repo_id]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def status(self) -> int:
        """The exit code of the push that was started, when it has ended."""
        return int(self.process.stdout.readline())

    def kill(self, pid: int) -> None:
        """End the push, and the requests that hang."""
        os.kill(pid, signal.SIGKILL)
        assert self.status() == -signal.SIGKILL
        self.hub.release()
        self.hub.forget_faults()

    def close(self) -> None:
        """End the processes."""
        self.process.stdin.close()
        self.process.wait(timeout=PATIENCE_SECONDS)
        self.hub.stop()


@pytest.fixture(scope="module", params=MODES)
def client(request, tmp_path_factory):
    client = _Client(request.param, tmp_path_factory.mktemp(request.param))
    yield client
    client.close()


def _wait_for(condition) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "the push did not come to where it was to be killed"
        time.sleep(0.005)


def _xorbs(store: Path) -> dict[str, int]:
    """Sizes of the files with the bytes, without those that say what is in them."""
    about = (".mdb", ".redb", ".tagset")
    found = (file for file in store.rglob("*") if file.is_file() and file.suffix not in about)
    return {file.name: file.stat().st_size for file in found}


def _assert_whole(client: _Client, repo_id: str) -> None:
    files = client.hub.repositories[repo_id].commit_at("main").files
    assert len(client.hub.titles(repo_id)) == 1
    for shard in client.shards:
        assert (files[shard.name].sha256, files[shard.name].size) == (file_sha256(shard), shard.stat().st_size)


def test_killed_within_a_file_the_next_push_sends_only_what_is_missing(client):
    repo_id = "tester/within"
    client.new_model()
    known = len(client.hub.known)
    last = file_sha256(client.shards[-1])
    client.hub.fail("POST", f"/{repo_id}/commit/", kind="hang")
    client.hub.fail("PUT", f"/_part/{last}/2", kind="hang")
    pid = client.start(repo_id)
    if client.mode == "lfs":
        _wait_for(lambda: client.hub.hanging.is_set() and len(client.hub.known) - known == len(client.shards) - 1)
    else:
        _wait_for(lambda: _xorbs(client.store))
    client.kill(pid)
    assert client.hub.titles(repo_id) == []
    # The client's own process keeps the lookup of a `local://` store in a server's place, and no server was killed.
    for lookup in client.store.rglob("*.redb"):
        lookup.unlink()
    before = len(client.hub.requests)

    client.start(repo_id)

    assert client.status() == 0
    _assert_whole(client, repo_id)
    sent = [path for method, path in client.hub.requests[before:] if method == "PUT"]
    assert all(last in path for path in sent) and bool(sent) == (client.mode == "lfs")


@pytest.mark.parametrize("is_made", [False, True], ids=["before", "after"])
def test_killed_at_the_commit_the_next_push_sends_no_bytes_and_makes_one_commit(client, is_made):
    repo_id = f"tester/commit-{is_made}"
    client.new_model()
    client.hub.fail("POST", f"/{repo_id}/commit/", kind="hang", after=is_made)
    pid = client.start(repo_id)
    _wait_for(client.hub.hanging.is_set)
    client.kill(pid)
    assert len(client.hub.titles(repo_id)) == int(is_made)
    sent, stored = client.hub.uploaded_bytes, _xorbs(client.store)
    assert max(sent, sum(stored.values())) >= sum(shard.stat().st_size for shard in client.shards)

    client.start(repo_id)

    assert client.status() == 0
    _assert_whole(client, repo_id)
    assert client.hub.uploaded_bytes == sent and _xorbs(client.store) == stored
