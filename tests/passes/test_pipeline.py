# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The block loop: it computes what the model computes, prunes what the config says, and leaves no trace behind."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_ssm import CalibrationError, SSMPruner, SSMPrunerConfig, register_method
from optimum_ssm.calibration.activations import Activations, inference_state
from optimum_ssm.calibration.seam import replaced_scan
from optimum_ssm.families import family_of
from optimum_ssm.methods.base import WeightMethod
from optimum_ssm.methods.magnitude import Magnitude
from tests.reference import relative_error, second_moment, trace, window_moment


LENGTH = 24


def prune(model: PreTrainedModel, ids: Tensor | None = None, **options: object) -> SSMPruner:
    """Prune by a config over `ids`, 50 % unless told otherwise."""
    options = {"sparsity": 0.5, "dataset": ids, "seq_len": LENGTH, **options}
    pruner = SSMPruner(model, pruning_config=SSMPrunerConfig(**options))
    pruner.prune()
    return pruner


def same_masks(one: SSMPruner, two: SSMPruner) -> bool:
    return one.masks.keys() == two.masks.keys() and all(torch.equal(one.masks[n], two.masks[n]) for n in one.masks)


def modelling(model: PreTrainedModel) -> object:
    return sys.modules[type(model.base_model.layers[0].mixer).__module__]


# ------------------------------------------------------------------ replay


def replayed_logits(model: PreTrainedModel, ids: Tensor, batch_size: int) -> Tensor:
    blocks = family_of(model).blocks(model)
    stream = Activations(model, blocks[0][1], ids, batch_size)
    for name, block in blocks:
        stream.advance(stream.through(block, name))
    normed = [model.base_model.norm_f(hidden) for hidden in stream.hidden]
    return torch.cat([model.lm_head(hidden.to(model.lm_head.weight.dtype)).float() for hidden in normed])


def full_logits(model: PreTrainedModel, ids: Tensor, batch_size: int) -> Tensor:
    return torch.cat([model(input_ids=batch, use_cache=False).logits for batch in ids.split(batch_size)])


@pytest.mark.parametrize("scan", ["stock", "replaced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_replay_is_the_full_forward_bit_for_bit(
    either_tiny_model: PreTrainedModel, token_ids: Callable[..., Tensor], scan: str, dtype: torch.dtype
) -> None:
    model, ids = either_tiny_model.to(dtype), token_ids(5, LENGTH)
    with (
        inference_state(model),
        replaced_scan(family_of(model), model) if scan == "replaced" else nullcontext() as seam,
    ):
        replayed, full = replayed_logits(model, ids, 2), full_logits(model, ids, 2)
        assert torch.equal(replayed, full)
    if scan == "replaced":
        assert seam.tokens == 2 * model.config.num_hidden_layers * ids.numel(), "both went through the replaced scan"


@pytest.mark.parametrize("scan", ["stock", "replaced"])
@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny"])
def test_block_replay_of_trained_models(
    load_trained: Callable[..., PreTrainedModel], token_ids: Callable[..., Tensor], scan: str, name: str
) -> None:
    model, ids = load_trained(name, torch.bfloat16), token_ids(2, 32, vocabulary=8192)
    for block in model.base_model.layers:
        block.mixer.chunk_size = 16  # Mamba-2's stock scan pads to whole chunks of 256
    with inference_state(model), replaced_scan(family_of(model), model) if scan == "replaced" else nullcontext():
        assert torch.equal(replayed_logits(model, ids, 1), full_logits(model, ids, 1))


def test_the_replaced_scan_agrees_with_the_stock_one(
    either_tiny_model: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    model, ids = either_tiny_model, token_ids(2, 70)  # not a whole number of chunks
    with inference_state(model):
        stock = full_logits(model, ids, 2)
        with replaced_scan(family_of(model), model):
            ours = full_logits(model, ids, 2)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(ours.double(), trace(model, ids)[1], rtol=1e-4, atol=2e-5)


def test_activations_that_are_not_finite_name_the_block(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    tiny_mamba.base_model.layers[1].mixer.out_proj.weight.data.fill_(3e38)
    with pytest.raises(CalibrationError, match=r"^backbone\.layers\.1: activations are not finite"):
        prune(tiny_mamba, token_ids(), method="wanda", targets=["in_proj"])


def test_weights_that_are_not_finite_are_named(tiny_mamba: PreTrainedModel) -> None:
    tiny_mamba.base_model.layers[1].mixer.in_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(CalibrationError, match=r"^backbone\.layers\.1\.mixer\.in_proj: the weight holds non-finite"):
        prune(tiny_mamba, method="magnitude", targets=["in_proj"])


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, math.inf), (torch.float16, 1e8)])
def test_a_result_that_is_not_finite_is_named_and_not_kept(
    tiny_mamba: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, factor: float
) -> None:
    """Looked at when the block is done, so that an accelerator is not waited for at every weight."""
    own = Magnitude.prune
    tiny_mamba.to(dtype)

    def prune_and_overflow(self: Magnitude, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        after, mask = own(self, weight, *args)
        return (after * factor if weight.shape[0] == tiny_mamba.config.hidden_size else after), mask

    monkeypatch.setattr(Magnitude, "prune", prune_and_overflow)
    before = tiny_mamba.base_model.layers[0].mixer.out_proj.weight.clone()
    with pytest.raises(
        CalibrationError, match=r"^backbone\.layers\.0\.mixer\.out_proj: pruning left the finite numbers"
    ):
        prune(tiny_mamba, method="magnitude", targets=["x_proj", "out_proj"])
    assert torch.equal(tiny_mamba.base_model.layers[0].mixer.out_proj.weight, before)


# ------------------------------------------------------------------ what is pruned


def wanda_mask(weight: Tensor, inputs: Tensor, sparsity: float) -> Tensor:
    """Row by row in float64, from the inputs of the weight (B, L, in)."""
    energy = inputs.reshape(-1, inputs.shape[-1]).square().mean(0)
    scores = weight.double().abs() * energy.sqrt()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    count = round(sparsity * weight.shape[1])
    for row in range(len(scores)):
        mask[row, scores[row].argsort()[:count]] = True
    return mask


@pytest.mark.parametrize("sequential", [True, False])
def test_sequential_decides_which_outputs_feed_the_next_block(
    make_tiny_model: Callable[..., PreTrainedModel], token_ids: Callable[..., Tensor], sequential: bool
) -> None:
    """Against masks from a float64 forward: of the pruned first block if sequential, of the dense one if not."""
    dense, ids = make_tiny_model("mamba", num_hidden_layers=3), token_ids()
    pruned = prune(make_tiny_model("mamba", num_hidden_layers=3), ids, method="wanda", sparsity=0.75,
                   sequential=sequential, targets=["in_proj"])  # fmt: skip
    inputs = {True: trace(pruned.model, ids)[0], False: trace(dense, ids)[0]}
    for index in (1, 2):
        name = f"backbone.layers.{index}.mixer.in_proj.weight"
        masks = {mode: wanda_mask(dense.get_parameter(name), inputs[mode][index]["in_proj"], 0.75) for mode in inputs}
        assert not torch.equal(masks[True], masks[False]), "the two modes could not be told apart"
        assert torch.equal(pruned.masks[name], masks[sequential])


def test_output_errors_are_those_of_a_float64_forward(
    make_tiny_model: Callable[..., PreTrainedModel], token_ids: Callable[..., Tensor]
) -> None:
    dense, ids = make_tiny_model("mamba"), token_ids()
    pruned = prune(make_tiny_model("mamba"), ids, method="sparsegpt", targets=["re:.*layers.0.mixer.(in_proj|conv1d)"])
    before, after = trace(dense, ids)[0][0], trace(pruned.model, ids)[0][0]
    rows = {row.name: row for row in pruned.report.rows}
    name = "backbone.layers.0.mixer.in_proj.weight"
    old, new = (model.get_parameter(name).detach() for model in (dense, pruned.model))
    expected = relative_error(old, new, second_moment(before["in_proj"]))
    assert rows[name].error == pytest.approx(expected, rel=1e-4)
    name = "backbone.layers.0.mixer.conv1d.weight"
    old, new = (model.get_parameter(name).detach().double().squeeze(1) for model in (dense, pruned.model))
    moments = window_moment(before["conv1d"])
    lost = sum((a - b) @ q @ (a - b) for a, b, q in zip(old, new, moments))
    assert rows[name].error == pytest.approx(float(lost / sum(a @ q @ a for a, q in zip(old, moments))), rel=1e-4)
    hidden = dense.base_model.embeddings.weight.detach().double()[ids]
    block = (after["output"] - before["output"]).square().sum() / (before["output"] - hidden).square().sum()
    assert pruned.report.passes[0].block_errors == [pytest.approx(float(block), rel=1e-4)], "one block was touched"
    assert 0.001 < block < 1


def test_scan_sums_of_the_loop_are_those_of_a_float64_recurrence(
    either_tiny_model: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    """A_log by `c2`: the lowest Σ C² (dA h)² goes, over all batches, from a state-by-state recurrence."""
    ids = token_ids(5)
    seen = trace(either_tiny_model, ids)[0]
    pruned = prune(either_tiny_model, ids, method="sparsessm", targets=["A_log"], batch_size=2, sequential=False)
    for index, block in enumerate(seen):
        error = (block["readout"] * block["decay"] * block["before"]).square().sum((0, 1))
        score = error if either_tiny_model.config.model_type == "mamba" else error.sum((1, 2))
        mask = pruned.masks[f"backbone.layers.{index}.mixer.A_log"]
        assert mask.sum() == mask.numel() // 2 and score[mask].max() < score[~mask].min()


def test_a_segment_leaves_the_other_rows_alone(
    make_tiny_model: Callable[..., PreTrainedModel], token_ids: Callable[..., Tensor]
) -> None:
    """conv1d.B of Mamba-2 has statistics for its own channels, and in_proj.B prunes its own rows."""
    dense, model = make_tiny_model("mamba2"), make_tiny_model("mamba2")
    pruned = prune(model, token_ids(), method="sparsegpt", targets=["conv1d.B", "in_proj.B"])
    for index in range(2):
        for name, rows in (("in_proj", slice(128, 144)), ("conv1d", slice(64, 80))):
            name = f"backbone.layers.{index}.mixer.{name}.weight"
            outside = torch.ones(len(model.get_parameter(name)), dtype=torch.bool)
            outside[rows] = False
            assert torch.equal(model.get_parameter(name)[outside], dense.get_parameter(name)[outside])
            assert not pruned.masks[name][outside].any()
            assert pruned.masks[name][rows].sum() == pruned.masks[name][rows].numel() // 2
            assert torch.equal(model.get_parameter(name) == 0, pruned.masks[name])


def test_methods_without_statistics_run_no_forward(
    tiny_mamba: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_mamba, "forward", lambda *_, **__: pytest.fail("the model was run"))
    monkeypatch.setattr(tiny_mamba.backbone, "forward", lambda *_, **__: pytest.fail("the model was run"))
    report = prune(tiny_mamba, method="magnitude", allocation="global").report
    assert report.passes[0].tokens == 0 and report.passes[0].block_errors == [None, None]


def test_a_method_that_refuses_a_tensor_is_reported_with_its_name(
    tiny_mamba: PreTrainedModel, clean_registries: None
) -> None:
    @register_method("always_nan")
    @dataclass
    class AlwaysNaN(WeightMethod):
        summary, source = "scores are NaN", "this test"

        def score(self, weight: Tensor, *_: object) -> Tensor:
            return weight * float("nan")

    with pytest.raises(CalibrationError, match=r"^backbone\.layers\.0\.mixer\.in_proj: scores hold NaN"):
        prune(tiny_mamba, method="always_nan", targets=["in_proj"])


# ------------------------------------------------------------------ the same again


def test_same_config_and_seed_give_the_same_masks(
    make_tiny_model: Callable[..., PreTrainedModel], token_ids: Callable[..., Tensor]
) -> None:
    text = token_ids(1, 2000)[0]  # one stream: windows are drawn from it by the seed
    options = {"method": "sparsessm", "num_samples": 6, "targets": ["A_log", "in_proj", "conv1d", "out_proj"]}
    one, two, other = (prune(make_tiny_model("mamba"), text, seed=seed, **options) for seed in (3, 3, 4))
    assert same_masks(one, two)
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, two.model.get_parameter(name))
    assert not same_masks(one, other)


def test_a_method_that_draws_follows_the_seed(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    one, two, other = (prune(make_tiny_model("mamba"), method="random", seed=seed) for seed in (3, 3, 4))
    assert same_masks(one, two) and not same_masks(one, other)


@pytest.mark.parametrize("change", ["order", "batch_size"])
def test_order_and_batching_change_masks_only_at_near_ties(
    make_tiny_model: Callable[..., PreTrainedModel], token_ids: Callable[..., Tensor], change: str
) -> None:
    ids = token_ids(16)
    shuffled = ids[torch.randperm(16)] if change == "order" else ids
    options = {"method": "wanda", "sequential": False}
    one = prune(make_tiny_model("mamba"), ids, batch_size=8, **options)
    two = prune(make_tiny_model("mamba"), shuffled, batch_size=8 if change == "order" else 3, **options)
    dense = make_tiny_model("mamba")
    inputs = trace(dense, ids)[0]
    assert one.masks.keys() == two.masks.keys()
    for name, mask in one.masks.items():
        row, column = (mask != two.masks[name]).nonzero(as_tuple=True)
        index, short = int(name.split(".")[2]), name.split(".")[4]
        energy = inputs[index][short].reshape(-1, mask.shape[1]).square().mean(0)
        scores = dense.get_parameter(name).detach().double().abs() * energy.sqrt()
        threshold = torch.where(mask, scores, 0).amax(1)
        gaps = (scores[row, column] / threshold[row] - 1).abs()
        assert (gaps < 1e-5).all() and len(gaps) < 0.01 * mask.numel(), name


# ------------------------------------------------------------------ what belongs to the user


def state_of(model: PreTrainedModel) -> dict[str, object]:
    """Everything of a user's model and process that a pass may touch for a while and must put back."""
    backends = torch.backends
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "hooks": {
            (name, kind): list(getattr(module, kind).values())
            for name, module in model.named_modules()
            for kind in vars(nn.Module())
            if kind.endswith("_hooks")
        },
        "forward": {name: module.__dict__.get("forward") for name, module in model.named_modules()},
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "globals": {key: id(value) for key, value in vars(modelling(model)).items() if not key.startswith("__")},
        "grad": torch.is_grad_enabled(),
        "precision": [o.fp32_precision for o in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)],
    }


@pytest.fixture
def odd_model(either_tiny_model: PreTrainedModel) -> PreTrainedModel:
    """A model in the middle of a user's work: parts train, parts are frozen, a hook listens, the cache is on."""
    model = either_tiny_model.train()
    model.base_model.layers[1].eval()
    model.base_model.layers[0].mixer.in_proj.weight.requires_grad_(False)
    model.base_model.layers[1].mixer.D.grad = torch.ones_like(model.base_model.layers[1].mixer.D)
    model.base_model.layers[0].register_forward_hook(lambda *_: None)
    model.config.use_cache = True
    return model


class Failure(Exception):
    pass


@contextmanager
def failing(where: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Raise in the second block's method, in its scan, or in the model's embedding."""
    calls = []

    def fail(*_: object, **__: object) -> None:
        calls.append(where)
        raise Failure

    with monkeypatch.context() as patch:
        if where == "method":
            from optimum_ssm.methods.wanda import Wanda

            original = Wanda.prune

            def second(self: Wanda, weight: Tensor, *rest: object) -> object:
                if torch.equal(weight, model.base_model.layers[1].mixer.out_proj.weight):
                    fail()
                return original(self, weight, *rest)

            patch.setattr(Wanda, "prune", second)
        elif where == "block":
            patch.setattr(model.base_model.layers[1].mixer.out_proj, "forward", fail)
        else:
            patch.setattr(model.base_model.embeddings, "forward", fail)
        yield
    assert calls == [where], "the failure was reached"


@pytest.mark.parametrize("where", ["nowhere", "method", "block", "embedding"])
@pytest.mark.parametrize("options", [
    {"method": "wanda"},
    {"method": "wanda", "allocation": "owl"},
    {"method": "wanda", "reconstruction_epochs": 1},
    {"method": "gradient_magnitude"},
])  # fmt: skip
def test_the_users_state_is_as_it_was(
    odd_model: PreTrainedModel,
    token_ids: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    options: dict[str, object],
) -> None:
    before = state_of(odd_model)
    if where == "nowhere":
        prune(odd_model, token_ids(), **options)
    elif where == "method" and options["method"] != "wanda":
        pytest.skip("the failure is in wanda")
    else:
        with failing(where, odd_model, monkeypatch), pytest.raises(Failure):
            prune(odd_model, token_ids(), **options)
    after = state_of(odd_model)
    for key in before:
        assert after[key] == before[key], key


SWITCHES = """
import os
import torch
from torch import backends as b
from optimum_ssm.calibration.activations import inference_state

NEW = b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b
OLD = lambda: b.cuda.matmul.allow_tf32, lambda: b.cudnn.allow_tf32, torch.get_float32_matmul_precision

def seen():
    found = [switch.fp32_precision for switch in NEW]
    for read in OLD:
        try:
            found.append(read())
        except RuntimeError:
            found.append("contradiction")
    return found

def user(action):
    if os.fork():
        return os.wait()[1]
    exec(action)
    before = seen()
    try:
        with inference_state(torch.nn.Linear(2, 2)):
            inside = seen()
            1 / 0
    except ZeroDivisionError:
        pass
    exact = inside[:4] == ["ieee"] * 4 and inside[5] in (False, before[5])
    readable = all(was == "contradiction" or now in (False, "highest") for was, now in zip(before[5:], inside[5:]))
    print(action or "nothing", "|", exact, readable, seen() == before, flush=True)
    os._exit(0)

for action in ("", "b.cuda.matmul.allow_tf32 = True", "torch.set_float32_matmul_precision('high')",
               "torch.set_float32_matmul_precision('medium')", "b.cudnn.allow_tf32 = False", "b.fp32_precision = 'tf32'",
               "b.cuda.matmul.fp32_precision = 'tf32'", "b.cudnn.conv.fp32_precision = 'ieee'",
               "b.fp32_precision = 'ieee'", "b.cuda.matmul.allow_tf32 = True; b.fp32_precision = 'tf32'"):
    user(action)
"""


def test_float32_products_are_exact_whatever_switches_the_user_touched() -> None:
    """torch's older switches cannot be read where they contradict the newer ones: that must stop no pass of such a user,
    and a pass must not bring it about."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SWITCHES], env=env, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 10 and all(line.endswith("| True True True") for line in lines), done.stdout + done.stderr


# ------------------------------------------------------------------ the fill


def forget(model: PreTrainedModel, masks: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the stock scan by one in which the decays that `masks` selects are set to 0 step by step."""
    module, family = modelling(model), family_of(model)
    of_decay = {id(block): masks[f"{name}.mixer.A_log"] for name, block in family.blocks(model)}
    running: list[Tensor] = []
    for _, block in family.blocks(model):
        block.register_forward_pre_hook(lambda block, _: running.append(of_decay[id(block)]))

    def mamba(x, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, **_):  # noqa: ANN001, ANN202
        delta = nn.functional.softplus(dt + delta_bias[:, None])
        state, out = torch.zeros(x.shape[0], *A.shape), []
        for t in range(x.shape[2]):
            decay = torch.exp(delta[:, :, t, None] * A).masked_fill(running[-1], 0)
            state = decay * state + (delta[:, :, t] * x[:, :, t])[..., None] * B[:, None, :, t]
            out.append((state * C[:, None, :, t]).sum(-1))
        return (torch.stack(out, -1) + D[:, None] * x) * nn.functional.silu(z)

    def mamba2(x, dt, A, B, C, D=None, dt_bias=None, **_):  # noqa: ANN001, ANN202
        delta = nn.functional.softplus(dt + dt_bias)
        B, C = (value.repeat_interleave(x.shape[2] // value.shape[2], 2) for value in (B, C))
        state, out = torch.zeros(*x.shape[:1], *x.shape[2:], B.shape[3]), []
        for t in range(x.shape[1]):
            decay = torch.exp(delta[:, t] * A).masked_fill(running[-1], 0)[..., None, None]
            state = decay * state + (delta[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            out.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
        return torch.stack(out, 1)

    monkeypatch.setattr(module, family.scan, mamba if family.recurrence == "mamba" else mamba2)


@pytest.mark.parametrize("model_type, bound", [("mamba", 1e-6), ("mamba2", 1e-5)])
@pytest.mark.parametrize("value", [10.0, 38.0, 80.0])
def test_memoryless_is_an_explicit_mask_of_the_decay(
    make_tiny_model: Callable[..., PreTrainedModel],
    token_ids: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    bound: float,
    value: float,
) -> None:
    """The same forward with the scan spelled out: once over the filled A_log, once over the dense one with dA := 0."""
    dense, ids = make_tiny_model(model_type), token_ids(2)
    pruned = prune(make_tiny_model(model_type), method="random", targets=["A_log"], memoryless_value=value)
    with torch.no_grad():
        stock, dense_logits = pruned.model(ids, use_cache=False).logits, dense(ids).logits
        with monkeypatch.context() as patch:
            forget(dense, pruned.masks, patch)
            masked = dense(ids, use_cache=False).logits
        with monkeypatch.context() as patch:
            nothing = {name: torch.zeros_like(mask) for name, mask in pruned.masks.items()}
            forget(pruned.model, nothing, patch)
            filled = pruned.model(ids, use_cache=False).logits
    assert (filled - masked).abs().max() <= bound, "the fill is the mask"
    torch.testing.assert_close(stock, masked, rtol=1e-5, atol=1e-5)
    assert (stock - dense_logits).abs().max() > 0.1, "forgetting half of the states is no small change"


@pytest.mark.parametrize("fill, value", [("memoryless", 38.0), ("memoryless", 60.5), ("zero", 0.0)])
def test_removed_entries_hold_the_fill_in_bfloat16(
    either_tiny_model: PreTrainedModel, token_ids: Callable[..., Tensor], fill: str, value: float
) -> None:
    model = either_tiny_model.to(torch.bfloat16)
    options = {"memoryless_value": value} if fill == "memoryless" else {}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    pruned = prune(model, token_ids(), method="magnitude", a_log_fill=fill, targets=["A_log", "in_proj"], **options)
    assert len(pruned.masks) == 4
    for name, mask in pruned.masks.items():
        held = model.get_parameter(name)
        assert held.dtype is torch.bfloat16 and mask.sum() == mask.numel() // 2
        assert (held[mask] == (value if name.endswith("A_log") else 0)).all()
        assert torch.equal(held[~mask], before[name][~mask]), "magnitude changes no kept weight"
    assert model(token_ids(1)).logits.isfinite().all()
