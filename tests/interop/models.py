"""What the tools are given: a tiny upcycled model with a tokenizer, and what transformers computes with it."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moe_hf import export_native, upcycle
from moe_hf.data import builtin_corpus, train_tokenizer
from moe_hf.hub import save_model
from moe_hf.trainer.chats import CHAT_TEMPLATE
from tests.families import MULTIPLIERS
from tests.tiny_models import tiny_dense


VOCAB_SIZE = 510
NEW_TOKENS = 24
# vLLM's attention on CPUs wants heads of 32, 64, ...; its kernel for experts widths that are multiples of 32.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
}
SIGMOID = {"scoring_func": "sigmoid"}
# Each native family, from a dense one, with fields of the dense model and of its experts that use what it can hold.
NATIVE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("llama", {}, {}),
    "qwen3_moe": ("qwen3", {}, {}),
    # Of this and granitemoe llama.cpp takes the heads for as wide together as the model, and here the weights of a token for
    # not normalised, whatever the config says.
    "qwen2_moe": (
        "qwen2",
        {"hidden_size": 256},
        {"norm_topk_prob": False, "shared_expert_intermediate_size": 128, "shared_expert_gate": True},
    ),
    "granitemoe": ("granite", MULTIPLIERS | {"hidden_size": 256}, {}),
    "granitemoeshared": ("granite", MULTIPLIERS | {"hidden_size": 256}, {"shared_expert_intermediate_size": 128}),
    "granitemoe_swa": ("granite_swa", {"hidden_size": 256}, {"shared_expert_intermediate_size": 128}),
    "ernie4_5_moe": ("ernie4_5", {}, {}),
    "lfm2_moe": ("lfm2", {"hidden_size": 256}, SIGMOID),
    "flex_olmo": ("olmo2", {}, {}),
    "cohere2_moe": ("cohere2", {}, {}),
    "hunyuan_v1_moe": ("hunyuan_v1_dense", {}, {"shared_expert_intermediate_size": 192}),
    "qwen3_5_moe_text": ("qwen3_5_text", {}, {"shared_expert_intermediate_size": 128, "shared_expert_gate": True}),
    "glm4_moe": ("qwen3", {}, SIGMOID | {"first_k_dense_replace": 1, "shared_expert_intermediate_size": 192}),
    # llama.cpp gives it as many key-value heads as heads.
    "dots1": ("qwen3", {"num_key_value_heads": 4}, SIGMOID | {"shared_expert_intermediate_size": 192}),
    "solar_open": ("llama", {}, SIGMOID | {"shared_expert_intermediate_size": 192}),
}
# What no native family of transformers holds as it is, and our own code computes: routers and experts of several kinds.
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3, sigmoid, bias, gated shared expert": (
        "qwen3",
        SIGMOID | {"balance_strategy": "bias", "shared_expert_intermediate_size": 96, "shared_expert_gate": True},
    ),
    "cosine router, dense FFN": ("llama", {"router_arch": "cosine", "moe_dense_ffn": "after"}),
    "top-p": ("llama", {"router_type": "top_p"}),
    "4, 2 and 3 experts": ("llama", {"num_experts_per_layer": [4, 2, 3]}),
}
PROMPTS = (
    "The import statement combines two operations",
    "A list comprehension",
    "def __init__(self, name):",
    "An exception can be handled by the caller of the function, or of",
)


def documents(count: int, characters: int = 400) -> list[str]:
    """The beginnings of some documents about Python."""
    texts = list(builtin_corpus().filter(lambda row: row["domain"] == "prose")["text"])
    return [text[:characters] for text in texts if len(text) > characters][:count]


@dataclass(frozen=True)
class Answers:
    """What transformers computes in float32, one entry per prompt: ids, logits (S, V), greedy continuation."""

    ids: list[list[int]]
    logits: list[torch.Tensor]
    tokens: list[list[int]]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model and its tokenizer."""

    folder: Path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def model(self) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        # Random weights end a text at any place; the tools are told to go on, too.
        model.generation_config.eos_token_id = None
        return model

    @cached_property
    def answers(self) -> Answers:
        """Of `PROMPTS`."""
        ids = [self.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        with torch.no_grad():
            logits = [self.model(torch.tensor([row])).logits[0] for row in ids]
        tokens = [self.greedy(row) for row in ids]
        return Answers(ids, logits, tokens)

    def greedy(self, ids: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
        """What `generate` appends."""
        output = self.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=new_tokens)
        tokens = output[0, len(ids) :].tolist()
        assert len(tokens) == new_tokens
        return tokens

    @torch.no_grad()
    def log_probabilities_of_tokens(self) -> list[list[float]]:
        """Of the greedy tokens, each after those before it."""
        rows = []
        for ids, tokens in zip(self.answers.ids, self.answers.tokens, strict=True):
            logits = self.model(torch.tensor([ids + tokens[:-1]])).logits[0, len(ids) - 1 :]
            rows.append(logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist())
        return rows

    def write_answers(self, file: Path) -> Path:
        """Ids and greedy tokens as JSON, for a program in another environment."""
        file.write_text(json.dumps({"texts": PROMPTS, "ids": self.answers.ids, "tokens": self.answers.tokens}))
        return file


def make_ours(folder: Path, family: str, fields: dict[str, Any] | None = None, **moe_fields) -> Checkpoint:
    """An upcycled model of 4 experts that differ, in our own layout, as `save_model` writes it.

    `fields` are the dense model's besides `SIZES`, `moe_fields` those of its experts.
    """
    text = documents(60, 2000)
    tokenizer = train_tokenizer(Dataset.from_dict({"text": text}), VOCAB_SIZE)
    tokenizer.chat_template = CHAT_TEMPLATE
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    dense = tiny_dense(family, vocab_size=len(tokenizer), **SIZES | special | (fields or {}))
    moe = upcycle(dense, num_experts=4, noise=0.5, allow_inexact=True, **moe_fields)
    for name, parameter in moe.named_parameters():
        if "shared_expert_gate" in name:
            # As training leaves it: an upcycled gate is zero, and of that llama.cpp makes NaN.
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    save_model(moe, tokenizer, folder)
    return Checkpoint(folder)


def export(ours: Checkpoint, folder: Path, target: str) -> Checkpoint:
    """The same model as a native family."""
    return Checkpoint(export_native(ours.folder, folder, target))
