"""What a run reports at its end: how many steps, how many refused, and why it stopped."""

from collections.abc import Sequence

import numpy as np

from gradhpo.training.record import Record
from gradhpo.training.stopping import Stopped


_GROWN = 100.0  # more than noise
_FEW_LOOKS = 5  # of a monitor
_RISEN = 0.02  # a monitored loss, relative to its lowest value


def write_report(
    ending: Stopped,
    record: Record,
    num_steps: int,
    seconds: float,
    remark: str,
    advice: tuple[str, str],
    unwritten: list[str],
    logs: list[str],
    last_checkpoint: int | None,
    monitored: Sequence[str],
    sizes: tuple[int | None, int],
    why: str | None,
) -> str:
    """The sentences, in order of importance.

    `remark` comes from the algorithm; `advice` is for derivatives, and for losses, that are not
    finite; `unwritten` are the checkpoints that failed, and `logs` says what loggers could not
    write; `last_checkpoint` says after how many steps the last one was written, if that is not the
    end; `sizes` are the numbers of validation examples and of hyperparameters; `why` is the
    explanation of the callback that stopped the run.
    """
    earlier = f" ({record.resumed_at} of them before it was resumed)" if record.resumed_at else ""
    rejected = len(record.rejected)
    sentences = ["Every step was rejected."] * (0 < record.taken == rejected)
    sentences.append(
        f"{record.taken} of {num_steps} steps{earlier} in {seconds:.1f} s, {rejected} "
        f"rejected as non-finite{_where(record.rejected)}. {why or _why(ending, record)}"
    )
    if remark:
        sentences.append(remark)
    else:
        advised = _on_rejections(record, *advice)
        sentences += advised + _on_divergence(record, bool(advised))
    if ending.error is None:
        sentences += _on_over_fitting(record, monitored, *sizes) + _on_looks(record, monitored)
    if unwritten:
        sentences.append(
            f"{len(unwritten)} checkpoints could not be written; the last time: {unwritten[-1]}."
        )
    sentences += [f"{said}." for said in logs]
    if last_checkpoint is not None:
        sentences.append(f"The last checkpoint is from step {last_checkpoint}.")
    return " ".join(sentences)


def _where(rejected: list[int]) -> str:
    if not rejected:
        return ""
    shown = ", ".join(map(str, rejected[:5])) + (", ..." if len(rejected) > 5 else "")
    return f" (step{'s' if len(rejected) > 1 else ''} {shown})"


def _why(ending: Stopped, record: Record) -> str:
    error = ending.error
    said = "" if error is None else f"{type(error).__name__}: {error}"
    notes = getattr(error, "__notes__", [])
    where = "; ".join(note for note in notes if note.startswith("in "))  # not JAX's
    reasons = {
        "num_steps": "The run is complete."
        + " There was nothing left to do." * (record.resumed_at == record.taken),
        "callback": "A callback stopped the run.",
        "interrupted": "It was interrupted.",
        "time limit": "Its time limit was reached.",
        "data error": f"A data source failed: {said}",
        "callback error": f"A callback failed: {said}" + f" ({where})" * bool(where),
        "loss error": f"A check within a loss failed: {said}",
        "device error": f"The device failed: {said}",
        "out of memory": f"The device is out of memory: {said}. {' '.join(notes)}",
        "data exhausted": (
            "An iterator ended; gradhpo.iterate(loader) restarts a loader at its end."
        ),
        "rejected": (
            f"{record.longest} consecutive steps were non-finite and were rejected: they left no "
            "trace in the state."
        ),
    }
    return reasons.get(ending.reason, f"A callback stopped the run: {ending.reason}.")


def _on_rejections(record: Record, on_derivatives: str, on_losses: str) -> list[str]:
    if record.of_derivatives:
        return [
            f"In {record.of_derivatives} of the rejected steps both losses were finite and "
            "only the hypergradient was not: something that is differentiated has no finite "
            f"derivative. {on_derivatives}"
        ]
    if record.in_a_row:  # the run ended this way
        return [on_losses]
    return []


def _on_divergence(record: Record, advised: bool) -> list[str]:
    """A loss that has blown up without becoming infinite, which nothing refuses.

    `advised`: the report has named the usual causes already.
    """
    metrics = record.shown()
    paths = {
        "training loss": metrics["train_loss"],
        "validation loss": metrics["val_loss"],
        "norm of the parameters": np.append(record.norm_at_start, metrics["param_norm"]),
    }
    grown = []
    for name, values in paths.items():
        finite = values[np.isfinite(values)]
        if len(finite) > 1 and finite[-1] > _GROWN * abs(finite[0]) > 0:
            grown.append(f"the {name} grew from {finite[0]:.3g} to {finite[-1]:.3g}")
    if not grown:
        return []
    usual = ": usually a learning rate too high (inner or outer), or a momentum of 1 or more"
    return [
        f"Does it diverge? {_capital(', '.join(grown))}{'' if advised else usual}. "
        "gradhpo.BestState keeps the state from before."
    ]


def states_lost(taken: int, step: int) -> str:
    """Explains which states a failure destroyed, if none of them is left."""
    return (
        f" The states after its first {_counted(taken, 'step')} are gone, since each chunk "
        "overwrites the state before it and the last one failed: run returns the state that it was "
        f"given, of step {step}, and a history without these steps. With checkpoint= or a "
        "callback, run keeps states."
    )


def not_finite_at_first(record: Record) -> str:
    """The first loss that was not finite in the first step, or nothing."""
    metrics = record.shown()
    losses = {"train_loss": "training loss", "val_loss": "validation loss"}
    at_first = lambda name: metrics[name][:1]
    bad = [said for name, said in losses.items() if not np.all(np.isfinite(at_first(name)))]
    return next(iter(bad), "")


def _on_over_fitting(
    record: Record, monitored: Sequence[str], examples: int | None, hyperparams: int
) -> list[str]:
    """A monitored loss that rises while the validation loss falls, and the amount of data."""
    metrics = record.shown()
    sentences = []
    for name in monitored:
        is_loss = "loss" in name.lower() or "error" in name.lower()
        at = np.flatnonzero(np.isfinite(metrics[name])) if is_loss else np.zeros(0, int)
        if len(at) < 2:
            continue
        values, val = metrics[name][at], metrics["val_loss"][at]
        lowest = int(np.argmin(values))
        if values[-1] > (1 + _RISEN) * values[lowest] and val[-1] < val[lowest]:
            sentences.append(
                f"{name} has risen from {values[lowest]:.3g} after {at[lowest] + 1} steps to "
                f"{values[-1]:.3g}, while the validation loss fell from {val[lowest]:.3g} to "
                f"{val[-1]:.3g}: the hyperparameters fit the validation set. Stop there "
                f"(EarlyStopping(metric={name!r})), tune fewer hyperparameters, penalise them, or "
                "validate on more examples."
            )
    if examples is not None and hyperparams:
        each = f", {examples / hyperparams:.3g} for each" if hyperparams > 1 else ""
        counts = _counted(examples, "validation example"), _counted(hyperparams, "hyperparameter")
        sentences.append(f"{' for '.join(counts)}{each}.")
    return sentences


def _on_looks(record: Record, monitored: Sequence[str]) -> list[str]:
    """Monitors that look at too few ends of chunks to show a trend."""
    metrics = record.shown()
    looks = max((int(np.sum(np.isfinite(metrics[name]))) for name in monitored), default=0)
    if not 0 < looks < min(_FEW_LOOKS, record.taken):
        return []
    size = max(1, record.taken // 10)
    return [
        f"Monitor looked only {_counted(looks, 'time')}: run(chunk_size={size}) makes it look "
        "more often."
    ]


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
