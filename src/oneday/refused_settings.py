"""Settings of `transformers.TrainingArguments` that would do nothing here, or break what the budget decides."""

DECIDED = "the budget decides; set {} instead"
NO_EFFECT = "has no effect here; leave it out"
LAUNCHED = "is not read here; start accelerate launch with recipes/accelerate_configs/fsdp.yaml instead"
# Settings of transformers.TrainingArguments that are refused: "... sets NAME, which REASON."
REFUSED_SETTINGS = {
    "max_steps": DECIDED.format("budget_steps"),
    "num_train_epochs": DECIDED.format("budget_tokens"),
    "gradient_accumulation_steps": DECIDED.format("batch_size_tokens and micro_batch_tokens"),
    "per_device_train_batch_size": DECIDED.format("micro_batch_tokens"),
    "per_device_eval_batch_size": DECIDED.format("micro_batch_tokens"),
    "auto_find_batch_size": DECIDED.format("micro_batch_tokens"),
    "lr_scheduler_type": DECIDED.format("lr_shape"),
    "lr_scheduler_kwargs": DECIDED.format("warmup_fraction and decay_fraction"),
    "warmup_steps": DECIDED.format("warmup_fraction"),
    "eval_strategy": DECIDED.format("num_evaluations or eval_steps"),
    "save_strategy": DECIDED.format("save_minutes or save_steps"),
    "torch_compile_backend": "has no effect here; set torch_compile instead",
    "torch_compile_mode": "has no effect here; set torch_compile instead",
    "save_only_model": "would lose the optimizer of a resumed run; leave it out",
    "hub_token": "would stand in recipe.yaml; run `hf auth login` or set HF_TOKEN instead",
    "hub_always_push": "is not supported: pushes run one at a time; leave it out",
    "hub_revision": "has no effect here; leave it out",
    "include_num_input_tokens_seen": "would count nothing here; leave it out, the trackers have tokens anyway",
    "use_liger_kernel": "would replace parts of the model under the fused loss; leave it out",
    "fsdp_config": LAUNCHED,
    "parallelism_config": LAUNCHED,
    **dict.fromkeys(
        (
            "resume_from_checkpoint", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
            "label_smoothing_factor", "optim_args", "optim_target_modules", "neftune_noise_alpha", "eval_delay",
            "dataloader_num_workers", "dataloader_drop_last", "dataloader_pin_memory", "dataloader_prefetch_factor",
            "dataloader_persistent_workers", "do_train", "do_eval", "do_predict", "prediction_loss_only",
            "train_sampling_strategy", "remove_unused_columns", "ignore_data_skip", "fp16", "logging_nan_inf_filter",
            "torch_empty_cache_steps", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics",
            "length_column_name", "average_tokens_across_devices", "ddp_bucket_cap_mb", "ddp_static_graph",
            "ddp_find_unused_parameters", "ddp_broadcast_buffers", "bf16_full_eval", "fp16_full_eval",
            "enable_jit_checkpoint", "save_on_each_node", "accelerator_config", "label_names", "use_cache",
            "dataloader_multiprocessing_context", "dataloader_in_order", "eval_do_concat_batches",
            "eval_use_gather_object", "liger_kernel_config",
        ),
        NO_EFFECT,
    ),
}  # fmt: skip
