"""How long does the first request wait after a restart, with and without stored prefixes?

Each turn is a process of its own whose programs were compiled before: it builds an engine, warms up,
and then gets one request. `cold`: nothing is stored. `common`: the beginning of the prompt, all but
its last 16 tokens, is one that another process has saved. `exact`: the whole prompt and its logits
are. `..._s` are medians of seconds from the request to its first token, `load_s` of
`engine.load_prefixes`, the digest of the weights included; `..._speedup` compares with `cold`, and
`common_speedup_with_load` counts the load as well.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import measure  # first: it sets XLA's flags

import jax  # isort: skip
import numpy as np

from paged_jax import models
from paged_jax.engine import Engine, EngineConfig, Sampling

QUESTION = 16  # last tokens of the prompt
TURNS = ("cold", "common", "exact")


def first_token(engine: Engine, prompt: list[int]) -> float:
  """Seconds from the request to its first token."""
  begin = time.perf_counter()
  handle = engine.submit(prompt, Sampling(max_new_tokens=1))
  while not handle.tokens[0]:
    engine.step()
  return time.perf_counter() - begin


def turn(name: str, model: pathlib.Path, num_tokens: int, folder: pathlib.Path) -> dict:
  """What one process measures; `fill` is the one that saves."""
  jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  decoder = models.load(model)
  config = models.cache_config(
    decoder.config, num_rows=4, max_length=num_tokens + 16, step_tokens=512,
    dtype=decoder.embed_tokens.weight.dtype, num_pages=8 * -(-num_tokens // 16),
  )  # fmt: skip
  engine = Engine(decoder, EngineConfig(config))
  engine.warm_up()
  tokens = np.random.default_rng(0).integers(decoder.config.vocab_size, size=num_tokens + QUESTION)
  prompt = tokens[:num_tokens].tolist()
  other = tokens[: num_tokens - QUESTION].tolist() + tokens[num_tokens:].tolist()
  if name == "fill":
    engine.generate([prompt], Sampling(max_new_tokens=1))
    begin = time.perf_counter()
    saved = engine.save_prefixes(folder / "prefixes")
    return {"save_s": time.perf_counter() - begin, "megabytes": saved.num_bytes / 1e6}
  begin = time.perf_counter()
  found = {} if name == "cold" else {"loaded": engine.load_prefixes(folder / "prefixes")[0]}
  load = {} if name == "cold" else {"load_s": time.perf_counter() - begin}
  seconds = first_token(engine, other if name == "common" else prompt)
  assert engine.counts.cached_tokens == {"cold": 0, "common": num_tokens - QUESTION}.get(
    name, num_tokens
  )
  return {"turn": name, "first_token_s": seconds} | load | found


def process(*argv: object) -> dict:
  """The last line of this script in a process of its own."""
  command = [sys.executable, __file__, *map(str, argv)]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def main():
  args = measure.arguments(
    __doc__.splitlines()[0],
    model=(pathlib.Path, models.embedded(), "checkpoint folder; default: the embedded model's"),
    tokens=(int, 448, "of the prompt"),
    turn=(str, "", "what a process of its own does"),
    folder=(pathlib.Path, None, "of its programs and prefixes"),
  )
  if args.turn:
    print(json.dumps(turn(args.turn, args.model, args.tokens, args.folder)))
    return
  with tempfile.TemporaryDirectory() as folder:
    fixed = f"--model={args.model}", f"--tokens={args.tokens}", f"--folder={folder}"
    filled = process("--turn=fill", *fixed)
    for name in TURNS:  # programs that only they need are compiled, too
      process(f"--turn={name}", *fixed)
    rows = [
      process(f"--turn={name}", *fixed) for _ in range(max(1, args.rounds // 5)) for name in TURNS
    ]
  seconds = {
    name: statistics.median(row["first_token_s"] for row in rows if row["turn"] == name)
    for name in TURNS
  }
  load = statistics.median(row["load_s"] for row in rows if "load_s" in row)
  summary = {
    "model": os.path.basename(os.path.abspath(args.model)),
    "prompt_tokens": args.tokens,
    **{f"{name}_s": value for name, value in seconds.items()},
    "load_s": load,
    **filled,
    "common_speedup": seconds["cold"] / seconds["common"],
    "exact_speedup": seconds["cold"] / seconds["exact"],
    "common_speedup_with_load": seconds["cold"] / (seconds["common"] + load),
  }
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
