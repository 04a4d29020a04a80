"""Train CoCoMix and its baselines. Without arguments: the whole method on a laptop, in minutes, offline.

    python train.py                      # or torchrun train.py: data, teacher, SAE, two students, a report (preset tiny)

    python train.py --mode ntp --out out/my_teacher                                    # one by one: a teacher (= NTP)
    python sae.py --teacher out/my_teacher/ckpt.pt --layer 1 --out out/my_sae          # its SAE
    python train.py --mode cocomix --teacher out/my_teacher/ckpt.pt --sae out/my_sae/ckpt.pt --out out/my_student

    torchrun --nproc_per_node=8 train.py --preset 69m                                  # the paper: also 386m, 1.4b
    python train.py --mode kd --teacher out/my_teacher/ckpt.pt --out out/my_kd         # baselines: also --mode pause
    python train.py --report out/my_teacher out/my_student out/my_kd                   # compare finished runs by their logs
    python train.py --eval out/tiny/ntp/ckpt.pt,out/tiny/cocomix/ckpt.pt               # evaluate finished models
    python train.py --bench 69m --mode cached --batch 1                                # time steps

    torchrun --nproc_per_node=8 train.py ...                                           # the 8 GPUs of a node
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST0 --master_port=29500 --nproc_per_node=8 train.py ...  # node 0
    torchrun --nnodes=2 --node_rank=1 --master_addr=HOST0 --master_port=29500 --nproc_per_node=8 train.py ...  # node 1

A run writes out/ckpt.pt and out/log.jsonl. --resume goes on bit for bit, after Ctrl-C or SIGTERM too: a step's
batch is a pure function of (seed, step, rank). The batch is given in tokens; accumulation follows from it.
Nodes share one disk: rank 0 writes, all read.
"""
import difflib
import json
import math
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from cocomix import CoCoMix, CoCoMixConfig, Output
from data import (VOCABULARIES, Interrupt, Log, Windows, World, atomic, get_tokenizer, load_checkpoint, make_if_known,
                  parse, read_json, run, save_checkpoint)
from sae import (CachedLabels, Labeler, SAESettings, TopKSAE, check_out, check_teacher_reads, describe_figures,
                 evaluate_sae, fingerprint, load_sae, load_teacher, sae_identity, train_sae)

PYSTDLIB = "data/pystdlib"


def paper(name, n_layer, n_head, n_embd, ntp_embd, insert_layer, lr, warmup, steps, batch_tokens, micro_batch):
    """The paper's setting (section 3 and appendix) for a size; NTP's width makes its parameters match."""
    shared = dict(data="data/openwebtext", block_size=1024, n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_multiple=64,
                  insert_layer=insert_layer, k_concepts=32, concept_weight=0.1, lr=lr, min_lr=lr / 10, warmup=warmup,
                  steps=steps, batch_tokens=batch_tokens, micro_batch=micro_batch, eval_interval=500, eval_tokens=1 << 20,
                  save_interval=500)
    return {**shared, "mode": "cocomix", "out": f"out/{name}/cocomix", "teacher": "gpt2", "sae": "openai", "sae_layer": 5,
            "ntp": {"out": f"out/{name}/ntp", "n_embd": ntp_embd, "teacher": "", "sae": ""},
            "kd": {"out": f"out/{name}/kd", "n_embd": ntp_embd, "sae": ""},
            "pause": {"out": f"out/{name}/pause", "teacher": "", "sae": ""}}


PRESETS = {
    "tiny": {"compile": "off"},  # the defaults below; compiling takes longer than these runs
    "69m": paper("69m", 8, 8, 512, 624, 3, 6e-4, 130, 40_000, 1 << 19, 16),
    "386m": paper("386m", 24, 16, 1024, 1072, 5, 3e-4, 130, 40_000, 1 << 19, 8),
    "1.4b": paper("1.4b", 24, 16, 2048, 2096, 5, 2e-4, 65, 20_000, 1 << 20, 4),
}
MIX = {"ntp": "none", "kd": "none", "pause": "pause", "cocomix": "concept"}


@dataclass(frozen=True)
class TrainSettings:
    """Train CoCoMix or a baseline. --mode all runs data, teacher, SAE, two students and a report. To compare finished runs:
    train.py --report x --help; to evaluate models: train.py --eval CKPT --help; to time steps: train.py --bench 69m --help"""
    mode: Literal["all", "ntp", "pause", "kd", "cocomix"] = "all"  # ntp: a plain GPT, teacher or baseline; kd: one distilled
    data: str = PYSTDLIB  # folder of token shards; data/NAME of a NAME that data.py knows is made when it is missing
    out: str = "out/tiny"  # folder for checkpoints and logs
    teacher: str = ""  # modes cocomix, kd: a plain GPT: checkpoint (--mode ntp), gpt2, or GPT-2's .safetensors or .bin
    sae: str = ""  # mode cocomix: checkpoint of an SAE on that teacher (sae.py), openai (for gpt2), or openai:FILE
    n_layer: int = 6  # blocks
    n_head: int = 3  # attention heads
    n_embd: int = 96  # width
    block_size: int = 128  # tokens of context
    vocab_multiple: int = 1  # embedding rows are padded to a multiple of this; 64 suits GPUs
    insert_layer: int = 2  # concept or pause vectors enter before this block, 0-based
    concept_residual: bool = False  # our variant: h + c stands at the concept position instead of c
    insertion: Literal["interleave", "add", "none"] = "interleave"  # mode cocomix; ablations: h + c; concepts predicted only
    k_concepts: int = 16  # concepts mixed in; in mode all also the SAE's active latents
    concept_weight: float = 0.5  # weight of the concept loss; 0.1 in the paper
    kd_weight: float = 1.0  # mode kd: weight of KL(teacher || student)
    n_labels: int = 4  # concept labels a token
    rank_by: Literal["attribution", "negative", "absolute", "activation"] = "attribution"  # what makes a latent a label
    labels: Literal["live", "cached"] = "live"  # make labels in training, or read those of `sae.py label`
    labels_name: str = ""  # labels cached: which, where the data has several (TRAIN.NAME.labels)
    steps: int = 700  # optimiser steps
    batch_tokens: int = 1024  # tokens a step, over all processes and accumulated passes
    micro_batch: int = 0  # rows a pass; 0: all of a process's rows at once
    gradient_checkpointing: bool = False  # keep a block's input only and run it again in the backward pass: less memory
    lr: float = 4e-3  # peak learning rate
    min_lr: float = 0.0  # where the cosine ends; 0: a tenth of --lr
    warmup: int = 50  # steps of linear warm-up
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    seed: int = 0  # of initialisation and data order
    eval_interval: int = 100  # steps between validations
    eval_tokens: int = 32_768  # validation tokens: a fixed set spread over the split
    log_interval: int = 10  # steps between log lines
    save_interval: int = 500  # steps between checkpoints; the last step is always saved
    device: str = "auto"  # cuda, mps or cpu; auto finds it
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto: bfloat16 on CUDA, float32 elsewhere
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on CUDA only
    resume: bool = False  # go on from the checkpoint in --out; mode all does so by itself
    n_concepts: int = 512  # mode all: the SAE's latents; in mode cocomix the SAE's checkpoint says
    sae_layer: int = -1  # the SAE reads the teacher after this block, 0-based; -1: 2 in mode all, 5 with OpenAI's
    sae_steps: int = 300  # mode all: optimiser steps of the SAE
    sae_lr: float = 3e-3  # mode all: its peak learning rate

    def __post_init__(self):
        if self.sae_layer == -1:
            object.__setattr__(self, "sae_layer", 5 if self.sae.startswith("openai") else 2)
        for name in ("steps", "batch_tokens", "block_size", "eval_interval", "eval_tokens", "log_interval",
                     "save_interval", "n_labels", "sae_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        for name in ("micro_batch", "min_lr", "warmup", "weight_decay", "grad_clip", "seed", "concept_weight",
                     "kd_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be 0 or more")
        if not 0 < self.lr < math.inf or self.min_lr > self.lr or not 0 < self.sae_lr < math.inf:
            raise ValueError(f"--lr {self.lr} and --sae_lr {self.sae_lr} must be above 0, --min_lr not above --lr")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"--beta1 {self.beta1} and --beta2 {self.beta2} must lie between 0 and 1")
        if self.batch_tokens % self.block_size:
            raise ValueError(f"--batch_tokens {self.batch_tokens} is no multiple of --block_size {self.block_size}: "
                             f"take {max(1, self.batch_tokens // self.block_size) * self.block_size}")
        if self.mode in ("all", "pause", "cocomix") and not 0 <= self.insert_layer < self.n_layer:
            raise ValueError(f"--insert_layer {self.insert_layer} names no block of --n_layer {self.n_layer}: take 0 to "
                             f"{self.n_layer - 1}")
        if self.mode == "all" and not 0 <= self.sae_layer < self.n_layer:
            raise ValueError(f"--sae_layer {self.sae_layer} names no block of --n_layer {self.n_layer}: take 0 to "
                             f"{self.n_layer - 1}")
        if self.mode == "all" and not self.n_labels <= self.k_concepts <= self.n_concepts:
            raise ValueError(f"--n_labels {self.n_labels} must not exceed --k_concepts {self.k_concepts}, nor that "
                             f"--n_concepts {self.n_concepts}")
        if self.mode == "cocomix" and self.labels == "live" and not (self.teacher and self.sae):
            raise ValueError("--mode cocomix needs --teacher CKPT (from train.py --mode ntp) and --sae CKPT (from "
                             "sae.py), or --labels cached; --mode all makes both")
        if self.mode != "cocomix" and self.labels == "cached":
            raise ValueError(f"--mode {self.mode} takes no --labels cached: leave it out, or take --mode cocomix")
        if self.mode == "kd" and not self.teacher:
            raise ValueError("--mode kd needs --teacher CKPT (from train.py --mode ntp), or gpt2")
        if self.mode not in ("cocomix", "kd") and self.teacher or self.mode != "cocomix" and self.sae:
            raise ValueError(f"--mode {self.mode} takes no {'--sae' if self.mode == 'kd' else '--teacher or --sae'} (the "
                             "presets 69m, 386m and 1.4b have them): leave them out, or take --mode cocomix")
        if self.insertion != "interleave" and (self.mode != "cocomix" or self.concept_residual):
            raise ValueError(f"--insertion {self.insertion} is for --mode cocomix without --concept_residual: leave one out")


# What makes a run what it is, beside model, data and labels.
TRAINING = ("steps", "batch_tokens", "lr", "min_lr", "warmup", "weight_decay", "beta1", "beta2", "grad_clip", "seed",
            "eval_interval", "eval_tokens", "dtype")


def run_identity(settings, config, data, labeler, teacher=None):
    """What makes two runs the same experiment, in plain types; not where they run or are written."""
    return {**{k: getattr(settings, k) for k in TRAINING}, "model": asdict(config), "data": data.fingerprint(),
            "labels": labeler.identity() if labeler else {}, "teacher": fingerprint(teacher) if teacher else None,
            "kd_weight": settings.kd_weight if teacher else None}


def model_config(settings, vocab_size, labeler):
    """The CoCoMixConfig of a run. What its mix does not use keeps the default: it makes no difference to the run."""
    used = {k: getattr(settings, k) for k in ("block_size", "vocab_multiple", "n_layer", "n_head", "n_embd")}
    if MIX[settings.mode] != "none":
        used.update(insert_layer=settings.insert_layer, concept_residual=settings.concept_residual)
    if settings.mode == "cocomix":
        used.update(n_concepts=labeler.n_concepts, k_concepts=settings.k_concepts, insertion=settings.insertion,
                    concept_weight=settings.concept_weight)
    return CoCoMixConfig(**used, vocab_size=vocab_size, mix=MIX[settings.mode])


def learning_rate(step, settings):
    """Linear warm-up (the first update's rate is above 0), then a cosine from --lr to --min_lr."""
    low = settings.min_lr or settings.lr / 10
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return low + 0.5 * (1 + math.cos(math.pi * progress)) * (settings.lr - low)


def peak_flops(device):
    """Dense bf16 peak of one device in FLOP/s, by the vendors' datasheets; None if it is not in this table."""
    table = {"b200": 2250e12, "h200": 989e12, "h100 pcie": 756e12, "h100": 989e12, "a100": 312e12, "l40s": 362e12,
             "4090": 165e12, "3090": 71e12}
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    return next((flops for key, flops in table.items() if key in name), None)


def device_name(device):
    """What a run computes on: the GPU's name, or how many threads."""
    threads = f"{torch.get_num_threads()} threads of {device.type}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else threads


def rows_and_passes(settings, world):
    """(rows, accumulation): a step is `accumulation` passes of `rows` rows on each process. ValueError if it cannot be."""
    T = settings.block_size
    rows = settings.micro_batch or max(1, settings.batch_tokens // (T * world.size))
    accumulation, left = divmod(settings.batch_tokens, T * rows * world.size)
    if left or not accumulation:
        raise ValueError(f"--batch_tokens {settings.batch_tokens} does not divide into {world.size} processes x {rows} "
                         f"rows x {T} tokens: take {max(1, accumulation) * T * rows * world.size}, or another "
                         "--micro_batch")
    return rows, accumulation


@torch.no_grad()
def evaluate(model, windows, settings, world):
    """Mean next-token loss (nats) over a fixed set of `windows`, shared by all ranks; the raw module, no randomness."""
    count, batches = windows.fixed(settings.eval_tokens, world.rank, world.size, min(16, settings.micro_batch or 16))
    total = torch.zeros((), dtype=torch.float64)
    for _, window in batches:
        idx, targets = window[:, :-1].to(world.device), window[:, 1:].to(world.device)
        with world.autocast(settings.dtype):
            total += model(idx, targets.contiguous(), logits=False).ntp_loss.cpu().double() * targets.numel()
    return float(world.sum(total)) / (count * settings.block_size)


@torch.no_grad()
def review_concepts(model, windows, settings, world, labeler):
    """What a student's predictions are like on the same fixed set, for its checkpoint: notes each concept's largest logit in
    model.concept_max, and returns how well its n strongest concepts a token agree with the teacher's n labels:
    {precision: share of them that are labels, base_rate: the same for always guessing the n most frequent labels}."""
    n, C = labeler.n_labels, model.config.n_concepts
    model.concept_max.fill_(-math.inf)
    hits, tokens, frequency = torch.zeros(()), torch.zeros(()), torch.zeros(C)
    _, batches = windows.fixed(settings.eval_tokens, world.rank, world.size, min(16, settings.micro_batch or 16))
    for numbers, window in batches:
        idx, targets = window[:, :-1].to(world.device), window[:, 1:].to(world.device)
        labels = labeler.val(idx, targets, numbers)
        with world.autocast(settings.dtype):
            z = model(idx, logits=False).concept_logits
        model.concept_max.copy_(torch.maximum(model.concept_max, z.amax((0, 1))))
        hits += (z.topk(n).indices.unsqueeze(-1) == labels.unsqueeze(-2)).sum().cpu()
        tokens += (labels >= 0).any(-1).sum().cpu()
        frequency += torch.bincount(labels[labels >= 0], minlength=C).cpu()
    if world.size > 1:
        dist.all_reduce(model.concept_max, op=dist.ReduceOp.MAX)
    possible = n * world.sum(tokens).clamp(min=1)
    guessed = world.sum(frequency).topk(n).values.sum()
    return {"precision": float(world.sum(hits) / possible), "base_rate": float(guessed / possible)}


# ---- the distillation baseline -----------------------------------------------------------------------------

def distillation(x, weight, soft_x, soft_weight, chunk=0):
    """Sum over tokens of KL(teacher || student), in nats: heads' inputs x (N,D), soft_x (N,D_t) and their weights (V,D),
    (V,D_t) -> ().

    Two heads' logits for `chunk` tokens at a time, made again in the backward pass: nothing (N,V) is held."""
    def kl(x, soft_x):
        ours, theirs = ((a @ w.T).float().log_softmax(-1) for a, w in ((x, weight), (soft_x, soft_weight)))
        return F.kl_div(ours, theirs, reduction="sum", log_target=True)
    chunk = chunk or (512 if x.device.type == "cpu" else 2048)
    return sum(checkpoint(kl, *part, use_reentrant=False) for part in zip(x.split(chunk), soft_x.split(chunk)))


class Distilled(torch.nn.Module):
    """A plain GPT as --mode kd trains it: L_ntp + kd_weight * KL(teacher || student) over the next token's whole
    distribution, mean over tokens (paper, section 3: the KD baseline). Called like the model itself."""

    def __init__(self, model, teacher, kd_weight):
        super().__init__()
        head = teacher.wte.weight.detach()[:model.config.vocab_size]
        head = head - head.mean(0)  # same softmax; GPT-2's logits lie so far below 0 that bf16 would round them to halves
        self.model, self.frozen, self.kd_weight = model, (teacher, head), kd_weight  # a tuple: none of it is a parameter of ours

    def forward(self, idx, targets, concept_labels=None, logits=False):
        """idx, targets (B,T) -> Output; the KL stands in the place of a concept loss. Every position counts for it."""
        teacher, soft_head = self.frozen
        with torch.no_grad():
            soft_x = teacher.ln_f(teacher.hidden(idx)[0]).flatten(0, 1)
        h = self.model.hidden(idx)[0]
        ntp = self.model.token_loss(h, targets) / (targets >= 0).sum().clamp(min=1)
        x, head = self.model.ln_f(h).flatten(0, 1), self.model.wte.weight[:len(soft_head)]
        kl = distillation(x, head, soft_x, soft_head) / idx.numel()
        return Output(ntp + self.kd_weight * kl, ntp, kl, None, None)


# ---- the loop ----------------------------------------------------------------------------------------------

def wrapped(model, settings, world):
    """The model as a step runs it: compiled and in DDP where wanted."""
    if world.compiles(settings.compile):
        model = torch.compile(model)
    return DistributedDataParallel(model, broadcast_buffers=False) if world.size > 1 else model


def training_step(model, step_model, optimizer, passes, lr, grad_clip, world, autocast):
    """One optimiser step over `passes` [(idx, targets, labels or None)]: a tensor of token loss, concept loss (mode kd:
    KL) and gradient norm."""
    sums, valid = torch.zeros(3, device=world.device), torch.zeros((), device=world.device)
    for _, _, labels in passes:
        valid += 0 if labels is None else (labels >= 0).sum()
    valid = world.sum(valid).clamp(min=1)  # labels of the whole step: a mean of means would weigh them unequally
    for i, (idx, targets, labels) in enumerate(passes):
        if world.size > 1:
            step_model.require_backward_grad_sync = i == len(passes) - 1  # read by DDP's forward, so set here
        with autocast:
            result = step_model(idx, targets, labels, logits=False)
        loss, ntp, second = result.loss / len(passes), result.ntp_loss / len(passes), torch.zeros_like(result.ntp_loss)
        if labels is not None:  # times world.size, since DDP averages gradients over ranks
            second = result.concept_loss * (labels >= 0).sum() * world.size / valid
            loss = ntp + model.config.concept_weight * second
        elif result.concept_loss is not None:  # mode kd: the KL
            second = result.concept_loss / len(passes)
        loss.backward()
        sums[:2] += torch.stack([ntp, second]).detach()
    sums[2] = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums


def train(settings, world, labeler=None, name="train", resume=False, teacher=None):
    """Train one model as `settings` say -> (model, the records of out/log.jsonl). Writes out/ckpt.pt.

    `labeler` (sae.Labeler) makes the labels of mode cocomix, `teacher` the distributions of mode kd. With `resume`
    the run goes on from out/ckpt.pt. ValueError for settings that do not fit data, processes, teacher or checkpoint;
    FloatingPointError when loss or gradient are not finite: the last good checkpoint stays."""
    T, out, (rows, accumulation) = settings.block_size, Path(settings.out), rows_and_passes(settings, world)
    data, val = Windows(settings.data, "train", T, settings.seed), Windows(settings.data, "val", T)
    vocab_size = data.meta["vocab_size"]
    if labeler:
        labeler.check(T, vocab_size)
    if teacher:
        check_teacher_reads(teacher, T, vocab_size)

    torch.manual_seed(settings.seed)
    model = CoCoMix(model_config(settings, vocab_size, labeler)).to(world.device)
    model.gradient_checkpointing = settings.gradient_checkpointing
    optimizer = model.configure_optimizer(settings.lr, settings.weight_decay, (settings.beta1, settings.beta2))
    identity = run_identity(settings, model.config, data, labeler, teacher)
    begin, seconds, label_seconds, records = 0, 0.0, 0.0, []
    if resume:
        ckpt = load_checkpoint(out / "ckpt.pt", "model", world.device)
        changed = [k for k in identity if k != "steps" and identity[k] != ckpt["identity"].get(k)]
        if changed:
            raise ValueError(f"{out}/ckpt.pt comes from a run with other settings ({', '.join(changed)}): give the same, "
                             "or another --out")
        model.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
        begin, records = ckpt["step"], ckpt["log"]
        records[0]["settings"]["steps"] = settings.steps  # more than before, perhaps
        seconds, label_seconds = records[-1]["seconds"], records[-1]["label_seconds"]
        if begin > settings.steps:
            raise ValueError(f"{out}/ckpt.pt is at step {begin} already, beyond --steps {settings.steps}: raise --steps")
    log = Log(out / "log.jsonl", records, world.main)
    learner = Distilled(model, teacher, settings.kd_weight) if teacher else model
    step_model = wrapped(learner, settings, world)  # evaluation, sampling and saving use the raw `model`
    world.print(f"{name}: {model.num_parameters():,} parameters, {settings.steps} steps of {settings.batch_tokens} tokens "
                f"= {world.size} processes x {rows} rows x {T} tokens x {accumulation} accumulated, on {world.device}"
                + (f", from step {begin}" if begin else ""))

    def note(step, **values):
        log.write({"step": step, "tokens": step * settings.batch_tokens, **values, "seconds": round(seconds, 3),
                   "label_seconds": round(label_seconds, 3)})

    if begin == 0:
        note(0, val_loss=evaluate(model, val, settings, world), parameters=model.num_parameters(),
             flops_per_token=model.flops_per_token(), processes=world.size, device=device_name(world.device),
             tokenizer=data.meta["tokenizer"], val_data=val.fingerprint(), settings=asdict(settings))
    sums, since, clock = torch.zeros(3, device=world.device), 0, time.perf_counter()
    labels_clock = labeler.seconds if labeler else 0.0
    with Interrupt(world) as interrupt, world.bar(settings.steps, name, begin) as bar:
        for step in range(begin, settings.steps):
            passes = []
            for i in range(accumulation):
                where = (step * accumulation + i, rows, world.rank, world.size)
                batch = data.batch(*where)
                if world.device.type == "cuda":  # pinned afresh each time: an older copy may still be reading
                    batch = [t.pin_memory() for t in batch]
                idx, targets = (t.to(world.device, non_blocking=world.device.type == "cuda") for t in batch)
                labels = labeler(idx, targets, data.numbers(*where)) if labeler else None
                passes.append((idx, targets, labels))
            lr = learning_rate(step, settings)
            sums += training_step(model, step_model, optimizer, passes, lr, settings.grad_clip, world,
                                  world.autocast(settings.dtype))

            done, since, stopping = step + 1, since + 1, interrupt.asked()
            last, saving = done == settings.steps, done % settings.save_interval == 0 or stopping
            validating = done % settings.eval_interval == 0 or last
            if done % settings.log_interval == 0 or validating or saving:
                ntp, concept, norm = (world.sum(sums) / (world.size * since)).tolist()  # the only wait for the device
                elapsed, labelling = time.perf_counter() - clock, labeler.seconds - labels_clock if labeler else 0.0
                seconds, label_seconds = seconds + elapsed - labelling, label_seconds + labelling
                if not math.isfinite(ntp + concept + norm):  # before anything is saved
                    raise FloatingPointError(
                        f"loss {ntp}, {'KL' if teacher else 'concept loss'} {concept}, gradient norm {norm} at step {done}: lower --lr {settings.lr} "
                        f"or lengthen --warmup {settings.warmup}; the last good checkpoint, if any, is {out}/ckpt.pt")
                speed, peak = since * settings.batch_tokens / elapsed, peak_flops(world.device)
                mfu = peak and model.flops_per_token() * speed / (peak * world.size)
                val_loss = evaluate(model, val, settings, world) if validating else None
                agreement = review_concepts(model, val, settings, world, labeler) if labeler and (saving or last) else None
                note(done, ntp_loss=ntp, concept_loss=concept if labeler else None,
                     **({"kd_loss": concept} if teacher else {}), val_loss=val_loss, lr=lr, grad_norm=norm,
                     tok_per_s=round(speed), mfu=mfu)
                if validating:
                    concepts = f" | concept {concept:.3f}" if labeler else f" | kl {concept:.3f}" if teacher else ""
                    use = f" | mfu {mfu:.1%}" if mfu else ""
                    world.print(f"{name:<18} step {done:>6} | loss {ntp:.3f}{concepts} | val {val_loss:.3f} | lr {lr:.1e} | "
                                f"norm {norm:.2f} | {1000 * elapsed / since:.0f} ms | {speed:,.0f} tok/s{use}")
                bar.set_postfix_str(f"loss {ntp:.3f} {speed:,.0f} tok/s", refresh=False)
                if (saving or last) and world.main:
                    save_checkpoint(out / "ckpt.pt", "model", config=asdict(model.config), model=model.state_dict(),
                                    optimizer=optimizer.state_dict(), step=done, identity=identity, log=log.records,
                                    tokenizer=data.meta["tokenizer"], agreement=agreement)
                sums, since, clock = torch.zeros_like(sums), 0, time.perf_counter()
                labels_clock = labeler.seconds if labeler else 0.0
            bar.update()
            if stopping and not last:
                interrupt.leave(out / "ckpt.pt", done)
        if interrupt.asked():  # a signal during the last step or its evaluation ends mode all, too
            interrupt.leave(out / "ckpt.pt", settings.steps)
    return model, log.records


# ---- python train.py --report: finished runs side by side -------------------------------------------------------

@dataclass(frozen=True)
class ReportSettings:
    """Compare finished runs by their logs: a Markdown table, and a picture of their validation curves."""
    report: tuple[str, ...] = ()  # folders of runs (--out); those that differ only in the seed make one row
    baseline: str = ""  # one of these folders, whose row the others are compared with; empty: the first
    plot: str = ""  # file for a picture of the curves, .png or .svg (pip install matplotlib)

    def __post_init__(self):
        if not self.report:
            raise ValueError("--report needs folders of finished runs, as in --report out/tiny/ntp out/tiny/cocomix")


# Runs that differ in no more than this are one row: it changes neither what a run learns nor its final loss.
INCIDENTAL = ("seed", "out", "device", "resume", "micro_batch", "compile", "gradient_checkpointing", "labels",
              "labels_name", "eval_interval", "log_interval", "save_interval")
# Where these are equal, validation losses are of the same tokens, each with the same context.
COMPARABLE = {"tokenizer": "tokenizers", "val_data": "validation texts", "block_size": "--block_size",
              "eval_tokens": "--eval_tokens"}
FIRST_RECORD = {"parameters": int, "flops_per_token": int, "tokenizer": str, "val_data": str, "settings": dict}


def read_run(folder):
    """The records of a finished run's log.jsonl. FileNotFoundError if there is none; ValueError if it is damaged or none
    of train.py's, or if the run is not at its last step."""
    path, again = Path(folder) / "log.jsonl", f"train again with `python train.py --mode MODE --out {folder}`"
    if not path.is_file():
        inside = sorted(p for p in Path(folder).glob("*/log.jsonl") if '"settings"' in p.read_text(errors="replace"))
        names = " ".join(str(p.parent) for p in inside)
        raise FileNotFoundError(f"{path} does not exist: " + (f"name the runs inside {folder}, as in --report {names}"
                                if names else "name the --out folder of a `python train.py` run"))
    log = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            log.append({"val_loss": None, **json.loads(line)})
        except (ValueError, TypeError) as e:
            raise ValueError(f"line {number} of {path} is damaged ({e}): `--resume` writes the log anew from the "
                             "checkpoint") from e
    if not log:
        raise ValueError(f"{path} is empty: {again}")
    wrong = [k for k, kind in FIRST_RECORD.items() if not isinstance(log[0].get(k), kind)]
    if not wrong:
        defaults = {f.name: f.default for f in fields(TrainSettings)}  # of settings that were not there yet
        log[0]["settings"] = defaults | log[0]["settings"]
        wrong = [k for k, v in defaults.items() if type(v) in (int, str) and type(log[0]["settings"][k]) is not type(v)]
    if wrong:
        raise ValueError(f"{path} is no log of this train.py, its first line lacks {', '.join(wrong)}: {again}")
    for number, record in enumerate(log, 1):
        figures = *(record.get(k) for k in ("step", "tokens", "seconds")), record["val_loss"] or 0
        if not all(isinstance(n, (int, float)) and abs(n) < math.inf for n in figures):
            raise ValueError(f"line {number} of {path} is damaged, its step, tokens, seconds and val_loss are {figures}: "
                             "`--resume` writes the log anew from the checkpoint")
    step, steps = log[-1]["step"], log[0]["settings"]["steps"]
    if step < steps or log[-1]["val_loss"] is None:
        raise ValueError(f"{folder} is unfinished, at step {step} of {steps}: go on with its own command and --resume")
    return log


def rows_of(runs):
    """{folder: log} -> {row's name: {seed: log}}: runs that differ only in the seed are one row, named by a pattern of
    their folders. ValueError if two differ in nothing, or if their losses are of different tokens."""
    rows, first = {}, next(iter(runs))
    for folder, log in runs.items():
        settings = dict(log[0]["settings"])
        for key, what in COMPARABLE.items():
            one, other = ((r[0]["settings"] | r[0])[key] for r in (runs[first], log))
            if one != other:
                raise ValueError(f"{first} and {folder} have different {what}, {one} and {other}: their losses are not of "
                                 "the same tokens and cannot be compared; report them apart")
        beside, seed = Path(settings["out"]).parent, settings["seed"]
        of_seed = beside.parent / re.sub(rf"(?<!\d){seed}(?!\d)", "*", beside.name)
        for key in ("teacher", "sae"):  # out/seed3/ntp and out/seed4/ntp, made beside runs of these seeds, are one setting
            if settings[key] and Path(settings[key]).is_relative_to(beside):
                settings[key] = str(of_seed / Path(settings[key]).relative_to(beside))
        kind = json.dumps({k: v for k, v in settings.items() if k not in INCIDENTAL}, sort_keys=True)
        twin = rows.setdefault(kind, {}).setdefault(seed, folder)
        if twin != folder:
            raise ValueError(f"{twin} and {folder} differ neither in their seed nor in a setting that changes what is "
                             "learnt: name one of them")

    def pattern(names):  # out/a_0, out/a_1 -> out/a_*
        start = os.path.commonprefix(names)
        end = os.path.commonprefix([name[len(start):][::-1] for name in names])[::-1]
        return names[0] if len(names) == 1 else f"{start}*{end}"
    names = [pattern(list(seeds.values())) for seeds in rows.values()]
    if len(set(names)) < len(names):  # run_1 and run_2, run_3 and run_4: a pattern does not tell them apart
        names = [", ".join(seeds.values()) for seeds in rows.values()]
    elif len(names) > 1 and len(set(map(os.path.isabs, names))) == 1:  # the folder of all rows goes without saying
        above = os.path.commonpath(list(map(os.path.dirname, names))) or "."
        names = [os.path.relpath(name, above) for name in names]
    return {name: {seed: runs[folder] for seed, folder in seeds.items()} for name, seeds in zip(names, rows.values())}


def curve(log):
    """[(tokens, validation loss)] of a log."""
    return [(r["tokens"], r["val_loss"]) for r in log if r.get("val_loss") is not None]


def tokens_to(target, log):
    """Training tokens at which a run's validation loss first reaches `target`, by a straight line between two
    validations; None if it never does."""
    points = curve(log)
    for (t0, l0), (t1, l1) in zip(points, points[1:]):
        if l0 <= target:
            return t0
        if l1 <= target:
            return t0 + (t1 - t0) * (l0 - target) / (l0 - l1)
    return None


def student_t(df, share=0.95):
    """The t with P(|T| < t) = share for Student's distribution: T = sqrt(df) tan(a), where a has density cos(a)^(df - 1)."""
    a = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    area = torch.cumulative_trapezoid(a.cos() ** (df - 1), a)
    return math.sqrt(df) * math.tan(a[1 + int(torch.searchsorted(area, share * area[-1]))])


def spread(values, form="{:.4f}"):
    """'mean ± standard deviation' of a list, the mean alone of one value."""
    return form.format(mean(values)) + (f" ± {form.format(stdev(values))}" if len(values) > 1 else "")


def compare(rows, baseline):
    """Markdown table of `rows` {name: {seed: log}}. Each is compared with the row named `baseline`, seed by seed."""
    names = {name: f"`{name}`" if "*" in name else name for name in rows}
    table = [("run", "seeds", "parameters", "tokens", "training FLOPs", "time", "validation loss",
              f"difference to {names[baseline]}", "tokens saved")]
    for name, logs in rows.items():
        first, end = next(iter(logs.values()))[0], [log[-1] for log in logs.values()]
        pairs = [(log, rows[baseline][s]) for s, log in logs.items() if s in rows[baseline] and name != baseline]
        gaps = [log[-1]["val_loss"] - base[-1]["val_loss"] for log, base in pairs]
        difference = f"{mean(gaps):+.4f}" if gaps else "-"
        if len(gaps) > 1:  # 95 % interval of the mean
            half = student_t(len(gaps) - 1) * stdev(gaps) / math.sqrt(len(gaps))
            difference += f" [{mean(gaps) - half:+.4f}, {mean(gaps) + half:+.4f}]"
        difference += f" ({len(gaps)} of {len(logs)} seeds)" * (0 < len(gaps) < len(logs))
        reached = [(tokens_to(base[-1]["val_loss"], log), base[-1]["tokens"]) for log, base in pairs]
        saved = [100 * (1 - tokens / all_tokens) for tokens, all_tokens in reached if tokens is not None]
        some = f" ({len(saved)} of {len(pairs)} seeds)" if len(saved) < len(pairs) else ""
        table.append((names[name], len(logs), f"{first['parameters']:,}", f"{end[0]['tokens']:,}",
                      f"{first['flops_per_token'] * end[0]['tokens']:.2e}", f"{mean([r['seconds'] for r in end]):,.0f} s",
                      spread([r["val_loss"] for r in end]), difference,
                      spread(saved, "{:.1f}") + f" %{some}" if saved else "not reached" if pairs else "-"))
    lines = [f"| {' | '.join(map(str, row))} |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def plot(rows, path):
    """A picture of validation loss by training tokens, a line a row: the mean over seeds, and their range."""
    try:
        import matplotlib
    except ImportError as e:
        raise ValueError(f"--plot needs matplotlib ({e}): pip install matplotlib") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for i, (name, logs) in enumerate(rows.items()):
        seeds = [dict(curve(log)[1:]) for log in logs.values()]  # without step 0
        tokens = [t for t in seeds[0] if all(t in s for s in seeds)]
        losses = [[s[t] for s in seeds] for t in tokens]
        label = f"{name} ({len(logs)} seed{'s' * (len(logs) > 1)})"
        axes.plot(tokens, list(map(mean, losses)), label=label, linestyle=("-", "--", ":")[i // 10 % 3])
        axes.fill_between(tokens, list(map(min, losses)), list(map(max, losses)), alpha=0.2)
    axes.set(xlabel="training tokens", ylabel="validation loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    kind = Path(path).suffix[1:].lower() or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"--plot {path}: matplotlib draws no .{kind}: take .png or .svg")
    with atomic(path) as tmp:
        figure.savefig(tmp, format=kind, dpi=150)
    pyplot.close(figure)


def report_runs(settings):
    """The command --report. Errors as in `read_run` and `rows_of`; ValueError for a baseline that is not among the runs."""
    runs = {folder: read_run(folder) for folder in map(os.path.normpath, settings.report)}
    wanted = os.path.normpath(settings.baseline or settings.report[0])
    if wanted not in runs:
        raise ValueError(f"--baseline {settings.baseline} is none of the runs in --report: name one of {', '.join(runs)}")
    rows = rows_of(runs)
    baseline = next(name for name, logs in rows.items() if any(log is runs[wanted] for log in logs.values()))
    if settings.plot:
        plot(rows, settings.plot)
    print(compare(rows, baseline))
    print("\nMean ± standard deviation over seeds. Differences: of the same seeds' final losses, in nats, with their 95 % "
          "interval (Student's t).\nTokens saved: where the loss first reaches the baseline's final one of the same seed. "
          "FLOPs are the trained model's own:\nthose of a teacher or SAE are not counted. Time includes labels made in the step, no validation."
          + f"\n\n{settings.plot}" * bool(settings.plot))


# ---- mode all: the whole method ----------------------------------------------------------------------------

def saved(path, kind, identity, steps, world):
    """The checkpoint at `path` if it is of this very run (finished or cut short), else None; says which in a line."""
    ckpt, verdict = None, ""
    if path.is_file():
        try:
            ckpt = load_checkpoint(path, kind, world.device)
            changed = [k for k in identity if identity[k] != ckpt["identity"].get(k)]
            verdict = "reused, made with these settings" if ckpt["step"] == steps else f"goes on from step {ckpt['step']}"
            if changed:
                ckpt, verdict = None, f"made again: other {', '.join(changed)}"
        except ValueError as e:
            verdict = f"made again: {e}"
        world.print(f"{path}: {verdict}")
    world.barrier()  # nobody overwrites what another rank still reads
    return ckpt


def stage(settings, world, name, labeler=None):
    """`train`, unless out/ckpt.pt is of this very run: finished, it is reused; cut short, it goes on."""
    path, data = Path(settings.out) / "ckpt.pt", Windows(settings.data, "train", settings.block_size, settings.seed)
    config = model_config(settings, data.meta["vocab_size"], labeler)
    ckpt = saved(path, "model", run_identity(settings, config, data, labeler), settings.steps, world)
    if ckpt and ckpt["step"] == settings.steps:
        return CoCoMix.from_checkpoint(ckpt).to(world.device), ckpt["log"]
    return train(settings, world, labeler, name, resume=ckpt is not None)


def sae_stage(settings, world, teacher):
    """`train_sae`, on the same terms."""
    path = Path(settings.out) / "ckpt.pt"
    ckpt = saved(path, "sae", sae_identity(settings, teacher), settings.steps, world)
    if ckpt and ckpt["figures"]:
        return TopKSAE.from_checkpoint(ckpt).to(world.device), ckpt["figures"]
    return train_sae(settings, teacher, world, resume=ckpt is not None)


def sample(model, settings, world, n=200):
    """How the model goes on from the beginning of the validation text by `n` tokens, as text."""
    val = Windows(settings.data, "val", settings.block_size)
    try:
        encoding = get_tokenizer(val.meta["tokenizer"])
    except (OSError, ValueError) as e:  # the table does not depend on it
        return f"(no sample: {e})"
    prompt = val.window(0)[None, :min(24, settings.block_size)].to(world.device)
    generator = torch.Generator(world.device).manual_seed(settings.seed)
    text = model.generate(prompt, n, temperature=0.7, top_k=50, generator=generator)[0].tolist()
    return encoding.decode(text[:prompt.size(1)]) + "[...]" + encoding.decode(text[prompt.size(1):])


def pipeline(settings, world):
    """Teacher (= NTP baseline) -> SAE -> CoCoMix as in the paper, CoCoMix residual -> report."""
    start, out = time.perf_counter(), Path(settings.out)
    world.first(lambda: make_if_known(settings.data, quiet=not world.main))
    paths = {"teacher": str(out / "ntp" / "ckpt.pt"), "sae": str(out / "sae" / "ckpt.pt")}
    teacher, log = stage(replace(settings, mode="ntp", out=str(out / "ntp")), world, "NTP = teacher")
    teacher, logs = teacher.eval().requires_grad_(False), {"NTP": log}

    sae, figures = sae_stage(SAESettings(
        teacher=paths["teacher"], data=settings.data, out=str(out / "sae"), layer=settings.sae_layer,
        n_latents=settings.n_concepts, k=settings.k_concepts, steps=settings.sae_steps, lr=settings.sae_lr,
        batch_tokens=settings.batch_tokens, dead_after=50 * settings.batch_tokens, seed=settings.seed,
        dtype=settings.dtype), world, teacher)
    world.print(f"SAE: {describe_figures(figures)}")

    labeler = Labeler(teacher, sae.eval(), settings.sae_layer, settings.n_labels, settings.rank_by,
                      world.autocast(settings.dtype), keep=True, compile=world.compiles(settings.compile))
    models = {}
    for name, residual in (("CoCoMix", False), ("CoCoMix residual", True)):
        student = replace(settings, mode="cocomix", concept_residual=residual, **paths,
                          out=str(out / name.lower().replace(" ", "_")))
        models[name], logs[name] = stage(student, world, name, labeler)
    if world.main:
        labels = max(log[-1]["label_seconds"] for log in logs.values())
        table = compare({name: {settings.seed: log} for name, log in logs.items()}, "NTP")
        text = (f"{table}\n\nConcept labels, made once for both students: {labels:.0f} s. This call: "
                f"{time.perf_counter() - start:.0f} s.\n\nCoCoMix goes on from validation text:\n\n"
                f"{sample(models['CoCoMix'], settings, world)}\n")
        with atomic(out / "report.md") as tmp:
            tmp.write_text(text)
        world.print(f"\n{text}\nFiles: {out}/*/ckpt.pt (models, SAE), {out}/*/log.jsonl (curves), {out}/report.md (this)")


def check_labels(cached, settings, world):
    """ValueError unless cached labels come from the teacher, SAE and rule that `settings` name: a file must have the same
    tensors, another name (gpt2, openai) must be the one that the labels were made with; an empty one is not asked for."""
    identity, wrong = cached.identity(), []
    loaders = {"teacher": load_teacher, "sae": lambda name, world: TopKSAE.from_checkpoint(load_checkpoint(name, "sae"))}
    if cached.header["bfloat16"] != world.bfloat16(settings.dtype):
        made_in = "bfloat16" if cached.header["bfloat16"] else "float32"
        wrong.append(f"--dtype {settings.dtype}, the labels were made in {made_in}")
    for (key, load), made in zip(loaders.items(), cached.header["made_from"]):
        name = getattr(settings, key)
        same = fingerprint(load(name, world)) == identity[key] if Path(name).is_file() else name in ("", made)
        wrong += [] if same else [f"--{key} {name}, the labels are of {made}"]
    rules = ("n_labels", "rank_by") if not settings.sae.startswith("openai") else ("n_labels", "rank_by", "sae_layer")
    wrong += [f"--{k} {getattr(settings, k)}, the labels have {made}" for k in rules
              if getattr(settings, k) != (made := identity[k.removeprefix("sae_")])]
    if wrong:
        raise ValueError(f"the labels cached in {settings.data} do not fit: {'; '.join(wrong)}. Make others with "
                         "`python sae.py label`, or correct those flags")


def single(settings, world):
    """One run of --mode ntp, pause, kd or cocomix."""
    labeler = distiller = None
    check_out(settings.out, settings.resume)
    world.first(lambda: make_if_known(settings.data, quiet=not world.main))
    if settings.labels == "cached":
        labeler = CachedLabels(settings.data, settings.block_size, settings.labels_name)
        check_labels(labeler, settings, world)
        (teacher, sae), file = labeler.header["made_from"], labeler.header["sae_file"]
        sae = f"openai:{file}" if sae.startswith("openai") else file
        settings = replace(settings, teacher=teacher, sae=sae)  # for the log
    elif settings.mode == "cocomix":
        teacher = load_teacher(settings.teacher, world)
        sae, layer, path = load_sae(settings, teacher, world)
        if settings.sae.startswith("openai"):
            settings = replace(settings, sae=f"openai:{path}")  # the log says which file, and where its dictionary lies
        T = min(settings.block_size, teacher.config.block_size)
        data = Windows(settings.data, "train", T, vocab_size=teacher.config.vocab_size)
        figures = evaluate_sae(teacher, sae, layer, data, 8192, world)
        doubt = (f"; WARNING: above 0.5 it hardly reconstructs this teacher. Likely the layer is wrong (it reads block {layer}: "
                 "--sae_layer), the SAE is another teacher's, or it was trained on inputs normalised otherwise (TopK form is "
                 "assumed)")
        world.print(f"SAE: fraction of variance unexplained {figures['fvu']:.3f} on training text"
                    + doubt * (figures["fvu"] > 0.5))
        labeler = Labeler(teacher, sae, layer, settings.n_labels, settings.rank_by, world.autocast(settings.dtype),
                          compile=world.compiles(settings.compile))
    elif settings.mode == "kd":
        distiller = load_teacher(settings.teacher, world)
    log = train(settings, world, labeler, settings.mode, settings.resume, distiller)[1]
    end = [r for r in log if r.get("val_loss") is not None][-1]
    world.print(f"{settings.mode}: validation loss {end['val_loss']:.4f} after {end['tokens']:,} tokens; "
                f"{settings.out}/ckpt.pt, {settings.out}/log.jsonl")


# ---- python train.py --eval: finished models, and GPT-2 --------------------------------------------------------

@dataclass(frozen=True)
class EvalSettings:
    """Evaluate models: loss over the whole validation split, and zero-shot tasks. One table, and a JSON file."""
    eval: str = ""  # comma-separated checkpoints (train.py); gpt2 and a GPT-2's .safetensors or .bin, too
    tasks: str = ""  # comma-separated tasks of EleutherAI's lm-evaluation-harness (pip install lm-eval); empty: none
    task_folder: str = ""  # folder with task definitions of your own, in the harness's YAML
    limit: int = 0  # documents of each task, for a quick look; 0: all
    data: str = ""  # shards whose validation split is read; empty: those that a checkpoint was trained on
    out: str = "out/eval.json"  # file for the results
    batch_tokens: int = 16_384  # tokens a pass
    device: str = "auto"  # cuda, mps or cpu; auto finds it
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto: bfloat16 on CUDA, float32 elsewhere

    def __post_init__(self):
        if not self.eval or self.batch_tokens < 1 or self.limit < 0:
            raise ValueError(f"--eval {self.eval!r} must name a checkpoint, --batch_tokens {self.batch_tokens} be 1 or more, "
                             f"--limit {self.limit} 0 or more")


@torch.no_grad()
def whole_split_loss(model, windows, settings, world):
    """Mean next-token loss (nats) over all of `windows`' split, and its exponential: {metric: [value, no standard error]}."""
    T, total = windows.block_size, torch.zeros(2, dtype=torch.float64)
    with world.bar(sum(len(s) - 1 for s in windows.shards) // world.size, "val", unit=" tokens") as bar:
        for idx, targets in windows.whole(world.rank, world.size, max(1, settings.batch_tokens // T)):
            with world.autocast(settings.dtype):
                loss = model(idx.to(world.device), targets.to(world.device), logits=False).ntp_loss
            total += torch.tensor([loss.item() * targets.numel(), targets.numel()], dtype=torch.float64)
            bar.update(targets.numel())
    loss = (total := world.sum(total))[0].item() / total[1].item()
    return {"loss": [loss, None], "perplexity": [math.exp(min(loss, 700)), None]}


@torch.no_grad()
def score(model, pairs, settings, world):
    """log p(continuation | context) of each of `pairs` (context ids, continuation ids), and whether it is what greedy
    decoding gives: [(float, bool), ...]. Work is shared by all ranks.

    Continuations of one context share its keys and values, in one batch, where context and continuation fit the block
    (where they do not, each sees a context cut differently on the left). The rest run in batches of similar length.
    Rows are padded on the right, which no earlier position sees."""
    T, groups, alone, jobs, found = model.config.block_size, {}, [], [], {}  # a job: (tokens shared, numbers of its pairs)
    for i, (context, continuation) in enumerate(pairs):
        if not 1 <= len(continuation) <= T or not context:
            raise ValueError(f"a text of {len(context)} tokens of context and {len(continuation)} to score: a model with "
                             f"blocks of {T} scores 1 to {T} after at least 1; leave that task out")
        groups.setdefault(tuple(context), []).append(i)
    def cut(shared, members):  # into passes of at most batch_tokens
        longest = max(min(T, len(pairs[i][0]) + len(pairs[i][1])) for i in members)
        rows = max(1, settings.batch_tokens // longest)
        jobs.append((shared, members[:rows]))
        return members[rows:]
    for context, members in groups.items():
        fits = len(context) + max(len(pairs[i][1]) for i in members) - 1 <= T
        if fits and len(context) > 1 and len(members) > 1:
            while members:
                members = cut(len(context) - 1, members)
        else:
            alone += members
    alone.sort(key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    while alone:
        alone = cut(0, alone)
    with world.bar(len(pairs) // world.size, "score", unit=" texts") as bar:
        for shared, members in jobs[world.rank::world.size]:
            whole = [(list(context) + list(continuation))[-(T + 1):] for context, continuation in (pairs[i] for i in members)]
            rows = torch.zeros(len(whole), max(map(len, whole)) - 1, dtype=torch.int64)
            for row, ids in zip(rows, whole):
                row[:len(ids) - 1] = torch.tensor(ids[:-1])
            rows, cache = rows.to(world.device), model.new_cache() if shared else None
            with world.autocast(settings.dtype):
                if shared:
                    model(rows[:1, :shared], cache=cache)
                    cache["past"] = [[t.expand(len(rows), *t.shape[1:]) for t in past] for past in cache["past"]]
                logits = model(rows[:, shared:], cache=cache).logits
            for i, row, ids in zip(members, logits, whole):
                targets = torch.tensor(pairs[i][1], device=world.device)
                end = len(ids) - 1 - shared
                row = row[end - len(targets):end].float()  # (continuation,V)
                log_p = F.log_softmax(row, -1).gather(-1, targets[:, None]).sum()
                found[i] = log_p.item(), bool((row.argmax(-1) == targets).all())
            bar.update(len(members))
    found = {i: result for part in world.gather(found) for i, result in part.items()}
    return [found[i] for i in range(len(pairs))]


def harness_model(model, encoding, settings, world):
    """`model` as lm-evaluation-harness sees one."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class Harness(TemplateLM):  # every rank asks for everything; `score` shares it out
        eot_token_id = encoding.eot_token

        def tok_encode(self, string, add_special_tokens=None, **_):
            return encoding.encode(string, allowed_special="all")

        def _loglikelihood_tokens(self, requests, **_):
            return score(model, [(context, continuation) for _, context, continuation in requests], settings, world)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            windows, owners = [], []
            for i, request in enumerate(requests):
                for window in utils.get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id,
                                                              model.config.block_size, 1):
                    windows.append(utils.make_disjoint_window(window))
                    owners.append(i)
            totals = [0.0] * len(requests)
            for i, (log_p, _) in zip(owners, score(model, windows, settings, world)):
                totals[i] += log_p
            return totals

        def generate_until(self, requests, disable_tqdm=False):
            found = {}
            for i in tqdm(range(world.rank, len(requests), world.size), desc=f"{'generate':<18}", disable=not world.main):
                context, options = requests[i].args
                stops, most = options.get("until") or [], options.get("max_gen_toks", 256)
                stops = [stops] if isinstance(stops, str) else list(stops)
                ids = self.tok_encode(context)[-max(1, model.config.block_size - most):] or [encoding.eot_token]
                text, new = "", []
                temperature = options.get("temperature", 1.0) if options.get("do_sample") else 0.0
                with world.autocast(settings.dtype):
                    for token in model.stream(torch.tensor([ids], device=world.device), most, temperature):
                        if token.item() == encoding.eot_token:
                            break
                        new.append(token.item())
                        text = encoding.decode(new)
                        if any(stop and stop in text for stop in stops):
                            break
                found[i] = min([text, *(text.split(stop)[0] for stop in stops if stop)], key=len)
            found = {i: text for part in world.gather(found) for i, text in part.items()}
            return [found[i] for i in range(len(requests))]

    return Harness()


def find_tasks(settings):
    """(simple_evaluate, names, task manager) of the harness. ValueError if it is not installed or has no such task."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise ValueError(f"--tasks needs EleutherAI's lm-evaluation-harness ({e}): pip install lm-eval") from e
    names, manager = settings.tasks.split(","), TaskManager(include_path=settings.task_folder or None)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            raise ValueError(f"--tasks: lm-evaluation-harness has no task {name!r}"
                             + f": did you mean {', '.join(near)}?" * bool(near))
    return simple_evaluate, names, manager


def run_tasks(model, encoding, settings, world):
    """{task: {metric: [value, standard error or None]}} of the harness."""
    simple_evaluate, names, manager = find_tasks(settings)
    done = simple_evaluate(harness_model(model, encoding, settings, world), tasks=names, task_manager=manager,
                           log_samples=False, limit=settings.limit or None, bootstrap_iters=1000)
    tasks = {}
    for task, result in done["results"].items() if done else ():  # one process of a node is given the results
        for key, value in result.items():
            metric, _, rule = key.partition(",")  # a metric, and the rule by which answers are filtered
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error, name = result.get(f"{metric}_stderr,{rule}"), metric if rule == "none" else f"{metric} {rule}"
                tasks.setdefault(task, {})[name] = [value, error if isinstance(error, float) else None]
    return tasks


def open_model(name, settings, world):
    """(model, tokenizer's name, validation Windows or None) of a name in --eval; ValueError for what does not fit together."""
    if name == "gpt2" or Path(name).suffix in (".safetensors", ".bin"):
        model, folder = load_teacher(name, world), settings.data
        tokenizer = {V: k for k, V in VOCABULARIES.items()}.get(model.config.vocab_size)
        if tokenizer is None:
            raise ValueError(f"{name} has a vocabulary of {model.config.vocab_size}, none of the tokenizers here: "
                             f"{VOCABULARIES}")
    else:
        ckpt = load_checkpoint(name, "model", mmap=True)  # its optimiser is not read
        model, tokenizer = CoCoMix.from_checkpoint(ckpt), ckpt["tokenizer"]
        folder = settings.data or ckpt["log"][0]["settings"]["data"]
        if settings.tasks and not settings.data and not Path(folder).is_dir():
            folder = ""  # the tasks can do without
    if not (folder or settings.tasks):
        raise ValueError(f"{name} does not say which data it was trained on: name --data FOLDER, or --tasks")
    windows = Windows(folder, "val", model.config.block_size, vocab_size=model.config.vocab_size) if folder else None
    return model.to(world.device).eval(), tokenizer, windows


def results_table(found):
    """Markdown: a row for each metric, a column for each model of {model: {"val": {metric: [value, error]}, "tasks": ...}}."""
    columns = [{**({"val": f["val"]} if "val" in f else {}), **f.get("tasks", {})} for f in found.values()]
    table = [f"| task | metric | {' | '.join(found)} |", "|---" * (2 + len(found)) + "|"]
    rows = dict.fromkeys((task, metric) for column in columns for task, result in column.items() for metric in result)
    for task, metric in rows:
        cells = []
        for column in columns:
            value, error = column.get(task, {}).get(metric, (None, None))
            cells.append("-" if value is None else f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
        table.append(f"| {task} | {metric} | {' | '.join(cells)} |")
    return "\n".join(table)


def evaluate_models(settings, world):
    """The command --eval: {model: {"val": ..., "tasks": ...}}, printed as one table; the JSON file grows with each model."""
    names, found, path = settings.eval.split(","), {}, Path(settings.out)
    if settings.tasks:
        find_tasks(settings)
    for name in names:  # a mistake is told before hours of work
        open_model(name, settings, world)
    for name in names:
        model, tokenizer, windows = open_model(name, settings, world)
        where = f", on {windows.folder}" if windows else ""
        world.print(f"evaluating {name}, {model.num_parameters():,} parameters{where}")
        found[name] = {"parameters": model.num_parameters(), "data": str(windows.folder) if windows else None}
        if windows:
            found[name]["val"] = whole_split_loss(model, windows, settings, world)
        if settings.tasks:
            found[name]["tasks"] = run_tasks(model, get_tokenizer(tokenizer), settings, world)
        if world.main:
            with atomic(path) as tmp:
                tmp.write_text(json.dumps({**read_json(path), **found}, indent=1) + "\n")
    world.print(f"{results_table(found)}\n\n{path}")
    return found


# ---- python train.py --bench: how fast a step is ---------------------------------------------------------------

@dataclass(frozen=True)
class BenchSettings:
    """Time training steps, generation or SAE steps, on random weights and tokens; prints a line of JSON."""
    bench: Literal["tiny", "69m", "386m", "1.4b"] = "tiny"  # sizes: of the presets; tiny is a model of width 256
    mode: Literal["cocomix", "cached", "ntp", "pause", "generate", "sae"] = "cocomix"  # cached: labels are there already
    batch: int = 8  # rows a step, of each process
    steps: int = 5  # timed steps, after two to warm up
    device: str = "auto"  # cuda, mps or cpu; auto finds it
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto: bfloat16 on CUDA, float32 elsewhere
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on CUDA only
    gradient_checkpointing: bool = False  # see TrainSettings

    def __post_init__(self):
        if min(self.batch, self.steps) < 1:
            raise ValueError(f"--batch {self.batch} and --steps {self.steps} must be at least 1")


def bench(settings, world):
    """The command --bench. Medians in ms; the student's FLOPs (`flops_per_token`) as a share of the rate of a large matrix
    product measured here, and as `mfu` of the datasheet's peak where that is known."""
    tiny, ntp = settings.bench == "tiny", settings.mode == "ntp"
    size = PRESETS[settings.bench] if not tiny else dict(n_layer=6, n_head=8, n_embd=256, insert_layer=3, block_size=256)
    V, C, teacher_width, T = (8192, 4096, 256, 256) if tiny else (50257, 32768, 768, 1024)
    shape = dict(block_size=T, vocab_size=V, vocab_multiple=64, n_layer=size["n_layer"], n_head=size["n_head"])
    mix = dict(mix=MIX.get(settings.mode, "concept"), insert_layer=size["insert_layer"], n_concepts=C, k_concepts=32)
    width = size["ntp"]["n_embd"] if ntp and not tiny else size["n_embd"]
    torch.manual_seed(0)
    model = CoCoMix(CoCoMixConfig(**shape, **mix, n_embd=width)).to(world.device)
    model.gradient_checkpointing, autocast = settings.gradient_checkpointing, world.autocast(settings.dtype)
    if settings.mode == "cocomix":
        config = CoCoMixConfig(**{**shape, "n_embd": 256} if tiny else {}, mix="none")  # else GPT-2
        teacher = CoCoMix(config).to(world.device).eval().requires_grad_(False)
    if settings.mode in ("cocomix", "sae"):
        sae = TopKSAE(teacher_width, C, 32).to(world.device)
    if settings.mode == "cocomix":
        labeler = Labeler(teacher, sae, size.get("sae_layer", 2), autocast=autocast, compile=world.compiles(settings.compile))
    idx = torch.randint(V, (settings.batch, T), device=world.device)
    sync = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None

    def timed(*works):  # median seconds of each, alternating, after two rounds to warm up
        rounds = []
        for _ in range(settings.steps + 2):
            rounds.append([])
            for work in works:
                start = time.perf_counter()
                work()
                sync()
                rounds[-1].append(time.perf_counter() - start)
        return [sorted(column)[len(column) // 2] for column in zip(*rounds[2:])]

    result = {"size": settings.bench, "mode": settings.mode, "device": str(world.device), "processes": world.size,
              "batch": settings.batch}
    if settings.mode == "generate":
        for context in (1, min(128, T // 2), T - 17):
            works = [partial(model.generate, idx[:1, :context], 16, cached=cached) for cached in (True, False)]
            fast, slow = timed(*works)
            result |= {f"context_{context}": {"cached": round(16 / fast, 1), "not_cached": round(16 / slow, 1)}}
    elif settings.mode == "sae":
        x = torch.randn(settings.batch * T, teacher_width, device=world.device)
        optimizer = torch.optim.Adam(sae.parameters(), fused=True)

        def dense(values, indices, mu=0.0, std=1.0):  # all C latents, most of them 0
            latents = torch.zeros(*values.shape[:-1], C, device=values.device).scatter(-1, indices, values)
            return latents @ sae.decoder + sae.pre_bias

        def step(decode):
            sae.decode = decode
            out = sae(x)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sae.after_step(out)
        for name, seconds in zip(("sparse", "dense"), timed(partial(step, sae.decode), partial(step, dense))):
            result |= {f"{name}_ms": round(1e3 * seconds, 1), f"{name}_tokens_per_s": round(len(x) / seconds)}
    else:
        optimizer, step_model = model.configure_optimizer(1e-4), wrapped(model, settings, world)
        labels = torch.randint(C, (*idx.shape, 4), device=world.device) if settings.mode in ("cocomix", "cached") else None

        def label():
            nonlocal labels
            if settings.mode == "cocomix":
                labels = labeler.val(idx, idx.roll(-1, 1))

        def step():
            idx.random_(V)
            training_step(model, step_model, optimizer, [(idx, idx.roll(-1, 1), labels)], 1e-4, 1.0, world, autocast)
        label_s, step_s = timed(label, step)
        n = 8192 if world.device.type == "cuda" else 2048
        a = torch.randn(n, n, device=world.device, dtype=torch.bfloat16 if world.bfloat16(settings.dtype) else torch.float32)
        matmul = 2 * len(a) ** 3 / timed(lambda: a @ a)[0]
        speed = settings.batch * T * world.size / (label_s + step_s)
        flops, peak = model.flops_per_token() * settings.batch * T / step_s, peak_flops(world.device)
        result |= {"tokens": settings.batch * T * world.size, "label_ms": round(1e3 * label_s, 1),
                   "student_ms": round(1e3 * step_s, 1), "tokens_per_s": round(speed),
                   "student_gflop_per_s": round(flops / 1e9), "matmul_gflop_per_s": round(matmul / 1e9),
                   "share_of_matmul": round(flops / matmul, 3), "mfu": peak and round(flops / peak, 4)}
    if world.device.type == "cuda":
        result["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2 ** 20)
    else:
        with suppress(ImportError):  # not on Windows
            import resource
            result["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10)
    world.print(json.dumps(result))
    return result


def main():
    if any(word == "--bench" or word.startswith("--bench=") for word in sys.argv[1:]):
        settings = parse(BenchSettings)
        return bench(settings, World(settings.device))
    if any(word == "--eval" or word.startswith("--eval=") for word in sys.argv[1:]):
        settings = parse(EvalSettings)
        return evaluate_models(settings, World(settings.device))
    if any(word == "--report" or word.startswith("--report=") for word in sys.argv[1:]):
        return report_runs(parse(ReportSettings))
    settings = parse(TrainSettings, presets=PRESETS, preset="tiny")
    world = World(settings.device)
    rows_and_passes(settings, world)  # what cannot work is refused before anything is downloaded
    (pipeline if settings.mode == "all" else single)(settings, world)


if __name__ == "__main__":
    run(main)
