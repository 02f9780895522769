"""What the demo trains on and how: the settings, their command line, and the dense model that they describe."""

import argparse
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from transformers import LlamaConfig, PreTrainedTokenizerBase

from moe_hf.errors import MoEError


@dataclass(frozen=True)
class Settings:
    """All that the results depend on; every field is an argument of the command. Token counts are per seed."""

    source: str | None = None
    seeds: int = 1
    vocab_size: int = 1024
    code_characters: int = 4_400_000
    held_out_share: float = 0.1
    evaluation_tokens: int = 40_000
    block_size: int = 128
    batch_size: int = 4
    hidden_size: int = 192
    intermediate_size: int = 448
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    pretraining_tokens: int = 1_003_520
    pretraining_learning_rate: float = 3e-3
    continued_tokens: int = 245_760
    # 0: 1e-3 for a model from scratch, and for a source what was measured for its size and each scope.
    continued_learning_rate: float = 0.0
    warmup_share: float = 0.05
    weight_decay: float = 0.1
    num_experts: int = 8
    num_experts_per_tok: int = 2
    expert_noise: float = 0.0


TINY = {
    "vocab_size": 512,
    "code_characters": 200_000,
    "evaluation_tokens": 2_048,
    "block_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pretraining_tokens": 8_192,
    "continued_tokens": 4_096,
}


@dataclass(frozen=True)
class Arm:
    """One continued training: from which model, what trains, and whether tokens are added up to the MoE's FLOPs."""

    start: str
    scope: str
    equal_flops: bool = False


ARMS = {
    "dense_ffn": Arm("dense", "ffn"),
    "dense_all": Arm("dense", "all"),
    "dense_all_equal_flops": Arm("dense", "all", equal_flops=True),
    "moe_moe": Arm("moe", "moe"),
    "moe_all": Arm("moe", "all"),
}


def dense_config(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """The dense model that is trained from scratch."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        max_position_embeddings=2 * settings.block_size,
        tie_word_embeddings=True,
        # Near 1 / sqrt(D); a model this narrow learns more slowly from the usual 0.02.
        initializer_range=0.05,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def parse_arguments(arguments: list[str] | None, description: str) -> tuple[Settings, Path]:
    """The command line; `SEEDS` and `SOURCE` of the environment are defaults, for `make demo SEEDS=3`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output-dir", type=Path, default=Path("demo"), help="folder of everything (demo)")
    parser.add_argument("--tiny", action="store_true", help="all stages on very little text, to see that they work")
    for field in fields(Settings):
        kind = str if field.default is None else type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help=f"default: {field.default}")
    given = vars(parser.parse_args(arguments))
    output_dir, tiny = given.pop("output_dir"), given.pop("tiny")
    environment = {name: os.environ.get(name.upper()) or None for name in ("source", "seeds")}
    overrides = {name: value for name, value in given.items() if value is not None}
    chosen = {name: value for name, value in (environment | overrides).items() if value is not None}
    try:
        chosen["seeds"] = int(chosen.get("seeds", 1))
    except ValueError:
        raise MoEError(f"SEEDS is {chosen['seeds']!r}: give the number of seeds, such as 3.") from None
    if chosen["seeds"] < 1:
        raise MoEError(f"SEEDS is {chosen['seeds']}: at least 1 is needed.")
    return replace(Settings(**TINY) if tiny else Settings(), **chosen), output_dir
