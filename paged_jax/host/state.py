"""The cache on the device, and its ledger's twin on the host's CPU, which move together.

The twin computes what the ledger functions do, in NumPy where `paged_jax.ledger.on_host` can and compiled
otherwise, and gets the same page ids (law 8), so that the host knows every page without asking the
device. A program that the user runs on the cache reports what it
did to the ledger in a `Log`; until then the twin is behind. Verbs that follow such a program are
said to the device at once, and to the twin twice: at once, as if the program did nothing, and again
after its report, since only then the pages that they take are known.

    # device  extend ─ program ─ free ─ extend ─ program ─
    # twin    extend ─ . . . . . free ─ extend ─ . . . . . report: replay ─ free ─ extend
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from paged_jax import jitted
from paged_jax.config import CacheConfig
from paged_jax.ledger import on_host as twin
from paged_jax.types import Cache, Log, Pages

Verb = tuple[str, tuple[np.ndarray, ...]]  # its name and operands

ID_SIZES = (16, 512)  # batches of ids that are compiled
BYTE_SIZES = (1, 2, 4, 8, 16)  # batches of pages whose bytes move: each page is an array of its own


@dataclasses.dataclass(frozen=True, eq=False)
class Ticket:
  """A program that was run: `result` is the third thing it returned, at once; `Manager.settle`
  takes over what it did to the ledger."""

  result: Any
  number: int = dataclasses.field(repr=False)
  state: "State" = dataclasses.field(repr=False)


@dataclasses.dataclass
class _Program:
  """A program whose report is not taken over, and the verbs that followed it."""

  number: int
  log: Log
  verbs: list[Verb] = dataclasses.field(default_factory=list)


class State:
  """One cache and its twin."""

  def __init__(self, config: CacheConfig, verbs=jitted, shardings=None):
    self.config = config
    self.verbs = verbs
    cache = verbs.init(config)
    # Placed for good from the start: a cache that is placed later compiles everything again.
    where = jax.tree.map(lambda leaf: leaf.sharding, cache) if shardings is None else shardings
    self.cache: Cache = jax.device_put(cache, where)
    self.ledger: twin.Ledger = _on_host(jitted.ledger.init(config))
    self._reported = self.ledger  # what the oldest of these programs began with
    self._programs: list[_Program] = []  # not settled yet, oldest first
    self._numbers = itertools.count(1)
    self._thread: ThreadPoolExecutor | None = None  # from when it is first needed

  @property
  def num_free(self) -> int:
    """Free pages."""
    return int(self.ledger.pool.num_free)

  @property
  def refcount(self) -> np.ndarray:
    """i32[N] holders of each page."""
    return self.ledger.pool.refcount

  @property
  def holds(self) -> np.ndarray:
    """i32[N] those of them that are the host's."""
    return self.ledger.pool.holds

  @property
  def block_tables(self) -> np.ndarray:
    """i32[S,P] page of each logical page of each row, N where there is none."""
    return self.ledger.tables.block_tables

  @property
  def starts(self) -> np.ndarray:
    """i32[S] first live token of each row."""
    return self.ledger.tables.starts

  @property
  def lengths(self) -> np.ndarray:
    """i32[S] tokens held by each row."""
    return self.ledger.tables.lengths

  def apply(self, verb: str, *operands: np.ndarray) -> None:
    """One verb on both. It must be granted: the manager asks only for what fits."""
    ledger = self._applied(self.ledger, [(verb, operands)])
    self.cache = getattr(self.verbs, verb)(self.cache, *operands)[0]
    if self._programs:
      self._programs[-1].verbs.append((verb, operands))
    self.ledger = ledger

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
    ledger, pages, info = self._compiled("take_held", self.ledger, np.int32(count), size=most)
    if not info.ok:
      raise AssertionError(f"the ledger refused {count} pages, {self.num_free} are free")
    self.cache, *_ = self.verbs.restore(self.cache, tuple(images), np.int32(count))
    self.ledger = ledger
    return pages[:count].tolist()

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

  def close(self) -> None:
    """Ends the twin's thread, until it is needed again."""
    thread, self._thread = self._thread, None
    if thread is not None:
      thread.shutdown()

  def run(self, program: Callable, *args, **kwargs) -> Ticket:
    """`program(cache, *args, **kwargs)` returns (cache, log, result)."""
    self.cache, log, result = program(self.cache, *args, **kwargs)
    if not self._programs:
      self._reported = self.ledger
    ticket = Ticket(result, next(self._numbers), self)
    self._programs.append(_Program(ticket.number, log))
    return ticket

  def settle(self, last: Ticket | None = None) -> bool:
    """Takes over the reports up to that of `last`, by default all; whether there were any."""
    if last is not None and last.state is not self:
      raise ValueError(f"ticket must be of this manager's `run`, got {last}")
    settled = [each for each in self._programs if last is None or each.number <= last.number]
    if not settled:
      return False
    ledger = self._reported
    for program in settled:
      ledger = self._applied(self._replayed(ledger, program.log), program.verbs)
    self._reported = ledger
    del self._programs[: len(settled)]
    for program in self._programs:
      ledger = self._applied(ledger, program.verbs)
    self.ledger = ledger
    return True

  # The twin alone

  def _applied(self, ledger: twin.Ledger, verbs: list[Verb]) -> twin.Ledger:
    """The ledger after these verbs, all granted."""
    for verb, operands in verbs:
      after = twin.apply(ledger, verb, operands)
      if after is None:
        after, info, *_ = self._compiled(verb, ledger, *operands)
        if not info.ok.all():
          raise AssertionError(f"the ledger refused {verb} of {operands}: {info.ok}")
      ledger = after
    return ledger

  def _replayed(self, ledger: twin.Ledger, log: Log) -> twin.Ledger:
    """The ledger after the program that this is the log of."""
    after = twin.replay(ledger, log)
    return self._compiled("replay", ledger, _on_host(log)) if after is None else after

  def _compiled(self, verb: str, ledger: twin.Ledger, *operands, **statics):
    """What a compiled verb returns, in NumPy."""

    def run():
      placed = jax.device_put(ledger, jax.local_devices(backend="cpu")[0])
      return _on_host(getattr(jitted.ledger, verb)(placed, *operands, **statics))

    if self._thread is None:  # one's own thread would wait for programs that run on the CPU, too
      self._thread = ThreadPoolExecutor(1, thread_name_prefix="twin")
    return self._thread.submit(run).result()


def _on_host(tree):
  """Arrays as NumPy's; waits for them."""
  return jax.tree.map(np.asarray, tree)


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
