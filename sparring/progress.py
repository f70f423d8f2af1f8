"""What a person sees of a run while it goes on: a live display on a terminal, else plain lines.

Everything goes to standard error. Numbers come from the step's metrics by name and are only shown
here; records are written by runlog.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sparring.types import Group

SHOW_GROUP_EVERY = 5
MAX_SHOWN_CHARACTERS = 320
_BARS = "▁▂▃▄▅▆▇█"


class Progress:
    """The display of one run; use it as a context manager around the loop.

    title: what runs, and where. num_steps: of the whole run; start: steps done before. stream:
    standard error unless given. is_live: a redrawn display, by default where stream is a terminal.
    """

    def __init__(
        self,
        *,
        title: str,
        num_steps: int,
        start: int = 0,
        stream: TextIO | None = None,
        is_live: bool | None = None,
    ) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._is_live = self._console.is_terminal if is_live is None else is_live
        self._title, self._num_steps, self._step = title, num_steps, start
        self._metrics: dict[str, float] = {}
        self._rewards: deque[float] = deque(maxlen=60)
        self._durations: deque[float] = deque(maxlen=20)
        self._last_step_at = time.monotonic()
        self._phase, self._phase_detail = "starting", ""
        self._group: RenderableType | None = None
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._is_live:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=4,
                redirect_stdout=False,
                transient=False,
            )
            self._live.start()
        else:
            self.say(self._title)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._phase, self._phase_detail = "done", ""
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line for people."""
        self._console.print(Text(printable(text)), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that asks for attention."""
        self._console.print(Text(f"warning: {printable(text)}", style="yellow"), soft_wrap=True)

    def phase(self, name: str) -> None:
        """What the run is doing now: rollout, reward, train, eval."""
        self._phase, self._phase_detail = name, ""

    def rollout(self, num_finished: int, num_all: int, num_tokens: int) -> None:
        """How far sampling is; the shape of the engine's on_progress."""
        self._phase_detail = f"{num_finished}/{num_all} completions, {num_tokens} tokens"

    def pause(self) -> None:
        """Time that passed since the last step, an evaluation say, is none of the next step's."""
        self._last_step_at = time.monotonic()

    def step(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group] = ()) -> None:
        """Show step `step` (from 1): its numbers, and every few steps one of its groups."""
        now = time.monotonic()
        self._durations.append(now - self._last_step_at)
        self._last_step_at, self._step, self._metrics = now, step, dict(metrics)
        if "reward" in metrics:
            self._rewards.append(metrics["reward"])
        show = bool(groups) and (step == 1 or step % SHOW_GROUP_EVERY == 0)
        if not self._is_live:
            self.say(f"step {step}/{self._num_steps}  " + "  ".join(self._words()))
        if show:
            group = most_telling(groups)
            if self._is_live:
                self._group = side_by_side(group, step)
            else:
                self.say(as_lines(group))

    def seconds_left(self) -> float | None:
        """Time that the steps left will take at the pace of the last; None before the first."""
        if not self._durations:
            return None
        pace = sum(self._durations) / len(self._durations)
        return pace * max(0, self._num_steps - self._step)

    def _words(self) -> list[str]:
        words = [text for text, _ in _figures(self._metrics)]
        left = self.seconds_left()
        return words + ([f"left {format_seconds(left)}"] if left is not None else [])

    def _render(self) -> RenderableType:
        left = self.seconds_left()
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"step {self._step}/{self._num_steps}", style="bold"),
            ProgressBar(total=max(1, self._num_steps), completed=self._step, width=40),
            Text("" if left is None else f"{format_seconds(left)} left"),
            Text(f"{self._phase} {self._phase_detail}", style="dim"),
        )
        figures = Text("  ").join(
            Text(text, style=style) for text, style in _figures(self._metrics)
        )
        rows: list[RenderableType] = [Text(self._title, style="bold"), bar, figures]
        if len(self._rewards) > 1:
            rows.append(Text(f"reward {sparkline(self._rewards)}", style="green"))
        return Stack(*rows, *([self._group] if self._group is not None else []))


def _figures(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """The step's numbers as (text, style), those that are there."""
    have = metrics.get
    shown: list[tuple[str, str]] = []
    for name, style in (("reward", "bold green"), ("loss", ""), ("accuracy", "bold")):
        if (value := have(name)) is not None:
            shown.append((f"{name} {value:.3f}", style))
    shown += [
        (f"{name.removeprefix('reward/')} {value:.2f}", "green")
        for name, value in metrics.items()
        if name.startswith("reward/") and name.count("/") == 1
    ]
    if (length := have("completion_tokens")) is not None:
        shown.append((f"length {length:.0f}", ""))
    if (truncated := have("truncated")) is not None:
        shown.append((f"truncated {truncated:.0%}", "yellow" if truncated > 0.5 else ""))
    if (groups := have("groups")) and (silent := have("groups_without_signal")) is not None:
        style = "yellow" if silent == groups else ""
        shown.append((f"no signal {silent:.0f}/{groups:.0f}", style))
    prefix = "tokens_per_second/"
    for name, value in metrics.items():
        if name.startswith(prefix):
            shown.append((f"{name.removeprefix(prefix)} {value:,.0f} tokens/s", "cyan"))
    if (memory := have("memory_bytes")) is not None:
        shown.append((format_bytes(memory), "cyan"))
    return shown


def most_telling(groups: Sequence[Group]) -> Group:
    """The group whose rewards differ most, the first of several."""

    def spread(group: Group) -> float:
        judged = group.rewards_G[~group.rewards_G.isnan()]
        return float(judged.max() - judged.min()) if judged.numel() else -1.0

    return max(groups, key=spread)


def side_by_side(group: Group, step: int) -> RenderableType:
    """One group's completions beside each other: best, worst and one between, with rewards."""
    picked = _picked(group)
    table = Table(expand=True, show_edge=False, pad_edge=False)
    for index in picked:
        table.add_column(Text(_verdict(group, index)), overflow="fold", ratio=1)
    table.add_row(*(Text(_shortened(group.rollouts[index].text)) for index in picked))
    asked = Text(_shortened(_question(group)), style="dim", overflow="fold")
    return Panel(Stack(asked, table), title=Text(f"one group of step {step}"))


def as_lines(group: Group) -> str:
    """The same as text: the prompt, then a line a completion."""
    lines = [f"  prompt: {_one_line(_question(group))}"]
    lines += [
        f"  {_verdict(group, index)}: {_one_line(group.rollouts[index].text)}"
        for index in _picked(group)
    ]
    return "\n".join(lines)


def sparkline(values: Sequence[float] | deque[float]) -> str:
    """The values as a row of bars from their least to their greatest."""
    finite = [value for value in values if value == value]
    if not finite:
        return ""
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in finite)


def format_bytes(num_bytes: float) -> str:
    """1.5 GiB, 512 MiB, ..."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def format_seconds(seconds: float) -> str:
    """42s, 3m05s, 2h10m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def printable(text: str) -> str:
    """The text with every control character but the line break as a dot: a model wrote it."""
    return "".join(mark if mark.isprintable() or mark == "\n" else "·" for mark in text)


def _picked(group: Group) -> list[int]:
    """Indices of the best, a middle and the worst completion, those not judged last."""
    rewards = [-float("inf") if reward != reward else reward for reward in group.rewards_G.tolist()]
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index])
    return sorted({order[0], order[len(order) // 2], order[-1]}, key=order.index)


def _verdict(group: Group, index: int) -> str:
    reward = float(group.rewards_G[index])
    parts = " ".join(f"{name} {float(p[index]):g}" for name, p in group.reward_parts.items())
    total = "not judged" if reward != reward else f"reward {reward:g}"
    return f"{total} ({parts})" if len(group.reward_parts) > 1 else total


def _question(group: Group) -> str:
    messages = group.prompt.messages
    return str(messages[-1].get("content", "")) if messages else group.prompt.text


def _shortened(text: str) -> str:
    text = printable(text)
    if len(text) <= MAX_SHOWN_CHARACTERS:
        return text
    return f"{text[: MAX_SHOWN_CHARACTERS // 2]}\n...\n{text[-MAX_SHOWN_CHARACTERS // 2 :]}"


def _one_line(text: str) -> str:
    line = " ".join(printable(text).split())
    return line if len(line) <= 160 else f"{line[:76]} ... {line[-76:]}"
