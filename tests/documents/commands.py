"""Runs the commands of documents in this process, where imports have been paid for, and checks those that are not run.

`moe-hf`, `python` and `accelerate launch` are run, programs that these start in one process too; a block with another command needs a marker.
"""

import dataclasses
import glob
import itertools
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import typer
import yaml
from typer.testing import CliRunner

from moe_hf.cli import app
from moe_hf.cli import launch as cli_launch
from moe_hf.doctor.arguments import DoctorArguments
from moe_hf.trainer import arguments
from moe_hf.trainer.arguments import MoEArgumentParser
from moe_hf.trainer.comparison import ComparisonArguments
from tests.documents.blocks import ROOT


RUN = ("moe-hf", "python", "accelerate launch")
OPTIONS_OF_LAUNCH = ("--config_file", "--num_processes", "--num_machines", "--mixed_precision", "--machine_rank")
OPTIONS_OF_LAUNCH += ("--main_process_ip", "--main_process_port")

# Of `accelerate launch`, which documents name outside of blocks.
OF_ACCELERATE = {"--cpu", "--multi_gpu", "--quiet", *OPTIONS_OF_LAUNCH}
INLINE = re.compile(r"`((?:moe-hf|--)[^`]*)`")


class CommandError(Exception):
    """A command of a document that fails, or that cannot be run here."""


def commands_of(script: str) -> list[list[str]]:
    """The commands of a shell block, split as a shell does: comments left out, lines and open quotes joined."""
    commands, begun = [], ""
    for line in re.sub(r"\\\n", " ", script).splitlines():
        begun += line + "\n"
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:
            # A quote goes on in the next line.
            continue
        commands += [words] if words else []
        begun = ""
    if begun:
        raise CommandError(f"a quote is not closed in {begun.strip()!r}")
    return commands


def run(words: list[str]) -> None:
    """Run one command in the current folder."""
    words = [found for word in words for found in (sorted(glob.glob(word)) if "*" in word else [word])]
    words = _without_environment(words)
    if words[0] == "moe-hf":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli_launch, "launch", _launch_here)
            result = CliRunner().invoke(app, words[1:])
        _check(words, result.exit_code, result.output, result.exception)
    elif words[0] == "python":
        _run_program(words[1:])
    elif words[:2] == ["accelerate", "launch"]:
        _launch_here(words[2:])
    else:
        raise CommandError(f"{words[0]!r} is not run here: tests run {', '.join(RUN)}")


def check(words: list[str]) -> None:
    """Raise `CommandError` where a command that is not run has an option, a program or a file that is not there."""
    words = _without_environment(words)
    if words[0] == "moe-hf":
        _check_our_command(words[1:])
    elif words[0] == "make":
        for target in (word for word in words[1:] if "=" not in word):
            if not re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
                raise CommandError(f"there is no target {target} in the Makefile")
    elif words[0] == "python" or words[:2] == ["accelerate", "launch"]:
        options, program = ({}, words[1:]) if words[0] == "python" else _launch_options(words[2:])
        if "--config_file" in options and not (ROOT / options["--config_file"]).is_file():
            raise CommandError(f"there is no {options['--config_file']}")
        _check_program(program)
    elif _is_missing(words[0]):
        raise CommandError(f"there is no {words[0]}")


def inline_complaints(text: str) -> Iterator[str]:
    """Commands of `moe-hf`, and options of it and of the training programs, that a text names and that do not exist."""
    group = typer.main.get_command(app)
    options = {
        name: {o for p in command.params for o in p.opts} | {"--help"} for name, command in group.commands.items()
    }
    for name in cli_launch.PROGRAMS:
        options[name] |= _program_options()
    everywhere = set().union(OF_ACCELERATE, *options.values(), {"--version"})
    for span in INLINE.findall(text):
        words = span.split()
        names_command = words[0] == "moe-hf" and len(words) > 1 and words[1].islower() and words[1][0] != "-"
        command = words[1] if names_command else None
        if command is not None and command not in options:
            yield f"moe-hf {command}"
            continue
        known = everywhere if command is None else options[command]
        yield from (f"{word} in `{span}`" for word in words if word.startswith("--") and word not in known)


def _program_options() -> set[str]:
    kinds = (
        ComparisonArguments,
        DoctorArguments,
        arguments.FinetuneArguments,
        arguments.ModelArguments,
        arguments.DataArguments,
        arguments.ConfigArguments,
    )
    return {"--config", *(f"--{field.name}" for kind in kinds for field in dataclasses.fields(kind))}


def _without_environment(words: list[str]) -> list[str]:
    """The command after the variables that are set before it."""
    return list(itertools.dropwhile(lambda word: re.match(r"^[A-Z_]+=", word), words))


def _launch_here(words: list[str], environment: Mapping[str, str] = MappingProxyType({})) -> int:
    """What `accelerate launch` does with `words`, in this process; the exit code."""
    options, program = _launch_options(words)
    if _processes(options) > 1:
        raise CommandError("it starts several processes, which the tests of layouts do: name one that does the same")
    _run_program(program)
    return 0


def _launch_options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    options = {}
    while words and words[0].startswith("--"):
        name, given, value = words[0].partition("=")
        if name not in OPTIONS_OF_LAUNCH:
            raise CommandError(f"accelerate launch {name} is not known here: add it to OPTIONS_OF_LAUNCH")
        options[name], words = (value, words[1:]) if given else (words[1], words[2:])
    return options, words


def _processes(options: dict[str, str]) -> int:
    settings = yaml.safe_load(Path(options["--config_file"]).read_text()) if "--config_file" in options else {}
    return int(options.get("--num_processes", settings.get("num_processes", 1)))


def _run_program(words: list[str]) -> None:
    """`-m module ARGUMENTS` or `FILE ARGUMENTS`, as `__main__`."""
    program, given = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *given])
        try:
            if words[0] == "-m":
                runpy.run_module(program, run_name="__main__")
            else:
                runpy.run_path(program, run_name="__main__")
        except SystemExit as stop:
            _check(words, stop.code or 0, "", None)


def _check(words: list[str], code: int, output: str, error: BaseException | None) -> None:
    if code != 0:
        raise CommandError(f"{shlex.join(words)} ends with {code}: {output[-2000:]}") from error


def _check_our_command(words: list[str]) -> None:
    group = typer.main.get_command(app)
    command = group.commands.get(words[0]) if words else None
    if command is None:
        raise CommandError(f"there is no moe-hf {' '.join(words[:1])}")
    try:
        context = command.make_context(words[0], list(words[1:]))
    except Exception as error:
        raise CommandError(f"moe-hf {shlex.join(words)}: {error}") from error
    if words[0] in cli_launch.PROGRAMS:
        _parse_only([f"training/{cli_launch.PROGRAMS[words[0]][0]}.py", *context.args])


def _check_program(words: list[str]) -> None:
    path = f"{words[1].replace('.', '/')}" if words[0] == "-m" else words[0]
    if _is_missing(path) and _is_missing(f"{path}.py"):
        raise CommandError(f"there is no {path}")
    if words[0].startswith("training/"):
        _parse_only(words)


def _is_missing(path: str) -> bool:
    """Whether a path leads into a folder of ours, where it is not; what other projects have is not known here."""
    first = path.split("/")[0]
    ours = (ROOT / first).is_dir() and first != ".venv"
    return ours and not (ROOT / path).exists()


def _parse_only(words: list[str]) -> None:
    """Let a training program read its command line, and stop there."""
    parse = MoEArgumentParser.parse

    def stop(self: MoEArgumentParser, argv: list[str] | None = None) -> None:
        parse(self, argv)
        raise _Parsed

    here = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoEArgumentParser, "parse", stop)
        patch.chdir(ROOT)
        try:
            _run_program(words)
        except _Parsed:
            return
        except ValueError as error:
            raise CommandError(f"{shlex.join(words)}: {error}") from error
        finally:
            os.chdir(here)


class _Parsed(Exception):
    pass
