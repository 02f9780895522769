"""`python -m moe_hf.cli` is the command `moe-hf`."""

from moe_hf.cli import main


main()
