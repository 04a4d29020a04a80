"""A TopK sparse autoencoder (SAE) on a teacher's residual stream, its trainer, and the concept labels made with it.

    python sae.py --teacher out/tiny/teacher/ckpt.pt --data data/pystdlib --layer 1 --out out/my_sae
    torchrun --nproc_per_node=8 sae.py --teacher CKPT ...              # same, tokens shared by 8 GPUs

What a token is labelled with (CoCoMix, arXiv 2502.08524, its selection of target concepts by attribution):
    r  = the teacher's residual stream after block `layer` (0-based), normalised per token as in cocomix.standardise
    a  = relu(TopK(W_enc (r - b_pre) + b_lat))                         its K active latents of C
    s_i = a_i * (g . W_dec_i),   g = dL/dr,  L = the teacher's summed next-token loss
    labels = the 4 latents of largest s_i
s_i is the first-order share of latent i in the loss L, so a large s_i marks a concept that *raises* the teacher's loss.
The paper and its code rank by this signed value, and so does the default; `rank_by` has the alternatives.
Because L sums over positions, g_t holds what r_t does to all later predictions: labels look ahead, inputs never do.

SAE form and training follow Gao et al., "Scaling and evaluating sparse autoencoders", arXiv 2406.04093 (TopK, AuxK).
Dimensions: B batch, T tokens, D the teacher's width, C latents, K active latents, n labels.
"""
import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from cocomix import CoCoMix, sparse_matmul, standardise, top_k
from data import Log, Windows, World, load_checkpoint, parse, run, save_checkpoint, writing

RANKINGS = ("attribution", "negative", "absolute", "activation")


# ---- the sparse autoencoder ------------------------------------------------------------------------------------------

class SAEOutput(NamedTuple):
    """What TopKSAE gives for x (..., D)."""
    reconstruction: torch.Tensor  # (..., D) in x's own scale
    values: torch.Tensor  # (..., K) activations, 0 or more, largest first
    indices: torch.Tensor  # (..., K) int64, their latents
    loss: torch.Tensor  # () mean squared error of the normalised input + aux_weight * aux_loss
    aux_loss: torch.Tensor  # () share of the remaining error that dead latents leave unexplained; 0 if none is dead
    fvu: torch.Tensor  # () fraction of variance unexplained, see TopKSAE


class TopKSAE(nn.Module):
    """SAE that keeps the k largest latents of every input (Gao et al., section 2.3), normalisation inside.

    FVU, everywhere in this project: sum |r - r_hat|^2 / sum |r - mean(r)|^2 over tokens, for the *normalised* input r,
    mean(r) over the same tokens. `decoder` (C,D) keeps one unit-norm row a latent: nn.Linear's weight transposed.
    A latent is dead when it has not fired for `dead_after` tokens; dead ones learn to explain the error (AuxK)."""

    def __init__(self, n_embd, n_latents, k, k_aux=0, aux_weight=1 / 32, dead_after=10_000_000):
        super().__init__()
        if not 1 <= k <= n_latents:
            raise ValueError(f"k={k} must lie between 1 and n_latents={n_latents}")
        self.config = dict(n_embd=n_embd, n_latents=n_latents, k=k, k_aux=k_aux, aux_weight=aux_weight, dead_after=dead_after)
        self.k, self.k_aux, self.aux_weight, self.dead_after = k, k_aux or max(1, n_embd // 2), aux_weight, dead_after
        self.pre_bias = nn.Parameter(torch.zeros(n_embd))  # b_pre
        self.decoder = nn.Parameter(F.normalize(torch.randn(n_latents, n_embd), dim=-1))  # W_dec, transposed
        self.encoder = nn.Parameter(self.decoder.detach().clone())  # W_enc starts as the decoder's transpose
        self.latent_bias = nn.Parameter(torch.zeros(n_latents))  # b_lat
        self.register_buffer("idle", torch.zeros(n_latents, dtype=torch.int64))  # tokens since each latent last fired

    def preactivations(self, normalised):
        return F.linear(normalised - self.pre_bias, self.encoder, self.latent_bias)  # (..., C)

    def encode(self, x):
        """x (..., D) -> values (..., k) fp32, largest first, and indices (..., k) int64."""
        pre = self.preactivations(standardise(x)[0])
        indices = top_k(pre, self.k)
        return pre.gather(-1, indices).relu(), indices

    def decode(self, values, indices, mu=0.0, std=1.0):
        """values, indices (..., k) -> (..., D) in normalised units; with the input's mu and std (..., 1), in its own scale."""
        return (sparse_matmul(values, indices, self.decoder) + self.pre_bias) * std + mu

    def forward(self, x):
        """x (..., D) -> SAEOutput. Gradients reach all four parameters."""
        r, mu, std = standardise(x)
        pre = self.preactivations(r)
        indices = top_k(pre, self.k)
        values = pre.gather(-1, indices).relu()
        r_hat = self.decode(values, indices)
        error = r - r_hat
        mse = error.square().mean()
        rest, aux_loss = error.detach(), torch.zeros((), device=x.device)
        dead = (self.idle > self.dead_after).nonzero().squeeze(-1)  # (n_dead,)
        if self.training and len(dead):  # AuxK (Gao et al., appendix A.2): dead latents alone rebuild what is left, no bias
            dead_pre = pre.index_select(-1, dead)
            best = top_k(dead_pre, min(self.k_aux, len(dead)))
            rebuilt = sparse_matmul(dead_pre.gather(-1, best).relu(), dead[best], self.decoder)
            aux_loss = (rest - rebuilt).square().mean() / rest.square().mean().clamp(min=1e-12)
        flat = r.flatten(0, -2)
        fvu = rest.square().sum() / (flat - flat.mean(0)).square().sum()
        return SAEOutput(r_hat * std + mu, values, indices, mse + self.aux_weight * aux_loss, aux_loss, fvu)

    @torch.no_grad()
    def after_step(self, values, indices, world=None):
        """To be called after each optimiser step: decoder rows back to unit norm, and who has fired is counted, over all ranks."""
        self.decoder.copy_(F.normalize(self.decoder, dim=-1))
        fired = torch.zeros_like(self.idle).index_add_(0, indices.flatten(), (values.flatten() > 0).long())
        count = torch.tensor(indices[..., 0].numel(), device=fired.device)
        if world is not None:
            world.sum(fired), world.sum(count)
        self.idle.add_(count).masked_fill_(fired > 0, 0)

    def dead_fraction(self):
        return (self.idle > self.dead_after).float().mean().item()

    @classmethod
    def from_checkpoint(cls, ckpt):
        """The SAE in a checkpoint dict of kind "sae" (`data.load_checkpoint`). ValueError if its sizes do not fit its tensors."""
        try:
            sae = cls(**ckpt["config"])
            sae.load_state_dict(ckpt["sae"])
        except (KeyError, TypeError, RuntimeError) as e:
            raise ValueError(f"the SAE checkpoint is of another configuration than TopKSAE: {e}; train it again with `python sae.py`") from e
        return sae


# ---- the teacher, cut in two at the SAE's layer ----------------------------------------------------------------------

def residual(teacher, idx, layer):
    """idx (B,T) -> r (B,T,D), the residual stream after block `layer` (0-based)."""
    x = teacher.embed(idx)
    for block in teacher.h[:layer + 1]:
        x = block(x)
    return x


def loss_from(teacher, r, targets, layer):
    """r (B,T,D) after block `layer`, targets (B,T) -> the teacher's next-token loss in nats, summed over targets that are not -1."""
    for block in teacher.h[layer + 1:]:
        r = block(r)
    return F.cross_entropy(teacher.head(r).flatten(0, 1).float(), targets.flatten(), ignore_index=-1, reduction="sum")


def check_pair(teacher, sae, layer):
    """ValueError unless `teacher` is a plain GPT that has block `layer` and the width the SAE reads."""
    if teacher.config.mix != "none":
        raise ValueError(f"the teacher is a model of mix={teacher.config.mix!r}; labels need a plain GPT: `python train.py --mode ntp`")
    if not 0 <= layer < teacher.config.n_layer:
        raise ValueError(f"layer={layer} names no block of a teacher with {teacher.config.n_layer}: take 0 to {teacher.config.n_layer - 1}")
    if sae is not None and sae.pre_bias.numel() != teacher.config.n_embd:
        raise ValueError(f"the SAE reads vectors of width {sae.pre_bias.numel()}, the teacher's residual stream has {teacher.config.n_embd}: "
                         "train one for this teacher with `python sae.py --teacher CKPT`")


# ---- concept labels --------------------------------------------------------------------------------------------------

def attribution(teacher, sae, idx, targets, layer):
    """s_i = a_i * (g . W_dec_i) of each token's K active latents: idx, targets (B,T) -> scores (B,T,K) fp32, indices (B,T,K).

    Exact, for less work: the blocks up to `layer` run without a graph, the others back-propagate to r only (no parameter
    gradient), and of the C latents only the active ones are scored: the others have a_i = 0. The factor std(r) > 0 that
    turns s_i into the loss's change in r's own scale is left out: it cannot change a token's order."""
    with torch.no_grad():
        r = residual(teacher, idx, layer)
        with torch.autocast(r.device.type, enabled=False):
            values, indices = sae.encode(r)
    with torch.enable_grad():
        r.requires_grad_()
        g, = torch.autograd.grad(loss_from(teacher, r, targets, layer), r)  # (B,T,D)
    with torch.no_grad(), torch.autocast(r.device.type, enabled=False):
        return values * (sae.decoder[indices] @ g.float().unsqueeze(-1)).squeeze(-1), indices


def concept_labels(teacher, sae, idx, targets, layer, n_labels=4, rank_by="attribution"):
    """The concepts each token is to predict: idx, targets (B,T) int64 -> (B,T,n_labels) int64, best first, -1 = none.

    rank_by: "attribution" s_i (the paper's), "negative" -s_i, "absolute" |s_i|, "activation" a_i. Only latents whose
    score is above 0 become labels: the last position has no gradient, hence no label unless by activation.
    ValueError for a teacher with concepts, a layer it lacks, an SAE of another width, or a wrong ranking or label count."""
    check_pair(teacher, sae, layer)
    if rank_by not in RANKINGS:
        raise ValueError(f"rank_by={rank_by!r} is none of {', '.join(RANKINGS)}")
    if not 1 <= n_labels <= sae.k:
        raise ValueError(f"n_labels={n_labels} must lie between 1 and the SAE's k={sae.k}")
    if rank_by == "activation":
        with torch.no_grad(), torch.autocast(idx.device.type, enabled=False):
            scores, indices = sae.encode(residual(teacher, idx, layer))
    else:
        scores, indices = attribution(teacher, sae, idx, targets, layer)
        scores = {"attribution": scores, "negative": -scores, "absolute": scores.abs()}[rank_by]
    best, at = scores.topk(n_labels)
    return indices.gather(-1, at).masked_fill(best <= 0, -1)


class Labeler:
    """`labeler(idx, targets, numbers)` -> concept_labels of the windows with these numbers; with `keep`, each window is
    labelled once and remembered (8 bytes a token), so that a second student over the same windows gets them for nothing."""

    def __init__(self, teacher, sae, layer, n_labels=4, rank_by="attribution", autocast=None, keep=False):
        check_pair(teacher, sae, layer)
        self.arguments, self.teacher, self.sae = (layer, n_labels, rank_by), teacher, sae
        self.autocast, self.kept, self.keep, self.seconds = autocast, {}, keep, 0.0

    def identity(self):
        """What the labels depend on, plain types: a run remembers it, and refuses to go on with other labels."""
        layer, n_labels, rank_by = self.arguments
        return {"teacher": fingerprint(self.teacher), "sae": fingerprint(self.sae), "layer": layer, "n_labels": n_labels, "rank_by": rank_by}

    def __call__(self, idx, targets, numbers):
        start = time.perf_counter()
        if self.keep and all(n in self.kept for n in numbers):
            labels = torch.stack([self.kept[n] for n in numbers]).to(idx.device, torch.int64)
            return torch.where(labels == 65535, -1, labels)
        with self.autocast or torch.autocast(idx.device.type, enabled=False):
            labels = concept_labels(self.teacher, self.sae, idx, targets, *self.arguments)
        if self.keep:  # 65535 stands for -1
            self.kept.update(zip(numbers, torch.where(labels < 0, 65535, labels).to("cpu", torch.uint16)))
        self.seconds += time.perf_counter() - start
        return labels


# ---- the trainer -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SAESettings:
    """Train a TopK SAE on a teacher's residual stream."""
    teacher: str = ""  # checkpoint of a plain GPT (train.py --mode ntp)
    data: str = "data/pystdlib"  # folder of token shards (data.py)
    out: str = "out/sae"  # folder for ckpt.pt and log.jsonl
    layer: int = 5  # read the residual stream after this block (0-based)
    n_latents: int = 32768  # C
    k: int = 32  # K, latents active for a token
    k_aux: int = 0  # dead latents that rebuild the error; 0: half the teacher's width
    aux_weight: float = 1 / 32  # weight of that loss
    dead_after: int = 10_000_000  # tokens without firing after which a latent counts as dead
    steps: int = 10_000  # optimiser steps
    batch_tokens: int = 8192  # tokens a step, over all processes
    block_size: int = 0  # tokens the teacher sees at once; 0: its block size
    lr: float = 3e-4  # peak learning rate: 5 % warm-up, constant, last fifth to 0
    eval_tokens: int = 65_536  # validation tokens for the final figures
    save_interval: int = 1000  # steps between checkpoints
    log_interval: int = 10  # steps between log lines
    seed: int = 0  # of initialisation and data order
    device: str = "auto"  # cuda, mps or cpu; auto finds it
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the teacher's pass; auto: bfloat16 on CUDA
    resume: bool = False  # go on from the checkpoint in --out

    def __post_init__(self):
        for name in ("n_latents", "k", "steps", "batch_tokens", "save_interval", "log_interval", "dead_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.k > self.n_latents:
            raise ValueError(f"--k {self.k} is larger than --n-latents {self.n_latents}")


def fingerprint(module):
    """16 hex digits of the SHA-256 of a module's tensors: which teacher, which SAE."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def evaluate_sae(teacher, sae, layer, windows, tokens, world):
    """On `tokens` validation tokens spread over `windows`, all ranks: {fvu, teacher_loss, spliced_loss} (nats a token).

    spliced_loss is the teacher's with its residual stream replaced by the SAE's reconstruction: what the SAE loses.
    The first position keeps its residual and stays out of the FVU: its norm is many times that of the others."""
    count = min(len(windows), max(1, tokens // windows.block_size))
    chosen = torch.arange(world.rank, count, world.size) * len(windows) // count
    total, mean = torch.zeros(4, dtype=torch.float64), torch.zeros(teacher.config.n_embd, dtype=torch.float64)
    for part in chosen.split(8):
        window = torch.stack([windows.window(int(n)) for n in part]).to(world.device)
        idx, targets = window[:, :-1], window[:, 1:]
        r = residual(teacher, idx, layer)
        n, mu, std = standardise(r[:, 1:])
        decoded = sae.decode(*sae.encode(r[:, 1:]))
        spliced = torch.cat([r[:, :1], (decoded * std + mu).to(r.dtype)], 1)
        total += torch.stack([(n - decoded).square().sum(), n.square().sum(), loss_from(teacher, r, targets, layer),
                              loss_from(teacher, spliced, targets, layer)]).double().cpu()
        mean += n.sum((0, 1)).double().cpu()
    total, mean = world.sum(total), world.sum(mean)
    inner = count * (windows.block_size - 1)
    return {"fvu": float(total[0] / (total[1] - mean.square().sum() / inner)),
            "teacher_loss": float(total[2] / (count * windows.block_size)), "spliced_loss": float(total[3] / (count * windows.block_size))}


def sae_identity(settings, teacher):
    """What makes two trained SAEs the same: teacher, data and settings; not where they run or are written."""
    T = settings.block_size or teacher.config.block_size
    kept = {k: v for k, v in asdict(settings).items() if k not in ("out", "resume", "device", "log_interval", "save_interval", "eval_tokens")}
    return {**kept, "block_size": T, "teacher": fingerprint(teacher), "data": Windows(settings.data, "train", T).fingerprint()}


def train_sae(settings, teacher, world, resume=False):
    """Train an SAE for `teacher` as `settings` (SAESettings) say -> (sae, figures). Writes out/ckpt.pt and out/log.jsonl.

    With `resume` training goes on from out/ckpt.pt. The first position of each window is left out (see evaluate_sae). ValueError for settings that do not fit the teacher
    or the processes, FloatingPointError when the loss is not finite (the last checkpoint stays)."""
    check_pair(teacher, None, settings.layer)
    T = settings.block_size or teacher.config.block_size
    rows, left = divmod(settings.batch_tokens, T * world.size)
    if left or T > teacher.config.block_size:
        raise ValueError(f"--batch-tokens {settings.batch_tokens} must be a multiple of block size {T} x {world.size} processes, "
                         f"as {max(1, rows) * T * world.size} is, and the block no longer than the teacher's {teacher.config.block_size}")
    train, val = Windows(settings.data, "train", T, settings.seed), Windows(settings.data, "val", T)
    if train.meta["vocab_size"] != teacher.config.vocab_size:
        raise ValueError(f"{settings.data} has a vocabulary of {train.meta['vocab_size']}, the teacher {teacher.config.vocab_size}: use its own data")
    torch.manual_seed(settings.seed)
    sae = TopKSAE(teacher.config.n_embd, settings.n_latents, settings.k, settings.k_aux, settings.aux_weight, settings.dead_after).to(world.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=settings.lr, fused=True)
    path, begin, identity = Path(settings.out) / "ckpt.pt", 0, sae_identity(settings, teacher)
    if resume:
        ckpt = load_checkpoint(path, "sae", world.device)
        changed = [k for k in identity if identity[k] != ckpt["identity"].get(k)]
        if changed:
            raise ValueError(f"{path} was trained with other settings ({', '.join(changed)}): use the same, or another --out")
        sae.load_state_dict(ckpt["sae"])
        optimizer.load_state_dict(ckpt["optimizer"])
        begin = ckpt["step"]
    log, spent = Log(Path(settings.out) / "log.jsonl", begin, world.main), time.perf_counter()
    since, sums, autocast = 0, torch.zeros(3, device=world.device), world.autocast(settings.dtype)

    def save(step, figures):
        if world.main:
            save_checkpoint(path, "sae", config=sae.config, sae=sae.state_dict(), optimizer=optimizer.state_dict(), layer=settings.layer,
                            step=step, identity=identity, teacher=identity["teacher"], figures=figures)

    with world.bar(settings.steps, "SAE", begin) as bar:
        for step in range(begin, settings.steps):
            sae.train()
            idx, _ = train.batch(step, rows, world.rank, world.size)
            with torch.no_grad(), autocast:
                x = residual(teacher, idx.to(world.device), settings.layer)[:, 1:].float()
            if step == 0:
                mean = standardise(x)[0].mean((0, 1))
                sae.pre_bias.data.copy_(world.sum(mean) / world.size)
            out = sae(x)
            out.loss.backward()
            for p in sae.parameters():
                if world.size > 1:
                    dist.all_reduce(p.grad)
                    p.grad /= world.size
            progress = step / settings.steps
            optimizer.param_groups[0]["lr"] = settings.lr * min(1, (progress + 1 / settings.steps) / 0.05, (1 - progress) / 0.2)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sae.after_step(out.values, out.indices, world)
            sums += torch.stack([out.loss, out.aux_loss, out.fvu]).detach()
            done, last = step + 1, step + 1 == settings.steps
            since, saving = since + 1, done % settings.save_interval == 0
            if done % settings.log_interval == 0 or saving or last:  # what is saved has been looked at
                loss, aux, fvu = (world.sum(sums) / (world.size * since)).tolist()
                since, sums = 0, torch.zeros_like(sums)
                if not loss < float("inf"):
                    raise FloatingPointError(f"the SAE's loss is {loss} at step {done}: lower --lr {settings.lr}; "
                                             f"the last good checkpoint, if any, is {path}")
                log.write({"step": done, "tokens": done * settings.batch_tokens, "loss": loss, "aux_loss": aux, "fvu": fvu,
                           "dead_fraction": sae.dead_fraction(), "seconds": round(time.perf_counter() - spent, 3)})
                bar.set_postfix_str(f"fvu {fvu:.3f} dead {sae.dead_fraction():.1%}", refresh=False)
            if saving and not last:
                save(done, {})
            bar.update()
    sae.eval()
    figures = {**evaluate_sae(teacher, sae, settings.layer, val, settings.eval_tokens, world), "dead_fraction": sae.dead_fraction()}
    save(settings.steps, figures)
    log.write({"step": settings.steps, "tokens": settings.steps * settings.batch_tokens, **figures})
    return sae, figures


def main():
    settings = parse(SAESettings)
    world = World(settings.device)
    if not settings.teacher:
        raise ValueError("--teacher is missing: give a plain GPT's checkpoint, as `python train.py --mode ntp` writes one")
    teacher = CoCoMix.from_checkpoint(load_checkpoint(settings.teacher, "model")).to(world.device).eval().requires_grad_(False)
    if not settings.resume and (Path(settings.out) / "ckpt.pt").exists():
        raise ValueError(f"{settings.out} already holds a checkpoint: go on with --resume, or choose another --out")
    sae, figures = train_sae(settings, teacher, world, settings.resume)
    world.print(f"SAE: fvu {figures['fvu']:.3f}, dead {figures['dead_fraction']:.1%}, teacher's loss {figures['teacher_loss']:.3f}, "
                f"with the SAE spliced in {figures['spliced_loss']:.3f}; {settings.out}/ckpt.pt")


if __name__ == "__main__":
    run(main)
