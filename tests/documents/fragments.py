"""Runs the Python of documents, and checks what is not run: that it compiles, and that its names and keywords exist."""

import ast
import inspect
import types
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from tests.documents.stand_ins import NAMES


def run(code: str, place: str, namespace: dict[str, Any]) -> None:
    """Run a block in the names of its page; what it reads and nobody set is a stand-in."""
    tree = ast.parse(code)
    for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
        if name in NAMES and name not in namespace:
            namespace[name] = NAMES[name]()
    exec(compile(tree, place, "exec"), namespace)


def complaints(code: str) -> Iterator[str]:
    """Names and keywords of `moe_hf` in a block that do not exist."""
    tree = ast.parse(code)
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name: import_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = import_module(node.module)
            yield from (f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name))
            known |= {a.asname or a.name: getattr(module, a.name, None) for a in node.names}
    known.setdefault("moe_hf", import_module("moe_hf"))
    for name in import_module("moe_hf").__all__:
        known.setdefault(name, getattr(known["moe_hf"], name))
    for node in ast.walk(tree):
        of_package = isinstance(node, ast.Attribute) and _value(node.value, known) is known["moe_hf"]
        if of_package and not hasattr(known["moe_hf"], node.attr):
            yield f"moe_hf.{node.attr}"
        if isinstance(node, ast.Call):
            yield from _unknown_keywords(node, known)


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
    """The module, function or class that an expression names, as far as it can be told without running it."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, known)
        return getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType | type) else None
    return None


def _unknown_keywords(node: ast.Call, known: dict[str, Any]) -> Iterator[str]:
    function = _value(node.func, known)
    if function is None or not callable(function) or not function.__module__.startswith("moe_hf"):
        return
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for keyword in node.keywords:
        if keyword.arg is not None and keyword.arg not in parameters:
            yield f"{ast.unparse(node.func)}({keyword.arg}=...)"
