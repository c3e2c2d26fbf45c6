"""Weight files: read without running anything in them, and told apart by their tensors."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
# Where training scripts put the weights, and what they put before every name.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.", "model.")


class WrongFile(ValueError):
    """A file that cannot serve, with the reason and the remedy."""


@dataclass(frozen=True)
class Kind:
    """What a file holds. loader: the node that takes it, or None where none of this pack does."""

    name: str
    loader: str | None = None


AESTHETIC_HEAD = Kind("an aesthetic head (LAION v2)", "MIRA Load Aesthetic Reward")
OPEN_CLIP = Kind("a CLIP in open_clip's layout", "MIRA Load CLIPScore Reward")
HF_CLIP = Kind("a CLIP in Hugging Face's layout", "MIRA Load CLIPScore Reward")
HF_CLIP_VISION = Kind("the image half of a CLIP", "MIRA Load Aesthetic Reward (as its clip)")
HF_CLIP_TEXT = Kind("the text half of a CLIP", "MIRA Load CLIPScore Reward (as its text_file)")
HF_SIGLIP = Kind("a SigLIP in Hugging Face's layout", "MIRA Load CLIPScore Reward")
OPEN_SIGLIP = Kind("a SigLIP in open_clip's layout", "MIRA Load CLIPScore Reward")
IMAGE_REWARD = Kind("ImageReward", "MIRA Load ImageReward")
UNKNOWN = Kind("a file of an unknown kind")

# The first whose names are all there decides, so the more special come first.
SIGNS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    (Kind("a checkpoint of an image model", "Load Checkpoint (ComfyUI's own)"), ("model.diffusion_model.",)),
    (Kind("a checkpoint of an image model", "Load Checkpoint (ComfyUI's own)"), ("diffusion_model.input_blocks.",)),
    (Kind("a LoRA", "Load LoRA (ComfyUI's own)"), ("lora_",)),
    (IMAGE_REWARD, ("blip.visual_encoder.", "blip.text_encoder.", "mlp.layers.0.weight")),
    (Kind("a BLIP without a reward's head"), ("visual_encoder.blocks.", "text_encoder.")),
    (AESTHETIC_HEAD, ("layers.0.weight", "layers.2.weight", "layers.4.weight", "layers.6.weight", "layers.7.weight")),
    (OPEN_SIGLIP, ("visual.trunk.", "text.transformer.")),
    (OPEN_CLIP, ("visual.conv1.weight", "visual.transformer.resblocks.", "token_embedding.weight")),
    (HF_SIGLIP, ("vision_model.head.probe", "text_model.head.weight")),
    (HF_CLIP, ("vision_model.pre_layrnorm.weight", "text_model.final_layer_norm.weight")),
    (HF_CLIP_VISION, ("vision_model.pre_layrnorm.weight",)),
    (HF_CLIP_TEXT, ("text_model.final_layer_norm.weight",)),
    (Kind("a SigLIP's image half"), ("vision_model.head.probe",)),
    (Kind("a VAE", "Load VAE (ComfyUI's own)"), ("decoder.", "encoder.")),
    (Kind("a T5 text encoder"), ("encoder.block.0.layer.0.SelfAttention.",)),
)


def kind_of(state: dict[str, Tensor]) -> Kind:
    for kind, signs in SIGNS:
        if all(any(sign in key for key in state) for sign in signs):
            return kind
    return UNKNOWN


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt, .pth or .bin file, or of the shards that an .index.json names, on the CPU.

    Nothing in a file is ever run. Raises WrongFile for a file that is missing, damaged, needs more than weights, or
    holds values that are not finite, or not stored one by one.
    """
    path = Path(path)
    if not path.is_file():
        raise WrongFile(f"{path.name} is not there: {path}")
    if path.name.endswith(".index.json"):
        state = _read_shards(path)
    else:
        state = _unwrapped(_read_one(path), path)
    for key, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise WrongFile(f"{path.name} holds weights that are sparse, quantised or empty ({key}): use plain ones")
        # Of a byte each there is no `isfinite`.
        if tensor.is_floating_point() and not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all():
            raise WrongFile(f"{path.name} holds NaN or infinite weights ({key}): download it again, or use another one")
    return state


def require(state: dict[str, Tensor], wanted: tuple[Kind, ...], file: str, node: str) -> Kind:
    """The file's kind. Raises WrongFile, saying what it is and what takes it, where it is none of `wanted`."""
    kind = kind_of(state)
    if kind not in wanted:
        names = " or ".join(k.name for k in wanted)
        if kind is UNKNOWN:
            kind_text = f"of an unknown kind (it begins with {', '.join(list(state)[:3]) or 'nothing: it is empty'})"
        else:
            kind_text = kind.name
        remedy = f"; {kind.loader} takes it" if kind.loader and not kind.loader.startswith(node) else ""
        raise WrongFile(f"{node}: {file} is {kind_text}, not {names}{remedy}")
    return kind


def _read_one(path: Path) -> Any:
    if path.stat().st_size == 0:
        raise WrongFile(f"{path.name} is empty: download it again")
    if path.suffix in (".safetensors", ".sft"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            # Tensors of their own: those that it gives are the file itself, and change or end the process with it.
            return {name: tensor.clone() for name, tensor in load_file(path).items()}
        except (SafetensorError, ValueError, OSError) as problem:
            raise WrongFile(
                f"{path.name} is damaged or cut short ({problem}): compare its size with the original and download it "
                "again"
            ) from problem
    if _is_torchscript(path):
        raise WrongFile(
            f"{path.name} is a TorchScript program, not a file of weights (OpenAI's own CLIP downloads are), and it is "
            "not run. Use the same network in safetensors (openai/clip-vit-large-patch14), or, if you trust the file, "
            "convert it once:\n"
            f"  python -c \"import torch; torch.save(torch.jit.load('{path.name}', 'cpu').state_dict(), 'weights.pt')\""
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        reason = re.search(r"GLOBAL ([\w.]+)", str(problem))
        if reason is None:
            raise WrongFile(f"{path.name} is damaged, or no file of weights at all: download it again") from problem
        raise WrongFile(
            f"{path.name} is a pickle that needs more than weights ({reason[1]}): opening it "
            "could run a stranger's code, so it is not opened. Use a safetensors version, or, if you trust the file, "
            "convert it once:\n"
            f"  python -c \"import torch; d = torch.load('{path.name}', 'cpu', weights_only=False); "
            "d = d.get('state_dict', d); "
            "torch.save({k: v for k, v in d.items() if torch.is_tensor(v)}, 'weights.pt')\""
        ) from problem
    except (RuntimeError, EOFError, zipfile.BadZipFile, KeyError, ValueError, OSError) as problem:
        raise WrongFile(
            f"{path.name} is damaged or cut short ({str(problem).splitlines()[0][:120]}): compare its size with the "
            "original and download it again"
        ) from problem


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        names = sorted({Path(n).name for n in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise WrongFile(f"{index.name} is no index of shards ({problem!r}): it needs a weight_map") from problem
    missing = [n for n in names if not (index.parent / n).is_file()]  # never out of the index's own folder
    if missing:
        raise WrongFile(f"{index.name} names {', '.join(missing)}, which {index.parent.name} lacks: add the file(s)")
    state: dict[str, Tensor] = {}
    for name in names:
        shard = index.parent / name
        state |= _unwrapped(_read_one(shard), shard)
    return state


def _unwrapped(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, its names without what training put before them."""
    for _ in WRAPPERS:
        inner = next(
            (loaded[w] for w in WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(w), dict)), None
        )
        if inner is None:
            break
        loaded = inner
    entries = loaded.items() if isinstance(loaded, dict) else ()
    state = {k: v for k, v in entries if isinstance(k, str) and isinstance(v, Tensor)}
    if not state:
        raise WrongFile(f"{path.name} holds no named weights (it is a {type(loaded).__name__}): use another file")
    if any(k.startswith("model.diffusion_model.") for k in state):
        return state
    for prefix in PREFIXES:
        if all(k.startswith(prefix) for k in state):
            state = {k[len(prefix) :]: v for k, v in state.items()}
    return state
