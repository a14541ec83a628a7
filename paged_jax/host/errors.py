"""What the manager refuses. Every error carries its numbers, and leaves all state as it was."""

import dataclasses
from collections.abc import Hashable


class CacheError(Exception):
  """Base of everything that a manager raises about a request."""

  template = ""

  def __str__(self) -> str:
    return self.template.format(**vars(self))


@dataclasses.dataclass(eq=False)
class OutOfPages(CacheError):
  """Too few pages are free, counting those of prefixes that nobody uses."""

  needed: int
  free: int
  template = "{needed} pages are needed, but {free} are free"


@dataclasses.dataclass(eq=False)
class OutOfHostPages(CacheError):
  """Too few pages are free in the host pool."""

  needed: int
  free: int
  template = "{needed} host pages are needed, but {free} are free"


@dataclasses.dataclass(eq=False)
class OutOfRows(CacheError):
  """Every row of the batch has a sequence."""

  needed: int
  free: int
  template = "{needed} rows are needed, but {free} are free"


@dataclasses.dataclass(eq=False)
class TooLong(CacheError):
  """A sequence would not fit in a row, or in what its request allowed."""

  request_id: Hashable
  needed: int
  capacity: int
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
  """A request, or what it writes, has another shape or dtype than the pool."""

  name: str
  wanted: object
  got: object
  template = "{name} must be {wanted}, got {got}"


@dataclasses.dataclass(eq=False)
class UnmappedToken(CacheError):
  """A position outside the tokens that a sequence holds."""

  request_id: Hashable
  page: int
  token: int
  template = "request {request_id!r} holds no token {token} (logical page {page})"


@dataclasses.dataclass(eq=False)
class NotEmpty(CacheError):
  """The target of a share holds tokens of its own."""

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
  """The operation was switched off when the manager was made."""

  feature: str
  template = "{feature} is off"


@dataclasses.dataclass(eq=False)
class CanaryMismatch(CacheError):
  """A slot does not hold what this sequence wrote there."""

  request_id: Hashable
  token: int
  page: int
  template = "request {request_id!r}: token {token}, on page {page}, is not what was written"
