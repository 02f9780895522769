"""Loads a saved model in a process that cannot import moe_hf, by the code that travelled with it."""

import os
import subprocess
import sys
from pathlib import Path

import torch


ISOLATED = """
import sys, torch
from transformers import AutoModelForCausalLM

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moe_hf":
            raise ModuleNotFoundError("moe_hf is blocked")

sys.meta_path.insert(0, Blocked())
folder, again = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(again)
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
ids = torch.load(folder + "/ids.pt")
torch.save(model(ids).logits.detach(), again + "/logits.pt")
"""


def logits_without_moe_hf(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of `folder/saved`, loaded, saved as `folder/again` and loaded once more, all without moe_hf."""
    torch.save(ids, folder / "saved" / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", ISOLATED, str(folder / "saved"), str(folder / "again")],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": ""},
        cwd=folder / "saved",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "again" / "logits.pt")
