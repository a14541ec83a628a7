"""What any thread may ask of an engine between rounds: requests, commands, texts.

# users     submit, fork, cancel ...  ──▶  arrivals, changed     at any time, under `lock`
# a round                             ◀──  takes them            first of all
"""

import itertools
import threading
from collections.abc import Iterable, Iterator

from paged_jax.engine.config import EngineConfig
from paged_jax.engine.requests import OnToken, Request, Sample
from paged_jax.engine.room import Room
from paged_jax.engine.sampling import Sampling
from paged_jax.engine.text import Vocabulary, numbers
from paged_jax.host.config import whole


class Desk:
  """Arrivals and changed samples, until the next round takes them.

  Args:
    config: Of the engine.
    room: Counts pages.
    vocab_size: V.
    vocabulary: What tokens are; None without a tokenizer.
  """

  def __init__(
    self, config: EngineConfig, room: Room, vocab_size: int, vocabulary: Vocabulary | None
  ):
    self._config, self._room, self._vocab_size = config, room, vocab_size
    self.vocabulary = vocabulary
    # Guards what any thread may do, and what the rounds do to texts and completions.
    self.lock = threading.RLock()
    self.numbers: Iterator[int] = itertools.count()  # of samples
    self.arrivals: list[Request] = []
    self.changed: dict[Sample, None] = {}  # they have a change to carry out
    self.live: dict[Sample, None] = {}  # they have not ended
    self.wake = threading.Event()  # there may be something to do
    self.closed = False
    self.failure: BaseException | None = None  # of a round

  def check_open(self) -> None:
    """Raises unless requests are taken.

    Raises:
      RuntimeError: The engine has failed, or is closed.
    """
    if self.failure is not None:
      raise RuntimeError(f"the engine has failed: {self.failure!r}") from self.failure
    if self.closed:
      raise RuntimeError("the engine is closed")

  def check(self, prompt: tuple, sampling: Sampling) -> None:
    """Raises if a request could never run.

    Raises:
      ValueError: It could not; the message says why.
    """
    config, most = self._config, self._config.max_beams
    if not prompt:
      raise ValueError("prompt is empty")
    self._check_tokens("prompt", prompt)
    self._check_tokens("logit_bias", sampling.logit_bias)
    self._check_tokens("stop_tokens", sampling.stop_tokens)
    if sampling.stop and self.vocabulary is None:
      raise ValueError(f"stop needs a tokenizer, got {sampling.stop}")
    if sampling.num_beams > most:
      raise ValueError(f"num_beams must be at most max_beams={most}, got {sampling.num_beams}")
    num_tokens = len(prompt) - 1 + sampling.max_new_tokens
    longest = min(cache.max_length for cache in config.caches)
    if num_tokens > longest:
      raise ValueError(f"the request needs {num_tokens} tokens, but a row holds {longest}")
    self._room.check_size(len(prompt), sampling.num_beams, num_tokens)

  def _check_tokens(self, name: str, tokens: Iterable) -> None:
    vocab = self._vocab_size
    if tokens and {*map(type, tokens)} == {int} and min(tokens) >= 0 and max(tokens) < vocab:
      return  # nearly always, and several times as fast
    for token in tokens:
      if not 0 <= whole(name, token) < vocab:
        raise ValueError(f"{name} has token {token}, but the vocabulary has {vocab}")

  def submit(
    self, prompt: tuple, sampling: Sampling, priority: int, on_token: OnToken | None
  ) -> Request:
    """A request arrives; see `Engine.submit`."""
    priority = whole("priority", priority)
    self.check(prompt, sampling)
    prompt, size = tuple(map(int, prompt)), self._config.page_size
    beginning = prompt[:size] if len(prompt) > size else None
    request = Request(prompt, priority, on_token, beginning)
    with self.lock:
      self.check_open()
      for nth in range(sampling.width):
        origin = request.samples[0] if nth and sampling.num_beams == 1 else None
        request.samples.append(Sample(next(self.numbers), nth, request, sampling, origin=origin))
      self.arrive(request)
    return request

  def arrive(self, request: Request) -> None:
    """The next round takes this request in."""
    self.arrivals.append(request)
    self.live.update(dict.fromkeys(request.samples))
    self._awake()

  def change(self, samples: Iterable[Sample]) -> None:
    """The next round carries out the changes of these samples."""
    changed = dict.fromkeys(samples)
    self.changed.update(changed)
    self.live.update(changed)
    self._awake()

  def _awake(self) -> None:
    """There is something to do; `set` costs more than all the rest, so once is enough."""
    if not self.wake.is_set():
      self.wake.set()

  def pieces(self, sample: Sample, start: int) -> list[str]:
    """See `RequestHandle.pieces`."""
    with self.lock:
      now = sample.change or sample
      if self.vocabulary is None:
        return [] if sample.searching and not sample.completion else numbers(now.tokens, start)
      if now.reader is None and (sample.searching or self.failure):
        return []  # beams have no text yet; and reading may have been the failure
      return sample.reading(self.vocabulary).pieces[start:]
