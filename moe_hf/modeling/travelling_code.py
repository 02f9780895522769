"""Which code goes along with a saved model: this package's, or that of a subclass which lies beside it."""

import os
import sys

from torch.distributed.fsdp import FSDPModule
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging


logger = logging.get_logger(__name__)


def travelling_class(cls: type, module: str) -> type:
    """The class whose file, with those that it imports from beside it, is all that a reader of a saved `cls` needs.

    Args:
        cls (`type`): a model's class, combined with a dense one or not.
        module (`str`): the module of this package's own classes.
    """
    generic = cls._generic_class or next(base for base in cls.__mro__ if not issubclass(base, FSDPModule))
    own = next(base for base in generic.__mro__ if base.__module__ == module)
    source = getattr(sys.modules.get(generic.__module__), "__file__", None)
    if generic is own or source is None or generic.__module__ == "__main__":
        return own
    try:
        needed = {os.path.realpath(file) for file in get_relative_import_files(source)}
    except OSError:  # it imports a package, which transformers does not copy
        return own
    return generic if os.path.realpath(sys.modules[module].__file__) in needed else own


def auto_map_of(cls: type, travelling: type) -> dict[str, str]:
    """The `auto_map` of a saved model of class `cls`; warns where the class that travels is another one."""
    generic = cls._generic_class
    if travelling is not generic:
        logger.warning(
            f"The code of {generic.__name__} ({generic.__module__}) does not travel with the model, which loads as "
            f"{travelling.__name__} where that is not imported: its file does not import .modeling_moe from beside it."
        )
    return {
        "AutoConfig": "configuration_moe.MoEConfig",
        "AutoModel": "modeling_moe.MoEModel",
        "AutoModelForCausalLM": "modeling_moe.MoEForCausalLM",
        "AutoModelForSequenceClassification": "modeling_moe.MoEForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_moe.MoEForTokenClassification",
        travelling._auto_class: f"{travelling.__module__.rpartition('.')[2]}.{travelling.__name__}",
    }
