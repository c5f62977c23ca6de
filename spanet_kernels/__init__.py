"""Spectral filters for vision networks at the speed of a memory copy.

radial_filter(x, base, gain, radius)         any radial profile, per channel
spectral_pool(x, lam, radius, boundary)      the spectral pooling filter of SPANet
SPF(lam, radius, boundary, learnable)        the same as a module
backends()                                   which implementation serves which operator on which device
"""

from . import modes, reference
from .backends import backends, use
from .nn import SPF
from .ops.radial_filter import radial_filter, spectral_pool

__version__ = "0.1.0"
__all__ = ["SPF", "backends", "modes", "radial_filter", "reference", "spectral_pool", "use"]
