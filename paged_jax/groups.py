"""One cache, or a tuple of caches: one per group of layers, with the same rows.

A group is the layers whose pages have one shape and one lifetime. Its cache has a pool and tables
of its own, and a verb that takes several caches grants a row in all of them or in none:

    # layers   w w w w w f  w w w w w f        w: a window of tokens, f: all tokens
    # caches   (cache of all w, cache of all f)
"""

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def several(value: Any) -> bool:
  """Whether this is a tuple of the values of groups, and not one value (or a record of fields)."""
  return type(value) is tuple


def each(value: Any) -> tuple[Any, ...]:
  """The values of all groups: those of a tuple, or one value."""
  return value if several(value) else (value,)


def like(whole: Any, values: Sequence[Any]) -> Any:
  """`values` of all groups in the form of `whole`: a tuple, or one value."""
  return tuple(values) if several(whole) else values[0]


def values_for(name: str, value: Any, whole: Any) -> tuple[Any, ...]:
  """An argument with one value for each group of `whole`.

  Raises:
    ValueError: It has another form than `whole`; the message names it.
  """
  if several(whole) == several(value) and len(each(value)) == len(each(whole)):
    return each(value)
  wanted = f"a tuple of {len(whole)}" if several(whole) else "no tuple"
  got = f"a tuple of {len(value)}" if several(value) else type(value).__name__
  raise ValueError(f"{name} must be {wanted}, as the cache is, got {got}")


def check_rows(values: Sequence[Any]) -> None:
  """Raises unless these configs, ledgers or books of all groups have what groups must share.

  Raises:
    ValueError: There is none, or they differ.
  """
  shared = list(dict.fromkeys((each.num_rows, each.copy_on_write) for each in values))
  if len(shared) != 1:
    raise ValueError(f"caches must have the same num_rows and copy_on_write, got {shared}")


def all_of(flags: Iterable[T]) -> T:
  """Where every group agrees: the logical "and" of arrays of flags."""
  return functools.reduce(operator.and_, flags)


def any_of(flags: Iterable[T]) -> T:
  """Where some group says so: the logical "or" of arrays of flags."""
  return functools.reduce(operator.or_, flags)
