"""Why nothing would be trained on, how many images it concerns, and what to change: `why_empty`, `why_blocked`.

A new kind of reject gets its remedy as an entry of `_REMEDIES`; without one its first example is quoted.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prep.frames import policy_of
from prep.geometry import Size, Targets, aspects_for, framed
from prep.matching import Manifest
from prep.places import place_of
from prep.planning.sides import Match
from prep.statistics import counts_of, kinds_of
from schemas.console import printable
from schemas.datasets import DatasetConfig
from schemas.project import Project

_CUSTOMARY = (2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 64)
_KINDS = 3  # kinds of reason told of one dataset

Remedy = Callable[[Project, DatasetConfig, pa.Table], str]


def trained(project: Project, dataset: DatasetConfig) -> bool:
    """Tell a set of targets that is trained on from one that is held out for evaluation."""
    return dataset.dataset_type == "image" and dataset.id != project.trainer.eval_dataset_id


def why_empty(project: Project, manifests: Mapping[str, Manifest], matches: Sequence[Match]) -> dict[str, str]:
    """Return the sets of targets that have no pair at all, why, and the remedy.

    One that waits for downloads, of its own or of its references, is left out: nothing is known of it.
    """
    reasons, paired = {}, {pairs.target.id for pairs in matches if pairs.count}
    for pairs in matches:
        name, asked = pairs.target.id, (pairs.target, *project.references_of(pairs.target))
        if name not in paired and not any(manifests[one.id].absent for one in asked):
            told = _unpaired(project, pairs, manifests) if pairs.kept else _unkept(project, manifests[name])
            reasons[name] = told
    return reasons


def why_blocked(project: Project, matches: Sequence[Match], empty: Mapping[str, str]) -> str | None:
    """Return why training would have no batch at all, and the remedy; None if it has some, or that is not known."""
    stops = [
        one for one in matches if one.rejected and one.target.on_unpaired == "error" and one.target.id not in empty
    ]
    if stops:
        return "; ".join(map(_stopped, stops))
    own = [pairs.target.id for pairs in matches if trained(project, pairs.target)]
    if not own:
        return _all_held_out(project)
    return None if set(own) - empty.keys() else "; ".join(f"{name}: {empty[name]}" for name in own)


def _stopped(pairs: Match) -> str:
    """Say that prep pairs would not go on."""
    first = printable(next(iter(pairs.examples.values()))[2])
    count = sum(pairs.rejected.values())
    return (
        f"{pairs.target.id}: prep pairs stops, as {count} of {pairs.kept} targets have no proper reference, "
        f"first {first}; "
        'mend the files, or set on_unpaired to "drop" or "train_without_reference"'
    )


def _all_held_out(project: Project) -> str:
    held_out = project.trainer.eval_dataset_id
    by_type = [one.id for one in project.targets if one.dataset_type == "eval"]
    said = [f'eval_dataset_id is "{held_out}"'] if held_out is not None else []
    said += [f'dataset_type of {", ".join(by_type)} is "eval"'] if by_type else []
    change = "leave eval_dataset_id out" if held_out not in (None, *by_type) else 'make one dataset_type "image"'
    return f"every dataset is held out: {' and '.join(said)}; {change}, or add a set to train on"


def _unkept(project: Project, manifest: Manifest) -> str:
    """Say why a dataset has no usable image."""
    dataset, rows = manifest.dataset, manifest.rows
    if rows.num_rows == 0:
        where = printable(place_of(project, dataset).name("").rstrip("/"))
        return f"no image in {where}; instance_data_dir or the table of the dataset must lead to some"
    kinds = kinds_of(rows["reject"])
    enlarged = pc.match_substring(rows["reject"], "would be enlarged")
    kinds = pc.if_else(enlarged, "enlarged", kinds)
    told = []
    for kind, count in [*counts_of(kinds).items()][:_KINDS]:
        some = rows.filter(pc.equal(kinds, kind))
        number = f"all {count}" if count == rows.num_rows else f"{count} of {rows.num_rows}"
        told.append(f"{number} images: {_REMEDIES.get(kind, _quoted)(project, dataset, some)}")
    return ", ".join(told)


def _unpaired(project: Project, pairs: Match, manifests: Mapping[str, Manifest]) -> str:
    """Say why none of the kept targets is paired."""
    kind, count = max(pairs.rejected.items(), key=lambda item: item[1])
    reference_id, _, reason = pairs.examples[kind]
    number = f"all {count}" if count == pairs.kept else f"{count} of {pairs.kept}"
    if kind == "no reference" and manifests[reference_id].rows.num_rows == 0:
        where = printable(place_of(project, manifests[reference_id].dataset).name("").rstrip("/"))
        return f"{number} targets have no reference: {reference_id} has no image in {where}"
    return f"{number} targets have no proper reference, first {printable(reason)}; {_ADVICE[kind]}"


_ADVICE: Mapping[str, str] = {
    "no reference": "references are found by relative path: rename them or mend instance_data_dir",
    "reference collides": "rename one of each",
    "reference rejected": "mend that",
    "orientation differs": "turn one of each",
    "aspect differs": 'crop them alike, or set conditioning_type to "reference_loose"',
    "reference equals target": "instance_data_dir of both may be the same",
}


# What to change for each kind of reject


def _quoted(project: Project, dataset: DatasetConfig, rows: pa.Table) -> str:
    first = rows.slice(0, 1).to_pylist()[0]
    return f"{first['reject']} (first {printable(first['path'])}); mend the files or the option it names"


def _largest(rows: pa.Table, *, by_edge: bool) -> Size:
    """Return the size of the image that is nearest to being large enough."""
    widths, heights = rows["width"].to_numpy(), rows["height"].to_numpy()
    areas, edges = widths * heights, np.minimum(widths, heights)
    at = int(np.lexsort((areas, edges) if by_edge else (edges, areas))[-1])
    return int(widths[at]), int(heights[at])


def _by_edge(dataset: DatasetConfig) -> bool:
    """Tell whether the shorter side of an image decides if it is large enough, or its area."""
    return dataset.resolution_type == "pixel" or (dataset.crop and dataset.crop_aspect == "square")


def _too_small(project: Project, dataset: DatasetConfig, rows: pa.Table) -> str:
    by_edge = _by_edge(dataset)
    width, height = _largest(rows, by_edge=by_edge)
    least = dataset.minimum_image_size or 0
    edge = min(width, height) if by_edge else int((width * height) ** 0.5)
    reached = next((one for one in _CUSTOMARY if one <= edge), edge)
    value = f"{int(reached**2 / 1e4) / 100:g}" if dataset.resolution_type == "area" else f"{reached}"
    return (
        f"too small: minimum_image_size {least:g} keeps none, the largest is {width}x{height}; set minimum_image_size "
        f"to {value}, or to 0 for any size"
    )


def _enlarged(project: Project, dataset: DatasetConfig, rows: pa.Table) -> str:
    width, height = size = _largest(rows, by_edge=_by_edge(dataset))
    limit = dataset.max_upscale_threshold or 0
    area = dataset.resolution_type == "area"
    for edge in _CUSTOMARY:
        value = int(edge**2 / 1e4) / 100 if area else float(edge)
        policy = policy_of(project, dataset.model_copy(update={"resolution": value}))
        choices = aspects_for(size, policy) if value else "no size"
        fits = [framed(size, policy, Targets(), one) for one, _ in choices] if not isinstance(choices, str) else []
        if any(not isinstance(one, str) for one in fits):
            change = f"set resolution to {value:g} or raise max_upscale_threshold"
            break
    else:
        change = "raise max_upscale_threshold"
    return (
        f"too small: at resolution {dataset.resolution:g} each would be enlarged by more than max_upscale_threshold "
        f"{limit:g}, the largest is {width}x{height}; {change}"
    )


def _aspect(project: Project, dataset: DatasetConfig, rows: pa.Table) -> str:
    ratios = rows["width"].to_numpy() / rows["height"].to_numpy()
    narrow = str(rows["reject"][0]).startswith("too narrow")
    option = "minimum_aspect_ratio" if narrow else "maximum_aspect_ratio"
    limit = dataset.minimum_aspect_ratio if narrow else dataset.maximum_aspect_ratio
    if limit is None:
        return _quoted(project, dataset, rows)
    nearest = float(ratios.max() if narrow else ratios.min())
    shown = np.floor(nearest * 100) / 100 if narrow else np.ceil(nearest * 100) / 100
    kind, extreme = ("narrow", "widest") if narrow else ("wide", "narrowest")
    return f"too {kind}: {option} {limit:g} keeps none, the {extreme} is {nearest:.2f}; set {option} to {shown:g}"


def _megapixels(project: Project, dataset: DatasetConfig, rows: pa.Table) -> str:
    least = float(np.min(rows["width"].to_numpy() * rows["height"].to_numpy())) / 1e6
    most = dataset.image_policy.maximum_megapixels
    return (
        f"too large: image_policy.maximum_megapixels {most:g} keeps none, the smallest has {least:.2f}; set it to "
        f"{int(least) + 1} or scale the images down"
    )


def _policy(option: str, kind: str, instead: str) -> Remedy:
    def told(project: Project, dataset: DatasetConfig, rows: pa.Table) -> str:
        return f'{kind}: image_policy.{option} is "reject"; set it to "{instead}"'

    return told


def _no_caption(project: Project, dataset: DatasetConfig, rows: pa.Table) -> str:
    first = str(rows["reject"][0])
    if "caption_filter_list" in first:
        return "no caption: caption_filter_list leaves nothing of them; take entries out of it"
    if "caption_encoding" in first or " is not " in first:
        return f"{first}; set caption_encoding"
    missing = int(pc.sum(pc.match_substring(rows["reject"], ".txt is missing")).as_py() or 0)
    what = f"{missing} text files are missing" if missing else f"{first} (first {printable(str(rows['path'][0]))})"
    return f"no caption: {what}; caption_strategy {_captionless(dataset)} needs none"


def _captionless(dataset: DatasetConfig) -> str:
    named = dataset.type in ("local", "aws", "csv")
    return '"filename" or "instanceprompt"' if named else '"instanceprompt"'


def _filtered(project: Project, dataset: DatasetConfig, rows: pa.Table) -> str:
    return f"{_quoted(project, dataset, rows)}; huggingface.filter_func keeps none"


_REMEDIES: Mapping[str, Remedy] = {
    "too small": _too_small,
    "enlarged": _enlarged,
    "too narrow": _aspect,
    "too wide": _aspect,
    "too large": _megapixels,
    "no caption": _no_caption,
    "filtered": _filtered,
    "transparent": _policy("alpha", "transparent", "compose"),
    "printing colours": _policy("cmyk", "printing colours", "convert"),
    "high depth": _policy("high_depth", "more than 8 bits", "scale"),
    "animation": _policy("animation", "animated", "first"),
}
