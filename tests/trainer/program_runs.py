"""Runs the programs of training/ in this process."""

import sys
from importlib import import_module


def run(program: str, *argv: str) -> None:
    """Run a program of training/ in this process."""
    original = sys.argv
    sys.argv = [program, *argv]
    try:
        import_module(f"training.{program}").main()
    finally:
        sys.argv = original
