"""GRPOTrainer: TRL's arguments become a recipe and parts, and the native loop is called."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparring.compat.arguments import adopt, say_once
from sparring.compat.grpo_table import GRPOConfig
from sparring.compat.rewards import build_rewards, name_of
from sparring.compat.rows import is_conversational, read_prompts, read_rows, template_for
from sparring.compat.sampling import SamplingParams, native_sampling
from sparring.compat.trainer import Trainer, shown_rows, template_name
from sparring.data.chat import ChatTemplate
from sparring.data.prompts import PromptSet
from sparring.errors import UserError
from sparring.models.memory import free_bytes
from sparring.models.quantised import Quantised
from sparring.models.transformer import kv_bytes_per_token
from sparring.recipe import Recipe
from sparring.rewards.verdicts import judge
from sparring.train import grpo
from sparring.train.evaluate import judging_reward
from sparring.train.inputs import evaluation_sampling, max_prompt_tokens
from sparring.train.metrics import rollout_metrics
from sparring.train.policy import MAX_RUNNING, build_engine

STOP_NAMES = ("stop", "stop_strings")
"""Entries of generation_kwargs that are honoured."""


class GRPOTrainer(Trainer):
    """Trains by GRPO; see TRL's GRPOTrainer for what the arguments mean."""

    command = "grpo"
    _suffix = "GRPO"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
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
        args = adopt(args, GRPOConfig, {})
        rows = read_rows(train_dataset, "train_dataset")
        longest = args.vllm_max_model_length or args.vllm_max_model_len
        super().__init__(
            model,
            args,
            processing_class=processing_class or tokenizer,
            peft_config=peft_config,
            quantization_config=quantization_config,
            max_tokens=longest if isinstance(model, str) else None,
            others=others,
        )
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.reward_funcs = reward_funcs
        self._rows = rows
        self._eval_rows = None if eval_dataset is None else read_rows(eval_dataset, "eval_dataset")
        self._prompts_per_step, self._mini_steps = _batches(args)
        self.updates_per_step = self._mini_steps * int(args.num_iterations)
        build_rewards(reward_funcs, args.reward_weights, max_steps=1)
        self._recipe(Path("unused"))  # what the recipe refuses is told before the run

    def _tables(self) -> dict[str, Any]:
        args = self.args
        functions = self.reward_funcs
        functions = functions if isinstance(functions, list | tuple) else [functions]
        weights = args.reward_weights or [1.0] * len(functions)
        names = [one if isinstance(one, str) else name_of(one) for one in functions]
        return {
            "data": {"train": shown_rows(self._rows), **self._eval_data(), "reference": ""},
            "reward": [
                {"name": name, "weight": float(weight)}
                for name, weight in zip(names, weights, strict=True)
            ],
            "rollout": {
                "group_size": int(args.num_generations),
                "prompts_per_step": self._prompts_per_step,
                "max_completion_tokens": int(args.max_completion_length),
                "temperature": float(args.temperature),
                "top_p": float(args.top_p),
                "top_k": max(0, int(args.top_k or 0)),
                "stop": _stop(args.generation_kwargs),
                **_of_params(args.vllm_sampling_params, self.processing_class),
                "kv_memory": self._kv_memory(),
            },
            "train": {
                "passes": int(args.num_iterations),
                "mini_steps": self._mini_steps,
                "learn_truncated": not args.mask_truncated_completions,
            },
            "advantage": {"name": _advantage(args.scale_rewards)},
            "loss": _loss(args),
            "eval": {
                **self._eval_tables(),
                "num_samples": int(args.num_generations_eval or args.num_generations),
                "temperature": float(args.temperature),
            },
        }

    def _eval_data(self) -> dict[str, str]:
        is_asked = str(getattr(self.args.eval_strategy, "value", self.args.eval_strategy)) != "no"
        if not is_asked and self.args.evaluation_strategy in (None, "no"):
            return {}
        if self._eval_rows is None:
            raise UserError("eval_strategy asks for evaluations, and eval_dataset is None")
        return {"eval": shown_rows(self._eval_rows)}

    def _steps_of_epoch(self) -> float:
        return max(1, len(self._rows) // self._prompts_per_step)

    def _template(self) -> ChatTemplate:
        tokenizer = self.model.policy.tokenizer
        return template_for(
            tokenizer,
            self.args.chat_template_kwargs,
            name=template_name(tokenizer),
            has_messages=is_conversational(self._rows),
        )

    def _prompts(self, rows: Any, recipe: Recipe) -> PromptSet:
        return read_prompts(
            rows,
            self._template(),
            max_prompt_tokens=max_prompt_tokens(recipe, self.model.policy),
            longest=self.args.max_prompt_length,
        )

    def _train(self, recipe: Recipe, *, resume: bool) -> None:
        grpo.train(
            recipe,
            resume=resume,
            policy=self.model.policy,
            rewards=build_rewards(
                self.reward_funcs, self.args.reward_weights, max_steps=recipe.train.steps
            ),
            prompts=replace(
                self._prompts(self._rows, recipe),
                is_ordered=not self.args.shuffle_dataset or self._is_sequential(),
            ),
            eval_prompts=self._prompts(self._eval_rows, recipe) if recipe.data.eval else None,
        )

    def _evaluate(self, recipe: Recipe) -> dict[str, float]:
        if self._eval_rows is None:
            raise UserError("evaluate: the trainer was given no eval_dataset")
        prompts = self._prompts(self._eval_rows, recipe)
        policy = self.model.policy.speaking(prompts.template)
        num_samples = recipe.eval.num_samples
        engine = build_engine(recipe, policy, most_rollouts=len(prompts) * num_samples)
        rollouts = engine.generate(
            prompts.prompts, evaluation_sampling(recipe), num_samples=num_samples
        )
        rewards = build_rewards(self.reward_funcs, self.args.reward_weights, max_steps=1)
        try:
            judgement = judge(rollouts, rewards, trainer_state={"step": self.state.global_step})
        finally:
            for reward in rewards:
                reward.close()
        found = rollout_metrics(judgement.groups, judgement.reports, engine.stats)
        name = judging_reward(rewards)
        return {
            "reward": found["reward"],
            "reward_std": found["reward_std"],
            f"rewards/{name}/mean": found[f"reward/{name}"],
            "completions/mean_length": found["completion_tokens"],
            "completions/clipped_ratio": found["truncated"],
        }

    def _kv_memory(self) -> int | str:
        """Bytes for keys and values: the share of the card that the script names, less weights."""
        share = self.model.kv_share
        if share is None and self.args.use_vllm:
            share = float(self.args.vllm_gpu_memory_utilization)
        if share is None:
            return "auto"
        policy = self.model.policy
        decoder, device = policy.model, policy.model.device
        weights = sum(p.numel() * p.element_size() for p in decoder.parameters())
        weights += sum(one.num_bytes for one in decoder.modules() if isinstance(one, Quantised))
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
        else:
            total = free_bytes(device) + weights
        running = min(self._prompts_per_step * int(self.args.num_generations), MAX_RUNNING)
        per_token = kv_bytes_per_token(decoder.config, decoder.dtype)
        useful = (running * policy.max_tokens + 4096) * per_token
        left = int(share * total) - weights
        if left < 2 * policy.max_tokens * per_token:
            raise UserError(
                f"gpu_memory_utilization = {share} of {total / 2**30:.1f} GiB leaves"
                f" {max(0, left) / 2**30:.2f} GiB for keys and values beside"
                f" {weights / 2**30:.1f} GiB of weights; raise it, or lower max_seq_length"
            )
        return left if left < useful else "auto"


def _batches(args: Any) -> tuple[int, int]:
    """Prompts of a generation and the updates on them, by TRL's arithmetic on one process.

    A generation smaller than an update is made whole. Raises UserError.
    """
    group, accumulation = int(args.num_generations), int(args.gradient_accumulation_steps)
    if group < 2:
        raise UserError(
            f"GRPOConfig: num_generations = {group} is refused: a completion is measured against"
            " its group, which takes at least 2"
        )
    if args.generation_batch_size is not None and args.steps_per_generation is not None:
        raise UserError("GRPOConfig: give generation_batch_size or steps_per_generation, not both")
    batch = int(args.per_device_train_batch_size)
    slices = args.steps_per_generation or accumulation
    if args.generation_batch_size is not None:
        slices, rest = divmod(int(args.generation_batch_size), batch)
        if rest or not slices:
            raise UserError(
                f"GRPOConfig: generation_batch_size = {args.generation_batch_size} is no multiple"
                f" of per_device_train_batch_size = {batch}"
            )
    if max(slices, accumulation) % min(slices, accumulation):
        raise UserError(
            f"GRPOConfig: steps_per_generation = {slices} beside gradient_accumulation_steps ="
            f" {accumulation} is refused: an update is made of whole generations, or a generation"
            " of whole updates; give a divisor or a multiple, or leave it out"
        )
    if batch * slices % group:
        raised = math.ceil(batch / group) * group
        say_once(
            f"per_device_train_batch_size = {batch} x {slices} is no multiple of num_generations ="
            f" {group}: it is raised to {raised}, as Unsloth does"
        )
        batch = raised
    updates = max(1, slices // accumulation)
    if batch * accumulation % group and updates > 1:
        raise UserError(
            f"GRPOConfig: an update has {batch} x {accumulation} completions, no multiple of"
            f" num_generations = {group}: a group is not split over updates; raise"
            " per_device_train_batch_size"
        )
    return batch * max(slices, accumulation) // group, updates


def _stop(given: Any) -> list[str]:
    values = dict(given or {})
    found: list[str] = []
    for name in STOP_NAMES:
        stop = values.pop(name, None) or []
        found += [stop] if isinstance(stop, str) else list(stop)
    if values:
        raise UserError(
            f"GRPOConfig: generation_kwargs holds {', '.join(values)}, which is refused: what is"
            " sampled is what the trainer scores; only stop strings are taken"
            f" ({', '.join(STOP_NAMES)}), and GRPOConfig has the rest"
        )
    return found


def _of_params(params: Any, tokenizer: Any) -> dict[str, Any]:
    """[rollout] keys that SamplingParams set; the recipe's own rules hold for them."""
    if params is None:
        return {}
    if not isinstance(params, SamplingParams):
        raise UserError(
            f"GRPOConfig: vllm_sampling_params is a {type(params).__name__}; import SamplingParams"
            " from sparring.compat"
        )
    values = native_sampling(params, room=1, seed=0)
    if values.min_p:
        raise UserError(
            f"GRPOConfig: vllm_sampling_params has min_p = {values.min_p}, which is refused: the"
            " trainer's distribution has no such cut, so the loss would compare two; take 0"
        )
    special = set(tokenizer.all_special_tokens)
    stop = [text for text in values.stop if text not in special]  # those end a completion anyway
    if stop and params.values["include_stop_str_in_output"]:
        raise UserError(
            "GRPOConfig: include_stop_str_in_output = True is refused: rewards see the text before"
            f" a stop string ({stop[0]!r}); leave it out"
        )
    found: dict[str, Any] = {"stop": stop} if stop else {}
    if values.top_p != 1.0:
        found["top_p"] = values.top_p
    return found | ({"top_k": values.top_k} if values.top_k else {})


def _advantage(scale: Any) -> str:
    name = {True: "group", False: "none"}.get(scale, scale)
    return "mean" if name == "none" else str(name)


def _loss(args: Any) -> dict[str, Any]:
    """[loss] of loss_type, epsilon, beta. Raises UserError for a pair that is no loss here."""
    name = str(args.loss_type)
    low = float(args.epsilon)
    high = low if args.epsilon_high is None else float(args.epsilon_high)
    if args.importance_sampling_level == "sequence":
        if name != "grpo":
            raise UserError(
                "GRPOConfig: importance_sampling_level = 'sequence' is GSPO with loss_type ="
                f" 'grpo'; with '{name}' long completions would weigh more; set loss_type = 'grpo'"
            )
        name = "gspo"
    found: dict[str, Any] = {"name": name, "clip_low": low, "clip_high": high}
    if name == "cispo":
        del found["clip_low"]
    beta = float(args.beta)
    return found | {"kl_coef": beta, "kl_unbiased": bool(args.use_bias_correction_kl and beta)}
