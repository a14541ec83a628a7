"""Cuts a sequence of layers into loops, so that a program has each kind of layer once or twice.

# layers  W W W W W F  W W W W W F  W W       of a Gemma 3: five see a window, one sees all
# loops  [W W W W W F] twice       [W W]      a run of equal layers is a loop of its own
"""

import itertools
from collections.abc import Hashable, Sequence

import numpy as np


def loops(kinds: Sequence[Hashable]) -> list[list[np.ndarray]]:
  """The layers 0, 1, ... of these `kinds`, as loops over a repeating pattern.

  Returns:
    The loops in order. A loop is a list of runs; a run is i32[R,C]: of each of R repetitions of the
    pattern, C layers of one kind that follow each other.

  >>> from paged_jax.models import pattern
  >>> [[run.tolist() for run in loop] for loop in pattern.loops("WWFWWFW")]
  [[[[0, 1], [3, 4]], [[2], [5]]], [[[6]]]]
  """
  layers = range(len(kinds))
  runs = [tuple(each) for _, each in itertools.groupby(layers, key=lambda i: kinds[i])]
  shapes = [(kinds[run[0]], len(run)) for run in runs]
  found = []
  while runs:
    period, repeats = _repetition(shapes)
    taken, runs, shapes = (
      runs[: period * repeats],
      runs[period * repeats :],
      shapes[period * repeats :],
    )
    found.append([np.array(taken[place::period], np.int32) for place in range(period)])
  return found


def _repetition(items: Sequence[Hashable]) -> tuple[int, int]:
  """Length of the pattern that `items` begin with, and how often it comes: most of them together."""
  best, covered = (1, 1), 1
  for period in range(1, len(items) // 2 + 1):
    same = (one == other for one, other in zip(items, items[period:]))
    repeats = 1 + sum(1 for _ in itertools.takewhile(bool, same)) // period
    if repeats > 1 and period * repeats > covered:
      best, covered = (period, repeats), period * repeats
    if covered > len(items) - best[0]:  # no other pattern can cover more periods
      break
  return best
