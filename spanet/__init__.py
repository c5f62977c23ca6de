"""The SPANet models (ICCV 2023, arXiv 2308.11568) on top of spanet_kernels: backbones, tasks, training and analyses.

Empty so far: the kernels come first. Until the models are here, `spanet_kernels.SPF` is the part of them that works.
"""
