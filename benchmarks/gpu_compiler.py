"""What the real GPU compiler makes of our GPU kernel, without a GPU.

Registers, spilled bytes and shared memory of the kernel, asynchronous copies of 8 or 16 bytes (the
paged loads that run ahead) and how many other kernels a call launches. Nothing may spill, and shared
memory must fit in the 99 KB of compute capability 8.6 and 8.9. Needs the wheels of the CUDA plugin
and the compiler, of the version of the installed jax, in a folder of their own (some 600 MB):

    pip install --no-deps --target FOLDER jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION \
      nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime nvidia-nvjitlink nvidia-cuda-cupti
    python benchmarks/gpu_compiler.py --wheels FOLDER --gpu "NVIDIA H200"
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import warnings
from typing import NamedTuple

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--wheels", type=pathlib.Path, required=True, help="where pip put the wheels")
parser.add_argument("--gpu", default="NVIDIA H200", help="a name in GPUS")
parser.add_argument("--quick", action="store_true", help="two shapes only")
parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
ARGS = parser.parse_args()
CUDA = ARGS.wheels.resolve() / "nvidia" / "cu13"
DUMPS = pathlib.Path(tempfile.mkdtemp(prefix="ptx-"))
sys.path.append(str(ARGS.wheels.resolve()))
os.environ |= {
  "JAX_PLATFORMS": "cpu",
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
  "TF_CPP_MIN_LOG_LEVEL": "3",
  "LLVM_DISABLE_SYMBOLIZATION": "1",  # of remarks, which takes minutes
  "XLA_FLAGS": f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={CUDA} --xla_dump_to={DUMPS}"
  " --xla_dump_emitter_re=.*",
}
warnings.filterwarnings("ignore", "JAX plugin jax_cuda13_plugin", RuntimeWarning)  # 0.12.0.1
warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)

import jax  # noqa: E402
import measure  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from paged_jax import CacheConfig, attention  # noqa: E402
from paged_jax import pages as pages_lib  # noqa: E402
from paged_jax.attention import gpu  # noqa: E402
from paged_jax.types import Tables  # noqa: E402


class Gpu(NamedTuple):
  capability: str
  arch: str
  num_sms: int
  shared_bytes: int  # of an SM
  memory_bytes: int
  bandwidth: int


GPUS = {
  "NVIDIA H200": Gpu("major: 9 feature_extension: ACCELERATED_FEATURES", "sm_90a", 132, 233_472,
                     151_397_597_184, 4_800_000_000_000),
  "NVIDIA A100": Gpu("major: 8", "sm_80", 108, 167_936, 85_000_000_000, 2_039_000_000_000),
  "NVIDIA L4": Gpu("major: 8 minor: 9", "sm_89", 58, 102_400, 24_000_000_000, 300_000_000_000),
}  # fmt: skip
TARGET = """
gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ {gpu.capability} }}
  core_count: {gpu.num_sms}
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_block}
  shared_memory_per_core: {gpu.shared_bytes}
  l2_cache_size: 52428800
  memory_bandwidth: {gpu.bandwidth}
  device_memory_size: {gpu.memory_bytes}
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
SHARED_BYTES = 99 * 2**10
POOL_BYTES = 2**36  # far beyond 32-bit offsets


@dataclasses.dataclass(frozen=True)
class Step:
  """A part of a step of a model, which is one launch of the kernel."""

  name: str
  num_heads: int
  num_kv_heads: int
  head_dim: int
  num_tokens: int
  num_rows: int = 32  # most of the part
  page_size: int = 16
  value_dim: int | None = None
  dtype: str = "bfloat16"
  kv_dtype: str = ""  # of pages, none: dtype
  softcap: float | None = None
  window: int | None = None


LLAMA = Step("Llama-3-8B", 32, 8, 128, 32)
QWEN = dataclasses.replace(LLAMA, name="Qwen3-0.6B", num_heads=16)
GEMMA = Step("Gemma-2-9B", 16, 8, 256, 32, softcap=50.0, window=4096)
SMALL = Step("Llama-3.2-1B", 32, 8, 64, 32)
MLA = Step("DeepSeek-V3", 128, 1, 576, 32, value_dim=512)
# Rows that decode, one row, rows that verify 4 drafts each, and prompts.
PARTS = ((32, 32), (1, 1), (160, 32), (512, 8))
STEPS = [
  *(dataclasses.replace(model, num_tokens=part[0], num_rows=part[1])
    for model in (LLAMA, QWEN, GEMMA, SMALL) for part in PARTS),
  *(dataclasses.replace(model, page_size=size, dtype=dtype, num_tokens=part[0], num_rows=part[1])
    for model, size, dtype in ((LLAMA, 64, "bfloat16"), (LLAMA, 16, "float16"),
                               (LLAMA, 16, "float32"), (GEMMA, 16, "float32"))
    for part in (PARTS[0], PARTS[-1])),
  *(dataclasses.replace(model, dtype=dtype, kv_dtype=kv_dtype, num_tokens=part[0], num_rows=part[1])
    for kv_dtype in ("int8", "float8_e4m3fn")
    for model, dtype in (*((m, "bfloat16") for m in (LLAMA, QWEN, GEMMA, SMALL, MLA)),
                         (LLAMA, "float32"), (GEMMA, "float32"))
    for part in PARTS),
]  # fmt: skip


def arguments(step: Step, sharding):
  """What the kernel gets, as shapes: q, pages, layer, tables and the part."""

  def shape(*dims, dtype="int32"):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

  b, s = step.num_tokens, step.num_rows
  config = CacheConfig(
    num_kv_heads=step.num_kv_heads, head_dim=step.head_dim, value_dim=step.value_dim,
    page_size=step.page_size, dtype=step.kv_dtype or step.dtype, num_pages=1,
  )  # fmt: skip
  config = dataclasses.replace(config, num_pages=POOL_BYTES // config.page_bytes)
  tokens, rows = shape(b), shape(s)
  tables = Tables(shape(s, 32_768 // step.page_size), rows, rows, shape(s, dtype="bool"))
  pages = jax.eval_shape(functools.partial(pages_lib.init, config))
  pages = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), pages)
  cut = functools.partial(attention.cut, "gpu", parts=((b, s),))
  [part] = jax.eval_shape(cut, tokens, tokens, tokens, shape(b, dtype="bool"), pages, tables)
  return (
    shape(b, step.num_heads, step.head_dim, dtype=step.dtype),
    pages,
    shape(),
    tables,
    jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), part),
  )


def compiled(step: Step, device) -> dict:
  """One row of the table."""
  for path in DUMPS.glob("*"):
    path.unlink()
  abstract = jax.sharding.AbstractDevice(ARGS.gpu, GPUS[ARGS.gpu].num_sms, "gpu")
  mesh = jax.sharding.AbstractMesh(
    (1,), ("x",), (jax.sharding.AxisType.Explicit,), abstract_device=abstract
  )

  def run(q, pages, layer, tables, part):
    options = attention.options.make(q, window=step.window, softcap=step.softcap)
    return gpu.attend(q, pages, layer, tables, part, options)

  args = arguments(step, jax.sharding.SingleDeviceSharding(device))
  with jax.sharding.use_abstract_mesh(mesh):
    program = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).compile()
  texts = {path: path.read_text() for path in DUMPS.glob("*.ptx")}
  [(path, ptx)] = [(p, x) for p, x in texts.items() if ".entry paged_attention(" in x]
  command = [CUDA / "bin" / "ptxas", f"-arch={GPUS[ARGS.gpu].arch}", "-v", path, "-o", os.devnull]
  log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
  [thunks] = DUMPS.glob("*thunk_sequence.txt")
  grid, shared = re.search(
    r"paged_attention grid: \[(.*?)\].*shared_memory: (\d+)", thunks.read_text()
  ).groups()
  return {
    "model": step.name,
    "dtype": step.dtype,
    "pages": step.kv_dtype or step.dtype,
    "page size": step.page_size,
    "tokens": step.num_tokens,
    "rows": step.num_rows,
    "grid": grid.replace(", ", "x"),
    "registers": int(re.search(r"Used (\d+) registers", log)[1]),
    "spilled": int(re.search(r"(\d+) bytes spill stores", log)[1]),
    "shared": int(shared),
    "async copies": len(re.findall(r"cp\.async\.c[ag]\.[^;]*, 0x(?:8|10),", ptx)),
    "products": ptx.count("mma.sync") + ptx.count("wgmma.mma"),
    "other kernels": sum(x.count(".entry ") for x in texts.values()) - 1,
    "temp": program.memory_analysis().temp_size_in_bytes,
  }


def main():
  found = GPUS[ARGS.gpu]
  target = TARGET.format(name=ARGS.gpu, gpu=found, shared_block=found.shared_bytes - 1024)
  topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
  steps = STEPS[:4:3] if ARGS.quick else STEPS
  if found.arch == "sm_80":  # cannot convert it
    steps = [step for step in steps if step.kv_dtype != "float8_e4m3fn"]
  rows = [compiled(step, topology.devices[0]) for step in steps]
  summary = {
    "compiled for": ARGS.gpu,
    "spilled": max(row["spilled"] for row in rows),
    "shared": max(row["shared"] for row in rows),
  }
  measure.report(rows, summary, as_json=ARGS.json)
  assert summary["spilled"] == 0, "a kernel spills"
  assert summary["shared"] <= SHARED_BYTES, "a kernel needs more shared memory than some GPUs have"
  assert all(row["async copies"] for row in rows), "loads do not run ahead"


if __name__ == "__main__":
  main()
