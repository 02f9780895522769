"""One process with a fake Hub and a client: pushes and pulls, and what goes wrong with them; prints one JSON object.

`python faults.py lfs|xet FOLDER`. The Hub's client reads its endpoint when it is imported, so the server starts first.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.hub.fake_hub import READ_TOKEN, TOKEN, FakeHub


MODE, WORK = sys.argv[1], Path(sys.argv[2])
HUB = FakeHub(WORK / "cas" if MODE == "xet" else None)
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_TOKEN": TOKEN,
    "HF_HOME": str(WORK / "home"),
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_XET": str(int(MODE == "lfs")),
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

import torch  # noqa: E402
from huggingface_hub import ModelCard  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import moe_hf  # noqa: E402
from moe_hf.cli import app  # noqa: E402
from moe_hf.hub import account, push_model, save_model, transfer  # noqa: E402
from moe_hf.reporting.card_facts import EVAL_RESULTS_NAME, eval_results  # noqa: E402
from moe_hf.reporting.statistics import FORMAT, JSON_NAME, PICTURE_NAME  # noqa: E402
from tests.closeness import close  # noqa: E402
from tests.hub.clients import facts_of, tiny_tokenizer, weights_hash  # noqa: E402
from tests.hub.fake_hub import Repository, StoredFile  # noqa: E402
from tests.processes import PATIENCE_SECONDS  # noqa: E402
from tests.tiny_models import tiny_dense, tiny_native_moe  # noqa: E402


SLEPT: list[float] = []
time.sleep = SLEPT.append
OURS = WORK / "ours"


def _make_folders() -> None:
    dense = tiny_dense("llama")
    dense.save_pretrained(WORK / "secret-place" / "dense")
    model = moe_hf.upcycle(WORK / "secret-place" / "dense", num_experts=4, noise=0.1)
    save_model(model, tiny_tokenizer(), OURS, max_shard_size="300KB")
    for name in ("training_args.bin", "optimizer.pt", ".env", "checkpoint-1/model.safetensors", "runs/.cache/x"):
        (OURS / name).parent.mkdir(parents=True, exist_ok=True)
        (OURS / name).write_text("state")


def _pushed(repo_id: str, folder: Path = OURS, **options) -> str | None:
    """The error of a push, or None."""
    try:
        moe_hf.push_folder(folder, repo_id, **options)
    except moe_hf.MoEError as error:
        return str(error)
    return None


def _pulled(repo_id: str, name: str, **options) -> str | None:
    try:
        moe_hf.pull_folder(repo_id, WORK / name, **options)
    except moe_hf.MoEError as error:
        assert not (WORK / name).exists()
        return str(error)
    return None


def _outcome(repo_id: str, *errors: str | None, **more) -> dict:
    """What a scenario left: its errors in order, the commits, and whether all files are there and whole."""
    repository = HUB.repositories.get(repo_id)
    files = repository.branches["main"][-1].files if repository else {}
    weights = [name for name in sorted(os.listdir(OURS)) if name.endswith(".safetensors")]
    whole = all(name in files and files[name].size == (OURS / name).stat().st_size for name in weights)
    commits = HUB.titles(repo_id) if repository else []
    return {"errors": errors, "commits": len(commits), "whole": bool(files) and whole, **more}


def _with_fault(repo_id: str, method: str, part: str, status: int = 500, again: bool = False, **fault) -> dict:
    """Push with a fault; with `again`, once more without it."""
    HUB.fail(method, part.format(repo=repo_id), status, **fault)
    SLEPT.clear()
    errors = [_pushed(repo_id)]
    HUB.forget_faults()
    waits = list(SLEPT)
    if again:
        before = HUB.uploaded_bytes
        errors.append(_pushed(repo_id))
        return _outcome(repo_id, *errors, waits=waits, sent_again=HUB.uploaded_bytes - before)
    return _outcome(repo_id, *errors, waits=waits)


def round_trip() -> dict:
    """Ours goes up and comes back, twice; what stays behind; the manifest of what came."""
    errors = [_pushed("tester/ours"), _pushed("tester/ours"), _pulled("tester/ours", "back")]
    torch.manual_seed(0)
    hashes = {weights_hash(AutoModelForCausalLM.from_pretrained(WORK / name)) for name in ("ours", "back")}
    files = sorted(HUB.repositories["tester/ours"].commit_at("main").files)
    source = json.loads(HUB.files("tester/ours")["config.json"])["upcycling"]["source"]
    listing = sorted(
        file.relative_to(WORK / "back").as_posix() for file in (WORK / "back").rglob("*") if file.is_file()
    )
    exists = _pulled_over("tester/ours", "back")
    return _outcome(
        "tester/ours", *errors, exists=exists, equal=len(hashes) == 1, files=files, source=source, listing=listing
    )


def without_moe_hf() -> dict:
    """What the command pushed, loaded by a process that cannot import moe_hf, with the code that went along."""
    pushed = CliRunner().invoke(app, ["push", str(OURS), "tester/ours"])
    env = os.environ | {"PYTHONPATH": "", "HF_HOME": str(WORK / "home-of-another")}
    command = [sys.executable, str(Path(__file__).with_name("clients.py")), "load_isolated", str(WORK / "another")]
    loading = subprocess.run(command, env=env, cwd=WORK, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert loading.returncode == 0, loading.stderr[-3000:]
    found = json.loads(loading.stdout.splitlines()[-1])
    here = facts_of(AutoModelForCausalLM.from_pretrained(OURS))
    handed_on = sorted(HUB.repositories["tester/handed-on"].commit_at("main").files)
    return {"output": pushed.output, "here": here, "there": found, "handed on": handed_on}


def kept_cards() -> dict:
    """A card that people edited stays, and gets results; what goes beside a card goes up in any case."""
    report, warnings = WORK / "report", []
    report.mkdir()
    (report / JSON_NAME).write_text(json.dumps({"format": FORMAT, "summary": {"tokens": 7}}))
    (report / PICTURE_NAME).write_bytes(b"a picture")
    gsm8k = {"dataset": "GSM8K", "metric": "exact match", "dataset_id": "openai/gsm8k", "task_id": "gsm8k"}
    facts = {"routing_report": report, "results": [gsm8k | {"value": 0.41}]}
    model = AutoModelForCausalLM.from_pretrained(OURS)
    save_model(model, None, WORK / "with-card", facts)
    shutil.copytree(OURS, WORK / "without-card", ignore=shutil.ignore_patterns("README.md"))
    older = eval_results([gsm8k | {"value": 0.2}, {"dataset": "theirs", "metric": "F1", "value": 0.5}])
    edited = ModelCard("---\nlicense: mit\n---\n\n# Edited by hand\n")
    edited.data.eval_results, edited.data.model_name = older, "their name"
    pushes = {
        "folder": lambda name: moe_hf.push_folder(WORK / "with-card", name),
        "folder without card": lambda name: moe_hf.push_folder(WORK / "without-card", name, card_facts=facts),
        "model": lambda name: push_model(model, name, False, card_facts=facts),
    }
    account.logger.warning = warnings.append
    found = {}
    for kind, push in pushes.items():
        for state, card in (("new", None), ("kept", str(edited))):
            name = f"tester/{kind.replace(' ', '-')}-{state}"
            if card is not None:
                HUB.repositories[name] = Repository(private=False)
                HUB.add_commit(name, "main", {"README.md": StoredFile(card.encode(), is_lfs=False)}, "by hand")
            push(name)
            files = HUB.files(name)
            beside = {file: files[file].decode() for file in (PICTURE_NAME, EVAL_RESULTS_NAME) if file in files}
            found[f"{kind}, {state}"] = {"card": files["README.md"].decode(), "beside": beside}
    pulled = _pulled("tester/folder-new", "with-results")
    return {
        "found": found,
        "warnings": warnings,
        "pulled": [pulled, (WORK / "with-results" / EVAL_RESULTS_NAME).is_file()],
        "facts for a card": _pushed("tester/facts", WORK / "with-card", card_facts={"license": "mit"}),
    }


def _pulled_over(repo_id: str, name: str) -> str:
    try:
        moe_hf.pull_folder(repo_id, WORK / name)
    except moe_hf.MoEError as error:
        return str(error)
    return "no error"


def options() -> dict:
    """Branch, pull request, private; another model with fewer shards; a native export."""
    errors = [
        _pushed("tester/options", revision="next"),
        _pushed("tester/options", create_pr=True, commit_message="proposed"),
        _pushed("tester/options", create_pr=True, commit_message="proposed"),
        _pushed("tester/hidden", private=True),
        _pushed("tester/options", target="auto"),
        _pulled("tester/options", "native"),
    ]
    repository = HUB.repositories["tester/options"]
    native = AutoModelForCausalLM.from_pretrained(WORK / "native")
    ids = torch.tensor([[4, 5, 6]])
    same_logits = close(native(ids).logits, AutoModelForCausalLM.from_pretrained(OURS)(ids).logits)
    wrong = [
        _pushed("tester/options", revision="next", create_pr=True),
        _pushed("tester/options", private=True),
        _pushed("tester/options", target="no_family"),
    ]
    return {
        "errors": errors,
        "wrong": wrong,
        "branches": {name: len(commits) - 1 for name, commits in repository.branches.items()},
        "proposals": repository.proposals,
        "private": HUB.repositories["tester/hidden"].private,
        "class": type(native).__name__,
        "same_logits": same_logits,
        "weights": sorted(name for name in repository.commit_at("main").files if "safetensors" in name),
    }


def parts() -> dict:
    """Adapters and deltas, there and back, onto their base."""
    model = tiny_native_moe("mixtral")
    model.config._name_or_path = str(WORK / "secret-place" / "mixtral")
    moe_hf.apply_scope(model, "selected", expert_selection={"0": [1]})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    moe_hf.save_expert_deltas(model, WORK / "deltas" / "expert_deltas.safetensors")
    adapted = moe_hf.add_expert_lora(tiny_native_moe("mixtral"), moe_hf.ExpertLoraConfig(r=2))
    moe_hf.save_expert_lora(adapted, WORK / "lora")
    errors = []
    for name in ("deltas", "lora"):
        errors += [_pushed(f"tester/{name}", WORK / name), _pulled(f"tester/{name}", f"{name}-back")]
    base = tiny_native_moe("mixtral")
    facts = moe_hf.load_expert_deltas(base, WORK / "deltas-back")
    moe_hf.load_expert_lora(tiny_native_moe("mixtral"), WORK / "lora-back")
    moe_hf.merge_selected_experts(model)
    return {
        "errors": errors,
        "base": facts.base_model,
        "equal": weights_hash(base) == weights_hash(model),
        "cards": {name: HUB.files(f"tester/{name}")["README.md"].decode() for name in ("deltas", "lora")},
    }


def refused() -> dict:
    """What is refused before a byte moves."""

    def changed(name: str, change) -> Path:
        folder = WORK / f"bad-{name}"
        shutil.copytree(OURS, folder)
        change(folder)
        return folder

    def edit(file: str, text: str):
        return lambda folder: (folder / file).write_text(text)

    def flip(folder: Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[0]
        file.write_bytes(file.read_bytes()[:-1] + b"\x55")

    secret = "hf_" + "aB3" * 12
    bad = {
        "secret": changed("secret", edit("notes.md", f"first line\nexport HF_TOKEN={secret}\n")),
        "own token": changed("own", edit("log.txt", f"x {TOKEN} y")),
        "flipped byte": changed("flip", flip),
        "broken card": changed("card", edit("README.md", "---\nlicense: [\n---\n")),
        "link": changed("link", lambda folder: (folder / "passwd").symlink_to("/etc/hostname")),
        "nothing": WORK / "home",
    }
    HUB.requests.clear()
    errors = {name: _pushed("tester/refused", folder) for name, folder in bad.items()}
    errors["read token"] = _pushed("tester/refused", token=READ_TOKEN)
    errors["wrong token"] = _pushed("tester/refused", token="hf_wrong")
    errors["bad name"] = _pushed("a/b/c")
    errors["foreign"] = _pushed("somebody/model")
    moved = [path for method, path in HUB.requests if method == "PUT" or "commit" in path or "create" in path]
    shown = secret in json.dumps(errors) or TOKEN in json.dumps(errors)
    return {"errors": errors, "moved": [path for path in moved if path != "/api/repos/create"], "shown": shown}


def moved_by_others() -> dict:
    """Somebody commits between the look at the branch and our commit."""
    errors, stale = [_pushed("tester/moved")], transfer._stale_weights

    def meanwhile(*args):
        transfer._stale_weights = stale
        files = dict(HUB.repositories["tester/moved"].commit_at("main").files)
        HUB.add_commit("tester/moved", "main", files | {"theirs.md": StoredFile(b"x", is_lfs=False)}, "theirs")
        return stale(*args)

    transfer._stale_weights = meanwhile
    other = WORK / "moved"
    shutil.copytree(OURS, other)
    (other / "notes.md").write_text("new")
    errors.append(_pushed("tester/moved", other))
    before = HUB.uploaded_bytes
    errors.append(_pushed("tester/moved", other))
    files = HUB.repositories["tester/moved"].commit_at("main").files
    return _outcome("tester/moved", *errors, theirs="theirs.md" in files, sent_again=HUB.uploaded_bytes - before)


def server_down() -> dict:
    HUB.stop()
    error = _pushed("tester/down")
    HUB.start()
    return _outcome("tester/down", error, _pushed("tester/down"))


def proposal_whose_reply_is_lost() -> dict:
    HUB.fail("POST", "/tester/proposed/commit/", kind="cut", after=True)
    error = _pushed("tester/proposed", create_pr=True)
    return {"errors": [error], "proposals": len(HUB.repositories["tester/proposed"].proposals)}


def _pull_with_fault(name: str, part: str, **fault) -> dict:
    HUB.fail("GET", part, **fault)
    errors = [_pulled("tester/ours", name)]
    HUB.forget_faults()
    HUB.requests.clear()
    errors.append(_pulled("tester/ours", name))
    blobs = [path for method, path in HUB.requests if method == "GET" and path.startswith("/_blob/")]
    return {"errors": errors, "fetched_again": len(blobs), "left": [p.name for p in WORK.glob(f".{name}.tmp-*")]}


def corrupt_store() -> dict:
    """A changed byte in the xet store."""
    # Python 3.13 finds a file below two folders of the name twice, and twice changed is not changed.
    for file in set((WORK / "cas").rglob("xorbs/**/*")):
        if file.is_file() and file.suffix != ".mdb" and file.stat().st_size > 100_000:
            content = bytearray(file.read_bytes())
            content[50_000] ^= 1
            file.write_bytes(content)
    shutil.rmtree(WORK / "home" / "xet", ignore_errors=True)
    return {"errors": [_pulled("tester/ours", "corrupt")]}


BOTH = {
    "round trip": round_trip,
    "without moe_hf": without_moe_hf,
    "options": options,
    "commit fails once": lambda: _with_fault("tester/c500", "POST", "/{repo}/commit/", 500),
    "commit fails for good": lambda: _with_fault("tester/c503", "POST", "/{repo}/commit/", 503, times=99, again=True),
    "reply is lost": lambda: _with_fault("tester/lost", "POST", "/{repo}/commit/", kind="cut", after=True),
    "reply of a proposal is lost": proposal_whose_reply_is_lost,
    "commit is rate limited": lambda: _with_fault(
        "tester/c429", "POST", "/{repo}/commit/", 429, headers={"Retry-After": "7"}
    ),
    "commit is forbidden": lambda: _with_fault("tester/c403", "POST", "/{repo}/commit/", 403),
    "preupload is unavailable": lambda: _with_fault("tester/p503", "POST", "/{repo}/preupload/", 503),
    "token expires": lambda: _with_fault("tester/p401", "POST", "/{repo}/preupload/", 401, again=True),
    "conflict": lambda: _with_fault("tester/c409", "POST", "/{repo}/commit/", 409, again=True),
    "moved": moved_by_others,
    "server is down": server_down,
}
LFS = {
    "parts": parts,
    "kept cards": kept_cards,
    "refused": refused,
    "part fails once": lambda: _with_fault("tester/u503", "PUT", "repo={repo}", 503),
    "part is rate limited": lambda: _with_fault(
        "tester/u429", "PUT", "repo={repo}", 429, headers={"Retry-After": "7"}
    ),
    "parts fail for good": lambda: _with_fault("tester/u500", "PUT", "/2?repo={repo}", 500, times=999, again=True),
    "part is cut": lambda: _with_fault("tester/ucut", "PUT", "/1?repo={repo}", kind="cut"),
    "download is corrupt": lambda: _pull_with_fault("dcorrupt", "/_blob/", kind="corrupt"),
    "download is cut": lambda: _pull_with_fault("dcut", "/_blob/", kind="cut"),
    "download fails": lambda: _pull_with_fault("d500", "/_blob/", status=500),
    "download is forbidden": lambda: _pull_with_fault("d403", "/api/models/tester/ours", status=403),
}
XET = {
    "store token fails once": lambda: _with_fault("tester/x500", "GET", "/{repo}/xet-write-token", 500),
    "store token is forbidden": lambda: _with_fault("tester/x403", "GET", "/{repo}/xet-write-token", 403, times=99),
    "store is corrupt": corrupt_store,
}


def main() -> None:
    """Run all scenarios of the mode, or those named on the command line."""
    _make_folders()
    scenarios = BOTH | (LFS if MODE == "lfs" else XET)
    results = {}
    for name, scenario in scenarios.items():
        if not sys.argv[3:] or name in sys.argv[3:]:
            # What other scenarios sent would make an upload unnecessary.
            HUB.known.clear()
            started = time.perf_counter()
            results[name] = scenario()
            print(f"{name}: {time.perf_counter() - started:.2f} s", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
