"""Studies end to end: from a model and sequences to a folder of results with a report."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
