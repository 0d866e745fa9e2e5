"""Operations: one module for each, with the plain PyTorch reference beside the public function."""

from __future__ import annotations

from fastgen.ops import philox
from fastgen.ops.concat_elu import concat_elu
from fastgen.ops.conv2d_bn_act import conv2d_bn_act
from fastgen.ops.conv_transpose2d_bn_act import conv_transpose2d_bn_act
from fastgen.ops.gated_unit import gated_unit
from fastgen.ops.group_norm_act import group_norm_act
from fastgen.ops.logistic_mixture_nll import logistic_mixture_nll
from fastgen.ops.masked_conv2d import conv_mask, masked_conv2d
from fastgen.ops.nearest_code import nearest_code
from fastgen.ops.normal import normal
from fastgen.ops.reparameterize import reparameterize
from fastgen.ops.row_lstm import row_lstm
from fastgen.ops.shifted_conv2d import shifted_conv2d
from fastgen.ops.upfirdn2d import upfirdn2d

__all__ = [
    "concat_elu",
    "conv2d_bn_act",
    "conv_mask",
    "conv_transpose2d_bn_act",
    "gated_unit",
    "group_norm_act",
    "logistic_mixture_nll",
    "masked_conv2d",
    "nearest_code",
    "normal",
    "philox",
    "reparameterize",
    "row_lstm",
    "shifted_conv2d",
    "upfirdn2d",
]
