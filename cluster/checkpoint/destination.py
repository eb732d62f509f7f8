"""Where a converted checkpoint comes to lie: a new folder that replaces nothing but a checkpoint, never the source.

Knows nothing of what is written.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TextIO

from cluster.checkpoint.convert import FILES_BESIDE, CannotConvert
from cluster.checkpoint.json_fields import read_json_object
from cluster.checkpoint.safetensors_file import InvalidCheckpoint

REPLACEABLE = (  # names of what a checkpoint's folder holds; with anything else in it the folder is not replaced
    *("config.json", "*.safetensors", "*.safetensors.index.json", *FILES_BESIDE),
    *("README*", "LICENSE*", ".gitattributes"),
)


class InterruptedWhenMade(KeyboardInterrupt):
    """`interrupt` came when the new folder was in its place."""

    def __init__(self, interrupt: KeyboardInterrupt) -> None:
        super().__init__()
        self.interrupt = interrupt


@contextmanager
def new_folder(destination: Path, *, source: Path, num_bytes: int, is_forced: bool) -> Iterator[Path]:
    """An empty folder beside `destination` that becomes it at the end, or vanishes if the block raises.

    source: the folder that is read meanwhile. num_bytes: what will be written. is_forced: replaces what is there, if it
    is a checkpoint. Raises CannotConvert, InterruptedWhenMade.
    """
    destination = destination.expanduser().absolute()
    _refuse_overlap(destination, source)
    _check_replaceable(destination, is_forced)
    _make_parent(destination)
    with _locked(destination) as is_locked:
        if is_locked:
            _remove_stale(destination)
        num_free = shutil.disk_usage(destination.parent).free
        if num_bytes > num_free:
            raise CannotConvert(
                f"{destination.parent} has {num_free:,} bytes free, the checkpoint needs {num_bytes:,}; make room or "
                "name another folder"
            )
        run = secrets.token_hex(4)
        folder = destination.with_name(f".{destination.name}.partial-{run}")
        replaced = destination.with_name(f".{destination.name}.replaced-{run}")
        folder.mkdir()
        try:
            yield folder
            _check_replaceable(destination, is_forced)  # again: a conversion takes long, and others may write there
            if destination.exists():
                destination.rename(replaced)
            folder.rename(destination)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException as error:  # Ctrl-C too
            if replaced.exists() and not destination.exists():
                replaced.rename(destination)
            elif not folder.exists() and isinstance(error, KeyboardInterrupt):
                shutil.rmtree(replaced, ignore_errors=True)
                raise InterruptedWhenMade(error) from error
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _make_parent(destination: Path) -> None:
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise CannotConvert(f"{destination.parent} is no folder; name another place for {destination.name}") from error
    except OSError as error:
        raise CannotConvert(f"{destination.parent} cannot be made: {error.strerror}; name another place") from error


@contextmanager
def _locked(destination: Path) -> Iterator[bool]:
    """Within, no other run writes to it; False where files cannot be locked. Raises CannotConvert while one does.

    A lock: of a run in another container or on another host, which may share the volume, a pid says nothing.
    """
    path = destination.with_name(f".{destination.name}.lock")
    with ExitStack() as stack:
        is_locked = is_taken = False
        with suppress(OSError):
            is_locked = _lock(stack.enter_context(path.open("a")), path)
            is_taken = not is_locked
        if is_taken:
            raise CannotConvert(f"another run converts to {destination}; wait for it or name another folder")
        try:
            yield is_locked
        finally:
            if is_locked:
                path.unlink(missing_ok=True)


def _lock(file: TextIO, path: Path) -> bool:
    """Whether it is locked now, and still at `path`: a run that ends removes its own. Raises OSError."""
    try:
        flock(file, LOCK_EX | LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove_stale(destination: Path) -> None:
    """What runs to this destination left that were killed; no other one is under way."""
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.(partial|replaced)-[0-9a-f]+")
    for path in destination.parent.iterdir():
        found = pattern.fullmatch(path.name)
        if found and (found[1] == "partial" or destination.exists()):  # what was set aside may be all there is
            shutil.rmtree(path, ignore_errors=True)


def _refuse_overlap(destination: Path, source: Path) -> None:
    """Whatever links lead to them. os.path: unlike Path.resolve it takes links that lead in a circle."""
    to, read = Path(os.path.realpath(destination)), Path(os.path.realpath(source.expanduser()))
    if to == read:
        raise CannotConvert(f"{destination} is the source itself; name another folder")
    if read.is_relative_to(to):
        raise CannotConvert(f"the source lies inside {destination}; name another folder")
    if to.is_relative_to(read):
        raise CannotConvert(f"{destination} lies inside the source; name a folder outside it")


def _check_replaceable(destination: Path, is_forced: bool) -> None:
    if not os.path.lexists(destination):
        return
    if not is_forced:
        raise CannotConvert(f"{destination} exists; name another folder or give --force")
    if destination.is_symlink() or not destination.is_dir() or not _is_checkpoint_or_empty(destination):
        raise CannotConvert(f"{destination} is no folder with a checkpoint; remove it yourself or name another")
    for path in sorted(destination.iterdir()):
        if path.is_dir() or not any(fnmatchcase(path.name, pattern) for pattern in REPLACEABLE):
            raise CannotConvert(
                f"{destination} holds {path.name}, which is no file of a checkpoint and would be lost; move it away or "
                "name another folder"
            )


def _is_checkpoint_or_empty(folder: Path) -> bool:
    if not any(folder.iterdir()):
        return True
    try:
        return "model_type" in read_json_object(folder / "config.json")
    except (InvalidCheckpoint, OSError):
        return False
