"""Runs a program in a process that cannot import moe_hf, on a saved model and the code that travelled with it."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.processes import PATIENCE_SECONDS


BLOCKED = """
import sys, torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moe_hf":
            raise ModuleNotFoundError("moe_hf is blocked")

sys.meta_path.insert(0, Blocked())
folder, again = sys.argv[1:3]
ids = torch.load(folder + "/ids.pt")
"""
LOAD_TWICE = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(again)
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
torch.save(model(ids).logits.detach(), again + "/logits.pt")
"""


def run_without_moe_hf(program: str, folder: Path, ids: torch.Tensor, python: str = sys.executable) -> Path:
    """Run `program`, which finds `folder/saved` and `folder/again` as `folder` and `again`, and `ids`; returns the latter."""
    saved, again = folder / "saved", folder / "again"
    torch.save(ids, saved / "ids.pt")
    environment = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [python, "-c", BLOCKED + program, str(saved), str(again)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env={**os.environ, **environment},
        cwd=saved,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return again


def logits_without_moe_hf(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of `folder/saved`, loaded, saved as `folder/again` and loaded once more, all without moe_hf."""
    return torch.load(run_without_moe_hf(LOAD_TWICE, folder, ids) / "logits.pt")
