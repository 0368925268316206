"""How samples are read from shards: the same options for every command that reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from zscore.samples import ReadOptions

ImageKeys = Annotated[str | None, typer.Option(help="Picture suffixes, best first, separated by ';'.")]
PromptKeys = Annotated[
    str | None, typer.Option(help="Where prompts are, best first.", show_default="json:prompt;json:caption;txt")
]
GroupKey = Annotated[
    str | None, typer.Option(help="JSON field that groups candidates.", show_default="hash of the prompt")
]
MaxImageBytes = Annotated[
    int | None, typer.Option(min=1, help="Largest picture file that is read.", show_default="256 MiB")
]
MaxTextBytes = Annotated[
    int | None, typer.Option(min=1, help="Largest text or JSON file that is read.", show_default="1 MiB")
]


def read_options(
    image_keys: str | None,
    prompt_keys: str | None,
    group_key: str | None,
    max_image_bytes: int | None,
    max_text_bytes: int | None,
) -> ReadOptions:
    """Those that were given; the others as they are by default."""
    from zscore.samples import ReadOptions

    read: dict[str, Any] = {
        "image_keys": image_keys,
        "prompt_keys": prompt_keys,
        "group_key": group_key,
        "max_image_bytes": max_image_bytes,
        "max_text_bytes": max_text_bytes,
    }
    return ReadOptions(**{name: value for name, value in read.items() if value is not None})
