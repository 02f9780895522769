"""`moe-hf finetune` and the other programs' commands: what accelerate's launcher is asked for, and how a failure ends."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import accelerate.commands.launch
import psutil
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer.testing import CliRunner

from moe_hf.cli import app, launch
from tests.documents.stand_ins import write_folders
from tests.processes import ROOT
from tests.test_cli import error_of


PRESETS = ROOT / "training" / "accelerate"


@pytest.fixture
def started(monkeypatch):
    """Run a command on a machine with `devices` accelerators, up to the launcher: its words, read by its own parser."""
    calls = []
    monkeypatch.setattr(launch, "launch", lambda words, environment: calls.append((words, environment)) or 0)

    def start(*words: str, devices: int = 0):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
        calls.clear()
        result = CliRunner().invoke(app, list(words))
        if not calls:
            return result
        assert result.exit_code == 0, result.output
        return launch_command_parser().parse_args(calls[0][0]), calls[0][1]

    return start


def test_every_program_has_a_command():
    programs = {path.stem for path in (ROOT / "training").glob("*.py")}
    assert {program for program, _ in launch.PROGRAMS.values()} == programs
    for command, (program, _) in launch.PROGRAMS.items():
        assert f"\nmoe-hf {command} " in (ROOT / "training" / f"{program}.py").read_text()


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        ("ddp", []),
        ("fsdp2", ["--fsdp_size=8"]),
        ("ep", ["--ep_size=8"]),
        ("tp", ["--tp_size=8"]),
        ("tp_ep", ["--tp_size=8", "--ep_size=8"]),
        ("deepspeed", [f"--deepspeed={ROOT / 'training' / 'deepspeed' / 'zero3.json'}"]),
        ("deepspeed_zero2", [f"--deepspeed={ROOT / 'training' / 'deepspeed' / 'zero2.json'}"]),
    ],
)
def test_a_layout_is_a_preset_and_sizes_and_the_users_options_come_last(layout, sizes, started, monkeypatch):
    # DeepSpeed counts as installed.
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: name)
    mine = ["--model", "a b", "--ep_size=4", "--seed", "-1"]
    words, environment = started("finetune", "--layout", layout, *mine, devices=8)
    assert words.training_script == str(ROOT / "training" / "finetune.py")
    assert words.training_script_args == [*sizes, *mine]
    assert (words.num_processes, words.num_machines, words.main_process_port) == (8, 1, 0)
    preset = yaml.safe_load(Path(words.config_file).read_text())
    assert preset["distributed_type"] == "MULTI_GPU" and environment == {}
    named = [f"--{name}" for name in launch.LAYOUTS[layout][1]]
    assert all(
        name.removeprefix("--") in Path(words.config_file).read_text() for name in named if name != "--deepspeed"
    )


@pytest.mark.parametrize(
    ("words", "devices", "preset", "processes"),
    [
        ([], 0, "single_cpu", 1),
        ([], 1, "single_gpu", 1),
        ([], 4, "multi_gpu", 4),
        (["--processes", "1"], 4, "single_gpu", 1),
        (["--processes", "2"], 4, "multi_gpu", 2),
        (["--processes", "2"], 0, "multi_cpu", 2),
        (["--processes", "2", "--layout", "ep"], 0, "multi_cpu", 2),
        (["--machines", "2", "--main-host", "first"], 8, "multi_gpu", 16),
    ],
)
def test_processes_are_the_accelerators_of_the_machines_if_not_given(words, devices, preset, processes, started):
    found, environment = started("evaluate", *words, devices=devices)
    assert Path(found.config_file) == PRESETS / f"{preset}.yaml"
    assert found.num_processes == processes
    # Without it, processes of a CPU do not know of each other.
    assert environment.get("ACCELERATE_USE_CPU") == ("true" if preset == "multi_cpu" else None)


def test_one_process_of_several_accelerators_sees_one(started, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert started("sft", "--processes", "1", devices=2)[0].gpu_ids == "5"
    assert started("sft", "--processes", "2", devices=2)[0].gpu_ids is None


def test_machines_hold_copies_and_meet_at_the_first(started):
    words, _ = started(
        "finetune", "--layout=hsdp", "--machines=2", "--machine-rank=1", "--main-host=first:3000", devices=8
    )
    assert (words.num_processes, words.num_machines, words.machine_rank) == (16, 2, 1)
    assert (words.main_process_ip, words.main_process_port) == ("first", 3000)
    assert words.training_script_args == ["--dp_replicate_size=2"]


@pytest.mark.parametrize(
    ("words", "devices", "message"),
    [
        (["--layout", "fsdp"], 8, "--layout fsdp: choose ddp, fsdp2, ep"),
        (["--layout", "ep"], 1, "there is one: give --processes"),
        (["--layout", "hsdp"], 8, "give --machines and --main-host, or the number of copies, --dp_replicate_size"),
        (["--processes", "0"], 8, "--processes 0"),
        (["--processes", "3", "--machines", "2", "--main-host", "first"], 8, "give a multiple of that"),
        (["--processes", "4"], 2, "this one has accelerators for 2"),
        (["--machines", "2"], 8, "give both or none"),
        (["--main-host", "first"], 8, "give both or none"),
        (["--machines", "2", "--machine-rank", "2", "--main-host", "first"], 8, "from 0 to machines - 1"),
        (["--machines", "2", "--main-host", "first:port"], 8, "HOST or HOST:29500"),
        (["--machine-rank", "1"], 8, "from 0 to machines - 1"),
    ],
)
def test_what_cannot_be_started_is_one_sentence(words, devices, message, started):
    assert message in error_of(started("finetune", *words, devices=devices))


@pytest.mark.parametrize(
    ("words", "requirement"), [(["dpo"], "moe-hf[trl]"), (["finetune", "--layout", "deepspeed"], "deepspeed")]
)
def test_a_missing_package_is_named_before_anything_is_started(words, requirement, started, monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert f"pip install '{requirement}'" in error_of(started(*words, devices=8))


def test_help_shows_the_commands_options_and_the_programs(capfd):
    with pytest.raises(SystemExit) as stop:
        app(["evaluate", "--help"])
    output = capfd.readouterr().out
    assert stop.value.code == 0
    assert "--layout" in output and "--per_device_eval_batch_size" in output


def failures(folder: Path, message: str | None, code: int) -> ChildFailedError:
    """What torchrun raises when a program has failed, which wrote `message` into its error file if it is one of ours."""
    file = folder / "error.json"
    if message is not None:
        file.write_text(json.dumps({"message": message, "timestamp": 1}))
    return ChildFailedError("program", {1: ProcessFailure(1, 2, code, str(file))})


@pytest.mark.parametrize(
    ("raised", "code", "last"),
    [
        (lambda folder: failures(folder, "Error: No model.", 2), 2, "Error: No model."),
        (lambda folder: failures(folder, None, 1), 1, "moe-hf: process 1 failed, see above."),
        (lambda folder: failures(folder, None, -9), 137, "moe-hf: the program was ended by SIGKILL."),
        # One process has no torchrun, and has said what is wrong.
        (lambda folder: subprocess.CalledProcessError(2, "program"), 2, None),
        (
            lambda folder: subprocess.CalledProcessError(-9, "program"),
            137,
            "moe-hf: the program was ended by SIGKILL.",
        ),
        (lambda folder: SignalException("", signal.SIGTERM), 143, "moe-hf: the program was ended by SIGTERM."),
        (lambda folder: ConnectionError("The port is in use."), 2, "moe-hf: The port is in use."),
    ],
)
def test_a_failure_ends_with_its_sentence_and_its_code(raised, code, last, monkeypatch, tmp_path):
    def fail(arguments):
        raise raised(tmp_path)

    monkeypatch.setattr(accelerate.commands.launch, "launch_command", fail)
    result = CliRunner().invoke(app, ["finetune"])
    assert result.exit_code == code
    assert (result.stderr.splitlines() or [None])[-1] == last
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_programs_error_is_the_last_line_and_no_traceback(processes, tmp_path):
    command = [sys.executable, "-m", "moe_hf.cli", "evaluate", f"--processes={processes}", "--config=none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("Error: No recipe 'none': no such file, and shipped recipes are ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ends_the_program_too(processes, tmp_path):
    command = [sys.executable, "-m", "moe_hf.cli", "pretrain", f"--processes={processes}", "--config=pretrain_dense"]
    with subprocess.Popen(
        [*command, f"--output_dir={tmp_path / 'out'}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert f"{processes} process" in process.stdout.readline()
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1] == "moe-hf: the program was ended by SIGTERM."
    assert not psutil.wait_procs(children, timeout=30)[1]


@pytest.mark.slow
def test_two_machines_hold_a_copy_each_and_train_together(tmp_path):
    write_folders(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Both are this machine.
    words = f"finetune --layout hsdp --machines 2 --processes 2 --main-host 127.0.0.1:{port} --machine-rank".split()
    rest = [
        "--config",
        "finetune_moe",
        "--model",
        "MODEL",
        "--dataset",
        "my_texts",
        "--block_size",
        "32",
        "--max_steps",
        "2",
        "--output_dir",
        "out",
    ]
    commands = [[sys.executable, "-m", "moe_hf.cli", *words, str(rank), *rest] for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    machines = [subprocess.Popen(command, cwd=tmp_path, **pipes) for command in commands]
    outputs = [machine.communicate(timeout=400) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert "2 processes on cpu, dp_replicate_size=2 over 2 processes" in outputs[0][0]
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()
