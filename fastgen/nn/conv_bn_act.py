from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen import ops
from fastgen._hooks import has_hooks


class _Block(torch.nn.Sequential):
    """A convolution, with BatchNorm and activation or without, which subclasses compute at once."""

    def __init__(
        self,
        conv: torch.nn.Module,
        channels: int,
        batch_norm: bool,
        activation: str,
        negative_slope: float,
        alpha: float,
        norm: dict[str, Any],
    ):
        super().__init__(conv)
        if batch_norm:
            self.append(torch.nn.BatchNorm2d(channels, **norm))
        if activation != "none":
            self.append(_activation(activation, negative_slope, alpha))

    def _call(self, input: Tensor) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        """Weight, bias and the tensors of the BatchNorm, and the options, as the operation takes them.

        A step of training is counted.
        """
        conv: Any
        conv, *rest = self._modules.values()
        options: dict[str, Any] = {
            "stride": conv.stride, "padding": conv.padding, "groups": conv.groups, "dilation": conv.dilation
        }  # fmt: skip
        tensors: tuple[Tensor | None, ...] = ()
        if rest and isinstance(rest[0], torch.nn.BatchNorm2d):
            norm: Any = rest.pop(0)
            tensors, options["momentum"] = _batch_norm(norm, input)
            options["training"], options["eps"] = tensors[0] is None or norm.training, norm.eps
        if rest:
            act: Any = rest[0]
            options["activation"] = _NAMES[type(act)]
            if type(act) is torch.nn.LeakyReLU:
                options["negative_slope"] = act.negative_slope
            elif type(act) is torch.nn.ELU:
                options["alpha"] = act.alpha
        return (conv.weight, conv.bias, *tensors), options

    def __getitem__(self, index: Any) -> Any:
        """A slice is a plain `Sequential`."""
        return torch.nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


class ConvBNAct(_Block):
    """`ops.conv2d_bn_act` as a layer: [N, in_channels, H, W] -> [N, out_channels, H', W'].

    It is the `Sequential(Conv2d, BatchNorm2d, activation)` that it replaces, computed at once: same members, same
    initialisation, and the state dicts load both ways ("0.weight", "1.running_mean", ...).  A member that was replaced
    by one of another class (or by an approximate GELU), of another dtype or with hooks (spectral norm in the old way),
    padding by anything but zeros, or an image without a batch makes the layer run its members in turn.  Results are
    channels-last in memory where a native kernel computed them.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in `torch.nn.Conv2d`.
        batch_norm: whether there is a BatchNorm.
        activation: one of `ops.ACTIVATIONS`; "none" has no module.
        negative_slope, alpha: of leaky_relu and elu.
        eps, momentum, affine, track_running_stats: as in `torch.nn.BatchNorm2d`.

    Raises:
        ValueError: an option is not as above, or does not fit the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        batch_norm: bool = True,
        activation: str = "relu",
        negative_slope: float = 0.01,
        alpha: float = 1.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = torch.nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **where)
        norm = {"eps": eps, "momentum": momentum, "affine": affine, "track_running_stats": track_running_stats, **where}
        super().__init__(conv, out_channels, batch_norm, activation, negative_slope, alpha, norm)

    def forward(self, input: Tensor) -> Tensor:
        if not _is_fusible(self, torch.nn.Conv2d, input):
            return self.in_turn(input)
        tensors, options = self._call(input)
        return ops.conv2d_bn_act(input, *tensors, **options)  # type: ignore[arg-type]

    def in_turn(self, input: Tensor) -> Tensor:
        """The same, member by member, as a `Sequential` does it."""
        for member in self:
            input = member(input)
        return input


class ConvTransposeBNAct(_Block):
    """`ops.conv_transpose2d_bn_act` as a layer: [N, in_channels, H, W] -> [N, out_channels, H', W'].

    It is the `Sequential(ConvTranspose2d, BatchNorm2d, activation)` that it replaces, computed at once: same members,
    same initialisation, and the state dicts load both ways ("0.weight", "1.running_mean", ...).  A member that was
    replaced by one of another class (or by an approximate GELU), of another dtype or with hooks (spectral norm in the
    old way), or an image without a batch makes the layer run its members in turn.  Results are channels-last in memory
    where a native kernel computed them.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation: as in
            `torch.nn.ConvTranspose2d`.
        batch_norm: whether there is a BatchNorm.
        activation: one of `ops.ACTIVATIONS`; "none" has no module.
        negative_slope, alpha: of leaky_relu and elu.
        eps, momentum, affine, track_running_stats: as in `torch.nn.BatchNorm2d`.

    Raises:
        ValueError: an option is not as above, or does not fit the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        *,
        batch_norm: bool = True,
        activation: str = "relu",
        negative_slope: float = 0.01,
        alpha: float = 1.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = torch.nn.ConvTranspose2d(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, **where
        )
        norm = {"eps": eps, "momentum": momentum, "affine": affine, "track_running_stats": track_running_stats, **where}
        super().__init__(conv, out_channels, batch_norm, activation, negative_slope, alpha, norm)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """`output_size` (H', W') chooses among the sizes that the stride leaves open, as in `ConvTranspose2d`."""
        if not _is_fusible(self, torch.nn.ConvTranspose2d, input):
            return self.in_turn(input, output_size)
        conv: Any = next(iter(self))
        padding = conv.output_padding
        if output_size is not None:
            padding = conv._output_padding(
                input, output_size, conv.stride, conv.padding, conv.kernel_size, 2, conv.dilation
            )
        tensors, options = self._call(input)
        return ops.conv_transpose2d_bn_act(input, *tensors, output_padding=padding, **options)  # type: ignore[arg-type]

    def in_turn(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The same, member by member, as a `Sequential` does it."""
        conv: Any
        conv, *rest = self
        output = conv(input) if output_size is None else conv(input, output_size)
        for member in rest:
            output = member(output)
        return output


_ACTIVATIONS = {
    "relu": torch.nn.ReLU,
    "leaky_relu": torch.nn.LeakyReLU,
    "elu": torch.nn.ELU,
    "tanh": torch.nn.Tanh,
    "sigmoid": torch.nn.Sigmoid,
    "silu": torch.nn.SiLU,
    "gelu": torch.nn.GELU,
}
_NAMES = {module: name for name, module in _ACTIVATIONS.items()}


def _is_fusible(members: Iterable[torch.nn.Module], conv: type[torch.nn.Module], input: Tensor) -> bool:
    """Whether the members are as they were made: the classes alone, padding by zeros, a GELU that is not approximate,
    and no hooks; and whether they are of the input's dtype, and that a batch of images.
    """
    if input.dim() != 4:
        return False
    dtype, kinds = input.dtype, []
    member: Any
    for member in members:
        kind = type(member)
        kinds.append(kind)
        for value in member._parameters.values():
            if value is not None and value.dtype != dtype:
                return False
        if (kind is torch.nn.GELU and member.approximate != "none") or has_hooks(member):
            return False
        if kind is conv and member.padding_mode != "zeros":
            return False
    wanted = [conv, torch.nn.BatchNorm2d] if torch.nn.BatchNorm2d in kinds else [conv]
    return kinds == wanted or (kinds[:-1] == wanted and kinds[-1] in _NAMES)


def _activation(name: str, negative_slope: float, alpha: float) -> torch.nn.Module:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of none, {', '.join(_ACTIVATIONS)}; got {name!r}")
    arguments = {"leaky_relu": (negative_slope,), "elu": (alpha,)}
    return _ACTIVATIONS[name](*arguments.get(name, ()))


def _batch_norm(norm: torch.nn.BatchNorm2d, input: Tensor) -> tuple[tuple[Tensor | None, ...], float]:
    """The tensors of a BatchNorm as the operation takes them, and the momentum of this step, which is counted."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    updates = norm.training and norm.track_running_stats
    if updates and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    statistics = (norm.running_mean, norm.running_var) if updates or not norm.training else (None, None)
    weight = norm.weight
    if weight is None and statistics[0] is None:
        weight = input.new_ones(norm.num_features)  # there is a BatchNorm
    return (*statistics, weight, norm.bias), momentum
