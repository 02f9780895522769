"""Fetches transformers' own tests, which no wheel has, from the source release of the installed version.

They are never committed: they live in `conformance/` at the root of the checkout, which git ignores.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import transformers

from tests.source_releases import fetch_files


CACHE = Path(__file__).parents[2] / "conformance"
PACKAGE = "transformers_tests"


def fetch_tests(version: str = transformers.__version__) -> Path:
    """Return the folder with the tests of transformers `version`, downloading its source release once."""
    return fetch_files("transformers", version, "tests", CACHE / f"transformers-{version}" / "tests")


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
