"""Fetches transformers' own tests, which no wheel has, from the source release of the installed version.

They are never committed: they live in `conformance/` at the root of the checkout, which git ignores.
"""

import importlib
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import transformers


CACHE = Path(__file__).parents[2] / "conformance"
PACKAGE = "transformers_tests"


def fetch_tests(version: str = transformers.__version__) -> Path:
    """Return the folder with the tests of transformers `version`, downloading its source release once."""
    target = CACHE / f"transformers-{version}" / "tests"
    if target.is_dir():
        return target
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*download, "--dest", folder, f"transformers=={version}"], check=True)
        (archive,) = Path(folder).glob("transformers-*.tar.gz")
        root = f"transformers-{version}"
        with tarfile.open(archive) as tar:
            members = [member for member in tar.getmembers() if member.name.startswith(f"{root}/tests/")]
            tar.extractall(folder, members, filter="data")
        # Whole or absent: an interrupted download leaves no folder that looks complete.
        (Path(folder) / root).replace(target.parent)
    return target


def _stub(name: str, **attributes) -> None:
    parent, _, child = name.rpartition(".")
    if parent != PACKAGE and parent not in sys.modules:
        _stub(parent)
    module = ModuleType(name)
    module.__path__ = []
    vars(module).update(attributes)
    sys.modules[name] = module
    setattr(sys.modules[parent], child, module)


def load_common() -> ModuleType:
    """Import `test_modeling_common`; what the source release lacks of its imports becomes empty mixins."""
    if PACKAGE not in sys.modules:
        folder = fetch_tests()
        # Not as `tests`: that is this project's own folder.
        spec = importlib.util.spec_from_loader(PACKAGE, loader=None, is_package=True)
        package = importlib.util.module_from_spec(spec)
        package.__path__ = [str(folder)]
        sys.modules[PACKAGE] = package
        for name, mixin in (
            ("exporters.test_export", "ExportTesterMixin"),
            ("generation.test_utils", "GenerationTesterMixin"),
        ):
            if not (folder / f"{name.replace('.', '/')}.py").is_file():
                _stub(f"{PACKAGE}.{name}", **{mixin: type(mixin, (), {})})
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")
