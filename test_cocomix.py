"""Every test compares with something independent: loops written from the equations, finite differences, files made by
hand, one process against two. Offline, on the CPU: `pytest`. Tests that need a GPU skip themselves."""
import hashlib
import http.server
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import cocomix as cocomix_module
import data as data_module
import sae as sae_module
import train as train_module
from cocomix import CoCoMix, CoCoMixConfig, concept_loss, interleave, load_hf, sparse_matmul, standardise, steering_study, top_k
from data import (DataSettings, Interrupt, Log, Windows, World, fetch, get_tokenizer, load_checkpoint, open_shard, parse, prepare, read_pieces, save_checkpoint)
from sae import (Labeler, SAEOutput, SAESettings, Strongest, TopKSAE, attribution, concept_labels, evaluate_sae, fingerprint, load_openai, loss_from, residual,
                 train_sae)
from train import PRESETS, Distilled, ReportSettings, TrainSettings, compare, evaluate, learning_rate, pipeline, report_runs, student_t, tokens_to, train

HERE = Path(__file__).parent
torch.set_num_threads(1)  # tiny tensors: threads only cost, and bit-exact comparisons need a fixed number
V, T, D = 257, 16, 32
SMALL = dict(block_size=T, vocab_size=V, n_layer=4, n_head=4, n_embd=D, insert_layer=2, n_concepts=64, k_concepts=5)


def small(mix="concept", seed=0, scale=8.0, **changes):
    """A small model whose weights are large enough that every term of the equations shows in its output."""
    torch.manual_seed(seed)
    model = CoCoMix(CoCoMixConfig(**{**SMALL, "mix": mix, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.02 * scale + (1 if p.dim() == 1 and (p == 1).all() else 0))
    return model


def tokens(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


# ---- the model -------------------------------------------------------------------------------------------------------

def slow_gpt(model, idx):
    """The equations in numpy float64, one position at a time: (T,) ids -> (T,V) logits, (T,C) concept logits or None."""
    c, w = model.config, {k: v.detach().double().numpy() for k, v in model.state_dict().items()}

    def norm(x, name):
        return (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    def block(xs, i):
        p, hd, out = f"h.{i}.", c.n_embd // c.n_head, []
        qkv = [w[p + "attn.c_attn.weight"] @ norm(x, p + "ln_1") + w[p + "attn.c_attn.bias"] for x in xs]
        for t, x in enumerate(xs):
            y = np.zeros(c.n_embd)
            for head in range(c.n_head):
                at = slice(head * hd, (head + 1) * hd)
                q = qkv[t][:c.n_embd][at]
                scores = np.array([q @ qkv[s][c.n_embd:2 * c.n_embd][at] / np.sqrt(hd) for s in range(t + 1)])
                weights = np.exp(scores - scores.max())
                y[at] = sum(a * qkv[s][2 * c.n_embd:][at] for s, a in enumerate(weights / weights.sum()))
            x = x + w[p + "attn.c_proj.weight"] @ y + w[p + "attn.c_proj.bias"]
            u = w[p + "mlp.c_fc.weight"] @ norm(x, p + "ln_2") + w[p + "mlp.c_fc.bias"]
            u = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u ** 3)))
            out.append(x + w[p + "mlp.c_proj.weight"] @ u + w[p + "mlp.c_proj.bias"])
        return out

    xs, zs = [w["wte.weight"][i] + w["wpe.weight"][t] for t, i in enumerate(idx.tolist())], []
    for i in range(c.n_layer):
        if c.mix != "none" and i == c.insert_layer:
            mixed = []
            for h in xs:
                if c.mix == "pause":
                    vector = w["pause"]
                else:
                    mu, std = h.mean(), h.std(ddof=1)
                    z = w["concept_predictor.weight"] @ ((h - mu) / (std + 1e-5) - w["pre_bias"]) + w["concept_predictor.bias"]
                    kept = np.zeros_like(z)
                    winners = np.argsort(-z)[:c.k_concepts]
                    kept[winners] = z[winners]
                    zs.append(z)
                    if c.insertion == "none":
                        continue
                    vector = (w["compress_layer.weight"].T @ kept + w["compress_layer.bias"] + w["pre_bias"]) * std + mu
                mixed += [h + vector] if c.insertion == "add" else [h, h + vector if c.concept_residual else vector]
            xs = mixed or xs
        xs = block(xs, i)
    xs = xs[1::2] if len(xs) > len(idx) else xs
    return np.stack([w["wte.weight"] @ norm(x, "ln_f") for x in xs]), np.stack(zs) if zs else None


@pytest.mark.parametrize("mix,changes", [("none", {}), ("pause", {}), ("concept", {}), ("concept", {"insert_layer": 0}), ("concept", {"insert_layer": 3}),
                                         ("concept", {"concept_residual": True}), ("pause", {"concept_residual": True}),
                                         ("concept", {"insertion": "add"}), ("concept", {"insertion": "none"})])
def test_model_is_the_slow_loop(mix, changes):
    model, idx = small(mix, **changes), tokens(2, T)
    out = model(idx)
    for b in range(2):
        logits, z = slow_gpt(model, idx[b])
        np.testing.assert_allclose(out.logits[b].detach(), logits, atol=2e-4, rtol=1e-4)
        if z is not None:
            np.testing.assert_allclose(out.concept_logits[b].detach(), z, atol=1e-4, rtol=1e-4)


def test_loss_is_token_loss_plus_weighted_concept_loss_and_ignores_minus_one():
    model, idx, targets, labels = small(concept_weight=0.3), tokens(3, T), tokens(3, T, seed=1), tokens(3, T, 4, seed=2) % 64
    targets[0, :5], labels[1, :, 2:] = -1, -1
    out = model(idx, targets, labels)
    logp, z = torch.log_softmax(out.logits.double(), -1), out.concept_logits
    want = -np.mean([logp[b, t, targets[b, t]].item() for b in range(3) for t in range(T) if targets[b, t] >= 0])
    assert out.ntp_loss.item() == pytest.approx(want, rel=1e-5)
    assert out.concept_loss.item() == pytest.approx(concept_loss(z, labels).item())
    assert out.loss.item() == pytest.approx(out.ntp_loss.item() + 0.3 * out.concept_loss.item(), rel=1e-6)
    assert model(idx, torch.full_like(targets, -1)).ntp_loss.item() == 0
    assert model(idx).loss is None and model(idx, targets).concept_loss is None


def test_interleave_and_its_inverse():
    h, c = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    x = interleave(h, c)
    for t in range(3):
        assert torch.equal(x[:, 2 * t], h[:, t]) and torch.equal(x[:, 2 * t + 1], c[:, t])
    assert torch.equal(x[:, 0::2], h) and torch.equal(x[:, 1::2], c)


@pytest.mark.parametrize("mix", ["none", "pause", "concept"])
def test_no_logit_sees_a_later_token(mix):
    model, idx = small(mix), tokens(1, T)
    before = model(idx)
    for t in (1, 7, T - 1):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % V
        after = model(changed)
        assert torch.allclose(before.logits[:, :t], after.logits[:, :t], atol=1e-5)
        assert not torch.allclose(before.logits[:, t], after.logits[:, t], atol=1e-3)
        if mix == "concept":
            assert torch.allclose(before.concept_logits[:, :t], after.concept_logits[:, :t], atol=1e-5)


def test_token_loss_trains_the_concept_predictor():
    model = small()
    model(tokens(2, T), tokens(2, T, seed=1)).ntp_loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    chosen = model.concept_predictor.bias.grad != 0  # only winners pass the top-k
    assert 5 <= chosen.sum() < 64
    ablated = small(insertion="none")  # concepts are predicted, but nothing of them goes on
    ablated(tokens(2, T), tokens(2, T, seed=1)).ntp_loss.backward()
    assert ablated.concept_predictor.weight.grad is None and not hasattr(ablated, "compress_layer")
    with pytest.raises(ValueError, match="insertion='none'"):
        ablated.generate(tokens(1, 3), 1, steer={0: 1.0})


def test_sparse_mixing_is_dense_mixing():
    torch.manual_seed(0)
    rows, z = torch.randn(64, D, requires_grad=True), torch.randn(2, 7, 64, requires_grad=True)
    at = top_k(z, 5)
    sparse = sparse_matmul(z.gather(-1, at), at, rows)
    dense = (torch.zeros_like(z).scatter(-1, z.topk(5)[1], 1.0) * z) @ rows
    assert torch.allclose(sparse, dense, atol=1e-5)
    upstream = torch.randn_like(dense)
    for a, b in zip(torch.autograd.grad(sparse, (rows, z), upstream), torch.autograd.grad(dense, (rows, z), upstream)):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("C,k", [(4096, 32), (2048, 32), (1024, 31), (1000, 7), (64, 5), (32, 32)])
def test_two_stage_top_k_is_top_k(C, k):
    z = torch.randn(3, 11, C, generator=torch.Generator().manual_seed(C))
    assert torch.equal(top_k(z, k), z.topk(k).indices)
    ties = (z * 2).round()  # many equal values: any choice is right if its values are
    chosen = top_k(ties, k)
    assert torch.equal(ties.gather(-1, chosen), ties.topk(k).values)
    assert all(len(set(row)) == k for row in chosen.flatten(0, 1).tolist())


def test_concept_loss_is_the_mean_of_separate_cross_entropies():
    z, labels = torch.randn(2, 7, 64, requires_grad=True), tokens(2, 7, 4) % 64
    separate = sum(F.cross_entropy(z.flatten(0, 1), labels[..., i].flatten()) for i in range(4)) / 4
    assert torch.allclose(concept_loss(z, labels), separate)
    labels[0, :, 1:], labels[1, 3] = -1, -1  # masked ones leave the sum and the count
    each = [F.cross_entropy(z[b, t], labels[b, t, i]) for b in range(2) for t in range(7) for i in range(4) if labels[b, t, i] >= 0]
    assert torch.allclose(concept_loss(z, labels), sum(each) / len(each))
    none = concept_loss(z, torch.full_like(labels, -1))
    none.backward()
    assert none.item() == 0 and torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("trains", ["xw", "x", "w", ""])
def test_the_chunked_token_loss_is_cross_entropy(trains):
    """Over chunk borders, with padded rows and missing targets, for whichever of x and W wants a gradient; in bf16 too."""
    torch.manual_seed(0)
    x, w, targets = torch.randn(1100, 24), torch.randn(72, 24), torch.randint(-1, 70, (1100,))
    x[5] *= 40  # a token that is sure
    x.requires_grad_("x" in trains), w.requires_grad_("w" in trains)
    want = 0.3 * F.cross_entropy((x @ w.T)[:, :70], targets, ignore_index=-1, reduction="sum")
    got = 0.3 * cocomix_module.TokenLoss.apply(x, w, targets, 70)
    assert (targets < 0).any() and got.item() == pytest.approx(want.item(), rel=1e-5) and got.requires_grad == bool(trains)
    inputs = [p for p in (x, w) if p.requires_grad]
    if inputs:
        exact = torch.autograd.grad(want, inputs)
        for a, b in zip(torch.autograd.grad(got, inputs), exact):
            assert torch.allclose(a, b, atol=1e-4 * b.abs().max())
        with torch.autocast("cpu", torch.bfloat16):
            low = 0.3 * cocomix_module.TokenLoss.apply(x, w, targets, 70)
        for a, b in zip(torch.autograd.grad(low, inputs), exact):
            assert a.dtype == torch.float32 and torch.allclose(a, b, atol=2e-2 * b.abs().max())
    assert cocomix_module.TokenLoss.apply(x, w, torch.full((1100,), -1), 70).item() == 0


def test_concept_loss_gradient_is_the_slope():
    torch.manual_seed(0)
    z, labels = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True), torch.randint(-1, 7, (2, 3, 4))
    labels[0, 0], labels[0, 1] = -1, 3  # a token without labels, and one with four times the same
    assert torch.autograd.gradcheck(lambda z: cocomix_module.ConceptLoss.apply(z, labels), z)


def test_logits_left_out_change_no_loss_and_no_gradient():
    for mix in ("none", "concept"):
        grads = []
        for wanted in (True, False):
            model, idx = small(mix, vocab_multiple=64), tokens(2, T)
            out = model(idx, idx.roll(-1, 1), logits=wanted)
            assert (out.logits is not None) == wanted
            F.cross_entropy(out.logits.flatten(0, 1), idx.roll(-1, 1).flatten()).backward() if wanted else out.loss.backward()
            grads.append([p.grad for p in model.parameters() if p.grad is not None])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_one_overflow_among_the_losers_does_no_harm():
    z = torch.randn(1, 1, 64)
    z[0, 0, 3] = -torch.inf
    model = small()
    assert torch.isfinite(model.mix_concepts(z, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))).all()


def test_flops_are_those_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    for mix, changes in (("none", {}), ("pause", {}), ("concept", {}), ("concept", {"insertion": "add"}), ("concept", {"insertion": "none"})):
        model = small(mix, **changes)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens(1, T))
        mixing = 2 * D * SMALL["k_concepts"] if hasattr(model, "compress_layer") else 0  # torch does not count embedding_bag
        assert model.flops_per_token() == 3 * (counter.get_total_flops() / T + mixing)


@pytest.mark.parametrize("mix", ["none", "concept"])
def test_gradient_checkpointing_keeps_less_and_changes_nothing(mix):
    grads, kept = [], []
    for on in (False, True):
        model, idx, seen = small(mix), tokens(2, T), {}
        model.gradient_checkpointing = on

        def pack(x):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(idx, idx, tokens(2, T, 4) % 64 if mix == "concept" else None).loss
        weights_of = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(size for at, size in seen.items() if at not in weights_of))
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and kept[1] < 0.5 * kept[0]


def test_padded_vocabulary_is_never_scored_or_sampled():
    model, padded, idx = small(), small(vocab_multiple=64), tokens(2, T)
    assert padded.wte.weight.shape == (320, D) and padded.flops_per_token() - model.flops_per_token() == 6 * D * 63
    with torch.no_grad():
        for p, q in zip(padded.parameters(), model.parameters()):
            p[:len(q)] = q
        padded.wte.weight[V:] = 10 * padded.wte.weight[5]  # would win every argmax and swell every log-sum-exp
    a, b = model(idx, idx), padded(idx, idx)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.loss, b.loss) and b.logits.size(-1) == V
    assert padded.generate(idx[:, :2], 40, temperature=100.0, generator=torch.Generator().manual_seed(0)).max() < V


def test_optimizer_decays_matrices_only_and_init_is_gpt2s():
    model = CoCoMix(CoCoMixConfig(**{**SMALL, "n_embd": 256}))
    decayed, spared = model.configure_optimizer(1e-3).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert all(names[id(p)].endswith("weight") and ".ln_" not in names[id(p)] for p in decayed["params"])
    assert all(n.endswith("bias") or "ln_" in n for n in (names[id(p)] for p in spared["params"]))
    assert model.num_parameters() == sum(p.numel() for g in (decayed, spared) for p in g["params"])
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 8 ** 0.5, rel=0.05)
    assert model.compress_layer.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("mix,changes", [("none", {}), ("pause", {}), ("concept", {}), ("concept", {"insert_layer": 0, "concept_residual": True}), ("concept", {"insertion": "add"})])
@pytest.mark.parametrize("length", [1, 2, 7, T, T + 3])
def test_generation_with_the_cache_is_generation_without(mix, changes, length):
    """Token for token, prompts of one token and more, batches, and past block_size, where the window slides."""
    model, prompt = small(mix, **changes), tokens(3, length)
    want = prompt
    for _ in range(T + 2):
        want = torch.cat([want, model(want[:, -T:]).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(prompt, T + 2, temperature=0), want)
    assert torch.equal(model.generate(prompt, T + 2, temperature=0, cached=False), want)
    assert model.generate(prompt, T + 2, temperature=0, slide=False).size(1) == max(length, T + 1)
    steer = {3: 2.0, 9: -4.0} if mix == "concept" else None
    g = [model.generate(prompt, 9, 1.0, 5, steer, cached=c, generator=torch.Generator().manual_seed(1)) for c in (True, False)]
    assert torch.equal(*g) and torch.equal(model.generate(prompt, 4, temperature=5.0, top_k=1), want[:, :length + 4])


@pytest.mark.parametrize("mix", ["none", "pause", "concept"])
def test_cached_logits_are_the_full_passes(mix):
    """Any cut of the text into pieces: the lower-right mask above the insertion, two rows a token."""
    model, idx = small(mix), tokens(2, T)
    want, cache, got, at = model(idx), model.new_cache(), [], 0
    for piece in (3, 1, 5, 1, 6):
        got.append(model(idx[:, at:at + piece], cache=cache).logits)
        at += piece
    assert torch.allclose(torch.cat(got, 1), want.logits, atol=1e-4) and at == T == cache["tokens"]
    assert [p[0].size(2) for p in cache["past"]] == ([T] * 4 if mix == "none" else [T, T, 2 * T, 2 * T])
    with pytest.raises(ValueError, match="block_size"):
        model(idx[:, :1], cache=cache)
    for cast in (False, True):  # bf16, as autocast and as the weights themselves
        rough, cache, got = small(mix, scale=2.0), None, []
        with torch.autocast("cpu", torch.bfloat16, enabled=not cast):
            rough = rough.bfloat16() if cast else rough
            want, cache = rough(idx).logits.float(), rough.new_cache()
            got = torch.cat([rough(idx[:, t:t + 1], cache=cache).logits.float() for t in range(T)], 1)
        assert (got - want).abs().max() < 0.15 * want.std()


def test_steering_adds_to_one_logit_at_generated_positions_only():
    model, idx = small(), tokens(1, 6)
    model.concept_max[9], model.concept_max[10] = 2.5, -2.0  # a concept whose largest logit is negative is raised by +, too
    delta = model.steering({9: 3.0, 10: 1.0}, 6, start=5)
    assert delta[5, 9] == 7.5 and delta[5, 10] == 2.0 and delta.abs().sum() == 9.5
    assert torch.equal(model.generate(idx, 4, 0, steer={9: 0.0}), model.generate(idx, 4, 0))
    assert torch.equal(model(idx, steer=delta).logits[:, :5], model(idx).logits[:, :5])
    assert not torch.allclose(model(idx, steer=delta).logits[:, 5], model(idx).logits[:, 5])
    for bad, words in (({64: 1.0}, "no concept 64"), ({0: float("nan")}, "finite")):
        with pytest.raises(ValueError, match=words):
            model.generate(idx, 1, steer=bad)
    with pytest.raises(ValueError, match="mix='none'"):
        small("none").generate(idx, 1, steer={0: 1.0})


@pytest.mark.parametrize("changes,words", [({"insert_layer": 4}, "insert_layer=4"), ({"insert_layer": -1}, "insert_layer"), ({"k_concepts": 65}, "k_concepts"),
                                           ({"n_head": 5}, "n_embd=32"), ({"mix": "stir"}, "stir"), ({"insertion": "stir"}, "stir"),
                                           ({"mix": "pause", "insertion": "add"}, "insertion='add'"), ({"n_layer": 0}, "below 1")])
def test_impossible_models_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        CoCoMixConfig(**{**SMALL, **changes})


def test_model_refuses_long_inputs_and_labels_without_concepts():
    with pytest.raises(ValueError, match="block_size=16"):
        small()(tokens(1, T + 1))
    with pytest.raises(ValueError, match="mix='none'"):
        small("none")(tokens(1, T), concept_labels=tokens(1, T, 4))
    with pytest.raises(ValueError, match="empty"):
        small().generate(tokens(1, 0), 1)


def test_bf16_autocast_keeps_concepts_in_fp32_and_stays_close():
    model, idx = small(scale=2.0), tokens(2, T)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(idx, idx, tokens(2, T, 4) % 64)
    out.loss.backward()
    assert out.concept_logits.dtype == torch.float32 and all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert (out.logits.float() - model(idx).logits).abs().max() < 0.1 * model(idx).logits.std()


# ---- weights of other codes ------------------------------------------------------------------------------------------

def hf_names(model, prefix):
    """A model's tensors under Hugging Face's names and in its layout, with the buffers old files carry."""
    tensors = {}
    for name, p in model.state_dict().items():
        if name != "concept_max":
            turned = re.search(r"(c_attn|c_proj|c_fc|compress_layer)\.weight", name)
            tensors[prefix + name] = (p.T if turned else p).detach().contiguous()
    tensors[prefix + "h.0.attn.bias"] = torch.ones(1, 1, T, T)
    return {**tensors, "lm_head.weight": model.wte.weight.detach()} if prefix else tensors


def write_safetensors(path, tensors):
    """By the format's description: length, JSON header, data."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, t in tensors.items():
        raw = t.numpy().astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("mix", ["none", "concept"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_load_hf_gives_back_the_model(tmp_path, mix, prefix, suffix):
    model, path = small(mix, n_head=2), tmp_path / f"model{suffix}"
    tensors = hf_names(model, prefix)
    write_safetensors(path, tensors) if suffix == ".safetensors" else torch.save(tensors, path)
    loaded = cocomix_module.load_hf(path, model.config)
    assert torch.equal(loaded(tokens(2, T)).logits, model(tokens(2, T)).logits)


def test_load_hf_infers_sizes_and_names_what_is_wrong(tmp_path):
    model, path = CoCoMix(CoCoMixConfig(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=128, mix="none")), tmp_path / "m.safetensors"
    tensors = hf_names(model, "")
    write_safetensors(path, tensors)
    loaded = cocomix_module.load_hf(path)
    assert loaded.config.n_head == 2 and torch.equal(loaded(tokens(1, 8) % 50).logits, model(tokens(1, 8) % 50).logits)
    whole = path.read_bytes()
    for content in (whole[:-5], whole[:40], b"", b"nonsense, and more of it"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="download it again"):
            cocomix_module.load_hf(path)
    del tensors["ln_f.bias"]
    tensors |= {"extra": torch.ones(2), "h.1.ln_1.weight": torch.ones(7)}
    write_safetensors(path, tensors)
    with pytest.raises(ValueError, match=r"ln_f.bias is missing; extra is left over; h.1.ln_1.weight is \(7,\), not \(128,\)"):
        cocomix_module.load_hf(path)
    with pytest.raises(ValueError, match="n_layer is 2 in the file, 4 in config"):
        cocomix_module.load_hf(path, CoCoMixConfig(**{**SMALL, "mix": "none"}))
    write_safetensors(path, hf_names(small(), "transformer."))
    with pytest.raises(ValueError, match="does not say its n_head, insert_layer and k_concepts"):
        cocomix_module.load_hf(path)
    write_safetensors(path, {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="holds no GPT-2"):
        cocomix_module.load_hf(path)
    with pytest.raises(ValueError, match="is no file"):
        cocomix_module.load_hf(tmp_path)


def test_load_hf_is_transformers_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_positions=T, n_embd=128, n_layer=3, n_head=2, attn_implementation="eager")
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
        want = theirs(tokens(2, T)).logits
    theirs.save_pretrained(tmp_path)
    assert torch.allclose(cocomix_module.load_hf(tmp_path / "model.safetensors")(tokens(2, T)).logits, want, atol=1e-4)


# ---- concept labels --------------------------------------------------------------------------------------------------

def teacher_and_sae(seed=0, n_latents=96, k=8):
    teacher = small("none", seed=seed, n_layer=3, scale=6.0).eval()
    torch.manual_seed(seed + 1)
    sae = TopKSAE(D, n_latents, k)
    with torch.no_grad():
        sae.pre_bias.normal_(0, 0.1), sae.latent_bias.normal_(0, 0.1)
    return teacher, sae.eval()


def test_attribution_is_the_slope_of_the_teachers_loss():
    (teacher, sae), idx, targets, layer, eps = teacher_and_sae(), tokens(1, 9), tokens(1, 9, seed=1), 1, 0.02
    scores, indices = attribution(teacher, sae, idx, targets, layer)
    assert all(p.grad is None for p in (*teacher.parameters(), *sae.parameters()))
    with torch.no_grad():
        r = residual(teacher, idx, layer)
        values, again = sae.encode(r)
        for t in range(9):
            for j in range(sae.k):
                step = torch.zeros_like(r)
                step[0, t] = values[0, t, j] * sae.decoder[again[0, t, j]]
                slope = (loss_from(teacher, r + eps * step, targets, layer) - loss_from(teacher, r - eps * step, targets, layer)) / (2 * eps)
                assert scores[0, t, j].item() == pytest.approx(slope.item(), abs=3e-3, rel=2e-2)
    assert scores.abs().max() > 0.1  # not a comparison of zeros


def dense_labels(teacher, sae, idx, targets, layer, n, rank_by):
    """The definition: full backward through the whole teacher, every one of the C latents scored."""
    kept = {}
    handle = teacher.h[layer].register_forward_hook(lambda module, args, out: kept.update(r=out) or out.retain_grad())
    logits = teacher(idx).logits
    handle.remove()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1).backward()
    with torch.no_grad():
        r, g = kept["r"], kept["r"].grad
        pre = ((r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-5) - sae.pre_bias) @ sae.encoder.T + sae.latent_bias
        a = torch.zeros_like(pre).scatter(-1, pre.topk(sae.k)[1], pre.topk(sae.k)[0].relu())
        s = a if rank_by == "activation" else (g @ sae.decoder.T) * a * {"attribution": 1, "negative": -1, "absolute": 1}[rank_by]
        s = s.abs() if rank_by == "absolute" else s
    best, at = s.topk(n)
    return at.masked_fill(best <= 0, -1)


@pytest.mark.parametrize("rank_by", ["attribution", "negative", "absolute", "activation"])
def test_efficient_labels_are_the_dense_definition(rank_by):
    (teacher, sae), idx, targets = teacher_and_sae(), tokens(4, T), tokens(4, T, seed=1)
    targets[0, 3] = -1
    labels = concept_labels(teacher, sae, idx, targets, 1, 4, rank_by)
    assert torch.equal(labels, dense_labels(teacher, sae, idx, targets, 1, 4, rank_by))
    assert labels.dtype == torch.int64 and labels.shape == (4, T, 4) and (labels >= 0).any()
    ends_here = concept_labels(teacher, sae, idx, torch.where(torch.arange(T) == T - 1, -1, targets), 1, 4, rank_by)[:, -1]
    assert (ends_here == -1).all() == (rank_by != "activation")  # nothing after it: no gradient, no label


def test_labels_look_ahead_but_the_teacher_keeps_no_graph():
    teacher, sae = teacher_and_sae()
    idx, targets = tokens(1, T), tokens(1, T, seed=1)
    later = targets.clone()
    later[0, -4:] = (later[0, -4:] + 100) % V
    assert not torch.equal(concept_labels(teacher, sae, idx, targets, 1)[0, :8], concept_labels(teacher, sae, idx, later, 1)[0, :8])
    assert not concept_labels(teacher, sae, idx, targets, 1).requires_grad and all(p.grad is None for p in teacher.parameters())


def test_compiled_labels_are_the_same():
    """The parts that Labeler compiles, each as one graph: no break between teacher, chunked loss and its gradient."""
    teacher, sae = teacher_and_sae()
    idx = tokens(2, T)
    want = concept_labels(teacher, sae, idx, idx.roll(-1, 1), 1)
    parts = [torch.compile(part, backend="aot_eager", fullgraph=True) for part in sae_module.PARTS]
    assert torch.equal(concept_labels(teacher, sae, idx, idx.roll(-1, 1), 1, parts=parts), want) and (want >= 0).any()
    torch._dynamo.reset()


def test_a_compiled_step_is_one_graph_with_the_same_gradients():
    for mix in ("none", "pause", "concept", "distilled"):
        model, idx = small("none" if mix == "distilled" else mix), tokens(2, T)
        labels, grads = tokens(2, T, 4) % 64 if mix == "concept" else None, []
        step = Distilled(model, small("none", seed=1).requires_grad_(False), 1.0) if mix == "distilled" else model
        for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
            run(idx, idx.roll(-1, 1), labels, logits=False).loss.backward()
            grads.append([p.grad.clone() for p in model.parameters()])
            model.zero_grad()
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))
        torch._dynamo.reset()


def test_labeler_keeps_what_it_made():
    teacher, sae = teacher_and_sae()
    labeler, idx, targets = Labeler(teacher, sae, 1, keep=True), tokens(3, T), tokens(3, T, seed=1)
    first = labeler(idx, targets, [4, 8, 2])
    labeler.teacher = None  # a second call must not need it
    assert torch.equal(labeler(idx.flip(0), targets.flip(0), [2, 8, 4]), first.flip(0)) and (first == -1).any()


def test_kept_labels_are_exact_beyond_16_bits():
    teacher, sae = teacher_and_sae(n_latents=70_000)
    with torch.no_grad():
        sae.latent_bias[-200:] += 3  # the last latents are active ones
    labeler, idx, targets = Labeler(teacher, sae, 1, keep=True), tokens(2, T), tokens(2, T, seed=1)
    first = labeler(idx, targets, [0, 1])
    assert first.max() > 65_535 and torch.equal(labeler(idx, targets, [0, 1]), first)


def test_wrong_pairs_are_refused():
    teacher, sae = teacher_and_sae()
    idx = tokens(1, T)
    for arguments, words in (((teacher, TopKSAE(D + 1, 96, 8), idx, idx, 1), "width 33"), ((teacher, sae, idx, idx, 3), "layer=3"),
                             ((small(), sae, idx, idx, 1), "plain GPT"), ((teacher, sae, idx, idx, 1, 9), "n_labels=9"),
                             ((teacher, sae, idx, idx, 1, 4, "luck"), "luck")):
        with pytest.raises(ValueError, match=words):
            concept_labels(*arguments)


# ---- the SAE ---------------------------------------------------------------------------------------------------------

def test_sae_gradients_are_those_of_the_dense_form():
    torch.manual_seed(0)
    sae, x = TopKSAE(D, 96, 8, dead_after=5), torch.randn(3, 5, D) * 4 + 1
    with torch.no_grad():
        sae.pre_bias.normal_(0, 0.1), sae.latent_bias.normal_(0, 0.1), sae.encoder.normal_(0, 0.3)
        sae.idle[:40] = 6  # dead
    out = sae.train()(x)
    got = torch.autograd.grad(out.loss, list(sae.parameters()))
    r = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    pre = (r - sae.pre_bias) @ sae.encoder.T + sae.latent_bias
    a = pre.relu() * torch.zeros_like(pre).scatter(-1, pre.topk(8)[1], 1)
    error = r - (a @ sae.decoder + sae.pre_bias)
    dead = pre.masked_fill(torch.arange(96) >= 40, -1e9)
    a_dead = dead.relu() * torch.zeros_like(pre).scatter(-1, dead.topk(D // 2)[1], 1)
    aux = (error.detach() - a_dead @ sae.decoder).square().mean() / error.detach().square().mean()
    loss = error.square().mean() + aux / 32
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5) and out.aux_loss.item() == pytest.approx(aux.item(), rel=1e-5)
    for g, want in zip(got, torch.autograd.grad(loss, list(sae.parameters()))):
        assert torch.allclose(g, want, atol=1e-6, rtol=1e-4)
    flat = r.flatten(0, 1)
    assert out.fvu.item() == pytest.approx((error.square().sum() / (flat - flat.mean(0)).square().sum()).item(), rel=1e-5)
    scale = x.std(-1, keepdim=True)
    assert torch.allclose(out.reconstruction, (a @ sae.decoder + sae.pre_bias) * scale + x.mean(-1, keepdim=True), atol=1e-4)
    values, indices = sae.encode(x)
    assert torch.equal(values, out.values) and torch.equal(indices, out.indices) and (values >= 0).all() and values.shape == (3, 5, 8)
    assert torch.allclose(sae.decode(values, indices, x.mean(-1, keepdim=True), scale), out.reconstruction, atol=1e-5)


@pytest.mark.parametrize("aux_weight,revived", [(1 / 32, True), (0.0, False)])
def test_dead_latents_revive_through_the_auxiliary_loss_and_rows_stay_unit(aux_weight, revived):
    torch.manual_seed(0)
    features = F.normalize(torch.randn(40, D), dim=-1)
    sae = TopKSAE(D, 64, 4, aux_weight=aux_weight, dead_after=500).train()
    with torch.no_grad():
        sae.latent_bias[:32] = -2.0  # half of the latents start too low to win
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for step in range(400):
        x = (torch.rand(64, 40) * (torch.rand(64, 40) < 0.1)) @ features * 5 + 0.01 * torch.randn(64, D)
        out = sae(x)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sae.after_step(out)
        assert torch.allclose(sae.decoder.norm(dim=-1), torch.ones(64), atol=1e-5)
        if step == 20:
            assert sae.dead_fraction() > 0.3
    assert (sae.dead_fraction() < 0.25) == revived


def test_idle_counts_tokens_since_each_latent_fired():
    sae = TopKSAE(D, 6, 2, dead_after=7)

    def step(values, indices):
        sae.after_step(SAEOutput(None, torch.tensor(values), torch.tensor(indices), None, None, None))
    step([[2.0, 1.0], [1.0, 0.0]], [[0, 1], [0, 2]])  # latent 2 was chosen, but with activation 0
    step([[1.0, 1.0]] * 6, [[1, 3]] * 6)
    assert sae.idle.tolist() == [6, 0, 8, 0, 8, 8] and sae.dead_fraction() == 0.5


def test_openai_sae_files(tmp_path):
    """A file with OpenAI's keys, against their formulas written out: normalise, encode, TopK, ReLU, decode, rescale."""
    torch.manual_seed(0)
    D_t, C, k, x = 24, 96, 6, torch.randn(3, 5, 24) * 3 + 1
    theirs = {"pre_bias": torch.randn(D_t), "encoder.weight": torch.randn(C, D_t), "latent_bias": torch.randn(C), "decoder.weight": torch.randn(D_t, C),
              "stats_last_nonzero": torch.zeros(C), "activation": "TopK", "activation_state_dict": {"k": k, "postact_fn": "ReLU"}}
    torch.save(theirs, tmp_path / "5.pt")
    sae = load_openai(tmp_path / "5.pt").eval()
    mu, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    pre = ((x - mu) / (std + 1e-5) - theirs["pre_bias"]) @ theirs["encoder.weight"].T + theirs["latent_bias"]
    top = pre.topk(k)
    latents = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    assert torch.allclose(sae(x).reconstruction, (latents @ theirs["decoder.weight"].T + theirs["pre_bias"]) * std + mu, atol=1e-4)
    for change, words in (({"activation": "ReLU"}, "'ReLU'"), ({"pre_bias": torch.zeros(7)}, "do not fit"), (None, "latent_bias missing")):
        torch.save({**theirs, **change} if change else {k: v for k, v in theirs.items() if k != "latent_bias"}, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=words):
            load_openai(tmp_path / "bad.pt")
    (tmp_path / "bad.pt").write_bytes(b"PK cut")
    with pytest.raises(ValueError, match="download it again"):
        load_openai(tmp_path / "bad.pt")
    with pytest.raises(FileNotFoundError, match="sae.py"):
        load_openai(tmp_path / "none.pt")


# ---- data ------------------------------------------------------------------------------------------------------------

def write_shard(path, ids, magic=20240520, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(ids) if count is None else count
    Path(path).write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())


def numbered(folder, sizes, T=4, vocab=50257):
    """Shards whose tokens count up, so that each window names itself by its first token."""
    folder.mkdir(exist_ok=True)
    start = 0
    for i, size in enumerate(sizes):
        write_shard(folder / f"x_train_{i:06d}.bin", range(start, start + size))
        start += size
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "gpt2", "vocab_size": vocab}))
    return folder


def test_every_window_comes_once_an_epoch_over_all_ranks(tmp_path):
    windows = Windows(numbered(tmp_path / "d", [53, 4, 27]), "train", 4, seed=3)
    assert len(windows) == 15  # 10 + 0 + 5: no window spans two shards
    starts = {5 * i for i in range(10)} | {57 + 5 * i for i in range(5)}
    streams = {}
    for rows, world in ((3, 1), (1, 3), (5, 1), (2, 2)):
        seen = []
        for step in range(60 // (rows * world)):
            for rank in range(world):
                idx, targets = Windows(tmp_path / "d", "train", 4, seed=3).batch(step, rows, rank, world)  # a fresh loader: no state
                assert torch.equal(idx[:, 1:], targets[:, :-1]) and torch.equal(targets, idx + 1)
                seen += idx[:, 0].tolist()
        for epoch in range(4):
            assert set(seen[15 * epoch:15 * epoch + 15]) == starts
        streams[rows, world] = seen
    assert streams[3, 1] == streams[1, 3] == streams[5, 1] == streams[2, 2]
    assert streams[3, 1][:15] != streams[3, 1][15:30] and streams[3, 1][:15] != sorted(starts)
    assert Windows(tmp_path / "d", "train", 4, seed=4).batch(0, 15)[0][:, 0].tolist() != streams[3, 1][:15]


def test_the_fixed_set_is_shared_out_among_any_number_of_ranks(tmp_path):
    windows = Windows(numbered(tmp_path / "d", [53, 4, 27]), "train", 4)
    for world in (1, 2, 3, 7):
        shares = [windows.fixed(25, rank, world, rows=2) for rank in range(world)]
        assert all(torch.equal(w, windows.window(n)) for _, batches in shares for numbers, batch in batches for n, w in zip(numbers, batch, strict=True))
        firsts = sorted(w[0].item() for count, batches in shares for _, batch in batches for w in batch)
        assert all(count == 6 for count, _ in shares) and firsts == sorted(windows.window(i * 15 // 6)[0].item() for i in range(6))


def test_shard_formats(tmp_path):
    write_shard(tmp_path / "fineweb_train_000001.bin", [1, 2, 60000])
    assert open_shard(tmp_path / "fineweb_train_000001.bin").tolist() == [1, 2, 60000]
    np.arange(700, dtype="<u2").tofile(tmp_path / "train.bin")  # nanoGPT: no header
    assert open_shard(tmp_path / "train.bin").tolist() == list(range(700))
    np.arange(9, dtype="<u2").tofile(tmp_path / "val.bin")
    assert sorted(Windows(tmp_path, "val", 2).batch(0, 3)[0][:, 0].tolist()) == [0, 3, 6]
    assert Windows(tmp_path, "val", 2).meta == {"tokenizer": "gpt2", "vocab_size": 50257}


@pytest.mark.parametrize("name,make,words", [
    ("train_0.bin", lambda p: write_shard(p, range(9), count=10), "truncated"),
    ("train_0.bin", lambda p: write_shard(p, range(9), magic=20240801), "no token shard"),
    ("train.bin", lambda p: write_shard(p, range(9), magic=7), "no token shard"),
    ("train_0.bin", lambda p: np.arange(900, dtype="<u2").tofile(p), "no token shard"),
    ("train_0.bin", lambda p: write_shard(p, []), "no tokens"),
    ("train.bin", lambda p: p.write_bytes(b""), "no tokens"),
    ("train.bin", lambda p: p.write_bytes(b"odd"), "truncated"),
    ("train_0.bin", lambda p: write_shard(p, range(4)), "too few"),
    ("val_0.bin", lambda p: write_shard(p, range(9)), "python data.py")])
def test_bad_data_is_refused(tmp_path, name, make, words):
    make(tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        Windows(tmp_path, "train", 4)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(ValueError, match="token .* beyond its vocabulary of 20"):
        Windows(numbered(tmp_path / "d", [40], vocab=20), "train", 4).batch(0, 8)
    (tmp_path / "d" / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match="meta.json is damaged"):
        Windows(tmp_path / "d", "train", 4)


def test_text_in_pieces_tokenises_like_the_whole(tmp_path):
    """With GPT-2's own splitting pattern, and merges that a cut in the wrong place would miss."""
    merges = [b"  ", b"\n\n", b" a", b"ab", b"\n ", b"    ", b"\r\n"]
    encoding = tiktoken.Encoding("x", pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", special_tokens={},
                                 mergeable_ranks={**{bytes([i]): i for i in range(256)}, **{m: 256 + i for i, m in enumerate(merges)}})
    rng = np.random.default_rng(0)
    for trial in range(30):
        text = "".join(rng.choice(["a", "ab", " ", "  ", "\n", "\n\n", "\r\n", "é", "1", "'s", ".", "\t", "\u2028"], 300))
        (tmp_path / "t.txt").write_bytes(text.encode())
        pieces = list(read_pieces(tmp_path / "t.txt", 7))
        assert "".join(pieces) == text and len(pieces) > 5
        assert sum((encoding.encode_ordinary(p) for p in pieces), []) == encoding.encode_ordinary(text)


def test_the_small_vocabulary_is_gpt2s_without_its_later_merges(monkeypatch):
    """Against byte pair encoding by hand: join the pair of lowest rank until no pair has one below 4,095."""
    ranks = {bytes([i]): i for i in range(256)}
    letters = [bytes([c]) for c in b"etaoinshrdlucmfwypvbgkjqxz,.-' \n"]
    for pair in sorted(((a + b) for a in letters for b in letters), reverse=True) + sorted(a + b + c for a in letters for b in letters for c in letters[:9]):
        ranks.setdefault(pair, len(ranks))
    gpt2 = tiktoken.Encoding("gpt2", pat_str=r" ?\p{L}+|\s+|[^\s\p{L}]+", special_tokens={"<|endoftext|>": len(ranks)}, mergeable_ranks=ranks)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: gpt2)
    small, text = get_tokenizer("gpt2-4k"), "the cat sat on the mat, \nand then-what? ünlike others"
    assert len(ranks) > 4200 and get_tokenizer("gpt2") is gpt2 and small.n_vocab == 4096 == data_module.VOCABULARIES["gpt2-4k"]
    expected = []
    for word in re.findall(r" ?[^\W\d_]+|\s+|[^\s\w]+", text):
        parts = [bytes([b]) for b in word.encode()]
        while len(parts) > 1:
            rank, i = min((ranks.get(parts[i] + parts[i + 1], 9999), i) for i in range(len(parts) - 1))
            if rank >= 4095:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        expected += [ranks[p] for p in parts]
    assert small.encode_ordinary(text) == expected != gpt2.encode_ordinary(text) and small.decode(expected) == text
    assert small.eot_token == 4095 and small.encode("<|endoftext|>", allowed_special="all") == [4095]
    with pytest.raises(ValueError, match="none of byte, gpt2-4k, gpt2"):
        get_tokenizer("gpt3")


def test_prepare_writes_every_byte_of_every_document_once(tmp_path):
    source = tmp_path / "text"
    for i in range(20):
        (source / f"d{i % 3}").mkdir(parents=True, exist_ok=True)
        (source / f"d{i % 3}" / f"{i}.txt").write_text(f"document {i} ümlaut\r\n" * (i + 1))
    (source / "image.bin").write_bytes(b"\0\1\2")
    out = prepare(DataSettings(str(source), str(tmp_path / "out"), shard_tokens=1000, val_fraction=0.2), quiet=True)
    ids = {split: np.concatenate([open_shard(p) for p in sorted(out.glob(f"{split}_*.bin"))]) for split in ("train", "val")}
    assert len(list(out.glob("train_*.bin"))) > 1 and all(p.stat().st_size <= 1024 + 2000 for p in out.glob("*.bin"))
    documents = [bytes(d.astype(np.uint8)) for split in ids.values() for d in np.split(split, np.flatnonzero(split == 256) + 1)[:-1] for d in [d[:-1]]]
    assert sorted(documents) == sorted(p.read_bytes() for p in source.rglob("*.txt")) and (ids["val"] == 256).sum() == 4
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["train_tokens"], meta["val_tokens"]) == ("byte", 257, len(ids["train"]), len(ids["val"]))
    before = (out / "train_000000.bin").stat().st_mtime_ns
    prepare(DataSettings(str(source), str(tmp_path / "out"), shard_tokens=1000, val_fraction=0.2), quiet=True)
    assert (out / "train_000000.bin").stat().st_mtime_ns == before  # reused
    (source / "new.txt").write_text("more")
    prepare(DataSettings(str(source), str(tmp_path / "out"), shard_tokens=1000, val_fraction=0.2), quiet=True)
    assert (out / "train_000000.bin").stat().st_mtime_ns != before  # made again


def test_the_default_corpus_is_the_standard_library_without_tests():
    root, paths = data_module.text_files("pystdlib")
    names = {p.relative_to(root).as_posix() for p in paths}
    assert {"argparse.py", "json/decoder.py"} <= names and paths == sorted(paths)
    assert not any(re.search(r"(^|/)(site-packages|tests?)/", n) for n in names) and sum(p.stat().st_size for p in paths) > 5e6


def test_prepare_leaves_what_is_not_its_own_and_keeps_the_old_when_it_fails(tmp_path):
    (tmp_path / "t.txt").write_text("some words " * 500)
    write_shard(tmp_path / "fineweb_train_000001.bin", range(9))
    with pytest.raises(ValueError, match="did not write"):
        prepare(DataSettings(str(tmp_path / "t.txt"), str(tmp_path)), quiet=True)
    out = prepare(DataSettings(str(tmp_path / "t.txt"), str(tmp_path / "o")), quiet=True)
    (tmp_path / "u.txt").write_text("other words " * 500)
    with pytest.raises(ValueError, match="t.txt: name another folder"):
        prepare(DataSettings(str(tmp_path / "u.txt"), str(tmp_path / "o")), quiet=True)
    before = (out / "train_000000.bin").read_bytes()
    (tmp_path / "t.txt").write_text("ab")
    with pytest.raises(ValueError, match="too short"):
        prepare(DataSettings(str(tmp_path / "t.txt"), str(tmp_path / "o")), quiet=True)
    assert (out / "train_000000.bin").read_bytes() == before and len(Windows(out, "train", 4)) > 1000
    resource = pytest.importorskip("resource")
    (tmp_path / "t.txt").write_text("other text " * 50_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # as on a full disk
    try:
        with pytest.raises(OSError, match="could not write"):
            prepare(DataSettings(str(tmp_path / "t.txt"), str(tmp_path / "o")), quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out / "train_000000.bin").read_bytes() == before and not list(out.glob("*.tmp"))
    assert prepare(DataSettings(str(tmp_path / "t.txt"), str(tmp_path / "o")), quiet=True) == out
    os.utime(tmp_path / "t.txt", (1, 2_000_000_000))  # same size, edited later: made again
    made = (out / "train_000000.bin").stat().st_mtime_ns
    prepare(DataSettings(str(tmp_path / "t.txt"), str(tmp_path / "o")), quiet=True)
    assert (out / "train_000000.bin").stat().st_mtime_ns != made


def test_one_file_is_split_at_its_end_and_at_separators(tmp_path):
    (tmp_path / "t.txt").write_text("<|endoftext|>".join(f"story {i} " + "word " * 30 for i in range(200)) + "<|endoftext|>")
    out = prepare(DataSettings(str(tmp_path / "t.txt"), str(tmp_path / "o"), val_fraction=0.1), quiet=True)
    train_ids, val_ids = open_shard(out / "train_000000.bin"), open_shard(out / "val_000000.bin")
    assert (train_ids == 256).sum() + (val_ids == 256).sum() == 200 and val_ids[-1] == 256 and val_ids[-2] != 256
    assert 0.05 < len(val_ids) / (len(train_ids) + len(val_ids)) < 0.15
    encoding = get_tokenizer("byte")
    assert encoding.n_vocab == 257 and encoding.decode(train_ids[:8].tolist()) == "story 0 " and encoding.encode_ordinary("<|endoftext|>")[0] == ord("<")
    (tmp_path / "split").mkdir()  # what is split already stays so
    for name in ("train", "val"):
        (tmp_path / "split" / f"{name}.txt").write_text(name)
    out = prepare(DataSettings(str(tmp_path / "split"), str(tmp_path / "s"), val_fraction=0.9), quiet=True)
    assert [encoding.decode(open_shard(out / f"{name}_000000.bin")[:-1].tolist()) for name in ("train", "val")] == ["train", "val"]
    for bad, words in (("nowhere", "python data.py pystdlib"), (str(tmp_path / "empty"), "no text")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            prepare(DataSettings(bad), quiet=True)

# ---- downloads -------------------------------------------------------------------------------------------------------

class Origin(http.server.BaseHTTPRequestHandler):
    """A file server on the loopback interface: ranges and ETags, and failures on demand."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range")))
        content = server.files.get(self.path)
        problem = server.problems.pop(0) if server.problems else None
        if content is None or isinstance(problem, int):
            self.send_response(problem or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        begin, etag = 0, f'"{hashlib.sha256(content).hexdigest()}"'
        if server.ranges and "Range" in self.headers and self.headers.get("If-Range") == etag:
            begin = int(re.match(r"bytes=(\d+)-$", self.headers["Range"])[1])
            if begin >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(206 if begin else 200)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(content) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if problem == "drop":
            self.wfile.write(content[begin:begin + len(content) // 3])
            self.close_connection = True
        else:
            self.wfile.write(content[begin:])


@pytest.fixture
def origin(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Origin)
    server.files, server.problems, server.asked, server.ranges = {}, [], [], True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.base = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("COCOMIX_MIRROR", server.base)
    monkeypatch.setenv("no_proxy", "*")
    yield server
    server.shutdown()
    server.server_close()


URL, BLOB = "https://host.org/a/b.bin", np.random.default_rng(0).bytes(300_000)


def test_fetch_goes_on_where_the_connection_dropped(origin, tmp_path, capsys):
    origin.files["/host.org/a/b.bin"], origin.problems = BLOB, [503, "drop", 429, "drop"]
    path = fetch(URL, tmp_path / "new" / "b.bin", hashlib.sha256(BLOB).hexdigest(), wait=0.01)
    assert path.read_bytes() == BLOB and [r for _, r in origin.asked] == [None, None, "bytes=100000-", "bytes=100000-", "bytes=200000-"]
    assert [p.name for p in path.parent.iterdir()] == ["b.bin"] and hashlib.sha256(BLOB).hexdigest() in capsys.readouterr().out
    assert fetch(URL, path) == path and len(origin.asked) == 5  # it is there


def test_fetch_goes_on_in_another_call_unless_the_file_has_changed(origin, tmp_path):
    origin.files["/host.org/a/b.bin"], origin.problems = BLOB, ["drop"] + [500] * 3
    with pytest.raises(OSError, match="500.*3 times without progress"):
        fetch(URL, tmp_path / "b.bin", attempts=3, wait=0.01)
    assert not (tmp_path / "b.bin").exists() and (tmp_path / "b.bin.part").stat().st_size == 100_000
    origin.files["/host.org/a/b.bin"] = changed = BLOB[::-1]
    origin.problems = ["drop"] + [500] * 3  # the changed file comes from its beginning
    with pytest.raises(OSError, match="without progress"):
        fetch(URL, tmp_path / "b.bin", attempts=3, wait=0.01)
    assert (tmp_path / "b.bin.part").read_bytes() == changed[:100_000]
    origin.asked.clear()
    assert fetch(URL, tmp_path / "b.bin", wait=0.01).read_bytes() == changed and origin.asked[0][1] == "bytes=100000-"
    (tmp_path / "b.bin").rename(tmp_path / "c.bin.part")  # stopped between the last byte and the name
    (tmp_path / "c.bin.part.tag").write_text(f'"{hashlib.sha256(changed).hexdigest()}"')
    assert fetch(URL, tmp_path / "c.bin", wait=0.01).read_bytes() == changed


def test_failed_downloads_say_why_and_leave_no_file(origin, tmp_path, monkeypatch):
    origin.files["/host.org/a/b.bin"] = BLOB
    with pytest.raises(ValueError, match="SHA-256 is .* not 00ff"):
        fetch(URL, tmp_path / "b.bin", "00ff")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="404.*by hand"):
        fetch("https://host.org/none", tmp_path / "b.bin")
    origin.ranges, origin.problems = False, ["drop"] * 9  # it can never go on
    with pytest.raises(OSError, match="dropped at 100,000 of 300,000 bytes, 3 times without"):
        fetch(URL, tmp_path / "b.bin", attempts=3, wait=0.01)
    monkeypatch.setenv("COCOMIX_MIRROR", "http://127.0.0.1:9/closed")
    with pytest.raises(OSError, match="127.0.0.1:9/closed/host.org.*connection failed.*2 times without progress"):
        fetch(URL, tmp_path / "b.bin", attempts=2, wait=0.01)
    monkeypatch.setenv("COCOMIX_MIRROR", "host/base")
    with pytest.raises(ValueError, match="write it as http"):
        fetch(URL, tmp_path / "b.bin")
    monkeypatch.setenv("COCOMIX_MIRROR", origin.base)
    origin.files["/host.org/a/empty"] = b""
    with pytest.raises(OSError, match="0 of 0 bytes"):
        fetch("https://host.org/a/empty", tmp_path / "b.bin", attempts=1)
    monkeypatch.delenv("COCOMIX_MIRROR")
    with pytest.raises(OSError, match="nowhere.invalid.*Check the network"):
        fetch("http://nowhere.invalid/x", tmp_path / "b.bin", attempts=1)
    monkeypatch.setenv("COCOMIX_MIRROR", origin.base)
    resource, origin.problems, origin.ranges = pytest.importorskip("resource"), [], True
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, limits[1]))  # as on a full disk
    try:
        with pytest.raises(OSError, match="could not write .*free some space"):
            fetch(URL, tmp_path / "b.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not (tmp_path / "b.bin").exists()
    assert fetch(URL, tmp_path / "b.bin", hashlib.sha256(BLOB).hexdigest()).read_bytes() == BLOB


def openwebtext_tar(documents, per_archive, extra=()):
    """Documents as Skylion007/openwebtext packs them: a tar of .xz files, each a tar.xz of .txt files."""
    outer = io.BytesIO()

    def add(tar, name, content):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with tarfile.open(fileobj=outer, mode="w") as tar:
        for n in range(0, len(documents), per_archive):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w:xz", format=tarfile.GNU_FORMAT) as small_tar:
                folder = tarfile.TarInfo("folder")
                folder.type = tarfile.DIRTYPE
                small_tar.addfile(folder)
                for i, text in enumerate(documents[n:n + per_archive]):
                    add(small_tar, f"{'long' * 40 * (i == 1)}{n + i:07d}-hash.txt", text.encode())  # a name beyond 100 characters
            add(tar, f"openwebtext/urlsf_subset00-{n}_data.xz", inner.getvalue())
        for name, content in extra:
            add(tar, name, content)
    return outer.getvalue()


def test_openwebtext_is_split_by_document_hash_and_goes_on_after_whole_archives(origin, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "get_tokenizer", lambda name, real=data_module.get_tokenizer: real("byte"))  # no BPE files here
    texts = [f"  document {i} " + "words and more " * (i % 7) + f"\n\n\n\n\nend {i}\n" for i in range(200)]
    clean = [re.sub("\n\n\n+", "\n\n", t).strip() for t in texts]
    base = "/huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/urlsf_subset%02d.tar"
    origin.files[base % 0] = openwebtext_tar(texts[:120], 32, extra=[("openwebtext/README", b"not an archive")])
    origin.files[base % 1] = whole = openwebtext_tar(texts[120:], 40)
    want = {"train": b"", "val": b""}
    for text in clean:
        held_out = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2 ** 64 < 0.2
        want["val" if held_out else "train"] += text.encode() + b"|"
    made = DataSettings("openwebtext", str(tmp_path / "o"), val_fraction=0.2, shards=2, shard_tokens=1500)
    origin.files[base % 1] = whole[:700]  # damaged
    keep = data_module.ShardWriter.keep
    monkeypatch.setattr(data_module.ShardWriter, "keep", lambda self: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        prepare(made, quiet=True)
    assert (tmp_path / "o" / "urlsf_subset00.tar").exists()  # not removed before its tokens are kept
    monkeypatch.setattr(data_module.ShardWriter, "keep", keep)
    with pytest.raises(ValueError, match="subset01.tar is damaged"):
        prepare(made, quiet=True)
    assert not list((tmp_path / "o").glob("*.bin")) and not (tmp_path / "o" / "urlsf_subset00.tar").exists()
    (tmp_path / "o" / "urlsf_subset01.tar").unlink()
    origin.files[base % 1] = whole
    origin.asked.clear()
    out = prepare(made, quiet=True)
    assert [path[-6:] for path, _ in origin.asked] == ["01.tar"]  # the first one's shards were kept
    for split, content in want.items():
        shards = [open_shard(p) for p in sorted(out.glob(f"{split}_*.bin"))]
        assert bytes(np.where(np.concatenate(shards) == 256, ord("|"), np.concatenate(shards)).astype(np.uint8)) == content
        assert all(len(s) <= 1500 for s in shards) and json.loads((out / "meta.json").read_text())[split + "_tokens"] == len(content)
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".bin") == ["meta.json"] and len(list(out.glob("train*"))) > 3


def test_fineweb_shards_are_downloaded_as_they_are(origin, tmp_path, monkeypatch):
    base = "/huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
    for n in range(3):
        name = f"fineweb_{'train' if n else 'val'}_{n:06d}.bin"
        write_shard(tmp_path / name, range(100 * n, 100 * n + 50))
        origin.files[base + name] = (tmp_path / name).read_bytes()
    monkeypatch.setattr(data_module, "get_tokenizer", None)  # tokens need no tokenizer
    with pytest.raises(ValueError, match="SHA-256"):  # the published validation shard is another one
        prepare(DataSettings("fineweb", str(tmp_path / "o"), shards=2), quiet=True)
    monkeypatch.setattr(data_module, "SHA256", {"https:/" + base + "fineweb_val_000000.bin": hashlib.sha256(origin.files[base + "fineweb_val_000000.bin"]).hexdigest()})
    out = prepare(DataSettings("fineweb", str(tmp_path / "o"), shards=1), quiet=True)
    origin.asked.clear()
    prepare(DataSettings("fineweb", str(tmp_path / "o"), shards=2), quiet=True)  # more of them: only the new one comes
    assert [path[-8:] for path, _ in origin.asked] == ["0002.bin"]
    data, val = Windows(out, "train", 9), Windows(out, "val", 9)
    assert len(data) == 10 and data.window(5)[0] == 200 and val.window(0)[0] == 0 and data.meta["vocab_size"] == 50257
    for other, words in ((DataSettings("fineweb", str(tmp_path / "o"), shards=1), "more than --shards 1"),  # the second would still be read
                         (DataSettings("fineweb100B", str(tmp_path / "o"), shards=2), "shards of fineweb:")):  # its files have the same names
        with pytest.raises(ValueError, match=words):
            prepare(other, quiet=True)
    monkeypatch.chdir(tmp_path)
    missing = origin.files.pop(base + "fineweb_train_000002.bin")
    with pytest.raises(FileNotFoundError):
        prepare(DataSettings("fineweb", shards=2), quiet=True)
    origin.files[base + "fineweb_train_000002.bin"] = missing
    data_module.make_if_known("data/fineweb", quiet=True)  # what train.py does: it goes on with the two shards asked for, not with all
    assert len(Windows("data/fineweb", "train", 9)) == 10 and not Path("data/fineweb/progress.json").exists()
    origin.asked.clear()
    data_module.make_if_known("data/fineweb", quiet=True)
    assert not origin.asked
    third = "/huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_train_000003.bin"
    origin.files[third] = b"<html>sorry</html>" * 100  # a server's excuse does not stay as a shard
    with pytest.raises(ValueError, match="no token shard"):
        prepare(DataSettings("fineweb", str(tmp_path / "o"), shards=3), quiet=True)
    origin.files[third] = origin.files[base + "fineweb_train_000002.bin"]
    assert len(Windows(prepare(DataSettings("fineweb", str(tmp_path / "o"), shards=3), quiet=True), "train", 9)) == 15
    assert DataSettings("fineweb_sample.txt").tokenizer == "byte"  # a file of such a name is a file
    for wrong, words in ((dict(tokenizer="byte"), "GPT-2 tokens"), (dict(shards=104), "between 1 and 103")):
        with pytest.raises(ValueError, match=words):
            DataSettings("fineweb", **wrong)


def test_shakespeare_comes_from_its_url(origin, tmp_path, monkeypatch):
    monkeypatch.setenv("COCOMIX_CACHE", str(tmp_path / "cache"))
    origin.files["/raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"] = text = b"To be, or not to be. " * 100
    out = prepare(DataSettings("shakespeare", str(tmp_path / "o")), quiet=True)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["train_tokens"] + meta["val_tokens"] == len(text) + 1 and abs(meta["val_tokens"] / len(text) - 0.1) < 0.06 and meta["tokenizer"] == "byte"
    with pytest.raises(FileNotFoundError, match="did you mean openwebtext"):
        prepare(DataSettings("openwebtex"))


# ---- files and command lines -----------------------------------------------------------------------------------------

def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, "model", step=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # as on a full disk: the write itself fails
    try:
        with pytest.raises(OSError, match="could not write .*ckpt.pt"):
            save_checkpoint(path, "model", step=2, model={"w": torch.randn(500_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(path, "model")["step"] == 1 and os.listdir(tmp_path) == ["ckpt.pt"]
    with pytest.raises(OSError, match="--out"):
        save_checkpoint(path / "below_a_file" / "ckpt.pt", "model")


def test_bad_checkpoints_are_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(FileNotFoundError, match="python train.py"):
        load_checkpoint(path, "model")
    model = small()
    save_checkpoint(path, "model", config=model.config.__dict__, model=model.state_dict())
    assert torch.equal(CoCoMix.from_checkpoint(load_checkpoint(path, "model"))(tokens(1, T)).logits, model(tokens(1, T)).logits)
    whole = path.read_bytes()
    for content, words in ((whole[:len(whole) // 2], "damaged"), (b"", "damaged"), (b"hello", "damaged")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            load_checkpoint(path, "model")
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not written by this project"):
        load_checkpoint(path, "model")
    save_checkpoint(path, "sae")
    with pytest.raises(ValueError, match="kind 'sae'"):
        load_checkpoint(path, "model")
    for ckpt in ({"config": {**SMALL, "insert_layer": 9}, "model": {}}, {"config": {**SMALL, "colour": 1}, "model": {}},
                 {"config": {**SMALL, "n_embd": 64}, "model": model.state_dict()}):
        with pytest.raises(ValueError):
            CoCoMix.from_checkpoint(ckpt)


@dataclass(frozen=True)
class Toy:
    """Toy settings."""
    lr: float = 0.5  # rate, 100% explained
    steps: int = 3  # how many
    kind: Literal["a", "b"] = "a"  # which
    fast: bool = False  # quickly
    batch_tokens: int = 8  # size

    def __post_init__(self):
        if self.steps > 99:
            raise ValueError(f"--steps {self.steps} is too many: take 99")


def test_command_line(capsys):
    assert parse(Toy, ["--lr=1", "--kind", "b", "--fast", "--batch-tokens", "4"]) == Toy(1.0, 3, "b", True, 4)
    presets = {"big": {"steps": 50, "fast": True}, "small": {}}
    assert parse(Toy, [], presets=presets, preset="small") == Toy()
    assert parse(Toy, ["--preset", "big", "--steps", "7"], presets=presets, preset="small") == Toy(steps=7, fast=True)
    assert parse(Toy, ["--preset=big", "--no-fast"], presets=presets, preset="small") == Toy(steps=50)
    for argv, words in ((["--stpes", "3"], "did you mean --steps?"), (["--step", "3"], "did you mean --steps?"), (["--steps", "x"], "invalid int"),
                        (["--kind", "c"], "invalid choice"), (["--steps", "100"], "take 99"), (["--preset", "huge"], "invalid choice")):
        with pytest.raises(SystemExit) as stop:
            parse(Toy, argv, presets=presets, preset="small")
        assert stop.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(Toy, ["--help"])
    text = capsys.readouterr().out
    assert "100% explained" in text and "default: 0.5" in text


@pytest.mark.parametrize("name,sizes,training,parameters", [  # layers, width, heads, NTP's width, insertion | lr, min lr, warm-up, steps, tokens a step
    ("69m", (8, 512, 8, 624, 3), (6e-4, 6e-5, 130, 40_000, 524_288), (68.3e6, 69.4e6)), ("386m", (24, 1024, 16, 1072, 5), (3e-4, 3e-5, 130, 40_000, 524_288), (389e6, 387e6)),
    ("1.4b", (24, 2048, 16, 2096, 5), (2e-4, 2e-5, 65, 20_000, 1_048_576), (1.38e9, 1.38e9))])
def test_presets_are_the_papers(name, sizes, training, parameters):
    ours, ntp, pause, kd = (parse(TrainSettings, ["--preset", name, *mode], presets=PRESETS, preset="tiny")
                            for mode in ([], ["--mode", "ntp"], ["--mode=pause"], ["--mode=kd"]))
    assert (ours.n_layer, ours.n_embd, ours.n_head, ntp.n_embd, ours.insert_layer) == sizes and pause.n_embd == ours.n_embd
    for s in (ours, ntp, pause):
        assert (s.lr, pytest.approx(s.min_lr), s.warmup, s.steps, s.batch_tokens) == training and (s.weight_decay, s.beta1, s.beta2, s.grad_clip) == (0.1, 0.9, 0.95, 1.0)
        assert s.block_size == 1024 and s.data == "data/openwebtext" and s.batch_tokens % (8 * s.micro_batch * 1024) == 0
    assert (ours.mode, ours.teacher, ours.sae, ours.sae_layer, ours.concept_weight, ours.k_concepts, ours.n_labels) == ("cocomix", "gpt2", "openai", 5, 0.1, 32, 4)
    assert (ntp.mode, ntp.teacher, ntp.sae) == ("ntp", "", "") and len({ours.out, ntp.out, pause.out, kd.out}) == 4
    assert (kd.mode, kd.teacher, kd.sae, kd.n_embd, kd.lr) == ("kd", "gpt2", "", ntp.n_embd, ntp.lr)
    assert parse(TrainSettings, ["--preset", name, "--mode", "ntp", "--n_embd", "96"], presets=PRESETS, preset="tiny").n_embd == 96  # a flag is stronger
    counts = []
    for s, extra in ((ours, dict(insert_layer=s.insert_layer, n_concepts=32768)), (ntp, dict(mix="none"))):
        with torch.device("meta"):
            model = CoCoMix(CoCoMixConfig(n_layer=s.n_layer, n_head=s.n_head, n_embd=s.n_embd, vocab_multiple=s.vocab_multiple, **extra))
        assert len(model.wte.weight) == 50304
        counts.append(model.num_parameters() - (model.compress_layer.weight.numel() if s is ours else 0))
    assert counts == pytest.approx(parameters, rel=0.02) and abs(counts[0] / counts[1] - 1) < 0.03


def test_flags_that_repeat_or_stand_alone():
    @dataclass(frozen=True)
    class Many:
        """Many."""
        steer: tuple[str, ...] = ()  # repeatable
        inspect: Optional[int] = None  # may stand alone
    assert parse(Many, []) == Many() and parse(Many, ["--inspect"]) == Many(inspect=-1)
    assert parse(Many, ["--steer", "17=+8", "--inspect", "3", "--steer=4=-2"]) == Many(("17=+8", "4=-2"), 3)
    assert parse(Many, ["--steer", "17=+8", "4=-2", "--inspect", "3", "--steer=1=1"]) == Many(("17=+8", "4=-2", "1=1"), 3)


@pytest.mark.parametrize("argv,words", [(["--mode", "cocomix"], "--teacher"), (["--mode", "ntp", "--sae", "x"], "no --teacher or --sae"),
                                        (["--batch_tokens", "1000"], "take 896"), (["--steps", "0"], "at least 1"), (["--lr", "-1"], "--lr"),
                                        (["--insert_layer", "6"], "take 0 to 5"), (["--sae_layer", "6"], "take 0 to 5"), (["--micro_batch", "-4"], "0 or more"),
                                        (["--k_concepts", "3"], "--n_labels 4"), (["--n_concepts", "9"], "--n_concepts 9"),
                                        (["--mode", "kd"], "--mode kd needs --teacher"), (["--mode", "kd", "--teacher", "x", "--sae", "y"], "takes no --sae"),
                                        (["--insertion", "add"], "--insertion add"), (["--kd_weight", "-1"], "0 or more"), (["--seed", "-1"], "0 or more")])
def test_impossible_training_settings_are_refused(argv, words, capsys):
    with pytest.raises(SystemExit):
        parse(TrainSettings, argv, presets=PRESETS, preset="tiny")
    assert words in capsys.readouterr().err


def test_log_begins_with_the_checkpoints_records(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 5}\n{"step": 11, "cut sho')
    log = Log(tmp_path / "log.jsonl", [{"step": 0}, {"step": 5}])
    log.write({"step": 7})
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [0, 5, 7]
    assert log.records == [{"step": 0}, {"step": 5}, {"step": 7}]


# ---- training --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    words = "the cat sat on a mat while two dogs ran far from every house".split()
    rng = np.random.default_rng(0)
    (folder / "t.txt").write_text("\n".join(" ".join(rng.choice(words, 9)) + "." for _ in range(900)))
    return prepare(DataSettings(str(folder / "t.txt"), str(folder / "data")), quiet=True)


def settings(corpus, out, **changes):
    return TrainSettings(**{**dict(mode="ntp", data=str(corpus), out=str(out), n_layer=3, n_head=2, n_embd=D, block_size=T, insert_layer=1, k_concepts=4,
                                   steps=12, batch_tokens=8 * T, warmup=3, eval_interval=6, eval_tokens=20 * T, log_interval=1, save_interval=5, device="cpu"), **changes})


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A teacher and its SAE, on disk: (folder, command-line flags of a student that learns from them)."""
    out = tmp_path_factory.mktemp("trained")
    teacher, _ = train(settings(corpus, out / "ntp", steps=80), World("cpu"))
    teacher.requires_grad_(False)
    sae, figures = train_sae(SAESettings(teacher="x", data=str(corpus), out=str(out / "sae"), layer=1, n_latents=64, k=4, steps=60, batch_tokens=8 * T,
                                         lr=3e-3, dead_after=2000, eval_tokens=20 * T, log_interval=5), teacher.eval(), World("cpu"))
    assert figures["fvu"] < 0.6 and figures["spliced_loss"] > figures["teacher_loss"] - 0.01
    return out


def command(corpus, out, trained=None, **changes):
    """The arguments of a train.py run with `settings`."""
    if trained:
        changes = {"mode": "cocomix", "teacher": str(trained / "ntp" / "ckpt.pt"), "sae": str(trained / "sae" / "ckpt.pt"), **changes}
    flags = {k: v for k, v in settings(corpus, out, **changes).__dict__.items() if v != TrainSettings.__dataclass_fields__[k].default}
    return [w for k, v in flags.items() for w in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]


def launch(arguments, script="train.py", processes=1, wait=True, cwd=None):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    process = subprocess.Popen([*start, str(HERE / script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    if wait:
        process.output = process.communicate(timeout=120)[0]
    return process


def weights(out):
    return load_checkpoint(Path(out) / "ckpt.pt", "model")["model"]


def lines(out, *keys):
    return [tuple(json.loads(line).get(k) for k in keys) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uncut(corpus, trained, tmp_path_factory):
    """The folder of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("uncut")
    assert launch(command(corpus, out, trained, steps=120, save_interval=7)).returncode == 0
    return out


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_resumes_bit_for_bit(corpus, trained, uncut, tmp_path, how):
    arguments = command(corpus, tmp_path / "cut", trained, steps=120, save_interval=7)
    process = launch(arguments, wait=False)
    deadline = time.time() + 60
    while time.time() < deadline and not ((tmp_path / "cut" / "log.jsonl").is_file() and len(lines(tmp_path / "cut", "step")) > 15):
        time.sleep(0.005)
    process.send_signal(how)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == (-9 if how == signal.SIGKILL else 128 + how), output
    at = load_checkpoint(tmp_path / "cut" / "ckpt.pt", "model")["step"]
    assert 7 <= at < 120 and (at % 7 == 0 or how != signal.SIGKILL) and (how == signal.SIGKILL or "--resume" in output)
    if how == signal.SIGTERM:
        refused = launch(arguments)
        assert refused.returncode == 1 and "--resume" in refused.output and "Traceback" not in refused.output
    resumed = launch([*arguments, "--resume"])
    assert resumed.returncode == 0 and f"from step {at}" in resumed.output, resumed.output
    a, b = weights(tmp_path / "cut"), weights(uncut)
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert lines(tmp_path / "cut", "step", "ntp_loss", "concept_loss", "val_loss", "lr", "grad_norm") == \
        lines(uncut, "step", "ntp_loss", "concept_loss", "val_loss", "lr", "grad_norm")


def test_two_ranks_stop_together_on_sigterm_and_go_on(corpus, tmp_path):
    arguments = command(corpus, tmp_path / "o", steps=3000, save_interval=5000, eval_interval=5000)
    process = launch(arguments, processes=2, wait=False)
    deadline = time.time() + 60
    while time.time() < deadline and not ((tmp_path / "o" / "log.jsonl").is_file() and len(lines(tmp_path / "o", "step")) > 15):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    output = process.communicate(timeout=60)[0]
    assert "stopped after step" in output, output
    at = load_checkpoint(tmp_path / "o" / "ckpt.pt", "model")["step"]
    assert 0 < at < 3000
    resumed = launch([*command(corpus, tmp_path / "o", steps=at + 2, save_interval=5000, eval_interval=5000), "--resume"], processes=2)
    assert resumed.returncode == 0 and lines(tmp_path / "o", "step")[-1] == (at + 2,), resumed.output


def test_two_processes_are_one_process(corpus, trained, tmp_path):
    """8 rows a step as 2 ranks x 2 rows x 2 accumulated, as 1 x 2 x 4, and as 1 x 8 x 1: one run, up to rounding."""
    for name, processes, micro in (("two", 2, 2), ("one", 1, 2), ("plain", 1, 0)):
        done = launch(command(corpus, tmp_path / name, trained, micro_batch=micro, concept_weight=1.0), processes=processes)
        assert done.returncode == 0, done.output
        assert name != "two" or "2 processes x 2 rows x 16 tokens x 2 accumulated" in done.output
    a, b, c = (weights(tmp_path / name) for name in ("two", "one", "plain"))
    for k in c:
        assert torch.allclose(a[k], c[k], atol=2e-5) and torch.allclose(b[k], c[k], atol=2e-5), k
    keys = ("step", "ntp_loss", "concept_loss", "val_loss", "grad_norm")
    for name in ("two", "one"):
        for got, want in zip(lines(tmp_path / name, *keys), lines(tmp_path / "plain", *keys)):
            assert all(g == w if w is None else g == pytest.approx(w, rel=1e-3) for g, w in zip(got, want, strict=True))


def test_sae_training_on_two_processes_is_that_on_one(corpus, trained, tmp_path):
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = launch(["--teacher", str(trained / "ntp" / "ckpt.pt"), "--data", str(corpus), "--out", str(out), "--layer", "1", "--n-latents", "64", "--k", "4",
                       "--steps", "20", "--batch-tokens", str(8 * T), "--dead-after", "300", "--aux-weight", "0", "--device", "cpu"], "sae.py", processes)
        assert done.returncode == 0 and "variance unexplained" in done.output, done.output
        found[processes] = load_checkpoint(out / "ckpt.pt", "sae")
    for k, want in found[1]["sae"].items():
        assert torch.allclose(found[2]["sae"][k].float(), want.float(), atol=1e-4), k
    assert found[1]["figures"] == pytest.approx(found[2]["figures"], rel=1e-3)


def test_sae_resumes_bit_for_bit(corpus, trained, tmp_path):
    teacher = CoCoMix.from_checkpoint(load_checkpoint(trained / "ntp" / "ckpt.pt", "model")).eval().requires_grad_(False)
    base = SAESettings(teacher="x", data=str(corpus), out=str(tmp_path / "a"), layer=1, n_latents=64, k=4, steps=20, batch_tokens=8 * T, dead_after=300, save_interval=8)
    whole, _ = train_sae(base, teacher, World("cpu"))

    class Cut(Exception):
        pass

    def cut(*_, calls=[0]):
        calls[0] += 1
        if calls[0] == 13:
            raise Cut
        return keep(*_)
    keep, Windows.batch = Windows.batch, cut
    try:
        with pytest.raises(Cut):
            train_sae(replace(base, out=str(tmp_path / "b")), teacher, World("cpu"))
    finally:
        Windows.batch = keep
    resumed, _ = train_sae(replace(base, out=str(tmp_path / "b")), teacher, World("cpu"), resume=True)
    assert all(torch.equal(p, q) for p, q in zip(whole.state_dict().values(), resumed.state_dict().values()))
    with pytest.raises(ValueError, match="lr"):
        train_sae(replace(base, lr=1.0), teacher, World("cpu"), resume=True)


def test_evaluations_are_plain_means(corpus, trained):
    """Validation loss, FVU and spliced loss over the fixed windows, against one window at a time."""
    teacher = CoCoMix.from_checkpoint(load_checkpoint(trained / "ntp" / "ckpt.pt", "model")).eval()
    ckpt = load_checkpoint(trained / "sae" / "ckpt.pt", "sae")
    sae, val = TopKSAE.from_checkpoint(ckpt).eval(), Windows(corpus, "val", T)
    chosen = [val.window(i * len(val) // 20) for i in range(20)]
    with torch.no_grad():
        losses = [F.cross_entropy(teacher(w[None, :-1]).logits[0], w[1:]).item() for w in chosen]
        spliced, n, n_hat = [], [], []
        for w in chosen:
            def splice(module, args, r):
                x = sae(r[:, 1:])
                n.append(standardise(r[:, 1:])[0][0]), n_hat.append(sae.decode(*sae.encode(r[:, 1:]))[0])
                return torch.cat([r[:, :1], x.reconstruction], 1)
            handle = teacher.h[1].register_forward_hook(splice)
            spliced.append(F.cross_entropy(teacher(w[None, :-1]).logits[0], w[1:]).item())
            handle.remove()
    n, n_hat = torch.cat(n), torch.cat(n_hat)
    want = {"fvu": ((n - n_hat).square().sum() / (n - n.mean(0)).square().sum()).item(), "teacher_loss": np.mean(losses), "spliced_loss": np.mean(spliced)}
    assert evaluate_sae(teacher, sae, 1, val, 20 * T, World("cpu")) == pytest.approx(want, rel=1e-4)
    assert evaluate(teacher, val, settings(corpus, "x"), World("cpu")) == pytest.approx(np.mean(losses), rel=1e-5)
    assert lines(trained / "ntp", "val_loss")[-1][0] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_model_overfits_a_few_windows():
    torch.manual_seed(0)
    model, idx, targets = CoCoMix(CoCoMixConfig(**SMALL)), tokens(4, T), tokens(4, T, seed=1)
    labels = tokens(4, T, 1, seed=2) % 64
    optimizer = model.configure_optimizer(3e-3, weight_decay=0.0)
    for _ in range(150):
        out = model(idx, targets, labels)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert out.ntp_loss < 0.1 and out.concept_loss < 1.0


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(corpus, tmp_path):
    base = settings(corpus, tmp_path / "out", steps=10, save_interval=5)
    train(base, World("cpu"))
    good = weights(tmp_path / "out")
    with pytest.raises(FloatingPointError, match="--lr"):
        train(replace(base, steps=20, lr=1e30, min_lr=1e30, warmup=0, grad_clip=0.0), World("cpu"))
    assert all(torch.equal(v, good[k]) for k, v in weights(tmp_path / "out").items())


def test_training_refuses_what_does_not_fit(corpus, trained, tmp_path):
    teacher, sae = trained / "ntp" / "ckpt.pt", trained / "sae" / "ckpt.pt"
    other, _ = train(settings(corpus, tmp_path / "other", steps=1, seed=1), World("cpu"))
    numbered(tmp_path / "words", [400], vocab=500)
    (tmp_path / "words" / "val_0.bin").write_bytes((tmp_path / "words" / "x_train_000000.bin").read_bytes())
    for changes, words in ((dict(micro_batch=3), "take"), (dict(block_size=32, batch_tokens=256), "teacher's 16"), (dict(data=str(tmp_path / "words")), "vocabulary"),
                           (dict(teacher=str(tmp_path / "other" / "ckpt.pt")), "another teacher"), (dict(sae=str(teacher)), "kind 'model'"),
                           (dict(teacher=str(tmp_path / "none.pt")), "no checkpoint file"), (dict(data=str(tmp_path / "nothing")), "python data.py"),
                           (dict(n_labels=5), "n_labels=5"), (dict(resume=True), "leave out --resume"), (dict(out=str(corpus / "meta.json" / "x")), "could not write")):
        arguments = command(corpus, changes.pop("out", tmp_path / "o"), trained, **changes)
        s = parse(TrainSettings, arguments, presets=PRESETS, preset="tiny")
        with pytest.raises((ValueError, OSError), match=words):
            train_module.single(s, World("cpu"))
    with pytest.raises(ValueError, match="n_embd|model"):
        train(settings(corpus, trained / "ntp", n_embd=64), World("cpu"), resume=True)
    sae_command = launch(["--data", str(corpus)], "sae.py")
    assert sae_command.returncode == 1 and "--teacher is missing" in sae_command.output and "Traceback" not in sae_command.output
    assert fingerprint(other) != load_checkpoint(sae, "sae")["identity"]["teacher"]


def test_a_student_learns_from_weights_of_other_codes(corpus, tmp_path, capsys):
    teacher = CoCoMix(CoCoMixConfig(block_size=T, vocab_size=V, n_layer=3, n_head=1, n_embd=64, mix="none"))
    write_safetensors(tmp_path / "model.safetensors", hf_names(teacher, ""))
    torch.save({"pre_bias": torch.zeros(64), "encoder.weight": torch.randn(80, 64), "latent_bias": torch.zeros(80), "decoder.weight": torch.randn(64, 80),
                "activation": "TopK", "activation_state_dict": {"k": 6}}, tmp_path / "1.pt")
    base = settings(corpus, tmp_path / "o", mode="cocomix", teacher=str(tmp_path / "model.safetensors"), sae=f"openai:{tmp_path / '1.pt'}", sae_layer=1)
    train_module.single(base, World("cpu"))
    assert "Likely the layer is wrong" in capsys.readouterr().out  # a random SAE explains nothing, and that is said
    ckpt = load_checkpoint(tmp_path / "o" / "ckpt.pt", "model")
    assert ckpt["identity"]["labels"]["teacher"] == fingerprint(teacher) and ckpt["config"]["n_concepts"] == 80
    with pytest.raises(ValueError, match="layer=7"):
        train_module.single(replace(base, sae_layer=7, out=str(tmp_path / "p")), World("cpu"))


def test_public_teacher_and_sae_are_downloaded_once(origin, corpus, tmp_path, monkeypatch, capsys):
    """--teacher gpt2 --sae openai, with small files of the same formats under the real addresses."""
    teacher, at = CoCoMix(CoCoMixConfig(block_size=T, vocab_size=V, n_layer=7, n_head=1, n_embd=64, mix="none")), "/huggingface.co/openai-community/gpt2/resolve/main/model.safetensors"
    write_safetensors(tmp_path / "model.safetensors", hf_names(teacher, ""))
    torch.save({"pre_bias": torch.zeros(64), "encoder.weight": torch.randn(80, 64), "latent_bias": torch.zeros(80), "decoder.weight": torch.randn(64, 80),
                "activation": "TopK", "activation_state_dict": {"k": 6}}, tmp_path / "5.pt")
    origin.files[at] = (tmp_path / "model.safetensors").read_bytes()
    origin.files["/openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small/resid_post_mlp_v5_32k/autoencoders/5.pt"] = (tmp_path / "5.pt").read_bytes()
    monkeypatch.setenv("COCOMIX_CACHE", str(tmp_path / "cache"))
    base = settings(corpus, tmp_path / "o", mode="cocomix", teacher="gpt2", sae="openai")
    with pytest.raises(ValueError, match="SHA-256"):  # it is not the published file
        train_module.single(base, World("cpu"))
    monkeypatch.setattr(sae_module, "GPT2", (sae_module.GPT2[0], hashlib.sha256(origin.files[at]).hexdigest()))
    train_module.single(base, World("cpu"))
    assert "5.pt: " in capsys.readouterr().out and len(origin.asked) == 3 and base.sae_layer == 5
    student = load_checkpoint(tmp_path / "o" / "ckpt.pt", "model")
    assert student["identity"]["labels"]["teacher"] == fingerprint(teacher) and student["identity"]["labels"]["layer"] == 5
    assert fingerprint(sae_module.load_teacher("gpt2", World("cpu"))) == fingerprint(teacher) and len(origin.asked) == 3
    sae_module.write_dictionary(sae_module.DescribeSettings(sae="openai", teacher="gpt2", data=str(corpus), tokens=20 * T, device="cpu"))
    cocomix_main(monkeypatch, tmp_path / "o" / "ckpt.pt", "--prompt", "the", "--inspect")
    assert "are ignored" in capsys.readouterr().out


def test_a_data_set_known_by_name_is_made_by_one_process_while_the_others_wait(origin, tmp_path, monkeypatch):
    origin.files["/raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"] = b"Speak the speech, I pray you. " * 3000
    monkeypatch.setenv("COCOMIX_CACHE", str(tmp_path / "cache"))
    done = launch(["--mode", "ntp", "--data", "data/shakespeare", "--out", str(tmp_path / "o"), "--steps", "2", "--eval-tokens", "256", "--device", "cpu"],
                  processes=2, cwd=tmp_path)
    assert done.returncode == 0 and len(origin.asked) == 1, done.output
    assert json.loads((tmp_path / "data" / "shakespeare" / "meta.json").read_text())["tokenizer"] == "byte"


def test_learning_rate_warms_up_from_above_zero_and_ends_at_its_minimum():
    s = TrainSettings(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(i, s) for i in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0 and rates[100] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and rates[55] == pytest.approx(0.55)


def test_tokens_to_reach_a_loss_are_interpolated():
    log = [{"tokens": t, "val_loss": v} for t, v in ((0, 5.0), (100, 3.0), (150, None), (200, 2.0))]
    assert tokens_to(2.5, log) == 150 and tokens_to(3.0, log) == 100 and tokens_to(1.9, log) is None and tokens_to(9.0, log) == 0


def test_the_whole_pipeline_shrunk(corpus, tmp_path, capsys):
    base = settings(corpus, tmp_path / "tiny", mode="all", n_concepts=64, sae_layer=1, sae_steps=15)
    pipeline(base, World("cpu"))
    first = capsys.readouterr().out
    for name in ("ntp", "sae", "cocomix", "cocomix_residual"):
        assert (tmp_path / "tiny" / name / "ckpt.pt").is_file() and (tmp_path / "tiny" / name / "log.jsonl").is_file()
    table = (tmp_path / "tiny" / "report.md").read_text()
    assert re.findall(r"^\| (\w[\w ]*?) \|", table, re.M) == ["run", "NTP", "CoCoMix", "CoCoMix residual"] and table.strip() in first
    record = json.loads((tmp_path / "tiny" / "cocomix" / "log.jsonl").read_text().splitlines()[-1])
    assert set(record) >= {"step", "tokens", "ntp_loss", "concept_loss", "val_loss", "lr", "grad_norm", "tok_per_s", "mfu", "seconds"}
    pipeline(base, World("cpu"))
    assert capsys.readouterr().out.count("reused") == 4
    pipeline(replace(base, concept_weight=0.7), World("cpu"))
    assert capsys.readouterr().out.count("reused") == 2  # teacher and SAE stay, both students are made again
    model = CoCoMix.from_checkpoint(load_checkpoint(tmp_path / "tiny" / "cocomix" / "ckpt.pt", "model"))
    val = Windows(corpus, "val", T)
    z = torch.cat([model(val.window(i * len(val) // 20)[None, :-1]).concept_logits for i in range(20)])
    assert model.config.concept_weight == 0.7 and torch.allclose(model.concept_max, z.amax((0, 1)), atol=1e-5)


def test_mode_all_goes_on_where_it_was_stopped(corpus, tmp_path, monkeypatch):
    """Stopped in the student and, another time, in the teacher's last evaluation; and a rebuild that fails leaves no mixture."""
    base, world = settings(corpus, tmp_path / "a", mode="all", n_concepts=64, sae_layer=1, sae_steps=15, save_interval=5), World("cpu")
    pipeline(replace(base, out=str(tmp_path / "whole")), world)
    asked, calls = Interrupt.asked, [0]

    def at(number):
        def ask(self):
            calls[0] += 1
            if calls[0] == number:
                self.number = signal.SIGTERM
            return asked(self)
        return ask
    for number, done in ((13, "ntp"), (15 + 7, "cocomix")):  # 12 steps and one last look; 15 steps of the SAE, then the student's 7th
        calls[0] = 0
        monkeypatch.setattr(Interrupt, "asked", at(number))
        with pytest.raises(SystemExit) as stop:
            pipeline(base, world)
        assert stop.value.code == 128 + signal.SIGTERM and (tmp_path / "a" / done / "ckpt.pt").is_file()
    monkeypatch.setattr(Interrupt, "asked", asked)
    assert load_checkpoint(tmp_path / "a" / "cocomix" / "ckpt.pt", "model")["step"] == 7
    pipeline(base, world)
    for name in ("cocomix", "cocomix_residual"):
        a, b = weights(tmp_path / "a" / name), weights(tmp_path / "whole" / name)
        assert all(torch.equal(a[k], b[k]) for k in b)
    table = compare({"NTP": {0: load_checkpoint(tmp_path / "a" / "ntp" / "ckpt.pt", "model")["log"]}}, "NTP")
    with pytest.raises(FloatingPointError):
        pipeline(replace(base, lr=1e30, min_lr=1e30, warmup=0, grad_clip=0.0), world)
    pipeline(base, world)
    assert compare({"NTP": {0: load_checkpoint(tmp_path / "a" / "ntp" / "ckpt.pt", "model")["log"]}}, "NTP") == table


# ---- distillation ----------------------------------------------------------------------------------------------------

def test_distillation_is_its_definition():
    """Losses and every gradient against full logits and autograd, with padded vocabularies, a longer teacher and chunks that do not divide."""
    student, targets = small("none", vocab_multiple=64), tokens(3, T, seed=1)
    teacher = small("none", seed=5, block_size=2 * T, n_layer=3, n_embd=24, vocab_multiple=32).requires_grad_(False)
    targets[0, :5] = -1
    out = Distilled(student, teacher, 0.7)(tokens(3, T), targets)
    out.loss.backward()
    got, idx = [p.grad.clone() for p in student.parameters()], tokens(3, T)
    student.zero_grad()
    ours, theirs = student(idx).logits, teacher(idx).logits
    ntp, q = F.cross_entropy(ours.flatten(0, 1), targets.flatten(), ignore_index=-1), theirs.softmax(-1)
    kl = (q * (q.log() - ours.log_softmax(-1))).sum(-1).mean()
    (ntp + 0.7 * kl).backward()
    assert out.ntp_loss.item() == pytest.approx(ntp.item(), rel=1e-5) and out.concept_loss.item() == pytest.approx(kl.item(), rel=1e-5)
    for a, p in zip(got, student.parameters()):
        assert torch.allclose(a, p.grad, atol=1e-4 * p.grad.abs().max().item())
    x, w, soft_x, soft_w = torch.randn(11, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True), torch.randn(11, 6), torch.randn(17, 6)
    whole = torch.autograd.grad(train_module.distillation(x, w, soft_x, soft_w), (x, w))
    parts = torch.autograd.grad(train_module.distillation(x, w, soft_x, soft_w, chunk=4), (x, w))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, parts)) and w.grad is None
    same = Distilled(student, student, 1.0)(idx, targets)
    assert abs(same.concept_loss.item()) < 1e-6  # a student that is its teacher has nothing to learn from it


def test_distillation_in_bf16_stands_a_teacher_whose_logits_lie_far_below_zero():
    """As GPT-2's do: at -100 bf16 rounds to halves. What is common to all tokens changes no distribution."""
    student, teacher, idx = small("none"), small("none", seed=5, scale=4.0).requires_grad_(False), tokens(8, T)
    teacher.ln_f.weight[0], teacher.ln_f.bias[0], teacher.wte.weight[:, 0] = 0.0, 1.0, -100.0
    assert -130 < teacher(idx).logits.mean() < -70
    want = Distilled(student, teacher, 1.0)(idx, idx).concept_loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        assert Distilled(student, teacher, 1.0)(idx, idx).concept_loss.item() == pytest.approx(want, rel=0.005)


def test_distillation_holds_no_logits():
    teacher, student, held, idx = small("none").requires_grad_(False), small("none", seed=1), [], tokens(8, T)

    def pack(x):
        held.append(x.shape)
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        Distilled(student, teacher, 1.0)(idx, idx)
    assert held and not any(8 * T * V <= math.prod(shape) for shape in held)


@pytest.mark.parametrize("processes", [1, 2])
def test_distillation_trains_resumes_and_is_the_same_on_two_processes(corpus, trained, tmp_path, processes):
    flags = dict(mode="kd", teacher=str(trained / "ntp" / "ckpt.pt"), kd_weight=2.0)
    if processes == 2:
        done = launch(command(corpus, tmp_path / "o", micro_batch=2, **flags), processes=2)
        assert done.returncode == 0 and "kl " in done.output, done.output
    else:
        for resume, steps in ((False, 7), (True, 12)):  # a schedule of 12 steps, left at the 7th
            stop = Interrupt.asked
            calls = iter(range(99))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Interrupt, "asked", lambda self: stop(self) if resume else setattr(self, "number", signal.SIGTERM * (next(calls) >= 6)) or stop(self))
                with suppress(SystemExit):
                    train_module.single(settings(corpus, tmp_path / "o", resume=resume, **flags), World("cpu"))
            assert load_checkpoint(tmp_path / "o" / "ckpt.pt", "model")["step"] == steps
    plain = tmp_path / "plain"
    train_module.single(settings(corpus, plain, **flags), World("cpu"))
    a, b = weights(tmp_path / "o"), weights(plain)
    assert all(torch.equal(a[k], b[k]) if processes == 1 else torch.allclose(a[k], b[k], atol=2e-5) for k in b)
    kl = [x for x, in lines(plain, "kd_loss") if x is not None]
    assert kl == pytest.approx([x for x, in lines(tmp_path / "o", "kd_loss") if x is not None], rel=1e-3) and len(kl) == 12 and kl[-1] < kl[0]
    assert load_checkpoint(plain / "ckpt.pt", "model")["config"]["mix"] == "none"  # what it leaves is a plain GPT


def test_distillation_refuses_teachers_that_do_not_fit(corpus, trained, tmp_path):
    numbered(tmp_path / "words", [400], vocab=500)
    (tmp_path / "words" / "val_0.bin").write_bytes((tmp_path / "words" / "x_train_000000.bin").read_bytes())
    flags = dict(mode="kd", teacher=str(trained / "ntp" / "ckpt.pt"))
    for changes, words in ((dict(data=str(tmp_path / "words")), "vocabulary has 257 tokens, the data's 500"), (dict(block_size=2 * T), "longer than the teacher's 16"),
                           (dict(teacher=str(trained / "sae" / "ckpt.pt")), "kind 'sae'"), (dict(teacher=str(tmp_path / "no.pt")), "no checkpoint file")):
        with pytest.raises((ValueError, OSError), match=words):
            train_module.single(settings(corpus, tmp_path / "o", **{**flags, **changes}), World("cpu"))
    assert not (tmp_path / "o").exists()
    pause = CoCoMix(CoCoMixConfig(**{**SMALL, "mix": "pause"}))
    with pytest.raises(ValueError, match="plain GPT"):
        train(settings(corpus, tmp_path / "o", **flags), World("cpu"), teacher=pause)
    train_module.single(settings(corpus, tmp_path / "o", **flags), World("cpu"))
    for changes, words in (({**flags, "kd_weight": 3.0}, "kd_weight"), (dict(mode="ntp"), "teacher, kd_weight")):
        with pytest.raises(ValueError, match=words):
            train_module.single(settings(corpus, tmp_path / "o", resume=True, **changes), World("cpu"))


# ---- reports ---------------------------------------------------------------------------------------------------------

def write_log(out, losses, seed=0, step_tokens=100, **changes):
    """A made-up run's log: validation losses at 0, 100, 200, ... tokens, a step each."""
    first = {"parameters": 1000, "flops_per_token": 50, "processes": 1, "tokenizer": "byte", "val_data": "ab",
             "settings": {"mode": "ntp", "lr": 1.0, "seed": seed, "out": str(out), "teacher": "", "sae": "", "block_size": 16, "eval_tokens": 64, "steps": len(losses) - 1, **changes}}
    Path(out).mkdir(parents=True)
    records = [{"step": i, "tokens": i * step_tokens, "val_loss": x, "seconds": 2.0 * i} for i, x in enumerate(losses)]
    records[0] |= first
    records.insert(1, {"step": 0, "tokens": 50, "ntp_loss": 9.0, "val_loss": None, "seconds": 1.0})
    (Path(out) / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def cells(text):
    return {row[0].strip("`"): row[1:] for row in ([c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| "))}


def test_a_report_on_made_up_logs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, end in enumerate((2.0, 2.2, 2.1)):
        write_log(f"out/ntp_{seed}", [5.0, 3.0, end], seed)
        write_log(f"out/mix_{seed}", [5.0, 2.5, end - (0.5, 0.3, 0.4)[seed]], seed, mode="cocomix", teacher="out/ntp_0/ckpt.pt")  # ahead by 0.4 on average
    write_log("out/worse", [5.0, 4.0, 3.0], mode="pause")
    write_log("out/other", [5.0, 2.0], seed=7, lr=2.0)  # no seed in common with the baseline
    report_runs(ReportSettings(("out/ntp_0/", "out/mix_0", "out/ntp_1", "out/mix_1", "out/mix_2", "out/ntp_2", "out/worse", "out/other")))
    found = cells(capsys.readouterr().out)
    assert list(found) == ["run", "ntp_*", "mix_*", "worse", "other"] and found["run"][-2] == "difference to `ntp_*`"
    assert found["ntp_*"] == ["3", "1,000", "200", "1.00e+04", "4 s", "2.1000 ± 0.1000", "-", "-"]
    half = 4.302652730 * 0.1 / math.sqrt(3)  # Student's t for two degrees of freedom, from a printed table
    assert found["mix_*"][5:7] == ["1.7000 ± 0.2000", f"-0.4000 [{-0.4 - half:+.4f}, {-0.4 + half:+.4f}]"]
    # from 2.5 at 100 tokens to 1.5, 1.9, 1.7 at 200: it is at 2.0, 2.2, 2.1 after 150 tokens, a quarter fewer
    assert found["mix_*"][7] == "25.0 ± 0.0 %" and found["worse"][6:] == ["+1.0000", "not reached"] and found["other"][6:] == ["-", "-"]
    report_runs(ReportSettings(("out/ntp_0", "out/worse", "out/mix_1", "out/mix_0"), baseline="out/worse"))
    found = cells(capsys.readouterr().out)
    assert found["ntp_0"][6:] == ["-1.0000", "50.0 %"] and found["worse"][6] == "-" and found["mix_*"][6] == "-1.5000 (1 of 2 seeds)"  # one pair: no interval
    write_log("out/late_1", [5.0, 4.0, 2.0, 1.9], 1, mode="late")  # reaches 2.2 after 190 of the baseline's 200 tokens, but never 2.0 less
    write_log("out/late_0", [5.0, 4.0, 3.0, 2.5], 0, mode="late")
    report_runs(ReportSettings(("out/ntp_0", "out/ntp_1", "out/late_0", "out/late_1")))
    assert cells(capsys.readouterr().out)["late_*"][7] == "5.0 % (1 of 2 seeds)"


def test_report_rows_have_names_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, (seed, lr) in enumerate(((0, 1.0), (1, 1.0), (0, 2.0), (1, 2.0))):
        write_log(f"out/run_{number}", [3.0, lr + seed], seed, lr=lr)
    report_runs(ReportSettings(tuple(f"out/run_{number}" for number in range(4)), baseline="out/run_3"))
    found = cells(capsys.readouterr().out)
    assert found["out/run_0, out/run_1"][6] == "-1.0000 [-1.0000, -1.0000]" and found["out/run_2, out/run_3"][6] == "-"
    write_log("here", [3.0, 2.0])
    report_runs(ReportSettings(("here", str(tmp_path / "out" / "run_2"))))  # a relative path and an absolute one
    assert list(cells(capsys.readouterr().out)) == ["run", "here", str(tmp_path / "out" / "run_2")]


def test_runs_of_several_seeds_with_their_own_teachers_are_one_row(tmp_path, capsys):
    for seed in (0, 1):
        folder = tmp_path / f"seed{seed}"
        write_log(folder / "cocomix", [3.0, 2.0], seed, mode="cocomix", teacher=str(folder / "ntp" / "ckpt.pt"), device="cpu" if seed else "cuda")
    write_log(tmp_path / "third", [3.0, 2.0], 2, mode="cocomix", teacher=str(tmp_path / "seed0" / "ntp" / "ckpt.pt"))
    report_runs(ReportSettings((str(tmp_path / "seed0" / "cocomix"), str(tmp_path / "seed1" / "cocomix"), str(tmp_path / "third"))))
    assert list(cells(capsys.readouterr().out))[1:] == ["seed*/cocomix", "third"]
    for seed, size in enumerate(("big", "small")):  # two teachers, not one of two seeds
        write_log(tmp_path / size / "mix", [3.0, 2.0], seed, mode="cocomix", teacher=str(tmp_path / size / "ntp" / "ckpt.pt"))
    report_runs(ReportSettings((str(tmp_path / "big" / "mix"), str(tmp_path / "small" / "mix"))))
    assert list(cells(capsys.readouterr().out))[1:] == ["big/mix", "small/mix"]
    write_log(tmp_path / "old", [3.0, 2.0], 0)  # written before some settings existed
    write_log(tmp_path / "new", [3.0, 2.0], 1, insertion="interleave", kd_weight=1.0)
    report_runs(ReportSettings((str(tmp_path / "old"), str(tmp_path / "new"))))
    assert len(cells(capsys.readouterr().out)) == 2


@pytest.mark.parametrize("df,t", [(1, 12.706205), (2, 4.302653), (4, 2.776445), (9, 2.262157), (100, 1.983972)])
def test_students_t_is_that_of_printed_tables(df, t):
    assert student_t(df) == pytest.approx(t, rel=1e-3)


def test_reports_refuse_what_they_cannot_compare(corpus, tmp_path, capsys):
    write_log(tmp_path / "a", [3.0, 2.0])
    log = (tmp_path / "a" / "log.jsonl").read_text()
    for name, text, words in (("empty", "", "is empty"), ("cut", log[:-9], "line 3 of .*cut.* is damaged"), ("list", "[1]\n" + log, "line 1"), ("binary", "\0\1", "line 1"),
                              ("settings", '{"step": 0, "tokens": 0, "seconds": 0, "settings": null}\n', "lacks"),
                              ("nan", log.replace("2.0", "NaN"), "line 3"), ("sae", '{"step": 5, "fvu": 0.1}\n{"step": 6, "loss": 0.1}\n', "lacks parameters"),
                              ("kinds", log.replace('"seed": 0', '"seed": [0]'), "lacks seed"), ("untimed", log.replace('"seconds": 0.0', '"s": 0'), "line 1"),
                              ("unfinished", log.rsplit("\n", 2)[0] + "\n", "at step 0 of 1.*--resume")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(text)
        with pytest.raises(ValueError, match=words):
            report_runs(ReportSettings((str(tmp_path / "a"), str(tmp_path / name))))
    for name, changes, words in (("bpe", {"tokenizer": "gpt2"}, "different tokenizers, byte and gpt2"), ("text", {"val_data": "cd"}, "validation texts"),
                                 ("window", {"block_size": 32}, "--block_size"), ("share", {"eval_tokens": 128}, "--eval_tokens")):
        write_log(tmp_path / name, [3.0, 2.0], 1)
        changed = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        (changed[0] if next(iter(changes)) in changed[0] else changed[0]["settings"]).update(changes)
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in changed))
        with pytest.raises(ValueError, match=words):
            report_runs(ReportSettings((str(tmp_path / "a"), str(tmp_path / name))))
    inside = " ".join(str(tmp_path / name) for name in ("a", "bpe", "cut"))  # and so on, but not the SAE's
    for argv, words in (((str(tmp_path / "nothing"),), "does not exist: name the --out"), ((str(tmp_path),), f"--report {inside}")):
        with pytest.raises(FileNotFoundError, match=re.escape(words)):
            report_runs(ReportSettings(argv))
    with pytest.raises(ValueError, match="--baseline out/x is none"):
        report_runs(ReportSettings((str(tmp_path / "a"),), baseline="out/x"))
    done = launch(["--report"])
    assert done.returncode == 2 and "expected at least one argument" in done.output
    # a real run's log is of the form that is read here
    train(settings(corpus, tmp_path / "real"), World("cpu"))
    report_runs(ReportSettings((str(tmp_path / "real"),)))
    end = json.loads((tmp_path / "real" / "log.jsonl").read_text().splitlines()[-1])
    assert cells(capsys.readouterr().out)[str(tmp_path / "real")][5] == f"{end['val_loss']:.4f}"


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for seed in (0, 1):
        write_log(tmp_path / f"a_{seed}", [3.0, 2.0 + seed, 1.5], seed)
    for name, begins in (("curves.PNG", b"\x89PNG"), ("curves.svg", b"<?xml")):
        report_runs(ReportSettings((str(tmp_path / "a_0"), str(tmp_path / "a_1")), plot=str(tmp_path / name)))
        assert (tmp_path / name).read_bytes().startswith(begins)


def test_plots_need_matplotlib_and_say_so(tmp_path, monkeypatch):
    write_log(tmp_path / "a", [3.0, 2.0, 1.5])
    write_log(tmp_path / "b", [3.0, 1.9, 1.4], 1)
    wanted = ReportSettings((str(tmp_path / "a"), str(tmp_path / "b")), plot=str(tmp_path / "curves.png"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        report_runs(wanted)
    drawn = []

    class Drawing:  # stands for matplotlib, its figures and axes, and notes what is drawn
        canvas = property(lambda self: self)

        def __getattr__(self, name):
            return lambda *args, **named: drawn.append((name, args, named)) or (self, self)

        def get_supported_filetypes(self):
            return {"png"}

        def savefig(self, path, **named):
            Path(path).write_bytes(b"picture")
            drawn.append(("savefig", named, {}))
    fake = types.ModuleType("matplotlib")
    fake.use, fake.pyplot = lambda name: None, Drawing()
    monkeypatch.setitem(sys.modules, "matplotlib", fake)
    with pytest.raises(ValueError, match="draws no .doc"):
        report_runs(replace(wanted, plot=str(tmp_path / "curves.doc")))
    drawn.clear()
    report_runs(wanted)
    assert (tmp_path / "curves.png").read_bytes() == b"picture" and [a for a in drawn if a[0] == "savefig"][0][1]["format"] == "png"
    lines_drawn = [args for name, args, _ in drawn if name == "plot"]
    assert lines_drawn == [([100, 200], [pytest.approx(1.95), pytest.approx(1.45)])]  # two seeds of one row: their mean
    assert [args for name, args, _ in drawn if name == "fill_between"] == [([100, 200], [1.9, 1.4], [2.0, 1.5])]


# ---- cached labels ---------------------------------------------------------------------------------------------------

@pytest.fixture
def labelled(corpus, trained, tmp_path):
    """A copy of the data with its cached labels, made by two processes."""
    folder = tmp_path / "data"
    shutil.copytree(corpus, folder)
    done = launch(["label", "--teacher", str(trained / "ntp" / "ckpt.pt"), "--sae", str(trained / "sae" / "ckpt.pt"), "--data", str(folder), "--batch-tokens", str(5 * T),
                   "--device", "cpu"], "sae.py", processes=2)
    assert done.returncode == 0 and "8 bytes a token" in done.output and not list(folder.glob("*tmp*")), done.output
    return folder


def test_training_on_cached_labels_is_training_on_live_ones(labelled, trained, tmp_path):
    """Bit for bit, through more than an epoch; the files hold what concept_labels gives; a run goes from one to the other; no teacher is loaded."""
    teacher = CoCoMix.from_checkpoint(load_checkpoint(trained / "ntp" / "ckpt.pt", "model")).eval().requires_grad_(False)
    sae = TopKSAE.from_checkpoint(load_checkpoint(trained / "sae" / "ckpt.pt", "sae")).eval()
    cached = sae_module.CachedLabels(labelled, T)
    for split in ("train", "val"):
        windows = Windows(labelled, split, T)
        for n in (0, 7, len(windows) - 1):
            w = windows.window(n)[None]
            assert torch.equal(cached.read(split, [n], torch.device("cpu")), concept_labels(teacher, sae, w[:, :-1], w[:, 1:].contiguous(), 1))
    assert (cached.read("train", list(range(50)), torch.device("cpu")) == -1).any() and cached.read("train", [0], torch.device("cpu")).max() < 64
    live = settings(labelled, tmp_path / "live", mode="cocomix", teacher=str(trained / "ntp" / "ckpt.pt"), sae=str(trained / "sae" / "ckpt.pt"), steps=40)
    train_module.single(live, World("cpu"))
    from_cache = settings(labelled, tmp_path / "cached", mode="cocomix", labels="cached", steps=40)
    hidden = [(p, p.with_suffix(".away")) for p in (trained / "ntp" / "ckpt.pt", trained / "sae" / "ckpt.pt")]
    for path, away in hidden:
        path.rename(away)
    try:
        train_module.single(replace(from_cache, save_interval=15), World("cpu"))
    finally:
        for path, away in hidden:
            away.rename(path)
    a, b = (load_checkpoint(tmp_path / name / "ckpt.pt", "model") for name in ("live", "cached"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]) and a["agreement"] == b["agreement"] and a["identity"] == b["identity"]
    train_module.single(replace(from_cache, out=live.out, teacher=live.teacher, sae=live.sae, resume=True, steps=45), World("cpu"))


def test_labelling_goes_on_where_it_was_stopped_and_refuses_what_does_not_fit(labelled, trained, tmp_path, monkeypatch):
    arguments = sae_module.LabelSettings(teacher=str(trained / "ntp" / "ckpt.pt"), sae=str(trained / "sae" / "ckpt.pt"), data=str(labelled), batch_tokens=5 * T, device="cpu")
    path, = labelled.glob("train.*.labels")
    want, name, calls = path.read_bytes(), path.name.split(".")[1], [0]
    path.unlink()
    val, whole = Labeler.val, Windows(labelled, "train", T)

    def stops(self, idx, *rest):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return val(self, idx, *rest)
    monkeypatch.setattr(Labeler, "val", stops)
    with pytest.raises(KeyboardInterrupt):
        sae_module.write_labels(arguments, World("cpu"))
    assert not path.exists()
    sae_module.write_labels(arguments, World("cpu"))
    assert path.read_bytes() == want and calls[0] - 4 == -(-(len(whole) - 15) // 5)  # three passes of 5 windows were kept
    path.rename(path.with_suffix(".labels.tmp"))  # killed between the file and its marks: none count
    path.with_suffix(".labels.tmp.done").write_bytes(b"")
    sae_module.write_labels(arguments, World("cpu"))
    assert path.read_bytes() == want
    calls[0] = 4
    sae_module.write_labels(replace(arguments, teacher=os.path.relpath(arguments.teacher)), World("cpu"))  # the same file by another name
    assert calls[0] == 4
    base = settings(labelled, tmp_path / "o", mode="cocomix", labels="cached")
    with pytest.raises(ValueError, match="--dtype bfloat16, the labels were made in float32"):
        train_module.single(replace(base, dtype="bfloat16"), World("cpu"))
    other, _ = train(settings(labelled, tmp_path / "other", steps=1, seed=1), World("cpu"))
    for changes, words in ((dict(teacher=str(tmp_path / "other" / "ckpt.pt")), "--teacher .*do not fit|do not fit.*--teacher"), (dict(teacher="gpt2"), "--teacher gpt2, the labels are of"),
                           (dict(n_labels=3), "--n_labels 3, the labels have 4"), (dict(rank_by="negative"), "rank_by"), (dict(block_size=32, batch_tokens=256), "made for block_size 16"),
                           (dict(labels_name="0123abcd"), "none"), (dict(data=str(trained.parent)), "no train shards")):
        with pytest.raises((ValueError, OSError), match=words):
            train_module.single(replace(base, **changes), World("cpu"))
    sae_module.write_labels(replace(arguments, rank_by="activation", n_labels=2), World("cpu"))
    with pytest.raises(ValueError, match="choose with --labels_name"):
        train_module.single(base, World("cpu"))
    assert sae_module.CachedLabels(labelled, T, name).n_labels == 4
    path.write_bytes(want[:-2])
    with pytest.raises(ValueError, match="bytes, not"):
        sae_module.CachedLabels(labelled, T, name)
    write_shard(labelled / "train_000001.bin", range(200))  # more text than was labelled
    path.write_bytes(want)
    with pytest.raises(ValueError, match="made for windows"):
        sae_module.CachedLabels(labelled, T, name)


# ---- reading and steering --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def student(corpus, trained, tmp_path_factory):
    """A trained student's checkpoint, with the concept dictionary of its SAE beside the SAE."""
    teacher = CoCoMix.from_checkpoint(load_checkpoint(trained / "ntp" / "ckpt.pt", "model")).eval().requires_grad_(False)
    sae, out = TopKSAE.from_checkpoint(load_checkpoint(trained / "sae" / "ckpt.pt", "sae")).eval(), tmp_path_factory.mktemp("student")
    train(settings(corpus, out, mode="cocomix", teacher=str(trained / "ntp" / "ckpt.pt"), sae=str(trained / "sae" / "ckpt.pt"), steps=60), World("cpu"),
          Labeler(teacher, sae, 1))
    done = launch(["describe", "--sae", str(trained / "sae" / "ckpt.pt"), "--teacher", str(trained / "ntp" / "ckpt.pt"), "--data", str(corpus),
                   "--snippets", "3", "--device", "cpu"], "sae.py")
    assert done.returncode == 0, done.output
    return out / "ckpt.pt"


def test_the_dictionary_is_what_a_brute_force_pass_finds(corpus, trained, student):
    teacher = CoCoMix.from_checkpoint(load_checkpoint(trained / "ntp" / "ckpt.pt", "model")).eval()
    sae, val = TopKSAE.from_checkpoint(load_checkpoint(trained / "sae" / "ckpt.pt", "sae")).eval(), Windows(corpus, "val", T)
    firings, text = {}, []
    for n in range(len(val)):
        ids = val.window(n).tolist()
        text += ids[1:]
        with torch.no_grad():
            values, indices = sae.encode(residual(teacher, torch.tensor([ids[:-1]]), 1))
        for t in range(1, T):
            for value, latent in zip(values[0, t].tolist(), indices[0, t].tolist()):
                if value > 0:
                    firings.setdefault(latent, []).append((value, n, t))
    entries = json.loads((trained / "sae" / "concepts.json").read_text())["concepts"]
    assert [e["id"] for e in entries] == list(range(64)) and sum(bool(e["snippets"]) for e in entries) > 20
    for e in entries:
        mine = sorted(firings.get(e["id"], []), key=lambda f: -f[0])
        assert e["rate"] == pytest.approx(len(mine) / (len(val) * (T - 1)), rel=1e-6) and e["max"] == pytest.approx(mine[0][0] if mine else 0, abs=1e-3)
        assert [s[3] for s in e["snippets"]] == pytest.approx([f[0] for f in mine[:3]], abs=1e-3)
        for (before, token, after, _), (value, n, t) in zip(e["snippets"], mine):
            if [f[0] for f in mine].count(value) == 1:
                ids = bytes(min(i, 255) for i in val.window(n).tolist()).decode()
                assert before + token + after == ids[max(0, t - 12):t + 13] and token == ids[t]
        if len(mine) < 64 and mine:  # the typical tokens, from all firings
            for key, offset in (("tokens", 0), ("next", 1)):
                ids = [val.window(n)[t + offset].item() for _, n, t in mine]
                scores = {i: ids.count(i) / len(ids) * np.log(ids.count(i) / len(ids) / (text.count(i) / len(text))) for i in set(ids)}
                got = [i for i, *_ in e[key]]
                assert [scores[i] for i in got] == pytest.approx(sorted((s for s in scores.values() if s > 0), reverse=True)[:6], abs=1e-4)
                assert all((share, lift) == pytest.approx((ids.count(i) / len(ids), ids.count(i) / len(ids) * len(text) / text.count(i)), rel=1e-2) and string == chr(i)
                           for i, string, share, lift in e[key] if i < 128)


def test_strongest_keeps_the_largest_of_a_long_stream():
    torch.manual_seed(0)
    strongest, all_values = Strongest(5), [[] for _ in range(5)]
    for batch in range(40):
        values, latents = torch.rand(90) + 0.01, torch.randint(0, 4, (90,))  # latent 4 never fires
        strongest.add(values, latents, 90 * batch + torch.arange(90))
        for i in range(90):
            all_values[latents[i]].append((values[i].item(), 90 * batch + i))
    for latent in range(5):
        want = sorted(all_values[latent], reverse=True)[:64]
        want += [(0.0, -1)] * (64 - len(want))
        assert list(zip(strongest.values[latent].tolist(), strongest.places[latent].tolist())) == want


def test_agreement_is_counted_as_by_hand(corpus, student, trained):
    ckpt, val = load_checkpoint(student, "model"), Windows(corpus, "val", T)
    model = CoCoMix.from_checkpoint(ckpt)
    teacher = CoCoMix.from_checkpoint(load_checkpoint(trained / "ntp" / "ckpt.pt", "model"))
    sae, hits, total, count = TopKSAE.from_checkpoint(load_checkpoint(trained / "sae" / "ckpt.pt", "sae")), 0, 0, {}
    for i in range(20):
        w = val.window(i * len(val) // 20)
        labels = concept_labels(teacher, sae, w[None, :-1], w[None, 1:], 1)[0].tolist()
        z = model(w[None, :-1]).concept_logits[0].tolist()
        for row, logits in zip(labels, z):
            row = [y for y in row if y >= 0]
            best = sorted(range(64), key=lambda c: -logits[c])[:4]
            hits, total = hits + len(set(row) & set(best)), total + 4 * bool(row)
            for y in row:
                count[y] = count.get(y, 0) + 1
    assert ckpt["agreement"] == pytest.approx({"precision": hits / total, "base_rate": sum(sorted(count.values())[-4:]) / total}, rel=1e-5)
    assert ckpt["agreement"]["precision"] > ckpt["agreement"]["base_rate"]


def test_the_steering_study_finds_a_planted_effect():
    model = small(n_layer=2, insert_layer=1, concept_residual=True, scale=1.0)
    with torch.no_grad():
        model.wte.weight.mul_(20)  # sharp predictions
        model.concept_max.fill_(1.0)
        model.concept_max[2] = -0.01  # the control is to shift its logit by as much all the same
        model.compress_layer.weight.mul_(0.01)
        model.compress_layer.weight[3] = 40 * model.wte.weight[7]  # concept 3 says token 7
        model.compress_layer.weight[4] = 40 * model.wte.weight[9]  # concept 4 says token 9
    says = {3: [7, "x", 0.9, 9.0], 4: [9, "y", 0.8, 9.0], 5: [9, "y", 0.7, 9.0], 2: [11, "z", 0.6, 9.0]}
    entries = [{"id": c, "rate": 0.5, "tokens": [], "next": [says.get(c, [12, "w", 0.05, 2.0]), [100, "v", 0.05, 2.0]]} for c in range(8)]
    table = steering_study(model, tokens(6, 4), entries, tokens=5, concepts=2, strengths=(-8, 0, 8))
    assert table[0][0] == table[0][3] < 0.2 and table[0][1:3] == (0, 0)
    assert table[8][0] > 0.9 and table[8][3] < 0.5 and table[-8][0] < 0.2 and table[8][1] == pytest.approx(table[8][0] - table[0][0])
    three = steering_study(model, tokens(6, 4), entries, tokens=5, concepts=3, strengths=(8,))  # concept 2, not 5: 9 is taken; and 2 says nothing
    assert three[8][0] == pytest.approx(2 / 3, abs=0.1) and three[8][2] > 0.2
    with pytest.raises(ValueError, match="more text"):
        steering_study(model, tokens(1, 4), [{**e, "rate": 0.0} for e in entries])


def cocomix_main(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["cocomix.py", *map(str, argv), "--device", "cpu"])
    cocomix_module.main()


def test_generating_inspecting_and_steering_from_the_command_line(student, monkeypatch, capsys):
    cocomix_main(monkeypatch, student, "--prompt", "a <|endoftext|>", "--tokens", 30, "--no-slide")
    assert len(capsys.readouterr().out.rstrip("\n")) == 17  # the prompt is 15 tokens of plain text, the block ends at 16
    cocomix_main(monkeypatch, student, "--prompt", "the", "--tokens", 40, "--seed", 3)
    shown, encoding = capsys.readouterr(), get_tokenizer("byte")
    model = CoCoMix.from_checkpoint(load_checkpoint(student, "model"))
    idx = torch.tensor([encoding.encode_ordinary("the")])
    want = encoding.decode(model.generate(idx, 40, 0.8, 50, generator=torch.Generator().manual_seed(3))[0].tolist())
    assert shown.out == want + "\n" and "tokens/s" in shown.err
    cocomix_main(monkeypatch, student, "--prompt", "the cat", "--inspect")
    lines = capsys.readouterr().out.splitlines()
    best = model(torch.tensor([encoding.encode_ordinary("the cat")])).concept_logits[0].argmax(-1).tolist()
    assert [int(re.match(r"'.'\s+(\d+) \(", line)[1]) for line in lines[:7]] == best and "are ignored" in lines[8] and "labels" in lines[9]
    cocomix_main(monkeypatch, student, "--prompt", "the cat", "--inspect", 5)
    lines = capsys.readouterr().out.splitlines()
    z = model(torch.tensor([encoding.encode_ordinary("the cat")])).concept_logits[0, :, 5].tolist()
    assert [float(line.split()[0]) for line in lines[1:8]] == pytest.approx(z, abs=0.006)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    cocomix_main(monkeypatch, student, "--prompt", "the cat", "--inspect", 5)
    shades = [int(s) for s in re.findall(r"48;5;(\d+)m", capsys.readouterr().out)]
    assert shades == [16 + 6 * round(4 * (x - min(z)) / (max(z) - min(z))) for x in z] and {16, 40} <= set(shades)
    monkeypatch.undo()
    steered = encoding.decode(model.generate(idx, 20, 0.8, 50, {5: 60.0}, generator=torch.Generator().manual_seed(0))[0].tolist())
    plain = encoding.decode(model.generate(idx, 20, 0.8, 50, generator=torch.Generator().manual_seed(0))[0].tolist())
    cocomix_main(monkeypatch, student, "--prompt", "the", "--steer", "5=+60", "--tokens", 20)
    columns = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [c[0].rstrip() for c in columns if c[0].strip()] == [x.rstrip() for x in plain.splitlines()] and plain != steered
    assert [c[1].rstrip() for c in columns if len(c) > 1] == [x.rstrip() for x in steered.splitlines()]
    monkeypatch.setattr(cocomix_module, "steering_study", partial(steering_study, concepts=3, tokens=8))  # tested as a whole elsewhere
    cocomix_main(monkeypatch, student, "--study")
    assert len(re.findall(r"^\| [+-]\d \| 0\.\d{4} \| [+-]0\.\d{4} ± 0\.\d{4} \| 0\.\d{4} \|$", capsys.readouterr().out, re.M)) == 9
    cocomix_main(monkeypatch, student, "--prompt", "the", "--steer", "5=+0", "--steer", "6=0", "--tokens", 20)
    for line in capsys.readouterr().out.splitlines()[2:]:
        left, right = line.split(" | ") if " | " in line else (line, "")
        assert left.strip() == right.strip()  # no steering, no difference


@pytest.mark.parametrize("argv,words", [
    (["--prompt", "x", "--steer", "64=1"], "no concept 64"), (["--prompt", "x", "--steer", "3=much"], "CONCEPT=STRENGTH"), (["--prompt", "x", "--steer", "3"], "CONCEPT="),
    (["--prompt", "x", "--steer", "3=nan"], "finite"), (["--prompt", "x", "--inspect", "64"], "no concept 64"), (["--prompt", "x", "--inspect", "-7"], "no concept -7"),
    (["--prompt", "x", "--steer", "3=1", "--steer", "3=2"], "name it once"), (["--prompt", "x", "--steer", "3=1", "--inspect"], "one at a time"),
    (["--prompt", "x", "--steer", "3=1e39"], "too large"), ([], "prompt is empty"), (["--prompt", "seventeen letters"], "17 tokens"), (["--prompt", "x", "--inspect", "--concepts", "nowhere.json"], "sae.py describe --sae")])
def test_bad_questions_get_clear_answers(student, monkeypatch, argv, words):
    with pytest.raises(ValueError, match=words):
        cocomix_main(monkeypatch, student, *argv)


def test_models_without_concepts_and_wrong_dictionaries_are_refused(student, trained, monkeypatch, tmp_path, capsys):
    for argv in (["--steer", "1=1"], ["--inspect"], ["--study"]):
        with pytest.raises(ValueError, match="mix='none'"):
            cocomix_main(monkeypatch, trained / "ntp" / "ckpt.pt", "--prompt", "x", *argv)
    for content, words in (("{", "no concept dictionary"), ("{}", "no concept dictionary"), ('{"sae": "x", "concepts": []}', "another SAE")):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            cocomix_main(monkeypatch, student, "--prompt", "x", "--inspect", "--concepts", tmp_path / "c.json")
    numbered(tmp_path / "words", [400], vocab=500)
    (tmp_path / "words" / "val_0.bin").write_bytes((tmp_path / "words" / "x_train_000000.bin").read_bytes())
    with pytest.raises(ValueError, match="vocabulary of 500"):
        cocomix_main(monkeypatch, student, "--study", "--data", tmp_path / "words")
    ckpt = load_checkpoint(student, "model")
    ckpt["model"]["compress_layer.weight"][:40] *= 1e-4  # 40 of 64 concepts are ignored
    save_checkpoint(tmp_path / "c.pt", **{k: v for k, v in ckpt.items() if k != "format"})
    cocomix_main(monkeypatch, tmp_path / "c.pt", "--prompt", "x", "--inspect")
    assert "62.5% are ignored" in capsys.readouterr().out
    done = launch(["describe", "--sae", str(trained / "sae" / "ckpt.pt")], "sae.py")
    assert done.returncode == 2 and "--teacher CKPT" in done.output

# ---- evaluation ------------------------------------------------------------------------------------------------------

def run_eval(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv), "--device", "cpu"])
    train_module.main()


def test_the_whole_split_is_scored_once(corpus, trained, tmp_path, monkeypatch, capsys):
    """Against a loop over every token: three shards, the last stretch of each shorter; and one process against two."""
    text = np.concatenate([open_shard(p) for p in sorted(corpus.glob("*val*.bin"))])
    write_meta = json.loads((corpus / "meta.json").read_text())
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps(write_meta))
    shards = [text[:100], text[100:100 + T + 1], text[150:155]]
    for i, shard in enumerate(shards):
        write_shard(folder / f"val_{i}.bin", shard)
    model = CoCoMix.from_checkpoint(load_checkpoint(trained / "ntp" / "ckpt.pt", "model"))
    total = []
    for shard in shards:
        for start in range(0, len(shard) - 1, T):
            ids = torch.from_numpy(shard[start:start + T + 1].astype(np.int64))
            total += (-F.log_softmax(model(ids[None, :-1]).logits[0], -1)[range(len(ids) - 1), ids[1:]]).tolist()
    assert len(total) == sum(len(s) - 1 for s in shards)
    ckpt = trained / "ntp" / "ckpt.pt"
    run_eval(monkeypatch, "--eval", ckpt, "--data", folder, "--out", tmp_path / "e.json", "--batch-tokens", 3 * T)
    val = json.loads((tmp_path / "e.json").read_text())[str(ckpt)]["val"]
    assert val["loss"][0] == pytest.approx(np.mean(total), rel=1e-5) and val["perplexity"][0] == pytest.approx(np.exp(np.mean(total)), rel=1e-5)
    assert f"| val | loss | {val['loss'][0]:.4f} |" in capsys.readouterr().out
    done = launch(["--eval", f"{ckpt},{ckpt}", "--data", str(folder), "--out", str(tmp_path / "2.json"), "--device", "cpu"], processes=2)
    assert done.returncode == 0, done.output
    assert json.loads((tmp_path / "2.json").read_text())[str(ckpt)]["val"]["loss"][0] == pytest.approx(val["loss"][0], rel=1e-5)


@pytest.mark.parametrize("mix", ["none", "pause", "concept"])
def test_scores_are_those_of_one_pair_at_a_time(mix):
    """Shared contexts, contexts of one token, continuations that push the context out of the block, equal lengths and not."""
    model, ids = small(mix).eval(), tokens(9, 40).tolist()
    pairs = [(ids[0][:7], ids[1][:3]), (ids[0][:7], ids[2][:5]), (ids[0][:7], ids[3][:1]), (ids[4][:1], ids[5][:2]), (ids[4][:1], ids[6][:2]),
             (ids[5][:30], ids[7][:4]), (ids[6][:14], ids[8][:6]), (ids[6][:14], ids[8][:2]), (ids[7][:16], ids[8][:1]), (ids[7][:16], ids[0][:1]), (ids[8][:1], ids[0][:T])]
    likely = model(torch.tensor([ids[2][:5]])).logits[0, -1].argmax().item()
    pairs.append((ids[2][:5], [likely]))
    assert max(len(c) for c, _ in pairs[:3]) * 3 > 20  # the first three share a context, and not all of them a pass
    got = train_module.score(model, pairs, train_module.EvalSettings("x", batch_tokens=20), World("cpu"))
    roomy = train_module.score(model, pairs, train_module.EvalSettings("x", batch_tokens=1000), World("cpu"))
    assert [g for _, g in got] == [g for _, g in roomy] and [p for p, _ in got] == pytest.approx([p for p, _ in roomy], abs=1e-4)
    for (context, continuation), (log_p, greedy) in zip(pairs, got, strict=True):
        whole = (context + continuation)[-(T + 1):]
        log_q = F.log_softmax(model(torch.tensor([whole[:-1]])).logits[0].detach(), -1)[-len(continuation):]
        assert log_p == pytest.approx(sum(log_q[j, t].item() for j, t in enumerate(continuation)), abs=1e-4)
        assert greedy == (log_q.argmax(-1).tolist() == continuation)
    assert got[-1][1] and not got[0][1]


@pytest.fixture
def harness_tasks(tmp_path):
    """A multiple-choice, a last-word and a rolling-perplexity task, and one that generates, on local files."""
    rng, words = np.random.default_rng(0), "the cat saw a dog near old houses while it rained and nobody came back home".split()
    text = [" ".join(rng.choice(words, n)) for n in (8, 12, 5, 30, 9, 40)]
    def write(name, records, **task):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        lines = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}}, "test_split": "test", **task}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(lines))  # JSON is YAML
    mean = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    write("my_choice", [{"q": t, "c": [" ".join(rng.choice(words, n)) for n in (1, 3, 2)], "a": i % 3} for i, t in enumerate(text)], output_type="multiple_choice",
          doc_to_text="{{q}}", doc_to_choice="{{c}}", doc_to_target="{{a}}", metric_list=mean + [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}])
    write("my_last_word", [{"text": t} for t in text], output_type="loglikelihood", doc_to_text="{{text.split(' ')[:-1]|join(' ')}}", doc_to_target="{{' '+text.split(' ')[-1]}}",
          metric_list=mean + [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}])
    write("my_rolling", [{"text": t} for t in text], output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
          metric_list=[{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")])
    write("my_generation", [{"q": t, "a": "x"} for t in text], output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}",
          generation_kwargs={"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
          metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}])
    return tmp_path


def test_the_harness_scores_our_models_as_its_own(harness_tasks, tmp_path, monkeypatch):
    """One random GPT-2, loaded by us and by transformers, through lm-evaluation-harness: equal scores and equal texts."""
    pytest.importorskip("lm_eval"), pytest.importorskip("accelerate")
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    torch.manual_seed(0)
    block = 64
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, n_positions=block, n_embd=128, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(6.0)  # beyond its small initialisation, where all continuations are alike
    theirs.save_pretrained(tmp_path / "gpt")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    chars = [chr(b) if chr(b) in alphabet and b < 256 else None for b in range(256)]
    spare = iter(sorted(c for c in alphabet if ord(c) > 255))  # GPT-2's table: bytes without a printable form, in order
    vocab = {c if c is not None else next(spare): b for b, c in enumerate(chars)}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer, fast.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    hf_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|endoftext|>")
    names = ["my_choice", "my_last_word", "my_rolling", "my_generation"]
    manager = TaskManager(include_path=str(harness_tasks))
    reference = HFLM(pretrained=theirs, tokenizer=hf_tokenizer, batch_size=2, max_length=block, device="cpu")
    want = simple_evaluate(reference, tasks=names, task_manager=manager, bootstrap_iters=10)
    assert hf_tokenizer.encode("a <|endoftext|>\n é") == get_tokenizer("byte").encode("a <|endoftext|>\n é", allowed_special="all")
    model, encoding = load_hf(tmp_path / "gpt" / "model.safetensors", CoCoMixConfig(block_size=block, vocab_size=V, n_layer=2, n_head=2, n_embd=128, mix="none")), get_tokenizer("byte")
    ours = train_module.harness_model(model.eval(), encoding, train_module.EvalSettings("x", batch_tokens=256), World("cpu"))
    got = simple_evaluate(ours, tasks=names, task_manager=manager, bootstrap_iters=10)
    for name in names:
        a, b = got["samples"][name], want["samples"][name]
        for x, y in zip(sorted(a, key=lambda s: s["doc_id"]), sorted(b, key=lambda s: s["doc_id"]), strict=True):
            x, y = x["resps"], y["resps"]
            if name == "my_generation":
                assert x == y
            else:
                np.testing.assert_allclose(np.array(x, dtype=np.float64).ravel(), np.array(y, dtype=np.float64).ravel(), rtol=1e-4, atol=1e-3)
        for key, value in want["results"][name].items():
            if isinstance(value, float):
                assert got["results"][name][key] == pytest.approx(value, rel=1e-4), (name, key)
    assert want["results"]["my_last_word"]["perplexity,none"] > 2 * V ** 0.5
    done = launch(["--eval", str(tmp_path / "gpt" / "model.safetensors"), "--tasks", ",".join(names[:3]), "--task_folder", str(harness_tasks), "--out", str(tmp_path / "e.json"),
                   "--device", "cpu"], processes=2)
    assert done.returncode == 0 and "| my_choice | acc_norm |" in done.output, done.output
    for name, result in json.loads((tmp_path / "e.json").read_text())[str(tmp_path / "gpt" / "model.safetensors")]["tasks"].items():
        assert result and all(value == pytest.approx(want["results"][name][key + ",none"], rel=1e-4) for key, (value, _) in result.items())
        assert name != "my_choice" or result["acc"][1] == pytest.approx(want["results"][name]["acc_stderr,none"], rel=1e-4)


@pytest.mark.parametrize("mode", ["cocomix", "cached", "ntp", "pause", "generate", "sae"])
def test_the_benchmark_runs_the_real_step(mode, monkeypatch, capsys):
    """Every mode; a step is train's own, and the dense SAE step it compares with is as exact."""
    calls, step, decodes = [], train_module.training_step, []
    monkeypatch.setattr(train_module, "training_step", lambda *a: calls.append(a) or step(*a))
    real = sae_module.TopKSAE.forward

    def forward(self, x):
        out = real(self, x)
        decodes.append((self.decode(out.values, out.indices), sparse_matmul(out.values, out.indices, self.decoder) + self.pre_bias))
        return out
    monkeypatch.setattr(sae_module.TopKSAE, "forward", forward)
    monkeypatch.setattr(sys, "argv", ["train.py", "--bench", "tiny", "--mode", mode, "--steps", "1", "--batch", "1", "--device", "cpu"])
    train_module.main()
    line = json.loads(capsys.readouterr().out)
    assert line["mode"] == mode and (len(calls) == 3) == (mode not in ("generate", "sae")) and (len(decodes) == 6) == (mode == "sae")
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in decodes)
    if calls:
        assert (calls[0][3][0][2] is not None) == (mode in ("cocomix", "cached")) and line["tokens_per_s"] > 0 and (line["label_ms"] > 0) == (mode == "cocomix")


def test_evaluation_refuses_what_it_cannot_do(corpus, trained, tmp_path, monkeypatch, harness_tasks):
    ckpt = trained / "ntp" / "ckpt.pt"
    numbered(tmp_path / "words", [400], vocab=500)
    (tmp_path / "words" / "val_0.bin").write_bytes((tmp_path / "words" / "x_train_000000.bin").read_bytes())
    torch.save({}, tmp_path / "odd.bin")
    for argv, words in ((["--eval", trained / "ntp"], "is a folder: name the checkpoint file in it, .*ckpt.pt"), (["--eval", f"{ckpt},{tmp_path}/no.pt"], "no checkpoint file"),
                        (["--eval", ckpt, "--data", tmp_path / "words"], "vocabulary of 500.*model one of 257"), (["--eval", tmp_path / "odd.bin"], "no GPT-2")):
        with pytest.raises((ValueError, OSError), match=words):
            run_eval(monkeypatch, *argv, "--out", tmp_path / "e.json")
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install lm-eval"):
        run_eval(monkeypatch, "--eval", ckpt, "--tasks", "piqa", "--out", tmp_path / "e.json")
    monkeypatch.undo()
    table = train_module.results_table({"a": {"val": {"loss": [2.5, None]}}, "b": {"tasks": {"t": {"acc": [0.25, 0.125], "f1 strict": [0.5, None]}}}})
    assert table.splitlines()[2:] == ["| val | loss | 2.5000 | - |", "| t | acc | - | 0.2500 ± 0.1250 |", "| t | f1 strict | - | 0.5000 |"]
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="no task 'my_choise': did you mean my_choice"):
        run_eval(monkeypatch, "--eval", ckpt, "--tasks", "my_choise", "--task_folder", harness_tasks, "--out", tmp_path / "e.json")


# ---- on a GPU --------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mix", ["none", "pause", "concept"])
def test_compiled_bf16_step_is_close_to_eager_fp32(mix):
    model, idx = small(mix, scale=2.0).cuda(), tokens(2, T).cuda()
    labels = tokens(2, T, 4).cuda() % 64 if mix == "concept" else None
    want = model(idx, idx, labels).loss
    with torch.autocast("cuda", torch.bfloat16):
        got = torch.compile(model)(idx, idx, labels).loss
    got.backward()
    assert torch.allclose(got, want, rtol=2e-2) and all(torch.isfinite(p.grad).all() for p in model.parameters())
