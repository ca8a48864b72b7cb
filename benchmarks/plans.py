"""What `--plan` says a study takes, and what it takes.

    python -m benchmarks.plans --model zoo/pythia-xs

Each plan and each run is a process of its own with one thread; the numbers are seconds of processor time.
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
}


def asked(*args: str) -> list[dict[str, float]]:
    """Run `memlens run … --json` and return its steps."""
    command = [sys.executable, "-m", "memlens", "run", *args, "--json", "--quiet"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, env=env, check=True).stdout)
    return answer["steps"] if "--plan" in args else answer["times"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="zoo/pythia-xs")
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    options = parser.parse_args()
    print("| study | planned | measured | planned / measured |")
    print("|---|---|---|---|")
    for study in options.studies:
        args = [word.format(model=options.model) for word in STUDIES[study]]
        with tempfile.TemporaryDirectory() as out:
            steps = asked(study, *args, "--out", out, "--plan"), asked(study, *args, "--out", out)
        planned, measured = (sum(step["cpu_seconds"] for step in each) for each in steps)
        print(f"| {study} | {planned:.0f} | {measured:.0f} | {planned / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
