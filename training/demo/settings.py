"""What the demonstrations train on and how: their settings, the command line, and the dense model of the toy."""

import argparse
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedTokenizerBase

from moe_hf.errors import MoEError
from moe_hf.upcycling.initialisers import Granular


@dataclass(frozen=True)
class Settings:
    """All that the results of the toy depend on; every field is an argument of the command. Token counts are per seed."""

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
class RealSettings:
    """All that the results with a pretrained model depend on; every field is an argument of the command.

    The tokens that each run trains on follow from `minutes`, for all seeds together, and the speed of the first steps;
    `most_tokens` bounds them. Tokens of `evaluation_tokens` and `validation_tokens` are per domain. Every `layer_step`-th
    layer gets experts.
    """

    source: str | None = None
    seeds: int = 1
    minutes: float = 25.0
    code_characters: int = 500_000
    held_out_share: float = 0.15
    evaluation_tokens: int = 6_144
    validation_tokens: int = 2_560
    block_size: int = 512
    batch_size: int = 1
    most_tokens: int = 100_000
    moe_learning_rates: str = "1e-4,3e-4,1e-3"
    dense_learning_rates: str = "1e-4,3e-4,1e-3"
    warmup_share: float = 0.1
    weight_decay: float = 0.1
    num_experts: int = 4
    num_experts_per_tok: int = 2
    layer_step: int = 3
    answer_tokens: int = 48

    def learning_rates(self, start: str) -> list[float]:
        """The rates to try of the arm that starts from the `"moe"` or the `"dense"` model, in rising order.

        Raises:
            MoEError: no numbers above 0.
        """
        given = getattr(self, f"{start}_learning_rates")
        try:
            rates = sorted({float(rate) for rate in given.split(",")})
        except ValueError:
            rates = []
        if not rates or not all(0 < rate < 1 for rate in rates):
            raise MoEError(
                f"--{start}-learning-rates is {given!r}: give numbers between 0 and 1 with commas between, such as 1e-4,3e-4."
            )
        return rates


# `minutes` where they are not given: of one seed, and of each of several.
MINUTES, MINUTES_PER_SEED = 25.0, 30.0
REAL_TINY = {
    "code_characters": 120_000,
    "evaluation_tokens": 512,
    "validation_tokens": 256,
    "block_size": 64,
    "most_tokens": 1_024,
    "moe_learning_rates": "1e-4,3e-4",
    "dense_learning_rates": "1e-4,3e-4",
    "answer_tokens": 4,
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
    "granular_all": Arm("granular", "all"),
}
# The MLP in so many parts: as many experts of half the width as there are parameters in the other MoE's, of which a token takes
# two, so that it costs what it costs the dense model.
SHARDS = 2
MOES = ("moe", "granular")


def shape(start: str, settings: Settings) -> dict[str, Any]:
    """What `upcycle` is given for the MoE that arms start from: `"moe"`, whole experts, or `"granular"`, parts of them."""
    if start == "granular":
        init = Granular(shards=SHARDS)
        return {"num_experts": SHARDS * settings.num_experts, "num_experts_per_tok": SHARDS, "init": init}
    return {"num_experts": settings.num_experts, "num_experts_per_tok": settings.num_experts_per_tok}


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


def parse_arguments(arguments: list[str] | None, description: str) -> tuple[Settings | RealSettings, Path]:
    """The command line; `REAL`, `SEEDS`, `SOURCE` and `MINUTES` of the environment are defaults, for `make demo SEEDS=3`.

    Raises:
        MoEError: a value that cannot be, or `MINUTES` without `REAL`.
    """
    environment = {name: os.environ.get(name.upper()) or None for name in ("source", "seeds", "minutes")}
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--real", action="store_true", default=os.environ.get("REAL", "") not in ("", "0"))
    kind = RealSettings if first.parse_known_args(arguments)[0].real else Settings
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--real", action="store_true", help="a pretrained model instead of a small one (REAL=1)")
    parser.add_argument("--output-dir", type=Path, help="folder of everything (demo, or demo/real)")
    parser.add_argument("--tiny", action="store_true", help="all stages on very little text, to see that they work")
    for field in fields(kind):
        field_type = str if field.default is None else type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field_type, help=f"default: {field.default}")
    given = vars(parser.parse_args(arguments))
    output_dir, tiny = given.pop("output_dir"), given.pop("tiny")
    del given["real"]
    overrides = {name: value for name, value in given.items() if value is not None}
    chosen = {name: value for name, value in (environment | overrides).items() if value is not None}
    chosen["seeds"] = _number(chosen.get("seeds", 1), "SEEDS", int, "the number of seeds, such as 3", at_least=1)
    if kind is Settings:
        if "minutes" in chosen:
            raise MoEError("MINUTES is for REAL=1: what the demo without it trains on does not depend on time.")
        return replace(Settings(**TINY) if tiny else Settings(), **chosen), output_dir or Path("demo")
    seeds = chosen["seeds"]
    minutes = chosen.get("minutes", MINUTES if seeds == 1 else MINUTES_PER_SEED * seeds)
    chosen["minutes"] = _number(minutes, "MINUTES", float, "how long the run may take, such as 25", at_least=0.1)
    settings = replace(RealSettings(**REAL_TINY) if tiny else RealSettings(), **chosen)
    for name, value in vars(settings).items():
        if type(value) is int:
            _number(value, f"--{name.replace('_', '-')}", int, "a whole number", at_least=1)
    for start in ("moe", "dense"):
        settings.learning_rates(start)
    return settings, output_dir or Path("demo/real")


def _number(value: str | float, name: str, kind: type, wanted: str, at_least: float) -> int | float:
    """`value` as a number; it may come from the environment."""
    try:
        number = kind(value)
    except ValueError:
        raise MoEError(f"{name} is {value!r}: give {wanted}.") from None
    if not at_least <= number < float("inf"):
        raise MoEError(f"{name} is {value}: at least {at_least} is needed.")
    return number
