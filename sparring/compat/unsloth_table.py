"""The arguments of Unsloth's calls, of vLLM's SamplingParams, of PEFT's LoraConfig and of generate.

Data alone; see arguments.py.
"""

from __future__ import annotations

from sparring.compat.arguments import Argument, honoured, immaterial, refused
from sparring.models.lora import PROJECTIONS

_OWN_ENGINE = "rollouts come from Sparring's own engine"
_ADAPTED = "adapters sit on whole layers' matrices alone"
_NO_LOG = "logits are not kept"
_CHECKPOINTING = honoured("unsloth", "checkpointing of layers", "unsloth", True, False)

LOAD: dict[str, Argument] = {
    "model_name": honoured("", "[model] path: a folder, a run directory or a Hub id"),
    "max_seq_length": honoured(2048, "[model] max_tokens: of prompt and completion together"),
    "dtype": honoured(None, "[model] dtype; None: the card's 16 bits, float32 on a CPU"),
    "load_in_4bit": honoured(True, '[model] quantization = "nf4"', True, False),
    "load_in_8bit": refused(
        False, "weights of 8 bits are not built", "load_in_4bit = True, or load_in_16bit = True"
    ),
    "load_in_16bit": honoured(False, "no quantisation", True, False),
    "load_in_fp8": refused(False, "weights of 8 bits are not built", "load_in_4bit = True"),
    "full_finetuning": honoured(False, "no [lora]: every weight is trained", True, False),
    "token": refused(None, "no secret is passed on", "log in once with `hf auth login`"),
    "device_map": honoured("sequential", "the device: one holds the model"),
    "rope_scaling": refused(None, "it is the checkpoint's", "write it into config.json", ({},)),
    "fix_tokenizer": immaterial(True, "a tokenizer is what its tokenizer.json says"),
    "model_patcher": refused(None, "nothing is patched", "leave it out"),
    "tokenizer_name": refused(None, "a model comes with its tokenizer", "give it to the trainer"),
    "trust_remote_code": refused(False, "no code of a checkpoint is ever run", "leave it out"),
    "use_gradient_checkpointing": _CHECKPOINTING,
    "resize_model_vocab": refused(None, "the vocabulary is the checkpoint's", "leave it out"),
    "revision": refused(None, "a Hub id is taken as it stands now", "download it, give the folder"),
    "tokenizer_revision": refused(None, "a model comes with its tokenizer", "leave it out"),
    "use_exact_model_name": immaterial(False, "a name is always taken exactly"),
    "offload_embedding": refused(False, "the embedding stays on the device", "leave it out"),
    "float32_mixed_precision": immaterial(None, "what is trained is always kept in float32"),
    "fast_inference": immaterial(False, f"{_OWN_ENGINE}, always, on the very weights"),
    "gpu_memory_utilization": honoured(0.5, "[rollout] kv_memory, where fast_inference is True"),
    "float8_kv_cache": refused(False, "keys and values keep the model's dtype", "leave it out"),
    "random_state": honoured(3407, "the seed of sampling"),
    "max_lora_rank": honoured(64, "a rank above it is refused, where fast_inference is True"),
    "disable_log_stats": immaterial(True, _OWN_ENGINE),
    "unsloth_vllm_standby": immaterial(False, "there is one set of weights, none can sleep"),
    "unsloth_tiled_mlp": immaterial(False, "micro-batches are cut by tokens"),
    "num_labels": refused(None, "a policy writes, it does not classify", "the reward `model`"),
    "qat_scheme": refused(None, "weights are not quantised while they are trained", "leave it out"),
    "attn_implementation": immaterial(None, "attention is Sparring's own"),
    "device_map_planner_kwargs": refused(None, "one device holds the model", "leave it out"),
    "text_only": immaterial(False, "models read text alone"),
}
"""FastLanguageModel.from_pretrained."""

LORA: dict[str, Argument] = {
    "r": honoured(16, "[lora] rank"),
    "target_modules": honoured(list(PROJECTIONS), "[lora] target_modules"),
    "lora_alpha": honoured(16, "[lora] alpha"),
    "lora_dropout": refused(
        0.0, "sampler and trainer read the same adapter, and noise would part them", "take 0"
    ),
    "bias": refused("none", "biases stay the base's", "take 'none'"),
    "layers_to_transform": refused(None, _ADAPTED, "leave it out"),
    "layers_pattern": refused(None, _ADAPTED, "leave it out"),
    "finetune_last_n_layers": refused(None, _ADAPTED, "leave it out"),
    "use_gradient_checkpointing": _CHECKPOINTING,
    "random_state": honoured(3407, "the seed that draws the adapter"),
    "max_seq_length": immaterial(2048, "from_pretrained has it"),
    "use_rslora": honoured(False, "[lora] rslora", True, False),
    "modules_to_save": refused(
        None,
        "embeddings and the output head are not trained beside an adapter",
        "train all weights: full_finetuning = True",
        ([],),
    ),
    "init_lora_weights": refused(True, "B starts at zero, A uniform as in PEFT", "take True"),
    "loftq_config": refused(None, "the base is quantised by itself", "leave it out", ({},)),
    "temporary_location": immaterial("_unsloth_temporary_saved_buffers", "nothing is put aside"),
    "qat_scheme": LOAD["qat_scheme"],
    "target_parameters": refused(None, _ADAPTED, "leave it out", ([],)),
    "ensure_weight_tying": refused(False, "embeddings carry no adapter", "leave it out"),
    "task_type": refused(
        "CAUSAL_LM", "a policy is a causal language model", "leave it out", (None,)
    ),
    "finetune_vision_layers": immaterial(True, "models read text alone"),
    "finetune_audio_layers": immaterial(False, "models read text alone"),
    "finetune_language_layers": refused(True, "nothing else is there", "take True"),
    "finetune_attention_modules": refused(True, "target_modules says it", "set target_modules"),
    "finetune_mlp_modules": refused(True, "target_modules says it", "set target_modules"),
}
"""FastLanguageModel.get_peft_model."""

_NO_SUCH = "plain LoRA is what is computed"
_OUT = "leave it out"
_RECORD = "it records how a file was made"

PEFT: dict[str, Argument] = {
    "r": honoured(8, "[lora] rank"),
    "lora_alpha": honoured(8, "[lora] alpha"),
    "target_modules": honoured(None, "[lora] target_modules; None: q_proj and v_proj, as in PEFT"),
    "use_rslora": honoured(False, "[lora] rslora", True, False),
    "lora_dropout": LORA["lora_dropout"],
    "bias": LORA["bias"],
    "modules_to_save": LORA["modules_to_save"],
    "init_lora_weights": LORA["init_lora_weights"],
    "layers_to_transform": LORA["layers_to_transform"],
    "layers_pattern": LORA["layers_pattern"],
    "task_type": refused(None, "a policy is a causal language model", _OUT, ("CAUSAL_LM",)),
    "peft_type": refused("LORA", _NO_SUCH, "give a LoraConfig", (None,)),
    "inference_mode": refused(False, "an adapter is trained", "take False"),
    "auto_mapping": immaterial(None, _RECORD),
    "peft_version": immaterial(None, _RECORD),
    "base_model_name_or_path": immaterial(None, _RECORD),
    "revision": immaterial(None, _RECORD),
    "exclude_modules": refused(None, _NO_SUCH, "name target_modules instead"),
    "fan_in_fan_out": refused(False, "matrices are stored outputs first", _OUT),
    "rank_pattern": refused({}, _NO_SUCH, "one r for all"),
    "alpha_pattern": refused({}, _NO_SUCH, "one lora_alpha for all"),
    "megatron_config": refused(None, _NO_SUCH, _OUT),
    "megatron_core": immaterial("megatron.core", "Megatron is not used"),
    "trainable_token_indices": refused(None, "embeddings carry no adapter", _OUT),
    "loftq_config": refused({}, "the base is quantised by itself", _OUT, (None,)),
    "eva_config": refused(None, _NO_SUCH, _OUT),
    "corda_config": refused(None, _NO_SUCH, _OUT),
    "lora_ga_config": refused(None, _NO_SUCH, _OUT),
    "use_dora": refused(False, _NO_SUCH, _OUT),
    "velora_config": refused(None, _NO_SUCH, _OUT),
    "alora_invocation_tokens": refused(None, _NO_SUCH, _OUT),
    "use_qalora": refused(False, _NO_SUCH, _OUT),
    "qalora_group_size": immaterial(16, "QA-LoRA is not used"),
    "monteclora_config": refused(None, _NO_SUCH, _OUT),
    "layer_replication": refused(None, _NO_SUCH, _OUT),
    "runtime_config": immaterial(None, "nothing is put off the device"),
    "lora_bias": refused(False, _NO_SUCH, _OUT),
    "target_parameters": refused(None, _ADAPTED, _OUT),
    "use_bdlora": refused(None, _NO_SUCH, _OUT, (False,)),
    "arrow_config": refused(None, _NO_SUCH, _OUT),
    "kasa_config": refused(None, _NO_SUCH, _OUT),
    "ensure_weight_tying": LORA["ensure_weight_tying"],
}
"""Every field of peft.LoraConfig."""

SAMPLING: dict[str, Argument] = {
    "n": honoured(1, "num_samples"),
    "temperature": honoured(1.0, "temperature; 0 is greedy"),
    "top_p": honoured(1.0, "top_p"),
    "top_k": honoured(0, "top_k; -1 and 0 keep all"),
    "max_tokens": honoured(16, "max_completion_tokens; None: what the model has room for"),
    "min_tokens": honoured(0, "min_completion_tokens"),
    "seed": honoured(None, "seed; None: another one in each call"),
    "stop": honoured(None, "stop"),
    "stop_token_ids": honoured(None, "further end tokens"),
    "min_p": honoured(0.0, "min_p"),
    "repetition_penalty": refused(1.0, "it is not built", "lower the temperature"),
    "presence_penalty": refused(0.0, "it is not built", "lower the temperature"),
    "frequency_penalty": refused(0.0, "it is not built", "lower the temperature"),
    "best_of": refused(None, "every sample is returned", "take n"),
    "bad_words": refused(None, "no token is forbidden", _OUT, ([],)),
    "ignore_eos": refused(False, "an end token ends a completion", "set min_tokens"),
    "logprobs": refused(None, _NO_LOG, "sparring.score gives log-probabilities", (0,)),
    "prompt_logprobs": refused(None, _NO_LOG, "sparring.score gives log-probabilities"),
    "logits_processors": refused(None, _NO_LOG, _OUT, ([],)),
    "logit_bias": refused(None, _NO_LOG, _OUT),
    "allowed_token_ids": refused(None, _NO_LOG, _OUT),
    "guided_decoding": refused(None, _NO_LOG, "sample, and judge by the reward `format`"),
    "structured_outputs": refused(None, _NO_LOG, "sample, and judge by the reward `format`"),
    "include_stop_str_in_output": honoured(False, "text with the stop string", True, False),
    "skip_special_tokens": refused(True, "text is without special tokens", "decode token_ids"),
    "spaces_between_special_tokens": immaterial(True, "text is without special tokens"),
    "detokenize": immaterial(True, "text is always there"),
    "truncate_prompt_tokens": refused(None, "a prompt is never cut", "shorten it", (-1,)),
    "output_kind": immaterial(None, "completions come whole"),
    "extra_args": refused(None, "nothing reads them", _OUT, ({},)),
}
"""vllm.SamplingParams."""

GENERATE: dict[str, Argument] = {
    "input_ids": honoured(None, "the prompts' token ids"),
    "attention_mask": honoured(None, "which of them are padding"),
    "token_type_ids": immaterial(None, "no model here has types of tokens"),
    "max_new_tokens": honoured(None, "max_completion_tokens"),
    "max_length": honoured(None, "of prompt and completion together"),
    "do_sample": honoured(None, "None: where a temperature is given", None, True, False),
    "temperature": honoured(None, "temperature"),
    "top_p": honoured(None, "top_p"),
    "top_k": honoured(None, "top_k"),
    "min_new_tokens": honoured(None, "min_completion_tokens"),
    "num_return_sequences": honoured(1, "num_samples"),
    "eos_token_id": honoured(None, "further end tokens"),
    "pad_token_id": honoured(None, "what fills shorter rows"),
    "streamer": honoured(None, "gets the first prompt, then its completion, when it is whole"),
    "min_p": honoured(None, "min_p"),
    "repetition_penalty": refused(None, "it is not built", "lower the temperature", (1.0,)),
    "num_beams": refused(1, "beams are not searched", "take num_return_sequences"),
    "use_cache": immaterial(True, "keys and values are always kept"),
    "generation_config": refused(None, "arguments are given by name", "give them by name"),
    "stop_strings": honoured(None, "stop"),
    "tokenizer": immaterial(None, "a model knows its tokenizer"),
}
"""generate of transformers."""

MODEL_INIT: dict[str, Argument] = {
    "dtype": honoured(None, "[model] dtype"),
    "torch_dtype": honoured(None, "[model] dtype"),
    "quantization_config": honoured(None, '[model] quantization = "nf4"'),
    "device_map": honoured(None, "the device: one holds the model"),
    "attn_implementation": immaterial(None, "attention is Sparring's own"),
    "use_cache": immaterial(None, "training keeps no keys and values"),
    "trust_remote_code": refused(None, "no code of a checkpoint is ever run", _OUT, (False,)),
    "revision": LOAD["revision"],
    "low_cpu_mem_usage": immaterial(None, "weights are always streamed in"),
}
"""model_init_kwargs of the trainers."""

MERGED: dict[str, Argument] = {
    "save_method": honoured(
        "merged_16bit", "what is written", "merged_16bit", "lora", "16bit", "merged_4bit_forced"
    ),
    "push_to_hub": refused(False, "nothing is pushed to the Hub", "upload it with `hf upload`"),
    "token": immaterial(None, "nothing is pushed to the Hub"),
    "is_main_process": immaterial(True, "one process writes"),
    "state_dict": refused(None, "the model's own weights are written", _OUT),
    "save_function": immaterial(None, "files are always safetensors"),
    "max_shard_size": honoured("5GB", "bytes of a file at most"),
    "safe_serialization": refused(True, "pickled weights are never written", "take True", (None,)),
    "variant": refused(None, "files have their usual names", _OUT),
    "save_peft_format": immaterial(True, "adapters are always PEFT's"),
    "tags": immaterial(None, "nothing is pushed to the Hub"),
    "temporary_location": LORA["temporary_location"],
    "maximum_memory_usage": immaterial(0.75, "matrices are merged one shard at a time"),
}
"""model.save_pretrained_merged."""

MOVED_SFT = ("dataset_text_field", "max_seq_length", "packing", "dataset_num_proc")
MOVED_DPO = ("beta", "max_length", "max_prompt_length", "loss_type", "label_smoothing")
"""Arguments that older scripts give to the trainer itself."""
