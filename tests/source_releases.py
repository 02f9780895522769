"""Files that no wheel has, taken from a source release on PyPI and kept where git ignores them."""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


def fetch_files(distribution: str, version: str, inside: str, target: Path, only: tuple[str, ...] = ("",)) -> Path:
    """Return `target`, which holds the folder `inside` of that release, of it what begins as one of `only`.

    Downloaded once. Whole or absent: an interrupted download leaves no folder that looks complete.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", distribution]
        subprocess.run([*download, "--dest", folder, f"{distribution}=={version}"], check=True)
        (archive,) = Path(folder).glob(f"{distribution}-*.tar.gz")
        root = f"{distribution}-{version}/{inside}"
        with tarfile.open(archive) as tar:
            wanted = tuple(f"{root}/{start}" for start in only)
            members = [member for member in tar.getmembers() if member.name.startswith(wanted)]
            tar.extractall(folder, members, filter="data")
        (Path(folder) / root).replace(target)
    return target
