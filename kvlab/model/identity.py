"""A name for a loaded model that changes when its config or its weights do."""

from __future__ import annotations

import json
from hashlib import blake2b

import torch
from torch import Tensor

SAMPLES = 256
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_IRRELEVANT = ("_attn_implementation", "transformers_version", "_name_or_path", "use_cache")


@torch.inference_mode()
def model_identity(model) -> str:
    """Hash of the config and, for each parameter, of its shape, sum and 256 samples of its bits.

    Reads every weight once (a sum of bits is the same on every device, in any order) and copies a
    few KiB to the host. Buffers are left out: they follow from the config.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _IRRELEVANT}
    digest = blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(fingerprint(parameter).cpu().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(x: Tensor) -> Tensor:
    """Int64 [1 + n]: the sum of the bit patterns and n <= 256 of them, evenly spaced."""
    bits = x.detach().reshape(-1).view(_INTEGER[x.element_size()])
    step = max(1, len(bits) // SAMPLES)
    return torch.cat([bits.sum(dtype=torch.int64)[None], bits[::step][:SAMPLES].long()])
