"""An engine as a service: the thread that does its rounds, and streams of tokens for asyncio."""

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from paged_jax.engine.handle import RequestHandle
from paged_jax.engine.requests import OnToken


class Token(NamedTuple):
  """What a stream yields."""

  sample: int  # of the request
  token: int
  logprob: float  # NaN unless `Sampling.logprobs` asked for it
  text: str  # what it added to the sample's text, see `RequestHandle.pieces`


class Worker:
  """The thread that does the rounds of an engine, until the engine ends it or nobody has the engine.

  Args:
    wake: Set when there may be something to do.
  """

  def __init__(self, wake: threading.Event):
    self._wake = wake
    self._thread: threading.Thread | None = None

  def start(self, turn: Callable[[], float | None]) -> None:
    """Starts the thread, if there is none.

    Args:
      turn: A method of the engine that does one round: most seconds until the next, None if there is
        to be none. The engine is not kept alive for it.
    """
    if self._thread is None:
      args = (weakref.WeakMethod(turn), self._wake)
      self._thread = threading.Thread(target=_serve, args=args, name="engine", daemon=True)
      self._thread.start()

  def stop(self) -> Callable[[], None]:
    """Lets go of the thread, which ends once `turn` says so; returns what waits for that."""
    thread, self._thread = self._thread, None
    self._wake.set()
    return (lambda: None) if thread is None else thread.join


def _serve(turn: weakref.WeakMethod, wake: threading.Event) -> None:
  while (there := turn()) is not None:
    seconds = there()
    del there
    if seconds is None:
      return
    if wake.wait(seconds):
      wake.clear()


async def stream(submit: Callable[[OnToken], RequestHandle]) -> AsyncIterator[Token]:
  """The tokens of a request as they come; it is cancelled if the listener leaves.

  Args:
    submit: Makes the request, with this listener.

  Raises:
    RuntimeError: The request ended in an error.
  """
  loop, arrived = asyncio.get_running_loop(), asyncio.Queue()

  def on_token(nth: int, tokens: list[int], logprobs: list[float]) -> None:
    loop.call_soon_threadsafe(arrived.put_nowait, (nth, tokens, logprobs))

  handle = submit(on_token)
  try:
    known = [0] * len(handle.completions)  # tokens of each sample
    while not all(x and n == len(x.tokens) for n, x in zip(known, handle.completions)):
      nth, tokens, logprobs = await arrived.get()
      pieces = handle.pieces(nth, known[nth])
      known[nth] += len(tokens)
      for token, logprob, piece in zip(tokens, logprobs, pieces):
        yield Token(nth, token, logprob, piece)
  finally:
    if not handle.done:
      handle.cancel()
  for completion in handle.completions:
    if completion and completion.error is not None:
      raise RuntimeError(completion.error)
