"""The client of `test_push_killed.py`: one process imports the libraries, and forks one for each push that is asked for.

Each line of the input is a JSON list: folder, repository. Printed for each: the process id when it starts, and how it ended.
"""

import json
import os
import sys

import moe_hf.hub
from moe_hf import MoEError


def main() -> None:
    """Push until the input ends."""
    for line in sys.stdin:
        folder, repo_id = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                moe_hf.hub.push_folder(folder, repo_id)
            except MoEError as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
