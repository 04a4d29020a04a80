"""Files, tokens, processes and command lines: what every script shares and no paper is about.

  python data.py pystdlib                      # the Python standard library -> data/pystdlib
  python data.py notes.txt --tokenizer gpt2    # one text file -> data/notes
  python data.py ~/books --vocab_size 4096     # a folder of text files; val.txt is held out
  python data.py fineweb --shards 10           # downloads: fineweb, openwebtext, shakespeare

A data set is a folder of train.bin and val.bin (uint16 tokens, nanoGPT's format) and a meta.json
(tokenizer, vocabulary, counts). llm.c's shards *train*.bin, *val*.bin (256 int32: 20240520, 1,
number of tokens; then uint16 tokens) are read too; without meta.json the tokens are GPT-2's.

In this order: command lines, files, tokenizers, text to tokens, tokens to batches, processes, runs
that can be killed. Dimensions: B batch, T tokens of a block.
"""
import argparse
import difflib
import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from datetime import timedelta
from functools import lru_cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
from tqdm import tqdm


# ---- command lines -------------------------------------------------------------------------------

def require(condition, message):
    """ValueError(message) unless condition holds: what is wrong, and what mends it."""
    if not condition:
        raise ValueError(message)


@contextmanager
def explain(what, remedy):
    """`with explain(what, remedy)`: any error inside becomes ValueError: what (error): remedy."""
    try:
        yield
    except Exception as e:  # torch, requests and json raise many kinds
        raise ValueError(f"{what} ({e!r:.99}): {remedy}") from e


def parse(cls, argv=None, presets=None, skip=()):
    """An instance of the frozen dataclass `cls` from the command line.

    One flag a field but those in `skip`, with its type and default, its comment as help; a tuple
    takes several words, a field without default is positional. `presets(args)` gives other defaults
    {field: value}. A wrong flag ends the program with what would be right; ValueError for what
    __post_init__ refuses."""
    source = "".join(map(inspect.getsource, cls.__mro__[:-1]))
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", source, re.M))
    parser = argparse.ArgumentParser(
        description=cls.__doc__, usage="%(prog)s [--flag value ...]   (see --help)",
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in (f for f in fields(cls) if f.name not in skip):
        inner = get_args(f.type)  # of Literal["a", "b"] or tuple[str, ...]
        kinds = {bool: {"action": argparse.BooleanOptionalAction}, Literal: {"choices": inner},
                 tuple: {"type": inner and inner[0], "nargs": "+"}}
        kind = kinds.get(get_origin(f.type) or f.type, {"type": f.type})
        parser.add_argument(f.name if f.default is MISSING else f"--{f.name}", **kind,
                            default=f.default, help=comments.get(f.name, "").replace("%", "%%"))
    if presets:
        parser.set_defaults(**presets(parser.parse_known_args(argv)[0]))
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(word.split("=")[0], parser._option_string_actions, 1)
        parser.error(f"unknown argument {word}: did you mean {(near or ['--help'])[0]}?")
    return cls(**vars(args))


def script(main):
    """Run a script's main. What a user can mend prints as one line, a bug with its traceback."""
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        main()
    except ImportError as e:
        sys.exit(f"error: {e}: pip install {e.name}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    except OSError as e:
        sys.exit(f"error: {e}: free some space, or name files that can be read and written. What "
                 "was saved stays, and the same command goes on")
    except ValueError as e:
        if Path(inspect.trace()[-1].filename).parent != Path(__file__).parent:
            raise  # from inside a library: a bug
        sys.exit(f"error: {e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- files ---------------------------------------------------------------------------------------

@contextmanager
def atomic(path):
    """`with atomic(path) as tmp`: the file or folder that is written to tmp becomes `path` in one
    step, or path stays as it was. OSError where that cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            yield Path(folder, path.name)
            os.replace(Path(folder, path.name), path)
    except RuntimeError as e:  # of torch, on a full disk
        raise OSError(f"{path} could not be made ({e})") from e


def load_checkpoint(path, kind, mmap=False):
    """The dict in a checkpoint of `kind` "model" or "sae" (`Run`). All of it is read once, for
    its checksums; with `mmap` only tensors that are used stay in memory. ValueError if it is
    missing, damaged, foreign, or of another kind."""
    with explain(f"{str(path)!r} is missing, damaged or no checkpoint of kind {kind}",
                 "name a ckpt.pt that train.py (models) or sae.py (SAEs) wrote"):
        require(not zipfile.ZipFile(path).testzip(), "a checksum in it is wrong")
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        require(ckpt["format"] == f"cocomix-4 {kind}", f"it is {ckpt['format']!r}")
    return ckpt


def load_dictionary(path, ckpt):
    """The entries (`sae.describe`) of the concept dictionary beside the SAE that the model `ckpt`
    at `path` learned from. ValueError if it is missing, damaged or of another SAE, or if the model
    predicts no concepts."""
    with explain(f"{path} has no concept dictionary of its SAE", "name a CoCoMix, after `python "
                 "sae.py describe --sae SAE --teacher TEACHER --data DATA`"):
        found = json.loads((Path(path).parent / ckpt["dictionary"]).read_text("utf-8"))
        require(found["sae"] == ckpt["identity"]["sae"], "it is of another SAE")
        return found["concepts"]


# ---- tokenizers ----------------------------------------------------------------------------------

EOT = "<|endoftext|>"  # ends a document
GPT2 = {"tokenizer": "gpt2", "vocab_size": 50257}
# Letters, digits, other signs, with a space before them; white space. re and tiktoken read it.
PATTERN = r" ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"


def get_tokenizer(vocabulary):
    """The tiktoken.Encoding of a meta.json or a checkpoint's vocabulary: gpt2, or a trained bpe.
    ValueError if gpt2's files are neither cached nor to be had."""
    if vocabulary["tokenizer"] == "bpe":
        tokens = [*map(chr, range(256)), *vocabulary["merged"]]  # of bytes, as Latin-1 text
        ranks = {token.encode("latin-1"): i for i, token in enumerate(tokens)}
        return tiktoken.Encoding("bpe", pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens={EOT: len(ranks)})
    with explain("GPT-2's tokenizer is neither cached nor to be had",
                 "go online once, set TIKTOKEN_CACHE_DIR to a folder that has it, or make the data "
                 "with --tokenizer bpe"):
        return tiktoken.get_encoding("gpt2")


def train_bpe(text, vocab_size):
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909) of `text` -> the merged tokens, bytes,
    in order: with 256 bytes and <|endoftext|> at most `vocab_size` tokens.

    The distinct words form one string in which a character's code is a token, 255 (never in UTF-8)
    after each word, weighted by how often they occur; the most frequent pair becomes a token, again
    and again."""
    words, V = Counter(re.findall(PATTERN, text)), vocab_size
    tokens = {chr(i): i for i in range(256)}  # bytes as Latin-1 text
    string = "".join(word.encode().decode("latin-1") + "\xff" for word in words)
    while len(tokens) < V - 1:
        ids = np.frombuffer(string.encode("utf-32-le"), "<u4").astype(np.int64)
        lengths = np.diff(np.flatnonzero(ids == 255), prepend=-1)
        weights = np.repeat([*words.values()], lengths)[:-1]
        totals = np.bincount(ids[:-1] * V + ids[1:], weights, V * V).reshape(V, V)
        totals[255] = totals[:, 255] = 0
        first, second = divmod(int(totals.argmax()), V)
        if totals[first, second] < 2:  # nothing is left to merge
            break
        token = list(tokens)[first] + list(tokens)[second]
        number = tokens.setdefault(token, len(tokens))  # one token can come of two pairs
        string = string.replace(chr(first) + chr(second), chr(number))
    return list(tokens)[256:]


# ---- text to tokens ------------------------------------------------------------------------------

KNOWN = {  # name: tokenizer, address
    "pystdlib": ("bpe", ""),
    "shakespeare": ("bpe", "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                    "tinyshakespeare/input.txt"),
    "openwebtext": ("gpt2", "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/"
                    "subsets/urlsf_subset{:02d}.tar"),
    "fineweb": ("gpt2", "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
                "fineweb_{}.bin")}
NO_CODE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data",
           "encodings"}


@dataclass(frozen=True)
class DataSettings:
    """Turn text into a data set, or download one."""
    source: str  # a text file, a folder of them, or pystdlib, shakespeare, openwebtext, fineweb
    out: str = ""  # folder for it; empty: data/NAME
    tokenizer: str = ""  # bpe, gpt2 (empty: for web texts, else bpe), or a data set's folder
    vocab_size: int = 1024  # of bpe, which is trained on the text; 257: bytes alone
    shards: int = 21  # files to download, of fineweb (103, 100M tokens each) or openwebtext (21)


def fetch(url, path="", sha256=None):
    """Download `url` to `path` (by default in ~/.cache/cocomix) unless it is there -> Path.
    ValueError if that fails, or for a wrong hash; a half file never gets the name."""
    path = Path(path or Path.home() / ".cache/cocomix" / url.split("//")[1])
    if not path.exists():
        with atomic(path) as tmp, explain(f"{url} is not to be had, or damaged",
                                          f"go online and try again, or put the file at {path}"):
            urllib.request.urlretrieve(url, tmp)
            require(sha256 in (None, hashlib.sha256(tmp.read_bytes()).hexdigest()),
                    f"its SHA-256 is not {sha256}")
    return path


def text_files(source):
    """The text files of pystdlib, shakespeare, a file or a folder, in the order of their names'
    hashes."""
    standard = source == "pystdlib"
    root = Path(os.__file__).parent if standard else Path(source)
    root = fetch(KNOWN[source][1]) if source == "shakespeare" else root
    paths = [p for p in list(root.rglob("*.py" if standard else "*")) or [root] if p.is_file()
             and not any(part[0] == "." or standard and part in NO_CODE
                         for part in p.relative_to(root).parts)
             and b"\0" not in open(p, "rb").read(8192)]
    require(any(map(os.path.getsize, paths)), f"{root} is no text file, no folder of any, nor "
            f"one of {', '.join(KNOWN)}: run `python data.py PATH` on some text")
    return sorted(paths, key=lambda p: hashlib.sha256(
        os.fsencode(p.relative_to(root).as_posix())).digest())


def openwebtext(shards):
    """Yield OpenWebText's documents."""
    for number in range(shards):
        outer = tarfile.open(fetch(KNOWN["openwebtext"][1].format(number)))
        for packed in filter(tarfile.TarInfo.isfile, outer):
            inner = tarfile.open(fileobj=outer.extractfile(packed))
            for file in filter(tarfile.TarInfo.isfile, inner):
                text = inner.extractfile(file).read().decode("utf-8", "replace")
                yield re.sub("\n\n\n+", "\n\n", text).strip() + EOT


def documents(source, shards=21):
    """Yield (text, held out) of any source in pieces; <|endoftext|> ends a document. Held out are a
    folder's val.txt, or 5 % of the text: a file's end, or the files of a folder whose names hash
    lowest; of OpenWebText every 2000th document. ValueError for text that is not UTF-8."""
    if source == "openwebtext":
        yield from zip(openwebtext(shards), cycle([False] * 1999 + [True]))
        return
    paths = text_files(source)
    ends = np.cumsum([p.stat().st_size for p in paths])
    size, done = int(ends[-1]), 0  # bytes
    piece = min(1 << 20, size // 80 + 1)
    held_out = {*([p for p in paths if p.name == "val.txt"] or
                  paths[:np.searchsorted(ends, size / 20)] or
                  [min(filter(os.path.getsize, paths), key=os.path.getsize)])}
    for path in paths:
        with explain(f"{path} is no UTF-8 text", "convert it, or leave it out"), open(
                path, encoding="utf-8", newline="") as f:
            while text := f.read(piece) + f.readline(piece):  # whole lines
                yield text, path in held_out if len(paths) > 1 else done > 0.95 * size
                done += len(text.encode())
        yield EOT, path in held_out


def prepare(settings):
    """Make the data set that `settings` (DataSettings) describe -> its folder. ValueError for a
    source that is missing or empty, for a wrong vocab_size, or if the folder is there."""
    source, meta = settings.source, GPT2
    out = Path(settings.out or f"data/{Path(source).resolve().stem}")
    if source == "fineweb":
        # validation last: then all are there
        for part in [*(f"train_{n:06d}" for n in range(1, settings.shards + 1)), "val_000000"]:
            fetch(KNOWN["fineweb"][1].format(part), out / f"fineweb_{part}.bin")
        return out
    require(not out.exists(), f"{out} is there already: remove it, or name another --out")
    with atomic(out) as tmp:
        tmp.mkdir()
        tokenizer = settings.tokenizer or KNOWN.get(source, ("bpe", ""))[0]
        if tokenizer == "bpe":
            require(257 <= settings.vocab_size <= 8192,
                    f"--vocab_size {settings.vocab_size}: bpe takes 257 to 8192")
            sample = islice(documents(source), 2000)
            text = "".join(text for text, held_out in sample if not held_out).replace(EOT, "")
            meta = {"tokenizer": "bpe", "merged": train_bpe(text[:1 << 25], settings.vocab_size)}
        elif tokenizer != "gpt2":
            with explain(f"--tokenizer {tokenizer} is not bpe, gpt2 or a data set's folder",
                         "name one"):
                meta = Windows(tokenizer, "train", 1).meta
        encoding, texts = get_tokenizer(meta), documents(source, settings.shards)
        with open(tmp / "train.bin", "wb") as train, open(tmp / "val.bin", "wb") as val:
            while batch := list(islice(texts, 256)):
                pieces = encoding.encode_batch([text for text, _ in batch], allowed_special={EOT})
                for (_, held_out), ids in zip(batch, pieces):
                    (val if held_out else train).write(np.array(ids, "<u2"))
            counts = {"train": train.tell() // 2, "val": val.tell() // 2}
        more = {"vocab_size": encoding.n_vocab, "tokens": counts}
        (tmp / "meta.json").write_text(json.dumps(meta | more), "utf-8")
    print(f"data: {out}, {counts['train']:,} training and {counts['val']:,} validation tokens")
    return out


# ---- tokens to batches ---------------------------------------------------------------------------

def open_shard(path):
    """A file of uint16 tokens, memory-mapped. ValueError if it is cut short or foreign: it begins
    with llm.c's header, or is train.bin or val.bin, which may come without (nanoGPT's)."""
    size, head = path.stat().st_size, np.fromfile(path, "<i4", 3).tolist()
    start = 1024 * (head[:2] == [20240520, 1])
    plain = path.name in ("train.bin", "val.bin") and size > 1
    require(size == 1024 + 2 * head[2] if start else plain, f"{path} is cut short or no token "
            f"shard: {size:,} bytes that begin with {head}, not with 20240520, 1 and the number of "
            "tokens. Make it again with data.py")
    return np.memmap(path, "<u2", "r", start, (size - start) // 2)


class Windows(torch.utils.data.ConcatDataset):
    """A data set's split as non-overlapping windows of T+1 tokens, dealt out in batches. Window n,
    in the order of files, is `self[n]`: (T+1,) uint16, unchecked.

    `numbers(step, rows, rank, world)` is a pure function: step t takes the next rows * world
    windows of an endless stream, a fresh permutation of all windows each epoch. So over all ranks
    every window comes once an epoch, resuming needs no state, and 8 rows on 1 rank are the windows
    of 4 rows on 2 ranks. ValueError without tokens, or too few for a window; for a batch with ids
    beyond the vocabulary; or if that is not the vocabulary of the `model` that is to read them."""

    def __init__(self, folder, split, block_size, seed=0, model=None):
        self.block_size, self.seed = block_size, seed
        self.paths, meta = sorted(Path(folder).glob(f"*{split}*.bin")), Path(folder, "meta.json")
        require(self.paths, f"no {split} tokens (*{split}*.bin) in {folder}: make them with "
                "`python data.py pystdlib`, or your own with `python data.py PATH`")
        self.shards = [open_shard(p) for p in self.paths]
        count, width = sum(map(len, self.shards)), block_size + 1
        super().__init__(s[:len(s) // width * width].reshape(-1, width) for s in self.shards)
        with explain(f"{meta} is damaged", "make the data again"):
            self.meta = GPT2 | (json.loads(meta.read_text("utf-8")) if meta.exists() else {})
            promised = self.meta.pop("tokens", {}).get(split, count)
        require(count == promised and len(self), f"{folder} has {count:,} {split} tokens of "
                f"{promised:,}, to be read {block_size} + 1 at a time: make it again, add text, or "
                "lower --block_size")
        require(not model or model.vocabulary.items() <= self.meta.items(), f"{folder} is in other "
                "tokens than the model's: make it with `python data.py TEXT --tokenizer` and gpt2 "
                "or the folder of the model's data")

    def fingerprint(self):
        """16 hex digits that change with the shards' names, sizes and first megabytes."""
        return hashlib.sha256(b"".join(
            f"{path.name} {len(shard)} ".encode() + shard[:1 << 19].tobytes()
            for path, shard in zip(self.paths, self.shards))).hexdigest()[:16]

    @lru_cache(1)
    def order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(len(self))

    def numbers(self, step, rows, rank=0, world=1):
        """The window numbers of a batch: `rows` ints."""
        first, N = (step * world + rank) * rows, len(self)
        return [int(self.order(at // N)[at % N]) for at in range(first, first + rows)]

    def batch(self, numbers, device="cpu"):
        """idx and targets (rows,T) int64: the targets are the tokens one further on."""
        windows = torch.from_numpy(np.stack([self[n] for n in numbers]).astype(np.int64))
        require(windows.max() < self.meta["vocab_size"], f"{self.paths[0].parent} holds token "
                f"{windows.max()}, its vocabulary {self.meta['vocab_size']}: make it again")
        return windows[:, :-1].to(device), windows[:, 1:].to(device)

    def spread(self, tokens, rank=0, world=1, rows=16):
        """A fixed set of about `tokens` tokens (0: all) spread over the split: this rank's share of
        the window numbers, in lists of up to `rows`."""
        count = min(len(self), max(1, tokens // self.block_size)) if tokens else len(self)
        mine = [n * len(self) // count for n in range(rank, count, world)]
        return [mine[i:i + rows] for i in range(0, len(mine), rows)]


# ---- processes, and runs that can be killed ------------------------------------------------------

class World:
    """This process among those torchrun started (without torchrun the only one), its device, and
    whether it computes in bf16 (`dtype` bfloat16, or auto on CUDA; never fp16).

    NCCL reduces GPU tensors and gloo CPU ones, so that a small CPU tensor is reduced without
    stalling the GPU. ValueError for a GPU that is not there."""

    def __init__(self, device="auto", dtype="auto"):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main, self.signal = self.rank == 0, 0
        self.print = tqdm.write if self.main else str  # the other ranks say nothing
        self.device = device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = dtype == "bfloat16" or dtype == "auto" and self.device == "cuda"
        self.autocast = partial(torch.autocast, self.device, torch.bfloat16, enabled=self.bf16)
        if self.device == "cuda":
            with explain("no GPU for this process", "start fewer processes, or --device cpu"):
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves fp32
        if self.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device == "cuda" else "gloo",
                                    timeout=timedelta(days=2))  # rank 0 may download for hours

    def sum(self, tensor):
        """The tensor summed over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def first(self, work):
        """`work()` on rank 0, then on the others, who find it done."""
        result = work() if self.main else None
        self.sum(torch.zeros(1))  # wait
        return result if self.main else work()


class Run:
    """A run of `settings` in folder `settings.out` that can be killed at any moment: the same call
    goes on from ckpt.pt, and log.jsonl is cut back to it. Two runs are the same if their settings
    off the defaults are (so a fork that adds one goes on with older runs), but for those in `free`,
    and `who` teaches them. `parts` {name: module or optimiser} are what trains; `more` {name: plain
    value} goes into the checkpoint with them. ValueError for another run's folder."""

    def __init__(self, settings, free, who, kind, world, parts, more):
        self.out, self.world, self.parts = Path(settings.out), world, parts
        identity = {k: v for k, v in vars(settings).items()
                    if k not in free and v != getattr(type(settings), k)} | who
        self.ckpt = {"format": f"cocomix-4 {kind}", "identity": identity, "step": 0, "seconds": 0.0,
                     "log": [], **more}
        if (self.out / "ckpt.pt").exists():
            ckpt = load_checkpoint(self.out / "ckpt.pt", kind)
            there = ckpt["identity"]
            differ = [f"{k} {there.get(k, 'default')} there, {identity.get(k, 'default')} here"
                      for k in there | identity if there.get(k) != identity.get(k)]
            require(not differ, f"{self.out} holds another run ({'; '.join(differ)}): name another "
                    "--out")
            for name, part in parts.items():
                part.load_state_dict(ckpt.pop(name))
            self.ckpt = ckpt | more
        for killed in self.out.glob(".ckpt.pt.*") if world.main else ():  # halves of saves
            shutil.rmtree(killed)
        self.write()

    def write(self, *records):
        """Add lines to log.jsonl. The time since `mean`, say of a validation, is not counted."""
        self.ckpt["log"].extend(records)
        if self.world.main:
            with atomic(self.out / "log.jsonl") as tmp:
                tmp.write_text("".join(json.dumps(r) + "\n" for r in self.ckpt["log"]), "utf-8")
        self.losses, self.clock = [], time.perf_counter()  # since this record

    def steps(self, end, save_interval, name):
        """Yield the steps that are left, behind a progress bar; save after every `save_interval`,
        after the last, and, at the next tenth, when SIGTERM or Ctrl-C asks any rank to stop. Asked
        again changes nothing: torchrun passes on what a process has had already."""
        def note(number, frame):
            self.world.signal = number
        first = self.ckpt["step"]
        require(self.world.sum(torch.tensor(first)).item() == first * self.world.size,
                f"{self.out} is at step {first} here, not so elsewhere: nodes must share one disk")
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        for step in tqdm(range(first, end), f"{name:<8}", initial=first, total=end,
                         disable=not self.world.main, dynamic_ncols=True,
                         mininterval=0.5 if sys.stderr.isatty() else 20):
            done = self.ckpt["step"] = step + 1
            save = done == end or done % save_interval == 0
            self.due = save or done % 10 == 0
            yield step
            stop = self.due and self.world.sum(torch.tensor(self.world.signal)).item()
            if self.world.main and (save or stop):  # plain types: weights_only=True loads them
                parts = {name: part.state_dict() for name, part in self.parts.items()}
                with atomic(self.out / "ckpt.pt") as tmp:
                    torch.save(self.ckpt | parts, tmp)
            if stop:
                sys.exit(f"stopped after step {done}; the same command goes on")
        for number, handler in before.items():
            signal.signal(number, handler)

    def mean(self, now, **losses):
        """Take note of a step's losses () -> {}, or, every tenth step, before saving and if `now`,
        their means over all ranks and the steps since `write`, which is to follow, with steps
        `per_second`. ValueError where they are not finite: the last checkpoint stays."""
        self.losses.append(torch.stack(list(losses.values())).detach())
        if not (now or self.due):
            return {}
        steps = len(self.losses)
        means = self.world.sum(sum(self.losses)) / (self.world.size * steps)
        means = dict(zip(losses, means.tolist()))
        elapsed = time.perf_counter() - self.clock  # after tolist, which waits for the GPU
        require(np.isfinite([*means.values()]).all(), f"{means} by step {self.ckpt['step']}: lower "
                f"--lr, in another --out. The last checkpoint stays in {self.out}")
        self.ckpt["seconds"] += elapsed
        return means | {"per_second": steps / elapsed}


if __name__ == "__main__":
    script(lambda: prepare(parse(DataSettings)))
