"""Optuna: a callback for its trials, and studies whose trials descend. Needs `gradhpo[optuna]`."""

try:
    import optuna  # noqa: F401
except ImportError as error:
    raise ImportError(
        'gradhpo.integrations.optuna needs Optuna: pip install "gradhpo[optuna]"'
    ) from error

from gradhpo.integrations.optuna.callback import TrialCallback
from gradhpo.integrations.optuna.space import Start, add_end_point, suggest


__all__ = ["Start", "TrialCallback", "add_end_point", "suggest"]
