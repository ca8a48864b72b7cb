"""Workers for a run: processes of this machine, or those of a running Dask scheduler."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any

from cyclopts import Parameter

from memlens.cli.console import ERR
from memlens.errors import OptionError

WorkersOption = Annotated[
    int | None,
    Parameter(
        name="--workers",
        help="Do the sweeps in this many processes of this machine, each with one thread (needs "
        "memlens[dask]).",
    ),
]
SchedulerOption = Annotated[
    str | None,
    Parameter(
        name="--scheduler",
        help="Do the sweeps on the workers of a running Dask scheduler, such as tcp://10.0.0.1:8786, which "
        "see the same folder (needs memlens[dask]).",
    ),
]
_CONNECTING = 30
"""Seconds in which a scheduler has to answer."""


@contextmanager
def executor_of(workers: int | None, scheduler: str | None, part: str | None) -> Iterator[Any]:
    """Yield an executor for `memlens.sweep`, whose processes end with the body; None if none was asked for.

    Args:
        workers: Number of processes of this machine.
        scheduler: Address of a running scheduler.
        part: The share of the work that was asked for instead.

    Raises:
        OptionError: Several of them, no worker, no Dask, or a scheduler that does not answer.
    """
    asked = {"--workers": workers, "--scheduler": scheduler, "--part": part}
    names = [name for name, value in asked.items() if value is not None]
    if len(names) > 1:
        raise OptionError(f"{names[0]} and {names[1]} contradict each other: give one.")
    if workers is None and scheduler is None:
        yield None
        return
    if workers is not None and workers < 1:
        raise OptionError(f"--workers {workers} does no work: give 1 or more.")
    try:
        import distributed
    except ImportError as error:
        raise OptionError(f"{names[0]} needs Dask Distributed: pip install 'memlens[dask]'.") from error
    # What is lost with a worker is warned of by memlens.
    logging.getLogger(distributed.__name__).setLevel(logging.ERROR)
    with _connected(str(scheduler)) if workers is None else _started(workers) as client:
        yield client.get_executor()


def _connected(address: str) -> Any:
    from distributed import Client

    try:
        client: Any = Client(address, timeout=_CONNECTING, set_as_default=False)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"no Dask scheduler answers at {address!r} ({error}): check --scheduler."
        ) from error
    ERR.print(f"{len(client.nthreads())} workers at {address}")
    return client


@contextmanager
def _started(number: int) -> Iterator[Any]:
    from distributed import Client, LocalCluster

    # Each worker holds the model, so that none is paused or ended for its share of the memory.
    options: dict[str, Any] = {"threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
    options["silence_logs"] = logging.ERROR
    with ExitStack() as running:
        with ERR.status(f"starting {number} workers"):
            cluster = running.enter_context(LocalCluster(n_workers=number, host="127.0.0.1", **options))
            client = running.enter_context(Client(cluster, set_as_default=False))
            # Ctrl-C reaches every process of the terminal, but it is this one that ends the workers.
            client.run(_ignore_interrupts)
        yield client


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
