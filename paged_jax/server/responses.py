"""What clients get: the samples of a question in one body, or as server-sent events."""

import asyncio
import dataclasses
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from paged_jax.engine import Completion, RequestHandle, Sampling
from paged_jax.engine.text import numbers
from paged_jax.server.metrics import Metrics
from paged_jax.server.requests import Question, Refusal, Served

_EVENTS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]


def response(body: Any, status: int = 200) -> Response:
  """A JSON body; ASCII, so that it can quote whatever a client sends."""
  return Response(json.dumps(body), status, media_type="application/json")


@dataclasses.dataclass(eq=False)
class Choice:
  """One sample of one prompt."""

  index: int
  handle: RequestHandle
  nth: int  # sample of the handle's
  reads: bool  # whether its tokens are told as text, not as numbers
  seen: float  # when its last tokens came, or else when it was asked for
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  reason: str | None = None  # why it ended
  offset: int = 0  # characters told
  told: int = 0  # tokens told

  @property
  def completion(self) -> Completion | None:
    """None while it goes on."""
    return self.handle.completions[self.nth]

  def news(self, *, logprobs: bool) -> tuple[str, dict[str, Any] | None]:
    """The text of the tokens that were not told yet, and OpenAI's object for these tokens."""
    start, self.told = self.told, len(self.tokens)
    if self.reads:
      pieces = self.handle.pieces(self.nth, start)[: self.told - start]
    else:
      pieces = numbers(self.tokens, start)
    begins = list(itertools.accumulate(map(len, pieces), initial=self.offset))
    self.offset = begins.pop()
    if not (pieces and logprobs):
      return "".join(pieces), None
    return "".join(pieces), {
      "tokens": pieces,
      "token_logprobs": self.logprobs[start:],
      "text_offset": begins,
      "top_logprobs": None,
    }


class Answer:
  """A question's way through the engine, as an ASGI response.

  Raises:
    Refusal: The engine does not take the question.
  """

  def __init__(
    self, question: Question, served: Served, in_flight: set["Answer"], metrics: Metrics
  ):
    self._question, self._served = question, served
    self._in_flight, self._metrics = in_flight, metrics
    self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
    self._arrived: asyncio.Queue[tuple[int, list[int], list[float]]] = asyncio.Queue()
    self._choices: list[Choice] = []
    self._handles: list[RequestHandle] = []
    try:
      for prompt, wanted in zip(question.prompts, question.samplings, strict=True):
        self._submit(prompt, wanted)
    except ValueError as error:
      self.cancel()
      raise Refusal(str(error)) from None
    served.engine.start()

  def _submit(self, prompt: tuple[int, ...], wanted: Sampling) -> None:
    loop, first = asyncio.get_running_loop(), len(self._choices)

    def on_token(nth: int, tokens: list[int], logprobs: list[float]) -> None:
      loop.call_soon_threadsafe(self._arrived.put_nowait, (first + nth, tokens, logprobs))

    now = time.perf_counter()
    handle = self._served.engine.submit(
      prompt, wanted, priority=self._question.priority, on_token=on_token
    )
    self._handles.append(handle)
    reads = self._served.tokenizer is not None
    self._choices += [
      Choice(first + nth, handle, nth, reads, now) for nth in range(wanted.num_samples)
    ]

  @property
  def begun(self) -> bool:
    """Whether it has drawn a token."""
    return any(choice.tokens for choice in self._choices)

  def cancel(self) -> None:
    """Ends what is still running."""
    for handle in self._handles:
      if not handle.done:
        handle.cancel()

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers; if the client goes away before, the engine forgets the question."""

    async def listen() -> None:
      while (await receive())["type"] != "http.disconnect":
        pass
      tasks.cancel_scope.cancel()

    self._in_flight.add(self)
    try:
      async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        if self._question.stream:
          await self._stream(send)
        else:
          await (await self._whole())(scope, receive, send)
        tasks.cancel_scope.cancel()
    finally:
      self._in_flight.discard(self)
      self._metrics.count(self._completions, len(self._choices))
      self.cancel()

  @property
  def _completions(self) -> list[Completion]:
    """Of the choices that have ended; of all of them, in order, once they have."""
    return [each for handle in self._handles for each in handle.completions if each]

  async def _arrivals(self) -> AsyncIterator[Choice]:
    """Choices as they get more tokens, or end, until all have ended."""
    while not all(choice.reason for choice in self._choices):
      index, tokens, logprobs = await self._arrived.get()
      choice, now = self._choices[index], time.perf_counter()
      if tokens:
        self._metrics.observe(now - choice.seen, len(tokens), first=not choice.tokens)
        choice.seen = now
        choice.tokens += tokens
        choice.logprobs += logprobs
      completion = choice.completion
      if completion and len(choice.tokens) == len(completion.tokens):
        choice.reason = completion.reason
      yield choice

  async def _whole(self) -> Response:
    async for _ in self._arrivals():
      pass
    if failure := self._failure():
      return response(failure.body, failure.status)
    choices = list(map(self._told, self._choices))
    return response(self._body(choices) | {"usage": self._usage()})

  async def _stream(self, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
    async for event in self._events():
      data = f"data: {json.dumps(event)}\n\n".encode()
      await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

  async def _events(self) -> AsyncIterator[dict[str, Any]]:
    """Pieces, each choice's last one with its reason, then usage."""
    usage = {"usage": None} if self._question.include_usage else {}
    async for choice in self._arrivals():
      if failure := self._failure():
        yield failure.body
        return
      told = self._told(choice)
      if told["text"] or told["logprobs"] or choice.reason:
        yield self._body([told]) | usage
    if usage:
      yield self._body([]) | {"usage": self._usage()}

  def _told(self, choice: Choice) -> dict[str, Any]:
    """What there is to tell of a choice that has not been told."""
    text, logprobs = choice.news(logprobs=self._question.logprobs)
    return {
      "index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.reason,
    }  # fmt: skip

  def _failure(self) -> Refusal | None:
    """What to say if a choice ended neither by a stop nor at its length."""
    for completion in self._completions:
      if completion.reason not in ("stop", "length"):
        message = completion.error or f"the request was {completion.reason}"
        return Refusal(message, status=500, kind="server_error")
    return None

  def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
    names = {"id": self._id, "object": "text_completion", "created": self._created}
    return {**names, "model": self._served.name, "choices": choices}

  def _usage(self) -> dict[str, Any]:
    prompt = sum(map(len, self._question.prompts))
    drawn = sum(len(choice.tokens) for choice in self._choices)
    cached = sum(handle.num_cached for handle in self._handles)
    return {
      "prompt_tokens": prompt,
      "completion_tokens": drawn,
      "total_tokens": prompt + drawn,
      "prompt_tokens_details": {"cached_tokens": cached},
    }
