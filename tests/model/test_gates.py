"""Gates of heads: what a head that looks back at the first reading gets, and one that does not."""

from __future__ import annotations

import pytest
import torch

from kvlab.core import BadInput
from kvlab.model.gates import _beyond, retrieval_gates


def test_attention_beyond_the_window_counts():
    n, weights = 20, torch.zeros(2, 40, 40)
    for t in range(40):
        weights[0, t, max(0, t - n)] = 1.0  # copies from the first reading
        weights[1, t, t] = 0.5  # looks at itself and at the sink
        weights[1, t, 0] += 0.5
    assert _beyond(weights, n, 0, 8).tolist() == [1.0, 0.5]
    without_sink = _beyond(weights, n, 1, 8).tolist()  # at which one query looks
    assert without_sink == pytest.approx([0.95, 0.0])


def test_a_model_has_a_gate_for_each_head(tiny_model):
    model = tiny_model()
    own = model.config._attn_implementation
    gates = retrieval_gates(model, tokens=24, sinks=2, recent=4, draws=2)
    assert len(gates) == model.config.num_hidden_layers
    assert {len(row) for row in gates} == {model.config.num_key_value_heads}
    assert all(0 < gate < 1 for row in gates for gate in row)
    assert gates == retrieval_gates(model, tokens=24, sinks=2, recent=4, draws=2)
    assert model.config._attn_implementation == own
    with pytest.raises(BadInput, match="must be more than 6"):
        retrieval_gates(model, tokens=6, sinks=2, recent=4)
