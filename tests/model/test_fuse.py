"""Fused layers give the logits of the library's, for every cache, and leave no trace."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

from kvlab.model import PagedCache
from kvlab.model.fuse import Fusing, fused

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512,
}
CONFIGS = [Qwen3Config, Qwen2Config, LlamaConfig, MistralConfig]


def tiny(config_class):
    torch.manual_seed(0)
    config = config_class(**SHAPE, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def decode(model, ids, cache, steps=5):
    with torch.inference_mode():
        out = [model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits]
        for _ in range(steps):
            token = out[-1].argmax(-1)
            out.append(model(input_ids=token, past_key_values=cache).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("rows", [1, 3])
def test_same_logits(config_class, rows):
    model, ids = tiny(config_class), torch.randint(97, (rows, 11))
    want = decode(model, ids, DynamicCache())
    with fused(model) as count:
        assert count == 2
        got = decode(model, ids, DynamicCache())
        static = decode(model, ids, StaticCache(config=model.config, max_cache_len=32))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(static, want)
    with fused(model):
        paged = decode(model, ids, PagedCache.for_model(model, block_size=4, format="fp32"))
    torch.testing.assert_close(paged, want)


def test_undone_also_after_an_error():
    model = tiny(Qwen3Config)
    with pytest.raises(RuntimeError), fused(model):
        raise RuntimeError
    assert not any("forward" in vars(m) for m in model.modules())


def test_other_layers_stay():
    config = LlamaConfig(**SHAPE, mlp_bias=True)
    model = AutoModelForCausalLM.from_config(config)
    with fused(model) as count:
        assert count == 0


def test_what_is_replaced_is_found_once_and_seen_where_it_changes():
    model, ids = tiny(Qwen2Config), torch.randint(97, (1, 11))
    fusing, layer = Fusing(model), model.model.layers[1]

    def same():
        want = decode(model, ids, DynamicCache())
        with fusing.on() as count:
            torch.testing.assert_close(decode(model, ids, DynamicCache()), want)
        return count, fusing._parts

    count, first = same()
    assert (count, first) == same() and count == 2
    layer.mlp.up_proj.weight = torch.nn.Parameter(torch.randn(48, 32))
    assert same()[1] is not first
    layer.self_attn.q_proj = Doubled(layer.self_attn.q_proj)
    assert same()[0] == 1
    layer.self_attn.q_proj = layer.self_attn.q_proj.inner
    layer.mlp.down_proj.bias = torch.nn.Parameter(torch.randn(32))
    assert same()[0] == 1


class Doubled(torch.nn.Module):
    """An adapter around a linear layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        return 2 * self.inner(x)
