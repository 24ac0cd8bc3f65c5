"""Any network of timm as a teacher: DINOv2 and v3, SigLIP, EVA, ViT, ConvNeXt, Swin, EfficientNet, your own file.

Source: https://github.com/huggingface/pytorch-image-models (Apache-2.0); the weights have the licence that their
authors chose, which is reported where timm knows it.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from agglom.core.tokens import TimmEncoder, freeze, to_float32, weights_digest
from agglom.core.types import Features, PixelSpec, Provenance, Teacher
from agglom.weights import measured, origin, repository, timm_network


def build(*, model: str, pretrained: bool = True, checkpoint: str | None = None, size: int | None = None) -> Teacher:
    """A frozen timm network without classifier.

    model: a name of timm (`vit_small_patch14_dinov2.lvd142m`), `hf-hub:…` or `local-dir:…`; pretrained: with its
    published weights; checkpoint: with those of a local file instead (safetensors, or PyTorch tensors); size: pin
    the input side in pixels (default: it follows the stage). Raises PluginError.

    The summary is the network's own pre-logits output (`agglom.core.tokens.summary_kind`), the patches are the
    tokens or the last map before pooling.
    """
    net, _, patch, side = timm_network("teachers.timm", model, pretrained=pretrained, checkpoint=checkpoint, size=size)
    cfg = net.pretrained_cfg
    mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    module = freeze(TimmEncoder(net, mean, std))

    def encode(pixels_BCHW: Tensor) -> Features:
        return to_float32(module(pixels_BCHW))

    dims, _ = measured("teachers.timm", model, encode, patch, side)
    if checkpoint is not None:
        provenance = Provenance(Path(checkpoint).name)
    elif pretrained:
        provenance = origin(model, repository(model) if ":" in model else cfg.get("hf_hub_id"))
    else:
        provenance = Provenance(f"{model}, random weights")
    return Teacher(
        module=module,
        encode=encode,
        dims=dims,
        pixels=PixelSpec(mean=mean, std=std, patch=patch, size=side),
        fingerprint=weights_digest(net, f"timm/{cfg.get('architecture') or model}/{mean}/{std}/{side}"),
        # Weights from elsewhere have not the licence of those that timm publishes under this name.
        licence="unknown" if checkpoint else cfg.get("license") or "unknown",
        provenance=provenance,
    )
