"""Keep the console clean while TransformerLens and transformers load a model, without lasting effects."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

_LOG = logging.getLogger(__name__)


def _not_from_transformer_lens(record: logging.LogRecord) -> bool:
    return "transformer_lens" not in record.pathname


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, log lines below ERROR, prints and progress bars of the loaders.

    The hub's download bars remain, since a download may take an hour. Printed text goes to this module's
    logger at DEBUG. Log levels, handlers, filters, warning filters and progress bars are restored when the
    block ends, also after an exception. (TransformerLens logs to the root logger, which then gets a handler;
    it is removed again.)
    """
    root = logging.getLogger()
    handlers = list(root.handlers)
    verbosity = transformers_logging.get_verbosity()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    printed = io.StringIO()
    root.addFilter(_not_from_transformer_lens)
    transformers_logging.set_verbosity_error()
    hub.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(printed), _no_loading_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeFilter(_not_from_transformer_lens)
        for handler in [h for h in root.handlers if h not in handlers]:
            root.removeHandler(handler)
        transformers_logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if printed.getvalue().strip():
            _LOG.debug("printed while loading: %s", printed.getvalue().strip())


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Transformers' switch also affects the hub's bars, which are restored on entry and on exit."""
    loading_bars = transformers_logging.is_progress_bar_enabled()
    set_hub_bars = disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars
    transformers_logging.disable_progress_bar()
    set_hub_bars()
    try:
        yield
    finally:
        if loading_bars:
            transformers_logging.enable_progress_bar()
            set_hub_bars()
