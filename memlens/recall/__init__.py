"""Did the model recall it: metrics, the memorization score, and the sets that follow."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
