"""One driver at a time in a folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FolderError

if TYPE_CHECKING:
    from .folder import Folder

NAME = "lock"


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": _start(os.getpid())}


def _start(pid: int) -> str | None:
    """When a process of this host began, in ticks since boot, so that a pid that was given again is not taken for it;
    None where the system does not tell or there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _gone(owner: dict[str, Any]) -> bool:
    """Whether the owner is a process of this host that has ended. Of another host nothing is known."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return owner.get("start") is not None and _start(owner["pid"]) != owner["start"]


def _owner(data: bytes) -> dict[str, Any] | None:
    """Who wrote a lock; None for one that is empty or torn, whose writer died while writing it."""
    try:
        owner = json.loads(data)
    except ValueError:
        return None
    return owner if isinstance(owner, dict) else None


def _refusal(folder: Folder, owner: dict[str, Any]) -> FolderError:
    return FolderError(
        f"process {owner.get('pid')} on {owner.get('host')} works in {folder} already; wait for it, or if it has ended "
        f"remove {folder.path(NAME)}"
    )


@contextlib.contextmanager
def locked(folder: Folder, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder's lock during the block.

    On a local file system the lock is taken under `flock`, so of two drivers that find a stale lock one gets it. On any
    other it is best effort: written, then read back.

    Raises:
        FolderError: another driver holds it; names its host and pid.
    """
    mine = json.dumps(_me())
    take = _take_local if folder.is_local else _take
    stale = take(folder, mine)
    if stale is not None:
        say(f"process {stale['pid']} on {stale['host']} left its lock behind when it ended; the lock is taken over")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if folder.read(NAME) == mine.encode():
                folder.delete(NAME)


def _take(folder: Folder, mine: str) -> dict[str, Any] | None:
    """Take the lock; returns the ended owner of a stale one."""
    owner = _owner(folder.read(NAME) or b"")
    if owner is not None and not _gone(owner):
        raise _refusal(folder, owner)
    folder.write(NAME, mine.encode())
    written = folder.read(NAME) or b""
    if written != mine.encode():
        raise _refusal(folder, _owner(written) or {})
    return owner


def _take_local(folder: Folder, mine: str) -> dict[str, Any] | None:
    try:
        import fcntl
    except ImportError:  # Windows
        return _take(folder, mine)
    path = folder.path(NAME)
    while True:
        with open(os.open(path, os.O_CREAT | os.O_RDWR, 0o644), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if os.stat(path).st_ino != os.fstat(file.fileno()).st_ino:
                    continue
            except FileNotFoundError:  # its owner has released it since it was opened
                continue
            owner = _owner(file.read())
            if owner is not None and not _gone(owner):
                raise _refusal(folder, owner)
            file.seek(0)
            file.write(mine.encode())
            file.truncate()
            return owner
