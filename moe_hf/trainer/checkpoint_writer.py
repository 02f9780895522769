"""Writes checkpoints, each whole or absent, in step with training or beside it."""

import shutil
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist

from moe_hf.errors import MoEError


Write = Callable[[dist.ProcessGroup | None], None]


class CheckpointWriter:
    """Runs what is left to write of a checkpoint, then publishes it if every process has written its part.

    Args:
        background (`bool`): write in a thread while training goes on; each process has its own, and they talk over a
            process group of their own. What is written must then be copies.
    """

    def __init__(self, background: bool) -> None:
        self.background = background
        self._group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def run(self, writes: list[Write], staging: Path, publish: Callable[[], None]) -> None:
        """Write and publish; in the background after the previous checkpoint, and `wait` reports a failure.

        Args:
            writes: as many in every process, called in order, with the process group for collectives or None for the
                default one.
            staging (`Path`): removed where a process fails.
            publish: called by the main process alone, at the end.
        """
        if not self.background:
            self._write(writes, staging, publish, None)
            return
        self.wait()
        if self._group is None and _num_processes() > 1:
            self._group = dist.new_group(backend="gloo")
        self._thread = threading.Thread(
            target=self._write_noting_failure, args=(writes, staging, publish), name="checkpoint-writer"
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            MoEError: it could not be written; an earlier one is the newest.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise MoEError(f"A checkpoint was not written, and none of it is left: {failure}") from failure

    def _write_noting_failure(self, writes: list[Write], staging: Path, publish: Callable[[], None]) -> None:
        try:
            self._write(writes, staging, publish, self._group)
        except BaseException as failure:
            self._failure = failure

    def _write(
        self, writes: list[Write], staging: Path, publish: Callable[[], None], group: dist.ProcessGroup | None
    ) -> None:
        is_main = not dist.is_initialized() or dist.get_rank() == 0
        try:
            for write in writes:
                together(partial(write, group), group)
            together(lambda: publish() if is_main else None, group)
        except BaseException:
            if is_main:
                shutil.rmtree(staging, ignore_errors=True)
            raise


def together(action: Callable[[], object], group: dist.ProcessGroup | None = None) -> None:
    """Run `action`; where it fails in one process, every process raises.

    Raises:
        MoEError: another process failed; the one that did raises its own error.
    """
    failure = None
    try:
        action()
    except Exception as error:
        failure = error
    if _num_processes() > 1:
        messages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, failure and "".join(traceback.format_exception_only(failure)), group=group)
        failed = [(rank, message.strip()) for rank, message in enumerate(messages) if message]
        if failed and failure is None:
            raise MoEError(f"Process {failed[0][0]} failed: {failed[0][1]}")
    if failure is not None:
        raise failure


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
