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
    """Most of the suite is compilation of small programs: let the code generator be quick about it.

    What XLA itself does to a program (its flops, its memory) is as always. XLA stops at a flag that
    it does not know, and the others are younger than the first.
    """
    flags = ["--xla_backend_optimization_level=0"]
    # The workers fill the cores already.
    one_thread = ["--xla_cpu_parallel_codegen_split_count=1", "--xla_cpu_multi_thread_eigen=false"]
    if version("jaxlib").startswith("0.10."):
        flags += ["--xla_cpu_use_fusion_emitters=false", *one_thread]
    elif version("jaxlib").startswith("0.12."):
        flags += ["--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE", *one_thread]
    return flags


# The compiler for a GPU has no such level. JAX_PLATFORMS=cuda,cpu says that it is the one.
if (os.environ.get("JAX_PLATFORMS") or "cpu").startswith("cpu"):
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags_of_the_cpu()])


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# With JAX_COMPILATION_CACHE_DIR a second run finds the programs of the first: small ones too.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

from gradhpo.utils.tracing import forget_traces  # noqa: E402


# A shell starts what it puts into the background with interrupts ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


as_in_the_suite()


def pytest_collection_modifyitems(items):
    """The longest tests first: at the end one worker would wait for another that runs them."""
    items.sort(key=lambda item: item.path.name != "test_examples.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Long stretches of neighbouring tests for every worker: they share compiled programs."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


_MAPS = Path("/proc/self/maps")  # only where there is a limit
_counted = time.process_time()


@pytest.fixture(autouse=True)
def _free_compiled_programs():
    """A process has room for 65,530 memory maps, of which compiled programs take some each.

    A second of compilation adds up to 200, and counting takes a microsecond for each of all: after
    five seconds of work it is nothing.
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
    """A new PRNG key at every call, the same ones in every run."""
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
