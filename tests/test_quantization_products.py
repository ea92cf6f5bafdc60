"""Products: rows, patches and gradients of a model's matrix products, against the model itself."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import quietvit
import zoo
from quietvit.quantization.calibration import Calibration, ImageStream
from quietvit.quantization.fitting import layout, products


def images(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def tiny_vit(**more) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, **(zoo.TINY | more)
    ).eval()


def matrices(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibration(model: nn.Module, batch: torch.Tensor) -> Calibration:
    trace = quietvit.trace(model, batch[:1])
    return Calibration(model, trace, ImageStream(batch, model), False)


def recorded(model, batch, *, rows=None, gradients=True, seed=0):
    found = calibration(model, batch)
    return products.record(
        found, lambda site: True, rows=rows, gradients=gradients, seed=seed, label="test"
    )


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Conv2d(6, 9, 3, padding=2, dilation=2, groups=3),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.Conv2d(6, 10, 1),
        nn.ConvTranspose2d(6, 5, 3, stride=2, padding=1),
    ],
    ids=str,
)
def test_a_convolution_is_a_product_of_its_patches(layer):
    x = matrices(2, 6, 9, 9)

    def run(values, weight):
        module = copy.deepcopy(layer)
        module.weight.data = weight
        return module(values)

    function = "conv_transpose2d" if isinstance(layer, nn.ConvTranspose2d) else "conv2d"
    weight = layer.weight.detach()
    site = next(
        site
        for site in quietvit.trace(nn.Sequential(layer), x).matmuls
        if site.kind == "conv" and function in site.function
    )
    with torch.no_grad():
        output = layer(x)
        laid = layout.lay_out(site, (x, weight), output, run)
        bias = 0 if layer.bias is None else layer.bias[:, None, None]
        assert laid is not None
        torch.testing.assert_close(
            laid.left @ laid.right, laid.arrange(output - bias), atol=1e-4, rtol=1e-4
        )


def test_few_rows_are_kept_of_many():
    model, batch = tiny_vit(), images(4)
    found = recorded(model, batch, rows=20, gradients=False)
    for product in found.values():
        kept = product.left.shape[0] * product.left.shape[2]
        # 17 tokens an image; of a matrix of activations at least 16 rows.
        assert kept <= (64 if product.site.kind == "matmul" else 24)
        torch.testing.assert_close(product.left.shape[3], product.right.shape[2])


def test_what_is_kept_does_not_grow_with_the_images():
    found = recorded(tiny_vit(), images(128), rows=64, gradients=False)
    for name, product in found.items():
        assert product.left.shape[0] * product.left.shape[2] <= 64, name


def test_products_are_those_of_the_model():
    model, batch = tiny_vit(), images(3)
    outputs = {}

    def handler(site, operands, run):
        outputs[site.name] = run(*operands)
        return outputs[site.name]

    found = recorded(model, batch, gradients=False)
    with torch.no_grad():
        calibration(model, batch).run(batch, handler, kinds=frozenset({"linear", "matmul"}))
    for name, output in outputs.items():
        product = found[name]
        if product.site.kind == "matmul":
            torch.testing.assert_close(product.left @ product.right, output)
            continue
        bias = dict(model.named_parameters())[f"{name}.bias"]
        expected = (output - bias).reshape(1, 1, -1, output.shape[-1])
        torch.testing.assert_close(product.left @ product.right, expected, atol=1e-5, rtol=1e-4)


def test_rows_without_a_gradient_are_left_out():
    found = recorded(tiny_vit(), images(4), rows=8)
    assert found["blocks.1.mlp.fc1"].left.shape[2] == 4  # the class token of each image
    assert found["blocks.0.mlp.fc1"].left.shape[2] > 4
    assert (found["blocks.1.mlp.fc1"].gradient != 0).any(-1).all()


def test_squared_gradients_average_to_the_diagonal_of_the_hessian_of_kl():
    logits = matrices(1, 4).double()
    target = logits.softmax(-1)

    def divergence(z):
        return (target * (target.log() - z.log_softmax(-1))).sum()

    hessian = torch.autograd.functional.hessian(divergence, logits).view(4, 4)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat(
        [products.curvature_root(logits.expand(2000, 4), generator)[1] for _ in range(20)]
    )
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), hessian, atol=4e-3, rtol=0.05)


def test_outputs_that_are_no_logits_are_weighed_alike():
    generator = torch.Generator().manual_seed(0)
    for result in (matrices(500, 1), (matrices(20, 5, 5),), {"pred_boxes": matrices(30, 16)}):
        output, direction = products.curvature_root(result, generator)
        assert output.shape == direction.shape
        assert direction.square().mean() == pytest.approx(1, abs=0.25)
    named = {"boxes": matrices(7, 4), "logits": matrices(7, 3)}
    output, direction = products.curvature_root(named, generator)
    assert output is named["logits"]
    assert direction.sum(-1).abs().max() < 1e-5
