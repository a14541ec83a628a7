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
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from paged_jax.engine import Engine
from paged_jax.server import requests
from paged_jax.server.metrics import Metrics
from paged_jax.server.requests import Refusal, Served
from paged_jax.server.responses import CompletionResponse


def app(
  engine: Engine,
  name: str,
  *,
  tokenizer: tokenizers.Tokenizer | None = None,
  max_requests: int = 256,
  max_choices: int = 128,
  max_bytes: int = 2**20,
) -> Starlette:
  """The ASGI application that serves an engine. The first request starts the engine's thread.

  >>> from starlette.testclient import TestClient
  >>> from paged_jax import engine, models, server
  >>> decoder = models.load(models.embedded())
  >>> cache = models.cache_config(decoder.config, num_pages=64, num_rows=4, max_length=128)
  >>> serving = engine.Engine(decoder, engine.EngineConfig(cache))
  >>> client = TestClient(server.app(serving, "shakespeare"))
  >>> client.get("/v1/models").json()["data"][0]["id"]
  'shakespeare'
  >>> client.post("/v1/completions", json={"model": "hamlet"}).json()["error"]["message"]
  "there is no model 'hamlet', only 'shakespeare'"

  Args:
    engine: Draws the tokens. The caller closes it.
    name: The model's, as requests must give it.
    tokenizer: Without one, prompts must be tokens, and texts are numbers.
    max_requests: Most HTTP requests in flight.
    max_choices: Most samples of one request, prompts times n.
    max_bytes: Longest body of a request.

  Raises:
    ValueError: There is a tokenizer, but the engine, which makes the texts, has none.
  """
  if tokenizer is not None and engine.tokenizer is None:
    raise ValueError(f"engine must have a tokenizer too if {name!r} has one, got None")
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
  """Serves an application until a signal comes, which cancels the requests in flight.

  It returns after an interrupt (SIGINT); it raises any other signal again.

  >>> with socket.create_server(("127.0.0.1", 8000)) as listener:  # doctest: +SKIP
  ...   server.run(server.app(engine, "shakespeare"), listener)
  """
  config = uvicorn.Config(
    application, log_level="warning", access_log=False, lifespan="off", ws="none",
    timeout_graceful_shutdown=10,
  )  # fmt: skip
  _Uvicorn(config, application.state.in_flight).run(sockets=[listener])


class _Uvicorn(uvicorn.Server):
  """Cancels the requests in flight when it stops; uvicorn alone would let them end."""

  def __init__(self, config: uvicorn.Config, in_flight: set[CompletionResponse]):
    super().__init__(config)
    self._in_flight = in_flight

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    """What uvicorn calls at a signal; its own method would raise an interrupt again."""
    if sig == signal.SIGINT:
      self.should_exit, self.force_exit = True, self.should_exit
    else:
      super().handle_exit(sig, frame)

  async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
    """What uvicorn calls after a signal."""
    for response in self._in_flight:
      response.cancel()
    await super().shutdown(sockets)


class _Endpoints:
  """Invariant: `in_flight` are the responses under way; only the event loop changes it."""

  def __init__(self, served: Served, *, max_requests: int, max_bytes: int):
    self.in_flight: set[CompletionResponse] = set()
    self._served, self._max_requests, self._max_bytes = served, max_requests, max_bytes
    self._metrics = Metrics(served.engine, self.in_flight)
    self._model = dict(
      id=served.name, object="model", created=int(time.time()), owned_by="paged_jax"
    )

  async def completions(self, request: Request) -> CompletionResponse:
    """Completes prompts, in one body or as events."""
    body = bytearray()
    async for part in request.stream():
      body += part
      if len(body) > self._max_bytes:  # starlette's max_body_size would not send OpenAI's format
        raise Refusal(f"the body has more than {self._max_bytes} bytes", status=413)
    asked, prompts = await run_in_threadpool(requests.read, bytes(body), self._served)
    if len(self.in_flight) >= self._max_requests:
      message = f"{len(self.in_flight)} requests are in flight, the most there may be"
      raise Refusal(message, status=429, kind="rate_limit_error", code="rate_limit_exceeded")
    return CompletionResponse(asked, prompts, self._served, self.in_flight, self._metrics)

  async def models(self, request: Request) -> Response:
    """Lists the one model."""
    del request
    return JSONResponse({"object": "list", "data": [self._model]})

  async def model(self, request: Request) -> Response:
    """Shows the model."""
    self._served.check_name(request.path_params["name"])
    return JSONResponse(self._model)

  def metrics(self, request: Request) -> Response:
    """All metrics; in a thread of its own, because the manager may be busy."""
    del request
    text = prometheus_client.generate_latest(self._metrics.registry)
    return Response(text, headers={"content-type": prometheus_client.CONTENT_TYPE_LATEST})

  async def health(self, request: Request) -> Response:
    """Whether the server takes requests: 503 if its engine has failed or is closed."""
    del request
    engine = self._served.engine
    if engine.failure is not None:
      reason = f"the engine failed: {engine.failure!r}"
      return JSONResponse({"status": "failed", "reason": reason}, 503)
    if engine.closed:
      return JSONResponse({"status": "closed", "reason": "the engine is closed"}, 503)
    return JSONResponse({"status": "ok"})


async def _refused(request: Request, error: Refusal) -> Response:
  del request
  return JSONResponse(error.body, error.status)


async def _misdirected(request: Request, error: HTTPException) -> Response:
  refusal = Refusal(f"{request.method} {request.url.path}: {error.detail}")
  return JSONResponse(refusal.body, error.status_code, error.headers)  # such as Allow


async def _gone(request: Request, error: ClientDisconnect) -> Response:
  """Reaches nobody: the client left before it had sent its request."""
  del request, error
  return Response(status_code=400)


async def _failed(request: Request, error: Exception) -> Response:
  del request
  return JSONResponse(Refusal(f"the server failed: {error!r}", kind="server_error").body, 500)
