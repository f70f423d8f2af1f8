"""Philox against published vectors, the draws against their distribution, limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparring.errors import UserError
from sparring.kernels import sampling as draws
from sparring.kernels.philox import log_exponential, noise_words, philox4x32
from sparring.rollout.sampler import Sampling, sample_id, sample_tokens

ONES = 0xFFFFFFFF
# Known answers of Random123 (philox4x32, 10 rounds): counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def sampling(**values: object) -> Sampling:
    return Sampling(**{"max_completion_tokens": 16, **values})  # type: ignore[arg-type]


def keys(num_rows: int) -> tuple[Tensor, Tensor]:
    """Sample ids and positions of `num_rows` different draws."""
    ids = torch.tensor([sample_id(0, row // 64, 1) for row in range(0, num_rows, 64)])
    positions = torch.arange(num_rows) % 64
    return ids.repeat_interleave(64, 0)[:num_rows], positions


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert philox4x32(counter, key) == expected
    words = [torch.tensor([word]) for word in counter]
    as_tensors = philox4x32((words[0], words[1], words[2], words[3]), key)
    assert tuple(int(word) for word in as_tensors) == expected


@pytest.mark.parametrize("vocab_size", [1, 4, 7, 30])
def test_noise_words_are_keyed_by_index_position_sample_and_seed(vocab_size: int) -> None:
    key = (0xFEDCBA98, 7)
    ids = [sample_id(3, 1 << 40, 2), sample_id(3, 5, 0)]
    positions = [0, 511]
    words = noise_words(key, torch.tensor(ids), torch.tensor(positions), vocab_size)
    assert words.shape == (2, vocab_size)
    for row in range(2):
        for v in range(vocab_size):
            counter = (v // 4, positions[row], *ids[row])
            assert int(words[row, v]) == philox4x32(counter, key)[v % 4]


def test_sample_ids_differ_in_every_part() -> None:
    parts = [
        (version, prompt, sample)
        for version in (0, 1, 2)
        for prompt in (0, 1, 2, 1 << 32, -1)
        for sample in range(16)
    ]
    assert len({sample_id(*part) for part in parts}) == len(parts)


def test_log_exponential_keeps_both_tails() -> None:
    words = torch.tensor([0, 1, 1 << 31, ONES - 1, ONES])
    expected = [math.log(-math.log1p(-(word + 0.5) / 2**32)) for word in words.tolist()]
    got = log_exponential(words)
    assert got.dtype == torch.float32
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=1e-7)
    assert len(set(got.tolist())) == len(words)


def chi_square_limit(degrees: int) -> float:
    """The value exceeded once in 10,000 (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * degrees)
    return degrees * float(1 - spread + 3.719 * math.sqrt(spread)) ** 3


def check_draws(num_draws: int, seed: int) -> None:
    """Chi-square of tokens and of the noise itself, bins far out in the tails included."""
    probs = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.04, 0.008, 0.0015, 0.0004, 0.0001])
    probs = probs.double() / probs.double().sum()
    logits = (probs.log() + 3).float().expand(num_draws, -1)
    ids, positions = keys(num_draws)
    tokens, _ = sample_tokens(logits, sampling(seed=seed), ids, positions)
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    expected = probs * num_draws
    assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_limit(len(probs) - 1)

    exponentials = (
        log_exponential(noise_words((seed, 0), ids, positions, 8)).double().exp().flatten()
    )
    shares = torch.tensor([0.0, 1e-5, 1e-4, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 1e-4, 1 - 1e-5, 1.0])
    shares = shares.double()
    edges = -torch.log1p(-shares[1:-1])
    counts = torch.bincount(torch.bucketize(exponentials, edges), minlength=10).double()
    expected = shares.diff() * len(exponentials)
    assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_limit(9)


def test_draws_follow_the_distribution() -> None:
    check_draws(80_000, seed=1)


@pytest.mark.parametrize("what", ["seeds", "positions", "samples"])
def test_draws_follow_it_whatever_part_of_the_key_changes(what: str) -> None:
    num_draws, probs = 40_000, torch.tensor([0.5, 0.3, 0.15, 0.04, 0.009, 0.001]).double()
    logits = probs.log().float().expand(num_draws, -1)
    ids = torch.tensor([[3, 5]]).repeat(num_draws, 1)
    positions = torch.zeros(num_draws, dtype=torch.int64)
    each = torch.arange(num_draws)
    if what == "samples":
        ids[:, 0] = each
    if what == "positions":
        positions = each
    parts = [sampling(seed=9)]
    if what == "seeds":  # a thousand seeds, in both words, of forty draws each
        parts = [sampling(seed=(part << 32) | (part * 7919 % 1000)) for part in range(1000)]
        ids[:, 1] = each % 40
    size = num_draws // len(parts)
    drawn = [sample_tokens(logits[:size], part, ids[:size], positions[:size])[0] for part in parts]
    counts = torch.bincount(torch.cat(drawn), minlength=6).double()
    expected = probs * num_draws
    assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_limit(5)


@pytest.mark.slow
def test_a_million_draws_follow_the_distribution() -> None:
    check_draws(1_000_000, seed=2)


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0]]).expand(4096, -1)
    tokens, logprobs = sample_tokens(logits, sampling(), *keys(4096))
    assert set(tokens.tolist()) == {0, 2}
    assert torch.isfinite(logprobs).all()


def test_recorded_logprob_is_of_the_whole_tempered_distribution() -> None:
    logits = torch.randn(64, 30, generator=torch.Generator().manual_seed(0)) * 3
    ids, positions = keys(64)
    for knobs in ({"temperature": 0.7}, {"temperature": 1.5, "top_k": 3}, {"top_p": 0.5}):
        tokens, logprobs = sample_tokens(logits, sampling(**knobs), ids, positions)
        whole = torch.log_softmax(logits / knobs.get("temperature", 1.0), dim=-1)
        torch.testing.assert_close(logprobs, whole.gather(1, tokens[:, None])[:, 0])


def test_greedy_takes_the_first_of_the_likeliest_at_temperature_one() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    tokens, logprobs = sample_tokens(logits, sampling(temperature=0), *keys(1))
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1)[:, 1])


@pytest.mark.parametrize("top_k", [1, 2, 5, 100])
def test_top_k_keeps_the_likeliest(top_k: int) -> None:
    logits = torch.tensor([0.3, 2.0, -1.0, 1.9, 0.0, 0.29]).expand(3000, -1)
    tokens, _ = sample_tokens(logits, sampling(top_k=top_k), *keys(3000))
    assert set(tokens.tolist()) == {1, 3, 0, 5, 4, 2} & set([1, 3, 0, 5, 4, 2][:top_k])


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, {2}), (0.49, {2}), (0.51, {2, 0}), (0.79, {2, 0}), (0.95, {2, 0, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    probs = torch.tensor([0.3, 0.02, 0.5, 0.18])
    logits = probs.log().expand(3000, -1)
    tokens, _ = sample_tokens(logits, sampling(top_p=top_p), *keys(3000))
    assert set(tokens.tolist()) == kept


@pytest.mark.parametrize(
    ("min_p", "kept"),
    [(0.99, {2}), (0.61, {2}), (0.59, {2, 0}), (0.1, {2, 0, 3}), (0.03, {0, 1, 2, 3})],
)
def test_min_p_keeps_shares_of_the_likeliest(min_p: float, kept: set[int]) -> None:
    probs = torch.tensor([0.3, 0.02, 0.5, 0.18])
    logits = probs.log().expand(3000, -1)
    tokens, logprobs = sample_tokens(logits, sampling(min_p=min_p), *keys(3000))
    assert set(tokens.tolist()) == kept
    torch.testing.assert_close(logprobs, probs.log()[tokens])


def test_end_tokens_wait_for_the_minimum_length() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0]]).expand(4, -1)
    ids, positions = torch.zeros(4, 2, dtype=torch.int64), torch.tensor([0, 1, 2, 3])
    end_ids = torch.tensor([1])
    tokens, logprobs = sample_tokens(
        logits, sampling(temperature=0, min_completion_tokens=2), ids, positions, end_ids
    )
    assert tokens.tolist() == [2, 2, 1, 1]
    whole = torch.log_softmax(logits, dim=-1)
    torch.testing.assert_close(logprobs, whole.gather(1, tokens[:, None])[:, 0])


def test_rows_taken_in_parts_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(50, 33, generator=torch.Generator().manual_seed(1))
    whole = sample_tokens(logits, sampling(seed=5), *keys(50))
    monkeypatch.setattr(draws, "MAX_CHUNK_ENTRIES", 33 * 8)
    parts = sample_tokens(logits, sampling(seed=5), *keys(50))
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


def test_seed_matters_in_both_words() -> None:
    logits = torch.zeros(256, 50)
    drawn = [sample_tokens(logits, sampling(seed=seed), *keys(256))[0] for seed in (0, 1, 1 << 32)]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.0}, "min_p is 1.0"),
        ({"min_p": "low"}, "min_p is 'low'"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"max_completion_tokens": 0}, "max_completion_tokens is 0"),
        ({"min_completion_tokens": 17}, "from 0 to 16"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 64}, "seed is"),
        ({"stop": "\n"}, "tuple of non-empty strings"),
        ({"stop": ("",)}, "tuple of non-empty strings"),
    ],
)
def test_wrong_settings_are_refused_with_the_value(values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        sampling(**values)
