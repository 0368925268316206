"""`zscore reshard`: kept samples into new shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zscore.shard_writer import Written


def reshard(
    kept: Annotated[
        str, typer.Argument(metavar="KEPT", help="Rows to keep, from filter or select: file, folder or url.")
    ],
    shards: Annotated[list[str], typer.Option(help="Source shards, as given to score; repeatable.", metavar="SRC")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder or fsspec url of the new shards.", metavar="DIR")],
    prefix: Annotated[str, typer.Option(help="Shards are called PREFIX-000000.tar and so on.")] = "kept",
    shard_size: Annotated[str, typer.Option(help="Samples (10000), or bytes from which a shard is full.")] = "1GB",
    add_scores: Annotated[
        bool, typer.Option("--add-scores", help="Add KEY.zscore.json with the row's scores.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output of this prefix in the end.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    """Copy kept samples into new webdataset shards, every member byte for byte, and index them for wids.

    Samples come in the order of the source shards. Nothing is decoded. Finished shards are kept: the same command
    resumes, and does again what a power cut has cut. Two neighbours of one key go into different shards, since readers
    would take them for one sample. With --overwrite the earlier output stays until the new one is complete. Links that
    stand for neither a picture nor a text stay behind, with a warning.

    \b
    Examples:
      zscore reshard kept.parquet --shards shards/ --out best/
      zscore reshard kept.parquet --shards 's3://bucket/{000..099}.tar' --out s3://bucket/best --shard-size 10000
      zscore reshard kept.parquet --shards shards/ --out best/ --add-scores
    """
    from zscore.reshard import ReshardOptions
    from zscore.reshard import reshard as run
    from zscore.tables import open_scores

    options = ReshardOptions(
        shards=tuple(shards),
        out=out,
        prefix=prefix,
        shard_size=shard_size,
        add_scores=add_scores,
        overwrite=overwrite,
    )

    def show(shard: Written) -> None:
        if not quiet:
            typer.echo(f"{shard.name}: {shard.samples:,} samples, {shard.size / 1e6:,.1f} MB", err=True)

    result = run(open_scores(kept), options, show)
    if result.links:
        typer.echo(
            f"{result.links:,} links inside kept samples stayed behind, as webdataset passes over them: "
            "pack the shards with --dereference --hard-dereference to have files",
            err=True,
        )
    if quiet:
        return
    if not result.shards:
        typer.echo(f"{kept} keeps no samples: no shards, only the index {result.index}")
        return
    before = f", {result.resumed:,} of them finished before" if result.resumed else ""
    typer.echo(
        f"{result.samples:,} samples in {len(result.shards):,} shards ({result.size / 1e6:,.1f} MB){before}; "
        f"index: {result.index}"
    )
