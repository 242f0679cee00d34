"""The options of `multidatabackend.json`: one entry per dataset, and the generators of its references.

Names are SimpleTuner's. An option is declared here and nowhere else; docs/options.md and the JSON Schema follow.
"""

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema, model_validator
from pydantic.json_schema import JsonSchemaValue

from schemas.keys import canonical
from schemas.options import Options, option
from schemas.recipes import Recipe
from schemas.trainer import CaptionStrategy, ImageSize, Interpolation, ResolutionType

Text: TypeAlias = Annotated[str, StringConstraints(min_length=1)]
DatasetId: TypeAlias = Annotated[
    str, StringConstraints(max_length=200, pattern=r'^[^/\\:*?"<>|\x00-\x1f.][^/\\:*?"<>|\x00-\x1f]*$')
]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _no_repeats(value: object) -> object:
    return 0 if value is None or value == "" else value


def _full_probability(value: object) -> object:
    return 1.0 if value is None or value == "" else value


def _as_buckets(value: object) -> object:
    """Read the numbers of `crop_aspect_buckets` as objects."""
    return [_as_bucket(one) for one in value] if isinstance(value, list) else value


def _as_bucket(value: object) -> object:
    if isinstance(value, AspectBucket):
        return value
    given = value if isinstance(value, dict) else {"aspect": value}
    if any(isinstance(one, bool | str | list | dict) for one in given.values()):
        raise ValueError("must be a list of numbers (width / height), or of objects {aspect, weight}")
    renamed = {"aspect_ratio": "aspect", "aspect_bucket": "aspect"}
    return {renamed.get(key, key): one for key, one in given.items()}


def _as_words(value: object) -> object:
    return [word for word in re.split(r"[\s,]+", value) if word] if isinstance(value, str) else value or []


def _as_filters(value: object) -> object:
    if value is None or isinstance(value, str) or (
        isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    ):  # fmt: skip
        return value
    raise ValueError("must be a list of texts, or the path of a .txt or .json file of them")


def _no_list(value: object) -> object:
    return [] if value is None or value == "" else value


def _no_captions(value: object) -> object:
    return [] if value is None or value is False else _as_list(value)


_TEXT_OR_LIST: JsonSchemaValue = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_NO_TEXT: JsonSchemaValue = {"anyOf": [*_TEXT_OR_LIST["anyOf"], {"const": False}, {"type": "null"}]}

Texts: TypeAlias = Annotated[tuple[Text, ...], BeforeValidator(_as_list), WithJsonSchema(_TEXT_OR_LIST)]


class Generator(Options):
    """One entry of a dataset's `conditioning`: references made from its own images."""

    recipe: Annotated[Recipe, Field(discriminator="type")] = option(
        ..., "the degradation; its parameters stand flat in the entry", stages="pairs cache"
    )
    captions: Annotated[tuple[Text, ...], BeforeValidator(_no_captions), WithJsonSchema(_NO_TEXT)] = option(
        (), "prompts instead of the images' captions; false or null keeps those", stages="pairs"
    )
    conditioning_type: Literal["reference_strict"] = option(
        "reference_strict", "generated references share their target's crop", stages="pairs"
    )
    storage: Literal["files", "ondemand"] = option(
        "ondemand",
        "`ondemand`: nothing is written, prep cache makes the pixels while encoding; `files`: prep pairs writes the "
        "very same pixels as lossless pictures",
        stages="pairs",
    )
    variants: int = option(
        1, "degradations drawn per target, shown in turn, epoch by epoch; the target is cached once", stages="pairs",
        ge=1, le=64,
    )  # fmt: skip
    instance_data_dir: str | None = option(
        None,
        "folder for the generated files",
        stages="",
        no_effect="generated pictures live in the workspace, named by their content",
    )
    cache_dir_vae: str | None = option(
        None, "folder for their latents", stages="", no_effect="latents lie with those of the source dataset"
    )


class CompositeImage(Options):
    """How one picture that shows several side by side is cut."""

    enabled: bool = option(True, "cut at all", stages="scan")
    image_count: int = option(2, "pictures side by side", stages="scan", ge=1, le=64)
    select_index: int = option(0, "which of them, from the left, 0 first", stages="scan", ge=0)

    @model_validator(mode="after")
    def _inside(self) -> "CompositeImage":
        if self.select_index >= self.image_count:
            raise ValueError(f"select_index {self.select_index} is not one of {self.image_count} pictures")
        return self


class FilterFunc(Options):
    """Which rows of a Hugging Face dataset are used; the others are rejected with a reason."""

    collection: Texts = option((), "values that the column `collection` may have; empty allows all", stages="scan")
    quality_column: Text | None = option(None, "struct of scores; null is the dataset's own", stages="scan")
    quality_thresholds: dict[str, float] = option({}, "score -> least value", stages="scan")
    min_width: int = option(0, "least width in pixels", stages="scan", ge=0)
    min_height: int = option(0, "least height in pixels", stages="scan", ge=0)


class HuggingFace(Options):
    """Where and what a dataset of `type: huggingface` is."""

    split: Text = option("train", "split", stages="scan")
    revision: str | None = option(None, "branch, tag or commit of a hub dataset", stages="scan")
    data_files: Texts = option((), "files or patterns inside it; empty takes all", stages="scan")
    streaming: bool = option(
        False,
        "scan without downloading the whole; prep cache, --verify and what decodes images download it",
        stages="scan",
    )
    cache_dir: str | None = option(None, "where `datasets` keeps downloads; null is its own place", stages="")
    num_proc: int | None = option(None, "processes that prepare a download", stages="", ge=1)
    image_column: Text = option("image", "image column", stages="scan")
    caption_column: Texts = option(
        ("caption",), "caption column or columns; dots reach into structs, a list is several captions", stages="scan"
    )
    fallback_caption_column: Text | None = option(None, "column for rows that have no other caption", stages="scan")
    width_column: Text | None = option(None, "column of widths; with heights, --no-hash opens no image", stages="scan")
    height_column: Text | None = option(None, "column of heights", stages="scan")
    quality_column: Text = option("quality_assessment", "struct of scores for `filter_func`", stages="scan")
    description_column: Text | None = option(
        None, "column of descriptions", stages="", no_effect="captions come from caption_column"
    )
    file_extension: str = option("jpg", "extension of the rows' names, `<number>.<extension>`", stages="scan")
    composite_image_config: CompositeImage | None = option(None, "cut composite pictures", stages="scan")
    filter_func: FilterFunc | None = option(None, "use only some rows", stages="scan")


class MetadataTable(Options):
    """A table of captions and sizes beside the images: Parquet, JSON lines or CSV."""

    path: Text = option(..., "the table, from the root or from the images' folder", stages="scan")
    filename_column: Text = option(..., "column of names, relative to the images' folder", stages="scan")
    identifier_includes_extension: bool = option(
        False, "names carry the images' extension; if false, they are compared without", stages="scan"
    )
    caption_column: Texts = option((), "caption column or columns; a list is several captions", stages="scan")
    fallback_caption_column: Text | None = option(None, "column for images that have no other caption", stages="scan")
    width_column: Text | None = option(None, "column of widths; with heights, --no-hash opens no image", stages="scan")
    height_column: Text | None = option(None, "column of heights", stages="scan")
    bbox_column: Text | None = option(None, "column of boxes", stages="", no_effect="boxes are not used")


class AspectBucket(Options):
    """One choice of `crop_aspect_buckets`."""

    aspect: float = option(..., "width / height", stages="scan", gt=0, le=100)
    weight: float = option(1.0, "how often it is drawn under `crop_aspect: random`", stages="scan", gt=0)


class CaptionShuffle(Options):
    """Variants of a caption of tags in another order."""

    enable: bool = option(False, "make variants", stages="scan")
    count: int = option(1, "variants per caption", stages="scan", ge=1, le=1000)
    seed: int | None = option(None, "of the order; null is prep_seed", stages="scan")
    split_on: Literal["comma", "space", "period"] = option("comma", "what stands between tags", stages="scan")
    position_start: int = option(0, "first tags that keep their place", stages="scan", ge=0)
    include_original: bool = option(True, "keep the caption as written too", stages="scan")


class ImagePolicy(Options):
    """What becomes of images that are not plain 8-bit RGB pictures; every kind is counted in the summary."""

    orientation: Literal["apply", "ignore"] = option("apply", "EXIF orientation", stages="scan")
    alpha: Literal["compose", "reject"] = option(
        "compose", "transparency is laid over `alpha_background`", stages="scan"
    )
    alpha_background: Annotated[str, StringConstraints(pattern=r"^(white|black|gray|#[0-9a-fA-F]{6})$")] = option(
        "white", "`white`, `black`, `gray` or `#rrggbb`", stages="scan"
    )
    color_profile: Literal["convert", "ignore"] = option(
        "convert", "pictures with an ICC profile are converted to sRGB", stages="scan"
    )
    cmyk: Literal["convert", "reject"] = option("convert", "printing colours become RGB", stages="scan")
    high_depth: Literal["scale", "reject"] = option("scale", "more than 8 bits, or float", stages="scan")
    animation: Literal["first", "reject"] = option("first", "the first picture of several counts", stages="scan")
    maximum_megapixels: float = option(179, "larger pictures are rejected unread", stages="scan", gt=0, le=2000)


class AlignmentCheck(Options):
    """How strict references are compared with their targets, on small gray versions."""

    enabled: bool = option(True, "compare at all; `prep pairs --no-align` leaves it out once", stages="pairs")
    # Of good pairs, 99 % err by less than 0.23 pixels and 0.2 % (photographs of 512 to 1024 pixels, 20 kinds of edits).
    maximum_shift: float = option(
        0.7, "pixels of the training picture by which a reference may lie beside its target", stages="pairs", ge=0
    )
    maximum_scale: float = option(
        0.006, "share by which what it shows may be larger or smaller", stages="pairs", ge=0, le=1
    )
    # Of other pictures 99 % have less; many a good edit too, so it never accuses by itself.
    minimum_similarity: float = option(
        0.6, "structural similarity (SSIM) above which nothing is taken for another picture", stages="pairs", ge=0, le=1
    )
    misaligned: Literal["report", "reject"] = option(
        "report", "name such pairs, or leave them out, as `prep pairs --reject-misaligned` does", stages="pairs"
    )


def _spelled(says: dict[str, object]) -> str:
    return canonical(says) if says else ""


_URL_KEYS = "`type: aws`, and s3:// URLs"


class DatasetConfig(Options):
    """One dataset."""

    id: DatasetId = option(..., "unique name; also the name of its files in the workspace", stages="scan pairs")
    type: Literal["local", "huggingface", "csv", "aws"] = option("local", "where its images come from", stages="scan")
    dataset_type: Literal["image", "conditioning", "eval", "text_embeds"] = option(
        "image",
        "what it is for: targets, references, held-out targets, or the place of the text cache",
        stages="scan pairs",
    )
    disabled: bool = option(False, "leave this entry out", stages="", alias="disable")
    default: bool = option(False, "of several `text_embeds` entries, the one that is used", stages="cache train")

    # Files and caches
    instance_data_dir: Text | None = option(
        None,
        "folder of images, sub-folders included; or a URL that fsspec reads: s3://, gs://, hf://, https://",
        stages="scan",
        alias="instance_data_root",
    )
    cache_dir: str | None = option(
        None, "text_embeds: where text shards lie; a folder, or a URL that fsspec writes to", stages="cache train"
    )
    cache_dir_vae: str | None = option(
        None,
        "where its latent shards lie: a folder, or a URL that fsspec writes to (s3://, gs://, hf://); several datasets "
        "may share one",
        stages="cache train",
    )
    dataset_name: Text | None = option(None, "`type: huggingface`: hub name, or path of a dataset", stages="scan")
    huggingface: HuggingFace = option(HuggingFace(), "`type: huggingface`: columns, split, filters", stages="scan")
    csv_file: Text | None = option(None, "`type: csv`: the table, with a header line", stages="scan")
    csv_url_column: Text = option("url", "`type: csv`: column of URLs, or of paths beside the table", stages="scan")
    csv_caption_column: Text | None = option(None, "`type: csv`: column of captions", stages="scan")
    csv_cache_dir: Text | None = option(
        None, "`type: csv`: where images are downloaded to; null is `downloads/<id>` in the workspace", stages="scan"
    )
    aws_bucket_name: Text | None = option(None, "`type: aws`: bucket", stages="scan")
    aws_data_prefix: str | None = option(None, "`type: aws`: folder in the bucket", stages="scan")
    aws_endpoint_url: str | None = option(None, f"{_URL_KEYS}: of a service that is not Amazon's", stages="scan")
    aws_region_name: str | None = option(None, f"{_URL_KEYS}: region", stages="")
    aws_access_key_id: str | None = option(None, f"{_URL_KEYS}: null asks the environment", stages="", repr=False)
    aws_secret_access_key: str | None = option(None, f"{_URL_KEYS}: null asks the environment", stages="", repr=False)
    aws_session_token: str | None = option(None, f"{_URL_KEYS}: null asks the environment", stages="", repr=False)
    aws_max_pool_connections: int = option(128, f"{_URL_KEYS}: connections at once", stages="", ge=1)
    metadata_backend: Literal["discovery", "json", "filesystem", "parquet", "huggingface"] = option(
        "discovery",
        "`parquet` asks for a table of widths and heights, `huggingface` goes with that type; `--no-hash` takes sizes "
        "from the columns that name them, otherwise from the images' headers",
        stages="",
    )
    parquet: MetadataTable | None = option(None, "table of captions and sizes", stages="scan")
    skip_file_discovery: Annotated[tuple[str, ...], BeforeValidator(_as_words), WithJsonSchema(_TEXT_OR_LIST)] = option(
        (),
        "`metadata` or `aspect`: a manifest of these settings is taken as it is, the folder is not looked at",
        stages="",
    )
    vae_cache_clear_each_epoch: bool = option(
        False,
        "another random crop each epoch: without `crop_variants`, 4 are cached and shown in turn",
        stages="pairs",
    )
    crop_variants: int | None = option(
        None, "random crops cached per image, shown in turn, epoch by epoch; null is 1", stages="pairs", ge=1, le=64
    )
    write_batch_size: int = option(
        128,
        "rows per write: what a killed run may lose of finished work, but of what is older than 5 s at most 8 MiB or "
        "one row",
        stages="cache",
        ge=1,
    )

    # Pairing
    conditioning_data: Texts = option((), "id or ids of the reference sets", stages="pairs")
    conditioning_type: Literal["reference_strict", "reference_loose"] | None = option(
        None, "references take their target's resize and crop, or have their own", stages="scan pairs"
    )
    source_dataset_id: str | None = option(None, "the target set this reference set belongs to", stages="pairs")
    conditioning: tuple[Generator, ...] = option((), "generators of references", stages="pairs")
    ignore_extension: bool = option(
        False, "pair `a.jpg` with `a.png`; two files that differ in nothing else are a fault then", stages="pairs"
    )
    on_unpaired: Literal["error", "drop", "train_without_reference"] = option(
        "error",
        "targets that lack a reference, or whose reference is unreadable, of another aspect or the target itself: "
        "`error` lists them all and pairs nothing, `drop` leaves them out, `train_without_reference` keeps them with "
        "the references they have",
        stages="pairs",
    )
    identical_references: Literal["refuse", "keep"] = option(
        "refuse", "references with the very bytes of their target: a fault, or pairs like others", stages="pairs"
    )
    alignment_check: AlignmentCheck = option(
        AlignmentCheck(), "whether strict references lie on their targets", stages="pairs"
    )

    # Amount
    repeats: Annotated[int, BeforeValidator(_no_repeats)] = option(
        0, "extra showings of each image per epoch; 0 is shown once", stages="pairs", ge=0, le=1_000_000
    )
    probability: Annotated[float, BeforeValidator(_full_probability)] = option(
        1.0, "share of the set that each epoch shows, another one each time", stages="train", gt=0, le=1
    )
    max_num_samples: int | None = option(
        None, "use only so many of the usable images, drawn by seed", stages="scan", ge=1
    )

    # Sizes and crops
    resolution: float = option(
        1024, "edge in pixels (`pixel`, `pixel_area`) or megapixels (`area`)", stages="scan", gt=0
    )
    resolution_type: ResolutionType = option(
        "pixel_area",
        "`pixel`: shorter edge; `area`: megapixels; `pixel_area`: edge of the square of equal area",
        stages="scan",
    )
    interpolation: Interpolation = option(
        "lanczos",
        "how pictures are scaled: `lanczos`, antialiased, or `opencv-linear`, not antialiased, as SimpleTuner does",
        stages="pairs cache",
    )
    crop: bool = option(False, "crop to `crop_aspect`; without, only to the bucket's alignment", stages="scan")
    crop_aspect: Literal["square", "preserve", "closest", "random"] = option(
        "square",
        "aspect under `crop: true`: a square, the image's own, the nearest of `crop_aspect_buckets`, or one drawn",
        stages="scan",
    )
    crop_aspect_buckets: Annotated[tuple[AspectBucket, ...], BeforeValidator(_as_buckets)] = option(
        (), "aspects (width / height) for `closest` and `random`: numbers, or {aspect, weight}", stages="scan"
    )
    crop_style: Literal["random", "center", "centre", "corner", "face"] = option(
        "random",
        "where the crop lies; random ones are drawn by seed and shared by references, `face` is centred on the "
        "largest face, on the middle where none is found",
        stages="scan",
    )
    minimum_image_size: ImageSize = option(
        None, "smaller images are rejected, by edge (`pixel`) or area, before any resize", stages="scan", gt=0
    )
    maximum_image_size: ImageSize = option(
        None,
        "with `target_downsample_size` and `crop: true`, images are scaled to that before the crop; its own value does "
        "not matter",
        stages="scan",
        gt=0,
    )
    target_downsample_size: ImageSize = option(None, "see `maximum_image_size`", stages="scan", gt=0)
    minimum_aspect_ratio: ImageSize = option(
        None, "images whose own width / height, rounded, is less are rejected", stages="scan", gt=0
    )
    maximum_aspect_ratio: ImageSize = option(
        None, "images whose own width / height, rounded, is more are rejected", stages="scan", gt=0
    )
    max_upscale_threshold: float | None = option(
        None,
        "images that would be enlarged by more than this share are rejected: 0.2 allows 1.2 times; `closest` and "
        "`random` first leave out the aspects that would need more",
        stages="scan",
        ge=0,
        le=1,
    )
    image_policy: ImagePolicy = option(
        ImagePolicy(), "transparency, colour profiles, animations and more", stages="scan"
    )
    exact_duplicates: Literal["report", "reject"] = option(
        "report", "files of equal bytes: counted, or all but the first rejected", stages="scan"
    )
    near_duplicates: Literal["ignore", "report", "reject"] = option(
        "ignore",
        "pictures that look alike (perceptual hash; every image is decoded once): counted, or all but the first "
        "rejected",
        stages="scan",
    )
    near_duplicate_distance: int = option(
        4, "bits of 64 by which the hashes of pictures that look alike may differ", stages="scan", ge=0, le=16
    )

    # Captions
    caption_strategy: CaptionStrategy | None = option(
        "filename", "where captions come from; null is none", stages="scan"
    )
    caption_encoding: str = option("utf-8", "encoding of text files; a byte-order mark overrides it", stages="scan")
    disable_multiline_split: bool = option(False, "a text file is one caption, lines and all", stages="scan")
    instance_prompt: Annotated[Texts, BeforeValidator(_no_list)] = option(
        (), "caption or captions under `instanceprompt`", stages="scan"
    )
    prepend_instance_prompt: bool = option(False, "put `instance_prompt` before every caption", stages="scan")
    only_instance_prompt: bool = option(False, "use `instance_prompt` instead of captions", stages="scan")
    caption_shuffle: CaptionShuffle = option(CaptionShuffle(), "variants of captions of tags", stages="scan")
    caption_filter_list: Annotated[tuple[str, ...] | str | None, BeforeValidator(_as_filters)] = option(
        None,
        "text_embeds: what to take out of captions, in order: texts, regular expressions, `s/old/new/`; or the path "
        "of a .txt or .json file of them",
        stages="",
    )
    text_embeds: str | None = option(
        None, "the `text_embeds` entry whose `caption_filter_list` holds", stages="", alias="text_embed_cache"
    )

    @property
    def upright(self) -> str:
        """Spell how its files become upright pictures, as far as that is not the default."""
        return _spelled(self._turned())

    @property
    def view(self) -> str:
        """Spell how its files become training pictures, as far as that is not the default; part of latent keys.

        That is `upright`, and how they are scaled.
        """
        scaled = {"interpolation": self.interpolation} if self.interpolation != "lanczos" else {}
        return _spelled(self._turned() | scaled)

    def _turned(self) -> dict[str, object]:
        policy, composite = self.image_policy, self.huggingface.composite_image_config
        says: dict[str, object] = {
            name: getattr(policy, name)
            for name in ("orientation", "alpha_background", "color_profile")
            if getattr(policy, name) != ImagePolicy.model_fields[name].default
        }
        if self.type == "huggingface" and composite is not None and composite.enabled:
            says["part"] = [composite.select_index, composite.image_count]
        return says

    @property
    def random_crops(self) -> bool:
        """Tell a set whose crops are drawn."""
        return self.crop_style == "random"

    @property
    def crops(self) -> int:
        """Return how many random crops of an image are cached."""
        if not self.random_crops:
            return 1
        return self.crop_variants or (4 if self.vae_cache_clear_each_epoch else 1)

    @property
    def variants(self) -> int:
        """Return how many rows a target has: its random crops, each with every draw of its degradations."""
        return self.crops * max((entry.variants for entry in self.conditioning), default=1)

    @property
    def is_target(self) -> bool:
        """Tell a set of targets from references and text stores."""
        return self.dataset_type in ("image", "eval")

    @property
    def generated_ids(self) -> tuple[str, ...]:
        """Name the reference sets that `conditioning` makes, as SimpleTuner does; a second of a type gets a number."""
        types = [entry.recipe.type for entry in self.conditioning]
        return tuple(
            f"{self.id}_conditioning_{kind}" + (f"_{before + 1}" if (before := types[:place].count(kind)) else "")
            for place, kind in enumerate(types)
        )
