"""A model built like BAGEL computes the same before and after ``accelerate``; what would not is an error."""

import copy
import inspect
import re

import pytest
import torch
from bagel_cases import SAMPLES, TOLERANCE, assert_close, batch, counting_layers, decoder_of, gradients, outer
from bagel_stand_in import Norm, Outer, Sizes
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from unigendet.integrations import bagel_forward
from unigendet.integrations.bagel import SplitMask, accelerate, restore
from unigendet.layout import Layout


@pytest.fixture
def count_layers(monkeypatch):
    return counting_layers(monkeypatch)


@pytest.mark.parametrize("latents", [True, False], ids=["two streams", "one stream"])
@pytest.mark.parametrize("freeze_und", [False, True], ids=["all learn", "freeze_und"])
def test_training_computes_the_same(latents, freeze_und, count_layers):
    model, arguments = outer(freeze_und=freeze_und), batch(latents)
    expected = gradients(model, arguments)
    assert model.built_masks == 1
    fast = accelerate(model)
    assert fast is model
    assert_close(gradients(fast, arguments), expected)
    assert fast.built_masks == 1
    assert count_layers() == 3
    frozen = [g for n, g in expected.items() if "layers" in n and "moe_gen" not in n]
    assert frozen
    assert all((g == 0).all() for g in frozen) == freeze_und


def test_arguments_by_position():
    model, arguments = outer(), batch()
    expected = model(**arguments)
    names = list(inspect.signature(Outer.forward).parameters)[1:]
    positional = [arguments.get(name) for name in names]
    torch.testing.assert_close(accelerate(model)(*positional), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_results_of_a_middle_layer_come_back_in_sequence_order():
    model, arguments = outer(), batch()
    x = torch.randn(arguments["sequence_length"], 32)
    mask = SplitMask(tuple(map(tuple, SAMPLES)))
    pack = {
        "packed_sequence": x,
        "sample_lens": arguments["sample_lens"],
        "packed_position_ids": arguments["packed_position_ids"],
        "packed_und_token_indexes": arguments["packed_text_indexes"],
        "packed_gen_token_indexes": arguments["packed_vae_token_indexes"],
    }
    splits = (arguments[name] for name in ("sample_lens", "split_lens", "attn_modes", "sequence_length"))
    dense = list(Layout.from_splits(SAMPLES).dense_mask().split([sum(n for n, _ in s) for s in SAMPLES]))
    bounds = torch.tensor([len(rows) for rows in dense]).cumsum(0).tolist()
    dense = [rows[:, end - len(rows) : end] for rows, end in zip(dense, bounds, strict=True)]
    assert SplitMask.of(*splits) == mask
    expected = model.language_model.forward_diga(attention_mask=dense, **pack)
    broken_off = model.language_model.forward_diga(attention_mask=dense, diga_layer_break=True, **pack)
    accelerate(model.language_model)  # without the outer model
    found = model.language_model.forward_diga(attention_mask=mask, **pack)
    assert len(found) == len(expected) == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    found = model.language_model.forward_diga(attention_mask=mask, diga_layer_break=True, **pack)
    torch.testing.assert_close(found, broken_off, rtol=TOLERANCE, atol=TOLERANCE)


def test_parameters_stay_themselves():
    model, arguments = outer(), batch()
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    plain = copy.deepcopy(model)
    accelerate(model)
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert list(state) == list(model.state_dict())
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for step in range(2):
        for each, its in ((model, optimizer), (plain, plain_optimizer)):
            gradients(each, batch(seed=step))
            its.step()
    moved = model.state_dict()
    assert_close(moved, plain.state_dict(), 1e-3)  # Adam divides by gradients that are all but zero
    assert not torch.equal(moved["vae2llm.weight"], state["vae2llm.weight"])
    model.load_state_dict(state)
    assert_close(gradients(model, arguments), gradients(restore(model), arguments))


def test_one_piece_of_memory_is_one_matrix(monkeypatch):
    """No weights are copied in a pass, nor their gradients."""
    model = accelerate(outer())
    attention = decoder_of(model).layers[0].self_attn
    monkeypatch.setattr(torch, "cat", None)
    bagel_forward.concatenated([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    out = model(**batch())
    monkeypatch.undo()
    out.sum().backward()
    grads = [getattr(attention, name).weight.grad for name in ("q_proj", "k_proj", "v_proj")]
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 1


def test_memory_that_came_apart():
    """A deep copy has weights of its own in every sense, and is accelerated too."""
    model, arguments = accelerate(outer()), batch()
    expected = gradients(model, arguments)
    twin = copy.deepcopy(model)
    assert twin.forward.__self__ is twin
    assert_close(gradients(twin, arguments), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(gradients(twin, arguments), expected)
    accelerate(twin)
    assert_close(gradients(twin, arguments), expected)


def test_restore():
    model, arguments = outer(), batch()
    accelerate(model)
    restore(model)
    assert not any("forward" in name for module in model.modules() for name in vars(module) if "hooks" not in name)
    model(**arguments)
    assert model.built_masks == 1
    restore(model)


def test_saved_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = accelerate(outer())
    safetensors.save_file(model.state_dict(), tmp_path / "x.safetensors")
    other = accelerate(outer(seed=1))
    other.load_state_dict(safetensors.load_file(tmp_path / "x.safetensors"))
    arguments = batch()
    assert torch.equal(other(**arguments), model(**arguments))
    torch.save(model, tmp_path / "x.pt")  # the replacements are not saved
    loaded = torch.load(tmp_path / "x.pt", weights_only=False)
    torch.testing.assert_close(loaded(**arguments), model(**arguments), rtol=TOLERANCE, atol=TOLERANCE)
    assert loaded.built_masks == 1
    accelerate(loaded)
    assert torch.equal(loaded(**arguments), model(**arguments))
    assert loaded.built_masks == 1


def test_restore_after_loading(tmp_path):
    torch.save(accelerate(outer()), tmp_path / "x.pt")
    loaded = restore(torch.load(tmp_path / "x.pt", weights_only=False))
    assert not any("forward" in name for module in loaded.modules() for name in vars(module) if "hooks" not in name)


@pytest.mark.parametrize("wrap_first", [True, False])
def test_activation_checkpointing(wrap_first, count_layers):
    model, arguments = outer(), batch()
    expected = gradients(model, arguments)
    layer = type(decoder_of(model).layers[0])
    wrap = lambda: apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layer))  # noqa: E731
    for act in (wrap, lambda: accelerate(model)) if wrap_first else (lambda: accelerate(model), wrap):
        act()
    found = gradients(model, arguments)
    assert count_layers() == 6  # each layer twice
    assert_close({name.replace("_checkpoint_wrapped_module.", ""): g for name, g in found.items()}, expected)


@pytest.mark.parametrize("trained", ["moe_gen", "k_proj", "nothing"])
def test_frozen_parameters(trained):
    """Also when one of several fused parameters learns."""
    model, arguments = outer(), batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name or name == "vae2llm.bias")
    expected = gradients(model, arguments)
    found = gradients(accelerate(model), arguments)
    assert_close(found, expected)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.requires_grad, name


def test_autocast_is_as_accurate():
    """In bfloat16: the error against float64 is at most twice that of the plain model."""
    model, arguments = outer(), batch()
    wide = copy.deepcopy(model).double()
    wide_arguments = arguments | {"packed_latents": arguments["packed_latents"].double()}
    exact = gradients(wide, wide_arguments)

    def errors(each):
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(each, arguments)
        assert found["output"].dtype == torch.float32
        return {name: (g - exact[name]).norm().item() for name, g in found.items()}

    plain, fast = errors(model), errors(accelerate(model))
    for name, error in fast.items():
        assert error <= 2 * plain[name] + 1e-6 * exact[name].norm().item(), name
    assert sum(plain.values()) > 0


def test_masks_without_splits_are_an_error():
    model, arguments = accelerate(outer()), batch()
    with pytest.raises(ValueError, match="split_lens or attn_modes is None"):
        model(**arguments | {"split_lens": None, "nested_attention_masks": [torch.ones(3, 3)]})
    x = torch.randn(3, 32)
    rows = torch.arange(3)
    for mask, shown in (([torch.ones(3, 3)], "a list of 1 masks"), (torch.ones(3, 3), "a Tensor")):
        with pytest.raises(ValueError, match=f"attention_mask is {shown}; .* SplitMask"):
            model.language_model(x, [3], mask, rows, rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_modes": ["causal"]}, r"attn_modes has 1 entries; it must have one per split: 10"),
        ({"sample_lens": [14, 24, 1, 13, 12]}, r"sample_lens\[0\] is 14; it must be the sum"),
        ({"sequence_length": 50}, r"sequence_length is 50; it must be the end of a sample"),
        (
            {"packed_text_indexes": torch.arange(20), "packed_text_ids": torch.arange(20)},
            "must name each of the 52 rows once",
        ),
    ],
)
def test_lists_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        accelerate(outer())(**batch(latents=False) | changes)


def structure(change):
    model = outer()
    change(model, decoder_of(model))
    return model


class Adapter(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m, d: delattr(d.layers[1].self_attn, "k_proj_moe_gen"),
            r"layers\.1\.self_attn\.k_proj_moe_gen is missing",
        ),
        (lambda m, d: delattr(d.layers[0], "mlp_moe_gen"), r"layers\.0\.mlp_moe_gen\.up_proj is missing"),
        (
            lambda m, d: setattr(d.layers[2].self_attn, "q_norm", nn.Identity()),
            "q_norm is a Identity; it must be an RMS",
        ),
        (
            lambda m, d: setattr(d.layers[0].mlp, "up_proj", Adapter(32, 48)),
            r"mlp\.up_proj is a Adapter; it must be a L",
        ),
        (lambda m, d: setattr(d.layers[0].input_layernorm_moe_gen, "variance_epsilon", 1e-5), "input_layernorm, 1e-06"),
        (lambda m, d: setattr(d.config, "hidden_act", "gelu"), r"config\.hidden_act is 'gelu'"),
        (lambda m, d: setattr(d.layers[0].self_attn.v_proj, "bias", None), "all or none of them must have a bias"),
        (lambda m, d: d.layers[0].mlp.register_forward_hook(print), r"layers\.0\.mlp has hooks"),
        (lambda m, d: setattr(m, "language_model", nn.Linear(2, 2)), r"must have language_model\.model\.layers"),
    ],
)
def test_other_structures_are_errors(change, message):
    model = structure(change)
    with pytest.raises(ValueError, match=message):
        accelerate(model)
    assert "forward" not in vars(model)


def test_an_outer_model_without_splits_is_an_error():
    class Other(Outer):
        def forward(self, x):
            return x

    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"Other\.forward has no argument split_lens"):
        accelerate(Other(Sizes()))


def test_a_forward_that_others_have_replaced_is_an_error():
    model = outer()
    layer = decoder_of(model).layers[1]
    layer.forward = theirs = lambda *a, **k: type(layer).forward(layer, *a, **k)
    with pytest.raises(ValueError, match=r"Layer\.forward is replaced already"):
        accelerate(model)
    restore(model)
    assert layer.forward is theirs


def test_projections_that_are_replaced_later_are_an_error():
    model = accelerate(outer())
    decoder_of(model).layers[0].self_attn.q_proj = Adapter(32, 32)
    with pytest.raises(ValueError, match="a projection has become a Adapter"):
        model(**batch())


@pytest.mark.parametrize("name", ["self_attn", "self_attn.q_proj_moe_gen", "self_attn.k_norm", "mlp.down_proj"])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_that_are_registered_later_are_an_error(name, register):
    model, arguments = accelerate(outer()), batch()
    layer = decoder_of(model).layers[1]
    handle = getattr(layer.get_submodule(name), register)(lambda *_: None)
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} has hooks, which would not run: .*; restore the model"):
        model(**arguments)
    handle.remove()
    called = []
    layer.register_forward_hook(lambda *_: called.append(True))  # the layer's own do run
    model(**arguments)
    assert called == [True]


def test_norms_without_variance_epsilon_are_an_error():
    """Whether all of a layer lack it or one does."""

    def replace(model, decoder):
        for layer in decoder.layers:
            for name, module in list(layer.named_modules()):
                if isinstance(module, Norm):
                    owner, _, last = name.rpartition(".")
                    setattr(layer.get_submodule(owner), last, nn.RMSNorm(len(module.weight), eps=1e-5))

    message = r"layers\.0\.self_attn\.q_norm is a RMSNorm without variance_epsilon; it must have one"
    with pytest.raises(ValueError, match=message):
        accelerate(structure(replace))
    one = structure(lambda m, d: setattr(d.layers[2], "input_layernorm", nn.RMSNorm(32)))
    with pytest.raises(ValueError, match="RMSNorm without") as error:
        accelerate(one)
    assert str(error.value).splitlines()[1:] == [
        "  layers.2.input_layernorm is a RMSNorm without variance_epsilon; it must have one"
    ]


def test_long_lists_of_problems_are_cut_short():
    model = structure(lambda m, d: [delattr(layer, "self_attn") for layer in d.layers])
    with pytest.raises(ValueError, match=r"and \d+ more"):
        accelerate(model)
