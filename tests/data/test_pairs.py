"""Pairs: every shape of row gives the tokens that generation would find, wrong rows are named."""

from __future__ import annotations

import pytest
import torch

from sparring.data.packing import pack_pairs
from sparring.data.pairs import load_pairs
from sparring.data.rows import build_rows
from sparring.errors import DataError

ASK = {"role": "user", "content": "What is 3 + 4?"}
SEVEN = {"role": "assistant", "content": "The answer is 7."}
EIGHT = {"role": "assistant", "content": "Is it 8?"}


@pytest.fixture
def tokenizer(make_tokenizer, chatml):
    return make_tokenizer(chatml)


def load(rows, tokenizer, **options):
    return load_pairs(build_rows(rows, name="pairs"), tokenizer, **{"max_tokens": 200, **options})


def texts(pair, tokenizer):
    """Context, chosen and rejected as text; the masks must cover the completions."""
    assert pair.chosen_mask.all()
    assert pair.rejected_mask.all()
    ids = (pair.context_ids, pair.chosen_ids, pair.rejected_ids)
    return tuple(tokenizer.decode(part.tolist()) for part in ids)


WHAT = "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n"
EXPECTED = (WHAT, "The answer is 7.<|im_end|>", "Is it 8?<|im_end|>")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK["content"], "chosen": SEVEN["content"], "rejected": EIGHT["content"]},
        {"prompt": [ASK], "chosen": [SEVEN], "rejected": [EIGHT]},
        {"prompt": [ASK], "chosen": SEVEN["content"], "rejected": EIGHT["content"]},
        {"prompt": ASK["content"], "chosen": [SEVEN], "rejected": [EIGHT]},
        {"chosen": [ASK, SEVEN], "rejected": [ASK, EIGHT]},
        {"prompt": ASK["content"], "chosen": [ASK, SEVEN], "rejected": [ASK, EIGHT]},
        {"prompt": [ASK], "chosen": [ASK, SEVEN], "rejected": [ASK, EIGHT], "score": 3},
    ],
)
def test_every_shape_of_row_is_the_same_pair(row, tokenizer):
    (pair,) = load([row], tokenizer)
    assert texts(pair, tokenizer) == EXPECTED


def test_text_without_a_template_is_taken_as_it_stands(make_tokenizer):
    tokenizer = make_tokenizer(None, begin=True)
    explicit = {"prompt": "Q: 3 + 4\nA:", "chosen": " 7", "rejected": " 8, or 9"}
    implicit = {"chosen": "Q: 3 + 4\nA: 7", "rejected": "Q: 3 + 4\nA: 8, or 9"}
    for row in (explicit, implicit):
        (pair,) = load([row], tokenizer)
        expected = ("<s>Q: 3 + 4\nA:", " 7<|im_end|>", " 8, or 9<|im_end|>")
        assert texts(pair, tokenizer) == expected


def test_an_implicit_text_prompt_is_no_user_message(tokenizer):
    found = load([{"chosen": "Human: hi\nBot: hello", "rejected": "Human: hi\nBot: no"}], tokenizer)
    assert texts(found[0], tokenizer)[0] == "Human: hi\nBot:"
    assert "without the chat template" in found.report()[-1]


def test_several_turns_are_compared_where_the_template_keeps_history(
    make_tokenizer, chatml, rewriting
):
    more = {"role": "user", "content": "Sure?"}
    thought = {"role": "assistant", "content": "<think>\nadd\n</think>\n\nYes."}
    row = {"chosen": [ASK, SEVEN, more, thought], "rejected": [ASK, EIGHT, more, SEVEN]}
    tokenizer = make_tokenizer(chatml)
    (pair,) = load([row], tokenizer)
    assert tokenizer.decode(pair.context_ids.tolist()) == WHAT
    learned = tokenizer.decode(pair.chosen_ids[pair.chosen_mask].tolist())
    assert learned == "The answer is 7.<|im_end|><think>\nadd\n</think>\n\nYes.<|im_end|>"
    assert not pair.chosen_mask.all()
    first = {**thought, "content": "<think>\nadd\n</think>\n\n7"}
    row = {"chosen": [ASK, first, more, SEVEN], "rejected": [ASK, EIGHT, more, SEVEN]}
    with pytest.raises(DataError, match=r"pairs:row 1: 'chosen' has 2 assistant turns"):
        load([row], make_tokenizer(rewriting))


def test_a_prefill_that_one_side_lacks_is_no_shared_context(make_tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    empty = "<think>\n\n</think>\n\n"
    row = {"prompt": "Hi", "chosen": f"{empty}1", "rejected": "<think>\nwell\n</think>\n\n2"}
    (pair,) = load([row], tokenizer)
    assert tokenizer.decode(pair.context_ids.tolist()).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(pair.chosen_ids[~pair.chosen_mask].tolist()) == empty
    assert tokenizer.decode(pair.chosen_ids[pair.chosen_mask].tolist()) == "1<|im_end|>"
    assert pair.rejected_mask.all()


BAD = [
    ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are the same"),
    (
        {"prompt": [ASK], "chosen": [SEVEN], "rejected": [{**SEVEN, "name": "x"}]},
        "the same after templating",
    ),
    ({"prompt": "Hi", "chosen": " ", "rejected": "a"}, "'chosen' is empty"),
    ({"prompt": [ASK], "chosen": [SEVEN], "rejected": [{**SEVEN, "content": ""}]}, "is empty"),
    ({"prompt": "Hi", "chosen": "a", "rejected": None}, "no 'rejected'"),
    ({"prompt": "Hi", "chosen": "a", "rejected": [SEVEN]}, "one is text and one a list"),
    ({"prompt": "Hi", "chosen": 3, "rejected": "a"}, "'chosen' is a int"),
    ({"prompt": "", "chosen": "b", "rejected": "a"}, "'prompt' is empty"),
    ({"chosen": "b", "rejected": "a"}, "do not begin alike"),
    ({"chosen": "Q: hi A", "rejected": "Q: hi"}, "one of chosen and rejected is how the other"),
    ({"chosen": [ASK, SEVEN], "rejected": [SEVEN]}, "do not begin with the same message"),
    ({"chosen": [ASK, SEVEN], "rejected": [ASK]}, "'rejected' has no message behind"),
    ({"chosen": [ASK, SEVEN], "rejected": [ASK, ASK]}, "which is the user's"),
    ({"prompt": "Else", "chosen": [ASK, SEVEN], "rejected": [ASK, EIGHT]}, "is not among"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_one_error_with_its_place(row, message, tokenizer):
    good = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}
    with pytest.raises(DataError, match=rf"^pairs:row 2: .*{message}.*bad_rows"):
        load([good, row], tokenizer)
    found = load([good, row], tokenizer, bad_rows="skip")
    assert (len(found), found.num_rows, found.num_bad) == (1, 2, 1)
    assert "pairs:row 2" in "\n".join(found.report())


def test_columns_that_are_missing_are_named(tokenizer):
    with pytest.raises(DataError, match=r"no column rejected; its columns are prompt, chosen"):
        load([{"prompt": "Hi", "chosen": "a"}], tokenizer)
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match="no column question"):
        load([row], tokenizer, prompt_column="question")


def test_messages_need_a_template(make_tokenizer):
    with pytest.raises(DataError, match="row 1: the data holds messages, but"):
        load([{"prompt": [ASK], "chosen": [SEVEN], "rejected": [EIGHT]}], make_tokenizer(None))


def test_rows_that_are_too_long_are_dropped_and_counted(tokenizer):
    short = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}
    long = {"prompt": "Hi", "chosen": "yes", "rejected": "no " * 300}
    found = load([short, long], tokenizer)
    assert (len(found), found.num_too_long) == (1, 1)
    assert found.longest > 300
    assert "1 dropped: longer than 200 tokens (the longest, pairs:row 2, has" in "\n".join(
        found.report()
    )
    with pytest.raises(DataError, match="all 1 pairs are longer than 200"):
        load([long], tokenizer)


def test_a_pair_is_packed_behind_one_copy_of_its_context(tokenizer):
    rows = [
        {"prompt": "Hi" * n, "chosen": "yes " * n, "rejected": "no " * (7 - n)} for n in range(1, 7)
    ]
    pairs = load(rows, tokenizer).pairs
    sizes = [len(p.context_ids) - 1 + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs]
    for max_tokens in (10, 100, 1000):
        batches = pack_pairs(pairs, max_tokens=max_tokens)
        seen = []
        for batch in batches:
            assert batch.num_sequences == 12
            assert batch.num_loss_tokens == sum(len(p.chosen_ids) for p in pairs)
            assert batch.weights_T is not None
            assert batch.num_local_sequences % 2 == 0
            assert len(batch.input_ids_T) <= max_tokens or batch.num_local_sequences == 2
            for pair in range(batch.num_local_sequences // 2):
                rows_of = [batch.sequence_ids_T == 2 * pair + side for side in (0, 1)]
                labels = [batch.labels_T[mask].tolist() for mask in rows_of]
                seen.append(tuple(map(tuple, labels)))
                assert batch.weights_T[rows_of[0]].eq(1).all()
                assert batch.weights_T[rows_of[1]].eq(0).all()
                starts = [int(batch.positions_T[mask][0]) for mask in rows_of]
                assert starts[0] == starts[1]
        expected = [(tuple(p.chosen_ids.tolist()), tuple(p.rejected_ids.tolist())) for p in pairs]
        assert sorted(seen) == sorted(expected)
        assert sum(len(batch.input_ids_T) for batch in batches) == sum(sizes)
    assert torch.equal(pack_pairs(pairs, max_tokens=1000)[0].input_ids_T, batch.input_ids_T)
