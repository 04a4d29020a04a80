"""A TopK sparse autoencoder (SAE) on a teacher's residual stream, its trainer, and concept labels.

  python sae.py --teacher out/tiny/ntp/ckpt.pt --layer 1 --out out/my_sae
  python sae.py describe --sae out/my_sae/ckpt.pt --teacher out/tiny/ntp/ckpt.pt
  torchrun --nproc_per_node=8 sae.py --teacher gpt2 --data data/openwebtext --layer 5 --k 32 \
      --n_latents 32768 --lr 3e-4 --steps 20000 --batch_tokens 65536 --dead_after 10000000

How a token gets its concepts (CoCoMix, arXiv 2502.08524: target concepts by attribution):
    r   = the teacher's residual stream after block `layer` (0-based)
    a   = relu(TopK(W_enc (n - b_pre) + b_lat))              K active of C; n is r standardised
    s_i = a_i * (g . W_dec_i),   g = dL/dr,   L = the teacher's next-token loss, summed over tokens
    labels = the 4 latents with the largest s_i above 0
s_i is, to first order, what latent i adds to L: a large s_i marks a concept whose presence *raises*
the teacher's loss. The paper and its code rank by this signed value. L sums over positions, so g_t
holds what r_t does to all later predictions: labels look ahead, inputs never do.

SAE form and training: Gao et al., arXiv 2406.04093 (TopK, AuxK).
Dimensions: B batch, T tokens, D the teacher's width, C latents, K active latents.
"""
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from cocomix import CoCoMix, load_hf, sparse_rows, standardise
from data import (GPT2, Run, Windows, World, atomic, explain, fetch, get_tokenizer,
                  load_checkpoint, parse, require, script)


# ---- the sparse autoencoder ----------------------------------------------------------------------

class SAEOutput(NamedTuple):
    """What TopKSAE gives for x (..., D)."""
    reconstruction: torch.Tensor  # (..., D) in x's own scale
    values: torch.Tensor  # (..., K) activations, 0 or more, largest first
    indices: torch.Tensor  # (..., K) int64, their latents
    loss: torch.Tensor  # () mean squared error of the standardised input + aux_weight * aux_loss
    aux_loss: torch.Tensor  # () share of that error which dead latents cannot explain
    fvu: torch.Tensor  # () fraction of variance unexplained


class TopKSAE(nn.Module):
    """SAE that keeps the k largest latents of each input and standardises it itself (Gao et al.).

    FVU, wherever this project says it: sum |n - n_hat|^2 / sum |n - mean n|^2 over tokens, n being
    the standardised input. `decoder` (C,D) has one unit-norm row a latent. A latent is dead once
    it has not fired for `dead_after` tokens; in training, k_aux dead ones explain the rest
    (AuxK)."""

    def __init__(self, n_embd, n_latents, k, k_aux=0, aux_weight=1 / 32, dead_after=10_000_000):
        super().__init__()
        require(1 <= k <= n_latents, f"k={k} is not in 1 to n_latents={n_latents}")
        self.config = {"n_embd": n_embd, "n_latents": n_latents, "k": k, "dead_after": dead_after,
                       "k_aux": k_aux or n_embd // 2, "aux_weight": aux_weight}
        self.k, self.dead_after = k, dead_after
        self.pre_bias = nn.Parameter(torch.zeros(n_embd))  # b_pre
        self.decoder = nn.Parameter(F.normalize(torch.randn(n_latents, n_embd), dim=-1))
        self.encoder = nn.Parameter(self.decoder.detach().clone())  # starts as W_dec transposed
        self.latent_bias = nn.Parameter(torch.zeros(n_latents))  # b_lat
        self.register_buffer("idle", torch.zeros(n_latents, dtype=torch.int64))  # tokens

    def preactivations(self, n):
        """Standardised n (..., D) -> (..., C), before the TopK and the ReLU."""
        return F.linear(n - self.pre_bias, self.encoder, self.latent_bias)

    def encode(self, x):
        """x (..., D) -> values (..., K) fp32, largest first, and indices (..., K) int64."""
        values, indices = self.preactivations(standardise(x)[0]).topk(self.k)
        return values.relu(), indices

    def decode(self, values, indices):
        """(..., K), (..., K) -> (..., D), standardised."""
        return sparse_rows(values, indices, self.decoder) + self.pre_bias

    def forward(self, x):
        """x (..., D) -> SAEOutput, with gradients to all four parameters."""
        n, mu, std = standardise(x)
        pre = self.preactivations(n)
        values, indices = pre.topk(self.k)
        n_hat = self.decode(values.relu(), indices)
        error, aux_loss = n - n_hat, n.new_zeros(())
        mse, dead = error.square().mean(), torch.where(self.idle > self.dead_after)[0]
        if self.training and len(dead):  # AuxK (appendix A.2): they rebuild the error, no bias
            best, at = pre[..., dead].topk(min(self.config["k_aux"], len(dead)))
            rebuilt = sparse_rows(best.relu(), dead[at], self.decoder)
            aux_loss = (error.detach() - rebuilt).square().mean() / mse.detach().clamp(min=1e-12)
        fvu = mse.detach() / n.flatten(0, -2).var(0, correction=0).mean()  # var: over tokens
        loss = mse + self.config["aux_weight"] * aux_loss
        return SAEOutput(n_hat * std + mu, values.relu(), indices, loss, aux_loss, fvu)

    @torch.no_grad()
    def after_step(self, out, world):
        """After every optimiser step with that step's SAEOutput: decoder rows back to unit norm,
        idle counts brought up to date over all ranks."""
        F.normalize(self.decoder, dim=-1, out=self.decoder)
        fired = torch.bincount(out.indices[out.values > 0], minlength=len(self.idle))
        self.idle += out.indices.numel() // self.k * world.size
        self.idle[world.sum(fired) > 0] = 0


def load_openai(path):
    """OpenAI's SAE for GPT-2 small (openai/sparse_autoencoder, a .pt file with the TopK activation,
    which standardises its input as ours does) -> TopKSAE. ValueError if it is none."""
    with explain(f"{path} is missing, damaged or no TopK SAE of OpenAI's", "download it again"):
        found = torch.load(path, map_location="cpu", weights_only=True)
        n_latents, n_embd = found["encoder.weight"].shape
        require(found["activation"] == "TopK", f"its activation is {found['activation']}")
        sae = TopKSAE(n_embd, n_latents, found["activation_state_dict"]["k"])
        sae.load_state_dict({"pre_bias": found["pre_bias"], "encoder": found["encoder.weight"],
                             "latent_bias": found["latent_bias"], "idle": sae.idle,
                             "decoder": found["decoder.weight"].T})
    return sae


# ---- concept labels ------------------------------------------------------------------------------

def residual(teacher, idx, layer):
    """idx (B,T) -> r (B,T,D), the residual stream after block `layer` (0-based).

    With `loss_from` this is CoCoMix.forward of a plain GPT, cut in two: change both or none."""
    x = teacher.embed(idx)
    for block in teacher.h[:layer + 1]:
        x = block(x)
    return x


def loss_from(teacher, r, targets, layer):
    """r (B,T,D) after block `layer`, targets (B,T), -1 = none -> () loss in nats, summed."""
    for block in teacher.h[layer + 1:]:
        r = block(r)
    logits = F.linear(teacher.ln_f(r), teacher.wte.weight)[..., :teacher.config.vocab_size]
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1,
                           reduction="sum")


@torch.no_grad()
def concept_labels(teacher, sae, idx, targets, layer, n_labels=4, rank_by="attribution"):
    """The concepts each token is to predict: idx, targets (B,T) int64 -> (B,T,n_labels) int64, best
    first, -1 = none.

    rank_by: "attribution" s_i (the paper's), "negative" -s_i, "absolute" |s_i|, "activation" a_i,
    or "shuffled", a control: the attribution labels permuted within the window. Only scores
    above 0 make labels. Exact, for less work: the blocks up to `layer` run without a graph,
    those above back-propagate to r alone, and only active latents are scored, the others having
    a_i = 0. That W_dec_i lacks r's own scale, std(r) > 0, cannot change a ranking. ValueError for
    more labels than k."""
    require(1 <= n_labels <= sae.k, f"n_labels={n_labels} is not in 1 to the SAE's k={sae.k}")
    r = residual(teacher, idx, layer).requires_grad_()
    with torch.autocast(r.device.type, enabled=False):
        scores, indices = sae.encode(r)  # a_i (B,T,K), their latents
    if rank_by != "activation":
        with torch.enable_grad():
            g, = torch.autograd.grad(loss_from(teacher, r, targets, layer), r)  # (B,T,D)
        with torch.autocast(r.device.type, enabled=False):
            for score, i, row in zip(scores, indices, g):  # of all rows (B,T,K,D) would be large
                score *= (sae.decoder[i] @ row[..., None])[..., 0]  # s_i
    scores = {"negative": -scores, "absolute": scores.abs()}.get(rank_by, scores)
    best, at = scores.topk(n_labels)
    labels = indices.gather(-1, at).masked_fill(best <= 0, -1)
    if rank_by == "shuffled":
        for row, tokens in zip(labels, idx):  # seeded by the tokens: the same at every call
            draw = torch.Generator().manual_seed(int(tokens.sum()))
            row[:] = row[torch.randperm(len(row), generator=draw)]
    return labels


class Labels:
    """A cache on disk: `labels(idx, targets, numbers)` is `make(idx, targets)`, (B,T,n) int64, made
    once for the windows with these numbers.

    The file lies beside the text, named by a hash of `identity`, all that labels depend on but the
    code that makes them. A label is a uint16 in it: 0 = not made yet, 1 = none, i + 2 = concept i.
    It begins empty, and a batch that holds a 0 is made again, so a kill or a torn file costs
    nothing. 2 bytes a label."""

    def __init__(self, make, windows, identity, n_labels, n_concepts, keep=True):
        self.make, self.n_concepts, self.file = make, n_concepts, None
        self.shape = windows.block_size, n_labels
        digest = hashlib.sha256(json.dumps([identity, windows.fingerprint(), self.shape]).encode())
        self.path = windows.paths[0].with_suffix(f".{digest.hexdigest()[:16]}.labels")
        if keep:
            require(n_concepts < 65534, f"{n_concepts} concepts are too many: --no-keep_labels")
            self.path.touch()
            self.file = self.path.open("r+b", buffering=0)

    def __call__(self, idx, targets, numbers):
        if not self.file:
            return self.make(idx, targets)
        kept = np.zeros((len(numbers), *self.shape), "<u2")
        for n, row in zip(numbers, kept):
            self.file.seek(n * row.nbytes)
            row.flat[self.file.readinto(row) // 2:] = 0  # what a torn file lacks
        if kept.all() and kept.max() < self.n_concepts + 2:
            return torch.from_numpy(kept.astype(np.int64) - 2).to(idx.device)
        labels = self.make(idx, targets)
        rows = (labels + 2).cpu().numpy().astype("<u2")
        for n, row in zip(numbers, rows):
            self.file.seek(n * row.nbytes)
            self.file.write(row)
        return labels


def fingerprint(module):
    """16 hex digits of the SHA-256 of a module's tensors: which teacher, which SAE."""
    return hashlib.sha256(b"".join(
        name.encode() + tensor.cpu().numpy().tobytes()
        for name, tensor in sorted(module.state_dict().items()))).hexdigest()[:16]


# ---- teachers and SAEs by name -------------------------------------------------------------------

GPT2_FILE = ("https://huggingface.co/openai-community/gpt2/resolve/main/model.safetensors", "",
             "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707")
OPENAI = ("https://openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small/"
          "resid_post_mlp_v5_32k/autoencoders/{}.pt")
PAGE = "https://www.neuronpedia.org/gpt2-small/{}-res_post_32k-oai/{}"  # layer, latent


def load_model(name, world):
    """(model on the world's device, its vocabulary, the folder of its tokens) that `name` names: a
    checkpoint of ours, a GPT-2 in .safetensors or .bin, or "gpt2", downloaded once (548 MB)."""
    name = world.first(lambda: fetch(*GPT2_FILE)) if name == "gpt2" else name
    if Path(name).suffix in (".safetensors", ".bin"):
        return load_hf(name).to(world.device), GPT2, ""
    ckpt = load_checkpoint(name, "model", mmap=True)
    return (CoCoMix.from_checkpoint(ckpt).to(world.device), ckpt["vocabulary"],
            ckpt["settings"]["data"])


def load_teacher(name, world):
    """The plain GPT that `name` names (`load_model`), frozen."""
    teacher = load_model(name, world)[0]
    require(teacher.config.mix == "none", f"{name} is a model of mix={teacher.config.mix}: a "
            "teacher is a plain GPT, as `python train.py --mode ntp` trains one")
    return teacher.eval().requires_grad_(False)


def load_sae(name, teacher, world):
    """(SAE, layer it reads, file) that `name` names, frozen, on the world's device: a checkpoint of
    ours, "openai" or "openai:LAYER" (5), OpenAI's for GPT-2, which is downloaded once (201 MB)."""
    if name.partition(":")[0] == "openai":
        layer = int(name.partition(":")[2] or 5)
        name = world.first(lambda: fetch(OPENAI.format(layer)))
        sae = load_openai(name)
    else:
        ckpt = load_checkpoint(name, "sae")
        sae, layer = TopKSAE(**ckpt["config"]), ckpt["layer"]
        sae.load_state_dict(ckpt["sae"])
        require(ckpt["identity"]["teacher"] == fingerprint(teacher), f"{name} was trained on "
                "another teacher: train an SAE on this one with `python sae.py --teacher CKPT`")
    require(len(sae.pre_bias) == teacher.config.n_embd and layer < teacher.config.n_layer,
            f"{name} reads block {layer}, {len(sae.pre_bias)} wide; the teacher has "
            f"{teacher.config.n_layer} blocks, {teacher.config.n_embd} wide: take its own SAE")
    return sae.to(world.device).eval().requires_grad_(False), layer, Path(name)


# ---- the trainer ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class SAESettings:
    """Train a TopK SAE on a teacher's residual stream. `sae.py describe` writes a concept
    dictionary beside an SAE, ckpt.concepts.json: what its latents fire on in held-out text."""
    teacher: str = ""  # checkpoint (train.py --mode ntp), gpt2, or a GPT-2's .safetensors or .bin
    data: str = "data/pystdlib"  # folder of tokens (data.py)
    out: str = "out/sae"  # folder for ckpt.pt and log.jsonl
    layer: int = 2  # read the residual stream after this block (0-based)
    n_latents: int = 512  # C
    k: int = 16  # latents active for a token
    dead_after: int = 50_000  # tokens without firing after which a latent counts as dead
    steps: int = 300  # optimiser steps
    batch_tokens: int = 1024  # tokens a step, over all processes
    lr: float = 3e-3  # peak learning rate: 5 % warm-up, then constant, the last fifth down to 0
    save_interval: int = 1000  # steps between checkpoints; the last step is always saved
    seed: int = 0  # of initialisation and data order
    sae: str = ""  # describe: checkpoint of the SAE (sae.py), openai or openai:LAYER
    tokens: int = 262_144  # describe: validation tokens to read
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the teacher; auto: bf16 on CUDA


FREE = ("teacher", "data", "out", "device", "save_interval", "sae", "tokens")  # no part of identity


@torch.no_grad()
def evaluate_sae(teacher, sae, layer, windows, world, tokens=65_536):
    """Over a fixed set of about `tokens` tokens, shared by all ranks: {val_fvu, teacher_loss,
    spliced_loss}, the last with the SAE's reconstruction in place of the residual stream.

    The first position keeps its own, and stays out of the FVU: its norm is many times the
    others'."""
    # sums of |error|^2, |n|^2, two losses, tokens, and of n (D,)
    total = torch.zeros(5 + teacher.config.n_embd, dtype=torch.float64)
    for numbers in windows.spread(tokens, world.rank, world.size):
        idx, targets = windows.batch(numbers, world.device)
        x = residual(teacher, idx, layer)
        (n, mu, std), n_hat = standardise(x[:, 1:]), sae.decode(*sae.encode(x[:, 1:]))
        spliced = torch.cat([x[:, :1], n_hat * std + mu], 1)
        losses = [loss_from(teacher, y, targets, layer) for y in (x, spliced)]
        figures = [(n - n_hat).square().sum(), n.square().sum(), *losses, idx.numel()]
        total += torch.cat([torch.tensor(figures), n.sum((0, 1)).cpu()])
    error, square, plain, spliced, count = world.sum(total)[:5].tolist()
    mean_part = total[5:].square().sum().item() / (count - count / windows.block_size)
    return {"val_fvu": error / (square - mean_part), "teacher_loss": plain / count,
            "spliced_loss": spliced / count}


def train_sae(settings, teacher, world):
    """Train an SAE for `teacher` as `settings` (SAESettings) say -> (sae, last record); writes
    out/ckpt.pt and out/log.jsonl. ValueError: see data.Run."""
    T = teacher.config.block_size
    rows, rest = divmod(settings.batch_tokens, T * world.size)
    require(rows and not rest, f"--batch_tokens {settings.batch_tokens} is no multiple of "
            f"{world.size} processes x {T} tokens")
    require(0 <= settings.layer < teacher.config.n_layer,
            f"--layer {settings.layer}: blocks are 0 to {teacher.config.n_layer - 1}")
    require(min(settings.steps, settings.save_interval, settings.lr) > 0,
            "--steps, --save_interval and --lr must be above 0")
    data = Windows(settings.data, "train", T, settings.seed, teacher)
    val = Windows(settings.data, "val", T)
    torch.manual_seed(settings.seed)
    sae = TopKSAE(teacher.config.n_embd, settings.n_latents, settings.k,
                  dead_after=settings.dead_after).to(world.device)
    optimizer = torch.optim.Adam(sae.parameters(), fused=True)
    who = {"teacher": fingerprint(teacher), "data": data.fingerprint()}
    run = Run(settings, FREE, who, "sae", world, {"sae": sae, "optimizer": optimizer},
              {"config": sae.config, "layer": settings.layer})
    for step in run.steps(settings.steps, settings.save_interval, "SAE"):
        idx, _ = data.batch(data.numbers(step, rows, world.rank, world.size), world.device)
        with torch.no_grad(), world.autocast():
            x = residual(teacher, idx, settings.layer)[:, 1:]  # see evaluate_sae
        if step == 0:
            sae.pre_bias.data.copy_(world.sum(standardise(x)[0].mean((0, 1))) / world.size)
        out = sae(x)
        out.loss.backward()
        for p in sae.parameters():
            world.sum(p.grad).div_(world.size)
        left = settings.steps - step
        optimizer.param_groups[0]["lr"] = settings.lr * min(
            1, 20 * (step + 1) / settings.steps, 5 * left / settings.steps)
        optimizer.step()
        optimizer.zero_grad()
        sae.after_step(out, world)
        means = run.mean(left == 1, loss=out.loss, aux_loss=out.aux_loss, fvu=out.fvu)
        if left == 1:
            means |= evaluate_sae(teacher, sae, settings.layer, val, world)
        if means:
            run.write({"step": step + 1, "tokens": (step + 1) * settings.batch_tokens, **means,
                       "dead_fraction": (sae.idle > sae.dead_after).float().mean().item()})
    return sae.eval(), run.ckpt["log"][-1]


# ---- reading latents: the concept dictionary -----------------------------------------------------

def typical(ids, frequency, encoding):
    """The 6 tokens typical of a tensor of ids, by share * log(lift): [[id, text, share of the ids,
    lift], ...], the lift being that share over the token's `frequency` in the text."""
    values, counts = ids.unique(return_counts=True)
    share = counts / len(ids)
    lift = share / frequency[values]
    best = (share * lift.log()).sort(descending=True, stable=True).indices[:6]
    columns = (column[best].tolist() for column in (values, share, lift))
    return [[token, encoding.decode([token]), s, x] for token, s, x in zip(*columns) if x > 1]


@torch.no_grad()
def describe(teacher, sae, layer, windows, path, tokens=262_144, page=""):
    """Write the concept dictionary of an SAE, made from about `tokens` tokens of `windows`.

    A dict a latent: its `id`; `rate`, the share of tokens it fires on; `tokens` and `next`, what is
    typical (`typical`) of those it fires on and of those that follow, over its 64 strongest
    firings; `snippets`, [text, token, text, activation] around the first 8 of these; its `page`, if
    any. A window's first position is left out."""
    encoding = get_tokenizer(windows.meta)
    idx, targets = windows.batch(sum(windows.spread(tokens), []))
    parts = [sae.encode(residual(teacher, rows.to(sae.decoder.device), layer))
             for rows in idx.split(16)]
    values, latents = (torch.cat(part)[:, 1:].cpu().flatten() for part in zip(*parts))
    places = torch.arange(idx.numel()).view_as(idx)[:, 1:].repeat_interleave(sae.k)
    order = np.lexsort((places, -values, latents))  # by latent, its strongest first
    fired = order[values.numpy()[order] > 0]
    entries, ends = [], np.bincount(latents[fired], minlength=len(sae.decoder)).cumsum()
    text = torch.cat([idx, targets[:, -1:]], 1).flatten()
    frequency = torch.bincount(text, minlength=encoding.n_vocab) / len(text)
    for latent, own in enumerate(np.split(fired, ends[:-1])):
        best, snippets = own[:64], []
        for at, value in zip(places[best][:8].tolist(), values[best].tolist()):
            row, t = idx[at // idx.size(1)].tolist(), at % idx.size(1)
            around = row[max(0, t - 12):t], row[t:t + 1], row[t + 1:t + 13]
            snippets.append([*map(encoding.decode, around), value])
        entries.append({"id": latent, "rate": len(own) * sae.k / len(places), "snippets": snippets,
                        "tokens": typical(idx.flatten()[places[best]], frequency, encoding),
                        "next": typical(targets.flatten()[places[best]], frequency, encoding),
                        "page": page.format(layer, latent)})
    with atomic(path) as tmp:
        tmp.write_text(json.dumps({"sae": fingerprint(sae), "concepts": entries}), "utf-8")


def main():
    command = sys.argv[1:2] == ["describe"]
    settings = parse(SAESettings, sys.argv[1 + command:])
    world = World(settings.device, settings.dtype)
    teacher = load_teacher(settings.teacher, world)
    if not command:
        return world.print(f"SAE in {settings.out}: {train_sae(settings, teacher, world)[1]}")
    sae, layer, path = load_sae(settings.sae, teacher, world)
    windows = Windows(settings.data, "val", teacher.config.block_size, model=teacher)
    path, public = path.with_suffix(".concepts.json"), settings.sae.partition(":")[0] == "openai"
    describe(teacher, sae, layer, windows, path, settings.tokens, PAGE * public)
    world.print(f"{path}: {len(sae.decoder)} concepts")


if __name__ == "__main__":
    script(main)
