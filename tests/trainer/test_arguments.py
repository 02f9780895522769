"""Recipes and command lines: what wins, what is converted, and what is refused with the nearest name."""

import re
from pathlib import Path

import pytest

from moe_hf import MoEError
from moe_hf.trainer.arguments import (
    ConfigArguments,
    DataArguments,
    FinetuneArguments,
    ModelArguments,
    MoEArgumentParser,
    MoETrainingArguments,
    find_recipe,
)
from moe_hf.trainer.comparison import ComparisonArguments


RECIPES = Path(__file__).parents[2] / "training" / "recipes"
FINETUNE = (ModelArguments, DataArguments, FinetuneArguments)
PRETRAIN = (ConfigArguments, DataArguments, MoETrainingArguments)


def recipe(tmp_path: Path, text: str) -> str:
    """Write a recipe and return its path."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


OF_THESE_PROGRAMS = [
    path for path in sorted(RECIPES.glob("*.yaml")) if re.search(r"moe-hf (finetune|pretrain) ", path.read_text())
]


@pytest.mark.parametrize("path", OF_THESE_PROGRAMS, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses(path, tmp_path):
    classes = PRETRAIN if path.stem.startswith("pretrain") else FINETUNE
    classes = classes if path.stem.startswith("pretrain") else (*classes, ComparisonArguments)
    argv = ["--config", str(path), "--output_dir", str(tmp_path)]
    first, data, training, *_ = MoEArgumentParser(classes).parse(argv)
    assert data.dataset.startswith("builtin") and training.max_steps > 0
    # A pretrained model's rate depends on its size.
    assert (training.learning_rate is None) == (not path.stem.startswith("pretrain"))
    assert training.scope in ("moe", "all", "expert_lora", None)
    assert (training.scope is None) == path.stem.startswith("pretrain")
    assert find_recipe(path.stem) == find_recipe(path.name) == path


def test_command_line_wins_over_recipe_and_recipe_over_defaults(tmp_path):
    path = recipe(tmp_path, "learning_rate: 3e-4\nmax_steps: 7\npacked: false\ndomains: [a, b]\nsave_strategy: no\n")
    model, data, training = MoEArgumentParser(FINETUNE).parse(["--max_steps", "9", f"--config={path}", "--model", "m"])
    assert (training.learning_rate, training.max_steps, training.scope, model.model) == (3e-4, 9, "moe", "m")
    assert data.packed is False and data.domains == ["a", "b"] and data.block_size == 256
    assert training.save_strategy == "no" and training.logging_nan_inf_filter is False


def test_model_config_is_a_map_in_a_recipe_and_json_on_the_command_line(tmp_path):
    path = recipe(tmp_path, "model_config: {model_type: llama, hidden_size: 64}\n")
    parser = MoEArgumentParser(PRETRAIN)
    assert parser.parse(["--config", path])[0].model_config == {"model_type": "llama", "hidden_size": 64}
    parser = MoEArgumentParser(PRETRAIN)
    assert parser.parse(["--model_config", '{"model_type": "gpt2"}'])[0].model_config == {"model_type": "gpt2"}
    with pytest.raises(MoEError, match="model_type"):
        MoEArgumentParser(PRETRAIN).parse(["--model_config", '{"hidden_size": 64}'])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1.0\n", "Unknown key 'learning_rte'.*Did you mean 'learning_rate'"),
        ("- scope\n", "not a map"),
        ("scope: [moe\n", "not YAML"),
        ("scope: !!python/object/apply:os.getcwd []\n", "not YAML"),
        ("max_steps: many\n", "max_steps.*invalid int value: 'many'"),
        ("max_steps: 1.5\n", "max_steps.*invalid int value: '1.5'"),
        ("eval_strategy: sometimes\n", "sometimes"),
    ],
)
def test_bad_recipe_is_refused(text, message, tmp_path):
    with pytest.raises(MoEError, match=message):
        MoEArgumentParser(FINETUNE).parse(["--config", recipe(tmp_path, text)])


def test_a_recipe_of_another_program_says_so():
    with pytest.raises(MoEError, match="Unknown key .* it is for `moe-hf dpo`"):
        MoEArgumentParser(FINETUNE).parse(["--config", "preferences"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat", "1"], "Unknown option --learning_rat. Did you mean '--learning_rate'"),
        (["--config", "absent.yaml"], "No recipe 'absent.yaml'.*finetune_moe"),
        (["--config", "folder/absent.yaml"], "No recipe at"),
        (["--config"], "expected one argument"),
        (["--max_steps"], "expected one argument"),
        (["stray"], "Unrecognized arguments: stray"),
    ],
)
def test_bad_command_line_is_refused(argv, message):
    with pytest.raises(MoEError, match=message):
        MoEArgumentParser(FINETUNE).parse(argv)
