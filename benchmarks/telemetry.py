"""What the routing telemetry costs: CPU time of a training step with and without it, taken in turns, one thread.

OMP_NUM_THREADS=1 python -m benchmarks.telemetry [--rounds 12]
"""

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import moe_hf
from moe_hf.finetuning.router_watch import RouterWatch
from moe_hf.trainer.telemetry import LoadCounts, summarise


SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
LOGGING_STEPS = 10


def build(kind: str) -> PreTrainedModel:
    """A MoE of 8 experts, 2 per token, this package's or Mixtral."""
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=8)).train()
    return moe_hf.upcycle(LlamaForCausalLM(LlamaConfig(**SIZES)), num_experts=8, noise=0.5).train()


def step_seconds(model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """CPU time of one training step."""
    start = time.process_time()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def measure(kind: str, tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step without telemetry, and the share that telemetry adds, a log every ten steps included."""
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, SIZES["vocab_size"], (tokens // 256, 256))
    plain, watched, logging = [], [], []
    for round_number in range(rounds + 1):
        counts = LoadCounts()
        watch = RouterWatch(model, lambda watch, _, counts=counts: counts.add(watch.decisions, watch.scoring_func))
        seconds = step_seconds(model, optimizer, ids)
        watch.remove()
        start = time.process_time()
        summarise(counts.take())
        log_seconds = time.process_time() - start
        without = step_seconds(model, optimizer, ids)
        if round_number:  # the first of each warms up
            plain.append(without)
            watched.append(seconds)
            logging.append(log_seconds / LOGGING_STEPS)
    extra = torch.tensor(watched) + torch.tensor(logging) - torch.tensor(plain)
    step = float(torch.tensor(plain).median())
    return {"step_seconds": step, "telemetry_share": float(extra.median()) / step}


def main(argv: list[str] | None = None) -> None:
    """Measure both kinds of models at two batch sizes, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="tokens per step")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    for kind in ("ours", "mixtral"):
        for tokens in arguments.tokens:
            found = measure(kind, tokens, arguments.rounds)
            print(f"{kind:8} {tokens:5} tokens: step {found['step_seconds']:.3f} s, {found['telemetry_share']:+.2%}")


if __name__ == "__main__":
    main()
