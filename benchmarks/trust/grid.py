"""The configurations that set and test the thresholds."""

from benchmarks.trust.problems import Config


_DIGITS = [
    Config(),
    Config(factor=5),
    Config(factor=30),
    Config(steps=500, batch_size=100),
    Config(factor=5, steps=500, batch_size=100),
    Config(steps=1_000, batch_size=20, left_out=0.01),
    Config(factor=30, steps=50, activation="relu"),
    Config(factor=5, steps=200, batch_size=20, activation="relu"),
    Config(steps=200, batch_size=100, activation="relu", left_out=0.05),
    Config(inner="adam", eps_root=1e-6),
    Config(inner="adam", eps_root=1e-8),
    Config(inner="adam", eps_root=1e-10),
    Config(inner="adam", eps_root=0.0),
    Config(inner="adam", eps_root=1e-6, factor=5, steps=200),
    Config(inner="adam", eps_root=1e-8, factor=5, activation="relu"),
    Config(inner="adam", eps_root=1e-6, factor=30),
    Config(inner="muon"),
    Config(inner="muon", factor=5, steps=50),
    Config(dropout="replayed"),
    Config(dropout="live"),
    Config(dropout="replayed", factor=5, steps=200, activation="relu"),
    Config(inner="adam", eps_root=1e-6, dropout="live", left_out=0.05),
    Config(dtype="bfloat16"),
    Config(dtype="bfloat16", factor=5, steps=200),
    Config(dtype="bfloat16", inner="adam", eps_root=1e-6),
    Config(estimator="last tenth"),
    Config(estimator="DrMAD"),
    Config(estimator="one step", left_out=0.05),
]
_CANCER = [
    Config("cancer"),
    Config("cancer", factor=5, steps=200),
    Config("cancer", factor=30, steps=200),
    Config("cancer", steps=50, activation="relu", left_out=0.05),
    Config("cancer", factor=30, batch_size=200, activation="relu"),
    Config("cancer", inner="adam", eps_root=1e-6),
    Config("cancer", inner="adam", eps_root=1e-8, steps=200),
    Config("cancer", inner="adam", eps_root=1e-10),
    Config("cancer", inner="adam", eps_root=0.0),
    Config("cancer", inner="muon", steps=50),
    Config("cancer", dropout="live", left_out=0.05),
    Config("cancer", dtype="bfloat16"),
    Config("cancer", factor=5, steps=1_000, batch_size=20, left_out=0.01),
    Config("cancer", inner="adam", eps_root=1e-6, factor=5, steps=500),
    Config("cancer", steps=50, batch_size=400, left_out=0.05),
    Config("cancer", estimator="last tenth", steps=200),
]
GRID = [*_DIGITS, *_CANCER]
# For `--quick`: enough to see that everything runs.
QUICK = [Config(steps=20), Config(factor=30, steps=50), Config("cancer", steps=20, dropout="live")]
