"""What clients get: the choices of a completion in one body, or as server-sent events."""

import asyncio
import dataclasses
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from paged_jax.engine import Completion, RequestHandle
from paged_jax.engine.text import numbers
from paged_jax.server.metrics import Metrics
from paged_jax.server.requests import CompletionRequest, Prompt, Refusal, Served

_EVENTS = {"content-type": "text/event-stream", "cache-control": "no-cache"}


@dataclasses.dataclass(eq=False)
class Choice:
  """One sample of one prompt."""

  index: int
  handle: RequestHandle
  nth: int  # which sample of the handle's
  reads: bool  # whether its tokens are sent as text, not as numbers
  seen: float  # when its last tokens came; before the first ones, when it was submitted
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  reason: str | None = None  # why it ended
  num_sent: int = 0  # tokens sent
  offset: int = 0  # characters sent

  @property
  def completion(self) -> Completion | None:
    """None while it goes on."""
    return self.handle.completions[self.nth]

  def chunk(self, *, logprobs: bool) -> dict[str, Any]:
    """OpenAI's object for the tokens that came since the last chunk."""
    start, self.num_sent = self.num_sent, len(self.tokens)
    if self.reads:
      pieces = self.handle.pieces(self.nth, start)[: self.num_sent - start]
    else:
      pieces = numbers(self.tokens, start)
    *begins, self.offset = itertools.accumulate(map(len, pieces), initial=self.offset)
    details = {
      "tokens": pieces,
      "token_logprobs": self.logprobs[start:],
      "text_offset": begins,
      "top_logprobs": None,
    }
    return {
      "index": self.index,
      "text": "".join(pieces),
      "logprobs": details if pieces and logprobs else None,
      "finish_reason": self.reason,
    }


class CompletionResponse:
  """The response to a request: an ASGI application. To make one submits the request.

  Raises:
    Refusal: The engine does not take the request.
  """

  def __init__(
    self,
    request: CompletionRequest,
    prompts: Sequence[Prompt],
    served: Served,
    in_flight: set["CompletionResponse"],
    metrics: Metrics,
  ):
    self._request, self._prompts, self._served = request, prompts, served
    self._in_flight, self._metrics = in_flight, metrics
    self._logprobs = request.logprobs is not None
    self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
    self._arrived: asyncio.Queue[tuple[int, list[int], list[float]]] = asyncio.Queue()
    self._choices: list[Choice] = []
    self._handles: list[RequestHandle] = []
    try:
      for prompt in prompts:
        self._submit(prompt)
    except ValueError as error:
      self.cancel()
      raise Refusal(str(error)) from None
    served.engine.start()

  def _submit(self, prompt: Prompt) -> None:
    loop, first = asyncio.get_running_loop(), len(self._choices)

    def on_token(nth: int, tokens: list[int], logprobs: list[float]) -> None:
      loop.call_soon_threadsafe(self._arrived.put_nowait, (first + nth, tokens, logprobs))

    now, reads = time.perf_counter(), self._served.tokenizer is not None
    handle = self._served.engine.submit(
      prompt.tokens, prompt.sampling, priority=self._request.priority, on_token=on_token
    )
    self._handles.append(handle)
    self._choices += [
      Choice(first + nth, handle, nth, reads, now) for nth in range(self._request.n)
    ]

  @property
  def begun(self) -> bool:
    """Whether a token has been drawn."""
    return any(choice.tokens for choice in self._choices)

  def cancel(self) -> None:
    """Ends the choices that still go on."""
    for handle in self._handles:
      if not handle.done:
        handle.cancel()

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the response. If the client leaves before its end, the engine drops the request."""

    async def listen() -> None:  # StreamingResponse does so only for servers below ASGI 2.4
      while (await receive())["type"] != "http.disconnect":
        pass
      tasks.cancel_scope.cancel()

    self._in_flight.add(self)
    try:
      async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        if self._request.stream:
          response = StreamingResponse(self._events(), headers=_EVENTS)
        else:
          response = await self._whole()
        await response(scope, receive, send)
        tasks.cancel_scope.cancel()
    finally:
      self._in_flight.discard(self)
      ended = [each for handle in self._handles for each in handle.completions if each]
      self._metrics.count(ended, len(self._choices))
      self.cancel()

  async def _arrivals(self) -> AsyncIterator[Choice]:
    """A choice whenever it gets tokens or ends, until all have ended.

    Raises:
      Refusal: A choice ended neither at a stop nor at its length.
    """
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
        if choice.reason not in ("stop", "length"):
          message = completion.error or f"the request was {choice.reason}"
          raise Refusal(message, status=500, kind="server_error")
      yield choice

  async def _whole(self) -> Response:
    try:
      async for _ in self._arrivals():
        pass
    except Refusal as refusal:
      return JSONResponse(refusal.body, refusal.status)
    chunks = [choice.chunk(logprobs=self._logprobs) for choice in self._choices]
    return JSONResponse(self._body(chunks) | {"usage": self._usage()})

  async def _events(self) -> AsyncIterator[str]:
    async for body in self._bodies():
      yield f"data: {json.dumps(body)}\n\n"
    yield "data: [DONE]\n\n"

  async def _bodies(self) -> AsyncIterator[dict[str, Any]]:
    """Chunks, the last one of a choice with its reason, then usage. An error ends them."""
    options = self._request.stream_options or {}
    usage = {"usage": None} if options.get("include_usage") else {}
    try:
      async for choice in self._arrivals():
        chunk = choice.chunk(logprobs=self._logprobs)
        if chunk["text"] or chunk["logprobs"] or choice.reason:
          yield self._body([chunk]) | usage
    except Refusal as refusal:
      yield refusal.body
    else:
      if usage:
        yield self._body([]) | {"usage": self._usage()}

  def _body(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
      "id": self._id,
      "object": "text_completion",
      "created": self._created,
      "model": self._served.name,
      "choices": chunks,
    }

  def _usage(self) -> dict[str, Any]:
    prompt = sum(len(prompt.tokens) for prompt in self._prompts)
    drawn = sum(len(choice.tokens) for choice in self._choices)
    cached = sum(handle.num_cached for handle in self._handles)
    return {
      "prompt_tokens": prompt,
      "completion_tokens": drawn,
      "total_tokens": prompt + drawn,
      "prompt_tokens_details": {"cached_tokens": cached},
    }
