"""Laws of `moe_hf.hub`, against a fake Hub on this machine: what is pushed comes back, whole, once, or not at all."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.fake_hub import TOKEN, Commit, FakeHub, Repository, StoredFile
from tests.processes import PATIENCE_SECONDS


TESTS = Path(__file__).resolve().parents[1]
CODE_FILES = {file.name for file in (TESTS.parent / "moe_hf" / "modeling").glob("*.py")} - {"__init__.py"}


# The sum of logits may differ in its last bits with where in memory the weights lie.
SAME = ("weights", "tokens")
EDITED_CARD = "---\nlicense: mit\n---\n\n# Edited by hand\n"


class _Client:
    def __init__(self, hub: FakeHub, folder: Path):
        self.hub, self.folder = hub, folder

    def run(self, name: str, isolated: bool = False) -> dict:
        """Run a function of clients.py in a process of its own and return its facts."""
        work = self.folder / name
        work.mkdir()
        env = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
        env |= {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / f"home-{name}"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "" if isolated else str(TESTS.parent),
            "HF_TOKEN": TOKEN,
        }
        script = str(TESTS / "hub" / "clients.py")
        done = subprocess.run(
            [sys.executable, script, name, str(work)],
            env=env,
            cwd=work,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert TOKEN not in done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub():
    with FakeHub() as server:
        yield server


def _put_card(hub: FakeHub, repo_id: str, card: str) -> None:
    repository = hub.repositories.setdefault(repo_id, Repository(private=False))
    repository.branches["main"].append(
        Commit("c" * 40, {"README.md": StoredFile(card.encode(), is_lfs=False)}, "card")
    )


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    return _Client(hub, tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def ours(hub, client):
    hub.fail("POST", "/tester/faulty/commit/", 500)
    hub.fail("POST", "/tester/cut/commit/", 502, after=True)
    return client.run("push_ours")


@pytest.fixture(scope="module")
def native(hub, client):
    hub.fail("POST", "/tester/forbidden/commit/", 403)
    _put_card(hub, "tester/broken", "---\nlicense: [\n---\n")
    _put_card(hub, "tester/edited", EDITED_CARD)
    return client.run("push_native")


@pytest.fixture(scope="module")
def loaded(ours, native, client):
    return client.run("load")


@pytest.fixture(scope="module")
def isolated(ours, client):
    return client.run("load_isolated", isolated=True)


def test_a_pushed_model_comes_back_bit_equal(ours, loaded):
    assert {name: loaded["ours"][name] for name in SAME} == {name: ours[name] for name in SAME}
    assert loaded["ours"]["logits"] == pytest.approx(ours["logits"], rel=1e-6)


def test_a_pushed_model_comes_back_bit_equal_without_moe_hf(ours, isolated):
    assert {name: isolated[name] for name in SAME} == {name: ours[name] for name in SAME}
    assert isolated["logits"] == pytest.approx(ours["logits"], rel=1e-6)
    assert isolated["module"].startswith("transformers_modules.")


def test_a_model_loaded_with_its_own_code_is_saved_and_reloaded(isolated):
    assert {name: isolated["again"][name] for name in SAME} == {name: isolated[name] for name in SAME}
    assert isolated["again"]["logits"] == pytest.approx(isolated["logits"], rel=1e-6)


def test_a_model_loaded_with_its_own_code_hands_the_code_on(isolated, hub):
    assert hub.files("tester/handed-on").keys() >= CODE_FILES


def test_push_carries_shards_code_tokenizer_and_card_and_no_pickle(ours, hub):
    files = hub.files("tester/ours")
    assert CODE_FILES | {"README.md", "config.json", "tokenizer.json", "tokenizer_config.json"} <= files.keys()
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl")) or name == "moe_hf_manifest.json"]
    config = json.loads(files["config.json"])
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(config["auto_map"])


def test_the_tokenizer_beside_the_source_is_pushed_along(loaded):
    assert loaded["ids"] == [4, 5, 6]
    assert loaded["chat_template"].startswith("{% for message in messages %}")


def test_an_unchanged_model_makes_no_second_commit(ours, hub):
    assert ours["oids"][0] == ours["oids"][1]
    assert len(hub.titles("tester/ours")) == 1


def test_a_branch_gets_its_commit_and_main_keeps_its_own(ours, loaded, hub):
    assert hub.titles("tester/ours", "next") == [*hub.titles("tester/ours"), "other weights"]
    assert loaded["branch"] == ours["changed"] != ours["weights"]
    assert "- extra\n" in hub.files("tester/ours", "next")["README.md"].decode()


def test_a_commit_that_fails_once_is_sent_again(ours, hub):
    assert len(hub.titles("tester/faulty")) == 1


def test_a_commit_whose_answer_is_lost_is_not_made_twice(ours, hub):
    assert len(hub.titles("tester/cut")) == 1


def test_the_card_says_what_is_counted_and_nothing_unknown(ours, hub):
    card = hub.files("tester/ours")["README.md"].decode()
    for text in ("library_name: transformers", "- upcycled", "| `num_experts` | 4 |", 'from_pretrained("tester/ours"'):
        assert text in card
    assert "trust_remote_code=True" in card
    assert "license:" not in card and "base_model" not in card
    assert "license: mit" in ours["card"]
    assert not re.search(r"None|More Information Needed|\n\n\n", card)


def test_no_path_of_this_machine_is_pushed(ours, native, hub, client):
    for repo_id in hub.repositories:
        for name, content in hub.files(repo_id).items():
            assert str(client.folder).encode() not in content, f"{repo_id}: {name}"
    assert json.loads(hub.files("tester/ours")["config.json"])["upcycling"]["source"] == "dense"


def test_a_saved_folder_is_complete(ours):
    saved = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "moe_hf_manifest.json"}
    assert CODE_FILES | saved <= set(ours["saved"])


def test_a_native_moe_is_pushed_with_its_facts(native, loaded, hub):
    assert {name: loaded["native"][name] for name in SAME} == {name: native[name] for name in SAME}
    card = hub.files("tester/native")["README.md"].decode()
    assert "license: apache-2.0" in card and "| prose | 1.5 |" in card and "trust_remote_code" not in card


def test_a_card_edited_on_the_hub_stays_and_is_replaced_only_on_request(native, hub):
    assert hub.titles("tester/edited") == ["card", "kept", "replaced"]
    cards = [c.files["README.md"].content.decode() for c in hub.repositories["tester/edited"].branches["main"][2:]]
    assert cards[0] == EDITED_CARD.replace("license: mit\n", "license: mit\ntags:\n- extra\n")
    assert "Edited by hand" not in cards[1] and "| `num_experts` | 4 |" in cards[1]


def test_a_private_repository_is_private_and_loads_with_the_token(native, loaded, hub):
    assert hub.repositories["tester/secret"].private and not hub.repositories["tester/native"].private
    assert loaded["secret"] == native["weights"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("no token", "Not logged in at http://127.0.0.1"),
        ("wrong token", "does not accept the token"),
        ("bad name", "'a/b/c' is no repository name"),
        ("foreign namespace", "may not write to somebody/model"),
        ("public", "tester/native exists and is public"),
        ("tokenizer", "507 tokens and the model 113 embeddings"),
        ("fact", "Did you mean 'license'"),
        ("broken card", "The card that is in tester/broken has broken metadata"),
        ("forbidden commit", "may not write to tester/forbidden"),
        ("existing folder", "exists: nothing was written"),
        ("save fact", "Did you mean 'license'"),
        ("save tokenizer", "507 tokens and the model 113 embeddings"),
    ],
)
def test_a_mistake_is_one_clear_error(native, mistake, message):
    assert message in native["errors"][mistake]
    assert "\n" not in native["errors"][mistake]


def test_a_mistake_leaves_nothing_behind(native, hub):
    assert native["left"] == []
    assert "tester/other" not in hub.repositories and "somebody/model" not in hub.repositories
    assert hub.titles("tester/forbidden") == []
