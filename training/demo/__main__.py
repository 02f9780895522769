"""Entry point of `python -m training.demo`."""

import sys

from moe_hf.errors import MoEError

from .job import main


try:
    main()
except MoEError as error:
    sys.exit(f"Error: {error}")
