"""DPOTrainer: TRL's arguments become a recipe and parts, and the native loop is called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sparring.algorithms.registry import build_preference_loss
from sparring.compat.arguments import adopt
from sparring.compat.rows import is_conversational, read_pairs, read_rows, template_for
from sparring.compat.sft_table import DPOConfig
from sparring.compat.trainer import Trainer, epoch_steps, rows_per_step, shown_rows, template_name
from sparring.compat.unsloth_table import MOVED_DPO
from sparring.data.chat import ChatTemplate
from sparring.data.packing import pack_pairs
from sparring.data.pairs import PairSet
from sparring.data.rows import Rows
from sparring.errors import UserError
from sparring.models.reference import Reference, build_reference
from sparring.recipe import Recipe
from sparring.train import dpo
from sparring.train.step import score_values

LOSSES = ("sigmoid", "hinge", "ipo", "robust")
"""loss_type's that are built, beside 'sft' as a second one."""


class DPOTrainer(Trainer):
    """Trains by DPO; see TRL's DPOTrainer for what the arguments mean."""

    command = "dpo"
    _suffix = "DPO"

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        tokenizer: Any = None,
        peft_config: Any = None,
        quantization_config: Any = None,
        **others: Any,
    ) -> None:
        moved = {name: others.pop(name, None) for name in MOVED_DPO}
        args = adopt(args, DPOConfig, moved)
        super().__init__(
            model,
            args,
            processing_class=processing_class or tokenizer,
            peft_config=peft_config,
            quantization_config=quantization_config,
            max_tokens=None,
            others={**others, "ref_model": ref_model},
        )
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        rows = read_rows(train_dataset, "train_dataset")
        tokenizer = self.model.policy.tokenizer
        self._pair_template = template_for(
            tokenizer, None, name=template_name(tokenizer), has_messages=is_conversational(rows)
        )
        own = self.model.policy.max_tokens
        self._max_tokens = min(own, int(args.max_length)) if args.max_length else own
        self.pairs: PairSet = self._pairs(rows)
        self.eval_pairs: PairSet | None = None
        if eval_dataset is not None:
            self.eval_pairs = self._pairs(read_rows(eval_dataset, "eval_dataset"))
        self._source = rows
        self._reference: Reference | None = None
        self._recipe(Path("unused"))  # what the recipe refuses is told before the run

    def _pairs(self, rows: Rows) -> PairSet:
        return read_pairs(
            rows,
            self._pair_template,
            self._max_tokens,
            longest_prompt=self.args.max_prompt_length,
            longest_answer=self.args.max_completion_length,
        )

    def _tables(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "data": {"train": shown_rows(self._source)},
            "train": {"pairs_per_step": rows_per_step(self.args)},
            "loss": _loss(self.args),
            "eval": self._eval_tables(),
        }
        if found["eval"].get("every"):
            if self.eval_pairs is None:
                raise UserError("eval_strategy asks for evaluations, and eval_dataset is None")
            found["data"]["eval"] = f"(rows given in memory: {len(self.eval_pairs):,})"
        return found

    def _steps_of_epoch(self) -> float:
        return epoch_steps(len(self.pairs), self.args)

    def _template(self) -> ChatTemplate:
        return self._pair_template

    def _train(self, recipe: Recipe, *, resume: bool) -> None:
        if self.model.policy.model.has_adapter():
            self._reference = build_reference(self.model.policy.model)
        dpo.train(
            recipe,
            resume=resume,
            policy=self.model.policy,
            pairs=replace(self.pairs, is_ordered=self._is_sequential()),
            eval_pairs=self.eval_pairs if recipe.data.eval else None,
        )

    def _evaluate(self, recipe: Recipe) -> dict[str, float]:
        if self.eval_pairs is None:
            raise UserError("evaluate: the trainer was given no eval_dataset")
        loss = build_preference_loss(recipe.loss.name, recipe.loss.knobs)
        model = self.model.policy.model
        reference = None
        if not loss.keywords.get("reference_free"):
            if self._reference is None and self.run_dir is not None:
                raise UserError(
                    "evaluate: the reference of a model whose weights are all trained is let go"
                    " with its run; set eval_strategy, and the run evaluates as it goes"
                )
            reference = (self._reference or build_reference(model)).logprobs
        return score_values(
            model,
            pack_pairs(self.eval_pairs.pairs, max_tokens=recipe.train.micro_batch_tokens),
            loss,
            reference=reference,
        )


def _loss(args: Any) -> dict[str, Any]:
    """[loss] of loss_type, loss_weights, beta, label_smoothing. Raises UserError."""
    types = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    names = [name for name in types if name != "sft"]
    if len(names) != 1 or names[0] not in LOSSES:
        raise UserError(
            f"DPOConfig: loss_type = {args.loss_type!r} is refused: one of {', '.join(LOSSES)} is"
            " built, alone or with 'sft' beside it; native way: [loss] name and sft_coef"
        )
    weights = dict(zip(types, args.loss_weights or [1.0] * len(types), strict=True))
    if weights[names[0]] != 1.0:
        raise UserError(
            f"DPOConfig: loss_weights gives '{names[0]}' {weights[names[0]]}; it weighs 1 here:"
            " scale learning_rate, and the weight of 'sft' with it"
        )
    found: dict[str, Any] = {"name": names[0], "kl_coef": float(args.beta)}
    if args.label_smoothing:
        found["label_smoothing"] = float(args.label_smoothing)
    if args.reference_free:
        found["reference_free"] = True
    coef = float(weights.get("sft", 0.0)) + float(args.rpo_alpha or 0.0)
    return found | ({"sft_coef": coef} if coef else {})
