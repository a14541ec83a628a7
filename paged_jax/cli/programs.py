"""Compiled programs are kept between commands: a second start need not compile.

jax writes two files for each program, one after the other:

    # NAME-cache   the program
    # NAME-atime   when it was last read

A command that is killed in between leaves a program without a time, and often only half of it.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import filelock
import jax
import platformdirs

MAX_BYTES = 2**28  # the programs that were read least recently go first

_settings: Any = jax.config  # whose attributes no type checker knows


def keep() -> None:
  """Keeps compiled programs in the user's cache folder, which never grows above `MAX_BYTES`.

  Nothing changes if the user has named a folder (`JAX_COMPILATION_CACHE_DIR`) or wants none
  (`JAX_ENABLE_COMPILATION_CACHE=0`). If the folder cannot be written, a line on standard error says
  so, and programs are compiled again each time.
  """
  if _settings.jax_compilation_cache_dir or not _settings.jax_enable_compilation_cache:
    return
  ours = platformdirs.user_cache_path("paged_jax", appauthor=False)
  try:
    _prepare(ours)
  except OSError as error:
    print(f"compiled programs are not kept: {error}", file=sys.stderr, flush=True)
    return
  _settings.update("jax_compilation_cache_dir", str(ours))
  _settings.update("jax_compilation_cache_max_size", MAX_BYTES)
  _settings.update("jax_persistent_cache_min_compile_time_secs", 0)
  _settings.update("jax_persistent_cache_min_entry_size_bytes", -1)


def folder() -> str | None:
  """Where compiled programs are kept, None if they are not."""
  return _settings.jax_compilation_cache_dir if _settings.jax_enable_compilation_cache else None


def _prepare(folder: Path) -> None:
  """Makes a folder that can be written, and removes programs that were not written to their end.

  Raises:
    OSError: It cannot be written.
  """
  if not folder.is_absolute():
    raise OSError(f"{folder} is no absolute path")  # what an unknown home folder leads to
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  tempfile.TemporaryFile(dir=folder).close()
  try:
    with filelock.FileLock(folder / ".lockfile", timeout=1):  # jax writes under the same lock
      for program in folder.glob("*-cache"):
        if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
          program.unlink()
  except filelock.Timeout:
    pass  # another command is writing; the next one tidies up
