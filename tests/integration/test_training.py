"""Training through Trainer, torch.compile and PEFT, with the parameters of the length scaling taking part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_asentmax import parameter_groups, set_alpha
from hf_asentmax.scaling import LengthScaling

from tiny_models import perturb_scalings, random_ids, tiny_model

IDS = random_ids(2, 12)
NAPE = {"positions": "nape"}
LEFT_PADDING = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])


def scaling_names(model: torch.nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".length_scaling." in name}


def loss_of(model: Any, **kwargs: Any) -> torch.Tensor:
    logits = model(input_ids=IDS, use_cache=False, **kwargs).logits
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=tolerance, atol=tolerance * 0.1, msg=name)


def training_model(family: str = "llama", flags: Any = None, name: str = "asentmax", **kwargs: Any) -> PreTrainedModel:
    model = tiny_model(family, name, flags, **kwargs).train()
    perturb_scalings(model)
    return model


# --- gradients


def test_gradients_reach_everything_from_the_first_step(family: str):
    """beta and gamma start at zero projections, and still move at once; without learned positions under NAPE."""
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
    """In float64, through a whole model whose norms don't round to float32 as RMSNorm does."""
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
        ("llama", None, True, None),
        ("gpt2", NAPE, True, None),
        ("gemma2", None, False, LEFT_PADDING),
    ],
    ids=["llama NAPE", "llama checkpointing", "gpt2 NAPE checkpointing", "gemma2 padding"],
)
def test_compiled_whole_model_equals_the_uncompiled(
    family: str, flags: Any, checkpointing: bool, mask: torch.Tensor | None
):
    """Without a graph break (fullgraph), forward and backward."""
    torch._dynamo.reset()
    model = training_model(family, flags)
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


@pytest.mark.parametrize("name", ["ssmax", "topk_softmax"])
def test_compiled_presets_on_softmax(name: str):
    torch._dynamo.reset()
    model = training_model(name=name, flags={"top_k": 3} if name == "topk_softmax" else None)
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


class Rows(torch.utils.data.Dataset):
    """Rows of one period of a fixed cycle of tokens: quick to learn, the same in every process."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(12) + index) % 8 + 3
        return {"input_ids": ids, "labels": ids}


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses[state.global_step] = logs["loss"]


def make_trainer(model: Any, path: Path, **overrides: Any) -> tuple[Trainer, dict[int, float]]:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "weight_decay": 0.1,
    }
    losses = Losses()
    arguments = TrainingArguments(output_dir=str(path), **{**settings, **overrides})
    return Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[losses]), losses.losses


@pytest.mark.parametrize(("family", "bf16"), [("llama", True), ("gpt2", True), ("llama", False)])
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
    if not bf16:  # after bf16 training transformers' model keeps its autocast
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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
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
    # and the checkpoint is a model by itself
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


# --- PEFT


def lora(**overrides: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **overrides})


def train_adapter(model: Any, steps: int = 3) -> None:
    """A few steps on everything that requires gradients."""
    optimizer = torch.optim.AdamW(parameter_groups(model.train()), lr=1e-2)
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = tiny_model("llama", "asentmax", NAPE)
    perturb_scalings(model)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("modules_to_save", [None, ["length_scaling"]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_only_its_adapter_and_reloads(
    modules_to_save: list[str] | None, checkpointing: bool, base: Path, tmp_path: Path
):
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapted = get_peft_model(model, lora(modules_to_save=modules_to_save, task_type="CAUSAL_LM"))
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    in_scalings = {name for name in trainable if ".length_scaling." in name}
    assert all("lora_" in name for name in trainable - in_scalings)
    assert len(in_scalings) == (8 if modules_to_save else 0)
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": True})
        adapted.enable_input_require_grads()
    start = {name: parameter.clone() for name, parameter in adapted.named_parameters() if name in trainable}
    train_adapter(adapted)
    for name, parameter in adapted.named_parameters():
        if name in trainable:
            assert not torch.equal(parameter, start[name]), f"{name} did not train"
        else:
            original = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
            assert torch.equal(parameter, before[original]), f"{name} was trained"
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        assert not torch.equal(expected, AutoModelForCausalLM.from_pretrained(base)(IDS).logits)
        onto = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
        torch.testing.assert_close(onto(input_ids=IDS).logits, expected, rtol=0, atol=0)
        alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(alone(input_ids=IDS).logits, expected, rtol=0, atol=0)
        if modules_to_save and Version(transformers.__version__) < Version("5.23"):
            return  # transformers 5.17 loses modules_to_save of any model, softmax too, on this way
        through_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(through_transformers(input_ids=IDS).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("modules_to_save", [None, ["length_scaling"]])
def test_a_merged_adapter_saves_as_a_plain_checkpoint(modules_to_save: list[str] | None, base: Path, tmp_path: Path):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(modules_to_save=modules_to_save))
    train_adapter(adapted)
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        merged = adapted.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert reloaded.state_dict().keys() == AutoModelForCausalLM.from_pretrained(base).state_dict().keys()
        torch.testing.assert_close(reloaded(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_lora_on_all_linear_layers_leaves_the_scalings_alone(base: Path):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(target_modules="all-linear"))
    assert not any("length_scaling" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert torch.isfinite(adapted(input_ids=IDS).logits).all()


def test_lora_on_a_softmax_checkpoint_with_the_scalings_trained(tmp_path: Path):
    """The usual conversion: a softmax model, its weights frozen, an adapter and the new parameters trained."""
    tiny_model("llama").save_pretrained(tmp_path / "softmax")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "softmax", attn_implementation="asentmax")
    adapted = get_peft_model(model, lora(modules_to_save=["length_scaling"]))
    train_adapter(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "softmax", attn_implementation="asentmax")
    onto = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(onto(input_ids=IDS).logits, adapted(input_ids=IDS).logits, rtol=0, atol=0)


def test_trainer_with_a_lora_adapter(base: Path, tmp_path: Path):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), lora(modules_to_save=["length_scaling"], task_type="CAUSAL_LM")
    )
    trainer, losses = make_trainer(adapted, tmp_path, gradient_checkpointing=True, max_steps=8)
    trainer.train()
    assert losses[8] < losses[1]
    decayed = set(trainer.get_decay_parameter_names(adapted))
    assert not any("length_scaling" in name for name in decayed)
    trainer.save_model(str(tmp_path / "adapter"))
    onto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(onto(input_ids=IDS).logits, adapted.eval()(input_ids=IDS).logits, rtol=0, atol=0)
