"""The model of a script: a policy with the methods that Unsloth and PEFT put on theirs.

It holds one native policy; every method is a call of a native function. Nothing is trained here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.compat.arguments import say_once, with_defaults
from sparring.compat.sampling import (
    CompletionOutput,
    RequestOutput,
    SamplingParams,
    native_sampling,
)
from sparring.compat.unsloth_table import GENERATE, MERGED
from sparring.errors import UserError
from sparring.export.merged import save_merged
from sparring.models import checkpoint
from sparring.rollout.sampler import Sampling
from sparring.train.inference import sampling_engine, template_of
from sparring.train.policy import Policy
from sparring.types import Prompt, Rollout

POLICY = "policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRequest:
    """An adapter to generate with: made by load_lora, given to fast_generate."""

    lora_name: str
    lora_path: str


class ModelConfig:
    """A checkpoint's config.json as attributes. What is set on it afterwards changes nothing."""

    def __init__(self, source: Mapping[str, Any]) -> None:
        vars(self).update(source)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("use_cache", "pretraining_tp", "pad_token_id", "bos_token_id"):
            raise UserError(
                f"model.config.{name} cannot be set: the weights were made for the value that"
                " config.json says; change the file and load it again"
            )
        say_once(f"model.config.{name} = {value!r} changes nothing here")
        vars(self)[name] = value

    def to_dict(self) -> dict[str, Any]:
        """The whole of it."""
        return dict(vars(self))


class FastModel:
    """A policy under the names that scripts use.

    policy: the native one. seed: of sampling without a seed. kv_share: of the device's memory for
    weights, keys and values together while sampling; None: as the run's recipe says. max_rank: the
    highest rank of an adapter. trains_all: every weight is trained, not an adapter.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        seed: int = 3407,
        kv_share: float | None = None,
        max_rank: int | None = None,
        trains_all: bool = False,
    ) -> None:
        self.policy, self.kv_share, self.max_rank = policy, kv_share, max_rank
        self.trains_all = trains_all
        self.config = ModelConfig(policy.model.config.source)
        self._seeds = random.Random(seed)
        self._adapters: dict[str, str] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.policy.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.policy.model.dtype

    @property
    def max_seq_length(self) -> int:
        """Tokens of a prompt and its completion together."""
        return self.policy.max_tokens

    def train(self, mode: bool = True) -> FastModel:  # noqa: ARG002 - the signature of torch
        """Nothing to switch: no layer behaves otherwise in training."""
        return self

    def eval(self) -> FastModel:
        """Nothing to switch: no layer behaves otherwise in training."""
        return self

    def to(self, device: Any = None, **given: Any) -> FastModel:
        """The model itself: it stays where, and in the dtype in which, it was loaded."""
        wanted = device if device is not None else given.get("device")
        here = self.device
        if given.get("dtype") is not None or isinstance(wanted, torch.dtype):
            raise UserError("a model keeps the dtype that it was loaded in; give dtype there")
        if wanted is not None and torch.device(wanted).type != here.type:
            raise UserError(f"the model is on {here} and stays there; give device_map to load it")
        return self

    def cuda(self) -> FastModel:
        """As to("cuda")."""
        return self.to("cuda")

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Layers are computed again in backward."""
        self.policy.model.set_checkpointing("layers")

    def enable_input_require_grads(self) -> None:
        """Nothing to switch: gradients reach an adapter anyway."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """Every parameter."""
        return list(self.policy.model.parameters())

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Every parameter with its name here."""
        return list(self.policy.model.named_parameters())

    def num_parameters(self) -> int:
        """How many numbers there are, those of four bits left out."""
        return self.get_nb_trainable_parameters()[1]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers that are trained, and all (those of four bits left out)."""
        trained = sum(p.numel() for p in self.policy.model.trainable_parameters().values())
        return trained, sum(p.numel() for p in self.policy.model.parameters())

    def print_trainable_parameters(self) -> None:
        """One line on what is trained."""
        trained, total = self.get_nb_trainable_parameters()
        share = 100.0 * trained / total
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}")

    def make_trainable(self) -> None:
        """Let train what is to be trained: the adapter, or every weight; UserError if neither."""
        model = self.policy.model
        if model.has_adapter("reference"):
            model.remove_adapter("reference")  # of an earlier run: this one has its own
        if model.has_adapter():
            model.requires_grad_(False)
            for adapter in model.adapter_modules(POLICY).values():
                adapter.requires_grad_(True)
        elif self.trains_all and model.is_quantised:
            raise UserError(
                "weights of four bits cannot be trained themselves: put an adapter on the model by"
                " get_peft_model or peft_config, or load it without quantisation"
            )
        elif self.trains_all:
            model.requires_grad_(True)
        else:
            raise UserError(
                "nothing of this model is trained: put an adapter on it by"
                " FastLanguageModel.get_peft_model or peft_config, or load it with"
                " full_finetuning = True"
            )

    def save_lora(self, save_directory: str) -> None:
        """Write the trained adapter as a PEFT folder."""
        if not self.policy.model.has_adapter():
            raise UserError("the model has no adapter to save; save_pretrained writes all weights")
        self._save_adapter(Path(save_directory))

    def load_lora(
        self, path: str, load_tensors: bool = False, lora_request_id: int | None = None
    ) -> LoraRequest:
        """An adapter to generate with: a PEFT folder, or with load_tensors the one in training.

        lora_request_id: part of the request's name alone. Raises CheckpointError for a folder that
        holds none or does not fit.
        """
        model = self.policy.model
        if load_tensors:
            if not model.has_adapter():
                raise UserError("load_tensors = True means the adapter in training; there is none")
            return LoraRequest(lora_name=POLICY, lora_path=str(path))
        folder = Path(path).expanduser()
        if not (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder.absolute()} holds no adapter; save_lora writes one")
        number = len(self._adapters) + 1 if lora_request_id is None else lora_request_id
        name = self._adapters.get(str(folder.resolve()), f"lora_{number}")
        if model.has_adapter(name):
            model.remove_adapter(name)
        trained = {key: p.requires_grad for key, p in model.named_parameters()}
        checkpoint.load_adapter_onto(model, folder, name=name)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(trained.get(key, False))
        self._adapters[str(folder.resolve())] = name
        return LoraRequest(lora_name=name, lora_path=str(path))

    def fast_generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | None = None,
        lora_request: LoraRequest | None = None,
        use_tqdm: bool = True,  # noqa: ARG002 - vLLM's name; the display draws on a terminal alone
    ) -> list[RequestOutput]:
        """Sample completions, a RequestOutput for each prompt with its .outputs.

        prompts: a text or texts, taken as they stand, or {"prompt_token_ids": [...]}. lora_request:
        the adapter to use; without one the base alone answers, as with vLLM. Raises UserError.
        """
        params = sampling_params or SamplingParams()
        adapter = None
        if lora_request is not None:
            adapter = lora_request.lora_name
            if not self.policy.model.has_adapter(adapter):
                raise UserError(f"there is no adapter '{adapter}'; get a request from load_lora")
        template = template_of(self.policy.tokenizer)
        asked = []
        for index, prompt in enumerate(
            [prompts] if isinstance(prompts, str | Mapping) else prompts
        ):
            if isinstance(prompt, Mapping):
                ids = list(
                    prompt.get("prompt_token_ids") or template.encode_plain(prompt["prompt"])
                )
            elif isinstance(prompt, str):
                ids = template.encode_plain(prompt)
            else:
                raise UserError(
                    f"prompt {index} is a {type(prompt).__name__}; give text: messages go through"
                    " tokenizer.apply_chat_template(..., tokenize = False) first"
                )
            text = prompt if isinstance(prompt, str) else self.policy.tokenizer.decode(ids)
            asked.append(Prompt(id=index, token_ids=tuple(ids), text=text))
        if not asked:
            return []
        room = self.policy.max_tokens - max(len(prompt.token_ids) for prompt in asked)
        sampling = native_sampling(params, room=room, seed=self._seeds.getrandbits(48))
        groups = self._sample(asked, sampling, params.n, adapter, params.stop_token_ids or ())
        return [
            RequestOutput(
                request_id=str(index),
                prompt=prompt.text,
                prompt_token_ids=list(prompt.token_ids),
                outputs=[
                    _output(number, rollout, self._text(rollout, params))
                    for number, rollout in enumerate(group)
                ],
            )
            for index, (prompt, group) in enumerate(zip(asked, groups, strict=True))
        ]

    def generate(self, input_ids: Any = None, **given: Any) -> Tensor:
        """As transformers' generate with the adapter in training: ids [B, P + R] of prompts and
        completions, shorter rows filled at their end. Raises UserError.
        """
        if isinstance(input_ids, Mapping):  # what apply_chat_template gives
            given = {**input_ids, **given}
            input_ids = given.pop("input_ids")
        values = with_defaults("generate", GENERATE, {"input_ids": input_ids, **given})
        if input_ids is None:
            raise UserError("generate takes input_ids; text goes through the tokenizer first")
        mask = values["attention_mask"]
        mask = torch.ones_like(input_ids) if mask is None else mask
        prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
        longest = max(len(prompt) for prompt in prompts)
        limit = values["max_new_tokens"] or (values["max_length"] or longest + 20) - longest
        greedy = values["do_sample"] is False or (
            values["do_sample"] is None and values["temperature"] is None
        )
        stop = values["stop_strings"] or ()
        sampling = Sampling(
            temperature=0.0 if greedy else float(values["temperature"] or 1.0),
            top_p=1.0 if greedy else float(values["top_p"] or 1.0),
            top_k=0 if greedy else int(values["top_k"] or 0),
            min_p=0.0 if greedy else float(values["min_p"] or 0.0),
            max_completion_tokens=int(limit),
            min_completion_tokens=int(values["min_new_tokens"] or 0),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            seed=self._seeds.getrandbits(48),
        )
        more = values["eos_token_id"] or ()
        asked = [
            Prompt(id=index, token_ids=tuple(ids), text="") for index, ids in enumerate(prompts)
        ]
        groups = self._sample(
            asked,
            sampling,
            int(values["num_return_sequences"]),
            POLICY,
            (more,) if isinstance(more, int) else tuple(more),
        )
        pad = values["pad_token_id"]
        if pad is None:
            pad = self.policy.tokenizer.pad_token_id
        return _as_rows(input_ids, groups, self.policy.stop_ids[0] if pad is None else pad, values)

    def save_pretrained(self, save_directory: str, **given: Any) -> None:
        """Write the adapter, or every weight where there is none, in Hugging Face's format."""
        values = with_defaults("save_pretrained", MERGED, given)
        folder = Path(save_directory)
        if self.policy.model.has_adapter():
            self._save_adapter(folder)
        else:
            checkpoint.save_model(
                self.policy.model,
                folder,
                end_ids=self.policy.stop_ids,
                max_shard_bytes=_size(values["max_shard_size"]),
            )

    def save_pretrained_merged(
        self, save_directory: str, tokenizer: Any = None, **given: Any
    ) -> None:
        """Write the weights with the adapter merged in ("merged_16bit"), or the adapter ("lora").

        A base of four bits is merged as it was decoded in training. Raises UserError.
        """
        values = with_defaults("save_pretrained_merged", MERGED, given)
        folder = Path(save_directory)
        if values["save_method"] == "lora":
            self._save_adapter(folder)
        elif values["save_method"] == "merged_4bit_forced":
            raise UserError(
                "save_pretrained_merged: save_method = 'merged_4bit_forced' is refused: rounding a"
                " merged matrix to four bits again changes the answers; take 'merged_16bit', or"
                " 'lora' beside the four-bit base"
            )
        else:
            dtype = "bfloat16" if self.dtype != torch.float16 else "float16"
            save_merged(
                self.policy.model,
                folder,
                dtype=dtype,
                end_ids=self.policy.stop_ids,
                max_shard_bytes=_size(values["max_shard_size"]),
            )
        checkpoint.save_tokenizer(tokenizer or self.policy.tokenizer, folder)

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        """Refused, with the native way."""
        raise UserError("nothing is pushed to the Hub from here; save, then `hf upload` the folder")

    push_to_hub_merged = push_to_hub

    def save_pretrained_gguf(self, *_: Any, **__: Any) -> None:
        """Refused, with the native way."""
        raise UserError(
            "GGUF is not written: save_pretrained_merged, then llama.cpp's convert_hf_to_gguf.py"
        )

    def _text(self, rollout: Rollout, params: SamplingParams) -> str:
        """A completion's text, with the stop string that ended it where it is asked for."""
        if not params.values["include_stop_str_in_output"]:
            return rollout.text
        return self.policy.decode(rollout.token_ids.tolist())

    def _save_adapter(self, folder: Path) -> None:
        source = self.policy.source
        base = str(checkpoint.base_folder(source)) if Path(source).exists() else source
        checkpoint.save_adapter(self.policy.model, folder, base)

    def _sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        num_samples: int,
        adapter: str | None,
        more_stop_ids: Sequence[int],
    ) -> list[list[Rollout]]:
        policy = self.policy
        template = template_of(policy.tokenizer)
        stop_ids = {*policy.stop_ids, *template.end_ids, *more_stop_ids}
        policy = replace(policy, stop_ids=tuple(sorted(stop_ids)))
        engine = sampling_engine(
            policy,
            prompts,
            num_samples=num_samples,
            max_completion_tokens=sampling.max_completion_tokens,
            adapter=adapter if adapter is None or policy.model.has_adapter(adapter) else POLICY,
        )
        with torch.no_grad():
            return engine.generate(prompts, sampling, num_samples=num_samples)


def _output(index: int, rollout: Rollout, text: str) -> CompletionOutput:
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=rollout.token_ids.tolist(),
        cumulative_logprob=float(rollout.logprobs.sum()),
        finish_reason=rollout.finish_reason,
    )


def _as_rows(
    input_ids: Tensor, groups: list[list[Rollout]], pad: int, values: Mapping[str, Any]
) -> Tensor:
    """Prompts as they were given, each with its completions behind it."""
    rollouts = [rollout for group in groups for rollout in group]
    longest = max(len(rollout.token_ids) for rollout in rollouts)
    heads = input_ids.repeat_interleave(len(groups[0]), dim=0)
    tails = torch.full((len(rollouts), longest), int(pad), dtype=input_ids.dtype)
    for row, rollout in enumerate(rollouts):
        tails[row, : len(rollout.token_ids)] = rollout.token_ids
    streamer = values["streamer"]
    if streamer is not None:
        streamer.put(input_ids[:1].cpu())
        streamer.put(rollouts[0].token_ids)
        streamer.end()
    return torch.cat([heads, tails.to(input_ids.device)], dim=1)


def _size(value: Any) -> int:
    from sparring.recipe import parse_size

    try:
        return parse_size(value)
    except ValueError as error:
        raise UserError(f"max_shard_size = {value!r}: {error}") from error


def note_nothing_to_patch(name: str) -> None:
    """What a call that patches elsewhere says here."""
    say_once(f"{name} is accepted and does nothing: nothing needs to be patched")
