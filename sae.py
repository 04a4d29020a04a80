"""A TopK sparse autoencoder (SAE) on a teacher's residual stream, its trainer, and the concept labels it gives.

    python sae.py --teacher out/tiny/ntp/ckpt.pt --data data/pystdlib --layer 1 --out out/my_sae
    torchrun --nproc_per_node=8 sae.py --teacher CKPT --data DATA --out OUT      # the same on the 8 GPUs of a node
    python sae.py describe --sae out/tiny/sae/ckpt.pt --teacher out/tiny/ntp/ckpt.pt     # what its latents fire on
    python sae.py label --sae out/tiny/sae/ckpt.pt --teacher out/tiny/ntp/ckpt.pt        # labels, made once for many runs

How a token gets its concepts (CoCoMix, arXiv 2502.08524: target concepts by attribution):
    r   = the teacher's residual stream after block `layer` (0-based), standardised as in equation (1)
    a   = relu(TopK(W_enc (r - b_pre) + b_lat))              K active latents of C
    s_i = a_i * (g . W_dec_i),   g = dL/dr,   L = the teacher's next-token loss, summed over the tokens
    labels = the 4 latents with the largest s_i
s_i is, to first order, what latent i adds to L: a large s_i marks a concept whose presence *raises* the teacher's
loss. The paper and its code rank by this signed value, so that is the default; `rank_by` has the alternatives.
L sums over positions, so g_t holds what r_t does to all later predictions: labels look ahead, inputs never do.

SAE form and training: Gao et al., "Scaling and evaluating sparse autoencoders", arXiv 2406.04093 (TopK, AuxK).
Dimensions: B batch, T tokens, D the teacher's width, C latents, K active latents.
"""
import hashlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from cocomix import CoCoMix, load_hf, sparse_matmul, standardise, top_k
from data import (Interrupt, Log, Windows, World, atomic, cache, fetch, get_tokenizer, load_checkpoint, parse, run,
                  save_checkpoint, writing)

STRONGEST = 64  # firings a latent is described by
RANKINGS = ("attribution", "negative", "absolute", "activation")


# ---- the sparse autoencoder --------------------------------------------------------------------------------

class SAEOutput(NamedTuple):
    """What TopKSAE gives for x (..., D)."""
    reconstruction: torch.Tensor  # (..., D) in x's own scale
    values: torch.Tensor  # (..., K) activations, 0 or more, largest first
    indices: torch.Tensor  # (..., K) int64, their latents
    loss: torch.Tensor  # () mean squared error of the standardised input + aux_weight * aux_loss
    aux_loss: torch.Tensor  # () share of that error which dead latents cannot explain; 0 if none is dead
    fvu: torch.Tensor  # () fraction of variance unexplained, as TopKSAE defines it


class TopKSAE(nn.Module):
    """SAE that keeps the k largest latents of each input (Gao et al., section 2.3) and standardises it itself.

    FVU, wherever this project says it: sum |r - r_hat|^2 / sum |r - mean r|^2 over tokens, r the *standardised*
    input. `decoder` (C,D) has one unit-norm row a latent: nn.Linear's weight transposed. A latent is dead once
    it has not fired for `dead_after` tokens; training then lets dead ones explain what is left (AuxK)."""

    def __init__(self, n_embd, n_latents, k, k_aux=0, aux_weight=1 / 32, dead_after=10_000_000):
        super().__init__()
        if not 1 <= k <= n_latents:
            raise ValueError(f"k={k} must lie between 1 and n_latents={n_latents}")
        self.config = dict(n_embd=n_embd, n_latents=n_latents, k=k, k_aux=k_aux, aux_weight=aux_weight,
                           dead_after=dead_after)
        self.k, self.k_aux, self.aux_weight, self.dead_after = k, k_aux or max(1, n_embd // 2), aux_weight, dead_after
        self.pre_bias = nn.Parameter(torch.zeros(n_embd))  # b_pre
        self.decoder = nn.Parameter(F.normalize(torch.randn(n_latents, n_embd), dim=-1))  # W_dec, transposed
        self.encoder = nn.Parameter(self.decoder.detach().clone())  # W_enc starts as the decoder's transpose
        self.latent_bias = nn.Parameter(torch.zeros(n_latents))  # b_lat
        self.register_buffer("idle", torch.zeros(n_latents, dtype=torch.int64))  # tokens since each latent fired

    def preactivations(self, r):
        return F.linear(r - self.pre_bias, self.encoder, self.latent_bias)  # (..., D) standardised -> (..., C)

    def encode(self, x):
        """x (..., D) -> values (..., K) fp32, largest first, and indices (..., K) int64."""
        pre = self.preactivations(standardise(x)[0])
        indices = top_k(pre, self.k)
        return pre.gather(-1, indices).relu(), indices

    def decode(self, values, indices, mu=0.0, std=1.0):
        """(..., K), (..., K) -> (..., D), standardised; in the input's own scale with its mu and std (..., 1)."""
        return (sparse_matmul(values, indices, self.decoder) + self.pre_bias) * std + mu

    def forward(self, x):
        """x (..., D) -> SAEOutput, with gradients to all four parameters."""
        r, mu, std = standardise(x)
        pre = self.preactivations(r)
        indices = top_k(pre, self.k)
        values = pre.gather(-1, indices).relu()
        r_hat = self.decode(values, indices)
        error = r - r_hat
        rest, aux_loss = error.detach(), torch.zeros((), device=x.device)
        dead = (self.idle > self.dead_after).nonzero().squeeze(-1)  # (n_dead,)
        if self.training and len(dead):  # AuxK (Gao et al., appendix A.2): dead latents rebuild the rest, no bias
            dead_pre = pre.index_select(-1, dead)
            best = top_k(dead_pre, min(self.k_aux, len(dead)))
            rebuilt = sparse_matmul(dead_pre.gather(-1, best).relu(), dead[best], self.decoder)
            aux_loss = (rest - rebuilt).square().mean() / rest.square().mean().clamp(min=1e-12)
        tokens = r.flatten(0, -2)
        fvu = rest.square().sum() / (tokens - tokens.mean(0)).square().sum()
        loss = error.square().mean() + self.aux_weight * aux_loss
        return SAEOutput(r_hat * std + mu, values, indices, loss, aux_loss, fvu)

    @torch.no_grad()
    def after_step(self, out, world=None):
        """Call after every optimiser step with that step's SAEOutput: decoder rows back to unit norm, and idle
        counts brought up to date over all ranks."""
        self.decoder.copy_(F.normalize(self.decoder, dim=-1))
        fired = torch.zeros_like(self.idle).index_add_(0, out.indices.flatten(), (out.values.flatten() > 0).long())
        count = torch.tensor(out.indices[..., 0].numel(), device=fired.device)
        if world is not None:
            world.sum(fired), world.sum(count)
        self.idle.add_(count).masked_fill_(fired > 0, 0)

    def dead_fraction(self):
        return (self.idle > self.dead_after).float().mean().item()

    @classmethod
    def from_checkpoint(cls, ckpt):
        """The SAE in a checkpoint dict of kind "sae" (data.load_checkpoint). ValueError if it does not fit."""
        try:
            sae = cls(**ckpt["config"])
            sae.load_state_dict(ckpt["sae"])
        except (KeyError, TypeError, RuntimeError) as e:
            raise ValueError(f"the checkpoint is of another configuration than this TopKSAE: {e}; train it again "
                             "with `python sae.py --teacher CKPT`") from e
        return sae


def load_openai(path):
    """OpenAI's SAE for GPT-2 small (openai/sparse_autoencoder, a .pt file with the TopK activation) -> TopKSAE.

    Its TopK form standardises the input as ours does. FileNotFoundError if it is missing, ValueError if it is damaged,
    not such an SAE, or has tensors that do not fit each other."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no SAE file {path}: download OpenAI's, or train one with `python sae.py --teacher CKPT`")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises seven kinds
        raise ValueError(f"{path} is damaged or no weights file ({type(e).__name__}): download it again") from e
    names = {"pre_bias": "pre_bias", "encoder": "encoder.weight", "latent_bias": "latent_bias", "decoder": "decoder.weight"}
    missing = [name for name in names.values() if not isinstance(found, dict) or name not in found]
    if missing or found.get("activation") != "TopK" or found["activation_state_dict"].get("postact_fn", "ReLU") != "ReLU":
        raise ValueError(f"{path} is no TopK SAE of OpenAI's: " + (f"{', '.join(missing)} missing" if missing else
                         f"its activation is {found.get('activation')!r} {found.get('activation_state_dict')}"))
    n_latents, n_embd = found["encoder.weight"].shape
    sae = TopKSAE(n_embd, n_latents, found["activation_state_dict"]["k"])
    tensors = {ours: found[theirs].T if ours == "decoder" else found[theirs] for ours, theirs in names.items()}
    try:
        sae.load_state_dict({**sae.state_dict(), **tensors})
    except RuntimeError as e:
        raise ValueError(f"{path} holds tensors that do not fit each other: {e}") from e
    return sae


# ---- the teacher, cut in two at the SAE's layer ------------------------------------------------------------

def residual(teacher, idx, layer):
    """idx (B,T) -> r (B,T,D), the residual stream after block `layer` (0-based)."""
    x = teacher.embed(idx)
    for block in teacher.h[:layer + 1]:
        x = block(x)
    return x


def loss_from(teacher, r, targets, layer):
    """r (B,T,D) after block `layer`, targets (B,T), -1 = none -> () next-token loss in nats, summed."""
    for block in teacher.h[layer + 1:]:
        r = block(r)
    return teacher.token_loss(r, targets)


def check_pair(teacher, layer, sae=None):
    """ValueError unless `teacher` is a plain GPT that has block `layer` and the width that `sae` reads."""
    if teacher.config.mix != "none":
        raise ValueError(f"the teacher is a model of mix={teacher.config.mix!r}; it must be a plain GPT, as "
                         "`python train.py --mode ntp` trains one")
    if not 0 <= layer < teacher.config.n_layer:
        raise ValueError(f"layer={layer} names no block of a teacher with {teacher.config.n_layer}: take 0 to "
                         f"{teacher.config.n_layer - 1}")
    if sae is not None and sae.pre_bias.numel() != teacher.config.n_embd:
        raise ValueError(f"the SAE reads vectors of width {sae.pre_bias.numel()}, the teacher's are "
                         f"{teacher.config.n_embd} wide: train one for it with `python sae.py --teacher CKPT`")


def check_teacher_reads(teacher, block_size, vocab_size):
    """ValueError unless the teacher is a plain GPT that reads blocks of that many tokens of that vocabulary."""
    check_pair(teacher, 0)
    if teacher.config.vocab_size != vocab_size:
        raise ValueError(f"the teacher's vocabulary has {teacher.config.vocab_size} tokens, the data's {vocab_size}: make the "
                         "data with the teacher's tokenizer (python data.py --tokenizer), or train a teacher on this data")
    if teacher.config.block_size < block_size:
        raise ValueError(f"--block_size {block_size} is longer than the teacher's {teacher.config.block_size}: lower it")


# ---- concept labels ----------------------------------------------------------------------------------------

PARTS = residual, loss_from  # the teacher below and above the SAE; Labeler compiles them where that pays


def attribution(teacher, sae, idx, targets, layer, parts=PARTS):
    """s_i = a_i * (g . W_dec_i) of each token's active latents: idx, targets (B,T) -> s, indices, both (B,T,K).

    Exact, for less work: the blocks up to `layer` run without a graph, those above back-propagate to r alone (no
    parameter gradient), and only active latents are scored, since the others have a_i = 0. The factor std(r) > 0
    between W_dec_i and r's own scale is left out: it cannot change a token's ranking."""
    below, above = parts
    with torch.no_grad():
        r = below(teacher, idx, layer)
        with torch.autocast(r.device.type, enabled=False):
            values, indices = sae.encode(r)
    with torch.enable_grad():
        r.requires_grad_()
        g, = torch.autograd.grad(above(teacher, r, targets, layer), r)  # (B,T,D)
    with torch.no_grad(), torch.autocast(r.device.type, enabled=False):
        dots = [sae.decoder[i] @ row.float().unsqueeze(-1) for i, row in zip(indices, g)]  # (T,K,D) at a time, not (B,T,K,D)
        return values * torch.stack(dots).squeeze(-1), indices


def concept_labels(teacher, sae, idx, targets, layer, n_labels=4, rank_by="attribution", parts=PARTS):
    """The concepts each token is to predict: idx, targets (B,T) int64 -> (B,T,n_labels) int64, best first, -1 = none.

    rank_by: "attribution" s_i (the paper's), "negative" -s_i, "absolute" |s_i|, "activation" a_i. Only scores
    above 0 make labels; a last position without a target has no gradient, so none unless by activation.
    ValueError for a teacher with concepts, a layer it lacks, an SAE of another width, a wrong ranking or count."""
    check_pair(teacher, layer, sae)
    if rank_by not in RANKINGS:
        raise ValueError(f"rank_by={rank_by!r} is none of {', '.join(RANKINGS)}")
    if not 1 <= n_labels <= sae.k:
        raise ValueError(f"n_labels={n_labels} must lie between 1 and the SAE's k={sae.k}")
    if rank_by == "activation":
        with torch.no_grad():
            r = parts[0](teacher, idx, layer)
            with torch.autocast(idx.device.type, enabled=False):
                scores, indices = sae.encode(r)
    else:
        scores, indices = attribution(teacher, sae, idx, targets, layer, parts)
        scores = {"attribution": scores, "negative": -scores, "absolute": scores.abs()}[rank_by]
    best, at = scores.topk(n_labels)
    return indices.gather(-1, at).masked_fill(best <= 0, -1)


class Labeler:
    """`labeler(idx, targets, numbers)`: the concept_labels of the training windows with these numbers, `.val` those of
    validation windows. CachedLabels reads what this makes.

    With `keep` a window is labelled once and remembered (4 bytes a label), so that a second student over the same
    windows has its labels for nothing; `seconds` then counts the time this took."""

    def __init__(self, teacher, sae, layer, n_labels=4, rank_by="attribution", autocast=None, keep=False, compile=False):
        check_pair(teacher, layer, sae)
        self.teacher, self.sae, self.layer, self.n_labels, self.rank_by = teacher, sae, layer, n_labels, rank_by
        self.autocast, self.keep, self.kept, self.seconds = autocast, keep, {}, 0.0
        self.n_concepts, self.parts = len(sae.encoder), tuple(map(torch.compile, PARTS)) if compile else PARTS

    def check(self, block_size, vocab_size):
        """ValueError unless the teacher reads blocks of that many tokens of that vocabulary."""
        check_teacher_reads(self.teacher, block_size, vocab_size)

    def identity(self):
        """What the labels depend on, in plain types: a run remembers it and refuses to go on with other labels."""
        return {"teacher": fingerprint(self.teacher), "sae": fingerprint(self.sae), "layer": self.layer,
                "n_labels": self.n_labels, "rank_by": self.rank_by}

    def val(self, idx, targets, numbers=None):
        """idx, targets (B,T) -> concept_labels (B,T,n_labels), nothing looked up or kept."""
        with self.autocast or torch.autocast(idx.device.type, enabled=False):
            return concept_labels(self.teacher, self.sae, idx, targets, self.layer, self.n_labels, self.rank_by, self.parts)

    def __call__(self, idx, targets, numbers):
        if self.kept and all(n in self.kept for n in numbers):
            return torch.stack([self.kept[n] for n in numbers]).to(idx.device, torch.int64)
        start = time.perf_counter()
        labels = self.val(idx, targets)
        if self.keep:
            self.kept.update(zip(numbers, labels.to(torch.int32).cpu()))
            self.seconds += time.perf_counter() - start
        return labels


LABELS_HEADER, NO_LABEL = 4096, 65535  # bytes of JSON, then uint16 (windows, T, n_labels)


class CachedLabels:
    """The labels that `sae.py label` wrote beside the shards of `folder`: used like a Labeler, without a teacher.

    ValueError if there are none, several (name one of their hashes), of other windows, or of another data set."""

    def __init__(self, folder, block_size, name=""):
        self.files, self.seconds = {}, 0.0
        make = f"make them with `python sae.py label --data {folder} --teacher CKPT --sae CKPT`"
        for split in ("train", "val"):
            windows, paths = Windows(folder, split, block_size), sorted(Path(folder).glob(f"{split}.{name or '*'}.labels"))
            fit = [p for p in paths if read_labels_header(p)["block_size"] == block_size] or paths[:1]
            if len(fit) != 1:
                found = f"{', '.join(p.name.split('.')[1] for p in fit)}: choose with --labels_name" if fit else f"none: {make}"
                raise ValueError(f"{folder} must have one file of cached {split} labels{' ' + name if name else ''}, and has {found}")
            path, name = fit[0], fit[0].name.split(".")[1]  # of the other split, too
            header = read_labels_header(path)
            wanted = {"block_size": block_size, "windows": len(windows), "data": windows.fingerprint()}
            for key, value in wanted.items():
                if header.get(key) != value:
                    raise ValueError(f"{path} was made for {key} {header.get(key)}, not {value}: {make}")
            self.n_labels, self.n_concepts, self.header = header["identity"]["n_labels"], header["n_concepts"], header
            shape = (len(windows), block_size, self.n_labels)
            self.files[split] = np.memmap(path, "<u2", "r", LABELS_HEADER, shape)

    def identity(self):
        return self.header["identity"]

    def check(self, block_size, vocab_size):
        pass  # the data's fingerprint says it

    def read(self, split, numbers, device):
        labels = torch.from_numpy(self.files[split][numbers].astype(np.int64))
        labels.masked_fill_(labels == NO_LABEL, -1)
        return labels.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else labels.to(device)

    def __call__(self, idx, targets, numbers):
        return self.read("train", numbers, idx.device)

    def val(self, idx, targets, numbers):
        return self.read("val", numbers, idx.device)


def read_labels_header(path):
    """The dict at the beginning of a label file. ValueError if it is damaged or none."""
    try:
        with open(path, "rb") as f:
            header = json.loads(f.read(LABELS_HEADER))
        if header["format"] != "cocomix-labels-1":
            raise ValueError("its format is another")
        size = LABELS_HEADER + 2 * header["windows"] * header["block_size"] * header["identity"]["n_labels"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is no label file: remove it and run `python sae.py label` again") from e
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, not {size:,}: remove it and run `python sae.py label` again")
    return header


@dataclass(frozen=True)
class LabelSettings:
    """Write the concept labels of a data set beside its shards, for train.py --labels cached."""
    teacher: str = ""  # a plain GPT: checkpoint (train.py --mode ntp), gpt2, or GPT-2's .safetensors or .bin
    sae: str = ""  # its SAE: checkpoint (sae.py), openai, or openai:FILE
    sae_layer: int = 5  # the block that OpenAI's SAE reads; a checkpoint of ours says so itself
    data: str = "data/pystdlib"  # folder of token shards (data.py); both splits are labelled
    block_size: int = 0  # tokens of a window, the --block_size of the training; 0: the teacher's
    n_labels: int = 4  # concept labels a token
    rank_by: Literal[RANKINGS] = "attribution"  # what makes a latent a label
    batch_tokens: int = 16_384  # tokens a pass, of each process
    device: str = "auto"  # cuda, mps or cpu; auto finds it
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the teacher's pass; auto: bfloat16 on CUDA
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile for the teacher; auto: on CUDA only

    def __post_init__(self):
        if not (self.teacher and self.sae) or self.batch_tokens < 1 or self.block_size < 0:
            raise ValueError(f"label needs --teacher CKPT and --sae CKPT; --batch_tokens {self.batch_tokens} must be 1 or more, "
                             f"--block_size {self.block_size} 0 or more")


def write_labels(settings, world):
    """The command `sae.py label`. All processes share the passes; what is whole survives an interruption, whoever goes on."""
    teacher = load_teacher(settings.teacher, world)
    sae, layer, sae_path = load_sae(settings, teacher, world)
    labeler = Labeler(teacher, sae, layer, settings.n_labels, settings.rank_by, world.autocast(settings.dtype),
                      compile=world.compiles(settings.compile))
    T = settings.block_size or teacher.config.block_size
    if labeler.n_concepts > NO_LABEL:
        raise ValueError(f"{settings.sae} has {labeler.n_concepts} latents, a label file can name {NO_LABEL}")
    for split in ("val", "train"):
        windows = Windows(settings.data, split, T, vocab_size=teacher.config.vocab_size)
        labeler.check(T, windows.meta["vocab_size"])
        header = {"format": "cocomix-labels-1", "identity": labeler.identity(), "block_size": T, "windows": len(windows),
                  "n_concepts": labeler.n_concepts, "data": windows.fingerprint(), "bfloat16": world.bfloat16(settings.dtype)}
        name = hashlib.sha256(json.dumps([header["identity"], header["bfloat16"], T]).encode()).hexdigest()[:8]
        path, rows = Path(settings.data) / f"{split}.{name}.labels", max(1, settings.batch_tokens // T)
        part, done = path.with_suffix(".labels.tmp"), path.with_suffix(".labels.tmp.done")  # a byte for each window that is labelled
        names = {"made_from": [settings.teacher, settings.sae], "sae_file": str(sae_path)}  # how they were spelt makes no labels
        first = json.dumps({**header, **names}).encode().ljust(LABELS_HEADER)
        if len(first) > LABELS_HEADER:
            raise ValueError(f"the paths {names} are too long for a label file's header: name shorter ones")

        def same(file):
            found = read_labels_header(file)
            return {k: v for k, v in found.items() if k not in names} == header
        if path.exists() and same(path):
            world.print(f"{path}: reused")
            continue
        with writing(path):
            if world.main and not (done.exists() and done.stat().st_size == len(windows) and part.exists() and same(part)):
                done.unlink(missing_ok=True)  # marks never outlive the labels they are of
                with open(part, "wb") as f:
                    f.write(first)
                    f.truncate(LABELS_HEADER + 2 * len(windows) * T * settings.n_labels)
                with atomic(done) as tmp:
                    tmp.write_bytes(bytes(len(windows)))
            world.barrier()
            missing = np.flatnonzero(np.frombuffer(done.read_bytes(), np.uint8) == 0).tolist()
            world.barrier()  # all have the same list
            with open(part, "r+b") as f, open(done, "r+b") as marks, world.bar(len(missing) // world.size, f"label {split}", unit=" windows") as bar:
                chunks = [missing[i:i + rows] for i in range(0, len(missing), rows)]
                for chunk in chunks[world.rank::world.size]:
                    window = torch.stack([windows.window(n) for n in chunk]).to(world.device)
                    labels = labeler.val(window[:, :-1], window[:, 1:].contiguous()).cpu()
                    for n, tokens in zip(chunk, labels.masked_fill(labels < 0, NO_LABEL).numpy().astype("<u2")):
                        f.seek(LABELS_HEADER + 2 * n * T * settings.n_labels)
                        f.write(tokens.tobytes())
                    f.flush()
                    os.fsync(f.fileno())  # before they are marked: labels must outlive a power cut if their marks do
                    for n in chunk:
                        marks.seek(n)
                        marks.write(b"\1")
                    marks.flush()
                    bar.update(len(chunk))
            world.barrier()
            if world.main:
                os.replace(part, path)
                done.unlink()
            world.barrier()
        world.print(f"{path}: {len(windows):,} windows of {T} tokens, {2 * settings.n_labels} bytes a token")


def fingerprint(module):
    """16 hex digits of the SHA-256 of a module's tensors: which teacher, which SAE."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(name.encode() + data.tobytes())
    return digest.hexdigest()[:16]


# ---- the trainer -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SAESettings:
    """Train a TopK SAE on a teacher's residual stream."""
    teacher: str = ""  # a plain GPT: checkpoint (train.py --mode ntp), gpt2, or GPT-2's .safetensors or .bin
    data: str = "data/pystdlib"  # folder of token shards (data.py)
    out: str = "out/sae"  # folder for ckpt.pt and log.jsonl
    layer: int = 5  # read the residual stream after this block (0-based)
    n_latents: int = 32768  # C
    k: int = 32  # latents active for a token
    k_aux: int = 0  # dead latents that rebuild the error; 0: half the teacher's width
    aux_weight: float = 1 / 32  # weight of that loss
    dead_after: int = 10_000_000  # tokens without firing after which a latent counts as dead
    steps: int = 10_000  # optimiser steps
    batch_tokens: int = 8192  # tokens a step, over all processes
    block_size: int = 0  # tokens the teacher sees at once; 0: its own block size
    lr: float = 3e-4  # peak learning rate: 5 % warm-up, then constant, the last fifth down to 0
    eval_tokens: int = 65_536  # validation tokens for the final figures
    save_interval: int = 1000  # steps between checkpoints; the last step is always saved
    log_interval: int = 10  # steps between log lines
    seed: int = 0  # of initialisation and data order
    device: str = "auto"  # cuda, mps or cpu; auto finds it
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the teacher's pass; auto: bfloat16 on CUDA
    resume: bool = False  # go on from the checkpoint in --out

    def __post_init__(self):
        for name in ("n_latents", "k", "steps", "batch_tokens", "save_interval", "log_interval", "dead_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.block_size < 0 or self.seed < 0:
            raise ValueError(f"--block_size {self.block_size} and --seed {self.seed} must be 0 or more")
        if self.k > self.n_latents:
            raise ValueError(f"--k {self.k} is larger than --n_latents {self.n_latents}")


def sae_identity(settings, teacher):
    """What makes two trained SAEs the same: settings, teacher and data, not where they run or are written."""
    T, free = settings.block_size or teacher.config.block_size, ("out", "resume", "device", "log_interval", "save_interval")
    return {**{k: v for k, v in asdict(settings).items() if k not in free}, "block_size": T,
            "teacher": fingerprint(teacher), "data": Windows(settings.data, "train", T).fingerprint()}


@torch.no_grad()
def evaluate_sae(teacher, sae, layer, windows, tokens, world):
    """Over a fixed set of about `tokens` tokens of `windows`, shared by all ranks: {fvu, teacher_loss, spliced_loss}.

    spliced_loss is the teacher's loss (nats a token) with the SAE's reconstruction in place of its residual
    stream. The first position keeps its own and stays out of the FVU: its norm is many times the others'."""
    count, batches = windows.fixed(tokens, world.rank, world.size)
    total, mean = torch.zeros(4, dtype=torch.float64), torch.zeros(teacher.config.n_embd, dtype=torch.float64)
    for _, window in batches:
        idx, targets = window[:, :-1].to(world.device), window[:, 1:].to(world.device)
        x = residual(teacher, idx, layer)
        (r, mu, std), r_hat = standardise(x[:, 1:]), sae.decode(*sae.encode(x[:, 1:]))
        spliced = torch.cat([x[:, :1], (r_hat * std + mu).to(x.dtype)], 1)
        losses = loss_from(teacher, x, targets, layer), loss_from(teacher, spliced, targets, layer)
        total += torch.stack([(r - r_hat).square().sum(), r.square().sum(), *losses]).cpu().double()
        mean += r.sum((0, 1)).cpu().double()
    (error, square, plain, spliced), mean = world.sum(total).tolist(), world.sum(mean)
    T = windows.block_size
    variance = square - mean.square().sum().item() / (count * (T - 1))  # sum |r - mean r|^2
    return {"fvu": error / variance, "teacher_loss": plain / (count * T), "spliced_loss": spliced / (count * T)}


def train_sae(settings, teacher, world, resume=False):
    """Train an SAE for `teacher` as `settings` (SAESettings) say -> (sae, figures); writes out/ckpt.pt, out/log.jsonl.

    The first position of each window is left out (see evaluate_sae). With `resume` training goes on from
    out/ckpt.pt, bit for bit. ValueError for settings that do not fit teacher, data, processes or checkpoint,
    FloatingPointError when the loss is not finite: the last checkpoint stays."""
    check_pair(teacher, settings.layer)
    T = settings.block_size or teacher.config.block_size
    if T > teacher.config.block_size:
        raise ValueError(f"--block_size {T} is longer than the teacher's {teacher.config.block_size}: lower it")
    rows, left = divmod(settings.batch_tokens, T * world.size)
    if left or not rows:
        raise ValueError(f"--batch_tokens {settings.batch_tokens} is no multiple of {world.size} processes x {T} tokens: "
                         f"take {max(1, rows) * T * world.size}")
    data, val = (Windows(settings.data, split, T, settings.seed, teacher.config.vocab_size) for split in ("train", "val"))
    torch.manual_seed(settings.seed)
    sae = TopKSAE(teacher.config.n_embd, settings.n_latents, settings.k, settings.k_aux, settings.aux_weight,
                  settings.dead_after).to(world.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=settings.lr, fused=True)
    path, begin, records, identity = Path(settings.out) / "ckpt.pt", 0, [], sae_identity(settings, teacher)
    if resume:
        ckpt = load_checkpoint(path, "sae", world.device)
        changed = [k for k in identity if identity[k] != ckpt["identity"].get(k)]
        if changed:
            raise ValueError(f"{path} was trained with other settings ({', '.join(changed)}): give the same, or "
                             "another --out")
        sae.load_state_dict(ckpt["sae"])
        optimizer.load_state_dict(ckpt["optimizer"])
        begin, records = ckpt["step"], ckpt["log"]
    log, start = Log(path.parent / "log.jsonl", records, world.main), time.perf_counter()
    since, sums, autocast = 0, torch.zeros(3, device=world.device), world.autocast(settings.dtype)

    def save(step, figures):
        if world.main:
            save_checkpoint(path, "sae", config=sae.config, sae=sae.state_dict(), optimizer=optimizer.state_dict(),
                            layer=settings.layer, step=step, identity=identity, figures=figures, log=log.records)

    with Interrupt(world) as interrupt, world.bar(settings.steps, "SAE", begin) as bar:
        for step in range(begin, settings.steps):
            idx, _ = data.batch(step, rows, world.rank, world.size)
            with torch.no_grad(), autocast:
                x = residual(teacher, idx.to(world.device), settings.layer)[:, 1:].float()
            if step == 0:
                sae.pre_bias.data.copy_(world.sum(standardise(x)[0].mean((0, 1))) / world.size)
            out = sae(x)
            out.loss.backward()
            for p in sae.parameters():  # the mean over ranks, AuxK's ratio being each rank's own
                world.sum(p.grad).div_(world.size)
            done = step + 1
            rate = min(1, done / settings.steps / 0.05, (1 - step / settings.steps) / 0.2)
            optimizer.param_groups[0]["lr"] = settings.lr * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sae.after_step(out, world)
            since, sums = since + 1, sums + torch.stack([out.loss, out.aux_loss, out.fvu]).detach()
            stopping, last = interrupt.asked(), done == settings.steps
            saving = done % settings.save_interval == 0 or stopping
            if done % settings.log_interval == 0 or saving or last:
                loss, aux_loss, fvu = (world.sum(sums) / (world.size * since)).tolist()
                since, sums, dead = 0, torch.zeros_like(sums), sae.dead_fraction()
                if not loss < float("inf"):
                    raise FloatingPointError(f"the SAE's loss is {loss} at step {done}: lower --lr {settings.lr}; the "
                                             f"last good checkpoint, if any, is {path}")
                log.write({"step": done, "tokens": done * settings.batch_tokens, "loss": loss, "aux_loss": aux_loss,
                           "fvu": fvu, "dead_fraction": dead, "seconds": round(time.perf_counter() - start, 3)})
                bar.set_postfix_str(f"fvu {fvu:.3f} dead {dead:.1%}", refresh=False)
            if saving and not last:
                save(done, {})
            bar.update()
            if stopping and not last:
                interrupt.leave(path, done)
    sae.eval()
    figures = {**evaluate_sae(teacher, sae, settings.layer, val, settings.eval_tokens, world),
               "dead_fraction": sae.dead_fraction()}
    log.write({"step": settings.steps, "tokens": settings.steps * settings.batch_tokens, **figures})
    save(settings.steps, figures)
    return sae, figures


def describe_figures(figures):
    return (f"fraction of variance unexplained {figures['fvu']:.3f}, dead latents {figures['dead_fraction']:.1%}, teacher's "
            f"loss {figures['teacher_loss']:.3f}, with the SAE spliced in {figures['spliced_loss']:.3f}")


GPT2 = ("https://huggingface.co/openai-community/gpt2/resolve/main/model.safetensors",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707")
OPENAI_SAE = "https://openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small/resid_post_mlp_v5_32k/autoencoders/{}.pt"


def load_teacher(name, world):
    """The plain GPT that `name` names, frozen, on the world's device: a checkpoint of ours, a GPT-2 in .safetensors or
    .bin, or "gpt2", which is downloaded once (548 MB). ValueError or OSError if it is not to be had."""
    path = world.first(lambda: fetch(GPT2[0], cache("gpt2.safetensors"), GPT2[1])) if name == "gpt2" else Path(name)
    foreign = path.suffix in (".safetensors", ".bin")
    teacher = load_hf(path) if foreign else CoCoMix.from_checkpoint(load_checkpoint(path, "model"))
    return teacher.to(world.device).eval().requires_grad_(False)


def load_sae(settings, teacher, world):
    """The SAE that `settings.sae` names, frozen, on the world's device, the layer it reads, and its file: a checkpoint of
    ours, which must be of this teacher; "openai:FILE"; or "openai", OpenAI's for GPT-2, which is downloaded once (201 MB).
    OpenAI's read layer `settings.sae_layer`."""
    if settings.sae == "openai" or settings.sae.startswith("openai:"):
        layer, path = settings.sae_layer, settings.sae.removeprefix("openai").removeprefix(":")
        path = path or world.first(lambda: fetch(OPENAI_SAE.format(layer), cache(f"openai_v5_32k_layer_{layer}/{layer}.pt")))
        sae = load_openai(path)
    else:
        ckpt, path = load_checkpoint(settings.sae, "sae"), settings.sae
        check_teacher(ckpt, teacher, settings)
        sae, layer = TopKSAE.from_checkpoint(ckpt), ckpt["layer"]
    check_pair(teacher, layer, sae)
    return sae.to(world.device).eval().requires_grad_(False), layer, Path(path)


# ---- reading latents: the concept dictionary ---------------------------------------------------------------

@dataclass(frozen=True)
class DescribeSettings:
    """Write a concept dictionary, concepts.json, beside an SAE: what each latent fires on in held-out text."""
    sae: str = ""  # checkpoint of the SAE (sae.py), openai, or openai:FILE
    teacher: str = ""  # its teacher: checkpoint (train.py --mode ntp), gpt2, or GPT-2's .safetensors or .bin
    sae_layer: int = 5  # the block that OpenAI's SAE reads; a checkpoint of ours says so itself
    data: str = "data/pystdlib"  # folder of token shards (data.py); its validation split is read
    tokens: int = 0  # tokens to read, spread over the split; 0: all
    snippets: int = 8  # pieces of text a latent, around its strongest activations
    device: str = "auto"  # cuda, mps or cpu; auto finds it

    def __post_init__(self):
        if self.tokens < 0 or not 1 <= self.snippets <= STRONGEST:
            raise ValueError(f"--tokens {self.tokens} must be 0 or more, --snippets {self.snippets} from 1 to {STRONGEST}")
        if not (self.sae and self.teacher):
            raise ValueError("describe needs --sae CKPT (from sae.py) and --teacher CKPT (the one it was trained on)")


class Strongest:
    """The STRONGEST largest activations of each of C latents in a stream, and their places: (C, STRONGEST) memory."""

    def __init__(self, n_latents):
        self.values, self.places = torch.zeros(n_latents, STRONGEST), torch.full((n_latents, STRONGEST), -1)

    def add(self, values, latents, places):
        """values, latents, places (N,), one entry a firing, in the order of the text; of equal ones the first stays."""
        keep = values > self.values[latents, -1]  # the others cannot enter
        values, latents, places = values[keep], latents[keep], places[keep]
        order = values.argsort(descending=True, stable=True)
        order = order[latents[order].argsort(stable=True)]  # by latent, its strongest first
        values, latents, places = values[order], latents[order], places[order]
        rank = torch.arange(len(latents)) - torch.searchsorted(latents, latents)
        top = rank < STRONGEST
        new_values, new_places = torch.zeros_like(self.values), torch.full_like(self.places, -1)
        new_values[latents[top], rank[top]], new_places[latents[top], rank[top]] = values[top], places[top]
        values, at = torch.cat([self.values, new_values], 1).sort(dim=1, descending=True, stable=True)
        places = torch.cat([self.places, new_places], 1).gather(1, at)
        self.values, self.places = values[:, :STRONGEST], places[:, :STRONGEST]


def typical(ids, frequency, encoding, n=6):
    """The tokens typical of a list of ids, by share * log(lift): [[id, text, share of the ids, lift], ...], the lift
    being that share over the token's `frequency` in the text."""
    if not ids:
        return []
    values, counts = torch.tensor(ids).unique(return_counts=True)
    share, lift = counts / len(ids), counts / len(ids) / frequency[values]
    score, order = (share * lift.log()).sort(descending=True, stable=True)
    return [[int(values[i]), encoding.decode([int(values[i])]), round(float(share[i]), 4), round(float(lift[i]), 4)]
            for s, i in zip(score[:n], order) if s > 0]


@torch.no_grad()
def describe(teacher, sae, layer, windows, encoding, world, tokens=0, snippets=8, around=12):
    """Yield the concept dictionary of an SAE, a dict of plain types a latent, from about `tokens` tokens of `windows`.

    `rate`: share of tokens it fires on; `max`: its largest activation; `tokens`, `next`: what is typical of the tokens
    it fires on and of those that follow, over its STRONGEST strongest firings, as in `typical`; `snippets`: [text
    before, token, text after, activation] around the strongest. The first position of a window is left out. Memory
    does not grow with the text."""
    check_pair(teacher, layer, sae)
    T, C = windows.block_size, len(sae.encoder)
    chosen = windows.spread(tokens or len(windows) * T)
    strongest, fired, seen = Strongest(C), torch.zeros(C, dtype=torch.int64), torch.zeros(encoding.n_vocab)
    with world.bar(len(chosen), "describe") as bar:
        rows = max(1, 4096 // T)
        for start in range(0, len(chosen), rows):
            window = torch.stack([windows.window(n) for n in chosen[start:start + rows]])  # (B,T+1)
            values, indices = sae.encode(residual(teacher, window[:, :-1].to(world.device), layer))
            values, indices = values[:, 1:].cpu(), indices[:, 1:].cpu()  # (B,T-1,K)
            places = (start + torch.arange(len(window)))[:, None] * T + torch.arange(1, T)  # of chosen[place // T]
            active = values > 0
            fired += torch.bincount(indices[active], minlength=C)
            seen += torch.bincount(window[:, 1:].flatten(), minlength=encoding.n_vocab)
            strongest.add(values[active], indices[active], places[..., None].expand_as(indices)[active])
            bar.update(len(window))
    frequency, count = seen / seen.sum(), len(chosen) * (T - 1)
    for latent in range(C):
        places = [p for p in strongest.places[latent].tolist() if p >= 0]
        texts = [(windows.window(chosen[p // T]).tolist(), p % T) for p in places]
        yield {"id": latent, "rate": fired[latent].item() / count, "max": round(strongest.values[latent, 0].item(), 4),
               "tokens": typical([ids[at] for ids, at in texts], frequency, encoding),
               "next": typical([ids[at + 1] for ids, at in texts], frequency, encoding),
               "snippets": [[encoding.decode(ids[max(0, at - around):at]), encoding.decode([ids[at]]),
                             encoding.decode(ids[at + 1:at + 1 + around]), round(value, 4)]
                            for (ids, at), value in zip(texts[:snippets], strongest.values[latent].tolist())]}


def write_dictionary(settings):
    """The command `sae.py describe`: concepts.json beside the SAE, a header line and one line a latent."""
    world = World(settings.device)
    if world.size > 1:
        raise ValueError(f"sae.py describe runs as one process, not {world.size}: start it with python, not torchrun")
    teacher = load_teacher(settings.teacher, world)
    sae, layer, path = load_sae(settings, teacher, world)
    windows = Windows(settings.data, "val", teacher.config.block_size, vocab_size=teacher.config.vocab_size)
    path, encoding = path.parent / "concepts.json", get_tokenizer(windows.meta["tokenizer"])
    entries = describe(teacher, sae, layer, windows, encoding, world, settings.tokens, settings.snippets)
    with atomic(path) as tmp, open(tmp, "w") as f:  # written as it is made: one line a latent
        f.write(f'{{"format": "cocomix-concepts-1", "sae": "{fingerprint(sae)}", "concepts": [\n')
        for entry in entries:
            f.write((",\n" if entry["id"] else "") + json.dumps(entry))
        f.write("\n]}\n")
    world.print(f"{path}: {len(sae.encoder)} concepts from {settings.data}")


def check_out(out, resume):
    """ValueError unless folder `out` has a checkpoint exactly if `resume` wants one: a run never overwrites another."""
    if (Path(out) / "ckpt.pt").exists() and not resume:
        raise ValueError(f"{out} already holds a checkpoint: go on with --resume, or choose another --out")
    if resume and not (Path(out) / "ckpt.pt").exists():
        raise ValueError(f"{out} holds no checkpoint to go on from: leave out --resume, or name the run's --out")


def check_teacher(ckpt, teacher, settings):
    """ValueError unless the SAE in `ckpt` was trained on `teacher`; `settings` name both files."""
    check_pair(teacher, ckpt["layer"])
    if ckpt["identity"]["teacher"] != fingerprint(teacher):
        raise ValueError(f"{settings.sae} was trained on another teacher than {settings.teacher}: train one with "
                         f"`python sae.py --teacher {settings.teacher} --layer {ckpt['layer']}`")


def main():
    if sys.argv[1:2] == ["label"]:
        settings = parse(LabelSettings, sys.argv[2:])
        return write_labels(settings, World(settings.device))
    if sys.argv[1:2] == ["describe"]:
        return write_dictionary(parse(DescribeSettings, sys.argv[2:]))
    settings = parse(SAESettings)
    world = World(settings.device)
    if not settings.teacher:
        raise ValueError("--teacher is missing: give a plain GPT's checkpoint, as `python train.py --mode ntp` writes one")
    check_out(settings.out, settings.resume)
    figures = train_sae(settings, load_teacher(settings.teacher, world), world, settings.resume)[1]
    world.print(f"SAE: {describe_figures(figures)}; {settings.out}/ckpt.pt")


if __name__ == "__main__":
    run(main)
