"""The static description of a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from paged_jax import meshes, quantization
from paged_jax.meshes import Split

_DTYPES = ("float32", "bfloat16", "float16", *quantization.LIMITS)


@dataclasses.dataclass(frozen=True)
class CacheConfig:
  """Sizes and dtypes of a cache. Frozen and hashable, so it can be a static argument.

  `value_dim=None`: each token has a key and a value, both `head_dim` wide. `value_dim=n`: the value
  is the first n channels of the key, and only the key is stored. Multi-head latent attention
  (DeepSeek-V2, arXiv 2405.04434, §2.1) needs this, once the up-projections are part of queries and
  outputs: one KV head, whose key is the latent vector and then the rotated channels. `write` takes
  no values, and `attend` returns n channels. Its default scale is still head_dim**-0.5: give it the
  scale of the model's own heads. Keys and values of different widths, stored apart, are not
  supported.

  `dtype="int8"` or `"float8_e4m3fn"`: pages keep 8-bit numbers, and a float32 scale per token and KV
  head for the key and for the value, computed when they are written (see `quantization`). With
  head_dim 128 that is 0.516 of the bytes of bfloat16. Keys and values are read as float32.

  Raises:
    ValueError: A field is out of range; the message names the field and its value.

  >>> import paged_jax as pj
  >>> config = pj.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=4, num_pages=8)
  >>> config.page_bytes, config.pages_per_row
  (512, 256)
  >>> mla = pj.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=576, value_dim=512)
  >>> mla.page_bytes // (mla.num_layers * mla.page_size)  # bytes of a token in a layer
  1152
  >>> pj.CacheConfig(dtype="int8").page_bytes / pj.CacheConfig(dtype="bfloat16").page_bytes
  0.515625
  """

  num_layers: int = 32
  num_kv_heads: int = 32
  head_dim: int = 128
  page_size: int = 16  # tokens per page
  num_pages: int = 1024  # pages in the pool; every id is usable
  num_rows: int = 32  # sequences that live in the cache at once
  max_length: int = 4096  # tokens per row, rounded up to whole pages
  dtype: DTypeLike = np.dtype(jnp.bfloat16)  # float32, bfloat16, float16, int8 or float8_e4m3fn
  storage_dtype: DTypeLike | None = None  # of the page array: `dtype`, or uint16 or uint8 for bits
  storage_head_dim: int | None = None  # of the page array: `head_dim`, or more, padded
  value_dim: int | None = None  # None: keys and values apart; n: a value is n channels of its key
  copy_on_write: bool = True  # False: only whole pages are shared
  window: int | None = None  # tokens that a token sees, itself included; None = all before it
  split: Split | None = None  # KV heads over a mesh, see `sharding.split`; None = one device

  def __post_init__(self):
    for name in ("num_layers", "num_kv_heads", "head_dim", "page_size", "num_pages", "num_rows",
                 "max_length"):  # fmt: skip
      object.__setattr__(self, name, self._positive(name))
    dtype, storage = self._dtype("dtype"), self._dtype("storage_dtype")
    if dtype is None or dtype.name not in _DTYPES:
      raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}")
    bits = f"uint{8 * dtype.itemsize}"
    if storage is not None and storage.name not in (dtype.name, bits):
      raise ValueError(f"storage_dtype must be None, {dtype} or {bits}, got {storage}")
    object.__setattr__(self, "dtype", dtype)
    object.__setattr__(self, "storage_dtype", storage)
    stored = self._size("storage_head_dim")
    if stored is not None and stored < self.head_dim:
      raise ValueError(f"storage_head_dim must be at least {self.head_dim=}, got {stored}")
    object.__setattr__(self, "storage_head_dim", stored)
    value_dim = self._size("value_dim")
    if value_dim is not None and not 1 <= value_dim <= self.head_dim:
      raise ValueError(f"value_dim must be from 1 to {self.head_dim=}, got {value_dim}")
    object.__setattr__(self, "value_dim", value_dim)
    if not isinstance(self.copy_on_write, bool):
      raise ValueError(f"copy_on_write must be a bool, got {self.copy_on_write!r}")
    if self.split is not None and not isinstance(self.split, Split):
      raise ValueError(f"split must be None or made by `sharding.split`, got {self.split!r}")
    if self.split is not None:  # how often heads are kept follows from their number
      split = meshes.split(self.split.mesh, self.split.axis, self.num_kv_heads)
      object.__setattr__(self, "split", split)
    if self.window is not None:
      object.__setattr__(self, "window", self._positive("window"))
    products = {  # computed in int32, with room for the slots of dropped tokens
      "num_pages * page_size": self.num_pages * self.page_size,
      "max_length": self.pages_per_row * self.page_size,
      "num_rows * pages_per_row": self.num_rows * self.pages_per_row,
    }
    for name, value in products.items():
      if value >= 2**30:
        raise ValueError(f"{name} must be below 2**30, got {value}")

  @property
  def array_dtype(self) -> np.dtype:
    """Dtype of the page array: `storage_dtype`, or `dtype` if it is None."""
    return np.dtype(self.dtype if self.storage_dtype is None else self.storage_dtype)

  @property
  def value_dtype(self) -> np.dtype:
    """Dtype in which keys and values are read: `dtype`, or float32 if pages are of 8 bits."""
    return np.dtype(np.float32) if self.num_scales else np.dtype(self.dtype)

  @property
  def num_scales(self) -> int:
    """Scales of a token in a layer: for each KV head's key and value in 8 bits, else none."""
    per_head = 2 if self.value_dim is None else 1
    return per_head * self.array_kv_heads if quantization.quantized(self.dtype) else 0

  @property
  def array_kv_heads(self) -> int:
    """KV heads of the page array: more than `num_kv_heads` if a mesh has more devices."""
    return self.num_kv_heads * (1 if self.split is None else self.split.repeats)

  @property
  def array_head_dim(self) -> int:
    """Head dim of the page array: `storage_head_dim`, or `head_dim` if it is None."""
    return self.head_dim if self.storage_head_dim is None else self.storage_head_dim

  @property
  def array_channels(self) -> int:
    """Channels of a token and KV head in the page array: its key and value, or its key alone."""
    return self.array_head_dim * (2 if self.value_dim is None else 1)

  @property
  def pages_per_row(self) -> int:
    """Pages that one row can map."""
    return -(-self.max_length // self.page_size)

  @property
  def page_bytes(self) -> int:
    """Bytes of one page, all layers, as they are stored, scales included; on all devices."""
    values = self.array_kv_heads * self.array_channels
    scale_bytes = self.num_scales * np.dtype(np.float32).itemsize
    token_bytes = values * self.array_dtype.itemsize + scale_bytes
    return self.num_layers * self.page_size * token_bytes

  def stored_for(self, platform: str) -> "CacheConfig":
    """The same cache, stored as a `platform` ("cpu", "gpu", "tpu", ...) works with it best.

    `init`, `Manager` and `Engine` do this for the platform that they run on, so only programs that
    are compiled for another one need it. What a config already says of its storage stays.

    `storage_dtype`: on CPU, XLA rewrites the whole pool when it updates float8, and with jax 0.10
    bfloat16. It updates the same bits in place if they are kept as uint8 or uint16. float8 is kept
    as uint8 on GPU, too, where not every device has it. `storage_head_dim`: the kernels of
    attention serve multiples of 64 on TPU, and powers of two from 16 to 256 on GPU. With a
    `value_dim` they serve multiples of 128 on TPU, and as many channels behind the value on GPU.
    Other head dims are padded with zeros to the next one. No verb shows the padding.

    >>> import paged_jax as pj
    >>> config = pj.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=80, num_pages=8)
    >>> config.stored_for("tpu").array_head_dim, config.stored_for("cpu").array_head_dim
    (128, 80)
    """
    dtype, old = np.dtype(self.dtype), jax.__version_info__ < (0, 11)
    bits = platform == "cpu" and old and dtype == jnp.bfloat16
    bits |= platform in ("cpu", "gpu") and dtype == jnp.float8_e4m3fn
    stored = np.dtype(f"uint{8 * dtype.itemsize}") if bits else dtype
    return dataclasses.replace(
      self,
      storage_dtype=stored if self.storage_dtype is None else self.storage_dtype,
      storage_head_dim=self.storage_head_dim or self._served(platform),
    )

  def _positive(self, name: str) -> int:
    value = getattr(self, name)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
      raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)

  def _served(self, platform: str) -> int:
    """The least head dim, from this one on, that a kernel of the platform serves; or this one."""
    head_dim = self.head_dim
    if platform == "tpu":
      unit = 64 if self.value_dim is None else 128  # a token's channels fill the lanes
      return -(-head_dim // unit) * unit
    if platform == "gpu":
      before = self.value_dim or 0  # what is behind the value is a power of two, too
      behind = (size for size in (0, 16, 32, 64, 128, 256) if size >= head_dim - before)
      return before + next(behind, head_dim - before)
    return head_dim

  def _size(self, name: str) -> int | None:
    value = getattr(self, name)
    if value is None:
      return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
      raise ValueError(f"{name} must be None or an integer, got {value!r}")
    return int(value)

  def _dtype(self, name: str) -> np.dtype | None:
    value = getattr(self, name)
    try:
      return None if value is None else np.dtype(value)
    except TypeError:
      raise ValueError(f"{name} must be a dtype, got {value!r}") from None
