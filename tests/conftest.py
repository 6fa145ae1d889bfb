"""Strict numerics for every test: float64, no silent promotion of dtypes or ranks."""

import os
import signal
import time
from importlib.metadata import version
from pathlib import Path

import jax
import pytest
from processes import as_in_the_suite


def flags_of_the_cpu() -> list[str]:
    """The suite mostly compiles small programs, so these flags make code generation quick.

    XLA's own passes, and so flops and memory, do not change. XLA aborts on a flag it does not know,
    and the first flag is the oldest.
    """
    flags = ["--xla_backend_optimization_level=0"]
    # The workers already fill the cores.
    one_thread = ["--xla_cpu_parallel_codegen_split_count=1", "--xla_cpu_multi_thread_eigen=false"]
    if version("jaxlib").startswith("0.10."):
        flags += ["--xla_cpu_use_fusion_emitters=false", *one_thread]
    elif version("jaxlib").startswith("0.12."):
        flags += ["--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE", *one_thread]
    return flags


# The GPU compiler, selected by JAX_PLATFORMS=cuda,cpu, has no such level.
if (os.environ.get("JAX_PLATFORMS") or "cpu").startswith("cpu"):
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags_of_the_cpu()])


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# With JAX_COMPILATION_CACHE_DIR, a second run reuses the first one's programs, even small ones.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

from gradhpo.utils.tracing import forget_traces  # noqa: E402


# A shell starts background jobs with interrupts ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


as_in_the_suite()


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no worker is left waiting for them at the end."""
    items.sort(key=lambda item: item.path.name != "test_examples.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Long runs of neighbouring tests for every worker: these share compiled programs."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


_MAPS = Path("/proc/self/maps")  # only where there is a limit
_counted = time.process_time()


@pytest.fixture(autouse=True)
def _free_compiled_programs():
    """Linux allows a process 65,530 memory maps, and every compiled program takes some.

    A second of compilation adds up to 200. Counting takes a microsecond per map, which is
    negligible after five seconds of work.
    """
    global _counted
    yield
    if time.process_time() - _counted < 5 or not _MAPS.exists():
        return
    if _MAPS.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()
    _counted = time.process_time()


@pytest.fixture(autouse=True)
def _fresh_trace_counts():
    forget_traces()


@pytest.fixture
def getkey():
    """A new PRNG key at every call, the same sequence in every run."""
    keys = iter(jax.random.split(jax.random.key(20261121), 200))
    return lambda: next(keys)


@pytest.fixture
def as_a_user_has_it():
    """Standard promotion rules and float32, as in a user's own program."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.enable_x64(False),
    ):
        yield
