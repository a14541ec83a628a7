"""What a program carries: only what its requests need."""

import jax
import numpy as np
import pytest

import paged_jax
from paged_jax.engine import sampling
from paged_jax.engine.device import draws, program, records
from paged_jax.testing.counting import Counting

S, V = 3, Counting().vocab_size


def traced(adjustments=None, *, num_beams=1):
  """The program's jaxpr, for plain requests unless there are adjustments."""
  config = paged_jax.CacheConfig(
    num_layers=1, num_kv_heads=1, head_dim=8, num_pages=8, num_rows=S, max_length=64
  )
  row = np.zeros(S, np.int32)
  rows = records.Rows(
    tokens=row, remaining=row, stop_tokens=np.zeros((S, 2), np.int32), groups=row,
    scores=np.zeros(S, np.float32), draws=draws.draws({}, S, V),
  )  # fmt: skip
  past = records.Past(
    seen=np.zeros((S, V if adjustments else 0), bool),
    texts=np.zeros((S, 0), np.int32),
    logits=np.zeros((S, V), np.float32),
  )

  def run(cache, *args):
    return program.run(cache, Counting(), *args, num_steps=2, num_beams=num_beams)

  edits = records.Edits(np.zeros(S, bool), rows)
  cache = jax.eval_shape(lambda: paged_jax.init(config))
  return jax.make_jaxpr(run)(cache, rows, past, edits, None, adjustments)


def shapes(variables):
  return {(str(x.aval.dtype), x.aval.shape) for x in variables}


def test_a_program_for_plain_requests_has_no_seen_tokens_biases_and_logprobs():
  plain = traced().jaxpr
  full = traced(draws.adjustments({}, S, V)).jaxpr
  more = {("bool", (S, V)), ("int32", (S, sampling.MAX_BIASES))}
  assert more <= shapes(full.invars)
  assert not more & shapes(plain.invars)
  assert not {("bool", (S, V))} & shapes(plain.outvars)
  report, longer = plain.outvars[-1].aval.size, full.outvars[-1].aval.size
  assert longer == report + 2 * S  # a log-probability for each step and row


def test_a_search_needs_adjustments():
  with pytest.raises(ValueError, match="num_beams=2 needs adjustments"):
    traced(num_beams=2)
