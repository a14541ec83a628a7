"""Who waits, and why, and who runs.

Samples that begin alike wait in one line: while one of them computes what the others could share, the
whole line is closed. So a round costs the same however many wait.

    # lines   page "a b c d"    3 7 9 ...    closed: sample 2, on a row, is computing that page
    #         page "e f g h"    4
    #         others            5 6 8 ...    short prompts, samples in host memory
    # heads   4 5                            the first of each open line, in a heap
    # aside   10 11                          under their origin, whose prompt is being computed
    #         1                              resting: it waits for a command
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Set

from paged_jax.engine.requests import Sample

Order = tuple[int, int]
Beginning = tuple[int, ...]


class Waiting:
  """Samples that wait for a row, in order; a beam search as one, by the first of its beams.

  `add`, `remove` and `first` take O(log n), on average. Entries of samples that were removed stay in the
  heaps until they come first, or are more than the others.

  Args:
    shares: Whether samples could start on each other's pages.
  """

  def __init__(self, *, shares: bool):
    self._shares = shares
    self._stamps = itertools.count()
    self._members: dict[Sample, int] = {}  # each with the stamp of its entry
    self._resting: set[Sample] = set()
    self._beginnings: Counter[Beginning | None] = Counter()
    self._lines: dict[Beginning | None, list[tuple[Order, int, Sample]]] = {}  # heaps
    self._heads: list[tuple[Order, int, Beginning | None]] = []  # a heap
    self._announced: dict[Beginning | None, Order] = {}  # each line's valid entry in `_heads`
    self._closed: Set[Beginning] = frozenset()
    self._followers: dict[Sample, list[tuple[int, Sample]]] = {}  # by origin
    self._num_removed = 0  # since the heaps were built

  def __len__(self) -> int:
    return len(self._members)

  def __iter__(self) -> Iterator[Sample]:
    """In no order."""
    return iter(self._members)

  @property
  def num_ready(self) -> int:
    """Those that do not rest."""
    return len(self._members) - len(self._resting)

  def begin_with(self, beginning: Beginning | None) -> bool:
    """Whether any of them begins with this page."""
    return beginning is not None and self._beginnings[beginning] > 0

  def add(self, sample: Sample) -> None:
    """A sample waits, at its place."""
    self._rebuild()
    self._members[sample] = stamp = next(self._stamps)
    self._beginnings[sample.request.beginning] += 1
    if sample.resting:
      self._resting.add(sample)
    else:
      self._line_up(sample, stamp)

  def remove(self, sample: Sample) -> None:
    """A sample waits no more, if it did."""
    if self._members.pop(sample, None) is None:
      return
    beginning = sample.request.beginning
    self._beginnings[beginning] -= 1
    if not self._beginnings[beginning]:
      del self._beginnings[beginning]
    self._resting.discard(sample)
    self._num_removed += 1

  def close(self, beginnings: Set[Beginning]) -> None:
    """Samples that begin with one of these pages, and have none, cannot start for now; all others can,
    except those whose origin is computing its prompt."""
    self._rebuild()
    opened, self._closed = self._closed - beginnings, beginnings
    for beginning in opened:
      self._announce(beginning)
    for origin in [each for each, (follower, *_) in self._followers.items()
                   if not follower[1].follows]:  # fmt: skip
      for stamp, sample in self._followers.pop(origin):
        if self._members.get(sample) == stamp:
          self._line_up(sample, stamp)

  def first(self) -> Sample | None:
    """The first one that can start."""
    while self._heads:
      order, _, beginning = self._heads[0]
      if self._announced.get(beginning) == order:
        if beginning not in self._closed:
          sample = self._head(beginning)
          if sample is not None and sample.order == order:
            return sample
        del self._announced[beginning]
      heapq.heappop(self._heads)
      if beginning not in self._closed:
        self._announce(beginning)
    return None

  def _head(self, beginning: Beginning | None) -> Sample | None:
    """The first of a line; those before it that are gone, or follow others, leave the line."""
    line = self._lines[beginning]
    while line:
      _, stamp, sample = line[0]
      if self._members.get(sample) == stamp:
        if not sample.follows:
          return sample
        assert sample.origin is not None
        self._followers.setdefault(sample.origin, []).append((stamp, sample))
      heapq.heappop(line)
    del self._lines[beginning]
    return None

  def _line_up(self, sample: Sample, stamp: int) -> None:
    alike = self._shares and not sample.swapped
    beginning = sample.request.beginning if alike else None
    heapq.heappush(self._lines.setdefault(beginning, []), (sample.order, stamp, sample))
    self._announce(beginning)

  def _announce(self, beginning: Beginning | None) -> None:
    """The first entry of a line, if there is one, is among the heads."""
    line = self._lines.get(beginning)
    if line and self._announced.get(beginning) != line[0][0]:
      self._announced[beginning] = line[0][0]
      heapq.heappush(self._heads, (line[0][0], next(self._stamps), beginning))

  def _rebuild(self) -> None:
    """If most entries are of samples that were removed, the heaps keep those of members only."""
    if self._num_removed <= len(self._members) + 64:
      return
    self._lines, self._heads, self._announced, self._followers = {}, [], {}, {}
    self._num_removed = 0
    for sample, stamp in self._members.items():
      if sample not in self._resting:
        self._line_up(sample, stamp)


class Queue:
  """Samples that wait, and those on rows: first come, first served within a priority."""

  def __init__(self, *, shares: bool):
    self.waiting = Waiting(shares=shares)
    self.running: dict[int, Sample] = {}  # by row

  def last(self) -> Sample:
    """Which running sample must give way first: one that rests, then the one that came last."""
    return max(self.running.values(), key=lambda sample: (sample.resting, sample.order))
