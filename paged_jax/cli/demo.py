"""`paged-jax demo`: Shakespeare goes on in several ways at once, and the cache's pages are shown."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import rich.text
import tokenizers
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel

from paged_jax import models, viz
from paged_jax.cli import progress
from paged_jax.cli.progress import Update
from paged_jax.engine import Engine, EngineConfig, Sampling
from paged_jax.engine import prompts as prompt_lib
from paged_jax.host import ManagerConfig

PROMPTS = (
  "ROMEO:\nBut, soft! what light through yonder window breaks?\n"
  "It is the east, and Juliet is the sun.\n",
  "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n",
  "GLOUCESTER:\nNow is the winter of our discontent\nMade glorious summer by this sun of York;\n",
)
NUM_SAMPLES = (4, 2, 4)  # per prompt
FORKED = "prompts forked into samples"
PAGE_SIZE, NUM_PAGES, NUM_ROWS = 8, 96, 8


def run() -> None:
  """Continues three prompts in ten ways and shows the pages as they fill, fork and free."""
  console, folder = Console(), models.embedded()
  tokenizer = models.tokenizer(folder)
  if tokenizer is None:
    raise ValueError(f"{folder} has no tokenizer.json")
  prompts = [prompt_lib.encode(tokenizer, prompt) for prompt in PROMPTS]
  with console.status("loading and compiling"):
    updates = start(models.load(folder), tokenizer, prompts)
    last = next(updates)
  rows = last.rows
  with _screen(console) as show:
    for update in updates:
      copied = update.summary.copies > last.summary.copies
      before, rows = rows, update.rows
      happened = events(before, rows, copied)
      show(picture(update, ", ".join(happened)), happened)
      last = update
  console.print(PROMPTS[0] + "".join(last.texts[0]), markup=False, highlight=False)
  summary = last.summary
  if console.is_terminal:  # the time is mostly that of the pauses between pictures
    summary = f"{summary.num_tokens} tokens; {summary.sharing}"
  console.print(f"\n{len(last.texts)} texts: {summary}", highlight=False)
  console.print(f"{last.cache.num_free} of {NUM_PAGES} pages are free again", highlight=False)


def start(
  decoder: models.Decoder, tokenizer: tokenizers.Tokenizer, prompts: Sequence[Sequence[int]]
) -> Iterator[Update]:
  """Starts several samples of each prompt; each goes on to the end of its speech at most."""
  config = models.cache_config(
    decoder.config, num_pages=NUM_PAGES, num_rows=NUM_ROWS, page_size=PAGE_SIZE, max_length=256,
    dtype=decoder.embed_tokens.weight.dtype,
  )  # fmt: skip
  engine = Engine(
    decoder,
    EngineConfig(
      config,
      ManagerConfig(0, swapping=False, prefix_cache=False),
      num_steps=4,
      prompt_sizes=(128,),
    ),
    tokenizer=tokenizer,
  )
  samplings = [
    Sampling(
      max_new_tokens=100,
      num_samples=count,
      temperature=0.8,
      top_p=0.95,
      seed=100 * i,
      stop=("\n\n",),
    )
    for i, count in enumerate(NUM_SAMPLES)
  ]
  engine.warm_up(samplings=samplings)
  return progress.follow(engine, list(zip(prompts, samplings)))


def events(before: dict[int, int], after: dict[int, int], copied: bool) -> list[str]:
  """What happened to the pages, besides filling up, from one update's rows to the next one's."""
  happened = {
    FORKED: after.keys() - before.keys(),
    "shared pages copied on write": copied,
    "finished rows freed": before.keys() - after.keys(),
  }
  return [event for event, true in happened.items() if true]


def picture(update: Update, title: str) -> Panel:
  """The page map, and the end of each text in the colour of its row."""
  pages = viz.pages(update.cache)
  used, unshared = sum(page.refcount > 0 for page in pages), sum(len(page.rows) for page in pages)
  lines = [
    rich.text.Text.assemble(
      (f" {viz.label(row)} ", f"black on {viz.colour(row)}"),
      " " + " / ".join("".join(update.texts[sample]).splitlines())[-60:],
      no_wrap=True,
    )
    for row, sample in sorted(update.rows.items())
  ]
  caption = f"{used} of {len(pages)} pages in use, {unshared} without sharing"
  return Panel(
    Group(viz.page_map(update.cache), "", *lines), title=title or "decoding", subtitle=caption,
    width=80,
  )  # fmt: skip


@contextlib.contextmanager
def _screen(console: Console) -> Iterator[Callable[[Panel, list[str]], None]]:
  """A function that shows a picture with events.

  On a terminal each replaces the last; elsewhere only those with new kinds of events are printed.
  """
  seen: set[str] = set()

  def animate(panel, events):
    live.update(panel, refresh=True)
    time.sleep(0.6 if events else 0.15)

  def print_some(panel, events):
    if FORKED in events or set(events) - seen:
      console.print(panel)
    seen.update(events)

  if console.is_terminal:
    with Live(console=console, auto_refresh=False) as live:
      yield animate
  else:
    yield print_some
