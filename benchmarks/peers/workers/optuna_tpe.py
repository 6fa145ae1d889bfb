"""Optuna's TPE with its defaults: suggests points of the unit cube and receives their values."""

import optuna
from worker import serve


optuna.logging.set_verbosity(optuna.logging.ERROR)
study, trial, space = None, None, {}


def begin(seed: int, first: list[float]) -> None:
    """A new search; `first` is its first trial."""
    global study, space
    names = [f"x{i}" for i in range(len(first))]
    space = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in names}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(dict(zip(names, first, strict=True)))


def suggest() -> list[float]:
    global trial
    trial = study.ask(space)
    return [trial.params[name] for name in space]


def tell(value: float) -> None:
    study.tell(trial, value)


serve(begin=begin, suggest=suggest, tell=tell)
