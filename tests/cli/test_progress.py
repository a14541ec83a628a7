import pytest

from paged_jax import models
from paged_jax.cli import generate, progress
from paged_jax.engine import RequestHandle, Sampling


@pytest.mark.parametrize(("total", "shown"), [(5, [1, 2, 3, 4, 5]), (30, [*range(1, 31, 3)])])
def test_a_bar_is_a_dozen_lines_at_most_where_there_is_no_terminal(capsys, total, shown):
  with progress.bar("compiling") as tell:
    for done in range(total + 1):
      tell(done, total)
  assert capsys.readouterr().err == "".join(f"compiling {n}/{total}\n" for n in shown)


def test_each_piece_and_token_is_read_once(folder, monkeypatch):
  pieces, read = RequestHandle.pieces, []

  def counted(handle, *args):
    found = pieces(handle, *args)
    read.extend(found)
    return found

  monkeypatch.setattr(RequestHandle, "pieces", counted)
  requests = [
    ((72, 105), Sampling(20)),
    ((65,), Sampling(12, num_samples=2, temperature=1.0)),
  ]
  tokenizer = models.tokenizer(folder)
  engine = generate._engine(models.load(folder), requests, ("float32",), 16, 8, (), tokenizer)
  updates = progress.follow(engine, requests)
  first = next(updates)
  assert (first.done, first.rows) == ([False] * 3, {})
  counts, rows = [], set()
  for update in updates:
    assert update.tokens is first.tokens and update.texts is first.texts
    counts.append(sum(map(len, update.tokens)))
    rows |= {*update.rows.values()}
  assert counts == sorted(counts) and len({*counts}) > 3 and counts[-1] == 44
  assert rows == {0, 1, 2}
  assert update.rows == {} and update.done == [True] * 3
  assert update.summary.num_tokens == 44 == len(read)
  completions = [completion for handle in update.handles for completion in handle.completions]
  assert update.tokens == [completion.tokens for completion in completions]
  assert [*map("".join, update.texts)] == [completion.text for completion in completions]
