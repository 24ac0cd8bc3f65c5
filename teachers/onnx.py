"""Any ONNX graph as a teacher, run by ONNX Runtime: outputs of the graph, or tensors inside it by their names.

Source: https://onnxruntime.ai (MIT); the licence is that of the weights: `teachers.X.licence`. On the CPU, or on an
NVIDIA GPU where `onnxruntime-gpu` is installed; the host waits for the device at every call.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agglom.core.tokens import Conditioner, freeze, from_outputs, to_float32
from agglom.core.types import Features, PixelSpec, Provenance, Teacher
from agglom.errors import PluginError
from agglom.weights import file_digest, file_of, measured, settled_side

INPUTS = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


def build(
    *,
    file: str,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    patch: int,
    size: int | None = None,
    summary: int | str | None = None,
    patches: int | str | None = None,
    prefix: int = 0,
    origin: str | None = None,
) -> Teacher:
    """A frozen ONNX graph of one input, images (B, 3, H, W) normalised by mean and std.

    file: the graph, with its external data beside it; mean, std: for pixels in [0, 1]; patch: pixels per cell of the
    grid; size: pin the side of the input in pixels (default: that of the graph, else it follows the stage); summary,
    patches: which outputs, by position or name, or any tensor of the graph by name, and the same for both where it
    holds all tokens; prefix: class and register tokens before the patches; origin: where the weights come from.
    Raises PluginError.
    """
    path = file_of("teachers.onnx", file)
    wanted = [which for which in (summary, patches) if which is not None]
    if not wanted:
        raise PluginError("teachers.onnx: name the output that is the summary, or the one that is the patches")
    module = Graph(path, wanted, mean, std)
    freeze(module)
    side = settled_side("teachers.onnx", path.name, module.shape, size)

    def encode(pixels_BCHW: Tensor) -> Features:
        outputs = iter(module(pixels_BCHW))
        pooled, tokens = (None if which is None else next(outputs) for which in (summary, patches))
        return to_float32(from_outputs(pixels_BCHW, pooled, tokens, patch, prefix))

    dims, _ = measured("teachers.onnx", path.name, encode, patch, side)
    return Teacher(
        module=module,
        encode=encode,
        dims=dims,
        pixels=PixelSpec(mean=tuple(mean), std=tuple(std), patch=patch, size=side),
        fingerprint=file_digest([path, *module.data]),
        licence="unknown",
        provenance=Provenance(origin or path.name),
    )


class Graph(nn.Module):
    """Pixels in [0, 1] (B, 3, H, W) → the wanted tensors of the graph; its weights belong to ONNX Runtime."""

    def __init__(self, path: Path, wanted: list[int | str], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise PluginError(
                f"teachers.onnx: needs {error.name}, which is not installed: pip install onnx onnxruntime, or "
                "onnxruntime-gpu in its place for an NVIDIA GPU"
            ) from error
        self.condition = Conditioner(mean, std)
        self.path, self.runtime = path, onnxruntime
        try:
            model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf raises its own class
            raise PluginError(f"teachers.onnx: {path}: not an ONNX graph ({error})") from error
        external = {e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"}
        self.data = [path.parent / name for name in sorted(external)]
        if missing := [file.name for file in self.data if not file.is_file()]:
            raise PluginError(f"teachers.onnx: {path}: its weights are in {missing[0]}, which is not beside it")
        names = [_name(model.graph, which, path.name) for which in wanted]
        del model.graph.output[:]
        # What leads to no output is not computed: of a larger model only the encoder runs.
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names))
        self.names, self.model = names, model.SerializeToString()
        self.sessions: dict[torch.device, Any] = {}
        described = self.session(torch.device("cpu")).get_inputs()
        self.input, self.shape = described[0].name, tuple(described[0].shape) if len(described) == 1 else ()
        if described[0].type not in INPUTS:
            raise PluginError(f"teachers.onnx: '{path.name}' takes a {described[0].type}, expected floats")
        self.dtype = INPUTS[described[0].type]

    def session(self, device: torch.device) -> Any:
        """The session on a device, made when it is first asked for."""
        if device not in self.sessions:
            options = self.runtime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = torch.get_num_threads()
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(self.path.parent.resolve())
            )
            provider: Any = "CPUExecutionProvider"
            if device.type == "cuda":
                stream = torch.cuda.current_stream(device).cuda_stream
                placed = {"device_id": device.index or 0, "user_compute_stream": str(stream)}
                provider = ("CUDAExecutionProvider", placed)
                if provider[0] not in self.runtime.get_available_providers():
                    raise PluginError(
                        "teachers.onnx: this onnxruntime runs on the CPU only: install onnxruntime-gpu in its place"
                    )
            try:
                self.sessions[device] = self.runtime.InferenceSession(self.model, options, providers=[provider])
            except Exception as error:  # the runtime raises its own classes
                raise PluginError(f"teachers.onnx: ONNX Runtime refuses '{self.path.name}': {_line(error)}") from error
        return self.sessions[device]

    def forward(self, pixels_BCHW: Tensor) -> list[Tensor]:
        if self.shape[0] == 1 and len(pixels_BCHW) != 1:
            raise PluginError(
                f"teachers.onnx: '{self.path.name}' takes one image at a time: set micro_batch: 1, or export it with a "
                "batch of any number"
            )
        x = self.condition(pixels_BCHW).to(self.dtype).contiguous()
        session, place = self.session(x.device), (x.device.type, x.device.index or 0)
        binding = session.io_binding()
        binding.bind_input(self.input, *place, x.new_empty(0, device="cpu").numpy().dtype, x.shape, x.data_ptr())
        for name in dict.fromkeys(self.names):
            binding.bind_output(name, *place)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # the runtime raises its own classes
            raise ValueError(f"ONNX Runtime: {_line(error)}") from error
        found = dict(zip(dict.fromkeys(self.names), map(torch.from_dlpack, binding.get_outputs()), strict=True))
        return [found[name] for name in self.names]


def _name(graph: Any, which: int | str, file: str) -> str:
    """The name of a tensor of the graph. Raises PluginError."""
    outputs = [output.name for output in graph.output]
    if isinstance(which, int):
        if 0 <= which < len(outputs):
            return outputs[which]
        close = outputs
    else:
        inside = [name for node in graph.node for name in node.output if name]
        if which in inside:
            return which
        close = difflib.get_close_matches(which, inside, n=3) or outputs
    raise PluginError(f"teachers.onnx: '{file}' has no tensor {which!r}; it has {', '.join(close)}")


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
