"""Errors of the manager. Each has its numbers as fields, and no sequence was changed."""

import dataclasses
from collections.abc import Hashable


class _Fields(dict):
  """The attributes of an error, by name."""

  def __init__(self, error: Exception):
    super().__init__()
    self._error = error

  def __missing__(self, name: str) -> object:
    return getattr(self._error, name)


class CacheError(Exception):
  """Base of all errors that a manager raises about a request.

  >>> from paged_jax import CacheConfig, host
  >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
  >>> try:
  ...   manager.allocate_many([host.Request("a", 64), host.Request("b", 64)], reserve=1)
  ... except host.errors.OutOfPages as error:
  ...   print(error, error.needed - error.free)
  9 pages are needed, but 8 are free 1
  """

  template = ""

  def __str__(self) -> str:
    return self.template.format_map(_Fields(self))


@dataclasses.dataclass(eq=False)
class OutOfPages(CacheError):
  """Too few pages are available: free, or freed by eviction."""

  needed: int
  free: int  # available ones
  group: int | None = None  # which cache of a tuple lacks them
  template = "{needed} pages are needed, but {free} are free{place}"

  @property
  def place(self) -> str:
    """Where they are missing, for the message."""
    return "" if self.group is None else f" in group {self.group}"


@dataclasses.dataclass(eq=False)
class OutOfHostPages(CacheError):
  """Too few host pages are available: free, or freed by dropping spilled prefixes."""

  needed: int
  free: int  # available ones
  group: int | None = None  # which cache of a tuple lacks them
  template = "{needed} host pages are needed, but {free} are free{place}"

  @property
  def place(self) -> str:
    """Where they are missing, for the message."""
    return "" if self.group is None else f" in group {self.group}"


@dataclasses.dataclass(eq=False)
class OutOfRows(CacheError):
  """Too few rows are free."""

  needed: int
  free: int
  template = "{needed} rows are needed, but {free} are free"


@dataclasses.dataclass(eq=False)
class TooLong(CacheError):
  """A sequence would hold more tokens than a row can, or than its request allows."""

  request_id: Hashable
  needed: int  # tokens
  capacity: int  # tokens
  template = "request {request_id!r} needs {needed} tokens, but may hold {capacity}"


@dataclasses.dataclass(eq=False)
class UnknownRequest(CacheError):
  """No live sequence has this id."""

  request_id: Hashable
  template = "there is no request {request_id!r}"


@dataclasses.dataclass(eq=False)
class DuplicateRequest(CacheError):
  """A live sequence has this id already."""

  request_id: Hashable
  template = "request {request_id!r} is live already"


@dataclasses.dataclass(eq=False)
class StaleHandle(CacheError):
  """The sequence of this handle was deallocated."""

  request_id: Hashable
  cache_id: int
  template = "the handle of request {request_id!r} (cache id {cache_id}) was deallocated"


@dataclasses.dataclass(eq=False)
class ShapeMismatch(CacheError):
  """A request, or keys and values to write, have another shape or dtype than the pool."""

  name: str
  wanted: object
  got: object
  template = "{name} must be {wanted}, got {got}"


@dataclasses.dataclass(eq=False)
class UnmappedToken(CacheError):
  """The sequence does not hold this token."""

  request_id: Hashable
  page: int  # logical page
  token: int  # position
  template = "request {request_id!r} holds no token {token} (logical page {page})"


@dataclasses.dataclass(eq=False)
class NotEmpty(CacheError):
  """The target of a share holds tokens already."""

  request_id: Hashable
  num_tokens: int
  template = "request {request_id!r} holds {num_tokens} tokens; only an empty one can share"


@dataclasses.dataclass(eq=False)
class SwappedOut(CacheError):
  """The sequence is in host memory."""

  request_id: Hashable
  template = "request {request_id!r} is swapped out"


@dataclasses.dataclass(eq=False)
class NotSwappedOut(CacheError):
  """The sequence is on the device already."""

  request_id: Hashable
  template = "request {request_id!r} is not swapped out"


@dataclasses.dataclass(eq=False)
class Disabled(CacheError):
  """The manager's options, or the cache's config, switch this feature off."""

  feature: str
  template = "{feature} is off"


@dataclasses.dataclass(eq=False)
class CanaryMismatch(CacheError):
  """A slot does not have the mark of the sequence that wrote it."""

  request_id: Hashable
  token: int  # position
  page: int  # physical page
  template = "request {request_id!r}: token {token}, on page {page}, is not what was written"
