"""`paged-jax generate`: continues prompts, and writes their texts as they come."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tokenizers
import typer

from paged_jax import models
from paged_jax.cli import model as model_lib
from paged_jax.cli import progress
from paged_jax.cli.progress import Update
from paged_jax.engine import Engine, EngineConfig, Sampling
from paged_jax.engine import prompts as prompt_lib
from paged_jax.host import ManagerConfig
from paged_jax.models.decoder import Decoder

_MAX_NEW_TOKENS = 128  # unless another number is asked for, or fewer have room
_MAX_ROWS = 32  # samples at once, unless one prompt asks for more
_PROMPT_SIZES = (32, 128, 512)  # the smallest that takes all prompts, or the largest


def run(
  prompts: Annotated[list[str] | None, typer.Argument(help="Texts to continue.")] = None,
  prompts_file: Annotated[
    Path | None, typer.Option("--prompts", help="File with a prompt on each line.")
  ] = None,
  prompt_ids: Annotated[
    Path | None, typer.Option(help="JSON list of lists of tokens, used as they are.")
  ] = None,
  output_ids: Annotated[
    Path | None, typer.Option(help="JSON file for the new tokens, a list for each sample.")
  ] = None,
  model: model_lib.Folder = None,
  special_tokens: Annotated[
    bool, typer.Option(help="The tokenizer puts its own around a text, such as BOS.")
  ] = True,
  max_new_tokens: Annotated[
    int | None,
    typer.Option(help="Most tokens to add to a prompt; default: 128, or what has room."),
  ] = None,
  num_samples: Annotated[int, typer.Option(help="Continuations of each prompt.")] = 1,
  temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
  top_k: Annotated[int | None, typer.Option(help="Draw from this many tokens.")] = None,
  top_p: Annotated[float, typer.Option(help="Draw from the likely tokens of this mass.")] = 1.0,
  seed: Annotated[int, typer.Option(help="Sample i draws with SEED + i.")] = 0,
  stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
  page_size: model_lib.PageSize = None,
  num_pages: Annotated[
    int | None, typer.Option(min=1, help="Pages in the pool; default: enough.")
  ] = None,
  dtype: model_lib.Weights = None,
  kv_dtype: model_lib.KvDtypes = None,
) -> None:
  """Continues prompts: arguments, or lines of a file or of standard input.

  Text goes to standard output as it comes, a summary to standard error.
  """
  folder = model_lib.folder(model)
  tokenizer = models.tokenizer(folder)
  ids = _prompts(prompts, prompts_file, prompt_ids, tokenizer, special_tokens)
  if stop and (tokenizer is None or not all(stop)):
    raise ValueError("--stop needs a text, and a model with a tokenizer")
  wanted = Sampling(
    max_new_tokens=_MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
    num_samples=num_samples, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
    stop=tuple(stop or ()),
  )  # fmt: skip
  if output_ids:
    output_ids.touch()

  with progress.status("loading and compiling"):
    decoder = models.load(folder, dtype)
    kv_dtypes = model_lib.kv_dtypes(decoder, kv_dtype)
    page_size = page_size or models.default_page_size(*kv_dtypes)
    longest = _longest(decoder.config.max_length, page_size, num_pages)
    counts = _new_tokens(ids, max_new_tokens, *longest)
    requests = [
      (x, dataclasses.replace(wanted, max_new_tokens=n)) for x, n in zip(ids, counts, strict=True)
    ]
    engine = _engine(
      decoder, requests, kv_dtypes, page_size, num_pages, models.eos_tokens(folder), tokenizer
    )
    updates = progress.follow(engine, requests)
    last = next(updates)
    engine.warm_up(samplings=[sampling for _, sampling in requests])
  writer = Writer(_labels(len(ids), num_samples))
  for update in updates:
    print(writer.add(update), end="", flush=True)
    last = update
  if output_ids:
    output_ids.write_text(json.dumps(last.tokens) + "\n", encoding="utf-8")
  print(last.summary, file=sys.stderr)


@dataclasses.dataclass
class Writer:
  """Writes samples one after another, the first unfinished one as it grows."""

  labels: list[str]  # before each sample
  current: int = 0  # the sample being written
  num_written: int | None = None  # pieces of it; None: not even its label

  def add(self, update: Update) -> str:
    """What to write after an update."""
    added = ""
    while self.current < len(self.labels):
      pieces = update.texts[self.current]
      added += self.labels[self.current] if self.num_written is None else ""
      added += "".join(pieces[self.num_written or 0 :])
      self.num_written = len(pieces)
      if not update.done[self.current]:
        break
      added += "\n"
      self.current, self.num_written = self.current + 1, None
    return added


def _labels(num_prompts: int, num_samples: int) -> list[str]:
  """A line before each sample, if there are several."""
  if num_prompts * num_samples == 1:
    return [""]
  names = [f", sample {i + 1}" for i in range(num_samples)] if num_samples > 1 else [""]
  return [f"[prompt {i + 1}{name}]\n" for i in range(num_prompts) for name in names]


def _prompts(
  texts: list[str] | None,
  texts_file: Path | None,
  ids_file: Path | None,
  tokenizer: tokenizers.Tokenizer | None,
  special_tokens: bool,
) -> list[tuple[int, ...]]:
  """The tokens of each prompt, given as text or as tokens."""
  if ids_file is None:
    given = _read_texts(texts, texts_file)
    if tokenizer is None:
      raise ValueError("the model has no tokenizer.json; give tokens with --prompt-ids")
    ids = [prompt_lib.encode(tokenizer, text, special_tokens=special_tokens) for text in given]
  elif texts or texts_file:
    raise ValueError("give prompts as text or as tokens, not both")
  else:
    ids = _read_ids(ids_file)
  if () in ids:
    raise ValueError(f"prompt {ids.index(()) + 1} is empty")
  return ids


def _read_texts(prompts: list[str] | None, file: Path | None) -> list[str]:
  """The prompts as given, or else the lines of a file or of standard input."""
  if prompts and file:
    raise ValueError("give prompts as arguments or in a file, not both")
  if not prompts and file is None and sys.stdin.isatty():
    raise ValueError("no prompt: give one as an argument, in a file or on standard input")
  try:
    read = sys.stdin.buffer.read if file is None else file.read_bytes
    texts = prompts or prompt_lib.lines(read())
  except UnicodeDecodeError:
    raise ValueError(f"{file or 'standard input'} is not UTF-8 text") from None
  if not texts:
    raise ValueError(f"{file or 'standard input'} has no prompt")
  return texts


def _read_ids(file: Path) -> list[tuple[int, ...]]:
  """The lists of tokens in a JSON file."""
  try:
    ids = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{file} is not JSON: {error}") from None
  if not isinstance(ids, list) or not all(isinstance(prompt, list) for prompt in ids):
    raise ValueError(f"{file} must hold a list of lists")
  if strange := [token for prompt in ids for token in prompt if type(token) is not int]:
    raise ValueError(f"{file} must hold whole numbers, got {strange[0]!r}")
  if not ids:
    raise ValueError(f"{file} has no prompt")
  return [tuple(prompt) for prompt in ids]


def _longest(max_length: int, page_size: int, num_pages: int | None) -> tuple[int, str]:
  """Most tokens of a prompt and its new ones together, and what sets this limit."""
  model = max_length, "the model"
  if num_pages is None:
    return model
  # The last token is drawn, but never written into a page.
  return min(model, (num_pages * page_size + 1, f"--num-pages {num_pages}"))


def _new_tokens(
  prompts: list[tuple[int, ...]], asked: int | None, longest: int, limit: str
) -> list[int]:
  """How many tokens to add to each prompt, at most.

  As many as asked for; by default 128, or as many as have room, which a line then says.

  Raises:
    ValueError: A prompt has no room, or too little for the number asked for.
  """
  rooms = [longest - len(prompt) for prompt in prompts]
  least = min(rooms)
  number = rooms.index(least) + 1
  size = len(prompts[number - 1])
  if least < 1:
    raise ValueError(
      f"prompt {number} has {size} tokens, but {limit} takes {longest}, new ones included"
    )
  left = f"after prompt {number} of length {size}, {limit} has room for {least}"
  if asked is None:
    if least < _MAX_NEW_TOKENS:
      progress.say(f"fewer than {_MAX_NEW_TOKENS} new tokens: {left}")
    return [min(_MAX_NEW_TOKENS, room) for room in rooms]
  if asked > least:
    raise ValueError(f"--max-new-tokens is {asked}, but {left}")
  return [asked] * len(prompts)


def _engine(
  decoder: Decoder,
  requests: list[tuple[tuple[int, ...], Sampling]],
  kv_dtypes: tuple,
  page_size: int,
  num_pages: int | None,
  eos: Sequence[int],
  tokenizer: tokenizers.Tokenizer | None,
) -> Engine:
  """An engine on a cache with pages for all samples that can run at once."""
  num_samples = requests[0][1].num_samples
  at_once = max(1, min(len(requests), _MAX_ROWS // num_samples))
  lengths = [len(prompt) - 1 + sampling.max_new_tokens for prompt, sampling in requests]
  shared = [(len(prompt) - 1) // page_size for prompt, _ in requests]  # by all samples
  needs = sorted(s + num_samples * (-(-n // page_size) - s) for n, s in zip(lengths, shared))
  total = sum(len(prompt) for prompt, _ in requests)
  budget = next((size for size in _PROMPT_SIZES if size >= total), _PROMPT_SIZES[-1])
  config = models.cache_config(
    decoder.config,
    num_pages=sum(needs[-at_once:]) if num_pages is None else num_pages,
    num_rows=at_once * num_samples,
    page_size=page_size,
    max_length=max(lengths),
    dtype=kv_dtypes,
    step_tokens=budget,
  )
  options = ManagerConfig(0, swapping=False, prefix_cache=len(requests) > 1)
  with model_lib.memory_for(config):
    return Engine(
      decoder,
      EngineConfig(config, options, prompt_sizes=(budget,), eos=tuple(eos)),
      tokenizer=tokenizer,
    )
