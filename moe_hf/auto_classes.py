"""Registers the models with transformers' Auto classes at the moment those are loaded, so that `import moe_hf` is quick.

Loading torch and the Auto classes takes seconds, which the help of a command should not wait for.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder


# Every Auto class is defined here or in a module that imports it.
AUTO_CONFIG_MODULE = "transformers.models.auto.configuration_auto"


class _RegisterWhenLoaded(MetaPathFinder):
    """Finds transformers' modules where Python would, and registers once those that load the Auto classes have run.

    The models need modules of transformers that may themselves be waiting for the Auto classes, so registering waits
    for the outermost of the nested imports to end.
    """

    depth = 0

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if not fullname.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module):
            self.depth += 1
            try:
                run(module)
            finally:
                self.depth -= 1
            if self.depth == 0 and AUTO_CONFIG_MODULE in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        spec.loader.exec_module = run_and_register
        return spec


def _register() -> None:
    # The package registers at its end; where it is being imported already, this returns at once.
    import_module("moe_hf.modeling")


def register_when_loaded() -> None:
    """Register `MoEConfig`, `MoEModel` and `MoEForCausalLM`: at once if the Auto classes are loaded, else with them."""
    if AUTO_CONFIG_MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisterWhenLoaded) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterWhenLoaded())
