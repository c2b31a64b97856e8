# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""S5: published initial values, the layer against its recurrence in float64, padding, classifier, reload."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.models.hippo import block_hippo, hippo_normal, truncated_normal
from optimum_ssm.models.s5 import S5Activation, S5Config, S5ForSequenceClassification, S5Layer
from optimum_ssm.models.s5_tasks import S5_TASKS, parameter_groups


SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "ssm_size_base": 16, "num_blocks": 2, "num_labels": 5}


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return S5ForSequenceClassification(S5Config(**SMALL | changes)).eval()


def tokens(*lengths, width=None, seed=0):
    ids = torch.randint(1, 20, (len(lengths), 32), generator=torch.Generator().manual_seed(seed))
    ids = ids[:, : width or max(lengths)]
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
    return ids


@pytest.mark.parametrize("size, largest", [(2, 0.866), (16, 80.97), (32, 325.4), (128, 5214.7)])
def test_hippo_normal(size, largest):
    poles, vectors = hippo_normal(size)
    assert torch.allclose(poles.real, torch.full((size,), -0.5, dtype=torch.float64))
    assert float(poles.imag.abs().max()) == pytest.approx(largest, rel=1e-4)
    n = torch.arange(size, dtype=torch.float64)
    rank_one = torch.sqrt(n + 0.5)
    legs = torch.tensor(
        [
            [0 if k > i else -(i + 1) if k == i else -((2 * i + 1) ** 0.5) * (2 * k + 1) ** 0.5 for k in range(size)]
            for i in range(size)
        ],
        dtype=torch.float64,
    )
    rebuilt = vectors @ torch.diag(poles) @ vectors.mH
    torch.testing.assert_close(rebuilt, (legs + torch.outer(rank_one, rank_one)).to(rebuilt.dtype), rtol=0, atol=1e-8)


def test_blocks_keep_the_half_with_negative_imaginary_parts():
    poles, vectors = block_hippo(16, 4, conjugate_symmetry=True)
    assert poles.shape == (8,) and vectors.shape == (16, 8)
    assert (poles.imag < 0).all() and torch.equal(poles[:2], poles[2:4])
    assert block_hippo(16, 4, conjugate_symmetry=False)[0].imag.sum().abs() < 1e-9
    for size, blocks in ((16, 3), (12, 4)):
        with pytest.raises(ConfigurationError, match="does not split"):
            block_hippo(size, blocks, conjugate_symmetry=True)


def test_truncated_normal_has_the_deviation_asked_for():
    torch.manual_seed(0)
    draw = truncated_normal((200_000,), 0.3)
    assert float(draw.std()) == pytest.approx(0.3, rel=0.01)
    assert float(draw.abs().max()) <= 2 * 0.3 / 0.87962566 + 1e-6


@pytest.mark.parametrize(
    "c_init, variance", [("lecun_normal", 2 / 64 / 16), ("trunc_standard_normal", 2 / 16), ("complex_normal", 1.0)]
)
def test_initial_maps_have_the_published_variance(c_init, variance):
    """Of complex entries: C i.i.d. in both parts times V, whose columns have norm 1; B real times Vᴴ."""
    torch.manual_seed(0)
    layer = S5Layer(64, 16, 2, c_init=c_init)
    for C in layer.requires_grad_(False).output_maps():
        assert C.shape == (64, 8)
        assert float(C.abs().square().mean()) == pytest.approx(variance, rel=0.2)
    assert float(layer.B.square().sum(-1).mean()) == pytest.approx(1 / 16, rel=0.2)
    assert set(dict(layer.named_parameters())) - {"C", "C1", "C2"} == {"Lambda_re", "Lambda_im", "log_step", "B", "D"}
    assert layer.log_step.shape == (8, 1)
    assert torch.log(torch.tensor(0.001)) <= layer.log_step.min() and layer.log_step.max() <= torch.log(
        torch.tensor(0.1)
    )


def by_steps(layer, u):
    """The layer from its parameters, one time step after the other, complex128."""
    poles = torch.complex(layer.Lambda_re, layer.Lambda_im)
    if layer.clip_eigenvalues:
        poles = torch.complex(layer.Lambda_re.clamp(max=-1e-4), layer.Lambda_im)
    step = layer.step_rescale * layer.log_step.exp()[:, 0]
    if layer.discretization == "zoh":
        decay, factor = (poles * step).exp(), ((poles * step).exp() - 1) / poles
    else:
        decay, factor = (1 + step * poles / 2) / (1 - step * poles / 2), step / (1 - step * poles / 2)
    B = factor[:, None] * torch.complex(*layer.B.unbind(-1))
    if layer.bidirectional:
        if layer.c_init == "complex_normal":
            C1, C2 = torch.complex(*layer.C.unbind(-1)).chunk(2, 1)
        else:
            C1, C2 = (torch.complex(*C.unbind(-1)) for C in (layer.C1, layer.C2))
    else:
        C1, C2 = torch.complex(*layer.C.unbind(-1)), None
    y = u * layer.D

    def run(order, C):
        state = torch.zeros(len(u), len(decay), dtype=torch.complex128)
        for t in order:
            state = decay * state + u[:, t].to(B.dtype) @ B.T
            y[:, t] += (2 if layer.conjugate_symmetry else 1) * (state @ C.T).real

    run(range(u.shape[1]), C1)
    if C2 is not None:
        run(reversed(range(u.shape[1])), C2)
    return y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scan": "fft"},
        {"discretization": "bilinear"},
        {"bidirectional": False},
        {"c_init": "complex_normal"},
        {"conjugate_symmetry": False, "step_rescale": 2.0},
        {"clip_eigenvalues": True, "state_size": 3},
    ],
)
def test_the_layer_is_its_recurrence(options):
    torch.manual_seed(0)
    layer = S5Layer(6, 8, 2, **options).double()
    with torch.no_grad():
        layer.Lambda_re[0] = 0.5 if options.get("clip_eigenvalues") else -1.0
        layer.log_step += 2  # slow poles would hide what bounds their sum
    u = torch.randn(2, 13, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(u), by_steps(layer, u), rtol=0, atol=1e-12)


def test_half_precision_computes_in_single():
    torch.manual_seed(0)
    layer, u = S5Layer(6, 8, 2), torch.randn(2, 13, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(u), layer(u))
        torch.testing.assert_close(layer(u), layer(u.double()).float(), rtol=1e-4, atol=1e-4)
    assert layer(u.bfloat16()).dtype == torch.bfloat16


def test_activations():
    torch.manual_seed(0)
    y = torch.randn(2, 3, 4)
    g = F.gelu(y, approximate="tanh")
    gates = {kind: S5Activation(kind, 4, 0.0) for kind in ("full_glu", "half_glu1", "half_glu2", "gelu")}
    sigma = {kind: torch.sigmoid(a.out2(g)) for kind, a in gates.items() if kind != "gelu"}
    expected = {"full_glu": gates["full_glu"].out1(g) * sigma["full_glu"], "half_glu1": g * sigma["half_glu1"]}
    expected |= {"half_glu2": y * sigma["half_glu2"], "gelu": g}
    for kind, activation in gates.items():
        torch.testing.assert_close(activation(y), expected[kind])


def test_dropout_takes_whole_channels_of_a_sequence():
    torch.manual_seed(0)
    dropped = S5Activation("gelu", 64, 0.5).train()(torch.full((3, 7, 64), 2.0)) == 0
    assert (dropped == dropped[:, :1]).all()
    assert 0.3 < dropped.float().mean() < 0.7 and not torch.equal(dropped[0], dropped[1])


def test_tokens_are_one_hot_vectors_through_a_linear_map():
    model, ids = make(), tokens(9)
    values = make(vocab_size=1, input_size=20)
    values.load_state_dict(model.state_dict())
    torch.testing.assert_close(values(input_values=F.one_hot(ids, 20).float()).logits, model(ids).logits)
    with pytest.raises(ValueError, match="takes input_ids"):
        model(input_values=torch.zeros(1, 3, 20))


def test_the_mean_is_over_the_true_length():
    model, ids = make(), tokens(4, 9)
    hidden = model.backbone(ids).last_hidden_state
    mean = torch.stack([hidden[0, :4].mean(0), hidden[1].mean(0)])
    torch.testing.assert_close(model(ids).logits, model.classifier(mean))


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("training", [False, True])
def test_masked_padding_changes_nothing(norm, training):
    model = make(norm=norm, mask_padding=True).train(training)
    short, long = tokens(4, 9), tokens(4, 9, width=15)
    torch.testing.assert_close(model(long).logits, model(short).logits, rtol=0, atol=1e-5)


def test_unmasked_padding_passes_through_as_published():
    model = make()
    assert (model(tokens(4, 9, width=15)).logits - model(tokens(4, 9)).logits).abs().max() > 1e-4
    model.train()
    seen = []
    model.backbone.layers[0].norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(tokens(4, 9, width=15))
    assert seen == [(30, 12)]  # padding counts in the batch norm


def test_pairs_are_joined():
    model = make(pairs=True)
    ids = torch.stack([tokens(4, 9), tokens(9, 5, seed=1)], 1)
    a, b = (model.backbone(ids[:, k]).last_hidden_state for k in range(2))
    mean = [
        (h * (x != 0)[..., None]).sum(1) / (x != 0).sum(1, keepdim=True) for h, x in ((a, ids[:, 0]), (b, ids[:, 1]))
    ]
    joined = torch.cat([*mean, mean[0] - mean[1], mean[0] * mean[1]], -1)
    expected = model.classifier(F.gelu(model.join(joined), approximate="tanh"))
    torch.testing.assert_close(model(ids).logits, expected)


def test_it_learns_and_all_parameters_take_part():
    model, ids = make().train(), tokens(9, 9, 9, 9, 9, 9)
    labels = ids[:, 0] % 5
    optimiser = torch.optim.AdamW(parameter_groups(model, 5e-3, 3, 0.0))
    first = None
    for _ in range(30):
        loss = model(ids, labels=labels).loss
        first = first or loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert loss.item() < first / 2


def test_parameter_groups_of_the_table():
    model = make()
    names = {id(p): n.rpartition(".")[2] for n, p in model.named_parameters() if ".layer.0." in n}

    def named(group):
        return {names.get(id(p), "other") for p in group["params"]}

    for kind, plain, decayed in (
        ("standard", {"B", "Lambda_re", "Lambda_im", "log_step"}, set()),
        ("BfastandCdecay", {"Lambda_re", "Lambda_im", "log_step"}, set()),
        ("BandCdecay", {"Lambda_re", "Lambda_im", "log_step"}, {"B"}),
        ("noBCdecay", {"B", "C1", "C2", "D", "Lambda_re", "Lambda_im", "log_step"}, set()),
    ):
        groups = parameter_groups(model, 1e-3, 3, 0.04, kind)
        assert named(groups[0]) == plain and named(groups[1]) == decayed
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0), (1e-3, 0.04), (3e-3, 0.04)]
    assert "log_step" in named(parameter_groups(model, 1e-3, 3, 0.04, dt_global=True)[2])
    with pytest.raises(ConfigurationError, match="allowed: standard"):
        parameter_groups(model, 1e-3, 3, 0.04, "all")


def test_states_of_the_published_models():
    units = {name: sum(S5Config(**task.config).layer_sizes) for name, task in S5_TASKS.items()}
    assert units == {
        **{"listops": 64, "imdb": 576, "cifar": 1152, "pathfinder": 768, "pathx": 768, "aan": 768, "speech": 384}
    }


def test_sizes_of_their_own_reload(tmp_path):
    model, ids = make(layer_sizes=[8, 3]), tokens(4, 9)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is S5ForSequenceClassification and again.config.layer_sizes == [8, 3]
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "wrong",
    [{"layer_sizes": [8]}, {"layer_sizes": [8, 9]}, {"layer_sizes": [8, 0]}, {"norm": "rms"}, {"scan": "loop"}],
)
def test_a_config_that_contradicts_itself_is_refused(wrong):
    with pytest.raises(Exception, match="layer_sizes must be|allowed: "):
        S5Config(**SMALL | wrong)
