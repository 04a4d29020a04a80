"""Train CoCoMix and its baselines. Without arguments: the whole method on a laptop, in a few minutes, offline.

    python train.py                                        # data, teacher, SAE, two students, a report (preset tiny)
    torchrun train.py                                      # the same under torchrun
    torchrun --nproc_per_node=8 train.py --mode ntp ...    # one model on the 8 GPUs of a node
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST0 --master_port=29500 --nproc_per_node=8 train.py ...    # node 0 of 2
    torchrun --nnodes=2 --node_rank=1 --master_addr=HOST0 --master_port=29500 --nproc_per_node=8 train.py ...    # node 1 of 2

    python train.py --mode ntp --out out/my_teacher                                      # 1. a teacher (also the NTP baseline)
    python sae.py --teacher out/my_teacher/ckpt.pt --layer 1 --out out/my_sae            # 2. its SAE
    python train.py --mode cocomix --teacher out/my_teacher/ckpt.pt --sae out/my_sae/ckpt.pt --out out/my_student

A run writes out/ckpt.pt and out/log.jsonl. --resume continues one bit for bit, after Ctrl-C or SIGTERM too: the batch of
a step is a pure function of (seed, step, rank). Batch size is in tokens; the accumulation that follows is printed.
"""
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cocomix import CoCoMix, CoCoMixConfig
from data import DataSettings, Log, Windows, World, atomic, get_tokenizer, load_checkpoint, parse, prepare, read_meta, run, save_checkpoint
from sae import Labeler, SAESettings, TopKSAE, fingerprint, sae_identity, train_sae

PYSTDLIB = "data/pystdlib"
PRESETS = {"tiny": {}}  # the defaults below are the tiny preset
MIX = {"ntp": "none", "pause": "pause", "cocomix": "concept"}


@dataclass(frozen=True)
class TrainSettings:
    """Train CoCoMix or a baseline; --mode all runs data, teacher, SAE, two students and a report."""
    mode: Literal["all", "ntp", "pause", "cocomix"] = "all"  # what to train; ntp is a plain GPT, teacher or baseline
    data: str = PYSTDLIB  # folder of token shards; the default one is made when it is missing
    out: str = "out/tiny"  # folder for checkpoints and logs
    teacher: str = ""  # cocomix: checkpoint of a plain GPT (train.py --mode ntp)
    sae: str = ""  # cocomix: checkpoint of an SAE on that teacher (sae.py)
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # width
    block_size: int = 128  # tokens of context
    insert_layer: int = 2  # concepts (or the pause vector) enter before this block, 0-based
    concept_residual: bool = False  # our variant: the concept position starts from h + c instead of c
    k_concepts: int = 16  # concepts mixed in; in mode all also the SAE's active latents
    concept_weight: float = 0.5  # weight of the concept loss (the paper's presets: 0.1)
    n_labels: int = 4  # concept labels a token
    rank_by: Literal["attribution", "negative", "absolute", "activation"] = "attribution"  # which latents become labels
    steps: int = 600  # optimiser steps
    batch_tokens: int = 2048  # tokens a step, over all processes and accumulation
    micro_batch: int = 0  # rows a forward pass; 0: all of a process's at once
    lr: float = 3e-3  # peak learning rate
    min_lr: float = 0.0  # where the cosine ends; 0: a tenth of --lr
    warmup: int = 50  # steps of linear warm-up
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    seed: int = 0  # of initialisation and data order
    eval_interval: int = 50  # steps between validations
    eval_tokens: int = 32_768  # validation tokens, a fixed set spread over the split
    log_interval: int = 10  # steps between log lines
    save_interval: int = 500  # steps between checkpoints; the last step is always saved
    device: str = "auto"  # cuda, mps or cpu; auto finds it
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto: bfloat16 on CUDA, float32 elsewhere
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on CUDA only
    resume: bool = False  # go on from the checkpoint in --out (mode all always does)
    n_concepts: int = 512  # mode all: the SAE's latents (elsewhere the SAE's checkpoint says)
    sae_layer: int = 1  # mode all: the SAE reads the teacher after this block, 0-based
    sae_steps: int = 300  # mode all: optimiser steps of the SAE
    sae_lr: float = 3e-3  # mode all: its peak learning rate

    def __post_init__(self):
        for name in ("steps", "batch_tokens", "block_size", "eval_interval", "eval_tokens", "log_interval", "save_interval", "n_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if not 0 < self.lr < math.inf or self.min_lr > self.lr:
            raise ValueError(f"--lr {self.lr} must be above 0 and not below --min-lr {self.min_lr}")
        if self.batch_tokens % self.block_size:
            raise ValueError(f"--batch-tokens {self.batch_tokens} is no multiple of --block-size {self.block_size}: "
                             f"take {max(1, self.batch_tokens // self.block_size) * self.block_size}")
        if self.mode == "cocomix" and not (self.teacher and self.sae):
            raise ValueError("--mode cocomix needs --teacher CKPT (from train.py --mode ntp) and --sae CKPT (from sae.py); "
                             "--mode all makes both")
        if self.mode in ("ntp", "pause") and (self.teacher or self.sae):
            raise ValueError(f"--mode {self.mode} uses no --teacher or --sae: leave them out, or take --mode cocomix")
        if self.mode == "all" and (self.teacher or self.sae):
            raise ValueError("--mode all trains its own teacher and SAE: leave --teacher and --sae out, or take --mode cocomix")


TRAINING = ("steps", "batch_tokens", "lr", "min_lr", "warmup", "weight_decay", "beta1", "beta2", "grad_clip", "seed",
            "eval_interval", "eval_tokens", "dtype")  # together with model, data and labels, these make a run what it is


def model_config(settings, vocab_size, labeler):
    """The CoCoMixConfig of a run; what its mix does not use keeps its default, so that it cannot tell two equal runs apart."""
    used = dict(block_size=settings.block_size, vocab_size=vocab_size, n_layer=settings.n_layer, n_head=settings.n_head, n_embd=settings.n_embd)
    if settings.mode == "ntp":
        return CoCoMixConfig(**used, mix="none", insert_layer=0)
    used.update(insert_layer=settings.insert_layer, concept_residual=settings.concept_residual)
    if settings.mode == "cocomix":
        used.update(n_concepts=labeler.sae.encoder.size(0), k_concepts=settings.k_concepts, concept_weight=settings.concept_weight)
    return CoCoMixConfig(**used, mix=MIX[settings.mode])


def learning_rate(step, settings):
    """Linear warm-up (the first update's rate is above 0), then cosine from --lr to --min-lr."""
    low = settings.min_lr or settings.lr / 10
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return low + 0.5 * (1 + math.cos(math.pi * progress)) * (settings.lr - low)


def peak_flops(device):
    """Dense bf16 peak of one device in FLOP/s (vendors' datasheets), or None when it is not in the table."""
    name = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    table = {"b200": 2250e12, "h200": 989e12, "h100 pcie": 756e12, "h100": 989e12, "a100": 312e12, "l40s": 362e12, "4090": 165e12, "3090": 71e12}
    return next((flops for key, flops in table.items() if key in name), None)


@torch.no_grad()
def evaluate(model, windows, settings, world, final=False):
    """Mean next-token loss in nats over a fixed set of windows spread over the split, shared by all ranks.

    `final` also records each concept's largest logit in model.concept_max. The raw module runs: no compile, no RNG."""
    count = min(len(windows), max(1, settings.eval_tokens // settings.block_size))
    chosen = torch.arange(world.rank, count, world.size) * len(windows) // count
    total, autocast, largest = torch.zeros((), dtype=torch.float64), world.autocast(settings.dtype), None
    for part in chosen.split(16):
        window = torch.stack([windows.window(int(n)) for n in part]).to(world.device)
        with autocast:
            out = model(window[:, :-1], window[:, 1:].contiguous())
        total += out.ntp_loss.double().cpu() * window[:, 1:].numel()
        if final and model.config.mix == "concept":
            seen = out.concept_logits.amax((0, 1))
            largest = seen if largest is None else torch.maximum(largest, seen)
    if final and model.config.mix == "concept":
        model.concept_max.fill_(-math.inf) if largest is None else model.concept_max.copy_(largest)
        if world.size > 1:
            dist.all_reduce(model.concept_max, op=dist.ReduceOp.MAX)
    return float(world.sum(total)) / (count * settings.block_size)


class Interrupt:
    """Turns SIGTERM and Ctrl-C into a flag that all ranks read after each step: the step ends, is saved, and the run exits."""

    def __init__(self, world):
        self.world, self.number = world, 0

    def __enter__(self):
        def note(number, frame):
            self.number = number
        self.before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def asked(self):
        self.number = self.number or int(self.world.sum(torch.tensor(self.number)))  # a CPU tensor: the GPU is not stalled
        return self.number > 0


def train(settings, world, labeler=None, name="train", resume=False):
    """Train one model as `settings` say -> (model, out/log.jsonl as a list). Writes out/ckpt.pt (all ranks read the same).

    `labeler` (sae.Labeler) makes the labels of mode cocomix. With `resume` the run goes on from out/ckpt.pt. ValueError for settings that do not fit the data, the processes or the checkpoint;
    FloatingPointError when the loss or a gradient is not finite: the last good checkpoint stays."""
    T, out = settings.block_size, Path(settings.out)
    micro = settings.micro_batch or max(1, settings.batch_tokens // (T * world.size))
    accumulation, left = divmod(settings.batch_tokens, T * micro * world.size)
    if left or not accumulation:
        raise ValueError(f"--batch-tokens {settings.batch_tokens} does not divide into {world.size} processes x {micro} rows x {T} tokens: "
                         f"take {max(1, accumulation) * T * micro * world.size}, or another --micro-batch")
    data, val = Windows(settings.data, "train", T, settings.seed), Windows(settings.data, "val", T)
    torch.manual_seed(settings.seed)
    model = CoCoMix(model_config(settings, data.meta["vocab_size"], labeler)).to(world.device)
    if labeler and labeler.teacher.config.vocab_size != data.meta["vocab_size"]:
        raise ValueError(f"the teacher's vocabulary has {labeler.teacher.config.vocab_size} tokens, the data's {data.meta['vocab_size']}: "
                         "train the teacher on data of the same tokenizer")
    if labeler and labeler.teacher.config.block_size < T:
        raise ValueError(f"--block-size {T} is longer than the teacher's {labeler.teacher.config.block_size}: lower it")
    optimizer = model.configure_optimizer(settings.lr, settings.weight_decay, (settings.beta1, settings.beta2))
    identity = run_identity(settings, model.config, data, labeler)
    begin, seconds, label_seconds = 0, 0.0, 0.0
    if resume:
        ckpt = load_checkpoint(out / "ckpt.pt", "model", world.device)
        changed = [k for k in identity if k != "steps" and identity[k] != ckpt["identity"].get(k)]
        if changed:
            raise ValueError(f"{out}/ckpt.pt comes from a run with other settings ({', '.join(changed)}): give the same, or another --out")
        model.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
        begin, seconds, label_seconds = ckpt["step"], ckpt["seconds"], ckpt["label_seconds"]
    log = Log(out / "log.jsonl", begin, world.main)

    step_model = model  # evaluation, sampling and saving use the raw `model`
    if settings.compile == "on" or (settings.compile == "auto" and world.device.type == "cuda"):
        step_model = torch.compile(step_model)
    if world.size > 1:
        step_model = DistributedDataParallel(step_model)
    world.print(f"{name}: {model.num_parameters():,} parameters, {settings.steps} steps of {settings.batch_tokens} tokens = {world.size} processes x "
                f"{micro} rows x {T} tokens x {accumulation} accumulated, on {world.device}" + (f", from step {begin}" if begin else ""))

    def save(step):
        if world.main:
            save_checkpoint(out / "ckpt.pt", "model", config=asdict(model.config), model=model.state_dict(), optimizer=optimizer.state_dict(),
                            step=step, seconds=seconds, label_seconds=label_seconds, identity=identity, tokenizer=data.meta["tokenizer"])

    def record(step, **values):  # every rank computes it, rank 0 writes it
        log.write({"step": step, "tokens": step * settings.batch_tokens, **values,
                   "seconds": round(seconds, 3), "label_seconds": round(label_seconds, 3)})

    if begin == 0:
        record(0, val_loss=evaluate(model, val, settings, world), parameters=model.num_parameters(),
               flops_per_token=model.flops_per_token(), world=world.size, settings=asdict(settings))
    sums, since, clock = torch.zeros(3, device=world.device), 0, time.perf_counter()
    labels_before = labeler.seconds if labeler else 0.0
    with Interrupt(world) as interrupt, world.bar(settings.steps, name, begin) as bar:
        for step in range(begin, settings.steps):
            batches, valid = [], torch.zeros((), device=world.device)
            for m in range(accumulation):
                at = (step * accumulation + m, micro, world.rank, world.size)
                batch = data.batch(*at)
                if world.device.type == "cuda":  # fresh pinned memory each time: the copy may still read it
                    batch = [t.pin_memory() for t in batch]
                idx, targets = (t.to(world.device, non_blocking=True) for t in batch)
                labels = labeler(idx, targets, data.numbers(*at)) if labeler else None
                batches.append((idx, targets, labels))
                valid += 0 if labels is None else (labels >= 0).sum()
            valid = world.sum(valid).clamp(min=1)  # labels of the whole step: a mean of unequal means would be wrong
            for m, (idx, targets, labels) in enumerate(batches):
                if world.size > 1:
                    step_model.require_backward_grad_sync = m == accumulation - 1  # DDP reads it in forward, not in backward
                with world.autocast(settings.dtype):
                    result = step_model(idx, targets, labels)
                ntp, concept = result.ntp_loss / accumulation, torch.zeros_like(result.ntp_loss)
                if labels is not None:  # DDP averages over ranks, hence world.size
                    concept = result.concept_loss * ((labels >= 0).sum() * world.size / valid)
                (ntp + model.config.concept_weight * concept).backward()
                sums[:2] += torch.stack([ntp, concept]).detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr = learning_rate(step, settings)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sums[2] += norm
            done, since, stopping = step + 1, since + 1, interrupt.asked()
            last, saving = done == settings.steps, done % settings.save_interval == 0 or stopping
            validating = done % settings.eval_interval == 0 or last
            if done % settings.log_interval == 0 or validating or saving or last:
                ntp, concept, norm = (world.sum(sums) / (world.size * since)).tolist()  # the only wait for the device
                elapsed, spent = time.perf_counter() - clock, (labeler.seconds - labels_before) if labeler else 0.0
                seconds, label_seconds = seconds + elapsed - spent, label_seconds + spent
                if not math.isfinite(ntp + concept + norm):
                    raise FloatingPointError(f"loss {ntp}, concept loss {concept}, gradient norm {norm} up to step {done}: lower --lr {settings.lr} "
                                             f"or lengthen --warmup {settings.warmup}; the last good checkpoint, if any, is {out}/ckpt.pt")
                speed = since * settings.batch_tokens / elapsed
                peak = peak_flops(world.device)
                mfu = peak and model.flops_per_token() * speed / (peak * world.size)
                loss = evaluate(model, val, settings, world, last) if validating else None
                record(done, ntp_loss=ntp, concept_loss=concept if labeler else None, val_loss=loss, lr=lr, grad_norm=norm,
                       tok_per_s=round(speed), mfu=mfu)
                if validating:
                    world.print(f"{name:<18} step {done:>6} | loss {ntp:.3f}" + (f" | concept {concept:.3f}" if labeler else "") + f" | val {loss:.3f} | "
                                f"lr {lr:.1e} | norm {norm:.2f} | {1000 * elapsed / since:.0f} ms | {speed:,.0f} tok/s" + (f" | mfu {mfu:.1%}" if mfu else ""))
                bar.set_postfix_str(f"loss {ntp:.3f} {speed:,.0f} tok/s", refresh=False)
                if saving or last:
                    save(done)
                sums, since, clock, labels_before = torch.zeros_like(sums), 0, time.perf_counter(), labeler.seconds if labeler else 0.0
            bar.update()
            if stopping and not last:
                world.print(f"stopped after step {done}, saved as {out}/ckpt.pt; the same command with --resume goes on (mode all goes on by itself)")
                sys.exit(128 + interrupt.number)
    world.barrier()
    return model, read_log(out)


def read_log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def run_identity(settings, config, data, labeler):
    """What makes two runs the same experiment: model, training settings, data, labels; not where it runs or writes."""
    return {**{k: getattr(settings, k) for k in TRAINING}, "model": asdict(config), "data": data.fingerprint(), "labels": labeler.identity() if labeler else {}}


# ---- mode all: the whole method --------------------------------------------------------------------------------------

def saved(path, kind, identity, world):
    """The checkpoint at `path` if it is of this very run, finished or cut short; None if there is none, it is damaged or of another."""
    try:
        ckpt = load_checkpoint(path, kind, world.device)
    except FileNotFoundError:
        return None
    except ValueError as e:
        world.print(f"{e}; it is made again")
        return None
    changed = [k for k in identity if identity[k] != ckpt["identity"].get(k)]
    if changed:
        world.print(f"{path}: made again, for it was made with other settings ({', '.join(changed)})")
    return None if changed else ckpt


def stage(settings, world, name, labeler=None):
    """`train`, unless out/ckpt.pt is of this very run: finished, it is reused; cut short, it goes on."""
    path, data = Path(settings.out) / "ckpt.pt", Windows(settings.data, "train", settings.block_size, settings.seed)
    config = model_config(settings, data.meta["vocab_size"], labeler)
    ckpt = saved(path, "model", run_identity(settings, config, data, labeler), world)
    world.barrier()
    if ckpt and ckpt["step"] == settings.steps:
        world.print(f"{name}: {path} reused, made with these settings")
        return CoCoMix.from_checkpoint(ckpt).to(world.device), read_log(path.parent)
    return train(settings, world, labeler, name, resume=ckpt is not None)


def tokens_to(target, log):
    """Training tokens at which a run's validation loss first reaches `target`, between two validations by a straight line; None: never."""
    curve = [(r["tokens"], r["val_loss"]) for r in log if r.get("val_loss") is not None]
    for (t0, l0), (t1, l1) in zip(curve, curve[1:]):
        if l1 <= target:
            return t1 if l0 == l1 else t0 + (t1 - t0) * max(0.0, (l0 - target) / (l0 - l1))
    return None


def report(logs):
    """Markdown table of {name: log}; the first is the baseline."""
    rows = ["| model | parameters | tokens | validation loss | training time | tokens to reach NTP's loss |", "|---|---|---|---|---|---|"]
    target = next(iter(logs.values()))[-1]["val_loss"]
    for name, log in logs.items():
        end, reached = log[-1], tokens_to(target, log)
        if log is next(iter(logs.values())):
            tokens = f"{end['tokens']:,}"
        elif reached is None:
            tokens = "not reached"
        else:
            tokens = f"{reached:,.0f} ({1 - reached / end['tokens']:.1%} fewer)"
        rows.append(f"| {name} | {log[0]['parameters']:,} | {end['tokens']:,} | {end['val_loss']:.4f} | {end['seconds']:.0f} s | {tokens} |")
    return "\n".join(rows)


def pipeline(settings, world):
    """Teacher (= NTP baseline) -> SAE -> CoCoMix as in the paper, CoCoMix residual -> report. Finished stages are reused."""
    start, out = time.perf_counter(), Path(settings.out)
    ntp, sae_path = out / "ntp", out / "sae" / "ckpt.pt"
    teacher, ntp_log = stage(replace(settings, mode="ntp", out=str(ntp)), world, "NTP = teacher")
    teacher.eval().requires_grad_(False)

    sae_settings = SAESettings(teacher=str(ntp / "ckpt.pt"), data=settings.data, out=str(sae_path.parent), layer=settings.sae_layer,
                               n_latents=settings.n_concepts, k=settings.k_concepts, steps=settings.sae_steps, batch_tokens=settings.batch_tokens,
                               lr=settings.sae_lr, dead_after=50 * settings.batch_tokens, seed=settings.seed, dtype=settings.dtype)
    ckpt = saved(sae_path, "sae", sae_identity(sae_settings, teacher), world)
    world.barrier()
    if ckpt and ckpt["step"] == settings.sae_steps:
        world.print(f"SAE: {sae_path} reused, made with these settings")
        sae, figures = TopKSAE.from_checkpoint(ckpt).to(world.device), ckpt["figures"]
    else:
        sae, figures = train_sae(sae_settings, teacher, world, resume=ckpt is not None)
    world.print(f"SAE: fraction of variance unexplained {figures['fvu']:.3f}, dead latents {figures['dead_fraction']:.1%}, teacher's loss "
                f"{figures['teacher_loss']:.3f}, with the SAE spliced in {figures['spliced_loss']:.3f}")

    labeler, logs = make_labeler(settings, world, teacher, sae, settings.sae_layer, keep=True), {"NTP": ntp_log}
    for name, residual in (("CoCoMix", False), ("CoCoMix residual", True)):
        student = replace(settings, mode="cocomix", concept_residual=residual, out=str(out / name.lower().replace(" ", "_")),
                          teacher=str(ntp / "ckpt.pt"), sae=str(sae_path))
        model, logs[name] = stage(student, world, name, labeler)
        paper_form = model if not residual else paper_form
    if world.main:
        labels, prompt = max(log[-1]["label_seconds"] for log in logs.values()), "def "
        text = (f"{report(logs)}\n\nConcept labels, made once for both students: {labels:.0f} s. "
                f"This call: {time.perf_counter() - start:.0f} s.\n\nCoCoMix continues {prompt!r}:\n\n{sample(paper_form, prompt, settings)}\n")
        with atomic(out / "report.md") as tmp:
            tmp.write_text(text)
        world.print(f"\n{text}\nFiles: {out}/*/ckpt.pt (models and SAE), {out}/*/log.jsonl (curves), {out}/report.md (this)")


def sample(model, prompt, settings, n=200):
    """`n` tokens that continue `prompt`, as text, the prompt included."""
    encoding, device = get_tokenizer(read_meta(settings.data)["tokenizer"]), next(model.parameters()).device
    idx = torch.tensor([encoding.encode_ordinary(prompt)], device=device)
    generator = torch.Generator(device).manual_seed(settings.seed)
    return encoding.decode(model.generate(idx, n, temperature=0.7, top_k=50, generator=generator)[0].tolist())


def make_labeler(settings, world, teacher, sae, layer, keep=False):
    return Labeler(teacher, sae, layer, settings.n_labels, settings.rank_by, world.autocast(settings.dtype), keep)


def single(settings, world):
    """One run of --mode ntp, pause or cocomix."""
    labeler = None
    if settings.mode == "cocomix":
        teacher = CoCoMix.from_checkpoint(load_checkpoint(settings.teacher, "model")).to(world.device).eval().requires_grad_(False)
        ckpt = load_checkpoint(settings.sae, "sae")
        if ckpt["teacher"] != fingerprint(teacher):
            raise ValueError(f"{settings.sae} was trained on another teacher than {settings.teacher}: "
                             f"train its own with `python sae.py --teacher {settings.teacher} --layer {ckpt['layer']}`")
        sae = TopKSAE.from_checkpoint(ckpt).to(world.device).eval().requires_grad_(False)
        labeler = make_labeler(settings, world, teacher, sae, ckpt["layer"])
    if (Path(settings.out) / "ckpt.pt").exists() and not settings.resume:
        raise ValueError(f"{settings.out} already holds a checkpoint: go on with --resume, or choose another --out")
    model, log = train(settings, world, labeler, settings.mode, settings.resume)
    world.print(f"{settings.mode}: validation loss {log[-1]['val_loss']:.4f} after {log[-1]['tokens']:,} tokens; {settings.out}/ckpt.pt, {settings.out}/log.jsonl")


def main():
    settings = parse(TrainSettings, presets=PRESETS, preset="tiny")
    world = World(settings.device)
    if settings.data == PYSTDLIB:
        if world.main:
            prepare(DataSettings("pystdlib"))
        world.barrier()
    (pipeline if settings.mode == "all" else single)(settings, world)


if __name__ == "__main__":
    run(main)
