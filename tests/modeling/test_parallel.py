"""Two gloo ranks: tensor and expert parallelism and FSDP2 give one process's logits, gradients and saved weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_hf import upcycle
from tests.tiny_models import tiny_dense


WORKER = Path(__file__).parent / "parallel_worker.py"
ROOT = WORKER.parents[2]
SIZES = {"vocab_size": 112, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "family",
    [pytest.param("llama", id="gated"), pytest.param("starcoder2", id="plain_biased")],
)
def test_sharded_model_equals_the_whole_one(family, tmp_path):
    quiet = {"residual_dropout": 0.0, "embedding_dropout": 0.0} if family == "starcoder2" else {}
    torch.manual_seed(0)
    upcycle(tiny_dense(family, **SIZES, **quiet), num_experts=4, noise=0.2).save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [str(WORKER), str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("compared tp tp_ep fsdp ep_fsdp") == 2
