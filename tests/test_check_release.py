"""`make release-check`: what it refuses to check, what it repeats, and what its report says; and the release's own files."""

import json
import re
import subprocess
import tomllib

import pytest
import yaml

import moe_hf
from tests import check_release
from tests.documents.blocks import ROOT


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a changelog, and three checks, of which one fails until there is a file `mended`."""
    monkeypatch.setattr(
        check_release,
        "CHECKS",
        {
            "good": "echo x >> good-ran; echo '== 3 passed, 1 skipped in 2s =='; echo more",
            "bad": "echo 'why | not'; test -f mended",
            "last": "echo done",
        },
    )
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## [{moe_hf.__version__}]\n")
    (tmp_path / ".gitignore").write_text("release/\ngood-ran\nmended\n")
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(folder, *words):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True)


def commit(folder):
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "x")


def test_all_run_in_spite_of_a_failure_and_what_passed_is_not_repeated(checkout):
    assert check_release.main([], checkout) == 1
    report = (checkout / "release" / "report.md").read_text()
    assert re.search(r"\| passed \| .* \| 3 passed, 1 skipped in 2s \|", report)
    assert re.search(r"`echo 'why \| not'.*\| FAILED \| .* \| why \\\| not \|", report)
    assert "Left to prove: bad." in report
    assert (checkout / "release" / "last.log").read_text() == "done\n"

    (checkout / "mended").touch()
    assert check_release.main([], checkout) == 0
    assert (checkout / "good-ran").read_text() == "x\n"
    assert f"All have passed: `git tag v{moe_hf.__version__}`" in (checkout / "release" / "report.md").read_text()


def test_what_passed_on_another_commit_counts_no_more(checkout):
    (checkout / "mended").touch()
    assert check_release.main([], checkout) == 0
    commit(checkout)
    assert check_release.main(["--only", "last"], checkout) == 1
    report = (checkout / "release" / "report.md").read_text()
    assert "Left to prove: good, bad." in report and "| passed on " in report
    assert check_release.main([], checkout) == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "new.py").touch(), "not committed"),
        (lambda folder: git(folder, "tag", f"v{moe_hf.__version__}"), "exists. Raise __version__"),
        (lambda folder: ((folder / "CHANGELOG.md").write_text("## [Unreleased]\n"), commit(folder)), "has no section"),
    ],
)
def test_what_cannot_be_a_release_is_not_checked(spoil, message, checkout, capsys):
    spoil(checkout)
    assert check_release.main([], checkout) == 2
    assert message in capsys.readouterr().err
    assert not (checkout / "good-ran").exists()


def test_checks_are_commands_that_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in check_release.CHECKS.values():
        program, *words = command.split()
        assert (words[0] in targets) if program == "make" else (ROOT / program).is_file()
    for proof in ("test-all", "conformance", "interop", "newest", "demo REAL=1"):
        assert f"make {proof}" in check_release.CHECKS.values()


def test_workflow_tests_the_wheel_on_every_python_and_publishes_tags_alone():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    wheel, publish = workflow["jobs"]["wheel"], workflow["jobs"]["publish"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = [one.split(" :: ")[-1] for one in project["classifiers"] if "Python :: 3." in one]
    assert wheel["strategy"]["matrix"]["python-version"] == pythons
    assert ".ci/wheel" in [step.get("run") for step in wheel["steps"]]
    assert publish["needs"] == "wheel" and publish["if"] == "github.ref_type == 'tag'"
    assert not json.dumps(workflow).count("password")
