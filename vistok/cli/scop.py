"""`vistok scop`: box annotations to a captioned spatial data set."""

from __future__ import annotations

import json
import re
import time
import zipfile
import zlib
from pathlib import Path
from typing import Annotated

import typer

PRESETS = ("authors", "best-geneval")


def parse_shard(text: str) -> tuple[int, int]:
    """(index, count) of `0/4`.

    Raises:
        InvalidInputError: for anything but an index from 0 below a count.
    """
    from vistok.errors import InvalidInputError

    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
    if found is None or int(found[1]) >= int(found[2]):
        raise InvalidInputError(f"--shard {text!r} is not INDEX/COUNT with INDEX from 0 below COUNT; e.g. 0/4 .. 3/4")
    return int(found[1]), int(found[2])


def scop(
    annotations: Annotated[
        Path,
        typer.Argument(help="COCO instances (.json, .json.gz, .zip, or the data set's folder), or .jsonl."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the data set.")],
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder or zip of the pictures.", show_default="ANNOTATIONS/SPLIT if there, otherwise metadata only"
        ),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="folder (metadata.jsonl and images/) or webdataset (pairs-*.tar).")
    ] = "folder",
    picture: Annotated[str, typer.Option(help="How a folder gets its pictures: link, copy or none.")] = "link",
    split: Annotated[str, typer.Option(help="Which instances_SPLIT.json of a folder or zip.")] = "train2017",
    preset: Annotated[
        str, typer.Option(help="Thresholds: authors, or best-geneval (their second set, searched on GenEval).")
    ] = "authors",
    min_area: Annotated[
        float | None, typer.Option(help="Smaller boxes, in square pixels, are left out.", show_default="1024")
    ] = None,
    visual_significance: Annotated[
        float | None, typer.Option(help="Both boxes fill at least this part of the image.", show_default="0.2")
    ] = None,
    spatial_clarity: Annotated[
        float | None,
        typer.Option(help="Centres at most this many times the smaller box's diagonal apart.", show_default="2.0"),
    ] = None,
    minimal_overlap: Annotated[
        float | None, typer.Option(help="The intersection is below this part of the smaller box.", show_default="0.3")
    ] = None,
    size_balance: Annotated[
        float | None, typer.Option(help="The smaller box is at least this part of the larger one.", show_default="0.5")
    ] = None,
    outside: Annotated[str, typer.Option(help="Boxes wholly outside of their image: skip or keep.")] = "skip",
    shard: Annotated[str, typer.Option(help="INDEX/COUNT: this process writes every COUNT-th part.")] = "0/1",
    images_per_part: Annotated[int, typer.Option(min=1, help="Images written together; the unit of resuming.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the statistics as JSON.")] = False,
) -> None:
    """Select the pairs of objects whose positions are beyond doubt, caption them, and say what each rule rejected.

    Run it again to resume; run it with --shard 0/4 to 3/4 to share the work among four processes.
    """
    from vistok.errors import InvalidInputError

    process, processes = parse_shard(shard)
    if preset not in PRESETS:
        raise InvalidInputError(f"--preset {preset!r} is unknown; use {' or '.join(PRESETS)}")
    if output.exists() and not output.is_dir():
        raise InvalidInputError(f"{output} is a file; give a folder")
    given = {
        "min_area": min_area,
        "visual_significance": visual_significance,
        "spatial_clarity": spatial_clarity,
        "minimal_overlap": minimal_overlap,
        "size_balance": size_balance,
    }
    from dataclasses import asdict, replace

    from vistok.controllers.scop import BEST_GENEVAL, AnnotationFile, ScopEngine, Thresholds

    thresholds = replace(
        BEST_GENEVAL if preset == "best-geneval" else Thresholds(),
        **{name: value for name, value in given.items() if value is not None},
    )
    if images is None and picture != "none" and annotations.is_dir() and (annotations / split).is_dir():
        images = annotations / split
    begun = time.perf_counter()
    try:
        engine = ScopEngine(
            AnnotationFile(annotations, split=split, outside=outside),
            images,
            thresholds=thresholds,
            layout=layout,
            picture=picture,
            images_per_part=images_per_part,
        )
        report = engine.run(output, process=process, processes=processes)
    except KeyboardInterrupt:
        written, total = _parts(output)
        if total is not None:
            typer.echo(
                f"vistok: {written} of {total} parts are written in {output}; the same command continues", err=True
            )
        raise
    # Damage below the level that the reader judges: archives, compression, encodings, and our own files in OUT.
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InvalidInputError(f"an archive is damaged or truncated ({error}): {annotations} or {images}") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{annotations} is not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise InvalidInputError(
            f"a file of {output} is damaged ({error}); delete the folder, or choose another"
        ) from error
    seconds = time.perf_counter() - begun
    written, total = _parts(output)
    whole = written == total
    if as_json:
        facts = {
            "output": str(output),
            "layout": layout,
            "images_from": None if images is None or picture == "none" else str(images),
            "shard": [process, processes],
            "parts_written": written,
            "parts": total,
            "complete": whole,
            "thresholds": asdict(thresholds),
            "seconds": round(seconds, 3),
            **report.to_dict(),
        }
        typer.echo(json.dumps(facts))
        return
    typer.echo(str(report))
    if images is None:
        typer.echo("no pictures were looked for: give --images to link them")
    state = "complete" if whole else f"{written} of {total} parts; other shards have still to run"
    typer.echo(f"{output}: {report.kept} pairs in {report.kept_images} images, {state} ({seconds:.1f} s)")


def _parts(output: Path) -> tuple[int, int | None]:
    """(parts that are written, parts that the data set will have or None if that is unknown yet)."""
    try:
        settings = json.loads((output / "settings.json").read_text(encoding="utf-8"))
        total = -(-settings["images"] // settings["images_per_part"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None
    return len(list((output / "parts").glob("*.report.json"))), total
