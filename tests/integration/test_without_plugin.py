"""Checkpoints in processes where transformers has not imported the plugin, or where it is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import Gemma3ForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerFast

import hf_asentmax

from tiny_models import BY_PART, VOCABULARY, composite_config, perturbed_model

pytestmark = pytest.mark.slow  # each test needs a process that imports transformers

REPOSITORY = str(Path(hf_asentmax.__file__).parents[1])


def run_python(script: str, *arguments: Path, home: Path, importable: bool) -> dict[str, Any]:
    """Run a script that ends by printing one JSON line, in a process that has not imported the plugin."""
    hide = """
    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "hf_asentmax":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Hide())
    """
    preamble = f"""
    import json, sys
    import torch
    torch.set_num_threads(1)
    {"" if importable else hide}
    def attempt(function):
        try:
            return function()
        except Exception as error:
            return f"{{type(error).__name__}}: {{error}}"
    """
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", ".", REPOSITORY)]
    if importable:
        paths.append(REPOSITORY)
    settings = {"PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(home / "home"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(preamble) + textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
        cwd=home,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.strip().splitlines()[-1])


def save_tokenizer(path: Path) -> None:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(path)


STOCK = """
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3ForConditionalGeneration, LlamaForCausalLM,
    pipeline,
)
path, entmax_path, composite_path = sys.argv[1:4]
ids = torch.arange(3, 12)[None]
result = {}
for key, model_class, where in (
    ("auto", AutoModelForCausalLM, path),
    ("auto base", AutoModel, path),
    ("direct", LlamaForCausalLM, path),
    ("entmax", AutoModelForCausalLM, entmax_path),
    ("composite auto", AutoModelForImageTextToText, composite_path),
    ("composite direct", Gemma3ForConditionalGeneration, composite_path),
):
    result[key] = attempt(lambda: model_class.from_pretrained(where).config._attn_implementation)
result["sdpa"] = attempt(lambda: AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa") and "loaded")
result["imported before"] = "hf_asentmax" in sys.modules
def logits():
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    return model(ids).logits.flatten().tolist()
result["trusted"] = attempt(logits)
def pipe():
    generator = pipeline("text-generation", path, trust_remote_code=True)
    return generator("w5 w6 w7", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
result["pipeline"] = attempt(pipe)
result["composite trusted"] = attempt(
    lambda: AutoModelForImageTextToText.from_pretrained(
        composite_path, trust_remote_code=True
    ).config.text_config._attn_implementation
)
print(json.dumps(result))
"""
WITHOUT_PACKAGE = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
path = sys.argv[1]
result = {
    "plain": attempt(lambda: AutoModelForCausalLM.from_pretrained(path)),
    "trusted": attempt(lambda: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)),
    "config": attempt(lambda: AutoConfig.from_pretrained(path, trust_remote_code=True)),
    "direct": attempt(lambda: LlamaForCausalLM.from_pretrained(path, trust_remote_code=True)),
}
print(json.dumps(result, default=str))
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], PreTrainedModel]:
    """The results of loading the plugin's checkpoints in transformers with the package installed but not imported."""
    home = tmp_path_factory.mktemp("stock")
    model = perturbed_model(flags={"positions": "nape"})
    model.save_pretrained(home / "asentmax")
    save_tokenizer(home / "asentmax")
    perturbed_model(name="entmax").save_pretrained(home / "entmax")
    composite = Gemma3ForConditionalGeneration._from_config(composite_config("gemma3"), attn_implementation=BY_PART)
    composite.save_pretrained(home / "composite")
    paths = (home / "asentmax", home / "entmax", home / "composite")
    return run_python(STOCK, *paths, home=home, importable=True), model


@pytest.mark.parametrize("key", ["auto", "auto base", "direct", "entmax", "composite auto", "composite direct"])
def test_transformers_without_the_plugin_refuses(key: str, stock: tuple[dict[str, Any], PreTrainedModel]):
    result, _ = stock
    assert result["imported before"] is False
    assert result[key].startswith("ValueError") and "pip install hf_asentmax" in result[key]
    assert "trust_remote_code=True" in result[key]


@pytest.mark.xfail(reason="an explicit attn_implementation replaces the entry of config.json", strict=True)
def test_transformers_without_the_plugin_refuses_an_explicit_sdpa(stock: tuple[dict[str, Any], PreTrainedModel]):
    assert "hf_asentmax" in stock[0]["sdpa"]


def test_trust_remote_code_loads_the_same_model(stock: tuple[dict[str, Any], PreTrainedModel]):
    result, model = stock
    with torch.no_grad():
        expected = model(torch.arange(3, 12)[None]).logits.flatten()
    assert isinstance(result["trusted"], list), result["trusted"]
    torch.testing.assert_close(torch.tensor(result["trusted"]), expected, rtol=1e-5, atol=1e-6)
    assert result["composite trusted"] == "asentmax"


def test_pipeline_with_trust_remote_code(stock: tuple[dict[str, Any], PreTrainedModel]):
    result, model = stock
    prompt = torch.tensor([[5, 6, 7]])
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    names = {0: "<pad>", 1: "<s>", 2: "</s>"}
    expected = " ".join(f"w{i}" for i in generated[0, 3:].tolist() if i not in names)
    assert result["pipeline"].split() == expected.split()


def test_without_the_package_the_import_error_names_it(checkpoint: tuple[Path, PreTrainedModel], tmp_path: Path):
    result = run_python(WITHOUT_PACKAGE, checkpoint[0], home=tmp_path, importable=False)
    for key in ("trusted", "config"):
        assert result[key].startswith("ImportError") and "hf_asentmax" in result[key], result[key]
        assert "pip install hf_asentmax" in result[key]
    for key in ("plain", "direct"):
        assert result[key].startswith("ValueError") and "pip install hf_asentmax" in result[key], result[key]
