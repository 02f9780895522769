"""Routing statistics in two processes; run by `test_statistics_distributed.py`, which starts them."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_hf import MoEError
from moe_hf.reporting.routing_statistics import routing_statistics
from tests.processes import run_cases
from tests.tiny_models import random_ids, tiny_native_moe


def batches(seeds: range) -> list[dict[str, torch.Tensor]]:
    """Batches of different lengths, one with padding, with an id per row."""
    rows = [
        {"input_ids": random_ids(2, 8 + 5 * seed, seed=seed), "task_ids": torch.tensor([seed, 0])} for seed in seeds
    ]
    for seed, batch in zip(seeds, rows, strict=True):
        if seed == 1:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"]).index_fill_(1, torch.tensor([0]), 0)
    return rows


def texts(rank: int | None) -> dict[str, list]:
    """Two domains; the second process has no text of the second one. With None: all."""
    parts = [{"a": batches(range(2)), "b": batches(range(3, 4))}, {"a": batches(range(2, 5)), "b": []}]
    return parts[rank] if rank is not None else {name: parts[0][name] + parts[1][name] for name in "ab"}


def union(folder: Path) -> Any:
    """The figures of two processes, in both, and of one on the whole text."""
    assert dist.get_world_size() == 2
    model, other = tiny_native_moe("mixtral"), tiny_native_moe("mixtral", seed=1)
    options = {"against": other, "sample_tokens": 50}
    both = routing_statistics(model, texts(dist.get_rank()), all_processes=True, **options).to_dict()
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, both)
    return {"both": everyone, "one": routing_statistics(model, texts(None), **options).to_dict()}


def nothing_in_one(folder: Path) -> Any:
    """One process has no text at all, and takes part."""
    model, rank = tiny_native_moe("mixtral"), dist.get_rank()
    found = routing_statistics(model, batches(range(2)) if rank else [], all_processes=True)
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, found.to_dict())
    return {"both": everyone, "one": routing_statistics(model, batches(range(2))).to_dict()}


def failures(folder: Path) -> list[str]:
    """The errors of both processes: a batch without tokens in one; other domains in one; no text in both."""
    model, rank = tiny_native_moe("mixtral"), dist.get_rank()
    bad = [{"labels": torch.ones(1, 2)}]
    found = []
    for data in (batches(range(1)) if rank else bad, {f"domain {rank}": batches(range(1))}, []):
        try:
            routing_statistics(model, data, all_processes=True)
            found.append("no error")
        except MoEError as error:
            found.append(str(error))
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, found)
    return everyone


CASES = {"union": union, "nothing in one": nothing_in_one, "failures": failures}


if __name__ == "__main__":
    run_cases(CASES, Path(sys.argv[1]))
