"""What a fake Hub keeps in memory: repositories, their commits, and what is planned to go wrong."""

import hashlib
from dataclasses import dataclass, field


@dataclass
class StoredFile:
    """A file of a commit."""

    content: bytes
    is_lfs: bool
    # Of a file whose bytes are in the xet store.
    xet: tuple[str, int] | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if self.xet is None else self.xet[1]

    @property
    def git_oid(self) -> str:
        """sha1 as git computes it for a blob, of a large file for its pointer."""
        content = self.content if self.xet is None else self.xet[0].encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        """sha256 of the content."""
        return hashlib.sha256(self.content).hexdigest() if self.xet is None else self.xet[0]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of `method` whose path and query contain `part`.

    Attributes:
        kind: `"status"`, `"cut"` (the connection is reset, in the middle of what is received or sent), `"corrupt"` (a
            changed byte in what is sent), or `"hang"` (no answer until `FakeHub.release`, and then a reset).
        after: do what was asked for first, so that only the answer is lost.
    """

    method: str
    part: str
    kind: str = "status"
    status: int = 500
    times: int = 1
    after: bool = False
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Commit:
    """A commit: the whole tree, and its message."""

    oid: str
    files: dict[str, StoredFile]
    title: str


@dataclass
class Repository:
    """A repository: commits by branch, the newest last."""

    private: bool
    branches: dict[str, list[Commit]] = field(
        default_factory=lambda: {"main": [Commit("0" * 40, {}, "initial commit")]}
    )

    # Titles of pull requests, whose branches are `refs/pr/1` and so on.
    proposals: list[str] = field(default_factory=list)

    def commit_at(self, revision: str) -> Commit | None:
        """The newest commit of a branch, or the commit with this id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)
