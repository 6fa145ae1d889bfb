"""Does the verdict of `check_hypergradient` come true? Its number against retraining scores.

Every configuration is a training run of a small classifier. Its score is that of
`retraining_score`: the rank correlation, over retrainings with a few percent of the examples left
out, of predicted and true changes in the validation loss. The thresholds between the verdicts are
set on a random half of the configurations and tested on the other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.rows import Kept, measured
from benchmarks.trust.grid import GRID, QUICK
from benchmarks.trust.problems import Config
from benchmarks.trust.scoring import judged, row_of
from gradhpo.diagnostics.trust import NOT_TRUSTED, TRUSTED
from gradhpo.utils.tables import aligned


ROWS = Path(__file__).parents[1] / "results" / "trust.jsonl"
RETRAININGS, SEED, OTHER_SPLITS = 48, 0, 200
GOOD, BAD, EXCELLENT = 0.8, 0.5, 0.95


class Thresholds(NamedTuple):
    """Values of `trust`, halfway between the configurations on either side."""

    trusted: float
    not_trusted: float


def print_trust(quick: bool = False, file: Path | Kept | None = None) -> None:
    """Configurations already in the file are not measured again."""
    configs, retrainings = (QUICK, 8) if quick else (GRID, RETRAININGS)
    rows = measured_of(configs, retrainings, file)
    setting = setting_half(configs)
    print(
        f"\nTrust of check_hypergradient against the score of {retrainings} retrainings; thresholds"
        f"\nare set on the half marked * (seed {SEED}) and tested on the other\n"
    )
    print(_table(configs, rows, setting))
    minutes = sum(sum(row["seconds"]) for row in rows) / 60
    print(f"\nmeasuring the rows took {minutes:.0f} minutes")
    if quick:
        print("\n(--quick: nothing is judged)")
    else:
        _print_judged(configs, rows, setting)


def setting_half(configs: Sequence[Config], seed: int = SEED) -> np.ndarray:
    """Marks the configurations that set the thresholds."""
    drawn = np.random.default_rng(seed).permutation(len(configs))[: (len(configs) + 1) // 2]
    return np.isin(np.arange(len(configs)), drawn)


def measured_of(
    configs: Sequence[Config], retrainings: int, file: Path | Kept | None
) -> list[dict]:
    """The configurations' rows, each written to the file once measured."""
    settings = [vars(config) | {"retrainings": retrainings} for config in configs]
    config_of = lambda row: Config(**{name: row[name] for name in Config.__dataclass_fields__})
    return measured(settings, lambda row: row_of(config_of(row), retrainings), file)


def thresholds_of(trust: np.ndarray, scores: np.ndarray) -> Thresholds:
    """All trust above the first goes with a good score, all below the second with a bad one."""
    not_good, not_bad = trust[scores < GOOD], trust[scores >= BAD]
    above = trust[trust > np.max(not_good, initial=0.0)]
    below = trust[trust < np.min(not_bad, initial=1.0)]
    return Thresholds(
        (np.max(not_good, initial=0.0) + np.min(above, initial=1.0)) / 2,
        (np.min(not_bad, initial=1.0) + np.max(below, initial=0.0)) / 2,
    )


def auc(trust: np.ndarray, scores: np.ndarray) -> float:
    """The probability that a good score has more trust than a bad one; ties count half."""
    good, bad = trust[scores >= GOOD][:, None], trust[scores < BAD][None]
    return float(np.mean((good > bad) + 0.5 * (good == bad)))


def _table(configs: Sequence[Config], rows: list[dict], setting: np.ndarray) -> str:
    head = ["", "score", "95 %", "trust", "verdict", "perturbed", "float64", "last bit", "redrawn"]
    table = [[*head, "exact", "smooth", "width"]]
    for i in sorted(range(len(rows)), key=lambda i: (rows[i]["score"], rows[i]["trust"])):
        row, agreement = rows[i], rows[i]["agreement"]
        names = ("perturbed", "float64", "rounded", "redrawn", "exact")
        table.append([
            ("* " if setting[i] else "  ") + configs[i].name,
            f"{row['score']:.2f}",
            "{:.2f} to {:.2f}".format(*row["interval"]),
            f"{row['trust']:.2f}",
            judged(row, configs[i])[0],
            *(_short(agreement.get(name)) for name in names),
            _short(row["metasmoothness"]),
            f"{row['width']:.0e}",
        ])  # fmt: skip
    return aligned(table)


def _spread(found: Sequence[Thresholds], which: int) -> str:
    low, middle, high = np.percentile([x[which] for x in found], [5, 50, 95])
    return f"{low:.2f} to {high:.2f}, median {middle:.2f}"


def _short(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.2f}"


def _print_judged(configs: Sequence[Config], rows: list[dict], setting: np.ndarray) -> None:
    scores, trust = (np.asarray([row[name] for row in rows]) for name in ("score", "trust"))
    found = thresholds_of(trust[setting], scores[setting])
    tested = ~setting
    of_all = thresholds_of(trust, scores)
    others = [
        thresholds_of(trust[half], scores[half])
        for half in (setting_half(configs, seed) for seed in range(OTHER_SPLITS))
    ]
    print(
        f"\n{len(rows)} configurations: {np.sum(scores < BAD)} with a score below {BAD}, "
        f"{np.sum(scores >= GOOD)} of {GOOD} and more, {np.sum(scores > EXCELLENT)} above "
        f"{EXCELLENT}"
        f"\nthresholds that the half * gives: trusted from {found.trusted:.2f}, not trusted below "
        f"{found.not_trusted:.2f}; the library has {TRUSTED} and {NOT_TRUSTED}"
        f"\nfrom all rows {of_all.trusted:.2f} and {of_all.not_trusted:.2f}; of {OTHER_SPLITS} "
        f"other halves, 5 to 95 %: {_spread(others, 0)} and {_spread(others, 1)}"
        f"\narea under the curve, scores of {GOOD} and more against scores below {BAD}: all "
        f"{auc(trust, scores):.3f}, tested half {auc(trust[tested], scores[tested]):.3f}"
    )
    decided = [judged(row, config) for row, config in zip(rows, configs, strict=True)]
    verdicts = np.asarray([verdict for verdict, _ in decided])
    for name, which in (("set", setting), ("tested", tested)):
        counts = []
        for verdict in ("trusted", "doubtful", "not trusted"):
            of = scores[which & (verdicts == verdict)]
            span = f" ({of.min():.2f} to {of.max():.2f})" if len(of) else ""
            counts.append(f"{verdict} {len(of)}{span}")
        print(f"{name} half: " + ", ".join(counts))
    rule = tested & np.where(verdicts == "trusted", scores < GOOD, False)
    rule |= tested & np.where(verdicts == "not trusted", scores >= BAD, False)
    wrong = [
        i
        for i in np.flatnonzero(tested)
        if (verdicts[i] == "trusted" and scores[i] < BAD)
        or (verdicts[i] == "not trusted" and scores[i] > EXCELLENT)
    ]
    print(f"tested half, trusted below {BAD} or not trusted above {EXCELLENT}: {len(wrong)}")
    print(f"tested half, trusted below {GOOD} or not trusted from {BAD} on: {np.sum(rule)}")
    print("\nWhere the verdict is not what the score alone would give:")
    odd = (verdicts == "trusted") & (scores < GOOD)
    odd |= (verdicts == "not trusted") & (scores >= BAD)
    odd |= (verdicts == "doubtful") & ((scores < BAD) | (scores >= GOOD))
    for i in np.flatnonzero(odd).tolist():
        print(f"- {configs[i].name}: score {scores[i]:.2f}, {verdicts[i]} ({trust[i]:.2f})")
        for reason in decided[i][1]:
            print(f"    {reason}")
        per_query = ", ".join(map(_short, rows[i]["per_query"]))
        print(f"    scores of the queries: {per_query}")
    if not np.any(odd):
        print("nowhere")
