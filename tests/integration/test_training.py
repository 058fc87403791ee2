"""Training through Trainer and torch.compile, with the parameters of the length scaling taking part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_asentmax import parameter_groups, set_alpha
from hf_asentmax.scaling import LengthScaling

from tiny_models import perturbed_model, random_ids, tiny_model
from training_runs import IDS, NAPE, loss_of, make_trainer

LEFT_PADDING = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])


def scaling_names(model: torch.nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".length_scaling." in name}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=tolerance, atol=tolerance * 0.1, msg=name)


def training_model(family: str = "llama", flags: Any = None, name: str = "asentmax", **kwargs: Any) -> PreTrainedModel:
    return perturbed_model(family, name, flags, **kwargs).train()


# --- gradients


def test_gradients_reach_everything_from_the_first_step(family: str):
    """The projections of beta and gamma start at zero and still receive gradients."""
    model = tiny_model(family, "asentmax", NAPE).train()
    loss_of(model).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    names = scaling_names(model)
    assert len(names) == 8
    for name in names:
        assert model.get_parameter(name).grad.abs().sum() > 0, name


@pytest.mark.parametrize("scaling", ["ssmax", "learned", "asentmax"])
def test_gradients_of_a_scaling_match_finite_differences(scaling: str):
    """In float64, through a whole GPT-2, whose norms do not round to float32 as RMSNorm does."""
    model = training_model("gpt2", flags={"scaling": scaling}, dtype=torch.float64)
    loss_of(model).backward()
    for name in sorted(scaling_names(model)):
        parameter = model.get_parameter(name)
        direction = torch.randn_like(parameter)
        step = 1e-5
        with torch.no_grad():
            parameter.add_(step * direction)
            above = loss_of(model)
            parameter.sub_(2 * step * direction)
            below = loss_of(model)
            parameter.add_(step * direction)
        expected = ((above - below) / (2 * step)).item()
        actual = (parameter.grad * direction).sum().item()
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool, family: str):
    model = training_model(family, NAPE)
    loss_of(model).backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    calls = count_calls(model)
    loss_of(model).backward()
    assert calls["forward"] == 4, "two layers, each computed twice"
    assert_same_gradients(gradients(model), expected)


def count_calls(model: PreTrainedModel) -> dict[str, int]:
    calls = {"forward": 0}

    def count(*_: Any) -> None:
        calls["forward"] += 1

    for module in model.modules():
        if isinstance(module, LengthScaling):
            module.register_forward_hook(count)
    return calls


def test_autocast_keeps_gradients_finite_and_close(family: str):
    model = training_model(family, NAPE)
    loss_of(model).backward()
    expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, attention_mask=torch.ones_like(IDS))
    loss.backward()
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all(), name
    norms = [torch.cat([g.flatten() for g in each.values()]) for each in (actual, expected)]
    assert (norms[0] - norms[1]).norm() < 0.1 * norms[1].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moving_a_model_moves_its_scalings(dtype: torch.dtype):
    model = training_model(flags=NAPE).to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    loss = loss_of(model)
    loss.backward()
    assert torch.isfinite(loss) and all(model.get_parameter(name).grad.dtype == dtype for name in scaling_names(model))
    model.to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


# --- torch.compile


@pytest.mark.parametrize(
    ("family", "flags", "checkpointing", "mask"),
    [
        ("llama", NAPE, False, None),
        pytest.param("llama", None, True, None, marks=pytest.mark.slow),
        pytest.param("gpt2", NAPE, True, None, marks=pytest.mark.slow),
        pytest.param("gemma2", None, False, LEFT_PADDING, marks=pytest.mark.slow),
    ],
    ids=["llama NAPE", "llama checkpointing", "gpt2 NAPE checkpointing", "gemma2 padding"],
)
def test_compiled_whole_model_equals_the_uncompiled(
    family: str, flags: Any, checkpointing: bool, mask: torch.Tensor | None
):
    """Forward and backward without a graph break (fullgraph). Gemma 2 has two kinds of layers."""
    torch._dynamo.reset()
    model = training_model(family, flags, num_hidden_layers=2 if family == "gemma2" else 1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    extra = {} if mask is None else {"attention_mask": mask}
    expected_loss = loss_of(model, **extra)
    expected_loss.backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = loss_of(compiled, **extra)
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("name", [pytest.param("ssmax", marks=pytest.mark.slow), "topk_softmax"])
def test_compiled_presets_on_softmax(name: str):
    torch._dynamo.reset()
    model = training_model(name=name, flags={"top_k": 3} if name == "topk_softmax" else None, num_hidden_layers=1)
    loss_of(model).backward()
    expected = gradients(model)
    model.zero_grad()
    loss_of(torch.compile(model, fullgraph=True, backend="aot_eager")).backward()
    assert_same_gradients(gradients(model), expected)


# --- optimizer groups


def test_parameter_groups_hold_each_parameter_once(family: str):
    model = tiny_model(family, "asentmax", NAPE)
    groups = parameter_groups(model, weight_decay=0.1)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in model.parameters()}
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and ".length_scaling." not in name
        assert (id(parameter) in decayed) == matrix, name
    torch.optim.AdamW(groups, lr=1e-3)


def test_parameter_groups_leave_out_what_is_frozen():
    model = tiny_model("llama", "asentmax")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".length_scaling." in name)
    groups = parameter_groups(model, weight_decay=0.1)
    assert [len(group["params"]) for group in groups] == [0, 8]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


@pytest.mark.parametrize("decay", [-0.1, float("nan")])
def test_parameter_groups_refuse_a_decay_without_meaning(decay: float):
    with pytest.raises(ValueError, match=r"weight_decay must be at least 0, got"):
        parameter_groups(tiny_model("llama", "asentmax"), weight_decay=decay)


# --- alpha that changes


def test_another_alpha_is_that_of_a_model_built_with_it(tmp_path: Path):
    model = tiny_model("llama", "asentmax", NAPE)
    built = tiny_model("llama", "asentmax", {**NAPE, "alpha": 1.2})
    built.load_state_dict(model.state_dict())
    before, expected = loss_of(model), loss_of(built)
    set_alpha(model, 1.2)
    assert torch.equal(loss_of(model), expected) and not torch.equal(before, expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(loss_of(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    set_alpha(model, 1.0)
    assert torch.isfinite(loss_of(model))


@pytest.mark.parametrize(
    ("implementation", "alpha", "message"),
    [("asentmax", 2.5, "between 1"), ("topk_softmax", 1.5, "top_k"), ("sdpa", 1.5, "no attention of hf_asentmax")],
)
def test_an_alpha_that_does_not_fit_is_refused(implementation: str, alpha: float, message: str):
    model = tiny_model("llama", implementation)
    with pytest.raises(ValueError, match=message):
        set_alpha(model, alpha)


# --- Trainer


@pytest.mark.parametrize(
    ("family", "bf16"), [("llama", True), pytest.param("gpt2", True, marks=pytest.mark.slow), ("llama", False)]
)
def test_trainer_end_to_end(family: str, bf16: bool, tmp_path: Path):
    """Gradient checkpointing and accumulation, bf16 autocast, save, reload."""
    model = tiny_model(family, "asentmax", NAPE).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer, losses = make_trainer(
        model, tmp_path, gradient_checkpointing=True, gradient_accumulation_steps=2, bf16=bf16, max_steps=12
    )
    trainer.train()
    assert sorted(losses) == list(range(1, 13))
    assert all(torch.isfinite(torch.tensor(list(losses.values()))))
    assert losses[12] < losses[1] - 0.2, losses
    for name in scaling_names(model):
        assert not torch.equal(model.get_parameter(name), before[name]), f"{name} did not train"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    trainer.save_model(str(tmp_path / "final"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert reloaded.config._attn_implementation == "asentmax"
    for name, parameter in model.named_parameters():
        assert torch.equal(reloaded.get_parameter(name), parameter), name
    if not bf16:  # after bf16 training the model keeps its autocast
        with torch.no_grad():
            assert torch.equal(reloaded(IDS).logits, model.eval()(IDS).logits)


def test_accumulated_steps_equal_one_large_step(tmp_path: Path):
    parameters = []
    for number, accumulation in enumerate((1, 2)):
        model = tiny_model("llama", "asentmax", NAPE)
        trainer, _ = make_trainer(
            model,
            tmp_path / str(number),
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
        )
        trainer.train()
        parameters.append(dict(model.named_parameters()))
    for name, parameter in parameters[0].items():
        torch.testing.assert_close(parameters[1][name], parameter, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_resume_gives_the_same_losses(family: str, tmp_path: Path):
    model = tiny_model(family, "asentmax", NAPE).train()
    trainer, losses = make_trainer(model, tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    other = tiny_model(family, "asentmax", NAPE, seed=9).train()
    resumed, resumed_losses = make_trainer(other, tmp_path, save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert sorted(resumed_losses) == [4, 5, 6]
    assert resumed_losses == {step: losses[step] for step in (4, 5, 6)}
    for name, parameter in model.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name
    # the checkpoint of a step is a complete model
    middle = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert middle.config._attn_implementation == "asentmax" and middle.config.asentmax["positions"] == "nape"


@pytest.mark.parametrize("name", ["asentmax", "ssmax", "learned"])
def test_trainers_own_optimizer_does_not_decay_the_scalings(name: str, tmp_path: Path):
    flags = {"scaling": "learned"} if name == "learned" else None
    model = tiny_model("llama", "asentmax" if flags else name, flags)
    trainer, _ = make_trainer(model, tmp_path)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): parameter_name for parameter_name, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    assert scaling_names(model) and {decay[scaling] for scaling in scaling_names(model)} == {0.0}
    assert decay["model.layers.0.self_attn.q_proj.weight"] == 0.1
    softmax_trainer, _ = make_trainer(tiny_model("llama"), tmp_path)
    kept = set(softmax_trainer.get_decay_parameter_names(softmax_trainer.model))
    assert kept == {parameter_name for parameter_name, value in decay.items() if value > 0}


@pytest.mark.parametrize("preset", ["asentmax", "entmax"])
def test_gradient_penalties_and_functional_calls(preset: str) -> None:
    model = perturbed_model("llama", preset, num_hidden_layers=1)
    ids = random_ids(2, 7)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    (gradient,) = torch.autograd.grad(logits.square().mean(), embeddings, create_graph=True)
    gradient.square().sum().backward()
    parameters = dict(model.named_parameters())
    reached = [parameter for parameter in parameters.values() if parameter is not model.get_input_embeddings().weight]
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in reached)

    def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, given, (ids,), {"use_cache": False}).logits.square().mean()

    functional = torch.func.grad(loss)({name: parameter.detach() for name, parameter in parameters.items()})
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(functional.values(), expected, strict=True))
