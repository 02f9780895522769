"""What counts as the same computation, and that tests which ask it are among those that `make numerics` runs."""

import ast
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.check_numerics import MACHINES, obstacle, running
from tests.closeness import SUMMANDS, bitwise, close, rounding


TESTS = Path(__file__).parent
FILES = [path for path in sorted(TESTS.rglob("*.py")) if path != Path(__file__)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_order_of_a_sum_is_close_and_what_rounding_cannot_explain_is_not(dtype):
    rows, weights = torch.randn(50, SUMMANDS, dtype=dtype), torch.randn(SUMMANDS, 7, dtype=dtype)
    order = torch.randperm(SUMMANDS)
    products = rows @ weights
    again = rows[:, order] @ weights[order]
    assert close(again, products) and not torch.equal(again, products)
    again[3, 2] += 3 * rounding(dtype) * products.abs().max()
    assert not close(again, products)


def test_only_numbers_of_one_kind_and_shape_are_close_and_integers_bitwise():
    ones = torch.ones(3)
    assert close(ones, ones * (1 + 1e-7)) and close(torch.arange(3), torch.arange(3))
    for other in (ones.double(), torch.ones(3, 1), torch.ones(2), torch.tensor([1, 1, torch.nan]), ones * torch.inf):
        assert not close(other, ones) and not close(ones, other)
    assert not close(torch.tensor([1_000_000]), torch.tensor([1_000_001]))
    assert bitwise({"a": ones}, {"a": ones.clone()}) and not bitwise({"a": ones}, {"a": ones.double()})
    assert not bitwise({"a": ones}, {"a": ones * (1 + 2e-7)}) and not bitwise({"a": ones}, {})


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def names_in(node: ast.AST) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def test_what_is_compared_by_closeness_runs_in_make_numerics():
    unmarked, asked = [], 0
    for path in FILES:
        tree = ast.parse(path.read_text())
        imported = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "tests.closeness"]
        if not any(alias.name == "close" for node in imported for alias in node.names):
            continue
        whole = any("numerics" in ast.unparse(n) for n in tree.body if isinstance(n, ast.Assign))
        compare = {"close"}
        # Helpers that compare, and what calls them.
        for _ in range(3):
            compare |= {function.name for function in functions(tree) if names_in(function) & compare}
        for function in functions(tree):
            if function.name.startswith("test_") and function.name in compare:
                asked += 1
                if not whole and not any("numerics" in ast.unparse(mark) for mark in function.decorator_list):
                    unmarked.append(f"{path.relative_to(TESTS)}::{function.name}")
    assert asked > 20 and unmarked == []


def model_of(expression: ast.expr, values: dict[str, ast.expr]) -> str | None:
    """`m` of `m(ids).logits`, `logits(m, ids)` and `logits_of(m)`, and of a name that stands for one of these."""
    if isinstance(expression, ast.Name) and expression.id in values:
        expression = values[expression.id]
    if (
        isinstance(expression, ast.Attribute)
        and expression.attr == "logits"
        and isinstance(expression.value, ast.Call)
    ):
        return ast.unparse(expression.value.func)
    if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name) and expression.args:
        return ast.unparse(expression.args[0]) if expression.func.id in ("logits", "logits_of") else None
    return None


def test_logits_of_two_models_are_never_compared_bitwise():
    found = []
    for path in FILES:
        for function in functions(ast.parse(path.read_text())):
            assigned = [n for n in ast.walk(function) if isinstance(n, ast.Assign) and len(n.targets) == 1]
            values = {node.targets[0].id: node.value for node in assigned if isinstance(node.targets[0], ast.Name)}
            negated = [
                n.operand for n in ast.walk(function) if isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.Not)
            ]
            for call in ast.walk(function):
                is_equal = isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.equal"
                if not is_equal or call in negated:
                    continue
                models = [model_of(argument, values) for argument in call.args]
                if None not in models and models[0] != models[1]:
                    found.append(f"{path.relative_to(TESTS)}:{call.lineno}: {ast.unparse(call)}")
    assert found == [], "copies of weights may lie elsewhere in memory: compare by tests.closeness.close"


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or shutil.which("cc") is None, reason="the library needs cc and glibc"
)
def test_tensors_start_anywhere_on_the_misaligned_machine():
    assert obstacle(MACHINES["misaligned"]) is None
    program = "import torch; print({torch.empty(n).data_ptr() % 16 for n in range(1, 200)})"
    with running(MACHINES["misaligned"]) as environment:
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "{0, 8}", done.stderr
