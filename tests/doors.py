"""The private names of other libraries that our code touches: found in its source, listed in docs/versions.md, looked up.

A private name has an underscore, or lies in a module from which its library does not export it. `python -m tests.doors
OTHER_PYTHON` prints what differs between this environment and another one.
"""

import ast
import difflib
import importlib
import inspect
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType


ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "versions.md"
SOURCES = [path for part in ("moe_hf", "training") for path in sorted((ROOT / part).rglob("*.py"))]
LIBRARIES = ("transformers", "torch", "accelerate", "peft", "datasets", "huggingface_hub", "trl")
# Where transformers exports less than it documents: these modules are public without being at its top.
PUBLIC_MODULES = ("transformers.utils", "transformers.utils.logging", "transformers.modeling_outputs")
# Names of ours that a library has too, for something else.
OURS = {"_config", "_lock"}
PRIVATE = re.compile(r"_[A-Za-z]\w*")


def listed() -> dict[str, str]:
    """Names such as `transformers.Trainer._save`, and the rest of their row of the table."""
    table = TABLE.read_text().partition("## Private names")[2]
    rows = re.findall(r"^\| (`(?:[\w.]+)`(?:, `[\w.]+`)*) \| (.*) \|$", table, re.MULTILINE)
    return {name: rest for names, rest in rows for name in re.findall(r"`([\w.]+)`", names)}


def touched() -> dict[str, set[str]]:
    """What our code touches, with the files that do: imports by their whole name, attributes by their own."""
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    own = set().union(*(_defined(tree) for tree in trees.values()))
    found: dict[str, set[str]] = {}
    for path, tree in trees.items():
        theirs = _private_names_of_libraries() - OURS
        names = (_attributes(tree) - own) | ((_attributes(tree) | _defined(tree) | _strings(tree)) & theirs)
        for name in _imports(tree) | names:
            found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    return found


def _imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in LIBRARIES:
            names |= {f"{node.module}.{alias.name}" for alias in node.names if _is_private(node.module, alias.name)}
    return names


def _is_private(module: str, name: str) -> bool:
    if any(PRIVATE.fullmatch(part) for part in (*module.split("."), name)):
        return True
    library = module.split(".")[0]
    if library != "transformers" or module in PUBLIC_MODULES:
        return False
    return name not in _exported(library)


@cache
def _exported(library: str) -> frozenset[str]:
    return frozenset(dir(importlib.import_module(library)))


def _attributes(tree: ast.AST) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr)}


def _strings(tree: ast.AST) -> set[str]:
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {string for string in strings if PRIVATE.fullmatch(string)}


def _defined(tree: ast.AST) -> set[str]:
    """Private names of classes and instances: methods, class attributes, and what is assigned to."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
                names |= {part.name} if isinstance(part, ast.FunctionDef) else {getattr(t, "id", "") for t in targets}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if PRIVATE.fullmatch(name)}


@cache
def _private_names_of_libraries() -> frozenset[str]:
    """Private names that classes define which ours have for parents or are decorated like, and what they set."""
    import torch
    import transformers
    from transformers.integrations import moe

    names = ("PreTrainedModel", "PreTrainedConfig", "GenerationMixin", "Trainer", "TrainingArguments", "DynamicCache")
    parents = (*(getattr(transformers, name) for name in names), torch.nn.Module)
    classes = {cls for parent in parents for cls in parent.__mro__ if cls.__module__.split(".")[0] in LIBRARIES}
    files = {moe.__file__, *(inspect.getfile(cls) for cls in classes)}
    return frozenset().union(*(_defined(ast.parse(Path(file).read_text())) for file in files))


def unlisted_and_untouched() -> tuple[set[str], set[str]]:
    """Names that our code touches and the table lacks, and those that the table has and our code does not touch."""
    names, table = touched(), listed()
    short = {name.split(".")[-1]: name for name in table}
    return {name for name in names if name not in table and name not in short}, {
        name for name in table if name not in names and name.split(".")[-1] not in names
    }


def look_up(name: str) -> str | None:
    """The source of a listed name in the installed library; None where it is not there any more."""
    *path, last = name.split(".")
    owner = _resolve(path)
    if owner is None:
        return None
    value = inspect.getattr_static(owner, last, None) or _resolve(name.split("."))
    value = getattr(value, "__func__", value)
    if inspect.isfunction(value) or inspect.isclass(value):
        return inspect.getsource(value)
    if isinstance(value, ModuleType):
        return ""  # what is touched in it is listed by itself
    # An attribute of instances, or a value: the lines that speak of it.
    sources = [owner] if isinstance(owner, ModuleType) else [c for c in owner.__mro__ if c is not object]
    lines = [
        line.strip()
        for source in sources
        for line in _source_of(source).splitlines()
        if re.search(rf"\b{last}\b", line)
    ]
    return "\n".join(lines) or (None if value is None else repr(type(value)))


def _resolve(path: list[str]):
    for end in range(len(path), 0, -1):
        try:
            value = importlib.import_module(".".join(path[:end]))
        except ImportError:
            continue
        for name in path[end:]:
            value = getattr(value, name, None)
        return value
    return None


def _source_of(thing) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


def main(other: str | None) -> int:
    """Without another Python print the source of each listed name as JSON; with one, compare with what it prints."""
    here = {name: look_up(name) for name in listed()}
    if other is None:
        print(json.dumps(here))
        return 0
    done = subprocess.run([other, "-m", "tests.doors"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    there = json.loads(done.stdout.splitlines()[-1])
    changed = [name for name in here if here[name] != there[name]]
    for name in changed:
        print(f"== {name}" + (": it is not there any more" if there[name] is None else ""))
        old, new = (here[name] or "").splitlines(), (there[name] or "").splitlines()
        print(*difflib.unified_diff(old, new, lineterm="", n=1), sep="\n")
    print(f"{len(changed)} of {len(here)} private names changed{': ' if changed else ''}{', '.join(changed)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:] or [None]))
