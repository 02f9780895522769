"""Held-out text in two halves: one to choose on, one to report on."""

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers.utils import logging

from moe_hf.data import split_by_document
from moe_hf.errors import MoEError


logger = logging.get_logger(__name__)


def validation_and_test(held_out: Dataset, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Halve the held-out documents of each domain: what is chosen by the first half can be reported on the second.

    A domain with a single document is in the second alone, which is said.

    Args:
        held_out (`Dataset`): with the columns `domain` and `document`, as `split_by_document` returns it.
        seed (`int`): of the choice.

    Raises:
        MoEError: each domain has a single document.
    """
    by_domain: dict[str, set[str]] = {}
    for domain, document in zip(map(str, held_out["domain"]), map(str, held_out["document"]), strict=True):
        by_domain.setdefault(domain, set()).add(document)
    single = sorted(domain for domain, documents in by_domain.items() if len(documents) == 1)
    if len(single) == len(by_domain):
        raise MoEError(
            f"Each domain of the held-out text has one document ({', '.join(single)}), and rates are chosen on other "
            "documents than results are reported on. Raise held_out_share, or choose nothing: give control_learning_rate, "
            "or sweep 0."
        )
    if single:
        logger.warning(
            f"Results alone are of {', '.join(single)}, which has one held-out document: rates are not chosen by it."
        )
    is_single = np.array([str(domain) in single for domain in held_out["domain"]])
    test, validation = split_by_document(held_out.select(np.flatnonzero(~is_single)), 0.5, seed)
    return validation, concatenate_datasets([test, held_out.select(np.flatnonzero(is_single))]) if single else test
