"""Makes the pictures under docs/images, and saves each script's output next to its picture.

    python docs/figures.py                          # all of them, about 40 minutes on 2 slow cores
    python docs/figures.py regularisation           # some
    python docs/figures.py --quick --into out/      # smoke tests, never into docs/images

Each picture is made by the script of the same name, in its own process, as
`python examples/<name>.py --output docs/images/<name>.png`; its output goes to `<name>.txt` next to
the picture. Seconds in these texts come from the machine that made them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
STYLE = ROOT / "docs" / "figures.mplstyle"  # type sizes, lines and frames of all pictures
MOST_BYTES = 150_000


# Runs the blocks of a page; its picture is the last axes that they call `ax`.
PAGE = """
import re, sys
page, _, output = sys.argv[1:]
names = {}
for code in re.findall(r"^```python\\n(.*?)^```", open(page).read(), re.MULTILINE | re.DOTALL):
    exec(code, names)
names["ax"].figure.set_size_inches(8, 4)
names["ax"].figure.savefig(output, dpi=150)
"""


class Figure(NamedTuple):
    script: str  # under examples/, or a page under docs/
    options: tuple[str, ...] = ()  # differences from the run that examples/README.md reports
    others: tuple[str, ...] = ()  # endings of the further pictures that the script saves


FIGURES = {
    # pages
    "getting_started": Figure("getting_started.md"),
    "first_hypergradient": Figure("reading/first_hypergradient.py", others=("_levels",)),
    "short_horizon": Figure("reading/short_horizon.py"),
    # examples
    "annotators": Figure("annotators.py"),
    "data_hypercleaning": Figure("data_hypercleaning.py", others=("_weights",)),
    "penalty_methods": Figure("penalty_methods.py"),
    "data_attribution": Figure("data_attribution.py"),
    "population": Figure("population.py"),
    "nonstationary": Figure("nonstationary.py"),
    "learned_learning_rates": Figure("learned_learning_rates.py"),
    "regularisation": Figure("regularisation.py"),
    "cross_validation": Figure("cross_validation.py"),
    "compressed_sensing": Figure("compressed_sensing.py"),
    "learned_schedule": Figure("learned_schedule.py"),
    "optimizer_hyperparameters": Figure("optimizer_hyperparameters.py"),
    "ode_calibration": Figure("ode_calibration.py"),
    "convolutional_network": Figure("convolutional_network.py"),
    "language_model_mixture": Figure("language_model_mixture.py"),
    "optuna_hybrid": Figure("optuna_hybrid.py"),
    "where_algorithms_fail": Figure("where_algorithms_fail.py"),
    "which_algorithm": Figure("which_algorithm.py", others=("_noise", "_horizon")),
    "meta_learning_sinusoid": Figure("meta_learning_sinusoid.py", ("--seeds=1",)),  # of 5: minutes
}


def limited(picture: Path) -> None:
    """The picture itself if it is small enough, otherwise in the 256 colours that suit it best."""
    if picture.stat().st_size > MOST_BYTES:
        with Image.open(picture) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
                picture, optimize=True
            )
    if picture.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{picture} has more than {MOST_BYTES:,} bytes")


def make(name: str, into: Path, quick: bool) -> None:
    """Runs one script; its pictures and its output go to `into`."""
    figure, picture = FIGURES[name], into / f"{name}.png"
    options = ["--quick"] if quick else list(figure.options)
    own = {
        "MATPLOTLIBRC": str(STYLE),
        "MPLBACKEND": "Agg",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    started = time.perf_counter()
    # Into a temporary folder first: a script that fails leaves the old picture.
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / picture.name
        if figure.script.endswith(".md"):
            shown, program = (
                f"blocks of docs/{figure.script}",
                ["-c", PAGE, ROOT / "docs" / figure.script],
            )
            options = []
        else:
            shown = " ".join(["python", f"examples/{figure.script}", *options])
            program = [ROOT / "examples" / figure.script]
        command = [sys.executable, *program, *options, "--output", made]
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr}")
        for ending in () if quick else ("", *figure.others):
            if not made.with_stem(name + ending).exists():
                raise SystemExit(f"{name} saved no {name}{ending}.png")
        wanted = {made.with_stem(name + ending) for ending in ("", *figure.others)}
        for path in sorted(wanted & set(made.parent.glob("*.png"))):
            limited(path)
            (into / path.name).write_bytes(path.read_bytes())
    told = done.stdout.replace(scratch, "docs/images")
    (into / f"{name}.txt").write_text(f"{shown}\n\n{told}")
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)}")
    parser.add_argument(
        "--quick", action="store_true", help="scripts in their quick form, not into docs/images"
    )
    parser.add_argument("--into", type=Path, help="a folder (default docs/images)")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(FIGURES)
    if unknown:
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    into = options.into or (Path(tempfile.mkdtemp()) if options.quick else IMAGES)
    if options.quick and into.resolve() == IMAGES:
        parser.error("--quick pictures are too short to show: give another folder")
    into.mkdir(parents=True, exist_ok=True)
    for name in options.names or FIGURES:
        make(name, into, options.quick)
    print(f"pictures in {into}")


if __name__ == "__main__":
    main()
