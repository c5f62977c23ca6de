"""Spectral filters for vision networks at the speed of a memory copy.

radial_filter(x, base, gain, radius)         any radial profile, per channel
spectral_pool(x, lam, radius, boundary)      the spectral pooling filter of SPANet
SPF(lam, radius, boundary, learnable)        the same as a module
axial_conv(x, weights and biases, radius)    depthwise 1 x k and k x 1 in one pass, with Fourier coefficients
spectral_gate(z, weight, bias, ...)          modulation by a context of filtered channels
spectral_mixer(x, ...)                       proj_in, axial_conv, spectral_gate and proj_out as one operator
pointwise_mlp(x, weights and biases)         the MLP of a block, its GELU within the matrix product where that can be
SPG, SPAM, PointwiseMLP                      the gate, the token mixer and the MLP of SPANet as modules
accelerate(model)                            put SPAM in place of the published layer, in a model of any making
decompositions()                             for export to runtimes without these operators: ONNX and others
backends()                                   which implementation serves which operator on which device
"""

from . import modes, reference
from .backends import backends, use
from .decompositions import decompositions
from .flops import flop_formulas
from .nn import SPAM, SPF, SPG, PointwiseMLP, accelerate, has_hooks
from .ops.axial_conv import axial_conv
from .ops.pointwise_mlp import pointwise_mlp
from .ops.radial_filter import radial_filter, spectral_pool
from .ops.spectral_gate import spectral_gate
from .ops.spectral_mixer import spectral_mixer

__version__ = "0.1.0"
__all__ = [
    "SPAM",
    "SPF",
    "SPG",
    "PointwiseMLP",
    "accelerate",
    "axial_conv",
    "backends",
    "decompositions",
    "flop_formulas",
    "has_hooks",
    "modes",
    "pointwise_mlp",
    "radial_filter",
    "reference",
    "spectral_gate",
    "spectral_mixer",
    "spectral_pool",
    "use",
]
