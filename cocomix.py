"""CoCoMix in one file: a GPT that predicts concepts mid-stack, for the blocks above to attend to.

Method: Tack et al., "LLM Pretraining with Continuous Concepts", arXiv 2502.08524. The file follows
a token on its way up; then come weights of other codes, and the command that reads and steers
concepts. Concept labels are made in sae.py, training is train.py.

  tokens -> embed -> blocks below insert_layer -> h (B,T,D)    one position a token
    (1)  n = (h - mean(h)) / (std(h) + 1e-5) - b_pre           standardise: per token, unbiased std
    (2)  z = W_p n + b_p                                       predict: a logit for each concept
    (3)  c = (W_c TopK(z) + b_c + b_pre) * std(h) + mean(h)    mix: the K winners in one vector
    (4)  h_1, c_1, h_2, c_2, ...                               interleave: (B,2T,D)
  -> blocks above -> the concept positions (B,T,D) -> head -> logits of the next token
    (5)  L = L_ntp + concept_weight * L_concept
         L_concept = mean of logsumexp(z) - z[y] over the valid concept labels y

Teacher, next-token-prediction (NTP) and pause baselines are the same class, by `mix`.

  model = CoCoMix(CoCoMixConfig(vocab_size=50257, n_layer=8, n_head=8, n_embd=512, insert_layer=3))
  loss = model(idx, targets, concept_labels).loss  # int64: (B,T), (B,T), (B,T,4); -1 = none

  python cocomix.py CKPT --prompt "import "                 # continue a text
  python cocomix.py CKPT --prompt "import " --inspect       # the concepts predicted at each token
  python cocomix.py CKPT --prompt "import " --steer 17=+4   # without and with steering
  python cocomix.py CKPT --study                            # what steering does, measured

Dimensions: B batch, T tokens, S positions (T, or 2T above the insertion), D width, C concepts,
K active concepts, V vocabulary.
"""
import json
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


def require(condition, message):
    """ValueError(message) unless condition holds: what is wrong, and what mends it."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class CoCoMixConfig:
    """Sizes of the model. Each is a flag of train.py but the first two, which it sets itself."""
    vocab_size: int = 1024  # V: of the data
    mix: Literal["none", "pause", "concept"] = "concept"  # what a token gets beside h
    block_size: int = 128  # T: tokens of context
    n_layer: int = 6  # blocks
    n_head: int = 3  # attention heads
    n_embd: int = 96  # D: width
    init_std: float = 0.05  # of matrices at the start; GPT-2's 0.02 is for wider models
    insert_layer: int = 2  # concept or pause vectors enter before this block, 0-based
    insertion: Literal["interleave", "add", "none"] = "interleave"  # add: h + c; none: predict only
    n_concepts: int = 512  # C: latents of the SAE that labels the tokens; --sae overrides it
    k_concepts: int = 16  # K: concepts kept in TopK(z); in mode all also the SAE's
    concept_weight: float = 0.5  # of the concept loss in equation (5); 0.1 in the paper
    concept_residual: bool = False  # our variant, not the paper's: h + c takes the place of c

    def __post_init__(self):
        require(self.mix in ("none", "pause", "concept")
                and self.insertion in ("interleave", "add", "none"),
                f"mix={self.mix!r} is to be none, pause or concept, insertion={self.insertion!r} "
                "interleave, add or none")
        require(0 < self.n_head <= self.n_embd and self.n_embd % self.n_head == 0,
                f"n_embd={self.n_embd} is no multiple of n_head={self.n_head}: change one")
        require(self.mix == "none" or 0 <= self.insert_layer < self.n_layer,
                f"insert_layer={self.insert_layer}: blocks are 0 to {self.n_layer - 1}")
        require(self.mix == "none" or self.insertion == "interleave" or
                (self.mix == "concept" and not self.concept_residual),
                f"insertion={self.insertion} is for mix='concept' without concept_residual")
        require(self.mix != "concept" or 1 <= self.k_concepts <= self.n_concepts,
                f"k_concepts={self.k_concepts} is not in 1 to n_concepts={self.n_concepts}")


class Output(NamedTuple):
    """What a forward pass gives; None for what was not asked for, or is not in this mix."""
    loss: torch.Tensor | None  # () equation (5), or the token loss when there are no labels
    ntp_loss: torch.Tensor | None  # () mean next-token cross-entropy in nats
    concept_loss: torch.Tensor | None  # () L_concept in nats; 0 if no label is valid
    logits: torch.Tensor  # (B,T,V) of the token after each position
    concept_logits: torch.Tensor | None  # (B,T,C) z, fp32


# ---- the transformer: GPT-2's block --------------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, past=None):
        """(B,S,D) -> (B,S,D). The list `past` keeps the keys and values of earlier positions."""
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        mask = None
        if past:  # lower-right causal: the last row sees all, the row above one less
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            mask = x.new_ones(x.size(1), k.size(2), dtype=torch.bool).tril(past[0].size(2))
        if past is not None:
            past[:] = k, v
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(config.n_embd, 4 * config.n_embd), gelu=nn.GELU(approximate="tanh"),
            c_proj=nn.Linear(4 * config.n_embd, config.n_embd)))

    def forward(self, x, past=None):
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


# ---- the method: predict, mix, interleave --------------------------------------------------------

def standardise(x):
    """Equation (1) before b_pre: x (..., D) -> (x - mu) / (std + 1e-5), mu and std (..., 1), fp32.

    `std` is unbiased and comes back without the 1e-5. The SAE reads its input the same way."""
    x = x.float()
    mu, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return (x - mu) / (std + 1e-5), mu, std


def sparse_rows(values, indices, rows):
    """sum_j values[..., j] * rows[indices[..., j]]: (..., K), (..., K), (C,D) -> (..., D), a vector
    with K of C entries times a matrix: W_c transposed, or the SAE's decoder."""
    out = F.embedding_bag(indices.flatten(0, -2), rows, mode="sum",
                          per_sample_weights=values.flatten(0, -2))
    return out.unflatten(0, indices.shape[:-1])


def concept_loss(z, labels, n_valid=None):
    """L_concept of equation (5): z (B,T,C), labels (B,T,n) int64, -1 = none -> () in nats: the sum
    over valid labels, divided by `n_valid`: if None, by their number, at least 1."""
    losses = z.logsumexp(-1, keepdim=True) - z.gather(-1, labels.clamp(min=0))
    n_valid = (labels >= 0).sum().clamp(min=1) if n_valid is None else n_valid
    return losses.masked_fill(labels < 0, 0).sum() / n_valid


def interleave(h, c):
    """Equation (4): h, c (B,T,D) -> (B,2T,D): h_1, c_1, h_2, c_2, ..."""
    return torch.stack([h, c], dim=2).flatten(1, 2)


class ConceptLayer(nn.Module):
    """Equations (1) to (3): h (B,T,D) -> continuous concepts c (B,T,D), concept logits z (B,T,C).

    fp32 even under autocast: in bf16 the last winner and the first loser tie in half of all rows.
    Winners keep their raw logits, through which the token loss trains W_p."""

    def __init__(self, config):
        super().__init__()
        self.k, self.mixes = config.k_concepts, config.insertion != "none"
        self.pre_bias = nn.Parameter(torch.zeros(config.n_embd))  # b_pre
        self.predictor = nn.Linear(config.n_embd, config.n_concepts)  # W_p, b_p
        if self.mixes:
            self.compress = nn.Linear(config.n_concepts, config.n_embd)  # W_c, b_c

    def forward(self, h, steer=None):
        """`steer` (C,) moves logits in units of |the largest one of their position|."""
        with torch.autocast(h.device.type, enabled=False):
            n, mu, std = standardise(h)
            z = self.predictor(n - self.pre_bias)
            if not self.mixes:
                return None, z
            scores = z if steer is None else z + steer * z.amax(-1, keepdim=True).abs()
            c = sparse_rows(*scores.topk(self.k), self.compress.weight.T.contiguous())
            return (c + self.compress.bias + self.pre_bias) * std + mu, z


class CoCoMix(nn.Module):
    """The student. With mix none a plain GPT-2 (teacher, NTP), with mix pause its pause tokens."""

    def __init__(self, config, vocabulary=None):
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary or {"vocab_size": config.vocab_size}  # meta.json's
        # positions a token has from the insertion on
        self.positions = 2 if config.mix != "none" and config.insertion == "interleave" else 1
        # the output head, too (tied): padded, since odd sizes are slow in bf16
        self.wte = nn.Embedding(64 * math.ceil(config.vocab_size / 64), config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        if config.mix == "concept":
            self.concept = ConceptLayer(config)
        elif config.mix == "pause":
            self.pause = nn.Parameter(config.init_std * torch.randn(config.n_embd))
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() >= 2:  # GPT-2: a block adds to the residual stream twice, by a c_proj
                added = 2 * config.n_layer if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=config.init_std / math.sqrt(added))

    def embed(self, idx):
        """(B,T) int64 -> (B,T,D), token plus position. ValueError unless 1 <= T <= block_size."""
        require(0 < idx.size(1) <= self.config.block_size,
                f"the prompt is empty or too long: {idx.size(1)} tokens, where the model reads 1 "
                f"to block_size={self.config.block_size}")
        return self.wte(idx) + self.wpe.weight[:idx.size(1)]

    def insert(self, h, c):
        """Equation (4), or an ablation of it: h, c (B,T,D) -> (B,S,D)."""
        c = h + c if self.config.concept_residual else c.expand_as(h)
        return interleave(h, c) if self.config.insertion == "interleave" else h + c

    def forward(self, idx, targets=None, concept_labels=None, n_valid=None, steer=None, past=None):
        """idx, targets (B,T), concept_labels (B,T,n), int64 -> Output. -1 is no target, no label.

        `n_valid` (`concept_loss`): train.py gives the mean number of valid labels over a step's
        passes and ranks, so that each label of the step weighs the same. `past` is a cache, a list
        for each block: tokens of idx that are in it already are skipped, and logits are those of
        the others. ValueError for no tokens, or more than block_size. Labels go with targets."""
        cached = past[-1][0].size(2) // self.positions if past and past[-1] else 0  # tokens
        h, z = self.embed(idx)[:, cached:], None
        for i, block in enumerate(self.h):
            if self.config.mix != "none" and i == self.config.insert_layer:
                c, z = (self.pause, None) if self.config.mix == "pause" else self.concept(h, steer)
                h = h if c is None else self.insert(h, c)
            h = block(h, past[i] if past else None)
        h = h[:, self.positions - 1::self.positions]  # of two positions, the concept's
        logits = F.linear(self.ln_f(h), self.wte.weight)[..., :self.config.vocab_size]
        loss = ntp_loss = l_concept = None
        if targets is not None:
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                                     ignore_index=-1, reduction="sum")
            loss = ntp_loss = losses / (targets >= 0).sum().clamp(min=1)
        if concept_labels is not None:
            l_concept = concept_loss(z, concept_labels, n_valid)
            loss = ntp_loss + self.config.concept_weight * l_concept  # equation (5)
        return Output(loss, ntp_loss, l_concept, logits, z)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, steer=None):
        """idx (B,T) and its continuation: (B, T + max_new_tokens) int64.

        temperature 0 is greedy; top_k keeps the likeliest tokens, 0 all. `steer` {concept:
        strength} moves concepts at every position (`ConceptLayer`). When block_size is passed the
        last block_size // 2 tokens are read anew: a token costs the same on average. ValueError for
        an empty prompt or a concept that is not mixed in."""
        mixed = self.config.n_concepts if self.config.mix == "concept" and self.concept.mixes else 0
        pushes = torch.zeros(mixed, device=idx.device) if steer else None
        for concept, strength in (steer or {}).items():
            require(0 <= concept < mixed,
                    f"no concept {concept} to steer: this model mixes {mixed}")
            pushes[concept] = strength
        begin, past = 0, [[] for _ in self.h]
        for _ in range(max_new_tokens):
            if idx.size(1) - begin > self.config.block_size:
                begin = idx.size(1) - max(1, self.config.block_size // 2)
                past = [[] for _ in self.h]
            logits = self(idx[:, begin:], steer=pushes, past=past).logits[:, -1].float()
            if top_k > 0:
                least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < least, -math.inf)
            p = F.softmax(logits / max(temperature, 1e-9), -1)
            idx = torch.cat([idx, torch.multinomial(p, 1)], 1)
        return idx

    def configure_optimizer(self):
        """Fused AdamW that decays matrices (embeddings too), not biases, norms and lone vectors."""
        return torch.optim.AdamW(
            [{"params": [p for p in self.parameters() if p.dim() >= 2], "weight_decay": 0.1},
             {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0}],
            betas=(0.9, 0.95), fused=True)

    def num_parameters(self):
        """All parameters, compression layer included (the paper's counts leave it out)."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Training FLOPs of a token in a full block, without labels: 3 x the forward products, a
        multiply-add being 2; attention's full square, as PaLM (arXiv 2204.02311, B) and nanoGPT."""
        config, products = self.config, self.wte.weight.numel()
        for i, block in enumerate(self.h):
            n = self.positions if i >= config.insert_layer else 1
            weights = sum(p.numel() for p in block.parameters() if p.dim() == 2)
            products += n * weights + 2 * n * n * config.block_size * config.n_embd
        if config.mix == "concept":
            products += config.n_embd * (config.n_concepts + config.k_concepts * self.concept.mixes)
        return 3 * 2 * products

    @classmethod
    def from_checkpoint(cls, ckpt):
        """The model in a checkpoint dict of kind "model" (data.load_checkpoint)."""
        model = cls(CoCoMixConfig(**ckpt["config"]), ckpt["vocabulary"])
        model.load_state_dict(ckpt["model"])
        return model


# ---- weights of other codes: Hugging Face's GPT-2 and the paper's released CoCoMix ---------------

OUR_NAMES = {"pre_bias": "concept.pre_bias",
             "concept_predictor.weight": "concept.predictor.weight",
             "concept_predictor.bias": "concept.predictor.bias",
             "compress_layer.weight": "concept.compress.weight",
             "compress_layer.bias": "concept.compress.bias"}


def read_tensors(path):
    """The tensors of a .safetensors file (floating-point ones) or a torch file, by name."""
    if Path(path).suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True)
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with open(path, "rb") as f:  # length of the header, header, tensors
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        data = bytearray(f.read())
    return {name: torch.frombuffer(data[slice(*entry["data_offsets"])],  # a copy, so aligned
                                   dtype=kinds[entry["dtype"]]).view(entry["shape"])
            for name, entry in header.items() if entry.get("dtype") in kinds}


def load_hf(path, config=None):
    """A GPT-2 as Hugging Face stores it, or a CoCoMix of the paper's released code -> CoCoMix.

    Sizes of a GPT-2 come from its tensors, with 64 wide heads. A CoCoMix needs its whole `config`:
    its file does not hold n_head, insert_layer and k_concepts. A plain GPT is centred: GPT-2's
    logits lie near -100, where bf16 steps are 0.5, so the mean row moves from wte to wpe, which
    changes a position's logits by a constant. ValueError names what is damaged or does not fit."""
    try:
        # without masks, and the head, which is wte
        found = {k.removeprefix("transformer."): v for k, v in read_tensors(path).items()
                 if not k.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight"))}
        wte, wpe = found["wte.weight"], found["wpe.weight"]
    except Exception as e:  # torch raises many kinds
        raise ValueError(f"{path} is missing, damaged or no GPT-2 ({e!r:.200}): name a "
                         "model.safetensors or pytorch_model.bin, or download it again") from e
    if config is None:
        require("pre_bias" not in found, f"{path} is a CoCoMix, which does not say its n_head, "
                "insert_layer and k_concepts: give load_hf its whole CoCoMixConfig")
        config = CoCoMixConfig(
            mix="none", n_layer=sum(name.endswith("ln_1.weight") for name in found),
            n_head=wte.size(1) // 64 or 1, n_embd=wte.size(1), vocab_size=len(wte),
            block_size=len(wpe))
    model = CoCoMix(config)
    turned = "c_attn.weight", "c_proj.weight", "c_fc.weight"  # Conv1D stores (in, out)
    tensors = {OUR_NAMES.get(name, name): tensor.T if name.endswith(turned) else tensor
               for name, tensor in found.items()}
    centre = wte.mean(0) if config.mix == "none" else 0
    padding = 0, 0, 0, len(model.wte.weight) - config.vocab_size
    tensors |= {"wte.weight": F.pad(wte - centre, padding), "wpe.weight": wpe + centre}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as e:
        raise ValueError(f"{path} does not fit: {' '.join(str(e).split())}") from e
    return model


# ---- python cocomix.py CKPT: what a trained model thinks, and how to change it -------------------

def concept_strength(word):
    """"17=+4" -> (17, 4.0)."""
    concept, strength = word.split("=")
    return int(concept), float(strength)


@dataclass(frozen=True)
class GenerateSettings:
    """Continue a prompt; read and steer the concepts behind it."""
    ckpt: str  # checkpoint of a model (train.py)
    prompt: str = ""  # text to continue or to inspect
    tokens: int = 200  # tokens to generate
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 50  # sample among that many likeliest tokens; 0: among all
    seed: int = 0  # of the sampling
    inspect: bool = False  # show the strongest concepts at each token of the prompt
    steer: tuple[concept_strength, ...] = ()  # 17=+4 ...: concept 17, by 4 x the largest logit
    study: bool = False  # measure steering over many prompts, concepts and strengths


def in_words(entry):
    """A concept in a few words: tokens it fires on > tokens that follow, and its page if any."""
    sides = (" ".join(repr(text) for _, text, *_ in entry[k][:3]) for k in ("tokens", "next"))
    return f"{' > '.join(side or 'nothing' for side in sides)} {entry['page']}".rstrip()


@torch.no_grad()
def inspect(model, encoding, idx, entries, n=4):
    """Yield a line for each token of idx (1,T): its n strongest concepts, with logits, in words."""
    best = model(idx).concept_logits.topk(n)
    for token, values, concepts in zip(*(x[0].tolist() for x in (idx, *best))):
        words = [f"{i} ({x:.1f}) {in_words(entries[i])}" for x, i in zip(values, concepts)]
        yield f"{encoding.decode([token])!r:<14} {' | '.join(words)}"


def steerable(entries, count):
    """Of the concepts that fire on 1 token in 1000 or more and have a follower of share >= 0.1, the
    `count` with the most typical: by share * log(lift) of the first, no two with the same one."""
    often = [e for e in entries if e["rate"] >= 1e-3 and e["next"] and e["next"][0][2] >= 0.1]
    require(often, "no concept that fires on 1 token in 1000 has a follower of share 0.1: describe "
            "the SAE on more text")
    chosen = {}  # of equal followers the first stays
    for entry in sorted(often, key=lambda e: -e["next"][0][2] * math.log(e["next"][0][3])):
        chosen.setdefault(entry["next"][0][0], entry)
    return list(chosen.values())[:count]


def follower_rate(model, prompts, entry, steer):
    """The share of a concept's typical followers in 24 tokens generated after prompts (P,T)."""
    torch.manual_seed(0)
    new = model.generate(prompts, 24, steer=steer)[:, prompts.size(1):]
    followers = [token for token, _, share, _ in entry["next"] if share >= 0.1]
    return torch.isin(new, torch.tensor(followers, device=new.device)).float().mean().item()


def study(model, prompts, entries, strengths=(-4, -2, -1, 0, 1, 2, 4), concepts=20):
    """Does steering do what it says? Yields (strength, rate, control): the mean `follower_rate` of
    the `steerable` concepts with each steered, and with one chosen at random instead."""
    chosen = steerable(entries, concepts)
    other = torch.randperm(len(entries), generator=torch.Generator().manual_seed(0)).tolist()
    for strength in strengths:
        rates = [[follower_rate(model, prompts, entry, {concept: strength})
                  for entry, concept in zip(chosen, steered)]
                 for steered in ([entry["id"] for entry in chosen], other)]
        yield strength, *(sum(row) / len(row) for row in rates)


def main():
    from data import Windows, World, get_tokenizer, load_checkpoint, load_dictionary, parse
    settings, device = parse(GenerateSettings), World().device
    ckpt = load_checkpoint(settings.ckpt, "model")
    model, encoding = CoCoMix.from_checkpoint(ckpt).to(device), get_tokenizer(ckpt["vocabulary"])
    # special tokens in the prompt are plain text
    prompt = torch.tensor([encoding.encode_ordinary(settings.prompt)], device=device)
    if settings.study:
        text = Windows(ckpt["settings"]["data"], "val", model.config.block_size, model=model)
        idx, _ = text.batch(sum(text.spread(32 * text.block_size), []), device)
        print("| strength | typical followers | with a random concept steered |\n|---|---|---|")
        for row in study(model, idx[:, :text.block_size // 4],
                         load_dictionary(settings.ckpt, ckpt)):
            print("| {:+} | {:.4f} | {:.4f} |".format(*row), flush=True)
    elif settings.inspect:
        print("token          concept (logit) tokens it fires on > tokens that follow")
        print(*inspect(model, encoding, prompt, load_dictionary(settings.ckpt, ckpt)), sep="\n")
    else:
        for steer in [{}, dict(settings.steer)] if settings.steer else [{}]:
            torch.manual_seed(settings.seed)
            new = model.generate(
                prompt, settings.tokens, settings.temperature, settings.top_k, steer)
            print(f"---- steered {steer}:\n" * bool(steer) + encoding.decode(new[0].tolist()))


if __name__ == "__main__":
    from data import script
    script(main)
