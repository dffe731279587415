"""A stock Qwen2 with attn_implementation="symbiotic" is the same model as with eager and sdpa."""

import os
import subprocess
import sys

import pytest
import torch
from attention_cases import PACKS

from unigendet.integrations import transformers as integration
from unigendet.layout import Layout

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # of the largest value: the arithmetic is float32 in another order
ROWS, TOKENS = 3, 12
PADDINGS = {
    "left": [[0] * 4 + [1] * 8, [1] * 12, [0] * 11 + [1]],
    "right": [[1] * 8 + [0] * 4, [1] * 12, [1] + [0] * 11],
    "in the middle": [[1] * 3 + [0] * 4 + [1] * 5, [0, 1] * 6, [1, 0] * 6],
    "nowhere": [[1] * 12] * 3,
}


@pytest.fixture(autouse=True)
def registered():
    integration.register()


def model(implementation, **changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 49,
    }
    config = transformers.Qwen2Config(**(sizes | changes))
    return transformers.Qwen2ForCausalLM._from_config(config, attn_implementation=implementation)


def ids(rows=ROWS, tokens=TOKENS):
    return torch.randint(1, 49, (rows, tokens), generator=torch.Generator().manual_seed(1))


def results(implementation, padding=None, labels=None, dense=None, **arguments):
    """Logits of real tokens, loss, and the gradients of all parameters as one vector."""
    own = model(implementation).train()
    logits_of = torch.ones_like(arguments["input_ids"]) if padding is None else padding
    out = own(
        attention_mask=padding if dense is None else dense,
        labels=arguments["input_ids"] if labels is None else labels,
        **arguments,
    )
    out.loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in own.parameters()])
    return {"logits": out.logits[logits_of.bool()].detach(), "loss": out.loss.detach(), "gradients": gradients}


def assert_close(found, expected):
    for name, value in expected.items():
        error = (found[name] - value).abs().max().item()
        assert error <= TOLERANCE * value.abs().max().item(), f"{name}: {error}"


@pytest.fixture
def layouts_made(monkeypatch):
    """The layouts that masks have made."""
    made, original = [], integration.Mask._make
    monkeypatch.setattr(integration.Mask, "_make", lambda *a: made.append(original(*a)) or made[-1])
    return made


@pytest.mark.parametrize("other", ["eager", "sdpa"])
def test_causal_rows(other, layouts_made):
    assert_close(results("symbiotic", input_ids=ids()), results(other, input_ids=ids()))
    assert [layout.num_samples for layout in layouts_made] == [ROWS], "one layout for all layers"


@pytest.mark.parametrize("padding", PADDINGS)
def test_padding(padding):
    """Tokens of a row are compared where they are real. What predicts a real token from padding has no label."""
    mask = torch.tensor(PADDINGS[padding])
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0), value=1)
    labels = ids().masked_fill((mask == 0) | (before == 0), -100)
    found, expected = (results(name, mask, labels, input_ids=ids()) for name in ("symbiotic", "eager"))
    assert_close(found, expected)


@pytest.mark.parametrize("other", ["eager", "sdpa"])
def test_packed_sequences_by_positions(other):
    positions = torch.tensor([[*range(12)], [*range(5), *range(7)], [0, *range(3), *range(8)]])
    arguments = {"input_ids": ids(), "position_ids": positions, "use_cache": False}
    found = results("symbiotic", **arguments)
    assert_close(found, results(other, **arguments))
    alone = results("symbiotic", input_ids=ids(), use_cache=False)
    assert (found["logits"] - alone["logits"]).abs().max() > 0.1


def test_packed_sequences_by_bounds(layouts_made):
    """As FlashAttention's arguments name them, with the positions to match, and with positions that do not tell."""
    bounds = torch.tensor([0, 5, 5, 6, 12], dtype=torch.int32)
    positions = torch.tensor([[*range(5), 0, *range(6)]])
    arguments = {"input_ids": ids(1), "position_ids": positions, "use_cache": False}
    expected = results("eager", **arguments)
    lists = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds.clone(), "max_length_q": 6, "max_length_k": 6}
    assert_close(results("symbiotic", **arguments, **lists), expected)
    assert len(layouts_made) == 1
    shifted = torch.tensor([[*range(5), 5, *range(6, 12)]])  # RoPE sees differences only
    assert_close(results("symbiotic", **arguments | {"position_ids": shifted}, **lists), expected)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padding", ["left", "nowhere"])
def test_generate(cache, padding):
    arguments = {
        "attention_mask": torch.tensor(PADDINGS[padding]),
        "max_new_tokens": 5,
        "do_sample": False,
        "cache_implementation": cache,
    }
    tokens = {name: model(name).eval().generate(ids(), **arguments) for name in ("symbiotic", "eager", "sdpa")}
    assert tokens["symbiotic"].shape[1] > TOKENS
    assert torch.equal(tokens["symbiotic"], tokens["eager"])
    assert torch.equal(tokens["symbiotic"], tokens["sdpa"])


def test_generate_with_beams():
    """The cache is reordered between steps."""
    arguments = {"attention_mask": torch.tensor(PADDINGS["left"]), "max_new_tokens": 4, "num_beams": 3}
    tokens = {name: model(name).eval().generate(ids(), **arguments) for name in ("symbiotic", "eager")}
    assert torch.equal(tokens["symbiotic"], tokens["eager"])


def test_a_prompt_in_pieces():
    """A dynamic cache with several new tokens at a time."""
    own, other = (model(name).eval() for name in ("symbiotic", "eager"))
    cache = transformers.DynamicCache(config=own.config)
    with torch.no_grad():
        expected = other(ids()).logits
        pieces = [own(piece, past_key_values=cache).logits for piece in ids().split([5, 1, 6], dim=1)]
    assert_close({"logits": torch.cat(pieces, 1)}, {"logits": expected})


@pytest.mark.parametrize("pack", PACKS)
def test_a_layout_of_the_callers(pack, layouts_made):
    """Any mask of a Layout runs in a stock model, as with the dense mask in an eager one."""
    layout = Layout.from_splits(PACKS[pack]["samples"])
    arguments = {"input_ids": ids(1, layout.num_queries), "position_ids": layout.positions[None], "use_cache": False}
    dense = torch.zeros(layout.num_queries, layout.num_keys)
    dense = dense.masked_fill(~layout.dense_mask(), torch.finfo(torch.float32).min)
    expected = results("eager", dense=dense[None, None], **arguments)
    assert_close(results("symbiotic", layout=layout, **arguments), expected)
    assert layouts_made == []


def test_a_layout_with_a_cache():
    """The second half of an image is denoised after the first half of a pack is cached."""
    splits = [[(4, "causal"), (5, "full"), (6, "noise")]]
    whole = Layout.from_splits(splits)
    own = model("symbiotic").eval()
    cache = transformers.DynamicCache(config=own.config)
    first = Layout.from_splits([[(4, "causal"), (5, "full")]])
    rest = Layout.from_splits(splits, cached=[9])
    every = ids(1, 15)
    with torch.no_grad():
        expected = own(every, layout=whole, position_ids=whole.positions[None], use_cache=False).logits
        own(every[:, :9], layout=first, position_ids=first.positions[None], past_key_values=cache)
        found = own(every[:, 9:], layout=rest, position_ids=rest.positions[None], past_key_values=cache).logits
    assert_close({"logits": found}, {"logits": expected[:, 9:]})


def test_gradient_checkpointing():
    expected = results("symbiotic", input_ids=ids(), use_cache=False)
    own = model("symbiotic").train()
    own.gradient_checkpointing_enable()
    own(ids(), labels=ids(), use_cache=False).loss.backward()
    assert_close(
        {"gradients": torch.cat([p.grad.flatten() for p in own.parameters()])}, {"gradients": expected["gradients"]}
    )


def test_autocast():
    """Positions are applied in float32 there, so queries and values have two dtypes. At most twice eager's error."""
    exact = results("eager", input_ids=ids())
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = (results(name, input_ids=ids()) for name in ("symbiotic", "eager"))
    for name, value in exact.items():
        assert (found[name] - value).norm() <= 2 * (plain[name] - value).norm(), name
        assert (found[name] - value).norm() > 0


def test_the_scale_is_the_models():
    logits = {}
    for name in ("symbiotic", "eager"):
        own = model(name).eval()
        for layer in own.model.layers:
            layer.self_attn.scaling = 0.9
        logits[name] = own(ids()).logits.detach()
    assert_close({"logits": logits["symbiotic"]}, {"logits": logits["eager"]})
    assert (logits["eager"] - model("eager").eval()(ids()).logits).abs().max() > 0.1


def test_the_backend_can_be_chosen():
    integration.register(backend="reference")
    expected = results("eager", input_ids=ids())
    assert_close(results("symbiotic", input_ids=ids()), expected)
    integration.register(backend="flash")
    with pytest.raises(ValueError, match="backend='flash' cannot run symbiotic_attention"):
        model("symbiotic")(ids())


def test_compiled():
    """With a layout without a graph break, and packs of other lengths compile nothing anew."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    own = model("symbiotic", num_hidden_layers=2).eval()
    compiled = torch.compile(own, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (20, 31, 25):
        layout = Layout.from_splits([[(7, "causal"), (tokens - 10, "noise"), (3, "full")]])
        arguments = {"position_ids": layout.positions[None], "layout": layout, "use_cache": False}
        with torch.no_grad():
            found, expected = (each(ids(1, tokens), **arguments).logits for each in (compiled, own))
        assert_close({"logits": found}, {"logits": expected})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_with_padding():
    """The layout is made between graphs."""
    torch._dynamo.reset()
    own = model("symbiotic", num_hidden_layers=2).eval()
    mask = torch.tensor(PADDINGS["left"])
    with torch.no_grad():
        found = torch.compile(own, backend="aot_eager")(ids(), attention_mask=mask, use_cache=False).logits
        expected = own(ids(), attention_mask=mask, use_cache=False).logits
    assert_close({"logits": found}, {"logits": expected})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_attentions": True}, "output_attentions is True"),
        (
            {"attention_mask": torch.ones(3, 1, 12, 12)},
            r"the mask of this attention is a tensor of shape \[3, 1, 12, 12\]",
        ),
        ({"softcap": 30.0}, "softcap is 30.0"),
        ({"s_aux": torch.ones(4)}, "s_aux is a tensor"),
        ({"is_causal": False}, "is_causal is False"),
        ({"layout": "causal"}, "layout is a str"),
        ({"layout": Layout.from_splits([[(12, "causal")]])}, "12 queries and 12 keys; it must have 36 and 36"),
        (
            {"layout": Layout.from_splits([[(36, "causal")]]), "attention_mask": torch.ones(3, 12)},
            "layout and attention_mask are both given",
        ),
        (
            {"layout": Layout.from_splits([[(36, "causal")]]), "cu_seq_lens_q": torch.tensor([0, 36])},
            "layout and cu_seq_lens_q are both given",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 12])}, r"cu_seq_lens_q is \[0, 12\]; it must rise from 0 to"),
        ({"cu_seq_lens_q": torch.tensor([0, 20, 9, 36])}, "it must rise"),
        ({"cu_seq_lens_q": torch.tensor([0, 36]), "cu_seq_lens_k": torch.tensor([0, 6, 36])}, "cu_seq_lens_k is"),
        ({"cu_seq_lens_q": torch.tensor([0, 36]), "attention_mask": torch.tensor(PADDINGS["left"])}, "a padding mask"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_what_is_not_supported_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        model("symbiotic").eval()(ids(), **{"use_cache": False} | changes)


def test_packed_sequences_have_no_cache():
    own = model("symbiotic").eval()
    cache = transformers.DynamicCache(config=own.config)
    own(ids(1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"24 keys a row; they must come without .* as many keys as queries, 12"):
        own(ids(1), past_key_values=cache, cu_seq_lens_q=torch.tensor([0, 12]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_dropout": 0.1}, "dropout is 0.1"),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, "sliding_window is 4"),
        ({"is_causal": False}, "is_causal is False"),
        ({"head_dim": 136}, "head_dim from 1 to 128"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_models_that_are_not_supported(changes, message):
    with pytest.raises(ValueError, match=message):
        model("symbiotic", **changes).train()(ids())


def test_a_mask_with_additions_is_an_error():
    own = model("symbiotic")
    arguments = {"config": own.config, "inputs_embeds": torch.zeros(1, 4, 32), "attention_mask": None}
    masks = transformers.masking_utils
    mask = masks.create_causal_mask(**arguments, past_key_values=None)
    assert isinstance(mask, integration.Mask)
    for kind, part in (("or_mask_function", "or_mask"), ("and_mask_function", "test_a_mask_with_additions")):
        with pytest.raises(ValueError, match=f"mask is, or holds, .*{part}"):
            masks.create_causal_mask(**arguments, past_key_values=None, **{kind: lambda b, h, q, k: q >= k}).layout()
    with pytest.raises(ValueError, match="kv_offset is 3"):
        integration._mask(batch_size=1, q_length=2, kv_length=5, kv_offset=3)


def test_imports():
    """transformers and torch are enough; nothing is registered before it is asked for."""
    code = (
        "import sys\n"
        "others = ('triton', 'diffusers', 'PIL', 'sklearn', 'scipy', 'rich', 'jsonargparse')\n"
        "sys.modules.update(dict.fromkeys(others))\n"
        "import unigendet.integrations.bagel\n"
        "assert 'transformers' not in sys.modules\n"
        "from unigendet.integrations.transformers import register\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions\n"
        "before = 'symbiotic' in functions\n"
        "register()\n"
        "print(before, 'symbiotic' in functions)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "False True\n", done.stderr
