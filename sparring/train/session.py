"""What every loop shares around its steps: records, display, checkpoints, resuming and the end.

A `Session` is an open run directory with a display. It knows no algorithm: loops tell it what
happened. Checkpoints go through resume.py, records through runlog, and what a person sees through
progress.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file

from sparring.environment import describe_environment
from sparring.errors import CheckpointError, UserError
from sparring.models.transformer import Decoder
from sparring.progress import MAX_SHOWN_CHARACTERS, Progress, format_bytes
from sparring.recipe import check_resume, load_recipe, recipe_tables, recipe_text
from sparring.runlog import FINAL, RECIPE, RunLog, holds_run
from sparring.train.evaluate import Evaluation
from sparring.train.memory import MemoryWatch
from sparring.train.optimizer import Optimizer
from sparring.train.out_of_memory import out_of_memory
from sparring.train.policy import Policy, save_policy
from sparring.train.resume import (
    Saver,
    find_latest,
    load_checkpoint,
    recipe_hash,
    restore_generators,
    save_checkpoint,
)
from sparring.train.step import StepMetrics
from sparring.types import Group

if TYPE_CHECKING:
    from sparring.recipe import Command, Recipe
    from sparring.rewards.verdicts import RewardReport

WEIGHTS_PART, WEIGHTS_FILE = "policy", "trainable.safetensors"
Phase = Literal["rollout", "reward", "train", "eval", "checkpoint"]


NOTHING: Mapping[str, Any] = MappingProxyType({})


@contextmanager
def open_session(recipe: Recipe, command: Command, *, resume: bool) -> Iterator[Session]:
    """Open the run directory of a recipe, new or to go on with, and its display.

    Raises RunDirectoryError where it holds a run and resume is not asked for, or where the recipe
    of a resumed run differs in more than it may. A new run that ends in a UserError before its
    first step leaves no records, so that the same command works once the input is mended.
    """
    began = time.monotonic()
    directory = Path(recipe.run.dir)
    checkpoint, notes = None, []
    if resume and holds_run(directory):
        old = load_recipe(str(directory / RECIPE), command=command)
        notes += [
            f"{change.key}: {change.old} -> {change.new}" for change in check_resume(old, recipe)
        ]
        checkpoint = find_latest(directory)
    start = 0 if checkpoint is None else load_checkpoint(checkpoint).step
    if resume and holds_run(directory):
        log = RunLog.reopen(directory, step=start)
    else:
        log = RunLog.create(directory)
    title = f"sparring {command}  {directory}"
    with log, Progress(title=title, num_steps=recipe.train.steps, start=start) as progress:
        session = Session(recipe, log, progress, checkpoint=checkpoint, start=start, began=began)
        if resume and checkpoint is None:
            session.say(f"{directory.absolute()} has no checkpoint: starting at step 0")
        elif resume:
            session.say(f"going on from {checkpoint} (step {start})")
        for note in notes:
            session.say(f"changed: {note}")
        log.recipe(recipe_text(recipe))
        log.environment(describe_environment())
        log.event(start, "resume" if resume else "start", "; ".join(notes))
        try:
            yield session
        except UserError:
            if not resume and not session.has_trained:
                log.discard()
            raise


class Session:
    """An open run: made by `open_session`. has_trained: a step of this process is recorded."""

    def __init__(
        self,
        recipe: Recipe,
        log: RunLog,
        progress: Progress,
        *,
        checkpoint: Path | None,
        start: int,
        began: float,
    ) -> None:
        self.recipe, self.log, self.progress = recipe, log, progress
        self.has_trained = False
        self.on_rollout = progress.rollout
        self._checkpoint, self._step = checkpoint, start
        self._last_checkpoint = start if checkpoint else -1
        self._began, self._seconds_before = began, 0.0
        self._memory: dict[str, Any] = {}
        self._phases: dict[str, float] = {}
        self._traceback_shown: set[str] = set()
        self._watch = MemoryWatch()

    def record_sandbox(self, levels: Mapping[str, Any]) -> None:
        """Write into environment.json what contains the programs that rewards run."""
        if levels:
            self.log.environment({**describe_environment(), "sandbox": dict(levels)})

    def say(self, line: str) -> None:
        """A line for people, not kept."""
        self.progress.say(line)

    def warn(self, line: str) -> None:
        """A warning: shown and kept."""
        self.progress.warn(line)
        self.log.event(self._step, "warning", line)

    def describe(self, policy: Policy) -> None:
        """Say what is trained."""
        trained = sum(p.numel() for p in policy.model.trainable_parameters().values())
        total = policy.model.num_weights
        dtype = str(policy.model.dtype).removeprefix("torch.")
        self.say(
            f"{policy.source}: {policy.model.config.family}, {total:,} parameters in {dtype}"
            f"{' (linear layers in NF4)' if policy.model.is_quantised else ''} on"
            f" {policy.model.device}, {trained:,} of them trained; end tokens"
            f" {list(policy.stop_ids)}"
        )

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time a phase of a step and show it; RunError where the device's memory ends."""
        self.progress.phase(name)
        start = time.monotonic()
        try:
            with out_of_memory(name):
                yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.monotonic() - start

    def report_reward(self, report: RewardReport) -> None:
        """Warn of what a reward did not judge, with the first traceback once a reward."""
        line = report.warning()
        if not line:
            return
        if report.first_traceback and report.name not in self._traceback_shown:
            self._traceback_shown.add(report.name)
            line += "\n" + report.first_traceback
        self.warn(line)

    def log_step(
        self,
        step: int,
        metrics: Mapping[str, float],
        update: StepMetrics | None,
        groups: Sequence[Group] | None,
    ) -> None:
        """Record and show a finished step (1-based) with what its phases took."""
        self._step, self.has_trained = step, True
        row = dict(metrics)
        if update is not None:
            row |= {
                "loss": update.loss,
                "gradient_norm": update.gradient_norm,
                "learning_rate": update.learning_rate,
                "num_loss_tokens": update.num_loss_tokens,
                "num_sequences": update.num_sequences,
                "num_micro_batches": update.num_micro_batches,
                "tokens_per_second/train": update.num_tokens / update.seconds,
                **update.values,
            }
        row |= {f"seconds/{name}": seconds for name, seconds in self._phases.items()}
        if groups and self._phases.get("rollout"):
            tokens = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
            row["tokens_per_second/rollout"] = tokens / self._phases["rollout"]
        row["memory_bytes"] = self._watch.peak_bytes()
        self._phases = {}
        self.log.step(step, row)
        self.progress.step(step, row, groups or ())

    def write_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep a step's completions."""
        self.log.rollouts(step, rows)

    def log_evaluation(
        self, step: int, evaluation: Evaluation, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Record and show an evaluation after `step` optimizer steps."""
        self.log.evaluation(step, evaluation.as_dict())
        self.log.rollouts(step, rows, kind="eval")
        greedy = "" if evaluation.greedy is None else f", greedy {evaluation.greedy:.1%}"
        self.say(
            f"evaluation at step {step}: accuracy {evaluation.accuracy:.1%} (95% interval"
            f" {evaluation.low:.1%} to {evaluation.high:.1%}, n = {evaluation.n}){greedy},"
            f" {evaluation.mean_tokens:.0f} tokens a completion"
        )
        self.progress.pause()

    def log_eval_loss(self, step: int, loss: float, values: Mapping[str, float] = NOTHING) -> None:
        """Record and show a held-out loss, and what else was found, after `step` steps."""
        self.log.evaluation(step, {"loss": loss, **values})
        words = [f"{name} {value:.4f}" for name, value in {"loss": loss, **values}.items()]
        self.say(f"evaluation at step {step}: {', '.join(words)}")
        self.progress.pause()

    def show_answers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record and show what the policy answers after `step` steps; see `shown_answers`."""
        if not rows:
            return
        self.log.rollouts(step, rows, kind="eval")
        for row in rows:
            asked, said, wanted = (
                " ".join(str(row[key]).split())[-MAX_SHOWN_CHARACTERS:]
                for key in ("prompt", "completion", "reference")
            )
            self.say(f"  asked    {asked}\n  answers  {said}\n  wanted   {wanted}")
        self.progress.pause()

    def remember(self, name: str, value: Any) -> None:
        """Keep a JSON value in every checkpoint from now on."""
        self._memory[name] = value

    def remembered(self, name: str) -> Any:
        """What an earlier part of this run remembered, or None."""
        return self._memory.get(name)

    def checkpoint_due(self, step: int) -> bool:
        """Whether this step (1-based) ends with a checkpoint."""
        every = self.recipe.run.checkpoint_every
        return bool(every) and step % every == 0

    def checkpoint(
        self,
        step: int,
        model: Decoder,
        optimizer: Optimizer,
        parts: Mapping[str, Saver] = NOTHING,
    ) -> None:
        """Write a checkpoint of the state after `step` steps, unless it is there already.

        parts: what the loop keeps beside policy and optimizer, a folder each; see `part`.
        """
        if step == self._last_checkpoint:
            return
        self.progress.phase("checkpoint")
        weights = {
            name: p.detach().contiguous() for name, p in model.trainable_parameters().items()
        }
        path = save_checkpoint(
            self.log.directory,
            step=step,
            parts={
                WEIGHTS_PART: lambda folder: save_file(weights, folder / WEIGHTS_FILE),
                **parts,
            },
            optimizer=optimizer,
            state={
                "recipe": recipe_hash(recipe_tables(self.recipe)),
                "memory": self._memory,
                "seconds": self.seconds(),
            },
            keep=self.recipe.run.keep_checkpoints,
        )
        self._last_checkpoint = step
        self.log.event(step, "checkpoint", str(path.name))

    def restore(self, model: Decoder, optimizer: Optimizer) -> int:
        """Load the checkpoint to go on from; returns the steps done (0: there is none)."""
        if self._checkpoint is None:
            return 0
        checkpoint = load_checkpoint(self._checkpoint)
        saved = load_file(checkpoint.path / WEIGHTS_PART / WEIGHTS_FILE)
        trained = model.trainable_parameters()
        if saved.keys() != trained.keys():
            differing = sorted(saved.keys() ^ trained.keys())[:5]
            raise CheckpointError(
                f"{checkpoint.path}: the weights are those of another model or [lora] section;"
                f" {', '.join(differing)} ... stand on one side only"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])
        model.refresh_shadows()
        optimizer.load_state(checkpoint.optimizer_tensors, checkpoint.optimizer_numbers)
        restore_generators(checkpoint)
        self._memory = dict(checkpoint.state["memory"])
        self._seconds_before = float(checkpoint.state["seconds"])
        return checkpoint.step

    def part(self, name: str) -> Path | None:
        """The folder of a part in the checkpoint that this run goes on from; None: from none."""
        return self._checkpoint / name if self._checkpoint else None

    def seconds(self) -> float:
        """Wall time of this run so far, parts before a resume included."""
        return self._seconds_before + time.monotonic() - self._began

    def save_final(self, policy: Policy) -> None:
        """Write final/."""
        save_policy(self.recipe, policy, self.log.directory / FINAL)

    def finish(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Write summary.json: what was measured, seconds, steps, peak memory; returns it."""
        peak = self._watch.highest_bytes
        summary = {
            **values,
            "steps": self.recipe.train.steps,
            "peak_memory_bytes": peak,
            "seconds": round(self.seconds(), 2),
        }
        self.log.summary(summary)
        self.log.event(self.recipe.train.steps, "done", "")
        self.say(
            f"done in {summary['seconds']:.0f} s, peak memory {format_bytes(peak)};"
            f" the policy is in {(self.log.directory / FINAL).absolute()}"
        )
        return summary
