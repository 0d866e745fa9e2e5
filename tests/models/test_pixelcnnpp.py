"""PixelCNN++: causality by autograd, normalisation by enumeration, the initialisation, and what a layer may not see."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

import fastgen
from fastgen import models
from fastgen.models import PixelCNNpp
from fastgen.models.autoregressive.pixelcnnpp import Upsampling
from fastgen.models.autoregressive.weight_normed import HORIZONTAL, POINT, VERTICAL, Convolution, WeightNormed

SMALL = {"num_filters": 6, "num_blocks": 1, "num_mixtures": 2}


def build(image_shape=(1, 5, 7), levels=4, **options):
    """A small model in float64 whose parameters are all generic: no bias is zero, no g is one."""
    torch.manual_seed(0)
    model = PixelCNNpp(image_shape=image_shape, levels=levels, **{**SMALL, **options}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def random_images(model, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.levels, (count, *model.image_shape), generator=generator).to(torch.uint8)


def test_published_configuration():
    with torch.device("meta"):
        model = PixelCNNpp()
    assert sum(parameter.numel() for parameter in model.parameters()) == 53_659_080
    assert [len(blocks) for blocks in model.encoder] == [5, 5, 5]
    assert [len(blocks) for blocks in model.decoder] == [5, 6, 6]
    assert model.output.weight_v.shape == (100, 160, 1, 1)
    assert model.config["dropout"] == model.decoder[2][5].horizontal.dropout == 0.5


SHAPES = [(1, 5, 7), (3, 4, 4), (3, 3, 6), (1, 9, 2), (1, 1, 6), (1, 6, 1), (3, 1, 1)]


def dependence(model):
    """bool [P, P]: whether the parameters of pixel p (raster order) depend on any colour of pixel q."""
    x = torch.randn(4, *model.image_shape, dtype=torch.float64, requires_grad=True)
    params = model(x)
    outputs = torch.einsum("nkhw,k->hw", params, torch.randn(params.shape[1], dtype=torch.float64)).flatten()
    rows = [torch.autograd.grad(output, x, retain_graph=True)[0] for output in outputs]
    return torch.stack([(row != 0).any(1).any(0).flatten() for row in rows])


@pytest.mark.parametrize("image_shape", SHAPES, ids=str)
def test_a_pixel_depends_on_all_earlier_pixels_and_on_no_other(image_shape):
    depends = dependence(build(image_shape))
    assert torch.equal(depends, torch.ones_like(depends).tril(-1))


@pytest.mark.parametrize("image_shape", [*SHAPES, (3, 17, 23)], ids=str)
def test_any_image_size(image_shape):
    model = build(image_shape, levels=256)
    images = random_images(model, 2)
    nats = model.log_prob(images)
    assert nats.shape == (2,)
    assert model.log_prob(images[:0]).shape == (0,)
    torch.testing.assert_close(torch.cat([model.log_prob(image[None]) for image in images]), nats)


@pytest.mark.parametrize(("size", "half"), [(1, 1), (2, 1), (3, 2), (8, 4), (17, 9)])
@pytest.mark.parametrize("window", [VERTICAL, HORIZONTAL], ids=["vertical", "horizontal"])
def test_half_the_resolution_and_back(size, half, window):
    down, up = Convolution(2, 2, window, stride=2), Upsampling(2, 2, window)
    y = down(torch.randn(1, 2, size, size + 1))
    assert y.shape == (1, 2, half, (size + 2) // 2)
    assert up(y, size, size + 1).shape == (1, 2, size, size + 1)


def test_the_first_pixel_and_row_are_free_of_what_is_shifted_away():
    """What the input layer computes for a pixel goes to later ones, its biases included."""
    model = build((3, 4, 5))
    params = model(torch.randn(1, 3, 4, 5, dtype=torch.float64))[0]  # [K, H, W]
    layers = {name: [*layer.parameters()] for name, layer in model.input.named_children()}

    def reached(name, output):
        return any(g.any() for g in torch.autograd.grad(output.sum(), layers[name], retain_graph=True))

    assert not any(reached(name, params[:, 0, 0]) for name in layers)
    assert not any(reached(name, params[:, 0]) for name in ("vertical", "above"))
    assert reached("left", params[:, 0])
    assert all(reached(name, params[:, 1]) for name in layers)


ENUMERATED = [
    ((1, 2, 2), 2, {}),
    ((3, 1, 2), 2, {}),
    ((1, 1, 3), 5, {}),
    ((3, 1, 1), 5, {"num_mixtures": 3}),
    ((1, 2, 2), 2, {"num_classes": 3}),
    ((2, 1, 2), 3, {"head": "categorical"}),
    ((1, 3, 2), 2, {"head": "bernoulli"}),
]


@pytest.mark.parametrize(("image_shape", "levels", "options"), ENUMERATED, ids=str)
def test_probabilities_of_all_images_sum_to_one(image_shape, levels, options):
    model = build(image_shape, levels, **options)
    every = torch.tensor(list(itertools.product(range(levels), repeat=math.prod(image_shape))), dtype=torch.uint8)
    labels = torch.full((len(every),), 1) if model.num_classes else None
    nats = model.log_prob(every.reshape(-1, *image_shape), labels)
    assert nats.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert nats.exp().max() > 1.01 * nats.exp().mean()  # not just the uniform distribution


def test_a_label_adds_a_bias_before_every_gate():
    conditional, plain = build((3, 5, 4), num_classes=2), build((3, 5, 4))
    plain.load_state_dict(conditional.state_dict(), strict=False)
    biases = {name: layer for name, layer in conditional.named_modules() if name.endswith("label_bias")}
    assert len(biases) == 2 * (3 * 1 + 1 + 2 + 2)  # both streams; the encoder's and the decoder's blocks
    for name, layer in biases.items():
        plain.get_submodule(name.replace("label_bias", "output")).bias.data += layer.weight[1].detach()
    images = random_images(plain, 3)
    torch.testing.assert_close(plain.log_prob(images), conditional.log_prob(images, torch.tensor([1, 1, 1])))
    other = conditional.log_prob(images, torch.tensor([0, 0, 0]))
    assert (plain.log_prob(images) - other).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("layer", "equivalent"),
    [
        (Convolution(4, 6, VERTICAL), torch.nn.Conv2d(4, 6, (2, 3))),
        (Convolution(4, 6), torch.nn.Conv2d(4, 6, 1)),
        (Upsampling(4, 6, HORIZONTAL), torch.nn.ConvTranspose2d(4, 6, 2)),
    ],
    ids=["convolution", "1x1", "upsampling"],
)
def test_weights_are_normalised_per_output_channel(layer, equivalent):
    dim = 1 if isinstance(layer, Upsampling) else 0
    torch.nn.utils.parametrizations.weight_norm(equivalent, dim=dim)
    equivalent.parametrizations.weight.original0.data.copy_(layer.weight_g.data.normal_())
    equivalent.parametrizations.weight.original1.data.copy_(layer.weight_v)
    torch.testing.assert_close(layer.weight(), equivalent.weight)
    torch.testing.assert_close(layer.weight().transpose(0, dim).flatten(1).norm(dim=1), layer.weight_g.flatten().abs())


def test_setting_a_weight():
    layer, weight = Upsampling(3, 4, VERTICAL), torch.randn(3, 4, 2, 3)
    weight[:, 2] = 0
    with torch.no_grad():
        layer.set_weight(weight)
    torch.testing.assert_close(layer.weight(), weight)


def outputs_of_layers(model, images, labels):
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, WeightNormed):
            layer.register_forward_hook(lambda _, __, output, name=name: found.setdefault(name, output))
    model.log_prob(images, labels)
    return found


@pytest.mark.parametrize("image_shape", [(1, 8, 8), (3, 9, 6)], ids=str)
@pytest.mark.parametrize("num_classes", [None, 2])
def test_initialisation_standardises_every_layer(image_shape, num_classes):
    model = build(image_shape, num_classes=num_classes).train()
    images = random_images(model, 6)
    labels = None if num_classes is None else torch.arange(6) % 2
    model.initialize(images, labels)
    assert model.training
    found = outputs_of_layers(model.eval(), images, labels)
    assert len(found) == sum(isinstance(layer, WeightNormed) for layer in model.modules())
    for name, output in found.items():
        std, mean = torch.std_mean(output, dim=(0, 2, 3), correction=0)
        gate = name.endswith("al.output")  # of a block's vertical or horizontal half
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-10, rtol=0, msg=name)
        torch.testing.assert_close(std, torch.full_like(std, 0.1 if gate else 1.0), atol=1e-10, rtol=0, msg=name)


def test_initialisation_goes_through_all_layers_in_one_pass():
    """As a function of (v, images): g and biases from before do not matter, and a second pass changes nothing."""
    model, other = build((3, 8, 8)), build((3, 8, 8))
    for name, parameter in other.named_parameters():
        if not name.endswith("weight_v"):
            parameter.data *= 1 + torch.rand_like(parameter)
    images = random_images(model, 4)
    for _ in range(2):
        other.initialize(images)
        model.initialize(images)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, other.get_parameter(name), msg=name)


@pytest.mark.parametrize("image_shape", [(1, 1, 1), (3, 2, 1)], ids=str)
def test_initialisation_leaves_the_scale_of_constant_features(image_shape):
    model = PixelCNNpp(image_shape=image_shape, **SMALL)
    model.initialize(random_images(model, 1))
    assert torch.isfinite(model.log_prob(random_images(model, 3))).all()
    assert max(layer.weight_g.abs().max() for layer in model.modules() if isinstance(layer, WeightNormed)) < 1e4


def test_a_new_model_is_near_the_scale_of_an_initialised_one():
    torch.manual_seed(0)
    model = PixelCNNpp(image_shape=(3, 8, 8), num_filters=16, num_blocks=2)
    images = random_images(model, 8)
    for output in outputs_of_layers(model.eval(), images, None).values():
        assert 1e-3 < output.std() < 3
    assert model.log_prob(images).mean() > -10 * math.log(2) * 3 * 8 * 8  # less than 10 bits per element


def test_bad_images_for_the_initialisation():
    model = build((1, 4, 4), num_classes=2)
    with pytest.raises(ValueError, match="images: the initialisation needs at least one, got none"):
        model.initialize(random_images(model, 0), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels: this model is conditional on 2 classes, got None"):
        model.initialize(random_images(model, 2))
    with pytest.raises(TypeError, match="images: expected a tensor of uint8 levels"):
        model.initialize(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))


def test_every_parameter_gets_a_gradient():
    model = build((3, 4, 5), num_classes=2).train()
    model.log_prob(random_images(model, 8), torch.arange(8) % 2).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_dropout_is_for_training():
    model = build((1, 4, 4))
    images = random_images(model, 2)
    assert torch.equal(model.log_prob(images), model.log_prob(images))
    model.train()
    assert not torch.equal(model.log_prob(images), model.log_prob(images))
    still = build((1, 4, 4), dropout=0).train()
    assert torch.equal(still.log_prob(images), still.eval().log_prob(images))


@pytest.mark.parametrize("options", [{}, {"head": "categorical", "num_classes": 3, "dropout": 0.25}], ids=str)
def test_saved_and_loaded(tmp_path, options):
    model = build((3, 4, 5), levels=7, **options).float()
    assert json.loads(json.dumps(model.config)) == model.config
    fastgen.save(model, tmp_path / "m.safetensors")
    twin = fastgen.load(tmp_path / "m.safetensors")
    assert twin.config == model.config
    assert (type(twin), repr(twin.head)) == (models.get("pixelcnnpp"), repr(model.head))
    images = random_images(model, 2)
    labels = torch.tensor([2, 0]) if model.num_classes else None
    assert torch.equal(twin.log_prob(images, labels), model.log_prob(images, labels))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_mixtures": 0}, "num_mixtures: expected an integer of at least 1, got 0"),
        ({"dropout": 1.0}, "dropout: expected a number of at least 0 and below 1, got 1.0"),
        ({"dropout": "half"}, "dropout: expected a number of at least 0 and below 1, got 'half'"),
        ({"num_filters": 0}, "num_filters: expected an integer of at least 1, got 0"),
        ({"head": "softmax"}, 'head: expected "logistic_mixture", "categorical" or "bernoulli", got \'softmax\''),
        ({"image_shape": (2, 4, 4)}, "channels"),
    ],
    ids=str,
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        PixelCNNpp(**{"image_shape": (1, 4, 4), **SMALL, **options})


def test_labels_must_fit_the_model():
    with pytest.raises(ValueError, match="labels: expected class labels with num_classes=2"):
        build((1, 2, 2), num_classes=2)(torch.zeros(1, 1, 2, 2).double())
    with pytest.raises(ValueError, match="labels: expected None with num_classes=None"):
        build((1, 2, 2))(torch.zeros(1, 1, 2, 2).double(), torch.tensor([0]))


def test_traced_models_are_saved(tmp_path):
    model = build((1, 4, 5)).float()
    x = torch.randn(2, 1, 4, 5)
    torch.jit.save(torch.jit.trace(model, x), tmp_path / "traced.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(x), model(x))


def test_point_windows_pad_nothing():
    assert Convolution(1, 1, POINT).padding == (0, 0, 0, 0)
