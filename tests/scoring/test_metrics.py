"""The built-in metrics against formulas written out, the bundled CLIP, and tiny models with random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from interp.scoring import score
from interp.scoring.blip import noun_phrases, questions
from interp.stores import InterpError, synthetic_run

CONDITIONS = ("baseline", "late")


@pytest.fixture(scope="module")
def run():
    """A run whose second condition's pictures are noisy versions of the first's."""
    made = synthetic_run(samples=3, conditions=CONDITIONS, scores=False)
    images = made.tree["images"]["image"]
    noise = np.random.default_rng(0).integers(-40, 40, images.shape[1:])
    images.values[3:] = np.clip(images.values[:3].astype(int) + noise, 0, 255)
    return made


def test_l1_is_a_share_of_the_full_range(run):
    found = score(run, "l1").scores.sel(metric="l1:baseline").values
    images = run.images.values.astype(float) / 255
    assert found == pytest.approx(np.abs(images - np.tile(images[:3], (2, 1, 1, 1))).mean((1, 2, 3)), abs=1e-6)
    assert (found[:3] == 0).all() and (found[3:] > 0).all()


def test_ssim_is_that_of_the_paper(run):
    """Against scikit-image's, which was written by others; windows at the border see the picture mirrored."""
    from skimage.metrics import structural_similarity

    found = score(run, "ssim").scores.sel(metric="ssim:baseline").values
    images = np.pad(run.images.values / 255.0, ((0, 0), (5, 5), (5, 5), (0, 0)), mode="reflect")
    wanted = [
        structural_similarity(
            images[i], images[i % 3], channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for i in range(6)
    ]  # fmt: skip
    assert found[:3] == pytest.approx(np.ones(3), abs=1e-6) and (found[3:] < 0.9).all()
    assert found == pytest.approx(wanted, abs=1e-4)


class Colors(torch.nn.Module):
    """Features that anybody can compute: the mean of each channel."""

    num_features = 3

    def forward(self, x):
        return x.double().mean((2, 3)) / 255


def test_fid_with_features_of_ones_own(run):
    found = score(run, "fid", features=Colors(), batch_size=2).tree["scores"].attrs["by_condition"]["fid:baseline"]
    x, y = (run.images.values[part].mean((1, 2)) / 255 for part in (slice(3, 6), slice(0, 3)))
    a, b = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root
    assert list(found) == ["late"] and found["late"]["samples"] == 3
    assert found["late"]["value"] == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_fid_in_clip_is_that_of_its_vectors_and_is_made_once(run, monkeypatch):
    from interp.scenes import folder
    from interp.scenes.scoring import Scorer, to_tensor
    from interp.scoring.frechet import ClipFid

    class Vectors(torch.nn.Module):
        num_features = 128

        def forward(self, x):
            return Scorer.of(folder()).picture_vectors(to_tensor(x.permute(0, 2, 3, 1).numpy()))

    run.tree.attrs["pipeline"] = {"id": "scenes"}
    wanted = score(run, "fid", features=Vectors()).tree["scores"].attrs["by_condition"]["fid:baseline"]
    scored = score(run, "clip_fid")
    found = scored.tree["scores"].attrs["by_condition"]["clip_fid:baseline"]
    assert found["late"] == pytest.approx(wanted["late"]) and list(found) == ["late"]

    def update(self, images, references):
        raise ValueError("asked again")

    monkeypatch.setattr(ClipFid, "update", update)
    assert score(scored, "clip_fid").tree["scores"].attrs == scored.tree["scores"].attrs
    with pytest.raises(InterpError, match="'clip_fid' failed: ValueError: asked again"):
        score(scored, "clip_fid", again=True)


class Counting:
    """A model whose vectors are what it is given; it notes how many that were."""

    features = 1

    def __init__(self):
        self.asked = []

    def pictures(self, images):
        self.asked.append(len(images))
        return torch.from_numpy(images[:, 0, 0, :1].astype("float32"))

    def texts(self, texts):
        self.asked.append(len(texts))
        return torch.tensor([[float(len(t))] for t in texts])


def test_a_vector_is_computed_once_as_long_as_it_is_remembered():
    from interp.scoring import clip

    encoder, number = clip.Encoder(Counting()), torch.arange(5, dtype=torch.uint8)
    images = number[:, None, None, None].expand(-1, 4, 4, 3).numpy()
    assert encoder.pictures(images[[3, 1, 3]]).flatten().tolist() == [3, 1, 3]
    assert encoder.pictures(images).flatten().tolist() == [0, 1, 2, 3, 4]
    assert encoder.texts(["abc", "a", "abc"]).flatten().tolist() == [3, 1, 3]
    assert encoder.pictures(images.reshape(5, 2, 8, 3)).flatten().tolist() == [0, 1, 2, 3, 4]  # of another shape
    assert encoder.model.asked == [2, 3, 2, 5]
    encoder.memory.most = 3
    assert encoder.pictures(images).flatten().tolist() == [0, 1, 2, 3, 4]
    assert len(encoder.memory.known) == 3 and encoder.pictures(images[:2]).flatten().tolist() == [0, 1]


@pytest.mark.parametrize(("metric", "needs"), [("lpips", "torchvision"), ("fid", "torch-fidelity")])
def test_what_is_not_installed_is_named(run, metric, needs):
    try:
        import torch_fidelity  # noqa: F401
        import torchvision  # noqa: F401
    except Exception:  # what cannot be imported is not there
        with pytest.raises(InterpError, match=f"{metric} needs .*{needs}") as error:
            score(run, metric)
        assert "\n" not in str(error.value)


def backbone(name):
    """The features of torchvision's alexnet, vgg16 and squeezenet1_1, by their papers, with random weights."""
    from torch import nn

    def convolutions(*sizes):
        channels, layers = 3, []
        for size in sizes:
            if size:
                layers += [nn.Conv2d(channels, size, 3, padding=1), nn.ReLU()]
                channels = size
            else:
                layers.append(nn.MaxPool2d(2))
        return layers

    class Fire(nn.Module):
        def __init__(self, channels, squeezed, expanded):
            super().__init__()
            self.squeeze = nn.Conv2d(channels, squeezed, 1)
            self.one, self.three = (nn.Conv2d(squeezed, expanded, k, padding=k // 2) for k in (1, 3))

        def forward(self, x):
            x = self.squeeze(x).relu()
            return torch.cat([self.one(x), self.three(x)], 1).relu()

    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    torch.manual_seed(0)
    if name == "alexnet":
        first = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), pool, nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool]
        then = [nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*first, *then, nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), pool)
    if name == "vgg16":
        wide = (0, 512, 512, 512)
        return nn.Sequential(*convolutions(64, 64, 0, 128, 128, 0, 256, 256, 256, *wide, *wide, 0))
    first = [nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool, Fire(64, 16, 64), Fire(128, 16, 64), pool]
    then = [Fire(128, 32, 128), Fire(256, 32, 128), pool, Fire(256, 48, 192), Fire(384, 48, 192)]
    return nn.Sequential(*first, *then, Fire(384, 64, 256), Fire(512, 64, 256))


AFTER = {  # the layers whose outputs LPIPS compares
    "alex": ("alexnet", (1, 4, 7, 9, 11)),
    "vgg": ("vgg16", (3, 8, 15, 22, 29)),
    "squeeze": ("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12)),
}


@pytest.mark.parametrize("network", AFTER)
def test_lpips_is_that_of_the_paper(run, network, monkeypatch):
    """Equation 1 of arXiv:1801.03924, its linear weights those that torchmetrics ships; backbones of random weights."""
    import torchmetrics.functional.image.lpips as functional
    from torchmetrics.image import lpip

    monkeypatch.setattr(lpip, "_TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(functional, "_get_tv_model_features", lambda name, pretrained: backbone(name))
    found = score(run, "lpips", network=network, batch_size=4).scores.sel(metric="lpips:baseline").values
    name, after = AFTER[network]
    layers = backbone(name)
    path = Path(functional.__file__).with_name("lpips_models") / f"{network}.pth"
    weights = list(torch.load(path, map_location="cpu", weights_only=True).values())
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ((-0.03, -0.088, -0.188), (0.458, 0.448, 0.45)))
    x = (torch.from_numpy(run.images.values).permute(0, 3, 1, 2) / 127.5 - 1 - shift) / scale
    wanted, features = torch.zeros(6), x
    with torch.no_grad():
        for k, layer in enumerate(layers):
            features = layer(features)
            if k in after:
                unit = features / features.norm(dim=1, keepdim=True).clamp(min=1e-4)
                gap = (unit - unit[[0, 1, 2, 0, 1, 2]]) ** 2
                wanted += (weights[after.index(k)] * gap).sum(1).mean((1, 2))
    assert found == pytest.approx(wanted.numpy(), rel=1e-3, abs=1e-6)
    assert (found[:3] == 0).all() and (found[3:] > 0).all()


def test_fid_of_inception_s_layers(run, monkeypatch):
    """Which layer is asked for, and what it is given; the network itself is one of random weights."""
    from torchmetrics.image import fid

    class Inception(torch.nn.Module):
        def __init__(self, name, features_list, **kwargs):
            super().__init__()
            asked.append(features_list)
            torch.manual_seed(0)
            self.layer = torch.nn.Conv2d(3, 64, 8, 8)
            self.num_features = 64

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            return self.layer(x.float() / 255).mean((2, 3))

    asked = []
    monkeypatch.setattr(fid, "_TORCH_FIDELITY_AVAILABLE", True)
    monkeypatch.setattr(fid, "NoTrainInceptionV3", Inception)

    def value(features):
        attrs = score(run, "fid", features=features, again=True).tree["scores"].attrs
        return attrs["by_condition"]["fid:baseline"]["late"]["value"]

    assert value(64) == pytest.approx(value(Inception("", [])), rel=1e-6) and asked[0] == ["64"]
    with pytest.raises(InterpError, match="features=65 is not possible; it is one of 64, 192, 768, 2048"):
        value(65)


def test_missing_torchmetrics_is_named(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics", None)
    with pytest.raises(
        InterpError, match=r"ssim needs the package torchmetrics: pip install 'interp-diffusion\[metrics\]'"
    ):
        score(run, "ssim", again=True)


@pytest.fixture(scope="module")
def own_clip(tmp_path_factory):
    """The CLIP of scenes as a folder of transformers, with a processor that does what scenes does to pictures."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    from interp.scenes import folder

    path = tmp_path_factory.mktemp("clip")
    CLIPModel.from_pretrained(folder() / "clip", dtype=torch.float32).save_pretrained(path)
    pictures = CLIPImageProcessorPil(
        size={"height": 128, "width": 128}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    CLIPProcessor(pictures, CLIPTokenizer.from_pretrained(folder() / "tokenizer")).save_pretrained(path)
    return str(path)


def test_clip_of_the_hub_equals_the_bundled_one(own_clip):
    """The same weights by two ways: transformers' processor, and the scorer of scenes."""
    from interp.scenes import alignment, draw

    drawn = draw(4, seed=11, full=True)
    run = synthetic_run(samples=4, scores=False)
    tree = run.tree.copy()
    images = run.images.isel(height=[0] * 128, width=[0] * 128).reset_coords(drop=True).copy(data=drawn.images)
    tree["images"] = type(tree)(tree["images"].to_dataset().drop_dims(["height", "width"]).assign(image=images))
    tree["prompt"].values[:] = drawn.captions
    run = type(run)(tree)
    found = score(run, ["clip:prompt", "clip_image"], clip_model=own_clip).scores
    assert found.sel(metric="clip:prompt").values == pytest.approx(alignment(drawn.images, drawn.captions), abs=2e-3)
    assert found.sel(metric="clip_image:baseline").values == pytest.approx(np.ones(4), abs=1e-5)
    assert (found.sel(metric="clip:prompt") > 0.4).all()


@pytest.fixture(scope="module")
def tiny_blip(tmp_path_factory):
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForQuestionAnswering,
        BlipImageProcessorPil,
        BlipProcessor,
        BlipTextConfig,
        BlipVisionConfig,
    )

    path = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "yes", "no", "a", "red", "blue", "circle", "star"]
    words += ["navy", "background", "dog", "two", "?"]
    (path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(path / "vocab.txt"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = BlipTextConfig(
        vocab_size=len(words), encoder_hidden_size=16, projection_dim=8, bos_token_id=5, eos_token_id=3,
        sep_token_id=3, pad_token_id=0, **sizes,
    )  # fmt: skip
    vision = BlipVisionConfig(image_size=32, patch_size=8, projection_dim=8, **sizes)
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    model = BlipForQuestionAnswering(config).eval()
    for p in model.parameters():  # large enough that answers depend on picture and question
        p.data.mul_(4) if p.ndim > 1 else None
    model.save_pretrained(path)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(path)
    return str(path)


def test_blip_vqa_is_the_product_of_yes(tiny_blip):
    """Against transformers' own generation, one question at a time."""
    from transformers import BlipForQuestionAnswering, BlipProcessor

    run = synthetic_run(samples=3, scores=False)
    texts = ["a red circle and a blue star", "two dogs on a navy background", "a circle? a star?"]
    run.tree["prompt"].values[:] = texts
    found = score(run, "blip_vqa:prompt", blip_model=tiny_blip, batch_size=2).scores.values[:, 0]
    model, processor = (k.from_pretrained(tiny_blip) for k in (BlipForQuestionAnswering, BlipProcessor))
    yes = processor.tokenizer.convert_tokens_to_ids("yes")
    asked = [["a red circle?", "a blue star?"], ["two dogs?", "a navy background?"], ["a circle?", "a star?"]]
    wanted = []
    for i, each in enumerate(asked):
        chances = []
        for question in each:
            inputs = processor(images=run.images.values[i], text=question, return_tensors="pt")
            out = model.generate(
                **inputs, max_new_tokens=1, output_scores=True, return_dict_in_generate=True, do_sample=False
            )
            chances.append(float(out.scores[0].softmax(-1)[0, yes]))
        wanted.append(np.prod(chances))
    assert found == pytest.approx(wanted, rel=1e-4)
    assert len({round(float(v), 6) for v in found}) == 3


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("a red circle left of a blue star", ["a red circle", "a blue star"]),
        ("a photo of an old man with a hat, in the park", ["an old man", "a hat", "the park"]),
        ("the cat is on the left", ["the cat"]),
        ("a brass lamp a wooden desk", ["a brass lamp", "a wooden desk"]),
        ("on top of the side", []),
        ("", []),
    ],
)
def test_noun_phrases(text, phrases):
    assert noun_phrases(text) == phrases
    assert questions(text) == [f"{p}?" for p in phrases]


def test_models_that_cannot_be_loaded_are_named(run):
    for metric, options in (("clip", {"clip_model": "no/such"}), ("blip_vqa", {"blip_model": "no/such"})):
        with pytest.raises(
            InterpError, match=f"cannot load the .* model 'no/such' .*; name another by {next(iter(options))}"
        ) as error:
            score(run, metric, **options)
        assert "\n" not in str(error.value)
