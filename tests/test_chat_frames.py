"""The chat format around picture and text: Qwen's by its tokens, any other by the checkpoint's own template."""

from __future__ import annotations

import json

import pytest

from tests import tiny_llava
from tests.tiny import pixels
from zscore.chat_frames import read_frame
from zscore.errors import ModelError
from zscore.judge import JudgeOptions, plan_judge
from zscore.rubrics.rubric import load_rubric
from zscore.templates import PromptBuilder
from zscore.text_tokenizer import TextTokenizer

IMAGE, BEGIN = tiny_llava.ADDED.index("<image>"), tiny_llava.ADDED.index("<s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava.write(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def copy(folder, tmp_path):
    """The small files of the model, to be spoiled."""
    for file in folder.glob("*.js*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes((folder / "chat_template.jinja").read_bytes())
    return tmp_path


def frame(folder):
    return read_frame(folder, TextTokenizer(folder))


def spelled(folder, ids):
    words = {
        number: token for token, number in json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"].items()
    }
    return "".join(words[token] for token in ids).replace("▁", " ").replace("<0x0A>", "\n")


def test_template_is_cut_where_the_text_stands(folder):
    found = frame(folder)
    assert found.before[0] == BEGIN
    assert found.before.count(IMAGE) == 1
    assert spelled(folder, found.before).split() == ["<s>", "USER:", "<image>"]
    assert spelled(folder, found.after).strip() == "ASSISTANT:"
    assert found.image is None


def test_nothing_a_user_writes_adds_a_special_token(folder):
    builder = PromptBuilder(folder, load_rubric("z-reward"), "separate", merge=2, max_tokens=4096)
    assert not builder.places_pictures
    special = range(len(tiny_llava.ADDED))
    for text in (*tiny_llava.ADDED, "<s><image></s>" * 5, "{{ bos_token }}", "ZSCORETEXTSTANDSHERE"):
        for prompt in builder.build(text, pixels()):
            assert [token for token in prompt.token_ids if token in special] == [BEGIN, IMAGE]
            assert text.replace(" ", "") in spelled(folder, prompt.token_ids).replace(" ", "")


def test_text_in_the_middle_gets_no_space_of_a_beginning(folder):
    """A sentencepiece tokenizer puts a space before a text; a level would then be two tokens."""
    text = TextTokenizer(folder)
    assert spelled(folder, text.encode("a b")) == "a b"
    assert len(set(text.level_ids(load_rubric("z-reward")))) == 9


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.json", "named"])
def test_template_is_found_in_older_places(copy, folder, place):
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    file = copy / ("chat_template.json" if place == "chat_template.json" else "tokenizer_config.json")
    settings = json.loads(file.read_text()) if file.exists() else {}
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    file.write_text(json.dumps({**settings, "chat_template": named if place == "named" else template}))
    assert frame(copy) == frame(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "neither Qwen's chat tokens nor a chat template"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no place for a picture and a text"),
        ("{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}", "no place for a picture and a text"),
        ("{{ raise_exception('pictures only on Sundays') }}", "can't be rendered: pictures only on Sundays"),
        ("{% for m in %}", "can't be rendered"),
    ],
)
def test_template_that_cannot_be_used_is_named(copy, template, message):
    (copy / "chat_template.jinja").unlink()
    if template is not None:
        (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=message):
        frame(copy)


def test_the_reference_engine_says_that_it_needs_qwens_tokens(folder):
    with pytest.raises(ModelError, match=r"lacks one of <\|im_start\|>.*only --engine vllm"):
        plan_judge(JudgeOptions(model=str(folder), engine="transformers"))
