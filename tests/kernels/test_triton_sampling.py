"""The sampling kernels against their references, on a GPU or in Triton's interpreter.

In an ordinary process these tests are marked gpu; with TRITON_INTERPRET=1 they run on the CPU
(tests/kernels/test_processes.py starts that process).
"""

from __future__ import annotations

import math
import os

import pytest
import torch

from sparring.kernels import cut, jit, philox, sampling, tl
from sparring.kernels.cut import CutRules, cut_reference
from sparring.kernels.sampling import DrawRules, draw_tokens_reference, draw_tokens_triton

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = (
    []
    if INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU or the interpreter"),
    ]
)
ONES = 0xFFFFFFFF
philox_words, exponential = philox.philox_words, philox.exponential


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What kernels allocate starts as garbage, so that an element nobody wrote shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else -(1 << 30))

    monkeypatch.setattr(torch, "empty", poisoned)


def rules(num_rows, *, temperatures=1.0, seed=(0, 0), held=(), min_draws=0, **cuts):
    """DrawRules from numbers or one number a row."""

    def per_row(values, dtype):
        values = values if isinstance(values, (list, tuple)) else [values] * num_rows
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    temperatures = per_row(temperatures, torch.float64)
    inverse = torch.where(temperatures > 0, 1.0 / temperatures, 0.0)
    return DrawRules(
        inverse_temperatures_R=inverse.float(),
        seed_words_2=torch.tensor(seed, device=DEVICE),
        held_ids_H=torch.tensor(held, dtype=torch.int64, device=DEVICE),
        min_draws_R=per_row(min_draws, torch.int64),
        cut=CutRules(
            top_k_R=per_row(cuts.get("top_k", 0), torch.int64),
            top_p_R=per_row(cuts.get("top_p", 1.0), torch.float64),
            min_p_R=per_row(cuts.get("min_p", 0.0), torch.float32),
        )
        if cuts
        else None,
    )


def keys(num_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1 << 32, (num_rows, 2), generator=generator)
    return ids.to(DEVICE), torch.arange(num_rows, device=DEVICE) * 7


def normal(num_rows, vocabulary, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, vocabulary, generator=generator) * scale).to(DEVICE)


def margins(logits, ids, draws, r):
    """How far the best score lies above the second, in units of what rounding may take."""
    inverse = torch.where(r.inverse_temperatures_R == 0, 1.0, r.inverse_temperatures_R)
    s = logits.double() * inverse.double()[:, None]
    words = philox.noise_words(tuple(r.seed_words_2), ids, draws, s.shape[1])
    u = (words.double() + 0.5) * 2.0**-32
    noise = torch.log(-torch.log1p(-u))
    scores = s - torch.where((r.inverse_temperatures_R == 0)[:, None], 0.0, noise)
    is_early = draws < r.min_draws_R
    held = r.held_ids_H[r.held_ids_H >= 0]
    scores[:, held] = scores[:, held].masked_fill(is_early[:, None], -math.inf)
    if r.cut is not None:
        is_cut = cut_reference(s.float(), r.cut).isneginf()
        scores = scores.masked_fill(is_cut, -math.inf)
    best = scores.topk(min(2, s.shape[1]), dim=1).values
    gap = best[:, 0] - best[:, -1] if s.shape[1] > 1 else torch.full_like(best[:, 0], math.inf)
    largest = s.masked_fill(s.isinf(), 0.0).abs().amax(1)
    return gap / (1e-5 + largest * 2.0**-21)


def check_draws(logits, ids, draws, r):
    """Tokens equal but at ties, log-probabilities close; returns the Triton pair."""
    tokens, logprobs = draw_tokens_triton(logits, ids, draws, r)
    expected, expected_logprobs = draw_tokens_reference(logits, ids, draws, r)
    is_clear = margins(logits, ids, draws, r) > 1.0
    assert torch.equal(tokens[is_clear], expected[is_clear])
    same = tokens == expected
    assert same.double().mean() > 0.98
    torch.testing.assert_close(logprobs[same], expected_logprobs[same], rtol=2e-6, atol=2e-6)
    return tokens, logprobs


@jit
def _words_kernel(words_ptr, scalars_ptr, BLOCK: tl.constexpr):
    key0 = tl.load(scalars_ptr).to(tl.uint32)
    key1 = tl.load(scalars_ptr + 1).to(tl.uint32)
    position = tl.load(scalars_ptr + 2).to(tl.uint32)
    id0 = tl.load(scalars_ptr + 3).to(tl.uint32)
    id1 = tl.load(scalars_ptr + 4).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(tl.arange(0, BLOCK), position, id0, id1, key0, key1)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    tl.store(words_ptr + tl.arange(0, 4 * BLOCK), words.to(tl.int64))


@pytest.mark.parametrize(
    ("key", "position", "ids"),
    [((0, 0), 0, (0, 0)), ((ONES, ONES), ONES, (ONES, ONES)), ((5, 7), 511, (0xFEDCBA98, 3))],
)
def test_philox_gives_the_same_integers(key, position, ids):
    words = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    scalars = torch.tensor([*key, position, *ids], device=DEVICE)
    _words_kernel[(1,)](words, scalars, BLOCK=16)
    expected = philox.noise_words(key, torch.tensor([ids]), torch.tensor([position]), 64)
    assert words.tolist() == expected[0].tolist()


@jit
def _exponential_kernel(words_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, exponential(tl.load(words_ptr + at).to(tl.uint32)))


def test_exponential_keeps_both_tails():
    half = 1 << 31
    ends = torch.arange(1024)
    words = torch.cat([ends, ONES - ends, half + ends - 512, torch.randint(1 << 32, (13312,))])
    words = words.to(DEVICE)
    got = torch.zeros(len(words), device=DEVICE)
    _exponential_kernel[(4,)](words, got, BLOCK=len(words) // 4)
    expected = -torch.log1p(-((words.double() + 0.5) * 2.0**-32))
    assert float((got.double() / expected - 1).abs().max()) < 2.0**-20
    assert len(set(got[:2048].tolist())) == 2048  # no two words of an end fall together


@pytest.mark.parametrize("vocabulary", [1, 3, 61, 512, 513, 1501])
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_draws_are_those_of_the_reference(vocabulary, scale):
    logits = normal(6, vocabulary, scale, seed=vocabulary)
    ids, draws = keys(6, seed=vocabulary)
    r = rules(6, temperatures=[1.0, 0.0, 0.7, 1.0, 1.7, 0.05], seed=(ONES, 3))
    check_draws(logits, ids, draws, r)


def test_many_rows_are_those_of_the_reference():
    ids, draws = keys(48 if INTERPRETED else 4096)
    check_draws(normal(len(ids), 300, 3.0), ids, draws, rules(len(ids), seed=(17, 0)))


def test_held_tokens_wait_and_still_count_in_the_logprob():
    logits = normal(6, 1100)
    logits[:, 1099] = 30.0
    logits[:, 5] = 29.0
    ids, draws = keys(6)
    draws = torch.arange(6, device=DEVICE)
    r = rules(6, temperatures=[1.0, 0.0] * 3, held=(1099, -1, 5), min_draws=[3, 3, 3, 3, 0, 0])
    tokens, logprobs = check_draws(logits, ids, draws, r)
    assert not set(tokens[:3].tolist()) & {1099, 5}
    assert set(tokens[3:].tolist()) <= {1099, 5}
    assert logprobs[:3].max() < -20
    whole = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, whole, rtol=1e-5, atol=1e-5)


def test_split_and_company_change_no_bit(monkeypatch):
    rows = 5
    logits = normal(rows, 1281, 2.0)
    ids, draws = keys(rows)
    r = rules(rows, temperatures=[1.0, 0.0, 0.6, 1.3, 1.0])
    one = draw_tokens_triton(logits, ids, draws, r)
    monkeypatch.setattr(sampling, "BUSY_PROGRAMS", 2)
    assert sampling.span_of(rows, 3) > 1
    several = draw_tokens_triton(logits, ids, draws, r)
    monkeypatch.setattr(sampling, "AHEAD", 2)
    ahead = draw_tokens_triton(logits, ids, draws, r)
    order = torch.tensor([3, 1, 4, 0, 2], device=DEVICE)
    shuffled = rules(rows, temperatures=[1.3, 0.0, 1.0, 1.0, 0.6])
    moved = draw_tokens_triton(logits[order], ids[order], draws[order], shuffled)
    wider = torch.cat([logits, logits], 1)[:, : logits.shape[1]]
    strided = draw_tokens_triton(wider, ids, draws, r)
    alone = draw_tokens_triton(logits[2:3], ids[2:3], draws[2:3], rules(1, temperatures=0.6))
    for i in range(2):
        assert torch.equal(one[i], several[i])
        assert torch.equal(one[i], ahead[i])
        assert torch.equal(one[i], strided[i])
        assert torch.equal(one[i][order], moved[i])
        assert torch.equal(one[i][2:3], alone[i])


def test_greedy_takes_the_first_of_equals():
    logits = torch.zeros(3, 1500, device=DEVICE)
    logits[0, [77, 1300, 1499]] = 2.0
    logits[1, [1024, 1023]] = 2.0
    tokens, logprobs = draw_tokens_triton(logits, *keys(3), rules(3, temperatures=0.0))
    assert tokens.tolist() == [77, 1023, 0]
    whole = torch.log_softmax(logits.double(), -1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_tokens_without_probability_are_never_drawn():
    logits = torch.full((16, 1500), -math.inf, device=DEVICE)
    logits[:, 1400], logits[:, 9] = 0.0, 1.0
    tokens, logprobs = draw_tokens_triton(logits, *keys(16), rules(16))
    assert set(tokens.tolist()) == {9, 1400}
    assert torch.isfinite(logprobs).all()


@pytest.mark.filterwarnings("ignore:invalid value|divide by zero|All-NaN")
def test_logits_that_are_not_finite_give_nan():
    logits = normal(7, 1500)
    logits[0, 100] = math.nan
    logits[1, 1400] = math.inf
    logits[2] = math.nan
    logits[3] = -math.inf
    logits[4, 1000:] = math.nan
    logits[5, 512:1024] = math.nan
    ids, draws = keys(7)
    for temperature in (1.0, 0.0):
        tokens, logprobs = draw_tokens_triton(
            logits, ids, draws, rules(7, temperatures=temperature)
        )
        assert logprobs.isnan().tolist() == [True] * 6 + [False]
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < 1500


def kept(logits, draws, r):
    """Which tokens stay, by the kernel and by the reference, as booleans [R, V]."""
    keys, last = cut.find_cuts(
        logits, draws, r.inverse_temperatures_R, r.held_ids_H, r.min_draws_R, r.cut
    )
    inverse = torch.where(r.inverse_temperatures_R == 0, 1.0, r.inverse_temperatures_R)
    s = logits * inverse[:, None]
    is_early = draws < r.min_draws_R
    s[:, r.held_ids_H] = s[:, r.held_ids_H].masked_fill(is_early[:, None], -math.inf)
    bits = (s + 0.0).view(torch.int32)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    columns = torch.arange(s.shape[1], device=DEVICE)
    stays = (order > keys[:, None]) | ((order == keys[:, None]) & (columns <= last[:, None]))
    return stays & ~s.isneginf(), ~cut_reference(s, r.cut).isneginf()


CUTS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 1e-6},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.9999},
    {"min_p": 0.1},
    {"min_p": 1e-5},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.02},
]


@pytest.mark.parametrize(
    ("vocabulary", "scale", "knobs"),
    [
        *((61, 3.0, knobs) for knobs in CUTS),
        *((5001, 1.0, knobs) for knobs in (CUTS[-1:] if INTERPRETED else CUTS)),
    ],
)
def test_cuts_keep_what_the_reference_keeps(vocabulary, scale, knobs):
    logits = normal(4, vocabulary, scale, seed=7)
    draws = torch.tensor([0, 1, 2, 3], device=DEVICE)
    r = rules(4, temperatures=[1.0, 0.7, 2.0, 1.0], held=(5, 60), min_draws=2, **knobs)
    got, want = kept(logits, draws, r)
    assert torch.equal(got.sum(1), want.sum(1))
    assert torch.equal(got, want)


@pytest.mark.parametrize("knobs", [{"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.01}])
def test_a_list_that_does_not_fit_changes_nothing(monkeypatch, knobs):
    monkeypatch.setattr(cut, "CAPACITY", 16)
    logits = normal(3, 700, 1.0, seed=2)
    r = rules(3, temperatures=[1.0, 0.5, 2.0], held=(5,), min_draws=2, **knobs)
    got, want = kept(logits, torch.tensor([0, 1, 2], device=DEVICE), r)
    assert int(want.sum(1).max()) > 16
    assert torch.equal(got, want)


@pytest.mark.parametrize("knobs", [{"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 8}])
def test_cuts_take_equals_by_index(knobs):
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[0, [77, 3000, 4999, 20, 4500, 4600]] = 20.0
    logits[1, [1, 4998]] = 25.0
    logits[1, [4097, 5, 9, 10, 11]] = -0.0  # no other number than 0.0
    logits[2] = logits[0] - 30.0
    r = rules(3, **knobs)
    got, want = kept(logits, torch.zeros(3, dtype=torch.int64, device=DEVICE), r)
    assert torch.equal(got, want)


def test_rows_without_cuts_keep_all_beside_rows_with_cuts():
    logits = normal(5, 300)
    r = rules(
        5,
        temperatures=[1.0, 1.0, 0.0, 1.0, 1.0],
        top_k=[0, 3, 3, 0, 0],
        top_p=[1.0, 1.0, 1.0, 0.3, 1.0],
        min_p=[0.0, 0.0, 0.0, 0.0, 0.5],
    )
    got, _ = kept(logits, torch.zeros(5, dtype=torch.int64, device=DEVICE), r)
    assert got.sum(1).tolist()[:3] == [300, 3, 300]
    assert 1 < got.sum(1)[3] < 60
    assert 1 <= got.sum(1)[4] < 30


@pytest.mark.parametrize("knobs", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}])
def test_cut_draws_stay_inside_and_record_the_whole_distribution(knobs):
    num_rows = 3 if INTERPRETED else 4096
    logits = normal(1, 500, 2.0).repeat(num_rows, 1)
    ids, draws = keys(num_rows)
    r = rules(num_rows, **knobs)
    tokens, logprobs = draw_tokens_triton(logits, ids, draws, r)
    expected, _ = draw_tokens_reference(logits, ids, draws, r)
    is_clear = margins(logits, ids, draws, r) > 1.0
    assert torch.equal(tokens[is_clear], expected[is_clear])
    stays = kept(logits[:1], draws[:1], rules(1, **knobs))[1][0]
    assert bool(stays[tokens].all())
    assert INTERPRETED or len(set(tokens.tolist())) > 1
    whole = torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, whole, rtol=1e-5, atol=1e-5)


def chi_square_limit(degrees):
    """The value exceeded once in 10,000 (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.719 * math.sqrt(spread)) ** 3


@pytest.mark.skipif(INTERPRETED, reason="a million draws take the interpreter hours")
@pytest.mark.parametrize("what", ["seeds", "positions", "samples", "all"])
def test_a_million_draws_follow_the_distribution(what):
    """Tail bins down to 1e-5 (ten draws), in a vocabulary of several tiles."""
    num_draws = 1 << 20
    places = torch.tensor([4999, 0, 2047, 2048, 4096, 1023, 7, 3001, 4500, 2050], device=DEVICE)
    probs = [0.4, 0.25, 0.2, 0.1, 0.04, 0.008, 0.0015, 0.0004, 0.00009, 0.00001]
    probs = torch.tensor(probs, dtype=torch.float64, device=DEVICE)
    logits = torch.full((1, 5000), -math.inf, device=DEVICE)
    logits[0, places] = (probs.log() + 3).float()
    counts = torch.zeros(5000, dtype=torch.float64, device=DEVICE)
    generator = torch.Generator().manual_seed(1)
    size = 1 << 14
    for part in range(num_draws // size):
        each = torch.arange(size, device=DEVICE) + part * size
        ids = torch.tensor([[3, 5]], device=DEVICE).repeat(size, 1)
        draws, seed = torch.zeros_like(each), (9, 0)
        if what in ("samples", "all"):
            ids[:, part % 2] = each
        if what in ("positions", "all"):
            draws = each
        if what in ("seeds", "all"):
            seed = tuple(torch.randint(1 << 32, (2,), generator=generator).tolist())
            ids[:, 1] = each % size
        tokens, _ = draw_tokens_triton(logits.expand(size, -1), ids, draws, rules(size, seed=seed))
        counts += torch.bincount(tokens, minlength=5000)
    assert int(counts.sum()) == int(counts[places].sum()) == num_draws
    expected = probs / probs.sum() * num_draws
    assert float(((counts[places] - expected) ** 2 / expected).sum()) < chi_square_limit(9)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no graphs")
@pytest.mark.parametrize("is_cut", [False, True])
def test_a_captured_draw_reads_everything_anew(is_cut):
    num_rows, vocabulary = 33, 5000
    logits = normal(num_rows, vocabulary, 3.0)
    ids, draws = keys(num_rows)
    cuts = {"top_k": 3, "top_p": 1.0} if is_cut else {}
    r = rules(num_rows, held=(5, -1), **cuts)
    draw_tokens_triton(logits, ids, draws, r)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, logprobs = draw_tokens_triton(logits, ids, draws, r)
    temperatures = [0.0, 0.7, 1.0] * 11
    cuts = {"top_k": [0, 9, 1] * 11, "top_p": 0.9} if is_cut else {}
    new = rules(
        num_rows, temperatures=temperatures, seed=(7, 8), held=(-1, 9), min_draws=100, **cuts
    )
    r.inverse_temperatures_R.copy_(new.inverse_temperatures_R)
    r.seed_words_2.copy_(new.seed_words_2)
    r.held_ids_H.copy_(new.held_ids_H)
    r.min_draws_R.copy_(new.min_draws_R)
    if is_cut:
        for name in ("top_k_R", "top_p_R", "min_p_R"):
            getattr(r.cut, name).copy_(getattr(new.cut, name))
    logits.copy_(normal(num_rows, vocabulary, 2.0, seed=5))
    ids.copy_(keys(num_rows, seed=3)[0])
    draws.add_(3)
    graph.replay()
    expected, expected_logprobs = draw_tokens_triton(logits, ids, draws, new)
    assert torch.equal(tokens, expected)
    assert torch.equal(logprobs, expected_logprobs)
    check_draws(logits, ids, draws, new)
