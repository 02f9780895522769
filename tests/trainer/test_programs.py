"""The programs of training/: a model is pretrained, fine-tuned and evaluated, and mistakes cost no traceback."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moe_hf import MoEError
from moe_hf.data import load_text, split_by_document
from moe_hf.trainer.programs import run_program
from tests.processes import ROOT, launch
from tests.trainer.program_runs import run


TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
QUICK = [
    "--block_size=32", "--max_steps=4", "--save_steps=2", "--eval_steps=2", "--per_device_train_batch_size=4",
    "--disable_tqdm=true", "--use_cpu=true", "--held_out_share=0.3",
]  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "moe"
    config = {"model_type": "moe_hf", "num_experts": 4, "num_experts_per_tok": 2, "text_config": TINY}
    run(
        "pretrain", "--config=pretrain_moe", f"--model_config={json.dumps(config)}", f"--dataset={text}",
        "--tokenizer_vocab_size=270", f"--output_dir={folder}", "--report_to=tensorboard", *QUICK,
    )  # fmt: skip
    return folder


def test_pretraining_gives_a_model_that_loads_with_its_tokenizer(pretrained):
    model = AutoModelForCausalLM.from_pretrained(pretrained / "final")
    tokenizer = AutoTokenizer.from_pretrained(pretrained / "final")
    assert model.config.num_experts == 4 and model.config.vocab_size == len(tokenizer) == 270
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert (pretrained / "checkpoint-4" / "moe_hf_manifest.json").is_file()
    assert list(pretrained.rglob("events.out.tfevents.*"))


def test_finetuning_changes_the_moe_alone_and_resumes_where_it_was(pretrained, text, tmp_path, capsys):
    argv = [
        "--config=finetune_moe",
        f"--model={pretrained / 'final'}",
        f"--dataset={text}",
        f"--output_dir={tmp_path}",
        *QUICK,
    ]
    run("finetune", *argv)
    output = capsys.readouterr().out
    assert "1 process on cpu" in output and "scope moe:" in output
    before = AutoModelForCausalLM.from_pretrained(pretrained / "final").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    assert all(torch.equal(after[name], tensor) == (".mlp." not in name) for name, tensor in before.items())

    with pytest.raises(MoEError, match="a run was finished there"):
        run("finetune", *argv)
    (tmp_path / "final").rename(tmp_path / "first")
    run("finetune", *argv)
    assert "Resuming from" in capsys.readouterr().out
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())


def test_evaluation_reports_each_domain_and_equals_a_plain_loop(pretrained, text, tmp_path):
    run(
        "evaluate_model", f"--model={pretrained / 'final'}", f"--dataset={text}", f"--output_dir={tmp_path}",
        "--block_size=32", "--held_out_share=0.3", "--use_cpu=true", "--per_device_eval_batch_size=3",
        "--packed=false", "--disable_tqdm=true",
    )  # fmt: skip
    results = json.loads((tmp_path / "eval_results.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(pretrained / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(pretrained / "final")
    held_out = split_by_document(load_text(str(text)), 0.3)[1]
    for domain in ("letters", "numbers"):
        total, count = 0.0, 0
        for row in held_out.filter(lambda row, name=domain: row["domain"] == name):
            ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
            for piece in ids.split(32, dim=1):
                if piece.shape[1] > 1:
                    with torch.no_grad():
                        total += float(model(piece, labels=piece).loss) * (piece.shape[1] - 1)
                    count += piece.shape[1] - 1
        assert results[f"eval_{domain}_tokens"] == count
        assert results[f"eval_{domain}_token_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("program", "argv", "message"),
    [
        ("finetune", [], "No model"),
        ("finetune", ["--model=/absent/folder"], "/absent/folder"),
        ("finetune", ["--model={model}", "--scope=expert"], "Did you mean 'experts'"),
        ("finetune", ["--model={model}", "--domains", "letter"], "No domain 'letter'"),
        ("finetune", ["--model={model}", "--max_train_tokens=3"], "less than one block"),
        ("finetune", ["--model={model}", "--dtype=int8"], "dtype is 'int8'"),
        ("pretrain", ['--model_config={{"model_type": "lama"}}'], "lama"),
        ("pretrain", ['--model_config={{"model_type": "opt"}}'], "packed documents see each other"),
    ],
)
def test_mistake_is_one_clear_error_and_writes_nothing(program, argv, message, pretrained, text, tmp_path, capsys):
    argv = [argument.format(model=pretrained / "final") for argument in argv]
    output = tmp_path / "output"
    with pytest.raises(SystemExit) as caught:
        run_program(lambda: run(program, f"--dataset={text}", f"--output_dir={output}", *QUICK, *argv))
    captured = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in captured and "Traceback" not in captured
    assert not output.exists()


def test_launcher_of_several_processes_is_told_the_sentence(tmp_path, monkeypatch):
    def main():
        raise MoEError("This cannot be.")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        run_program(main)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert failure.message == "Error: This cannot be."


@pytest.fixture(scope="module")
def dense(pretrained, tmp_path_factory) -> Path:
    """A dense model with the tokenizer of the pretrained MoE."""
    folder = tmp_path_factory.mktemp("dense")
    tokenizer = AutoTokenizer.from_pretrained(pretrained / "final")
    tokenizer.save_pretrained(folder)
    fields = {name: value for name, value in TINY.items() if name != "model_type"}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": None, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **fields, **ids)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", ["ep", pytest.param("tp", marks=pytest.mark.slow)])
def test_finetuning_and_its_control_take_a_layout(layout, pretrained, dense, text, tmp_path):
    common = [
        "--config=finetune_moe", f"--model={pretrained / 'final'}", f"--control={dense}", f"--dataset={text}",
        "--balance_loss_scope=global_batch", "--sweep=2", *QUICK,
    ]  # fmt: skip
    output = launch(
        [
            sys.executable, "-m", "moe_hf.cli", "finetune", "--processes=2", f"--layout={layout}",
            f"--output_dir={tmp_path / 'out'}",
            *[flag for flag in common if "use_cpu" not in flag],
        ]
    )  # fmt: skip
    assert "2 processes on cpu, " in output and f"{layout}_size=2" in output
    before = AutoModelForCausalLM.from_pretrained(pretrained / "final").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final").state_dict()
    assert all(torch.equal(after[name], tensor) == (".mlp." not in name) for name, tensor in before.items())
    # Processes that share rows have as many as one, others twice as many.
    rows = 4 if layout == "tp" else 8
    run("finetune", f"--output_dir={tmp_path / 'one'}", *common, f"--per_device_train_batch_size={rows}")
    two, one = (json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("out", "one"))
    for model in ("this model", "control"):
        assert two[model]["learning_rate"] == one[model]["learning_rate"]
        assert two[model]["sweep"] == pytest.approx(one[model]["sweep"], rel=2e-4)
        for fact in ("training_tokens", "training_flops", "total_parameters", "active_parameters"):
            assert two[model][fact] == one[model][fact], (model, fact)
        for when in ("before", "after"):
            # `loss` is a mean over batches, which processes cut in other places.
            expected = {name: value for name, value in one[model][when].items() if name.endswith("token_loss")}
            assert {name: two[model][when][name] for name in expected} == pytest.approx(expected, rel=2e-4)
    start, *ends = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (dense, *(tmp_path / name / "control" / "final" for name in ("out", "one")))
    )
    for name, before in start.items():
        assert torch.equal(ends[0][name], before) == (".mlp." not in name)
        # The rate is small, and so are the steps beside the rounding of the weights.
        assert float((ends[0][name] - ends[1][name]).norm()) <= 1e-4 * float((ends[1][name] - before).norm())


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        (["--scope=router"], "no router to train"),
        (["--scope=expert_lora"], "no experts that could have adapters"),
        (["--control=/absent/control"], "Could not load"),
    ],
)
def test_control_that_cannot_be_is_refused_before_training(scope, message, pretrained, dense, text, tmp_path):
    argv = [f"--model={pretrained / 'final'}", f"--control={dense}", f"--dataset={text}", *QUICK]
    with pytest.raises(MoEError, match=message):
        run("finetune", "--config=finetune_moe", f"--output_dir={tmp_path / 'out'}", *argv, *scope)
    assert not (tmp_path / "out").exists()


def test_control_of_chosen_experts_trains_its_mlps_at_the_rate_of_experts(pretrained, dense, text, tmp_path):
    (tmp_path / "selection.json").write_text('{"experts": {"0": [1]}}')
    argv = [f"--model={pretrained / 'final'}", f"--control={dense}", f"--dataset={text}", *QUICK]
    argv += [
        "--scope=selected",
        f"--expert_selection={tmp_path / 'selection.json'}",
        "--skip_idle_experts=false",
        "--sweep=0",
    ]
    run("finetune", "--config=finetune_moe", f"--output_dir={tmp_path}", *argv, "--expert_learning_rate=0")
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (dense, tmp_path / "control" / "final"))
    changed = [n for n, t in before.state_dict().items() if not torch.equal(t, after.state_dict()[n])]
    assert changed == [] and "control" in json.loads((tmp_path / "comparison.json").read_text())


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--ep_size=2", "ep_size=2 must"), ("--fsdp_size=2", "has one process"), ("--distributed_config={", "not JSON")],
)
def test_layout_for_several_processes_in_one_is_refused(argument, message, pretrained, text, tmp_path, capsys):
    argv = [f"--model={pretrained / 'final'}", f"--dataset={text}", f"--output_dir={tmp_path / 'out'}", argument]
    with pytest.raises(SystemExit):
        run_program(lambda: run("finetune", *argv, *QUICK))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_program_runs_in_two_processes_from_accelerate_launch(text, tmp_path):
    output = launch(
        [
            sys.executable, "-m", "accelerate.commands.launch",
            "--config_file", str(ROOT / "training" / "accelerate" / "multi_cpu.yaml"), "--main_process_port", "0",
            str(ROOT / "training" / "pretrain.py"), "--config=pretrain_dense", f"--model_config={json.dumps(TINY)}",
            f"--dataset={text}", "--tokenizer_vocab_size=270", f"--output_dir={tmp_path / 'out'}",
            *[flag for flag in QUICK if "use_cpu" not in flag],
        ]
    )  # fmt: skip
    assert "2 processes on cpu" in output
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "checkpoint-4" / "rng_state_1.pth").is_file()
