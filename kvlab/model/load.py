"""AXIS model: what `conf/model` names, loaded from safetensors or GGUF; nobody's code is run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from kvlab.cache import CacheSpec
from kvlab.core import BadInput
from kvlab.model import checkpoint
from kvlab.model.fuse import fusible
from kvlab.model.gguf_config import check_architecture, config_of
from kvlab.model.gguf_convert import convert
from kvlab.model.gguf_header import is_gguf, packaged_gguf, read_header
from kvlab.model.portrait import portrait
from kvlab.model.read import read_tokenizer, read_weights

REFERENCE = Path(__file__).resolve().parents[1] / "assets" / "reference"
Dtype = Literal["auto", "float32", "float16", "bfloat16"]


class LoadedModel(NamedTuple):
    """A model ready to be measured.

    identity: changes when config or weights change; prefix hashes and baselines start from it.
    random: weights are random, so quality means nothing; memory and speed do.
    weights: what they were stored as, `gguf Q4_K_M (133 Q5_0, ...)` or `safetensors (201 BF16)`.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    identity: str
    random: bool
    name: str
    weights: str

    def about(self, spec: CacheSpec | None = None) -> dict:
        """What every row of a run says of its model, and what is done the long way for it.

        decoder: in how many layers the library's own forward decodes, where they are not fused.
        kernels: why plain torch reads the blocks of `spec` where kernels were wanted.
        """
        told = {"model": self.name, "weights": self.weights, "random_weights": self.random}
        shapes, plain = portrait(self.model).shapes, None
        rest = len(shapes) - sum(map(fusible, self.model.modules()))
        if rest:
            told["decoder"] = f"the library's forward in {rest} of {len(shapes)} layers"
        if spec is not None:
            plain = spec.why_plain(shapes, self.model.device)
        return told if plain is None else told | {"kernels": f"plain torch: {plain}"}


class FolderModel:
    """A checkpoint folder of any language model of transformers (`model=local`).

    Whether its decoder can run over a PagedCache is asked of the model itself, see `portrait`.

    path: the folder, or a GGUF file. dtype: `auto` is float32 on the CPU and bfloat16 on CUDA.
    """

    def __init__(self, path: str, dtype: Dtype = "auto"):
        self.path, self.dtype = path, dtype

    def folder(self) -> Path:
        return Path(self.path).expanduser()

    def config(self) -> dict:
        """The checkpoint's `config.json`; weights need not be there. Raises `BadInput`."""
        path = self.folder()
        return _config_of_gguf(path) if is_gguf(path) else checkpoint.read_config(path)

    def load(self, device: str | torch.device, dtype: torch.dtype | None = None) -> LoadedModel:
        """Model and tokenizer on `device`, in evaluation mode.

        Raises `BadInput` for a folder or file that cannot be loaded.
        """
        dtype, path = dtype or resolve_dtype(self.dtype, device), self.folder()
        if is_gguf(path):
            folder, weights = convert(path, dtype)
        else:
            checkpoint.check(path)
            folder, weights = path, checkpoint.weights(path)
        model = read_weights(folder, dtype).to(device).eval().requires_grad_(False)
        portrait(model)
        tokenizer = read_tokenizer(folder, model.config)
        name = path.stem if is_gguf(path) else path.name
        return LoadedModel(model, tokenizer, checkpoint.identity(folder), False, name, weights)


class GgufModel(FolderModel):
    """A GGUF file of a Llama, Mistral, Qwen2 or Qwen3 model (`model=gguf`, pip extra `gguf`).

    It is dequantized once and kept as safetensors in the user's cache folder, see
    `kvlab.model.gguf_convert`; what the cache of keys and values does is measured on those weights.
    path: the file. dtype: as in `FolderModel`.
    """

    def folder(self) -> Path:
        path = super().folder()
        if path.is_dir():
            raise BadInput("model.path", path, "is a folder; give a GGUF file, or model=local")
        return path

    def config(self) -> dict:
        return _config_of_gguf(self.folder())

    def load(self, device: str | torch.device, dtype: torch.dtype | None = None) -> LoadedModel:
        read_header(self.folder())  # refuses what is no such file
        return super().load(device, dtype)


class PackagedModel(GgufModel):
    """A GGUF file that lies in an installed package; nothing of the package is imported.

    package: its name in the registry. path: another GGUF file used instead.
    """

    def __init__(self, package: str, path: str | None = None, dtype: Dtype = "auto"):
        super().__init__(path or "", dtype)
        self.package = package

    def folder(self) -> Path:
        return super().folder() if self.path else packaged_gguf(self.package)


class ReferenceModel(FolderModel):
    """The bundled 13.8M-parameter Qwen3-architecture model; see `kvlab/assets/reference`.

    path: null takes the bundled checkpoint.
    """

    def __init__(self, path: str | None = None, dtype: Dtype = "auto"):
        super().__init__(path or str(REFERENCE), dtype)


class OutlierModel(ReferenceModel):
    """A Qwen3 checkpoint with key channels blown up as large Qwen3 models have them.

    In every layer `channels` rotary pairs (d, d + D/2) have `k_norm` multiplied and `q_norm`
    divided by `factor`. The pair turns as one under RoPE, so every dot product of query and key,
    and with it the model's function, stays the same: only quantization notices.
    """

    def __init__(
        self,
        path: str | None = None,
        channels: int = 2,
        factor: float = 16.0,
        dtype: Dtype = "auto",
    ):
        super().__init__(path, dtype)
        if channels < 0:
            raise BadInput("channels", channels, "must be at least 0 rotary pairs")
        if not 0 < factor < 1e4:
            raise BadInput("factor", factor, "must lie between 0 and 10000")
        self.channels, self.factor = channels, factor

    def load(self, device: str | torch.device, dtype: torch.dtype | None = None) -> LoadedModel:
        loaded = super().load(device, dtype)
        pairs = self._pairs(loaded.model.config)
        for layer in loaded.model.model.layers:
            layer.self_attn.k_norm.weight.data[pairs] *= self.factor
            layer.self_attn.q_norm.weight.data[pairs] /= self.factor
        changed = f"{loaded.identity}-outliers-{self.channels}-{self.factor:g}"
        return loaded._replace(identity=changed, name=f"{loaded.name}_outliers")

    def _pairs(self, config) -> list[int]:
        """Indices of both halves of the chosen pairs, spread over the rotary frequencies."""
        half = config.head_dim // 2
        if config.model_type != "qwen3":
            raise BadInput("model.path", self.path, "outliers need the k_norm of a Qwen3 model")
        if self.channels > half:
            raise BadInput("model.channels", self.channels, f"the model has {half} rotary pairs")
        first = [(2 * i + 1) * half // (2 * self.channels) for i in range(self.channels)]
        return first + [d + half for d in first]


class HubModel(FolderModel):
    """A model of the Hugging Face hub, or the same from a folder.

    name: `owner/name` on the hub. path: a local folder or GGUF file used instead; null asks cache
    and hub.
    """

    def __init__(self, name: str, path: str | None = None, dtype: Dtype = "auto"):
        super().__init__(path or "", dtype)
        self.name = name

    def folder(self) -> Path:
        return super().folder() if self.path else checkpoint.from_hub(self.name)

    def config(self) -> dict:
        if self.path:
            return super().config()
        return checkpoint.read_config(checkpoint.from_hub(self.name, weights=False))

    def load(self, device: str | torch.device, dtype: torch.dtype | None = None) -> LoadedModel:
        return super().load(device, dtype)._replace(name=self.name.rpartition("/")[2])


class RandomModel:
    """A Qwen3 of given shape with random weights: for memory and speed, never for quality.

    The defaults are the shapes of Qwen3-0.6B. Tokens come from the bundled reference tokenizer,
    whose ids all lie inside the vocabulary.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        layers: int = 28,
        query_heads: int = 16,
        kv_heads: int = 8,
        head_dim: int = 128,
        mlp_size: int = 3072,
        vocabulary: int = 151936,
        tied_embeddings: bool = True,
        seed: int = 0,
        dtype: Dtype = "auto",
    ):
        self.shape = {
            "hidden_size": at_least(1, "hidden_size", hidden_size),
            "num_hidden_layers": at_least(1, "layers", layers),
            "num_attention_heads": at_least(1, "query_heads", query_heads),
            "num_key_value_heads": at_least(1, "kv_heads", kv_heads),
            "head_dim": at_least(2, "head_dim", head_dim),
            "intermediate_size": at_least(1, "mlp_size", mlp_size),
            "vocab_size": at_least(8192, "vocabulary", vocabulary),  # the tokenizer's ids
            "tie_word_embeddings": tied_embeddings,
        }
        if query_heads % kv_heads:
            raise BadInput("query_heads", query_heads, f"must be a multiple of kv_heads={kv_heads}")
        if head_dim % 2:
            raise BadInput("head_dim", head_dim, "must be even: rotary channels come in pairs")
        self.seed, self.dtype = seed, dtype

    def config(self) -> dict:
        """What `config.json` of such a checkpoint would hold."""
        return self._config().to_dict()

    def load(self, device: str | torch.device, dtype: torch.dtype | None = None) -> LoadedModel:
        """Model on `device` with seeded weights; equal on the same kind of device only."""
        device, config = torch.device(device), self._config()
        dtype = dtype or resolve_dtype(self.dtype, device)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.device(device):
            torch.manual_seed(self.seed)
            model = Qwen3ForCausalLM._from_config(config, dtype=dtype)
        shape = "-".join(str(value) for value in self.shape.values())
        identity = f"random-{shape}-seed{self.seed}-{device.type}-{dtype}"
        tokenizer = read_tokenizer(REFERENCE, config)
        model = model.to(device).eval().requires_grad_(False)
        return LoadedModel(model, tokenizer, identity, True, "random", "random")

    def _config(self) -> Qwen3Config:
        rope = {"rope_type": "default", "rope_theta": 1e6}
        return Qwen3Config(
            **self.shape, max_position_embeddings=1 << 20, rope_parameters=rope,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )


def _config_of_gguf(path: Path) -> dict:
    """What `config.json` would hold, from the file's header. Raises `BadInput`."""
    header = read_header(path)
    check_architecture(header)
    return config_of(header).to_dict()


def at_least(least: int, name: str, value: int) -> int:
    """`value`, or `BadInput`."""
    if value < least:
        raise BadInput(name, value, f"must be at least {least}")
    return value


def resolve_dtype(name: Dtype, device: str | torch.device) -> torch.dtype:
    """`auto` is what a device computes well: float32 on the CPU, bfloat16 on CUDA."""
    if name == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    return getattr(torch, name)
