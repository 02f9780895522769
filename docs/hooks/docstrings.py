"""The docstrings of moe_hf, which are written as those of transformers are, in the form that griffe reads.

Public names get their place in `moe_hf`, where they are loaded on first use and a reader of the source finds none. Types come
from the annotations, which are complete; what a docstring says of a name that does not exist is a warning, an error in a
strict build.
"""

import dataclasses
import inspect
import logging
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import griffe

import moe_hf


# Below MkDocs' own logger, so that a strict build counts what is warned of.
log = logging.getLogger("mkdocs.plugins.moe_hf.docstrings")
REFERENCE = re.compile(r"\[`([\w.]+)`\](?![\[(])")
# `name (`type`, *optional*): text`; several names may share a line.
ITEM = re.compile(r"^( {4})(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \(.*?\))?:(?= |$)(.*)$")
# The entries of the reference by their last name.
PAGES = Path(__file__).parents[1] / "api"
PLACES = {
    path.rpartition(".")[2]: path
    for page in sorted(PAGES.glob("*.md"))
    for path in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
}
NEXT_NAME = ",\N{NO-BREAK SPACE}"
SECTIONS = ("Args", "Attributes", "Returns", "Raises")


class MoEDocstrings(griffe.Extension):
    """What is changed between reading the source and rendering it."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Add the public names, and rewrite all docstrings."""
        if pkg.path != "moe_hf":
            return
        for name in moe_hf.__all__:
            value = getattr(moe_hf, name)
            pkg.set_member(name, griffe.Alias(name, f"{value.__module__}.{value.__qualname__}"))
        for item in _objects(pkg):
            if item.is_class:
                _describe_fields(item)
            if item.docstring is not None:
                item.docstring.value = rewritten(item.docstring.value, item)


def rewritten(text: str, item: griffe.Object) -> str:
    """A docstring in griffe's form: one entry per name, types from the annotations, references with their target."""
    lines, section = [], None
    for line in inspect.cleandoc(text).splitlines():
        title = line.removesuffix(":")
        if line and not line.startswith(" "):
            section = title if title in SECTIONS else None
        if section in ("Args", "Attributes") and (match := ITEM.match(line)):
            lines.append(_entry(match, item, section))
        elif section == "Raises" and (match := re.match(r"^( {4})`?(\w+)`?:(.*)$", line)):
            lines.append(f"{match[1]}{match[2]}:{match[3]}")
        elif section == "Returns" and lines[-1] == "Returns:":
            lines.append(_returned(line.strip(), getattr(item, "returns", None)))
        else:
            lines.append(line)
    return REFERENCE.sub(lambda match: f"[`{match[1]}`][{_target(match[1])}]", "\n".join(lines))


def _returned(text: str, annotation: Any) -> str:
    """The first line of what is returned, with the type from the annotation, once."""
    if annotation is None:
        return f"    {text}"
    named = re.match(r"`([^`]+)`", text)
    if named and named[1].rpartition(".")[2] == str(annotation).rpartition(".")[2]:
        text = text[named.end() :].lstrip(" ,:")
    return f"    {annotation}: {text}"


def _entry(match: re.Match, item: griffe.Object, section: str) -> str:
    names = [name.lstrip("*") for name in match[2].split(", ")]
    for name in names:
        if not _knows(item, name):
            log.warning(f"{item.path}: {section} names {name}, which it does not have")
    # A row holds the names that share a description; griffe takes all before the colon for the name, and asks the
    # signature for a type. What transformers' `strict` makes of a class has none that can be read.
    member = item.members.get(names[0]) if item.is_class and names[0] not in item.parameters else None
    kind = f" ({member.annotation}, default {member.value})" if section == "Args" and member is not None else ""
    # griffe takes what follows a plain space for a type.
    return f"{match[1]}{NEXT_NAME.join(names)}{kind}:{match[3]}"


def _knows(item: griffe.Object, name: str) -> bool:
    """Whether a function takes it, or a class takes or has it; inherited names are asked of the class itself."""
    if item.is_function:
        return name in item.parameters
    if not item.is_class or name in item.members:
        return True
    value = getattr(import_module(item.module.path), item.name)
    return hasattr(value, name) or name in inspect.signature(value).parameters or f"self.{name}" in item.source


def _describe_fields(item: griffe.Class) -> None:
    """Give the fields of a dataclass whose help is in their metadata, as argument parsers want it, that help."""
    if "metadata=" not in item.source:
        return
    value = getattr(import_module(item.module.path), item.name, None)
    for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        text, member = field.metadata.get("help"), item.members.get(field.name)
        if text and member is not None and member.docstring is None:
            member.docstring = griffe.Docstring(text, parent=member)


def _target(name: str) -> str:
    """The path by which the pages of the reference show `name`; where they do not, the link is reported as broken."""
    return PLACES.get(name.rpartition(".")[2], name)


def _objects(item: griffe.Object) -> Iterator[griffe.Object]:
    for member in list(item.members.values()):
        if not member.is_alias:
            yield member
            yield from _objects(member)
