"""Text → token ids that are never special tokens, whatever the text says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from zscore.errors import ModelError, RubricError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from zscore.rubrics.rubric import Rubric


class TextTokenizer:
    """Tokenizes text as text: a tokenizer without its added tokens, and their ids by name."""

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        try:
            spec = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ModelError(
                f"{file} is missing: save it with AutoTokenizer.from_pretrained(...).save_pretrained({folder})"
            ) from error
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} can't be read: {error}") from error
        self.added = {entry["content"]: int(entry["id"]) for entry in spec.get("added_tokens", [])}
        self._forbidden = frozenset(self.added.values())
        # A post-processor may prepend a BOS; truncation and padding would change lengths behind our back.
        spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        spec.update({name: _unprefixed(spec.get(name)) for name in ("normalizer", "pre_tokenizer")})
        self._tokenizer = Tokenizer.from_str(json.dumps(spec))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens, the added ones too."""
        return self._tokenizer.get_vocab() | self.added

    def encode(self, text: str) -> list[int]:
        """Ids of the text; none of them is an added token.

        Raises:
            ModelError: the tokenizer's own vocabulary spells a special token (then text can't be kept apart).
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not self._forbidden.isdisjoint(ids):
            spelled = [name for name, number in self.added.items() if number in ids]
            raise ModelError(f"the tokenizer spells the special token {spelled[0]!r} from ordinary text; unsafe to use")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; added tokens have none."""
        return str(self._tokenizer.decode([one for one in ids if one not in self._forbidden]))

    def level_ids(self, rubric: Rubric) -> tuple[int, ...]:
        """One token id a level, shape (K,).

        Raises:
            RubricError: a level's text isn't one token; names the token and what it became.
        """
        ids = []
        for level in rubric.levels:
            found = self.encode(level.token)
            if len(found) != 1:
                raise RubricError(
                    f"rubric '{rubric.name}': level {level.token!r} is {len(found)} tokens {found} in this tokenizer;"
                    " each level must be exactly one: choose another text for it"
                )
            ids.append(found[0])
        if len(set(ids)) != len(ids):
            raise RubricError(f"rubric '{rubric.name}': two levels are the same token: {ids}")
        return tuple(ids)


def _unprefixed(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space before a text: ours all stand in the middle of a prompt."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            part = {**part, name: [kept for inner in part[name] if (kept := _unprefixed(inner)) is not None]}
    if "prepend_scheme" in part:
        part = {**part, "prepend_scheme": "never"}
    if part.get("type") == "ByteLevel":
        part = {**part, "add_prefix_space": False}
    return part
