"""The SPANet models (ICCV 2023, arXiv 2308.11568) on top of spanet_kernels: backbones, tasks, training and analyses.

Importing it registers spanet_small, spanet_medium, spanet_mediumx, spanet_base and spanet_basex with timm.
"""

from .model import SPANet, spanet_base, spanet_basex, spanet_medium, spanet_mediumx, spanet_small

__all__ = ["SPANet", "spanet_base", "spanet_basex", "spanet_medium", "spanet_mediumx", "spanet_small"]
