"""Converters: weights of well-known implementations elsewhere, into the models here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor

from fastgen.models.autoregressive.image_gpt import ImageGPT
from fastgen.models.autoregressive.pixelcnnpp import RESOLUTIONS, PixelCNNpp, Upsampling
from fastgen.models.autoregressive.weight_normed import WeightNormed

# What weight normalisation calls g and v: torch.nn.utils.weight_norm, its newer parametrization, or once it is removed.
_PARTS = {
    "weight_g": "weight_g",
    "weight_v": "weight_v",
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
    "weight": "weight_v",
    "bias": "bias",
}
_KEY = re.compile(rf"(?:module\.)*(.+?)\.({'|'.join(map(re.escape, _PARTS))})")


def pixelcnnpp_from_port(
    state_dict: Mapping[str, Tensor], *, image_size: tuple[int, int] = (32, 32), levels: int = 256
) -> PixelCNNpp:
    """A `PixelCNNpp` with the weights of the common PyTorch port (github.com/pclucas14/pixel-cnn-pp and its heirs).

    Number of filters, blocks, mixture components and channels are read off the shapes.  The names may have
    ``DataParallel``'s prefix ``module.``; the weight normalisation may be of either kind in PyTorch, or removed.  The
    port normalises its transposed convolutions per input channel, `PixelCNNpp` per output channel: their g and v are
    worked out anew, with the same product.

    The port scales its images to [-1, 1], ``2 * level / 255 - 1``, as `PixelCNNpp` does.  A network that was trained on
    another scale (early versions fed MNIST in [0, 1]) gives other outputs here.

    Args:
        state_dict: the port's, e.g. from `fastgen.checkpoint.load_state_dict_file`.
        image_size: (H, W), which the weights do not say.
        levels: number of levels of the images that the network was trained on.

    Returns:
        The model, in eval mode, on the CPU, in the dtype of the weights.

    Raises:
        ValueError: keys are missing or unexpected (both are listed), or a tensor has the wrong shape.
    """
    layers = _layers(state_dict)
    channels, filters, blocks, mixtures = _sizes(layers)
    model = PixelCNNpp(
        image_shape=(channels, *image_size),
        levels=levels,
        num_filters=filters,
        num_blocks=blocks,
        num_mixtures=mixtures,
    ).to(layers["u_init.conv"]["weight_v"].dtype)
    names = dict(_port_names(blocks))
    _check_names(layers, list(names))
    with torch.no_grad():
        for theirs, ours in names.items():
            _copy(theirs, layers[theirs], cast(WeightNormed, model.get_submodule(ours)))
    return model.eval()


def _layers(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors by layer and by part: weight_g, weight_v, bias; a plain weight is a v without a g."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        match = _KEY.fullmatch(key)
        layer, part = (match[1], _PARTS[match[2]]) if match else (key, "unknown")
        layers.setdefault(layer, {})[part] = tensor
    return layers


def _sizes(layers: Mapping[str, Mapping[str, Tensor]]) -> tuple[int, int, int, int]:
    """Channels, filters, blocks, mixture components."""
    filters, inputs, *_ = _shape_of(layers, "u_init.conv", 4)
    outputs, *_ = _shape_of(layers, "nin_out.lin_a", 2)
    blocks = sum(re.fullmatch(r"up_layers\.0\.u_stream\.\d+\.conv_input\.conv", name) is not None for name in layers)
    if blocks == 0:
        raise ValueError("state_dict: not a PixelCNN++ of the PyTorch port: missing 'up_layers.0.u_stream.0'")
    channels = inputs - 1
    per_component = 3 if channels == 1 else 10
    if outputs % per_component:
        raise ValueError(
            f"state_dict: expected a multiple of {per_component} outputs of 'nin_out.lin_a' for "
            f"{channels}-channel images, got {outputs}"
        )
    return channels, filters, blocks, outputs // per_component


def _shape_of(layers: Mapping[str, Mapping[str, Tensor]], name: str, dims: int) -> torch.Size:
    weight = layers.get(name, {}).get("weight_v")
    if weight is None:
        raise ValueError(f"state_dict: not a PixelCNN++ of the PyTorch port: missing '{name}.weight_v'")
    if weight.dim() != dims:
        raise ValueError(f"state_dict: expected {dims} dimensions of '{name}.weight_v', got {list(weight.shape)}")
    return weight.shape


def _port_names(blocks: int) -> Iterator[tuple[str, str]]:
    """The port's name and ours of every layer with weights."""
    yield "u_init.conv", "input.vertical"
    yield "ul_init.0.conv", "input.above"
    yield "ul_init.1.conv", "input.left"
    yield "nin_out.lin_a", "output"
    for theirs, ours in (("u", "vertical"), ("ul", "horizontal")):
        for i in range(RESOLUTIONS - 1):
            yield f"downsize_{theirs}_stream.{i}.conv", f"downsample.{i}.{ours}"
            yield f"upsize_{theirs}_stream.{i}.deconv", f"upsample.{i}.{ours}"
        for level in range(RESOLUTIONS):
            for side, other_side, count in (("up", "encoder", blocks), ("down", "decoder", blocks + (level > 0))):
                for i in range(count):
                    block, other = f"{side}_layers.{level}.{theirs}_stream.{i}", f"{other_side}.{level}.{i}.{ours}"
                    yield f"{block}.conv_input.conv", f"{other}.conv"
                    yield f"{block}.conv_out.conv", f"{other}.output"
                    if (side, theirs) != ("up", "u"):
                        yield f"{block}.nin_skip.lin_a", f"{other}.skip"


def _check_names(layers: Mapping[str, Mapping[str, Tensor]], expected: list[str]) -> None:
    missing = [f"{n}.{part}" for n in expected for part in ("weight_v", "bias") if part not in layers.get(n, {})]
    unexpected = [name for name in layers if name not in expected]
    if missing or unexpected:
        raise ValueError(f"state_dict: missing {_some(missing)}; unexpected {_some(unexpected)}")


def _some(names: list[str], shown: int = 8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (", ".join(names[:shown]) or "nothing") + more


def _copy(name: str, parts: Mapping[str, Tensor], layer: WeightNormed) -> None:
    v, g, bias = parts["weight_v"], parts.get("weight_g"), parts["bias"]
    if name.endswith(".lin_a"):
        v = v[:, :, None, None]  # linear there, a 1x1 convolution here
    if v.shape != layer.weight_v.shape or bias.shape != layer.bias.shape or (g is not None and g.numel() != len(v)):
        expected = f"weight_v {list(layer.weight_v.shape)}, bias {list(layer.bias.shape)}, a g for each of dimension 0"
        got = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
        raise ValueError(f"state_dict: {name}: expected {expected}; got {got}")
    layer.bias.copy_(bias)
    if g is None:
        layer.set_weight(v)
    elif isinstance(layer, Upsampling):
        g, v = g.double().reshape(-1, 1, 1, 1), v.double()
        layer.set_weight(v * (g / torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)))
    else:
        layer.weight_g.copy_(g.reshape(-1, 1, 1, 1))
        layer.weight_v.copy_(v)


# Layers of the port's blocks, and ours. These have biases, and weights [in, out].
_LINEAR_OF_PORT = {
    "attn.c_attn": "query_key_value",
    "attn.c_proj": "attention_output",
    "mlp.c_fc": "hidden",
    "mlp.c_proj": "output",
}
_NORMS_OF_PORT = {"ln_1": "attention_norm", "ln_2": "mlp_norm"}
_MASK_OF_PORT = re.compile(r".*\.attn\.(masked_)?bias")  # buffers of older versions


def image_gpt_from_port(
    state_dict: Mapping[str, Tensor], *, image_size: tuple[int, int] | None = None, num_heads: int = 8
) -> ImageGPT:
    """An `ImageGPT` with the weights of Hugging Face's ``ImageGPTForCausalImageModeling``, such as those of
    ``openai/imagegpt-small``.

    Width, layers and levels are read off the shapes.  Levels are the indices of the port's clusters of colours.

    Args:
        state_dict: the port's, e.g. from `fastgen.checkpoint.load_state_dict_file`.
        image_size: (H, W), whose product is the number of positions; None for squares.
        num_heads: which the weights do not say; 8 in the small and medium models, 16 in the large one.

    Returns:
        The model, in eval mode, on the CPU, in the dtype of the weights; with biases if any is not zero.

    Raises:
        ValueError: keys are missing or unexpected (both are listed), or a tensor has the wrong shape.
    """
    given = {key: tensor for key, tensor in state_dict.items() if not _MASK_OF_PORT.fullmatch(key)}
    layers = {int(match[1]) for key in given if (match := re.match(r"transformer\.h\.(\d+)\.", key))}
    names = {"embedding.weight": "transformer.wte.weight", "position": "transformer.wpe.weight"}
    names |= {"norm.weight": "transformer.ln_f.weight", "output.weight": "lm_head.weight"}
    for i in range(max(layers, default=0) + 1):
        for theirs, ours in _NORMS_OF_PORT.items():
            names[f"blocks.{i}.{ours}.weight"] = f"transformer.h.{i}.{theirs}.weight"
        for theirs, ours in _LINEAR_OF_PORT.items():
            for part in ("weight", "bias"):
                names[f"blocks.{i}.{ours}.{part}"] = f"transformer.h.{i}.{theirs}.{part}"
    missing, unexpected = [
        [*a - b] for a, b in ((set(names.values()), given.keys()), (given.keys(), {*names.values()}))
    ]
    if missing or unexpected:
        raise ValueError(f"state_dict: missing {_some(sorted(missing))}; unexpected {_some(sorted(unexpected))}")
    weights = {ours: given[theirs] for ours, theirs in names.items()}
    for name in weights:
        if name.startswith("blocks.") and weights[name].dim() == 2:
            weights[name] = weights[name].T
    if weights["position"].dim() != 2 or weights["output.weight"].dim() != 2:
        raise ValueError("state_dict: expected two dimensions of 'transformer.wpe.weight' and 'lm_head.weight'")
    positions, (levels, width) = len(weights["position"]), weights["output.weight"].shape
    height, columns = image_size or (math.isqrt(positions), math.isqrt(positions))
    if height * columns != positions:
        raise ValueError(f"image_size: expected (H, W) of {positions} positions, got {(height, columns)}")
    biases = {name for name in weights if name.endswith("bias")}
    model = ImageGPT(
        image_shape=(1, height, columns),
        levels=levels,
        num_filters=width,
        num_blocks=max(layers) + 1,
        num_heads=num_heads,
        embedding_dim=width,
        bias=any(bool(weights[name].any()) for name in biases),
    )
    tokens = weights["embedding.weight"]  # of levels, and of what is before the first
    weights["embedding.weight"], weights["start.weight"] = tokens[:levels], tokens[levels:]
    if not model.config["bias"]:
        weights = {name: tensor for name, tensor in weights.items() if name not in biases}
    else:
        weights["output.bias"] = torch.zeros(levels)
    for name, parameter in model.named_parameters():
        if parameter.shape != weights[name].shape:
            theirs = names.get(name, names["embedding.weight"])
            raise ValueError(f"state_dict: {theirs}: {list(state_dict[theirs].shape)} does not fit the other tensors")
    model.to(weights["position"].dtype).load_state_dict(weights)
    return model.eval()
