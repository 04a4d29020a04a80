"""Files, tokens and command lines: what every script of this project shares and no paper is about.

    python data.py pystdlib                            # the Python standard library's sources -> data/pystdlib
    python data.py notes.txt --tokenizer gpt2          # one text file -> data/notes
    python data.py ~/books --out data/books            # a folder of text files, or of a train.txt and a val.txt
    python data.py openwebtext                         # public text, downloaded: openwebtext, fineweb (as tokens),
    python data.py fineweb --shards 10                 # fineweb100B, shakespeare

Text is read in pieces and written as it is tokenised: memory stays bounded whatever the size. A data set is
a folder of shards train_000000.bin, val_000000.bin, ... in llm.c's format (256 int32: 20240520, 1, number of
tokens; then uint16 tokens) with a meta.json (tokenizer, vocabulary, source). nanoGPT's headerless train.bin and
val.bin are read too.

In this order: settings with a generated command line (`parse`), atomic files and checkpoints, tokenizers,
downloads (`fetch`), text to shards (`prepare`), shards to batches (`Windows`), processes and devices (`World`).
Dimensions: B batch, T tokens of a block.
"""
import argparse
import collections
import ctypes
import difflib
import errno
import hashlib
import http.client
import inspect
import io
import itertools
import json
import lzma
import math
import os
import re
import signal
import sys
import sysconfig
import tarfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

MAGIC, HEADER_BYTES = 20240520, 256 * 4
EOT, VOCABULARIES = "<|endoftext|>", {"byte": 257, "gpt2-4k": 4096, "gpt2": 50257}


# ---- settings and command lines ----------------------------------------------------------------------------

def parse(cls, argv=None, positional=(), presets=None, preset=None):
    """An instance of the frozen dataclass `cls` from the command line.

    One flag a field, of its type and default, its comment as help; `Literal` gives choices, a flag of type
    tuple[X, ...] can be repeated, or takes several words where there is no positional argument, one of type
    Optional[int] can stand alone, which means -1. `presets` {name: {field: value}} adds --preset, whose values other
    flags override; in it {mode: {field: value}} holds with that --mode. A wrong flag or value ends the program with
    what would be right. In flags - and _ are the same."""
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
            many = {"action": "append"} if positional else {"action": "extend", "nargs": "+"}  # many words would swallow a positional
            extra.update(**many, type=get_args(kind)[0], metavar="...")
        elif get_origin(kind) is Union:  # Optional[int]
            extra.update(nargs="?", const=-1, type=get_args(kind)[0], metavar="...")
        else:
            extra.update(type=kind, metavar=kind.__name__.upper())
        default = list(f.default) if isinstance(f.default, tuple) else f.default
        parser.add_argument(*dict.fromkeys(["--" + f.name, "--" + f.name.replace("_", "-")]), default=default, **extra)
    if presets:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", default=preset)
        first.add_argument("--mode")
        named = first.parse_known_args(argv)[0]
        values = presets.get(named.preset, {})
        values = {**values, **values.get(named.mode, {})}
        parser.set_defaults(**{k: v for k, v in values.items() if not isinstance(v, dict)})
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
                      "Free some space, or name a folder that can be written (--out; COCOMIX_CACHE for the cache)") from e


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


def load_checkpoint(path, kind, map_location="cpu", mmap=False):
    """The dict that `save_checkpoint` wrote; with `mmap` tensors are read when they are used. FileNotFoundError if it is
    missing, ValueError if it is damaged, not of this project, or of another kind."""
    path = Path(path)
    make = {"model": "python train.py --mode ntp", "sae": "python sae.py --teacher CKPT"}[kind]
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the checkpoint file in it, {path / 'ckpt.pt'}")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}: make one with `{make} --out {path.parent}`")
    try:
        ckpt = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
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
    """A tiktoken.Encoding: "byte" (256 bytes and <|endoftext|> = 256; no download), "gpt2" (50,257 ids), or "gpt2-4k",
    for small models: GPT-2's first 4,095 tokens, that is its BPE without the later merges, and <|endoftext|> = 4095.

    OSError if gpt2's files are neither cached nor to be had, ValueError for another name."""
    import tiktoken  # late: training on existing shards needs no tokenizer
    if name == "byte":  # the pattern only cuts text into short runs; no two bytes ever merge
        return tiktoken.Encoding("byte", pat_str=r"[\s\S]{1,64}", special_tokens={EOT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if name not in VOCABULARIES:
        raise ValueError(f"tokenizer {name!r} is none of {', '.join(VOCABULARIES)}")
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as e:  # requests' errors, and the cache folder's
        raise OSError(f"GPT-2's BPE files are not cached and could not be downloaded ({type(e).__name__}): set "
                      "TIKTOKEN_CACHE_DIR to a folder that has them, go online once, or take --tokenizer byte") from e
    if name == "gpt2":
        return gpt2
    last = VOCABULARIES[name] - 1
    return tiktoken.Encoding(name, pat_str=gpt2._pat_str, special_tokens={EOT: last}, mergeable_ranks={
        token: rank for token, rank in gpt2._mergeable_ranks.items() if rank < last})


# ---- downloads ---------------------------------------------------------------------------------------------

def cache(name):
    """Where a download that several runs share is kept: $COCOMIX_CACHE/name, by default ~/.cache/cocomix/name."""
    return Path(os.environ.get("COCOMIX_CACHE") or Path.home() / ".cache" / "cocomix") / name


def fetch(url, path, sha256=None, attempts=6, wait=1.0):
    """Download `url` to `path` unless that exists; returns it as a Path.

    The bytes gather in PATH.part, from where a later attempt or call goes on; after a failed connection there are
    `attempts` of them, `wait` seconds and then twice as long apart, counted anew whenever bytes were gained. The
    file gets its name once it is whole and, where `sha256` is given, verified. With COCOMIX_MIRROR=http://host/base
    https://a.org/b comes from http://host/base/a.org/b. FileNotFoundError if the server has no such file, ValueError
    for a wrong hash, OSError if the server cannot be reached or the disk is full."""
    path, mirror = Path(path), os.environ.get("COCOMIX_MIRROR")
    if path.exists():
        return path
    if mirror and "://" not in mirror:
        raise ValueError(f"COCOMIX_MIRROR={mirror} is no address: write it as http://host/base")
    address = f"{mirror.rstrip('/')}/{url.split('://', 1)[1]}" if mirror else url
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.tag")
    by_hand = f"or download {address} by hand and put it at {path}"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    failures, furthest = 0, part.stat().st_size if part.exists() else 0
    while True:
        have, headers, total, pause = part.stat().st_size if part.exists() else 0, {"User-Agent": "cocomix"}, 0, 0
        if have and tag.exists():  # If-Range: a file that has changed since comes whole
            headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text()}
        try:
            with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as reply:
                have = have if reply.status == 206 else 0
                total = have + int(reply.headers.get("Content-Length") or 0)
                with open(part, "ab" if have else "wb") as f, tqdm(total=total or None, initial=have, unit="B", unit_scale=True,
                                                                   desc=f"{path.name:<18}", leave=False) as bar:
                    version = reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""
                    tag.unlink(missing_ok=True) if version[:2] in ("", "W/") else tag.write_text(version)
                    while block := reply.read(1 << 20):
                        f.write(block)
                        have += len(block)
                        bar.update(len(block))
            if have and total in (0, have):
                break
            problem = f"the connection was dropped at {have:,} of {total:,} bytes"
        except urllib.error.HTTPError as e:
            problem, pause = f"the server answered {e}", e.headers.get("Retry-After", "")
            pause = min(300, int(pause)) if pause.isdigit() else 0
            if e.code == 416 and e.headers.get("Content-Range", "").endswith(f"/{have}"):
                break  # an earlier call had all of it
            if e.code == 416:
                part.unlink()
            elif e.code < 500 and e.code not in (408, 425, 429):
                raise FileNotFoundError(f"{address} is not to be had ({e}): check the address and COCOMIX_MIRROR, {by_hand}") from e
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO):
                raise OSError(f"could not write {part} ({e}): free some space; the same command goes on from there") from e
            problem = f"the connection failed ({getattr(e, 'reason', e)!r})"
        failures, furthest = 0 if have > furthest else failures + 1, max(have, furthest)
        if failures >= attempts:
            raise OSError(f"{address}: {problem}, {failures} times without progress. Check the network and run the same "
                          f"command again, {by_hand}")
        time.sleep(max(pause, wait * 2 ** max(0, failures - 1)))
    digest = hashlib.sha256()
    with open(part, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    tag.unlink(missing_ok=True)
    if sha256 not in (None, digest.hexdigest()):
        part.unlink()
        raise ValueError(f"{address} is damaged or another file: its SHA-256 is {digest.hexdigest()}, not {sha256}. It was "
                         f"deleted; run the same command again, {by_hand}")
    os.replace(part, path)
    print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {digest.hexdigest()}" + (" as published" if sha256 else ""))
    return path


# ---- text to shards ----------------------------------------------------------------------------------------

HUB = "https://huggingface.co/datasets"
SOURCES = {  # name: address, number of files, tokenizer, share of the documents or of the text's end that is held out
    "fineweb": (HUB + "/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}_{:06d}.bin", 103, "gpt2", 0),
    "fineweb100B": (HUB + "/kjj0/fineweb100B-gpt2/resolve/main/fineweb_{}_{:06d}.bin", 1030, "gpt2", 0),
    "openwebtext": (HUB + "/Skylion007/openwebtext/resolve/main/subsets/urlsf_subset{:02d}.tar", 21, "gpt2", 0.0005),
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt", 1, "byte", 0.1),
    "pystdlib": ("", 1, "byte", 0.05),
}
SHA256 = {SOURCES["fineweb"][0].format("val", 0): "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640"}


@dataclass(frozen=True)
class DataSettings:
    """Turn text into token shards, or download them."""
    source: str  # a text file, a folder of them, or pystdlib, shakespeare, openwebtext, fineweb, fineweb100B
    out: str = ""  # folder for the shards; empty: data/NAME
    tokenizer: Literal["auto", *VOCABULARIES] = "auto"  # 257, 4096 or 50257 ids; auto: gpt2 for the web texts, else byte
    val_fraction: float = 0.0  # held out: share of a folder's files, of a file's end; 0: 0.05, shakespeare 0.1, openwebtext 0.0005
    separator: str = EOT  # text that ends a document inside a file; empty: a file is one document
    shard_tokens: int = 100_000_000  # tokens a shard
    shards: int = 0  # how many training shards (fineweb) or archives (openwebtext) to take; 0: all, 103 or 21

    def __post_init__(self):
        _, files, tokenizer, share = SOURCES.get(self.source, ("", 1, "byte", 0.05))
        for name, default in (("tokenizer", tokenizer), ("val_fraction", share), ("shards", files)):
            if getattr(self, name) in ("auto", 0):
                object.__setattr__(self, name, default)
        if self.source in ("fineweb", "fineweb100B"):
            if (self.tokenizer, self.val_fraction) != ("gpt2", 0):
                raise ValueError(f"{self.source} is made of GPT-2 tokens and split already: leave out --tokenizer, --val_fraction")
        elif not 0 < self.val_fraction < 1:
            raise ValueError(f"--val_fraction {self.val_fraction} must lie between 0 and 1, as 0.05 does")
        if not 1 <= self.shards <= files:
            raise ValueError(f"--shards {self.shards} must lie between 1 and {files}, all of {self.source}")
        if not 0 < self.shard_tokens < 1 << 31:
            raise ValueError(f"--shard_tokens {self.shard_tokens} must lie between 1 and 2147483647")


def text_files(source):
    """(root, sorted text files) of pystdlib, a file or a folder (without hidden and binary files)."""
    if source == "pystdlib":
        root, skip = Path(sysconfig.get_paths()["stdlib"]), {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        paths = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
        if not paths:
            raise FileNotFoundError(f"this Python keeps no sources in {root}: run `python data.py PATH` on some text")
        return root, paths
    if source == "shakespeare":
        path = fetch(SOURCES[source][0], cache("shakespeare.txt"))
        return path.parent, [path]
    root = Path(source).expanduser()
    if root.is_file():
        return root.parent, [root]
    if not root.is_dir():
        near = difflib.get_close_matches(source, SOURCES, 1)
        raise FileNotFoundError(f"{source!r} is neither a file or folder nor one of {', '.join(SOURCES)}"
                                + (f": did you mean {near[0]}?" if near else ": check the path, or run `python data.py pystdlib`"))
    paths = []
    for p in sorted(root.rglob("*")):
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts):
            with open(p, "rb") as f:
                if b"\0" not in f.read(8192):
                    paths.append(p)
    return root, paths


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


def split_files(root, paths, settings):
    """Yield (split, text, whether a document ends here) of text files, in pieces, in order."""
    size, done, in_val, begin_val = sum(p.stat().st_size for p in paths), 0, set(), math.inf
    if len(paths) == 1:  # one file: its end is held out
        begin_val = (1 - settings.val_fraction) * size
    elif [p.name for p in paths] == ["train.txt", "val.txt"]:  # split already
        in_val = {paths[1]}
    else:  # many: those whose names hash lowest, so that a new file moves few of the others
        ranked = sorted(paths, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())
        in_val = set(ranked[:max(1, round(settings.val_fraction * len(paths)))])
    chunk = int(min(1 << 20, max(16, settings.val_fraction * size / 2)))
    for path in paths:
        split, unfinished = "train", False
        for text in read_pieces(path, chunk):
            split = "val" if path in in_val or done >= begin_val else "train"
            *ended, rest = text.split(settings.separator) if settings.separator else [text]
            for document in ended:
                yield split, document, True
            yield split, rest, False
            unfinished = bool(rest) or unfinished and not ended
            done += len(text.encode())
        if unfinished:  # the file may end with the separator itself
            yield split, "", True


def unpack(packed):
    """The documents of one of OpenWebText's inner archives: .tar.xz bytes -> list of str, cleaned as its loader does.

    A tar is a row of files, each a header of 512 bytes (size in octal at 124, type at 156) and its bytes, padded to a
    multiple of 512. The library's reader would take a third as long again as unpacking does."""
    raw, at, texts = lzma.decompress(packed), 0, []
    while size := raw[at + 124:at + 136].strip(b"\0 "):
        begin, end = at + 512, at + 512 + int(size, 8)
        if raw[at + 156:at + 157] in (b"0", b"\0"):  # a plain file
            texts.append(re.sub("\n\n\n+", "\n\n", raw[begin:end].decode("utf-8", "replace")).strip())
        at = begin + -(-(end - begin) // 512) * 512
    return texts


def split_openwebtext(path, val_fraction):
    """Yield (split, document, True) of one of OpenWebText's tars. A document's hash decides on its split, wherever it lies.

    Inner archives are unpacked a few ahead, by threads (lzma lets go of the interpreter), while others are tokenised."""
    try:
        with tarfile.open(path) as tar, ThreadPoolExecutor() as pool:
            waiting = collections.deque()
            members = (m for m in tar if m.name.endswith(".xz"))
            while (member := next(members, None)) or waiting:
                if member:
                    waiting.append(pool.submit(unpack, tar.extractfile(member).read()))
                if not member or len(waiting) > (os.cpu_count() or 1):
                    for text in waiting.popleft().result():
                        held_out = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < val_fraction * 2 ** 64
                        yield "val" if held_out else "train", text, True
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as e:
        raise ValueError(f"{path} is damaged ({e}): delete it and run the same command again") from e


class ShardWriter:
    """Appends tokens to folder/split_000000.bin.tmp, _000001.bin.tmp, ...; `finish` gives them their names. `shards` and
    `total`, as `keep` returned them, go on from there."""

    def __init__(self, folder, split, shard_tokens, shards=0, total=0):
        self.name, self.limit = f"{folder}/{split}_%06d.bin", shard_tokens
        self.shards, self.total, self.kept, self.count, self.file = shards, total, shards, 0, None

    def append(self, tokens):
        while len(tokens):
            if self.file is None:
                self.file = open(self.name % self.shards + ".tmp", "wb")
                self.file.write(bytes(HEADER_BYTES))
            part, tokens = tokens[:self.limit - self.count], tokens[self.limit - self.count:]
            self.file.write(part.astype("<u2").tobytes())
            self.count += len(part)
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

    def keep(self):
        """End the shard begun, and spare all of them from `drop`: (shards, their tokens)."""
        self.close()
        self.kept = self.shards
        return self.shards, self.total

    def drop(self):
        """Remove what was written since `keep`: a full disk is not to stay full."""
        if self.file is not None:
            self.file.close()
        for i in itertools.count(self.kept):
            if not Path(self.name % i + ".tmp").exists():
                return
            os.remove(self.name % i + ".tmp")

    def finish(self):
        for i in range(self.shards):
            with suppress(FileNotFoundError):  # named already, before an interruption
                os.replace(self.name % i + ".tmp", self.name % i)


def tokenise(pieces, encoding, writers, bar, ahead=1 << 23):
    """Write (split, text, whether a document ends here) to writers[split], at most `ahead` bytes of text at a time, on all
    cores (tiktoken lets go of the interpreter). Returns the number of bytes of text."""
    eot, total, pending, waiting = np.array([encoding.eot_token]), 0, 0, collections.deque()

    def encode(text):
        return encoding.encode_to_numpy(text, disallowed_special=())  # encode_ordinary, without a Python list

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pieces = iter(pieces)
        while (piece := next(pieces, None)) or waiting:
            if piece:
                size = len(piece[1].encode())
                waiting.append((piece, size, pool.submit(encode, piece[1])))
                total, pending = total + size, pending + size
            if not piece or pending > ahead:
                (split, _, ends), size, tokens = waiting.popleft()
                writers[split].append(tokens.result())
                writers[split].append(eot[:ends])
                pending -= size
                bar.update(size)
    return total


def write_shards(jobs, out, settings, state, size, quiet):
    """Tokenise the pieces of text that each of `jobs` () gives, with a file to remove after it (or None), and write their
    shards to folder `out`, so that whole jobs survive an interruption. Returns {train_tokens, val_tokens, text_bytes, seconds}."""
    progress, encoding = out / "progress.json", get_tokenizer(settings.tokenizer)
    done = read_json(progress)
    done = done if done.get("settings") == state else {}
    writers = {split: ShardWriter(out, split, settings.shard_tokens, *done.get(split, ())) for split in ("train", "val")}
    begin, text_bytes, seconds = done.get("jobs", 0), done.get("text_bytes", 0), done.get("seconds", 0.0)
    try:
        for writer in writers.values():
            writer.drop()
        for number in range(begin, len(jobs)):
            (pieces, used), start = jobs[number](), time.perf_counter()  # a job downloads first
            name = "tokenise" + f" {number + 1}/{len(jobs)}" * (len(jobs) > 1)
            with writing(out), tqdm(total=size or None, unit="B", unit_scale=True, desc=f"{name:<18}", disable=quiet) as bar:
                out.mkdir(parents=True, exist_ok=True)
                text_bytes += tokenise(pieces, encoding, writers, bar)
                seconds += time.perf_counter() - start
                with atomic(progress) as tmp:
                    tmp.write_text(json.dumps({**{split: writer.keep() for split, writer in writers.items()}, "jobs": number + 1,
                                               "text_bytes": text_bytes, "seconds": seconds, "settings": state}))
                if used:
                    used.unlink()  # 600 MB each
    finally:
        for writer in writers.values():
            writer.drop()
    counts = {f"{split}_tokens": writer.total for split, writer in writers.items()}
    if not all(counts.values()):
        for path in [progress, *out.glob("*.bin.tmp")]:
            path.unlink()
        raise ValueError(f"{settings.source!r} is too short to hold out a share of {settings.val_fraction}: add text, or "
                         "raise --val_fraction")
    (out / "meta.json").unlink(missing_ok=True)  # all is written: the new shards take the place of the old
    for old in (p for split, writer in writers.items() for p in sorted(out.glob(f"{split}_*.bin"))[writer.shards:]):
        old.unlink()
    for writer in writers.values():
        writer.finish()
    return {**counts, "text_bytes": text_bytes, "seconds": round(seconds, 3)}


def download_tokens(settings, out):
    """FineWeb's shards, as they are, into folder `out`: {train_tokens, val_tokens}."""
    counts, address = {"train_tokens": 0, "val_tokens": 0}, SOURCES[settings.source][0]
    for number, split in enumerate(["val"] + ["train"] * settings.shards):
        url = address.format(split, number)
        path = fetch(url, out / url.rsplit("/", 1)[1], SHA256.get(url))
        try:
            counts[f"{split}_tokens"] += len(open_shard(path))
        except ValueError:
            path.unlink()  # or it would stand in the way of a good one
            raise
    return counts


def read_json(path):
    """The dict in a JSON file; {} if it is missing or damaged."""
    with suppress(ValueError, OSError):
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    return {}


def prepare(settings, quiet=False):
    """Make the shards that `settings` (DataSettings) describe, return their folder (Path). Present ones are reused; an
    interrupted openwebtext or fineweb goes on after its last whole archive or shard.

    FileNotFoundError for a missing source; ValueError for one too short to split, or a folder whose shards are not
    ours to replace; OSError when a download or writing fails: what stood there before stays."""
    source, path = settings.source, Path(settings.source).expanduser().resolve()
    out = Path(settings.out or Path("data") / (source if source in SOURCES else path.stem if path.is_file() else path.name))
    state, size, ours = {**asdict(settings), "out": ""}, 0, re.compile(r"(train|val)_\d{6}\.bin")
    if source in ("fineweb", "fineweb100B"):
        ours = re.compile(r"fineweb_(train|val)_(\d{6})\.bin")
    elif source == "openwebtext":
        def archive(number):
            tar = fetch(SOURCES[source][0].format(number), out / f"urlsf_subset{number:02d}.tar")
            return split_openwebtext(tar, settings.val_fraction), tar
        jobs = [partial(archive, number) for number in range(settings.shards)]
    else:
        root, paths = text_files(source)
        size, jobs = sum(p.stat().st_size for p in paths), [lambda: (split_files(root, paths, settings), None)]
        if size == 0:
            raise ValueError(f"{source!r} holds no text: give a file or folder with text in it")
        state |= {"files": len(paths), "bytes": size, "newest": max(int(p.stat().st_mtime) for p in paths)}
        state["source"] = source if source in SOURCES else str(path)
    present, begun = read_json(out / "meta.json").get("settings"), read_json(out / "progress.json").get("settings")
    if present == state:
        if not quiet:
            print(f"data: {out} reused, made with these settings")
        return out
    strangers = [p.name for p in out.glob("*.bin") if not ours.fullmatch(p.name)]
    known = (present or begun or {}).get("source")
    if strangers or any(out.glob("*.bin")) and known != state["source"]:
        raise ValueError(f"{out} holds shards {f'of {known}' if known else 'that this command did not write'}"
                         f"{f' ({strangers[0]})' if strangers else ''}: name another folder with data.py --out, or delete it")
    if source in ("fineweb", "fineweb100B"):
        if any(int(ours.fullmatch(p.name)[2]) > settings.shards for p in out.glob("*.bin")):
            raise ValueError(f"{out} holds more than --shards {settings.shards}: ask for as many, or name another folder with --out")
        with atomic(out / "progress.json") as tmp:  # says that more is to come
            tmp.write_text(json.dumps({"settings": state}))
        counts, speed = download_tokens(settings, out), ""
    else:
        counts = write_shards(jobs, out, settings, state, size, quiet)
        speed = f", {counts['text_bytes'] / 1e6 / counts['seconds']:.1f} MB/s"
    with atomic(out / "meta.json") as tmp:
        tmp.write_text(json.dumps({"tokenizer": settings.tokenizer, "vocab_size": VOCABULARIES[settings.tokenizer], **counts,
                                   "settings": state}, indent=1) + "\n")
    (out / "progress.json").unlink(missing_ok=True)
    if not quiet:
        print(f"data: {out}, {counts['train_tokens']:,} training and {counts['val_tokens']:,} validation tokens "
              f"({settings.tokenizer}{speed})")
    return out


def make_if_known(folder, quiet=False):
    """Make data/NAME for a NAME in SOURCES unless it is there: whole shards, of whoever made them."""
    folder = Path(folder)
    if folder.parent == Path("data") and folder.name in SOURCES:
        begun = read_json(folder / "progress.json").get("settings")  # go on as it was begun, with as many shards
        if begun or not any(folder.glob("*.bin")):
            begun = {f.name: begun[f.name] for f in fields(DataSettings)} if begun else {"source": folder.name}
            prepare(DataSettings(**begun), quiet)


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
        return {"tokenizer": "gpt2", "vocab_size": VOCABULARIES["gpt2"]}
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
        return self.tokens(shard, start)

    def tokens(self, shard, start):
        """Up to T+1 tokens of a shard from `start` on: int64."""
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
        together, list of batches: (numbers, windows (up to `rows`, T+1)))."""
        everyone = self.spread(tokens)
        chosen = everyone[rank::world]
        parts = [chosen[i:i + rows] for i in range(0, len(chosen), rows)]
        return len(everyone), [(part, torch.stack([self.window(n) for n in part])) for part in parts]

    def whole(self, rank=0, world=1, rows=16):
        """Yield this rank's share of the whole split as (idx, targets) of up to (rows,T) each: disjoint stretches in which
        every token but the first of a shard is a target exactly once."""
        starts = [(shard, start) for shard, tokens in enumerate(self.shards) for start in range(0, len(tokens) - 1, self.block_size)]
        batch = []
        for shard, start in starts[rank::world]:
            tokens = self.tokens(shard, start)
            if batch and (len(batch) == rows or len(tokens) != len(batch[0])):  # a shard's last stretch is shorter
                yield torch.stack(batch)[:, :-1], torch.stack(batch)[:, 1:].contiguous()
                batch = []
            batch.append(tokens)
        if batch:
            yield torch.stack(batch)[:, :-1], torch.stack(batch)[:, 1:].contiguous()


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
        if kind == "cpu":  # glibc returns large freed tensors to the kernel and gets them back page by page: let it keep
            # them (the process's memory stays at its peak)
            with suppress(OSError, AttributeError, TypeError):  # not glibc
                mallopt = ctypes.CDLL(None).mallopt
                mallopt(-4, 0), mallopt(-1, 2 ** 31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
        if self.size > 1:
            if not dist.is_initialized():
                dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
            self.patient = dist.new_group(backend="gloo", timeout=timedelta(days=2))  # others give up after 10 to 30 minutes

    def sum(self, tensor):
        """The tensor summed over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self):
        """Wait for all ranks, up to two days: rank 0 may be downloading."""
        if self.size > 1:
            dist.barrier(self.patient)

    def gather(self, value):
        """[value of rank 0, of rank 1, ...], on every rank; picklable values."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def first(self, work):
        """`work()` on rank 0, then on the others, who find it done."""
        if not self.main:
            self.barrier()
        result = work()
        if self.main:
            self.barrier()
        return result

    def bfloat16(self, dtype):
        """Whether to compute in bf16: "bfloat16", or "auto" on CUDA. Never fp16."""
        return dtype == "bfloat16" or (dtype == "auto" and self.device.type == "cuda")

    def autocast(self, dtype):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16(dtype))

    def compiles(self, choice):
        """Whether to torch.compile: "on", or "auto" on CUDA."""
        return choice == "on" or (choice == "auto" and self.device.type == "cuda")

    def print(self, text):
        if self.main:
            tqdm.write(text)

    def bar(self, total, name, initial=0, unit="step"):
        """A progress bar on rank 0; lines in a file where there is no terminal, a few a minute."""
        return tqdm(total=total, desc=f"{name:<18}", initial=initial, unit=unit, disable=not self.main,
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
