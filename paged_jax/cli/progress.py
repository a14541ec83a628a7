"""What a command is doing: lines, a spinner or a bar, and an engine's requests round by round."""

import contextlib
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import rich.console
import rich.progress
import rich.text

from paged_jax import groups
from paged_jax.engine import Engine, RequestHandle, Sampling
from paged_jax.types import Cache

_MAX_LINES = 12  # of a bar, where there is no terminal


def say(line: str) -> None:
  """Writes a line to standard error, which is no part of the result."""
  print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
  """Says what is under way: on a terminal until it is done, elsewhere in a line of its own."""
  if sys.stderr.isatty():
    with rich.console.Console(stderr=True).status(rich.text.Text(text)):
      yield
  else:
    say(text)
    yield


@contextlib.contextmanager
def bar(text: str) -> Iterator[Callable[[int, int], None]]:
  """Gives what shows how many of how many are done: in a bar on a terminal, elsewhere in few lines."""
  if not sys.stderr.isatty():
    yield functools.partial(_say_done, text)
    return
  with rich.progress.Progress(console=rich.console.Console(stderr=True), transient=True) as shown:
    task = shown.add_task(text)
    yield lambda done, total: shown.update(task, completed=done, total=total)


def _say_done(text: str, done: int, total: int) -> None:
  if done < total and done % -(-total // _MAX_LINES) == 0:
    say(f"{text} {done + 1}/{total}")


class Summary(NamedTuple):
  """What a run came to.

  >>> print(Summary(num_tokens=60, seconds=0.5, pages=6, unshared_pages=9, copies=2))
  60 tokens in 0.50 s (120 tokens/s); 6 pages used at most, 9 without sharing; 2 copied on write
  """

  num_tokens: int = 0  # drawn
  seconds: float = 0.0
  pages: int = 0  # most pages in use at once
  unshared_pages: int = 0  # most that would have been in use if no page had been shared
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


@dataclasses.dataclass(frozen=True)
class Update:
  """Where a run stands. Samples are numbered request by request.

  All updates of a run share their lists, which grow in place: a round costs what it draws, and not
  what was drawn before it.
  """

  tokens: list[list[int]]  # new tokens of each sample, an end token included
  texts: list[
    list[str]
  ]  # what each token added to its sample's text, or numbers without a tokenizer
  done: list[bool]  # which samples are complete
  handles: list[RequestHandle]
  cache: Cache  # valid until the next update is asked for
  summary: Summary

  @property
  def rows(self) -> dict[int, int]:
    """The sample in each busy row at the moment. Looks at every sample."""
    firsts = itertools.accumulate((len(handle.completions) for handle in self.handles), initial=0)
    return {
      row: first + nth
      for first, handle in zip(firsts, self.handles)
      for row, nth in handle.rows.items()
    }


def follow(engine: Engine, requests: Sequence[tuple[Sequence[int], Sampling]]) -> Iterator[Update]:
  """Runs (prompt, sampling) requests to their end.

  Yields:
    An update when all have been accepted, one after each round, and one when all is given back.

  Raises:
    ValueError: A request could never run; the message says which, and why.
  """
  handles: list[RequestHandle] = []
  firsts = [*itertools.accumulate((sampling.width for _, sampling in requests), initial=0)]
  num_samples = firsts.pop()
  tokens, texts = ([[] for _ in range(num_samples)] for _ in range(2))
  done = [False] * num_samples
  told: set[int] = set()  # requests with news since the last update

  def listener(number: int):
    def on_token(nth: int, new: list[int], logprobs: list[float]) -> None:
      del logprobs
      sample = firsts[number] + nth
      tokens[sample] += new
      texts[sample] += handles[number].pieces(nth, len(texts[sample]))
      told.add(number)

    return on_token

  for number, (prompt, sampling) in enumerate(requests):
    try:
      handles.append(engine.submit(prompt, sampling, on_token=listener(number)))
    except ValueError as error:
      for handle in handles:
        handle.cancel()
      raise ValueError(f"request {number + 1}: {error}") from None

  summary, manager = Summary(), engine.manager
  num_pages = sum(cache.num_pages for cache in engine.config.caches)
  yield Update(tokens, texts, done, handles, manager.cache, summary)
  began, drawn, copies = time.perf_counter(), engine.counts.drawn_tokens, engine.num_copies
  going = True
  while going:
    going = engine.step()
    for number in told:
      for sample, completion in enumerate(handles[number].completions, firsts[number]):
        done[sample] = completion is not None
    told.clear()
    summary = Summary(
      num_tokens=engine.counts.drawn_tokens - drawn,
      seconds=time.perf_counter() - began,
      pages=max(summary.pages, num_pages - sum(groups.each(manager.num_free))),
      unshared_pages=max(summary.unshared_pages, manager.num_mapped),
      copies=engine.num_copies - copies,
    )
    yield Update(tokens, texts, done, handles, manager.cache, summary)
