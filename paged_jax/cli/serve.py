"""`paged-jax serve`: answers requests over HTTP in OpenAI's format."""

import gc
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from paged_jax import cache, groups, interrupts, models
from paged_jax.cli import model as model_lib
from paged_jax.cli import progress
from paged_jax.engine import Engine, EngineConfig
from paged_jax.host import ManagerConfig


def run(
  model: model_lib.Folder = None,
  name: Annotated[str | None, typer.Option(help="The model's; default: the folder's.")] = None,
  host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
  port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
  page_size: model_lib.PageSize = None,
  num_pages: Annotated[
    int | None, typer.Option(min=1, help="Pages in the pool, instead of --memory.")
  ] = None,
  memory: Annotated[
    float | None,
    typer.Option(min=0, help="Gigabytes for keys and values; default: enough, if there are."),
  ] = None,
  num_host_pages: Annotated[
    int, typer.Option(min=0, help="Pages in host memory, for samples that must wait.")
  ] = 512,
  num_rows: Annotated[int, typer.Option(min=1, help="Samples decoded at once.")] = 16,
  max_length: Annotated[
    int | None, typer.Option(min=2, help="Longest text in tokens; default: the model's.")
  ] = None,
  num_steps: Annotated[int, typer.Option(min=1, help="Tokens per sample and call.")] = 8,
  prompt_size: Annotated[
    list[int], typer.Option(min=1, help="Prompt tokens of a call; repeatable.")
  ] = [32, 128, 512],  # noqa: B006 (typer makes a list of its own)
  max_requests: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 256,
  dtype: model_lib.Weights = None,
  kv_dtype: model_lib.KvDtypes = None,
  attention: Annotated[
    str | None, typer.Option(help="Attention backend; default: the best that is right here.")
  ] = None,
  prefixes: Annotated[
    Path | None, typer.Option(help="Folder of computed prompts, loaded first and saved at the end.")
  ] = None,
) -> None:
  """Answers requests for completions over HTTP in OpenAI's format, until interrupted."""
  from paged_jax import server  # not earlier: it needs an extra of its own

  folder = model_lib.folder(model)
  name = name or folder.resolve().name
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  with socket.create_server((host, port), family=family) as listener:
    tokenizer = models.tokenizer(folder)
    with progress.status(f"loading {name}"):
      decoder = models.load(folder, dtype)
    kv_dtypes = model_lib.kv_dtypes(decoder, kv_dtype)
    page_size = page_size or models.default_page_size(*kv_dtypes)
    max_length = _max_length(max_length, decoder.config.max_length, page_size, num_pages)
    sizes = {"num_rows": num_rows, "page_size": page_size, "max_length": max_length}
    sizes |= {"dtype": kv_dtypes, "step_tokens": max(prompt_size)}
    config = _caches(decoder, num_pages, memory, sizes)
    options = EngineConfig(
      config, ManagerConfig(num_host_pages=num_host_pages), num_steps=num_steps,
      prompt_sizes=tuple(sorted({*prompt_size})), eos=models.eos_tokens(folder),
      implementation=attention,
    )  # fmt: skip
    engine = _engine(decoder, options, tokenizer, prefixes)
    gc.collect()
    gc.freeze()  # later collections skip what is here, so none stops the tokens for long
    application = server.app(engine, name, tokenizer=tokenizer, max_requests=max_requests)
    shown = f"[{host}]" if ":" in host else host
    print(f"{name} is at http://{shown}:{listener.getsockname()[1]}/v1", flush=True)
    try:
      server.run(application, listener)
    finally:
      engine.close()
      if prefixes is not None:
        _save(engine, prefixes)
  interrupts.end()


def _engine(
  decoder: models.Decoder, options: EngineConfig, tokenizer: Any, prefixes: Path | None
) -> Engine:
  """An engine that is compiled, with the prefixes of a folder."""
  with model_lib.memory_for(options.cache):
    engine = Engine(decoder, options, tokenizer=tokenizer)
  with progress.bar("compiling") as tell:
    engine.warm_up(tell)
  if prefixes is not None:
    loaded = engine.load_prefixes(prefixes)
    progress.say(f"{loaded.num_prefixes} prefixes loaded from {prefixes}")
    signal.signal(signal.SIGTERM, _exit)  # so that they are saved
  return engine


def _exit(number: int, frame: FrameType | None) -> None:
  """Ends the process as if by this signal, but not at once."""
  sys.exit(128 + number)


def _save(engine: Engine, folder: Path) -> None:
  """Saves the prefixes of an engine that is closed, and says how many, or why not."""
  try:
    saved = engine.save_prefixes(folder)
    progress.say(f"{saved.num_prefixes} prefixes saved in {folder}")
  except OSError as error:
    progress.say(f"prefixes are not saved: {error}")


def _caches(
  decoder: models.Decoder, num_pages: int | None, memory: float | None, sizes: dict[str, Any]
) -> model_lib.Configs:
  """The caches: of so many pages, in so much memory, or for rows of full length if there is room.

  Raises:
    ValueError: Pages and memory are asked for, or the memory is too small for one text.
  """
  if num_pages is not None and memory is not None:
    raise ValueError(f"give --num-pages or --memory, got {num_pages} and {memory}")
  whole = sizes["num_rows"] * -(-sizes["max_length"] // sizes["page_size"])
  config = models.cache_config(decoder.config, num_pages=num_pages or whole, **sizes)
  size = sum(each.num_pages * each.page_bytes for each in groups.each(cache.stored(config)))
  free = model_lib.free_bytes() if memory is None else int(memory * 1e9)
  if memory is not None or (num_pages is None and size > free):
    config = models.cache_config(decoder.config, memory_bytes=free, **sizes)
    progress.say(models.describe(config))
  return config


def _max_length(asked: int | None, longest: int, page_size: int, num_pages: int | None) -> int:
  """Most tokens of a text: as asked for; by default as many as the model and the pages hold.

  Raises:
    ValueError: They hold fewer than asked for.
  """
  if asked is not None and asked > longest:
    raise ValueError(f"--max-length is {asked}, but the model takes {longest}")
  wanted = longest if asked is None else asked
  held = wanted if num_pages is None else num_pages * page_size
  if held >= wanted:
    return wanted
  if asked is not None:
    raise ValueError(f"--max-length is {asked}, but --num-pages {num_pages} holds {held} tokens")
  progress.say(
    f"texts of {held} tokens at most: --num-pages {num_pages} holds fewer than {longest}"
  )
  return held
