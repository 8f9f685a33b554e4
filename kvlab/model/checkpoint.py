"""Folders with a checkpoint: found, checked and named before a byte of weights is loaded."""

from __future__ import annotations

import json
from collections import Counter
from hashlib import blake2b
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvlab import hub
from kvlab.core import BadInput

_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def from_hub(name: str, weights: bool = True) -> Path:
    """The folder of a hub model: the local cache first, then the network if it answers.

    weights: whether they have to be there, or `config.json` alone.
    Raises `BadInput` within a few seconds where neither has it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = _WANTED if weights else "config.json"
    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=wanted))
        if _is_complete(folder, weights):
            return folder
    except (LocalEntryNotFoundError, ValueError):
        pass
    reason = hub.obstacle()
    if reason is None:
        try:
            return Path(snapshot_download(name, allow_patterns=wanted))
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
    raise BadInput(
        "model.name",
        name,
        f"not in the local cache, and {hub.endpoint()} gives nothing ({reason}); "
        "give a folder with model.path=DIR or a GGUF file with model.path=FILE.gguf, or fill the "
        "cache where there is a network and set HF_HOME (HF_HUB_OFFLINE=1 skips the question)",
    )


def _is_complete(folder: Path, weights: bool) -> bool:
    try:
        return bool(check(folder) if weights else read_config(folder))
    except BadInput:
        return False


def check(folder: Path) -> dict:
    """The `config.json` of a folder that can be loaded. Raises `BadInput` saying why not."""
    config = read_config(folder)
    for file in weight_files(folder):
        _check_safetensors(file)
    return config


def read_config(folder: Path) -> dict:
    """The `config.json` of a folder, whatever else is there. Raises `BadInput`."""
    if not folder.is_dir():
        raise _refused(folder, "no such folder" if not folder.exists() else "is not a folder")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _refused(folder, "holds no config.json; a checkpoint folder is wanted") from None
    except (OSError, ValueError) as error:
        raise _refused(folder, f"config.json cannot be read: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise _refused(folder, f"architecture {kind!r} is no language model of transformers "
                       f"{transformers.__version__}, and code of a checkpoint is never run")
    if config.get("quantization_config"):
        raise _refused(folder, "its weights are quantized; give the unquantized checkpoint")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Pickled weights are refused: loading runs code."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise _refused(folder, f"{index.name} cannot be read: {error!r}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise _refused(folder, f"the weights file {missing[0]} is missing")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        remedy = "holds only pickled weights; convert them to safetensors (save_pretrained)"
        raise _refused(folder, remedy)
    raise _refused(folder, "holds no model.safetensors")


def _check_safetensors(file: Path) -> None:
    """Header whole, data as long as it says: a truncated download is named, not half loaded."""
    header, start = _header(file)
    try:
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    except (TypeError, KeyError, IndexError) as error:
        raise _refused(file.parent, f"{file.name} is damaged: {error!r}") from error
    wanted, size = start + max(ends, default=0), file.stat().st_size
    if size < wanted:
        raise _refused(file.parent, f"{file.name} is truncated: {size} of {wanted} bytes")


def _header(file: Path) -> tuple[dict, int]:
    """The JSON header of a safetensors file and where its data begins."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if 8 + length > file.stat().st_size:
            raise _refused(file.parent, f"{file.name} is truncated or no safetensors file")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise _refused(file.parent, f"{file.name} is no safetensors file") from error
    return header, 8 + length


def weights(folder: Path) -> str:
    """What the weights are, tensors counted by type: `safetensors (201 BF16)`."""
    counts = Counter(
        entry["dtype"] for file in weight_files(folder)
        for name, entry in _header(file)[0].items() if name != "__metadata__"
    )
    return f"safetensors ({', '.join(f'{count} {name}' for name, count in counts.most_common())})"


def identity(folder: Path) -> str:
    """A name for config and weights that changes when they do; reads at most 1 MiB a file.

    Hashes `config.json` and, for each weights file, header, size and 16 samples of 64 KiB.
    """
    digest = blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for file in weight_files(folder):
        header, start = _header(file)
        size = file.stat().st_size
        digest.update(json.dumps([size, header], sort_keys=True).encode())
        with file.open("rb") as stream:
            last = max(start, size - _SAMPLE_BYTES)
            for i in range(_SAMPLES):  # evenly spaced, both ends included
                stream.seek(start + (last - start) * i // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _refused(folder: Path, remedy: str) -> BadInput:
    return BadInput("model.path", folder, remedy)
