"""`moe-hf finetune`, `pretrain`, ...: the training programs, started by accelerate's launcher with a layout's preset."""

import importlib.util
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from moe_hf.cli.app import user_errors


# Command: its program, and what it does.
PROGRAMS = {
    "finetune": ("finetune", "Fine-tune part of a MoE, experts and routers by default, or of a dense model."),
    "pretrain": ("pretrain", "Train a dense model or a MoE from random weights."),
    "sft": ("sft", "Fine-tune on chats with TRL: the loss is on the answers."),
    "dpo": ("dpo", "Train on preferences with TRL: of two answers the chosen one becomes more likely."),
    "classify": ("classify", "Train a classifier of texts or of words."),
    "distill": ("distill", "Train a smaller MoE, or a dense model, on the predictions of a MoE."),
    "harden": ("harden", "Fine-tune router and experts in turns against small changes of the embeddings."),
    "evaluate": (
        "evaluate_model",
        "Measure token loss, perplexity and accuracy on held-out documents of each domain.",
    ),
}
NEED_TRL = ("sft", "dpo")
# Layout: accelerate's preset, and what the program is told; `N` is the number of processes, `M` that of machines.
LAYOUTS: dict[str, tuple[str, dict[str, str]]] = {
    "ddp": ("multi_gpu", {}),
    "fsdp2": ("fsdp2", {"fsdp_size": "N"}),
    "ep": ("expert_parallel", {"ep_size": "N"}),
    "tp": ("tensor_parallel", {"tp_size": "N"}),
    "tp_ep": ("tensor_expert_parallel", {"tp_size": "N", "ep_size": "N"}),
    "hsdp": ("hsdp_multi_node", {"dp_replicate_size": "M"}),
    "deepspeed": ("multi_gpu", {"deepspeed": "training/deepspeed/zero3.json"}),
    "deepspeed_zero2": ("multi_gpu", {"deepspeed": "training/deepspeed/zero2.json"}),
}
PORT = "29500"


def launched(command: str, program: str, summary: str) -> Callable[..., None]:
    """The function behind a command of `PROGRAMS`, for Typer."""

    def run(
        context: typer.Context,
        processes: Annotated[
            int | None,
            typer.Option(help="On all machines together; if not given one per GPU, and one where there is no GPU."),
        ] = None,
        layout: Annotated[
            str, typer.Option(help=f"How model and rows are spread over processes: {', '.join(LAYOUTS)}.")
        ] = "ddp",
        machines: Annotated[int, typer.Option(help="Number of machines; the command is started on each.")] = 1,
        machine_rank: Annotated[int, typer.Option(help="Of this machine, from 0.")] = 0,
        main_host: Annotated[
            str | None, typer.Option(metavar="HOST[:PORT]", help=f"Of machine 0; the port is {PORT} if not given.")
        ] = None,
        show_help: Annotated[
            bool, typer.Option("--help", help="Show these options and those of the program, and exit.")
        ] = False,
    ) -> None:
        with user_errors():
            script = _resource(f"training/{program}.py")
            if command in NEED_TRL:
                _require("trl", "moe-hf[trl]", command)
        if show_help:
            typer.echo(context.get_help())
            sys.argv = [context.command_path, "--help"]
            runpy.run_path(script, run_name="__main__")
        with user_errors():
            start = _start(processes, layout, machines, machine_rank, main_host, context.args)
            code = launch([*start.launcher_words, script, *start.program_words, *context.args], start.environment)
        raise typer.Exit(code)

    run.__doc__ = (
        f"{summary}\n\nA recipe is given by its name or its path (`--config`). All further options are the program's."
    )
    return run


@dataclass(frozen=True)
class Start:
    """How a program is started: `devices` is the number of accelerators of this machine, 0 for a CPU."""

    layout: str
    processes: int
    machines: int
    machine_rank: int
    main_host: str | None
    devices: int

    @property
    def launcher_words(self) -> list[str]:
        """Options of `accelerate launch`."""
        host, _, port = (self.main_host or "").partition(":")
        words = {
            "config_file": _resource(f"training/accelerate/{self._preset}.yaml"),
            "num_processes": self.processes,
            "num_machines": self.machines,
            "machine_rank": self.machine_rank,
            # On one machine, a port that is free.
            "main_process_port": "0" if self.machines == 1 else port or PORT,
        }
        if self.machines > 1:
            words["main_process_ip"] = host
        if self.processes == 1 and self.devices > 1:
            # Trainer would spread the rows of one process over all that it sees, by DataParallel.
            words["gpu_ids"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return [f"--{name}={value}" for name, value in words.items()]

    @property
    def program_words(self) -> list[str]:
        """Options of the program, for its layout; those of the user come after them, and win."""
        numbers = {"N": self.processes, "M": self.machines}
        options = LAYOUTS[self.layout][1].items()
        return [f"--{name}={numbers[value] if value in numbers else _resource(value)}" for name, value in options]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the launcher needs, on a CPU to start processes that know of each other, each with its cores."""
        if self.devices or self.processes == 1:
            return {}
        cores = max(1, (os.cpu_count() or 1) * self.machines // self.processes)
        return {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}

    @property
    def _preset(self) -> str:
        if self.processes == 1:
            return "single_gpu" if self.devices else "single_cpu"
        return LAYOUTS[self.layout][0] if self.devices else "multi_cpu"


def _resource(name: str) -> str:
    from moe_hf.resources import resource_path

    return str(resource_path(name))


def _require(package: str, requirement: str, user: str) -> None:
    from moe_hf.errors import MoEError

    if importlib.util.find_spec(package) is None:
        raise MoEError(f"{user} uses {package}, which is not installed: pip install '{requirement}'.")


def _start(
    processes: int | None, layout: str, machines: int, rank: int, main_host: str | None, arguments: Sequence[str]
) -> Start:
    """Check what is asked for against this machine, before the launcher does."""
    import torch

    from moe_hf.errors import MoEError

    if layout not in LAYOUTS:
        raise MoEError(f"--layout {layout}: choose {', '.join(LAYOUTS)}.")
    if "deepspeed" in LAYOUTS[layout][1]:
        _require("deepspeed", "deepspeed", f"--layout {layout}")
    if machines < 1 or not 0 <= rank < machines:
        raise MoEError(
            f"--machines {machines} --machine-rank {rank}: the rank of this machine is from 0 to machines - 1."
        )
    if (machines > 1) != (main_host is not None):
        raise MoEError(
            "--main-host HOST says where machine 0 is, and --machines how many there are: give both or none."
        )
    if main_host is not None and not re.fullmatch(r"[^:]+(:\d+)?", main_host):
        raise MoEError(f"--main-host {main_host}: give a name or an address, and perhaps a port: HOST or HOST:{PORT}.")
    devices = torch.accelerator.device_count()
    processes = machines * max(devices, 1) if processes is None else processes
    if processes < 1 or processes % machines:
        raise MoEError(f"--processes {processes} is for all machines together, {machines}: give a multiple of that.")
    if devices and processes // machines > devices:
        raise MoEError(
            f"--processes {processes} on {machines} machine{'s' * (machines > 1)}: this one has accelerators for {devices}. "
            "Give fewer, or hide them with CUDA_VISIBLE_DEVICES= to run on the CPU."
        )
    if layout != "ddp" and processes == 1:
        raise MoEError(f"--layout {layout} spreads a model over processes, and there is one: give --processes.")
    if layout == "hsdp" and machines == 1 and not _names(arguments, "--dp_replicate_size"):
        raise MoEError(
            "--layout hsdp holds a copy of the model on each machine, and there is one: give --machines and --main-host, or "
            "the number of copies, --dp_replicate_size."
        )
    return Start(layout, processes, machines, rank, main_host, devices)


def _names(arguments: Sequence[str], option: str) -> bool:
    return any(word.partition("=")[0] == option for word in arguments)


def launch(words: Sequence[str], environment: dict[str, str]) -> int:
    """Run `accelerate launch` with `words`; its exit code, without the launcher's own report on a program that failed.

    The last line on stderr is the program's error, whatever the number of processes.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    before = signal.signal(signal.SIGTERM, _end_children)
    try:
        with patch_environment(**environment):
            launch_command(launch_command_parser().parse_args(list(words)))
    except subprocess.CalledProcessError as error:
        return _exit_code(error.returncode)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        told = failure.message.startswith("Error: ")
        typer.echo(failure.message if told else f"moe-hf: process {failure.local_rank} failed, see above.", err=True)
        return _exit_code(failure.exitcode)
    except SignalException as stop:
        return _exit_code(-stop.sigval)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _end_children(number: int, frame: object) -> None:
    """Hand a signal on to the program, which the launcher of one process would leave behind."""
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)


def _exit_code(code: int) -> int:
    """Of a program that ended with `code`, which is negative where a signal ended it; that is said."""
    if code >= 0:
        return code
    typer.echo(f"moe-hf: the program was ended by {signal.Signals(-code).name}.", err=True)
    return 128 - code
