"""The `prep` command: a thin wrapper over one function per stage.

Stages are imported inside their commands, so that `prep --help` answers at once.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from schemas.console import report, reporting, warn
from schemas.summaries import VerifySummary

if TYPE_CHECKING:
    from prep.cache import Engine
    from schemas.project import Project

app = typer.Typer(
    name="prep",
    help="Prepare images for training edit models: scan, then pairs, then cache.",
    epilog="Stages meet only in files below WORKSPACE. Run one again at any time: it does what is missing, no more.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ProjectPath = Annotated[
    Path, typer.Argument(metavar="PROJECT", help="Folder that holds config.json, or the path of such a file.")
]
Workspace = Annotated[Path | None, typer.Option(help="Folder for all products.  [default: PROJECT/work]")]
Root = Annotated[
    Path | None, typer.Option(help="Folder that relative paths start from.  [default: the folder of config.json]")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace an option of config.json; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON summary on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Stop after N items of each dataset or store.")]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Processes; 1 is the command itself, which a crash then ends.  [default: one per core]"
    ),
]


@app.command(short_help="Measure, caption and bucket images.", epilog="Example:  prep scan my-project --json")
def scan(
    project: ProjectPath,
    workspace: Workspace = None,
    root: Root = None,
    settings: Settings = None,
    json: Json = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    workers: Workers = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Decode every image: finds damage inside files, and TIFF or JPEG 2000 cut short."
        ),
    ] = False,
    no_hash: Annotated[
        bool, typer.Option("--no-hash", help="Measure without reading whole files: for a look, not for prep pairs.")
    ] = False,
) -> None:
    """Measure, caption and bucket every image: WORKSPACE/manifests/*.parquet."""
    with reporting():
        from families import open_project
        from prep.scan import scan as run

        opened = open_project(project, root=root, workspace=workspace, overrides=settings or (), need_images=True)
        warn(opened.warnings)
        summary = run(opened, limit=limit, workers=workers, dry_run=dry_run, hashed=not no_hash, verify=verify)
        report(summary, json)


@app.command(short_help="Say what would be done, and what it takes.", epilog="Example:  prep plan my-project --json")
def plan(
    project: ProjectPath,
    workspace: Workspace = None,
    root: Root = None,
    settings: Settings = None,
    json: Json = False,
    workers: Workers = None,
) -> None:
    """Say what scan, pairs, cache and train would do: counts, bytes, batches. Nothing is written."""
    with reporting():
        from families import open_project
        from prep.plan import plan as run

        opened = open_project(project, root=root, workspace=workspace, overrides=settings or (), need_images=True)
        warn(opened.warnings)
        report(run(opened, workers=workers), json)


@app.command(short_help="Match or make references.", epilog="Example:  prep pairs my-project --preview 12")
def pairs(
    project: ProjectPath,
    workspace: Workspace = None,
    root: Root = None,
    settings: Settings = None,
    json: Json = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    workers: Workers = None,
    preview: Annotated[int, typer.Option(min=0, metavar="N", help="Draw N pairs on a contact sheet.")] = 0,
    no_align: Annotated[
        bool, typer.Option("--no-align", help="Do not check that strict references lie on their targets.")
    ] = False,
    reject_misaligned: Annotated[
        bool, typer.Option("--reject-misaligned", help="Leave out pairs that do not lie on each other.")
    ] = False,
    materialise: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write all pictures and captions, cropped, as files to DIR.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of DIR: pairline, simpletuner, musubi, ai-toolkit, diffusers.  [default: pairline]",
        ),
    ] = None,
) -> None:
    """Match targets and references, or make references by degradation: WORKSPACE/pairs/*.parquet."""
    with reporting():
        from families import open_project
        from prep.materialise import check_layout, materialise_all
        from prep.pairs import pairs as run

        if no_align and reject_misaligned:
            raise typer.BadParameter("--reject-misaligned needs the check that --no-align leaves out")
        if layout is not None and materialise is None:
            raise typer.BadParameter("--layout is that of the files that --materialise DIR writes; name DIR too")
        check_layout(layout or "pairline")
        opened = open_project(project, root=root, workspace=workspace, overrides=settings or (), need_images=True)
        left_out = {"--preview": preview, "--materialise": materialise}
        unwritten = [f"{name} writes nothing under --dry-run" for name, asked in left_out.items() if asked and dry_run]
        warn([*opened.warnings, *unwritten])
        summary = run(
            opened,
            limit=limit,
            workers=workers,
            dry_run=dry_run,
            preview=preview,
            misaligned="ignore" if no_align else "reject" if reject_misaligned else None,
        )
        if materialise is not None and not dry_run:
            summary = replace(
                summary, materialised=materialise_all(opened, materialise, layout or "pairline", workers=workers)
            )
        report(summary, json)


@app.command(
    short_help="Encode images and prompts; look after what is encoded.",
    epilog="Example:  prep cache my-project --dry-run.  On many machines:  "
    "torchrun --nproc-per-node 8 --no-python prep cache my-project;  "
    "prep cache my-project --num-shards 16 --shard-index $SLURM_ARRAY_TASK_ID;  "
    "prep cache my-project --engine ray --address auto.  Upkeep:  prep cache my-project --stats;  "
    "prep cache my-project --explain photos/cat.jpg;  prep cache my-project --gc --also other-project --delete",
)
def cache(
    project: ProjectPath,
    workspace: Workspace = None,
    root: Root = None,
    settings: Settings = None,
    json: Json = False,
    dry_run: DryRun = False,
    limit: Limit = None,
    workers: Workers = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Instead, say what lies in the stores and how much of it is needed.")
    ] = False,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="SAMPLE",
            help="Instead, say what is cached of one sample (its id, or its target's path), and what changed since.",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Instead, check every row: sums, shapes, finite numbers; decode a few latents."),
    ] = False,
    decode: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="With --verify: how many.  [default: 4 if the checkpoint is here]"),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="With --verify: take out what is bad, and encode it again.")
    ] = False,
    num_shards: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Cut the work into N shares, the same in every process, and do one.  [default: WORLD_SIZE, or 1]",
        ),
    ] = None,
    shard_index: Annotated[
        int | None,
        typer.Option(min=0, metavar="I", help="Which of the shares, counted from 0.  [default: RANK, or 0]"),
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="Who encodes: local, this machine; ray, the nodes of a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Of the Ray cluster.  [default: RAY_ADDRESS, or the one that runs here, or one is started]",
        ),
    ] = None,
    compact: Annotated[bool, typer.Option("--compact", help="Instead, merge many small shards into few.")] = False,
    gc: Annotated[
        bool, typer.Option("--gc", help="Instead, say which rows no pair table reaches; deletes nothing.")
    ] = False,
    also: Annotated[
        list[Path] | None,
        typer.Option(metavar="PROJECT", help="With --gc: another project that uses these stores; repeatable."),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="With --gc: delete those rows.")] = False,
) -> None:
    """Encode images and prompts into shards: WORKSPACE/cache/latents and WORKSPACE/cache/text.

    Several such commands, here or on machines that share the workspace, divide the work between them.
    """
    with reporting():
        from families import open_project
        from prep.cache import cache as run
        from prep.cache import share_of
        from prep.upkeep import modes

        _check_engine(engine, address, workers)
        of_encoding = {"--limit": limit} | ({} if repair else {"--num-shards": num_shards, "--address": address})
        others = [name for name, value in of_encoding.items() if value is not None]
        asked = modes.Asked(
            verify, repair, decode, compact, stats, explain, gc, tuple(also or ()), delete, dry_run, others
        )
        try:
            mode = asked.mode
        except ValueError as fault:
            raise typer.BadParameter(str(fault)) from None
        share = share_of(shard_index, num_shards)
        need_images = mode is None
        opened = open_project(
            project, root=root, workspace=workspace, overrides=settings or (), need_images=need_images
        )
        warn(opened.warnings)
        if mode is None:
            with _engine(opened, engine, address) as made:
                summary = run(opened, limit=limit, workers=workers, dry_run=dry_run, share=share, engine=made)
            report(summary, json)
            return
        found = modes.run(opened, asked)
        if isinstance(found, VerifySummary) and repair:
            with _engine(opened, engine, address) as made:
                found = replace(found, encoded=run(opened, workers=workers, share=share, engine=made))
        report(found, json)
        if isinstance(found, VerifySummary) and found.faults and not repair:
            raise SystemExit(1)


def _check_engine(engine: str, address: str | None, workers: int | None) -> None:
    if engine not in ("local", "ray"):
        raise typer.BadParameter(f"--engine {engine} is neither local nor ray")
    if engine == "local" and address is not None:
        raise typer.BadParameter("--address is that of a Ray cluster; say --engine ray too")
    if engine == "ray" and workers is not None:
        raise typer.BadParameter("--workers is of --engine local; a Ray cluster decodes on all its cores")


def _engine(project: "Project", engine: str, address: str | None) -> "AbstractContextManager[Engine | None]":
    """Return the engine that was asked for; None is the one that `cache` has by itself."""
    if engine == "local":
        return nullcontext()
    from prep.distributed import OnRay

    return OnRay(project, address)


@app.command(
    "import",
    short_help="Take over what other trainers have cached.",
    epilog="Example:  prep import my-project cache/vae/photos --dataset photos",
)
def import_cache(
    project: ProjectPath,
    cache_dir: Annotated[Path, typer.Argument(metavar="CACHE_DIR", help="Folder of that trainer's cache files.")],
    workspace: Workspace = None,
    root: Root = None,
    settings: Settings = None,
    json: Json = False,
    dry_run: DryRun = False,
    format: Annotated[
        str, typer.Option(metavar="NAME", help="Of CACHE_DIR: auto, simpletuner, musubi, sd-scripts.")
    ] = "auto",
    dataset: Annotated[
        str | None, typer.Option(metavar="ID", help="Look for the latents of this dataset alone.  [default: all]")
    ] = None,
    sample: Annotated[
        int, typer.Option(min=1, metavar="N", help="Encode N of each dataset, and N prompts, again to compare.")
    ] = 8,
) -> None:
    """Bring latents and text embeds that another trainer cached into our stores, where they are proven to be equal."""
    with reporting():
        from families import open_project
        from prep.importing.run import import_cache as run

        opened = open_project(project, root=root, workspace=workspace, overrides=settings or (), need_images=True)
        warn(opened.warnings)
        summary = run(opened, cache_dir, format=format, dataset=dataset, sample=sample, dry_run=dry_run)
        report(summary, json)
        if summary.failed:
            raise SystemExit(1)


@app.command(short_help="Say what is done, what is stale, what comes next.", epilog="Example:  prep status my-project")
def status(
    project: ProjectPath,
    workspace: Workspace = None,
    root: Root = None,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Say of every stage what is complete, stale or missing, and why. Images are not looked at, nothing is written."""
    with reporting():
        from families import open_project
        from prep.status import status as run

        opened = open_project(project, root=root, workspace=workspace, overrides=settings or ())
        warn(opened.warnings)
        report(run(opened), json)


@app.command(
    "report", short_help="Show what was scanned and paired on one page.", epilog="Example:  prep report my-project"
)
def report_page(
    project: ProjectPath,
    workspace: Workspace = None,
    root: Root = None,
    settings: Settings = None,
    json: Json = False,
    output: Annotated[Path | None, typer.Option(help="The file to write.  [default: WORKSPACE/report.html]")] = None,
    thumbnails: Annotated[int, typer.Option(min=0, metavar="N", help="Images shown of each dataset.")] = 60,
) -> None:
    """Show what manifests and pair tables say as one HTML file that opens without a network: WORKSPACE/report.html."""
    with reporting():
        from families import open_project
        from prep.report import report as run

        opened = open_project(project, root=root, workspace=workspace, overrides=settings or ())
        warn(opened.warnings)
        report(run(opened, output=output, thumbnails=thumbnails), json)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # others keep what a large scan lets go
    app(prog_name="prep")


if __name__ == "__main__":
    main()
