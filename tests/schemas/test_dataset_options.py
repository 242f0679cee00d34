"""Every key of an image dataset: what it may be, what it may not, and where it has no effect."""

import json

import pytest

from families import open_project
from schemas.datasets import AspectBucket, DatasetConfig, Generator
from schemas.errors import ConfigError
from schemas.simpletuner import DATASET_KEYS

LOCAL = {"id": "photos", "instance_data_dir": "photos"}
HUB = {"id": "photos", "type": "huggingface", "dataset_name": "team/photos"}
LIST = {"id": "photos", "type": "csv", "csv_file": "photos.csv"}
BUCKET = {"id": "photos", "type": "aws", "aws_bucket_name": "photos"}
TARGETS = {"id": "targets", "instance_data_dir": "targets", "conditioning_data": "photos"}
REFERENCES = {**LOCAL, "conditioning_type": "reference_strict"}
TEXT = {"id": "text", "dataset_type": "text_embeds"}
CROP = {"crop": True, "crop_aspect_buckets": [1]}
TABLE = {"path": "table.parquet", "filename_column": "file"}


def written(folder, *datasets, **config):
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    return folder


def opened(folder, *datasets, **config):
    """Open a project, and return it with its dataset "photos"."""
    project = open_project(written(folder, *datasets, **config))
    return project, project.dataset("photos")


def faults_of(folder, *datasets, **config):
    with pytest.raises(ConfigError) as caught:
        open_project(written(folder, *datasets, **config))
    return [str(fault).removeprefix("multidatabackend.json: ") for fault in caught.value.faults]


def at(options, path):
    for name in path.split("."):
        options = getattr(options, name)
    return options


# (dataset, where the value lands, normalised value)
ACCEPTED = [
    ({**LOCAL, "type": "local"}, "type", "local"),
    (LOCAL, "type", "local"),
    (LOCAL, "dataset_type", "image"),
    ({**LOCAL, "dataset_type": "eval"}, "dataset_type", "eval"),
    (REFERENCES, "dataset_type", "conditioning"),
    ({**LOCAL, "conditioning_type": None}, "dataset_type", "image"),
    ({"id": "photos", "instance_data_root": "photos"}, "instance_data_dir", "photos"),
    ({**LOCAL, "instance_data_dir": "hf://datasets/team/photos"}, "instance_data_dir", "hf://datasets/team/photos"),
    ({**LOCAL, "cache_dir_vae": "latents"}, "cache_dir_vae", "latents"),
    ({**LOCAL, "metadata_backend": "json"}, "metadata_backend", "json"),
    ({**LOCAL, "metadata_backend": "parquet", "parquet": TABLE}, "parquet.width_column", "width"),
    ({**LOCAL, "metadata_backend": "parquet", "parquet": {**TABLE, "height_column": "h"}}, "parquet.height_column", "h"),
    ({**LOCAL, "parquet": {**TABLE, "caption_column": ["a", "b"]}}, "parquet.caption_column", ("a", "b")),
    ({**LOCAL, "parquet": {**TABLE, "caption_column": "a"}}, "parquet.caption_column", ("a",)),
    ({**LOCAL, "parquet": {**TABLE, "bbox_column": "box"}}, "parquet.identifier_includes_extension", False),
    ({**LOCAL, "skip_file_discovery": "vae, aspect,metadata"}, "skip_file_discovery", ("vae", "aspect", "metadata")),
    ({**LOCAL, "skip_file_discovery": ["text"]}, "skip_file_discovery", ("text",)),
    ({**LOCAL, "skip_file_discovery": ""}, "skip_file_discovery", ()),
    ({**LOCAL, "vae_cache_clear_each_epoch": True}, "variants", 4),
    ({**LOCAL, "crop_variants": 3, "vae_cache_clear_each_epoch": True}, "variants", 3),
    ({**LOCAL, "crop_variants": 3, "crop_style": "corner"}, "variants", 1),
    ({**LOCAL, "repeats": 3}, "repeats", 3),
    ({**LOCAL, "repeats": ""}, "repeats", 0),
    ({**LOCAL, "probability": 0.25}, "probability", 0.25),
    ({**LOCAL, "probability": ""}, "probability", 1.0),
    ({**LOCAL, "max_num_samples": 10}, "max_num_samples", 10),
    ({**LOCAL, "resolution": 512}, "resolution", 512),
    ({**LOCAL, "resolution": 1024.0}, "resolution", 1024),
    ({**LOCAL, "resolution": "768"}, "resolution", 768),
    ({**LOCAL, "resolution": 0.5, "resolution_type": "area"}, "resolution", 0.5),
    ({**LOCAL, "resolution_type": "pixel"}, "resolution_type", "pixel"),
    ({**LOCAL, "crop": "true"}, "crop", True),
    ({**LOCAL, "crop": 1}, "crop", True),
    ({**LOCAL, "crop": None}, "crop", False),
    ({**LOCAL, "crop": True, "crop_aspect": "preserve"}, "crop_aspect", "preserve"),
    ({**LOCAL, **CROP, "crop_aspect": "random"}, "crop_aspect", "random"),
    ({**LOCAL, "crop_style": "centre"}, "crop_style", "centre"),
    ({**LOCAL, "crop": True, "crop_style": "face"}, "crop_style", "face"),
    ({**LOCAL, "minimum_image_size": 512}, "minimum_image_size", 512),
    ({**LOCAL, "minimum_image_size": 16, "resolution_type": "pixel", "resolution": 64}, "minimum_image_size", 16),
    ({**LOCAL, "maximum_image_size": 4472, "target_downsample_size": 4472}, "maximum_image_size", 4472),
    ({**LOCAL, "crop": True, "maximum_image_size": 1024}, "maximum_image_size", 1024),
    ({**LOCAL, "minimum_aspect_ratio": 0.5, "maximum_aspect_ratio": 0.5}, "maximum_aspect_ratio", 0.5),
    ({**LOCAL, "minimum_aspect_ratio": 0}, "minimum_aspect_ratio", None),
    ({**LOCAL, "max_upscale_threshold": 0.2}, "max_upscale_threshold", 0.2),
    ({**LOCAL, "image_policy": {"alpha_background": "#00ff7F"}}, "image_policy.alpha_background", "#00ff7F"),
    ({**LOCAL, "image_policy": {"cmyk": "reject"}}, "image_policy.cmyk", "reject"),
    ({**LOCAL, "exact_duplicates": "reject"}, "exact_duplicates", "reject"),
    ({**LOCAL, "near_duplicates": "report", "near_duplicate_distance": 0}, "near_duplicate_distance", 0),
    ({**LOCAL, "caption_strategy": "textfile"}, "caption_strategy", "textfile"),
    ({**LOCAL, "caption_strategy": None}, "caption_strategy", None),
    (HUB, "caption_strategy", "huggingface"),
    ({**LIST, "csv_caption_column": "text"}, "caption_strategy", "csv"),
    (LIST, "caption_strategy", "filename"),
    (LIST, "csv_url_column", "url"),
    ({**LIST, "csv_cache_dir": "downloads", "csv_url_column": "link"}, "csv_url_column", "link"),
    (REFERENCES, "caption_strategy", None),
    ({**LOCAL, "caption_strategy": "textfile", "caption_encoding": "cp1252"}, "caption_encoding", "cp1252"),
    ({**LOCAL, "caption_strategy": "textfile", "disable_multiline_split": True}, "disable_multiline_split", True),
    ({**LOCAL, "caption_strategy": "instanceprompt", "instance_prompt": "a"}, "instance_prompt", ("a",)),
    ({**LOCAL, "only_instance_prompt": True, "instance_prompt": ["a", "b"]}, "instance_prompt", ("a", "b")),
    ({**LOCAL, "instance_prompt": ""}, "instance_prompt", ()),
    ({**LOCAL, "caption_shuffle": {"enable": True, "count": 3, "seed": None}}, "caption_shuffle.count", 3),
    ({**LOCAL, "caption_shuffle": {"enable": True, "split_on": "period"}}, "caption_shuffle.split_on", "period"),
    ({**LOCAL, "caption_shuffle": None}, "caption_shuffle.enable", False),
    ({**BUCKET, "aws_data_prefix": "sub", "aws_endpoint_url": "http://here"}, "aws_data_prefix", "sub"),
    ({**BUCKET, "aws_region_name": "eu", "aws_access_key_id": "a", "aws_secret_access_key": "b"}, "aws_region_name", "eu"),
    ({**BUCKET, "aws_session_token": None, "aws_max_pool_connections": 8}, "aws_max_pool_connections", 8),
    (HUB, "huggingface.split", "train"),
    ({**HUB, "huggingface": {"split": "test"}}, "huggingface.split", "test"),
    ({**HUB, "split": "test"}, "huggingface.split", "test"),
    ({**HUB, "--split": "test"}, "huggingface.split", "test"),
    ({**HUB, "split": "test", "huggingface": {"split": "test"}}, "huggingface.split", "test"),
    ({**HUB, "split": "test", "huggingface": {"image_column": "a"}}, "huggingface.image_column", "a"),
    ({**HUB, "huggingface": {"split": None, "num_proc": None}}, "huggingface.split", "train"),
    ({**HUB, "huggingface": None}, "huggingface.split", "train"),
    ({**HUB, "cache_dir": "downloads"}, "huggingface.cache_dir", "downloads"),
    ({**HUB, "revision": "v1", "streaming": True, "num_proc": 4}, "huggingface.revision", "v1"),
    ({"id": "photos", "type": "huggingface", "huggingface": {"dataset_name": "a/b"}}, "dataset_name", "a/b"),
    ({**HUB, "metadata_backend": "huggingface"}, "metadata_backend", "huggingface"),
    ({**HUB, "metadata_backend": None}, "metadata_backend", "discovery"),
    ({**HUB, "huggingface": {"caption_column": "a.b"}}, "huggingface.caption_column", ("a.b",)),
    ({**HUB, "huggingface": {"caption_column": ["a", "b"]}}, "huggingface.caption_column", ("a", "b")),
    ({**HUB, "composite_image_config": {"image_count": 2}}, "huggingface.composite_image_config.image_count", 2),
    ({**HUB, "filter_func": {"collection": "a"}}, "huggingface.filter_func.collection", ("a",)),
    (
        {**HUB, "huggingface": {"filter_func": {"quality_thresholds": {"sharp": 3}, "min_width": 64}}},
        "huggingface.filter_func.quality_thresholds",
        {"sharp": 3.0},
    ),
    ({**LOCAL, "text_embed_cache": "text"}, "text_embeds", "text"),
]  # fmt: skip


@pytest.mark.parametrize(("dataset", "path", "value"), ACCEPTED)
def test_a_valid_value_lands_where_it_belongs_as_what_it_means(dataset, path, value, tmp_path):
    _, photos = opened(tmp_path, dataset, TARGETS if dataset.get("conditioning_type") else TEXT, {**LOCAL, "id": "more"},
                       TEXT if dataset.get("conditioning_type") else {**TEXT, "id": "text2"})  # fmt: skip
    assert at(photos, path) == value


# (dataset, what its one fault says after the place)
REFUSED = [
    ({"instance_data_dir": "photos"}, "[0] id: missing, but required"),
    ({**LOCAL, "id": ""}, '[0] "" id = "": must be fit for a file name; no / \\ : * ? " < > | and no dot in front'),
    ({**LOCAL, "id": None}, "[0] id: missing, but required"),
    ({**LOCAL, "type": "loca"}, "type = \"loca\": must be one of 'local', 'huggingface', 'csv' or 'aws'; did you mean 'local'?"),
    ({**LOCAL, "type": "memory"}, "type = \"memory\": must be one of 'local', "),
    ({**LOCAL, "dataset_type": "video"}, "dataset_type = \"video\": must be one of 'image', 'conditioning', 'eval' or 'text_embeds'"),
    ({**LOCAL, "conditioning_type": "controlnet"}, "conditioning_type = \"controlnet\": must be one of 'reference_strict' or 'reference_loose'"),
    ({"id": "photos"}, 'instance_data_dir: missing, but required; a dataset of type "local" lies there'),
    ({**LOCAL, "instance_data_dir": ""}, 'instance_data_dir = "": must not be empty'),
    ({"id": "photos", "type": "huggingface"}, "dataset_name: missing, but required"),
    ({"id": "photos", "type": "csv"}, "csv_file: missing, but required"),
    ({"id": "photos", "type": "aws"}, "aws_bucket_name: missing, but required"),
    ({**BUCKET, "aws_max_pool_connections": 0}, "aws_max_pool_connections = 0: must be greater than or equal to 1"),
    ({**LOCAL, "metadata_backend": "sqlite"}, "metadata_backend = \"sqlite\": must be one of 'discovery', 'json', "),
    ({**LOCAL, "metadata_backend": "huggingface"}, "metadata_backend = \"huggingface\": goes with type 'huggingface', and that with no other; leave it out"),
    ({**HUB, "metadata_backend": "discovery"}, "metadata_backend = \"discovery\": goes with type 'huggingface', "),
    ({**LOCAL, "metadata_backend": "parquet"}, 'metadata_backend = "parquet": needs a table of widths and heights; "parquet": {"path": '),
    ({**LOCAL, "parquet": {"path": "a.parquet"}}, "parquet.filename_column: missing, but required"),
    ({**LOCAL, "parquet": "a.parquet"}, 'parquet = "a.parquet": must be an object'),
    ({**LOCAL, "parquet": {**TABLE, "caption_colum": "a"}}, "parquet.caption_colum = \"a\": unknown key; did you mean 'caption_column'?"),
    ({**LOCAL, "skip_file_discovery": 3}, "skip_file_discovery = 3: must be a list"),
    ({**LOCAL, "crop_variants": 0}, "crop_variants = 0: must be greater than or equal to 1"),
    ({**LOCAL, "vae_cache_clear_each_epoch": "each"}, 'vae_cache_clear_each_epoch = "each": must be true or false'),
    ({**LOCAL, "repeats": -1}, "repeats = -1: must be greater than or equal to 0"),
    ({**LOCAL, "repeats": 1.5}, "repeats = 1.5: must be a whole number"),
    ({**LOCAL, "probability": 0}, "probability = 0: must be greater than 0"),
    ({**LOCAL, "probability": 1.5}, "probability = 1.5: must be less than or equal to 1"),
    ({**LOCAL, "max_num_samples": 0}, "max_num_samples = 0: must be greater than or equal to 1"),
    ({**LOCAL, "resolution": "large"}, 'resolution = "large": must be a number'),
    ({**LOCAL, "resolution": 1}, 'resolution = 1.0: must be 64 to 10000 pixels; resolution_type is "pixel_area"'),
    ({**LOCAL, "resolution": 1024, "resolution_type": "area"}, 'resolution = 1024.0: must be 0.004 to 100 megapixels; resolution_type is "area"'),
    ({**LOCAL, "resolution_type": "pixels"}, "resolution_type = \"pixels\": must be one of 'pixel', 'area' or 'pixel_area'; did you mean 'pixel'?"),
    ({**LOCAL, "crop": "sometimes"}, 'crop = "sometimes": must be true or false'),
    ({**LOCAL, "crop_aspect": "squar"}, "crop_aspect = \"squar\": must be one of 'square', 'preserve', 'closest' or 'random'; did you mean 'square'?"),
    ({**LOCAL, "crop": True, "crop_aspect": "closest"}, 'crop_aspect_buckets: missing, but required by crop_aspect closest; "crop_aspect_buckets": [1.0, 0.75, 1.5]'),
    ({**LOCAL, "crop_aspect": "random"}, "crop_aspect_buckets: missing, but required by crop_aspect random; "),
    ({**LOCAL, **CROP, "crop_aspect_buckets": [0]}, "crop_aspect_buckets[0].aspect = 0: must be greater than 0"),
    ({**LOCAL, **CROP, "crop_aspect_buckets": [1, {"aspect": 2, "weight": 0}]}, "crop_aspect_buckets[1].weight = 0: must be greater than 0"),
    ({**LOCAL, **CROP, "crop_aspect_buckets": ["1.0"]}, 'crop_aspect_buckets = ["1.0"]: must be a list of numbers (width / height), or of objects {aspect, weight}'),
    ({**LOCAL, **CROP, "crop_aspect_buckets": [True]}, "crop_aspect_buckets = [true]: must be a list of numbers"),
    ({**LOCAL, **CROP, "crop_aspect_buckets": [{}]}, "crop_aspect_buckets[0].aspect: missing, but required"),
    ({**LOCAL, **CROP, "crop_aspect_buckets": 1.0}, "crop_aspect_buckets = 1.0: must be a list"),
    ({**LOCAL, **CROP, "crop_aspect_buckets": [{"aspect": 1.0, "wieght": 1}]}, "crop_aspect_buckets[0].wieght = 1: unknown key; did you mean 'weight'?"),
    ({**LOCAL, "crop_style": "middle"}, "crop_style = \"middle\": must be one of 'random', 'center', 'centre', 'corner' or 'face'"),
    ({**LOCAL, "minimum_image_size": 1.0}, 'minimum_image_size = 1.0: must be an edge in pixels, above 10; resolution_type is "pixel_area"'),
    ({**LOCAL, "crop": True, "resolution_type": "area", "resolution": 1, "minimum_image_size": 1024}, 'minimum_image_size = 1024.0: must be megapixels, below 20; resolution_type is "area"'),
    ({**LOCAL, "crop": True, "resolution_type": "area", "resolution": 1, "maximum_image_size": 20}, 'maximum_image_size = 20.0: must be megapixels, below 20; resolution_type is "area"'),
    ({**LOCAL, "crop": True, "resolution_type": "pixel", "maximum_image_size": 511}, 'maximum_image_size = 511.0: must be an edge in pixels, at least 512; resolution_type is "pixel"'),
    ({**LOCAL, "crop": True, "resolution_type": "pixel", "target_downsample_size": 1.5}, "target_downsample_size = 1.5: must be an edge in pixels, above 10; "),
    ({**LOCAL, "crop": True, "maximum_image_size": 4473}, "maximum_image_size = 4473.0: must be the edge of a square below 20 megapixels; "),
    ({**LOCAL, "minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1}, "minimum_aspect_ratio = 2.0: is above maximum_aspect_ratio 1; no image would be left"),
    ({**LOCAL, "maximum_aspect_ratio": -1}, "maximum_aspect_ratio = -1: must be greater than 0"),
    ({**LOCAL, "max_upscale_threshold": 2}, "max_upscale_threshold = 2: must be less than or equal to 1"),
    ({**LOCAL, "image_policy": {"alpha_background": "pink"}}, 'image_policy.alpha_background = "pink": must be a colour; white, black, gray or #rrggbb'),
    ({**LOCAL, "image_policy": {"alpa": "reject"}}, "image_policy.alpa = \"reject\": unknown key; did you mean 'alpha'?"),
    ({**LOCAL, "exact_duplicates": "delete"}, "exact_duplicates = \"delete\": must be one of 'report' or 'reject'"),
    ({**LOCAL, "near_duplicate_distance": 40}, "near_duplicate_distance = 40: must be less than or equal to 16"),
    ({**LOCAL, "caption_strategy": "textfiles"}, "caption_strategy = \"textfiles\": must be one of 'textfile', "),
    ({**LOCAL, "caption_strategy": "huggingface"}, "caption_strategy = \"huggingface\": not for datasets of type 'local'; such datasets have textfile, filename, parquet, instanceprompt or null"),
    ({**HUB, "caption_strategy": "textfile"}, "caption_strategy = \"textfile\": not for datasets of type 'huggingface'; such datasets have huggingface, instanceprompt or null"),
    ({**LIST, "caption_strategy": "textfile"}, "caption_strategy = \"textfile\": not for datasets of type 'csv'; "),
    ({**LIST, "caption_strategy": "csv"}, 'caption_strategy = "csv": needs csv_caption_column; the column of csv_file that holds captions'),
    ({**LOCAL, "caption_strategy": "parquet"}, 'caption_strategy = "parquet": needs a table; give "parquet" with path, filename_column and caption_column'),
    ({**LOCAL, "caption_strategy": "textfile", "caption_encoding": "utf9"}, 'caption_encoding = "utf9": unknown encoding; for example utf-8, utf-16, cp1252'),
    ({**LOCAL, "caption_strategy": "textfile", "caption_encoding": "base64"}, 'caption_encoding = "base64": unknown encoding; '),
    ({**LOCAL, "caption_strategy": "instanceprompt"}, "instance_prompt: missing, but required; a text, or a list of texts"),
    ({**LOCAL, "prepend_instance_prompt": True}, "instance_prompt: missing, but required; "),
    ({**LOCAL, "only_instance_prompt": True, "instance_prompt": [""]}, 'instance_prompt[0] = "": must not be empty'),
    ({**LOCAL, "caption_shuffle": True}, "caption_shuffle = true: must be an object"),
    ({**LOCAL, "caption_shuffle": {"count": 0}}, "caption_shuffle.count = 0: must be greater than or equal to 1"),
    ({**LOCAL, "caption_shuffle": {"count": 1.5}}, "caption_shuffle.count = 1.5: must be a whole number"),
    ({**LOCAL, "caption_shuffle": {"position_start": -1}}, "caption_shuffle.position_start = -1: must be greater than or equal to 0"),
    ({**LOCAL, "caption_shuffle": {"split_on": "tab"}}, "caption_shuffle.split_on = \"tab\": must be one of 'comma', 'space' or 'period'"),
    ({**LOCAL, "caption_filter_list": ["a"]}, "caption_filter_list: belongs to the text_embeds entry; it holds for all datasets that use the entry"),
    ({**LOCAL, "text_embeds": "texts"}, 'text_embeds = "texts": no such entry; text_embeds entries: none'),
    ({**LOCAL, "conditioning_data": 3}, "conditioning_data = 3: must be a list"),
    ({**LOCAL, "conditioning_data": [3]}, "conditioning_data[0] = 3: must be text"),
    ({**REFERENCES, "source_dataset_id": "elsewhere"}, 'source_dataset_id = "elsewhere": no such dataset; datasets: '),
    ({**REFERENCES, "source_dataset_id": "photos"}, 'source_dataset_id = "photos": names the dataset itself; name another'),
    ({**HUB, "huggingface": "team/photos"}, 'huggingface = "team/photos": must be an object'),
    ({**HUB, "split": "test", "huggingface": {"split": "train"}}, 'split = "test": is "train" inside huggingface; keep one'),
    ({**HUB, "huggingface": {"dataset_name": "a/b"}}, 'dataset_name = "team/photos": is "a/b" inside huggingface; keep one'),
    ({**HUB, "huggingface": {"num_proc": 0}}, "huggingface.num_proc = 0: must be greater than or equal to 1"),
    ({**HUB, "huggingface": {"composite_image_config": {"image_count": 2, "select_index": 2}}}, "huggingface.composite_image_config = "),
    ({**HUB, "huggingface": {"filter_func": {"min_widht": 3}}}, "huggingface.filter_func.min_widht = 3: unknown key; did you mean 'min_width'?"),
    ({**HUB, "huggingface": {"filter_func": {"quality_thresholds": {"sharp": "very"}}}}, 'huggingface.filter_func.quality_thresholds.sharp = "very": must be a number'),
    ({**LOCAL, "croop": True}, "croop = true: unknown key; did you mean 'crop'?"),
    ({**LOCAL, "--repeats": 1, "repeats": 2}, "repeats = 2: given twice"),
]  # fmt: skip


@pytest.mark.parametrize(("dataset", "says"), REFUSED)
def test_an_invalid_value_is_one_fault_that_names_key_value_and_what_helps(dataset, says, tmp_path):
    others = [TARGETS] if "conditioning_type" in dataset else []
    [fault] = faults_of(tmp_path, dataset, *others, {**LOCAL, "id": "more"})
    told = fault.removeprefix("[0] ").removeprefix('"photos" ')
    if says.startswith("[0]"):
        assert fault.startswith(says)
    elif "given twice" in says:
        assert "given twice" in told
    else:
        assert told.startswith(says)


# (dataset, what a warning about it says)
INACTIVE = [
    ({**LOCAL, "csv_file": "a.csv"}, "csv_file has no effect: it is for type 'csv'"),
    ({**LOCAL, "csv_url_column": "link"}, "csv_url_column has no effect: it is for type 'csv'"),
    ({**HUB, "aws_bucket_name": "a"}, "aws_bucket_name has no effect: it is for type 'aws'"),
    ({**LOCAL, "cache_dir_vae": "s3://a/b", "aws_bucket_name": "a"}, "aws_bucket_name has no effect: it is for type 'aws'"),
    ({**LOCAL, "dataset_name": "a/b"}, "dataset_name has no effect: it is for type 'huggingface'"),
    ({**LOCAL, "split": "train"}, "split has no effect: it is for type 'huggingface'"),
    ({**LIST, "huggingface": {"image_column": "a"}}, "image_column has no effect: it is for type 'huggingface'"),
    ({**HUB, "instance_data_dir": "a"}, "instance_data_dir has no effect: images of type 'huggingface' lie elsewhere"),
    ({**LIST, "instance_data_dir": "a"}, "instance_data_dir has no effect: images of type 'csv' lie elsewhere"),
    ({**BUCKET, "aws_data_prefix": "a", "instance_data_dir": "b"}, "instance_data_dir has no effect"),
    ({**LOCAL, "cache_dir": "a"}, "cache_dir has no effect: it is for text_embeds"),
    ({**LOCAL, "default": True}, "default has no effect: it is for text_embeds"),
    ({**LOCAL, "parquet": TABLE}, 'parquet has no effect without "caption_strategy": "parquet" or "metadata_backend": "parquet"'),
    ({**LOCAL, "skip_file_discovery": "vae,metadata"}, "skip_file_discovery: vae has no effect, metadata and aspect have"),
    ({**LOCAL, "maximum_image_size": 1024, "target_downsample_size": 1024}, 'maximum_image_size and target_downsample_size have no effect without "crop": true'),
    ({**LOCAL, "crop": True, "maximum_image_size": 1024}, "maximum_image_size has no effect without target_downsample_size: images are scaled to their bucket at once"),
    ({**LOCAL, "crop": True, "target_downsample_size": 1024}, "target_downsample_size has no effect without maximum_image_size"),
    ({**REFERENCES, "minimum_image_size": 512}, "minimum_image_size has no effect: a reference may be smaller than its target"),
    ({**LOCAL, "crop_aspect_buckets": [1]}, 'crop_aspect_buckets has no effect without "crop": true and "crop_aspect": "closest" or "random"'),
    ({**LOCAL, "crop": True, "crop_aspect_buckets": [1]}, "crop_aspect_buckets has no effect without"),
    ({**LOCAL, "crop_aspect": "preserve"}, 'crop_aspect has no effect without "crop": true'),
    ({**LOCAL, "crop_style": "face"}, 'crop_style face has no effect without "crop": true'),
    ({**LOCAL, "crop_style": "center", "vae_cache_clear_each_epoch": True}, "vae_cache_clear_each_epoch has no effect: its crops are the same in every epoch"),
    ({**LOCAL, "vae_cache_clear_each_epoch": True}, "vae_cache_clear_each_epoch: 4 random crops are cached (crop_variants), shown in turn"),
    ({**LOCAL, "crop": True, "crop_style": "face", "crop_variants": 3}, "crop_variants has no effect: only random crops differ"),
    ({**LOCAL, "near_duplicate_distance": 3}, 'near_duplicate_distance has no effect without "near_duplicates"'),
    ({**LOCAL, "disable_multiline_split": True}, 'disable_multiline_split has no effect without "caption_strategy": "textfile"'),
    ({**LOCAL, "caption_encoding": "cp1252"}, 'caption_encoding has no effect without "caption_strategy": "textfile"'),
    ({**LOCAL, "instance_prompt": "a"}, 'instance_prompt has no effect without "caption_strategy": "instanceprompt" or "prepend_instance_prompt"'),
    ({**LOCAL, "instance_prompt": "a", "only_instance_prompt": True, "prepend_instance_prompt": True}, "prepend_instance_prompt has no effect: instance_prompt is the caption already"),
    ({**LOCAL, "caption_strategy": None, "caption_shuffle": {"enable": True}}, "caption_shuffle has no effect: the set has no captions"),
    ({**LOCAL, "caption_shuffle": {"count": 3}}, 'caption_shuffle has no effect without "enable": true'),
    ({**REFERENCES, "repeats": 2}, "repeats has no effect: references are shown with their targets"),
    ({**REFERENCES, "probability": 0.5}, "probability has no effect: references are shown with their targets"),
    ({**REFERENCES, "conditioning": {"type": "jpeg"}}, "conditioning has no effect: it is not a set of targets"),
    ({**REFERENCES, "crop_variants": 2}, "crop_variants has no effect: it is not a set of targets"),
    ({**REFERENCES, "id": "other"}, "is no target set's conditioning_data: it is scanned, not used"),
    ({**REFERENCES, "crop": True, "resolution": 512}, 'resolution, crop has no effect: strict references take the crops of "targets"'),
    ({**HUB, "huggingface": {"auto_load": True}}, "auto_load: ignored"),
    ({**HUB, "description_column": "a"}, "huggingface.description_column has no effect: captions come from caption_column"),
    ({**LOCAL, "caption_strategy": "parquet", "parquet": {**TABLE, "caption_column": "a", "bbox_column": "b"}}, "parquet.bbox_column has no effect: boxes are not used"),
]  # fmt: skip


@pytest.mark.parametrize(("dataset", "says"), INACTIVE)
def test_what_has_no_effect_is_a_warning_that_says_why(dataset, says, tmp_path):
    references = "conditioning_type" in dataset
    others = [TARGETS, REFERENCES] if dataset["id"] == "other" else [TARGETS] if references else []
    warnings = open_project(written(tmp_path, dataset, *others)).warnings
    told = [one for one in warnings if f'"{dataset["id"]}" {says}' in one]
    assert len(told) == 1 == len(warnings), warnings
    assert told[0].startswith("multidatabackend.json: ")


@pytest.mark.parametrize("key", sorted(DATASET_KEYS))
def test_every_other_key_of_simpletuner_is_a_warning(key, tmp_path):
    [warning] = open_project(written(tmp_path, {**LOCAL, key: None})).warnings
    assert warning.startswith(f'multidatabackend.json: [0] "photos" {key}: ')


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    """One of each kind: an entry's values, its nested objects, links, rules, and the other file."""
    broken = {
        **LOCAL,
        "crop": "sometimes",
        "repeats": True,
        "crop_aspect": "random",
        "image_policy": {"alpha": "drop", "cmyk": "keep"},
        "conditioning_data": ["nowhere", "refs"],
        "minimum_image_size": "{env:PAIRLINE_UNKNOWN}",
        "nonsense": 1,
    }
    references = {"id": "refs", "instance_data_dir": "refs", "dataset_type": "conditioning"}
    store = {**TEXT, "caption_filter_list": ["s/(/x/", "s/a/b/c/"]}
    faults = faults_of(tmp_path, broken, references, store, lora_rnak=8, caption_strategy="none")
    keys = [
        fault.removeprefix("[0] ").removeprefix('"photos" ').partition(" = ")[0].partition(":")[0] for fault in faults
    ]
    assert sorted(keys) == sorted(
        ["config.json", "config.json", "crop", "repeats", "crop_aspect_buckets", "image_policy.alpha",
         "image_policy.cmyk", "conditioning_data", '"refs" conditioning_type', "minimum_image_size", "nonsense",
         '"text" caption_filter_list', '"text" caption_filter_list']
    )  # fmt: skip


# Numbers


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"repeats": True}, "repeats"),
        ({"minimum_image_size": False}, "minimum_image_size"),
        ({"probability": True}, "probability"),
        ({"max_num_samples": True}, "max_num_samples"),
        ({"image_policy": {"maximum_megapixels": True}}, "image_policy.maximum_megapixels"),
        ({"caption_shuffle": {"count": True}}, "caption_shuffle.count"),
        ({"crop_aspect_buckets": [{"aspect": True}]}, "crop_aspect_buckets[0].aspect"),
        ({"conditioning": [{"type": "jpeg", "quality": True}]}, "conditioning[0].quality"),
        ({"conditioning": [{"type": "jpeg"}, {"type": "lowres", "params": {"blur_radius": False}}]}, "conditioning[1].blur_radius"),
        ({"type": "huggingface", "dataset_name": "a", "huggingface": {"num_proc": True}}, "huggingface.num_proc"),
        ({"type": "huggingface", "dataset_name": "a", "composite_image_config": {"image_count": True}}, "huggingface.composite_image_config.image_count"),
        ({"type": "huggingface", "dataset_name": "a", "filter_func": {"quality_thresholds": {"sharp": True}}}, "huggingface.filter_func.quality_thresholds.sharp"),
    ],
)  # fmt: skip
def test_a_yes_or_no_is_no_number_at_any_depth(options, key, tmp_path):
    [fault] = faults_of(tmp_path, {**LOCAL, **options})
    value = "false" if key in ("minimum_image_size", "conditioning[1].blur_radius") else "true"
    assert fault == f'[0] "photos" {key} = {value}: must be a number'


def test_a_yes_or_no_in_a_list_of_numbers_is_a_fault_too(tmp_path):
    [fault] = faults_of(tmp_path, {**LOCAL, "conditioning": [{"type": "jpeg", "quality_range": [True, 50]}]})
    assert fault == '[0] "photos" conditioning[0].quality_range[0] = true: must be a number'


def test_other_faults_beside_a_yes_or_no_are_told_too(tmp_path):
    dataset = {**LOCAL, "caption_shuffle": {"count": True, "position_start": -1}, "crop": "maybe"}
    assert [fault.partition(" = ")[0] for fault in faults_of(tmp_path, dataset)] == [
        f'[0] "photos" {key}' for key in ("caption_shuffle.count", "crop", "caption_shuffle.position_start")
    ]


# Nulls


def test_a_key_without_a_value_is_a_key_not_given(tmp_path):
    required = {"id", "instance_data_dir", "caption_strategy"}
    nulls = dict.fromkeys(DatasetConfig.model_fields.keys() - required)
    project, photos = opened(tmp_path, {**LOCAL, **nulls})
    assert (photos, project.warnings[1:]) == (opened(tmp_path, LOCAL)[1], ())
    inner = {"huggingface": {"split": None, "composite_image_config": {"image_count": None}}}
    assert opened(tmp_path, {**HUB, **inner})[1].huggingface.composite_image_config.image_count == 2


def test_nulls_leave_to_config_json_what_cannot_be_null(tmp_path):
    nulls = {"resolution": None, "resolution_type": None, "minimum_image_size": None, "caption_strategy": None}
    config = {"resolution": 0.5, "resolution_type": "area", "minimum_image_size": 0.25, "caption_strategy": "textfile"}
    _, photos = opened(tmp_path, {**LOCAL, **nulls}, **config)
    assert (photos.resolution, photos.resolution_type) == (0.5, "area")
    assert (photos.minimum_image_size, photos.caption_strategy) == (None, None)


def test_generators_may_have_keys_without_a_value(tmp_path):
    entry = {"type": "jpeg", "quality": None, "captions": None, "conditioning_type": None, "storage": None}
    [with_nulls] = opened(tmp_path, {**LOCAL, "conditioning": [entry]})[1].conditioning
    assert with_nulls == opened(tmp_path, {**LOCAL, "conditioning": [{"type": "jpeg"}]})[1].conditioning[0]
    assert isinstance(with_nulls, Generator)


# Aspects


def test_aspects_are_numbers_or_objects_of_any_spelling(tmp_path):
    given = [1, 1.5, {"aspect": 0.75}, {"aspect_ratio": 2, "weight": 3}, {"aspect_bucket": 0.5, "weight": 0.25}]
    _, photos = opened(tmp_path, {**LOCAL, "crop": True, "crop_aspect": "random", "crop_aspect_buckets": given})
    assert photos.crop_aspect_buckets == tuple(
        AspectBucket(aspect=aspect, weight=weight)
        for aspect, weight in ((1, 1), (1.5, 1), (0.75, 1), (2, 3), (0.5, 0.25))
    )


# Placeholders


def test_placeholders_are_filled_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("PAIRLINE_PLACE", "/data")
    dataset = {
        **HUB,
        "dataset_name": "{env:PAIRLINE_PLACE}/{id}",
        "cache_dir_vae": "{output_dir}/{model_family}/{id}",
        "caption_strategy": "instanceprompt",
        "instance_prompt": ["{id}", "{other} {", "{{id}}"],
        "huggingface": {"split": "{id}", "filter_func": {"collection": ["{id}-{id}"]}},
        "conditioning": [{"type": "jpeg", "captions": "restore {id}"}],
    }
    _, photos = opened(tmp_path, dataset, output_dir="runs")
    assert (photos.dataset_name, photos.cache_dir_vae) == ("/data/photos", "runs/flux/photos")
    assert photos.instance_prompt == ("photos", "{other} {", "{photos}")
    assert (photos.huggingface.split, photos.huggingface.filter_func.collection) == ("photos", ("photos-photos",))
    assert photos.conditioning[0].captions == ("restore photos",)


def test_the_run_folder_stands_in_for_an_output_dir_that_is_not_given(tmp_path):
    project, photos = opened(tmp_path, {**LOCAL, "cache_dir_vae": "{output_dir}/vae"}, tracker_run_name="first")
    assert (
        project.latent_store(photos).folder
        == project.run_folder / "vae"
        == tmp_path / "work" / "runs" / "first" / "vae"
    )


def test_an_id_may_have_placeholders_too(tmp_path):
    project = open_project(written(tmp_path, {**LOCAL, "id": "photos-{model_family}", "instance_data_dir": "{id}"}))
    assert [(one.id, one.instance_data_dir) for one in project.targets] == [("photos-flux", "photos-flux")]


def test_an_unknown_variable_of_the_environment_names_key_and_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("PAIRLINE_UNKNOWN", raising=False)
    monkeypatch.setenv("PAIRLINE_EMPTY", "")
    dataset = {**LOCAL, "instance_data_dir": "{env:PAIRLINE_UNKNOWN}/a", "instance_prompt": ["{env:PAIRLINE_EMPTY}a"]}
    inner = {"conditioning": [{"type": "jpeg", "captions": ["{env:PAIRLINE_UNKNOWN}"]}]}
    why = "the environment has no PAIRLINE_UNKNOWN; set it before the command"
    assert faults_of(tmp_path, {**dataset, **inner})[:2] == [
        f'[0] "photos" instance_data_dir = "{{env:PAIRLINE_UNKNOWN}}/a": {why}',
        f'[0] "photos" conditioning[0].captions[0] = "{{env:PAIRLINE_UNKNOWN}}": {why}',
    ]


# Filter lists


@pytest.mark.parametrize(
    ("name", "content", "entries"),
    [
        (None, ["a", "s/b/c/"], ("a", "s/b/c/")),
        ("list.txt", "\ufeffa \r\n\r\ns/b/c/\n", ("a ", "s/b/c/")),
        ("list.json", '["a", "s/b/c/"]', ("a", "s/b/c/")),
        ("empty.txt", "", ()),
    ],
)
def test_a_filter_list_stands_in_the_entry_or_in_a_file(name, content, entries, tmp_path):
    if name is not None:
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    store = {**TEXT, "caption_filter_list": content if name is None else name}
    project, photos = opened(tmp_path, LOCAL, store, {**TEXT, "id": "other"})
    assert project.caption_filter(photos) == entries
    project, photos = opened(tmp_path, {**LOCAL, "text_embeds": "other"}, store, {**TEXT, "id": "other"})
    assert project.caption_filter(photos) == ()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("missing.txt", '= "missing.txt": no such file: {here}/missing.txt; a list of texts may stand here too'),
        ("folder", ": {here}/folder cannot be read"),
        (3, "= 3: must be a list of texts, or the path of a .txt or .json file of them"),
        (["a", 3], '= ["a", 3]: must be a list of texts, or the path of a .txt or .json file of them'),
        (["s/(/x/"], '= "s/(/x/": not a regular expression: missing ), unterminated subpattern'),
        (["s/a/\\2/"], "not a regular expression: invalid group reference 2"),
        (["s//x/"], '= "s//x/": must say what to replace between its first two slashes'),
        (["s/a/b/c/"], '= "s/a/b/c/": must be s/old/new/, then i or nothing; a slash inside is written \\/'),
        (["s/a/b/x"], '= "s/a/b/x": must be s/old/new/, then i or nothing'),
    ],
)
def test_a_filter_list_that_cannot_be_used_is_a_fault(given, says, tmp_path):
    (tmp_path / "folder").mkdir()
    [fault] = faults_of(tmp_path, LOCAL, {**TEXT, "caption_filter_list": given})
    assert '"text" caption_filter_list' in fault and says.format(here=tmp_path) in fault


def test_a_filter_list_of_another_shape_names_its_file(tmp_path):
    (tmp_path / "list.json").write_text('{"a": "b"}')
    [fault] = faults_of(tmp_path, LOCAL, {**TEXT, "caption_filter_list": "list.json"})
    assert fault.startswith("list.json: must be a list of texts")


def test_an_option_of_datasets_among_those_of_the_trainer_is_told_where_it_belongs(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "config.json").write_text('{"crop_style": "center"}')
    (tmp_path / "multidatabackend.json").write_text('[{"id": "a", "instance_data_dir": "photos"}]')
    with pytest.raises(ConfigError, match=r"crop_style = \"center\": unknown key; it is an option of datasets"):
        open_project(tmp_path)
