"""Tasks made from CPython's library, which every machine has: instructions, questions, preferences, labelled code.

Each function returns a dataset in the form that a training program reads, and that a file or a Hub dataset may have
instead. Every row has a `document`, the file that it comes from, so that whole files can be held out.
"""

import ast
import io
import keyword
import random
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from datasets import Dataset

from moe_hf.data import builtin_corpus, load_rows
from moe_hf.errors import MoEError


# Longer functions would not fit the context of a small model.
LONGEST_SOURCE, LONGEST_ANSWER = 700, 160
# Names of token classes, in the order of their ids.
TOKEN_CLASSES = ("keyword", "name", "number", "string", "operator", "comment")


@dataclass(frozen=True)
class LibraryFunction:
    """A function of the library that has a docstring.

    Attributes:
        signature: `def name(...):`, on one line.
        summary: first sentence of its docstring.
        body: its source without decorators and docstring.
    """

    document: str
    name: str
    signature: str
    summary: str
    body: str
    arguments: tuple[tuple[str, str | None], ...]  # (name, default)


@cache
def library_functions() -> tuple[LibraryFunction, ...]:
    """The documented functions of CPython's library, in the order of files and lines."""
    code = builtin_corpus().filter(lambda row: row["domain"] == "code")
    found = []
    for row in code:
        try:
            tree = ast.parse(row["text"])
        except SyntaxError:  # templates of tools, which are no modules
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                function = _described(node, row["document"])
                if function is not None:
                    found.append(function)
    return tuple(found)


def _described(node: ast.FunctionDef, document: str) -> LibraryFunction | None:
    docstring = ast.get_docstring(node)
    if not docstring:
        return None
    summary = re.split(r"(?<=\.)\s|\n\s*\n", docstring.strip(), maxsplit=1)[0]
    summary = " ".join(summary.split())
    positional = [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(positional) - len(node.args.defaults)) + [ast.unparse(d) for d in node.args.defaults]
    body = "\n".join(ast.unparse(statement) for statement in node.body[1:])
    source = f"def {node.name}({ast.unparse(node.args)}):"
    if not body or len(source) + len(body) > LONGEST_SOURCE or not 10 <= len(summary) <= LONGEST_ANSWER:
        return None
    arguments = tuple((a.arg, d) for a, d in zip(positional, defaults, strict=True) if a.arg not in ("self", "cls"))
    return LibraryFunction(document, node.name, source, summary, body, arguments)


def _source(function: LibraryFunction) -> str:
    indented = "\n".join(f"    {line}" for line in function.body.splitlines())
    return f"{function.signature}\n{indented}"


def instructions() -> Dataset:
    """Chats of one turn, column `messages`: a function is given, and its docstring or its signature is asked for.

    Columns: `messages`, `domain` (the kind of task), `document`.
    """
    rows = []
    for function in library_functions():
        request = f"Write a docstring for this function.\n\n{_source(function)}"
        rows.append(_row(function, "docstring", messages=_chat(request, function.summary)))
        request = f"Write the first line of a Python function.\n\n{function.summary}"
        rows.append(_row(function, "signature", messages=_chat(request, function.signature)))
    return Dataset.from_list(rows)


def questions() -> Dataset:
    """Questions whose answer stands in a docstring or signature: `messages`, `answer`, `domain`, `document`."""
    rows = []
    for function in library_functions():
        context = f'{function.signature}\n    """{function.summary}"""'
        for kind, question, answer in _questions_about(function):
            request = f"{context}\n\n{question}"
            rows.append(_row(function, kind, messages=_chat(request, answer), answer=answer))
    return Dataset.from_list(rows)


def _questions_about(function: LibraryFunction) -> Iterator[tuple[str, str, str]]:
    returned = re.fullmatch(r"Returns? (.+?)\.?", function.summary)
    if returned:
        yield "returns", f"What does {function.name} return?", returned[1]
    for name, default in function.arguments:
        if default is not None and len(default) <= 20:
            yield "default", f"What is the default of {name}?", default
            break
    if len(function.arguments) > 1:
        (first, _), (second, _) = function.arguments[:2]
        yield "parameter", f"Which parameter follows {first}?", second


def preferences(seed: int = 0) -> Dataset:
    """Pairs for preference training: `prompt`, `chosen`, `rejected` (chats), `domain`, `document`.

    The chosen docstring is the function's own, the rejected one that of another function of the same file.
    """
    generator, rows = random.Random(seed), []
    by_document: dict[str, list[LibraryFunction]] = {}
    for function in library_functions():
        by_document.setdefault(function.document, []).append(function)
    for functions in by_document.values():
        for function in functions:
            others = [other.summary for other in functions if other.summary != function.summary]
            if others:
                prompt, chosen = _chat(
                    f"Write a docstring for this function.\n\n{_source(function)}", function.summary
                )
                rejected = {"role": "assistant", "content": generator.choice(others)}
                rows.append(_row(function, "docstring", prompt=[prompt], chosen=[chosen], rejected=[rejected]))
    return Dataset.from_list(rows)


def labelled_functions(num_labels: int = 8) -> Dataset:
    """Functions and the package that they come from: `text`, `label` (the package's name), `domain`, `document`.

    Args:
        num_labels (`int`): the packages with the most functions.
    """
    functions = [function for function in library_functions() if "/" in function.document]
    packages = [function.document.split("/")[0] for function in functions]
    most = sorted(set(packages), key=lambda name: (-packages.count(name), name))[:num_labels]
    rows = [
        _row(function, "function", text=_source(function), label=package)
        for function, package in zip(functions, packages, strict=True)
        if package in most
    ]
    return Dataset.from_list(rows)


def labelled_tokens() -> Dataset:
    """Functions cut into Python's tokens, each with its class: `tokens`, `tags` (names of classes), `domain`, `document`."""
    rows = []
    for function in library_functions():
        words, tags = _token_classes(_source(function))
        rows.append(_row(function, "function", tokens=words, tags=tags))
    return Dataset.from_list(rows)


def _token_classes(source: str) -> tuple[list[str], list[str]]:
    classes = {tokenize.NAME: "name", tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.OP: "operator"}
    words, tags = [], []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        tag = "comment" if token.type == tokenize.COMMENT else classes.get(token.type)
        if tag is not None:
            words.append(token.string)
            tags.append("keyword" if keyword.iskeyword(token.string) else tag)
    return words, tags


def multi_task_text() -> Dataset:
    """Texts of three tasks with their ids: `text`, `task_ids`, `domain` (the task's name), `document`."""
    rows = []
    for function in library_functions():
        rows.append(_row(function, "code", text=_source(function), task_ids=0))
        text = f"{_source(function)}\nDocstring: {function.summary}"
        rows.append(_row(function, "docstring", text=text, task_ids=1))
        for _, question, answer in _questions_about(function):
            text = f"{function.signature} {function.summary}\n{question} {answer}"
            rows.append(_row(function, "question", text=text, task_ids=2))
    return Dataset.from_list(rows)


def _chat(request: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def _row(function: LibraryFunction, domain: str, **columns) -> dict:
    return {**columns, "domain": domain, "document": function.document}


LIBRARY_TASKS: dict[str, Callable[[], Dataset]] = {
    "builtin_instructions": instructions,
    "builtin_questions": questions,
    "builtin_preferences": preferences,
    "builtin_functions": labelled_functions,
    "builtin_tokens": labelled_tokens,
    "builtin_tasks": multi_task_text,
}


def library_task(name: str) -> Dataset:
    """The dataset called `name` in `LIBRARY_TASKS`.

    Raises:
        MoEError: an unknown name.
    """
    if name not in LIBRARY_TASKS:
        raise MoEError(f"No built-in dataset {name!r}; there are builtin, {', '.join(LIBRARY_TASKS)}.")
    return LIBRARY_TASKS[name]()


def load_task(dataset: str, split: str) -> Dataset:
    """The rows of a dataset in `LIBRARY_TASKS`, of a file, or of a dataset on the Hub.

    Raises:
        MoEError: see [`library_task`] and [`moe_hf.data.load_rows`].
    """
    return library_task(dataset) if dataset.startswith("builtin") else load_rows(dataset, split)
