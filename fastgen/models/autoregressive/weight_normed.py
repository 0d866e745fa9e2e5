"""What PixelCNN++ and PixelSNAIL are made of: weight-normalised convolutions over windows that hold nothing later,
gated residual layers of them, and the initialisation from data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import ops
from fastgen.models.autoregressive.base import AutoregressiveModel
from fastgen.sampling.subject import evaluating

CONSTANT = 1e-8  # an output channel whose variance is below this share of g^2 has no scale to standardise


class Window(NamedTuple):
    """What a layer sees around its own pixel: rows that end with the pixel's own, columns of which ``left`` lie to its
    left.
    """

    rows: int
    columns: int
    left: int

    @property
    def right(self) -> int:
        return self.columns - 1 - self.left


POINT = Window(1, 1, left=0)
VERTICAL = Window(2, 3, left=1)  # the papers' "down shifted" convolution: this row and the one above
HORIZONTAL = Window(2, 2, left=1)  # "down right shifted": nothing to the right


def shift_down(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def shift_right(x: Tensor) -> Tensor:
    return F.pad(x, (1, 0))[:, :, :, :-1]


class WeightNormed(torch.nn.Module):
    """The weights ``g v / |v|``, normalised per output channel, and the bias (Salimans, Kingma 2016, arXiv:1602.07868).

    Unlike `torch.nn.utils.weight_norm`, this is the norm per output channel of a transposed convolution too: only then
    can the scale of a channel be set from data (section 3), and it is what the authors of PixelCNN++ did.
    """

    def __init__(self, shape: tuple[int, int, int, int], output_dim: int, init_scale: float) -> None:
        super().__init__()
        self.init_scale = init_scale
        self.summed_dims = [dim for dim in range(4) if dim != output_dim]
        g_shape = [size if dim == output_dim else 1 for dim, size in enumerate(shape)]
        self.weight_v = torch.nn.Parameter(torch.empty(shape).normal_(0, 0.05))
        self.weight_g = torch.nn.Parameter(torch.full(g_shape, init_scale))
        self.bias = torch.nn.Parameter(torch.zeros(shape[output_dim]))

    def extra_repr(self) -> str:
        return f"weight {list(self.weight_v.shape)}"

    def weight(self) -> Tensor:
        norm = torch.linalg.vector_norm(self.weight_v, dim=self.summed_dims, keepdim=True)
        return self.weight_v * (self.weight_g / norm)

    def set_weight(self, weight: Tensor) -> None:
        """Sets g and v to what gives this weight."""
        norm = torch.linalg.vector_norm(weight, dim=self.summed_dims, keepdim=True)
        self.weight_g.copy_(norm)
        self.weight_v.copy_(torch.where(norm > 0, weight, 1.0))

    def standardise(self, output: Tensor) -> Tensor:
        """Sets g and the bias so that an output [N, C, H, W] of this layer would have had mean 0 and standard deviation
        ``init_scale`` in each channel, and returns what it would have been.
        """
        variance, mean = torch.var_mean(output, dim=(0, 2, 3), correction=0)
        varies = variance > CONSTANT * self.weight_g.flatten().square()
        scale = torch.where(varies, self.init_scale * variance.rsqrt(), 1.0)
        self.weight_g.mul_(scale.view_as(self.weight_g))
        self.bias.sub_(mean).mul_(scale)
        return (output - mean[:, None, None]) * scale[:, None, None]


class Convolution(WeightNormed):
    """A convolution over a window, with zeros outside the image: [N, C, H, W] -> [N, C', ceil(H/s), ceil(W/s)]."""

    def __init__(
        self, inputs: int, outputs: int, window: Window = POINT, *, stride: int = 1, init_scale: float = 1.0
    ) -> None:
        super().__init__((outputs, inputs, window.rows, window.columns), 0, init_scale)
        self.padding = (window.left, window.right, window.rows - 1, 0)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            if self.stride == 1:
                return ops.shifted_conv2d(x, self.weight(), self.bias, left=self.padding[0])
            x = F.pad(x, self.padding)
        return F.conv2d(x, self.weight(), self.bias, self.stride)


class GatedResidual(torch.nn.Module):
    """A residual layer with a gate, which may also read another feature map: [N, C, H, W] -> the same shape.

    Salimans et al. 2017 (PixelCNN++), sections 2.3 and 2.4. The activations are ELU, of the features and, with
    ``negate``, of their negatives.  ``skip_channels`` are those of the other feature map, or of all others together.
    """

    def __init__(
        self,
        channels: int,
        window: Window = POINT,
        *,
        negate: bool,
        skip_channels: int = 0,
        num_classes: int | None,
        dropout: float,
    ) -> None:
        super().__init__()
        width = 2 if negate else 1  # the channels that become of one
        self.negate = negate
        self.conv = Convolution(width * channels, channels, window)
        self.skip = Convolution(width * skip_channels, channels) if skip_channels else None
        self.output = Convolution(width * channels, 2 * channels, window, init_scale=0.1)
        self.label_bias = None if num_classes is None else torch.nn.Embedding(num_classes, 2 * channels)
        if self.label_bias is not None:
            torch.nn.init.normal_(self.label_bias.weight, std=0.05)
        self.dropout = dropout

    def forward(self, x: Tensor, skips: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
        y = self.conv(ops.concat_elu(x, negate=self.negate))
        if self.skip is not None:
            y = y + self.skip(ops.concat_elu(*skips, negate=self.negate))
        y = self.output(ops.concat_elu(y, negate=self.negate, dropout=self.dropout if self.training else 0.0))
        if self.label_bias is not None:
            y = y + self.label_bias(labels)[:, :, None, None]
        return ops.gated_unit(y, x, activation="none")


class WeightNormedModel(AutoregressiveModel):
    """A model whose layers are `WeightNormed`. Call `initialize` on some images before training."""

    @torch.no_grad()
    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Data-dependent initialisation (Salimans, Kingma 2016, section 3), before training.

        One pass over a batch sets g and the bias of each layer in turn so that its outputs have mean 0 and standard
        deviation 1 in each channel (0.1 in front of the gates, which makes the blocks nearly the identity).  Channels
        that are constant on these images keep their scale.  Dropout is off, so the result is a function of the weights
        and the images.

        Args:
            images: uint8 levels [N, C, H, W], N >= 1; some tens of images are enough.
            labels: int64 [N] for a conditional model.

        Raises:
            TypeError, ValueError: as `log_prob`, or there is no image.
        """
        self._check_images(images)
        self._check_labels(labels, len(images))
        if len(images) == 0:
            raise ValueError("images: the initialisation needs at least one, got none")
        layers = [layer for layer in self.modules() if isinstance(layer, WeightNormed)]
        hooks = [layer.register_forward_hook(lambda layer, _, output: layer.standardise(output)) for layer in layers]
        try:
            with evaluating(self):
                self(self._encode(images).to(next(self.parameters()).device), labels)
        finally:
            for hook in hooks:
                hook.remove()


def dropout_share(value: float) -> float:
    """The argument itself, when it is a share of features that may be dropped."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"dropout: expected a number of at least 0 and below 1, got {value!r}")
    return value
