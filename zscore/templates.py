r"""Sample + rubric → token ids, and the positions where the model's next-token logits are read.

Prompts are put together from token ids, never from a chat string: the fixed parts are tokenized once, special tokens
are placed by id, and the user's text goes through a copy of the tokenizer that knows no added tokens at all. So
`<|im_end|>` in a prompt is seven ordinary characters' worth of tokens, whatever the tokenizer.
In Qwen's format (others: `zscore.chat_frames`):

    <|im_start|>user\n<|vision_start|> image <|vision_end|> prompt, questions <|im_end|>\n
    <|im_start|>assistant\n<think>\n\n</think>\n\n{title}: ▮\n{title}: ▮ …

Joint layout: the titles follow each other in one sequence and each ▮'s logits are read at the token before it; no
score is ever written there, so one prefill reads all dimensions. Separate layout: a sequence a dimension (the paper's
q(s | p, I, d)), with picture and prompt first so that the prefix is shared. Reasoning layout: as separate, but the
prompt ends where the answer begins; the model writes its reasoning, the marker and the score by itself.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from zscore.chat_frames import read_frame
from zscore.errors import ModelError, RubricError
from zscore.records import EnginePrompt, Failure, Pixels, Status
from zscore.text_tokenizer import TextTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from zscore.rubrics.rubric import Layout, Rubric

    _Tail = tuple[tuple[int, ...], tuple[int, ...]]


class PromptBuilder:
    """Builds the engine prompts of a sample for one tokenizer, rubric and layout.

    `level_ids` are the K level tokens; `hash` identifies every fixed token and special id that goes into a prompt;
    `places_pictures` is False where the engine has to put the picture's tokens in by itself.
    """

    def __init__(
        self, folder: Path, rubric: Rubric, layout: Layout, *, merge: int, max_tokens: int, samples: int = 1
    ) -> None:
        self._text = TextTokenizer(folder)
        self._merge2 = merge * merge
        self._max_tokens = max_tokens
        self.level_ids = self._text.level_ids(rubric)
        frame = read_frame(folder, self._text)
        self._image = frame.image
        self.places_pictures = frame.image is not None
        encode = self._text.encode
        before, after = rubric.prompt_text.split("{prompt}")
        self._head = list(frame.before)
        self._lead = [*frame.between, *encode(before)]
        self._tails = self._make_tails(rubric, layout, after, frame.after)
        self._samples = samples if layout == "reasoning" else 1
        fixed: list[object] = [layout, self._head, self._image, self._lead, self._tails, self.level_ids]
        if layout == "reasoning":
            fixed.append(rubric.reasoning_marker)
        self.hash = hashlib.sha256(json.dumps(fixed).encode()).hexdigest()

    def _make_tails(self, rubric: Rubric, layout: Layout, after: str, close: Sequence[int]) -> list[_Tail]:
        """What follows the user's prompt in each engine prompt."""
        encode, dimensions = self._text.encode, rubric.dimensions
        questions = [rubric.question(dimension) for dimension in dimensions]
        if layout == "joint":
            probes = [rubric.joint_probe.replace("{title}", one.title) for one in dimensions]
            tail = [*encode(after + "".join(questions) + rubric.scale_text), *close]
            return [_with_probes(tail, [encode(probe) for probe in probes], encode(rubric.joint_between))]
        pairs = list(zip(dimensions, questions, strict=True))
        if layout == "reasoning":
            if not rubric.reasoning_ask:
                raise RubricError(f"rubric '{rubric.name}' has no [layouts.reasoning]: add its ask and marker")
            return [
                ((*encode(after + question + rubric.scale_text + rubric.ask(one)), *close), ())
                for one, question in pairs
            ]
        return [
            _with_probes(
                [*encode(after + question + rubric.scale_text), *close],
                [encode(rubric.separate_probe.replace("{title}", one.title))],
                [],
            )
            for one, question in pairs
        ]

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(self._text.added[name] for name in ("<|im_end|>", "<|endoftext|>") if name in self._text.added)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, none of them special."""
        return self._text.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids that a model wrote."""
        return self._text.decode(ids)

    @property
    def overhead(self) -> int:
        """Tokens of the longest prompt besides the picture and the user's text."""
        return len(self._head) + len(self._lead) + max(len(tail) for tail, _ in self._tails)

    def unfit(self, prompt: str, picture: int) -> Failure | None:
        """Why a prompt can't be used beside a picture of so many tokens, if it can't."""
        found = self._user(prompt, 0 if self._image is None else picture)
        return found if isinstance(found, Failure) else None

    def _user(self, prompt: str, picture: int) -> list[int] | Failure:
        """Tokens of the user's prompt."""
        try:
            user = self._text.encode(prompt)
        except ModelError as error:  # a tokenizer with a special token for what it doesn't know
            return Failure(Status.BAD_TEXT, str(error))
        length = self.overhead + picture + len(user)
        if length <= self._max_tokens:
            return user
        fix = " or lower --max-pixels" if self.overhead + len(user) < self._max_tokens else ""
        return Failure(
            Status.PROMPT_TOO_LONG,
            f"{length} tokens ({len(user)} of them the prompt, {picture} the picture); the limit is"
            f" {self._max_tokens}: shorten the prompt{fix}",
        )

    def build(self, prompt: str, pixels: Pixels) -> list[EnginePrompt] | Failure:
        """Prompts of one sample: one in the joint layout, D in the separate one, D x samples where it is to reason."""
        image = [] if self._image is None else [self._image] * (pixels.grid[0] * pixels.grid[1] // self._merge2)
        user = self._user(prompt, len(image))
        if isinstance(user, Failure):
            return user
        shared = [*self._head, *image, *self._lead, *user]
        return [
            EnginePrompt((*shared, *tail), tuple(len(shared) + probe for probe in probes), pixels, draw)
            for tail, probes in self._tails
            for draw in range(self._samples)
        ]


def _with_probes(tail: list[int], probes: list[list[int]], between: list[int]) -> _Tail:
    """Append the probe texts; return the ids and each probe's position (the last token of its text)."""
    ids, positions = list(tail), []
    for number, probe in enumerate(probes):
        if number:
            ids += between
        ids += probe
        positions.append(len(ids) - 1)
    return tuple(ids), tuple(positions)
