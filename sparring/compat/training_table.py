"""The arguments that every TRL configuration inherits from transformers.TrainingArguments (5.x).

Data alone; see arguments.py for what honoured, immaterial and refused mean. Names that older
releases had stand at the end.
"""

from __future__ import annotations

from sparring.compat.arguments import Argument, honoured, immaterial, refused

_PACKED = "steps are packed by tokens ([train] micro_batch_tokens), never padded or batched by rows"
_ONE_PROCESS = "one process trains on one device"
_NO_PUSH = "nothing is pushed to the Hub"
_NO_TRACKER = "no tracker is written to: every step is a line of metrics.jsonl in the run directory"
_ROWS_ONCE = "rows are read and tokenised once, before the first step"
_SAME_DTYPE = "evaluation computes as training does"

OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_8bit", "adamw_bnb_8bit"),
    *("paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit"),
)
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")

TRAINING: dict[str, Argument] = {
    "output_dir": honoured(None, "[run] dir; one that holds a run stays, the next goes beside it"),
    "per_device_train_batch_size": honoured(8, "with gradient_accumulation_steps: rows of a step"),
    "num_train_epochs": honoured(3.0, "[train] steps, counted from the rows"),
    "max_steps": honoured(-1, "[train] steps"),
    "learning_rate": honoured(5e-5, "[optimizer] learning_rate"),
    "lr_scheduler_type": honoured("linear", "[optimizer] schedule", *SCHEDULES),
    "lr_scheduler_kwargs": refused(
        None, "schedules have no further knobs", "take [optimizer] schedule as it is", ({},)
    ),
    "warmup_steps": honoured(0, "[optimizer] warmup_steps; below 1 a share of all steps"),
    "optim": honoured("adamw_torch_fused", "[optimizer] name: adamw, adamw_8bit", *OPTIMIZERS),
    "optim_args": refused(
        None, "AdamW takes betas, weight decay and clipping", "leave it out", ("",)
    ),
    "weight_decay": honoured(0.0, "[optimizer] weight_decay, on matrices alone"),
    "adam_beta1": honoured(0.9, "[optimizer] betas"),
    "adam_beta2": honoured(0.999, "[optimizer] betas"),
    "adam_epsilon": refused(1e-8, "no recipe key turns it", "keep 1e-8"),
    "optim_target_modules": refused(
        None, "it chooses layers for GaLore and its like", "choose by LoRA's target_modules"
    ),
    "gradient_accumulation_steps": honoured(
        1, "rows of a step; micro-batches are cut by tokens and change no number"
    ),
    "average_tokens_across_devices": immaterial(True, _ONE_PROCESS),
    "max_grad_norm": honoured(1.0, "[optimizer] max_grad_norm"),
    "label_smoothing_factor": refused(
        0.0, "SFT learns the given tokens alone", "dpo has [loss] label_smoothing"
    ),
    "bf16": honoured(None, "[model] dtype of a model given by name", None, True, False),
    "fp16": honoured(False, "[model] dtype of a model given by name", True, False),
    "bf16_full_eval": refused(False, _SAME_DTYPE, "choose [model] dtype"),
    "fp16_full_eval": refused(False, _SAME_DTYPE, "choose [model] dtype"),
    "tf32": immaterial(None, "products are taken in the model's own dtype"),
    "activation_checkpointing": honoured(None, "as gradient_checkpointing", None, True, False),
    "activation_checkpointing_kwargs": immaterial(None, "checkpointing changes no number"),
    "gradient_checkpointing": honoured(
        False, "[train] checkpointing: layers computed again in backward", True, False, "unsloth"
    ),
    "gradient_checkpointing_kwargs": immaterial(None, "checkpointing changes no number"),
    "torch_compile": immaterial(False, "kernels are written by hand, none is compiled by torch"),
    "torch_compile_backend": immaterial(None, "nothing is compiled by torch"),
    "torch_compile_mode": immaterial(None, "nothing is compiled by torch"),
    "use_liger_kernel": immaterial(False, "fused kernels are always used"),
    "liger_kernel_config": immaterial(None, "fused kernels are always used"),
    "use_cache": immaterial(False, "training keeps no keys and values, sampling always does"),
    "neftune_noise_alpha": refused(None, "embeddings are trained without noise", "leave it out"),
    "torch_empty_cache_steps": immaterial(None, "memory is planned, not emptied in between"),
    "auto_find_batch_size": refused(
        False, "it changes the batch behind the user's back", "set [train] micro_batch_tokens"
    ),
    "logging_strategy": honoured(
        "steps", "rows of trainer.state.log_history", "no", "steps", "epoch"
    ),
    "logging_steps": honoured(
        10, "steps a row of trainer.state.log_history speaks of; metrics.jsonl has every step"
    ),
    "logging_first_step": honoured(False, "a row of trainer.state.log_history", True, False),
    "log_on_each_node": immaterial(True, _ONE_PROCESS),
    "logging_nan_inf_filter": immaterial(True, "a loss that is not finite stops the run"),
    "include_num_input_tokens_seen": immaterial("no", "tokens of each step are always recorded"),
    "log_level": immaterial("passive", "what people read goes to standard error"),
    "log_level_replica": immaterial("warning", _ONE_PROCESS),
    "disable_tqdm": immaterial(None, "the display is drawn on a terminal alone"),
    "report_to": refused(
        "none", _NO_TRACKER, "read it after the run, or while it grows", (None, [], ["none"])
    ),
    "run_name": immaterial(None, _NO_TRACKER),
    "project": immaterial("huggingface", _NO_TRACKER),
    "trackio_space_id": immaterial(None, _NO_TRACKER),
    "trackio_bucket_id": immaterial(None, _NO_TRACKER),
    "trackio_static_space_id": immaterial(None, _NO_TRACKER),
    "eval_strategy": honoured("no", "[eval] every", "no", "steps", "epoch"),
    "eval_steps": honoured(None, "[eval] every; below 1 a share of all steps, None: logging_steps"),
    "eval_delay": refused(0, "evaluations come at equal distances", "set eval_steps"),
    "per_device_eval_batch_size": immaterial(8, _PACKED),
    "prediction_loss_only": immaterial(False, "evaluation keeps no logits"),
    "eval_on_start": refused(
        False,
        "grpo measures before the first step anyway",
        "call trainer.evaluate() before train()",
    ),
    "eval_do_concat_batches": immaterial(True, "evaluation keeps no logits"),
    "eval_use_gather_object": immaterial(False, _ONE_PROCESS),
    "eval_accumulation_steps": immaterial(None, "evaluation keeps no logits"),
    "include_for_metrics": refused([], "compute_metrics is not called", "use `sparring eval`"),
    "batch_eval_metrics": refused(False, "compute_metrics is not called", "use `sparring eval`"),
    "save_only_model": refused(
        False, "every checkpoint can be gone on from", "final/ holds the weights alone"
    ),
    "save_strategy": honoured("steps", "[run] checkpoint_every", "no", "steps", "epoch"),
    "save_steps": honoured(500, "[run] checkpoint_every; below 1 a share of all steps"),
    "save_on_each_node": immaterial(False, _ONE_PROCESS),
    "save_total_limit": honoured(None, "[run] keep_checkpoints; None keeps all"),
    "enable_jit_checkpoint": immaterial(False, "SIGTERM always ends with a checkpoint"),
    "push_to_hub": refused(False, _NO_PUSH, "upload the run's final/ with `hf upload`"),
    "hub_token": immaterial(None, _NO_PUSH),
    "hub_private_repo": immaterial(None, _NO_PUSH),
    "hub_model_id": immaterial(None, _NO_PUSH),
    "hub_strategy": immaterial("every_save", _NO_PUSH),
    "hub_always_push": immaterial(False, _NO_PUSH),
    "hub_revision": immaterial(None, _NO_PUSH),
    "load_best_model_at_end": refused(
        False, "the last step is kept", "measure checkpoints with `sparring eval` and take one"
    ),
    "metric_for_best_model": immaterial(None, "no best checkpoint is chosen"),
    "greater_is_better": immaterial(None, "no best checkpoint is chosen"),
    "ignore_data_skip": refused(
        False, "a resumed run goes on with the rows that come next", "start a new run instead"
    ),
    "restore_callback_states_from_checkpoint": immaterial(False, "there are no callbacks"),
    "full_determinism": honoured(False, "[run] bitwise on a card; a CPU needs none", True, False),
    "seed": honoured(42, "[run] seed"),
    "data_seed": refused(None, "one seed keys rows and noise alike", "set seed"),
    "use_cpu": honoured(False, "where a model given by name is loaded", True, False),
    "accelerator_config": refused(None, "accelerate is not used", "leave it out"),
    "parallelism_config": refused(None, _ONE_PROCESS, "leave it out"),
    "dataloader_drop_last": immaterial(
        False, "a step is always full: the next epoch's rows fill it"
    ),
    "dataloader_num_workers": immaterial(0, _ROWS_ONCE),
    "dataloader_pin_memory": immaterial(True, _ROWS_ONCE),
    "dataloader_persistent_workers": immaterial(False, _ROWS_ONCE),
    "dataloader_prefetch_factor": immaterial(None, _ROWS_ONCE),
    "dataloader_multiprocessing_context": immaterial(None, _ROWS_ONCE),
    "dataloader_in_order": immaterial(True, _ROWS_ONCE),
    "remove_unused_columns": immaterial(True, "a column is read where something asks for it"),
    "label_names": refused(None, "labels are the tokens themselves", "leave it out"),
    "train_sampling_strategy": honoured(
        "random",
        "the order of rows; nothing is padded, so lengths need no grouping",
        *("random", "sequential", "group_by_length"),
    ),
    "length_column_name": immaterial("length", _PACKED),
    "ddp_find_unused_parameters": immaterial(None, _ONE_PROCESS),
    "ddp_bucket_cap_mb": immaterial(None, _ONE_PROCESS),
    "ddp_broadcast_buffers": immaterial(None, _ONE_PROCESS),
    "ddp_static_graph": immaterial(None, _ONE_PROCESS),
    "ddp_backend": immaterial(None, _ONE_PROCESS),
    "ddp_timeout": immaterial(1800, _ONE_PROCESS),
    "fsdp": refused(None, _ONE_PROCESS, "NF4 and LoRA make large models fit", ("", [], False)),
    "fsdp_config": refused(None, _ONE_PROCESS, "NF4 and LoRA make large models fit", ({},)),
    "deepspeed": refused(None, _ONE_PROCESS, "NF4 and LoRA make large models fit"),
    "debug": refused("", "it debugs transformers' own Trainer", "leave it out", ([],)),
    "skip_memory_metrics": immaterial(True, "peak memory of each step is always recorded"),
    "do_train": immaterial(False, "call train()"),
    "do_eval": immaterial(False, "call evaluate()"),
    "do_predict": immaterial(False, "call fast_generate"),
    "resume_from_checkpoint": honoured(None, "train() goes on from the run's newest checkpoint"),
    "local_rank": immaterial(-1, _ONE_PROCESS),
    # names of older releases
    "warmup_ratio": honoured(None, "[optimizer] warmup_steps, as a share of all steps"),
    "evaluation_strategy": honoured(None, "eval_strategy", None, "no", "steps", "epoch"),
    "overwrite_output_dir": immaterial(None, "a run that is there stays, the next goes beside it"),
    "logging_dir": immaterial(None, _NO_TRACKER),
    "group_by_length": immaterial(None, _PACKED),
    "no_cuda": honoured(None, "use_cpu", None, True, False),
    "save_safetensors": refused(None, "pickled weights are never written", "leave it out", (True,)),
    "jit_mode_eval": immaterial(None, "nothing is compiled by torch"),
}
"""Every argument of transformers.TrainingArguments."""
