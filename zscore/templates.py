r"""Sample + rubric → token ids, and the positions where the model's next-token logits are read.

Prompts are put together from token ids, never from a chat string: the fixed parts are tokenized once, special tokens
are placed by id, and the user's text goes through a copy of the tokenizer that knows no added tokens at all. So
`<|im_end|>` in a prompt is seven ordinary characters' worth of tokens, whatever the tokenizer.
In Qwen's format (others: `zscore.chat_frames`):

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

from zscore.chat_frames import read_frame
from zscore.errors import ModelError
from zscore.records import EnginePrompt, Failure, Pixels, Status
from zscore.text_tokenizer import TextTokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from zscore.rubrics.rubric import Layout, Rubric


class PromptBuilder:
    """Builds the engine prompts of a sample for one tokenizer, rubric and layout.

    `level_ids` are the K level tokens; `hash` identifies every fixed token and special id that goes into a prompt;
    `places_pictures` is False where the engine has to put the picture's tokens in by itself.
    """

    def __init__(self, folder: Path, rubric: Rubric, layout: Layout, *, merge: int, max_tokens: int) -> None:
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
        close = frame.after
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

    @property
    def overhead(self) -> int:
        """Tokens of the longest prompt besides the picture and the user's text."""
        return len(self._head) + len(self._lead) + max(len(tail) for tail, _ in self._tails)

    def build(self, prompt: str, pixels: Pixels) -> list[EnginePrompt] | Failure:
        """Prompts of one sample: one in the joint layout, D in the separate one."""
        image = [] if self._image is None else [self._image] * (pixels.grid[0] * pixels.grid[1] // self._merge2)
        try:
            user = self._text.encode(prompt)
        except ModelError as error:  # a tokenizer with a special token for what it doesn't know
            return Failure(Status.BAD_TEXT, str(error))
        length = self.overhead + len(image) + len(user)
        if length > self._max_tokens:
            return Failure(
                Status.PROMPT_TOO_LONG,
                f"{length} tokens ({len(user)} of them the prompt, {len(image)} the picture); the limit is"
                f" {self._max_tokens}: shorten the prompt or lower --max-pixels",
            )
        shared = [*self._head, *image, *self._lead, *user]
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
