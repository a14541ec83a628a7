"""A kernel proves itself on the device before an engine uses it; what is proven once is kept.

What an engine does, by the backend that it was asked for:

    # asked for         kernel right      kernel wrong
    # nothing (None)    the kernel        the next best that is right, with a warning
    # its name          the kernel        NotImplementedError
    # xla, reference    nothing to prove: they are what XLA compiles anywhere
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import jax

from paged_jax import attention, pages
from paged_jax.attention import proof
from paged_jax.config import CacheConfig

_log = logging.getLogger(__name__)
_settings: Any = jax.config  # whose attributes no type checker knows
_MEMORY_BYTES = 2**27  # for the timed step: the engine's pages are there already


def backend(implementation: str | None, config: CacheConfig) -> str:
  """The backend for a cache: the one asked for, or for None the best that is right on this device.

  Raises:
    NotImplementedError: The one asked for is wrong, or cannot serve the cache. The message has the
      table of `attention.verify`.
  """
  shape = dataclasses.replace(config, num_layers=1, num_pages=1, num_rows=1, max_length=1)
  there = jax.eval_shape(functools.partial(pages.init, shape))
  if implementation is None:
    wanted = attention.candidates(there, config.pages_per_row)
  else:
    wanted = [attention.choose(implementation, there, config.pages_per_row)]
  wrong = {}
  for name in wanted:
    if attention.platform(name) is not None and (table := _disproof(name, shape)):
      wrong[name] = table
      continue
    for other, table in wrong.items():
      _log.warning("attention %r is wrong on this device; %r is used:\n%s", other, name, table)
    return name
  raise NotImplementedError(
    "\n".join(f"implementation {name!r} is wrong on this device:\n{wrong[name]}" for name in wrong)
  )


@functools.cache
def _disproof(implementation: str, shape: CacheConfig) -> str | None:
  """The table of a proof that failed; None if the kernel is right, now or in an earlier process."""
  known = {**proof.where(), "attention": implementation, "pages": repr(shape)}
  file = _file(known)
  if file is not None and _read(file) == known:
    return None
  report = attention.verify(implementation, shape, memory_bytes=_MEMORY_BYTES)
  if not report.ok:
    return str(report)  # not kept: the next process tries again
  if file is not None:
    _write(file, {"proven": known, "table": str(report)})
  return None


def _file(known: dict[str, str]) -> Path | None:
  """Where a proof is kept: beside compiled programs, if these are kept in a local folder."""
  folder = _settings.jax_compilation_cache_dir
  if not folder or not _settings.jax_enable_compilation_cache or "://" in folder:
    return None
  name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
  return Path(folder) / f"paged_jax-attention-{name}.json"


def _read(file: Path) -> dict[str, str] | None:
  """What a file says is proven; None if there is none, or it is damaged."""
  try:
    return json.loads(file.read_text(encoding="utf-8"))["proven"]
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _write(file: Path, content: dict[str, Any]) -> None:
  """Writes a file in one piece, if it can."""
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    part.replace(file)
  except OSError as error:
    _log.warning("the proof of an attention kernel is not kept: %s", error)
