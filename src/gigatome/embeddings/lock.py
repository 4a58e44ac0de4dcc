"""Lock files beside outputs, so that several processes, and TRIDENT, may work in one job directory.

The lock of ``a.h5`` is ``a.h5.lock``, a JSON object ``{"pid", "hostname", "created_at"}`` with Unix seconds, as TRIDENT
writes it. A lock is never taken for dead because its output exists, only because its owner is.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from gigatome.core.logs import log

STALE_HOURS = 24.0
"""Age at which the lock of another machine, which cannot be asked, counts as dead; the same as TRIDENT's."""


class Lock:
    """The lock of one output; :meth:`acquire` it, and :meth:`release` it whatever happens.

    Args:
        output: the file that is to be written.
        stale_hours: age in hours at which a lock from another machine counts as dead.
    """

    def __init__(self, output: Path, *, stale_hours: float = STALE_HOURS):
        self.path = output.with_name(output.name + ".lock")
        self._stale_seconds = stale_hours * 3600
        self._mine: bytes | None = None

    def acquire(self) -> bool:
        """Takes the lock; False if somebody else who may be alive holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._create():
            return True
        held = self._read()
        if held is not None and not self._is_stale(held):
            return False
        if held is not None and not self._remove(held):
            return False
        return self._create()

    def sweep(self) -> None:
        """Removes a lock whose owner is gone, such as one who was killed after writing the output."""
        held = self._read()
        if held is not None and self._is_stale(held):
            self._remove(held)

    def release(self) -> None:
        """Gives the lock back if it is still ours."""
        if self._mine is not None and self._read() == self._mine:
            self.path.unlink(missing_ok=True)
        self._mine = None

    def owner(self) -> str:
        """Who holds the lock, for messages."""
        content = _parse(self._read() or b"")
        return f"process {content.get('pid', '?')} on {content.get('hostname', 'an unknown machine')}"

    def _create(self) -> bool:
        if self.path.exists():
            return False
        owner = {"pid": os.getpid(), "hostname": socket.gethostname(), "created_at": time.time()}
        content = json.dumps(owner).encode()
        whole = self.path.with_name(f".{self.path.name}.{uuid4().hex}.tmp")
        try:
            whole.write_bytes(content)
            os.link(whole, self.path)  # appears whole or not at all: we may be killed at any moment
        except FileExistsError:
            return False
        except OSError:  # no hard links here
            if not self._create_in_steps(content):
                return False
        finally:
            whole.unlink(missing_ok=True)
        self._mine = content
        return True

    def _create_in_steps(self, content: bytes) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        return True

    def _read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _is_stale(self, held: bytes) -> bool:
        owner = _parse(held)
        created, pid = owner.get("created_at"), owner.get("pid")
        if not isinstance(created, int | float):  # empty or foreign: go by the file itself
            try:
                created = self.path.stat().st_mtime
            except FileNotFoundError:
                return True
        if owner.get("hostname") == socket.gethostname() and isinstance(pid, int):
            return not _is_running(pid, created)
        return time.time() - created > self._stale_seconds

    def _remove(self, held: bytes) -> bool:
        """Removes the stale lock ``held``; False if somebody else has taken it over in the meantime."""
        aside = self.path.with_name(f"{self.path.name}.{uuid4().hex}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return True
        if aside.read_bytes() != held:
            aside.rename(self.path)
            return False
        aside.unlink()
        log.info("%s: taken over from %s, which is gone", self.path, _parse(held).get("pid", "an unknown process"))
        return True


def _parse(content: bytes) -> Mapping[str, Any]:
    try:
        owner = json.loads(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_running(pid: int, since: float) -> bool:
    """Whether the process that wrote a lock at Unix time ``since`` still runs, and not another one of the same id."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        lines = Path("/proc/stat").read_text().splitlines()
        boot = next(int(line.split()[1]) for line in lines if line.startswith("btime"))
    except (OSError, StopIteration, ValueError, IndexError):
        return True  # no /proc here: the id is all there is to go by
    started = boot + ticks / os.sysconf("SC_CLK_TCK")
    return started <= since + 2.0  # btime is a whole second
