"""SFTTrainer and train_on_responses_only: arguments become a recipe, the native loop is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparring.compat.arguments import adopt
from sparring.compat.rows import read_dialogues, read_rows, responses_only, template_for
from sparring.compat.sft_table import SFTConfig
from sparring.compat.trainer import Trainer, epoch_steps, rows_per_step, shown_rows, template_name
from sparring.compat.unsloth_table import MOVED_SFT
from sparring.data.chat import ChatTemplate
from sparring.data.conversations import ConversationSet
from sparring.data.rows import Rows, build_rows
from sparring.errors import UserError
from sparring.recipe import Recipe
from sparring.train import sft


class SFTTrainer(Trainer):
    """Trains by SFT; see TRL's SFTTrainer for what the arguments mean."""

    command = "sft"
    _suffix = "SFT"

    def __init__(
        self,
        model: Any,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        tokenizer: Any = None,
        peft_config: Any = None,
        quantization_config: Any = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        **others: Any,
    ) -> None:
        moved = {name: others.pop(name, None) for name in MOVED_SFT}
        args = adopt(args, SFTConfig, moved)
        limit = args.max_seq_length or args.max_length
        super().__init__(
            model,
            args,
            processing_class=processing_class or tokenizer,
            peft_config=peft_config,
            quantization_config=quantization_config,
            max_tokens=None,
            others=others,
        )
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        own = self.model.policy.max_tokens
        self._max_tokens = min(own, int(limit)) if limit else own
        self._speak(args)
        rows = _formatted(read_rows(train_dataset, "train_dataset"), formatting_func, args)
        self.rows: ConversationSet = self._dialogues(rows)
        self.eval_rows: ConversationSet | None = None
        if eval_dataset is not None:
            held_out = _formatted(read_rows(eval_dataset, "eval_dataset"), formatting_func, args)
            self.eval_rows = self._dialogues(held_out)
        self._source = rows
        self._recipe(Path("unused"))  # what the recipe refuses is told before the run

    def _speak(self, args: Any) -> None:
        """The tokenizer with the end token and the chat template that the arguments name."""
        tokenizer = self.model.policy.tokenizer
        if args.eos_token is not None:
            if tokenizer.convert_tokens_to_ids(args.eos_token) in (None, tokenizer.unk_token_id):
                raise UserError(
                    f"SFTConfig: eos_token = {args.eos_token!r} is no token of the model"
                )
            tokenizer.eos_token = args.eos_token
        if args.chat_template_path is not None:
            path = Path(args.chat_template_path)
            file = path if path.is_file() else path / "chat_template.jinja"
            if not file.is_file():
                raise UserError(
                    f"SFTConfig: chat_template_path = {path} is neither a .jinja file nor a folder"
                    " with chat_template.jinja"
                )
            tokenizer.chat_template = file.read_text(encoding="utf-8")

    def _dialogues(self, rows: Rows) -> ConversationSet:
        args = self.args
        tokenizer = self.model.policy.tokenizer
        return read_dialogues(
            rows,
            lambda has_messages: template_for(
                tokenizer, None, name=template_name(tokenizer), has_messages=has_messages
            ),
            text_field=args.dataset_text_field,
            completion_only=args.completion_only_loss,
            assistant_only=bool(args.assistant_only_loss),
            max_tokens=self._max_tokens,
        )

    def _per_step(self) -> int:
        """Rows of a step; packing counts full sequences, so it takes as many rows as they hold."""
        rows = rows_per_step(self.args)
        if not self.args.packing:
            return rows
        tokens = sum(len(sample.token_ids) for sample in self.rows.conversations)
        return max(1, round(rows * self._max_tokens * len(self.rows) / tokens))

    def _tables(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "data": {"train": shown_rows(self._source)},
            "train": {"conversations_per_step": self._per_step()},
            "eval": self._eval_tables(),
        }
        if found["eval"].get("every"):
            if self.eval_rows is None:
                raise UserError("eval_strategy asks for evaluations, and eval_dataset is None")
            found["data"]["eval"] = f"(rows given in memory: {len(self.eval_rows):,})"
        return found

    def _steps_of_epoch(self) -> float:
        if self.args.packing:
            return max(1.0, len(self.rows) / self._per_step())
        return epoch_steps(len(self.rows), self.args)

    def _template(self) -> ChatTemplate:
        return self.rows.template

    def _train(self, recipe: Recipe, *, resume: bool) -> None:
        sft.train(
            recipe,
            resume=resume,
            policy=self.model.policy,
            rows=replace(self.rows, is_ordered=self._is_sequential()),
            held_out=self.eval_rows if recipe.data.eval else None,
        )

    def _evaluate(self, recipe: Recipe) -> dict[str, float]:
        if self.eval_rows is None:
            raise UserError("evaluate: the trainer was given no eval_dataset")
        return {"loss": sft.held_out_loss(recipe, self.model.policy, self.eval_rows)}


def train_on_responses_only(
    trainer: SFTTrainer,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,  # noqa: ARG001 - parts are always matched in any spelling
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,  # noqa: ARG001 - rows are tokenised already
) -> SFTTrainer:
    """The trainer with loss on answers alone: behind response_part, up to instruction_part.

    Both are the texts that the chat template writes before a turn. Raises UserError or DataError.
    """
    if tokenizer is not None or return_function:
        raise UserError(
            "train_on_responses_only takes the trainer and the two parts; tokenizer and"
            " return_function are refused, since the trainer's rows are tokenised already"
        )
    if not instruction_part or not response_part:
        raise UserError(
            "train_on_responses_only needs instruction_part and response_part: the texts that the"
            " chat template writes before a question and before an answer"
        )
    trainer.rows = responses_only(trainer.rows, instruction_part, response_part)
    if trainer.eval_rows is not None:
        trainer.eval_rows = responses_only(trainer.eval_rows, instruction_part, response_part)
    return trainer


def _formatted(rows: Rows, function: Callable[[dict[str, Any]], str] | None, args: Any) -> Rows:
    """The rows as formatting_func writes them: one text each."""
    if function is None:
        return rows
    texts = []
    for index, row in enumerate(rows):
        text = function(row)
        if not isinstance(text, str):
            raise UserError(
                f"{rows.where(index)}: formatting_func gave a {type(text).__name__}; it is called"
                " with one row and gives one text"
            )
        texts.append({args.dataset_text_field: text})
    return build_rows(texts, name=rows.source)
