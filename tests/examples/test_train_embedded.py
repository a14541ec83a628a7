"""Training in miniature: it learns, it resumes, it scores every token, it writes a model."""

import dataclasses
import importlib
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax import models

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))
lib = importlib.import_module("train_embedded")

TEXT = "".join(f"{i} bottles of beer on the wall, take {i % 3} down.\n" for i in range(120))
RECIPE = lib.Recipe(steps=20, batch_tokens=256)


@pytest.fixture(autouse=True)
def standard_promotion():
  """optax computes with mixed dtypes."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(scope="module")
def data():
  """A small model's config, and the tokens it learns."""
  tokenizer = lib.learn_tokenizer(TEXT, 300)
  config = lib.small_llama(tokenizer.get_vocab_size(), hidden_size=96, num_layers=1)
  return dataclasses.replace(config, max_length=64), lib.encode(tokenizer, TEXT)


def test_a_few_steps_lower_the_loss(data):
  config, tokens = data
  losses = []
  state = lib.init(config, RECIPE)
  lib.train(state, tokens, 20, config=config, recipe=RECIPE, on_step=losses.append)
  assert len(losses) == 20
  assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


def test_a_resumed_run_is_the_same_to_the_bit(data, tmp_path):
  config, tokens = data

  def train(state, stop, losses):
    return lib.train(state, tokens, stop, config=config, recipe=RECIPE, on_step=losses.append)

  losses, curve = [], lib.Curve([], [(3, 2.5)])
  straight = train(lib.init(config, RECIPE), 6, losses)
  state = train(lib.init(config, RECIPE), 3, curve.train)
  with lib.checkpoints_at(tmp_path / "run") as checkpoints:
    lib.save(checkpoints, state, curve)
  with lib.checkpoints_at(tmp_path / "run") as checkpoints:
    state, curve = lib.restore(checkpoints, lib.init(config, RECIPE))
  resumed = train(state, 6, curve.train)

  assert curve == lib.Curve(losses, [(3, 2.5)])
  for ours, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(straight), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_checkpoint_of_another_model_is_refused(data, tmp_path):
  config, _ = data
  other = lib.small_llama(config.vocab_size, hidden_size=192, num_layers=1)
  with lib.checkpoints_at(tmp_path / "run") as checkpoints:
    lib.save(checkpoints, lib.init(config, RECIPE), lib.Curve([], []))
    with pytest.raises(ValueError, match="run holds another model"):
      lib.restore(checkpoints, lib.init(other, RECIPE))


@pytest.mark.parametrize("num_tokens", [5, 64, 65, 66, 200])
def test_evaluation_scores_every_token_once(data, num_tokens):
  config, tokens = data
  tokens = tokens[:num_tokens]
  params = jax.tree.map(jnp.zeros_like, lib.init(config, RECIPE).params)  # a uniform guess
  loss = lib.evaluate(params, tokens, 10, config=config)
  assert loss == pytest.approx((len(tokens) - 1) * np.log(config.vocab_size) / 10, rel=1e-5)


def test_evaluation_of_one_window_is_the_sum_of_its_losses(data):
  config, tokens = data
  params = lib.init(config, RECIPE).params
  expected = float(lib.losses(params, tokens[None, :65], config).sum()) / 7
  assert lib.evaluate(params, tokens[:65], 7, config=config) == pytest.approx(expected, rel=1e-5)


def test_split_keeps_the_last_tenth():
  assert lib.split("0123456789") == ("012345678", "9")


@pytest.mark.once
def test_command_trains_saves_and_goes_on_from_its_checkpoint(tmp_path, capsys):
  (tmp_path / "beer.txt").write_text(TEXT, encoding="utf-8")
  options = {"text": tmp_path / "beer.txt", "out": tmp_path / "beer", "steps": 2, "hidden_size": 96}
  lib.main(**options)
  weights = (tmp_path / "beer" / "model.safetensors").read_bytes()
  assert "step 2: validation" in capsys.readouterr().out

  shutil.rmtree(tmp_path / "beer")
  lib.main(**options)  # nothing is left to learn
  assert "step 2: validation" not in capsys.readouterr().out
  assert (tmp_path / "beer" / "model.safetensors").read_bytes() == weights
  written = {file.name for file in (tmp_path / "beer").iterdir()}
  assert written == {"config.json", "model.safetensors", "tokenizer.json", "README.md", "loss.png"}
  assert models.load(tmp_path / "beer").config.hidden_size == 96
