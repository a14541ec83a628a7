"""What was drawn becomes text, ends samples, and is told to listeners."""

import collections
import logging
import math
from collections.abc import Iterable

from paged_jax.engine.calls import Drawn
from paged_jax.engine.config import Counts, EngineConfig
from paged_jax.engine.desk import Desk
from paged_jax.engine.requests import Completion, Sample
from paged_jax.engine.scheduler import Scheduler

_log = logging.getLogger(__name__)
_NOT_NUMBERS = "the model's logits are not numbers"


class Delivery:
  """Takes what calls drew into samples.

  Args:
    desk: Of the engine; its lock is taken.
    scheduler: Hears of samples that end.
    config: Of the engine.
    counts: What is counted here, too.
  """

  def __init__(self, desk: Desk, scheduler: Scheduler, config: EngineConfig, counts: Counts):
    self._desk, self._scheduler, self._config, self._counts = desk, scheduler, config, counts
    self._untold: collections.OrderedDict[Sample, None] = collections.OrderedDict()

  def take(self, drawn: Iterable[Drawn]) -> None:
    """Samples have what a call drew for them, unless a command has come meanwhile."""
    with self._desk.lock:
      for each in drawn:
        sample = each.sample
        known = len(sample.tokens)
        if sample.change is None:
          self._take(sample, each)
        self._counts.drawn_tokens += len(sample.tokens) - known
        self.tell_later(sample)

  def _take(self, sample: Sample, drawn: Drawn) -> None:
    if sample.searching:
      sample.search(drawn.tokens, drawn.logprobs, drawn.score, ended=drawn.text_ended)
      if drawn.ended:
        self._end_beam(sample)
    elif drawn.broken:
      self._add(sample, drawn)
      self.end(sample, "error", _NOT_NUMBERS)
    elif self._add(sample, drawn):
      self.end(sample, "stop")
    elif drawn.ended:
      self.end(sample, "stop" if self._stops(sample) else "length")

  def _add(self, sample: Sample, drawn: Drawn) -> bool:
    """Adds what was drawn, up to a stop; whether there is one."""
    count = None
    if self._desk.vocabulary is not None:
      count = sample.reading(self._desk.vocabulary).add(drawn.tokens)
    sample.add(drawn.tokens[:count], drawn.logprobs[:count])
    return count is not None

  def _stops(self, sample: Sample) -> bool:
    """Whether the last token is one that ends the sample."""
    return sample.tokens[-1] in (*self._config.eos, *sample.sampling.stop_tokens)

  def _end_beam(self, beam: Sample) -> None:
    """A search has ended, and one of its texts with it."""
    if beam.score > -math.inf:
      self.end(beam, "stop" if self._stops(beam) else "length")
    elif any(other.score > -math.inf for other in beam.beams):
      beam.search([], [], beam.score, ended=True)
      self.end(beam, "surplus")
    else:
      self.end(beam, "error", _NOT_NUMBERS)

  def end(self, sample: Sample, reason: str, error: str | None = None) -> None:
    """A sample has its completion; what it holds is given back soon."""
    text = self._text(sample, reason, error)
    tokens, logprobs = list(sample.tokens), list(sample.logprobs)
    sample.end(Completion(tokens, logprobs, reason, text, error))
    self._desk.live.pop(sample, None)
    self._scheduler.end(sample)
    if sample.searching and sample.request.done:
      sample.request.rank(_rank)

  def _text(self, sample: Sample, reason: str, error: str | None) -> str | None:
    vocabulary, reader = self._desk.vocabulary, sample.reader
    if vocabulary is not None and reader is None and error is None:
      if not sample.tokens:
        return ""  # as most have that are cancelled while they wait
      reader = sample.reading(vocabulary)
    if reader is None:
      return None  # after an error nothing is read: reading may have been the error
    if error is None and reason in ("stop", "length"):
      reader.finish()  # otherwise the text stays as the listener has it
    return reader.text

  def end_with(self, error: str, samples: Iterable[Sample]) -> None:
    """Those of `samples` that have not ended, and those that a command has made go on, do so."""
    with self._desk.lock:
      for sample in samples:
        sample.become()
        if sample.completion is None:
          self.end(sample, "error", error)
          self.tell_later(sample)

  # Listeners

  def tell_later(self, sample: Sample) -> None:
    """The listener of a sample is called before the round ends."""
    self._untold[sample] = None

  def tell_all(self) -> None:
    """Calls listeners about everything that was read and not told, in order."""
    while self._untold:
      self._tell(self._untold.popitem(last=False)[0])

  def _tell(self, sample: Sample) -> None:
    """Calls a listener about tokens that it has not been told, and about the end."""
    news, on_token = sample.news(), sample.request.on_token
    if news is None or on_token is None:
      return
    try:
      on_token(sample.nth, *news)
    except Exception as error:  # it is the caller's code: only its own request ends
      _log.exception("on_token of request %s raised", sample.number)
      self.end_with(repr(error), sample.request.samples)


def _rank(beam: Sample) -> float:
  """Texts with a smaller one are better."""
  if beam.score == -math.inf:
    return math.inf
  return -beam.score / max(1, len(beam.tokens)) ** beam.sampling.length_penalty
