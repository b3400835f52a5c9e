"""Put trained parts together into the folder that ships: a pipeline in half precision, CLIP, the judge, hashes."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from interp.scenes.bpe import write_tokenizer
from interp.scenes.grammar import WORDS
from interp.scenes.parts import build_scheduler

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def pack(training: Path, folder: Path) -> None:
    """Write what `training` holds as one pipeline folder with half precision weights, and print its hashes.

    The text encoder's weights are stored once: `clip/` names them by an index that points at the pipeline's file.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    build_scheduler().save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer", WORDS)
    shared = training if (training / "vae").exists() else training.parent
    for part, source in {"vae": shared, "unet": training}.items():
        file = "diffusion_pytorch_model.safetensors"
        _copy_config(source / part / "config.json", folder / part / "config.json")
        _halved(load_file(source / part / file), folder / part / file)
    _pack_clip(training / "clip", folder)
    _halved(load_file((shared if not (training / "judge").exists() else training) / "judge" / "model.safetensors"),
            folder / "judge" / "model.safetensors")  # fmt: skip


def _pack_clip(source: Path, folder: Path) -> None:
    weights = load_file(source / "model.safetensors")
    text = {name: value for name, value in weights.items() if name.startswith("text_model.")}
    rest = {name: value for name, value in weights.items() if name not in text}
    _halved(text, folder / "text_encoder" / "model.safetensors")
    _halved(rest, folder / "clip" / "vision.safetensors")
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    _write_config(config, folder / "clip" / "config.json")
    encoder = {**config["text_config"], "architectures": ["CLIPTextModel"]}
    encoder["transformers_version"] = config["transformers_version"]
    _write_config(encoder, folder / "text_encoder" / "config.json")
    files = dict.fromkeys(rest, "vision.safetensors") | dict.fromkeys(text, "../text_encoder/model.safetensors")
    size = sum(2 * value.numel() for value in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (folder / "clip" / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _write_config(config: dict[str, Any], target: Path) -> None:
    # Files are in half precision; loading without a dtype gives float32, as diffusers does for the other parts.
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def _copy_config(source: Path, target: Path) -> None:
    config = {k: v for k, v in json.loads(source.read_text()).items() if k != "_name_or_path"}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(config, indent=2) + "\n")


def _halved(weights: dict[str, torch.Tensor], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    save_file({name: value.contiguous() for name, value in half.items()}, target, metadata={"format": "pt"})


def hashes(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and sha256 of every weight file below `folder`, by its path there."""
    found = sorted(folder.rglob("*.safetensors"))
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in found
    }
