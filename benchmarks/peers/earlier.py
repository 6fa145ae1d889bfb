"""Against the earlier `gradhpo` 0.1.3 from the package index, which shares our names but no code.

The job is its tutorial's: a learning rate for each of the 517 parameters of a small network.
Its own `run` is timed as the tutorial calls it, and once more with the outer rate inside an optax
optimizer, so that compiled programs can be reused.
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.peers.environment import PeerError, Worker
from benchmarks.peers.workers.earlier_job import EPISODES, ESTIMATION_PERIOD, STEPS
from benchmarks.timed import by_turns


REQUIREMENTS = ["gradhpo==0.1.3", "jax==0.10.2", "jaxlib==0.10.2", "optax==0.2.8"]
# Each algorithm of 0.1.3, and ours: T1-T2 with finite differences in the rates, as in 0.1.3, and in
# the weights.
ALGORITHMS = {
    "one step": ["one step"],
    "T1-T2": ["T1-T2", "T1-T2, weights"],
    "greedy": ["greedy"],
    "HyperDistill": ["HyperDistill"],
}
NUM_STEPS = EPISODES * STEPS
ASKED = [
    ("one step", 3), ("T1-T2", 1), ("T1-T2", 3), ("greedy", STEPS), ("HyperDistill", 1),
    ("HyperDistill", 3),
]  # fmt: skip


def ours(**environment: str) -> Worker:
    return Worker("earlier_ours.py", JAX_PLATFORMS="cpu", **environment)


def theirs(**environment: str) -> Worker:
    return Worker("earlier_theirs.py", REQUIREMENTS, JAX_PLATFORMS="cpu", **environment)


def print_earlier(limit: float = 60.0) -> None:
    print("\nAgainst gradhpo 0.1.3 of the package index: the job of its tutorial")
    try:
        with theirs() as worker:
            versions = ", ".join(worker.versions())
    except PeerError as error:
        print(f"  not measured, 0.1.3 {error}")
        return
    print(
        f"  517 learning rates of an MLP 10-32-5, {EPISODES} episodes of {STEPS} inner steps,"
        f" batches of 128\n"
        f"  With {versions} for the peer; both on the CPU\n"
        f"  in (): scaled up from what it finished in {limit:.0f} s, with the mean of all episodes"
        " but\n  the first (or that one, if there are no others); HyperDistill fits theta six times"
        f" in {EPISODES} episodes\n"
        f"    {'':24}{'episodes':>9}{'ms an inner':>13}{'s a whole':>11}"
        f"{'compilations':>14}{'peak':>9}{'MiB per':>9}\n"
        f"    {'':24}{'done':>9}{'step':>13}{'job':>11}"
        f"{'of the step':>14}{'MiB':>9}{'compil.':>9}"
    )
    for algorithm, names in ALGORITHMS.items():
        print_job(algorithm, names, limit)
    print_hypergradients()


def print_job(algorithm: str, names: list[str], limit: float) -> None:
    print(f"  {algorithm}", flush=True)
    own = math.nan  # seconds an inner step
    try:
        with theirs() as worker:
            own = print_own_run(worker.ask("job", algorithm=algorithm, budget=limit))
    except PeerError as error:
        print(f"    0.1.3, its own run: {error}")
    again = None
    with contextlib.ExitStack() as stack:
        try:
            worker = stack.enter_context(theirs())
            first = worker.ask("again", algorithm=algorithm)
            print_row("0.1.3, rate in optax", first["seconds"], first["compiled"])
            second = worker.ask("again", algorithm=algorithm)
            print_row("  once more", second["seconds"], second["compiled"] - first["compiled"])
            again = lambda: worker.ask("again", algorithm=algorithm)["seconds"]
        except PeerError as error:
            print(f"    0.1.3, rate in optax: {error}")
        for name in names:
            print_ours("gradhpo.run" + name.removeprefix(algorithm), name, own, again)
    if algorithm == "T1-T2":
        print(
            "      different work: 0.1.3 moves whole leaves of rates, 8 updates for a step;\n"
            "      ours each of the 517 rates, 1,034 updates (`weights`: two gradients)"
        )


def print_own_run(reply: dict) -> float:
    """Seconds an inner step of 0.1.3."""
    if not (done := reply["episodes"]):
        print(f"    0.1.3, its own run: not one episode, {reply['failed']}")
        return math.nan
    (_, compiled, mib, maps), (_, compiled_now, mib_now, maps_now) = done[0], done[-1]
    new = compiled_now - compiled
    whole = whole_job([episode[0] for episode in done], reply["theta"])
    growth = "" if not new else "-" if mib is None else f"{(mib_now - mib) / new:.1f}"
    print_row("0.1.3, its own run", whole, compiled_now, reply["peak"], len(done), growth)
    if reply["failed"]:
        print(f"      ended by {reply['failed']}")
    if new and maps is not None and (each := (maps_now - maps) / new) > 0:
        with contextlib.suppress(OSError):
            most = int(Path("/proc/sys/vm/max_map_count").read_text())
            print(
                f"      each compilation keeps {each:.0f} memory maps, and Linux allows {most}:"
                f" enough for {compiled + (most - maps) / each:.0f}"
            )
    return whole / NUM_STEPS


def whole_job(ends: list[float], theta: float) -> float:
    """Seconds of all episodes, from the `ends` of those done and the seconds of a fit of theta.

    One-time costs fall only in the first episode. HyperDistill fits theta in it, and then once
    every `ESTIMATION_PERIOD` episodes.
    """
    more = len(ends) - 1
    if not more:
        return EPISODES * ends[0]
    fits = lambda more: more // ESTIMATION_PERIOD  # after the first
    each = (ends[-1] - ends[0] - fits(more) * theta) / more
    return ends[0] + (EPISODES - 1) * each + fits(EPISODES - 1) * theta


def print_ours(title: str, name: str, own: float, again: Callable[[], float] | None) -> None:
    with ours() as worker:
        first = worker.ask("job", algorithm=name)
        job = lambda: worker.ask("job", algorithm=name)["seconds"]
        try:
            compared = by_turns(again or job, job, repeats=5)
        except PeerError as error:
            print(f"    0.1.3, rate in optax: {error}")
            again, compared = None, by_turns(job, job, repeats=5)
        last = worker.ask("job", algorithm=name)
    print_row(title, first["seconds"], first["compiled"], first["peak"])
    print_row("  once more", compared.second, last["compiled"] - first["compiled"], last["peak"])
    if not math.isnan(own):
        job_ratio, step_ratio = (own * NUM_STEPS / x for x in (first["seconds"], compared.second))
        print(
            f"      0.1.3's own run / this: {job_ratio:,.0f} x the first job,"
            f" {step_ratio:,.0f} x a step once compiled"
        )
    if again:
        print(
            f"      0.1.3 with the rate in optax once more / this: {compared.ratio:.1f} x"
            f" ({compared.low:.1f} to {compared.high:.1f})",
            flush=True,
        )


def print_row(
    title: str, job: float, compiled: int, peak: float | str | None = "", done: int = EPISODES,
    growth: str = "",
) -> None:  # fmt: skip
    memory = "-" if peak is None else peak if isinstance(peak, str) else f"{peak:.0f}"
    whole = f"{job:.2f}" if done == EPISODES else f"({job:.0f})"  # scaled from those done
    print(
        f"    {title:24}{done:9}{1e3 * job / NUM_STEPS:13.3f}{whole:>11}{compiled:14}"
        f"{memory:>9}{growth:>9}",
        flush=True,
    )


def print_hypergradients() -> None:
    """Relative error and cosine of a step's hypergradient against the formula.

    Taken from the update of `step` and from the result of `compute_hypergradient`; the float32
    columns show the latter.
    """
    print(
        "\n  Hypergradients against each algorithm's own formula: |error| / |formula|, cosine\n"
        f"    {'float64, then float32':22}{'0.1.3, step':>18}{'compute_hypergradient':>24}"
        f"{'gradhpo, both':>15}{'0.1.3':>8}{'gradhpo':>8}"
    )
    wide = {"JAX_ENABLE_X64": "1"}
    with contextlib.ExitStack() as stack:
        our, our32 = (stack.enter_context(ours(**precision)) for precision in (wide, {}))
        try:
            their, their32 = (stack.enter_context(theirs(**precision)) for precision in (wide, {}))
        except PeerError as failure:
            print(f"    not measured: {failure}")
            return
        for algorithm, step in ASKED:
            title = algorithm if algorithm == "greedy" else f"{algorithm}, step {step}"
            request = {"algorithm": algorithm, "at_step": step}
            truth = our.ask("exact", **request)
            mine = max(error(h, truth) for h in our.ask("hypergradient", **request))
            try:
                from_step, computed = (
                    error(h, truth) for h in their.ask("hypergradient", **request)
                )
                single = [
                    error(worker.ask("hypergradient", **request)[1], truth)[0]
                    for worker in (their32, our32)
                ]
            except PeerError as failure:
                print(f"    {title:22}{failure}", flush=True)
                continue
            print(
                f"    {title:22}{'{:9.1e} {:7.4f}'.format(*from_step):>21}"
                f"{'{:9.1e} {:7.4f}'.format(*computed):>21}{mine[0]:15.1e}"
                f"{single[0]:8.0e}{single[1]:8.0e}",
                flush=True,
            )
        try:
            most = max(map(abs, their.ask("greedy_of_the_tutorial")))
        except PeerError as failure:
            most = str(failure)
        print(
            "    greedy of 0.1.3 as its tutorial calls it (it sees no rates): the largest of"
            f" 517 is {most}"
        )


def error(found: list[float], truth: list[float]) -> tuple[float, float]:
    a, b = np.asarray(found), np.asarray(truth)
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b)), float(
        a @ b / lengths if lengths else 0
    )
