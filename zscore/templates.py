r"""Sample + rubric → token ids, and the positions where the model's next-token logits are read.

Prompts are put together from token ids, never from a chat string: the fixed parts are tokenized once, special tokens
are placed by id, and the user's text goes through a copy of the tokenizer that knows no added tokens at all. So
`<|im_end|>` in a prompt is seven ordinary characters' worth of tokens, whatever the tokenizer.

    <|im_start|>user\n<|vision_start|> image <|vision_end|> prompt, questions <|im_end|>\n
    <|im_start|>assistant\n<think>\n\n</think>\n\n{title}: ▮\n{title}: ▮ …

Joint layout: the titles follow each other in one sequence and each ▮'s logits are read at the token before it; no
score is ever written there, so one prefill reads all dimensions. Separate layout: a sequence a dimension (the paper's
q(s | p, I, d)), with picture and prompt first so that the prefix is shared.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from zscore.errors import ModelError, RubricError
from zscore.records import EnginePrompt, Failure, Pixels, Status

if TYPE_CHECKING:
    from pathlib import Path

    from zscore.rubrics.rubric import Layout, Rubric

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
THINK_TOKENS = ("<think>", "</think>")


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
        self._tokenizer = Tokenizer.from_str(json.dumps(spec))

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

    def special(self, name: str) -> int:
        """Id of an added token.

        Raises:
            ModelError: the tokenizer has none of that name.
        """
        try:
            return self.added[name]
        except KeyError:
            raise ModelError(
                f"the tokenizer has no token {name}: zscore's chat layout needs {', '.join(CHAT_TOKENS)}"
            ) from None

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


class PromptBuilder:
    """Builds the engine prompts of a sample for one tokenizer, rubric and layout.

    `level_ids` are the K level tokens; `hash` identifies every fixed token and special id that goes into a prompt.
    """

    def __init__(self, folder: Path, rubric: Rubric, layout: Layout, *, merge: int, max_tokens: int) -> None:
        self._text = TextTokenizer(folder)
        self._merge2 = merge * merge
        self._max_tokens = max_tokens
        self.level_ids = self._text.level_ids(rubric)
        start, end, vision, vision_end, self._image = (self._text.special(name) for name in CHAT_TOKENS)
        encode = self._text.encode
        before, after = rubric.prompt_text.split("{prompt}")
        self._head = [start, *encode("user\n"), vision]
        self._lead = [vision_end, *encode(before)]
        close = [end, *encode("\n"), start, *encode("assistant\n"), *self._no_thinking()]
        questions = [rubric.question(dimension) for dimension in rubric.dimensions]
        if layout == "joint":
            probes = [rubric.joint_probe.replace("{title}", d.title) for d in rubric.dimensions]
            tail = [*encode(after + "".join(questions) + rubric.scale_text), *close]
            self._tails = [_with_probes(tail, [encode(probe) for probe in probes], encode(rubric.joint_between))]
        else:
            self._tails = [
                _with_probes(
                    [*encode(after + question + rubric.scale_text), *close],
                    [encode(rubric.separate_probe.replace("{title}", dimension.title))],
                    [],
                )
                for dimension, question in zip(rubric.dimensions, questions, strict=True)
            ]
        fixed = [layout, self._head, self._image, self._lead, self._tails, self.level_ids]
        self.hash = hashlib.sha256(json.dumps(fixed).encode()).hexdigest()

    def _no_thinking(self) -> list[int]:
        """The empty reasoning block that Qwen's chat format puts before a direct answer, where the model has one."""
        if any(name not in self._text.added for name in THINK_TOKENS):
            return []
        begin, end = (self._text.special(name) for name in THINK_TOKENS)
        return [begin, *self._text.encode("\n\n"), end, *self._text.encode("\n\n")]

    @property
    def overhead(self) -> int:
        """Tokens of the longest prompt besides the picture and the user's text."""
        return len(self._head) + len(self._lead) + max(len(tail) for tail, _ in self._tails)

    def build(self, prompt: str, pixels: Pixels) -> list[EnginePrompt] | Failure:
        """Prompts of one sample: one in the joint layout, D in the separate one."""
        image_tokens = pixels.grid[0] * pixels.grid[1] // self._merge2
        try:
            user = self._text.encode(prompt)
        except ModelError as error:  # a tokenizer with a special token for what it doesn't know
            return Failure(Status.BAD_TEXT, str(error))
        length = self.overhead + image_tokens + len(user)
        if length > self._max_tokens:
            return Failure(
                Status.PROMPT_TOO_LONG,
                f"{length} tokens ({len(user)} of them the prompt, {image_tokens} the picture); the limit is"
                f" {self._max_tokens}: shorten the prompt or lower --max-pixels",
            )
        shared = [*self._head, *([self._image] * image_tokens), *self._lead, *user]
        return [
            EnginePrompt((*shared, *tail), tuple(len(shared) + probe for probe in probes), pixels)
            for tail, probes in self._tails
        ]


def _with_probes(
    tail: list[int], probes: list[list[int]], between: list[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Append the probe texts; return the ids and each probe's position (the last token of its text)."""
    ids, positions = list(tail), []
    for number, probe in enumerate(probes):
        if number:
            ids += between
        ids += probe
        positions.append(len(ids) - 1)
    return tuple(ids), tuple(positions)
