"""PixelCNN++ (Salimans, Karpathy, Chen, Kingma 2017, "PixelCNN++: Improving the PixelCNN with Discretized Logistic
Mixture Likelihood and Other Modifications", arXiv:1701.05517).
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.models.autoregressive.base import AutoregressiveModel, positive
from fastgen.sampling.subject import evaluating

RESOLUTIONS = 3  # full, half and quarter resolution
CONSTANT = 1e-8  # an output channel whose variance is below this share of g^2 has no scale to standardise

Streams = tuple[Tensor, Tensor]  # vertical, horizontal: [N, num_filters, H, W] each


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
VERTICAL = Window(2, 3, left=1)  # the paper's "down shifted" convolution: this row and the one above
HORIZONTAL = Window(2, 2, left=1)  # "down right shifted": nothing to the right


def concat_elu(*x: Tensor) -> Tensor:
    """ELU of the features of all arguments, and of their negatives: C channels -> 2C."""
    return F.elu(torch.cat([*x, *(-each for each in x)], dim=1))


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
            x = F.pad(x, self.padding)
        return F.conv2d(x, self.weight(), self.bias, self.stride)


class Upsampling(WeightNormed):
    """A transposed convolution of stride 2: [N, C, ceil(H/2), ceil(W/2)] -> [N, C', H, W].

    Row y of the input has seen rows up to 2y, and goes to rows 2y and later; columns of the horizontal stream likewise.
    """

    def __init__(self, inputs: int, outputs: int, window: Window) -> None:
        super().__init__((inputs, outputs, window.rows, window.columns), 1, init_scale=1.0)
        self.right = window.right

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        y = F.conv_transpose2d(x, self.weight(), self.bias, stride=2)
        return y[:, :, :height, self.right : self.right + width]


class GatedResidual(torch.nn.Module):
    """The residual block of one stream, which also reads ``skips`` other feature maps (sections 2.3 and 2.4)."""

    def __init__(self, p: int, window: Window, *, skips: int, num_classes: int | None, dropout: float) -> None:
        super().__init__()
        self.conv = Convolution(2 * p, p, window)
        self.skip = Convolution(2 * skips * p, p) if skips else None
        self.output = Convolution(2 * p, 2 * p, window, init_scale=0.1)
        self.label_bias = None if num_classes is None else torch.nn.Embedding(num_classes, 2 * p)
        if self.label_bias is not None:
            torch.nn.init.normal_(self.label_bias.weight, std=0.05)
        self.dropout = dropout

    def forward(self, x: Tensor, skips: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
        y = self.conv(concat_elu(x))
        if self.skip is not None:
            y = y + self.skip(concat_elu(*skips))
        y = self.output(F.dropout(concat_elu(y), self.dropout, self.training))
        if self.label_bias is not None:
            y = y + self.label_bias(labels)[:, :, None, None]
        a, b = y.chunk(2, dim=1)
        return x + a * torch.sigmoid(b)


class InputLayer(torch.nn.Module):
    """The only layer that looks at pixels, and the only one with shifts: after it, no stream can see its own pixel.

    The shifts move in zeros, without a bias, and the channel of ones tells the image from the zeros around it.
    """

    def __init__(self, colors: int, p: int) -> None:
        super().__init__()
        self.vertical = Convolution(colors + 1, p, VERTICAL)
        self.above = Convolution(colors + 1, p, Window(1, 3, left=1))
        self.left = Convolution(colors + 1, p, Window(2, 1, left=0))

    def forward(self, x: Tensor) -> Streams:
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        return shift_down(self.vertical(x)), shift_down(self.above(x)) + shift_right(self.left(x))


class Block(torch.nn.Module):
    """A residual block per stream; the horizontal one reads the vertical one, and in the decoder (``mirrored``) both
    read the encoder's block at the same place.
    """

    def __init__(self, p: int, *, mirrored: bool, num_classes: int | None, dropout: float) -> None:
        super().__init__()
        skips = int(mirrored)
        self.vertical = GatedResidual(p, VERTICAL, skips=skips, num_classes=num_classes, dropout=dropout)
        self.horizontal = GatedResidual(p, HORIZONTAL, skips=1 + skips, num_classes=num_classes, dropout=dropout)

    def forward(self, streams: Streams, mirror: Streams | tuple[()], labels: Tensor | None) -> Streams:
        v = self.vertical(streams[0], mirror[:1], labels)
        return v, self.horizontal(streams[1], (v, *mirror[1:]), labels)


class Downsample(torch.nn.Module):
    """To half the resolution; odd sizes are rounded up."""

    def __init__(self, p: int) -> None:
        super().__init__()
        self.vertical = Convolution(p, p, VERTICAL, stride=2)
        self.horizontal = Convolution(p, p, HORIZONTAL, stride=2)

    def forward(self, streams: Streams) -> Streams:
        return self.vertical(streams[0]), self.horizontal(streams[1])


class Upsample(torch.nn.Module):
    """Back to the resolution before a `Downsample`."""

    def __init__(self, p: int) -> None:
        super().__init__()
        self.vertical = Upsampling(p, p, VERTICAL)
        self.horizontal = Upsampling(p, p, HORIZONTAL)

    def forward(self, streams: Streams, height: int, width: int) -> Streams:
        return self.vertical(streams[0], height, width), self.horizontal(streams[1], height, width)


class PixelCNNpp(AutoregressiveModel):
    """PixelCNN++: whole pixels from a mixture of discretised logistics, in a network shaped like a U.

    An encoder of residual blocks at full, half and quarter resolution, and a decoder back up; each block of the decoder
    also reads its mirror image in the encoder (figure 2).  Two streams run through both: the vertical one sees the rows
    above, the horizontal one also what is to the left in this row.

    Call `initialize` on some images before training.  The defaults are the published model for CIFAR-10, 53,659,080
    parameters.

    Args:
        image_shape: (C, H, W); any sizes, 1 or 3 channels for the logistic mixture.
        levels: number of levels, 2..256.
        head: "logistic_mixture"; or "categorical", or "bernoulli" for two levels, which draw the colours of a pixel
            independently of each other.
        num_filters: feature maps of each stream.
        num_blocks: residual blocks of the encoder at each resolution; the decoder has one more at all but the lowest.
        num_mixtures: components of the logistic mixture.
        num_classes: number of classes, or None for an unconditional model.
        dropout: of the features between the two convolutions of a block.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "pixelcnnpp"

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        levels: int = 256,
        head: str = "logistic_mixture",
        num_filters: int = 160,
        num_blocks: int = 5,
        num_mixtures: int = 10,
        num_classes: int | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(
            image_shape=image_shape,
            levels=levels,
            head=head,
            num_classes=num_classes,
            num_filters=positive("num_filters", num_filters),
            num_blocks=positive("num_blocks", num_blocks),
            num_mixtures=positive("num_mixtures", num_mixtures),
            dropout=_dropout(dropout),
        )
        colors, p = self.image_shape[0], num_filters

        def blocks(count: int, mirrored: bool) -> torch.nn.ModuleList:
            return torch.nn.ModuleList(
                Block(p, mirrored=mirrored, num_classes=num_classes, dropout=dropout) for _ in range(count)
            )

        self.input = InputLayer(colors, p)
        self.encoder = torch.nn.ModuleList(blocks(num_blocks, False) for _ in range(RESOLUTIONS))
        self.downsample = torch.nn.ModuleList(Downsample(p) for _ in range(RESOLUTIONS - 1))
        self.decoder = torch.nn.ModuleList(blocks(num_blocks + (level > 0), True) for level in range(RESOLUTIONS))
        self.upsample = torch.nn.ModuleList(Upsample(p) for _ in range(RESOLUTIONS - 1))
        self.output = Convolution(p, self.head.num_params(colors))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Encoded images [N, C, H, W], labels int64 [N] if conditional -> head parameters [N, P, H, W]."""
        self._check_conditional(labels)
        saved: list[Streams] = [self.input(x)]  # what every layer of the encoder gives; the decoder takes them back
        for level, blocks in enumerate(cast("list[list[Block]]", self.encoder)):
            if level:
                saved.append(self.downsample[level - 1](saved[-1]))
            for block in blocks:
                saved.append(block(saved[-1], (), labels))
        streams = saved.pop()
        for level, blocks in enumerate(cast("list[list[Block]]", self.decoder)):
            if level:
                streams = self.upsample[level - 1](streams, *saved[-1][0].shape[2:])
            for block in blocks:
                streams = block(streams, saved.pop(), labels)
        return self.output(F.elu(streams[1]))

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
                self(self.head.encode(images).to(self.output.bias), labels)
        finally:
            for hook in hooks:
                hook.remove()


def _dropout(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"dropout: expected a number of at least 0 and below 1, got {value!r}")
    return value
