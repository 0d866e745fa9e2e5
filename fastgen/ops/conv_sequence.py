"""`conv2d_bn_act` and `conv_transpose2d_bn_act`, one or several in turn, at the price of one native call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.ops import conv_cpu as cpu
from fastgen.ops.conv2d_bn_act import conv2d_bn_act
from fastgen.ops.conv_block import goes_straight
from fastgen.ops.conv_cpu import Options
from fastgen.ops.conv_transpose2d_bn_act import conv_transpose2d_bn_act
from fastgen.ops.known_convs import BLOCK_TENSORS, Blocks, Call, Tensors, call_known, keep, of_block


def conv_bn_act_sequence(input: Tensor, tensors: Tensors, blocks: Blocks, contiguous: bool = False) -> Tensor:
    """The last result of `conv2d_bn_act` and `conv_transpose2d_bn_act` in turn, each of the result of the one before.

    Args:
        input: [N, Cin, H, W], or [Cin, H, W] where no block has a norm.
        tensors: weight, bias, running_mean, running_var, bn_weight and bn_bias of the first block, then of the second,
            and so on.
        blocks: of each whether its convolution is a transposed one, and its `Options` as a tuple.
        contiguous: whether the result is made contiguous.
    """
    if isinstance(input, Tensor) and input.dim() == 3 and all(mean is None for mean in tensors[2::BLOCK_TENSORS]):
        return conv_bn_act_sequence(input[None], tensors, blocks, contiguous)[0]  # which convolutions take, norms not
    if torch.compiler.is_compiling() or not isinstance(input, Tensor):
        output = _one_by_one(input, tensors, blocks)
    else:
        known = call_known(input, tensors, blocks, contiguous)
        output = _first_time(input, tensors, blocks, contiguous) if known is None else known
    return output.contiguous() if contiguous else output


def _first_time(input: Tensor, tensors: Tensors, blocks: Blocks, contiguous: bool) -> Tensor:
    if not goes_straight((input, *tensors)):
        return _one_by_one(input, tensors, blocks)
    calls: list[Call | None] = []
    output = _one_by_one(input, tensors, blocks, calls)
    if None not in calls:
        keep(input, tensors, blocks, calls, output, contiguous)  # type: ignore[arg-type]
    return output


def _one_by_one(input: Tensor, tensors: Tensors, blocks: Blocks, calls: list[Call | None] | None = None) -> Tensor:
    """`calls` gets what served the blocks."""
    for i, (transposed, block) in enumerate(blocks):
        weight, *channels = of_block(tensors, i)
        options = Options(*block)
        given = {name: getattr(options, name) for name in ("stride", "padding", "groups", "dilation", "eps")}
        given |= {"activation": options.activation, "negative_slope": options.parameter, "alpha": options.parameter}
        if transposed:
            output = conv_transpose2d_bn_act(input, weight, *channels, output_padding=options.output_padding, **given)
        else:
            output = conv2d_bn_act(input, weight, *channels, **given)
        if calls is not None:
            calls.append(cpu.served(transposed, (input, weight, *channels), options))
        input = output
    return input
