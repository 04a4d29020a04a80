"""Files, tokens and command lines: what every script of this project shares and no paper is about.

    python data.py pystdlib                            # the Python standard library's sources -> data/pystdlib
    python data.py notes.txt --tokenizer gpt2          # one text file -> data/notes
    python data.py ~/books --out data/books            # a folder of text files; a file is a document

Text is read in pieces and written as it is tokenised: memory stays at a few MB whatever the size. A data set is
a folder of shards train_000000.bin, val_000000.bin, ... in llm.c's format (256 int32: 20240520, 1, number of
tokens; then uint16 tokens) with a meta.json (tokenizer, vocabulary, source). nanoGPT's headerless train.bin and
val.bin are read too.

In this order: settings with a generated command line (`parse`), atomic files and checkpoints, tokenizers, text
to shards (`prepare`), shards to batches (`Windows`), processes and devices (`World`).
Dimensions: B batch, T tokens of a block.
"""
import argparse
import difflib
import hashlib
import inspect
import json
import os
import re
import signal
import sys
import sysconfig
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

MAGIC, HEADER_BYTES = 20240520, 256 * 4
EOT = "<|endoftext|>"


# ---- settings and command lines ----------------------------------------------------------------------------

def parse(cls, argv=None, positional=(), presets=None, preset=None):
    """An instance of the frozen dataclass `cls` from the command line.

    One flag a field, of its type and default, its comment as help; `Literal` gives choices, a flag of type
    tuple[X, ...] can be repeated, one of type Optional[int] can stand alone, which means -1. `presets`
    {name: {field: value}} adds --preset, whose values other flags override. A wrong flag or value ends the
    program with what would be right. In flags - and _ are the same."""
    argv = list(sys.argv[1:] if argv is None else argv)
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.usage = "%(prog)s " + "".join(f"{name.upper()} " for name in positional) + "[--flag value ...]   (--help)"
    if presets:
        parser.add_argument("--preset", choices=presets, default=preset, help="named settings")
    for f in fields(cls):
        kind, extra = get_type_hints(cls)[f.name], {"help": comments.get(f.name, " ").replace("%", "%%")}
        if f.name in positional:
            parser.add_argument(f.name, **extra)
            continue
        if kind is bool:
            extra["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            extra["choices"] = get_args(kind)
        elif get_origin(kind) is tuple:
            extra.update(action="append", type=get_args(kind)[0], metavar="...")
        elif get_origin(kind) is Union:  # Optional[int]
            extra.update(nargs="?", const=-1, type=get_args(kind)[0], metavar="...")
        else:
            extra.update(type=kind, metavar=kind.__name__.upper())
        default = list(f.default) if isinstance(f.default, tuple) else f.default
        parser.add_argument(*dict.fromkeys(["--" + f.name, "--" + f.name.replace("_", "-")]), default=default, **extra)
    if presets:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", default=preset)
        parser.set_defaults(**presets.get(first.parse_known_args(argv)[0].preset, {}))
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        parser.error(f"unknown argument {unknown[0]}" + (f": did you mean {near[0]}?" if near else ""))
    try:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items() if k != "preset"}
        return cls(**values)
    except ValueError as e:
        parser.error(str(e))


def run(main):
    """Run a script's main. An error raised in this project's files prints as one line, others with traceback."""
    try:
        main()
        if dist.is_initialized():  # all ranks leave together: one that hangs up early kills the others
            dist.all_reduce(torch.zeros(1))
    except KeyboardInterrupt:
        sys.exit("interrupted; what was saved stays")
    except RuntimeError as e:
        if "onnection closed" not in str(e):
            raise
        sys.exit(f"rank {os.environ['RANK']} stops because another process has: the error is in that one's output")
    except (ValueError, OSError, FloatingPointError) as e:
        frame = e.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        if Path(frame.tb_frame.f_code.co_filename).parent != Path(__file__).parent:
            raise
        sys.exit(f"error: {e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- files: atomic, and refused when they are not what they should be --------------------------------------

@contextmanager
def writing(path):
    """Turns an OSError while `path` is written (full disk, forbidden folder) into one that says what to do."""
    try:
        yield
    except OSError as e:
        raise OSError(f"could not write {path} ({e}); what stood there before is untouched. "
                      "Free some space, or name a folder that can be written with --out") from e


@contextmanager
def atomic(path):
    """`with atomic(path) as tmp`: what is written to tmp becomes `path` in one step, or `path` stays as it was."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield tmp
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)


def save_checkpoint(path, kind, **parts):
    """Write a checkpoint of `kind` "model" or "sae": tensors and plain types, so that weights_only=True loads it."""
    with atomic(path) as tmp, open(tmp, "wb") as f:
        try:
            torch.save({"format": "cocomix-1", "kind": kind, **parts}, f)
        except RuntimeError as e:  # its way to report a full disk
            raise OSError(str(e)) from e
        f.flush()
        os.fsync(f.fileno())


def load_checkpoint(path, kind, map_location="cpu"):
    """The dict that `save_checkpoint` wrote. FileNotFoundError if it is missing, ValueError if it is damaged, not
    of this project, or of another kind."""
    path = Path(path)
    make = {"model": "python train.py --mode ntp", "sae": "python sae.py --teacher CKPT"}[kind]
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}: make one with `{make} --out {path.parent}`")
    try:
        ckpt = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as e:  # torch raises seven kinds, from EOFError to UnpicklingError
        raise ValueError(f"{path} is damaged or no checkpoint ({type(e).__name__}): take another copy, or make it "
                         f"again with `{make}`") from e
    if not isinstance(ckpt, dict) or ckpt.get("format") != "cocomix-1":
        raise ValueError(f"{path} was not written by this project (no format mark): make one with `{make}`")
    if ckpt["kind"] != kind:
        raise ValueError(f"{path} holds a checkpoint of kind {ckpt['kind']!r}, not {kind!r}: make one with `{make}`")
    return ckpt


class Log:
    """JSONL, one dict a line, each written at once. It begins with `records`, those of the checkpoint a run goes on
    from. `on=False` (all ranks but the first) keeps the records without writing."""

    def __init__(self, path, records=(), on=True):
        self.path, self.records, self.on = Path(path), list(records), on
        if on:
            with atomic(path) as tmp:
                tmp.write_text("".join(json.dumps(r) + "\n" for r in self.records))

    def write(self, record):
        self.records.append(record)
        if self.on:
            with writing(self.path), open(self.path, "a") as f:
                f.write(json.dumps(record) + "\n")


# ---- tokenizers --------------------------------------------------------------------------------------------

def get_tokenizer(name):
    """A tiktoken.Encoding: "byte" (256 bytes and <|endoftext|> = 256; no download) or "gpt2" (50,257 ids).

    OSError if gpt2's files are neither cached nor to be had, ValueError for another name."""
    import tiktoken  # late: training on existing shards needs no tokenizer
    if name == "byte":  # the pattern only cuts text into short runs; no two bytes ever merge
        return tiktoken.Encoding("byte", pat_str=r"[\s\S]{1,64}", special_tokens={EOT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if name != "gpt2":
        raise ValueError(f"tokenizer {name!r} is none of byte, gpt2")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:  # requests' errors, and the cache folder's
        raise OSError(f"GPT-2's BPE files are not cached and could not be downloaded ({type(e).__name__}): set "
                      "TIKTOKEN_CACHE_DIR to a folder that has them, go online once, or take --tokenizer byte") from e


# ---- text to shards ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class DataSettings:
    """Turn text into token shards."""
    source: str  # pystdlib, a text file, or a folder of text files
    out: str = ""  # folder for the shards; empty: data/NAME
    tokenizer: Literal["byte", "gpt2"] = "byte"  # 257 or 50257 token ids
    val_fraction: float = 0.05  # share held out: of a folder's files (by a hash of their names), or of a file's end
    separator: str = EOT  # text that ends a document inside a file; empty: a file is one document
    shard_tokens: int = 100_000_000  # tokens a shard

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val_fraction {self.val_fraction} must lie between 0 and 1, as 0.05 does")
        if not 0 < self.shard_tokens < 1 << 31:
            raise ValueError(f"--shard_tokens {self.shard_tokens} must lie between 1 and 2147483647")


def text_files(source):
    """(root, sorted text files, name) of pystdlib, a file or a folder (without hidden and binary files)."""
    if source == "pystdlib":
        root, skip = Path(sysconfig.get_paths()["stdlib"]), {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        paths = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
        if not paths:
            raise FileNotFoundError(f"this Python keeps no sources in {root}: run `python data.py PATH` on some text")
        return root, paths, "pystdlib"
    root = Path(source).expanduser()
    if root.is_file():
        return root.parent, [root], root.stem
    if not root.is_dir():
        raise FileNotFoundError(f"{source!r} is neither pystdlib nor a file or folder: check the path, or run "
                                "`python data.py pystdlib`")
    paths = []
    for p in sorted(root.rglob("*")):
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts):
            with open(p, "rb") as f:
                if b"\0" not in f.read(8192):
                    paths.append(p)
    return root, paths, root.resolve().name


def read_pieces(path, chunk):
    """Yield a file's text in pieces of about `chunk` characters that tokenise to what the whole tokenises to.

    A piece ends where a non-space meets a space or newline: no token, of GPT-2's or of bytes, spans that."""
    text = ""
    with open(path, encoding="utf-8", errors="replace", newline="") as f:
        while block := f.read(chunk):
            text += block
            cut = len(text) - 1
            while cut > 0 and not (text[cut] in " \n" and not text[cut - 1].isspace()):
                cut -= 1
            if cut == 0 and len(text) >= 16 * chunk:
                cut = len(text)  # text without spaces: bounded memory comes before exact tokens
            if cut:
                yield text[:cut]
                text = text[cut:]
    if text:
        yield text


class ShardWriter:
    """Appends token arrays to folder/split_000000.bin.tmp, _000001.bin.tmp, ...; `finish` gives them their names."""

    def __init__(self, folder, split, shard_tokens):
        self.name, self.limit = f"{folder}/{split}_%06d.bin", shard_tokens
        self.shards, self.count, self.total, self.last, self.file = 0, 0, 0, None, None

    def append(self, tokens):
        while len(tokens):
            if self.file is None:
                self.file = open(self.name % self.shards + ".tmp", "wb")
                self.file.write(bytes(HEADER_BYTES))
            part, tokens = tokens[:self.limit - self.count], tokens[self.limit - self.count:]
            self.file.write(part.astype("<u2").tobytes())
            self.count, self.last = self.count + len(part), int(part[-1])
            if self.count == self.limit:
                self.close()

    def close(self):
        if self.file is not None:
            header = np.zeros(256, "<i4")
            header[:3] = MAGIC, 1, self.count
            self.file.seek(0)
            self.file.write(header.tobytes())
            self.file.close()
            self.shards, self.total, self.count, self.file = self.shards + 1, self.total + self.count, 0, None

    def finish(self):
        for i in range(self.shards):
            os.replace(self.name % i + ".tmp", self.name % i)


def prepare(settings, quiet=False):
    """Write the shards that `settings` (DataSettings) describe, return their folder (Path). Present ones are reused.

    FileNotFoundError for a missing source; ValueError for one too short to split, or a folder whose shards are not
    ours to replace; OSError when writing fails: what stood there before stays."""
    root, paths, name = text_files(settings.source)
    out, size = Path(settings.out or Path("data") / name), sum(p.stat().st_size for p in paths)
    if size == 0:
        raise ValueError(f"{settings.source!r} holds no text: give a file or folder with text in it")
    newest = max(int(p.stat().st_mtime) for p in paths)
    state, present = {**asdict(settings), "out": "", "files": len(paths), "bytes": size, "newest": newest}, {}
    if (out / "meta.json").is_file():
        with suppress(ValueError):  # a damaged one is replaced
            present = json.loads((out / "meta.json").read_text())
    elif any(out.glob("*.bin")):
        raise ValueError(f"{out} holds shards that this command did not write: name another folder with --out")
    if present.get("settings") == state:
        if not quiet:
            print(f"data: {out} reused, made with these settings")
        return out
    encoding = get_tokenizer(settings.tokenizer)
    eot, in_val, begin_val = np.array([encoding.eot_token]), set(), float("inf")
    if len(paths) == 1:  # one file: its end is held out
        begin_val = (1 - settings.val_fraction) * size
    else:  # many: those whose names hash lowest, so that a new file moves few of the others
        ranked = sorted(paths, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())
        in_val = set(ranked[:max(1, round(settings.val_fraction * len(paths)))])
    chunk, done = int(min(1 << 20, max(16, settings.val_fraction * size / 2))), 0
    try:
        with writing(out), tqdm(total=size, unit="B", unit_scale=True, desc=f"{'data':<18}", disable=quiet) as bar:
            out.mkdir(parents=True, exist_ok=True)
            writers = {split: ShardWriter(out, split, settings.shard_tokens) for split in ("train", "val")}
            for path in paths:
                for text in read_pieces(path, chunk):
                    writer = writers["val" if path in in_val or done >= begin_val else "train"]
                    for i, part in enumerate(text.split(settings.separator) if settings.separator else [text]):
                        if i:
                            writer.append(eot)
                        writer.append(np.array(encoding.encode_ordinary(part), dtype=np.int64))
                    done += len(text.encode("utf-8", "replace"))
                    bar.update(min(done, size) - bar.n)
                if writer.last != eot[0]:  # the file may end with the separator itself
                    writer.append(eot)
            for writer in writers.values():
                writer.close()
            counts = {f"{split}_tokens": writer.total for split, writer in writers.items()}
            if all(counts.values()):  # all is written: the new shards take the place of the old
                for old in [out / "meta.json", *out.glob("train_*.bin"), *out.glob("val_*.bin")]:
                    old.unlink(missing_ok=True)
                for writer in writers.values():
                    writer.finish()
    finally:  # a full disk is not to stay full
        for rest in out.glob("*.bin.tmp"):
            rest.unlink()
    if not all(counts.values()):
        raise ValueError(f"{settings.source!r} is too short to hold out a share of {settings.val_fraction}: add text, or "
                         "raise --val_fraction")
    with atomic(out / "meta.json") as tmp:
        tmp.write_text(json.dumps({"tokenizer": settings.tokenizer, "vocab_size": encoding.n_vocab, **counts,
                                   "settings": state}, indent=1) + "\n")
    if not quiet:
        print(f"data: {out}, {counts['train_tokens']:,} training and {counts['val_tokens']:,} validation tokens "
              f"({settings.tokenizer})")
    return out


# ---- shards to batches -------------------------------------------------------------------------------------

def open_shard(path):
    """A shard as a memory-mapped uint16 array (tokens,). ValueError if it is truncated, empty, or has a wrong magic
    number. Only files named train.bin or val.bin may come without a header (nanoGPT's)."""
    path, size, again = Path(path), os.path.getsize(path), "make it again with `python data.py`"
    head = np.fromfile(path, "<i4", 256) if size >= HEADER_BYTES else np.zeros(0, "<i4")
    headerless = path.name in ("train.bin", "val.bin") and not (len(head) and not head[3:].any())
    if head[:2].tolist() == [MAGIC, 1]:
        offset, count = HEADER_BYTES, int(head[2])
        if size != offset + 2 * count:
            raise ValueError(f"{path} is truncated or damaged: its header promises {count:,} tokens, there is room "
                             f"for {(size - offset) / 2:,.0f}; {again}")
    elif headerless and size % 2 == 0:
        offset = 0
    elif headerless:
        raise ValueError(f"{path} is truncated: {size:,} bytes are no whole number of uint16 tokens; {again}")
    else:
        raise ValueError(f"{path} is no token shard: it starts with {head[:2].tolist()}, not with [{MAGIC}, 1] "
                         f"(llm.c's GPT-2 format); {again}")
    if size == offset:
        raise ValueError(f"{path} holds no tokens; {again}")
    return np.memmap(path, "<u2", "r", offset)


def read_meta(folder):
    """A data set's meta.json. Without one (FineWeb, nanoGPT) the tokens are GPT-2's. ValueError if it is damaged."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        return {"tokenizer": "gpt2", "vocab_size": 50257}
    try:
        meta = json.loads(path.read_text())
        return {**meta, "tokenizer": str(meta["tokenizer"]), "vocab_size": int(meta["vocab_size"])}
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e!r}): it needs tokenizer and vocab_size; make the data again with "
                         "`python data.py`") from e


class Windows:
    """A data set's split as non-overlapping windows of T+1 tokens, dealt out in batches.

    `batch(step, rows, rank, world)` is a pure function: step t takes the next rows * world windows of an endless
    stream that runs through a fresh permutation of all windows each epoch. So over all ranks every window comes
    once an epoch, resuming needs no state, and 8 rows on 1 rank are the windows of 4 rows on 2 ranks.
    FileNotFoundError without shards, ValueError if they are too short for a window, if ids exceed the vocabulary, or
    if that is not the `vocab_size` of a model that is to read them."""

    def __init__(self, folder, split, block_size, seed=0, vocab_size=None):
        self.folder, self.block_size, self.seed = Path(folder), block_size, seed
        self.paths = sorted(self.folder.glob(f"*{split}*.bin"))
        if self.folder.is_file():
            raise ValueError(f"{folder} is a file, not a folder of shards: run `python data.py {folder}`, then name "
                             "the folder it makes")
        if not self.paths:
            raise FileNotFoundError(f"no {split} shards (*{split}*.bin) in {folder}: make them with `python data.py "
                                    f"pystdlib` or `python data.py PATH --out {folder}`")
        self.shards, self.meta = [open_shard(p) for p in self.paths], read_meta(folder)
        self.ends = np.cumsum([len(s) // (block_size + 1) for s in self.shards])  # windows up to each shard's end
        self.order, self.epoch = None, -1
        if vocab_size not in (None, self.meta["vocab_size"]):
            raise ValueError(f"{folder} has a vocabulary of {self.meta['vocab_size']} ({self.meta['tokenizer']}), the model one "
                             f"of {vocab_size}: give --data of the model's own tokenizer")
        if not len(self):
            raise ValueError(f"{folder} has {sum(map(len, self.shards)):,} {split} tokens, too few for one window of "
                             f"{block_size} + 1: add text, or lower --block_size")

    def __len__(self):
        return int(self.ends[-1])

    def fingerprint(self):
        """16 hex digits that change with the shards' names, sizes and first megabytes: which data."""
        digest = hashlib.sha256()
        for path, shard in zip(self.paths, self.shards):
            digest.update(f"{path.name} {len(shard)} ".encode() + shard[:1 << 19].tobytes())
        return digest.hexdigest()[:16]

    def window(self, number):
        """Window `number` (0-based, file order): int64 (T+1,)."""
        shard = int(np.searchsorted(self.ends, number, side="right"))
        start = (number - (self.ends[shard - 1] if shard else 0)) * (self.block_size + 1)
        tokens = self.shards[shard][start:start + self.block_size + 1]
        if tokens.max() >= self.meta["vocab_size"]:
            raise ValueError(f"{self.paths[shard]} holds token {tokens.max()}, beyond its vocabulary of "
                             f"{self.meta['vocab_size']} ({self.meta['tokenizer']}): correct meta.json, or make the "
                             "data again with `python data.py`")
        return torch.from_numpy(tokens.astype(np.int64))

    def numbers(self, step, rows, rank=0, world=1):
        """The window numbers of a batch: `rows` ints."""
        first, chosen = (step * world + rank) * rows, []
        for position in range(first, first + rows):
            epoch, at = divmod(position, len(self))
            if epoch != self.epoch:
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
                self.order, self.epoch = order, epoch
            chosen.append(int(self.order[at]))
        return chosen

    def batch(self, step, rows, rank=0, world=1):
        """idx and targets (rows,T) int64: the targets are the tokens one further on."""
        window = torch.stack([self.window(n) for n in self.numbers(step, rows, rank, world)])
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def spread(self, tokens):
        """The numbers of windows that hold about `tokens` tokens, spread evenly over the split."""
        count = min(len(self), max(1, tokens // self.block_size))
        return [n * len(self) // count for n in range(count)]

    def fixed(self, tokens, rank=0, world=1, rows=16):
        """This rank's share of a fixed set of about `tokens` tokens spread over the split: (windows of all ranks
        together, list of batches (up to `rows`, T+1))."""
        everyone = self.spread(tokens)
        chosen = everyone[rank::world]
        parts = [chosen[i:i + rows] for i in range(0, len(chosen), rows)]
        return len(everyone), [torch.stack([self.window(n) for n in part]) for part in parts]


# ---- the processes and devices of a run --------------------------------------------------------------------

class World:
    """This process among those torchrun started (without torchrun the only one), and its device.

    "auto" finds CUDA, MPS or CPU. NCCL reduces GPU tensors and gloo CPU ones, so that a small CPU tensor can be
    reduced without stalling the GPU. ValueError for a device that is not there."""

    def __init__(self, device="auto"):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main, gpus = self.rank == 0, torch.cuda.device_count()
        mps = torch.backends.mps.is_available() and self.size == 1  # no process group carries MPS tensors
        if device == "auto":
            device = "cuda" if gpus else "mps" if mps else "cpu"
        kind, local = device.split(":")[0], int(os.environ.get("LOCAL_RANK", 0))
        if kind not in ("cuda", "cpu") and not (kind == "mps" and mps) or kind == "cuda" and local >= gpus:
            raise ValueError(f"--device {device} is not to be had for process {self.rank} of {self.size}: PyTorch finds "
                             f"{gpus} CUDA GPUs{' and MPS' * mps}; take --device cpu, or as many processes as GPUs")
        self.device = torch.device(device)
        if kind == "cuda":
            self.device = torch.device("cuda", local if self.size > 1 else self.device.index or 0)
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves fp32
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")

    def sum(self, tensor):
        """The tensor summed over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self):
        self.sum(torch.zeros(1))

    def autocast(self, dtype):
        """bf16 autocast for "bfloat16", and for "auto" on CUDA; otherwise fp32. Never fp16."""
        on = dtype == "bfloat16" or (dtype == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def print(self, text):
        if self.main:
            tqdm.write(text)

    def bar(self, total, name, initial=0):
        """A progress bar of steps on rank 0; lines in a file where there is no terminal, a few a minute."""
        return tqdm(total=total, desc=f"{name:<18}", initial=initial, unit="step", disable=not self.main,
                    dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 10)


class Interrupt:
    """Turns SIGTERM and Ctrl-C into a flag that all ranks read together: the step under way is finished and saved."""

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
        """Whether any rank was told to stop; to be called by all."""
        anyone = int(self.world.sum(torch.tensor(self.number)))  # a CPU tensor: the GPU is not stalled
        if anyone and not self.number:
            self.number = signal.SIGTERM
        return anyone > 0  # not this rank's own flag: it may have come since

    def leave(self, path, step):
        """Exit once all ranks are here, `path` being saved."""
        self.world.barrier()
        self.world.print(f"stopped after step {step}, saved as {path}: the same command with --resume goes on "
                         "(train.py --mode all goes on by itself)")
        sys.exit(128 + self.number)


if __name__ == "__main__":
    run(lambda: prepare(parse(DataSettings, positional=["source"])))
