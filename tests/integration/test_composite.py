"""Vision-language models whose text part has the attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3ForConditionalGeneration,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from checkpoints import IDS, assert_same_parameters, config_file
from tiny_models import BY_PART, composite_config, perturb_scalings

IMAGE_IDS = torch.tensor([[5, 60, 60, 60, 60, 7, 8, 9]])


COMPOSITES = {"gemma3": Gemma3ForConditionalGeneration, "llava": LlavaForConditionalGeneration}


def image_logits(model: PreTrainedModel) -> torch.Tensor:
    """The logits of `IMAGE_IDS` with one random image."""
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    extra = {"token_type_ids": (IMAGE_IDS == 60).long()} if isinstance(model, Gemma3ForConditionalGeneration) else {}
    with torch.no_grad():
        return model(input_ids=IMAGE_IDS, pixel_values=pixels, **extra).logits


@pytest.mark.parametrize("kind", COMPOSITES)
def test_composite_model_saves_and_reloads(kind: str, tmp_path: Path):
    config = composite_config(kind, {"positions": "nape"})
    model = COMPOSITES[kind]._from_config(config, attn_implementation=BY_PART).eval()
    perturb_scalings(model)
    names = [name for name, _ in model.named_parameters() if "length_scaling" in name]
    assert len(names) == 8 and all("language_model" in name for name in names)
    model.save_pretrained(tmp_path)
    entries = config_file(tmp_path)
    assert entries["text_config"]["asentmax"]["positions"] == "nape"
    assert "asentmax" not in entries and "asentmax" not in entries["vision_config"]
    for model_class in (COMPOSITES[kind], AutoModelForImageTextToText):
        reloaded = model_class.from_pretrained(tmp_path)
        assert_same_parameters(reloaded, model)
        assert torch.equal(image_logits(reloaded), image_logits(model))
        assert reloaded.config.vision_config._attn_implementation == "sdpa"
    assert model.generate(input_ids=IDS[:1], max_new_tokens=2, do_sample=False).shape == (1, 11)


@pytest.mark.parametrize("kind", COMPOSITES)
def test_composite_baseline_equals_its_own_sdpa(kind: str):
    """Also for Gemma 3, where the tokens of an image see each other in both directions."""
    expected = COMPOSITES[kind]._from_config(composite_config(kind)).eval()
    flags = {"alpha": 1.0, "scaling": "none"}
    model = COMPOSITES[kind]._from_config(composite_config(kind, flags), attn_implementation=BY_PART).eval()
    model.load_state_dict(expected.state_dict())
    torch.testing.assert_close(image_logits(model), image_logits(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", COMPOSITES)
def test_composite_model_refuses_a_plain_name_with_a_hint(kind: str):
    with pytest.raises(NotImplementedError, match=r"'text_config': 'asentmax', 'vision_config': 'sdpa'"):
        COMPOSITES[kind]._from_config(composite_config(kind), attn_implementation="asentmax")


@pytest.mark.parametrize("kind", COMPOSITES)
def test_flags_on_the_top_of_a_composite_config_are_not_lost(kind: str):
    config = composite_config(kind)
    config.asentmax = {"positions": "nape"}
    with pytest.raises(ValueError, match=r"set it on that part, e\.g\. config\.text_config\.asentmax"):
        COMPOSITES[kind]._from_config(config, attn_implementation=BY_PART)
    with pytest.raises(NotImplementedError, match=r"flags in config\.text_config\.asentmax"):
        COMPOSITES[kind]._from_config(config)
