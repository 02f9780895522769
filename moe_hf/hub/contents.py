"""What of a folder may be published: no pickles, no training state, no secrets, nothing from outside of the folder."""

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from moe_hf.errors import MoEError
from moe_hf.saving import MANIFEST_NAME


# Pickles can run code where they are loaded; the rest is training state, secrets, or true of one folder only.
NEVER_PUSHED = (
    *("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.npy", "*.npz", "*.pyc"),
    *("optimizer*", "scheduler*", "rng_state*", "scaler*", "trainer_state.json", "checkpoint-*", "global_step*"),
    *(".*", "__pycache__", "id_rsa*", "id_ed25519*", "*.pem", "*.key", MANIFEST_NAME),
)
# Hidden, and yet part of a repository: which files are large, and the results that the Hub shows.
_HIDDEN_AND_PUSHED = (".gitattributes", ".eval_results")
SECRETS = {
    "a token of the Hugging Face Hub": rb"\bhf_[A-Za-z0-9]{30,}\b",
    "a token of GitHub": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})\b",
    "an access key of AWS": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "an API key of Google": rb"\bAIza[A-Za-z0-9_-]{35}\b",
    "an API key of OpenAI or Anthropic": rb"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}\b",
    "a token of Slack": rb"\bxox[abprs]-[A-Za-z0-9-]{20,}\b",
    "a private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
}
_SECRET = re.compile(b"|".join(b"(%s)" % pattern for pattern in SECRETS.values()))
_PIECE_BYTES = 1 << 22
# Longer than any token; pieces overlap by so much.
_OVERLAP_BYTES = 1 << 9


def is_never_pushed(path: str) -> bool:
    """Whether a file, named relative to its folder, or a folder above it, stays behind."""
    return any(
        part not in _HIDDEN_AND_PUSHED and any(fnmatch(part, pattern) for pattern in NEVER_PUSHED)
        for part in path.split("/")
    )


def files_to_push(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The files of a folder by their names in a repository, and the names of those that stay behind.

    Raises:
        `MoEError`: a file lies outside of the folder, behind a link; links of the Hub's own cache are fine.
    """
    wanted, left = {}, []
    for path in sorted(_walk(folder)):
        name = path.relative_to(folder).as_posix()
        if is_never_pushed(name):
            left.append(name)
            continue
        _refuse_link_out(path, folder)
        if path.is_file():
            wanted[name] = path
    return wanted, left


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        # Links to folders are named like files, so that they are refused and not silently left out.
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        yield from (Path(root, name) for name in (*files, *links))


def _refuse_link_out(path: Path, folder: Path) -> None:
    target, home = path.resolve(), folder.resolve()
    in_cache = home.parent.name == "snapshots" and target.is_relative_to(home.parent.parent / "blobs")
    if not (target.is_relative_to(home) or in_cache):
        raise MoEError(f"{path} is a link out of its folder: nothing was sent. Replace it with the file itself.")


def refuse_secrets(files: dict[str, Path], token: str | None = None) -> None:
    """Refuse files that hold what looks like a token or a private key, or the very token that is in use.

    Weights are not searched, except for the header of a safetensors file, where metadata are.

    Raises:
        `MoEError`: with the file, the line and the kind; never with the secret.
    """
    for name, path in files.items():
        found = _find_secret(path, token.encode() if token else None)
        if found is not None:
            kind, line = found
            where = "the header" if path.suffix == ".safetensors" else f"line {line}"
            raise MoEError(
                f"{name} holds what looks like {kind} ({where}): nothing was sent. Remove it, and revoke it if others saw it."
            )


def _find_secret(path: Path, token: bytes | None) -> tuple[str, int] | None:
    tail, lines = b"", 1
    with open(path, "rb") as file:
        limit = None
        if path.suffix == ".safetensors":
            limit = 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
        while piece := file.read(_PIECE_BYTES if limit is None else min(_PIECE_BYTES, limit)):
            limit = None if limit is None else limit - len(piece)
            text = tail + piece
            match = _SECRET.search(text)
            kind = None if match is None else list(SECRETS)[match.lastindex - 1]
            place = -1 if match is None else match.start()
            if kind is None and token and (place := text.find(token)) >= 0:
                kind = "the token that you push with"
            if kind is not None:
                return kind, lines + text.count(b"\n", 0, place)
            tail = text[-_OVERLAP_BYTES:]
            lines += text.count(b"\n", 0, len(text) - len(tail))
            if limit == 0:
                break
    return None
