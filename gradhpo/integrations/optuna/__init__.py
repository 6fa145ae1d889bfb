"""Optuna: a callback for its trials, and studies whose trials descend. Needs the extra `optuna`."""

try:
    import optuna  # noqa: F401
except ImportError as error:
    raise ImportError(
        "gradhpo.integrations.optuna needs Optuna: "
        'run pip install -e ".[optuna]" in a clone of gradhpo'
    ) from error

from gradhpo.integrations.optuna.callback import TrialCallback
from gradhpo.integrations.optuna.space import Start, add_end_point, suggest


__all__ = ["Start", "TrialCallback", "add_end_point", "suggest"]
