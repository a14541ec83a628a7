"""The cache on the device, or one per group of layers, and its ledger on the host, which follows it.

Both ledgers run the same verbs and get the same page ids, so the host knows every page without
asking the device. A user's program that runs on the cache reports its ledger verbs in a `Log`.
Until the report is here, the host's ledger is behind. A verb after such a program goes to the
device once. The host's ledger does it twice: at once, as if the program did nothing, and again
after the report, which decides which pages the verb takes.

    # device   extend ─ program ─ free ─ extend ─ program ─
    # host     extend ─ . . . . . free ─ extend ─ . . . . . report: rewind ─ replay ─ free ─ extend
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from paged_jax import groups, jitted
from paged_jax.config import CacheConfig
from paged_jax.ledger.on_host import HostLedger
from paged_jax.types import Cache, Log, Pages

Configs = CacheConfig | tuple[CacheConfig, ...]
Verb = tuple[str, tuple[Any, ...]]  # its name and operands

ID_SIZES = (16, 512)  # batches of ids that are compiled
BYTE_SIZES = (1, 2, 4, 8, 16)  # compiled batches of pages whose bytes move; each is its own array


@dataclasses.dataclass(eq=False)
class Ticket:
  """A program that `Manager.run` started; `Manager.settle` takes over its report.

  >>> from paged_jax import CacheConfig, Log, host
  >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
  >>> ticket = manager.run(lambda cache: (cache, Log((), ()), "done"))
  >>> ticket.result, manager.settle(ticket)
  ('done', 8)
  """

  result: Any  # the third value that the program returned
  number: int = dataclasses.field(repr=False)
  owner: object = dataclasses.field(repr=False)  # the manager's
  recorded: bool = dataclasses.field(default=False, repr=False)  # its tokens are known


@dataclasses.dataclass
class _Program:
  """A program whose report is not taken over yet, and the verbs that followed it."""

  number: int
  log: Log
  verbs: list[Verb] = dataclasses.field(default_factory=list)


class State:
  """The caches of all groups, and their ledger on the host. Not thread-safe.

  Args:
    config: Sizes and dtypes of the stored cache, or of each of a tuple.
    verbs: The compiled verbs.
    shardings: Where each leaf of the cache lives; None = the default device.
  """

  def __init__(self, config: Configs, verbs=jitted, shardings=None):
    self.config = config
    self.configs: tuple[CacheConfig, ...] = groups.each(config)
    self.num_rows = self.configs[0].num_rows
    self.copy_on_write = self.configs[0].copy_on_write
    self.page_size = math.lcm(*(x.page_size for x in self.configs))  # whole pages in every group
    self._no_pages = [np.array([x.num_pages], np.int32) for x in self.configs]
    self.verbs = verbs
    cache = verbs.init(config)
    # The cache is placed now: one that is placed later makes every verb compile again.
    where = jax.tree.map(lambda leaf: leaf.sharding, cache) if shardings is None else shardings
    self.cache: Any = jax.device_put(cache, where)
    self.ledger = HostLedger(config)
    # Unreported programs, oldest first. The ledger's mark is at the first one.
    self._programs: list[_Program] = []
    self._numbers = itertools.count(1)
    self.num_reports = 0  # how often reports of programs were taken over
    self._owner = object()  # what its tickets have in common

  @property
  def waits(self) -> bool:
    """Whether the report of a program is not taken over yet."""
    return bool(self._programs)

  @property
  def num_free(self) -> list[int]:
    """Free pages of each group."""
    return [book.num_free for book in self.ledger.groups]

  def like(self, values: Sequence[Any]) -> Any:
    """Values of all groups as users get and give them: a tuple, or one of a single cache."""
    return groups.like(self.config, values)

  def cache_of(self, group: int) -> Cache:
    """The cache of a group."""
    return groups.each(self.cache)[group]

  def replace(self, group: int, cache: Cache) -> None:
    """Puts the next cache of a group in its place."""
    caches = list(groups.each(self.cache))
    caches[group] = cache
    self.cache = self.like(caches)

  def apply(self, verb: str, *operands: Any) -> None:
    """Applies one verb to the cache and to the host's ledger, which must grant it."""
    self.cache = getattr(self.verbs, verb)(self.cache, *operands)[0]
    self._note(verb, operands)

  def _note(self, verb: str, operands: tuple[Any, ...]) -> None:
    """Applies one verb to the host's ledger, and again after the report of an unreported program."""
    if self._programs:
      self._programs[-1].verbs.append((verb, operands))
    self._follow(verb, operands)

  def _follow(self, verb: str, operands: tuple[Any, ...]) -> None:
    """Applies one verb to the host's ledger."""
    info = getattr(self.ledger, verb)(*operands)
    # A row that a program empties, or fills, may be freed before its report is here.
    granted = all(each.all() for each in groups.each(info.ok))
    if not (granted or verb == "free"):
      raise AssertionError(f"the ledger refused {verb} of {operands}: {info.ok}")

  def apply_ids(self, verb: str, group: int, pages: list[int]) -> None:
    """Applies `hold` or `drop` to a list of pages of one group, of any length."""
    for _, ids in batches(pages, self.configs[group].num_pages, ID_SIZES):
      self.replace(group, getattr(self.verbs, verb)(self.cache_of(group), ids)[0])
      named = list(self._no_pages)
      named[group] = ids
      self._note(verb, (self.like(named),))

  def offload(self, group: int, pages: list[int]) -> list[Pages]:
    """Images of device pages, in host memory. The copies go on in the background."""
    images: list[Pages] = []
    for count, ids in batches(pages, self.configs[group].num_pages, BYTE_SIZES):
      images += self.verbs.offload(self.cache_of(group), ids)[:count]
    return images

  def restore(self, group: int, images: list[Pages]) -> list[int]:
    """Copies images into new pages that the host holds; returns the pages.

    Takes over all reports first.
    """
    self.settle()
    taken: list[int] = []
    for count, numbers in batches(list(range(len(images))), -1, BYTE_SIZES):
      taken += self._put(group, [images[i] for i in numbers], count)
    return taken

  def _put(self, group: int, images: list[Pages], count: int) -> list[int]:
    """Copies the first `count` of a batch of images into new pages that the host holds."""
    cache, *_ = self.verbs.restore(self.cache_of(group), tuple(images), np.int32(count))
    self.replace(group, cache)
    every = range(len(self.configs))
    counts = self.like([np.array(count if n == group else 0) for n in every])
    sizes = self.like([len(images) if n == group else 1 for n in every])
    pages, info = self.ledger.take_held(counts, sizes)
    if not info.ok:
      raise AssertionError(f"the ledger refused {count} pages, {self.num_free} are free")
    return groups.each(pages)[group][:count].tolist()

  def warm_up(self, *, holding: bool, swapping: Sequence[bool], scrubbing: bool) -> None:
    """Compiles verbs for each size of a batch: applies each to padding only.

    Args:
      holding: Whether the host holds pages: `hold`, `drop` and `adopt`.
      swapping: Whether bytes of each group move: `offload` and `restore`.
      scrubbing: Whether pages are cleared: `scrub`.
    """
    s = self.num_rows
    nobody = np.full(2, s, np.int32)
    self.apply("extend", np.zeros(s, np.int32))
    self.apply("trim", self.ledger.lengths.copy())
    self.apply("free", np.zeros(s, bool))
    self.apply("fork", nobody, nobody, np.zeros(2, np.int32))
    for size in row_sizes(s) if holding else ():
      rows, lengths = np.full(size, s, np.int32), np.zeros(size, np.int32)
      pages = [np.full((size, x.pages_per_row), x.num_pages, np.int32) for x in self.configs]
      begins = [lengths for _ in self.configs]
      self.apply("adopt", rows, self.like(pages), lengths, self.like(begins))
    for group, config in enumerate(self.configs):
      for size in ID_SIZES:
        none = [config.num_pages] * size
        if holding:
          self.apply_ids("hold", group, none)
          self.apply_ids("drop", group, none)
        if scrubbing:
          self.scrub(group, none)
      for size in BYTE_SIZES if swapping[group] else ():
        self._put(group, self.offload(group, [config.num_pages] * size), 0)

  def scrub(self, group: int, pages: list[int]) -> None:
    """Clears those of these pages that are free."""
    for _, ids in batches(pages, self.configs[group].num_pages, ID_SIZES):
      self.replace(group, self.verbs.scrub(self.cache_of(group), ids))

  def run(self, program: Callable, *args, **kwargs) -> Ticket:
    """Runs `program(cache, *args, **kwargs)`, which returns (cache, log, result)."""
    self.cache, log, result = program(self.cache, *args, **kwargs)
    if not self._programs:
      self.ledger.mark()
    ticket = Ticket(result, next(self._numbers), self._owner)
    self._programs.append(_Program(ticket.number, log))
    return ticket

  def settle(self, last: Ticket | None = None) -> bool:
    """Takes over the reports up to that of `last`; None = all. Returns whether there were any."""
    if last is not None and not (isinstance(last, Ticket) and last.owner is self._owner):
      raise ValueError(f"ticket must be of this manager's `run`, got {last!r}")
    settled = [each for each in self._programs if last is None or each.number <= last.number]
    if not settled:
      return False
    logs = [jax.tree.map(np.asarray, program.log) for program in settled]  # waits for the programs
    self.ledger.rewind()
    try:
      for program, log in zip(settled, logs):
        self.ledger.replay(log)
        self._repeat(program)
    except BaseException:  # a wrong log, say: nothing is taken over
      self.ledger.rewind()
      for program in self._programs:
        self._repeat(program)
      raise
    self.num_reports += 1
    self.ledger.unmark()
    del self._programs[: len(settled)]
    if self._programs:
      self.ledger.mark()
    for program in self._programs:
      self._repeat(program)
    return True

  def _repeat(self, program: _Program) -> None:
    """Applies the verbs that followed a program to the host's ledger again."""
    for verb, operands in program.verbs:
      self._follow(verb, operands)


def row_sizes(num_rows: int) -> tuple[int, ...]:
  """The compiled sizes of a batch of rows."""
  return tuple(sorted({min(size, max(num_rows, ID_SIZES[0])) for size in ID_SIZES}))


def bucket(size: int, sizes: tuple[int, ...]) -> int:
  """The smallest of `sizes` that is at least `size`, or the largest one."""
  return next((each for each in sizes if each >= size), sizes[-1])


def batches(
  ids: list[int], padding: int, sizes: tuple[int, ...]
) -> Iterator[tuple[int, np.ndarray]]:
  """Pairs of (number of ids, padded i32 array): `ids` in batches of the compiled `sizes`."""
  for i in range(0, len(ids), sizes[-1]):
    part = ids[i : i + sizes[-1]]
    array = np.full(bucket(len(part), sizes), padding, np.int32)
    array[: len(part)] = part
    yield len(part), array
