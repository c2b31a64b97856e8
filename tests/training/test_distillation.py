# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The mixed loss: its two ends, its gradient, and positions without weight."""

import copy

import pytest
import torch
import torch.nn.functional as F

from optimum_ssm import ConfigurationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.training import DistillationTrainer, distillation_loss

from .runs import RandomTokens, arguments, train


@pytest.fixture
def logits():
    """Student, teacher (3, 7, 11) and labels whose last two positions of the first row are padding."""
    labels = torch.randint(0, 11, (3, 7))
    labels[0, 5:] = -100
    return torch.randn(3, 7, 11).requires_grad_(), torch.randn(3, 7, 11), labels


def batch(rows=2, length=10):
    ids = RandomTokens(rows, length).ids
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def test_alpha_0_is_the_cross_entropy(logits):
    student, teacher, labels = logits
    expected = F.cross_entropy(student[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), ignore_index=-100)
    assert distillation_loss(student, teacher, labels, alpha=0.0).item() == pytest.approx(expected.item(), rel=1e-6)


def test_both_terms_are_their_formulas(logits):
    student, teacher, labels = logits
    terms = []
    for row, column in (labels[:, 1:] != -100).nonzero().tolist():
        ours, theirs = student[row, column].log_softmax(-1), teacher[row, column]
        soft = -((theirs / 2).softmax(-1) * (student[row, column] / 2).log_softmax(-1)).sum()
        terms.append(0.7 * -ours[labels[row, column + 1]] + 0.3 * 4 * soft)
    expected = torch.stack(terms).mean().item()
    assert distillation_loss(student, teacher, labels, 0.3, 2.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_teacher_that_is_the_student_gives_no_gradient(logits, temperature):
    student, _, labels = logits
    distillation_loss(student, student.detach(), labels, 1.0, temperature).backward()
    assert student.grad.abs().max() < 1e-7
    distillation_loss(student, student.detach() + torch.randn_like(student), labels, 1.0, temperature).backward()
    assert student.grad.abs().max() > 1e-3


def test_padded_positions_have_no_weight(logits):
    student, teacher, labels = logits
    changed = [tensor.detach().clone() for tensor in (student, teacher)]
    for tensor in changed:
        tensor[0, 4:] = 50 * torch.randn_like(tensor[0, 4:])  # positions that predict padding
    assert distillation_loss(*changed, labels, 0.5) == distillation_loss(student, teacher, labels, 0.5)
    distillation_loss(student, teacher, labels, 0.5).backward()
    assert not student.grad[0, 4:].any()
    assert not student.grad[:, -1].any()
    assert student.grad[0, :4].any()


def test_the_trainer_takes_padding_from_the_attention_mask(make_tiny_model, tmp_path):
    teacher, student = make_tiny_model("mamba"), make_tiny_model("mamba", seed=1)
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher)
    student.train()
    losses = []
    for filler in (1, 9):
        inputs = batch()
        inputs["labels"][0, 6:] = filler
        inputs["input_ids"][0, 6:] = filler  # causal: what comes after the real tokens cannot reach them
        losses.append(trainer.compute_loss(student, inputs).item())
    assert losses[0] == losses[1]


def test_the_trainer_with_alpha_0_has_the_models_own_loss(either_tiny_model, make_tiny_model, tmp_path):
    trainer = DistillationTrainer(
        either_tiny_model, arguments(tmp_path), teacher=make_tiny_model(either_tiny_model.config.model_type), alpha=0.0
    )
    either_tiny_model.train()
    inputs = batch()
    inputs["labels"][0, 6:] = -100
    expected = either_tiny_model(**inputs).loss.item()
    assert trainer.compute_loss(either_tiny_model, inputs).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (2, 2)])
def test_a_step_is_that_of_the_mean_over_all_real_tokens(make_tiny_model, tmp_path, size, accumulation):
    """Also where micro-batches are padded unequally, and padding is told by the attention mask alone."""

    class Padded(RandomTokens):
        def __getitem__(self, index):
            mask = (torch.arange(12) < (3 if index < 2 else 12)).long()
            return {"input_ids": self.ids[index], "attention_mask": mask, "labels": self.ids[index].clone()}

    student, teacher, data = make_tiny_model("mamba", seed=1), make_tiny_model("mamba"), Padded(4)
    name = "backbone.layers.0.mixer.in_proj.weight"
    inputs = torch.utils.data.default_collate([data[i] for i in range(4)])
    labels = inputs.pop("labels").masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        taught = teacher(**inputs).logits
    distillation_loss(student.train()(**inputs).logits, taught, labels).backward()
    expected = student.get_parameter(name).detach() - 0.01 * student.get_parameter(name).grad
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    args = arguments(tmp_path, optim="sgd", weight_decay=0.0, max_grad_norm=0.0, **settings)
    student.zero_grad()
    DistillationTrainer(student, args, train_dataset=data, teacher=teacher).train()
    start = make_tiny_model("mamba", seed=1).get_parameter(name).detach()
    assert torch.allclose(student.get_parameter(name) - start, expected - start, rtol=1e-3, atol=1e-6)


def test_distillation_brings_a_sparse_student_closer_and_leaves_the_teacher_alone(make_tiny_model, tmp_path):
    teacher = make_tiny_model("mamba").train()
    student = copy.deepcopy(teacher)
    before = copy.deepcopy(teacher.state_dict())
    pruner = SSMPruner(student)
    pruner.prune(SSMPrunerConfig(method="magnitude", sparsity=0.5))
    ids = RandomTokens().ids

    def distance():
        with torch.no_grad():
            ours, theirs = (model.eval()(input_ids=ids).logits for model in (student, teacher))
        return distillation_loss(ours, theirs, ids, 1.0).item()

    first = distance()
    options = {"teacher": teacher, "alpha": 1.0}
    callbacks = [pruner.sparsity_callback()]
    train(student, tmp_path, callbacks, trainer=DistillationTrainer, options=options, max_steps=20, learning_rate=3e-3)
    assert distance() < first
    assert callbacks[0].masks.sparsity() == pytest.approx(0.5, abs=1e-3)
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_evaluation_is_the_plain_loss(make_tiny_model, tmp_path):
    model, data = make_tiny_model("mamba"), RandomTokens(4)
    trainer = DistillationTrainer(
        model, arguments(tmp_path), eval_dataset=data, teacher=make_tiny_model("mamba", seed=1)
    )
    with torch.no_grad():
        expected = model.eval()(input_ids=data.ids, labels=data.ids).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"compute_loss_func": len}, "compute_loss_func"),
    ],
)
def test_contradictions_are_refused(tiny_mamba, make_tiny_model, tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        DistillationTrainer(tiny_mamba, arguments(tmp_path), **{"teacher": make_tiny_model("mamba"), **options})
    with pytest.raises(ConfigurationError, match="vocabulary has 32 entries, the student's 64"):
        DistillationTrainer(tiny_mamba, arguments(tmp_path), teacher=make_tiny_model("mamba", vocab_size=32))
