"""Requests on an engine, watched from round to round."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from paged_jax.engine import Engine, Sampling
from paged_jax.types import Cache


class Summary(NamedTuple):
  """What a run came to."""

  num_tokens: int = 0  # drawn
  seconds: float = 0.0
  pages: int = 0  # most pages in use at once
  unshared_pages: int = 0  # most that would have been, had no page been shared
  copies: int = 0  # pages copied on write

  @property
  def tokens_per_second(self) -> float:
    """Tokens drawn in all rows per second."""
    return self.num_tokens / max(self.seconds, 1e-9)

  @property
  def sharing(self) -> str:
    """What sharing pages saved."""
    return (
      f"{self.pages} pages used at most, {self.unshared_pages} without sharing;"
      f" {self.copies} copied on write"
    )

  def __str__(self) -> str:
    speed = f"{self.seconds:.2f} s ({self.tokens_per_second:.0f} tokens/s)"
    return f"{self.num_tokens} tokens in {speed}; {self.sharing}"


class Update(NamedTuple):
  """Where a run stands. Samples are numbered request by request."""

  tokens: list[list[int]]  # all new tokens of each sample so far, an end token included
  texts: list[list[str]]  # what each of them added to the sample's text, in numbers if need be
  done: list[bool]  # which samples are complete
  rows: dict[int, int]  # sample in each busy row
  cache: Cache  # valid until the next update is asked for
  summary: Summary


def follow(engine: Engine, requests: Sequence[tuple[Sequence[int], Sampling]]) -> Iterator[Update]:
  """Runs (prompt, sampling) requests to their end.

  Yields:
    An update when all have been accepted, one after each round, and one when all is given back.

  Raises:
    ValueError: A request could never run; the message says which, and why.
  """
  handles = []
  for number, (prompt, sampling) in enumerate(requests, start=1):
    try:
      handles.append(engine.submit(prompt, sampling))
    except ValueError as error:
      for handle in handles:
        handle.cancel()
      raise ValueError(f"request {number}: {error}") from None
  widths = [sampling.width for _, sampling in requests]
  firsts = [sum(widths[:n]) for n in range(len(widths))]
  summary = Summary()

  def update():
    return Update(
      tokens=[tokens for handle in handles for tokens in handle.tokens],
      texts=[handle.pieces(nth) for handle, width in zip(handles, widths) for nth in range(width)],
      done=[done is not None for handle in handles for done in handle.completions],
      rows={
        row: first + nth
        for handle, first in zip(handles, firsts)
        for row, nth in handle.rows.items()
      },
      cache=engine.manager.cache,
      summary=summary,
    )

  yield update()
  began, drawn, copies = time.perf_counter(), engine.counts.drawn_tokens, engine.num_copies
  going = True
  while going:
    going = engine.step()
    manager = engine.manager
    summary = Summary(
      num_tokens=engine.counts.drawn_tokens - drawn,
      seconds=time.perf_counter() - began,
      pages=max(summary.pages, manager.config.num_pages - manager.num_free),
      unshared_pages=max(summary.unshared_pages, manager.num_mapped),
      copies=engine.num_copies - copies,
    )
    yield update()
