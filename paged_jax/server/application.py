"""The ASGI application: its endpoints, limits and errors."""

import signal
import socket
import time
from types import FrameType

import prometheus_client
import tokenizers
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from paged_jax.engine import Engine
from paged_jax.server import requests as question
from paged_jax.server.metrics import Metrics
from paged_jax.server.requests import Refusal, Served
from paged_jax.server.responses import Answer, response


def app(
  engine: Engine,
  name: str,
  *,
  tokenizer: tokenizers.Tokenizer | None = None,
  max_requests: int = 256,
  max_choices: int = 128,
  max_bytes: int = 2**20,
) -> Starlette:
  """The ASGI application that serves an engine, whose own thread starts with the first request.

  Args:
    engine: What answers; whoever made it closes it.
    name: The model's.
    tokenizer: Without one, prompts must be tokens, and texts are numbers.
    max_requests: Most HTTP requests in flight.
    max_choices: Most samples of one of them, prompts times n.
    max_bytes: Longest body.

  Raises:
    ValueError: There is a tokenizer, but the engine, which makes the texts, has none.
  """
  if tokenizer is not None and engine.tokenizer is None:
    raise ValueError(f"engine must have a tokenizer, too, for the one of {name!r} to be of use")
  endpoints = _Endpoints(
    Served(engine, name, tokenizer, max_choices), max_requests=max_requests, max_bytes=max_bytes
  )
  routes = [
    Route("/v1/completions", endpoints.completions, methods=["POST"]),
    Route("/v1/models", endpoints.models),
    Route("/v1/models/{name:path}", endpoints.model),
    Route("/metrics", endpoints.metrics),
    Route("/health", endpoints.health),
  ]
  handlers = {
    Refusal: _refused, HTTPException: _misdirected, ClientDisconnect: _gone, Exception: _failed,
  }  # fmt: skip
  application = Starlette(routes=routes, exception_handlers=handlers)
  application.state.in_flight = endpoints.in_flight
  return application


def run(application: Starlette, listener: socket.socket) -> None:
  """Serves an application until a signal comes; requests in flight are cancelled then.

  It returns after an interrupt; another signal is raised again.
  """
  config = uvicorn.Config(
    application, log_level="warning", access_log=False, lifespan="off", ws="none",
    timeout_graceful_shutdown=10,
  )  # fmt: skip
  _Uvicorn(config, application.state.in_flight).run(sockets=[listener])


class _Uvicorn(uvicorn.Server):
  """Does not wait for the ends of texts when it stops."""

  def __init__(self, config: uvicorn.Config, in_flight: set[Answer]):
    super().__init__(config)
    self._in_flight = in_flight

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    """What uvicorn calls at a signal; it would raise an interrupt again, too."""
    if sig == signal.SIGINT:
      self.should_exit, self.force_exit = True, self.should_exit
    else:
      super().handle_exit(sig, frame)

  async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
    """What uvicorn calls after a signal."""
    for answer in self._in_flight:
      answer.cancel()
    await super().shutdown(sockets)


class _Endpoints:
  """Invariant: `in_flight` are the answers under way; only the event loop changes it."""

  def __init__(self, served: Served, *, max_requests: int, max_bytes: int):
    self.in_flight: set[Answer] = set()
    self._served, self._max_requests, self._max_bytes = served, max_requests, max_bytes
    self._metrics = Metrics(served.engine, self.in_flight)
    self._model = dict(
      id=served.name, object="model", created=int(time.time()), owned_by="paged_jax"
    )

  async def completions(self, request: Request) -> Answer:
    """Answers a question, in one body or as events."""
    body = bytearray()
    async for part in request.stream():
      body += part
      if len(body) > self._max_bytes:
        raise Refusal(f"the body has more than {self._max_bytes} bytes", status=413)
    asked = await run_in_threadpool(question.read, bytes(body), self._served)
    if len(self.in_flight) >= self._max_requests:
      message = f"{len(self.in_flight)} requests are in flight, the most there may be"
      raise Refusal(message, status=429, kind="rate_limit_error", code="rate_limit_exceeded")
    return Answer(asked, self._served, self.in_flight, self._metrics)

  async def models(self, request: Request) -> Response:
    """Lists the one model."""
    del request
    return response({"object": "list", "data": [self._model]})

  async def model(self, request: Request) -> Response:
    """Shows the model."""
    self._served.check_name(request.path_params["name"])
    return response(self._model)

  def metrics(self, request: Request) -> Response:
    """All metrics; in a thread of its own, for the manager may be busy."""
    del request
    text = prometheus_client.generate_latest(self._metrics.registry)
    return Response(text, headers={"content-type": prometheus_client.CONTENT_TYPE_LATEST})

  async def health(self, request: Request) -> Response:
    """Says whether the server answers requests: 503 once its engine has failed, or is closed."""
    del request
    engine = self._served.engine
    if engine.failure is not None:
      return response({"status": "failed", "reason": f"the engine failed: {engine.failure!r}"}, 503)
    if engine.closed:
      return response({"status": "closed", "reason": "the engine is closed"}, 503)
    return response({"status": "ok"})


async def _refused(request: Request, error: Refusal) -> Response:
  del request
  return response(error.body, error.status)


async def _misdirected(request: Request, error: HTTPException) -> Response:
  refusal = Refusal(f"{request.method} {request.url.path}: {error.detail}")
  answer = response(refusal.body, error.status_code)
  answer.headers.update(error.headers or {})  # Allow, if another method would do
  return answer


async def _gone(request: Request, error: ClientDisconnect) -> Response:
  """For nobody: the client went away before it had sent its question."""
  del request, error
  return Response(status_code=400)


async def _failed(request: Request, error: Exception) -> Response:
  del request
  return response(Refusal(f"the server failed: {error!r}", kind="server_error").body, 500)
