"""Settings of the whole test run; they must be made before jax is imported."""

import gc
import os
import pathlib
from importlib import metadata

asked = os.environ.get("XLA_FLAGS", "")
AS_USERS_DO = f"--xla_force_host_platform_device_count=8 {asked}"
if metadata.version("jaxlib").startswith("0.10."):
  # This version miscompiles some reductions on CPU, silently.
  AS_USERS_DO = f"--xla_cpu_experimental_ynn_fusion_type=-reduce {AS_USERS_DO}"
# Most of the tests' time is compilation. Without LLVM's optimizations, with one module per program
# and (up to jax 0.10) without MLIR, it takes a quarter of the time.
QUICKLY = (
  "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
  "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
os.environ["XLA_FLAGS"] = (
  AS_USERS_DO if "optimization_level" in asked else f"{QUICKLY} {AS_USERS_DO}"
)
# What one process compiles the others load: workers, notebooks, commands, and the next run.
programs = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "programs"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(programs))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.devices()  # the flags are read
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# jax and its traces make many objects, and few of them are garbage: do not look often.
gc.set_threshold(20_000, 20, 20)


def pytest_collection_finish():
  gc.freeze()  # what the modules hold stays


MAPS = pathlib.Path("/proc/self/maps")
MANY = 30_000  # Linux allows a process 65,530 by default; every compiled program takes some


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
  """Forgets compiled programs before a process has more memory maps than it may have."""
  yield
  if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
    jax.clear_caches()


@pytest.fixture
def compiled_as_users_do(monkeypatch):
  """Processes that the test starts compile with all optimizations."""
  monkeypatch.setenv("XLA_FLAGS", AS_USERS_DO)


@pytest.fixture
def compiled():
  """What has been compiled since the test began, by whatever part of jax."""
  names = []

  def listen(event, seconds, **_):
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
      names.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield names
  jax.monitoring.unregister_event_duration_listener(listen)
