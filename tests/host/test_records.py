"""Records: what is read is what was written, or it is damaged."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from paged_jax.host import records

ARRAYS = {
  "kv": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
  "half": np.arange(3).astype(jnp.bfloat16),
  "eighth": np.arange(3).astype(jnp.float8_e4m3fn),
  "bits": np.arange(4, dtype=np.int8)[::-1],
  "one": np.asarray(7),
  "none": np.zeros((0, 3), np.float16),
}
ABOUT = {"pages": [["page"]], "namespace": None}
DATA, DIGEST = records.pack(ABOUT, ARRAYS)


def test_a_record_is_read_as_it_was_written():
  about, arrays, digest = records.unpack(DATA)
  assert about.pop("dtypes").keys() == ARRAYS.keys()
  assert (about, digest) == (ABOUT, DIGEST)
  for name, x in ARRAYS.items():
    assert (arrays[name].dtype, arrays[name].shape) == (x.dtype, x.shape)
    np.testing.assert_array_equal(arrays[name], x)


def test_others_can_read_it():
  found = dict(safetensors.deserialize(DATA))
  assert found["half"]["dtype"] == "BF16" and found["eighth"]["dtype"] == "F8_E4M3"


def test_the_digest_is_that_of_content_names_and_shapes():
  digests = [
    records.pack(about, {name: x})[1]
    for about in ({}, {"a": 1})
    for name in ("x", "y")
    for x in (np.zeros(4, np.int8), np.zeros(1, np.int32), np.zeros((2, 2), np.int8))
  ]
  assert len({*digests}) == len(digests)
  assert records.pack({"b": 1, "a": 2}, ARRAYS)[1] == records.pack({"a": 2, "b": 1}, ARRAYS)[1]


def test_a_shorter_record_is_damaged():
  for length in range(len(DATA)):
    with pytest.raises(records.Damaged):
      records.unpack(DATA[:length])
  with pytest.raises(records.Damaged):
    records.unpack(DATA + b"\0")


def test_a_flipped_bit_is_damage_or_changes_nothing():
  begin, unnoticed = 8 + int.from_bytes(DATA[:8], "little"), []
  for i in range(len(DATA)):
    changed = bytearray(DATA)
    changed[i] ^= 1 << i % 8
    try:
      about, arrays, digest = records.unpack(bytes(changed))
    except records.Damaged:
      continue
    unnoticed.append(i)
    assert digest == DIGEST and about.keys() == {*ABOUT, "dtypes"}
    for name, x in ARRAYS.items():
      assert arrays[name].tobytes() == x.tobytes() and arrays[name].dtype == x.dtype
  assert all(i < begin for i in unnoticed)


@pytest.mark.parametrize(
  "metadata",
  [
    None, {}, {"about": "{"}, {"about": "[]", "sha256": ""}, {"about": "{}", "sha256": ""},
    {"about": '{"dtypes": {"kv": "object"}}', "sha256": ""},
    {"about": '{"dtypes": {"kv": "float3"}}', "sha256": ""},
    {"about": '{"dtypes": {"other": "float32"}}', "sha256": ""},
    {"about": '{"dtypes": {"kv": "int64"}}', "sha256": ""}, {"about": "[" * 99_999, "sha256": ""},
    {"about": '{"dtypes": {"kv": "float32"}}', "sha256": "0" * 64},
  ],
)  # fmt: skip
def test_safetensors_of_others_are_damaged(metadata):
  data = bytes(safetensors.numpy.save({"kv": ARRAYS["kv"]}, metadata))
  with pytest.raises(records.Damaged):
    records.unpack(data)
