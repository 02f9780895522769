"""Which versions of other libraries moe_hf was tested with, and which are installed."""

import warnings
from importlib import metadata

from packaging.version import Version


# Also in configuration_moe.py, which travels without this file; here it is checked before transformers is loaded, since
# an old one fails in the middle of the models' imports. A test compares both with pyproject.toml.
SUPPORTED_TRANSFORMERS = ("5.23.0", "6")
# Oldest and newest that the tests ran with: the pins of constraints-oldest.txt and constraints.txt, which a test compares.
# torch is several gigabytes where it is not the pinned one, so its newest release is run by hand.
TESTED = {
    "transformers": ("5.23.0", "5.24.0"),
    "torch": ("2.13.0", "2.14.1"),
    "accelerate": ("1.10.1", "1.15.0"),
    "peft": ("0.20.0", "0.21.2"),
    "datasets": ("5.1.0", "5.2.0"),
    "huggingface_hub": ("2.0.0", "2.4.0"),
    "tokenizers": ("0.23.3", "0.23.3"),
    "safetensors": ("0.8.0", "0.8.0"),
    "trl": ("1.16.0", "1.16.0"),
}


def installed_versions() -> dict[str, str]:
    """Version by name of the libraries of `TESTED` that are installed."""
    versions = {}
    for name in TESTED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # trl is optional
    return versions


def check_installed_transformers() -> None:
    """Raise `ImportError` when the installed transformers is outside the supported range."""
    lowest, beyond = SUPPORTED_TRANSFORMERS
    version = metadata.version("transformers")
    if not Version(lowest) <= Version(version) < Version(beyond):
        raise ImportError(
            f"moe_hf works with transformers >= {lowest}, < {beyond}, and {version} is installed: "
            f"pip install 'transformers>={lowest},<{beyond}'."
        )


def warn_of_untested_versions() -> None:
    """Warn, in one sentence, of libraries that are newer than the newest that was tested."""
    newer = {
        name: version
        for name, version in installed_versions().items()
        if Version(Version(version).public) > Version(TESTED[name][1])
    }
    if newer:
        found = ", ".join(f"{name} {version} (tested up to {TESTED[name][1]})" for name, version in newer.items())
        tested = " ".join(f"'{name}<={TESTED[name][1]}'" for name in newer)
        warnings.warn(
            f"moe_hf was not tested with {found}; what it computes may differ. The tested ones: pip install {tested}.",
            stacklevel=2,
        )
