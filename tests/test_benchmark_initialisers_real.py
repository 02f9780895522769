"""The study of initialisers on a pretrained model, at a very small size: every arm, in pieces, nothing twice."""

import json

import pytest

from benchmarks import split_scales
from benchmarks.initialisers_real import ARMS, main
from moe_hf import MoEError
from moe_hf.data import builtin_prose, train_tokenizer
from tests.tiny_models import tiny_dense


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = train_tokenizer(builtin_prose().select(range(8)), 300)
    tiny_dense("llama", vocab_size=len(tokenizer), intermediate_size=48).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_every_arm_runs_once_and_the_table_has_all_that_was_run(model, tmp_path, capsys):
    run = ["--model", str(model), "--out", str(tmp_path), "--tiny"]
    names = list(ARMS)
    main([*run, "--arms", ",".join(names[:3]), "--rates", "1e-3,1e-2"])
    results = main([*run, "--arms", ",".join(names[2:]), "--rates", "1e-3"])
    assert list(results["arms"]) == names
    assert [list(arm["runs"]) for arm in results["arms"].values()][1:4] == [["0.001", "0.01"]] * 2 + [["0.001"]]
    for name in ("copy", "permute", "granular"):
        start = results["arms"][name]["runs"]["0.001"]["test"][0]
        assert start["all"] == pytest.approx(results["dense"]["all"], rel=1e-5), name
    for name in ("drop_0.5", "noise_0.5", "split_2of4_E", "split_2of4_K"):
        start, end = results["arms"][name]["runs"]["0.001"]["test"]
        assert abs(start["all"] - results["dense"]["all"]) > 1e-4 and end != start, name
    best = results["arms"]["copy"]
    by_rate = {rate: run["points"][-1]["loss"]["all"] for rate, run in best["runs"].items()}
    assert best["best_rate"] == min(by_rate, key=by_rate.get)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {arm.title} |" in table for arm in ARMS.values())
    capsys.readouterr()
    main([*run, "--rates", "1e-3"])
    assert "running" not in capsys.readouterr().out


def test_the_start_alone_takes_no_step(model, tmp_path):
    given = ["--model", str(model), "--out", str(tmp_path), "--tiny", "--steps", "0", "--sparse-step", "1"]
    results = main([*given, "--arms", "copy"])
    start, end = results["arms"]["copy"]["runs"]["0.0001"]["test"]
    assert start == end and results["settings"]["sparse_step"] == 1


def test_what_a_killed_run_left_is_no_rate_that_was_run(model, tmp_path):
    (tmp_path / "runs" / "copy" / ".0.001.tmp-1").mkdir(parents=True)
    given = ["--model", str(model), "--out", str(tmp_path), "--tiny", "--steps", "0", "--arms", "copy"]
    assert list(main(given)["arms"]["copy"]["runs"]) == ["0.0001"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "copie"], "--arms has .'copie'.; it takes some of copy"),
        (["--rates", "fast"], "--rates is 'fast'; it takes numbers above 0"),
        (["--rates", "0"], "numbers above 0"),
        (["--steps", "-1"], "--steps is -1"),
        (["--sparse-step", "0"], "--sparse-step is 0"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(model, tmp_path, options, message):
    with pytest.raises(MoEError, match=message):
        main(["--model", str(model), "--out", str(tmp_path), *options])


def test_the_study_of_scales_runs_each_pair_at_each_scale(tmp_path):
    arms = ["2of4_K", "2of4_mean", "2of4_E"]
    results = split_scales.main(["--tiny", "--seeds", "1", "--out", str(tmp_path), "--arms", ",".join(arms)])
    runs = [results["arms"][name]["runs"][0] for name in arms]
    scales = [run["method"]["init"]["options"]["scale"] for run in runs]
    assert scales == pytest.approx([2, 8**0.5, 4])
    assert len({run["points"][0]["loss"]["all"] for run in runs}) == 3
    assert len({run["parameters"] for run in runs}) == 1
