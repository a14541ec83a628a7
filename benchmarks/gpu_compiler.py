"""What does the real GPU compiler make of the attention kernel? Registers, spills, shared memory.

Compiles `paged_jax.attend` ahead of time for an H200, without a GPU. Needs the wheels of the CUDA
plugin in a folder (it need not be the environment's):

    pip install --target FOLDER --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V  # jax's version V
    pip install --target FOLDER nvidia-cuda-nvcc nvidia-nvvm nvidia-cublas nvidia-cudnn-cu13 \\
      nvidia-nccl-cu13 nvidia-nvshmem-cu13 nvidia-cufft nvidia-cusolver nvidia-cusparse \\
      nvidia-cuda-cupti nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-nvjitlink
    python benchmarks/gpu_compiler.py FOLDER

Another `--target` is a text form of XLA's GpuTargetConfigProto. Fails if a register is spilled.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import warnings

DUMPS = pathlib.Path(tempfile.mkdtemp(prefix="ptx-"))
ROWS, CONTEXT, PREFILL = 32, 8192, 2048


@dataclasses.dataclass(frozen=True)
class Case:
  name: str
  num_heads: int
  num_kv_heads: int
  head_dim: int
  softcap: bool = False
  window: int | None = None
  num_layers: int = 32
  dtype: str = "bfloat16"
  page_size: int = 16
  num_tokens: int = ROWS
  pool_bytes: int = 80_000_000_000  # at most

  @property
  def num_pages(self) -> int:
    values = self.num_layers * self.num_kv_heads * self.page_size * 2 * self.head_dim
    return self.pool_bytes // (values * (4 if self.dtype == "float32" else 2))


MODELS = (
  Case("Llama 3 8B", 32, 8, 128),
  Case("Qwen3 32B", 64, 8, 128, num_layers=64),
  Case("Gemma 2 9B", 16, 8, 256, softcap=True, window=4096, num_layers=42),
)
EXTRA = (
  Case("pool of 2 GiB", 32, 8, 128, pool_bytes=2**31),
  Case("head dim 64", 32, 8, 64),
  Case("float16", 32, 8, 128, dtype="float16"),
  Case("float32", 32, 8, 128, dtype="float32"),
  Case("float32, head dim 64", 32, 8, 64, dtype="float32"),
  Case("float32, head dim 256", 16, 8, 256, dtype="float32"),
)


def cases(quick: bool) -> list[Case]:
  tokens = (ROWS, PREFILL)
  models = [
    dataclasses.replace(case, page_size=t, num_tokens=b)
    for case in MODELS for t in (16, 64) for b in tokens
  ]  # fmt: skip
  extra = [dataclasses.replace(case, num_tokens=b) for case in EXTRA for b in tokens]
  return models[:2] if quick else models + extra


def prepare(folder: pathlib.Path) -> pathlib.Path:
  """Lets jax, not imported yet, find the plugin; the folder of NVIDIA's tools."""
  tools = next(folder.glob("nvidia/cu*/bin/ptxas"), None)
  if tools is None:
    sys.exit(f"{folder} has no nvidia/cu*/bin/ptxas: see the top of this file for what to install")
  sys.path.append(str(folder))
  root = tools.parent.parent
  os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "XLA_FLAGS": f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={root} "
    f"--xla_dump_to={DUMPS} --xla_dump_emitter_re=.*",
  }
  return root


def compile_kernel(case: Case, implementation: str, sharding, abstract_mesh):
  """The compiled `attend` of a case, and the seconds it took."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from paged_jax import attention
  from paged_jax.types import Pages, Plan, Tables

  def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

  h, t, d, b = case.num_kv_heads, case.page_size, case.head_dim, case.num_tokens
  block_size = jax.eval_shape(lambda rows: attention.schedule(rows, ROWS)[:2], shape(b))
  num_blocks = block_size[0].shape[0]
  kv = shape(case.num_pages, case.num_layers, h, t, 2 * d, dtype=case.dtype)
  tables = Tables(shape(ROWS, CONTEXT // t), shape(ROWS), shape(ROWS), shape(ROWS, dtype=bool))
  plan = Plan(
    shape(b), shape(b), shape(b), shape(b, dtype=bool), shape(num_blocks), shape(num_blocks),
    block_size=min(64, b // ROWS), implementation=implementation,
  )  # fmt: skip
  q = shape(b, case.num_heads, d, dtype=case.dtype)

  def attend(q, kv, layer, tables, plan):
    pages = Pages(kv, np.dtype(case.dtype))
    softcap = 50.0 if case.softcap else None
    return attention.attend(q, pages, layer, tables, plan, softcap=softcap, window=case.window)

  began = time.perf_counter()
  with abstract_mesh, warnings.catch_warnings():
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated")
    traced = jax.jit(attend).trace(q, kv, shape(), tables, plan)
    compiled = traced.lower(lowering_platforms=("cuda",)).compile()
  return compiled, time.perf_counter() - began


def inspect(case: Case, compiled, root: pathlib.Path, arch: str) -> dict:
  """What the kernel of the last compilation needs."""
  path = next(p for p in DUMPS.glob("*.ptx") if ".entry paged_attention" in p.read_text())
  ptx = path.read_text()
  command = [root / "bin" / "ptxas", f"-arch={arch}", "-v", path, "-o", os.devnull]
  told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
  thunks = next(DUMPS.glob("*thunk_sequence.txt")).read_text()
  launch = re.search(r"paged_attention grid: \[(.*?)\].*shared_memory: (\d+)", thunks)
  return {
    "pool GB": round(case.pool_bytes / 1e9),
    "grid": launch[1].replace(" ", ""),
    "registers": int(re.search(r"Used (\d+) registers", told)[1]),
    "spilled": sum(map(int, re.findall(r"(\d+) bytes spill stores", told))),
    "shared": int(launch[2]),
    "cp.async 16": ptx.count("cp.async.cg.shared.global"),
    "mma": ptx.count("mma.sync") + ptx.count("wgmma.mma_async"),
    "temp MB": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folder", type=pathlib.Path, help="where the CUDA plugin's wheels are")
  parser.add_argument(
    "--target", type=pathlib.Path, default=pathlib.Path(__file__).parent / "h200.txtpb"
  )
  parser.add_argument("--arch", default="sm_90a", help="ptxas' name of the target")
  parser.add_argument("--implementation", default="gpu")
  parser.add_argument("--quick", action="store_true", help="fewer cases")
  parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
  args = parser.parse_args()
  root = prepare(args.folder)

  import measure  # isort: skip  # it imports jax, so it comes after `prepare`
  import jax
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(
    platform="cuda", target_config=args.target.read_text(), topology="1x1x1"
  )
  sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
  rows = []
  for case in cases(args.quick):
    for path in DUMPS.glob("*"):
      path.unlink()
    compiled, seconds = compile_kernel(case, args.implementation, sharding, abstract_gpu())
    rows.append({
      "case": case.name, "dtype": case.dtype, "page": case.page_size, "tokens": case.num_tokens,
      **inspect(case, compiled, root, args.arch), "seconds": round(seconds, 1),
    })  # fmt: skip
    print(rows[-1], file=sys.stderr, flush=True)
  spilled = sum(row["spilled"] for row in rows)
  measure.report(rows, {"target": args.target.stem, "spilled_bytes": spilled}, as_json=args.json)
  if spilled:
    sys.exit("registers are spilled")


def abstract_gpu():
  """The context in which newer versions of jax lower for a GPU that is not there."""
  import jax

  device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
  axis = jax.sharding.AxisType.Explicit
  mesh = jax.sharding.AbstractMesh((1,), ("_",), (axis,), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


if __name__ == "__main__":
  main()
