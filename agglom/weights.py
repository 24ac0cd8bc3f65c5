"""Networks by name and weights from files, for the teachers and students that are built on timm."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agglom.core.tokens import emitted, stride
from agglom.core.types import Dims, Features
from agglom.errors import PluginError

WRAPPERS = ("state_dict", "model", "model_state_dict")
HEADS = ("head.fc.", "head.", "classifier.", "fc.", "head_dist.", "last_linear.")


def hub_error(kind: str, model: str, error: Exception) -> PluginError:
    """What to tell a user whose model could not be fetched or found."""
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return PluginError(
        f"{kind}: cannot load '{model}': {reason}. Weights come from the Hugging Face hub unless a local path is "
        "given: check the name and the connection (HF_HUB_OFFLINE=1 allows only what is cached), or download the "
        "files elsewhere and give their path"
    )


def read(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` or PyTorch file, never unpickling code.

    A state dict nested under 'state_dict', 'model' or 'model_state_dict' is found. Raises PluginError.
    """
    path = Path(path)
    if not path.is_file():
        raise PluginError(f"checkpoint {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError) as error:
        raise PluginError(
            f"checkpoint {path}: not a safetensors file nor a PyTorch file of plain tensors "
            f"({str(error).splitlines()[0]}); save its state dict alone"
        ) from error
    except Exception as error:  # safetensors raises its own class, an immediate child of Exception
        raise PluginError(f"checkpoint {path}: cannot be read ({error})") from error
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise PluginError(f"checkpoint {path}: expected a state dict of tensors (keys tried: {', '.join(WRAPPERS)})")
    return content


def load(net: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load strictly, except that the weights of a classifier which the network does not have are left out.

    Raises PluginError that names missing, surplus and misshapen keys.
    """
    own = net.state_dict()
    state = {key: value for key, value in state.items() if key in own or not key.startswith(HEADS)}
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    problems = [
        *_named("missing", own.keys() - state.keys()),
        *_named("unknown", state.keys() - own.keys()),
        *_named("wrong shape", (f"{k} (expected {tuple(own[k].shape)}, got {tuple(state[k].shape)})" for k in shapes)),
    ]
    if problems:
        raise PluginError(f"checkpoint {origin} does not fit {type(net).__name__}: {'; '.join(problems)}")
    net.load_state_dict(state)


def _named(what: str, keys: Iterable[str]) -> list[str]:
    names = sorted(keys)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"{what}: {', '.join(names[:5])}{more}"] if names else []


def timm_network(
    kind: str, model: str, *, pretrained: bool, checkpoint: str | None, size: int | None, **extra: Any
) -> tuple[Any, dict[str, Any], int, int | None]:
    """A timm network without classifier: (network, arguments that shaped it, patch, pinned size).

    A network that can take images of any size does, and its pinned size is `size`; one that cannot is pinned to
    `size` or to its native size. Raises PluginError for unknown names, absent weights and an unreachable hub.
    """
    import timm

    state = None if checkpoint is None else read(checkpoint)
    pinned: dict[str, Any] = {} if size is None else {"img_size": size}
    # A checkpoint's table of positions has the native size; a network of any size resamples it as it goes.
    dynamic: dict[str, Any] = {"dynamic_img_size": True} | (pinned if state is None else {})
    # What a network accepts is known by its constructor alone; it refuses before any weight is fetched.
    net: Any = None
    args: dict[str, Any]
    for args in (dynamic, pinned, {}):
        try:
            net = timm.create_model(model, pretrained=pretrained and state is None, num_classes=0, **args, **extra)
            break
        except TypeError as error:
            if "unexpected keyword argument" not in str(error) or not args:
                raise PluginError(f"{kind}: cannot build '{model}': {error}") from error
        except Exception as error:  # the hub's client raises errors of several libraries
            if ":" not in model and not timm.is_model(model):
                close = difflib.get_close_matches(model, timm.list_models(), n=3)
                hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
                raise PluginError(f"{kind}: timm has no model '{model}'; {hint}") from error
            raise hub_error(kind, model, error) from error
    if state is not None:
        load(net, state, str(checkpoint))
    cfg = net.pretrained_cfg
    fixed = "dynamic_img_size" not in args and cfg.get("fixed_input_size", False)
    return net, args, max(stride(net)), size or (cfg["input_size"][-1] if fixed else None)


def measured(
    kind: str, model: str, encode: Callable[[Tensor], Features], patch: int, size: int | None
) -> tuple[Dims, tuple[int, int]]:
    """Widths and grid of an encoder, by one image at its pinned size, else at about 64 px (two cells at least).

    Raises PluginError if its output cannot be read as a grid of tokens.
    """
    try:
        return emitted(encode, size or patch * max(2, -(-64 // patch)))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise PluginError(f"{kind}: '{model}' cannot be used as an encoder: {error}") from error


def follows(encode: Callable[[Tensor], Features], shape: tuple[int, int]) -> bool:
    """Whether an encoder takes an image of this (height, width)."""
    try:
        with torch.no_grad():
            encode(torch.zeros(1, 3, *shape))
    except (ValueError, RuntimeError, AssertionError):
        return False
    return True
