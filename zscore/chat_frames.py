"""What stands around a picture and a text in a model's chat format, as token ids.

Qwen's format is written here, token by token. For any other vision-language model the checkpoint's own chat template is
rendered once with a marker where the text will stand, cut at the marker, and each side tokenized by itself: so the
text never passes through the template, and what it says can't become a special token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from zscore.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from zscore.text_tokenizer import TextTokenizer

QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
THINK_TOKENS = ("<think>", "</think>")
MARKER = "ZSCORETEXTSTANDSHERE"


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """Token ids of one turn with a picture and a text, up to where the answer begins."""

    before: tuple[int, ...]
    """Up to the picture; with the model's own placeholder at its end or in it where `image` is None."""
    image: int | None
    """What stands once for every image token; None where the engine puts the picture in by itself."""
    between: tuple[int, ...]
    """From the picture to the text."""
    after: tuple[int, ...]
    """From the text to the answer."""


def read_frame(folder: Path, text: TextTokenizer) -> ChatFrame:
    """The chat frame of a checkpoint.

    Raises:
        ModelError: neither Qwen's chat tokens nor a chat template that takes a picture.
    """
    if all(name in text.added for name in QWEN_TOKENS):
        return _qwen(text)
    return _from_template(folder)


def _qwen(text: TextTokenizer) -> ChatFrame:
    start, end, vision, vision_end, image = (text.added[name] for name in QWEN_TOKENS)
    encode = text.encode
    after = [end, *encode("\n"), start, *encode("assistant\n")]
    if all(name in text.added for name in THINK_TOKENS):
        # The empty reasoning block that Qwen's format puts before a direct answer.
        begin, finish = (text.added[name] for name in THINK_TOKENS)
        after += [begin, *encode("\n\n"), finish, *encode("\n\n")]
    return ChatFrame((start, *encode("user\n"), vision), image, (vision_end,), tuple(after))


def _from_template(folder: Path) -> ChatFrame:
    settings = _read_json(folder / "tokenizer_config.json")
    special = {name: _content(value) for name, value in settings.items() if name.endswith("_token")}
    template = _template(folder, settings)
    picture, words = {"type": "image"}, {"type": "text", "text": MARKER}
    rendered = _render(folder, template, [picture, words], special)
    # A template for text alone drops the picture, or writes the list of parts out as it stands.
    written_out = "'type'" in rendered or '"type"' in rendered
    if rendered.count(MARKER) != 1 or written_out or rendered == _render(folder, template, [words], special):
        raise ModelError(
            f"the tokenizer of {folder} lacks {QWEN_TOKENS[0]}, and its chat template has no place for a picture and a"
            " text: zscore can't tell how to prompt this model"
        )
    before, after = rendered.split(MARKER)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode(before, add_special_tokens=False).ids
    first = tokenizer.encode("", add_special_tokens=True).ids[:1]
    begin = tokenizer.token_to_id(special.get("bos_token") or "")
    if begin is not None and first == [begin] and ids[:1] != [begin]:
        ids = [begin, *ids]
    return ChatFrame(tuple(ids), None, (), tuple(tokenizer.encode(after, add_special_tokens=False).ids))


def _render(folder: Path, template: str, content: list[dict[str, str]], special: dict[str, str]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [{"role": "user", "content": content}]
    try:
        rendered, _ = render_jinja_template(
            [conversation], chat_template=template, add_generation_prompt=True, **special
        )
    except Exception as error:  # a template raises whatever it likes
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"the chat template of {folder} can't be rendered: {line}") from error
    return str(rendered[0])


def _template(folder: Path, settings: dict[str, Any]) -> str:
    """The chat template, from wherever this generation of checkpoints keeps it."""
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        return jinja.read_text(encoding="utf-8")
    found = _read_json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise ModelError(
            f"{folder} has neither Qwen's chat tokens nor a chat template: zscore can't tell how to prompt it"
        )
    return found


def _content(token: Any) -> str:
    return str(token.get("content", "") if isinstance(token, dict) else token or "")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} can't be read: {error}") from error
    return found if isinstance(found, dict) else {}
