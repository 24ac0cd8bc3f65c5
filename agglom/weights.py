"""Networks by name and weights from files, for the teachers and students that are built on timm."""

from __future__ import annotations

import difflib
import hashlib
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agglom.core.tokens import emitted, stride
from agglom.core.types import Dims, Features, Provenance
from agglom.errors import PluginError

WRAPPERS = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, and classes that wrap a network
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

    A state dict nested under 'state_dict', 'model' or 'model_state_dict' is found, and a prefix that all of its keys
    have from a wrapper of the network ('module.', '_orig_mod.', 'model.') is taken off. Raises PluginError.
    """
    path = Path(path)
    if not path.is_file():
        raise PluginError(f"checkpoint {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return _unwrapped(load_file(path))
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
    return _unwrapped(content)


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            return _unwrapped({key.removeprefix(prefix): value for key, value in state.items()})
    return state


def file_of(kind: str, file: str) -> Path:
    """The path of a file that a teacher is made of. Raises PluginError where there is none."""
    path = Path(file)
    if not path.is_file():
        raise PluginError(f"{kind}: {path}: no such file")
    return path


def file_digest(paths: Iterable[Path]) -> str:
    """sha256 over the bytes of some files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def settled_side(kind: str, model: str, shape: Sequence[Any], size: int | None) -> int | None:
    """The side of the input of a graph whose input has this shape (B, C, H, W), where only a fixed axis is an int.

    It is `size` where the graph follows its input. Raises PluginError where `size` contradicts the graph, or the graph
    takes anything but square images of three channels, in batches of any number or one by one.
    """
    batch, channels, height, width = shape if len(shape) == 4 else (None, None, None, None)
    shown = "×".join(str(axis) if isinstance(axis, int) else "any" for axis in shape)
    fixed = height if isinstance(height, int) else width
    square = height == width if isinstance(height, int) and isinstance(width, int) else not isinstance(fixed, int)
    if len(shape) != 4 or not square or (isinstance(channels, int) and channels != 3):
        raise PluginError(f"{kind}: '{model}' takes {shown}, expected images (batch, 3, side, side)")
    if isinstance(batch, int) and batch != 1:
        raise PluginError(
            f"{kind}: '{model}' takes {shown}, {batch} images at a time: export it with a batch of any number, or of 1"
        )
    if isinstance(fixed, int) and size not in (None, fixed):
        raise PluginError(f"{kind}: '{model}' takes images of {fixed} px only, but size is {size}; remove it")
    return fixed if isinstance(fixed, int) else size


def repository(model: str) -> str | None:
    """The repository on the hub that a library's name of a model stands for; None for a local folder."""
    name = model.removeprefix("hf-hub:").partition("@")[0]
    return None if model.startswith("local-dir:") or Path(model).is_dir() else name


def origin(model: str, repo: str | None) -> Provenance:
    """Where weights come from: the repository and the commit that the hub's cache holds of it, or a local folder.

    A folder or file is told by its name alone: where it lies is nobody's business.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if repo is None:
        return Provenance(Path(model.removeprefix("local-dir:")).name)
    wanted = model.partition("@")[2] or "main"
    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "refs" / wanted
    commit = cached.read_text(encoding="utf-8").strip() if cached.is_file() else None
    return Provenance(repo, commit or (wanted if wanted != "main" else None))


def licence_of(model: str, repo: str | None) -> str:
    """The licence in the model card of a repository or of a local folder; "unknown" without one."""
    from huggingface_hub import hf_hub_download, metadata_load

    folder = Path(model.removeprefix("local-dir:"))
    try:
        card = folder / "README.md" if repo is None else hf_hub_download(repo, "README.md")
        said = metadata_load(card) or {}
    except Exception:  # the hub's client raises errors of several libraries; a licence can be given by hand
        return "unknown"
    licence = said.get("license")
    return str(said.get("license_name", "unknown") if licence in (None, "other") else licence)


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
