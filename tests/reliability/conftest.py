"""The checkpoint that the tests of this folder damage."""

from tests.reliability.folders import copy, ours


__all__ = ["copy", "ours"]
