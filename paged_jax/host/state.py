"""The cache on the device, and its ledger's twin on the host's CPU, which move together.

The twin runs the same ledger functions and gets the same page ids (law 8), so that the host knows
every page without asking the device. A program that the user runs on the cache reports what it
did to the ledger in a `Log`; until then the twin is behind. Verbs that follow such a program are
said to the device at once, and to the twin twice: at once, as if the program did nothing, and again
after its report, since only then the pages that they take are known.

    # device  extend ─ program ─ free ─ extend ─ program ─
    # twin    extend ─ . . . . . free ─ extend ─ . . . . . report: replay ─ free ─ extend
"""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from paged_jax import jitted
from paged_jax.config import CacheConfig
from paged_jax.types import Cache, Ledger, Log, Pages

ID_SIZES = (16, 512)  # batches of ids that are compiled
BYTE_SIZES = (1, 2, 4, 8, 16)  # batches of pages whose bytes move: each page is an array of its own


@dataclasses.dataclass
class _Program:
  """A program whose report is not taken over, and the verbs that followed it."""

  before: Ledger | Future[Ledger]
  log: Log
  verbs: list[tuple[str, tuple[np.ndarray, ...]]] = dataclasses.field(default_factory=list)
  after: Future[Ledger] | None = None  # once another program follows

  def replay(self) -> Ledger:
    """The ledger after the program and these verbs."""
    ledger = self.before.result() if isinstance(self.before, Future) else self.before
    ledger = jitted.ledger.replay(ledger, jax.tree.map(np.asarray, self.log))
    return _applied(ledger, self.verbs)


class State:
  """One cache and its twin."""

  def __init__(self, config: CacheConfig, verbs=jitted, shardings=None):
    self.config = config
    self.verbs = verbs
    cache = verbs.init(config)
    # Placed for good from the start: a cache that is placed later compiles everything again.
    where = jax.tree.map(lambda leaf: leaf.sharding, cache) if shardings is None else shardings
    self.cache: Cache = jax.device_put(cache, where)
    self._cpu = jax.local_devices(backend="cpu")[0]
    self.ledger = jax.device_put(jitted.ledger.init(config), self._cpu)
    self._programs: list[_Program] = []  # not settled yet, oldest first
    # The twin has a thread, since one's own would wait for programs that run on the CPU, too.
    self._thread = ThreadPoolExecutor(1, thread_name_prefix="twin")
    self._read()

  def _read(self) -> None:
    """The twin's integers, as NumPy arrays."""
    pool, tables = self.ledger.pool, self.ledger.tables
    self.num_free = int(pool.num_free)
    self.refcount, self.holds = np.asarray(pool.refcount), np.asarray(pool.holds)
    self.block_tables = np.asarray(tables.block_tables)
    self.starts, self.lengths = np.asarray(tables.starts), np.asarray(tables.lengths)

  def apply(self, verb: str, *operands: np.ndarray) -> None:
    """One verb on both. It must be granted: the manager asks only for what fits."""
    ledger = self._thread.submit(_applied, self.ledger, [(verb, operands)]).result()
    self.cache = getattr(self.verbs, verb)(self.cache, *operands)[0]
    if self._programs:
      self._programs[-1].verbs.append((verb, operands))
    self.ledger = ledger
    self._read()

  def apply_ids(self, verb: str, pages: list[int]) -> None:
    """A verb on a list of pages, however long."""
    for _, ids in batches(pages, self.config.num_pages, ID_SIZES):
      self.apply(verb, ids)

  def offload(self, pages: list[int]) -> list[Pages]:
    """The bytes of device pages as images in host memory; the copies go on in the background."""
    images: list[Pages] = []
    for count, ids in batches(pages, self.config.num_pages, BYTE_SIZES):
      images += self.verbs.offload(self.cache, ids)[:count]
    return images

  def restore(self, images: list[Pages]) -> list[int]:
    """Images in host memory into fresh pages that the host holds; which, only reports can tell."""
    self.settle()
    taken: list[int] = []
    for count, numbers in batches(list(range(len(images))), -1, BYTE_SIZES):
      taken += self._put([images[i] for i in numbers], count)
    return taken

  def _put(self, images: list[Pages], count: int) -> list[int]:
    """The first `count` of a batch of images into fresh pages."""
    most = BYTE_SIZES[-1]  # one program for batches of all sizes
    ledger, pages, info = jitted.ledger.take_held(self.ledger, np.int32(count), size=most)
    if not bool(info.ok):
      raise AssertionError(f"the ledger refused {count} pages, {self.num_free} are free")
    self.cache, *_ = self.verbs.restore(self.cache, tuple(images), np.int32(count))
    self.ledger = ledger
    self._read()
    return np.asarray(pages)[:count].tolist()

  def warm_up(self, *, holding: bool, swapping: bool, scrubbing: bool) -> None:
    """Compiles each verb for each size of a batch, by asking it for nothing.

    Args:
      holding: Those with which the host keeps pages, and rows start on such pages.
      swapping: Those that move bytes.
      scrubbing: The one that clears them.
    """
    s, n, p = self.config.num_rows, self.config.num_pages, self.config.pages_per_row
    nobody = np.full(2, s, np.int32)
    self.apply("extend", np.zeros(s, np.int32))
    self.apply("trim", self.lengths.copy())
    self.apply("free", np.zeros(s, bool))
    self.apply("fork", nobody, nobody, np.zeros(2, np.int32))
    for size in row_sizes(s) if holding else ():
      begins, lengths = np.zeros((2, size), np.int32)
      rows, pages = np.full(size, s, np.int32), np.full((size, p), n, np.int32)
      self.apply("adopt", rows, pages, lengths, begins)
    for size in ID_SIZES:
      none = np.full(size, n, np.int32)
      if holding:
        self.apply("hold", none)
        self.apply("drop", none)
      if scrubbing:
        self.cache = self.verbs.scrub(self.cache, none)
    for size in BYTE_SIZES if swapping else ():
      self._put(self.offload([n] * size), 0)

  def run(self, program: Callable, *args, **kwargs):
    """`program(cache, *args, **kwargs)` returns (cache, log, anything); returns the last."""
    self.cache, log, out = program(self.cache, *args, **kwargs)
    before: Ledger | Future[Ledger] = self.ledger
    if self._programs:
      last = self._programs[-1]
      before = last.after = self._thread.submit(last.replay)
    self._programs.append(_Program(before, log))
    return out

  def settle(self, but: int = 0) -> bool:
    """Takes over all reports but those of the newest `but` programs; whether there were any."""
    settled = self._programs[: max(0, len(self._programs) - but)]
    if not settled:
      return False
    del self._programs[: len(settled)]
    after = settled[-1].after or self._thread.submit(settled[-1].replay)
    since = [each for program in self._programs for each in program.verbs]
    if since:  # a wait for the thread takes longer than its work; so one for both
      after = self._thread.submit(lambda before=after: _applied(before.result(), since))
    self.ledger = after.result()
    self._read()
    return True


def _applied(ledger: Ledger, verbs: list[tuple[str, tuple[np.ndarray, ...]]]) -> Ledger:
  """The ledger after these verbs, all granted."""
  for verb, operands in verbs:
    ledger, info, *_ = getattr(jitted.ledger, verb)(ledger, *operands)
    if not np.asarray(info.ok).all():
      raise AssertionError(f"the ledger refused {verb} of {operands}: {np.asarray(info.ok)}")
  return ledger


def row_sizes(num_rows: int) -> tuple[int, ...]:
  """Batches of rows that are compiled."""
  return tuple(sorted({min(size, max(num_rows, ID_SIZES[0])) for size in ID_SIZES}))


def bucket(size: int, sizes: tuple[int, ...]) -> int:
  """The compiled size for a batch of `size`, or the largest one."""
  return next((each for each in sizes if each >= size), sizes[-1])


def batches(
  ids: list[int], padding: int, sizes: tuple[int, ...]
) -> Iterator[tuple[int, np.ndarray]]:
  """`ids` in padded i32 arrays of few sizes, each with how many of its ids are real."""
  for i in range(0, len(ids), sizes[-1]):
    part = ids[i : i + sizes[-1]]
    array = np.full(bucket(len(part), sizes), padding, np.int32)
    array[: len(part)] = part
    yield len(part), array
