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


def from_outputs(
    pixels_BCHW: Tensor, summary: Tensor | None, patches: Tensor | None, patch: int, prefix: int
) -> Features:
    """Features of these images out of two outputs of a network that nothing else is known of.

    summary: (B, D), a pooled map (B, D, 1, 1), or tokens (B, P + N, D), of which the class token is taken; patches:
    tokens (B, P + N, D) or a map (B, D, H, W). Both may be the same. Raises ValueError for other shapes.
    """
    if summary is not None and summary.ndim == 3:
        if not prefix:
            raise ValueError("the summary is a row of tokens, and none of them is a class token; set prefix")
        summary = summary[:, 0]
    if summary is not None and summary[0].numel() != summary.shape[1]:
        raise ValueError(f"expected a summary (B, D), got {tuple(summary.shape)}")
    summary_BD = None if summary is None else summary.flatten(1)
    if patches is None:
        return Features(summary_BD, None)
    if patches.ndim == 4:
        return Features(summary_BD, *flatten_map(patches))
    if patches.ndim != 3:
        raise ValueError(f"expected patch tokens (B, N, D) or a map (B, D, H, W), got {tuple(patches.shape)}")
    grid = grid_of(pixels_BCHW, (patch, patch), patches.shape[1], prefix)
    return Features(summary_BD, split_prefix(patches, prefix)[1], grid)


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
    summary_BD, patches_BND, grid = features[:3]
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
    (B, H, W, D); the grid follows the input. It calls `forward_features`, `forward_intermediates` and `forward_head`
    of `net` and imports nothing of timm. The features have the dtype in which the network computes.

    Of a patch transformer, the first `class_tokens` of the prefix are served as such; where there are several, their
    mean is the summary. `blocks` are the indices of those after which it serves a level, the last block among them:
    tokens before the final norm, with the class tokens' mean as the summary, else that of the patches.
    """

    def __init__(
        self,
        net: Any,
        mean: Sequence[float],
        std: Sequence[float],
        class_tokens: int = 0,
        blocks: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.condition = Conditioner(mean, std)
        self.net = net
        self.summary = summary_kind(net)
        self.class_tokens = class_tokens
        self.blocks = tuple(blocks)

    def forward(self, pixels_BCHW: Tensor) -> Features:
        # The constants are float32 also where an engine has cast the weights to bfloat16.
        x_BCHW = self.condition(pixels_BCHW).to(next(self.net.parameters()).dtype)
        prefix, inner = getattr(self.net, "num_prefix_tokens", 0), []
        if len(self.blocks) > 1:
            output, inner = self.net.forward_intermediates(
                x_BCHW, list(self.blocks[:-1]), return_prefix_tokens=prefix > 0, output_fmt="NLC"
            )
        else:
            output = self.net.forward_features(x_BCHW)
        if output.ndim == 4:
            map_BDHW = rearrange(output, "b h w d -> b d h w") if self._channels_last(output) else output
            patches_BND, grid = flatten_map(map_BDHW)
            class_BD = tokens_BKD = None
        else:
            class_BD, patches_BND = split_prefix(output, prefix)
            tokens_BKD = output[:, : self.class_tokens] if self.class_tokens else None
            grid = grid_of(pixels_BCHW, stride(self.net), output.shape[1], prefix)
        if tokens_BKD is not None and self.class_tokens > 1:
            summary_BD = tokens_BKD.mean(1)
        elif self.summary == "head":
            summary_BD = self.net.forward_head(output, pre_logits=True)
        else:
            summary_BD = class_BD if self.summary == "class" else None
        features = Features(summary_BD, patches_BND, grid, tokens_BKD)
        if not self.blocks:
            return features
        return features._replace(levels=(*(self._level(level, grid, prefix) for level in inner), features))

    def _level(self, level: Any, grid: tuple[int, int], prefix: int) -> Features:
        patches_BND, prefix_BPD = level if prefix else (level, None)
        if prefix_BPD is None or not self.class_tokens:
            return Features(patches_BND.mean(1), patches_BND, grid)
        tokens_BKD = prefix_BPD[:, : self.class_tokens]
        return Features(tokens_BKD.mean(1), patches_BND, grid, tokens_BKD)

    def _channels_last(self, output: Tensor) -> bool:
        declared = getattr(self.net, "output_fmt", None)
        if declared is not None:
            return str(getattr(declared, "value", declared)) == "NHWC"
        return output.shape[1] != self.net.num_features
