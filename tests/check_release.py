"""What a release has to prove, one check after the other, with a report of what each said.

    make release-check                     # everything: hours, a network, 16 GB of memory
    make release-check ONLY='wheel demo'   # some of it; what is in the report of the others stays there

Checks that passed on this commit are not repeated. `release/report.md` has the outcome of each, `release/NAME.log` its output.
Exit code 0 when all have passed on this commit, which is then ready to be tagged; 1 when one failed or is left; 2 where there is
nothing to be checked: files that are not committed, no section of the version in the CHANGELOG, a tag that exists.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import moe_hf
from moe_hf.versions import installed_versions


ROOT = Path(__file__).resolve().parent.parent
# Name of a check, and its command; the shortest first.
CHECKS = {
    "quality": "make quality",
    "wheel": ".ci/wheel",
    "docs": "make docs",
    "newest": "make newest",
    "test-oldest": "make test-oldest",
    "conformance": "make conformance",
    "demo": "make demo REAL=1",
    "test-all": "make test-all",
    "interop": "make interop",
}
SUMMARY = re.compile(r"\d+ (?:passed|failed|error|skipped)")


def obstacles(root: Path, version: str) -> Iterator[str]:
    """Why a commit cannot be a release, in sentences."""
    if _git(root, "status", "--porcelain"):
        yield "Some files are not committed: a check of them says nothing of a commit. Commit or remove them."
    if _git(root, "tag", "--list", f"v{version}"):
        yield f"The tag v{version} exists. Raise __version__ in moe_hf/__init__.py."
    if not re.search(rf"^## \[{re.escape(version)}\]", (root / "CHANGELOG.md").read_text(), re.MULTILINE):
        yield f"CHANGELOG.md has no section of {version}. Write one: ## [{version}]."


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def run_check(command: str, log: Path, root: Path) -> dict[str, Any]:
    """Run one check and show what it prints; whether it passed, its seconds and what it said in the end."""
    start, said = time.monotonic(), ""
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, shell=True, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
            words = line.strip().strip("= ")
            # Of a run of tests its count, which other lines may follow.
            if words and (SUMMARY.search(words) or not SUMMARY.search(said)):
                said = words
    return {"passed": process.returncode == 0, "seconds": time.monotonic() - start, "said": said[:200]}


def report(results: Mapping[str, dict[str, Any]], commit: str, version: str) -> str:
    """The report as Markdown; a check that has not passed on `commit` says so."""
    rows = []
    for name, command in CHECKS.items():
        result = results.get(name)
        outcome, date, minutes, said = "not run", "", "", ""
        if result is not None:
            outcome = "passed" if result["passed"] else "FAILED"
            outcome += "" if result["commit"] == commit else f" on {result['commit'][:10]}"
            date, minutes = result["date"], f"{result['seconds'] / 60:.1f}"
            said = result["said"].replace("|", "\\|")
        rows.append(f"| `{command}` | {outcome} | {date} | {minutes} | {said} |")
    left = [name for name in CHECKS if not _has_passed(results, name, commit)]
    verdict = f"Left to prove: {', '.join(left)}." if left else f"All have passed: `git tag v{version}`."
    machine = f"Python {platform.python_version()}, {os.cpu_count()} processors, {platform.platform()}"
    versions = ", ".join(f"{name} {number}" for name, number in installed_versions().items())
    lines = [f"# moe_hf {version}", "", f"Commit {commit}. {verdict}", "", f"{machine}; {versions}.", ""]
    lines += ["| check | outcome | date | minutes | its last words |", "|---|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _has_passed(results: Mapping[str, dict[str, Any]], name: str, commit: str) -> bool:
    return name in results and results[name]["passed"] and results[name]["commit"] == commit


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the checks that are left or asked for, write the report after each, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="NAME", help=f"of {', '.join(CHECKS)}")
    only = parser.parse_args(arguments).only
    version = moe_hf.__version__
    found = list(obstacles(root, version))
    if found:
        print(*found, sep="\n", file=sys.stderr)
        return 2
    commit, folder = _git(root, "rev-parse", "HEAD"), root / "release"
    folder.mkdir(exist_ok=True)
    record = folder / "results.json"
    results = json.loads(record.read_text()) if record.is_file() else {}
    for name in only or [name for name in CHECKS if not _has_passed(results, name, commit)]:
        print(f"== {name}: {CHECKS[name]}", flush=True)
        results[name] = run_check(CHECKS[name], folder / f"{name}.log", root)
        results[name] |= {"commit": commit, "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
        record.write_text(json.dumps(results, indent=1))
        (folder / "report.md").write_text(report(results, commit, version))
    text = report(results, commit, version)
    (folder / "report.md").write_text(text)
    print(text)
    return int(not all(_has_passed(results, name, commit) for name in CHECKS))


if __name__ == "__main__":
    sys.exit(main())
