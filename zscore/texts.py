"""A sample's text files → its prompt and its group, or a Failure.

A prompt source is `SUFFIX` (the whole file) or `SUFFIX:FIELD` (a string in the file's JSON object). Sources are tried
in order. One whose file or field is absent, null or blank gives way to the next; one that can't be read fails the
sample: scoring against another text than the one that was asked for would be worse than no score.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zscore.errors import UsageError
from zscore.records import Failure, Status

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GZIP_SUFFIX = ".gz"
"""What webdataset inflates on its own: `a.txt.gz` stands in for `a.txt`."""
_JSON = "json"
_GROUP_DIGITS = 16
_JSON_BLANKS = " \t\r\n"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class PromptSource:
    """Where a prompt may stand."""

    suffix: str
    """Of the file, lower case, without the first dot."""
    field: str | None
    """Of its JSON object; None where the file itself is the prompt."""

    def __str__(self) -> str:
        return self.suffix if self.field is None else f"{self.suffix}:{self.field}"


class TextFault(Exception):  # noqa: N818  # not an error but a row: never leaves this file and `zscore.samples`
    """A text can't be had; carries the sample's `Failure`."""

    def __init__(self, status: Status, error: str) -> None:
        super().__init__(error)
        self.failure = Failure(status, error)


def parse_suffixes(spec: str, what: str) -> tuple[str, ...]:
    """Parses `jpg;png` into suffixes, first choice first.

    Raises:
        UsageError: None at all, or one that no file can have.
    """
    parts = tuple(part.strip().removeprefix(".").lower() for part in spec.split(";"))
    if wrong := [part for part in parts if not part or "/" in part]:
        example = "jpg;png;webp" if what == "image_keys" else "json:prompt;txt"
        raise UsageError(f"{what} {spec!r}: {wrong[0]!r} is no file suffix; write them like {example!r}")
    return parts


def parse_sources(spec: str) -> tuple[PromptSource, ...]:
    """Parses `json:prompt;txt` into prompt sources, first choice first.

    Raises:
        UsageError: A source without a suffix, or JSON without a field.
    """
    sources = []
    for part in spec.split(";"):
        suffix, colon, field = part.strip().partition(":")
        (suffix,) = parse_suffixes(suffix, "prompt_keys")
        if (colon and not field) or (suffix == _JSON and not colon):
            raise UsageError(f"prompt_keys {spec!r}: {part!r} names no field; write it like 'json:prompt'")
        sources.append(PromptSource(suffix, field or None))
    return tuple(sources)


class Texts:
    """The text files of one sample, decoded when they are first asked for.

    Args:
        files: Contents by suffix, or why there are none.
        limit: Bytes of a text once it is inflated.
    """

    def __init__(self, files: Mapping[str, bytes | Failure], limit: int) -> None:
        self._files = files
        self._limit = limit
        self._objects: dict[str, dict[str, Any]] = {}

    def prompt(self, sources: Sequence[PromptSource]) -> str:
        """Returns the first prompt that any of `sources` gives.

        Raises:
            TextFault: missing_prompt, bad_text or prompt_too_long.
        """
        for source in sources:
            if source.field is None:
                # The line feed at the end of a text file is the editor's and not the prompt's.
                prompt = (self._text(source.suffix) or "").rstrip("\r\n")
            else:
                prompt = self._string(source.suffix, source.field)
            if prompt and not prompt.isspace():
                return prompt
        tried = ", ".join(map(str, sources))
        raise TextFault(Status.MISSING_PROMPT, f"no prompt in {tried} (see --prompt-keys)")

    def group(self, field: str | None, prompt: str) -> str:
        """Returns what the samples of one best-of-N group share.

        Args:
            field: Of the `.json` file, a string or an integer; None groups by the prompt.
            prompt: The sample's own, or "" where it has none.

        Raises:
            TextFault: bad_text where the field isn't there: another grouping for some samples would pass unseen.
        """
        if field is None:
            return hashlib.sha256(prompt.encode()).hexdigest()[:_GROUP_DIGITS] if prompt else ""
        value = self._object(_JSON).get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value:
            found = "absent" if value is None else f"{_type_name(value)} {json.dumps(value)[:40]}"
            raise TextFault(
                Status.BAD_TEXT, f"group_key {field!r} is {found} in .json; it takes a string or an integer"
            )
        return _checked(value, f"{_JSON}:{field}")

    def _string(self, suffix: str, field: str) -> str:
        value = self._object(suffix).get(field)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise TextFault(Status.BAD_TEXT, f".{suffix} field {field!r} is {_type_name(value)} and not a string")
        return value if value.isascii() else _checked(value, f"{suffix}:{field}")

    def _object(self, suffix: str) -> dict[str, Any]:
        value = self._objects.get(suffix)
        if value is None:
            text = self._text(suffix)
            value = self._objects[suffix] = {} if text is None else _parse_object(text, suffix)
        return value

    def _text(self, suffix: str) -> str | None:
        data = self._files.get(suffix)
        if data is None:
            data = self._files.get(suffix + GZIP_SUFFIX)
            if isinstance(data, bytes):
                data = self._inflated(data, suffix + GZIP_SUFFIX)
        if isinstance(data, Failure):
            raise TextFault(data.status, data.error)
        if data is None:
            return None
        try:
            return data.decode().removeprefix("\ufeff")  # a byte order mark; the codec utf-8-sig is 5 times slower
        except UnicodeDecodeError as error:
            text = f".{suffix} isn't UTF-8: byte 0x{data[error.start]:02x} at {error.start}"
            raise TextFault(Status.BAD_TEXT, text) from None

    def _inflated(self, data: bytes, suffix: str) -> bytes:
        inflater = zlib.decompressobj(31)  # 31: a gzip header, and its checksum verified
        try:
            text = inflater.decompress(data, self._limit + 1)
        except zlib.error as error:
            raise TextFault(Status.BAD_TEXT, f".{suffix} isn't gzip: {error}") from None
        if len(text) > self._limit:
            raise TextFault(
                Status.PROMPT_TOO_LONG, f".{suffix} inflates to over {self._limit} bytes: raise --max-text-bytes"
            )
        if not inflater.eof:
            raise TextFault(Status.BAD_TEXT, f".{suffix} ends before its gzip stream does")
        return text


def _parse_object(text: str, suffix: str) -> dict[str, Any]:
    text = text.strip(_JSON_BLANKS)
    try:
        value, end = _DECODER.raw_decode(text)  # json.loads looks for blanks with regular expressions, at half the time
    except (ValueError, RecursionError) as error:
        raise TextFault(Status.BAD_TEXT, f".{suffix} isn't JSON: {' '.join(str(error).split())[:120]}") from None
    if end < len(text):
        raise TextFault(Status.BAD_TEXT, f".{suffix} isn't one JSON object: something follows at character {end}")
    if not isinstance(value, dict):
        raise TextFault(Status.BAD_TEXT, f".{suffix} is {_type_name(value)} and not a JSON object")
    return value


def _checked(value: str, where: str) -> str:
    # JSON may escape half of a surrogate pair, which no file can hold.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        text = f"{where} holds U+{ord(value[error.start]):04X}, a lone surrogate, which is no character"
        raise TextFault(Status.BAD_TEXT, text) from None
    return value


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
