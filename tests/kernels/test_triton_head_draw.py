"""Head and draw in one launch, against a draw from the logits: on a GPU or interpreted.

The interpreter's process is started by tests/kernels/test_processes.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparring.kernels import capability_for, head_draw
from sparring.kernels.head_draw import (
    HeadForm,
    head_draw_reference,
    head_draw_triton,
    head_form,
)
from sparring.kernels.sampling import DrawRules
from tests.kernels.test_triton import DEVICE, HALVES, INTERPRETED, _poisoned, pytestmark, random

__all__ = ["_poisoned", "pytestmark"]

FORM = HeadForm(64, 64, 4, 2)


@pytest.fixture(autouse=True)
def _with_bulk_copies():
    if not INTERPRETED and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs compute capability 9.0")


def case(rows, vocabulary, width, dtype, *, scale=1.0):
    """x, W, sample ids, draw places and rules of rows with several temperatures, one greedy."""
    x = random(rows, width, dtype=dtype, seed=1)
    weight = random(vocabulary, width, dtype=dtype, seed=2, scale=scale / width**0.5)
    generator = torch.Generator().manual_seed(3)
    ids_R2 = torch.randint(0, 1 << 32, (rows, 2), generator=generator).to(DEVICE)
    draws_R = torch.randint(0, 2000, (rows,), generator=generator).to(DEVICE)
    inverse = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.25]).repeat(rows // 5 + 1)[:rows]
    rules = DrawRules(
        inverse_temperatures_R=inverse.to(DEVICE),
        seed_words_2=torch.tensor([123, 456], device=DEVICE),
        held_ids_H=torch.empty(0, dtype=torch.int64, device=DEVICE),
        min_draws_R=torch.zeros(rows, dtype=torch.int64, device=DEVICE),
    )
    return x, weight, ids_R2, draws_R, rules


def scores_of(x, weight, ids_R2, draws_R, rules, tokens_R):
    """How far each row's token lies behind the best score of the reference."""
    ends = []
    for token_R in (head_draw_reference(x, weight, ids_R2, draws_R, rules)[0], tokens_R):
        logits = x.double() @ weight.double().T
        inverse = rules.inverse_temperatures_R.double()
        scaled = logits * torch.where(inverse == 0, 1.0, inverse)[:, None]
        words = head_draw_words(ids_R2, draws_R, rules, weight.shape[0])
        noise = torch.log(-torch.log1p(-(words.double() + 0.5) * 2.0**-32))
        noise = noise.masked_fill((inverse == 0)[:, None], 0.0)
        ends.append((scaled - noise).gather(1, token_R[:, None])[:, 0])
    return ends[0] - ends[1]


def head_draw_words(ids_R2, draws_R, rules, vocabulary):
    from sparring.kernels.philox import noise_words

    return noise_words((rules.seed_words_2[0], rules.seed_words_2[1]), ids_R2, draws_R, vocabulary)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "scale"),
    [(3, 64, 64, 1.0), (11, 300, 128, 3.0), (70, 640, 192, 1.0), (70, 641, 64, 8.0)],
)
def test_tokens_and_logprobs_are_those_of_the_logits(rows, vocabulary, width, scale, dtype):
    given = case(rows, vocabulary, width, dtype, scale=scale)
    tokens, logprobs = head_draw_triton(*given, FORM)
    want_tokens, want = head_draw_reference(*given)
    assert ((tokens >= 0) & (tokens < vocabulary)).all()
    # another token only where two scores are as close as rounded sums
    assert (scores_of(*given, tokens) < 1e-4).all()
    same = tokens == want_tokens
    assert same.float().mean() > 0.95
    torch.testing.assert_close(logprobs[same], want[same], rtol=0, atol=2e-5)


def test_held_tokens_are_not_drawn_early_and_count_in_the_logprob():
    rows, vocabulary = 20, 128
    x, weight, ids_R2, draws_R, rules = case(rows, vocabulary, 64, torch.bfloat16)
    free, _ = head_draw_triton(x, weight, ids_R2, draws_R, rules, FORM)
    held = torch.cat([free.unique()[:6], torch.tensor([-1], device=DEVICE)])
    early = draws_R + torch.arange(rows, device=DEVICE) % 2  # every other row is early
    rules = replace(rules, held_ids_H=held, min_draws_R=early)
    tokens, logprobs = head_draw_triton(x, weight, ids_R2, draws_R, rules, FORM)
    want_tokens, want = head_draw_reference(x, weight, ids_R2, draws_R, rules)
    assert torch.equal(tokens, want_tokens)
    torch.testing.assert_close(logprobs, want, rtol=0, atol=2e-5)
    is_early = draws_R < early
    assert not torch.isin(tokens[is_early], held).any()
    assert torch.isin(tokens[~is_early], held).any()


def test_a_row_does_not_depend_on_the_others_nor_on_the_tile():
    x, weight, ids_R2, draws_R, rules = case(70, 300, 128, torch.bfloat16)
    tokens, logprobs = head_draw_triton(x, weight, ids_R2, draws_R, rules, FORM)
    part = slice(33, 70)
    given = x[part], weight, ids_R2[part], draws_R[part], rules.of_rows(part)
    some, some_logprobs = head_draw_triton(*given, FORM)
    assert torch.equal(some, tokens[part])
    assert torch.equal(some_logprobs, logprobs[part])
    other = HeadForm(32, 64, 4, 2, pieces=2)
    assert torch.equal(head_draw_triton(*given, other)[0], some)


@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_logits_that_are_not_finite_give_nan():
    x, weight, ids_R2, draws_R, rules = case(4, 128, 64, torch.bfloat16)
    x[2] = float("nan")
    logprobs = head_draw_triton(x, weight, ids_R2, draws_R, rules, FORM)[1]
    assert torch.isnan(logprobs).tolist() == [False, False, True, False]


def test_a_million_draws_follow_the_distribution():
    """Of one row's logits: chi-square over 64 tokens, rare ones too."""
    count = 600 if INTERPRETED else 250_000
    x, weight, _, _, rules = case(1, 64, 64, torch.bfloat16, scale=2.0)
    rows = 200 if INTERPRETED else 5000
    probabilities = torch.softmax((x.double() @ weight.double().T)[0], -1)
    rules = replace(
        rules,
        inverse_temperatures_R=torch.ones(rows, device=DEVICE),
        min_draws_R=torch.zeros(rows, dtype=torch.int64, device=DEVICE),
    )
    counts = torch.zeros(64, dtype=torch.float64, device=DEVICE)
    ids_R2 = torch.arange(2 * rows, device=DEVICE).view(rows, 2)
    for turn in range(count // rows):
        draws_R = torch.full((rows,), turn, device=DEVICE)
        tokens, _ = head_draw_triton(x.expand(rows, -1), weight, ids_R2, draws_R, rules, FORM)
        counts += torch.bincount(tokens, minlength=64)
    expected = probabilities * counts.sum()
    chi_square = ((counts - expected).square() / expected).sum()
    assert chi_square < 63 + 5 * (2 * 63) ** 0.5


def test_what_the_kernel_does_not_take():
    x, weight, ids_R2, draws_R, rules = case(3, 64, 64, torch.bfloat16)
    with pytest.raises(ValueError, match="columns must be equal"):
        head_draw_triton(x, weight[:, :32], ids_R2, draws_R, rules, FORM)
    with pytest.raises(ValueError, match="dtypes the same"):
        head_draw_triton(x, weight.half(), ids_R2, draws_R, rules, FORM)


def test_which_form_a_number_of_rows_takes(monkeypatch):
    few, many = HeadForm(64, 128), HeadForm(128, 128)
    monkeypatch.setattr(head_draw, "FORMS", {90: ((64, few), (200, many))})
    for rows, form in ((63, None), (64, few), (199, few), (200, many), (512, many)):
        assert head_form(capability_for(90), rows) is form
    assert head_form(capability_for(89), 256) is None
