"""Every test compares with something independent: loops written from the equations, finite
differences, files made by hand, one process against two. Offline, on the CPU: `pytest`. Tests that
need a GPU or an optional package skip themselves."""
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import cocomix as cocomix_module
import data as data_module
import sae as sae_module
import train as train_module
from cocomix import CoCoMix, CoCoMixConfig, GenerateSettings, load_hf, steerable, study
from data import (EOT, DataSettings, Run, Windows, World, documents, fetch, get_tokenizer,
                  load_checkpoint, load_dictionary, open_shard, parse, prepare, train_bpe)
from sae import (Labels, SAESettings, TopKSAE, concept_labels, evaluate_sae, fingerprint,
                 load_openai, load_sae, load_teacher, loss_from, residual, train_sae)
from train import TrainSettings, distillation, learning_rate, preset, train

HERE = Path(__file__).parent
torch.set_num_threads(1)  # tiny tensors: threads only cost; bit-exact comparisons need their number
V, T, D = 257, 16, 32
SMALL = dict(init_std=0.02, block_size=T, vocab_size=V, n_layer=4, n_head=4, n_embd=D,
             insert_layer=2, n_concepts=64, k_concepts=5)
FORMS = [("none", {}), ("pause", {}), ("concept", {}), ("concept", {"insert_layer": 0}),
         ("concept", {"insert_layer": 3}), ("concept", {"concept_residual": True}),
         ("pause", {"concept_residual": True}), ("concept", {"insertion": "add"}),
         ("concept", {"insertion": "none"})]


def small(mix="concept", noise=0.16, **changes):
    """A small model, with noise on all weights, enough that every term shows in its output."""
    torch.manual_seed(0)
    model = CoCoMix(CoCoMixConfig(**{**SMALL, "mix": mix, **changes}))
    for p in model.parameters():
        p.data.add_(noise * torch.randn_like(p))
    return model


def tokens(*shape, seed=0, below=V):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def kept(x, k):
    """The k largest of x (..., C) in their places, 0 elsewhere."""
    return x * (x >= x.topk(k).values[..., -1:])


# ---- the model -----------------------------------------------------------------------------------

def slow_mix(model, h):
    """Equations (1) to (4) at one position: h (D,) -> the vectors that go on, z (C,) or None."""
    c, z = model.config, None
    if c.mix == "pause":
        vector = model.pause
    else:
        layer, mu, std = model.concept, h.mean(), h.std()
        z = layer.predictor((h - mu) / (std + 1e-5) - layer.pre_bias)
        if c.insertion == "none":
            return [h], z
        vector = (layer.compress(kept(z, c.k_concepts)) + layer.pre_bias) * std + mu
    if c.insertion == "add":
        return [h + vector], z
    return [h, h + vector if c.concept_residual else vector], z


def slow_block(block, xs, n_head):
    """GPT-2's block on a list of (D,), a position and a head at a time."""
    qkv = [block.attn.c_attn(block.ln_1(x)).view(3, n_head, -1) for x in xs]
    for t, (q, _, _) in enumerate(qkv):
        heads = []
        for head in range(n_head):
            scores = torch.stack([q[head] @ k[head] for _, k, _ in qkv[:t + 1]])
            weights = (scores / q.size(1) ** 0.5).softmax(0)
            heads.append(sum(a * v[head] for a, (_, _, v) in zip(weights, qkv)))
        xs[t] = xs[t] + block.attn.c_proj(torch.cat(heads))
        u = F.gelu(block.mlp.c_fc(block.ln_2(xs[t])), approximate="tanh")
        xs[t] = xs[t] + block.mlp.c_proj(u)
    return xs


@torch.no_grad()
def slow_gpt(model, idx):
    """The equations one position at a time: (T,) ids -> (T,V) logits, [(C,) z]."""
    c, zs, per_token = model.config, [], 1
    xs = [model.wte.weight[i] + model.wpe.weight[t] for t, i in enumerate(idx)]
    for i, block in enumerate(model.h):
        if c.mix != "none" and i == c.insert_layer:
            mixed, zs = zip(*(slow_mix(model, x) for x in xs))
            xs, per_token = sum(mixed, []), len(mixed[0])
        xs = slow_block(block, xs, c.n_head)
    tops = torch.stack([model.ln_f(x) for x in xs[per_token - 1::per_token]])
    return tops @ model.wte.weight[:c.vocab_size].T, zs


@pytest.mark.parametrize("mix,changes", FORMS)
def test_model_is_the_slow_loop(mix, changes):
    model, idx = small(mix, **changes), tokens(2, T)
    out = model(idx)
    for b in range(2):
        logits, zs = slow_gpt(model, idx[b])
        assert torch.allclose(out.logits[b], logits, atol=2e-4, rtol=1e-4)
        assert mix != "concept" or torch.allclose(out.concept_logits[b], torch.stack(zs), atol=1e-4)


def test_loss_is_equation_5_over_what_is_not_minus_one():
    model, idx = small(concept_weight=0.3), tokens(3, T)
    targets, labels = tokens(3, T, seed=1), tokens(3, T, 4, seed=2, below=64)
    targets[0, :5] = -1
    labels[1, :, 2:] = -1
    out = model(idx, targets, labels)
    of_tokens = [F.cross_entropy(out.logits[b, t], targets[b, t])
                 for b, t in (targets >= 0).nonzero()]
    of_concepts = [F.cross_entropy(out.concept_logits[b, t], labels[b, t, i])
                   for b, t, i in (labels >= 0).nonzero()]
    want = torch.stack(of_tokens).mean() + 0.3 * torch.stack(of_concepts).mean()
    assert torch.allclose(out.loss, want)
    nothing = model(idx, torch.full_like(targets, -1), torch.full_like(labels, -1))
    nothing.loss.backward()
    assert nothing.loss == 0 and not any(p.grad.any() for p in model.parameters())


def test_token_loss_trains_the_concept_predictor():
    model = small()
    model(tokens(2, T), tokens(2, T, seed=1)).ntp_loss.backward()
    assert all(p.grad.any() for p in model.parameters())
    winners = (model.concept.predictor.bias.grad != 0).sum()
    assert 5 <= winners < 64  # nothing passes the top-k but they


@pytest.mark.parametrize("mix,changes", FORMS)
def test_flops_are_those_torch_counts(mix, changes):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model = small(mix, **changes)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        model(tokens(1, T))
    mixing = mix == "concept" and changes.get("insertion") != "none"  # embedding_bag is not counted
    assert model.flops_per_token() == 3 * (counter.get_total_flops() / T + 2 * D * 5 * mixing)


def test_optimizer_decays_matrices_only_and_init_is_gpt2s():
    model = CoCoMix(CoCoMixConfig(**{**SMALL, "n_embd": 256}))
    decayed, spared = model.configure_optimizer().param_groups
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    vectors = {p for name, p in model.named_parameters() if re.search(r"bias$|ln_", name)}
    assert set(spared["params"]) == vectors
    assert set(decayed["params"]) == set(model.parameters()) - vectors
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 8 ** 0.5, rel=0.05)
    assert model.wte.weight.shape == (320, 256)  # padded to a multiple of 64


@pytest.mark.parametrize("mix,changes", FORMS[:4] + FORMS[7:8])
@pytest.mark.parametrize("length", [1, 7, T, T + 3])
def test_generation_with_the_cache_is_generation_without(mix, changes, length):
    """Token for token, in batches, and past block_size, where the text's half is read anew."""
    model, prompt = small(mix, **changes), tokens(3, length)
    steer = {3: 2.0, 9: -4.0} if mix == "concept" else {}
    pushes = torch.tensor([steer.get(concept, 0.0) for concept in range(64)])
    want, begin = prompt, 0
    for _ in range(T + 2):
        if want.size(1) - begin > T:
            begin = want.size(1) - T // 2
        logits = model(want[:, begin:], steer=pushes).logits[:, -1]
        want = torch.cat([want, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(prompt, T + 2, temperature=0, steer=steer), want)
    assert torch.equal(model.generate(prompt, 4, 5.0, 1, steer), want[:, :length + 4])  # top_k 1


def test_steering_moves_a_logit_in_units_of_the_positions_largest():
    model, idx = small(), tokens(1, 1)
    plain, steered = model(idx), model(idx, steer=3.0 * F.one_hot(torch.tensor(9), 64))
    assert torch.equal(steered.concept_logits, plain.concept_logits)  # what is predicted stays
    with torch.no_grad():  # of a single position: the same as another bias
        model.concept.predictor.bias[9] += 3 * plain.concept_logits.max().abs()
    want = model(idx).logits
    assert torch.allclose(steered.logits, want, atol=1e-4)
    assert not torch.allclose(plain.logits, want, atol=1e-2)
    for other, concept in ((model, -1), (small("none"), 0), (small(insertion="none"), 0)):
        with pytest.raises(ValueError, match="to steer"):
            other.generate(idx, 1, steer={concept: 1.0})


@pytest.mark.parametrize("changes,words", [
    ({"insert_layer": 4}, "insert_layer=4"), ({"insert_layer": -1}, "0 to 3"),
    ({"k_concepts": 65}, "k_concepts"), ({"n_head": 5}, "n_embd=32"), ({"mix": "stir"}, "stir"),
    ({"insertion": "stir"}, "stir"), ({"mix": "pause", "insertion": "add"}, "insertion"),
    ({"insertion": "add", "concept_residual": True}, "insertion=add")])
def test_impossible_models_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        CoCoMixConfig(**{**SMALL, **changes})


def test_bf16_autocast_keeps_concepts_in_fp32_and_stays_close():
    model, idx = small(noise=0.04), tokens(2, T)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(idx, idx, tokens(2, T, 4, below=64))
    out.loss.backward()
    assert out.concept_logits.dtype == torch.float32
    want = model(idx).logits
    assert (out.logits.float() - want).abs().max() < 0.1 * want.std()


# ---- weights of other codes ----------------------------------------------------------------------

def hf_names(model, prefix=""):
    """A model's tensors under Hugging Face's names and in its layout, with what old files carry."""
    tensors = {"h.0.attn.bias": torch.ones(1, 1, T, T)}
    for name, p in model.state_dict().items():
        name = name.replace("concept.predictor", "concept_predictor")
        name = name.replace("concept.compress", "compress_layer").removeprefix("concept.")
        turned = re.search(r"(c_attn|c_proj|c_fc)\.weight", name)
        tensors[name] = (p.T if turned else p[:V] if name == "wte.weight" else p).contiguous()
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    return {**tensors, "lm_head.weight": tensors[prefix + "wte.weight"]}


def write_safetensors(tensors, path):
    """By the format's description: length, JSON header, data."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, t in tensors.items():
        raw = t.numpy().astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(t.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("mix", ["none", "concept"])
@pytest.mark.parametrize("write,suffix,prefix", [
    (write_safetensors, "safetensors", ""), (torch.save, "bin", "transformer.")])
def test_load_hf_gives_back_the_model(tmp_path, mix, write, suffix, prefix):
    model, path = small(mix, n_head=2), tmp_path / f"model.{suffix}"
    write(hf_names(model, prefix), path)
    got, want = (m(tokens(2, T)).logits for m in (load_hf(path, model.config), model))
    assert torch.allclose(got.log_softmax(-1), want.log_softmax(-1), atol=1e-4)
    assert torch.equal(got, want) == (mix == "concept")  # a plain GPT is centred


def test_load_hf_infers_sizes_and_names_what_is_wrong(tmp_path):
    path = tmp_path / "model.safetensors"
    model = CoCoMix(CoCoMixConfig(V, "none", T, n_layer=3, n_head=2, n_embd=128))
    tensors = hf_names(model)
    write_safetensors(tensors, path)
    assert load_hf(path).config == model.config
    whole = path.read_bytes()
    for content in (whole[:-5], b"", b"nonsense, and more of it"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="download it again"):
            load_hf(path)
    del tensors["ln_f.bias"]
    write_safetensors(tensors | {"extra": torch.ones(2), "h.1.ln_1.weight": torch.ones(7)}, path)
    with pytest.raises(ValueError, match=r"ln_f.bias.*extra.*h.1.ln_1.weight"):
        load_hf(path)
    write_safetensors(hf_names(small()), path)
    with pytest.raises(ValueError, match="does not say its n_head, insert_layer and k_concepts"):
        load_hf(path)


def random_gpt2(folder):
    """A GPT-2 of the package transformers, with random weights, also saved in `folder`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=300, n_positions=64, n_embd=128, n_layer=3, n_head=2)).eval()
    for p in theirs.requires_grad_(False).parameters():
        p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(folder)
    return theirs


def test_load_hf_is_transformers_gpt2(tmp_path):
    want = random_gpt2(tmp_path)(tokens(2, 64)).logits
    got = load_hf(tmp_path / "model.safetensors")(tokens(2, 64)).logits
    assert torch.allclose(got.log_softmax(-1), want.log_softmax(-1), atol=1e-4)


# ---- concept labels ------------------------------------------------------------------------------

def teacher_and_sae(noise=0.12):
    teacher = small("none", n_layer=3, noise=noise).requires_grad_(False)
    sae = TopKSAE(D, 96, 8).requires_grad_(False).eval()
    sae.pre_bias.normal_(0, 0.1)
    sae.latent_bias.normal_(0, 0.1)
    return teacher, sae


def test_labels_rank_by_the_slope_of_the_teachers_loss():
    """Finite differences along each active latent's decoder row, weighted by its activation."""
    (teacher, sae), idx, targets, eps = teacher_and_sae(), tokens(1, 9), tokens(1, 9, seed=1), 0.02
    r, slopes = residual(teacher, idx, 1), torch.zeros(9, 96)
    values, indices = sae.encode(r)
    for t in range(9):
        for value, latent in zip(values[0, t], indices[0, t]):
            step = torch.zeros_like(r)
            step[0, t] = eps * value * sae.decoder[latent]
            ends = [loss_from(teacher, r + sign * step, targets, 1) for sign in (1, -1)]
            slopes[t, latent] = (ends[0] - ends[1]) / (2 * eps)
    labels = concept_labels(teacher, sae, idx, targets, 1, n_labels=3)
    for t in range(9):
        best, at = slopes[t].topk(3)
        assert labels[0, t][best > 1e-3].tolist() == at[best > 1e-3].tolist()
    assert slopes.abs().max() > 0.1 and (labels >= 0).sum() > 15  # not a comparison of nothing


def dense_latents(sae, x):
    """x (..., D) -> x standardised, all C latents before the TopK and after it."""
    r = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    pre = (r - sae.pre_bias) @ sae.encoder.T + sae.latent_bias
    return r, pre, kept(pre, sae.k).relu()


@pytest.mark.parametrize("rank_by", ["attribution", "negative", "absolute", "activation"])
def test_labels_are_the_dense_definition(rank_by):
    """A backward pass through the whole teacher, every one of the C latents scored."""
    (teacher, sae), idx, targets = teacher_and_sae(), tokens(4, T), tokens(4, T, seed=1)
    targets[0, 3] = targets[:, -1] = -1
    labels = concept_labels(teacher, sae, idx, targets, 1, 4, rank_by)
    outputs = []
    teacher.requires_grad_(True).h[1].register_forward_hook(
        lambda module, args, out: outputs.append(out))
    g, = torch.autograd.grad(teacher(idx, targets).loss, outputs)
    a = dense_latents(sae, outputs[0].detach())[2]
    s = a * (g @ sae.decoder.T)
    scores = {"attribution": s, "negative": -s, "absolute": s.abs(), "activation": a}[rank_by]
    best, at = scores.topk(4)
    assert torch.equal(labels, at.masked_fill(best <= 0, -1)) and (labels >= 0).any()
    assert (labels[:, -1] == -1).all() == (rank_by != "activation")  # no gradient, no label


def test_shuffled_labels_are_those_of_another_token_of_the_window():
    (teacher, sae), idx, targets = teacher_and_sae(), tokens(3, T), tokens(3, T, seed=1)
    true, shuffled, again = (concept_labels(teacher, sae, idx, targets, 1, 4, rule)
                             for rule in ("attribution", "shuffled", "shuffled"))
    assert torch.equal(shuffled, again)
    for a, b in zip(true, shuffled):
        assert sorted(a.tolist()) == sorted(b.tolist()) and (a != b).any(1).float().mean() > 0.7


def test_labels_are_made_once_and_a_torn_file_is_mended(tmp_path):
    windows, calls = Windows(numbered(tmp_path, [40]), "train", 4), []

    def make(idx, targets):
        calls.append(len(idx))
        return torch.stack([idx % 7 - 1, idx + 300], -1)  # a -1 among them

    def ask(*numbers, who="a", keep=True):
        """Asks for the labels of these windows -> the file, how many were made for it."""
        calls.clear()
        labels, (idx, targets) = Labels(make, windows, who, 2, 350, keep), windows.batch(numbers)
        assert torch.equal(labels(idx, targets, numbers), torch.stack([idx % 7 - 1, idx + 300], -1))
        return labels.path, sum(calls)
    path, made = ask(2, 5)
    # in another order, by another process: not made again
    assert [made, ask(5, 2)[1], ask(2)[1], ask(0)[1]] == [2, 0, 0, 1]
    whole = path.read_bytes()
    for torn in (whole[:9], whole[:47], b"", whole[:34] + b"\0\0" + whole[36:],
                 b"\xff" * len(whole)):
        path.write_bytes(torn)
        assert [ask(0, 2)[1], ask(2, 0)[1]] == [2, 0]
    assert ask(2, who="b")[1] == 1
    assert [ask(2, keep=False)[1], ask(2, keep=False)[1]] == [1, 1]


def test_a_centred_teacher_labels_in_bf16_wherever_its_logits_lie(tmp_path):
    """GPT-2's lie near -100, where bf16 rounds to halves; load_hf moves them to 0."""
    (teacher, sae), labels = teacher_and_sae(noise=0.08), []
    idx, targets, path = tokens(16, T), tokens(16, T), tmp_path / "model.safetensors"
    teacher.ln_f.weight[0] = 0.0  # dimension 0 is 1 at the top: it moves all logits
    teacher.ln_f.bias[0] = 1.0
    for shift in (0.0, -80.0):
        teacher.wte.weight[:, 0] = shift
        teacher.wpe.weight[:, 0] = -shift  # at the bottom it is 0
        assert abs(teacher(idx).logits.mean() - shift) < 3
        write_safetensors(hf_names(teacher), path)
        loaded = load_hf(path, teacher.config).requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            labels.append(concept_labels(loaded, sae, idx, targets, 1))
    assert (labels[0] == labels[1]).all(-1).float().mean() >= 0.99


# ---- the SAE -------------------------------------------------------------------------------------

def test_sae_gradients_are_those_of_the_dense_form():
    torch.manual_seed(0)
    sae, x = TopKSAE(D, 96, 8, dead_after=5), torch.randn(3, 5, D) * 4 + 1
    for p in (sae.pre_bias, sae.latent_bias, sae.encoder):
        p.data.normal_(0, 0.2)
    sae.idle[:40] = 6  # dead
    r, pre, a = dense_latents(sae, x)
    error = r - (a @ sae.decoder + sae.pre_bias)
    rest = error.detach()
    rebuilt = kept(pre[..., :40], D // 2).relu() @ sae.decoder[:40]
    aux = (rest - rebuilt).square().mean() / rest.square().mean()
    loss = error.square().mean() + aux / 32
    fvu = rest.square().sum() / (r - r.mean((0, 1))).square().sum()
    out = sae.train()(x)
    got = torch.stack([out.loss, out.aux_loss, out.fvu])
    assert torch.allclose(got, torch.stack([loss, aux, fvu]), rtol=1e-5)
    got, want = (torch.autograd.grad(x, list(sae.parameters())) for x in (out.loss, loss))
    assert all(torch.allclose(g, w, atol=1e-6, rtol=1e-4) for g, w in zip(got, want))
    want = (r - error) * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
    assert torch.allclose(out.reconstruction, want, atol=1e-4)


def test_after_a_step_decoder_rows_have_unit_norm_and_idle_tokens_are_counted():
    sae = TopKSAE(D, 64, 4)
    sae.decoder.data.mul_(3)
    sae.latent_bias.data[:] = -5  # not every winner fires
    sae.idle[:] = 100
    out = sae(torch.randn(3, 5, D))
    sae.after_step(out, World("cpu"))
    fired = {i.item() for i, value in zip(out.indices.flatten(), out.values.flatten()) if value}
    assert sae.idle.tolist() == [0 if i in fired else 115 for i in range(64)]
    assert torch.allclose(sae.decoder.norm(dim=-1), torch.ones(64), atol=1e-5)


def openai_file(path, D_t=24, C=96, k=6):
    theirs = {"pre_bias": torch.randn(D_t), "encoder.weight": torch.randn(C, D_t),
              "latent_bias": torch.randn(C), "decoder.weight": torch.randn(D_t, C),
              "stats_last_nonzero": torch.zeros(C), "activation": "TopK",
              "activation_state_dict": {"k": k, "postact_fn": "ReLU"}}
    torch.save(theirs, path)
    return theirs


def test_openai_sae_files(tmp_path):
    """Against OpenAI's formulas written out: normalise, encode, TopK, ReLU, decode, rescale."""
    path, x = tmp_path / "5.pt", torch.randn(3, 5, 24) * 3 + 1
    theirs = openai_file(path)
    mu, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    pre = ((x - mu) / (std + 1e-5) - theirs["pre_bias"]) @ theirs["encoder.weight"].T
    latents = kept(pre + theirs["latent_bias"], 6).relu()
    want = (latents @ theirs["decoder.weight"].T + theirs["pre_bias"]) * std + mu
    assert torch.allclose(load_openai(path).eval()(x).reconstruction, want, atol=1e-4)
    for bad in ({**theirs, "activation": "ReLU"}, {"x": 1}):
        torch.save(bad, path)
        with pytest.raises(ValueError, match="no TopK SAE of OpenAI's.*download it again"):
            load_openai(path)


# ---- data ----------------------------------------------------------------------------------------

def write_shard(path, ids, magic=20240520, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(ids) if count is None else count
    Path(path).write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())


def numbered(folder, sizes, vocab=50257):
    """Shards whose tokens count up, so that each window names itself by its first token."""
    folder.mkdir(exist_ok=True)
    start = 0
    for i, size in enumerate(sizes):
        write_shard(folder / f"x_train_{i:06d}.bin", range(start, start + size))
        write_shard(folder / f"x_val_{i:06d}.bin", range(start, start + size))
        start += size
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "gpt2", "vocab_size": vocab}))
    return folder


def test_every_window_comes_once_an_epoch_over_all_ranks(tmp_path):
    numbered(tmp_path, [53, 4, 27])  # 10 + 0 + 5 windows: none spans two shards
    starts = [*range(0, 50, 5), *range(57, 82, 5)]
    streams = []
    for rows, world in ((3, 1), (1, 3), (5, 1), (2, 2)):
        streams.append([])
        for step, rank in np.ndindex(60 // (rows * world), world):
            fresh = Windows(tmp_path, "train", 4, seed=3)  # no state is carried over
            idx, targets = fresh.batch(fresh.numbers(step, rows, rank, world))
            assert torch.equal(targets, idx + 1)
            streams[-1] += idx[:, 0].tolist()
    assert streams[0] == streams[1] == streams[2] == streams[3]
    epochs = np.array(streams[0]).reshape(4, 15)
    assert np.sort(epochs).tolist() == [starts] * 4
    assert starts != epochs[0].tolist() != epochs[1].tolist()
    assert Windows(tmp_path, "train", 4, seed=4).numbers(0, 15) != fresh.numbers(0, 15)


def test_shard_formats(tmp_path):
    write_shard(tmp_path / "fineweb_train_000001.bin", [1, 2, 60000])
    assert open_shard(tmp_path / "fineweb_train_000001.bin").tolist() == [1, 2, 60000]
    np.arange(9, dtype="<u2").tofile(tmp_path / "val.bin")  # nanoGPT: no header
    windows = Windows(tmp_path, "val", 2)
    assert windows.batch([0, 1, 2])[0].tolist() == [[0, 1], [3, 4], [6, 7]]
    assert windows.meta == {"tokenizer": "gpt2", "vocab_size": 50257}
    (tmp_path / "meta.json").write_text('{"vocab_si')
    with pytest.raises(ValueError, match="meta.json is damaged"):
        Windows(tmp_path, "val", 2)


@pytest.mark.parametrize("name,make,words", [
    ("train_0.bin", lambda p: write_shard(p, range(9), count=10), "cut short"),
    ("train_0.bin", lambda p: write_shard(p, range(9), magic=20240801), "no token shard"),
    ("train.bin", lambda p: p.write_bytes(b""), "cut short"),
    ("train_0.bin", lambda p: write_shard(p, range(4)), "add text"),
    ("train_0.bin", lambda p: write_shard(p, [1, 2, 300, 4, 5]), "token 300, .*257"),
    ("val_0.bin", lambda p: write_shard(p, range(9)), "python data.py")])
def test_bad_data_is_refused(tmp_path, name, make, words):
    make(tmp_path / name)
    (tmp_path / "meta.json").write_text('{"tokenizer": "bpe", "vocab_size": 257}')
    with pytest.raises(ValueError, match=words):
        Windows(tmp_path, "train", 4).batch([0])


def test_bpe_merges_the_most_frequent_pair_as_a_slow_loop_does():
    words = ["aaaa", "aaaaa", "abab", "ab", "é", "baab", "x1", "  ", "cab"]
    text = " ".join(np.random.default_rng(0).choice(words, 400))
    merged, found = train_bpe(text, 300), re.findall(data_module.PATTERN, text)
    assert "".join(found) == text and len(set(merged)) == len(merged) > 10
    pieces = [[chr(b) for b in word.encode()] for word in found]
    for token in merged:
        counts = Counter(pair for piece in pieces for pair in zip(piece, piece[1:]))
        pair = max((p for p in counts if "".join(p) == token), key=counts.get)
        assert counts[pair] == max(counts.values())
        for piece in pieces:
            for i in range(len(piece) - 1):
                if tuple(piece[i:i + 2]) == pair:
                    piece[i:i + 2] = [token]
    encoding = get_tokenizer({"tokenizer": "bpe", "merged": merged})
    odd = "\u00a0é aaaa_1\r\n\t ab\U0001f600\u0301" + text
    assert encoding.decode(encoding.encode_ordinary(odd)) == odd
    assert len(encoding.encode_ordinary(text)) == sum(map(len, pieces))
    assert encoding.encode(EOT, allowed_special="all") == [256 + len(merged)]


def written(folder, texts):
    """A folder of text files {name: text}."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def all_text(source):
    """(text to train on, held-out text) of a source."""
    pieces = list(documents(str(source)))
    return tuple("".join(text for text, held_out in pieces if held_out == which)
                 for which in (False, True))


def test_a_folder_is_split_by_its_files_names_and_a_file_at_its_end(tmp_path):
    texts = [f"text {i} é\r\n" * (i % 7 + 3) for i in range(80)]
    folder = written(tmp_path / "many", {f"{i % 2}/{i}.txt": text for i, text in enumerate(texts)})
    (folder / "binary.png").write_bytes(b"\x89PNG\0\0")
    train_text, val_text = all_text(folder)
    assert sorted((train_text + val_text).split(EOT)[:-1]) == sorted(texts)
    assert 0.01 < len(val_text) / len(train_text) < 0.1
    for i in range(6):  # whichever name comes first
        folder = written(tmp_path / f"two{i}", {f"large{i}": "text " * 900, f"small{i}": "more"})
        assert all_text(folder)[1] == "more" + EOT
    folder = written(tmp_path / "split", {"train.txt": f"a {EOT}b", "val.txt": "c"})
    assert all_text(folder) == (f"a {EOT}b{EOT}", f"c{EOT}")
    text = "".join(f"line {i}\n" for i in range(9000))
    train_text, val_text = all_text(written(tmp_path / "one", {"one.txt": text}) / "one.txt")
    assert train_text + val_text == text + EOT and val_text.startswith("line")
    assert 0.03 < len(val_text) / len(train_text) < 0.07


def test_prepare_writes_every_token_and_keeps_to_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(Path(), {"t.txt": "the cat sat on the mat é\n" * 900, "u.txt": "a rat ran\n" * 900,
                     "empty/none": ""})
    out = prepare(DataSettings("t.txt", vocab_size=300))
    meta = json.loads((out / "meta.json").read_text("utf-8"))
    for split, text in zip(("train", "val"), all_text("t.txt")):
        ids = np.fromfile(out / f"{split}.bin", "<u2").tolist()
        assert get_tokenizer(meta).decode(ids) == text
        assert meta["tokens"][split] == len(ids) and max(ids) < meta["vocab_size"] <= 300
    again = prepare(DataSettings("u.txt", tokenizer=str(out)))  # for a teacher of the first text
    assert all_text("u.txt")[0] == get_tokenizer(meta).decode(
        np.fromfile(again / "train.bin", "<u2"))
    (out / "val.bin").write_bytes((out / "val.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match="make it again"):
        Windows(out, "val", T)
    Path("latin").write_bytes(b"caf\xe9\n" * 99)
    for source, words in (("t.txt", "name another --out"), ("no", "data.py PATH"),
                          ("empty", "data.py PATH"), ("latin", "no UTF-8 text")):
        with pytest.raises(ValueError, match=words):
            prepare(DataSettings(source))
    assert sorted(os.listdir("data")) == ["t", "u"]


def test_the_default_corpus_is_the_standard_library_without_tests_and_tables():
    root = Path(os.__file__).parent
    names = {p.relative_to(root).as_posix() for p in data_module.text_files("pystdlib")}
    assert {"json/decoder.py", "random.py"} <= names
    assert not any(re.match(r"test/|pydoc_data/|encodings/|site-packages/", name) for name in names)


def test_downloads_are_whole_checked_and_made_once(tmp_path, monkeypatch):
    def dropped(url, path):
        Path(path).write_bytes(b"pay")
        raise OSError("dropped")
    written(tmp_path, {"source": "payload"})
    url, path = (tmp_path / "source").as_uri(), tmp_path / "deep/file"
    digest = "239f59ed55e737c77147cf55ad0c1b030b6d7ee748a7426952f9b852d5a935e5"
    with pytest.raises(ValueError, match="SHA-256"):
        fetch(url, path, "0" * 64)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="dropped.*put the file"):
        patch.setattr(data_module.urllib.request, "urlretrieve", dropped)
        fetch(url, path, digest)
    assert not os.listdir(path.parent) and fetch(url, path, digest).read_bytes() == b"payload"
    (tmp_path / "source").unlink()
    assert fetch(url, path, digest) == path


def tar(members, mode):
    """The bytes of a tar of {name: content}."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def test_public_texts_come_from_their_addresses(tmp_path, monkeypatch):
    """OpenWebText's tar of tar.xz, FineWeb's shards, tinyshakespeare, in their formats."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, (tokenizer, address) in data_module.KNOWN.items():
        address = f"{tmp_path.as_uri()}/{address.rpartition('/')[2]}"
        monkeypatch.setitem(data_module.KNOWN, name, (tokenizer, address))
    for number, start in ((0, 0), (1, 2500)):
        texts = {f"{i}.txt": f"document {i}\n\n\n\nof é".encode()
                 for i in range(start, start + 2500)}
        inner = {f"openwebtext/urlsf_subset0{number}-1_data.xz": tar(texts, "w:xz")}
        Path(f"urlsf_subset0{number}.tar").write_bytes(tar(inner, "w"))
    found = list(documents("openwebtext", 2))
    assert [text for text, _ in found] == [f"document {i}\n\nof é{EOT}" for i in range(5000)]
    assert sum(held_out for _, held_out in found) == 2
    write_shard("fineweb_val_000000.bin", range(40))
    write_shard("fineweb_train_000001.bin", range(99))
    out = prepare(DataSettings("fineweb", shards=1))
    assert len(Windows(out, "train", 9)) == 9
    Path("input.txt").write_text("Citizen:\n" * 400)
    assert len(Windows(prepare(DataSettings("shakespeare")), "train", 9)) > 9


# ---- files and command lines ---------------------------------------------------------------------

def a_run(out, **parts):
    return Run(SAESettings(out=str(out)), (), {}, "model", World("cpu"), parts, {"config": SMALL})


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    run = a_run(tmp_path, model=torch.nn.Linear(2, 2))
    list(run.steps(1, 1, ""))
    before, limits = (tmp_path / "ckpt.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # as on a full disk
    run.parts = {"model": torch.nn.Linear(500, 500)}
    try:
        with pytest.raises(OSError, match="ckpt.pt"):
            list(run.steps(2, 1, ""))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "log.jsonl"]


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_bad_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("ckpt.pt")
    list(a_run(".", model=small()).steps(1, 1, ""))
    with pytest.raises(ValueError, match="kind sae.*cocomix-4 model"):
        load_checkpoint(path, "sae")
    Path("cut").write_bytes(path.read_bytes()[:-1000])
    Path("flipped").write_bytes(path.read_bytes().replace(b"n_embd", b"n_embc"))
    torch.save({"weight": torch.ones(2)}, "foreign")
    torch.save(Hostile(), "hostile")
    for name in ("cut", "flipped", "foreign", "hostile", "none"):
        with pytest.raises(ValueError, match="missing, damaged or no checkpoint"):
            load_checkpoint(name, "model")
    assert not Path("hacked").exists()


@pytest.fixture
def command(monkeypatch, capsys):
    """A call of a script's main with arguments of a command line -> all that it prints."""
    def call(module, *argv):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
        try:
            data_module.script(module.main)
        except SystemExit as e:
            print(e)  # as Python does
        return "".join(capsys.readouterr())
    return call


def test_command_line(command):
    got = parse(GenerateSettings, ["c.pt", "--top_k=7", "--inspect", "--steer", "3=+4", "5=-1"])
    assert got == GenerateSettings("c.pt", top_k=7, inspect=True, steer=[(3, 4.0), (5, -1.0)])
    got = parse(TrainSettings, ["--preset", "69m", "--no-compile", "--steps", "7"], preset)
    assert (got.n_embd, got.compile, got.steps) == (512, False, 7)  # a flag over a preset's value
    for argv, words in (("--stpes 3", "mean --steps?"), ("--step=3", "mean --steps?")):
        assert words in command(sae_module, *argv.split())
    text = command(sae_module, "--help")
    assert "5 % warm-up" in text and "default: 0.003" in text


@pytest.mark.parametrize("name,lr,insert_layer,parameters", [  # CoCoMix's without W_c, NTP's
    ("69m", 6e-4, 3, (68.3e6, 69.4e6)), ("386m", 3e-4, 5, (389e6, 387e6)),
    ("1.4b", 2e-4, 5, (1.38e9, 1.38e9))])
def test_presets_are_the_papers(name, lr, insert_layer, parameters):
    ours, ntp, kd, pause = (
        parse(TrainSettings, ["--preset", name, *mode], preset)
        for mode in ([], ["--mode=ntp"], ["--mode=kd"], ["--mode=pause"]))
    for s in (ours, ntp, kd, pause):
        assert (s.lr, s.insert_layer, s.block_size, s.init_std) == (lr, insert_layer, 1024, 0.02)
        assert s.steps * s.batch_tokens == pytest.approx(21e9, rel=0.01)
    assert (ours.mode, ours.teacher, ours.sae) == ("cocomix", "gpt2", "openai")
    assert (ours.concept_weight, ours.k_concepts, ours.n_labels) == (0.1, 32, 4)
    assert (kd.teacher, kd.sae, ntp.teacher) == ("gpt2", "", "")
    assert (kd.n_embd, pause.n_embd) == (ntp.n_embd, ours.n_embd)
    for s, mix, left_out in ((ours, "concept", 32768 * ours.n_embd), (ntp, "none", 0)):
        with torch.device("meta"):
            model = CoCoMix(CoCoMixConfig(50257, mix, 1024, s.n_layer, s.n_head, s.n_embd,
                                          insert_layer=insert_layer, n_concepts=32768))
        count = model.num_parameters() - left_out
        assert count == pytest.approx(parameters[mix == "none"], rel=0.02)


@pytest.mark.parametrize("flags,words", [
    ("--mode cocomix", "--teacher"), ("--steps 0", "above 0"),
    ("--mode ntp --sae x", "others take none"), ("--mode cocomix --teacher x", "needs both"),
    ("--insertion none", "to steer"), ("--sae_layer 6", "in 0 to 5"), ("--n_head 0", "n_head=0")])
def test_impossible_training_settings_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        parse(TrainSettings, flags.split(), preset)


# ---- training ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    words = "the cat sat on a mat while two dogs ran far from every house".split()
    rng = np.random.default_rng(0)
    text = "\n".join(" ".join(rng.choice(words, 9)) + "." for _ in range(900))
    (folder / "t.txt").write_text(text)
    return prepare(DataSettings(str(folder / "t.txt"), str(folder / "data"), vocab_size=V))


def settings(corpus, out, **changes):
    return TrainSettings(**{**dict(
        mode="ntp", data=str(corpus), out=str(out), n_layer=3, n_head=2, n_embd=D, block_size=T,
        init_std=0.02, insert_layer=1, k_concepts=4, steps=20, batch_tokens=8 * T, warmup=3,
        eval_interval=10, eval_tokens=20 * T, save_interval=5, device="cpu", lr=4e-3), **changes})


def sae_settings(corpus, out, **changes):
    return SAESettings(**{**dict(
        data=str(corpus), out=str(out), layer=1, n_latents=64, k=4, steps=60, batch_tokens=8 * T,
        lr=3e-3, dead_after=2000, device="cpu"), **changes})


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """{teacher, sae}: a teacher and its SAE, on disk, as flags of mode cocomix."""
    out = tmp_path_factory.mktemp("trained")
    teacher, _ = train(settings(corpus, out / "ntp", steps=80), World("cpu"))
    sae = sae_settings(corpus, out / "sae")
    _, figures = train_sae(sae, teacher.requires_grad_(False), World("cpu"))
    assert figures["val_fvu"] < 0.6 and figures["spliced_loss"] > figures["teacher_loss"] - 0.01
    return {"teacher": str(out / "ntp/ckpt.pt"), "sae": str(out / "sae/ckpt.pt"), "mode": "cocomix"}


def opened(trained):
    teacher = load_teacher(trained["teacher"], World("cpu"))
    return teacher, load_sae(trained["sae"], teacher, World("cpu"))[0]


def flags(s):
    """Settings as command-line flags, of which mix is none."""
    given = {k: v for k, v in vars(s).items() if k != "mix" and v != getattr(type(s), k)}
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in given.items()]


def start(arguments, script="train.py", processes=1, **env):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [sys.executable, *torchrun[:4 * (processes > 1)], HERE / script, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env})


def launch(*arguments, **more):
    """`start`, and wait for the end -> its output."""
    process = start(*arguments, **more)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill(process, log, lines, *signals):
    """Send the signals once the log has that many lines -> (exit code, output)."""
    deadline = time.time() + 300
    while not (log.is_file() and log.read_text().count("\n") >= lines):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.005)
    for how in signals:
        process.send_signal(how)
        time.sleep(0.01)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def weights(out):
    return load_checkpoint(Path(out) / "ckpt.pt", "model")["model"]


def logged(out):
    """The log without what depends on the clock and the folder."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    timed = ("seconds", "tok_per_s", "per_second", "mfu", "settings")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def assert_equal(out, other):
    """Two runs have the same weights and the same log, bit for bit."""
    a, b = weights(out), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert logged(out) == logged(other)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_same_command_goes_on_bit_for_bit(corpus, trained, tmp_path, how):
    s = settings(corpus, tmp_path / "cut", **trained, steps=90, save_interval=7)
    train(replace(s, out=str(tmp_path / "whole")), World("cpu"))
    # twice, as Slurm and torchrun together do
    code, output = kill(start(flags(s)), tmp_path / "cut/log.jsonl", 5, how, how)
    at = load_checkpoint(tmp_path / "cut/ckpt.pt", "model")["step"]
    assert code == {signal.SIGTERM: 1, signal.SIGKILL: -9}[how] and 7 <= at < 90, output
    assert at % 7 == 0 if how == signal.SIGKILL else "the same command goes on" in output
    launch(flags(s))
    assert_equal(tmp_path / "cut", tmp_path / "whole")
    with pytest.raises(ValueError, match="lr 0.004 there, 0.001 here; concept_weight default"):
        train(replace(s, lr=1e-3, concept_weight=0.25), World("cpu"))


def test_two_ranks_stop_together_on_sigterm(corpus, tmp_path):
    s = settings(corpus, tmp_path, steps=3000, save_interval=5000, eval_interval=5000)
    process = start(flags(s), processes=2)
    _, output = kill(process, tmp_path / "log.jsonl", 4, signal.SIGTERM)  # torchrun passes it on
    at = load_checkpoint(tmp_path / "ckpt.pt", "model")["step"]
    assert "stopped after step" in output and 0 < at < 3000, output


def test_two_processes_are_one_process(corpus, trained, tmp_path):
    """8 rows a step as 2 ranks x 2 rows x 2 accumulated, and as 1 x 8 x 1: one run."""
    s = settings(corpus, tmp_path / "one", **trained, concept_weight=1.0)
    train(s, World("cpu"))
    output = launch(flags(replace(s, out=str(tmp_path / "two"), micro_batch=2)), processes=2)
    assert "2 passes x 2 rows of 16" in output
    a, b = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert all(torch.allclose(a[k], b[k], atol=2e-5) for k in b)
    for got, want in zip(logged(tmp_path / "two")[1:], logged(tmp_path / "one")[1:], strict=True):
        assert got == pytest.approx(want, rel=1e-3)


def test_sae_training_on_two_processes_is_that_on_one_and_goes_on(corpus, trained, tmp_path):
    (teacher, _), stopped = opened(trained), World("cpu")
    s = sae_settings(corpus, tmp_path / "one", steps=20, dead_after=10 ** 6, save_interval=8)
    whole, _ = train_sae(s, teacher, World("cpu"))
    cut = replace(s, out=str(tmp_path / "cut"))
    stopped.signal = signal.SIGTERM
    with pytest.raises(SystemExit, match="stopped after step 8"):
        train_sae(cut, teacher, stopped)
    again, _ = train_sae(cut, teacher, World("cpu"))
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match="blocks are 0 to 2"):
        train_sae(replace(s, layer=3), teacher, World("cpu"))
    two = replace(s, out=str(tmp_path / "two"), teacher=trained["teacher"])
    launch(flags(two), "sae.py", processes=2)
    found = load_checkpoint(tmp_path / "two/ckpt.pt", "sae")
    for name, want in whole.state_dict().items():
        assert torch.allclose(found["sae"][name].float(), want.float(), atol=1e-4), name
    got, want = (logged(tmp_path / name)[-1] for name in ("two", "one"))
    assert got.pop("fvu") == pytest.approx(want.pop("fvu"), rel=0.02)  # about a rank's own mean
    assert got == pytest.approx(want, rel=1e-3)


def test_kept_labels_train_as_fresh_ones_do(corpus, trained, tmp_path, monkeypatch):
    for old in corpus.glob("*.labels"):
        old.unlink()
    made, make = [], train_module.concept_labels
    monkeypatch.setattr(train_module, "concept_labels", lambda *a: made.append(1) or make(*a))
    counts = []
    for name in ("fresh", "first", "second"):
        s = settings(corpus, tmp_path / name, **trained, keep_labels=name != "fresh")
        train(s, World("cpu"))
        assert_equal(tmp_path / name, tmp_path / "fresh")
        counts.append(len(made))
    assert counts[0] < counts[1] == counts[2]  # the first keeps what it makes, the second finds it


def test_a_fork_that_adds_a_setting_goes_on_with_older_runs(corpus, tmp_path):
    @dataclass(frozen=True)
    class Fork(TrainSettings):
        colour: str = "blue"
    s = settings(corpus, tmp_path, steps=10)
    train(s, World("cpu"))
    train(Fork(**vars(s)), World("cpu"))  # finds it finished
    with pytest.raises(ValueError, match="colour default there, red here"):
        train(Fork(**vars(s), colour="red"), World("cpu"))


def test_figures_of_an_sae_are_plain_means(corpus, trained):
    (teacher, sae), val = opened(trained), Windows(corpus, "val", T)
    idx, targets = val.batch([i * len(val) // 20 for i in range(20)])
    r = residual(teacher, idx, 1)
    n, _, a = dense_latents(sae, r[:, 1:])  # the first position stays out
    error = n - (a @ sae.decoder + sae.pre_bias)
    spliced = torch.cat([r[:, :1], sae(r).reconstruction[:, 1:]], 1)
    want = {"val_fvu": error.square().sum() / (n - n.mean((0, 1))).square().sum(),
            "teacher_loss": teacher(idx, targets).loss,
            "spliced_loss": loss_from(teacher, spliced, targets, 1) / targets.numel()}
    got = evaluate_sae(teacher, sae, 1, val, World("cpu"), 20 * T)
    assert got == pytest.approx({name: x.item() for name, x in want.items()}, rel=1e-4)


def test_figures_of_a_student_are_plain_means(corpus, trained, student):
    ckpt, val = load_checkpoint(student, "model"), Windows(corpus, "val", T)
    idx, targets = val.batch([i * len(val) // 20 for i in range(20)])
    labels = concept_labels(*opened(trained), idx, targets, 1)
    out, hits, possible = CoCoMix.from_checkpoint(ckpt)(idx, targets), 0, 0
    for row, z in zip(labels.flatten(0, 1).tolist(), out.concept_logits.flatten(0, 1)):
        hits += len(set(row) & set(z.topk(4).indices.tolist()))
        possible += 4 * (max(row) >= 0)
    guess = labels[labels >= 0].bincount().topk(4).values.sum().item() / possible
    got = [ckpt["log"][-1][name] for name in ("val_loss", "label_hits", "label_guess")]
    assert got == pytest.approx([out.ntp_loss.item(), hits / possible, guess], rel=1e-5)
    assert hits / possible > guess


def test_eval_is_the_mean_over_the_whole_split(corpus, trained, command):
    (teacher, _), val = opened(trained), Windows(corpus, "val", T)
    loss = teacher(*val.batch(range(len(val)))).loss.item()
    text = command(train_module, "eval", trained["teacher"])
    assert f": loss {loss:.4f}, perplexity {math.exp(loss):.4f}," in text


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(corpus, tmp_path, monkeypatch):
    s, real = settings(corpus, tmp_path, steps=30, save_interval=7), train_module.learning_rate
    monkeypatch.setattr(train_module, "learning_rate",
                        lambda step, s: real(step, s) if step < 8 else math.inf)
    with pytest.raises(ValueError, match="--lr"):
        train(s, World("cpu"))
    assert load_checkpoint(tmp_path / "ckpt.pt", "model")["step"] == 7


def test_training_refuses_what_does_not_fit(corpus, trained, tmp_path, command):
    train(settings(corpus, tmp_path / "other", steps=1, seed=1), World("cpu"))
    train(settings(corpus, tmp_path / "pause", mode="pause", steps=1), World("cpu"))
    numbered(tmp_path / "words", [400], vocab=V)  # as many tokens, but others
    for changes, words in (
            (dict(micro_batch=3), "1 processes x 3 rows"), (dict(block_size=32), "reads 16 tokens"),
            (dict(data=str(tmp_path / "words")), "other tokens than the model's"),
            (dict(teacher=str(tmp_path / "other/ckpt.pt")), "another teacher"),
            (dict(teacher=str(tmp_path / "pause/ckpt.pt")), "plain GPT"),
            (dict(sae=trained["teacher"]), "kind sae"), (dict(data="nothing"), "python data.py"),
            (dict(n_labels=5), "n_labels=5")):
        with pytest.raises(ValueError, match=words):
            train(settings(corpus, tmp_path / "o", **{**trained, **changes}), World("cpu"))
    text = command(train_module, *flags(settings(corpus, corpus / "meta.json/x")))
    assert re.search("error: .*Not a directory.*free some space", text)


def test_public_teacher_and_sae_by_name(corpus, tmp_path, monkeypatch, command):
    """--teacher gpt2 --sae openai:1, with small files of the same formats under their addresses."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_safetensors(hf_names(small("none", n_head=1, n_embd=64)), tmp_path / "gpt2.safetensors")
    for layer in (1, 7):
        openai_file(tmp_path / f"{layer}.pt", 64, 80)
    gpt2 = (tmp_path / "gpt2.safetensors").as_uri()
    monkeypatch.setattr(sae_module, "GPT2_FILE", (gpt2, "", None))
    monkeypatch.setattr(sae_module, "OPENAI", tmp_path.as_uri() + "/{}.pt")
    s = settings(corpus, tmp_path / "o", mode="cocomix", teacher="gpt2", sae="openai:1", steps=10)
    student, _ = train(s, World("cpu"))
    ckpt = load_checkpoint(tmp_path / "o/ckpt.pt", "model")
    loaded = load_hf(tmp_path / "gpt2.safetensors")
    assert ckpt["identity"]["teacher"] == fingerprint(loaded) and student.config.n_concepts == 80
    command(sae_module, "describe", "--sae", "openai:1", "--teacher", "gpt2", "--data", corpus,
            "--tokens", 640)
    entries = load_dictionary(tmp_path / "o/ckpt.pt", ckpt)
    assert entries[7]["page"] == "https://www.neuronpedia.org/gpt2-small/1-res_post_32k-oai/7"
    with pytest.raises(ValueError, match="reads block 7"):
        train(replace(s, sae="openai:7"), World("cpu"))


def test_learning_rate_warms_up_from_above_zero_and_ends_at_a_tenth():
    s = TrainSettings(lr=1.0, warmup=4, steps=104)
    rates = [learning_rate(step, s) for step in range(105)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[54] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1) and learning_rate(0, replace(s, warmup=0)) == 1.0


def test_distillation_is_its_definition():
    ours, theirs = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    q = theirs.softmax(-1)
    want = (q * (q.log() - ours.log_softmax(-1))).sum(-1).mean()
    assert torch.allclose(distillation(ours, theirs), want)


def test_the_whole_method_in_one_command(tmp_path, corpus):
    s = settings(corpus, tmp_path, mode="all", sae_layer=1, sae_steps=10, n_concepts=64)
    output = launch(flags(s), processes=2, LC_ALL="C")
    report = (tmp_path / "report.md").read_text("utf-8")
    assert report in output and re.search(r"cocomix \| 1 .* \| [+-]\d", report)
    continued, thoughts, steered = (block.splitlines() for block in report.split("```")[1::2])
    assert "----" in continued and continued[1][:8] == steered[1][:8] and len(thoughts) == 11
    files = [tmp_path / f for f in ("ntp/ckpt.pt", "sae/ckpt.concepts.json", "cocomix/ckpt.pt")]
    before = [path.stat().st_mtime_ns for path in files]
    train_module.pipeline(s, World("cpu"))  # every stage is found finished
    assert (tmp_path / "report.md").read_text("utf-8") == report
    assert before == [path.stat().st_mtime_ns for path in files]


# ---- reports and evaluation ----------------------------------------------------------------------

def write_log(out, losses, seed=0, validation="v", **identity):
    """A made-up run's log: validation losses at 100, 200, ... tokens, a step each."""
    first = {"step": 0, "tokens": 0, "parameters": 1000, "flops_per_token": 50,
             "validation": validation, "identity": {"seed": seed, **identity},
             "settings": {"seed": seed, "steps": len(losses)}}
    records = [{"step": i, "tokens": 100 * i, "val_loss": loss, "seconds": 2.0 * i}
               for i, loss in enumerate(losses, 1)]
    records.insert(0, {"step": 0, "tokens": 50, "ntp_loss": 9.0})
    Path(out).mkdir(parents=True)
    lines = [json.dumps(record) + "\n" for record in (first, *records)]
    Path(out, "log.jsonl").write_text("".join(lines))
    return str(out)


def test_a_report_on_made_up_logs(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    ends, ahead = np.array([2.0, 2.2, 2.1]), np.array([0.5, 0.3, 0.4])
    for seed, end in enumerate(ends):
        write_log(f"ntp_{seed}", [5.0, 3.0, end], seed, lr=1.0)
        write_log(f"{seed}/mix0.1", [5.0, 2.5, end - ahead[seed]], seed, lr=2.0, teacher=seed)
    write_log("worse", [5.0, 4.0, 3.0])
    rows = command(train_module, "report", "ntp_0", "ntp_1", "ntp_2", "0/mix0.1/", "1/mix0.1",
                   "2/mix0.1", "worse").splitlines()
    error = ahead.std(ddof=1) / 3 ** 0.5
    saved = 100 * (1 - (200 + 100 * (2.5 - ends) / (2.5 - ends + ahead)) / 300)
    saved = f"{saved.mean():.1f} ± {saved.std(ddof=1):.1f}"
    assert rows[2:] == [
        "| ntp_* | 3 | 1,000 | 300 | 1.50e+04 | 6 | 2.1000 ± 0.1000 | - | - |",
        "| */mix0.1 | 3 | 1,000 | 300 | 1.50e+04 | 6 | 1.7000 ± 0.2000 | "
        f"-0.4000 ± {error:.4f} | {saved} |",
        "| worse | 1 | 1,000 | 300 | 1.50e+04 | 6 | 3.0000 | +1.0000 | - (0 of 1) |"]
    rows = command(train_module, "report", "ntp_0", "--baseline", "0/mix0.1").splitlines()
    assert rows[2].endswith("| 1.5000 | - | - |")
    assert rows[3].endswith("| 2.0000 | +0.5000 | - (0 of 1) |")


def test_a_picture_of_the_curves(tmp_path, monkeypatch, command):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    ask = "report", write_log("a", [5.0, 3.0]), "--plot"
    command(train_module, *ask, "curves.png")
    assert Path("curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "name a .png or .svg" in command(train_module, *ask, "curves")


def test_reports_refuse_what_they_cannot_compare(tmp_path, command):
    good, torn, unfinished, foreign = (write_log(tmp_path / name, [5.0, 3.0], lr=1.0)
                                       for name in ("a_0", "torn", "unfinished", "foreign"))
    text = Path(good, "log.jsonl").read_text()
    Path(torn, "log.jsonl").write_text(text[:-9])
    Path(unfinished, "log.jsonl").write_text(text.rpartition("\n{")[0])
    Path(foreign, "log.jsonl").write_text('{"loss": 1}\n')
    for other, words in ((torn, "damaged"), (unfinished, "unfinished, at step 1 of 2"),
                         (foreign, "no log of train.py"), (tmp_path / "none", "missing"),
                         (write_log(tmp_path / "o", [5.0], validation="w"), "different tokens"),
                         (write_log(tmp_path / "a_1", [5.0], 1, lr=2.0), "more than its seed")):
        assert words in command(train_module, "report", good, other)


def test_optional_packages_are_named_where_they_are_missing(
        tmp_path, trained, monkeypatch, command):
    run = write_log(tmp_path / "a", [5.0, 3.0])
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    for package, argv in (("matplotlib", ["report", run, "--plot", "p.png"]),
                          ("lm_eval", ["eval", trained["teacher"], "--tasks", "piqa"])):
        monkeypatch.setitem(sys.modules, package, None)  # what Python then says it is missing
        assert f"pip install {package}" in command(train_module, *argv)


def test_the_harness_scores_our_models_as_its_own(tmp_path):
    """A random GPT-2, loaded by us and by transformers, asked by lm-evaluation-harness."""
    for package in ("lm_eval", "accelerate", "transformers"):
        pytest.importorskip(package)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import ByT5Tokenizer
    reference = HFLM(random_gpt2(tmp_path), tokenizer=ByT5Tokenizer(), add_bos_token=False,
                     batch_size=2, max_length=64, device="cpu")
    ranks = {bytes([b]): b + 3 for b in range(256)}  # ByT5's; its </s> is 1
    encoding = tiktoken.Encoding("ByT5", pat_str=data_module.PATTERN, mergeable_ranks=ranks,
                                 special_tokens={EOT: 1})
    ours = train_module.harness(load_hf(tmp_path / "model.safetensors"), encoding, World("cpu"))
    rng, words = np.random.default_rng(0), "the cat saw a dog near old houses in rain".split()
    text = [" ".join(rng.choice(words, n)) for n in (8, 12, 5, 30, 9, 40)]  # some beyond the block
    pairs = [Instance("loglikelihood", {}, (t, f" {word}"), 0) for t in text for word in words]
    want, got = (lm.loglikelihood(pairs) for lm in (reference, ours))
    assert torch.allclose(torch.tensor(got), torch.tensor(want), rtol=1e-4)
    whole = [Instance("loglikelihood_rolling", {}, (t,), 0) for t in text]
    want, got = (lm.loglikelihood_rolling(whole) for lm in (reference, ours))
    assert got == pytest.approx(want, rel=1e-4)


# ---- reading and steering concepts ---------------------------------------------------------------

@pytest.fixture(scope="module")
def student(corpus, trained, tmp_path_factory):
    """A trained student's checkpoint, with the concept dictionary of its SAE beside the SAE."""
    out = tmp_path_factory.mktemp("student")
    train(settings(corpus, out, **trained, steps=60), World("cpu"))
    dictionary = Path(trained["sae"]).with_suffix(".concepts.json")
    sae_module.describe(*opened(trained), 1, Windows(corpus, "val", T), dictionary)
    return str(out / "ckpt.pt")


def test_the_dictionary_is_what_a_brute_force_pass_finds(corpus, trained, student):
    (teacher, sae), val = opened(trained), Windows(corpus, "val", T)
    encoding, text = get_tokenizer(val.meta), torch.tensor(np.stack([*val]).astype(int))
    values, latents = sae.encode(residual(teacher, text[:, :-1], 1))
    a = torch.zeros(*text[:, :-1].shape, 64).scatter(-1, latents, values)
    a[:, 0] = 0  # a window's first position is left out
    entries = load_dictionary(student, load_checkpoint(student, "model"))
    assert [entry["id"] for entry in entries] == list(range(64))
    for entry in entries:
        values, places = a[..., entry["id"]].flatten().sort(descending=True, stable=True)
        fired = (values > 0).sum().item()
        assert entry["rate"] == pytest.approx(fired / (len(val) * (T - 1)))
        n, t = places[:min(fired, 64)] // T, places[:min(fired, 64)] % T
        for key, ids in (("tokens", text[n, t]), ("next", text[n, t + 1])):
            for i, word, share, lift in entry[key]:
                assert word == encoding.decode([i])
                assert share == pytest.approx((ids == i).float().mean().item())
                assert 1 < lift == pytest.approx(share / (text == i).float().mean().item())
            scores = [share * math.log(lift) for _, _, share, lift in entry[key]]
            assert scores == sorted(scores, reverse=True)
        for n, t, value, snippet in zip(n.tolist(), t.tolist(), values, entry["snippets"]):
            around = text[n, max(0, t - 12):t], text[n, t:t + 1], text[n, t + 1:min(t + 13, T)]
            assert snippet[:3] == [encoding.decode(ids.tolist()) for ids in around]
            assert snippet[3] == pytest.approx(value.item(), abs=1e-3)
    assert sum(entry["rate"] > 0 for entry in entries) > 20  # not a comparison of nothing


def test_the_steering_study_finds_a_planted_effect():
    model = small(n_layer=2, insert_layer=1, concept_residual=True, noise=0.02)
    words = model.requires_grad_(False).wte.weight.mul_(20)  # sharp predictions
    model.concept.compress.weight.mul_(0.01)
    model.concept.compress.weight[:, 3:5] = 40 * words[[7, 9]].T  # 3 says token 7, 4 says 9
    entries = [{"id": c, "rate": 0.5, "next": [[12, "w", 0.05, 2.0]]} for c in range(64)]
    for concept, token, share in ((3, 7, 0.9), (4, 9, 0.8), (5, 9, 0.7), (2, 11, 0.6)):
        entries[concept]["next"] = [[token, "x", share, 9.0]]
    down, still, up = study(model, tokens(6, 4), entries, (-8, 0, 8), concepts=2)
    assert still[1] == still[2] < 0.2 and up[1] > 0.9 > 0.5 > up[2] and down[1] < 0.2
    assert [e["id"] for e in steerable(entries, 3)] == [3, 4, 2]  # 5 says what 4 says
    with pytest.raises(ValueError, match="more text"):
        steerable([{**e, "rate": 0.0} for e in entries], 1)


def test_generating_inspecting_and_steering(student, trained, monkeypatch, command):
    ckpt = load_checkpoint(student, "model")
    model, encoding = CoCoMix.from_checkpoint(ckpt), get_tokenizer(ckpt["vocabulary"])
    idx = torch.tensor([encoding.encode_ordinary("the cat")])
    ask = student, "--prompt", "the cat", "--tokens", 20, "--temperature", 0
    want, steered = (encoding.decode(model.generate(idx, 20, 0, steer=steer)[0].tolist())
                     for steer in (None, {3: 29.0, 5: -2.5}))
    assert command(cocomix_module, *ask) == f"{want}\n"
    output = command(cocomix_module, *ask, "--steer", "3=+29", "5=-2.5")
    assert want in output and steered in output and want != steered
    lines = command(cocomix_module, *ask, "--inspect").splitlines()[1:]
    entries = load_dictionary(student, ckpt)
    for line, ids in zip(lines, model(idx).concept_logits[0].topk(4).indices.tolist(), strict=True):
        assert [int(i) for i in re.findall(r"(?:^'.+?' +|\| )(\d+) \(", line)] == ids
        assert not entries[ids[0]]["tokens"] or repr(entries[ids[0]]["tokens"][0][1]) in line
    monkeypatch.setattr(study, "__defaults__", ((-4, 4), 2))
    lines = command(cocomix_module, student, "--study").splitlines()
    assert len(lines) == 4 and re.match(r"\| -4 \| 0\.\d{4} \| 0\.\d{4} \|", lines[2])


def test_bad_questions_get_clear_answers(student, trained, command):
    for argv, words in ((["--prompt", ""], "prompt is empty"), (["--prompts"], "mean --prompt?"),
                        (["--prompt", "a", "--steer", "64=+1"], "no concept 64"),
                        (["--steer", "17"], "invalid concept_strength value: '17'"),
                        (["--prompt", "a" * 99, "--inspect"], "block_size=16")):
        assert words in command(cocomix_module, student, *argv)
    ask = "--prompt", "a", "--inspect"
    assert "name a CoCoMix" in command(cocomix_module, trained["teacher"], *ask)
    dictionary = Path(trained["sae"]).with_suffix(".concepts.json")
    good = dictionary.read_text()
    for text in ('{"sae": "other", "concepts": []}', good[:-9], "[]"):
        dictionary.write_text(text)
        assert "sae.py describe" in command(cocomix_module, student, *ask)
    dictionary.write_text(good)


# ---- on a GPU, and compiled ----------------------------------------------------------------------

def test_a_compiled_step_is_one_graph_with_the_same_gradients():
    model, idx, labels = small(), tokens(2, T), tokens(2, T, 4, below=64)
    model(idx, idx, labels).loss.backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(idx, idx, labels).loss.backward()
    assert all(torch.allclose(p.grad, g, atol=1e-5) for p, g in zip(model.parameters(), want))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_compiled_bf16_step_is_close_to_eager_fp32():
    model, idx = small(noise=0.04).cuda(), tokens(2, T).cuda()
    labels = tokens(2, T, 4, below=64).cuda()
    want = model(idx, idx, labels).loss
    with torch.autocast("cuda", torch.bfloat16):
        got = torch.compile(model)(idx, idx, labels).loss
    got.backward()
    assert torch.allclose(got, want, rtol=2e-2)
    assert all(p.grad.isfinite().all() for p in model.parameters())
