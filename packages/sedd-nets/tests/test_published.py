"""Checkpoints as their publishers write them: SEDD, RADD, MDLM, UDLM, Duo, BD3LM.

Config keys, nesting, tensor names and shapes are those of louaaron/Score-Entropy-Discrete-Diffusion, ML-GSAI/RADD,
kuleshov-group/{mdlm, discrete-diffusion-guidance, bd3lms} and s-sahoo/duo, at sizes that fit a test. What the networks
compute is compared with a transcription in plain tensors, itself checked against the published code's own numbers.
"""

import importlib
import itertools
import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sedd_nets import BD3LM, MDLM, RADD, SEDD, UDLM, Documents, from_pretrained, read_config
from sedd_nets.attention import ScaledDotProduct

WIDTH, DEPTH, HEADS, COND = 16, 2, 2, 8


# The networks in plain tensors


def layer_norm(h, weight, bias=None):
    centred = h - h.mean(-1, keepdim=True)
    out = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    return out if bias is None else out + bias


def gelu(a):
    return 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))


def silu(a):
    return a / (1 + torch.exp(-a))


def turn(a, positions, inv_freq):
    """Each head's halves (u, v) (L, d/2) as complex numbers, times e^(i position frequency)."""
    u, v = a.chunk(2, -1)
    angle = positions[:, None] * inv_freq
    turned = torch.complex(u, v) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def logits(weights, tokens, *, heads, sigma=None, label=None, positions=None, sees=None):
    """Logits (L, N) of one sequence.

    Args:
        weights: by their published names, without `backbone.`; computed in float64.
        tokens: (L,) int64.
        heads: how many.
        sigma: the noise level, for a network that embeds it; None: no modulation.
        label: a row of the class table, for a network that has one.
        positions: (L,) where the tokens stand; 0 .. L - 1 unless given.
        sees: (L, L) bool, whether the row's position attends to the column's; everywhere unless given.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    length, width = len(tokens), w["vocab_embed.embedding"].shape[1]
    positions = (torch.arange(length) if positions is None else positions).double()
    sees = torch.ones(length, length, dtype=torch.bool) if sees is None else sees

    def linear(name, a):
        out = a @ w[f"{name}.weight"].T
        return out + w[f"{name}.bias"] if f"{name}.bias" in w else out

    c = None
    if sigma is not None:
        frequency = torch.exp(-math.log(10_000) * torch.arange(128).double() / 128)
        waves = torch.cat([torch.cos(sigma * frequency), torch.sin(sigma * frequency)])
        c = silu(linear("sigma_map.mlp.2", silu(linear("sigma_map.mlp.0", waves))))
        if label is not None:
            c = c + silu(w["cond_map.embedding_table.weight"][label])

    def norm(name, a, shift, scale):
        out = layer_norm(a, w[f"{name}.weight"], w.get(f"{name}.bias"))
        return out if c is None else out * (1 + scale) + shift

    h = w["vocab_embed.embedding"][tokens]
    for number in range(len({name.split(".")[1] for name in w if name.startswith("blocks.")})):
        block = f"blocks.{number}"
        shift1 = scale1 = shift2 = scale2 = None
        gate1 = gate2 = 1.0
        if c is not None:
            shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{block}.adaLN_modulation", c).chunk(6)
        q, k, v = linear(f"{block}.attn_qkv", norm(f"{block}.norm1", h, shift1, scale1)).chunk(3, -1)
        attended = []
        for head in range(heads):
            of_head = slice(head * width // heads, (head + 1) * width // heads)
            inv_freq = w["rotary_emb.inv_freq"]
            q_, k_ = (turn(a[:, of_head], positions, inv_freq) for a in (q, k))
            score = (q_ @ k_.T / math.sqrt(width // heads)).masked_fill(~sees, -math.inf)
            attended.append(torch.softmax(score, -1) @ v[:, of_head])
        h = h + gate1 * linear(f"{block}.attn_out", torch.cat(attended, -1))
        h = h + gate2 * linear(
            f"{block}.mlp.2", gelu(linear(f"{block}.mlp.0", norm(f"{block}.norm2", h, shift2, scale2)))
        )
    shift = scale = None
    if c is not None:
        shift, scale = linear("output_layer.adaLN_modulation", c).chunk(2)
    return linear("output_layer.linear", norm("output_layer.norm_final", h, shift, scale))


# Their files


def tensors(states, *, sigma=True, norm_bias=False, classes=0, seed=0):
    """Random weights under the published names."""
    shapes = {"vocab_embed.embedding": (states, WIDTH), "rotary_emb.inv_freq": (WIDTH // HEADS // 2,)}
    if sigma:
        shapes |= {"sigma_map.mlp.0.weight": (COND, 256), "sigma_map.mlp.0.bias": (COND,)}
        shapes |= {"sigma_map.mlp.2.weight": (COND, COND), "sigma_map.mlp.2.bias": (COND,)}
    if classes:
        shapes["cond_map.embedding_table.weight"] = (classes + 1, COND)
    norms = ["output_layer.norm_final"]
    modulations = {"output_layer": 2}
    for block in (f"blocks.{number}" for number in range(DEPTH)):
        norms += [f"{block}.norm1", f"{block}.norm2"]
        modulations[block] = 6
        shapes |= {f"{block}.attn_qkv.weight": (3 * WIDTH, WIDTH), f"{block}.attn_out.weight": (WIDTH, WIDTH)}
        shapes |= {f"{block}.mlp.0.weight": (4 * WIDTH, WIDTH), f"{block}.mlp.0.bias": (4 * WIDTH,)}
        shapes |= {f"{block}.mlp.2.weight": (WIDTH, 4 * WIDTH), f"{block}.mlp.2.bias": (WIDTH,)}
    shapes |= {"output_layer.linear.weight": (states, WIDTH), "output_layer.linear.bias": (states,)}
    shapes |= {f"{norm}.weight": (WIDTH,) for norm in norms}
    if norm_bias:
        shapes |= {f"{norm}.bias": (WIDTH,) for norm in norms}
    if sigma:
        for of, times in modulations.items():
            shapes[f"{of}.adaLN_modulation.weight"] = (times * WIDTH, COND)
            shapes[f"{of}.adaLN_modulation.bias"] = (times * WIDTH,)
    generator = torch.Generator().manual_seed(seed)
    made = {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    half = WIDTH // HEADS // 2
    made["rotary_emb.inv_freq"] = 10_000 ** (-torch.arange(half) / half)
    return made


def write(folder, config, weights, *, prefix="", as_bin=False):
    """A repository's folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    named = {prefix + name: tensor for name, tensor in weights.items()}
    if as_bin:
        torch.save(named, folder / "pytorch_model.bin")
    else:
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NESTED: dict[str, Any] = {
    "ngpus": 8,
    "tokens": 20,
    "training": {"batch_size": 512, "accum": 1, "n_iters": 1300001, "weight": "standard", "ema": 0.9999},
    "data": {"train": "openwebtext", "valid": "wikitext103", "cache_dir": "data"},
    "noise": {"type": "loglinear", "sigma_min": 0.0001, "sigma_max": 20},
    "sampling": {"predictor": "euler", "steps": 128, "noise_removal": True},
    "eval": {"batch_size": 512, "perplexity": True, "perplexity_batch_size": 32},
    "optim": {"weight_decay": 0, "optimizer": "AdamW", "lr": 0.0003, "warmup": 2500, "grad_clip": 1.0},
}
DIT: dict[str, Any] = {"hidden_size": WIDTH, "cond_dim": COND, "length": 12, "n_blocks": DEPTH, "n_heads": HEADS}


def sedd(folder, graph="absorb"):
    model = {"name": "small", "type": "ddit", **DIT, "scale_by_sigma": graph == "absorb", "dropout": 0.1}
    config = NESTED | {"graph": {"type": graph, "file": "data", "report_all": False}, "model": model}
    return write(folder, config, tensors(20 + (graph == "absorb")), as_bin=True)


def radd(folder):
    model = {"name": "small_radd", "type": "ddit_wot", **DIT, "dropout": 0.02, "use_checkpoint": False}
    config = NESTED | {"model": model | {"dtype": "float16"}, "gpt_dir": "gpt2-large", "outdir": "../output"}
    config["training"] = config["training"] | {"loss_type": "t_DCE"}
    return write(folder, config, tensors(21, sigma=False, norm_bias=True))


def flat(kind, states, **more):
    """What a Hugging Face class of Kuleshov's group or Sahoo writes by `save_pretrained`."""
    return {
        "_name_or_path": f"someone/{kind}",
        "architectures": [kind.upper()],
        "auto_map": {
            "AutoConfig": f"someone/{kind}--configuration_{kind}.{kind.upper()}Config",
            "AutoModelForMaskedLM": f"someone/{kind}--modeling_{kind}.{kind.upper()}",
        },
        "cond_dim": COND,
        "dropout": 0.1,
        "hidden_dim": WIDTH,
        "model_length": 12,
        "model_type": kind,
        "n_blocks": DEPTH,
        "n_heads": HEADS,
        "return_dict": False,
        "torch_dtype": "float32",
        "transformers_version": "4.38.2",
        "vocab_size": states,
    } | more


def mdlm(folder, states=21):
    return write(folder, flat("mdlm", states, time_conditioning=False), tensors(states), prefix="backbone.")


def udlm(folder, classes=0):
    more = {"cfg": classes > 0, "cfg_num_classes": classes or -1, "time_conditioning": True}
    return write(folder, flat("udlm", 21, **more), tensors(21, classes=classes), prefix="backbone.")


def duo(folder, kind="DUO"):
    return write(folder, flat(kind, 21, causal=False, var_min=True), tensors(21), prefix="backbone.")


def duo_trainer(folder, name="duo"):
    """The trainer's own backbone, by huggingface_hub's mixin: nested, keys without a prefix."""
    algo = {"name": name, "backbone": "dit", "parameterization": "mean", "time_conditioning": True, "T": 0}
    algo |= {"subs_masking": False, "causal_attention": False, "loss_type": "elbo", "ignore_bos": False}
    model = {"name": "small", "type": "ddit", **DIT, "scale_by_sigma": True, "dropout": 0.1}
    config = {"algo": algo, "noise": {"type": "log-linear", "eps": 0.001}, "model": model, "vocab_size": 21}
    return write(folder, config | {"mode": "train", "seed": 1}, tensors(21))


def bd3lm(folder, **more):
    config = flat("bd3lm", 21, block_size=4, cross_attn=True, adaln=True, attn_backend="flex", causal=False)
    config |= {"time_conditioning": False, "var_min": True, "sampling_eps_min": 0.001, "sampling_eps_max": 0.999}
    folder = write(folder, config | more, tensors(21), prefix="backbone.")
    weights = load_file(folder / "model.safetensors")
    buffers = {"sampling_eps_min": torch.tensor(0.001), "sampling_eps_max": torch.tensor(0.999)}
    save_file(weights | buffers, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def some_states(states, rows=3, length=12, seed=1):
    return torch.randint(states, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def exact():
    """Without gradients."""
    with torch.no_grad():
        yield


def test_the_transcription_gives_the_published_code_s_numbers(golden):
    for name, prefix, wanted in (("radd-tiny", "", "logits"), ("mdlm-tiny", "backbone.", "logits")):
        folder, expected = golden(name)
        weights = {key.removeprefix(prefix): value for key, value in load_file(folder / "model.safetensors").items()}
        found = logits(weights, expected["xt"][0], heads=4, sigma=0.0 if prefix else None)
        torch.testing.assert_close(found.float(), expected[wanted][0], atol=1e-5, rtol=0)
    folder, expected = golden("sedd-tiny-uniform")
    weights, x, sigma = load_file(folder / "model.safetensors"), expected["xt"][1], float(expected["sigma"][1])
    found = logits(weights, x, heads=4, sigma=sigma).scatter(-1, x[:, None], 0.0)
    torch.testing.assert_close(found.float(), expected["log_score"][1], atol=1e-5, rtol=0)


def test_sedd(tmp_path):
    sigma = torch.tensor([0.05, 0.7, 3.0])
    for graph, states in (("absorb", 21), ("uniform", 20)):
        net = from_pretrained(sedd(tmp_path / graph, graph))
        assert type(net) is SEDD
        assert (net.num_states, net.sections["tokens"], net.sections["graph"]["type"]) == (states, 20, graph)
        assert net.sections["noise"] == NESTED["noise"]
        x, weights = some_states(states), tensors(states)
        for row, log_score in enumerate(net(x, sigma)):
            expected = logits(weights, x[row], heads=HEADS, sigma=float(sigma[row]))
            if graph == "absorb":
                expected = expected - math.log(math.expm1(sigma[row])) - math.log(20)
            expected = expected.scatter(-1, x[row, :, None], 0.0)
            torch.testing.assert_close(log_score.double(), expected, atol=2e-5, rtol=1e-5)


def test_radd_s_public_config(tmp_path):
    """No graph, and a cond_dim that nothing uses."""
    net = from_pretrained(radd(tmp_path / "radd"))
    assert type(net) is RADD
    assert net.sections["graph"] == {"type": "absorb"}
    assert net.sections["training"]["loss_type"] == "t_DCE"
    x = some_states(21)
    found = net.log_conditional(x, torch.ones(3))
    for row in range(3):
        expected = torch.log_softmax(logits(tensors(21, sigma=False, norm_bias=True), x[row], heads=HEADS)[:, :20], -1)
        torch.testing.assert_close(found[row, :, :20].double(), expected, atol=1e-5, rtol=1e-5)
    net.save_pretrained(tmp_path / "again")
    assert torch.equal(RADD.from_pretrained(tmp_path / "again").log_conditional(x, torch.ones(3)), found)


@pytest.mark.parametrize(("states", "mask_id"), [(21, 20), (30522, 103), (28996, 103)])
def test_mdlm(tmp_path, states, mask_id):
    """BERT's vocabularies count their mask already, and have it at 103."""
    net = from_pretrained(mdlm(tmp_path / "mdlm", states))
    assert type(net) is MDLM
    assert net.mask_id == mask_id
    assert net.sections == {
        "tokens": states - 1,
        "graph": {"type": "absorb"} | ({} if mask_id == states - 1 else {"mask_id": mask_id}),
        "noise": {"type": "loglinear"},
    }
    x = some_states(states, rows=2)
    x[:, ::2] = mask_id
    found = net.log_conditional(x, torch.tensor([0.3, 2.0]))
    assert (found[..., mask_id] == -torch.inf).all()
    for row in range(2):
        expected = logits(tensors(states), x[row], heads=HEADS, sigma=0.0)
        expected[:, mask_id] = -torch.inf  # SUBS
        torch.testing.assert_close(found[row].double(), torch.log_softmax(expected, -1), atol=2e-5, rtol=1e-5)
    net.save_pretrained(tmp_path / "again")
    again = from_pretrained(tmp_path / "again")
    assert (again.mask_id, again.sections) == (net.mask_id, net.sections)


def test_the_mask_is_where_the_config_says(tmp_path):
    """The first state, too; and a trainer's word for what is predicted leaves the graph that its config has."""
    for number, config in enumerate(
        [
            flat("mdlm", 21, time_conditioning=False, mask_id=0),
            {"parameterization": "subs", "model": dict(DIT), "graph": {"type": "absorb", "mask_id": 0}},
        ]
    ):
        net = from_pretrained(write(tmp_path / str(number), config, tensors(21)))
        assert net.sections["graph"] == {"type": "absorb", "mask_id": 0}
        assert (net(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1))[..., 0] == 0).all()


def uniform_log_score(posterior_logits, x, sigma):
    """log p_t(y) / p_t(x) for w = softmax(logits): (N a w_y + 1 - a) / (N a w_x + 1 - a), a = e^-sigma."""
    a, w = math.exp(-sigma), torch.softmax(posterior_logits, -1)
    p = len(w[0]) * a * w + 1 - a
    return (p / p.gather(-1, x[:, None])).log()


@pytest.mark.parametrize("writer", [udlm, duo, lambda folder: duo(folder, "duo"), duo_trainer])
def test_udlm_and_duo(tmp_path, writer):
    net = from_pretrained(writer(tmp_path / "published"))
    assert type(net) is UDLM
    assert net.time_conditioning
    assert net.sections.get("tokens", 21) == 21
    assert net.sections["graph"] == {"type": "uniform"}
    assert net.sections["noise"]["type"] == "loglinear"
    x, sigma = some_states(21), torch.tensor([0.001, 0.7, 6.0])
    found = net(x, sigma)
    for row in range(3):
        expected = logits(tensors(21), x[row], heads=HEADS, sigma=float(sigma[row]))
        expected = uniform_log_score(expected, x[row], float(sigma[row]))
        torch.testing.assert_close(found[row].double(), expected, atol=2e-5, rtol=1e-5)
    net.save_pretrained(tmp_path / "again")
    again = from_pretrained(tmp_path / "again")
    assert torch.equal(again(x, sigma), found)
    assert again.sections == net.sections


def test_udlm_s_classes(tmp_path):
    net = from_pretrained(udlm(tmp_path / "guided", classes=3))
    x, sigma, labels = some_states(21), torch.tensor([0.1, 0.7, 2.0]), torch.tensor([2, -1, 0])
    found, without = net(x, sigma, condition=labels), net(x, sigma)
    for row, table_row in enumerate([2, 3, 0]):  # the row behind the classes is for none
        at = float(sigma[row])
        labelled, plain = (
            uniform_log_score(logits(tensors(21, classes=3), x[row], heads=HEADS, sigma=at, label=label), x[row], at)
            for label in (table_row, None)
        )
        torch.testing.assert_close(found[row].double(), labelled, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(without[row].double(), plain, atol=2e-5, rtol=1e-5)
        assert (labelled - plain).abs().max() > 0.01
    assert net.parameter_counts()["conditioning"] > 4 * COND
    net.save_pretrained(tmp_path / "again")
    assert torch.equal(from_pretrained(tmp_path / "again")(x, sigma, condition=labels), found)
    with pytest.raises(IndexError, match=r"label 3 is outside 0\.\.2"):
        net(x, sigma, condition=torch.tensor([3, 0, 0]))
    with pytest.raises(ValueError, match="network without conditions"):
        from_pretrained(udlm(tmp_path / "plain"))(x, sigma, condition=labels)


def test_another_graph_is_not_the_uniform_networks(tmp_path):
    config = {"model": DIT | {"type": "udlm"}, "graph": {"type": "absorb"}}
    with pytest.raises(ValueError, match=r"graph\.type is 'absorb', and this network is the uniform graph's"):
        from_pretrained(write(tmp_path / "udlm", config, tensors(21)))


def test_uniform_score_is_the_ratio_of_probabilities():
    """For w_y = p(x0 = y | the other positions), on a law over 4^3 sequences, by enumeration."""
    states, sigma = 4, 0.6
    p0 = torch.rand(states, states, states, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 4
    p0 /= p0.sum()
    a = math.exp(-sigma)
    kernel = a * torch.eye(states, dtype=torch.float64) + (1 - a) / states
    net = UDLM(states, width=8, depth=1, heads=1, cond_dim=4, length=3).double().eval()
    pt = torch.einsum("abc,ax,by,cz->xyz", p0, kernel, kernel, kernel)
    for x in itertools.product(range(states), repeat=3):
        for position in range(3):
            mats = [torch.eye(states, dtype=torch.float64) if i == position else kernel for i in range(3)]
            w = torch.einsum("abc,ax,by,cz->xyz", p0, *mats)  # clean here, noised elsewhere
            at = tuple(slice(None) if i == position else x[i] for i in range(3))
            net.output_layer.linear.weight.zero_()
            net.output_layer.linear.bias.copy_((w[at] / w[at].sum()).log())
            hidden, here = torch.zeros(1, 8, dtype=torch.float64), torch.tensor([x[position]])
            found = net.head(hidden, here, torch.tensor([sigma], dtype=torch.float64))
            torch.testing.assert_close(found[0], (pt[at] / pt[x]).log(), atol=1e-12, rtol=1e-12)


def test_uniform_score_at_the_ends_of_sigma():
    """Probabilities from e^-60 to 1 and sigma from 1e-4 to 40 in float32, against float64."""
    net = UDLM(5, width=8, depth=1, heads=1, cond_dim=4, length=3).eval()
    bias = torch.tensor([0.0, -60.0, -20.0, -5.0, -0.1])
    net.output_layer.linear.bias.copy_(bias)
    x = torch.arange(5)
    for sigma in (1e-4, 0.01, 1.0, 10.0, 40.0):
        found = net.head(torch.zeros(5, 8), x, torch.full((5,), sigma))
        w = torch.softmax(bias.double(), -1)
        lifted = torch.log1p(5 / math.expm1(sigma) * w)
        torch.testing.assert_close(found.double(), lifted - lifted[:, None], atol=1e-5, rtol=1e-5)


# BD3LM


def sees_beside_clean(length, size):
    """Who sees whom in (x_t, x0), position by position."""
    sees = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for query, key in itertools.product(range(2 * length), repeat=2):
        block_q, block_k = query % length // size, key % length // size
        if query < length:
            sees[query, key] = block_q == block_k if key < length else block_k < block_q
        else:
            sees[query, key] = key >= length and block_k <= block_q
    return sees


@pytest.mark.parametrize("length", [12, 10])  # 10: the last block is half a block
def test_bd3lm_beside_the_clean_text(tmp_path, length):
    net = from_pretrained(bd3lm(tmp_path / "bd3lm"))
    assert type(net) is BD3LM
    assert net.block_size == 4
    clean = some_states(20, length=length)
    x = clean.masked_fill(torch.rand(clean.shape, generator=torch.Generator().manual_seed(5)) < 0.6, 20)
    found = torch.log_softmax(net.token_logits(net.hidden(x, torch.ones(3), clean=clean)), -1)
    positions = torch.arange(length).repeat(2)
    for row in range(3):
        both = torch.cat([x[row], clean[row]])
        sees = sees_beside_clean(length, 4)
        expected = logits(tensors(21), both, heads=HEADS, sigma=0.0, positions=positions, sees=sees)[:length]
        expected[:, 20] = -torch.inf
        torch.testing.assert_close(found[row].double(), torch.log_softmax(expected, -1), atol=2e-5, rtol=1e-5)


def test_bd3lm_block_by_block(tmp_path):
    """With one noised block, the blocks before it in x itself are the clean ones, and those behind do not count."""
    net = from_pretrained(bd3lm(tmp_path / "bd3lm"))
    clean, sigma = some_states(20), torch.tensor([0.1, 0.7, 2.0])
    noised = clean.masked_fill(torch.rand(clean.shape, generator=torch.Generator().manual_seed(5)) < 0.6, 20)
    together = net(noised, sigma, clean=clean)
    for block in range(3):
        of_block = slice(4 * block, 4 * block + 4)
        x = clean.clone()
        x[:, of_block] = noised[:, of_block]
        for length in (4 * block + 4, 12):
            found = net(x[:, :length], sigma)
            torch.testing.assert_close(found[:, of_block], together[:, of_block], atol=2e-5, rtol=1e-5)
    where = torch.rand(clean.shape, generator=torch.Generator().manual_seed(6)) < 0.4
    torch.testing.assert_close(net(noised, sigma, where, clean=clean), together[where], atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="masks in several blocks of 4 positions"):
        net(torch.full_like(clean, 20), sigma)
    with pytest.raises(ValueError, match=r"clean must be \(3, 12\) int64"):
        net(noised, sigma, clean=clean[:, :8])


@pytest.mark.parametrize("host", [True, False])
def test_bd3lm_takes_masks_of_one_block_in_a_row(monkeypatch, host):
    """Anywhere in it, in another one of each row, or nowhere; two of neighbouring blocks are too many."""
    net, clean = BD3LM(21, width=8, depth=1, heads=1, cond_dim=8, length=12, block_size=4).eval(), some_states(20)
    asked = []
    monkeypatch.setattr("sedd_nets.block_diffusion.on_host", lambda _tensor: host)
    monkeypatch.setattr(torch, "_assert_async", lambda right, told: asked.append(bool(right)))
    x = clean.clone()
    x[0, 4], x[0, 7], x[1, 8:], x[2, 0] = 20, 20, 20, 20
    net(clean, torch.ones(3))
    net(x, torch.ones(3))
    for position in (3, 8):
        wrong = x.clone()
        wrong[0, position] = 20
        if host:
            with pytest.raises(ValueError, match="masks in several blocks of 4 positions"):
                net(wrong, torch.ones(3))
        else:
            net(wrong, torch.ones(3))
    assert asked == ([] if host else [True, True, False, False])


def test_bd3lm_comes_back(tmp_path):
    net = from_pretrained(bd3lm(tmp_path / "bd3lm"))
    net.save_pretrained(tmp_path / "again")
    again = from_pretrained(tmp_path / "again")
    x, sigma = some_states(20), torch.ones(3)
    assert torch.equal(again(x, sigma), net(x, sigma))
    assert (
        again.sections
        == net.sections
        == {
            "tokens": 20,
            "graph": {"type": "absorb"},
            "noise": {"type": "loglinear"},
        }
    )
    assert read_config(tmp_path / "again")["model"]["block_size"] == 4


def test_bd3lm_attends_in_its_own_way(tmp_path):
    net = from_pretrained(bd3lm(tmp_path / "bd3lm"))
    x, sigma = some_states(20), torch.ones(3)
    with pytest.raises(ValueError, match="takes no documents and no other `attention`"):
        net(x, sigma, documents=Documents(torch.zeros_like(x)))
    net.attention = ScaledDotProduct(causal=True)
    with pytest.raises(ValueError, match="takes no documents and no other `attention`"):
        net(x, sigma)


@pytest.mark.parametrize("name", ["cross_attn", "adaln", "time_conditioning"])
def test_bd3lm_s_other_variants_are_refused(tmp_path, name):
    value = name == "time_conditioning"
    with pytest.raises(ValueError, match=f"{name} is {value}, and BD3LM is read with {name} {not value} only"):
        from_pretrained(bd3lm(tmp_path / "bd3lm", **{name: value}))


# What is no score model of a family here


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (flat("duo", 21, causal=True), "causal is true: a left-to-right network"),
        (flat("llada", 21), "describes 'llada'"),
        ({"algo": {"name": "ar", "causal_attention": True}, "model": DIT}, r"algo.name 'ar' is none of"),
        ({"algo": {"name": "d3pm"}, "model": DIT}, r"algo.name 'd3pm' is none of"),
        ({"parameterization": "d3pm", "diffusion": "absorbing_state", "model": DIT}, "parameterization 'd3pm'"),
        ({"algo": {"name": "duo"}, "noise": {"type": "cosine"}, "model": DIT}, "noise.type 'cosine' of Duo's"),
        ({"model": DIT | {"type": "dimamba"}}, "model.type 'dimamba' is none of"),
    ],
)
def test_others_are_named(tmp_path, config, told):
    with pytest.raises(ValueError, match=told):
        from_pretrained(write(tmp_path / "other", config, tensors(21), prefix="backbone."))


def test_mdlm_s_and_udlm_s_trainers(tmp_path):
    """Nested configs of their repositories, which say by `parameterization` and `diffusion` what is predicted."""
    trainers: list[tuple[str, str, type]] = [
        ("subs", "absorbing_state", MDLM),
        ("sedd", "absorbing_state", SEDD),
        ("d3pm", "uniform", UDLM),
    ]
    for parameterization, diffusion, family in trainers:
        config = {"parameterization": parameterization, "diffusion": diffusion, "time_conditioning": True}
        config |= {"noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20}}
        config |= {"model": {"name": "small", "type": "ddit", **DIT, "scale_by_sigma": True, "dropout": 0.1}}
        net = from_pretrained(write(tmp_path / parameterization, config, tensors(21)))
        assert type(net) is family
        assert getattr(net, "time_conditioning", True)
        assert net.sections["graph"]["type"] == ("uniform" if family is UDLM else "absorb")


def test_transformers_auto_model_reads_them_and_runs_nothing_of_theirs(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    importlib.import_module("sedd_nets.auto")
    monkeypatch.chdir(tmp_path)
    x, sigma = some_states(20), torch.ones(3)
    families: list[tuple[Any, type]] = [(mdlm, MDLM), (udlm, UDLM), (duo, UDLM), (bd3lm, BD3LM)]
    for writer, family in families:
        folder = writer(tmp_path / writer.__name__)
        config = read_config(folder)
        config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForMaskedLM"), "evil.Evil")
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text("open('it-ran', 'w').close()\nclass Evil: pass\n")
        for auto in (transformers.AutoModel, transformers.AutoModelForMaskedLM):
            net = auto.from_pretrained(folder, local_files_only=True)
            assert type(net).__name__ == family.__name__
            assert torch.equal(net(x, sigma), from_pretrained(folder)(x, sigma))
    assert not (tmp_path / "it-ran").exists()
    with pytest.raises(ValueError, match="dtype is not for sedd_nets' networks"):
        transformers.AutoModel.from_pretrained(folder, dtype=torch.bfloat16)


def test_what_transformers_is_told_of_the_hub_is_passed_on_and_what_it_cannot_have_is_refused(monkeypatch):
    pytest.importorskip("transformers")
    auto = importlib.import_module("sedd_nets.auto")
    asked: list[Any] = []
    monkeypatch.setattr(auto, "from_pretrained", lambda name, **hub: asked.append((name, hub)))
    hub = {"revision": "v1", "token": "secret", "cache_dir": "there", "local_files_only": True}
    auto._Reader.from_pretrained("someone/mdlm", trust_remote_code=True, **hub)
    assert asked == [("someone/mdlm", hub)]
    for option in ("dtype", "torch_dtype", "device_map", "quantization_config", "attn_implementation"):
        with pytest.raises(ValueError, match=f"{option} is not for sedd_nets' networks"):
            auto._Reader.from_pretrained("someone/mdlm", **{option: "auto"})


@pytest.mark.parametrize(
    ("says", "family"),
    [
        *(
            (({"algo": {"name": name}}), family)
            for name, family in [
                ("duo", UDLM),
                ("duo_base", UDLM),
                ("distillation", UDLM),
                ("mdlm", MDLM),
                ("sedd", SEDD),
            ]
        ),
        ({"parameterization": "subs"}, MDLM),
        ({"parameterization": "sedd"}, SEDD),
        ({"parameterization": "d3pm", "diffusion": "uniform"}, UDLM),
    ],
)
def test_what_a_trainer_s_word_is_taken_for(tmp_path, says, family):
    config = says | {"noise": {"type": "log-linear", "eps": 0.01}, "model": {**DIT, "type": "ddit", "dropout": 0.25}}
    net = from_pretrained(write(tmp_path / "trainer", config, tensors(21)))
    assert type(net) is family
    assert net.sections["noise"] == {"type": "loglinear", "eps": 0.01}
    assert net.sections["graph"] == {"type": "uniform" if family is UDLM else "absorb"}
    assert (net.length, net.dropout, net.training) == (12, 0.25, False)
    assert getattr(net, "time_conditioning", None) == {SEDD: None, MDLM: False, UDLM: True}[family]


@pytest.mark.parametrize("told", [{"algo": {"name": "mdlm", "time_conditioning": True}}, {"algo": {"name": "mdlm"}}])
def test_a_trainer_s_word_on_time(tmp_path, told):
    net = from_pretrained(write(tmp_path / "trainer", told | {"model": dict(DIT)}, tensors(21)))
    assert isinstance(net, MDLM)
    assert net.time_conditioning == told["algo"].get("time_conditioning", False)
    assert net.sections["noise"] == {"type": "loglinear"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"algo": {"name": "mdlm", "causal_attention": True}, "model": DIT}, "algo.name 'mdlm' is none of"),
        ({"algo": {"name": 3}, "model": DIT}, "name must be a string; got 3"),
        ({"algo": "mdlm", "model": DIT}, "algo must be an object; got 'mdlm'"),
        ({"parameterization": "d3pm", "model": DIT}, "parameterization 'd3pm' is none of"),
        ({"parameterization": ["subs"], "model": DIT}, "parameterization .* is none of"),
        (
            {"model": DIT | {"type": "mdlm"}, "graph": {"type": "uniform"}},
            "graph.type is 'uniform', and must be 'absorb'",
        ),
        (
            {"model": DIT | {"type": "mdlm"}, "graph": {"type": "absorb", "mask_id": 21}},
            "mask_id must be a whole number of 0 to 20",
        ),
        (flat("mdlm", 21) | {"vocab_size": -1}, "vocab_size must be a whole number of 0 to"),
        (flat("mdlm", 21) | {"vocab_size": 22}, "says 21 tokens and the absorb graph, which make 22 states"),
        (flat("udlm", 22), "says 22 tokens and the uniform graph, which make 22 states, and the weights have 21"),
        (flat("udlm", 21, cfg=True), "cfg_num_classes must be a whole number .*; there is none"),
        (flat("bd3lm", 21, cross_attn=True, adaln=True, time_conditioning=False), "block_size must be a whole number"),
        (flat("mdlm", 21, causal="no"), "causal must be true or false; got 'no'"),
    ],
)
def test_a_config_that_contradicts_itself_is_named(tmp_path, config, told):
    with pytest.raises(ValueError, match=told):
        from_pretrained(write(tmp_path / "other", config, tensors(21), prefix="backbone."))


def test_a_flat_config_without_a_vocabulary_s_size(tmp_path):
    config = flat("mdlm", 21, time_conditioning=False)
    del config["vocab_size"]
    net = from_pretrained(write(tmp_path / "mdlm", config, tensors(21), prefix="backbone."))
    assert (net.num_states, net.sections["tokens"], net.sections["graph"]) == (21, 20, {"type": "absorb"})


@pytest.mark.parametrize("kind", ["mdlm", "udlm", "duo", "DUO", "bd3lm"])
def test_transformers_finds_every_model_type(kind):
    transformers = pytest.importorskip("transformers")
    auto = importlib.import_module("sedd_nets.auto")
    assert kind in auto.MODEL_TYPES
    config = transformers.AutoConfig.for_model(kind)
    assert config.model_type == kind
    for mapping in (transformers.AutoModel, transformers.AutoModelForMaskedLM):
        assert issubclass(mapping._model_mapping[type(config)], auto._Reader)


def test_bd3lm_s_trunk_does_not_see_the_noise(tmp_path):
    net: Any = from_pretrained(bd3lm(tmp_path / "bd3lm"))
    clean = some_states(20)
    x = clean.clone()
    x[:, 4:8] = 20
    few, much = torch.full((3,), 0.1), torch.full((3,), 4.0)
    assert torch.equal(net.hidden(x, few), net.hidden(x, much))
    assert torch.equal(net.hidden(x, few, clean=clean), net.hidden(x, much, clean=clean))
    ratio = math.log(math.expm1(4.0) / math.expm1(0.1))
    found = (net(x, few) - net(x, much))[:, 4:8, :20]
    torch.testing.assert_close(found, torch.full_like(found, ratio), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"sigma has shape \(2,\)"):
        net(x, few[:2])
    with pytest.raises(ValueError, match="13 tokens; this network takes 1 to 12"):
        net(torch.zeros(3, 13, dtype=torch.int64), few)
    with pytest.raises(ValueError, match=r"clean must be \(3, 12\) int64, as x; got torch\.float32"):
        net(x, few, clean=clean.float())
