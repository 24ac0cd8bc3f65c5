"""Vision models of transformers as teachers: CLIP, SigLIP, DINOv2 and v3, ViT, BEiT, ConvNeXt, …

Source: https://github.com/huggingface/transformers (Apache-2.0); the weights have the licence that their authors
chose. The image processor of the library, which needs torchvision, is not used: only its constants are read.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agglom.core.tokens import Conditioner, flatten_map, freeze, grid_of, split_prefix, to_float32, weights_digest
from agglom.core.types import Features, PixelSpec, Teacher, Text
from agglom.errors import PluginError
from agglom.weights import follows, hub_error, licence_of, measured, origin, repository

Constants = tuple[tuple[float, ...], tuple[float, ...]]


def build(*, model: str, size: int | None = None) -> Teacher:
    """A frozen vision model, or the vision tower of a model of images and text.

    model: hub id or local folder (as `save_pretrained` writes it, with `preprocessor_config.json`); size: pin the
    side of the input in pixels (default: it follows the stage). Raises PluginError.

    The summary is the `pooler_output` (SigLIP: attention pooling head) if its weights are in the checkpoint, else the
    class token, else absent; the patches are the last hidden state without class and register tokens.
    """
    try:
        net, missing = _load(model)
        constants = _constants(model)
    except PluginError:
        raise
    except Exception as error:  # the hub's client raises errors of several libraries
        raise hub_error("teachers.transformers", model, error) from error
    tower = getattr(net, "vision_model", net)
    absent = [key for key in missing if tower is net or key.startswith("vision_model.")]
    # Checkpoints of classifiers lack the pooler that the library then fills with random numbers.
    pooled = not any("pooler" in key for key in absent)
    if broken := sorted(key for key in absent if "pooler" not in key):
        raise PluginError(f"teachers.transformers: '{model}' lacks weights: {', '.join(broken[:5])}")
    module = freeze(Tower(tower, constants, pooled))

    def encode(pixels_BCHW: Tensor) -> Features:
        return to_float32(module(pixels_BCHW))

    native = getattr(tower.config, "image_size", None) or 224
    dims, grid = measured("teachers.transformers", model, encode, 1, size or native)
    patch = (size or native) // grid[0]
    if size is None and not follows(encode, (2 * patch, 3 * patch)):
        size = native
    prompted = len(absent) == len(missing) and _shares_space(net, module, native)
    # The settings that are not weights; a folder may move, so its path is none of them.
    settings = {k: v for k, v in tower.config.to_dict().items() if k[0] != "_" and k != "transformers_version"}
    repo = repository(model)
    identity = json.dumps([settings, constants, size], sort_keys=True, default=str)
    return Teacher(
        module=module,
        encode=encode,
        dims=dims,
        pixels=PixelSpec(mean=constants[0], std=constants[1], patch=patch, size=size),
        fingerprint=weights_digest(tower, f"transformers/{identity}"),
        licence=licence_of(model, repo),
        provenance=origin(model, repo),
        text=partial(_text, model) if prompted else None,
    )


def _load(model: str) -> tuple[Any, list[str]]:
    """The network, and the names of the weights that its checkpoint lacks."""
    from transformers import AutoModel
    from transformers.utils import logging

    # Its report of absent weights would be about heads that are not used; what matters is checked by the caller.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    net, info = AutoModel.from_pretrained(model, output_loading_info=True, dtype="float32")
    return net, sorted(info["missing_keys"])


def _projection(net: Any) -> Any:
    """From the summary to the space shared with text: linear without bias, or the identity."""
    return getattr(net, "visual_projection", nn.Identity())


@torch.no_grad()
def _shares_space(net: Any, module: Any, size: int) -> bool:
    """Whether texts can be compared with the summary of `module`: its projection is what the model itself compares."""
    needed = ("get_text_features", "get_image_features", "logit_scale", "text_model")
    projection = _projection(net)
    linear = isinstance(projection, nn.Identity) or getattr(projection, "bias", 0) is None
    if not linear or not all(hasattr(net, name) for name in needed):
        return False
    pixels_BCHW = torch.zeros(1, 3, size, size)
    summary_BD = module(pixels_BCHW).summary_BD
    if summary_BD is None:
        return False
    theirs_BE = net.get_image_features(module.condition(pixels_BCHW)).pooler_output
    ours_BE = projection(summary_BD)
    return ours_BE.shape == theirs_BE.shape and torch.allclose(ours_BE, theirs_BE, rtol=1e-3, atol=1e-5)


def _text(model: str) -> Text:
    """Raises PluginError where weights or tokenizer are not to be had; so does `embed` for a text that is too long."""
    from transformers import AutoTokenizer

    try:
        net, _ = _load(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # the hub's client raises errors of several libraries
        raise hub_error("teachers.transformers", model, error) from error
    # Without its files, the library makes a tokenizer that knows no word.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise PluginError(
            f"teachers.transformers: '{model}' has a text tower but no tokenizer: save it beside the weights"
        )
    del net.vision_model
    freeze(net)
    # Padded to the full length: SigLIP has learnt its texts so, the others do not look at what pads.
    length = min(tokenizer.model_max_length, net.text_model.config.max_position_embeddings)

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(texts), padding="max_length", max_length=length)
        long = [text for text, ids in zip(texts, tokens["input_ids"], strict=True) if len(ids) > length]
        if long:
            raise PluginError(
                f"teachers.transformers: '{model}' reads {length} tokens, too few for the prompt '{long[0]}': "
                "shorten it"
            )
        found = net.get_text_features(**{key: torch.tensor(ids) for key, ids in tokens.items()})
        return found.pooler_output.float()

    return Text(embed, _projection(net), net.logit_scale.exp().item())


class Tower(nn.Module):
    """A vision model of transformers as an encoder: pixels in [0, 1] (B, C, H, W) → Features."""

    def __init__(self, tower: Any, constants: Constants, pooled: bool) -> None:
        super().__init__()
        self.condition = Conditioner(*constants)
        self.tower = tower
        self.pooled = pooled
        resampled = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
        # A hierarchical network that flattens its last map has a stem of stride 4 and halves before every other stage.
        patch = getattr(tower.config, "patch_size", None) or 2 ** (1 + len(tower.config.hidden_sizes))
        self.patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
        self.options = {"interpolate_pos_encoding": True} if resampled else {}

    def forward(self, pixels_BCHW: Tensor) -> Features:
        output = self.tower(pixel_values=self.condition(pixels_BCHW), **self.options)
        hidden = output.last_hidden_state
        summary_BD = getattr(output, "pooler_output", None) if self.pooled else None
        if hidden.ndim == 4:
            return Features(None if summary_BD is None else summary_BD.flatten(1), *flatten_map(hidden))
        patch = self.patch
        whole = (pixels_BCHW.shape[-2] // patch[0]) * (pixels_BCHW.shape[-1] // patch[1])
        prefix = hidden.shape[1] - whole
        grid = grid_of(pixels_BCHW, patch, hidden.shape[1], max(prefix, 0))
        class_BD, patches_BND = split_prefix(hidden, prefix)
        return Features(class_BD if summary_BD is None else summary_BD, patches_BND, grid)


def _constants(model: str) -> Constants:
    """Mean and std for pixels in [0, 1] from the configuration of the image processor.

    Where it rescales by another factor than 1/255, the constants absorb the difference.
    """
    from transformers.utils import cached_file

    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            path = cached_file(model, name)
        except OSError:
            continue
        config = json.loads(Path(str(path)).read_text(encoding="utf-8"))
        config = config.get("image_processor", config)
        break
    else:
        raise PluginError(
            f"teachers.transformers: '{model}' has no preprocessor_config.json to tell mean and std of its pixels: "
            "save its image processor beside the weights"
        )
    scale = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255.0
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if config.get("do_normalize", True):
        if not {"image_mean", "image_std"} <= config.keys():
            raise PluginError(f"teachers.transformers: {path}: expected the keys image_mean and image_std")
        mean, std = config["image_mean"], config["image_std"]
    return tuple(m / scale for m in mean), tuple(s / scale for s in std)
