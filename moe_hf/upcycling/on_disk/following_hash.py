"""sha256 of a file while it is being written."""

import hashlib
import os
import threading
from pathlib import Path


_CHUNK_BYTES = 1 << 18


class FollowingHash:
    """Hashes a file in a thread of its own, up to where it is said to be final; a context manager.

    What was hashed is handed to the disk at once, so that flushing the file in the end finds little left to do.

    Args:
        path (`Path`): the file, which exists.
    """

    def __init__(self, path: Path):
        self._path = path
        self._condition = threading.Condition()
        self._reached, self._is_last = 0, False
        self._digest, self._error = hashlib.sha256(), None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "FollowingHash":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._stop()

    def reach(self, position: int) -> None:
        """Say that the bytes before `position` will not change any more."""
        with self._condition:
            self._reached = position
            self._condition.notify()

    def hexdigest(self) -> str:
        """Wait for the thread; the sha256 of the bytes before the position that was reached."""
        self._stop()
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def _stop(self) -> None:
        with self._condition:
            self._is_last = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            with open(self._path, "rb", buffering=0) as file:
                self._follow(file.fileno())
        except OSError as error:
            self._error = error

    def _wait_beyond(self, position: int) -> int:
        """The position that was reached; `position` itself when no more will come."""
        with self._condition:
            self._condition.wait_for(lambda: self._is_last or self._reached > position)
            return self._reached

    def _follow(self, descriptor: int) -> None:
        buffer, position = memoryview(bytearray(_CHUNK_BYTES)), 0
        while (reached := self._wait_beyond(position)) > position:
            start = position
            while position < reached:
                count = os.preadv(descriptor, [buffer[: reached - position]], position)
                if count == 0:
                    raise OSError(f"{self._path} became shorter while it was written")
                self._digest.update(buffer[:count])
                position += count
            os.posix_fadvise(descriptor, start, position - start, os.POSIX_FADV_DONTNEED)
