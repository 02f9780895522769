"""A part of CPython's library in the place of the whole, for tests of the tasks made from it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from moe_hf import library_tasks


@contextmanager
def library_of(*packages: str) -> Iterator[None]:
    """Let the tasks be made from these packages alone."""
    code = library_tasks.builtin_corpus()
    few = code.select([i for i, name in enumerate(code["document"]) if name.split("/")[0] in packages])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library_tasks, "builtin_corpus", lambda: few)
        library_tasks.library_functions.cache_clear()
        yield
    library_tasks.library_functions.cache_clear()
