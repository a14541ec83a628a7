"""What clients send: a JSON body, checked by pydantic and against the model that is served."""

import dataclasses
import json
import reprlib
import secrets
from collections.abc import Collection
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import tokenizers
from pydantic import BeforeValidator, ConfigDict, Field, WrapValidator
from pydantic_core import PydanticCustomError

from paged_jax.engine import Engine, Sampling, sampling
from paged_jax.engine import prompts as prompt_lib

_INT_MAX = 2**31 - 1


class Refusal(Exception):
  """Why a request gets no completion: OpenAI's error object, and its HTTP status."""

  def __init__(
    self,
    message: str,
    param: str | None = None,
    *,
    status: int = 400,
    kind: str = "invalid_request_error",
    code: str | None = None,
  ):
    super().__init__(message)
    self.status = status
    self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclasses.dataclass(frozen=True)
class Served:
  """A model that is served."""

  engine: Engine
  name: str
  tokenizer: tokenizers.Tokenizer | None  # None: prompts must be tokens, and texts are numbers
  max_choices: int  # of a request, prompts times n

  @property
  def max_length(self) -> int:
    """Most tokens of a text, new ones included."""
    caches = self.engine.config.caches
    whole = [x.num_pages * x.page_size for x in caches if x.window is None]
    return min(*(x.max_length for x in caches), *whole)

  def check_name(self, name: str) -> None:
    """Refuses the empty name and the name of another model."""
    if not name:
      raise Refusal("you must provide a model parameter", "model")
    if name != self.name:
      message = f"there is no model {_brief(name)}, only {self.name!r}"
      raise Refusal(message, "model", status=404, code="model_not_found")

  def check_tokens(self, tokens: Collection[int], field: str) -> None:
    """Refuses a field that has tokens outside the vocabulary."""
    size = self.engine.vocab_size
    for token in tokens:
      if not 0 <= token < size:
        raise Refusal(f"{field} has token {_brief(token)}, but the vocabulary has {size}", field)


def _listed(value: Any) -> Any:
  return [value] if isinstance(value, str) else value


def _prompts(value: Any, validate: pydantic.ValidatorFunctionWrapHandler) -> list[str | list[int]]:
  several = isinstance(value, list) and value and not isinstance(value[0], int)
  try:
    return validate(value if several else [value])
  except pydantic.ValidationError:  # an error for each type of each prompt
    message = "Input should be a text, tokens, or a list of either"
    raise PydanticCustomError("prompt", message) from None


class CompletionRequest(pydantic.BaseModel):
  """The body of a request: OpenAI's fields, and those that this engine adds.

  >>> CompletionRequest(model="shakespeare", prompt="To be", stop="\\n", top_k=5).stop
  ['\\n']
  """

  model_config = ConfigDict(strict=True, extra="forbid")

  model: str = ""
  prompt: Annotated[list[str | list[int]], WrapValidator(_prompts)] = [""]
  max_tokens: int | None = Field(None, ge=1, le=_INT_MAX)
  n: int = Field(1, ge=1, le=128)
  temperature: float = Field(1.0, ge=0, le=2)
  top_p: float = Field(1.0, ge=1e-6, le=1)
  top_k: int | None = Field(None, ge=1, le=_INT_MAX)
  min_p: float = Field(0.0, ge=0, le=1)
  repetition_penalty: float = Field(1.0, ge=0.01, le=100)
  logit_bias: dict[
    Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]
  ] = Field({}, max_length=sampling.MAX_BIASES)  # by token
  seed: int | None = Field(None, ge=0, le=_INT_MAX)
  stop: Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]], BeforeValidator(_listed)
  ] = Field([], max_length=16)
  stop_token_ids: list[int] = Field([], max_length=sampling.MAX_STOP_TOKENS)
  add_special_tokens: bool = True  # those that the tokenizer puts around a text, such as BOS
  priority: int = Field(0, ge=-_INT_MAX, le=_INT_MAX)
  logprobs: int | None = Field(None, ge=0, le=1)  # only of the drawn tokens
  stream: bool = False
  stream_options: dict[Literal["include_usage"], bool] | None = None
  user: str = ""
  # not supported, so only their neutral values
  best_of: Literal[1] = 1
  echo: Literal[False] = False
  frequency_penalty: float = Field(0.0, ge=0, le=0)
  presence_penalty: float = Field(0.0, ge=0, le=0)
  suffix: Literal[""] = ""


class Prompt(NamedTuple):
  """One prompt of a request, and how to go on from it."""

  tokens: tuple[int, ...]
  sampling: Sampling


def read(body: bytes, served: Served) -> tuple[CompletionRequest, list[Prompt]]:
  """The request in a body, and its prompts.

  Raises:
    Refusal: Something is wrong with it; the message names the field and its value.
  """
  try:
    fields = json.loads(body)
  except (ValueError, RecursionError) as error:
    raise Refusal(f"the body is not JSON: {error}") from None
  if not isinstance(fields, dict):
    raise Refusal(f"the body must be a JSON object, got {_brief(fields)}")
  present = {name: value for name, value in fields.items() if value is not None}
  try:
    request = CompletionRequest.model_validate(present)
  except pydantic.ValidationError as error:
    raise _refusal(error) from None
  served.check_name(request.model)
  num_prompts = len(request.prompt)
  if num_prompts * request.n > served.max_choices:
    message = f"n is {request.n} for {num_prompts} prompts, but {served.max_choices} choices"
    raise Refusal(f"{message} are the most", "n")
  if request.stream_options is not None and not request.stream:
    raise Refusal("stream_options must be absent unless stream is true", "stream_options")
  prompts = [_tokens(prompt, request, served) for prompt in request.prompt]
  return request, [Prompt(tokens, _sampling(tokens, request, served)) for tokens in prompts]


def _refusal(error: pydantic.ValidationError) -> Refusal:
  first = error.errors()[0]
  place = first["loc"]  # of the value: its field, and where in the field
  param = next((str(name) for name in place if name in CompletionRequest.model_fields), None)
  where = _brief(".".join(map(str, place)))
  return Refusal(f"{where}: {first['msg']}, got {_brief(first['input'])}", param)


def _tokens(prompt: str | list[int], request: CompletionRequest, served: Served) -> tuple[int, ...]:
  """The tokens of a prompt."""
  if isinstance(prompt, list):
    tokens = tuple(prompt)
  elif prompt and served.tokenizer is None:
    raise Refusal(f"prompt must be tokens for this model, got {_brief(prompt)}", "prompt")
  else:
    try:
      special = request.add_special_tokens
      tokens = prompt_lib.encode(served.tokenizer, prompt, special_tokens=special)
    except ValueError as error:
      raise Refusal(str(error), "prompt") from None
  if not tokens:
    raise Refusal(f"prompt is empty, got {_brief(prompt)}", "prompt")
  if len(tokens) >= served.max_length:
    message = f"prompt has {len(tokens)} tokens, but the model takes {served.max_length}"
    raise Refusal(f"{message}, new ones included", "prompt")
  served.check_tokens(tokens, "prompt")
  return tokens


def _sampling(tokens: tuple[int, ...], request: CompletionRequest, served: Served) -> Sampling:
  """How to go on from the tokens of a prompt."""
  room = served.max_length - len(tokens)
  max_tokens = request.max_tokens or min(16, room)  # OpenAI's default is 16
  if max_tokens > room:
    message = f"max_tokens is {max_tokens}, but a prompt of {len(tokens)} tokens leaves {room}"
    raise Refusal(message, "max_tokens")
  biases = {int(token): bias for token, bias in request.logit_bias.items()}
  served.check_tokens(biases, "logit_bias")
  served.check_tokens(request.stop_token_ids, "stop_token_ids")
  return Sampling(
    max_new_tokens=max_tokens,
    num_samples=request.n,
    temperature=request.temperature,
    top_k=request.top_k,
    top_p=request.top_p,
    min_p=request.min_p,
    repetition_penalty=request.repetition_penalty,
    logit_bias=biases,
    seed=secrets.randbits(30) if request.seed is None else request.seed,
    logprobs=None if request.logprobs is None else "model",
    stop_tokens=tuple(request.stop_token_ids),
    stop=tuple(request.stop),
  )


def _brief(value: Any) -> str:
  """A value as messages show it, however long it is."""
  return reprlib.repr(value)
