"""Any backbone of timm as the student: convolutional, hierarchical or patch transformer.

Source: https://github.com/huggingface/pytorch-image-models (Apache-2.0; pretrained weights have licences of their
own). The export is plain timm: `timm.create_model(recipe["architecture"], num_classes=0, **recipe["model_args"])`.
"""

from __future__ import annotations

from torch import nn

from agglom.core.tokens import TimmEncoder
from agglom.core.types import PixelSpec, Student
from agglom.errors import PluginError
from agglom.weights import measured, timm_network


class FixedStatistics(TimmEncoder):
    """An encoder whose batch-norm layers normalise in training by the statistics that they were built with."""

    def train(self, mode: bool = True) -> FixedStatistics:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def build(
    *,
    model: str,
    pretrained: bool = False,
    size: int | None = None,
    drop_path: float = 0.0,
    fixed_statistics: bool = False,
    checkpoint: str | None = None,
) -> Student:
    """A trainable timm backbone without classifier.

    model: a name of timm, `hf-hub:…` or `local-dir:…`; pretrained: start from its published weights; checkpoint:
    start from a local file instead; size: pin the input side in pixels (default: it follows the stage); drop_path:
    rate of stochastic depth; fixed_statistics: batch-norm layers keep the statistics that they start with, for
    pretrained convolutional networks whose statistics a few images a rank would replace by noise. Raises PluginError.
    """
    if not 0 <= drop_path < 1:
        raise PluginError(f"students.timm: drop_path is {drop_path}; expected a rate in [0, 1)")
    extra = {"drop_path_rate": drop_path} if drop_path else {}
    net, args, patch, side = timm_network(
        "students.timm", model, pretrained=pretrained, checkpoint=checkpoint, size=size, **extra
    )
    table = getattr(getattr(net, "patch_embed", None), "img_size", None)
    if args.get("dynamic_img_size") and table is not None:
        # Without it timm loads an export into a table of positions of its own default size, resampled.
        args = {"img_size": list(table)} | args
    cfg = net.pretrained_cfg
    module = (FixedStatistics if fixed_statistics else TimmEncoder)(net, cfg["mean"], cfg["std"])
    dims, _ = measured("students.timm", model, module.eval(), patch, side)
    return Student(
        module=module.train(),
        backbone=net,
        dims=dims,
        pixels=PixelSpec(mean=tuple(cfg["mean"]), std=tuple(cfg["std"]), patch=patch, size=side),
        recipe={
            "architecture": cfg.get("architecture") or model,
            "model_args": args,
            "pretrained_cfg": {
                "mean": list(cfg["mean"]),
                "std": list(cfg["std"]),
                "input_size": [3, side, side] if side else list(cfg["input_size"]),
                "fixed_input_size": cfg.get("fixed_input_size", False),
                "interpolation": cfg.get("interpolation", "bicubic"),
                "crop_pct": 1.0,
                "num_classes": 0,
            },
        },
    )
