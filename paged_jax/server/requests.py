"""What clients ask: a JSON body, checked field by field, or the reason why it is refused."""

import dataclasses
import json
import re
import reprlib
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

import tokenizers

from paged_jax.engine import Engine, Sampling, sampling
from paged_jax.engine import prompts as prompt_lib

_MAX_STOPS, _MAX_STOP_CHARS, _MAX_BIAS, _DEFAULT_MAX_TOKENS = 16, 256, 100, 16
_INT_MAX = 2**31 - 1


class Refusal(Exception):
  """Why a client gets no answer: OpenAI's error object, and its status."""

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
    cache = self.engine.config.cache
    return min(cache.max_length, cache.num_pages * cache.page_size)

  def check_name(self, name: Any) -> None:
    """Refuses any other model, and none."""
    if not name:
      raise Refusal("you must provide a model parameter", "model")
    if name != self.name:
      message = f"there is no model {_brief(name)}, only {self.name!r}"
      raise Refusal(message, "model", status=404, code="model_not_found")


class Question(NamedTuple):
  """A request for completions, once checked."""

  prompts: list[tuple[int, ...]]
  samplings: list[Sampling]  # of each prompt
  priority: int
  logprobs: bool
  stream: bool
  include_usage: bool


class _Field(NamedTuple):
  meaning: str  # what it must be
  fits: Callable[[Any], bool]


def _whole(least: int, most: int) -> _Field:
  return _Field(
    f"a whole number from {least} to {most}",
    lambda value: type(value) is int and least <= value <= most,
  )


def _number(least: float, most: float) -> _Field:
  return _Field(
    f"a number from {least} to {most}",
    lambda value: type(value) in (int, float) and least <= value <= most,
  )


def _unsupported(neutral: Any) -> _Field:
  meaning = f"absent or {json.dumps(neutral)}, for it is not supported"
  return _Field(meaning, lambda value: value == neutral)


def _are_tokens(value: Any) -> bool:
  return isinstance(value, list) and all(type(token) is int for token in value)


def _are_stops(value: Any) -> bool:
  stops = [value] if isinstance(value, str) else value
  return (
    isinstance(stops, list)
    and len(stops) <= _MAX_STOPS
    and all(isinstance(stop, str) and 0 < len(stop) <= _MAX_STOP_CHARS for stop in stops)
  )


def _are_biases(value: Any) -> bool:
  return (
    isinstance(value, dict)
    and len(value) <= sampling.MAX_BIASES
    and all(re.fullmatch("[0-9]{1,9}", token) for token in value)
    and all(map(_number(-_MAX_BIAS, _MAX_BIAS).fits, value.values()))
  )


_FLAG = _Field("true or false", lambda value: isinstance(value, bool))
_FIELDS = {
  "model": _Field("the name of a model", lambda value: isinstance(value, str)),
  "prompt": _Field(
    "a text, tokens, or a list of either",
    lambda value: isinstance(value, str) or _are_tokens(value)
    or (isinstance(value, list) and all(isinstance(x, str) or _are_tokens(x) for x in value)),
  ),
  "max_tokens": _whole(1, _INT_MAX),
  "n": _whole(1, 128),
  "temperature": _number(0, 2),
  "top_p": _number(1e-6, 1),
  "top_k": _whole(1, _INT_MAX),
  "min_p": _number(0, 1),
  "repetition_penalty": _number(0.01, 100),
  "logit_bias": _Field(
    f"a number from -{_MAX_BIAS} to {_MAX_BIAS} for each of at most {sampling.MAX_BIASES} tokens",
    _are_biases,
  ),
  "seed": _whole(0, _INT_MAX),
  "stop": _Field(
    f"at most {_MAX_STOPS} texts of 1 to {_MAX_STOP_CHARS} characters", _are_stops
  ),
  "stop_token_ids": _Field(
    f"at most {sampling.MAX_STOP_TOKENS} tokens",
    lambda value: _are_tokens(value) and len(value) <= sampling.MAX_STOP_TOKENS,
  ),
  "add_special_tokens": _FLAG,  # those that the tokenizer puts around a text, such as BOS
  "priority": _whole(-_INT_MAX, _INT_MAX),
  "logprobs": _whole(0, 1),  # of the tokens drawn; those of others are not known
  "stream": _FLAG,
  "stream_options": _Field(
    "an object with include_usage, true or false",
    lambda value: isinstance(value, dict) and value.keys() <= {"include_usage"}
    and all(map(_FLAG.fits, value.values())),
  ),
  "user": _Field("a text", lambda value: isinstance(value, str)),
  "best_of": _unsupported(1),
  "echo": _unsupported(False),
  "frequency_penalty": _unsupported(0),
  "presence_penalty": _unsupported(0),
  "suffix": _unsupported(""),
}  # fmt: skip


def read(body: bytes, served: Served) -> Question:
  """The question in a body.

  Raises:
    Refusal: Something is wrong with it; the message names the field and its value.
  """
  fields = _fields(body)
  served.check_name(fields.get("model"))
  prompts = _prompts(fields.get("prompt", ""), served, fields.get("add_special_tokens", True))
  num_samples, stream = fields.get("n", 1), fields.get("stream", False)
  if len(prompts) * num_samples > served.max_choices:
    message = f"n is {num_samples} for {len(prompts)} prompts, but {served.max_choices} choices"
    raise Refusal(f"{message} are the most", "n")
  if "stream_options" in fields and not stream:
    raise Refusal("stream_options must be absent unless stream is true", "stream_options")
  return Question(
    prompts,
    [_sampling(fields, prompt, served) for prompt in prompts],
    priority=fields.get("priority", 0),
    logprobs="logprobs" in fields,
    stream=stream,
    include_usage=fields.get("stream_options", {}).get("include_usage", False),
  )


def _fields(body: bytes) -> dict[str, Any]:
  """The fields of a JSON object that are not null, each as it must be."""
  try:
    fields = json.loads(body)
  except (ValueError, RecursionError) as error:
    raise Refusal(f"the body is not JSON: {error}") from None
  if not isinstance(fields, dict):
    raise Refusal(f"the body must be a JSON object, got {_brief(fields)}")
  fields = {name: value for name, value in fields.items() if value is not None}
  for name, value in fields.items():
    if name not in _FIELDS:
      raise Refusal(f"there is no field {_brief(name)}, got {_brief(value)} for it")
    meaning, fits = _FIELDS[name]
    if not fits(value):
      raise Refusal(f"{name} must be {meaning}, got {_brief(value)}", name)
  return fields


def _prompts(value: str | list, served: Served, special: bool) -> list[tuple[int, ...]]:
  """Tokens of each prompt; for a text, with the tokenizer's own around it if `special`."""
  several = isinstance(value, list) and value and not isinstance(value[0], int)
  prompts = []
  for prompt in value if several else [value]:
    tokens = _encode(prompt, served, special) if isinstance(prompt, str) else tuple(prompt)
    if not tokens:
      raise Refusal(f"prompt is empty, got {_brief(value)}", "prompt")
    if len(tokens) >= served.max_length:
      message = f"prompt has {len(tokens)} tokens, but the model takes {served.max_length}"
      raise Refusal(f"{message}, new ones included", "prompt")
    prompts.append(_known("prompt", tokens, served))
  return prompts


def _encode(text: str, served: Served, special: bool) -> tuple[int, ...]:
  if text and served.tokenizer is None:
    raise Refusal(f"prompt must be tokens for this model, got {_brief(text)}", "prompt")
  try:
    return prompt_lib.encode(served.tokenizer, text, special_tokens=special)
  except ValueError as error:
    raise Refusal(str(error), "prompt") from None


def _known(name: str, tokens: tuple[int, ...], served: Served) -> tuple[int, ...]:
  """The tokens of a field, if they are in the vocabulary."""
  size = served.engine.vocab_size
  for token in tokens:
    if not 0 <= token < size:
      raise Refusal(f"{name} has token {_brief(token)}, but the vocabulary has {size}", name)
  return tokens


def _sampling(fields: dict[str, Any], prompt: tuple[int, ...], served: Served) -> Sampling:
  room = served.max_length - len(prompt)
  max_tokens = fields.get("max_tokens", min(_DEFAULT_MAX_TOKENS, room))
  if max_tokens > room:
    message = f"max_tokens is {max_tokens}, but a prompt of {len(prompt)} tokens leaves {room}"
    raise Refusal(message, "max_tokens")
  biases = {int(token): bias for token, bias in fields.get("logit_bias", {}).items()}
  _known("logit_bias", tuple(biases), served)
  stop = fields.get("stop", [])
  return Sampling(
    max_new_tokens=max_tokens,
    num_samples=fields.get("n", 1),
    temperature=fields.get("temperature", 1.0),
    top_k=fields.get("top_k"),
    top_p=fields.get("top_p", 1.0),
    min_p=fields.get("min_p", 0.0),
    repetition_penalty=fields.get("repetition_penalty", 1.0),
    logit_bias=biases,
    seed=fields.get("seed", secrets.randbits(30)),
    stop_tokens=_known("stop_token_ids", tuple(fields.get("stop_token_ids", ())), served),
    stop=(stop,) if isinstance(stop, str) else tuple(stop),
  )


def _brief(value: Any) -> str:
  """A value as messages show it, however long it is."""
  return reprlib.repr(value)
