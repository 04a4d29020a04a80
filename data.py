"""Files, tokens and command lines: what every script of this project shares and no paper is about.

    python data.py pystdlib                                # the Python standard library's sources -> data/pystdlib
    python data.py notes.txt --tokenizer gpt2              # one text file -> data/notes
    python data.py ~/books --out data/books                # a folder of text files; a document is a file

Text is read in pieces and written as it is tokenised, so memory stays at a few MB whatever the size. A data set is a
folder of shards `train_000000.bin`, `val_000000.bin`, ... in llm.c's format (256 int32: 20240520, 1, token count; then
uint16 tokens) and `meta.json` (tokenizer, vocabulary, source). nanoGPT's headerless `train.bin` / `val.bin` are read too.

Here as well: settings as frozen dataclasses with a generated command line (`parse`), the batch loader (`Windows`), atomic
files and checkpoints, and the processes and devices of a run (`World`). Dimensions: B batch, T tokens of a block.
"""
import argparse
import difflib
import hashlib
import inspect
import json
import os
import re
import sys
import sysconfig
import typing
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

MAGIC, HEADER_BYTES = 20240520, 256 * 4
EOT = "<|endoftext|>"


# ---- settings and command lines --------------------------------------------------------------------------------------

def parse(cls, argv=None, positional=(), presets=None, preset=None):
    """An instance of the frozen dataclass `cls` from the command line: one flag a field, of the field's type and default,
    with the comment behind the field as its help; `Literal` gives choices. `presets` {name: {field: value}} adds
    --preset (default `preset`); flags override it. Wrong flags and values end the program with the nearest right one."""
    argv = list(sys.argv[1:] if argv is None else argv)
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M))
    hints = typing.get_type_hints(cls)
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     usage="%(prog)s " + "".join(f"{p.upper()} " for p in positional) + "[--flag value ...]   (--help lists the flags)")
    if presets:
        parser.add_argument("--preset", choices=presets, default=preset, help="named settings; other flags override them")
    for f in fields(cls):
        kind, text = hints[f.name], comments.get(f.name, "").replace("%", "%%") or " "
        if f.name in positional:
            parser.add_argument(f.name, help=text)
            continue
        flag = "--" + f.name.replace("_", "-")
        names = [flag] if flag == "--" + f.name else [flag, "--" + f.name]
        if kind is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        elif typing.get_origin(kind) is typing.Literal:
            parser.add_argument(*names, choices=typing.get_args(kind), default=f.default, help=text)
        else:
            parser.add_argument(*names, type=kind, default=f.default, help=text, metavar=kind.__name__.upper())
    if presets:
        chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        chosen.add_argument("--preset", default=preset)
        parser.set_defaults(**presets.get(chosen.parse_known_args(argv)[0].preset, {}))
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(word.split("=")[0], parser._option_string_actions, 1)
        parser.error(f"unknown argument {word}" + (f": did you mean {near[0]}?" if near else ""))
    values = vars(args)
    values.pop("preset", None)
    try:
        return cls(**values)
    except ValueError as e:
        parser.error(str(e))


def run(main):
    """Run a script's main: an error this project raised on purpose prints as one line, any other with its traceback."""
    try:
        main()
        if dist.is_initialized():  # all ranks leave together: one that closes its connections early kills the others
            dist.barrier()
    except KeyboardInterrupt:
        sys.exit("interrupted; whatever was saved stays")
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


# ---- files: atomic, and refused when they are not what they should be ------------------------------------------------

@contextmanager
def writing(path):
    """Turns what goes wrong while writing `path` (full disk, forbidden folder) into one OSError that says what to do."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as a RuntimeError
        raise OSError(f"could not write {path} ({e}); what stood there before is untouched. "
                      "Free some space, or name a folder that can be written with --out") from e


@contextmanager
def atomic(path):
    """`with atomic(path) as tmp:` write to tmp; at the end it becomes `path` in one step, or `path` stays as it was."""
    path = Path(path)
    tmp = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield tmp
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)


def write_json(path, value):
    with atomic(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1) + "\n")


def save_checkpoint(path, kind, **parts):
    """Write tensors and plain types (they load with weights_only=True) as a checkpoint of `kind` "model" or "sae"."""
    with atomic(path) as tmp, open(tmp, "wb") as f:
        torch.save({"format": "cocomix-1", "kind": kind, **parts}, f)
        f.flush()
        os.fsync(f.fileno())


def load_checkpoint(path, kind, map_location="cpu"):
    """The dict `save_checkpoint` wrote. FileNotFoundError or ValueError if it is missing, damaged, not ours, or of another kind."""
    path = Path(path)
    make = {"model": "python train.py --mode ntp", "sae": "python sae.py --teacher CKPT"}[kind]
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}: make one with `{make} --out {path.parent}`")
    try:
        ckpt = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as e:  # torch raises seven kinds, from EOFError to UnpicklingError
        raise ValueError(f"{path} is damaged or no checkpoint ({type(e).__name__}): take another copy, or make it again with `{make}`") from e
    if not isinstance(ckpt, dict) or ckpt.get("format") != "cocomix-1":
        raise ValueError(f"{path} was not written by this project: it holds no format mark; make one with `{make}`")
    if ckpt["kind"] != kind:
        raise ValueError(f"{path} holds a checkpoint of kind {ckpt['kind']!r}, here one of kind {kind!r} is needed: make it with `{make}`")
    return ckpt


class Log:
    """JSONL: one dict a line, flushed at once. Opening it for `step` drops later lines, which a resumed run writes anew."""

    def __init__(self, path, step=0, on=True):
        self.path, self.on = Path(path), on
        if on:
            lines = self.path.read_text().splitlines() if step and self.path.is_file() else []
            with atomic(self.path) as tmp:
                tmp.write_text("".join(line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= step))

    def write(self, record):
        if self.on:
            with writing(self.path), open(self.path, "a") as f:
                f.write(json.dumps(record) + "\n")


# ---- tokenizers ------------------------------------------------------------------------------------------------------

def get_tokenizer(name):
    """A `tiktoken.Encoding`: "byte" (256 bytes and <|endoftext|> = 256, made here, no download) or "gpt2" (50,257).

    OSError if gpt2's files are neither cached nor to be had, ValueError for another name."""
    import tiktoken  # late: training on existing shards needs no tokenizer
    if name == "byte":  # the pattern only cuts text into short runs; no two bytes ever merge
        return tiktoken.Encoding("byte", pat_str=r"[\s\S]{1,64}", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={EOT: 256})
    if name != "gpt2":
        raise ValueError(f"tokenizer {name!r} is none of byte, gpt2")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:  # requests' errors, and OSError of the cache folder
        raise OSError(f"GPT-2's BPE files are not cached and could not be downloaded ({type(e).__name__}): set TIKTOKEN_CACHE_DIR "
                      "to a folder that holds them, go online once, or take --tokenizer byte") from e


# ---- text to shards --------------------------------------------------------------------------------------------------

def read_pieces(path, chunk):
    """Yield the text of a file in pieces of about `chunk` characters that tokenise to what the whole file tokenises to.

    Pieces end where a non-space meets a space or newline: no token of GPT-2's (or of bytes) spans that."""
    text = ""
    with open(path, encoding="utf-8", errors="replace", newline="") as f:
        while block := f.read(chunk):
            text += block
            cut = len(text) - 1
            while cut > 0 and not (text[cut] in " \n" and not text[cut - 1].isspace()):
                cut -= 1
            if cut == 0 and len(text) >= 16 * chunk:
                cut = len(text)  # text without spaces: memory is bounded before tokens are exact
            if cut:
                yield text[:cut]
                text = text[cut:]
    if text:
        yield text


class ShardWriter:
    """Appends token arrays to `folder/split_000000.bin`, `_000001.bin`, ...; each gets its name when it is complete."""

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
            os.replace(self.file.name, self.name % self.shards)
            self.shards, self.total, self.count, self.file = self.shards + 1, self.total + self.count, 0, None


@dataclass(frozen=True)
class DataSettings:
    """Turn text into token shards."""
    source: str  # pystdlib, a text file, or a folder of text files
    out: str = ""  # folder for the shards; empty: data/NAME
    tokenizer: typing.Literal["byte", "gpt2"] = "byte"  # 257 or 50257 token ids
    val_fraction: float = 0.05  # share held out: of a folder's files (chosen by a hash of their names), of one file's end
    separator: str = EOT  # text that ends a document inside a file; empty: a file is one document
    shard_tokens: int = 100_000_000  # tokens a shard

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction} must lie between 0 and 1, as in 0.05")
        if self.shard_tokens < 1:
            raise ValueError(f"--shard-tokens {self.shard_tokens} must be at least 1")


def text_files(source):
    """(root, sorted text files, name) of `pystdlib`, a file, or a folder; hidden and binary files (a NUL byte) are left out."""
    if source == "pystdlib":
        root, skip = Path(sysconfig.get_paths()["stdlib"]), {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        paths = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
        if not paths:
            raise FileNotFoundError(f"this Python keeps no sources in {root}: give a text file or folder, `python data.py PATH`")
        return root, sorted(paths), "pystdlib"
    path = Path(source).expanduser()
    if path.is_file():
        return path.parent, [path], path.stem
    if not path.is_dir():
        raise FileNotFoundError(f"{source!r} is neither pystdlib nor a file or folder: check the path, or run `python data.py pystdlib`")
    paths = []
    for p in sorted(path.rglob("*")):
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts):
            with open(p, "rb") as f:
                if b"\0" not in f.read(8192):
                    paths.append(p)
    return path, paths, path.resolve().name


def prepare(settings, quiet=False):
    """Write the shards of `settings` (DataSettings) and return their folder (Path); a folder that already holds them is reused.

    ValueError for an empty source, FileNotFoundError for a missing one, OSError when writing fails."""
    root, paths, name = text_files(settings.source)
    out, size = Path(settings.out or Path("data") / name), sum(p.stat().st_size for p in paths)
    if size == 0:
        raise ValueError(f"{settings.source!r} holds no text: give a file or folder with text in it")
    state = {**asdict(settings), "out": "", "files": len(paths), "bytes": size}
    if (out / "meta.json").is_file() and json.loads((out / "meta.json").read_text()).get("settings") == state:
        if not quiet:
            print(f"data: {out} reused (delete it to make it again)")
        return out
    encoding = get_tokenizer(settings.tokenizer)

    if len(paths) == 1:  # one file: its end is held out
        in_val, begin_val = set(), (1 - settings.val_fraction) * size
    else:  # many: those whose name hashes lowest, so that adding files moves few of them
        ranked = sorted(paths, key=lambda p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest())
        in_val, begin_val = set(ranked[:max(1, round(settings.val_fraction * len(paths)))]), float("inf")
    chunk = int(min(1 << 20, max(1024, settings.val_fraction * size / 2)))
    eot, done = np.array([encoding.eot_token]), 0
    with writing(out), tqdm(total=size, unit="B", unit_scale=True, desc=f"{'data':<18}", disable=quiet) as bar:
        out.mkdir(parents=True, exist_ok=True)
        for stale in [out / "meta.json", *out.glob("train_*.bin*"), *out.glob("val_*.bin*")]:
            stale.unlink(missing_ok=True)
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
    write_json(out / "meta.json", {"tokenizer": settings.tokenizer, "vocab_size": encoding.n_vocab, "settings": state,
                                   "train_tokens": writers["train"].total, "val_tokens": writers["val"].total})
    if not quiet:
        print(f"data: {out}, {writers['train'].total:,} training and {writers['val'].total:,} validation tokens ({settings.tokenizer})")
    return out


# ---- shards to batches -----------------------------------------------------------------------------------------------

def open_shard(path):
    """A shard as a memory-mapped uint16 array (tokens,). llm.c's header is checked; only files named train.bin or val.bin
    may come without one (nanoGPT). ValueError for a truncated file, a wrong magic number, or no tokens."""
    path, size = Path(path), os.path.getsize(path)
    head = np.fromfile(path, "<i4", 256) if size >= HEADER_BYTES else np.zeros(0, "<i4")
    offset, again = 0, "make it again with `python data.py`"
    if len(head) and head[0] == MAGIC and head[1] == 1:
        offset, tokens = HEADER_BYTES, int(head[2])
        if size != HEADER_BYTES + 2 * tokens:
            raise ValueError(f"{path} is truncated or damaged: its header promises {tokens:,} tokens, the file has room for "
                             f"{(size - HEADER_BYTES) / 2:,.0f}; {again}")
    elif path.name not in ("train.bin", "val.bin") or (len(head) and not head[3:].any()):
        raise ValueError(f"{path} is no token shard: it starts with {head[:2].tolist()} instead of [{MAGIC}, 1] (llm.c's GPT-2 format); {again}")
    elif size % 2:
        raise ValueError(f"{path} is truncated: {size:,} bytes are no whole number of uint16 tokens; {again}")
    if size <= offset:
        raise ValueError(f"{path} holds no tokens; {again}")
    return np.memmap(path, "<u2", "r", offset)


class Windows:
    """A data set cut into non-overlapping windows of T+1 tokens, dealt out as batches.

    `batch(step, rows, rank, world)` is a pure function: step t takes the next `rows * world` windows of an endless
    stream that runs through a fresh permutation of all windows each epoch, so over all ranks every window comes once an
    epoch, resuming needs no state, and (rows, world) = (8, 1) sees the same windows as (4, 2). `shuffle=False`: file order.

    Raises FileNotFoundError without shards, ValueError for shards too short for one window or ids beyond the vocabulary."""

    def __init__(self, folder, split, block_size, seed=0, shuffle=True):
        self.folder, self.block_size, self.seed, self.shuffle = Path(folder), block_size, seed, shuffle
        self.paths = sorted(self.folder.glob(f"*{split}*.bin"))
        if not self.paths:
            raise FileNotFoundError(f"no {split} shards (*{split}*.bin) in {self.folder}: make them with `python data.py pystdlib` "
                                    f"or `python data.py PATH --out {self.folder}`")
        self.shards = [open_shard(p) for p in self.paths]
        self.meta = read_meta(self.folder)
        self.ends = np.cumsum([len(s) // (block_size + 1) for s in self.shards])
        self.order, self.epoch = None, -1
        if not len(self):
            raise ValueError(f"{self.folder} has {sum(map(len, self.shards)):,} {split} tokens in {len(self.shards)} shards, too few for one "
                             f"window of {block_size} + 1: add text, or lower --block-size")

    def __len__(self):
        return int(self.ends[-1])

    def fingerprint(self):
        """16 hex digits that change with the shards' names, sizes and first megabytes: which data."""
        digest = hashlib.sha256()
        for path, shard in zip(self.paths, self.shards):
            digest.update(f"{path.name} {len(shard)} ".encode() + shard[:1 << 19].tobytes())
        return digest.hexdigest()[:16]

    def window(self, number):
        """Window `number` (0-based, file order) as int64 (T+1,)."""
        shard = int(np.searchsorted(self.ends, number, side="right"))
        start = (number - (self.ends[shard - 1] if shard else 0)) * (self.block_size + 1)
        tokens = self.shards[shard][start:start + self.block_size + 1]
        if tokens.max() >= self.meta["vocab_size"]:
            raise ValueError(f"{self.paths[shard]} holds token {tokens.max()}, beyond its vocabulary of {self.meta['vocab_size']} "
                             f"({self.meta['tokenizer']}): correct meta.json or make the data again with `python data.py`")
        return torch.from_numpy(tokens.astype(np.int64))

    def numbers(self, step, rows, rank=0, world=1):
        """The window numbers of a batch, a list of `rows` ints."""
        first, n = (step * world + rank) * rows, len(self)
        chosen = []
        for position in range(first, first + rows):
            epoch, at = divmod(position, n)
            if self.shuffle and epoch != self.epoch:
                self.order, self.epoch = np.random.default_rng([self.seed, epoch]).permutation(n), epoch
            chosen.append(int(self.order[at]) if self.shuffle else at)
        return chosen

    def batch(self, step, rows, rank=0, world=1):
        """idx and targets, both (rows, T) int64: the targets are the tokens one further on."""
        window = torch.stack([self.window(n) for n in self.numbers(step, rows, rank, world)])
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def read_meta(folder):
    """The data set's meta.json; without one (FineWeb, nanoGPT) the tokens are GPT-2's."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        return {"tokenizer": "gpt2", "vocab_size": 50257}
    try:
        meta = json.loads(path.read_text())
        return {**meta, "tokenizer": str(meta["tokenizer"]), "vocab_size": int(meta["vocab_size"])}
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e}): it needs tokenizer and vocab_size; make the data again with `python data.py`") from e


# ---- the processes and devices of a run ------------------------------------------------------------------------------

class World:
    """This process among those torchrun started (alone without torchrun), and its device: CUDA, MPS or CPU, found by itself.

    NCCL carries GPU tensors and gloo CPU tensors, so a small CPU tensor can be reduced without stalling the GPU."""

    def __init__(self, device="auto"):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        self.device = torch.device(device)
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError("--device cuda: PyTorch finds no CUDA GPU here; take --device cpu, or install the CUDA build of torch")
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.device.index or 0)))
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        self.main = self.rank == 0

    def sum(self, tensor):
        """The tensor summed over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self):
        if self.size > 1:
            self.sum(torch.zeros(1))

    def print(self, *words):
        if self.main:
            tqdm.write(" ".join(map(str, words)))

    def bar(self, total, desc, initial=0, unit="step"):
        return tqdm(total=total, desc=f"{desc:<18}", initial=initial, unit=unit, disable=not self.main, dynamic_ncols=True,
                    mininterval=0.5 if sys.stderr.isatty() else 10)

    def autocast(self, dtype):
        """bf16 autocast for dtype "bfloat16", or for "auto" on CUDA; fp32 otherwise. Never fp16."""
        on = dtype == "bfloat16" or (dtype == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)


if __name__ == "__main__":
    run(lambda: prepare(parse(DataSettings, positional=["source"])))
