"""An engine uses a kernel if it is right on this device. Here "tpu" is what "xla" computes."""

import dataclasses
import functools
import json
import types

import pytest
import tiny

from paged_jax import attention
from paged_jax.attention import cases, tpu, xla
from paged_jax.attention.backend import Backend
from paged_jax.engine import Engine, EngineConfig, Sampling, proofs

CONFIG = EngineConfig(tiny.cache(), prompt_sizes=(8,), num_steps=2)
SHAPE = CONFIG.cache


def swaps_heads(q, pages, layer, tables, part, options):
  out, lse = xla.attend(q, pages, layer, tables, part, options)
  return out[:, ::-1], lse


RIGHT, WRONG = Backend(xla.attend), Backend(swaps_heads)


verify = attention.verify


@functools.cache
def report(name, shape, backend):
  """The report on `backend`, which "tpu" is now: tests share it."""
  assert tpu.BACKEND is backend
  return verify(name, shape, memory_bytes=2**20)


@pytest.fixture
def verified(monkeypatch, tmp_path):
  """Lets the backend be this platform's kernel; returns the names of what is verified."""
  names = []

  def counted(name, shape, **_):
    names.append(name)
    return report(name, shape, tpu.BACKEND)

  settings = dict(jax_compilation_cache_dir=str(tmp_path), jax_enable_compilation_cache=True)
  monkeypatch.setattr(attention, "_KERNELS", {"cpu": ("tpu",)})
  monkeypatch.setattr(attention, "verify", counted)
  monkeypatch.setattr(cases, "ESSENTIAL", cases.ESSENTIAL[:1])
  monkeypatch.setattr(tpu, "BACKEND", RIGHT)
  monkeypatch.setattr(proofs, "_settings", types.SimpleNamespace(**settings))
  proofs._disproof.cache_clear()
  yield names
  proofs._disproof.cache_clear()


@pytest.fixture
def wrong(monkeypatch, verified):
  monkeypatch.setattr(tpu, "BACKEND", WRONG)
  return verified


@pytest.mark.parametrize("name", [None, "tpu"])
def test_a_kernel_is_verified_once_and_kept_beside_the_programs(verified, tmp_path, name):
  assert [proofs.backend(name, SHAPE) for _ in range(2)] == ["tpu"] * 2
  assert verified == ["tpu"]
  [file] = tmp_path.iterdir()
  kept = json.loads(file.read_text())
  assert "all cases agree" in kept["table"] and kept["proven"]["attention"] == "tpu"
  proofs._disproof.cache_clear()  # as another process
  assert proofs.backend(name, SHAPE) == "tpu"
  assert verified == ["tpu"]


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"proven": {"jax": "0.1"}}'])
def test_a_damaged_file_proves_nothing(verified, tmp_path, damage):
  proofs.backend(None, SHAPE)
  [file] = tmp_path.iterdir()
  file.write_text(damage)
  proofs._disproof.cache_clear()
  assert proofs.backend(None, SHAPE) == "tpu"
  assert verified == ["tpu"] * 2


def test_pages_of_another_shape_are_another_proof_other_numbers_of_them_are_not(verified):
  other = dict(num_pages=7, num_rows=3, num_layers=1, max_length=8)
  for config in (
    SHAPE,
    dataclasses.replace(SHAPE, **other),
    dataclasses.replace(SHAPE, head_dim=4),
  ):
    assert proofs.backend(None, config) == "tpu"
  assert verified == ["tpu"] * 2


@pytest.mark.parametrize(
  "settings",
  [dict(jax_compilation_cache_dir=None), dict(jax_enable_compilation_cache=False),
   dict(jax_compilation_cache_dir="gs://bucket/programs")],
)  # fmt: skip
def test_without_a_local_folder_a_proof_lasts_as_long_as_the_process(verified, tmp_path, settings):
  vars(proofs._settings).update(settings)
  assert [proofs.backend(None, SHAPE) for _ in range(2)] == ["tpu"] * 2
  assert verified == ["tpu"] and not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told(verified, tmp_path, caplog):
  (tmp_path / "file").touch()
  proofs._settings.jax_compilation_cache_dir = str(tmp_path / "file")
  assert proofs.backend(None, SHAPE) == "tpu"
  assert "the proof of an attention kernel is not kept" in caplog.text


def test_a_wrong_kernel_gives_way_with_a_warning_if_no_backend_was_asked_for(
  wrong, tmp_path, caplog
):
  assert [proofs.backend(None, SHAPE) for _ in range(2)] == ["xla"] * 2
  assert wrong == ["tpu"] and not any(tmp_path.iterdir())
  assert "attention 'tpu' is wrong on this device; 'xla' is used:" in caplog.text
  assert "output differs by" in caplog.text and "3 of 3 cases disagree" in caplog.text


def test_a_wrong_kernel_that_was_asked_for_is_refused_with_the_table(wrong):
  with pytest.raises(NotImplementedError, match=r"(?s)'tpu' is wrong.*output differs by"):
    proofs.backend("tpu", SHAPE)


def test_nothing_is_proven_of_what_xla_compiles(verified):
  assert proofs.backend("xla", SHAPE) == "xla"
  assert proofs.backend("reference", SHAPE) == "reference"
  assert verified == []


def test_an_engine_warms_up_with_the_backend_that_is_right(wrong):
  """Its texts are right though the kernel swaps heads."""
  engine = Engine(tiny.MODEL, CONFIG)
  wanted = Sampling(max_new_tokens=4)
  engine.warm_up(samplings=[wanted])
  [[done]] = engine.generate([[1, 2, 3]], wanted)
  assert done.tokens == tiny.greedy([1, 2, 3], 4)


def test_an_engine_refuses_a_wrong_kernel_and_says_what_it_cannot_serve(wrong, monkeypatch):
  named = dataclasses.replace(CONFIG, implementation="tpu")
  with pytest.raises(NotImplementedError, match="'tpu' is wrong on this device"):
    Engine(tiny.MODEL, named).warm_up()
  monkeypatch.setattr(
    tpu, "BACKEND", Backend(xla.attend, lambda pages, pages_per_row: "it is Monday")
  )
  with pytest.raises(NotImplementedError, match="'tpu' cannot serve this cache: it is Monday"):
    Engine(tiny.MODEL, named)


def test_an_unknown_backend_is_named():
  with pytest.raises(ValueError, match=r"implementation must be None or one of .*, got 'cuda'"):
    dataclasses.replace(CONFIG, implementation="cuda")
