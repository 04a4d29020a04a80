"""Train CoCoMix and its baselines. Without arguments: the whole method on a laptop, offline.

  python train.py                        # or torchrun train.py: data, teacher, SAE, student, report

  python train.py --mode ntp --out out/my_teacher                              # a teacher (= NTP)
  python sae.py --teacher out/my_teacher/ckpt.pt --layer 2 --out out/my_sae    # its SAE
  python train.py --mode cocomix --teacher out/my_teacher/ckpt.pt --sae out/my_sae/ckpt.pt --out ...
  python train.py --mode kd --teacher out/my_teacher/ckpt.pt --out out/my_kd   # also --mode pause

  python train.py report out/tiny/ntp out/tiny/cocomix     # compare finished runs by their logs
  python train.py eval out/tiny/cocomix/ckpt.pt            # loss over the whole split, and tasks

  torchrun --nproc_per_node=8 train.py --preset 69m        # the paper, on 8 GPUs: also 386m, 1.4b
  torchrun --nnodes=2 --node_rank=0 --master_addr=HOST0 --master_port=29500 --nproc_per_node=8 ...
  torchrun --nnodes=2 --node_rank=1 --master_addr=HOST0 --master_port=29500 --nproc_per_node=8 ...

A run writes out/ckpt.pt and out/log.jsonl. Stopped by Ctrl-C, SIGTERM or a crash, the same command
goes on, bit for bit on the CPU: a step's batch is a pure function of (seed, step, rank). The batch
is given in tokens; accumulation follows from it. Nodes share one disk: rank 0 writes, all read.
"""
import json
import math
import os
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import torch

from cocomix import CoCoMix, CoCoMixConfig, follower_rate, in_words, inspect, steerable
from data import (KNOWN, DataSettings, Run, Windows, World, atomic, explain, get_tokenizer,
                  load_checkpoint, load_dictionary, parse, prepare, require, script)
from sae import (Labels, SAESettings, concept_labels, describe, fingerprint, load_model, load_sae,
                 load_teacher, train_sae)

RULES = Literal["attribution", "negative", "absolute", "activation", "shuffled"]
MIX = {"all": "concept", "ntp": "none", "kd": "none", "pause": "pause", "cocomix": "concept"}
SIZES = {  # the paper's, section 3 and appendix; NTP's width makes its parameters match
    "69m": dict(n_layer=8, n_head=8, n_embd=512, ntp_embd=624, insert_layer=3, lr=6e-4, warmup=130,
                steps=40_000, batch_tokens=1 << 19, micro_batch=16),
    "386m": dict(n_layer=24, n_head=16, n_embd=1024, ntp_embd=1072, insert_layer=5, lr=3e-4,
                 warmup=130, steps=40_000, batch_tokens=1 << 19, micro_batch=8),
    "1.4b": dict(n_layer=24, n_head=16, n_embd=2048, ntp_embd=2096, insert_layer=5, lr=2e-4,
                 warmup=65, steps=20_000, batch_tokens=1 << 20, micro_batch=4),
}


def preset(args):
    """The defaults {field: value} of --preset, where --mode has a say in them."""
    if args.preset == "tiny":
        return {}
    size, mode = dict(SIZES[args.preset]), args.mode.replace("all", "cocomix")
    width, plain = size.pop("ntp_embd"), MIX[mode] == "none"
    return size | dict(
        mode=mode, out=f"out/{args.preset}/{mode}", data="data/openwebtext", block_size=1024,
        init_std=0.02, n_embd=width if plain else size["n_embd"], k_concepts=32, concept_weight=0.1,
        eval_interval=500, eval_tokens=1 << 20, compile=True,
        sae="openai" if mode == "cocomix" else "",
        teacher="gpt2" if mode in ("cocomix", "kd") else "")


@dataclass(frozen=True)
class TrainSettings(CoCoMixConfig):
    """Train CoCoMix or a baseline; --mode all runs the whole method. See also train.py report
    --help and train.py eval --help."""
    mode: Literal["all", "ntp", "pause", "kd", "cocomix"] = "all"  # ntp: a plain GPT; kd: distilled
    preset: Literal["tiny", "69m", "386m", "1.4b"] = "tiny"  # tiny: these defaults
    data: str = "data/pystdlib"  # folder of tokens; data/NAME is made, of a NAME data.py knows
    out: str = "out/tiny"  # folder for checkpoints and logs
    teacher: str = ""  # modes cocomix, kd: checkpoint (--mode ntp), gpt2, or a GPT-2's weights
    sae: str = ""  # mode cocomix: checkpoint (sae.py), or openai (for gpt2), openai:LAYER
    kd_weight: float = 1.0  # mode kd: weight of KL(teacher || student)
    n_labels: int = 4  # concept labels a token
    rank_by: RULES = "attribution"  # what the labels of a token are ranked by
    keep_labels: bool = True  # keep labels beside the data, 8 bytes a token, for later runs
    steps: int = 600  # optimiser steps
    batch_tokens: int = 1024  # tokens a step, over all processes and accumulated passes
    micro_batch: int = 0  # rows a pass; 0: all of a process's rows at once
    lr: float = 6e-3  # peak learning rate; a cosine ends at a tenth
    warmup: int = 100  # steps of linear warm-up
    seed: int = 0  # of initialisation and data order
    eval_interval: int = 100  # steps between validations
    eval_tokens: int = 32_768  # validation tokens, a fixed set spread over the split; 0: all
    save_interval: int = 500  # steps between checkpoints; the last step is always saved
    sae_layer: int = 2  # mode all: the SAE reads the teacher after this block, 0-based
    sae_steps: int = 300  # mode all: optimiser steps of the SAE
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # autocast; auto: bfloat16 on CUDA
    compile: bool = False  # torch.compile the step, for long runs on a GPU: the big presets do

    def __post_init__(self):
        object.__setattr__(self, "mix", MIX[self.mode])  # frozen
        super().__post_init__()
        least = min(self.steps, self.block_size, self.eval_interval, self.save_interval,
                    self.sae_steps, self.n_labels, self.lr)
        require(least > 0, f"{least} is too little: --steps, --block_size, --eval_interval, "
                "--save_interval, --sae_steps, --n_labels and --lr must be above 0")
        require(self.mode != "all" or self.insertion != "none" and self.n_labels <= self.k_concepts
                and 0 <= self.sae_layer < self.n_layer, "--mode all needs --n_labels <= "
                f"--k_concepts, --sae_layer in 0 to {self.n_layer - 1}, and concepts to steer, not "
                "--insertion none")
        require(bool(self.teacher) == (self.mode in ("cocomix", "kd"))
                and bool(self.sae) == (self.mode == "cocomix"),
                f"--mode {self.mode}, --teacher {self.teacher!r}, --sae {self.sae!r}: cocomix "
                "needs both, gpt2 and openai or checkpoints of --mode ntp and of sae.py, kd needs "
                "--teacher, others take none")


# No part of a run's identity; teacher, SAE and data are part of it by their fingerprints.
FREE = ("out", "data", "teacher", "sae", "preset", "device", "compile", "micro_batch",
        "save_interval", "keep_labels", "sae_layer", "sae_steps", "n_concepts", "mix")


def learning_rate(step, settings):
    """Linear warm-up (the first update's rate is above 0), then a cosine to a tenth of --lr."""
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
    return settings.lr * (cosine if progress >= 0 else (step + 1) / settings.warmup)


def peak_flops(device):
    """Dense bf16 peak of a GPU in FLOP/s, by its datasheet; None if it is not in this table."""
    table = {"b200": 2250e12, "h200": 989e12, "h100 pcie": 756e12, "h100": 989e12, "a100": 312e12,
             "l40s": 362e12, "4090": 165e12, "3090": 71e12}
    name = torch.cuda.get_device_name().lower() if device == "cuda" else ""
    return next((flops for key, flops in table.items() if key in name), None)


def distillation(logits, teacher_logits):
    """The paper's KD baseline (section 3): KL(teacher || student) over the next token's whole
    distribution, in nats, mean over tokens: two (B,T,V) -> ()."""
    ours, theirs = (x.flatten(0, 1).float().log_softmax(-1) for x in (logits, teacher_logits))
    return torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


@torch.no_grad()
def evaluate(model, windows, world, tokens=0, labels=None, rows=16):
    """{val_loss} in nats a token over a fixed set of about `tokens` tokens of windows (0: all),
    shared by all ranks. With `labels`, n a token, also {label_hits}, over tokens that have any: the
    share of the model's n strongest concepts that are labels; and {label_guess}, that of the n most
    frequent labels."""
    total = torch.zeros(4 + model.config.n_concepts, dtype=torch.float64)
    for numbers in windows.spread(tokens, world.rank, world.size, rows):
        idx, targets = windows.batch(numbers, world.device)
        with world.autocast():
            out = model(idx, targets)
        total[:2] += torch.tensor([out.ntp_loss * idx.numel(), idx.numel()])
        if labels:
            y = labels(idx, targets, numbers)
            strongest = out.concept_logits.topk(y.size(-1)).indices
            total[2] += (strongest.unsqueeze(-1) == y.unsqueeze(-2)).sum().cpu()
            total[3] += y.size(-1) * (y >= 0).any(-1).sum().cpu()
            total[4:] += torch.bincount(y[y >= 0], minlength=model.config.n_concepts).cpu()
    loss, count, hits, possible, *seen = world.sum(total).tolist()
    if not labels:
        return {"val_loss": loss / count}
    guess = sum(sorted(seen)[-labels.shape[-1]:])
    return {"val_loss": loss / count, "label_hits": hits / possible,
            "label_guess": guess / possible}


# ---- the loop ------------------------------------------------------------------------------------

class Setup:
    """A run's data, teacher, labels, model; `who` and `more` for Run. ValueError for a misfit."""

    def __init__(self, settings, world):
        T = settings.block_size
        self.rows = settings.micro_batch or max(1, settings.batch_tokens // (T * world.size))
        self.passes, left = divmod(settings.batch_tokens, T * world.size * self.rows)
        require(self.passes > 0 and not left, f"--batch_tokens {settings.batch_tokens} is no "
                f"multiple of {world.size} processes x {self.rows} rows x {T} tokens: change it or "
                "--micro_batch")
        self.data = Windows(settings.data, "train", T, settings.seed)
        self.teacher = self.labels = self.val_labels = None
        self.who = {"data": self.data.fingerprint()}
        sizes = {f.name: getattr(settings, f.name) for f in fields(CoCoMixConfig)}
        sizes["vocab_size"] = self.data.meta["vocab_size"]
        self.more = {"vocabulary": self.data.meta}
        if settings.teacher:
            self.teacher = load_teacher(settings.teacher, world)
            self.who["teacher"], most = fingerprint(self.teacher), self.teacher.config.block_size
            require(most >= T, f"the teacher reads {most} tokens, this run {T}: lower --block_size")
            for block in self.teacher.h if settings.compile else ():
                block.compile()
        self.val = Windows(settings.data, "val", T, model=self.teacher)
        if settings.sae:
            sae, layer, path = load_sae(settings.sae, self.teacher, world)
            sizes["n_concepts"] = len(sae.decoder)
            self.more["dictionary"] = os.path.relpath(
                path.with_suffix(".concepts.json").resolve(), Path(settings.out).resolve())
            self.who["sae"] = fingerprint(sae)
            rule = [self.who["teacher"], self.who["sae"], layer, settings.rank_by, world.bf16]

            @world.autocast()
            def make(idx, targets):
                return concept_labels(self.teacher, sae, idx, targets, layer, settings.n_labels,
                                      settings.rank_by)
            self.labels, self.val_labels = (
                Labels(make, windows, rule, settings.n_labels, len(sae.decoder),
                       settings.keep_labels) for windows in (self.data, self.val))
        self.more |= {"config": sizes, "settings": asdict(settings) | sizes}
        torch.manual_seed(settings.seed)
        self.model = CoCoMix(CoCoMixConfig(**sizes), self.data.meta).to(world.device)
        self.step_model = torch.compile(self.model) if settings.compile else self.model  # to train
        if world.size > 1:
            self.step_model = torch.nn.parallel.DistributedDataParallel(
                self.step_model, gradient_as_bucket_view=True)


def train(settings, world):
    """Train one model as `settings` say -> (model, records of its log). Writes out/ckpt.pt and
    out/log.jsonl. ValueError: see Setup, data.Run."""
    setup = Setup(settings, world)
    names = {"cocomix": ["ntp_loss", "concept_loss"], "kd": ["ntp_loss", "kd_loss"]}.get(
        settings.mode, ["ntp_loss"])
    model, step_model = setup.model, setup.step_model
    optimizer = model.configure_optimizer()
    run = Run(settings, FREE, setup.who, "model", world, {"model": model, "optimizer": optimizer},
              setup.more)
    flops, peak = model.flops_per_token(), peak_flops(world.device)
    if not run.ckpt["log"]:
        run.write({"step": 0, "tokens": 0, "parameters": model.num_parameters(),
                   "flops_per_token": flops, "identity": run.ckpt["identity"],
                   "settings": setup.more["settings"], "validation": [
                       setup.val.fingerprint(), settings.block_size, settings.eval_tokens]})
    world.print(f"{settings.mode}: {model.num_parameters():,} parameters; a step is {world.size} "
                f"processes x {setup.passes} passes x {setup.rows} rows of {settings.block_size}")
    for step in run.steps(settings.steps, settings.save_interval, settings.mode):
        passes, n_valid = [], None
        for i in range(step * setup.passes, (step + 1) * setup.passes):
            numbers = setup.data.numbers(i, setup.rows, world.rank, world.size)
            idx, targets = setup.data.batch(numbers, world.device)
            labels = setup.labels(idx, targets, numbers) if setup.labels else None
            passes.append((idx, targets, labels))
        if setup.labels:  # the mean number of valid labels over passes and ranks
            n_valid = world.sum(sum((labels >= 0).sum() for _, _, labels in passes))
            n_valid = n_valid.clamp(min=1) / (setup.passes * world.size)
        losses = dict.fromkeys(names, 0.0)
        for i, (idx, targets, labels) in enumerate(passes):
            step_model.require_backward_grad_sync = i == setup.passes - 1  # read by DDP alone
            with world.autocast():
                out = step_model(idx, targets, labels, n_valid)
                loss, extra = out.loss, out.concept_loss
                if settings.mode == "kd":
                    extra = distillation(out.logits, setup.teacher(idx).logits)
                    loss = loss + settings.kd_weight * extra
            (loss / setup.passes).backward()
            for name, part in zip(names, (out.ntp_loss, extra)):
                losses[name] += part.detach() / setup.passes
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        validate = done % settings.eval_interval == 0 or done == settings.steps
        if means := run.mean(validate, **losses, grad_norm=norm):
            speed = means.pop("per_second") * settings.batch_tokens
            record = {"step": done, "tokens": done * settings.batch_tokens, **means,
                      "lr": learning_rate(step, settings), "tok_per_s": round(speed),
                      "mfu": peak and speed * flops / (peak * world.size),
                      "seconds": round(run.ckpt["seconds"], 3)}
            if validate:
                record |= evaluate(model, setup.val, world, settings.eval_tokens, setup.val_labels,
                                   settings.micro_batch or 16)
                world.print(" | ".join(f"{k} {v:.4g}" for k, v in record.items() if v is not None))
            run.write(record)
    return model, run.ckpt["log"]


# ---- python train.py report: finished runs side by side ------------------------------------------

@dataclass(frozen=True)
class ReportSettings:
    """Compare finished runs by their logs: a Markdown table, and a picture of their curves. Folders
    that differ in their seed alone, a whole word between / and _ (out/0/ntp, out/1/ntp; out/ntp_0,
    out/ntp_1), make one row."""
    runs: tuple[str, ...]  # folders of runs (--out)
    baseline: str = ""  # one of them, whose row the others are compared with; empty: the first
    plot: str = ""  # file for a picture, .png or .svg (pip install matplotlib)
    level: float = 0.0  # a loss to draw in it as a line, say the teacher's


def read_run(folder):
    """The records of a finished run's log. ValueError if it is missing, foreign or unfinished."""
    with explain(f"{folder}/log.jsonl is missing, damaged or no log of train.py",
                 "name the --out folder of a run"):
        lines = Path(folder, "log.jsonl").read_text("utf-8").splitlines()
        log = list(map(json.loads, lines))
        steps, at = log[0]["settings"]["steps"], log[-1]["step"]
    require(at == steps,
            f"{folder} is unfinished, at step {at} of {steps}: give its command again")
    return log


def rows_of(folders):
    """{row's name: {seed: log}} of finished runs, out/ntp_1 of seed 1 in row out/ntp_*. ValueError
    if runs of a row differ in more than their seed (and the teachers and SAEs that come of it), or
    if losses are not of the same tokens."""
    rows, kinds, logs = {}, {}, [read_run(folder) for folder in folders]
    for folder, log in zip(folders, logs):
        first, seed = log[0], log[0]["settings"]["seed"]
        require(first["validation"] == logs[0][0]["validation"], f"{folder} and {folders[0]} were "
                "validated on different tokens: report them apart")
        kind = {**first["identity"], "seed": 0, "teacher": 0, "sae": 0}
        name = re.sub(rf"(.*)(?<![^/_]){seed}(?![^/_])", r"\1*", Path(folder).as_posix())
        require(kinds.setdefault(name, kind) == kind, f"{folder} differs in more than its seed "
                f"from the others that are named {name}: rename it")
        rows.setdefault(name, {})[seed] = log
    return rows


def tokens_to(target, log):
    """Training tokens at which a run's validation loss first reaches `target`, by a straight line
    between two validations; None if it never does."""
    points = [(r["tokens"], r["val_loss"]) for r in log if "val_loss" in r]
    for (t0, l0), (t1, l1) in zip([points[0], *points], points):
        if l1 <= target:
            return t1 - (t1 - t0) * (target - l1) / max(l0 - l1, 1e-12)


def plus_minus(values, form, n=1):
    """'mean ± s.d. / sqrt(n)' of a list, the mean alone of one value, '-' of none."""
    if len(values) < 2:
        return format(values[0], form) if values else "-"
    return f"{mean(values):{form}} ± {stdev(values) / math.sqrt(n):{form.lstrip('+')}}"


def compare(rows):
    """Markdown table of `rows` {name: {seed: log}}, each compared with the first, seed by seed:
    validation loss ± s.d., its difference ± standard error, tokens saved by the end of the first
    ± s.d."""
    baseline = next(iter(rows))
    table = ["| run | seeds | parameters | tokens | FLOPs | seconds | loss | difference | saved % |",
             "|---" * 9 + "|"]
    for name, logs in rows.items():
        first, ends = next(iter(logs.values()))[0], [log[-1] for log in logs.values()]
        pairs = [(log, rows[baseline][seed][-1]) for seed, log in logs.items()
                 if seed in rows[baseline] and name != baseline]
        gaps = [log[-1]["val_loss"] - end["val_loss"] for log, end in pairs]
        saved = [100 - 100 * tokens / end["tokens"] for log, end in pairs
                 if (tokens := tokens_to(end["val_loss"], log))]
        cells = [name, len(logs), f"{first['parameters']:,}", f"{ends[0]['tokens']:,}",
                 f"{first['flops_per_token'] * ends[0]['tokens']:.2e}",
                 f"{mean(end['seconds'] for end in ends):.0f}",
                 plus_minus([end["val_loss"] for end in ends], ".4f"),
                 plus_minus(gaps, "+.4f", len(gaps)), plus_minus(saved, ".1f") +
                 f" ({len(saved)} of {len(gaps)})" * (len(saved) < len(gaps))]
        table.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(table)


def plot(rows, path, level=0.0):
    """A picture of validation loss by training tokens: a colour for each of `rows`, a line for each
    of its seeds; with `level` a line at that loss. ValueError for a format matplotlib lacks."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, (name, logs) in enumerate(rows.items()):
        for log in logs.values():
            points = [(r["tokens"], r["val_loss"]) for r in log if "val_loss" in r]
            line, = axes.plot(*zip(*points), color=f"C{number}", linewidth=1)
        line.set_label(f"{name} ({len(logs)})")
    if level:
        axes.axhline(level, color="gray", linestyle="dashed")
    axes.set(xlabel="training tokens", ylabel="validation loss (nats a token)")
    axes.legend()
    with explain(f"no picture in {path}", "name a .png or .svg"), atomic(Path(path)) as tmp:
        figure.savefig(tmp, dpi=150)


# ---- python train.py eval: finished models, and GPT-2 --------------------------------------------

@dataclass(frozen=True)
class EvalSettings:
    """Evaluate models: loss over the whole validation split, and zero-shot tasks."""
    ckpts: tuple[str, ...]  # checkpoints (train.py); gpt2 and a GPT-2's weights, too
    tasks: str = ""  # comma-separated tasks of lm-evaluation-harness (pip install lm-eval)
    limit: int = 0  # documents of each task, for a quick look; 0: all
    data: str = ""  # folder of tokens; empty: those that a checkpoint was trained on


@torch.no_grad()
def score(model, context, continuation, world):
    """log p(continuation | context), two lists of ids that are cut to a block on the left, and
    whether it is what greedy decoding gives."""
    ids = torch.tensor([*context, *continuation][-model.config.block_size - 1:],
                       device=world.device)
    targets = ids[1:][-len(continuation):]
    with world.autocast():
        logits = model(ids[None, :-1]).logits[0, -len(targets):]
    loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return -loss.item(), torch.equal(logits.argmax(-1), targets)


def harness(model, encoding, world):
    """`model` as lm-evaluation-harness sees one."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class Harness(TemplateLM):
        eot_token_id = encoding.eot_token
        generate_until = None  # the paper's tasks only score

        def tok_encode(self, string, **_):
            return encoding.encode(string, allowed_special="all")

        def _loglikelihood_tokens(self, requests, **_):
            return [score(model, *pair, world) for _, *pair in requests]

        def loglikelihood_rolling(self, requests, **_):
            totals, T = [], model.config.block_size
            for ids in (self.tok_encode(request.args[0]) for request in requests):
                windows = utils.get_rolling_token_windows(ids, encoding.eot_token, T, 1)
                pairs = map(utils.make_disjoint_window, windows)
                totals.append(sum(score(model, *pair, world)[0] for pair in pairs))
            return totals

    return Harness()


def evaluate_models(settings, world):
    """The command `train.py eval`: prints a line for each model, and the harness's own table of
    the tasks."""
    for name in settings.ckpts:
        model, vocabulary, folder = load_model(name, world)
        folder = settings.data or folder
        require(folder or settings.tasks, f"{name} names no text: give --data, or --tasks")
        if folder:
            windows = Windows(folder, "val", model.config.block_size, model=model)
            loss = evaluate(model, windows, world)["val_loss"]
            world.print(f"{name}: loss {loss:.4f}, perplexity {math.exp(loss):.4f}, validation "
                        f"text of {folder}")
        if settings.tasks:
            from lm_eval import simple_evaluate, utils
            results = simple_evaluate(
                harness(model, get_tokenizer(vocabulary), world), log_samples=False,
                tasks=settings.tasks.split(","), limit=settings.limit or None)
            world.print(f"\n{name}:\n\n{utils.make_table(results)}")


# ---- mode all: the whole method ------------------------------------------------------------------

REPORT = """
{table}

**The same prompt**, continued by NTP and by CoCoMix:

```
{ntp}
----
{cocomix}
```

**What it thinks** at ten tokens of held-out text: the strongest predicted concept, (its logit),
tokens it fires on > tokens that follow. {hits:.1%} of a token's {n} strongest are among the
teacher's labels of it; always guessing the most frequent labels scores {guess:.1%}.

```
{thoughts}
```

**Steered**: concept {id}, {words}, raised by 4. It has the most typical follower
that begins a word. Of all that follows 32 held-out texts, its typical followers are
{rates[0]:.1%} at strength 0, {rates[1]:.1%} at 2, {rates[2]:.1%} at 4.

```
{steered}
```

Try next:

    python cocomix.py {ckpt} --prompt "for " --inspect
    python cocomix.py {ckpt} --prompt "for " --steer {id}=+2
    python cocomix.py {ckpt} --study
    python train.py report {out}/ntp {out}/cocomix --plot {out}/curves.png   # needs matplotlib
"""


def first_report(out, ntp, cocomix, val):
    """The text of report.md: both models in `out`, compared, read and steered."""
    path, encoding = out / "cocomix/ckpt.pt", get_tokenizer(val.meta)
    ckpt = load_checkpoint(path, "model")
    entries, figures = load_dictionary(path, ckpt), ckpt["log"][-1]
    idx, _ = val.batch(sum(val.spread(32 * val.block_size), []), cocomix.wte.weight.device)
    prompts = idx[:, :24]

    def continued(model, steer=None):
        torch.manual_seed(1)
        new = model.generate(prompts[len(prompts) // 3, None], 60, 0.7, 50, steer)
        return encoding.decode(new[0].tolist())
    typical = steerable(entries, 20)
    best = next((entry for entry in typical if entry["next"][0][1][0] == " "), typical[0])
    rates = [follower_rate(cocomix, prompts, best, {best["id"]: s}) for s in (0, 2, 4)]
    thoughts = list(inspect(cocomix, encoding, prompts[-1:], entries, 1))[-10:]
    return REPORT.format(
        table=compare(rows_of([out / "ntp", out / "cocomix"])), out=out, ckpt=path,
        ntp=continued(ntp), cocomix=continued(cocomix), steered=continued(cocomix, {best["id"]: 4}),
        thoughts="\n".join(thoughts), hits=figures["label_hits"], guess=figures["label_guess"],
        id=best["id"], words=in_words(best), rates=rates, n=ckpt["settings"]["n_labels"])


def pipeline(settings, world):
    """Teacher (= NTP baseline) -> SAE and its dictionary -> CoCoMix, the paper's form -> report."""
    out = Path(settings.out)
    ntp, _ = train(replace(settings, mode="ntp", out=str(out / "ntp")), world)
    sae, _ = train_sae(SAESettings(
        data=settings.data, out=str(out / "sae"), layer=settings.sae_layer, k=settings.k_concepts,
        n_latents=settings.n_concepts, steps=settings.sae_steps, seed=settings.seed,
        batch_tokens=settings.batch_tokens, dtype=settings.dtype), ntp, world)
    val = Windows(settings.data, "val", settings.block_size)
    dictionary = out / "sae/ckpt.concepts.json"
    world.first(lambda: dictionary.exists() or
                describe(ntp, sae, settings.sae_layer, val, dictionary))
    cocomix, _ = train(replace(
        settings, mode="cocomix", out=str(out / "cocomix"), teacher=str(out / "ntp/ckpt.pt"),
        sae=str(out / "sae/ckpt.pt")), world)
    if world.main:
        text = first_report(out, ntp, cocomix, val)
        with atomic(out / "report.md") as tmp:
            tmp.write_text(text, "utf-8")
        print(text)


def main():
    command = sys.argv[1:2]
    if command == ["report"]:
        settings = parse(ReportSettings, sys.argv[2:])
        rows = rows_of([settings.baseline or settings.runs[0], *settings.runs])
        if settings.plot:
            plot(rows, settings.plot, settings.level)
        return print(compare(rows))
    if command == ["eval"]:
        return evaluate_models(parse(EvalSettings, sys.argv[2:]), World())
    settings = parse(TrainSettings, presets=preset, skip=("vocab_size", "mix"))
    world, data = World(settings.device, settings.dtype), Path(settings.data)
    if data.parent == Path("data") and data.name in KNOWN:
        world.first(lambda: any(data.glob("*val*.bin"))  # made last
                    or prepare(DataSettings(data.name)))
    if settings.mode == "all":
        return pipeline(settings, world)
    _, log = train(settings, world)
    world.print(f"{settings.mode}: validation loss {log[-1]['val_loss']:.4f}, in {settings.out}")


if __name__ == "__main__":
    script(main)
