"""Layers over `fastgen.ops`, with the parameter names and shapes of the `torch.nn` layers they replace."""

from __future__ import annotations

from fastgen.nn.conv_transpose_bn_act import ConvTransposeBNAct
from fastgen.nn.masked_conv2d import MaskedConv2d

__all__ = ["ConvTransposeBNAct", "MaskedConv2d"]
