"""Laws of `push_folder` and `pull_folder` with the real client, over LFS and over xet, and whatever goes wrong.

Each mode is one process (`faults.py`); nothing is lost, nothing is there twice, and a failure is one sentence.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.hub.fake_hub import READ_TOKEN, TOKEN
from tests.processes import PATIENCE_SECONDS


TESTS = Path(__file__).resolve().parents[1]
WITHOUT_XET = pytest.mark.skipif(importlib.util.find_spec("hf_xet") is None, reason="hf_xet is not installed")
MODES = ["lfs", pytest.param("xet", marks=WITHOUT_XET)]


def _run(mode: str, folder: Path) -> dict:
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"NO_PROXY": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(TESTS / "hub" / "faults.py"), mode, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr and READ_TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Outcomes by scenario; each mode runs once, when it is first asked for."""
    runs: dict[str, dict] = {}

    def of(mode: str) -> dict:
        if mode not in runs:
            runs[mode] = _run(mode, tmp_path_factory.mktemp(mode))
        return runs[mode]

    return of


@pytest.mark.parametrize("mode", MODES)
def test_a_pushed_folder_comes_back_bit_equal_and_twice_is_one_commit(outcomes, mode):
    outcome = outcomes(mode)["round trip"]
    assert outcome["errors"] == [None, None, None]
    assert outcome["equal"] and outcome["commits"] == 1
    assert "exists: nothing was written" in outcome["exists"]


@pytest.mark.parametrize("mode", MODES)
def test_what_the_command_pushed_loads_bit_equal_without_moe_hf_and_is_handed_on(outcomes, mode):
    outcome = outcomes(mode)["without moe_hf"]
    here, there, again = outcome["here"], outcome["there"], outcome["there"]["again"]
    assert "every checksum compared" in outcome["output"]
    assert there["module"].startswith("transformers_modules.")
    assert {name: (there[name], again[name]) for name in ("weights", "tokens")} == {
        name: (here[name], here[name]) for name in ("weights", "tokens")
    }
    # The sum may differ in its last bits with where in memory the weights lie.
    assert there["logits"] == pytest.approx(here["logits"], rel=1e-6)
    assert {"modeling_moe.py", "model.safetensors"} <= set(outcome["handed on"])


def test_results_and_pictures_go_up_beside_a_new_card_and_beside_one_that_is_kept(outcomes):
    outcome = outcomes("lfs")["kept cards"]
    assert len(outcome["found"]) == 6
    for case, found in outcome["found"].items():
        assert found["beside"]["routing.png"] == "a picture", case
        assert "value: 0.41" in found["beside"][".eval_results/moe_hf.yaml"], case
    assert outcome["pulled"] == [None, True]


def test_a_kept_card_keeps_its_text_and_gets_the_results_in_the_place_of_earlier_ones(outcomes):
    outcome = outcomes("lfs")["kept cards"]
    for case, found in outcome["found"].items():
        card = ModelCard(found["card"])
        values = {result.dataset_name: result.metric_value for result in card.data.eval_results}
        if case.endswith("new"):
            assert values == {"GSM8K": 0.41} and "](routing.png)" in card.text, case
        else:
            assert values == {"theirs": 0.5, "GSM8K": 0.41} and card.data.model_name == "their name", case
            assert card.text.strip() == "# Edited by hand" and card.data.license == "mit", case
    assert len(outcome["warnings"]) == 3
    assert all("routing.png is pushed, and the card does not show it" in text for text in outcome["warnings"])
    assert "card_facts are for a folder without one: nothing was sent" in outcome["facts for a card"]


@pytest.mark.parametrize("mode", MODES)
def test_pickles_training_state_secrets_and_local_paths_stay_behind(outcomes, mode):
    outcome = outcomes(mode)["round trip"]
    behind = ("training_args.bin", "optimizer.pt", ".env", "checkpoint-1", ".cache", "moe_hf_manifest.json")
    assert not [name for name in outcome["files"] if any(part in name for part in behind)]
    assert {*outcome["files"], "moe_hf_manifest.json"} == set(outcome["listing"])
    assert outcome["source"] == "dense"


@pytest.mark.parametrize("mode", [pytest.param("lfs", marks=pytest.mark.numerics), *MODES[1:]])
def test_branches_proposals_private_repositories_and_native_exports(outcomes, mode):
    outcome = outcomes(mode)["options"]
    assert outcome["errors"] == [None] * 6
    assert outcome["branches"] == {"main": 1, "next": 1, "refs/pr/1": 1} and outcome["proposals"] == ["proposed"]
    assert outcome["private"] and outcome["class"] == "MixtralForCausalLM" and outcome["same_logits"]
    messages = ("A proposal is made against main", "exists and is public", "There is no target 'no_family'")
    assert all(message in error for message, error in zip(messages, outcome["wrong"], strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("scenario", "waits"),
    [
        ("commit fails once", [2.0]),
        ("reply is lost", [2.0]),
        ("commit is rate limited", [7.0]),
        ("preupload is unavailable", [1]),
    ],
)
def test_a_passing_fault_is_survived_with_one_commit(outcomes, mode, scenario, waits):
    outcome = outcomes(mode)[scenario]
    assert outcome["errors"] == [None]
    assert outcome["commits"] == 1 and outcome["whole"]
    assert outcome["waits"] == waits


@pytest.mark.parametrize("mode", MODES)
def test_a_proposal_whose_reply_is_lost_is_not_made_twice(outcomes, mode):
    assert outcomes(mode)["reply of a proposal is lost"] == {"errors": [None], "proposals": 1}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("commit fails for good", "failed: planned fault. Push again: files that arrived are not sent a second time."),
        ("token expires", "does not accept the token"),
        ("conflict", "with status 409"),
        ("server is down", "refused"),
    ],
)
def test_a_lasting_fault_is_one_sentence_and_the_same_call_continues(outcomes, mode, scenario, message):
    outcome = outcomes(mode)[scenario]
    first, second = outcome["errors"]
    assert message in first and "\n" not in first and second is None
    assert outcome["commits"] == 1 and outcome["whole"]
    # What arrived before the fault is not sent again; where the fault came first, nothing had arrived.
    assert scenario != "commit fails for good" or outcome["sent_again"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_forbidden_commit_publishes_nothing(outcomes, mode):
    outcome = outcomes(mode)["commit is forbidden"]
    assert "may not write to tester/c403" in outcome["errors"][0] and outcome["commits"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_commit_of_others_meanwhile_is_not_run_over(outcomes, mode):
    outcome = outcomes(mode)["moved"]
    assert outcome["errors"][0] is None and "was changed by somebody else" in outcome["errors"][1]
    assert outcome["errors"][2] is None and outcome["theirs"] and outcome["sent_again"] == 0
    assert outcome["commits"] == 3


def test_adapters_and_deltas_go_there_and_back(outcomes):
    outcome = outcomes("lfs")["parts"]
    assert outcome["errors"] == [None] * 4 and outcome["equal"]
    assert outcome["base"] == "mixtral", "only the name of the folder is published"
    assert "load_expert_deltas(model" in outcome["cards"]["deltas"] and "load_expert_lora" in outcome["cards"]["lora"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("secret", "notes.md holds what looks like a token of the Hugging Face Hub (line 2): nothing was sent"),
        ("own token", "log.txt holds what looks like the token that you push with (line 1)"),
        ("flipped byte", "is changed: its sha256 is not the one it was saved with"),
        ("broken card", "README.md has broken metadata"),
        ("link", "is a link out of its folder: nothing was sent"),
        ("nothing", "is nothing that can be pushed"),
        ("read token", "may only read: nothing was sent"),
        ("wrong token", "does not accept the token"),
        ("bad name", "'a/b/c' is no repository name"),
        ("foreign", "may not write to somebody/model"),
    ],
)
def test_a_mistake_is_one_sentence_before_a_byte_moves(outcomes, mistake, message):
    outcome = outcomes("lfs")["refused"]
    assert message in outcome["errors"][mistake] and "\n" not in outcome["errors"][mistake]
    assert outcome["moved"] == [] and not outcome["shown"]


@pytest.mark.parametrize(
    ("scenario", "waits"), [("part fails once", [1]), ("part is rate limited", [8.0]), ("part is cut", [1])]
)
def test_a_part_that_fails_is_sent_again(outcomes, scenario, waits):
    outcome = outcomes("lfs")[scenario]
    assert outcome["errors"] == [None] and outcome["commits"] == 1 and outcome["whole"]
    assert outcome["waits"] == waits


def test_parts_that_fail_for_good_leave_no_commit_and_the_next_push_completes(outcomes):
    outcome = outcomes("lfs")["parts fail for good"]
    first, second = outcome["errors"]
    assert "Push again" in first and "\n" not in first and second is None
    assert outcome["commits"] == 1 and outcome["whole"]
    assert sorted(outcome["waits"]) == [1] * 3 + [2] * 3 + [4] * 3 + [8] * 6, "the client's own, and no more"


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("download is corrupt", "arrived with other bytes than the Hub lists"),
        ("download is cut", "Pull again"),
        ("download fails", "Pull again"),
    ],
)
def test_a_pull_that_fails_leaves_no_folder_and_continues(outcomes, scenario, message):
    outcome = outcomes("lfs")[scenario]
    first, second = outcome["errors"]
    assert message in first and "\n" not in first and second is None
    assert outcome["fetched_again"] == 1 and outcome["left"] == []


def test_a_pull_that_is_forbidden_is_one_sentence(outcomes):
    assert "may not read tester/ours" in outcomes("lfs")["download is forbidden"]["errors"][0]


@WITHOUT_XET
def test_faults_of_the_xet_store_end_as_those_of_lfs(outcomes):
    xet = outcomes("xet")
    assert xet["store token fails once"]["errors"] == [None] and xet["store token fails once"]["commits"] == 1
    forbidden = xet["store token is forbidden"]
    assert "may not write to tester/x403" in forbidden["errors"][0] and forbidden["commits"] == 0
    assert forbidden["waits"] == []
    # hf_xet itself hands out the changed bytes without a word.
    assert "arrived with other bytes than the Hub lists" in xet["store is corrupt"]["errors"][0]
