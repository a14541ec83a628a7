"""What does a cache per group of layers save, and cost, where most layers see only a window?

A Gemma 3 keeps all tokens for one layer in six and the last 512 or 1,024 for the others; a gpt-oss
all for every second layer and 128 for the others. `uniform` is one cache that keeps all tokens for
all layers. Each ratio is the groups' over the uniform cache's.

`bytes_vs_uniform` (`..._27b`, `..._gpt_oss`): most bytes that the pages of a row of 8,192 tokens hold
while it grows, by pieces of 512 tokens and then token by token, counted by the ledger; `bytes_vs_bound`
is the worst of all over the arithmetic bound, in which a window of W tokens takes ceil((W-1)/T) + 1
pages of T. `_32k`: with 32,768 tokens.

`concurrency_vs_uniform`: most requests at once, and `running_vs_uniform` the mean over calls, by runs
of the engine in one memory budget. The model has the 26 layers of a Gemma 3 1B and everything else
small; all lengths are over 16: the window is 32, a page has 4 tokens. Requests have the lengths of
Azure's 2023 conversations (`--trace` its csv; drawn from its quantiles without), times 6: a text
has 8,200 tokens on average (before the division). `concurrency_vs_uniform_azure` has them as they are,
1,370 on average.

`decode_step_vs_uniform`: time of 8 decode steps in one program, 8 rows of 8,192 tokens, a Gemma 3 1B of
a quarter of the width, the median of pairs; `..._2k` with 2,048 tokens, `..._short` with 256, where no
window has passed anything.

`hit_rate_vs_uniform`: prompt tokens that the prefix cache has, by the manager, for Mooncake's hour of
conversations (`--mooncake` its jsonl, nothing without) one after the other, 16 of them at once, on the
memory of 2.1M tokens of a Gemma 3 1B. The trace says what a prompt has in common with others by blocks
of 512 tokens, so what is stored of a prompt are its whole blocks. The memory has room for the windows
of as many ends of prefixes as `--ends` says first; the table has the others.

`--checkpoint` names the folder of a checkpoint (a Gemma 3 270M): `greedy_equal` are the greedy tokens
behind a prompt of 1,500 that equal those of `transformers`, out of 64; the table has the pages that
each group held at the end.

`--parts` names what to run: bytes, engine, step, hits, checkpoint.
"""

import measure  # first: it sets XLA's flags

import jax  # isort: skip
import collections
import dataclasses
import functools
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import lengths
import numpy as np
from flax import nnx
from simulation import SCALE, units

import paged_jax
from paged_jax import models
from paged_jax.engine import Engine, EngineConfig, Sampling
from paged_jax.host import Manager, ManagerConfig, Request, errors
from paged_jax.ledger import HostLedger
from paged_jax.models import families

GEMMA = {"model_type": "gemma3_text", "num_hidden_layers": 26, "num_attention_heads": 4}
GEMMA |= {"num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512, "hidden_size": 1152}
LARGE = {"num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16}
LARGE |= {"head_dim": 128, "sliding_window": 1024, "hidden_size": 5376}
MODELS = {
  "Gemma 3 1B": families.read(GEMMA),
  "Gemma 3 27B": families.read(GEMMA | LARGE),
  "gpt-oss-20b": families.read({"model_type": "gpt_oss", "num_hidden_layers": 24}),
}
SMALL = MODELS["Gemma 3 1B"]
PIECE = 512  # tokens of a prompt that a step computes
PARTS = ("bytes", "engine", "step", "hits", "checkpoint")


# Bytes of a row


def most_bytes(caches, length: int) -> int:
  """Most bytes that a row's pages hold while it grows from a prompt to `length` tokens."""
  ledger, most = HostLedger(caches), 0
  prompt = length - 2 * PIECE
  for count in [PIECE] * (prompt // PIECE) + [1] * (length - prompt):
    ledger.extend(np.int32([count]))
    if ledger.lengths[0] > prompt:
      used = [cache.num_pages - book.num_free for cache, book in zip(caches, ledger.groups)]
      most = max(most, sum(n * cache.page_bytes for n, cache in zip(used, caches)))
  return most


def bound(caches, length: int) -> int:
  """The same by arithmetic."""
  total = 0
  for cache in caches:
    pages = -(-length // cache.page_size)
    if cache.window is not None:
      pages = min(pages, -(-(cache.window - 1) // cache.page_size) + 1)
    total += pages * cache.page_bytes
  return total


def bytes_of_rows() -> tuple[list[dict], dict]:
  rows = []
  for name, config in MODELS.items():
    for length in (2**13, 2**15):
      make = functools.partial(
        models.cache_config, config, num_pages=length // 16, num_rows=1, max_length=length
      )
      caches, uniform = make(), (make(uniform=True),)
      held, whole = most_bytes(caches, length), most_bytes(uniform, length)
      rows.append({
        "what": f"row of a {name}", "tokens": length, "MB": held / 2**20,
        "uniform MB": whole / 2**20, "over uniform": held / whole,
        "over bound": held / bound(caches, length),
      })  # fmt: skip
  ratios = [row["over uniform"] for row in rows]
  names = [
    f"bytes_vs_uniform{model}{length}"
    for model in ("", "_27b", "_gpt_oss")
    for length in ("", "_32k")
  ]
  worst = max((row["over bound"] for row in rows), key=lambda x: abs(x - 1))
  return rows, dict(zip(names, ratios)) | {"bytes_vs_bound": worst}


# Requests at once


class Load(NamedTuple):
  """Requests, and what there is to run them on."""

  times: int  # what Azure's lengths are multiplied with
  longest: int  # tokens of a text, and
  pool: int  # of a uniform cache, both over 16
  num_rows: int


LOADS = {"": Load(6, 2048, 4096, 44), "_azure": Load(1, 512, 1024, 24)}


def requests(path, count: int, load: Load) -> list[tuple[list[int], int]]:
  """Prompts of random tokens, and how many new ones each wants; lengths of the trace over 16."""
  rng = np.random.default_rng(1)
  drawn = np.maximum(1, lengths.azure(path)[:20_000] * load.times // SCALE)
  chosen = drawn[rng.choice(len(drawn), count, replace=False)]
  wanted = [(max(2, min(p, load.longest - 2)), o) for p, o in chosen.tolist()]
  return [(rng.integers(1, 60, p).tolist(), min(o, load.longest - p)) for p, o in wanted]


def at_once(uniform: bool, work, load: Load) -> dict:
  """The engine runs all requests, which are there at the start."""
  windows = tuple(w and w // SCALE for w in SMALL.windows)
  config = dataclasses.replace(
    SMALL, vocab_size=64, hidden_size=32, intermediate_size=64, num_heads=2, head_dim=16,
    windows=windows, attention_scale=None, max_length=load.longest,
  )  # fmt: skip
  make = functools.partial(
    models.cache_config, config, num_rows=load.num_rows, page_size=4, dtype="float32",
    step_tokens=PIECE // SCALE, prefix_ends=0,
  )  # fmt: skip
  whole = make(num_pages=load.pool // 4, uniform=True)
  caches = whole if uniform else make(memory_bytes=whole.num_pages * whole.page_bytes)
  options = ManagerConfig(num_host_pages=0, swapping=False, prefix_cache=False)
  engine = Engine(
    models.Decoder(config, rngs=nnx.Rngs(0)),
    EngineConfig(caches, options, prompt_sizes=(PIECE // SCALE,), preemption="recompute"),
  )
  handles = [engine.submit(p, Sampling(max_new_tokens=n)) for p, n in work]
  running = []
  while engine.step():
    running.append(engine.num_running)
  assert all(handle.done for handle in handles)
  return {
    "what": f"engine, {'uniform' if uniform else 'groups'}", "most at once": engine.counts.peak_running,
    "mean at once": float(np.mean(running)), "recomputed": engine.counts.recomputations,
    "calls": engine.counts.calls,
  }  # fmt: skip


def requests_at_once(path, count: int) -> tuple[list[dict], dict]:
  rows, found = [], {}
  for name, load in LOADS.items():
    work = requests(path, count, load)
    ours, uniform = (at_once(each, work, load) for each in (False, True))
    mean = SCALE * float(np.mean([len(prompt) + new for prompt, new in work]))
    rows += [each | {"tokens": mean} for each in (ours, uniform)]
    found |= {
      f"{what}_vs_uniform{name}": ours[column] / uniform[column]
      for what, column in (("concurrency", "most at once"), ("running", "mean at once"))
    }
  return rows, found


# Time of a step


STEP_ROWS, STEPS = 8, 8


@functools.partial(jax.jit, donate_argnames="cache")
def decode(decoder, cache, tokens):
  """Steps of all rows."""
  rows = jnp.arange(STEP_ROWS)

  def step(carry, _):
    cache, tokens = carry
    cache, _ = paged_jax.extend(cache, jnp.ones(STEP_ROWS, jnp.int32))
    plan = paged_jax.plan(cache, rows, paged_jax.groups.each(cache)[0].lengths - 1)
    hidden, cache = decoder(tokens, cache, plan)
    tokens = jnp.argmax(decoder.logits(hidden), axis=-1).astype(jnp.int32)
    return (cache, tokens), None

  return jax.lax.scan(step, (cache, tokens), length=STEPS)[0]


class Steps:
  """Decode steps behind `context` tokens."""

  def __init__(self, decoder, context: int, *, uniform: bool, rounds: int):
    longest = context + (rounds + 1) * STEPS
    caches = models.cache_config(
      decoder.config, num_pages=STEP_ROWS * -(-longest // 16), num_rows=STEP_ROWS,
      max_length=longest, dtype="float32", uniform=uniform,
    )  # fmt: skip
    self.decoder, self.cache = decoder, paged_jax.init(caches)
    self.tokens = jnp.arange(STEP_ROWS, dtype=jnp.int32)
    for at in range(0, context, PIECE):
      count = np.full(STEP_ROWS, min(PIECE, context - at), np.int32)
      self.cache, info = paged_jax.jitted.extend(self.cache, count)
      assert np.asarray(info.ok).all()

  def __call__(self):
    self.cache, self.tokens = decode(self.decoder, self.cache, self.tokens)
    return self.tokens


def time_of_steps(rounds: int) -> tuple[list[dict], dict]:
  config = dataclasses.replace(
    SMALL, vocab_size=8192, hidden_size=288, intermediate_size=1728, head_dim=64, max_length=2**15
  )
  decoder = models.Decoder(config, rngs=nnx.Rngs(0))
  rows, found = [], {}
  for name, context in {"": 2**13, "_2k": 2**11, "_short": 256}.items():
    steps = {
      what: Steps(decoder, context, uniform=what == "uniform", rounds=rounds)
      for what in ("groups", "uniform")
    }
    pairs = np.array([[measure.seconds(each) for each in steps.values()] for _ in range(rounds)])
    ratio = float(np.median(pairs[1:, 0] / pairs[1:, 1]))  # the first ones compile
    rows.append({
      "what": f"step of {STEP_ROWS} rows", "tokens": context, "over uniform": ratio,
      **{f"{name} ms": ms for name, ms in zip(steps, 1e3 * np.median(pairs[1:], axis=0) / STEPS)},
    })  # fmt: skip
    found[f"decode_step_vs_uniform{name}"] = ratio
  return rows, found


# Hits of the prefix cache


POOL, PAGE, RUNNING = 2**21, 64, 16
BLOCK = 512 // SCALE


def hit_rate(trace: lengths.Trace, *, uniform: bool, prefix_ends: int) -> dict:
  """The manager serves the requests of a trace; one of its tokens stands for 16 of theirs."""
  blocks = trace.blocks or []
  longest = max(units(prompt + output) for prompt, output in trace.tokens.tolist())
  windows = tuple(w and w // SCALE for w in SMALL.windows)
  config = dataclasses.replace(SMALL, head_dim=2, windows=windows, max_length=longest)
  make = functools.partial(
    models.cache_config, config, num_rows=2 * RUNNING, page_size=PAGE // SCALE, dtype="float32",
    step_tokens=128, prefix_ends=prefix_ends,
  )  # fmt: skip
  whole = make(num_pages=POOL // PAGE, uniform=True)
  caches = whole if uniform else make(memory_bytes=whole.num_pages * whole.page_bytes)
  options = ManagerConfig(num_host_pages=0, swapping=False, max_prefixes=len(blocks))
  manager = Manager(caches, options)
  alive, asked, hit = collections.deque(), 0, 0

  def begin(number, ids, prompt, output):
    known = np.array(ids[: prompt // 512], np.int32)
    tokens = (known[:, None] * BLOCK + np.arange(BLOCK, dtype=np.int32)).reshape(-1)
    own = np.full(units(prompt) - len(tokens), 2**30 + number, np.int32)
    handle = manager.allocate(Request(number, tokens=np.append(tokens, own), only_cached=True))
    alive.append(number)
    for end in (len(tokens), units(prompt + output)):
      while handle.num_tokens < end:
        manager.extend(handle, min(128, end - handle.num_tokens))
      if end == len(tokens) and end:
        manager.store_prefix(handle, tokens)
    return handle.num_cached * SCALE

  for number, (ids, (prompt, output)) in enumerate(zip(blocks, trace.tokens.tolist())):
    while len(alive) >= RUNNING:
      manager.deallocate(alive.popleft())
    while True:
      try:
        found = begin(number, ids, prompt, output)
        break
      except errors.OutOfPages:
        if len(alive) == 1:
          raise
        if alive[-1] == number:
          manager.deallocate(alive.pop())
        manager.deallocate(alive.popleft())
    asked, hit = asked + prompt, hit + found
  assert manager.audit().clean
  return {
    "what": "hits, uniform" if uniform else f"hits, {prefix_ends} ends kept",
    "pages": " + ".join(f"{x.num_pages:,}" for x in paged_jax.groups.each(caches)),
    "hit rate": hit / asked, "prefixes": manager.prefix_stats().entries,
  }  # fmt: skip


def hits(path, count: int, ends: list[int]) -> tuple[list[dict], dict]:
  if path is None:
    return [], {}
  trace = lengths.trace(path)
  trace = lengths.Trace(trace.times[:count], trace.tokens[:count], trace.blocks[:count])
  uniform = hit_rate(trace, uniform=True, prefix_ends=0)
  ours = [hit_rate(trace, uniform=False, prefix_ends=each) for each in ends]
  found = {"hit_rate": ours[0]["hit rate"]}
  found["hit_rate_vs_uniform"] = ours[0]["hit rate"] / uniform["hit rate"]
  return [uniform, *ours], found


# A checkpoint


def checkpoint(folder) -> tuple[list[dict], dict]:
  """Greedy tokens behind a prompt of 1,500, against `transformers`."""
  if folder is None:
    return [], {}
  import torch
  import transformers

  prompt_size, new_tokens = 1500, 64
  text = (pathlib.Path(__file__).parents[1] / "LICENSE").read_text()
  prompt = models.tokenizer(folder).encode(text).ids[:prompt_size]
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  want = theirs.generate(
    torch.tensor([prompt]), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
  )[0, prompt_size:].tolist()
  del theirs
  decoder = models.load(folder, "float32")
  caches = models.cache_config(
    decoder.config, num_pages=256, num_rows=1, max_length=prompt_size + new_tokens, dtype="float32",
    step_tokens=2 * PIECE,  # a row has the pages of its last piece until the next one
  )  # fmt: skip
  options = ManagerConfig(num_host_pages=0, swapping=False, prefix_cache=False)
  engine = Engine(decoder, EngineConfig(caches, options, prompt_sizes=(PIECE,)))
  handle = engine.submit(prompt, Sampling(max_new_tokens=new_tokens))
  held = []
  while engine.step():
    if alive := engine.manager.list_handles():
      held = [len(pages) for pages in alive[0].pages]
  (got,) = handle.tokens
  assert len(got) == new_tokens
  rows = [
    {"what": f"checkpoint, window {cache.window}", "layers": cache.num_layers, "pages": pages}
    for cache, pages in zip(caches, held)
  ]
  return rows, {"greedy_equal": sum(a == b for a, b in zip(want, got)), "greedy_tokens": len(want)}


def main():
  args = measure.arguments(
    __doc__.splitlines()[0],
    trace=(pathlib.Path, None, "csv of Azure's trace"),
    mooncake=(pathlib.Path, None, "jsonl of Mooncake's trace"),
    checkpoint=(pathlib.Path, None, "folder of a checkpoint"),
    requests=(int, 150, "how many for the engine"),
    prompts=(int, 10**9, "only the first ones of Mooncake's trace"),
    ends=(str, "1000", "windows of prefix ends that the memory has room for"),
    parts=(str, ",".join(PARTS), "what to run"),
  )
  run = {
    "bytes": bytes_of_rows,
    "engine": lambda: requests_at_once(args.trace, args.requests),
    "step": lambda: time_of_steps(args.rounds),
    "hits": lambda: hits(args.mooncake, args.prompts, [int(x) for x in args.ends.split(",")]),
    "checkpoint": lambda: checkpoint(args.checkpoint),
  }
  rows, summary = [], {}
  for part in args.parts.split(","):
    more, found = run[part]()
    rows += more
    summary |= found
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
