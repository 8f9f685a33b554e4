"""A GGUF file becomes a checkpoint folder, once: dequantized by transformers, kept by content.

The folder lies in the user's cache (`KVLAB_CACHE`, else `$XDG_CACHE_HOME/kvlab`, else
`~/.cache/kvlab`) and may be deleted at any time. Its name holds the hash of the file, the dtype
and the version of transformers. It is written beside its place under a lock and moved there whole.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from filelock import FileLock
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.quantization_config import GgufConfig
from xxhash import xxh3_128

from kvlab.core import BadInput
from kvlab.hub import cache_folder
from kvlab.model import checkpoint
from kvlab.model.gguf_config import check_architecture, config_of
from kvlab.model.gguf_header import MISSING_EXTRA, Header, check_whole, described, read_header

EXTRA = ("gguf", "accelerate")
RECORD = "kvlab.json"  # what the folder was made from
LAYOUT = 1  # goes up when what is written here changes
_PIECE = 1 << 24
# What a tokenizer's regular expression must hold, by llama.cpp's name: before 5.24 transformers
# splits Llama 3 and Mistral Nemo as GPT-2.
SPLITS = {"llama-bpe": "p{N}{1,3}", "llama3": "p{N}{1,3}", "llama-v3": "p{N}{1,3}",
          "tekken": "p{Lu}"}


class Converted(NamedTuple):
    """A checkpoint folder, and in words what its weights were."""

    folder: Path
    weights: str


def convert(path: Path, dtype: torch.dtype) -> Converted:
    """The checkpoint folder of a GGUF file, from the cache or made now.

    Raises `BadInput` where the file is damaged, cut short, of another architecture or of tensor
    types that nobody knows, and where the extra `gguf` is not installed.
    """
    header = read_header(path)
    check_architecture(header)
    absent = [name for name in EXTRA if find_spec(name) is None]
    if absent:
        raise header.refused(MISSING_EXTRA.format(", ".join(absent)))
    check_whole(header)
    folder = cache_folder() / "gguf" / folder_name(path, dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not _is_whole(folder):
        with FileLock(f"{folder}.lock"):
            if not _is_whole(folder):  # or another process has made it meanwhile
                _make(header, folder, dtype)
    return Converted(folder, json.loads((folder / RECORD).read_text())["weights"])


def folder_name(path: Path, dtype: torch.dtype) -> str:
    """Changes with the file's content and with what reads it."""
    digest = xxh3_128(str(LAYOUT).encode())
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    kind = str(dtype).removeprefix("torch.")
    return f"{digest.hexdigest()}-{kind}-{transformers.__version__}"


def _is_whole(folder: Path) -> bool:
    """Moved there in one step, so it is whole, unless somebody deleted parts of it."""
    try:
        return (folder / RECORD).is_file() and bool(checkpoint.check(folder))
    except BadInput:
        return False


def _make(header: Header, folder: Path, dtype: torch.dtype) -> None:
    """Write the folder under another name and move it. What a killed run left is replaced."""
    part = folder.with_name(f"{folder.name}.part")
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir()
    weights = described(header)
    try:
        with _told(header, weights, folder):
            _write(header, part, dtype)
        record = {"file": header.path.name, "weights": weights,
                  "transformers": transformers.__version__}
        (part / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        os.replace(part, folder)
    except OSError as error:
        raise header.refused(f"its dequantized copy cannot be written to {folder.parent}: "
                             f"{error.strerror or error}; KVLAB_CACHE names another folder"
                             ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _told(header: Header, weights: str, folder: Path):
    """A line before and one after; the library's own bar is for terminals only."""
    began = time.perf_counter()
    print(f"{header.path.name}: {header.size / 1e6:,.0f} MB of {weights} are dequantized once, "
          f"into {folder.parent}", file=sys.stderr, flush=True)
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):
        yield
    print(f"{header.path.name}: done in {time.perf_counter() - began:.0f} s",
          file=sys.stderr, flush=True)


def _write(header: Header, part: Path, dtype: torch.dtype) -> None:
    """Config, weights, generation config, tokenizer and chat template."""
    config = config_of(header)
    try:
        write_tokenizer(header, part)
        model = _dequantized(header, config, dtype)
    except (OSError, BadInput):
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = str(error).strip().partition("\n")[0]
        raise header.refused(f"transformers cannot read it: {reason}") from error
    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, part / "model.safetensors", metadata={"format": "pt"})
    config.dtype, config.architectures = dtype, [_class_name(config)]
    config.save_pretrained(part)
    model.generation_config.save_pretrained(part)


def _dequantized(header: Header, config, dtype: torch.dtype):
    """The library's own load of the file. A Mistral file is laid out as a Llama file is."""
    kind = header.architecture
    if kind == "llama" and config.model_type == "mistral":
        plain = config.to_dict()
        for key in ("model_type", "sliding_window"):
            plain.pop(key)
        config = transformers.LlamaConfig(**plain)
    model, info = AutoModelForCausalLM.from_pretrained(
        header.path.parent, gguf_file=header.path.name, config=config, dtype=dtype,
        quantization_config=GgufConfig(dequantize=True), local_files_only=True,
        output_loading_info=True,
    )
    missing = sorted(set(info["missing_keys"]) - {"lm_head.weight"})
    if missing:
        raise header.refused(f"{len(missing)} weights are missing, the first is {missing[0]}")
    return model


def _class_name(config) -> str:
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__


def write_tokenizer(header: Header, part: Path) -> None:
    """As transformers converts it; special tokens as the file numbers them."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        header.path.parent, gguf_file=header.path.name, local_files_only=True
    )
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    pre = header.metadata.get("tokenizer.ggml.pre")
    if SPLITS.get(pre, "") not in tokenizer.backend_tokenizer.to_str():
        raise header.refused(f"transformers {transformers.__version__} splits text otherwise than "
                             f"its tokenizer {pre!r} does; a later one may not")
    tokenizer.save_pretrained(part)
