"""What the TPU kernels can serve: a cache, a TPU's generation, and its memories.

Found with the TPU compiler (libtpu 0.0.42.1, November 2026); see docs/kernels.md.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from paged_jax import pages as pages_lib
from paged_jax.attention import backend
from paged_jax.attention.tpu_kernel import LANES
from paged_jax.types import Pages

VMEM_BYTES = 48 * 2**20  # of 64 MiB on v5p and 7x, 128 on v5e and v6e; v4 has 16, and CMEM beside
SMALL_BLOCK = 16
MAX_PAGES_PER_ROW = 2**16  # their ids, twice, are half of SMEM; the rest is for the blocks
_DTYPES = jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn


def vmem_bytes() -> int:
  """Most bytes of VMEM that the kernel may take; XLA prefetches into the rest.

  The TPU is that of the mesh that is set, also if it is not there (a program compiled ahead of
  time), or else that of this process.
  """
  if not pltpu.is_tpu_device():
    return VMEM_BYTES
  return min(VMEM_BYTES, pltpu.get_tpu_info().vmem_capacity_bytes * 7 // 8)


def block_size(num_tokens: int, num_rows: int, longest: int) -> int:
  """Most tokens in a block: as for every kernel, but few where VMEM is small (v4)."""
  size = backend.block_size(num_tokens, num_rows, longest)
  return size if vmem_bytes() == VMEM_BYTES else min(size, SMALL_BLOCK)


def refusal(pages: Pages, pages_per_row: int) -> str | None:
  """Why the kernel cannot serve `pages`, None if it can; without a TPU no device is judged."""
  if pltpu.is_tpu_device() and pltpu.get_tpu_info().generation < 4:
    return f"the TPU must be v4 or later, not {pltpu.get_tpu_info().chip_version}"
  _, _, _, t, d = pages_lib.sizes(pages)
  if pages.kv.dtype not in _DTYPES:
    *names, last = (np.dtype(x).name for x in _DTYPES)
    return f"pages must be kept as {', '.join(names)} or {last}, not {pages.kv.dtype}"
  if pages.scales is not None and t % LANES:
    return (
      f"page_size must be a multiple of {LANES} for {pages.kv.dtype}, not {t}: a page's scales of one"
      f" head are whole rows of {LANES} lanes; take page_size={LANES}"
    )
  rows = 32 // pages.kv.dtype.itemsize  # of a tile
  if t % rows:
    return f"page_size must be a multiple of {rows} for {pages.kv.dtype}, not {t}"
  unit = 64 if pages.value_dim is None else 128
  if d % unit:
    return f"head_dim must be a multiple of {unit}, not {d}: CacheConfig.stored_for pads it"
  if pages_per_row > MAX_PAGES_PER_ROW:
    return (
      f"a row must have at most {MAX_PAGES_PER_ROW} pages, whose ids fit in SMEM, not"
      f" {pages_per_row}: take larger pages or a smaller max_length"
    )
  page_bytes, most = pages_lib.layer_bytes(pages), vmem_bytes() // 4
  if page_bytes > most:
    return (
      f"a page of one layer must have at most {most} bytes, a quarter of the kernel's VMEM, not"
      f" {page_bytes}: take smaller pages"
    )
  return None
