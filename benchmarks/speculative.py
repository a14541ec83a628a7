"""How many drafted tokens are accepted, and how much faster is that?

The packaged model goes on greedily with passages of `--text FILE`, or with the demo's prompts, each
said twice. Prompt lookup drafts 2, 4 or 8 tokens, verified in one pass. `accepted_per_call`: tokens
drawn per row and pass of the model, 1 without drafts. `speedup`: new tokens per second over plain
decoding, with one row and with 8 at once. The texts are equal, or this script fails. A CPU is
limited by arithmetic, of which there is more with drafts: it gains with few rows alone.
"""

import pathlib
import statistics
import time

import measure  # first: it sets XLA's flags

from paged_jax import models
from paged_jax.cli.demo import PROMPTS
from paged_jax.engine import Engine, EngineConfig, PromptLookup, Sampling
from paged_jax.host import ManagerConfig

NEW_TOKENS, SIZE = 192, 16


def texts(path: pathlib.Path | None, count: int) -> list[list[int]]:
  """Tokens of `count` passages."""
  tokenizer = models.tokenizer(models.embedded())
  assert tokenizer is not None
  if path is None:
    passages = [prompt * 2 for prompt in PROMPTS] * count
  else:
    whole = path.read_text(encoding="utf-8")
    step = len(whole) // count
    passages = [whole[i * step : i * step + 600] for i in range(count)]
  return [tokenizer.encode(passage).ids[:200] for passage in passages[:count]]


def engine(model, rows: int, num_drafts: int) -> Engine:
  config = models.cache_config(
    model.config, num_pages=rows * 32, num_rows=rows, page_size=SIZE, max_length=512
  )
  drafter = PromptLookup(num_drafts) if num_drafts else None
  options = ManagerConfig(prefix_cache=False)
  return Engine(model, EngineConfig(config, options, prompt_sizes=(512,), drafter=drafter))


def run(e: Engine, prompts) -> tuple[float, list[list[int]]]:
  """Seconds, and the new tokens of each prompt."""
  began = time.perf_counter()
  done = e.generate(prompts, Sampling(max_new_tokens=NEW_TOKENS))
  return time.perf_counter() - began, [each[0].tokens for each in done]


def main():
  args = measure.arguments(
    __doc__.splitlines()[0], text=(pathlib.Path, None, "a text to go on with"),
    drafts=(str, "0,2,4,8", "drafted tokens, 0 = plain decoding, which comes first"),
  )  # fmt: skip
  model = models.load(models.embedded())
  rows, summary = [], {}
  for num_rows in (1, 8):
    prompts = texts(args.text, num_rows)
    engines = {int(k): engine(model, num_rows, int(k)) for k in args.drafts.split(",")}
    seconds, plain = {k: [] for k in engines}, run(engines[0], prompts)[1]
    for e in engines.values():
      e.warm_up()
      assert run(e, prompts)[1] == plain, "drafts changed a text"
    for _ in range(max(3, args.rounds // 3)):
      for k, e in engines.items():
        e.counts.row_steps = e.counts.drawn_tokens = 0
        seconds[k].append(run(e, prompts)[0])
    for k, e in engines.items():
      rows.append(
        {
          "rows": num_rows,
          "drafts": k,
          "accepted_per_call": e.counts.drawn_tokens / e.counts.row_steps,
          "speedup": statistics.median(seconds[0]) / statistics.median(seconds[k]),
        }
      )
    drafted = rows[1 - len(engines) :]
    best = max(drafted, key=lambda row: row["speedup"])
    summary[f"speedup_{num_rows}_rows"] = best["speedup"]
    summary[f"accepted_per_call_{num_rows}_rows"] = best["accepted_per_call"]
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
