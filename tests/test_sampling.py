"""The sampler against a NumPy oracle, its generator against published values, and its refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flashmoe.errors import ArgumentError, StateError
from flashmoe.generation import SamplingConfig
from flashmoe.sampling import Sampler

SIZES = [1, 2, 3, 31, 64, 65, 127, 1023]


def sampler(n_vocab, n_used=None, **options) -> Sampler:
    return SamplingConfig(**{"seed": 0, **options}).sampler(n_vocab, n_used or n_vocab)


def oracle(logits, n_used, options, prompt=(), output=()):
    """Return {id: probability} by the definitions, in float64."""
    c = SamplingConfig(**options)
    v = np.array(logits[:n_used], dtype=np.float64)
    for i, b in c.logit_bias.items():
        v[i] += b
    for i in {*prompt, *output}:
        v[i] = v[i] / c.repetition_penalty if v[i] > 0 else v[i] * c.repetition_penalty
        count = list(output).count(i)
        v[i] -= (count > 0) * c.presence_penalty + count * c.frequency_penalty
    order = sorted(range(n_used), key=lambda i: (-v[i], i))
    if c.temperature == 0:
        return {order[0]: 1.0}
    if c.top_k:
        order = order[: c.top_k]
    p = np.exp((v[order] - v[order[0]]) / c.temperature)
    p /= p.sum()
    n = int(np.searchsorted(np.cumsum(p), c.top_p - 1e-15)) + 1 if c.top_p < 1 else len(p)
    order, p = order[:n], p[:n]
    keep = p >= c.min_p * p[0]
    order, p = [i for i, k in zip(order, keep) if k], p[keep]
    return {i: x for i, x in zip(order, p / p.sum()) if x > 0}


OPTIONS = [
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.3, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 5, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.7},
    {"temperature": 2.0, "top_k": 0, "top_p": 0.999},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.1},
    {"temperature": 1.3, "top_k": 0, "top_p": 0.9, "min_p": 0.3},
    {"temperature": 1.0, "top_k": 10**6, "top_p": 1e-9},
    {"temperature": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", SIZES)
def test_distribution_equals_oracle(n, options):
    rng = np.random.default_rng(n)
    for n_used in {n, max(1, n - 1), max(1, n // 2)}:
        logits = (3 * rng.standard_normal(n)).astype(np.float32)
        ids, probs = sampler(n, n_used, **options).distribution(logits)
        want = oracle(logits, n_used, options)
        assert set(ids.tolist()) == set(want)
        got = dict(zip(ids.tolist(), probs))
        assert max(abs(got[i] - want[i]) for i in want) < 1e-12


def test_penalties_and_bias_equal_oracle():
    rng = np.random.default_rng(5)
    options = {
        "temperature": 0.9, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.3,
        "presence_penalty": 0.7, "frequency_penalty": -0.4, "logit_bias": {3: 2.5, 7: -math.inf},
    }  # fmt: skip
    prompt, output = [1, 2, 2, 9, 40], [2, 5, 5, 5, 1, 0]
    logits = (3 * rng.standard_normal(48)).astype(np.float32)
    s = sampler(48, 41, **options)
    s.observe_prompt([*prompt, 45])  # 45 is padding: ignored
    for i in output:
        s.accept(i)
    ids, probs = s.distribution(logits)
    want = oracle(logits, 41, options, prompt, output)
    assert 7 not in want
    assert set(ids.tolist()) == set(want)
    # penalised logits are kept in float32: 1e-5 is over 2^-24 * |logit| / temperature * 10
    assert all(abs(p - want[i]) < 1e-5 for i, p in zip(ids.tolist(), probs))


@pytest.mark.parametrize("n", [48, 64, 200, 1023])
def test_penalties_and_bias_move_ids_within_and_across_blocks(n):
    """The best are pushed down and others up, so that what a block of ids had at most is no longer true."""
    rng = np.random.default_rng(n)
    logits = rng.standard_normal(n).astype(np.float32)
    best = np.argsort(-logits)
    options = {
        "temperature": 0.9, "top_k": 9, "top_p": 1.0, "presence_penalty": 2.0,
        "frequency_penalty": 1.0, "repetition_penalty": 2.0,
        "logit_bias": {int(best[-1]): 30.0, int(best[-2]): 4.0, int(best[1]): -9.0},
    }  # fmt: skip
    prompt, output = best[:20:2].tolist(), best[2:12].tolist() * 2
    for temperature in (0.9, 0.0):
        for top_k in (9, 0):
            now = {**options, "temperature": temperature, "top_k": top_k}
            s = sampler(n, **now)
            s.observe_prompt(prompt)
            for i in output:
                s.accept(i)
            ids, probs = s.distribution(logits)
            want = oracle(logits, n, now, prompt, output)
            assert set(ids.tolist()) == set(want)
            assert all(abs(p - want[i]) < 1e-5 for i, p in zip(ids.tolist(), probs))
            again, _ = s.distribution(logits)  # the row it was given is as it was
            assert again.tolist() == ids.tolist()


def test_zeros_of_either_sign_are_equal():
    row = np.full(300, -1, dtype=np.float32)
    row[[70, 130, 200]] = [-0.0, 0.0, -0.0]
    assert sampler(300, temperature=0).sample(row) == 70
    ids, _ = sampler(300, temperature=1, top_k=3, top_p=1).distribution(row)
    assert ids.tolist() == [70, 130, 200]


def test_flat_nucleus_of_many_ids():
    rng = np.random.default_rng(3)
    logits = (0.01 * rng.standard_normal(5000)).astype(np.float32)
    logits[17] = -200.0  # beyond the last bin of mass
    options = {"temperature": 1.0, "top_k": 0}
    for top_p in (1e-6, 0.5, 0.9999, 1 - 1e-12):
        ids, probs = sampler(5000, **options, top_p=top_p).distribution(logits)
        want = oracle(logits, 5000, {**options, "top_p": top_p})
        assert abs(len(ids) - len(want)) <= 1  # sums of 5000 are rounded in two orders
        assert ids.tolist() == np.argsort(-logits, kind="stable")[: len(ids)].tolist()
        assert all(abs(p - want[i]) < 1e-12 + 1 / 5000**2 for i, p in zip(ids.tolist(), probs) if i in want)
        assert set(want) ^ set(ids.tolist()) <= {ids[-1], list(want)[-1]}


@pytest.mark.parametrize("options", OPTIONS[:8])
def test_draws_follow_the_distribution(options):
    """Chi-square of 20,000 draws; the seed is fixed, so this cannot fail by chance."""
    logits = np.random.default_rng(1).standard_normal(30).astype(np.float32) * 2
    s = sampler(30, **options, seed=11)
    ids, probs = s.distribution(logits)
    n = 20_000
    counts = np.bincount([s.sample(logits) for _ in range(n)], minlength=30)
    assert counts.sum() == counts[ids].sum()
    big = probs * n >= 5
    chi2 = (((counts[ids] - probs * n) ** 2) / (probs * n))[big].sum()
    k = big.sum() - 1
    assert chi2 < k + 4 * math.sqrt(2 * max(k, 1))


def test_ties_go_to_the_smaller_id():
    flat = np.zeros(200, dtype=np.float32)
    assert sampler(200, temperature=0).sample(flat) == 0
    ids, _ = sampler(200, temperature=1, top_k=7, top_p=1).distribution(flat)
    assert ids.tolist() == list(range(7))
    ids, _ = sampler(200, temperature=1, top_k=0, top_p=0.5).distribution(flat)
    assert ids.tolist() == list(range(100))
    _, top, _ = sampler(200).logprobs(flat, 3, 4)
    assert top.tolist() == [0, 1, 2, 3]


def test_generator_matches_published_values():
    """SplitMix64 from 1234567 and xoshiro256** by their authors' code (prng.di.unimi.it)."""
    mask = 2**64 - 1

    def splitmix(x):
        x = (x + 0x9E3779B97F4A7C15) & mask
        z = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return x, z ^ (z >> 31)

    assert splitmix(1234567)[1] == 6457827717110365317  # published test value
    x, state = 42, []
    for _ in range(4):
        x, z = splitmix(x)
        state.append(z)

    def rotl(v, k):
        return ((v << k) | (v >> (64 - k))) & mask

    s = sampler(4, seed=42)
    for _ in range(100):
        want = (rotl((state[1] * 5) & mask, 7) * 9) & mask
        t = (state[1] << 17) & mask
        state[2] ^= state[0]
        state[3] ^= state[1]
        state[1] ^= state[2]
        state[0] ^= state[3]
        state[2] ^= t
        state[3] = rotl(state[3], 45)
        assert s.random() == (want >> 11) / 2**53


def test_same_seed_same_draws():
    rows = np.random.default_rng(0).standard_normal((50, 100)).astype(np.float32)

    def draw(seed):
        s = sampler(100, temperature=1, top_k=0, top_p=0.9, seed=seed)
        return [s.sample(row) for row in rows]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(2**64 - 1) == draw(2**64 - 1)


def test_padding_is_never_drawn():
    logits = np.zeros(64, dtype=np.float32)
    logits[50:] = 100
    for options in OPTIONS:
        s = sampler(64, 50, **options)
        assert all(s.sample(logits) < 50 for _ in range(50))
    logits[60] = np.nan  # nor does it matter what is there
    assert sampler(64, 50).sample(logits) < 50
    assert sampler(64, 50).logprobs(logits, 0, 64)[1].size == 50


def test_extreme_logits():
    logits = np.full(10, -np.inf, dtype=np.float32)
    logits[4] = -3e38
    for options in OPTIONS:
        assert sampler(10, **options).sample(logits) == 4
    logits[6] = 3e38
    for options in OPTIONS:
        assert sampler(10, **options).sample(logits) == 6
    tiny = np.linspace(0, 1, 10, dtype=np.float32)
    assert sampler(10, temperature=1e-8, top_k=0, top_p=1).sample(tiny) == 9


def test_logprobs_equal_log_softmax():
    logits = (5 * np.random.default_rng(2).standard_normal(500)).astype(np.float32)
    want = logits[:480].astype(np.float64)
    want = want - want.max() - np.log(np.exp(want - want.max()).sum())
    s = sampler(500, 480, temperature=0.1, logit_bias={3: -100.0})
    chosen, ids, values = s.logprobs(logits, 3, 5)
    assert abs(chosen - want[3]) < 1e-12
    assert ids.tolist() == np.argsort(-want, kind="stable")[:5].tolist()
    assert np.abs(values - want[ids]).max() < 1e-12
    assert s.logprobs(logits, 3, 0)[1].size == 0


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize(("n", "at"), [(8, 5), (200, 0), (200, 63), (200, 64), (200, 199)])
def test_broken_logits_are_refused(n, at, bad):
    logits = np.full(n, -np.inf, dtype=np.float32)
    logits[at] = np.copysign(bad, -1) if np.signbit(bad) else bad
    for options in OPTIONS:
        with pytest.raises(StateError, match=f"token {at} is"):
            sampler(n, **options).sample(logits)
    with pytest.raises(StateError, match=f"token {at} is"):
        sampler(n).logprobs(logits, 0, 1)
    assert sampler(n + 1, n).n_vocab_used == n
    padding = np.zeros(n + 1, dtype=np.float32)
    padding[n] = bad
    assert sampler(n + 1, n, temperature=0).sample(padding) == 0


def test_nothing_allowed_is_refused():
    row = np.full(8, -np.inf, dtype=np.float32)
    for options in OPTIONS:
        with pytest.raises(StateError, match="no token is allowed"):
            sampler(8, **options).sample(row)


def test_wrong_shapes_and_ids_are_refused():
    s = sampler(8)
    with pytest.raises(ArgumentError, match="a row of 7 logits, the vocabulary has 8"):
        s.sample(np.zeros(7, dtype=np.float32))
    with pytest.raises(ValueError):
        s.sample(np.zeros(8, dtype=np.float64))
    for i in (-1, 8):
        with pytest.raises(ArgumentError, match="token id"):
            s.accept(i)
    with pytest.raises(ArgumentError):
        sampler(8, 9)
    with pytest.raises(ArgumentError, match="token id 8"):
        sampler(8, logit_bias={8: 1.0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", None),
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
        ("temperature", "hot"), ("top_k", -1), ("top_k", 2.0), ("top_p", 0.0), ("top_p", 1.1),
        ("min_p", -0.1), ("min_p", 1.5), ("repetition_penalty", 0.0), ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1), ("seed", -1), ("seed", 2**64), ("logprobs", -1),
        ("logprobs", 101), ("stop", ""), ("stop", ["a", ""]), ("stop", [1]),
        ("logit_bias", {1: math.nan}), ("logit_bias", {1: math.inf}), ("logit_bias", {"a": 1.0}),
        ("ignore_eos", 1),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ArgumentError, match=name):
        SamplingConfig(**{name: value})


def test_unknown_option_names_the_nearest():
    with pytest.raises(ArgumentError, match=r"'temprature'.*'temperature'"):
        SamplingConfig.from_options({"temprature": 1})


def test_numpy_numbers_are_taken():
    c = SamplingConfig(temperature=np.float32(0.5), max_tokens=np.int64(3), top_p=1)
    assert (c.temperature, c.max_tokens, c.top_p) == (0.5, 3, 1.0)
    assert isinstance(c.max_tokens, int)
    assert SamplingConfig().with_seed().seed is not None
