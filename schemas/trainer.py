"""The options of `config.json`: model, LoRA, optimiser, time and guidance, run folder, and defaults for datasets.

Names are SimpleTuner's. An option is declared here and nowhere else; docs/options.md and the JSON Schema follow.
"""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, model_validator

from schemas.arguments import parsed_arguments
from schemas.options import Options, option
from schemas.sizes import checked_sizes, picture_sizes


def _plain_precision(value: object) -> object:
    """Text encoders that are not quantised run in bfloat16."""
    return "no_change" if value == "bf16" else value


def _known_mode(value: object) -> object:
    """Of PyTorch's modes two differ here: sizes vary, so no step is recorded and replayed."""
    same = {None: "default", "": "default", "reduce-overhead": "default", "max-autotune-no-cudagraphs": "max-autotune"}
    return same.get(value, value) if value is None or isinstance(value, str) else value


_Mode: TypeAlias = Literal["default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead", ""]
DynamoMode: TypeAlias = Annotated[
    Literal["default", "max-autotune"], BeforeValidator(_known_mode, json_schema_input_type=_Mode | None)
]
_Given: TypeAlias = Literal["no_change", "bf16", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto"]
Precision: TypeAlias = Annotated[
    Literal["no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto"],
    BeforeValidator(_plain_precision, json_schema_input_type=_Given),
]
BasePrecision: TypeAlias = Literal[
    "no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "int8-torchao", "fp8-torchao"
]
PLAIN_TENSORS = (
    "no_change",
    "int8-quanto",
    "int8-torchao",
    "fp8-torchao",
)  # of which weights can be moved and compiled
Posterior: TypeAlias = Literal["mode", "sample", "moments"]
Interpolation: TypeAlias = Literal["lanczos", "opencv-linear"]
ResolutionType: TypeAlias = Literal["pixel", "area", "pixel_area"]
CaptionStrategy: TypeAlias = Literal["textfile", "filename", "instanceprompt", "parquet", "csv", "huggingface"]
ALIGNMENTS = (8, 16, 24, 32, 64)

DEFAULT_STEPS = 1000  # of a run that is given neither steps nor epochs


class Route(Options):
    """One span of layers that some tokens skip."""

    selection_ratio: float = option(
        ...,
        "fraction of the target's tokens that skip the span, as in TREAD's paper and code; SimpleTuner's guide of "
        "FLUX.2 calls it the fraction kept, which its own code does not do",
        ge=0,
        lt=1,
    )
    start_layer_idx: int = option(..., "first layer of the span, counted over all blocks; negative from the end")
    end_layer_idx: int = option(..., "last layer of the span, itself included; negative counts from the end")


class Tread(Options):
    """Token routing: some tokens skip some layers during training."""

    routes: tuple[Route, ...] = option(..., "spans of layers", min_length=1)


def _zero_is_none(value: object) -> object:
    return None if value in (0, "0", "") and not isinstance(value, bool) else value


ImageSize: TypeAlias = Annotated[float | None, BeforeValidator(_zero_is_none)]


def _as_object(value: str | dict[str, Any] | None) -> dict[str, Any] | None:
    return parsed_arguments(value) if isinstance(value, str) else value


Arguments: TypeAlias = Annotated[str | dict[str, Any] | None, AfterValidator(_as_object)]
PictureSizes: TypeAlias = Annotated[str | int | float, AfterValidator(checked_sizes)]


class TrainerConfig(Options):
    """Everything `config.json` may say."""

    # Model
    model_family: str = option("flux", "model family", stages="scan cache train")
    model_flavour: str | None = option(None, "flavour of the family; null is the family's own", stages="cache train")
    model_type: Literal["lora", "full"] = option(
        "lora", "what is trained: an adapter on frozen weights, or all weights of the transformer"
    )
    pretrained_model_name_or_path: str | None = option(
        None,
        "checkpoint in the Hub layout: a folder, a hub id, or `tiny`, a small random one built in the workspace; "
        "null is the flavour's hub id",
        stages="cache train",
    )
    allow_distilled: bool = option(
        False,
        "train on a checkpoint that is distilled to few steps, which is refused otherwise: a LoRA learns on the base "
        "model, and loads into the distilled one too",
    )
    base_model_precision: BasePrecision = option(
        "no_change",
        "quantisation of the frozen weights: less memory; `fp8-torchao` multiplies in float8 too, forwards and "
        "backwards, which is faster (NVIDIA's Ada, Hopper and later)",
    )
    quantize_via: Literal["cpu", "accelerator"] = option(
        "accelerator",
        "where weights are quantised, of text encoders too: on the accelerator, one layer at a time, so that it never "
        "holds the whole model in bf16; or on the CPU",
        stages="cache train",
    )
    base_model_default_dtype: Literal["bf16", "fp32"] = option(
        "bf16", "dtype of the frozen weights and so of the computation, under `mixed_precision: bf16`"
    )
    mixed_precision: Literal["bf16", "no"] = option(
        "bf16", "`bf16` computes in bfloat16, `no` in float32; LoRA weights are float32 in both"
    )
    gradient_checkpointing: bool = option(
        True, "recompute activations in the backward pass: less memory, slower", alias="use_gradient_checkpointing"
    )
    gradient_checkpointing_interval: int = option(
        1, "with `gradient_checkpointing`: every Nth block is recomputed, the others keep their activations", ge=1
    )
    gradient_checkpointing_keep: Literal["nothing", "attention"] = option(
        "nothing",
        "with `gradient_checkpointing`: what of a block is kept all the same; `attention` keeps the outputs of "
        "attention, the costliest part to recompute, as much again as the block's input",
    )
    gradient_checkpointing_backend: Literal["torch", "unsloth"] = option(
        "torch",
        "with `gradient_checkpointing`: where what recomputation starts from is until then; with `unsloth` it waits in "
        "the CPU's memory: a few GiB less, hardly slower (CUDA alone)",
    )
    fuse_qkv_projections: bool = option(
        False,
        "one product for q, k and v: larger products, for Hopper; the LoRA file has them apart again, so that it loads "
        "into every pipeline",
    )
    dynamo_backend: Literal["no", "inductor"] = option(
        "no",
        "`inductor` compiles the blocks of the model, each kind of them once and once more for sizes that vary, again "
        "for batches above one, and all that for evaluation too: a minute or two before the first step, and less "
        "where each is first needed, quicker from then on; what is compiled is kept in the workspace; needs a "
        "C++ compiler, on CUDA gcc",
    )
    memory_budget_gib: float | None = option(
        None,
        "the most of the accelerator's memory that the process may take, CUDA's own part included: `train run` keeps "
        "to it, as on a smaller card, and `train plan` plans for it; null is all that is free",
        gt=0,
    )
    dynamo_mode: DynamoMode = option(
        "default",
        "with `dynamo_backend`: `max-autotune` tries how each kernel is quickest, two minutes more before the first "
        "step of the first run, and steps a few per cent shorter",
    )
    enable_group_offload: bool = option(
        False,
        "frozen weights of blocks wait on the CPU, in memory that is locked there, until their turn: less memory, "
        "slower (CUDA alone, with `gradient_checkpointing`, quantised in eight bits at most)",
    )
    group_offload_type: Literal["block_level"] = option(
        "block_level",
        "what is moved together: whole blocks; single layers (`leaf_level`) would save nothing, for the gradients of a "
        "block need all its weights at once",
    )
    group_offload_blocks_per_group: int = option(
        1, "with group offload: blocks that are moved together", stages="cache train", ge=1
    )
    group_offload_use_stream: bool = option(
        False,
        "with group offload: copy the next blocks while these compute; faster, for the memory of both",
        stages="cache train",
    )
    group_offload_text_encoder: bool = option(
        False,
        "while prompts are encoded: layers of the text encoders wait on the CPU until their turn (CUDA alone, "
        "unquantised encoders)",
        stages="cache",
    )
    group_offload_vae: bool = option(
        False, "while pictures are encoded: the same for the blocks of the VAE (CUDA alone)", stages="cache"
    )
    text_encoder_1_precision: Precision = option(
        "no_change",
        "quantisation of the first text encoder (optimum-quanto); `bf16` is none, as `no_change`",
        stages="cache train",
    )
    text_encoder_2_precision: Precision = option(
        "no_change", "quantisation of the second text encoder (optimum-quanto)", stages="cache train"
    )

    # LoRA
    lora_type: Literal["standard", "lycoris"] = option(
        "standard", "kind of adapter: LoRA, or LyCORIS' LoKr, which peft trains and diffusers loads"
    )
    lycoris_config: str | None = option(
        None,
        "JSON file of LyCORIS, whose keys are listed below; null is factor 10, whole matrices",
    )
    lora_rank: int = option(16, "rank", ge=1, le=1024)
    lora_alpha: float | None = option(None, "strength is alpha / rank; null is the rank, strength 1", gt=0)
    lora_dropout: float = option(0.0, "dropout on the adapter's input", ge=0, lt=1)
    flux_lora_target: str | None = option(None, "preset of wrapped layers; null is the family's own")
    init_lora: str | None = option(
        None, "file of an adapter that training starts from; of the same kind, layers, rank and strength"
    )

    # Optimiser
    learning_rate: float = option(1e-4, "peak learning rate", gt=0)
    optimizer: Literal["adamw", "adamw_bf16", "optimi-adamw", "optimi-lion", "adamw8bit", "prodigy"] = option(
        "adamw",
        "optimiser; adapters are float32, so `adamw_bf16` is plain AdamW; `adamw8bit` and `prodigy` need "
        "`pip install 'pairline[adamw8bit]'` and `'pairline[prodigy]'`",
    )
    optimizer_config: Arguments = option(
        None,
        'arguments of the optimiser: an object, or a text such as "weight_decay=0.01,betas=0.9/0.99"; `beta1` and '
        "`beta2` stand for the two of `betas`",
    )
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial"
    ] = option("constant", "learning-rate schedule")
    lr_warmup_steps: int = option(0, "steps of linear warm-up, for every schedule but `constant`", ge=0)
    lr_num_cycles: int = option(1, "cycles of `cosine_with_restarts`", ge=1)
    lr_power: float = option(1.0, "power of `polynomial`", gt=0)
    max_grad_norm: float = option(
        1.0,
        "gradients are scaled down to this norm, which a single odd sample then cannot exceed; 0 does not clip",
        ge=0,
    )
    train_batch_size: int = option(1, "samples per forward pass", ge=1)
    gradient_accumulation_steps: int = option(1, "forward passes per step", ge=1, le=100_000)
    max_train_steps: int = option(0, "optimiser steps; 0 counts `num_train_epochs` instead", ge=0)
    num_train_epochs: int = option(0, "epochs, when `max_train_steps` is 0; if both are 0, 1000 steps are taken", ge=0)
    seed: int = option(42, "of training: order of samples, noise, times, dropout, initial weights of the adapter", ge=0)
    loss_type: Literal["l2", "huber", "smooth_l1"] = option(
        "l2", "loss of the velocity's error: its square, or pseudo-Huber, scaled as in diffusers' examples"
    )
    huber_c: float = option(0.1, "error at which `huber` and `smooth_l1` turn from square to straight", gt=0)
    use_ema: bool = option(
        False,
        "keep a moving average of the trained weights too; evaluation and samples show it, `ema/` has it as a file",
    )
    ema_decay: float = option(0.995, "decay of the average, reached gradually from the start", gt=0, lt=1)
    ema_update_interval: int = option(1, "steps between updates of the average", ge=1)

    # Time, guidance, conditioning
    flow_schedule_auto_shift: bool = option(True, "shift times by the number of target tokens, as FLUX was trained")
    flow_schedule_shift: float = option(
        3.0, "fixed shift, when the automatic one is off, which giving this one does; 0 and 1 are none", ge=0
    )
    flow_sigmoid_scale: float = option(1.0, "times are drawn as sigmoid(scale × normal)", gt=0)
    flow_use_uniform_schedule: bool = option(False, "draw times uniformly instead")
    flow_use_beta_schedule: bool = option(False, "draw times from a beta distribution instead")
    flow_beta_schedule_alpha: float = option(2.0, "its alpha: more is nearer to noise", gt=0)
    flow_beta_schedule_beta: float = option(2.0, "its beta: more is nearer to the picture", gt=0)
    flux_fast_schedule: bool = option(
        False,
        "draw times from the four that schnell runs at, 1 seven times as often as 0.75, 0.5 and 0.25; not shifted",
    )
    flux_guidance_mode: Literal["constant", "random-range"] = option(
        "constant", "guidance that the model is told, for flavours that take one"
    )
    flux_guidance_value: float = option(1.0, "guidance under `constant`", ge=0, le=1000)
    flux_guidance_min: float = option(0.0, "lower end under `random-range`", ge=0, le=1000)
    flux_guidance_max: float = option(4.0, "upper end under `random-range`", ge=0, le=1000)
    caption_dropout_probability: float | None = option(
        None,
        "share of showings with the empty prompt; null is 0.1 for models that are sampled with classifier-free "
        "guidance, as FLUX.2 klein, which need it, and 0 for the others",
        ge=0,
        le=1,
    )
    conditioning_dropout_probability: float = option(0.0, "share of showings without their references", ge=0, le=1)
    conditioning_multidataset_sampling: Literal["random", "combined"] = option(
        "random", "with several reference sets: one drawn per showing, or all together", stages="train"
    )
    tread_config: Tread | None = option(
        None, "token routing (TREAD): some of the target's tokens skip some blocks; references and text never do"
    )
    scheduled_sampling_max_step_offset: int = option(
        0,
        "rollout: a sample starts at a time up to this many thousandths later, and the model itself brings it to its "
        "time; 0 is off",
        ge=0,
        le=999,
    )
    scheduled_sampling_strategy: Literal["uniform", "biased_early", "biased_late"] = option(
        "uniform", "how the offset is drawn: biased to small ones, or to large ones"
    )
    scheduled_sampling_probability: float = option(0.0, "share of samples that are rolled out", ge=0, le=1)
    scheduled_sampling_prob_start: float = option(0.0, "the share at the start of a ramp", ge=0, le=1)
    scheduled_sampling_prob_end: float = option(0.5, "the share at its end", ge=0, le=1)
    scheduled_sampling_ramp_steps: int = option(0, "steps of the ramp; 0 has none, `..._probability` holds", ge=0)
    scheduled_sampling_start_step: int = option(0, "step before which nothing is rolled out, and the ramp begins", ge=0)
    scheduled_sampling_ramp_shape: Literal["linear", "cosine"] = option("linear", "shape of the ramp")

    # Run folder
    data_backend_config: str = option("multidatabackend.json", "the dataset file, beside this one", stages="")
    output_dir: str | None = option(
        None, "run folder; null is `runs/<tracker_run_name>` in the workspace", min_length=1
    )
    tracker_run_name: str = option("default", "name of the run", pattern=r"^\w[\w .-]*(/\w[\w .-]*)*$", max_length=200)
    checkpointing_steps: int = option(
        500, "steps between checkpoints; 0 writes only the last", ge=0, alias="checkpoint_step_interval"
    )
    checkpoints_total_limit: int = option(5, "checkpoints kept; 0 keeps all", ge=0)
    checkpointing_rolling_steps: int = option(
        0, "steps between checkpoints of a second kind, `checkpoint-N-rolling`, kept apart; 0 is none", ge=0
    )
    checkpoints_rolling_total_limit: int = option(1, "of these how many are kept", ge=1)
    resume_from_checkpoint: str | None = option(
        "latest", "`latest`, a checkpoint folder, or null to refuse a run folder that holds one"
    )

    # Cache
    vae_dtype: Literal["bf16", "fp32"] = option(
        "bf16", "dtype the VAE computes in; latents are stored as bfloat16", stages="cache train"
    )
    posterior: Posterior = option(
        "mode",
        "what is stored of the VAE's posterior of a target: `mode` its mean, `sample` one draw, seeded by content, "
        "`moments` mean and deviation, twice the bytes, of which training draws anew each showing; references keep the "
        "mode, as pipelines encode them",
        stages="cache train",
    )
    vae_enable_tiling: bool = option(
        False,
        "encode pictures larger than the VAE's `sample_size` in tiles that overlap: less memory, other latents",
        stages="cache train",
    )
    vae_enable_slicing: bool = option(
        False, "encode the pictures of a batch one after the other: less memory, the same latents", stages="cache"
    )
    vae_batch_size: int = option(
        4, "images per VAE batch on an accelerator; a CPU takes one at a time", stages="cache", ge=1
    )
    text_encoder_batch_size: int = option(
        1, "prompts per text-encoder batch on an accelerator; a CPU takes one at a time", stages="cache", ge=1
    )
    max_sequence_length: int | None = option(
        None,
        "tokens that prompts are padded to, and cut off at; null is the flavour's, which is also the most",
        stages="cache train",
        ge=1,
        alias="tokenizer_max_length",
    )
    text_cache_dtype: Literal["bf16", "float8"] = option(
        "bf16", "dtype that text embeds are stored in; `float8` halves their bytes", stages="cache train"
    )
    offload_during_startup: bool = option(
        False,
        "text encoders share the accelerator one at a time: each is moved there when its turn comes",
        stages="cache",
    )
    prep_seed: int = option(
        42,
        "of data preparation: random crops and degradations; apart from `seed`, so that another training seed "
        "reuses the cache",
        stages="scan pairs",
        ge=0,
    )

    # Defaults for datasets
    resolution: float = option(1024, "default for datasets", stages="scan", gt=0)
    resolution_type: ResolutionType = option("pixel_area", "default for datasets", stages="scan")
    interpolation: Interpolation = option("lanczos", "default for datasets", stages="pairs cache")
    minimum_image_size: ImageSize = option(None, "default for datasets", stages="scan", gt=0)
    maximum_image_size: ImageSize = option(None, "default for datasets", stages="scan", gt=0)
    target_downsample_size: ImageSize = option(None, "default for datasets", stages="scan", gt=0)
    caption_strategy: CaptionStrategy | None = option("filename", "default for datasets", stages="scan")
    aspect_bucket_alignment: Literal[ALIGNMENTS] | None = option(  # type: ignore[valid-type]
        None, "pixels that target sides are multiples of; null is the family's own", stages="scan"
    )
    aspect_bucket_rounding: int = option(2, "decimals of an aspect ratio", stages="scan", ge=1, le=9)

    write_batch_size: int = option(128, "default for datasets", stages="cache", ge=1)

    # Evaluation and samples
    eval_dataset_id: str | None = option(
        None,
        "dataset held out of training: its loss is measured, and its pairs are sampled; null is those of "
        "`dataset_type` eval",
    )
    eval_steps_interval: int = option(500, "steps between evaluations, besides first and last; 0 is none", ge=0)
    num_eval_images: int = option(4, "pairs of that set that are evaluated and sampled; 0 is all", ge=0)
    eval_timesteps: int = option(16, "times at which each of them is evaluated, the same ones every time", ge=4)
    validation_disable: bool = option(False, "sample no pictures")
    validation_steps: int = option(
        500,
        "steps between samples, besides the last; 0 samples after the last alone",
        ge=0,
        alias="validation_step_interval",
    )
    user_prompt_library: str | None = option(
        None, "JSON file of {name: prompt}: cached with the captions, sampled as pictures", stages="cache train"
    )
    validation_prompt: str | None = option(None, "one more prompt that is sampled", stages="cache train")
    validation_negative_prompt: str = option(
        "", "what true guidance (`validation_guidance_real`) leads away from", stages="cache train"
    )
    validation_guidance: float = option(
        3.5,
        "guidance of sampled pictures: what the model is told (Kontext is best at 2.5), or, for FLUX.2 klein, the "
        "scale of classifier-free guidance",
        ge=0,
    )
    validation_guidance_real: float = option(
        1.0,
        "true classifier-free guidance, two forward passes a step; 1 is none; models that always need it, as FLUX.2 "
        "klein, take `validation_guidance` unless this is given",
        ge=0,
    )
    validation_resolution: PictureSizes = option(
        "1024x1024",
        "size of pictures sampled from prompts: WIDTHxHEIGHT, an edge, or megapixels; several are separated by commas; "
        "pictures of pairs have their target's",
    )
    validation_num_inference_steps: int = option(28, "denoising steps of sampled pictures", ge=1)
    validation_seed: int = option(
        42, "of the noise that sampled pictures start from, the same every time", ge=0, le=2**64 - 1
    )

    # Trackers
    report_to: Literal["tensorboard", "wandb", "none"] = option(
        "tensorboard",
        "where metrics and samples go, besides metrics.jsonl; `wandb` needs `pip install 'pairline[wandb]'`",
    )
    tracker_project_name: str = option("pairline", "project under which wandb shows the run")

    @model_validator(mode="before")
    @classmethod
    def _fixed_shift(cls, given: Any) -> Any:
        """Take a shift that is given for what is meant, unless the automatic one is asked for as well."""
        if isinstance(given, dict) and "flow_schedule_shift" in given and "flow_schedule_auto_shift" not in given:
            return given | {"flow_schedule_auto_shift": False}
        return given

    @model_validator(mode="after")
    def _guidance_range(self) -> "TrainerConfig":
        if self.flux_guidance_min > self.flux_guidance_max:
            raise ValueError(
                f"flux_guidance_min {self.flux_guidance_min} is above flux_guidance_max {self.flux_guidance_max}"
            )
        return self

    @property
    def validation_sizes(self) -> tuple[tuple[int, int], ...]:
        """Return the sizes, width and height, of pictures sampled from prompts."""
        return picture_sizes(self.validation_resolution)

    @property
    def strength(self) -> float:
        """LoRA alpha, the rank where none is given."""
        return self.lora_alpha if self.lora_alpha is not None else float(self.lora_rank)

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """Arguments of the optimiser, however they were written."""
        return dict(self.optimizer_config) if isinstance(self.optimizer_config, dict) else {}
