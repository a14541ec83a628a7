"""Records of a store: safetensors, with a text beside the arrays and a digest of both.

# header   __metadata__: about (JSON), sha256      tokens: I32 [20]      logits: F32 [V]
# then     the bytes of the arrays
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


class Damaged(ValueError):
  """A record is not what was written."""


def pack(about: Mapping[str, Any], arrays: Arrays) -> tuple[bytes, str]:
  """The bytes of a record, and its digest. `about` must be JSON.

  Raises:
    ImportError: safetensors is not installed.
  """
  from safetensors import numpy as safetensors  # it needs an extra

  arrays = {name: np.asarray(x, order="C") for name, x in arrays.items()}
  dtypes = {name: x.dtype.name for name, x in arrays.items()}
  text = json.dumps({**about, "dtypes": dtypes}, sort_keys=True)
  digest = _digest(text, arrays)
  return bytes(safetensors.save(dict(arrays), {"about": text, "sha256": digest})), digest


def unpack(data: bytes) -> tuple[dict[str, Any], Arrays, str]:
  """What `pack` made a record of: the text, the arrays and the digest.

  Raises:
    Damaged: It is not what was written; the message says why.
    ImportError: safetensors is not installed.
  """
  import safetensors

  try:
    found = dict(safetensors.deserialize(data))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    about = json.loads(header["about"])
    arrays = {name: _array(found[name], dtype) for name, dtype in about["dtypes"].items()}
    digest = header["sha256"]
    same = digest == _digest(header["about"], arrays)
  except safetensors.SafetensorError as error:
    raise Damaged(f"no safetensors ({error})") from None
  except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
    raise Damaged(f"no record ({error!r})") from None
  if not same:
    raise Damaged("its bytes have changed")
  return about, arrays, digest


def _array(tensor: Mapping[str, Any], dtype: str) -> np.ndarray:
  return np.frombuffer(tensor["data"], np.dtype(dtype)).reshape(tensor["shape"])


def _digest(text: str, arrays: Arrays) -> str:
  """Of a text and arrays, with their names and shapes."""
  digest = hashlib.sha256(text.encode())
  for name, x in sorted(arrays.items()):
    digest.update(f"\0{name}{x.shape}".encode())
    digest.update(x.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()
