"""Does a long text cost the host more per token than a short one?

One row, a model that computes next to nothing, stops that never come, log-probabilities and streamed
pieces as the server tells them. For each length: CPU time of the thread that does the rounds, per new
token, over that of a text of 500 tokens (`growth_16000` is asked to be at most 1.5); and of it what
reading the text takes, against decoding the whole text again for each event, as one would without a
state (`rereading`).
"""

import measure  # first: it sets XLA's flags

import jax  # isort: skip
import statistics
import time
from typing import NamedTuple

import jax.numpy as jnp

import paged_jax
from paged_jax import models
from paged_jax.engine import Engine, EngineConfig, Sampling
from paged_jax.engine.text import Reader, Vocabulary
from paged_jax.server.responses import Choice

LENGTHS = (500, 2000, 4000, 16_000)
STOPS = ("no such text", "\n\n\n\n\n", "To be or not")


class Chain(NamedTuple):
  """After token t comes token after[t]."""

  after: jax.Array

  def __call__(self, tokens, cache, plan):
    x = jnp.zeros((len(tokens), 1, 8))
    return self.after[tokens], paged_jax.write(cache, 0, x, x, plan)

  def logits(self, hidden):
    return 50.0 * jax.nn.one_hot(hidden, len(self.after))


def seconds(e: Engine, length: int) -> float:
  """CPU time per token of a streamed text."""
  choices: list[Choice] = []

  def on_token(nth, tokens, logprobs):
    (choice,) = choices
    choice.tokens += tokens
    choice.logprobs += logprobs
    choice.chunk(logprobs=True)

  began = time.thread_time()
  handle = e.submit([1, 2, 3], Sampling(max_new_tokens=length, stop=STOPS), on_token=on_token)
  choices.append(Choice(0, handle, 0, True, 0.0))
  while e.step():
    pass
  spent = time.thread_time() - began
  assert len(choices[0].tokens) == length and handle.done
  return spent / length


def reading(words, tokens: list[int], *, again: bool) -> float:
  """CPU time per token of reading a text in events of 8 tokens, once or from its beginning on."""
  began, reader = time.thread_time(), Reader(Vocabulary(words), (1, 2, 3), STOPS)
  for at in range(0, len(tokens), 8):
    if again:
      words.decode(tokens[: at + 8])
    else:
      reader.add(tokens[at : at + 8])
  return (time.thread_time() - began) / len(tokens)


def main():
  args = measure.arguments(__doc__.splitlines()[0])
  words = models.tokenizer(models.embedded())
  size = words.get_vocab_size()
  cache = paged_jax.CacheConfig(
    num_layers=1, num_kv_heads=1, head_dim=8, num_pages=1024, num_rows=1, max_length=2**14,
    dtype="float32",
  )  # fmt: skip
  chain = Chain((jnp.arange(size) + 7) % size)
  e = Engine(chain, EngineConfig(cache, prompt_sizes=(8,)), tokenizer=words)
  e.warm_up()
  seconds(e, LENGTHS[0])
  times = {length: [] for length in LENGTHS}
  for _ in range(max(3, args.rounds // 5)):
    for length in LENGTHS:
      turns = max(1, LENGTHS[1] // length)
      times[length].append(statistics.mean(seconds(e, length) for _ in range(turns)))
  median = {length: statistics.median(each) for length, each in times.items()}
  tokens = [(7 * i) % size for i in range(LENGTHS[-1])]
  rows = [
    {
      "tokens": length,
      "us per token": 1e6 * spent,
      "growth": spent / median[LENGTHS[0]],
      "of it reading": reading(words, tokens[:length], again=False) / spent,
      "rereading/reading": reading(words, tokens[:length], again=True)
      / reading(words, tokens[:length], again=False),
    }
    for length, spent in median.items()
  ]
  summary = {"growth_16000": rows[-1]["growth"], "rereading": rows[-1]["rereading/reading"]}
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
