"""From rollouts to groups: what a function gets, what its answers become, when a run is stopped."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from fractions import Fraction

import pytest
import torch

from sparring.errors import RewardError, RunError
from sparring.rewards.verdicts import Reward, check_rewards, combine, judge, load_reward
from sparring.types import Prompt, Rollout

NAN = float("nan")


def rollouts(num_prompts=2, group_size=3, *, chat=False, columns=None, prefill=""):
    groups = []
    for row in range(num_prompts):
        prompt = Prompt(
            id=row,
            token_ids=(1, 2),
            text=f"question {row}",
            messages=({"role": "user", "content": f"question {row}"},) if chat else None,
            columns=columns[row] if columns else {"reference": str(row), "level": row},
            prefill=prefill,
        )
        groups.append([_rollout(prompt, sample) for sample in range(group_size)])
    return groups


def _rollout(prompt, sample):
    length = sample + 1
    return Rollout(
        prompt=prompt,
        sample_index=sample,
        token_ids=torch.arange(length),
        logprobs=torch.zeros(length),
        loss_mask=torch.ones(length, dtype=torch.bool),
        text=f"<think>x</think><answer>{sample}</answer>",
        finish_reason="length" if sample == 2 else "stop",
        policy_version=0,
    )


def made(function, **fields):
    """A Reward around a function, as a recipe would make it."""
    fields = {"name": getattr(function, "__name__", "made"), **fields}
    return Reward(function=function, **fields)


def test_a_function_gets_whole_groups_and_only_the_keywords_it_names():
    seen = {}

    def spy(prompts, completions, completion_ids, group_ids, finish_reasons, level, trainer_state):
        seen.update({key: value for key, value in locals().items() if key != "seen"})
        return [0.0] * len(completions)

    judge(rollouts(), [made(spy)], trainer_state={"step": 7})
    assert set(seen) == {
        "prompts", "completions", "completion_ids", "group_ids", "finish_reasons", "level",
        "trainer_state",
    }  # fmt: skip
    assert seen["prompts"] == ["question 0"] * 3 + ["question 1"] * 3
    assert seen["completions"][2] == "<think>x</think><answer>2</answer>"
    assert seen["completion_ids"][:3] == [[0], [0, 1], [0, 1, 2]]
    assert seen["group_ids"] == [0, 0, 0, 1, 1, 1]
    assert seen["finish_reasons"] == ["stop", "stop", "length"] * 2
    assert seen["level"] == [0, 0, 0, 1, 1, 1]
    assert seen["trainer_state"] == {"step": 7}


def test_kwargs_get_everything():
    seen = {}

    def spy(completions, **rest):
        seen.update(rest)
        return [0.0] * len(completions)

    judge(rollouts(prefill="<think>"), [made(spy)])
    assert {"prompts", "reference", "level", "prefills", "log_extra", "log_metric"} <= set(seen)
    assert seen["prefills"] == ["<think>"] * 6
    assert seen["reference"] == ["0"] * 3 + ["1"] * 3


def test_message_prompts_give_lists_of_messages():
    seen = {}

    def spy(prompts, completions):
        seen.update(locals())
        return [1.0] * len(completions)

    judge(rollouts(chat=True), [made(spy)])
    assert seen["prompts"][0] == [{"role": "user", "content": "question 0"}]
    assert seen["completions"][0][0]["role"] == "assistant"
    assert len(seen["completions"][0]) == 1


def test_columns_that_some_rows_lack_are_none_there():
    columns = [{"reference": "1", "extra": 5}, {"reference": "2"}]
    seen = {}

    def spy(completions, extra):
        seen["extra"] = extra
        return [1.0] * len(completions)

    judge(rollouts(columns=columns), [made(spy)])
    assert seen["extra"] == [5, 5, 5, None, None, None]


def test_a_column_that_is_not_there_stops_at_once_and_lists_the_columns():
    def needs(completions, answer):
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=r"'needs' needs 'answer'.*columns: level, reference"):
        judge(rollouts(), [made(needs)])


def test_knobs_reach_keyword_only_parameters_and_must_not_share_a_name_with_a_column(tmp_path):
    file = write(
        tmp_path,
        "def mine(completions, *, scale=1.0):\n    return [scale] * len(completions)\n"
        "def clash(completions, *, level=1):\n    return [0.0] * len(completions)\n"
        "def must(completions, *, scale):\n    return [scale] * len(completions)\n",
    )
    judgement = judge(rollouts(), [load_reward(f"{file}:mine", knobs={"scale": 2.5})])
    assert judgement.groups[0].rewards_G.tolist() == [2.5] * 3
    with pytest.raises(RewardError, match="column 'level'"):
        judge(rollouts(), [load_reward(f"{file}:clash")])
    with pytest.raises(RewardError, match="'mine' takes no 'scales'; it takes scale"):
        load_reward(f"{file}:mine", knobs={"scales": 1})
    with pytest.raises(RewardError, match="needs a value for 'scale'"):
        load_reward(f"{file}:must")


def test_a_class_is_built_from_its_knobs_and_called(tmp_path):
    file = write(
        tmp_path,
        "class Mine:\n"
        "    def __init__(self, scale: float = 1.0): self.scale = scale\n"
        "    def __call__(self, completions, level): return [self.scale * x for x in level]\n"
        "class NotCallable:\n    pass\n"
        "class AsyncMine:\n"
        "    async def __call__(self, completions): return [3] * len(completions)\n",
    )
    reward = load_reward(f"{file}:Mine", knobs={"scale": 4})
    assert judge(rollouts(), [reward]).groups[1].rewards_G.tolist() == [4.0] * 3
    assert judge(rollouts(), [load_reward(f"{file}:AsyncMine")]).reports["AsyncMine"].mean == 3.0
    with pytest.raises(RewardError, match="a number"):
        load_reward(f"{file}:Mine", knobs={"scale": "big"})
    with pytest.raises(RewardError, match="without __call__"):
        load_reward(f"{file}:NotCallable")


def test_async_and_sync_functions_run_side_by_side():
    async def slow_async(completions):
        await asyncio.sleep(0.4)
        return [1.0] * len(completions)

    async def other_async(completions):
        await asyncio.sleep(0.4)
        return [1.0] * len(completions)

    def slow(completions):
        time.sleep(0.4)
        return [1.0] * len(completions)

    start = time.perf_counter()
    judge(rollouts(), [made(slow_async), made(other_async), made(slow)])
    assert time.perf_counter() - start < 1.1


def test_an_async_reward_keeps_its_event_loop_between_batches():
    loops = []

    async def spy(completions):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    reward = made(spy)
    judge(rollouts(), [reward])
    judge(rollouts(), [reward])
    assert loops[0] is loops[1]
    reward.close()
    assert not [thread for thread in threading.enumerate() if "_run_loop" in thread.name]


def test_a_sync_function_may_return_an_awaitable():
    async def later(n):
        return [2.0] * n

    def mixed(completions):
        return later(len(completions))

    assert judge(rollouts(), [made(mixed)]).reports["mixed"].mean == 2.0


@pytest.mark.parametrize(
    "values",
    [
        [1, 0, True, False, 0.5, None],
        (1, 0, 1, 0, 0.5, None),
        torch.tensor([1.0, 0, 1, 0, 0.5, NAN]),
        [torch.tensor(1.0), torch.tensor(0), 1, 0, 0.5, NAN],
    ],
)
def test_numbers_of_every_kind_are_taken(values):
    def mine(completions):
        return values

    judgement = judge(rollouts(), [made(mine)])
    part = torch.cat([group.reward_parts["mine"] for group in judgement.groups])
    assert part[:5].tolist() == [1.0, 0.0, 1.0, 0.0, 0.5]
    assert math.isnan(part[5])
    assert part.dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "'mine' returned 1 values for 6 completions"),
        ([1.0] * 7, "returned 7 values"),
        (1.0, "returned float"),
        (None, "returned NoneType"),
        ("111111", "returned str"),
        ([1.0] * 5 + ["1"], "returned '1' .str. for completion 5"),
        ([1.0] * 5 + [[1.0]], "list"),
        ([1.0] * 5 + [1j], "complex"),
        ({0: 1.0}, "returned dict"),
    ],
)
def test_a_broken_contract_stops_the_run_and_names_the_function(values, message):
    def mine(completions):
        return values

    with pytest.raises(RewardError, match=message):
        judge(rollouts(), [made(mine)], is_first_batch=False)


def test_what_cannot_be_judged_is_none_and_counted_by_reason():
    def mine(completions):
        return [1.0, None, NAN, math.inf, -math.inf, 10**400]

    judgement = judge(rollouts(), [made(mine)])
    report = judgement.reports["mine"]
    assert dict(report.reasons) == {"None": 1, "NaN": 1, "infinity": 3}
    assert (report.num_samples, report.num_judged, report.mean) == (6, 1, 1.0)
    assert judgement.groups[0].rewards_G.isnan().tolist() == [False, True, True]
    assert "5 of 6: 1 None, 1 NaN, 3 infinity" in report.warning()


def test_a_raised_error_costs_that_call_and_keeps_the_first_traceback():
    def boom(completions):
        raise KeyError("no such thing")

    def fine(completions):
        return [1.0] * len(completions)

    judgement = None
    with pytest.raises(RunError, match="boom"):
        judge(rollouts(), [made(fine), made(boom)], is_first_batch=False)
    calls = []

    def sometimes(completions):
        calls.append(1)
        if len(calls) > 1:
            raise KeyError("no such thing")
        return [1.0] * len(completions)

    reward = made(sometimes)
    judgement = judge(rollouts(), [reward])
    assert judgement.reports["sometimes"].warning() == ""
    with pytest.raises(RunError, match=r"6 error: KeyError[\s\S]*no such thing") as raised:
        judge(rollouts(), [reward], is_first_batch=False)
    assert "sparring/rewards/calling.py" not in str(raised.value)


def test_nothing_judged_is_the_users_fault_in_the_first_batch_and_the_runs_later():
    def nothing(completions):
        return [None] * len(completions)

    with pytest.raises(RewardError, match=r"'nothing' judged none of 6 completions .6 None"):
        judge(rollouts(), [made(nothing)])
    with pytest.raises(RunError, match="judged none"):
        judge(rollouts(), [made(nothing)], is_first_batch=False)


def test_a_hang_costs_the_wall_clock_once_and_is_not_piled_up():
    release = threading.Event()

    def hangs(completions):
        release.wait(30)
        return [1.0] * len(completions)

    def fine(completions):
        return [1.0] * len(completions)

    reward = made(hangs, timeout_seconds=0.3)
    start = time.perf_counter()
    with pytest.raises(RunError, match=r"timeout after 0.3 s"):
        judge(rollouts(), [made(fine), reward], is_first_batch=False)
    with pytest.raises(RunError, match=r"busy: .*isolate = true"):
        judge(rollouts(), [made(fine), reward], is_first_batch=False)
    assert time.perf_counter() - start < 2.0
    release.set()
    time.sleep(0.1)
    assert judge(rollouts(), [reward]).reports["hangs"].mean == 1.0


def test_async_hangs_are_cancelled_and_blocked_loops_left_behind():
    cancelled = []

    async def sleeps(completions):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(1)
            raise

    calls = []

    async def blocks_once(completions):
        calls.append(1)
        if len(calls) == 1:
            time.sleep(2.5)  # an async function that does not yield
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match="timeout"):
        judge(rollouts(), [made(sleeps, timeout_seconds=0.2)])
    deadline = time.monotonic() + 5
    while not cancelled and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cancelled
    reward = made(blocks_once, timeout_seconds=0.2)
    with pytest.raises(RewardError, match="timeout"):
        judge(rollouts(), [reward])
    assert judge(rollouts(), [reward]).reports["blocks_once"].mean == 1.0
    time.sleep(1.5)  # the blocked loop comes to its end before the test does


def test_a_function_that_exits_does_not_end_the_run():
    def leaves(completions):
        raise SystemExit(3)

    with pytest.raises(RunError, match="error: SystemExit"):
        judge(rollouts(), [made(leaves)], is_first_batch=False)


def test_our_own_errors_inside_a_reward_stop_the_run_at_once():
    def misused(completions):
        raise RewardError("this knob is wrong")

    with pytest.raises(RewardError, match="this knob is wrong"):
        judge(rollouts(), [made(misused)], is_first_batch=False)


def test_what_a_function_logs_is_in_its_report():
    def mine(completions, log_extra, log_metric):
        log_extra("note", [f"n{i}" for i in range(len(completions))])
        log_metric("share", 0.25)
        return [1.0] * len(completions)

    def wrong(completions, log_extra):
        log_extra("note", ["one"])
        return [1.0] * len(completions)

    report = judge(rollouts(), [made(mine)]).reports["mine"]
    assert report.extras["note"] == ["n0", "n1", "n2", "n3", "n4", "n5"]
    assert report.metrics == {"share": 0.25}
    with pytest.raises(RewardError, match="got 1 values for 6"):
        judge(rollouts(), [made(wrong)])


def named(name, **fields):
    return Reward(name=name, function=len, **fields)


def test_the_sum_is_weighted_and_a_missing_optional_value_drops_out():
    rewards = [
        named("math", weight=1.0),
        named("format", weight=0.5),
        named("language", weight=0.1),
    ]
    values = {"math": [1.0, 0.0, None], "format": [1.0, None, 1.0], "language": [0.5, 1.0, 1.0]}
    assert combine(rewards, values) == [pytest.approx(1.55), pytest.approx(0.1), None]


def test_required_rewards_and_the_first_where_none_is_marked():
    values = {"a": [None, 1.0], "b": [1.0, None]}
    assert combine([named("a"), named("b")], values) == [None, 1.0]
    assert combine([named("a"), named("b", required=True)], values) == [1.0, None]
    both = [named("a", required=True), named("b", required=True)]
    assert combine(both, values) == [None, None]


def test_a_gate_lets_a_reward_count_only_where_it_is_positive():
    rewards = [named("math", gate="format"), named("format", weight=0.5)]
    values = {"math": [1.0, 1.0, -1.0, 1.0], "format": [1.0, 0.0, 0.0, None]}
    assert combine(rewards, values) == [1.5, 0.0, 0.0, None]
    optional = [named("x", required=True), named("math", gate="format"), named("format")]
    assert combine(optional, {**values, "x": [0.0] * 4}) == [2.0, 0.0, 0.0, 0.0]


def test_parts_are_the_raw_values_of_each_reward():
    def half(completions):
        return [0.5] * len(completions)

    def zero(completions):
        return [0.0] * len(completions)

    judgement = judge(rollouts(), [made(half, weight=2.0, gate="zero"), made(zero)])
    assert judgement.groups[0].reward_parts["half"].tolist() == [0.5] * 3
    assert judgement.groups[0].rewards_G.tolist() == [0.0] * 3


def test_what_rewards_of_a_run_must_keep_to():
    with pytest.raises(RewardError, match="no reward"):
        check_rewards([])
    with pytest.raises(RewardError, match="two rewards are called 'a'"):
        check_rewards([named("a"), named("a")])
    with pytest.raises(RewardError, match=r"gate = 'formt'.*the others: format"):
        check_rewards([named("math", gate="formt"), named("format")])
    with pytest.raises(RewardError, match="no other reward"):
        check_rewards([named("math", gate="math")])
    with pytest.raises(RewardError, match="must be positive"):
        load_reward("math", timeout_seconds=0)


def test_length_rewards_see_what_the_deciding_reward_said():
    def right(completions):
        return [1.0, None, 0.0] * 2

    def other(completions):
        return [0.0] * len(completions)

    rewards = [
        load_reward("group_length", weight=0.2),
        made(other),
        made(right, required=True),
    ]
    judgement = judge(rollouts(), rewards)
    part = judgement.groups[0].reward_parts["group_length"]
    assert part[[0, 2]].tolist() == [0.5, -0.5]
    assert math.isnan(part[1])


def test_named_rewards_together_on_real_rollouts():
    rewards = [load_reward("math", gate="format"), load_reward("format", weight=0.5)]
    judgement = judge(rollouts(), rewards)
    assert [group.rewards_G.tolist() for group in judgement.groups] == [
        [1.5, 0.5, 0.0],  # the third is cut by the length limit: its layout does not hold
        [0.5, 1.5, 0.0],
    ]
    assert judgement.reports["math"].metrics["share_string"] == pytest.approx(1 / 3)
    for reward in rewards:
        reward.close()


def test_no_rollouts_no_groups():
    assert judge([], [named("a")]).groups == []


def test_exact_fractions_and_other_numbers_are_refused():
    def mine(completions):
        return [Fraction(1, 2)] * len(completions)

    with pytest.raises(RewardError, match="Fraction"):
        judge(rollouts(), [made(mine)])


def write(folder, text):
    file = folder / "rewards_of_mine.py"
    file.write_text(text, encoding="utf-8")
    return file


def test_an_optional_reward_may_judge_nothing_and_others_stand_in():
    def nothing(completions):
        return [None for _ in completions]

    def some(completions):
        return [1.0 if index % 2 else None for index in range(len(completions))]

    rewards = [
        Reward(name="nothing", function=nothing, is_optional=True),
        Reward(name="some", function=some, weight=2.0, is_optional=True),
    ]
    judgement = judge(rollouts(group_size=4), rewards)
    values = [float(v) for group in judgement.groups for v in group.rewards_G]
    assert [v for v in values if v == v] == [2.0] * (len(values) // 2)

    def broken(completions):
        raise OSError("down")

    with pytest.raises(RewardError, match="judged none"):
        judge(rollouts(), [made(broken, is_optional=True)])


def test_an_inline_reward_runs_in_the_callers_thread():
    seen = []

    def where(completions):
        seen.append(threading.get_ident())
        return [0.0 for _ in completions]

    judge(rollouts(), [made(where, is_inline=True)])
    judge(rollouts(), [made(where)])
    assert seen[0] == threading.get_ident() != seen[1]
