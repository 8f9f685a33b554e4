"""Intervals: do they cover what they claim, and do they hold their promises?"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab import stats


def texts(rng, documents, tokens, between, correlation=0.5):
    """Documents whose tokens are an autoregressive series of mean 0, each with its own offset."""
    noise = rng.normal(size=(documents, tokens))
    for t in range(1, tokens):
        noise[:, t] = correlation * noise[:, t - 1] + (1 - correlation**2) ** 0.5 * noise[:, t]
    return list(noise + between * rng.normal(size=(documents, 1)))


@pytest.mark.parametrize(
    "documents,between", [(1, 0.0), (3, 0.0), (3, 1.0), (8, 0.0), (8, 0.1), (8, 1.0), (20, 0.1)]
)
def test_the_interval_of_a_mean_covers_it_95_percent_of_the_time(documents, between):
    rng, hits, times = np.random.default_rng(documents), 0, 200
    for seed in range(times):
        sample = texts(rng, documents, 512, between)
        found = stats.mean_interval(sample, block=64, resamples=400, seed=seed)
        hits += found.low <= 0 <= found.high
    assert 0.90 <= hits / times <= 0.995  # 95 % with four standard errors below


def test_pairing_narrows_what_texts_have_in_common():
    rng = np.random.default_rng(0)
    baseline = [x + 3 for x in texts(rng, 4, 1024, 1.0)]
    variant = [x + 0.01 + 0.001 * rng.normal(size=1024) for x in baseline]
    found = stats.paired_ratio_percent(variant, baseline)
    assert found.value == pytest.approx(100 * np.expm1(0.01), rel=1e-2)
    assert found.high - found.low < 0.05
    alone = stats.perplexity_interval(variant)
    assert (alone.high - alone.low) / alone.value > 0.5


def test_quantiles_cover():
    rng, hits = np.random.default_rng(1), 0
    for seed in range(100):
        sample = [rng.exponential(size=1024) for _ in range(6)]
        found = stats.quantile_interval(sample, 0.99, block=64, resamples=300, seed=seed)
        hits += found.low <= -np.log(0.01) <= found.high
    assert hits >= 92


arrays = st.lists(
    st.lists(st.floats(-5, 5), min_size=1, max_size=40).map(np.array), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(arrays, st.integers(1, 50), st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]))
def test_the_interval_holds_the_point_and_repeats(values, block, q):
    options = {"block": block, "resamples": 50}
    flat = np.concatenate(values)
    mean = stats.mean_interval(values, **options)
    quantile = stats.quantile_interval(values, q, **options)
    assert mean.value == pytest.approx(flat.mean(), abs=1e-12)
    assert quantile.value == np.quantile(flat, q, method="inverted_cdf")
    for found in (mean, quantile):
        assert found.low is None or found.low <= found.value <= found.high
    assert mean == stats.mean_interval(values, **options)
    assert quantile == stats.quantile_interval(values, q, **options)


@settings(max_examples=30, deadline=None)
@given(arrays)
def test_identical_data_have_no_width(values):
    found = stats.paired_ratio_percent(values, values, block=7, resamples=30)
    assert found in [(0.0, 0.0, 0.0), (0.0, None, None)]
    same = [np.full(len(v) + 8, 0.3) for v in values]
    mean = stats.mean_interval(same, block=4, resamples=30)
    assert mean.high - mean.low == pytest.approx(0, abs=1e-15)


def test_a_quantile_of_few_blocks_matches_a_plain_bootstrap():
    """Against the definition: resampled tokens written out, then the quantile of each resample."""
    rng = np.random.default_rng(3)
    sample = [rng.exponential(size=100)]
    found = stats.quantile_interval(sample, 0.9, block=1, resamples=4000)
    drawn = rng.choice(sample[0], size=(4000, 100))
    plain = np.quantile(np.quantile(drawn, 0.9, axis=1, method="inverted_cdf"), [0.025, 0.975])
    np.testing.assert_allclose([found.low, found.high], plain, rtol=0.08)


def test_where_all_agree_the_exact_interval_speaks():
    found = stats.proportion_percent([np.ones(1000, bool), np.ones(1000, bool)])
    assert found.value == found.high == 100
    assert found.low == pytest.approx(100 * 0.025 ** (1 / 2000))
    some = stats.proportion_percent([np.arange(1000) % 10 > 0] * 2)
    assert some.value == pytest.approx(90) and some.low < 90 < some.high + 1e-9


def test_positions_show_where_the_loss_is():
    rng = np.random.default_rng(2)
    baseline = [rng.normal(size=n) for n in (800, 800, 500)]
    late = [b + 0.1 * (np.arange(b.size) >= 400) for b in baseline]
    found = stats.position_intervals(late, baseline, buckets=8, first=10)
    assert found["position"].shape == found["low"].shape == (8,)
    assert found["position"][0] == 10 + 49.5
    np.testing.assert_allclose(found["nll_delta"], [0] * 4 + [0.1] * 4, atol=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.mean_interval([]),
        lambda: stats.mean_interval([np.array([])]),
        lambda: stats.mean_interval([np.ones(3)], block=0),
        lambda: stats.quantile_interval([np.ones(3)], 0.0),
        lambda: stats.paired_ratio_percent([np.ones(3)], [np.ones(4)]),
    ],
)
def test_what_cannot_be_is_refused(call):
    with pytest.raises(ValueError):
        call()


def test_empty_documents_count_for_nothing():
    values = [np.arange(10.0), np.array([]), np.arange(5.0)]
    assert stats.mean_interval(values, block=3) == stats.mean_interval(
        [values[0], values[2]], block=3
    )


def test_many_tokens_stay_quick():
    rng = np.random.default_rng(0)
    values = [rng.exponential(size=32_000) for _ in range(10)]
    assert stats.quantile_interval(values, 0.999).high < 12
    assert stats.mean_interval(values).value == pytest.approx(1, abs=0.02)


def test_intervals_keep_to_their_bounds():
    rng = np.random.default_rng(0)
    kl = [scale * rng.exponential(size=512) for scale in (0.001, 0.002, 0.05)]
    free, bound = stats.mean_interval(kl), stats.mean_interval(kl, least=0.0)
    assert free.low < 0 < bound.low < bound.value and bound.high == free.high
    flags = [rng.random(512) < share for share in (0.999, 0.9, 0.5)]
    found = stats.proportion_percent(flags)
    assert 0 < found.low < found.value < found.high < 100


def test_two_documents_that_differ_have_no_interval():
    rng = np.random.default_rng(0)
    far = [rng.normal(size=512), 3 + rng.normal(size=512)]
    found = stats.paired_ratio_percent(far, [np.zeros(512)] * 2)
    assert found.low is None and found.high is None
    near = [far[0], far[0][::-1]]
    assert stats.mean_interval(near).low is not None  # no more than their blocks explain
