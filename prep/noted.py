"""What `prep cache` notes beside shards: what encoders are, who uses a store, what each sample was last made from.

Nothing depends on these notes but explanations: a lost one is written by the next run. The one place where upkeep asks
for the keys of encoders.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from families.checkpoints import (
    Description,
    describe_image_encoder,
    describe_text_encoder,
    encoder_keys,
    here,
)
from prep.needed import REFERENCES, TARGETS
from schemas.errors import UserError
from schemas.keys import PIXEL_POLICY, canonical, digest, file_id
from schemas.paths import is_url
from schemas.project import Project
from schemas.rows import NotedReference, NotedRow, PairRow, arrow_schema
from schemas.storage import HOST
from schemas.stores import Store
from schemas.tables import Provenance, read_columns, read_provenance, write_table

TEXT = "text"
DESCRIPTION = "encoder.json"  # in an encoder's folder: its key is the hash of what this says
USERS = "users"  # folder there: projects that use it
POLICY = "pixel policy"  # of latents; noted beside the encoders


def image_keys(project: Project) -> dict[str, str]:
    """Return the keys of the encoders of targets and references; raises UserError if they are unknown."""
    keys = encoder_keys(project, remember=False)
    return {TARGETS: keys.target, REFERENCES: keys.reference}


def text_key_of(project: Project) -> str:
    """Return the key of the text encoders; raises UserError if it is unknown."""
    return encoder_keys(project, remember=False).text


def descriptions(project: Project) -> dict[str, Description] | None:
    """Describe the encoders of targets, references and text; None if they are not on this machine."""
    folder = here(project, (*project.family.image_encoder, *project.family.text_encoders))
    if folder is None:
        return None
    return {
        TARGETS: describe_image_encoder(project, folder, project.trainer.posterior, remember=False),
        REFERENCES: describe_image_encoder(project, folder, "mode", remember=False),
        TEXT: describe_text_encoder(project, folder, remember=False),
    }


def announce(project: Project, store: Store, description: Description) -> None:
    """Say in an encoder's folder what the encoder is, and that this project uses it."""
    user = {"project": project.config_path.parent.name, "host": HOST, "place": place_id(store)}
    for name, said in ((DESCRIPTION, description), (f"{USERS}/{user_id(project)}.json", user)):
        spelled = json.dumps(said, indent=1, sort_keys=True).encode()
        with suppress(UserError):  # whether a store can be written is for rows to tell
            if store.read(name) != spelled:
                store.replace(name, spelled)


def user_id(project: Project) -> str:
    """Identify a project among the users of a store."""
    return digest(str(project.config_path.resolve()))[:16]  # the same on all machines of a cluster


def place_id(store: Store) -> str:
    """Identify where a store lies, without saying it: a copy elsewhere has other users."""
    where = store.where()
    return digest(where if is_url(where) else str(Path(where).resolve()))[:16]


def note(project: Project, said: Mapping[str, Description]) -> None:
    """Note what all samples were made from, once they are cached; `said` describes the encoders by role."""
    spelled = canonical({**said, POLICY: PIXEL_POLICY})
    for target in project.targets:
        path = project.noted(target.id)
        provenance = Provenance(digest(spelled), file_id(project.pair_table(target.id)), noted=spelled)
        if read_provenance(path, NotedRow) != provenance:
            rows = read_columns(project.pair_table(target.id), PairRow, [*_COLUMNS, "reject"])
            write_table(path, _noted(rows.filter(pc.is_null(rows["reject"]))), NotedRow, provenance)


_COLUMNS = [field.name for field in arrow_schema(NotedRow)]


def _noted(pairs: pa.Table) -> pa.Table:
    """Take what enters keys out of a pair table."""
    schema = arrow_schema(NotedRow)
    pieces = [_references(piece) for piece in pairs["references"].chunks]
    references = pa.chunked_array(pieces, schema.field("references").type)
    place = pairs.column_names.index("references")
    return pairs.set_column(place, "references", references).select(_COLUMNS).cast(schema)


def _references(lists: pa.ListArray) -> pa.ListArray:
    fields = list(arrow_schema(NotedReference))
    flat = lists.flatten()
    struct = pa.StructArray.from_arrays([pc.struct_field(flat, field.name) for field in fields], fields=fields)
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    offsets = pa.array([0, *lengths.cumsum()], pa.int32())
    return pa.ListArray.from_arrays(offsets, struct, type=pa.list_(pa.field("item", struct.type, False)))
