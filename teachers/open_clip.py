"""The towers of any OpenCLIP model as a teacher: CLIP, EVA-CLIP, SigLIP, CoCa, BiomedCLIP, …

Source: https://github.com/mlfoundations/open_clip (MIT); the weights have the licence that their authors chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agglom.core.tokens import Conditioner, flatten_map, freeze, to_float32, weights_digest
from agglom.core.types import Features, PixelSpec, Provenance, Teacher, Text
from agglom.errors import PluginError
from agglom.weights import hub_error, licence_of, load, measured, origin, read, repository


def build(*, model: str, pretrained: str | None = None, size: int | None = None) -> Teacher:
    """A frozen vision tower; the text tower is loaded where prompts ask for it.

    model: a name of OpenCLIP (`ViT-B-32`), `hf-hub:…` or `local-dir:…` (a folder with `open_clip_config.json` and
    weights); pretrained: tag, or local file with the state dict of both towers (as a training loop saves it: see
    `agglom.weights.read`), needed with a bare name; size: side of the input in pixels (default:
    that of the model; position embeddings are resampled once). Raises PluginError.

    The summary is the image embedding in the space shared with text, the patches are the tokens of the last block,
    normalised as the tower does before it pools them.
    """
    import open_clip

    if pretrained is None and not model.startswith(("hf-hub:", "local-dir:")):
        tags = [tag for name, tag in open_clip.list_pretrained() if name == model]
        choice = f"one of its tags ({', '.join(tags)}) or a local file" if tags else "a local file"
        raise PluginError(f"teachers.open_clip: '{model}' needs `pretrained`: {choice}")
    tower = _create(model, pretrained, size).visual
    height, width = tower.image_size if isinstance(tower.image_size, tuple) else (tower.image_size,) * 2
    if height != width:
        raise PluginError(f"teachers.open_clip: '{model}' takes {height}×{width} px: set `size` to make it square")
    mean, std = tuple(tower.image_mean), tuple(tower.image_std)
    condition = Conditioner(mean, std)
    # An attentional pooler normalises after pooling, to another width: its tower pools raw tokens.
    normalised = getattr(tower, "attn_pool", None) is None and not getattr(tower, "final_ln_after_pool", False)
    tower.condition = condition
    freeze(tower)

    def encode(pixels_BCHW: Tensor) -> Features:
        output = tower.forward_intermediates(
            condition(pixels_BCHW), indices=1, normalize_intermediates=normalised, output_fmt="NCHW"
        )
        patches_BND, grid = flatten_map(output["image_intermediates"][-1])
        return to_float32(Features(output["image_features"], patches_BND, grid))

    dims, grid = measured("teachers.open_clip", model, encode, 1, height)
    # A folder may move; what lies in it is in the digest.
    name = "local" if model.startswith("local-dir:") else model
    provenance, licence = _origin(model, pretrained)
    return Teacher(
        module=tower,
        encode=encode,
        dims=dims,
        pixels=PixelSpec(mean=mean, std=std, patch=height // grid[0], size=height),
        fingerprint=weights_digest(tower, f"open_clip/{name}/{mean}/{std}/{height}"),
        licence=licence,
        provenance=provenance,
        text=partial(_text, model, pretrained),
    )


def _origin(model: str, pretrained: str | None) -> tuple[Provenance, str]:
    """Where the weights come from, and their licence where the hub tells it."""
    from open_clip.pretrained import get_pretrained_cfg

    if pretrained is None:
        repo, name = repository(model), model
    elif _is_state(pretrained):
        return Provenance(Path(pretrained).name), "unknown"
    else:
        # Written "owner/name/" or "owner/name/file".
        repo = "/".join(get_pretrained_cfg(model, pretrained).get("hf_hub", "").split("/")[:2]) or None
        name = f"{model} {pretrained}"
    return origin(name, repo), licence_of(name, repo)


def _text(model: str, pretrained: str | None) -> Text:
    """Raises PluginError where weights or tokenizer are not to be had; so does `embed` for a text that is too long."""
    import open_clip

    net = _create(model, pretrained)
    try:
        tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:  # the hub's client raises errors of several libraries
        raise hub_error("teachers.open_clip", model, error) from error
    del net.visual
    freeze(net)

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        token_NL = tokenizer(list(texts))
        # Tokenizers cut without a word; where they do not, one token of room more, on whichever side, changes nothing.
        roomy_NL = tokenizer(list(texts), context_length=token_NL.shape[1] + 1)
        whole_N = (roomy_NL[:, :-1] == token_NL).all(1) | (roomy_NL[:, 1:] == token_NL).all(1)
        if not whole_N.all():
            raise PluginError(
                f"teachers.open_clip: '{model}' reads {token_NL.shape[1]} tokens, too few for the prompt "
                f"'{texts[int(whole_N.int().argmin())]}': shorten it"
            )
        return net.encode_text(token_NL, normalize=False).float()

    return Text(embed, lambda summary_BD: summary_BD, net.logit_scale.exp().item())


def _is_state(pretrained: str | None) -> bool:
    """Whether weights are a state dict in a local file; arrays of big_vision are for the library to read."""
    return pretrained is not None and Path(pretrained).is_file() and Path(pretrained).suffix not in (".npz", ".npy")


def _create(model: str, pretrained: str | None, size: int | None = None) -> Any:
    import open_clip

    try:
        if pretrained is not None and _is_state(pretrained):
            net = open_clip.create_model(model, force_image_size=size, pretrained_text=False)
            load(net, _converted(net, read(pretrained)), pretrained)
            return net
        return open_clip.create_model(
            model, pretrained=pretrained, force_image_size=size, pretrained_text=False, require_pretrained=True
        )
    except PluginError:
        raise
    except Exception as error:  # the hub's client raises errors of several libraries
        raise hub_error("teachers.open_clip", model, error) from error


def _converted(net: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as the network names and shapes it; positions are resampled where the size of the input differs."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    state = convert_state_dict(net, state)
    if "positional_embedding" in state and not hasattr(net, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for key in ("logit_scale", "logit_bias"):
        own = getattr(net, key, None)
        if key in state and own is not None:
            state[key] = state[key].reshape(own.shape)
    resize_pos_embed(state, net)
    resize_text_pos_embed(state, net)
    return state
