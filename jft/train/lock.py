"""The lock of a work directory: one run at a time writes into it, and the lock ends with its process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from jft import parallel, strict_json

NAME = ".lock"
# Of file systems without locks (gcsfuse, some of FUSE): a run there goes on without one.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# POSIX locks do not exclude threads of one process, nor a second opening of the file, so a process keeps its own account.
_held: dict[str, list[int]] = {}
_account = threading.Lock()


class Locked(OSError):
    """Another run works in the directory."""


def _holder(path: Path) -> str:
    """Who holds the lock, as its file says."""
    try:
        who = strict_json.read(path)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who["since"]))
        return f"process {who['pid']} on {who['host']} since {since} ({who['command']})"
    # The lock is what counts; the holder may just be writing its name.
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _refuse(directory: Path, who: str) -> Locked:
    return Locked(f"{directory} is in use by {who}; wait for it to end, stop it, or give another workdir")


def _acquire(directory: Path) -> int | None:
    """The descriptor of the locked file; None where the file system has no locks."""
    path = directory / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Not flock, which worker processes inherit: they may outlive the run.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in UNSUPPORTED:
                return None
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _refuse(directory, _holder(path)) from None
            raise
        # The one before may have removed the file between our opening and locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                break
        os.close(descriptor)
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "command": " ".join(sys.argv)[:200]}
    # A full disk must not stop a run from saying so later: the lock holds without a name.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(who).encode(), 0)
    return descriptor


@contextlib.contextmanager
def of_all(directory: Path) -> Iterator[None]:
    """:func:`held` by the first process for all of a run; the others are refused with it."""
    with contextlib.ExitStack() as stack:
        refusal = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(held(directory))
            except OSError as error:
                refusal = error
        first = parallel.exchange("lock of the workdir", None if refusal is None else str(refusal))[0]
        if first is not None:
            raise refusal or Locked(first)
        yield


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """While entered, no other run may start in ``directory``, which is made where it is missing.

    The lock is a POSIX record lock on ``directory/.lock``: it works over NFS and Lustre and ends with the process, however
    that ends. The same thread may enter again. Raises :class:`Locked` naming process, host, start and command of the holder.
    """
    key, thread = os.path.realpath(directory), threading.get_ident()
    with _account:
        owners = _held.get(key, [])
        if owners and owners[0] != thread:
            raise _refuse(directory, "another thread of this process")
        if not owners:
            made = not directory.exists()
            try:
                directory.mkdir(parents=True, exist_ok=True)
                descriptor = _acquire(directory)
            except Locked:
                raise
            except OSError as error:
                reason = "it is a file" if directory.is_file() else error.strerror or str(error)
                raise OSError(
                    f"workdir {directory} cannot be used: {reason}; give a directory that can be made and written to"
                ) from None
        _held.setdefault(key, []).append(thread)
    try:
        yield
    finally:
        with _account:
            _held[key].pop()
            if not owners:
                del _held[key]
        if not owners:
            if descriptor is not None:
                # Before it is released, so that nobody can have locked this file meanwhile.
                (directory / NAME).unlink(missing_ok=True)
                os.close(descriptor)
            if made:
                # A start that was refused leaves no folder.
                with contextlib.suppress(OSError):
                    directory.rmdir()
