"""Layers over `fastgen.ops`, with the parameter names and shapes of the `torch.nn` layers they replace."""

from __future__ import annotations

from fastgen.nn.conv_bn_act import ConvBNAct, ConvTransposeBNAct
from fastgen.nn.masked_conv2d import MaskedConv2d
from fastgen.nn.row_lstm import RowLSTM
from fastgen.nn.shifted_conv2d import ShiftedConv2d
from fastgen.nn.vector_quantizer import Quantized, VectorQuantizer

__all__ = [
    "ConvBNAct",
    "ConvTransposeBNAct",
    "MaskedConv2d",
    "Quantized",
    "RowLSTM",
    "ShiftedConv2d",
    "VectorQuantizer",
]
