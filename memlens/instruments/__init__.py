"""Where recall is stored: decode, patch, ablate, bypass, knock out, perturb, attribute."""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
