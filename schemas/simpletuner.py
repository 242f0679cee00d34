"""SimpleTuner's keys that pairline does not act on, and what happens instead.

To add one, put its name in the group whose sentence is true of it, or start a group; typed options never belong here.
"""

from collections.abc import Mapping


def _same(message: str, keys: str) -> dict[str, str]:
    """One message for every name in a whitespace-separated list."""
    return dict.fromkeys(keys.split(), message)


# Keys of config.json, written there without or with a leading "--".
TRAINER_KEYS: Mapping[str, str] = (
    # Other spellings
    {
        "fused_qkv_projections": "ignored: write fuse_qkv_projections",
        "flow_matching_sigmoid_scale": "ignored: write flow_sigmoid_scale",
        "flux_schedule_shift": "ignored: write flow_schedule_shift",
        "flux_schedule_auto_shift": "ignored: write flow_schedule_auto_shift",
        "flux_use_uniform_schedule": "ignored: write flow_use_uniform_schedule",
        "disable_compel": "ignored: FLUX prompts are encoded without Compel",
    }
    | _same("ignored: write optimizer", "adam_bfloat16 use_8bit_adam use_adafactor_optimizer use_dadapt_optimizer")
    | _same("ignored: the family is chosen with model_family", "flux kolors legacy pixart_sigma sd3 smoldit")
    # Where models come from
    | _same(
        "not in this version: the default revision and variant are loaded; name a local folder to pin others",
        "revision variant non_ema_revision",
    )
    | _same(
        "not in this version: every component is loaded from pretrained_model_name_or_path",
        """
        pretrained_transformer_model_name_or_path pretrained_transformer_subfolder pretrained_vae_model_name_or_path
        pretrained_t5_model_name_or_path
        """,
    )
    | {
        "trust_remote_code": "ignored: code from model repositories is never run",
        "delete_model_after_load": "ignored: downloaded models stay where they are, pairline deletes none",
    }
    # Text encoders
    | _same(
        "not in this version: text encoders stay frozen, only a LoRA on the transformer is trained",
        """
        train_text_encoder text_encoder_lr text_encoder_limit save_text_encoder freeze_encoder freeze_encoder_before
        freeze_encoder_after freeze_encoder_strategy
        """,
    )
    | _same(
        "ignored: no family here has so many text encoders",
        "text_encoder_3_precision text_encoder_4_precision",
    )
    | _same(
        "ignored: the model family fixes how captions are tokenized, padded and encoded",
        "t5_padding flux_attention_masked_training custom_text_encoder_intermediary_layers",
    )
    | {"fully_unload_text_encoder": "ignored: train run reads cached embeddings and loads no text encoder"}
    # Quantization and precision
    | _same(
        "not in this version: base_model_precision alone chooses the quantization",
        """
        quantization_config sdnq_weights_dtype sdnq_quantized_matmul_dtype sdnq_group_size sdnq_use_quantized_matmul
        sdnq_compile_mode sdnq_use_static_quantization sdnq_use_stochastic_rounding sdnq_dequantize_fp32 sdnq_use_svd
        sdnq_svd_rank sdnq_svd_steps sdnq_use_hadamard sdnq_hadamard_group_size sdnq_modules_to_not_convert
        sdnq_modules_to_not_use_matmul sdnq_modules_dtype_dict sdnq_modules_quant_config
        """,
    )
    | {"quantize_activations": "not in this version: only weights are quantized, activations keep their precision"}
    | _same("ignored: TF32 stays at PyTorch's own default", "disable_tf32 allow_tf32")
    # Memory
    | _same(
        "not in this version: save memory with base_model_precision, gradient_checkpointing and enable_group_offload",
        """
        group_offload_to_disk_path offload_during_save offload_param_path
        enable_model_cpu_offload ramtorch ramtorch_target_modules ramtorch_text_encoder ramtorch_vae ramtorch_controlnet
        ramtorch_transformer_percent ramtorch_text_encoder_percent ramtorch_disable_sync_hooks
        ramtorch_disable_extensions musubi_blocks_to_swap musubi_block_swap_device
        """,
    )
    | _same(
        "not in this version: finer settings of gradient_checkpointing are its _interval, _keep and _backend",
        """
        gradient_checkpointing_segment_stride gradient_checkpointing_offload_attention
        gradient_checkpointing_offload_prefetch gradient_checkpointing_offload_pin_memory_max_buckets
        """,
    )
    | _same(
        "not in this version: attention uses PyTorch's scaled dot product attention",
        """
        attention_mechanism sla_config sageattention_usage enable_xformers_memory_efficient_attention
        unet_attention_slice
        """,
    )
    | _same(
        "not in this version: feed-forward layers run in one piece",
        "enable_chunked_feed_forward feed_forward_chunk_size",
    )
    | {
        "set_grads_to_none": "ignored: gradients are always released between steps",
        "accelerator_cache_clear_interval": "ignored: PyTorch alone manages its accelerator memory",
    }
    # Kinds of training and of adapter
    | _same(
        "not in this version: no ControlNet or control channels; a plain LoRA is trained",
        "controlnet control controlnet_model_name_or_path controlnet_custom_config",
    )
    | _same(
        "not in this version: of LyCORIS, lycoris_config alone is read",
        "init_lokr_norm validation_lycoris_strength",
    )
    | _same(
        "not in this version: no DoRA or SingLoRA; a plain LoRA is trained",
        "use_dora peft_lora_mode singlora_ramp_up_steps",
    )
    | _same(
        "not in this version: an adapter starts from its default initialization, or from init_lora",
        "lora_init_type init_lora_step init_lora_ema",
    )
    | _same(
        "not in this version: no assistant LoRA is loaded, the base model is trained as it is",
        "assistant_lora_path assistant_lora_strength assistant_lora_inference_strength disable_assistant_lora",
    )
    | {
        "lora_format": "not in this version: LoRA files are written in the layout diffusers loads",
        "peft_lora_target_modules": "not in this version: choose the layers with flux_lora_target",
        "slider_lora_target": "not in this version: no slider training; flux_lora_target chooses the layers",
        "layer_freeze_strategy": "ignored: everything except the LoRA is frozen",
        "diffusion_blocks_config": "not in this version: all blocks are trained together",
    }
    # Learning rate and optimizer
    | _same(
        "not in this version: lr_scheduler keeps its standard shape",
        "lr_end",
    )
    | _same("not in this version: learning_rate is used as written", "lr_scale lr_scale_sqrt")
    | _same(
        "ignored: write optimizer_config, for example weight_decay=0.01",
        """
        adam_beta1 adam_beta2 adam_epsilon adam_weight_decay optimizer_beta1 optimizer_beta2
        """,
    )
    | _same(
        "not in this version: optimizer state and gradients stay on the accelerator",
        """
        optimizer_cpu_offload_method optimizer_offload_gradients optimizer_release_gradients fuse_optimizer
        """,
    )
    | {"gradient_precision": "ignored: LoRA weights are float32, and so are their gradients"}
    | _same(
        "ignored: write optimizer prodigy, and its arguments in optimizer_config",
        "prodigy_steps use_prodigy_optimizer",
    )
    | {"grad_clip_method": "ignored: max_grad_norm always clips by norm"}
    # EMA
    | _same(
        "not in this version: the average of use_ema is kept where the weights are, and shown in evaluations",
        """
        ema_device ema_cpu_only ema_foreach_disable ema_warmup_steps ema_validation
        """,
    )
    # Noise, timesteps and loss
    | _same(
        "not in this version: timesteps come from the sigmoid, uniform, beta or fast schedule",
        """
        flow_cubic_schedule_weights flow_custom_timesteps flow_timesteps_mode flux_use_beta_schedule
        flux_beta_schedule_alpha flux_beta_schedule_beta mixflow_enabled mixflow_gamma timestep_bias_strategy
        timestep_bias_begin timestep_bias_end timestep_bias_multiplier timestep_bias_portion
        """,
    )
    | {"disable_segmented_timestep_sampling": "ignored: each sample draws its timestep independently"}
    | _same(
        "ignored: FLUX is a flow-matching model, its prediction type and schedule are fixed",
        """
        prediction_type rescale_betas_zero_snr training_scheduler_timestep_spacing inference_scheduler_timestep_spacing
        flow_matching_loss diff2flow_enabled diff2flow_loss
        """,
    )
    | _same(
        "ignored: SNR weighting is for diffusion models, here every timestep has the same weight",
        "snr_gamma snr_weight use_soft_min_snr soft_min_snr_sigma_data",
    )
    | _same(
        "ignored: huber_c is the same at every time",
        "huber_schedule",
    )
    | {"masked_loss_probability": "not in this version: every part of the image counts alike in the loss"}
    | _same(
        "not in this version: latents are mixed with plain Gaussian noise",
        "offset_noise noise_offset noise_offset_probability input_perturbation input_perturbation_steps",
    )
    | _same(
        "ignored: a rollout is one Euler step of the model itself",
        """
        scheduled_sampling_sampler scheduled_sampling_order
        """,
    )
    | _same(
        "not in this version: the target of a rolled-out sample leads to the picture, its loss has no further terms",
        """
        scheduled_sampling_reflexflow scheduled_sampling_reflexflow_alpha scheduled_sampling_reflexflow_beta1
        scheduled_sampling_reflexflow_beta2
        """,
    )
    | _same(
        "not in this version: no auxiliary loss, only the flow-matching loss is trained",
        """
        irepa_enabled irepa_spatial_norm_alpha irepa_projector_kernel_size urepa_enabled urepa_lambda
        urepa_manifold_weight urepa_model urepa_encoder_image_size urepa_use_tae urepa_scheduler urepa_warmup_steps
        urepa_decay_steps urepa_lambda_end urepa_power urepa_cutoff_step urepa_similarity_threshold
        urepa_similarity_ema_decay urepa_threshold_mode layersync_enabled layersync_student_block
        layersync_teacher_block layersync_lambda internal_guidance_enabled internal_guidance_loss_weight
        internal_guidance_block_index nextlat_enabled nextlat_block_index nextlat_weight nextlat_kl_weight
        nextlat_state_loss xm_enabled xm_block_size xm_candidate_count xm_selection_scope xm_training_target
        """,
    )
    | _same(
        "not in this version: no frame alignment loss, only the flow-matching loss is trained",
        """
        crepa_enabled crepa_block_index crepa_lambda crepa_adjacent_distance crepa_adjacent_tau
        crepa_cumulative_neighbors crepa_model crepa_encoder crepa_encoder_frames_batch_size crepa_encoder_image_size
        crepa_use_backbone_features crepa_feature_source crepa_self_flow crepa_self_flow_mask_ratio
        crepa_teacher_block_index crepa_drop_vae_encoder crepa_normalize_by_frames crepa_normalize_neighbour_sum
        crepa_spatial_align crepa_use_tae crepa_scheduler crepa_warmup_steps crepa_decay_steps crepa_lambda_end
        crepa_power crepa_cutoff_step crepa_similarity_threshold crepa_similarity_ema_decay crepa_threshold_mode
        """,
    )
    | _same(
        "not in this version: no distillation, the model is trained on the images themselves",
        "distillation_method distillation_config twinflow_enabled twinflow_target_step_count",
    )
    | _same(
        "not in this version: no grounding, bounding boxes are not read",
        "max_grounding_entities pretrained_grounding_model_name_or_path",
    )
    # Length of a run and seeds
    | _same(
        "ignored: max_train_steps and num_train_epochs alone set the length of a run",
        "ignore_final_epochs strict_epoch_limit",
    )
    | {"seed_for_each_device": "ignored: every random draw of training is derived from seed"}
    # Where data and caches live
    | _same(
        "ignored: shards live in the workspace, or where a dataset's own cache_dir or cache_dir_vae says",
        "cache_dir cache_dir_text cache_dir_vae",
    )
    | {"compress_disk_cache": "ignored: latents always live in Parquet shards, which are never compressed twice"}
    | _same(
        "ignored: prep cache encodes everything once, before train run reads it",
        """
        vae_cache_ondemand vae_cache_disable vae_cache_preprocess text_cache_ondemand text_cache_disable
        text_embed_full_cache keep_vae_loaded cache_clear_validation_prompts
        """,
    )
    | _same(
        "ignored: shards are found by content hash, so a changed image or setting never meets a stale latent",
        "vae_cache_scan_behaviour override_dataset_config preserve_data_backend_cache",
    )
    | {
        "aspect_bucket_disable_rebuild": "ignored: buckets are not rebuilt between epochs",
        "metadata_update_interval": "ignored: manifests are not saved at timed intervals",
    }
    | {"vae_enable_patch_conv": "not in this version: vae_enable_tiling saves memory, at the price of other latents"}
    # Which images and captions are used
    | _same(
        "ignored: pairline never deletes a user's files; unusable images are left out",
        "delete_unwanted_images delete_problematic_images",
    )
    | _same(
        "not in this version: images are not checked for nudity, and none is deleted",
        """
        enable_nsfw_check nsfw_check_models nsfw_check_min_votes nsfw_check_backend_types nsfw_check_sample_types
        nsfw_check_video_frame_count nsfw_check_video_frame_selection nsfw_check_video_min_flagged_frames
        delete_nsfw_images
        """,
    )
    | _same(
        "ignored: set it on the dataset",
        """
        instance_prompt prepend_instance_prompt only_instance_prompt disable_multiline_split max_upscale_threshold
        skip_file_discovery aws_max_pool_connections
        """,
    )
    | _same(
        "ignored: name the columns in the dataset's parquet object",
        "parquet_caption_column parquet_filename_column parquet_fallback_caption_column",
    )
    | {
        "ignore_missing_files": "ignored: prep scan records only the files that it finds",
        "disable_bucket_pruning": "ignored: no bucket is dropped for being small",
        "allow_dataset_oversubscription": "not in this version: repeats is used as written, never raised",
        "data_backend_sampling": "not in this version: sets weigh what they hold, times repeats and probability",
    }
    # Workers and batches while preparing and reading
    | _same(
        "ignored: pairline sizes its own workers and batches",
        """
        max_workers aspect_bucket_worker_count enable_multiprocessing torch_num_threads image_processing_batch_size
        read_batch_size dataloader_prefetch dataloader_prefetch_qlen dataloader_prefetch_device_threshold_mb
        """,
    )
    # Checkpoints
    | _same(
        "not in this version: checkpoints follow steps alone",
        "checkpoint_epoch_interval",
    )
    | {
        "checkpointing_use_tempdir": "ignored: a checkpoint always appears whole or not at all",
        "delete_invalid_checkpoints": "ignored: a broken checkpoint is left for you to delete",
    }
    | _same(
        "not in this version: free disk space is not watched, a full disk ends the run with an error",
        "disk_low_threshold disk_low_action disk_low_script",
    )
    # Validation images
    | _same(
        "not in this version: samples are one picture of each prompt and evaluation pair, by the pipeline of diffusers",
        """
        validation_epoch_interval validate_after_step validate_after_epoch validation_on_startup
        validation_prompt_library validation_input validation_method validation_using_datasets validation_randomize
        validation_seed_source validation_multigpu validation_stitch_input_location validation_guidance_rescale
        validation_guidance_skip_layers validation_guidance_skip_layers_start validation_guidance_skip_layers_stop
        validation_guidance_skip_scale validation_internal_guidance_scale validation_no_cfg_until_timestep
        validation_noise_scheduler validation_num_video_frames validation_preview validation_preview_steps
        validation_image_format validation_image_quality validation_adapter_path validation_adapter_name
        validation_adapter_strength validation_adapter_mode validation_adapter_config validation_torch_compile
        validation_torch_compile_mode num_validation_images benchmark_base_model
        """,
    )
    | _same(
        "ignored: there is no such sampling to switch off",
        "validation_disable_unconditional disable_benchmark",
    )
    | {"enable_watermark": "ignored: pairline writes no sample images that could carry a watermark"}
    | _same(
        "not in this version: evaluations follow eval_steps_interval",
        "eval_epoch_interval eval_dataset_pooling eval_loss_disable",
    )
    | _same(
        "ignored: samples are scored by PSNR and SSIM",
        "evaluation_type pretrained_evaluation_model_name_or_path",
    )
    # Scripts, uploads and messages
    | _same(
        "ignored: pairline starts no scripts of the user",
        "validation_external_script validation_external_background post_checkpoint_script post_upload_script",
    )
    | _same(
        "ignored: nothing is uploaded; the LoRA stays in output_dir for you to publish",
        "push_to_hub push_to_hub_background push_checkpoints_to_hub publishing_config hub_model_id",
    )
    | _same(
        "ignored: no model card is written",
        "model_card_private model_card_safe_for_work model_card_note model_card_base_model",
    )
    | {"modelspec_comment": "ignored: the LoRA file carries only its adapter's own metadata"}
    | _same("ignored: no webhooks; follow metrics.jsonl", "webhook_config webhook_reporting_interval")
    # Logs
    | _same(
        "ignored: metrics go to metrics.jsonl and to the tracker of report_to",
        "custom_tracker tracker_image_layout logging_dir",
    )
    | _same(
        "ignored: pairline's own log level decides what is printed",
        "debug_aspect_buckets debug_dataset_loader print_filenames print_sampler_statistics",
    )
    # How the run is started
    | _same(
        "ignored: trained on one machine with the launcher's own settings",
        """
        accelerate_config accelerate_extra_args num_processes num_machines machine_rank main_process_ip
        main_process_port same_network local_rank find_unused_parameters
        """,
    )
    | _same(
        "not in this version: no DeepSpeed or FSDP; each process holds the whole base model",
        """
        deepspeed_config fsdp_enable fsdp_version fsdp_reshard_after_forward fsdp_state_dict_type
        fsdp_cpu_ram_efficient_loading fsdp_auto_wrap_policy fsdp_limit_all_gathers fsdp_cpu_offload
        fsdp_activation_checkpointing fsdp_transformer_layer_cls_to_wrap
        """,
    )
    | _same(
        "not in this version: each process works on whole sequences",
        "context_parallel_size context_parallel_comm_strategy",
    )
    | _same(
        "ignored: dynamo_backend compiles the blocks of the model, whose sizes may vary; nothing else is chosen",
        """
        dynamo_fullgraph dynamo_dynamic dynamo_use_regional_compilation dynamo_wrapper
        dynamo_cache_export dynamo_cache_export_after_first_step dynamo_hub_repo_id
        """,
    )
    | _same("ignored: settings come from the two JSON files alone", "configs_dir merge_environment_config")
    | {"i_know_what_i_am_doing": "ignored: no check can be switched off"}
    # Other model families
    | _same(
        "ignored: image families only, no video or audio",
        """
        framerate vae_enable_temporal_roll audio_flow_schedule_shift audio_max_duration_seconds
        audio_min_duration_seconds audio_channels audio_duration_interval audio_truncation_mode validation_audio_only
        validation_audio_duration validation_lyrics acestep_lora_target lyrics_embedder_train lyrics_embedder_optimizer
        lyrics_embedder_lr lyrics_embedder_lr_scheduler ltx_train_mode ltx_i2v_prob ltx_partial_noise_fraction
        ltx_protect_first_frame ltx2_intrinsic_conditioning ltx2_first_frame_conditioning_probability
        ltx2_prefix_conditioning_frames ltx2_prefix_conditioning_probability ltx2_reference_spatial_scale_factor
        ltx2_reference_temporal_scale_factor ltx2_validation_audio_guidance ltx2_validation_pipeline_mode
        ltx2_validation_spatial_upsampler_model ltx2_validation_spatial_upsampler_filename
        validation_ltx2_video_conditioning wan_force_2_1_time_embedding wan_validation_load_other_stage
        minimax_h3_reference_mode minimax_h3_target_mode minimax_h3_sparse_attention minimax_h3_sparse_block_shape
        minimax_h3_sparse_video_kv_fraction minimax_h3_sparse_share_heads minimax_h3_sparse_start_layer
        minimax_music_train_component minimax_music_lm_adapter minimax_music_lm_adapter_strength
        minimax_music_lm_precache_mode minimax_music_lm_max_frames minimax_music_lm_continuation_crop_mode
        minimax_music_lm_max_duration_seconds minimax_music_lm_min_duration_seconds minimax_music_lm_target_frames
        minimax_music_lm_window_mode minimax_music_rvq_encoder_model_name_or_path minimax_music_rvq_encoder_revision
        minimax_music_rvq_encoder_subfolder minimax_music_rvq_vae_model_name_or_path cosmos3_reasoner_component
        cosmos3_generator_component
        """,
    )
    | _same(
        "ignored: belongs to a model family that pairline does not train",
        """
        pretrained_unet_model_name_or_path pretrained_unet_subfolder pretrained_gemma_model_name_or_path
        qwen_text_encoder_model_name_or_path smoldit_config data_aesthetic_score refiner_training
        refiner_training_invert_schedule refiner_training_strength sdxl_refiner_uses_full_range
        sdxl_validation_pipeline_mode sdxl_validation_stage1_model sdxl_validation_stage2_model
        sd3_clip_uncond_behaviour sd3_t5_uncond_behaviour sd3_t5_mask_behaviour pixart_validation_pipeline_mode
        pixart_validation_stage1_model pixart_validation_stage2_model deepfloyd_validation_pipeline_mode
        deepfloyd_validation_stage1_model deepfloyd_validation_stage1_num_inference_steps
        deepfloyd_validation_stage1_guidance deepfloyd_validation_stage2_model
        deepfloyd_validation_stage2_num_inference_steps deepfloyd_validation_stage2_guidance
        deepfloyd_validation_stage3_mode deepfloyd_validation_stage3_model deepfloyd_validation_stage3_guidance
        deepfloyd_validation_stage3_noise_level hidream_use_load_balancing_loss hidream_load_balancing_loss_weight
        ideogram_auto_json ideogram_validation ideogram_prompt_upsample ideogram_fp8_base_upcast
        ideogram_prompt_enhancer_head_id ideogram_schedule_mu ideogram_schedule_std
        ideogram_load_unconditional_transformer ideogram_uncond_ramtorch krea2_reference_latents
        moss_image_uncond_skip_layers moss_image_validation_shift flux3_prompt_upsample sana_complex_human_instruction
        """,
    )
)

# Keys of one entry of multidatabackend.json.
DATASET_KEYS: Mapping[str, str] = (
    # Where images come from
    _same(
        "ignored: downloads are named by their URL, host and path",
        "csv_hash_filenames csv_shorten_filenames shorten_filenames",
    )
    | _same(
        "not in this version: remote shards are not read; unpack the images to a folder and use type local",
        """
        webshart source metadata subfolder hf_token metadata_cache_dir shard_cache_dir shard_cache_gb buffer_size
        max_file_size parallel_downloads caption_key optimize_captions optimise_captions webshart_optimize_captions
        webshart_optimise_captions
        """,
    )
    | _same(
        "ignored: no in-memory file system; caches are Parquet files under the workspace",
        "memory_filesystem_path memory_filesystem_size memory_filesystem_sudo",
    )
    | _same(
        "ignored: write composite_image_config, which says how many pictures one shows",
        "composite_image_column split_composite_images",
    )
    | _same(
        "ignored here: write it in config.json, where it holds for every dataset",
        "aspect_bucket_alignment aspect_bucket_rounding",
    )
    | {"auto_load": "ignored: a dataset is loaded when it is scanned"}
    # Links to other sets
    | _same(
        "ignored: embeddings and latents live in Parquet shards and are found by content hash",
        """
        image_embeds conditioning_image_embeds conditioning_image_embed_cache cache_dir_conditioning_image_embeds
        """,
    )
    | _same(
        "ignored: generated reference sets are described by conditioning alone",
        "conditioning_config auto_generated metadata_clone_source_id",
    )
    | _same("not in this version: no grounding, bounding boxes are not read", "grounding grounding_data")
    # Caches and scans
    | _same(
        "ignored: pairline names its shards and manifests itself",
        "hash_filenames cache_file_suffix",
    )
    | {
        "compress_cache": "ignored: latents always live in Parquet shards, which are never compressed twice",
        "metadata_update_interval": "ignored: manifests are not saved at timed intervals",
    }
    | _same(
        "ignored: every image is seen by content hash, so there is no stale cache to repair or keep",
        "preserve_data_backend_cache scan_for_errors vae_cache_scan_behaviour",
    )
    | _same(
        "ignored: prep cache encodes everything once, before train run reads it",
        "vae_cache_ondemand vae_cache_disable disable_vae_cache text_cache_ondemand text_cache_disable",
    )
    | _same(
        "ignored: set it in the trainer config, where it holds for every dataset",
        "train_batch_size vae_batch_size text_encoder_batch_size caption_dropout_probability",
    )
    | _same(
        "ignored: pairline sizes its own workers and batches",
        "read_batch_size image_processing_batch_size conditioning_image_embed_batch_size max_workers",
    )
    | _same(
        "ignored: pairline never deletes a user's files; unusable images are left out",
        "delete_unwanted_images delete_problematic_images",
    )
    | {"delete_nsfw_images": "not in this version: images are not checked for nudity, and none is deleted"}
    # Which images are used, and in what shape
    # How often and when a set is trained on
    | {
        "ignore_epochs": "ignored: every set counts towards an epoch",
        "shuffle": "ignored: the order of samples is drawn from seed",
        "timestep_sampling_offset": "not in this version: all sets share one distribution of timesteps",
        "slider_strength": "not in this version: no slider training, the set is trained on like any other",
        "disable_validation": "ignored: there is no sampling inside the run to leave the set out of",
    }
    | _same(
        "not in this version: the set is trained on from the first step to the last",
        "start_epoch start_step end_epoch end_step disable_after_epoch_step",
    )
    | _same(
        "not in this version: no prior preservation, the set is trained on like any other",
        "is_regularisation_data is_regularization_data",
    )
    | _same(
        "not in this version: no distillation, the model is trained on the images themselves",
        "distillation_type distillation_cache",
    )
    # Captions
    | {
        "data_generator": "not in this version: no images are generated from captions",
    }
    | _same(
        "not in this version: text captions are read from .txt files only",
        "caption_file_extensions caption_ingest_strategy",
    )
    # Video and audio
    | _same(
        "ignored: image families only, no video or audio",
        "video video_column audio audio_column s2v_datasets",
    )
)
