"""From the output of a network to `Features`: conditioning of pixels, prefix tokens, maps, pooling, digests.

Shapes: B images, C channels, H W pixels or cells of a map, N patches, P prefix tokens (class, registers), D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from agglom.core.types import Dims, Features

Summary = Literal["head", "class", "none"]


class Conditioner(nn.Module):
    """(pixels − mean) / std per channel, for pixels in [0, 1].

    The constants are rebuilt with the network, hence not part of its state.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean_C11", torch.tensor(mean, dtype=torch.float32)[:, None, None], persistent=False)
        self.register_buffer("std_C11", torch.tensor(std, dtype=torch.float32)[:, None, None], persistent=False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return (pixels_BCHW - self.mean_C11) / self.std_C11


def split_prefix(tokens_BND: Tensor, prefix: int) -> tuple[Tensor | None, Tensor]:
    """(B, P + N, D) → class token (B, D), None where P = 0, and patch tokens (B, N, D).

    Every supported library puts the class token first and the registers between it and the patches.
    """
    return (tokens_BND[:, 0] if prefix else None), tokens_BND[:, prefix:]


def flatten_map(map_BDHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """(B, D, H, W) → row-major tokens (B, H·W, D) and the grid (H, W)."""
    grid = (map_BDHW.shape[-2], map_BDHW.shape[-1])
    return rearrange(map_BDHW, "b d h w -> b (h w) d"), grid


def grid_of(pixels_BCHW: Tensor, patch: tuple[int, int], tokens: int, prefix: int) -> tuple[int, int]:
    """The grid (rows, columns) of a patch transformer for this input.

    Raises ValueError if the number of tokens is not that of the prefix plus one for each whole patch.
    """
    height, width = pixels_BCHW.shape[-2:]
    grid = (height // patch[0], width // patch[1])
    if grid[0] * grid[1] + prefix != tokens:
        raise ValueError(
            f"{height}×{width} px with patches of {patch[0]}×{patch[1]} px: expected {grid[0]}×{grid[1]} patch tokens "
            f"after {prefix} prefix tokens, got {tokens} tokens in all"
        )
    return grid


def freeze(module: nn.Module) -> nn.Module:
    """The module in evaluation mode, without gradients."""
    return module.eval().requires_grad_(False)


def weights_digest(module: nn.Module, name: str) -> str:
    """sha256 over the name and every tensor of the state dict (sorted by key: key, dtype, shape, bytes)."""
    digest = hashlib.sha256(name.encode())
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"\0{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def emitted(encode: Callable[[Tensor], Features], side: int, channels: int = 3) -> tuple[Dims, tuple[int, int]]:
    """The widths and the grid that one black image of `side` pixels yields."""
    with torch.no_grad():
        features = encode(torch.zeros(1, channels, side, side))
    summary = None if features.summary_BD is None else features.summary_BD.shape[-1]
    patches = None if features.patches_BND is None else features.patches_BND.shape[-1]
    return Dims(summary, patches), features.grid


def to_float32(features: Features) -> Features:
    """The same features in float32, whatever a teacher computes in."""
    summary_BD, patches_BND, grid = features
    return Features(
        None if summary_BD is None else summary_BD.float(), None if patches_BND is None else patches_BND.float(), grid
    )


def stride(net: Any) -> tuple[int, int]:
    """Pixels per cell of the last feature map of a timm network, (vertical, horizontal)."""
    reduction = net.feature_info[-1]["reduction"]
    return (reduction, reduction) if isinstance(reduction, int) else tuple(reduction)


def summary_kind(net: Any) -> Summary:
    """Where the summary of a timm network comes from.

    Its own pre-logits output ("head"), except where that is a plain mean of patch tokens which nothing was trained
    on: a single-scale transformer published without classifier, whose pooling is the library's default. Its class
    token is taken then ("class"), or there is no summary ("none").
    """
    pooling = getattr(net, "global_pool", "avg")
    if not (hasattr(net, "patch_embed") and hasattr(net, "blocks")):
        return "head"
    class_token = getattr(net, "cls_token", None) is not None
    normed = not isinstance(getattr(net, "fc_norm", None), nn.Identity | None)
    learnt = normed or getattr(net, "attn_pool", None) is not None
    trained = learnt or pooling == "token" or net.pretrained_cfg.get("num_classes", 0) > 0
    if pooling and trained:
        return "head"
    return "class" if class_token else "none"


class TimmEncoder(nn.Module):
    """A timm network as an encoder: pixels in [0, 1] (B, C, H, W) → Features.

    Serves patch transformers (B, P + N, D) and convolutional or hierarchical networks with maps (B, D, H, W) or
    (B, H, W, D); the grid follows the input. It calls `forward_features` and `forward_head` of `net` and imports
    nothing of timm. The features have the dtype in which the network computes.
    """

    def __init__(self, net: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.condition = Conditioner(mean, std)
        self.net = net
        self.summary = summary_kind(net)

    def forward(self, pixels_BCHW: Tensor) -> Features:
        # The constants are float32 also where an engine has cast the weights to bfloat16.
        output = self.net.forward_features(self.condition(pixels_BCHW).to(next(self.net.parameters()).dtype))
        if output.ndim == 4:
            map_BDHW = rearrange(output, "b h w d -> b d h w") if self._channels_last(output) else output
            patches_BND, grid = flatten_map(map_BDHW)
            class_BD = None
        else:
            prefix = getattr(self.net, "num_prefix_tokens", 0)
            class_BD, patches_BND = split_prefix(output, prefix)
            grid = grid_of(pixels_BCHW, stride(self.net), output.shape[1], prefix)
        if self.summary == "head":
            return Features(self.net.forward_head(output, pre_logits=True), patches_BND, grid)
        return Features(class_BD if self.summary == "class" else None, patches_BND, grid)

    def _channels_last(self, output: Tensor) -> bool:
        declared = getattr(self.net, "output_fmt", None)
        if declared is not None:
            return str(getattr(declared, "value", declared)) == "NHWC"
        return output.shape[1] != self.net.num_features
