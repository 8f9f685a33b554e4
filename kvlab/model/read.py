"""Tokenizer and weights of a checkpoint folder; whatever goes wrong names the folder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from kvlab.core import BadInput


def read_tokenizer(folder: Path, config) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, also where only `tokenizer.json` is there."""
    try:
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
            eos = config.eos_token_id
            eos = eos[0] if isinstance(eos, list) else eos
            if eos is not None:
                tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(eos)
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = str(error).strip().partition("\n")[0]
        raise BadInput("model.path", folder, f"its tokenizer cannot be read: {reason}") from error
    if len(tokenizer) > config.vocab_size:
        remedy = f"its tokenizer has {len(tokenizer)} ids, its model only {config.vocab_size}"
        raise BadInput("model.path", folder, remedy)
    return tokenizer


def read_weights(folder: Path, dtype: torch.dtype) -> nn.Module:
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInput("model.path", folder, f"cannot be loaded: {reason}") from error
    if info["missing_keys"]:  # transformers would go on with random numbers in their place
        missing = sorted(info["missing_keys"])
        remedy = f"{len(missing)} weights are missing, the first is {missing[0]}"
        raise BadInput("model.path", folder, remedy)
    return model
