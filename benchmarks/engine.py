"""Continuous batching on pages against dense caches of maximum length, at equal KV memory.

The packaged model; requests with the lengths of Azure's 2023 conversations over 16 (`--trace` its
csv; drawn from its quantiles without), all there at the start; KV memory of 8 dense rows of 512
tokens (8,192 of the trace). `static`: dense rows, a batch runs until its last sample ends, as Flax,
Gemma and Tunix loops do. `continuous`: dense rows, a row is refilled when its sample ends. `ours`:
the engine, pages of 16. All prefill prompts alone or in pieces of the same compiled sizes and decode
8 steps per dispatch. `--transformers` adds Hugging Face's continuous batching in torch, if it is
installed: the same weights, requests, page size and number of pages, in bfloat16 like ours.

`concurrency_vs_dense`: most requests at once over dense rows. `vs_static_dense`,
`vs_continuous_dense`: new tokens per second over theirs. `bookkeeping_share`: what all of the host's
work adds, as a part of the time: 1 - (seconds of the same device programs and verbs, recorded and
dispatched again back to back) / (seconds of the engine), the median of pairs of runs. TTFT and TPOT
(seconds to the first token, and per token after it) count from the start of the run.

What requests cost that only wait, on a model that computes nothing, in CPU time of the thread that does
the rounds (`--queue 1` measures this alone): `queue_growth` is a round before which 50,000 wait, over
one with 100, in turns, the worse of prompts that all differ and of prompts that begin alike (asked to
be at most 1.2); `cancel_50k_s` is to cancel 50,000 and to run until nothing is left (at most 1).
"""

import measure  # first: it sets XLA's flags

import jax  # isort: skip
import functools
import os
import pathlib
import time

import jax.numpy as jnp
import lengths
import numpy as np
import tape

import paged_jax
from paged_jax import models
from paged_jax.engine import Engine, EngineConfig, Sampling
from paged_jax.host import ManagerConfig
from paged_jax.testing.counting import Counting

SCALE, LONGEST, DENSE_ROWS, SIZE, ROWS, STEPS = 16, 512, 8, 16, 64, 8
PROMPT_SIZES = (32, 128, 512)


def requests(path, count: int) -> list[tuple[list[int], int]]:
  """Prompts of random tokens, and how many new ones each wants."""
  rng = np.random.default_rng(1)
  drawn = np.maximum(1, lengths.azure(path)[:20_000] // SCALE)
  chosen = drawn[rng.choice(len(drawn), count, replace=False)]
  wanted = [(max(2, min(p, LONGEST - 2)), o) for p, o in chosen.tolist()]
  return [(rng.integers(1, 500, p).tolist(), min(o, LONGEST - p)) for p, o in wanted]


class Dense:
  """A cache [L,S,X,H,D] of keys and of values, one row of maximum length per sequence."""

  def __init__(self, model):
    config = model.config
    shape = (config.num_layers, DENSE_ROWS, LONGEST, config.num_kv_heads, config.head_dim)
    self.model, self.shape = model, shape
    self.reset()

  def reset(self):
    dtype = self.model.embed_tokens.weight.dtype
    self.kv = (jnp.zeros(self.shape, dtype), jnp.zeros(self.shape, dtype))
    self.tokens = jnp.zeros(DENSE_ROWS, jnp.int32)
    self.positions = jnp.zeros(DENSE_ROWS, jnp.int32)
    self.remaining = jnp.zeros(DENSE_ROWS, jnp.int32)

  def begin(self, row: int, prompt: list[int], new_tokens: int) -> None:
    body = prompt[:-1]
    size = next(size for size in PROMPT_SIZES if size >= len(body))
    padded = np.zeros(size, np.int32)
    padded[: len(body)] = body
    self.kv = prefill(self.model, self.kv, jnp.int32(row), padded)
    self.tokens = self.tokens.at[row].set(prompt[-1])
    self.positions = self.positions.at[row].set(len(body))
    self.remaining = self.remaining.at[row].set(new_tokens)

  def decode(self) -> np.ndarray:
    """Up to so many steps for all rows; new tokens i32[K,S], -1 where none was drawn."""
    self.kv, self.tokens, self.positions, self.remaining, drawn = decode(
      self.model, self.kv, self.tokens, self.positions, self.remaining
    )
    return np.asarray(drawn)


@functools.partial(jax.jit, donate_argnums=1)
def prefill(model, kv, row, tokens):
  def attend(kv, layer, window, q, k, v):
    del window
    kv = tuple(
      jax.lax.dynamic_update_slice(x, new[None, None].astype(x.dtype), (layer, row, 0, 0, 0))
      for x, new in zip(kv, (k, v))
    )
    return jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0], kv

  return model._run(tokens, jnp.arange(len(tokens)), attend, kv)[1]


@functools.partial(jax.jit, donate_argnums=1)
def decode(model, kv, tokens, positions, remaining):
  rows = jnp.arange(DENSE_ROWS)

  def step(state):
    kv, tokens, positions, remaining, drawn, n = state
    active = remaining > 0

    def attend(kv, layer, window, q, k, v):
      del window
      at = jnp.where(active, positions, LONGEST)
      kv = tuple(x.at[layer, rows, at].set(new, mode="drop") for x, new in zip(kv, (k, v)))
      keys, values = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in kv)
      heads = jax.nn.dot_product_attention(
        q[:, None], keys, values, key_value_seq_lengths=positions + 1
      )
      return heads[:, 0], kv

    hidden, kv = model._run(tokens, positions, attend, kv)
    new = jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32)
    tokens = jnp.where(active, new, tokens)
    drawn = drawn.at[n].set(jnp.where(active, new, -1))
    positions = positions + active
    return kv, tokens, positions, remaining - active, drawn, n + 1

  def unfinished(state):
    return (state[-1] < STEPS) & jnp.any(state[3] > 0)

  drawn = jnp.full((STEPS, DENSE_ROWS), -1, jnp.int32)
  state = (kv, tokens, positions, remaining, drawn, jnp.int32(0))
  return jax.lax.while_loop(unfinished, step, state)[:-1]


def run_dense(dense: Dense, work, *, continuous: bool) -> dict:
  """All requests, in rows of maximum length."""
  dense.reset()
  began, waiting, running = time.perf_counter(), list(range(len(work))), {}
  times = [[] for _ in work]
  while waiting or running:
    if continuous or not running:
      for row in sorted(set(range(DENSE_ROWS)) - set(running))[: len(waiting)]:
        running[row] = waiting.pop(0)
        dense.begin(row, *work[running[row]])
    drawn = dense.decode()
    now = time.perf_counter() - began
    for row, number in list(running.items()):
      times[number] += [now] * int((drawn[:, row] >= 0).sum())
      if len(times[number]) == work[number][1]:
        del running[row]
  seconds = time.perf_counter() - began
  return summary(times, seconds) | {"most_at_once": DENSE_ROWS, "seconds": seconds}


def run_engine(engine: Engine, work) -> dict:
  began = time.perf_counter()
  engine.counts.peak_running = 0
  times = [[] for _ in work]

  def on_token(number, nth, tokens, logprobs):
    times[number].extend([time.perf_counter() - began] * len(tokens))

  for number, (prompt, new_tokens) in enumerate(work):
    told = functools.partial(on_token, number)
    engine.submit(prompt, Sampling(max_new_tokens=new_tokens), on_token=told)
  while engine.step():
    pass
  seconds = time.perf_counter() - began
  return summary(times, seconds) | {
    "most_at_once": engine.counts.peak_running, "seconds": seconds
  }  # fmt: skip


class Line:
  """An engine before which a number of requests wait."""

  def __init__(self, count: int, *, alike: bool):
    cache = paged_jax.CacheConfig(
      num_layers=1, num_kv_heads=1, head_dim=8, page_size=4, num_pages=64, num_rows=8, max_length=48,
      dtype="float32",
    )  # fmt: skip
    config = EngineConfig(cache, num_steps=4, prompt_sizes=(16,))
    self.engine, self.count, self.alike = Engine(Counting(), config), count, alike
    self.handles = []
    self.engine.warm_up()

  def prompt(self) -> list[int]:
    n = len(self.handles)
    beginning = [1] * 4 if self.alike else [n // 60**i % 60 for i in range(4)]
    return [*beginning, 5, n % 60]

  def round(self) -> float:
    """Seconds of a round; the line is made full before."""
    while self.engine.num_waiting < self.count:
      self.handles.append(self.engine.submit(self.prompt(), Sampling(max_new_tokens=8)))
    began = time.thread_time()
    self.engine.step()
    return time.thread_time() - began

  def cancel(self) -> float:
    """Seconds until all who wait, and run, are gone."""
    going = [handle for handle in self.handles if not handle.done]
    began = time.thread_time()
    for handle in going:
      handle.cancel()
    while self.engine.step():
      pass
    seconds = time.thread_time() - began
    assert all(handle.done for handle in going) and len(going) >= self.count
    return seconds


def waiting(rounds: int) -> tuple[list[dict], dict]:
  """What requests cost that wait: a row for each kind, and the summary."""
  rows, cancels = [], []
  for alike in (False, True):
    few, many = Line(100, alike=alike), Line(50_000, alike=alike)
    times = [(few.round(), many.round()) for _ in range(30 + rounds)][30:]
    few_ms, many_ms = (1e3 * float(np.median(each)) for each in zip(*times))
    cancels.append(many.cancel())
    rows.append({
      "what": "alike" if alike else "distinct", "ms at 100": few_ms, "ms at 50,000": many_ms,
      "growth": many_ms / few_ms, "cancel 50,000 s": cancels[-1],
    })  # fmt: skip
  growth = max(row["growth"] for row in rows)
  return rows, {"queue_growth": growth, "cancel_50k_s": float(np.median(cancels))}


def run_transformers(work) -> dict:
  """Hugging Face's continuous batching of the same requests."""
  import torch
  import transformers

  torch.set_num_threads(os.cpu_count() or 1)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    models.embedded(), dtype=torch.bfloat16, attn_implementation="sdpa"
  )
  config = transformers.ContinuousBatchingConfig(
    page_size=SIZE, num_blocks=DENSE_ROWS * LONGEST // SIZE, max_batch_tokens=PROMPT_SIZES[-1],
    max_requests_per_batch=ROWS, allow_block_sharing=False,
  )  # fmt: skip
  greedy = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
  manager = model.init_continuous_batching(greedy, config)
  manager.start()
  began = time.perf_counter()
  for prompt, new_tokens in work:
    manager.add_request(prompt, max_new_tokens=new_tokens)
  tokens = sum(len(manager.get_result(timeout=600).generated_tokens) for _ in work)
  seconds = time.perf_counter() - began
  manager.stop(block=True)
  return {"tokens_per_s": tokens / seconds, "seconds": seconds}


def summary(times, seconds: float) -> dict:
  first = [each[0] for each in times]
  later = [(each[-1] - each[0]) / (len(each) - 1) for each in times if len(each) > 1]
  percent = {f"{name}_p{p}": float(np.percentile(x, p))
             for name, x in (("ttft", first), ("tpot", later)) for p in (50, 99)}  # fmt: skip
  return {"tokens_per_s": sum(map(len, times)) / seconds} | percent


def main():
  args = measure.arguments(
    __doc__.splitlines()[0],
    trace=(pathlib.Path, None, "csv of the trace"),
    requests=(int, 200, "how many"),
    transformers=(int, 0, "runs of Hugging Face's continuous batching, 0 for none"),
    queue=(int, 0, "1 to measure only what requests cost that wait"),
  )
  queue_rows, queue = waiting(20 * args.rounds)
  if args.queue:
    measure.report(queue_rows, queue, as_json=args.json)
    return
  model = models.load(models.embedded())
  work = requests(args.trace, args.requests)
  config = models.cache_config(
    model.config, num_pages=DENSE_ROWS * LONGEST // SIZE, num_rows=ROWS, page_size=SIZE,
    max_length=LONGEST,
  )  # fmt: skip
  options = ManagerConfig(prefix_cache=False)
  engine = Engine(model, EngineConfig(config, options, num_steps=STEPS, prompt_sizes=PROMPT_SIZES))
  engine.warm_up()
  dense = Dense(model)
  run_engine(engine, work)  # compiles what is left
  recording = tape.record(engine, lambda: run_engine(engine, work))
  contenders = {
    "ours": lambda: run_engine(engine, work),
    "bare": lambda: {"seconds": recording.seconds()},
    "static": lambda: run_dense(dense, work, continuous=False),
    "continuous": lambda: run_dense(dense, work, continuous=True),
  }
  runs = {name: [] for name in contenders}
  for turn in range(1 + max(3, args.rounds // 3)):
    for name in (*("ours", "bare") * 6, "static", "continuous"):
      result = contenders[name]()
      if turn:  # the first one compiles
        runs[name].append(result)
  if args.transformers:
    runs["transformers"] = [run_transformers(work) for _ in range(1 + args.transformers)][1:]
  median = {
    name: {key: float(np.median([r[key] for r in each])) for key in each[0]}
    for name, each in runs.items()
  }
  ours = median["ours"]
  shares = [1 - bare["seconds"] / own["seconds"] for own, bare in zip(runs["ours"], runs["bare"])]
  report = {
    "concurrency_vs_dense": ours["most_at_once"] / DENSE_ROWS,
    "vs_static_dense": ours["tokens_per_s"] / median["static"]["tokens_per_s"],
    "vs_continuous_dense": ours["tokens_per_s"] / median["continuous"]["tokens_per_s"],
    "bookkeeping_share": float(np.median(shares)),
  } | queue
  if args.transformers:
    theirs = median["transformers"]["tokens_per_s"]
    report["vs_transformers"] = ours["tokens_per_s"] / theirs
  rows = [{"what": name} | each for name, each in median.items()] + queue_rows
  measure.report(rows, report, as_json=args.json)


if __name__ == "__main__":
  main()
