"""One call of a reward function over a batch: side by side, under a wall clock, answers checked.

A synchronous function runs in a thread of its own, an async one on an event loop that lives as long
as its reward, an isolated one in a worker process. A thread that hangs cannot be ended, only left
behind: isolate = true is the remedy, since a process can be killed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import math
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparring.errors import RewardError, SparringError
from sparring.rewards.isolation import IsolatedFunction, RemoteError
from sparring.rewards.signatures import Parameters, Samples, bind, parameters_of

if TYPE_CHECKING:
    from sparring.rewards.verdicts import Reward


class Runtime:
    """What a reward keeps alive between calls: its event loop, its worker process.

    left_behind: set once the last call that ran over its time has come to an end after all.
    """

    def __init__(self) -> None:
        self._loop: EventLoopThread | None = None
        self._isolated: IsolatedFunction | None = None
        self.left_behind: threading.Event | None = None

    def loop(self) -> EventLoopThread:
        """The reward's event loop, started at its first use."""
        if self._loop is None:
            self._loop = EventLoopThread()
        return self._loop

    def drop_loop(self) -> None:
        """Leave the event loop behind: something on it does not yield."""
        self._loop = None

    def isolate(self, name: str, knobs: Mapping[str, Any]) -> tuple[str, IsolatedFunction]:
        """Start a worker process for the reward `name`; returns its short name and its stand-in."""
        self._isolated = IsolatedFunction(name, knobs)
        return self._isolated.short_name, self._isolated

    def close(self) -> None:
        """End the loop and the worker."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None
        if self._isolated is not None:
            self._isolated.close()


class EventLoopThread:
    """An asyncio loop in a daemon thread, so that clients of a reward outlive a single call."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run_loop, args=(self._loop,), daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _stop_loop, self._loop, self._thread)

    def run(self, coroutine: Any, seconds: float) -> Any:
        """The coroutine's result. Raises TimeoutError past `seconds` and cancels the task."""
        future = asyncio.run_coroutine_threadsafe(_awaited(coroutine), self._loop)
        try:
            return future.result(timeout=seconds)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise

    def is_responsive(self, seconds: float = 1.0) -> bool:
        """Whether the loop still takes turns, or is blocked by code that does not yield."""
        answered = threading.Event()
        self._loop.call_soon_threadsafe(answered.set)
        return answered.wait(seconds)

    def close(self) -> None:
        """Stop the loop."""
        self._finalizer()


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        pending = asyncio.all_tasks(loop)
        for task in pending:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
    finally:
        loop.close()


def _stop_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=1.0)


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What one call gave: a finite number or None for each sample, and why where None."""

    values: list[float | None]
    reasons: dict[str, int] = field(default_factory=dict)
    first_traceback: str = ""
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)


class CallLog:
    """Collects what one call logs; a call that was given up writes into a log nobody reads."""

    def __init__(self, name: str, num_samples: int) -> None:
        self._name, self._num_samples = name, num_samples
        self.extras: dict[str, list[Any]] = {}
        self.metrics: dict[str, float] = {}

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Keep one value a sample under `column`, for the record of rollouts."""
        if len(values) != self._num_samples:
            raise RewardError(
                f"reward '{self._name}': log_extra('{column}') got {len(values)} values for "
                f"{self._num_samples} completions"
            )
        self.extras[str(column)] = list(values)

    def log_metric(self, name: str, value: float) -> None:
        """Keep one number of this batch under `name`."""
        self.metrics[str(name)] = float(value)


def call_all(
    rewards: Sequence[Reward], samples: Samples, trainer_state: Mapping[str, Any]
) -> dict[str, Verdict]:
    """Call all rewards side by side; those that take `judged` come after the others, with their
    values.

    `judged` maps names to values, the reward that decides on correctness (the first required one,
    else the first) in front. Raises RewardError where a function breaks its contract.
    """
    signatures = {reward.name: _signature(reward) for reward in rewards}
    verdicts: dict[str, Verdict] = {}
    later = [reward for reward in rewards if "judged" in signatures[reward.name].names]
    first = [reward for reward in rewards if reward not in later]
    decisive = next((reward for reward in rewards if reward.required), rewards[0])
    order = sorted(rewards, key=lambda reward: reward is not decisive)
    for batch in (first, later):
        judged = {
            reward.name: list(verdicts[reward.name].values)
            for reward in order
            if reward.name in verdicts
        }
        offered = _offered(samples, trainer_state)
        if batch is later and judged:
            offered["judged"] = judged
        calls = [Call(reward, signatures[reward.name], samples, offered) for reward in batch]
        for call in sorted(calls, key=lambda call: call.reward.is_inline):
            call.start()
        for call in calls:
            verdicts[call.reward.name] = call.finish()
    return {reward.name: verdicts[reward.name] for reward in rewards}


def _signature(reward: Reward) -> Parameters:
    if isinstance(reward.function, IsolatedFunction):
        return reward.function.parameters
    return parameters_of(reward.function)


def _offered(samples: Samples, trainer_state: Mapping[str, Any]) -> dict[str, Any]:
    offered: dict[str, Any] = {
        "prompts": samples.prompts,
        "completions": samples.completions,
        "prefills": samples.prefills,
        "finish_reasons": samples.finish_reasons,
        "group_ids": samples.group_ids,
        "trainer_state": dict(trainer_state),
    }
    if samples.completion_ids is not None:
        offered["completion_ids"] = samples.completion_ids
    return offered


class Call:
    """One reward function called once: start() sets it going, finish() waits and checks."""

    def __init__(
        self, reward: Reward, parameters: Parameters, samples: Samples, offered: Mapping[str, Any]
    ) -> None:
        self.reward = reward
        self._num_samples = len(samples)
        self._log = CallLog(reward.name, len(samples))
        self._is_async = parameters.is_async
        offered = {**offered, "log_extra": self._log.log_extra, "log_metric": self._log.log_metric}
        self._arguments = bind(reward.name, parameters, offered, samples.columns, reward.knobs)
        if reward.is_fitted:
            for knob in reward.knobs:
                del self._arguments[knob]
        self._outcome: tuple[Any, BaseException | None] | None = None
        self._is_blocked = False
        self._ended = 0.0
        self._done = threading.Event()
        self._started = 0.0

    def start(self) -> None:
        """Set the call going in a thread of its own, unless an earlier one still hangs."""
        self._started = time.monotonic()
        behind = self.reward.runtime.left_behind
        if behind is not None and not behind.is_set():
            self._is_blocked = True
            return
        if self.reward.is_inline:
            self._run()
            return
        threading.Thread(target=self._run, name=f"reward {self.reward.name}", daemon=True).start()

    def finish(self) -> Verdict:
        """Wait, at most until the reward's wall clock, and turn the outcome into a Verdict."""
        limit = self.reward.timeout_seconds
        if self._is_blocked:
            return self._nothing("busy: a call that timed out still runs; isolate = true ends it")
        self._done.wait(
            max(0.0, self._started + limit + 2.0 * self._keeps_clock - time.monotonic())
        )
        seconds = (self._ended or time.monotonic()) - self._started
        if self._outcome is None:
            self.reward.runtime.left_behind = self._done
            return self._nothing(f"timeout after {limit:g} s", seconds=seconds)
        value, error = self._outcome
        if isinstance(error, SparringError):
            raise error
        if isinstance(error, TimeoutError) and self._keeps_clock:
            return self._nothing(f"timeout after {limit:g} s", seconds=seconds)
        if isinstance(error, RemoteError):
            return self._nothing(f"error: {error.kind}", str(error), seconds)
        if error is not None:
            trace = "".join(traceback.format_exception(from_function(error)))
            return self._nothing(f"error: {type(error).__name__}", trace, seconds)
        verdict = check_values(self.reward.name, value, self._num_samples)
        verdict.seconds = seconds
        verdict.metrics, verdict.extras = self._log.metrics, self._log.extras
        return verdict

    @property
    def _keeps_clock(self) -> bool:
        """Whether the call ends by itself when its time is over: on a loop, or in a worker."""
        return self._is_async or isinstance(self.reward.function, IsolatedFunction)

    def _run(self) -> None:
        try:
            self._outcome = (self._value(), None)
        except BaseException as error:  # foreign code: whatever it raises is reported by finish()
            self._outcome = (None, error)
        finally:
            self._ended = time.monotonic()
            self._done.set()

    def _value(self) -> Any:
        function, seconds = self.reward.function, self.reward.timeout_seconds
        if isinstance(function, IsolatedFunction):
            return function(self._arguments, num_samples=self._num_samples, seconds=seconds)
        value = None if self._is_async else function(**self._arguments)
        if self._is_async or inspect.isawaitable(value):
            loop = self.reward.runtime.loop()
            awaitable = function(**self._arguments) if self._is_async else value
            try:
                return loop.run(awaitable, seconds)
            except TimeoutError:
                if not loop.is_responsive():
                    self.reward.runtime.drop_loop()
                raise
        return value

    def _nothing(self, reason: str, trace: str = "", seconds: float = 0.0) -> Verdict:
        return Verdict(
            values=[None] * self._num_samples,
            reasons={reason: self._num_samples},
            first_traceback=trace,
            seconds=seconds,
        )


def from_function(error: BaseException) -> BaseException:
    """The error with Sparring's own frames cut off the top of its traceback."""
    own = (__file__, str(Path(__file__).with_name("isolation_worker.py")))
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in own:
        trace = trace.tb_next
    return error.with_traceback(trace)


def check_values(name: str, value: Any, num_samples: int) -> Verdict:
    """Turn what a function returned into finite floats and None.

    Takes a list, tuple, array or tensor of numbers, booleans and None. Raises RewardError naming
    the function for anything else or for a wrong length.
    """
    value = plain_values(value)
    if not isinstance(value, list):
        raise RewardError(
            f"reward '{name}' returned {type(value).__name__}; it must return a list with one "
            "number or None for each completion"
        )
    if len(value) != num_samples:
        raise RewardError(
            f"reward '{name}' returned {len(value)} values for {num_samples} completions; "
            "it must return one for each, in their order"
        )
    values: list[float | None] = []
    reasons: dict[str, int] = {}
    for index, item in enumerate(value):
        number = _number(name, item, index)
        if number is not None and not math.isfinite(number):
            reason = "NaN" if math.isnan(number) else "infinity"
            number = None
        else:
            reason = "None"
        if number is None:
            reasons[reason] = reasons.get(reason, 0) + 1
        values.append(number)
    return Verdict(values=values, reasons=reasons)


def plain_values(value: Any) -> Any:
    """A tuple, array or tensor as a list, its scalars as Python numbers; anything else as it is."""
    if hasattr(value, "tolist") and not isinstance(value, list | tuple):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return value
    return [
        _scalar(item) if hasattr(item, "item") and not isinstance(item, int | float) else item
        for item in value
    ]


def _number(name: str, item: Any, index: int) -> float | None:
    if item is None:
        return None
    if isinstance(item, int | float):
        try:
            return float(item)
        except OverflowError:
            return math.inf
    raise RewardError(
        f"reward '{name}' returned {item!r} ({type(item).__name__}) for completion {index}; "
        "only numbers and None are allowed"
    )


def _scalar(item: Any) -> Any:
    convert: Callable[[], Any] = item.item
    try:
        return convert()
    except (ValueError, RuntimeError, TypeError):
        return item
