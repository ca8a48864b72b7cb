"""The tests and the benchmark table on another device: `python -m benchmarks.on_device --device cuda`.

It needs no network. `gpu/summary.json` says when and on what it ran, what the tests found, and the tables of
both precisions, each also in a folder of its own. It exits with 1 if a test fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

TESTS = tuple(
    f"tests/{name}" for name in ("forward", "sweeps", "instruments", "models", "recall", "organisms")
)
"""Where models run; everything else does not know the device."""


def machine(device: str) -> dict[str, str]:
    """Return the date, the device's name, and the versions that matter."""
    cuda = device.startswith("cuda") and torch.cuda.is_available()
    found = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(torch.device(device)) if cuda else device,
        "processor": platform.processor() or platform.machine(),
        "cuda": str(torch.version.cuda),
    }
    for package in ("torch", "transformers", "transformer-lens", "memlens"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def tested(device: str, out: Path, tests: list[str], workers: int, seconds: float | None) -> dict[str, Any]:
    """Run tests with their models on the device; return how many passed and failed, and which failed."""
    report = out / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--device", device, f"--junitxml={report}", "--tb=line"]
    command += ["-p", "no:cacheprovider", *tests]
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers), "--dist", "worksteal"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    timed_out = False
    with (out / "tests.log").open("w") as log:
        try:
            subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            timed_out = True
    if not report.exists() or "<testcase" not in report.read_text():
        return {"timed_out": timed_out, "error": (out / "tests.log").read_text()[-2000:]}
    suite = next(ET.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "seconds": float(suite.get("time", 0)), "timed_out": timed_out, "failed": failed}


def main() -> None:
    """Run both parts and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="folders or files; none: no tests")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, help="most for the tests")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], help="none: no table")
    parser.add_argument("--model", nargs="+", default=["pythia-160m", "pythia-410m", "pythia-1.4b"])
    parser.add_argument("--backend", nargs="+", default=["hooked"])
    parser.add_argument("--rows", nargs="+", default=[])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: run it on a machine with one, or try --device cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"machine": machine(args.device)}
    if args.tests:
        summary["tests"] = tested(args.device, args.out, args.tests, args.workers, args.seconds)
        print(json.dumps(summary["tests"], indent=1), flush=True)
    for dtype in args.dtypes:
        folder = args.out / dtype
        command = [sys.executable, "-m", "benchmarks.run", "--device", args.device, "--dtype", dtype]
        command += ["--model", *args.model, "--backend", *args.backend, "--repeats", str(args.repeats)]
        command += ["--out", str(folder), *(["--rows", *args.rows] if args.rows else [])]
        ended = subprocess.run(command, check=False).returncode
        table = folder / "table.json"
        summary[dtype] = json.loads(table.read_text()) if ended == 0 else {"exit": ended}
        (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
    tests = summary.get("tests", {})
    bad = "error" in tests or tests.get("timed_out") or tests.get("failures") or tests.get("errors")
    raise SystemExit(1 if bad or any("exit" in summary[dtype] for dtype in args.dtypes) else 0)


if __name__ == "__main__":
    main()
