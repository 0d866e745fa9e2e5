"""Converters: a foreign network and its converted twin give the same outputs."""

from __future__ import annotations

import pytest
import torch

from fastgen.models.convert import pixelcnnpp_from_port

from .port_pixelcnnpp import NEW_NORM, OLD_NORM, PortPixelCNNpp

CASES = {
    "colour": (3, 2, OLD_NORM),
    "grey": (1, 1, OLD_NORM),
    "new_norm": (3, 1, NEW_NORM),
    "no_norm": (3, 1, lambda layer: layer),
}


def port(channels=3, blocks=1, norm=OLD_NORM):
    torch.manual_seed(0)
    network = PortPixelCNNpp(blocks, 5, 3, channels, norm).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("channels", "blocks", "norm"), CASES.values(), ids=CASES)
def test_pixelcnnpp_gives_the_outputs_of_the_port(channels, blocks, norm, prefix):
    network = port(channels, blocks, norm)
    model = pixelcnnpp_from_port({prefix + key: t for key, t in network.state_dict().items()}, image_size=(8, 12))
    assert not model.training
    assert model.image_shape == (channels, 8, 12)
    assert (model.levels, model.head.components) == (256, 3)
    levels = torch.randint(256, (2, channels, 8, 12))
    x = levels.double() / 255 * 2 - 1  # as the port's users scale their images
    torch.testing.assert_close(model.head.encode(levels).double(), x, rtol=0, atol=1e-7)
    expected = network(x).detach()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-13 * float(expected.abs().max()))


def test_g_and_v_are_kept_where_both_normalise_alike():
    state = port().state_dict()
    model = pixelcnnpp_from_port(state, image_size=(4, 4))
    layer = model.decoder[1][1].horizontal.skip
    name = "down_layers.1.ul_stream.1.nin_skip.lin_a"
    assert torch.equal(layer.weight_v.flatten(1), state[f"{name}.weight_v"])
    assert torch.equal(layer.weight_g.flatten(1), state[f"{name}.weight_g"])


def spoil(state, how):
    if how == "missing":
        del state["up_layers.1.ul_stream.0.conv_out.conv.bias"]
    if how == "unexpected":
        state["down_layers.0.u_stream.0.conv_out.norm.running_mean"] = torch.zeros(5)
    if how == "shape":
        state["upsize_u_stream.1.deconv.weight_v"] = torch.zeros(5, 5, 2, 2)
    if how == "outputs":
        state["nin_out.lin_a.weight_v"] = torch.zeros(31, 5)
    if how == "another":
        state = {"conv1.weight": torch.zeros(5, 3, 3, 3)}
    if how == "flat":
        state["u_init.conv.weight_v"] = torch.zeros(5)
    return state


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("missing", r"missing up_layers\.1\.ul_stream\.0\.conv_out\.conv\.bias; unexpected nothing"),
        ("unexpected", r"missing nothing; unexpected down_layers\.0\.u_stream\.0\.conv_out\.norm\.running_mean"),
        ("shape", r"upsize_u_stream\.1\.deconv: expected weight_v \[5, 5, 2, 3\].*got .*weight_v \[5, 5, 2, 2\]"),
        ("outputs", r"expected a multiple of 10 outputs of 'nin_out\.lin_a' for 3-channel images, got 31"),
        ("another", r"not a PixelCNN\+\+ of the PyTorch port: missing 'u_init\.conv\.weight_v'"),
        ("flat", r"expected 4 dimensions of 'u_init\.conv\.weight_v', got \[5\]"),
    ],
)
def test_what_does_not_fit_is_named(how, text):
    with pytest.raises(ValueError, match=text):
        pixelcnnpp_from_port(spoil(dict(port().state_dict()), how), image_size=(4, 4))
