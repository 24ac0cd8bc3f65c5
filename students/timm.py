"""Any backbone of timm as the student: convolutional, hierarchical or patch transformer.

Source: https://github.com/huggingface/pytorch-image-models (Apache-2.0; pretrained weights have licences of their
own). The export is plain timm: `timm.create_model(recipe["architecture"], num_classes=0, **recipe["model_args"])`.

A patch transformer may get more class tokens, one for each teacher (RADIO, arXiv 2312.06709), and registers, tokens
that nobody reads (Darcet et al. 2024, arXiv 2309.16588). To timm all of them but the first are registers: the prefix is
the class token, those added to it, the registers that the model has, those added to them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from agglom.core.tokens import TimmEncoder
from agglom.core.types import PixelSpec, Student
from agglom.errors import PluginError
from agglom.weights import measured, read, timm_network

KIND = "students.timm"
REGISTERS = ("reg_tokens", "num_reg_tokens")  # as timm's transformers call their number
NOISE = 0.02  # standard deviation of new tokens, that of timm's tables of positions


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
    class_tokens: int = 1,
    registers: int = 0,
    levels: int = 0,
) -> Student:
    """A trainable timm backbone without classifier.

    model: a name of timm, `hf-hub:…` or `local-dir:…`; pretrained: start from its published weights; checkpoint:
    start from a local file instead; size: pin the input side in pixels (default: it follows the stage); drop_path:
    rate of stochastic depth; fixed_statistics: batch-norm layers keep the statistics that they start with, for
    pretrained convolutional networks whose statistics a few images a rank would replace by noise.

    For patch transformers: class_tokens: how many there are, for `heads.tokens: own` one for each teacher; of several,
    the summary is the mean. registers: how many to add to those that the model has. levels: after how many blocks,
    evenly spaced up to the last, tokens are served for `heads.kind: ladder`. Added class tokens start as the first one
    with noise, registers as noise; published weights, and a checkpoint with or without these tokens, load all the same.
    Raises PluginError.
    """
    if not 0 <= drop_path < 1:
        raise PluginError(f"{KIND}: drop_path is {drop_path}; expected a rate in [0, 1)")
    if class_tokens < 1 or registers < 0 or levels < 0:
        raise PluginError(
            f"{KIND}: class_tokens is {class_tokens}, registers {registers}, levels {levels}; "
            "expected at least 1, 0 and 0"
        )
    start: dict[str, Any] = {"pretrained": pretrained, "checkpoint": checkpoint, "size": size}
    start |= {"drop_path_rate": drop_path} if drop_path else {}
    if class_tokens > 1 or registers:
        net, args, patch, side = _with_tokens(model, class_tokens, registers, start)
    else:
        net, args, patch, side = timm_network(KIND, model, **start)
    table = getattr(getattr(net, "patch_embed", None), "img_size", None)
    if args.get("dynamic_img_size") and table is not None:
        # Without it timm loads an export into a table of positions of its own default size, resampled.
        args = {"img_size": list(table)} | args
    cfg = net.pretrained_cfg
    served = class_tokens if getattr(net, "cls_token", None) is not None else 0
    encoder = FixedStatistics if fixed_statistics else TimmEncoder
    module = encoder(net, cfg["mean"], cfg["std"], served, _spaced(model, net, levels))
    dims, _ = measured(KIND, model, module.eval(), patch, side)
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
        class_tokens=served,
        levels=levels,
    )


def _spaced(model: str, net: Any, levels: int) -> list[int]:
    """The indices of that many blocks, evenly spaced, the last one among them."""
    if not levels:
        return []
    depth = len(net.blocks) if hasattr(net, "patch_embed") and hasattr(net, "blocks") else 0
    if levels > depth:
        raise PluginError(
            f"{KIND}: levels is {levels}, but '{model}' "
            + (f"has {depth} blocks" if depth else "is no patch transformer; leave it at 0")
        )
    return [round((index + 1) * depth / levels) - 1 for index in range(levels)]


def _with_tokens(
    model: str, class_tokens: int, registers: int, start: dict[str, Any]
) -> tuple[Any, dict[str, Any], int, int | None]:
    """What `timm_network` returns, with more tokens in the prefix."""
    import timm

    with torch.device("meta"):
        bare = timm_network(KIND, model, pretrained=False, checkpoint=None, size=None)[0]
    option = next((name for name in REGISTERS if name in inspect.signature(type(bare)).parameters), None)
    if option is None or getattr(bare, "pool_include_prefix", False):
        why = "takes no registers" if option is None else "pools its registers into the summary"
        raise PluginError(f"{KIND}: '{model}' {why}; leave class_tokens at 1 and registers at 0, or choose another")
    if class_tokens > 1 and bare.cls_token is None:
        raise PluginError(f"{KIND}: '{model}' has no class token to add others to; leave class_tokens at 1")
    count = bare.num_prefix_tokens - (bare.cls_token is not None) + class_tokens - 1 + registers
    if start["checkpoint"] is not None:
        held = read(start["checkpoint"]).get("reg_token")
        if held is not None and held.shape[1] == count:
            net, args, patch, side = timm_network(KIND, model, **start, **{option: count})
            return net, args | {option: count}, patch, side
    net, args, patch, side = timm_network(KIND, model, **start)
    args = args | {option: count}
    rest = {key: value for key, value in start.items() if key not in ("pretrained", "checkpoint", "size")}
    wide = timm.create_model(model, num_classes=0, **args, **rest)
    _fill(wide, net, class_tokens - 1)
    return wide, args, patch, side


@torch.no_grad()
def _fill(wide: Any, net: Any, classes: int) -> None:
    """Give `wide` the weights of `net`, the same network without new tokens, of which `classes` are class tokens."""
    state = net.state_dict()
    noise_1RD = NOISE * torch.randn_like(wide.reg_token)
    own_1RD = state.get("reg_token", noise_1RD[:, :0])
    copies_1RD = noise_1RD[:, :classes] + (state["cls_token"] if classes else 0)
    new_1RD = noise_1RD[:, classes + own_1RD.shape[1] :]
    state["reg_token"] = torch.cat([copies_1RD, own_1RD, new_1RD], 1)
    table_1PD = state.get("pos_embed")
    if table_1PD is not None and table_1PD.shape != wide.pos_embed.shape:
        prefix = net.num_prefix_tokens
        first_1PD, own_1PD, grid_1PD = table_1PD.tensor_split([prefix - own_1RD.shape[1], prefix], 1)
        copies_1PD, new_1PD = first_1PD.expand(-1, classes, -1), torch.zeros_like(new_1RD)
        state["pos_embed"] = torch.cat([first_1PD, copies_1PD, own_1PD, new_1PD, grid_1PD], 1)
    wide.load_state_dict(state)
