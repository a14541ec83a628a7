"""Draws the README's picture, `docs/page_map.png`, from the cache of a real generation."""

import pathlib

from paged_jax import models, viz
from paged_jax.cli import demo, progress
from paged_jax.engine import Engine, EngineConfig, Sampling
from paged_jax.host import ManagerConfig

PROMPT = demo.PROMPTS[0]


def main() -> None:
  """Writes the picture beside this file."""
  folder = models.embedded()
  decoder, tokenizer = models.load(folder), models.tokenizer(folder)
  config = models.cache_config(
    decoder.config, num_pages=48, num_rows=3, page_size=8, max_length=256
  )
  options = ManagerConfig(prefix_cache=False)
  engine = Engine(decoder, EngineConfig(config, options, num_steps=10, prompt_sizes=(128,)))
  wanted = Sampling(max_new_tokens=60, num_samples=3, temperature=0.8, seed=7)
  updates = progress.follow(engine, [(tokenizer.encode(PROMPT).ids, wanted)])
  update = next(update for update in updates if len(update.tokens[0]) >= 40)
  axes = viz.draw(update.cache)
  axes.figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=160)
  print(f"{PROMPT}\n{[len(tokens) for tokens in update.tokens]} new tokens")


if __name__ == "__main__":
  main()
