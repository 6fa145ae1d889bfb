"""Hypergradients of example weights by gradhpo, and by `jax.vjp`, for the table `bergson`."""

from worker import resident_mib, serve_methods

from benchmarks.peers import attributed


def flat(function):
    def method(problem, **setting):
        found = function(problem, **setting)
        return lambda: found().ravel()

    return method


serve_methods(
    attributed.load,
    {
        "replay": flat(attributed.replayed),
        "unrolled": flat(attributed.unrolled),
        "jax": flat(attributed.by_jax),
        "nothing": lambda problem: list,
    },
    lambda function: resident_mib("VmHWM"),
)
