"""Configurations of models, read from a folder, a GGUF file or the Hub; what is wrong with one is one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from moe_hf.errors import MoEError
from moe_hf.gguf_files import gguf_config, gguf_file_of
from moe_hf.modeling.index_names import check_kernel_names


def load_config(path: str) -> PreTrainedConfig:
    """Read a configuration from a folder, a GGUF file or the Hub.

    Raises:
        MoEError: when there is none, or none that transformers can read without remote code.
    """
    folder = Path(path).expanduser()
    file = gguf_file_of(folder)
    if file is not None:
        return gguf_config(file)
    if folder.is_dir():
        path = str(folder)
        if not (folder / "config.json").is_file():
            raise MoEError(f"{path} has no config.json; give a folder that save_pretrained wrote.")
        check_kernel_names(folder)
    elif folder.exists() or path.startswith((".", "/", "~")):
        raise MoEError(f"{path} is not a folder; give a folder that save_pretrained wrote, or a Hub id.")
    with config_errors(path):
        return AutoConfig.from_pretrained(path)


@contextmanager
def config_errors(path: str | Path) -> Iterator[None]:
    """What reading a configuration, or making an empty model of it, raises of values that no model can have, as one error.

    Which exception it is depends on the field and on the family.

    Raises:
        MoEError: names the configuration and the first line of the reason.
    """
    try:
        yield
    except MoEError:
        raise
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RuntimeError,
        AssertionError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MoEError(f"The configuration of {path} cannot be read: {reason}") from error
    except StrictDataclassError as error:
        raise MoEError(f"The configuration of {path} cannot be read: {' '.join(str(error).split())}") from error
