"""The arguments of GRPOConfig (TRL 1.16, and names that Unsloth and older releases have).

Data alone; see arguments.py.
"""

from __future__ import annotations

from sparring.compat.arguments import Argument, build_config, honoured, immaterial, refused
from sparring.compat.training_table import TRAINING

_OWN_ENGINE = "rollouts come from Sparring's own engine, on the very weights that are trained"
_NO_SERVER = "rollouts need no server"
_ADAPTIVE = "there is no entropy bonus"
_NO_MASK = "rollouts are made by the policy itself, a few updates ago at most"
_ONE_LOSS = "it belongs to a loss that is not built"
_LOSSES = ("dapo", "grpo", "dr_grpo", "cispo", "bnpo")
_ALWAYS_LOGGED = "every completion is written to rollouts/ in the run directory"

GRPO: dict[str, Argument] = TRAINING | {
    "learning_rate": honoured(1e-6, "[optimizer] learning_rate"),
    "gradient_checkpointing": honoured(
        True, "[train] checkpointing: layers computed again in backward", True, False, "unsloth"
    ),
    "remove_unused_columns": immaterial(False, "rewards get every column, whatever it says"),
    "model_init_kwargs": honoured(None, "dtype and quantisation of a model given by name"),
    "trust_remote_code": refused(
        False, "no code of a checkpoint is ever run", "known families load without it"
    ),
    "router_aux_loss_coef": refused(
        None, "no family with experts is known", "leave it out", (0.0,)
    ),
    "disable_dropout": immaterial(False, "no model here has dropout"),
    "cast_lm_head_to_fp32": immaterial(False, "log-probabilities are always taken in float32"),
    "num_generations": honoured(8, "[rollout] group_size"),
    "num_generations_eval": honoured(None, "[eval] num_samples; None: num_generations"),
    "max_completion_length": honoured(512, "[rollout] max_completion_tokens"),
    "ds3_gather_for_generation": immaterial(True, "one process trains on one device"),
    "shuffle_dataset": honoured(True, "a new order in each epoch, or the rows' own", True, False),
    "pad_to_multiple_of": immaterial("auto", "nothing is padded"),
    "generation_batch_size": honoured(None, "[rollout] prompts_per_step x group_size"),
    "steps_per_generation": honoured(None, "a divisor or a multiple of accumulation: mini_steps"),
    "temperature": honoured(1.0, "[rollout] temperature"),
    "top_p": honoured(1.0, "[rollout] top_p, which the recipe's own rule lets be 1.0 alone"),
    "top_k": honoured(0, "[rollout] top_k, which the recipe's own rule lets be 0 alone"),
    "min_p": refused(
        None, "the trainer's distribution has no such cut", "sample from all of it", (0.0, 0)
    ),
    "generation_kwargs": honoured(None, "stop strings; any other entry is refused"),
    "chat_template_kwargs": honoured(None, "arguments of the chat template"),
    "repetition_penalty": refused(
        1.0, "the trainer's distribution has no such penalty", "use the reward `repetition`"
    ),
    "cache_implementation": refused(None, _OWN_ENGINE, "[rollout] kv_memory sizes its cache"),
    "use_vllm": immaterial(False, _OWN_ENGINE),
    "vllm_mode": refused("colocate", _NO_SERVER, "take 'colocate'"),
    "vllm_model_impl": immaterial("vllm", _OWN_ENGINE),
    "vllm_enable_sleep_mode": immaterial(False, "there is one set of weights, none can sleep"),
    "vllm_structured_outputs_regex": refused(
        None, "the trainer's distribution has no such mask", "use the reward `format`"
    ),
    "vllm_server_base_url": refused(None, _NO_SERVER, "leave it out"),
    "vllm_server_host": immaterial("0.0.0.0", _NO_SERVER),
    "vllm_server_port": immaterial(8000, _NO_SERVER),
    "vllm_server_timeout": immaterial(240.0, _NO_SERVER),
    "vllm_group_port": immaterial(51216, _NO_SERVER),
    "vllm_gpu_memory_utilization": honoured(0.3, "[rollout] kv_memory where use_vllm is True"),
    "vllm_max_model_length": honoured(None, "[model] max_tokens of a model given by name"),
    "vllm_tensor_parallel_size": refused(1, "one device holds the model", "take 1"),
    "beta": honoured(0.0, "[loss] kl_coef"),
    "num_iterations": honoured(1, "[train] passes"),
    "epsilon": honoured(0.2, "[loss] clip_low"),
    "delta": refused(None, "ratios are bounded on one side of the advantage", "leave it out"),
    "epsilon_high": honoured(None, "[loss] clip_high; None: epsilon"),
    "sapo_temperature_neg": refused(1.05, _ONE_LOSS, "see loss_type"),
    "sapo_temperature_pos": refused(1.0, _ONE_LOSS, "see loss_type"),
    "vespo_k_pos": refused(2.0, _ONE_LOSS, "see loss_type"),
    "vespo_lambda_pos": refused(3.0, _ONE_LOSS, "see loss_type"),
    "vespo_k_neg": refused(3.0, _ONE_LOSS, "see loss_type"),
    "vespo_lambda_neg": refused(2.0, _ONE_LOSS, "see loss_type"),
    "importance_sampling_level": honoured(
        "token", "'sequence' with loss_type 'grpo' is [loss] gspo", "token", "sequence"
    ),
    "reward_weights": honoured(None, "[[reward]] weight"),
    "multi_objective_aggregation": refused(
        "sum_then_normalize", "rewards are added before they are centred", "scale reward_weights"
    ),
    "scale_rewards": honoured(
        "group", "[advantage] group, batch or mean", "group", "batch", "none", True, False
    ),
    "loss_type": honoured("dapo", "[loss] name", *_LOSSES),
    "mask_truncated_completions": honoured(False, "[train] learn_truncated", True, False),
    "sync_ref_model": refused(False, "the reference is the policy at step 0", "start a new run"),
    "ref_model_mixup_alpha": immaterial(0.6, "the reference does not move"),
    "ref_model_sync_steps": immaterial(512, "the reference does not move"),
    "top_entropy_quantile": refused(1.0, "every token of a completion is learned", "take 1.0"),
    "entropy_coef": refused(0.0, _ADAPTIVE, "raise epsilon_high to keep entropy up"),
    "use_adaptive_entropy": refused(False, _ADAPTIVE, "raise epsilon_high to keep entropy up"),
    "entropy_coef_min": immaterial(0.0, _ADAPTIVE),
    "entropy_coef_max": immaterial(1.0, _ADAPTIVE),
    "entropy_coef_delta": immaterial(0.005, _ADAPTIVE),
    "entropy_target": immaterial(0.2, _ADAPTIVE),
    "max_tool_calling_iterations": refused(None, "a completion calls no tools", "leave it out"),
    "vllm_importance_sampling_correction": immaterial(True, _OWN_ENGINE),
    "vllm_importance_sampling_mode": immaterial("sequence_mask", _OWN_ENGINE),
    "vllm_importance_sampling_clip_max": immaterial(3.0, _OWN_ENGINE),
    "vllm_importance_sampling_clip_min": immaterial(None, _OWN_ENGINE),
    "off_policy_mask_threshold": refused(None, _NO_MASK, "leave it out"),
    "use_bias_correction_kl": honoured(True, "[loss] kl_unbiased", True, False),
    "log_completions": immaterial(False, _ALWAYS_LOGGED),
    "log_multimodal": immaterial(True, "prompts are text"),
    "num_completions_to_print": immaterial(None, _ALWAYS_LOGGED),
    "log_unique_prompts": immaterial(False, _ALWAYS_LOGGED),
    "log_completions_hub_repo": refused(None, "nothing is pushed to the Hub", "upload rollouts/"),
    "use_transformers_continuous_batching": immaterial(False, _OWN_ENGINE),
    "transformers_continuous_batching_config": immaterial(None, _OWN_ENGINE),
    "use_transformers_paged": immaterial(False, _OWN_ENGINE),
    "vllm_importance_sampling_cap": immaterial(None, _OWN_ENGINE),
    # names of older releases, and Unsloth's
    "max_prompt_length": honoured(None, "a longer prompt is dropped and counted, never cut"),
    "vllm_sampling_params": honoured(None, "its stop strings, top_p, top_k and min_p"),
    "unsloth_num_chunks": immaterial(-1, "logits are never kept, in chunks or whole"),
    "unsloth_logit_chunk_multiplier": immaterial(None, "logits are never kept"),
    "unsloth_grpo_mini_batch": immaterial(None, "micro-batches are cut by tokens"),
    "use_liger_loss": immaterial(None, "the fused head is always used"),
    "vllm_device": immaterial(None, _OWN_ENGINE),
    "vllm_dtype": immaterial(None, _OWN_ENGINE),
    "vllm_max_model_len": honoured(None, "vllm_max_model_length"),
    "vllm_enable_prefix_caching": immaterial(None, "a prompt is computed once for its group"),
}
"""Every argument of trl.GRPOConfig."""

GRPOConfig = build_config(
    "GRPOConfig", GRPO, "Arguments of GRPOTrainer, in TRL's names and with TRL's defaults."
)
