"""Where prefixes are kept while no process has them: a `Store`, and one made of files.

A store knows names and bytes. What the bytes mean is the business of `persistence`.

    # folder    entry-5e1f..  ──┬──▶ page-09ac..      an entry is one prefix; it names its pages
    #           entry-77b0..  ──┴──▶ page-c4d2..      a page that several prefixes share is there once
"""

import contextlib
import logging
import os
import pathlib
import re
import secrets
import stat
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

_log = logging.getLogger(__name__)

_NAME = re.compile(r"(entry|page)-[0-9a-f]{64}")
_SUFFIX = ".safetensors"
_NEW = ".tmp"  # ends the name of a file that is being written
_STALE = 3600  # seconds after which nobody writes such a file any more
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class Store(Protocol):
  """Records by name. Several processes may use one store at once.

  A record may vanish at any time, and what `get` returns may be damaged: that is a miss. An error of
  `put` (a full disk, say) ends the save, and leaves all earlier records as they were.

  >>> class Memory(dict):  # a store as short as it may be, without a limit
  ...   def names(self):
  ...     return [*reversed(self)]
  ...   def put(self, records):
  ...     for name, data in records.items():
  ...       self[name] = self.pop(name, None) if data is None else data
  ...     return True
  ...   remove = dict.pop
  >>> from paged_jax import CacheConfig, host
  >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
  >>> manager.load_prefixes(Memory(), "weights 1").num_prefixes
  0
  """

  def names(self) -> Iterable[str]:
    """The names of all records, the most recently put first."""
    ...

  def get(self, name: str) -> bytes | None:
    """A record; None if there is none, or if it cannot be read."""
    ...

  def put(self, records: Mapping[str, bytes | None]) -> bool:
    """Keeps records in this order, so that the last one, which names the others, never lacks them.

    None stands for a record that is there already: it counts as just put.

    Returns:
      Whether they are kept; not if they are more than the store may hold.
    """
    ...

  def remove(self, name: str) -> None:
    """Forgets a damaged record."""
    ...


class _File(NamedTuple):
  time: int  # of the last `put`, nanoseconds
  size: int  # bytes
  path: pathlib.Path


class FileStore:
  """A folder of safetensors files, one for each record.

  A file is written under another name, synchronized with the disk and renamed, so that a process that
  is killed leaves whole files behind, and all that were there before. Files and folder are for their
  owner alone, since they tell what was asked.

  >>> import tempfile
  >>> from paged_jax import host
  >>> store = host.FileStore(tempfile.mkdtemp(), max_bytes=10**9)
  >>> store.put({"page-" + 64 * "0": b"bytes"}), store.get("page-" + 64 * "0")
  (True, b'bytes')

  Args:
    folder: Made by the first `put` if it is missing.
    max_bytes: Of all records. Those that were not put for the longest time go first.

  Raises:
    ValueError: `max_bytes` is not positive.
  """

  def __init__(self, folder: str | os.PathLike[str], max_bytes: int = 2**34):
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
      raise ValueError(f"max_bytes must be a positive integer, got {max_bytes!r}")
    self.folder, self.max_bytes = pathlib.Path(folder), max_bytes

  def names(self) -> list[str]:
    """The names of all records, the most recently put first; none if there is no folder."""
    files = sorted(self._files(_SUFFIX), reverse=True)
    names = (file.path.name.removesuffix(_SUFFIX) for file in files)
    return [name for name in names if _NAME.fullmatch(name)]

  def get(self, name: str) -> bytes | None:
    """A record; None if there is none, or if it is no plain file that can be read."""
    if not _NAME.fullmatch(name):  # it comes from a file, and must not lead out of the folder
      return None
    path = self._path(name)
    try:
      with open(os.open(path, _FLAGS), "rb") as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
          return file.read()
        reason = "no plain file"
    except FileNotFoundError:
      return None
    except OSError as error:
      reason = error.strerror
    _log.warning("%s is not used: %s", path, reason)
    return None

  def put(self, records: Mapping[str, bytes | None]) -> bool:
    """Keeps records; see `Store.put`.

    Raises:
      OSError: The folder or the disk takes no more.
    """
    self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = {name: self._path(name) for name in records}
    fresh = {paths[name]: data for name, data in records.items() if data is not None}
    if not self._make_room(fresh, {*paths.values()}):
      last = next(reversed(paths.values()))
      _log.warning("%s is not written: with its pages it exceeds %d bytes", last, self.max_bytes)
      return False
    self._write(fresh)
    # The last record is the oldest, then the one before it: so an entry goes before its pages, and
    # those at the end of a prefix before those at its beginning.
    now = time.time_ns()
    for age, path in enumerate(reversed(paths.values())):
      with contextlib.suppress(FileNotFoundError):  # another process has removed it: a miss
        os.utime(path, ns=(now + age, now + age))
    return True

  def remove(self, name: str) -> None:
    """Removes a record, if that is allowed."""
    with contextlib.suppress(OSError):
      self._path(name).unlink()

  def _path(self, name: str) -> pathlib.Path:
    if not _NAME.fullmatch(name):
      raise ValueError(f"name must be entry- or page- and 64 hexadecimal digits, got {name!r}")
    return self.folder / f"{name}{_SUFFIX}"

  def _files(self, suffix: str) -> list[_File]:
    """The plain files of the folder whose names end so."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as each:
      for item in each:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
          if item.name.endswith(suffix) and item.is_file(follow_symlinks=False):
            status = item.stat(follow_symlinks=False)
            found.append(_File(status.st_mtime_ns, status.st_size, pathlib.Path(item.path)))
    return found

  def _make_room(self, fresh: Mapping[pathlib.Path, bytes], staying: set[pathlib.Path]) -> bool:
    """Removes the oldest files, except `staying`, until there is room for `fresh`; False if there is
    too little."""
    stale = time.time_ns() - _STALE * 10**9
    gone = [file for file in self._files(_NEW) if file.time < stale]  # their process was killed
    files = sorted(self._files(_SUFFIX))
    size = sum(file.size for file in files if file.path not in fresh)
    size += sum(map(len, fresh.values()))
    for file in files:
      if size > self.max_bytes and file.path not in staying:
        gone.append(file)
        size -= file.size
    if size > self.max_bytes:
      return False
    for file in gone:
      file.path.unlink(missing_ok=True)
    return True

  def _write(self, fresh: Mapping[pathlib.Path, bytes]) -> None:
    """Writes files, each whole or not at all, in order."""
    unique = f".{os.getpid()}-{secrets.token_hex(4)}{_NEW}"
    made = {path: path.with_name(f".{path.name}{unique}") for path in fresh}
    try:
      for path, data in fresh.items():
        with open(os.open(made[path], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
          file.write(data)
      for path, temporary in made.items():
        _synchronize(temporary)
        temporary.replace(path)
    finally:
      for temporary in made.values():
        temporary.unlink(missing_ok=True)
    _synchronize(self.folder)


def _synchronize(path: pathlib.Path) -> None:
  """Waits until the disk has a file or a folder."""
  opened = os.open(path, os.O_RDONLY)
  try:
    os.fsync(opened)
  finally:
    os.close(opened)
