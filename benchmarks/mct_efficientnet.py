"""What ``hptq_efficientnet.py mct`` runs: model-compression-toolkit, the package of HPTQ's authors.

The toolkit is imported on first use only, because it has an environment of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Setting -> fields of the toolkit's QuantizationConfig; an error method is written by its name.
MCT_RUNS: dict[str, dict[str, Any]] = {
    "mct": {},
    "mct, no bias correction": {"weights_bias_correction": False},
    "mct, no clipping": {
        "weights_error_method": "NOCLIPPING",
        "activation_error_method": "NOCLIPPING",
    },
    "mct, outlier filter 16": {"z_threshold": 16.0},
    "mct, equalization": {"activation_channel_equalization": True},
    "mct, no shift": {"shift_negative_activation_correction": False},
}


def mct_quantize(
    model: nn.Module, setting: str, calibration: Tensor
) -> Callable[[], tuple[nn.Module, str]]:
    """The toolkit's default: platform imx500 1.0, 8-bit weights and activations.

    Weights have one threshold per output channel, of any value. Activations have power-of-two
    thresholds. These include residual adds and logits, which quietvit leaves in float. The toolkit
    folds BatchNorm.
    """
    import model_compression_toolkit as toolkit

    fields = {
        key: toolkit.core.QuantizationErrorMethod[value] if key.endswith("_method") else value
        for key, value in MCT_RUNS[setting].items()
    }
    core = toolkit.core.CoreConfig(quantization_config=toolkit.core.QuantizationConfig(**fields))
    plain = with_fixed_padding(model, calibration[:1])

    def batches() -> Iterator[list[Any]]:
        for batch in torch.split(calibration, 8):
            yield [batch.numpy()]

    def go() -> tuple[nn.Module, str]:
        quantized, _ = toolkit.ptq.pytorch_post_training_quantization(
            plain, batches, core_config=core
        )
        return quantized.eval(), ""

    return go


def with_fixed_padding(model: nn.Module, example: Tensor) -> nn.Module:
    """Copy the model, with the padding of "same" convolutions fixed for this size.

    The toolkit reads models through torch.fx. torch.fx cannot follow timm's Conv2dSame, which
    computes the padding from the size of its input.
    """
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.padding import get_same_padding

    plain = copy.deepcopy(model)
    sizes: dict[str, torch.Size] = {}

    def noting(name: str) -> Callable[..., None]:
        return lambda module, inputs: sizes.update({name: inputs[0].shape[2:]})

    same = {n: m for n, m in plain.named_modules() if isinstance(m, Conv2dSame)}
    hooks = [module.register_forward_pre_hook(noting(name)) for name, module in same.items()]
    with torch.no_grad():
        expected = plain(example)
    for hook in hooks:
        hook.remove()
    for name, conv in same.items():
        high, wide = (
            get_same_padding(side, kernel, stride, dilation)
            for side, kernel, stride, dilation in zip(
                sizes[name], conv.kernel_size, conv.stride, conv.dilation, strict=True
            )
        )
        fixed = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
        )
        fixed.load_state_dict(conv.state_dict())
        sides = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
        plain.set_submodule(name, nn.Sequential(nn.ZeroPad2d(sides), fixed).eval())
    with torch.no_grad():
        torch.testing.assert_close(plain(example), expected)
    return plain
