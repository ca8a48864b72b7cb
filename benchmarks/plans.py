"""What `--plan` says a study takes, and what it takes.

    python -m benchmarks.plans --models zoo/pythia-xs
    python -m benchmarks.plans --models zoo/pythia-s --studies detectors --steps -- --max-steered 8

Each plan and each run is a process of its own with one thread; the numbers are seconds of processor time.
What follows `--` is given to each study.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

STUDIES = {
    "localize": ["--model", "{model}", "--sequences", "zoo"],
    "bypass": ["--model", "{model}"],
    "idioms": ["--model", "{model}"],
    "comparative": ["--models", "{model}", "--sequences", "zoo"],
    "detectors": ["--model", "{model}", "--sequences", "zoo"],
    "audit": ["--model", "{model}", "--sequences", "zoo"],
}


def asked(*args: str) -> dict[str, float]:
    """Run `memlens run … --json` and return the processor seconds of its steps."""
    command = [sys.executable, "-m", "memlens", "run", *args, "--json", "--quiet"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, env=env, check=True).stdout)
    steps = answer["steps"] if "--plan" in args else answer["times"]
    return {step["step"]: step["cpu_seconds"] for step in steps}


def row(name: str, planned: float, measured: float) -> str:
    """Return a row of the table."""
    ratio = f"{planned / measured:.2f}" if measured else ""
    return f"| {name} | {planned:.1f} | {measured:.1f} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["zoo/pythia-xs"])
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--steps", action="store_true", help="a row for each step, too")
    parser.add_argument("more", nargs="*", help="options of the study, after --")
    options = parser.parse_args()
    print("| model and study | planned, CPU s | measured | planned / measured |")
    print("|---|---:|---:|---:|")
    for model in options.models:
        for study in options.studies:
            args = [study, *(word.format(model=model) for word in STUDIES[study]), *options.more]
            with tempfile.TemporaryDirectory() as out:
                planned, measured = asked(*args, "--out", out, "--plan"), asked(*args, "--out", out)
            for step in dict.fromkeys([*planned, *measured]) if options.steps else ():
                print(row(f"{study}: {step}", planned.get(step, 0.0), measured.get(step, 0.0)))
            print(row(f"{model}, {study}", sum(planned.values()), sum(measured.values())), flush=True)


if __name__ == "__main__":
    main()
