"""What the three trainers share: they hold arguments, build a recipe and call a native loop.

There is no loop here, no hook and no callback. A run lies in its own directory with Sparring's
records; what a script reads afterwards is taken from them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sparring.compat.arguments import say_once
from sparring.compat.loading import set_checkpointing, take_model
from sparring.compat.model import FastModel
from sparring.compat.state import TrainerState, TrainOutput, history, mean_loss
from sparring.data.chat import ChatTemplate
from sparring.data.rows import Rows
from sparring.errors import UserError
from sparring.recipe import Command, Recipe, build_recipe
from sparring.runlog import CHECKPOINTS, holds_run, read_steps
from sparring.train.inference import tokenizer_settings
from sparring.train.policy import save_policy

KEEP_ALL = 1_000_000
"""Checkpoints to keep where save_total_limit is None."""

IN_MEMORY = "(rows given in memory)"
"""What a recipe records as its data where a script handed rows over."""

REFUSED: Mapping[str, tuple[str, str]] = {
    "callbacks": ("a loop has no hooks", "read metrics.jsonl of the run directory"),
    "optimizers": ("the optimizer is built from the arguments", "set optim and learning_rate"),
    "data_collator": ("rows are packed, not collated", "give rows with their columns"),
    "compute_metrics": ("no logits are kept", "measure with `sparring eval`"),
    "compute_loss_func": ("losses are functions of the recipe", "[loss] names one"),
    "optimizer_cls_and_kwargs": ("the optimizer is built from the arguments", "set optim"),
    "preprocess_logits_for_metrics": ("no logits are kept", "measure with `sparring eval`"),
    "tools": ("a completion calls no tools", "leave it out"),
    "rollout_func": ("rollouts come from Sparring's own engine", "leave it out"),
    "environment_factory": ("a completion acts in no environment", "judge it by a reward"),
    "ref_model": ("the reference is the policy at step 0, of the same weights", "leave it out"),
    "reward_processing_classes": ("a classifier comes with its tokenizer", "leave it out"),
}
"""Arguments of the trainers' constructors that are refused unless they are empty: why, native."""


class Trainer:
    """Base of GRPOTrainer, SFTTrainer and DPOTrainer. model, args and state are for reading.

    updates_per_step: optimizer updates of a native step, which is one batch of rollouts.
    """

    command: Command
    updates_per_step = 1
    _suffix: str

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        processing_class: Any,
        peft_config: Any,
        quantization_config: Any,
        max_tokens: int | None,
        others: Mapping[str, Any],
    ) -> None:
        _refuse_others(type(self).__name__, others)
        self.args = args
        values = args.to_dict()
        self.model: FastModel = take_model(
            model,
            peft_config=peft_config,
            tokenizer=processing_class,
            settings={**values, "max_tokens": max_tokens, "use_cpu": _uses_cpu(values)},
            quantization_config=quantization_config,
            seed=int(args.seed),
        )
        if not isinstance(model, str):
            _check_dtype(type(args).__name__, values, self.model.dtype)
        self.model.make_trainable()
        if isinstance(model, str) or not args.gradient_checkpointing:
            set_checkpointing(
                self.model, args.gradient_checkpointing or args.activation_checkpointing
            )
        name = model if isinstance(model, str) else self.model.policy.source
        self._directory = Path(args.output_dir or f"{Path(str(name)).name}-{self._suffix}")
        self.run_dir: Path | None = None
        self.state = TrainerState()
        self._recipe_of_run: Recipe | None = None

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        return self.model.policy.tokenizer

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, under its older name."""
        return self.model.policy.tokenizer

    def train(self, resume_from_checkpoint: Any = None) -> TrainOutput:
        """Run the loop. Raises UserError before anything is trained, RunError later.

        resume_from_checkpoint: True, or a path of the run or of its newest checkpoint, to go on
        with it.
        """
        began = time.monotonic()
        resume = resume_from_checkpoint or self.args.resume_from_checkpoint
        self.run_dir = _run_to_go_on(resume, self._directory) if resume else _free(self._directory)
        recipe = self._recipe(self.run_dir)
        self._recipe_of_run = recipe
        self._train(recipe, resume=bool(resume))
        return self._finish(recipe, time.monotonic() - began)

    def evaluate(self) -> dict[str, float]:
        """Measure the model as it stands on eval_dataset; names begin with eval_."""
        found = self._evaluate(self._recipe(self.run_dir or self._directory))
        values = {f"eval_{name}": float(value) for name, value in found.items()}
        self.state.log_history.append({**values, "step": self.state.global_step})
        return values

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the adapter, or every weight, with tokenizer, template and settings."""
        folder = Path(output_dir or self.run_dir or self._directory)
        template = self._template()
        policy = self.model.policy.speaking(template)
        save_policy(self._recipe_of_run or self._recipe(folder), policy, folder)

    def save_state(self) -> None:
        """Nothing left to do: the run directory holds every step."""

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print numbers, one a line."""
        for name, value in metrics.items():
            print(f"{split} {name} = {value}")

    def add_callback(self, callback: Any) -> None:
        """Refused, with the native way."""
        _refuse_others(type(self).__name__, {"callbacks": callback})

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        """Refused, with the native way."""
        self.model.push_to_hub()

    def _train(self, recipe: Recipe, *, resume: bool) -> None:
        raise NotImplementedError

    def _evaluate(self, recipe: Recipe) -> Mapping[str, float]:
        raise NotImplementedError

    def _tables(self) -> dict[str, Any]:
        """The recipe's tables that only this trainer knows."""
        raise NotImplementedError

    def _template(self) -> ChatTemplate:
        raise NotImplementedError

    def _steps_of_epoch(self) -> float:
        """Optimizer steps in which every row comes up once."""
        raise NotImplementedError

    def num_steps(self) -> int:
        """Steps of the run, each of updates_per_step: max_steps, or as many as the epochs take."""
        if self.args.max_steps > 0:
            steps: int = math.ceil(self.args.max_steps / self.updates_per_step)
            return steps
        epochs = float(self.args.num_train_epochs)
        return max(1, math.ceil(epochs * self._steps_of_epoch()))

    def _recipe(self, folder: Path) -> Recipe:
        args, decoder = self.args, self.model.policy.model
        tables: dict[str, Any] = {
            "model": {
                "path": self.model.policy.source,
                "max_tokens": self.model.policy.max_tokens,
                "dtype": str(self.model.dtype).removeprefix("torch."),
            },
            "data": {"train": IN_MEMORY, "template": _recorded(self._template())},
            "optimizer": _optimizer(args, self.num_steps() * self.updates_per_step),
            "train": {
                "steps": self.num_steps(),
                "checkpointing": decoder.checkpointing.mode,
                **({"micro_batch_tokens": "auto"} if self.model.device.type == "cuda" else {}),
            },
            "run": {
                "bitwise": bool(args.full_determinism) and self.model.device.type == "cuda",
                "dir": str(folder),
                "seed": int(args.seed),
                "checkpoint_every": self._every("save_strategy", "save_steps"),
                "keep_checkpoints": args.save_total_limit or KEEP_ALL,
            },
        }
        if decoder.has_adapter():
            lora = decoder.lora["policy"]
            targets = lora.target_modules
            tables["lora"] = {
                "rank": lora.rank,
                "alpha": float(lora.alpha),
                "rslora": lora.rslora,
                "target_modules": targets if isinstance(targets, str) else list(targets),
            }
        if decoder.is_quantised:
            tables["model"]["quantization"] = "nf4"
        for section, values in self._tables().items():
            there = tables.get(section, {})
            tables[section] = {**there, **values} if isinstance(values, dict) else values
        return build_recipe(tables, command=self.command)

    def _is_sequential(self) -> bool:
        strategy = self.args.train_sampling_strategy
        return str(getattr(strategy, "value", strategy)) == "sequential"

    def _every(self, strategy: str, steps: str) -> int:
        """Steps between two of something: by its strategy, its steps, or a share of all steps."""
        kind = str(getattr(getattr(self.args, strategy), "value", getattr(self.args, strategy)))
        if kind == "no":
            return 0
        if kind == "epoch":
            return max(1, math.floor(self._steps_of_epoch()))
        value = getattr(self.args, steps)
        value = self.args.logging_steps if value is None else value
        if value < 1:
            return max(1, math.ceil(float(value) * self.num_steps()))
        steps_between: int = math.ceil(int(value) / self.updates_per_step)
        return max(1, steps_between)

    def _eval_tables(self) -> dict[str, Any]:
        """[eval], where there is something to evaluate on and the arguments ask for it."""
        if self.args.evaluation_strategy is not None:
            self.args.eval_strategy = self.args.evaluation_strategy
        every = self._every("eval_strategy", "eval_steps")
        return {"every": every, "num_samples": 0} if every else {"num_samples": 0}

    def _finish(self, recipe: Recipe, seconds: float) -> TrainOutput:
        assert self.run_dir is not None, "called at the end of a run"
        steps = recipe.train.steps
        per_epoch = self._steps_of_epoch()
        strategy = str(getattr(self.args.logging_strategy, "value", self.args.logging_strategy))
        every = self._every("logging_strategy", "logging_steps") if strategy != "no" else 0
        rows = history(
            self.run_dir,
            every=every,
            is_first_logged=bool(self.args.logging_first_step),
            steps_per_epoch=per_epoch,
            updates_per_step=self.updates_per_step,
        )
        updates = steps * self.updates_per_step
        metrics = {
            "train_runtime": seconds,
            "train_steps_per_second": len(read_steps(self.run_dir)) / max(seconds, 1e-9),
            "train_loss": mean_loss(self.run_dir),
            "epoch": steps / per_epoch,
        }
        self.state = TrainerState(
            global_step=updates,
            max_steps=updates,
            epoch=steps / per_epoch,
            num_train_epochs=float(self.args.num_train_epochs),
            log_history=[*rows, {**metrics, "step": updates}],
        )
        return TrainOutput(updates, metrics["train_loss"], metrics)


def _recorded(template: ChatTemplate) -> str:
    """A conversation format as a recipe names it."""
    return "none" if template.source is None else template.name


def rows_per_step(args: Any) -> int:
    """Rows of one optimizer step."""
    return int(args.per_device_train_batch_size) * int(args.gradient_accumulation_steps)


def epoch_steps(num_rows: int, args: Any) -> float:
    """Optimizer steps of an epoch as transformers counts them: the last one may be short."""
    micro = math.ceil(num_rows / int(args.per_device_train_batch_size))
    return max(1, math.ceil(micro / int(args.gradient_accumulation_steps)))


def template_name(tokenizer: Any) -> str:
    """The conversation format that the model's own run recorded, else the tokenizer's."""
    return str(tokenizer_settings(tokenizer).get("template", "auto"))


def shown_rows(rows: Rows | None) -> str:
    """Rows in words, for a recipe."""
    return IN_MEMORY if rows is None else f"(rows given in memory: {len(rows):,})"


def _optimizer(args: Any, steps: int) -> dict[str, Any]:
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    warmup = args.warmup_steps
    if args.warmup_ratio:
        warmup = math.ceil(args.warmup_ratio * steps)
    elif 0 < warmup < 1:
        warmup = math.ceil(warmup * steps)
    return {
        "name": _rule(str(getattr(args.optim, "value", args.optim))),
        "learning_rate": float(args.learning_rate),
        "betas": [float(args.adam_beta1), float(args.adam_beta2)],
        "weight_decay": float(args.weight_decay),
        "schedule": "constant" if kind == "constant_with_warmup" else kind,
        "warmup_steps": 0 if kind == "constant" else int(warmup),
        "max_grad_norm": float(args.max_grad_norm),
    }


def _rule(name: str) -> str:
    """[optimizer] name: with moments of 8 bits where they are asked for and can be had."""
    if name.startswith("paged"):
        say_once(f"optim = '{name}': moments stay on the device, they are not paged out")
    if "8bit" not in name:
        return "adamw"
    if find_spec("bitsandbytes") is not None:
        return "adamw_8bit"
    say_once(
        f"optim = '{name}': bitsandbytes is not installed, so the moments are kept in float32, not"
        " in 8 bits: 6 bytes more for each trained number, and no rounding"
    )
    return "adamw"


def _check_dtype(title: str, values: Mapping[str, Any], dtype: torch.dtype) -> None:
    """A loaded model computes in its own dtype: say so where the arguments name another."""
    for name, asked in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        if not values.get(name) or dtype == asked:
            continue
        if dtype == torch.float32:
            say_once(f"{title}: {name} = True: the model was loaded in float32 and computes in it")
            continue
        raise UserError(
            f"{title}: {name} = True is refused: the model was loaded in {dtype}; load it with the"
            " other dtype, or leave it out"
        )


def _uses_cpu(values: Mapping[str, Any]) -> bool:
    return bool(values.get("use_cpu") or values.get("no_cuda"))


def _refuse_others(title: str, others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        if value is None or value == (None, None) or (isinstance(value, list) and not value):
            continue
        if name not in REFUSED:
            raise UserError(f"{title} takes no '{name}'")
        why, native = REFUSED[name]
        raise UserError(f"{title}: {name} is refused: {why}; {native}")


def _candidates(folder: Path) -> list[Path]:
    """The directory and those that later runs took beside it."""
    found = [folder]
    while holds_run(found[-1]):
        found.append(folder.with_name(f"{folder.name}-{len(found) + 1}"))
    return found


def _free(folder: Path) -> Path:
    """A directory without a run: this one, or the next beside it, said."""
    chosen = _candidates(folder)[-1]
    if chosen != folder:
        say_once(f"{folder} holds a run, which stays as it is: this one is in {chosen}")
    return chosen


def _run_to_go_on(resume: Any, folder: Path) -> Path:
    """The run that resume_from_checkpoint means. Raises UserError where there is none."""
    if isinstance(resume, str | os.PathLike):
        path = Path(resume)
        if path.parent.name == CHECKPOINTS:
            newest = max(
                (one.name for one in path.parent.iterdir() if one.name[0] != "."), default=""
            )
            if path.name != newest:
                raise UserError(
                    f"resume_from_checkpoint = {path} is not the newest of its run, {newest}, which"
                    " a run goes on from; remove the later ones, or give the run's directory"
                )
            path = path.parent.parent
        if not holds_run(path):
            raise UserError(f"resume_from_checkpoint = {path} is no run of Sparring's")
        return path
    runs = [one for one in _candidates(folder) if holds_run(one)]
    if not runs:
        raise UserError(f"resume_from_checkpoint = True, but {folder.absolute()} holds no run")
    return runs[-1]
