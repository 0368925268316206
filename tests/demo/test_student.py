import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zscore import _torchvision
from zscore.demo import student, tokenizer
from zscore.demo.student import build_student, untrained_student
from zscore.rubrics.rubric import load_rubric
from zscore.templates import TextTokenizer


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_student(tmp_path_factory.mktemp("student"))


def test_same_bytes_each_time(folder, tmp_path):
    assert digests(build_student(tmp_path / "again")) == digests(folder)


def test_bytes_are_those_of_every_machine(folder):
    """A change here changes what tests and benchmarks score with: raise `_REVISION` in student.py with it."""
    assert student._REVISION == 4
    assert digests(folder)["model.safetensors"][:16] == "71eab2a7da09863b"
    assert digests(folder)["tokenizer.json"][:16] == "21827d6810cb56db"


def test_seed_changes_weights_only(folder, tmp_path):
    other = digests(build_student(tmp_path / "seed", seed=1))
    assert {name for name, digest in digests(folder).items() if other[name] != digest} == {"model.safetensors"}


def test_overrides_size_the_body(tmp_path):
    text = {"hidden_size": 256, "num_hidden_layers": 8, "tie_word_embeddings": True}
    built = build_student(tmp_path, text=text, vision={"depth": 1})
    config = json.loads((built / "config.json").read_text())
    tensors = load_file(built / "model.safetensors")
    assert config["tie_word_embeddings"] is True
    assert config["text_config"]["num_hidden_layers"] == 8
    assert config["vision_config"]["out_hidden_size"] == 256
    assert "lm_head.weight" not in tensors
    assert "model.language_model.layers.7.self_attn.q_proj.weight" in tensors
    assert "model.visual.blocks.1.norm1.weight" not in tensors
    assert all(tensor.dtype is torch.bfloat16 for tensor in tensors.values())


def test_loads_in_transformers_with_every_weight(folder):
    _torchvision.ensure_importable()
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "Qwen3_5ForConditionalGeneration"
    assert {key: value for key, value in info.items() if value} == {}
    words = AutoTokenizer.from_pretrained(folder)
    assert words("The score: 7<|im_end|>").input_ids[-1] == model.config.text_config.eos_token_id
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a cat"}]}]
    assert words.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a cat<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_loads_without_torchvision(folder):
    """The base install has no torchvision: the weights, the tokenizer and the image processor must do without."""
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torchvision" else found(name, *rest)
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
AutoModelForImageTextToText.from_pretrained({str(folder)!r})
AutoTokenizer.from_pretrained({str(folder)!r})
print(type(AutoImageProcessor.from_pretrained({str(folder)!r})).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "Qwen2VLImageProcessorPil"


@pytest.mark.parametrize("rubric", ["z-reward", "q-align"])
def test_levels_of_the_shipped_rubrics_are_single_tokens(folder, rubric):
    ids = TextTokenizer(folder).level_ids(load_rubric(rubric))
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("text", ["12345", " 7", "é🙂\x00\n\n", "a  b\tc", "don't", "日本語"])
def test_any_text_survives_the_round_trip(folder, text):
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert words.decode(words.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_have_the_ids_that_the_config_names(folder):
    config = json.loads((folder / "config.json").read_text())
    entries = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    named = {entry["content"]: entry for entry in entries}
    assert config["image_token_id"] == named["<|image_pad|>"]["id"] == tokenizer.IDS["<|image_pad|>"]
    assert named["<|im_end|>"]["special"]
    assert not named["<think>"]["special"]
    assert max(entry["id"] for entry in entries) < config["text_config"]["vocab_size"]


def test_cached_student_is_built_once_by_concurrent_callers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: untrained_student(), range(4)))
    assert set(folders) == {tmp_path / "zscore" / f"untrained-student-{student._REVISION}"}
    assert [entry.name for entry in (tmp_path / "zscore").iterdir()] == [folders[0].name]
    assert (folders[0] / "zscore.json").exists()


def test_shim_declares_once_and_only_where_it_must():
    declared = _torchvision.ensure_importable()
    assert _torchvision.ensure_importable() is declared
    if torch.version.cuda is not None:
        assert not declared
