"""The ledger in NumPy: the same verbs as in `verbs` and `growing`, with the same bits, in place."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from paged_jax import arguments, groups
from paged_jax.config import CacheConfig
from paged_jax.ledger import log as log_lib
from paged_jax.ledger.book import Book, earlier, spread
from paged_jax.types import Info, Log

_NOTHING = np.zeros(0, np.int32)


class HostLedger:
  """All integers of a cache, on the host.

  Its verbs take the same requests as those of `paged_jax.ledger`, and decide the same. A verb
  changes the ledger and returns an `Info` of NumPy values. The public docstrings are in
  `paged_jax.cache`. The arrays are in `groups`, one `Book` for each cache.

  >>> import numpy as np, paged_jax
  >>> config = paged_jax.CacheConfig(num_rows=2, num_pages=4, page_size=8, max_length=16)
  >>> ledger = HostLedger(config)
  >>> info = ledger.extend(np.array([9, 0]))
  >>> info.ok.tolist(), info.num_free
  ([True, True], 2)
  >>> ledger.groups[0].block_tables.tolist()
  [[0, 1], [4, 4]]

  A program on the device changes the device's ledger, and its report comes later. Until then the
  host goes on from a mark, as if the program did nothing. After the report it starts from the mark
  again:

      # device  extend ─ program ─ free ─ extend
      # host    extend ─ mark ──── free ─ extend ─┐ the report is here
      #                  rewind ◄─────────────────┘
      #                  replay ── free ─ extend

  >>> ledger.mark()
  >>> info = ledger.free(np.array([True, False]))
  >>> ledger.rewind()
  >>> ledger.lengths.tolist()
  [9, 0]

  Args:
    config: Sizes of the cache, or of each cache of a tuple.

  Raises:
    ValueError: The caches of a tuple differ in `num_rows` or `copy_on_write`.
  """

  def __init__(self, config: CacheConfig | tuple[CacheConfig, ...]):
    groups.check_rows(groups.each(config))
    self.groups = tuple(map(Book, groups.each(config)))
    self._several = groups.several(config)
    self.copy_on_write = self.groups[0].copy_on_write

  @property
  def lengths(self) -> np.ndarray:
    """i32[S] tokens held by each row, the same in all groups."""
    return self.groups[0].lengths

  @property
  def num_rows(self) -> int:
    """Rows of the batch, S; also the id that means "no row"."""
    return self.groups[0].num_rows

  @functools.cached_property
  def capacity(self) -> int:
    """Tokens that one row can hold in every group."""
    return min(book.capacity for book in self.groups)

  @property
  def num_copies(self) -> int:
    """Pages that `extend` and `unshare` copied."""
    return sum(book.num_copies for book in self.groups)

  def snapshot(self) -> Any:
    """A copy in the form of the device's ledger, or of each of a tuple."""
    return self._like([book.snapshot() for book in self.groups])

  # Verbs that take pages

  def pages_needed(self, num_tokens: np.ndarray) -> Any:
    """Pages that `extend` would take for each row, i32[S], of each group."""
    num_tokens, asked = self._asked(num_tokens)
    passed = [self._passed(book, asked & (num_tokens > 0)) for book in self.groups]
    growths = self._growths(num_tokens, asked, passed)
    return self._like([growth.num_new + growth.copied for growth in growths])

  def pages_passed(self, num_tokens: np.ndarray) -> list[int]:
    """Pages of each group that `extend` frees before it takes any, since a window has passed them."""
    passed = [self._passed(book, num_tokens > 0) for book in self.groups]
    return [book.num_alone(each) if each.size else 0 for book, each in zip(self.groups, passed)]

  def pages_to_begin(self, held: int, num_tokens: int, group: int = 0) -> int:
    """Pages of a group that a row takes to hold `num_tokens`, if it starts on `held` tokens.

    The copy of a partly filled held page counts.
    """
    size = self.groups[group].page_size
    copied = num_tokens > held and held % size > 0
    return -(-num_tokens // size) - -(-held // size) + copied

  def shares_tail(self, num_tokens: np.ndarray) -> bool:
    """Whether growing by `num_tokens` i32[S] would write into a page with several holders."""
    return any(_shares_tail(book, num_tokens) for book in self.groups)

  def extend(self, num_tokens: np.ndarray) -> Info:
    """Makes room for `num_tokens` i32[S] more tokens in each row.

    # row before   [a     ][b  ]           others hold b too
    # row after    [a     ][c     ][d ]    the row takes c, a copy of b, and d, and gives up b
    """
    num_tokens, asked = self._asked(num_tokens)
    for book in self.groups:
      if book.window is not None:
        self._slide(book, asked & (num_tokens > 0), book.latest_start(book.lengths))
    growths = self._growths(num_tokens, asked, [_NOTHING] * len(self.groups))
    ok, lengths = growths[0].valid, growths[0].lengths
    need = [growth.num_new + growth.copied for growth in growths]
    if any(each.any() for each in need):
      fits = groups.all_of(
        each.cumsum(dtype=np.int64) <= book.num_free for each, book in zip(need, self.groups)
      )
      kept = [_grow(*each, fits) for each in zip(self.groups, growths, need)]
      ok = ok & (fits | groups.all_of(kept))
      lengths = np.where(ok, lengths, self.lengths)
    for book in self.groups:
      book.set(book.stale, (book.stale & (lengths > book.lengths)).nonzero()[0], False)
      book.set(book.lengths, ..., lengths)
    return self._info(ok)

  def unshare(self, starts: np.ndarray) -> Info:
    """Makes each row the only holder of its pages from the one of token `starts` i32[S] on.

    # row before   [a][b][c]      others hold a and b too; `starts` is on b
    # row after    [a][d][c]      the row takes d, a copy of b, and gives up b
    """
    starts = arguments.host_integers("starts", starts, (self.num_rows,))
    ok = (starts >= 0) & (starts <= self.lengths)
    asking = (ok & (starts < self.lengths)).nonzero()[0]
    short = False  # whether pages were missing for a row: no later row takes any
    for row in asking.tolist():
      shared = [_shared(book, row, int(starts[row])) for book in self.groups]
      if not any(each.size for each in shared):
        continue
      short |= any(each.size > book.num_free for each, book in zip(shared, self.groups))
      if short or not self.copy_on_write:
        ok[row] = False
        continue
      for book, columns in zip(self.groups, shared):
        _copy(book, row, columns)
    return self._info(ok)

  def take_held(self, count: Any, size: Any) -> tuple[Any, Info]:
    """Takes `count` i32[] free pages of each group, which the host then holds, all or none.

    Returns:
      The pages i32[size] (N past the last) of each group, and `Info` with ok bool[].
    """
    sizes = groups.values_for("size", size, self._form)
    counts = groups.values_for("count", count, self._form)
    counts = [int(arguments.host_integers("count", each, ())) for each in counts]
    ok = all(
      0 <= each <= min(limit, book.num_free)
      for each, limit, book in zip(counts, sizes, self.groups)
    )
    taken = []
    for book, each, limit in zip(self.groups, counts, sizes):
      pages = np.full(limit, book.num_pages, np.int32)
      if ok:
        pages[:each] = book.take(each, holds=1)
      taken.append(pages)
    return self._like(taken), self._info(np.bool_(ok))

  # Verbs that share pages, or give them up

  def fork(self, src: np.ndarray, dst: np.ndarray, num_tokens: np.ndarray | None = None) -> Info:
    """Makes rows `dst` i32[B] share the first `num_tokens` i32[B] tokens of rows `src` i32[B].

    # src          [a][b][c]     1 1 1 holders before, 2 2 1 after
    # dst after    [a][b]        b may be shared in part
    """
    src = arguments.host_integers("src", src, (None,))
    dst = arguments.host_integers("dst", dst, src.shape)
    known = (src >= 0) & (src < self.num_rows)
    source = np.where(known, src, 0)
    held = np.where(known, self.lengths[source], 0)
    tokens = held if num_tokens is None else num_tokens
    tokens = arguments.host_integers("num_tokens", tokens, src.shape)
    valid = known & (tokens <= held)
    for book in self.groups:
      valid &= np.where(tokens > 0, book.starts[source], 0) <= book.latest_start(tokens)
      if not self.copy_on_write:
        valid &= tokens % book.page_size == 0
    ok = self.groups[0].vacant(dst, valid)
    for book in self.groups:
      _fork(book, source[ok], dst[ok], tokens[ok])
    return self._info(ok | (dst == self.num_rows))

  def reorder(self, sources: np.ndarray) -> Info:
    """Makes row r a share of row `sources[r]`, all rows at once; S empties a row.

    # row 0    [a][b]   ──▶   [a][c]       sources 1, 1: row 0 becomes a holder of a and c,
    # row 1    [a][c]   ──▶   [a][c]       and gives up a and b
    """
    s = self.num_rows
    sources = arguments.host_integers("sources", sources, (s,))
    own = np.arange(s)
    ok = (sources >= 0) & (sources <= s)
    if not self.copy_on_write:
      for book in self.groups:  # no row has no partial page
        whole = np.append(self.lengths % book.page_size == 0, True)
        ok &= whole[np.where(ok, sources, s)] | (sources == own)
    changed = (ok & (sources != own)).nonzero()[0]
    for book in self.groups:
      _reorder(book, changed, sources[changed])
    return self._info(ok)

  def trim(self, lengths: np.ndarray) -> Info:
    """Cuts each row to its first `lengths` i32[S] tokens, and gives up whole pages after them."""
    lengths = arguments.host_integers("lengths", lengths, (self.num_rows,))
    ok = (lengths <= self.lengths) & (lengths >= 0)
    for book in self.groups:
      ok &= (book.starts <= book.latest_start(lengths)) | (lengths == 0)
    rows = (ok & (lengths < self.lengths)).nonzero()[0]
    lengths = lengths[rows]
    some = lengths > 0
    for book in self.groups:
      starts = book.starts[rows]
      first, count = book.span(starts, book.lengths[rows])
      keep = np.where(some, -(-lengths // book.page_size) - first, 0)
      book.unmap(rows, first + keep, count - keep)
      book.write(rows, np.where(some, starts, 0), lengths, some)
    return self._info(ok)

  def slide(self, starts: np.ndarray) -> Info:
    """Forgets each row's tokens before `starts` i32[S], and gives up whole pages of these."""
    starts = arguments.host_integers("starts", starts, (self.num_rows,))
    ok = starts >= 0
    for book in self.groups:
      ok &= starts <= book.latest_start(book.lengths)
    for book in self.groups:
      self._slide(book, ok, starts)
    return self._info(ok)

  def free(self, rows: np.ndarray) -> Info:
    """Empties the rows marked in `rows` bool[S]: they give up all their pages."""
    rows = arguments.host_booleans("rows", rows, (self.num_rows,))
    filled = rows & (self.lengths > 0)
    marked = filled.nonzero()[0]
    for book in self.groups:
      book.unmap(marked, *book.span(book.starts[marked], book.lengths[marked]))
      book.write(marked, 0, 0, False)
    return self._info(~rows | filled)

  def hold(self, pages: Any) -> Info:
    """Adds a hold of the host for each entry of `pages` i32[B], of each group."""
    return self._apart([_hold(*each) for each in self._with_pages(pages)])

  def drop(self, pages: Any) -> Info:
    """Removes a hold of the host for each entry of `pages` i32[B], of each group."""
    return self._apart([_drop(*each) for each in self._with_pages(pages)])

  def adopt(self, rows: np.ndarray, pages: Any, lengths: np.ndarray, starts: Any = None) -> Info:
    """Starts empty rows i32[B] on held `pages` i32[B,C], with `lengths` i32[B] tokens.

    # host         [a][b]     1 1 holders before
    # row after    [a][b]     2 2 holders: the host's holds remain
    """
    rows = arguments.host_integers("rows", rows, (None,))
    lengths = arguments.host_integers("lengths", lengths, rows.shape)
    if starts is None:
      starts = self._like([np.zeros_like(lengths)] * len(self.groups))
    adopted = [
      _Adopted.of(book, pages, lengths, starts)
      for book, pages, starts in zip(
        self.groups,
        groups.values_for("pages", pages, self._form),
        groups.values_for("starts", starts, self._form),
      )
    ]
    ok = self.groups[0].vacant(rows, groups.all_of(each.valid for each in adopted))
    for book, each in zip(self.groups, adopted):
      each.apply(book, rows, lengths, ok)
    return self._info(ok | (rows == self.num_rows))

  # Programs that report later

  def replay(self, log: Log) -> None:
    """Repeats all verbs in `log`, step by step.

    Raises:
      ValueError: The log names a verb that a ledger does not have, lacks operands, or has operands
        with different numbers of steps.
    """
    log_lib.check(log)
    operands = [tuple(_host(x) for x in arrays) for arrays in log.operands]
    flat = itertools.chain.from_iterable(groups.each(x) for arrays in operands for x in arrays)
    num_steps = set(map(len, flat))
    if len(num_steps) > 1:
      raise ValueError(f"log.operands must have one number of steps, got {sorted(num_steps)}")
    for step in range(max(num_steps, default=0)):
      # Most programs only extend, and copy pages in their first step if at all: then all other
      # steps are done at once.
      if step < 2 and log.verbs == ("extend",) and self._extend_all(operands[0][0][step:]):
        return
      for verb, arrays in zip(log.verbs, operands):
        getattr(self, verb)(*(groups.like(x, [y[step] for y in groups.each(x)]) for x in arrays))

  def _extend_all(self, num_tokens: np.ndarray) -> bool:
    """Extends by each of `num_tokens` i32[K,S] in turn, if it is simple.

    All must be granted, no page be copied, and no page be passed by a window.

    Returns:
      Whether it did; if not, nothing changed.
    """
    lengths = np.zeros((len(num_tokens) + 1, self.num_rows), np.int64)
    np.cumsum(num_tokens, axis=0, out=lengths[1:])
    grows = lengths[-1] > 0
    lengths += self.lengths
    if (lengths[-1] > self.capacity).any() or (num_tokens < 0).any() or self.shares_tail(grows):
      return False
    last = np.where(num_tokens > 0, lengths[:-1], 0).max(axis=0)  # before the last growth
    pages = [-(-lengths // book.page_size) for book in self.groups]  # at first, and after each step
    for book, each in zip(self.groups, pages):
      starts = (
        book.starts if book.window is None else np.maximum(book.starts, book.latest_start(last))
      )
      passes = (starts // book.page_size != book.starts // book.page_size).any()
      if passes or (each[-1] - each[0]).sum() > book.num_free:
        return False
    for book, each in zip(self.groups, pages):
      need = each[1:] - each[:-1]
      steps, rows = need.nonzero()
      rows, columns = spread(rows, each[steps, rows], need[steps, rows])
      book.map(rows, columns, book.take(columns.size))
      book.set(book.stale, (book.stale & grows).nonzero()[0], False)
      if book.window is not None:
        book.set(book.starts, ..., np.maximum(book.starts, book.latest_start(last)))
      book.set(book.lengths, ..., lengths[-1])
    return True

  def mark(self) -> None:
    """Makes the state now the one that `rewind` brings back."""
    for book in self.groups:
      book.mark()

  def rewind(self) -> None:
    """Brings back the state at the mark, which stays."""
    for book in self.groups:
      book.rewind()

  def unmark(self) -> None:
    """Forgets the mark."""
    for book in self.groups:
      book.unmark()

  # Parts of the verbs

  @property
  def _form(self) -> Any:
    """A value of the form that arguments of all groups have."""
    return self._like(self.groups)

  def _like(self, values: Sequence[Any]) -> Any:
    """Values of all groups: a tuple, or one if the ledger is of one cache."""
    return tuple(values) if self._several else values[0]

  def _info(self, ok) -> Info:
    """What a verb reports."""
    return Info._make((ok, self._like([book.num_free for book in self.groups])))

  def _apart(self, ok: list[np.ndarray]) -> Info:
    """What a verb reports that each group decides alone."""
    return self._info(self._like(ok))

  def _with_pages(self, pages: Any) -> list[tuple[Book, np.ndarray]]:
    """Each group, and its entries of `pages` i32[B]."""
    listed = groups.values_for("pages", pages, self._form)
    return [
      (book, arguments.host_integers("pages", each, (None,)))
      for book, each in zip(self.groups, listed)
    ]

  def _asked(self, num_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens i32[S] asked for, and the rows that can have so many: bool[S]."""
    num_tokens = arguments.host_integers("num_tokens", num_tokens, (self.num_rows,))
    return num_tokens, (num_tokens >= 0) & (num_tokens <= self.capacity - self.lengths)

  def _passed(self, book: Book, rows: np.ndarray) -> np.ndarray:
    """Entries of the tables that growth of `rows` bool[S] passes with a window."""
    if book.window is None:
      return _NOTHING
    asking = rows.nonzero()[0]
    first = book.starts[asking] // book.page_size
    passed = book.latest_start(book.lengths[asking]) // book.page_size
    return book.block_tables[spread(asking, first, np.maximum(passed - first, 0))]

  def _slide(self, book: Book, rows: np.ndarray, starts: np.ndarray) -> None:
    """Forgets the tokens before `starts` i32[S] of the marked rows bool[S]."""
    rows = (rows & (starts > book.starts)).nonzero()[0]
    first = book.starts[rows] // book.page_size
    book.unmap(rows, first, starts[rows] // book.page_size - first)
    book.set(book.starts, rows, starts[rows])

  def _growths(
    self, num_tokens: np.ndarray, asked: np.ndarray, passed: list[np.ndarray]
  ) -> list["_Growth"]:
    """What `extend` asks of each group, once the `passed` pages of each lost that many holders."""
    before, valid = self.lengths, asked
    grows = asked & (num_tokens > 0)
    tails = [_shared_tails(*each, grows) for each in zip(self.groups, passed)]
    if not self.copy_on_write:
      valid = valid.copy()
      for rows, _, _ in tails:
        valid[rows] = False
    lengths = before + num_tokens * valid
    return [_growth(*each, lengths, valid) for each in zip(self.groups, tails)]


class _Growth(NamedTuple):
  """What `extend` asks for each row of a group, whether or not enough pages are free."""

  valid: np.ndarray  # bool[S] the count is not negative and fits the row, in every group
  lengths: np.ndarray  # i32[S] tokens afterwards
  num_pages: np.ndarray  # i32[S] logical pages before
  num_new: np.ndarray  # i32[S] whole new pages
  rows: np.ndarray  # the rows that write into a partly filled page with other holders
  tails: np.ndarray  # that page of each of these rows
  copied: np.ndarray  # i32[S] 1 if that page must be copied first


class _Adopted(NamedTuple):
  """Rows that start on held pages of a group, if all groups allow it."""

  valid: np.ndarray  # bool[B]
  pages: np.ndarray  # i32[B,C]
  starts: np.ndarray  # i32[B]
  first: np.ndarray  # i32[B] first logical page
  num_pages: np.ndarray  # i32[B]

  @classmethod
  def of(cls, book: Book, pages: Any, lengths: np.ndarray, starts: Any) -> "_Adopted":
    """What a group says to a request to `adopt`."""
    pages = arguments.host_integers("pages", pages, (*lengths.shape, None))
    starts = arguments.host_integers("starts", starts, lengths.shape)
    valid = (starts >= 0) & (starts <= book.latest_start(lengths)) & (lengths <= book.capacity)
    if not book.copy_on_write:
      valid &= lengths % book.page_size == 0
    first, count = book.span(np.where(valid, starts, 0), np.where(valid, lengths, 0))
    listed = np.arange(pages.shape[1]) < count[:, None]
    known = (pages >= 0) & (pages < book.num_pages)
    held = known & (book.holds[np.where(known, pages, 0)] > 0)
    valid &= (count <= pages.shape[1]) & (held | ~listed).all(axis=1)
    return cls(valid, pages, starts, first, count)

  def apply(self, book: Book, rows: np.ndarray, lengths: np.ndarray, ok: np.ndarray) -> None:
    """The rows in `ok` bool[B] start."""
    listed = np.arange(self.pages.shape[1]) < self.num_pages[:, None]
    used = self.pages[listed & ok[:, None]]
    book.count(used, 1)
    book.map(*spread(rows[ok], self.first[ok], self.num_pages[ok]), used)
    book.write(rows[ok], self.starts[ok], lengths[ok], lengths[ok] > 0)


def _host(operand: Any) -> Any:
  """An operand of a log as arrays of NumPy."""
  return groups.like(operand, [np.asarray(x) for x in groups.each(operand)])


def _shares_tail(book: Book, num_tokens: np.ndarray) -> bool:
  """Whether growth by `num_tokens` i32[S] would write into a page with several holders."""
  rows = ((num_tokens > 0) & (book.lengths % book.page_size > 0)).nonzero()[0]
  tails = book.block_tables[rows, book.lengths[rows] // book.page_size]
  return bool((book.refcount[tails] > 1).any())


def _shared_tails(
  book: Book, passed: np.ndarray, grows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Rows in `grows` bool[S] whose partly filled page has other holders, the page, and how many."""
  rows = (grows & (book.lengths % book.page_size > 0)).nonzero()[0]
  tails = book.block_tables[rows, book.lengths[rows] // book.page_size]
  holders = book.refcount[tails]
  if passed.size:
    holders = holders - (passed[None, :] == tails[:, None]).sum(axis=1)
  shared = holders > 1
  return rows[shared], tails[shared], holders[shared]


def _growth(
  book: Book, shared: tuple[np.ndarray, ...], lengths: np.ndarray, valid: np.ndarray
) -> _Growth:
  """What a group must give so that its rows hold `lengths` i32[S] tokens."""
  size = book.page_size
  num_pages = (book.lengths + (size - 1)) // size
  copied = np.zeros(book.num_rows, np.int32)
  rows, tails, holders = (x[valid[shared[0]]] for x in shared)
  if rows.size:
    # Row by row: of n sharers the first n - 1 copy the page, and the last one keeps it.
    copied[rows] = holders - earlier(tails) > 1
  num_new = (lengths + (size - 1)) // size - num_pages
  return _Growth(valid, lengths, num_pages, num_new, rows, tails, copied)


def _grow(book: Book, growth: _Growth, need: np.ndarray, fits: np.ndarray) -> np.ndarray:
  """Gives the rows that fit bool[S] their pages; returns the others that need none: bool[S]."""
  rows = (fits & (need > 0)).nonzero()[0]
  first = growth.num_pages[rows] - growth.copied[rows]  # the tail, if it is copied
  rows, columns = spread(rows, first, need[rows])
  book.map(rows, columns, book.take(rows.size))
  copied = growth.tails[fits[growth.rows] & (growth.copied[growth.rows] > 0)]
  book.count(copied, -1)
  book.num_copies += copied.size
  # After a refused row, the last sharer of a tail page still has another holder on it.
  kept = need == 0
  kept[growth.rows] &= book.refcount[growth.tails] <= 1
  return kept


def _shared(book: Book, row: int, start: int) -> np.ndarray:
  """The logical pages of a row from token `start` on that have other holders."""
  first = max(start, int(book.starts[row])) // book.page_size
  columns = np.arange(first, -(-int(book.lengths[row]) // book.page_size))
  return columns[book.refcount[book.block_tables[row, columns]] > 1]


def _copy(book: Book, row: int, columns: np.ndarray) -> None:
  """The row gets its own copies of these logical pages."""
  if not columns.size:
    return
  pages = book.block_tables[row, columns]
  book.map(row, columns, book.take(pages.size))
  book.count(pages, -1)
  book.num_copies += pages.size
  if columns[-1] + 1 == -(-int(book.lengths[row]) // book.page_size):  # the tail's copy is clean
    book.set(book.stale, row, False)


def _fork(book: Book, source: np.ndarray, target: np.ndarray, tokens: np.ndarray) -> None:
  """Empty rows `target` share the first `tokens` of rows `source`."""
  starts = np.where(tokens > 0, book.starts[source], 0)
  stale = (tokens > 0) & (book.stale[source] | (tokens < book.lengths[source]))
  first, count = book.span(starts, tokens)
  rows, columns = spread(source, first, count)
  pages = book.block_tables[rows, columns]
  book.count(pages, 1)
  book.map(np.repeat(target, count), columns, pages)
  book.write(target, starts, tokens, stale)


def _reorder(book: Book, changed: np.ndarray, sources: np.ndarray) -> None:
  """Rows `changed` become shares of rows `sources`, all at once; S empties a row."""
  target, source = (x[sources < book.num_rows] for x in (changed, sources))
  starts, lengths, stale = book.starts[source], book.lengths[source], book.stale[source]
  first, count = book.span(starts, lengths)
  rows, columns = spread(source, first, count)
  pages = book.block_tables[rows, columns]
  # All rows become holders of their new pages before any row gives up its old ones.
  book.count(pages, 1)
  book.unmap(changed, *book.span(book.starts[changed], book.lengths[changed]))
  book.map(np.repeat(target, count), columns, pages)
  book.write(changed, 0, 0, False)
  book.write(target, starts, lengths, stale)


def _hold(book: Book, pages: np.ndarray) -> np.ndarray:
  ok = (pages >= 0) & (pages < book.num_pages)
  ok[ok] = book.refcount[pages[ok]] > 0
  book.count(pages[ok], 1, 1)
  return ok | (pages == book.num_pages)


def _drop(book: Book, pages: np.ndarray) -> np.ndarray:
  ok = (pages >= 0) & (pages < book.num_pages)
  ok[ok] = earlier(pages[ok]) < book.holds[pages[ok]]
  book.count(pages[ok], -1, -1)
  return ok | (pages == book.num_pages)
