"""The arguments of SFTConfig and DPOConfig (TRL 1.16, and names of older releases).

Data alone; see arguments.py.
"""

from __future__ import annotations

from sparring.compat.arguments import Argument, build_config, honoured, immaterial, refused
from sparring.compat.grpo_table import GRPO
from sparring.compat.training_table import TRAINING

_SHARED = ("gradient_checkpointing", "model_init_kwargs", "trust_remote_code")
_MODEL = {name: GRPO[name] for name in (*_SHARED, "router_aux_loss_coef", "pad_to_multiple_of")}
_OFFLOAD = refused(False, "activations stay on the device", "use gradient_checkpointing")
_KEEP_START = refused("keep_start", "rows are cut at their end", "cut them before training")
_PAD = immaterial(None, "nothing is padded")

SFT: dict[str, Argument] = TRAINING | {
    "learning_rate": honoured(2e-5, "[optimizer] learning_rate"),
    **_MODEL,
    "chat_template_path": honoured(None, "[data] template: a .jinja file, or a tokenizer's folder"),
    "dataset_text_field": honoured("text", "the column of plain texts"),
    "dataset_kwargs": refused(None, "rows are always prepared", "give rows as they are", ({},)),
    "dataset_num_proc": immaterial(None, "rows are read and tokenised once, in this process"),
    "eos_token": honoured(None, "the token that ends a turn"),
    "max_length": honoured(1024, "rows are cut behind so many tokens; None: the model's limit"),
    "truncation_mode": _KEEP_START,
    "shuffle_dataset": immaterial(False, "every epoch is a new order drawn from the seed anyway"),
    "packing": honoured(False, "a step takes as many rows as so many full sequences hold"),
    "packing_strategy": refused("bfd", "rows never see each other, nor are they cut", "take 'bfd'"),
    "padding_free": immaterial(False, "nothing is padded"),
    "eval_packing": immaterial(None, "packing changes no held-out loss"),
    "completion_only_loss": honoured(None, "None: where rows have a prompt", None, True, False),
    "assistant_only_loss": honoured(False, "loss on the assistant's turns", True, False),
    "loss_type": honoured("nll", "the mean over the tokens of a step", "nll", "chunked_nll"),
    "activation_offloading": _OFFLOAD,
    "pad_token": _PAD,
    # names of older releases
    "max_seq_length": honoured(None, "max_length"),
    "num_of_sequences": immaterial(None, "rows are read and tokenised once"),
    "chars_per_token": immaterial(None, "rows are read and tokenised once"),
    "dataset_batch_size": immaterial(None, "rows are read and tokenised once"),
}
"""Every argument of trl.SFTConfig."""

DPO: dict[str, Argument] = TRAINING | {
    "learning_rate": honoured(1e-6, "[optimizer] learning_rate"),
    **_MODEL,
    "disable_dropout": immaterial(True, "no model here has dropout"),
    "dataset_num_proc": immaterial(None, "rows are read and tokenised once, in this process"),
    "max_length": honoured(1024, "rows are cut behind so many tokens; None: the model's limit"),
    "truncation_mode": _KEEP_START,
    "padding_free": immaterial(False, "nothing is padded"),
    "precompute_ref_log_probs": immaterial(
        False, "the reference is the same weights with the adapter off, in each step"
    ),
    "precompute_ref_batch_size": immaterial(None, "see precompute_ref_log_probs"),
    "loss_type": honoured(["sigmoid"], "[loss] name, and 'sft' beside it: [loss] sft_coef"),
    "loss_weights": honoured(None, "[loss] sft_coef: the weight of 'sft'; the other's is 1"),
    "ld_alpha": refused(None, "all tokens of an answer weigh the same", "leave it out"),
    "f_divergence_type": refused("reverse_kl", "other divergences are not built", "leave it out"),
    "f_alpha_divergence_coef": immaterial(0.5, "other divergences are not built"),
    "label_smoothing": honoured(0.0, "[loss] label_smoothing of sigmoid and robust"),
    "beta": honoured(0.1, "[loss] kl_coef"),
    "use_weighting": refused(False, "all pairs weigh the same", "leave it out"),
    "discopop_tau": immaterial(0.05, "discopop is not built"),
    "activation_offloading": _OFFLOAD,
    "sync_ref_model": GRPO["sync_ref_model"],
    "ref_model_mixup_alpha": GRPO["ref_model_mixup_alpha"],
    "ref_model_sync_steps": GRPO["ref_model_sync_steps"],
    "pad_token": _PAD,
    # names of older releases
    "max_prompt_length": honoured(None, "a pair with a longer prompt is dropped and counted"),
    "max_completion_length": honoured(None, "answers are cut behind so many tokens"),
    "reference_free": honoured(None, "[loss] reference_free", None, True, False),
    "rpo_alpha": honoured(None, "[loss] sft_coef"),
    "generate_during_eval": refused(
        None, "no text is sampled", "use `sparring generate`", (False,)
    ),
    "model_adapter_name": refused(None, "there is one trained adapter", "leave it out"),
    "ref_adapter_name": refused(None, "the reference is the adapter at step 0", "leave it out"),
}
"""Every argument of trl.DPOConfig."""

SFTConfig = build_config(
    "SFTConfig", SFT, "Arguments of SFTTrainer, in TRL's names and with TRL's defaults."
)
DPOConfig = build_config(
    "DPOConfig", DPO, "Arguments of DPOTrainer, in TRL's names and with TRL's defaults."
)
