"""CoCoMix in one file: a GPT that predicts concepts half-way up and lets its upper half attend to them.

Method: Tack et al., "LLM Pretraining with Continuous Concepts", arXiv 2502.08524. The first half of this file is
the model, in the order in which a token travels; then come sampling, other codes' weights, and the command that
reads and steers concepts. Concept labels come from sae.py, the training loop is train.py.

    tokens -> embed -> blocks below insert_layer -> h (B,T,D)      one position a token
      (1)  n = (h - mean(h)) / (std(h) + 1e-5) - b_pre             standardise: per token, unbiased std
      (2)  z = W_p n + b_p                                         predict: a logit for each of C concepts
      (3)  c = (W_c TopK(z) + b_c + b_pre) * std(h) + mean(h)      mix: the K winners squeezed into one vector
      (4)  h_1, c_1, h_2, c_2, ...                                 interleave: (B,2T,D)
    -> blocks above -> the concept positions (B,T,D) -> head -> logits of the next token
      (5)  L = L_ntp + concept_weight * L_concept
           L_concept = mean of logsumexp(z) - z[y] over the valid concept labels y

Teacher, next-token-prediction (NTP) and pause baselines are the same class: `mix` is none, pause or concept.

    model = CoCoMix(CoCoMixConfig(n_layer=8, n_head=8, n_embd=512, insert_layer=3))    # the paper's 69M student
    loss = model(idx, targets, concept_labels).loss    # int64: (B,T), (B,T), (B,T,4); -1 = ignore

    python cocomix.py CKPT --prompt "import "                           # continue a text
    python cocomix.py CKPT --prompt "import " --inspect                 # the concepts predicted for each token
    python cocomix.py CKPT --prompt "import " --inspect 17              # where concept 17 is predicted
    python cocomix.py CKPT --prompt "import " --steer 17=+8             # the continuation without and with steering
    python cocomix.py CKPT --study                                      # how much steering does, over many prompts

Dimensions: B batch, T tokens, D width, C concepts, K active concepts, V vocabulary.
"""
import codecs
import json
import math
import random
import shutil
import struct
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class CoCoMixConfig:
    """Sizes of the model. Defaults: GPT-2 124M with the paper's concepts."""
    block_size: int = 1024  # T: longest context, in tokens
    vocab_size: int = 50257  # V
    vocab_multiple: int = 1  # embedding rows are padded to a multiple of this (64 suits GPUs); no padding in logits
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # D
    mix: Literal["none", "pause", "concept"] = "concept"  # after each token: nothing, a learned vector, its concept
    insert_layer: int = 5  # that vector enters before this block (0-based); unused by mix none
    insertion: Literal["interleave", "add", "none"] = "interleave"  # the method; ablations: h + c; concepts predicted only
    n_concepts: int = 32768  # C: latents of the SAE that labels the tokens
    k_concepts: int = 32  # K: concepts kept in TopK(z)
    concept_weight: float = 0.1  # weight of the concept loss in equation (5)
    concept_residual: bool = False  # our variant, not the paper's: h + c stands at the concept position, not c

    def __post_init__(self):
        if self.mix not in ("none", "pause", "concept"):
            raise ValueError(f"mix={self.mix!r} is none of none, pause, concept")
        if min(self.block_size, self.vocab_size, self.vocab_multiple, self.n_layer, self.n_head, self.n_embd) < 1:
            raise ValueError(f"a size below 1 in {self}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads: "
                             f"take n_embd={max(1, round(self.n_embd / self.n_head)) * self.n_head}")
        if self.mix != "none" and not 0 <= self.insert_layer < self.n_layer:
            raise ValueError(f"insert_layer={self.insert_layer} names no block of {self.n_layer}: "
                             f"take 0 to {self.n_layer - 1}")
        if self.insertion not in ("interleave", "add", "none"):
            raise ValueError(f"insertion={self.insertion!r} is none of interleave, add, none")
        if self.insertion != "interleave" and (self.mix != "concept" or self.concept_residual):
            raise ValueError(f"insertion={self.insertion!r} is for mix concept without concept_residual: leave it out")
        if self.mix == "concept" and not 1 <= self.k_concepts <= self.n_concepts:
            raise ValueError(f"k_concepts={self.k_concepts} must lie between 1 and n_concepts={self.n_concepts}")


class Output(NamedTuple):
    """What a forward pass gives. A part that was not asked for, or that this mix does not have, is None."""
    loss: Optional[torch.Tensor]  # () equation (5), or the token loss alone when there are no labels
    ntp_loss: Optional[torch.Tensor]  # () mean next-token cross-entropy in nats, over targets that are not -1
    concept_loss: Optional[torch.Tensor]  # () L_concept in nats; 0 if no label is valid
    logits: Optional[torch.Tensor]  # (B,T,V) of the token after each position
    concept_logits: Optional[torch.Tensor]  # (B,T,C) z, fp32


# ---- the transformer: GPT-2's block ------------------------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, only_concepts=False, past=None):
        B, S, D = x.shape  # S positions: T below the insertion, 2T above; only the new ones when there is a `past`
        q, k, v = self.c_attn(x).view(B, S, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)
        if past is not None:  # a list that holds keys and values of the positions before, and is kept up to date
            k, v = (torch.cat([old, new], 2) for old, new in zip(past, (k, v))) if past else (k, v)
            past[:] = k, v
        before, mask = k.size(2) - S, None
        if before and S > 1:  # lower-right causal: the last new position sees all, the one before it one less
            mask = torch.ones(S, before + S, dtype=torch.bool, device=x.device).tril(before)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not before)
        y = y.transpose(1, 2).reshape(B, S, D)
        return self.c_proj(y[:, 1::2] if only_concepts else y)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)

    def forward(self, x, only_concepts=False, past=None):
        """(B,S,D) -> (B,S,D), or with `only_concepts` (B,S/2,D): after the last block nothing reads the rest."""
        y = self.attn(self.ln_1(x), only_concepts, past)
        x = (x[:, 1::2] if only_concepts else x) + y
        return x + self.mlp(self.ln_2(x))


# ---- the method: predict, mix, interleave ------------------------------------------------------------------

def standardise(x, eps=1e-5):
    """Equation (1) before b_pre: (..., D) -> (x - mu) / (std + eps), mu, std; the last two are (..., 1).

    `std` is the unbiased one and comes back without eps. Always fp32. The SAE reads its input the same way."""
    x = x.float()
    mu, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return (x - mu) / (std + eps), mu, std


@torch.no_grad()
def top_k(z, k, group=32):
    """Indices (..., k) of the k largest of z (..., C), largest first. Exact; faster than torch.topk for large C.

    The k largest lie in the k groups whose maxima are largest: a cheap pass of maxima leaves k * group
    candidates. Among equal values any choice is a top-k, here as in torch.topk."""
    if z.size(-1) % group or z.size(-1) // group <= k:
        return z.topk(k).indices
    groups = z.unflatten(-1, (-1, group))  # (..., C/group, group)
    best = groups.amax(-1).topk(k).indices  # (..., k) the groups that can hold a winner
    candidates = groups.gather(-2, best.unsqueeze(-1).expand(*best.shape, group)).flatten(-2)
    at = candidates.topk(k).indices  # (..., k) into the k * group candidates
    return best.gather(-1, at // group) * group + at % group


def sparse_matmul(values, indices, rows):
    """sum_j values[..., j] * rows[indices[..., j]]: (..., K), (..., K), (C,D) -> (..., D), fp32.

    A vector with K of C entries times a (C,D) matrix, without the C - K zeros. Gradients reach `values` and
    `rows`. Serves the student's W_c and the SAE's decoder."""
    flat_values, flat_indices = values.flatten(0, -2).float(), indices.flatten(0, -2)
    out = F.embedding_bag(flat_indices, rows.float(), mode="sum", per_sample_weights=flat_values)
    return out.view(*indices.shape[:-1], rows.size(-1))


def interleave(h, c):
    """Equation (4): two (B,T,D) -> (B,2T,D) as h_1, c_1, h_2, c_2, ... Inverse: x[:, 0::2], x[:, 1::2]."""
    return torch.stack([h, c], dim=2).flatten(1, 2)


class ConceptLoss(torch.autograd.Function):
    """Sum of logsumexp(z) - z[label] over valid labels. Autograd's own backward would fill three tensors like z, this one."""

    @staticmethod
    def forward(ctx, z, labels):
        lse, valid = torch.logsumexp(z, -1, keepdim=True), labels >= 0
        ctx.save_for_backward(z, labels)
        return (lse - z.gather(-1, labels.clamp(min=0))).masked_fill(~valid, 0).sum()

    @staticmethod
    def backward(ctx, grad):
        z, labels = ctx.saved_tensors
        valid = (labels >= 0).to(z.dtype) * grad
        return F.softmax(z, -1).mul_(valid.sum(-1, keepdim=True)).scatter_add_(-1, labels.clamp(min=0), -valid), None


def concept_loss(z, labels):
    """L_concept of equation (5): z (B,T,C), labels (B,T,n) int64, -1 = none -> () in nats, 0 if none is valid.

    One log-sum-exp serves all n labels of a token. The mean is over valid labels."""
    return ConceptLoss.apply(z.float(), labels) / (labels >= 0).sum().clamp(min=1)


class TokenLoss(torch.autograd.Function):
    """Sum of the cross-entropies of the logits x W^T and `targets` (N,), -1 = none: x (N,D), W (rows,D) of which the
    first `vocab_size` rows count -> () in nats. What F.cross_entropy gives, for less memory and time: the logits are
    made a chunk at a time, and turned into their gradient, then into that of x and W, while they are at hand."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, training=True):
        device, size = x.device.type, 512 if x.device.type == "cpu" else 4096  # tokens a chunk
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        w, total = weight.to(dtype), torch.zeros((), device=x.device)
        need_x, need_w = (training and needed for needed in ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x) if need_x else None
        grad_w = torch.zeros_like(weight) if need_w else None
        for start in range(0, len(x), size):
            part, at = x[start:start + size].to(dtype), targets[start:start + size, None]
            z = (part @ w.T).float()
            z[:, vocab_size:] = -math.inf
            p, valid = F.softmax(z, -1), (at >= 0).float()
            lse = z.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()  # the largest p is exp(max z - lse)
            total += ((lse - z.gather(-1, at.clamp(min=0))) * valid).sum()
            if need_x or need_w:  # d loss / d z = softmax(z), less 1 at the target
                g = p.mul_(valid).scatter_add_(-1, at.clamp(min=0), -valid).to(dtype)
            if need_x:
                grad_x[start:start + size] = g @ w
            if need_w and dtype == grad_w.dtype:
                grad_w.addmm_(g.T, part)
            elif need_w:
                grad_w += g.T @ part
        ctx.save_for_backward(grad_x, grad_w)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(None if g is None else g * grad for g in ctx.saved_tensors), None, None, None


class CompressLayer(nn.Module):
    """W_c, b_c of equation (3). Row i of `weight` (C,D) is what concept i adds: nn.Linear's weight transposed."""

    def __init__(self, n_concepts, n_embd):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_concepts, n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))

    def forward(self, values, indices):
        return sparse_matmul(values, indices, self.weight) + self.bias.float()


class CoCoMix(nn.Module):
    """The student. With mix none a plain GPT-2 (teacher, NTP), with mix pause the pause-token baseline."""

    def __init__(self, config):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False  # True: backward runs each block again to save memory
        rows = math.ceil(config.vocab_size / config.vocab_multiple) * config.vocab_multiple
        self.wte = nn.Embedding(rows, config.n_embd)  # also the output head (tied)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        if config.mix == "concept":
            self.pre_bias = nn.Parameter(torch.zeros(config.n_embd))  # b_pre
            self.concept_predictor = nn.Linear(config.n_embd, config.n_concepts)  # W_p, b_p
            if config.insertion != "none":
                self.compress_layer = CompressLayer(config.n_concepts, config.n_embd)  # W_c, b_c
            # Largest logit of each concept on validation text, the unit of steering: train.py fills it in.
            self.register_buffer("concept_max", torch.ones(config.n_concepts))
        elif config.mix == "pause":
            self.pause = nn.Parameter(0.02 * torch.randn(config.n_embd))
        self.apply(self._init)
        for name, p in self.named_parameters():  # GPT-2: every block adds to the residual stream twice
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init(module):
        if isinstance(module, (nn.Linear, nn.Embedding, CompressLayer)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def embed(self, idx, start=0):
        """(B,T) int64 -> (B,T,D), token plus position `start` on. ValueError if that exceeds block_size."""
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit block_size={self.config.block_size}: shorten the input")
        return self.wte(idx) + self.wpe.weight[start:end]

    def predict_concepts(self, h):
        """Equations (1), (2): h (B,T,D) -> z (B,T,C), and mu, std (B,T,1), all fp32.

        fp32 even under autocast: in bf16 the last winner and the first loser tie in half of all rows."""
        with torch.autocast(h.device.type, enabled=False):
            n, mu, std = standardise(h)
            w, b = self.concept_predictor.weight.float(), self.concept_predictor.bias.float()
            return F.linear(n - self.pre_bias.float(), w, b), mu, std

    def mix_concepts(self, z, mu, std):
        """Equation (3): z (B,T,C), mu and std (B,T,1) -> the continuous concept c (B,T,D), fp32.

        The winners keep their raw logits, negative ones too: through them the token loss trains W_p."""
        with torch.autocast(z.device.type, enabled=False):
            indices = top_k(z, self.config.k_concepts)
            return (self.compress_layer(z.gather(-1, indices), indices) + self.pre_bias.float()) * std + mu

    def head(self, x):
        """(B,T,D) after the last block -> logits (B,T,V)."""
        return F.linear(self.ln_f(x), self.wte.weight)[..., :self.config.vocab_size]  # padding is never scored

    def token_loss(self, x, targets):
        """x (B,T,D) after the last block, targets (B,T), -1 = none -> () summed next-token cross-entropy in nats."""
        return TokenLoss.apply(self.ln_f(x).flatten(0, 1), self.wte.weight, targets.flatten(), self.config.vocab_size,
                               torch.is_grad_enabled())  # inside, gradients are always off

    def hidden(self, idx, steer=None, cache=None):
        """idx (B,T) -> h (B,T,D) after the last block, and z (B,T,C) or None: equations (1) to (4)."""
        config = self.config
        doubled = config.mix != "none" and config.insertion == "interleave"  # above the insertion: two positions a token
        h, z = self.embed(idx, cache["tokens"] if cache else 0), None
        for i, block in enumerate(self.h):
            if config.mix != "none" and i == config.insert_layer:
                if config.mix == "pause":
                    c = self.pause.expand_as(h)
                else:
                    z, mu, std = self.predict_concepts(h)
                    if config.insertion != "none":
                        c = self.mix_concepts(z if steer is None else z + steer, mu, std)
                if config.concept_residual:
                    c = h + c
                if config.insertion == "interleave":
                    h = interleave(h, c.to(h.dtype))  # (B,2T,D): no new positions, the usual causal mask over 2T
                elif config.insertion == "add":
                    h = h + c.to(h.dtype)
            run = partial(checkpoint, block, use_reentrant=False) if self.gradient_checkpointing and not cache else block
            h = run(h, doubled and i == config.n_layer - 1, cache["past"][i] if cache else None)
        if cache:
            cache["tokens"] += idx.size(1)
        return h, z

    def forward(self, idx, targets=None, concept_labels=None, steer=None, cache=None, logits=True):
        """idx, targets (B,T), concept_labels (B,T,n), all int64 -> Output. Targets and labels of -1 do not count.

        The loss needs no logits: training leaves them, and concept_logits, out with logits=False. `steer`, broadcastable
        to (B,T,C), is added to the concept logits before the top-k. With a `cache` (`new_cache`) idx continues the
        tokens that it has seen. ValueError if T is larger than block_size, or if labels or steering come to a model
        without concepts."""
        if self.config.mix != "concept" and concept_labels is not None:
            raise ValueError(f"a model of mix={self.config.mix!r} has no concepts to label: take one of mix='concept'")
        if steer is not None:
            self.check_steerable()
        h, z = self.hidden(idx, steer, cache)
        loss = ntp_loss = l_concept = None
        if targets is not None:
            loss = ntp_loss = self.token_loss(h, targets) / (targets >= 0).sum().clamp(min=1)
        if concept_labels is not None:
            l_concept = concept_loss(z, concept_labels)
            loss = self.config.concept_weight * l_concept + (0 if ntp_loss is None else ntp_loss)
        z = z if logits or targets is None else None  # a training step hands out nothing that it need not differentiate
        return Output(loss, ntp_loss, l_concept, self.head(h) if logits else None, z)

    def check_steerable(self):
        """ValueError unless concepts are mixed into this model."""
        if self.config.mix != "concept" or self.config.insertion == "none":
            raise ValueError(f"a model of mix={self.config.mix!r}, insertion={self.config.insertion!r} mixes in no concepts "
                             "to steer: take one of mix='concept' with insertion='interleave' or 'add'")

    # ---- around the architecture: sampling, steering, optimiser, bookkeeping -------------------------------

    def new_cache(self):
        """What `forward` keeps of the tokens it has seen: each block's keys and values (B, heads, positions, D/heads),
        one position a token below the insertion and two above."""
        return {"tokens": 0, "past": [[] for _ in self.h]}

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, steer=None, generator=None, slide=True,
               cached=True):
        """Yield the tokens, (B,1) int64 each, that continue idx (B,T): sampled, or greedy at temperature 0.

        top_k keeps the likeliest tokens. `steer` {concept: strength} changes the concepts of each position that
        generates (see `steering`). The prompt runs in one pass, then one token a step; at block_size tokens the
        window slides, which runs all of it each step since every position moves, or with slide=False the text ends.
        ValueError on an empty prompt, a negative temperature or a top_k below 1."""
        if idx.size(1) == 0:
            raise ValueError("the prompt is empty: give at least one token (<|endoftext|> starts a document)")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature={temperature} must be 0 or more, top_k={top_k} 1 or more")
        prompt, block_size, new = idx.size(1), self.config.block_size, idx
        cache = self.new_cache() if cached else None
        for _ in range(max_new_tokens):
            if idx.size(1) > block_size and not slide:
                return
            if idx.size(1) > block_size or not cached:
                new, cache = idx[:, -block_size:], None
            start = max(0, prompt - 1 - (idx.size(1) - new.size(1)))  # the first of `new` that generates
            delta = None if steer is None else self.steering(steer, new.size(1), start)
            logits = self(new, steer=delta, cache=cache).logits[:, -1].float()
            if temperature < 1e-6:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -math.inf)
                new = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
            idx = torch.cat([idx, new], 1)
            yield new

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, steer=None, **options):
        """idx (B,T) and its continuation: (B, T + up to max_new_tokens) int64. Arguments and errors as in `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, steer, **options)], 1)

    def steering(self, steer, length, start):
        """{concept: strength} -> (length, C) to add to z: from position `start` on strength * |concept_max|, else 0.

        The absolute value, since the largest logit of a rare concept can be negative: plus must mean more.

        ValueError for a model without concepts, a concept it lacks, or a strength that is no finite number."""
        self.check_steerable()
        delta = torch.zeros(length, self.config.n_concepts, device=self.concept_max.device)
        for concept, strength in steer.items():
            if not 0 <= concept < self.config.n_concepts:
                raise ValueError(f"there is no concept {concept}: this model has 0 to {self.config.n_concepts - 1}")
            if not math.isfinite(strength):
                raise ValueError(f"the strength {strength!r} of concept {concept} is no finite number")
            delta[start:, concept] = strength * self.concept_max[concept].abs()
        if not delta.isfinite().all():
            raise ValueError(f"a strength in {steer} is too large for fp32: +8 is much already")
        return delta

    @classmethod
    def from_checkpoint(cls, ckpt):
        """The model in a checkpoint dict of kind "model" (data.load_checkpoint). ValueError if it does not fit."""
        try:
            model = cls(CoCoMixConfig(**ckpt["config"]))
            model.load_state_dict(ckpt["model"])
        except (KeyError, TypeError, RuntimeError) as e:
            raise ValueError(f"the checkpoint is of another configuration than this CoCoMix: {e}; use the code "
                             "that wrote it, or train again with `python train.py`") from e
        return model

    def configure_optimizer(self, lr, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8):
        """Fused AdamW that decays matrices (embeddings too), not biases, norms and lone vectors."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
                  {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

    def num_parameters(self):
        """All parameters, embeddings and compression layer included (the paper's counts leave the latter out)."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Training FLOPs a token of a full block costs: 3 x the forward products, two a multiply-add.

        Attention counts the full square, causal or not, as PaLM (arXiv 2204.02311, appendix B) and nanoGPT do.
        Above an interleaving a token has two positions that attend to 2T. Making labels is not counted."""
        c = self.config
        D, T, doubled = c.n_embd, c.block_size, c.mix != "none" and c.insertion == "interleave"
        below, above = (c.insert_layer, c.n_layer - c.insert_layer) if doubled else (c.n_layer, 0)
        forward = below * (24 * D * D + 4 * T * D) + above * 2 * (24 * D * D + 4 * 2 * T * D)
        forward += 2 * D * len(self.wte.weight)
        if doubled:
            forward -= 18 * D * D  # the last block's c_proj (2 D^2) and MLP (16 D^2) at the token positions
        if c.mix == "concept":
            forward += 2 * D * c.n_concepts + 2 * D * c.k_concepts * (c.insertion != "none")
        return 3 * forward


# ---- weights of other codes: Hugging Face's GPT-2 and the paper's released CoCoMix --------------------------

def read_safetensors(path):
    """The tensors of a .safetensors file by name. ValueError if the file is cut short or none."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
             "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
    tensors = {}
    with open(path, "rb") as f:
        try:
            length, = struct.unpack("<Q", f.read(8))
            for name, entry in json.loads(f.read(length)).items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    f.seek(8 + length + begin)  # the data begins unaligned: each tensor is read into memory of its own
                    flat = torch.frombuffer(bytearray(f.read(end - begin)), dtype=kinds[entry["dtype"]])
                    tensors[name] = flat.reshape(entry["shape"])
        except (struct.error, ValueError, RuntimeError, KeyError, TypeError, MemoryError, OverflowError) as e:
            raise ValueError(f"{path} is damaged or no safetensors file ({type(e).__name__}): download it again") from e
    return tensors


def load_hf(path, config=None):
    """A GPT-2 as Hugging Face stores it (.safetensors or .bin), or a CoCoMix of the paper's released code -> CoCoMix.

    Sizes come from the tensors; 64 wide heads are assumed unless `config` (CoCoMixConfig) says otherwise. A CoCoMix
    needs `config` for what its file does not hold: n_head, insert_layer, k_concepts. ValueError names every tensor
    that is missing, left over or of another shape, and every size in which `config` differs."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file: name a model.safetensors or pytorch_model.bin")
    if path.suffix == ".safetensors":
        found = read_safetensors(path)
    else:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:  # torch raises seven kinds
            raise ValueError(f"{path} is damaged or no weights file ({type(e).__name__}): download it again") from e
    tensors = {}
    for name, tensor in found.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue  # the causal mask; the head, which is wte
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight", "compress_layer.weight")):
            tensor = tensor.T  # Conv1D stores (in, out); our compression layer keeps a row for each concept
        tensors[name] = tensor
    if tensors.keys().isdisjoint(("wte.weight", "wpe.weight")):
        raise ValueError(f"{path} holds no GPT-2: no wte.weight, no wpe.weight among its {len(tensors)} tensors")
    wte, wpe = (tensors.get(k, torch.empty(1, 1)) for k in ("wte.weight", "wpe.weight"))
    sizes = dict(vocab_size=wte.size(0), n_embd=wte.size(1), block_size=wpe.size(0), vocab_multiple=1, mix="none",
                 n_layer=1 + max((int(k.split(".")[1]) for k in tensors if k.startswith("h.")), default=0))
    if "concept_predictor.weight" in tensors:
        sizes.update(mix="concept", n_concepts=len(tensors["concept_predictor.weight"]))
        if config is None:
            raise ValueError(f"{path} is a CoCoMix, which does not say its n_head, insert_layer and k_concepts: give them, "
                             "as in load_hf(path, CoCoMixConfig(n_layer=8, n_head=8, n_embd=512, insert_layer=3))")
    if config is None:
        config = CoCoMixConfig(**sizes, n_head=max(1, sizes["n_embd"] // 64))
    wrong = [f"{k} is {v!r} in the file, {getattr(config, k)!r} in config" for k, v in sizes.items() if getattr(config, k) != v]
    if wrong:
        raise ValueError(f"{path} does not fit: {'; '.join(wrong)}")
    model = CoCoMix(config)
    wanted = {k: v for k, v in model.state_dict().items() if k != "concept_max"}
    problems = [f"{k} is missing" for k in wanted if k not in tensors] + [f"{k} is left over" for k in tensors if k not in wanted]
    problems += [f"{k} is {tuple(tensors[k].shape)}, not {tuple(v.shape)}" for k, v in wanted.items()
                 if k in tensors and tensors[k].shape != v.shape]
    if problems:
        raise ValueError(f"{path} does not fit: {'; '.join(problems[:9])}" + (f" and {len(problems) - 9} more" * (len(problems) > 9)))
    model.load_state_dict({**model.state_dict(), **tensors})
    return model


# ---- python cocomix.py CKPT: what a trained model thinks, and how to change it -----------------------------

@dataclass(frozen=True)
class GenerateSettings:
    """Continue a prompt; read and steer the concepts behind it."""
    ckpt: str  # checkpoint of a model (train.py)
    prompt: str = ""  # text to continue or to inspect
    tokens: int = 200  # tokens to generate
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 50  # sample among that many likeliest tokens; 0: among all
    seed: int = 0  # of the sampling
    slide: bool = True  # at the model's block size slide the window (slower); --no-slide ends there
    inspect: Optional[int] = None  # show the prompt's strongest concepts; with a number, that one concept
    steer: tuple[str, ...] = ()  # CONCEPT=STRENGTH as in 17=+8, in units of the concept's largest logit; repeatable
    concepts: str = ""  # concept dictionary (sae.py describe); empty: beside the SAE the model was trained with
    study: bool = False  # measure steering over many prompts, concepts and strengths
    data: str = ""  # study: shards whose validation split gives the prompts; empty: those of the training
    device: str = "auto"  # cuda, mps or cpu; auto finds it

    def __post_init__(self):
        if self.tokens < 1 or self.top_k < 0 or not 0 <= self.temperature < math.inf:
            raise ValueError(f"--tokens {self.tokens} must be at least 1, --top_k {self.top_k} and --temperature "
                             f"{self.temperature} 0 or more")


def parse_steer(words):
    """("17=+8", "42=-4") -> {17: 8.0, 42: -4.0}. ValueError for anything else."""
    steer = {}
    for word in words:
        concept, _, strength = word.partition("=")
        try:
            concept, strength = int(concept), float(strength)
        except ValueError:
            raise ValueError(f"--steer {word}: write CONCEPT=STRENGTH, two numbers, as in --steer 17=+8") from None
        if concept in steer:
            raise ValueError(f"--steer {word}: concept {concept} has strength {steer[concept]} already; name it once")
        steer[concept] = strength
    return steer


def load_dictionary(path, ckpt):
    """The entries of a concept dictionary, one dict a concept; `path` "" means the one beside the SAE that labelled
    for the model of `ckpt`. ValueError if it is missing, damaged or another SAE's."""
    trained = ckpt["log"][0]["settings"]
    path = Path(path or Path(trained["sae"].removeprefix("openai:")).parent / "concepts.json")
    make = "make it with `python sae.py describe --sae {sae} --teacher {teacher} --data {data}`".format(**trained)
    if not path.is_file():
        raise ValueError(f"no concept dictionary {path}: {make}, or name one with --concepts")
    try:
        dictionary = json.loads(path.read_text())
        sae, entries = dictionary["sae"], dictionary["concepts"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is no concept dictionary ({e!r}): {make}") from e
    if sae != ckpt["identity"]["labels"]["sae"]:
        raise ValueError(f"{path} describes another SAE than the one this model learned from: {make}")
    return entries


def in_words(entry):
    """A concept in a few words: tokens it fires on > tokens that follow."""
    return " > ".join(" ".join(repr(text) for _, text, *_ in entry[k][:3]) or "nothing" for k in ("tokens", "next"))


def show_concept(model, z, words, concept, entry):
    """Print one concept's logits z (T,) at each of the T words; in a terminal, the words shaded by it."""
    low, high = z.min().item(), z.max().item()
    print(f"concept {concept}: {in_words(entry)}; its logit at each token, from {low:.2f} to {high:.2f} here (largest on "
          f"validation text: {model.concept_max[concept]:.2f})")
    for word, logit in zip(words, z.tolist()):
        if sys.stdout.isatty():  # five shades of green between this text's lowest and highest
            shade = round(4 * (logit - low) / (high - low)) if high > low else 0
            print(f"\033[97;48;5;{16 + 6 * shade}m{word}\033[0m", end="")
        else:
            print(f"{logit:8.2f}  {word!r}")
    print()


def show_concepts(model, z, words, entries, ckpt):
    """Print the four strongest concepts of z (T,C) at each word, which concepts the model uses, and how often it is right."""
    for word, logits, ids in zip(words, *(t.tolist() for t in z.topk(min(4, z.size(-1))))):
        print(f"{word!r:<10} " + " | ".join(f"{i} ({x:.1f}) {in_words(entries[i])}" for i, x in zip(ids, logits)))
    print("\nEach: concept (logit) tokens it fires on > tokens that follow.", end=" ")
    if model.config.insertion != "none":
        norms = model.compress_layer.weight.detach().norm(dim=-1)
        most = norms.topk(min(5, len(norms))).indices.tolist()
        print(f"Of the {len(norms)} concepts, those with the largest norm in the compression layer are "
              f"{', '.join(f'{i} ({norms[i]:.2f})' for i in most)}; {(norms < norms.max() / 100).float().mean():.1%} are ignored "
              "(below a hundredth of the largest).", end="")
    print()
    if ckpt["agreement"]:  # measured when it was saved, the teacher being at hand
        n, agreement = ckpt["identity"]["labels"]["n_labels"], ckpt["agreement"]
        print(f"On validation text {agreement['precision']:.1%} of its {n} strongest concepts are among the teacher's {n} "
              f"labels of the token; guessing the {n} most frequent labels scores {agreement['base_rate']:.1%}.")


STRENGTHS = (-8, -4, -2, -1, 0, 1, 2, 4, 8)


@torch.no_grad()
def steering_study(model, prompts, entries, tokens=24, concepts=20, strengths=STRENGTHS, seed=0, progress=lambda: None):
    """Does steering do what it says? -> {strength: (rate, change, standard error of the change, control)}.

    Concepts: of those that fire on at least 1 token in 1000, the `concepts` with the most typical followers, by share
    * log(lift) of their first, no two with the same first. A concept's rate is the share of generated tokens that are
    typical followers of it (those in `next` with a share of 0.1 or more), over prompts (P,T) int64, `tokens` tokens
    each, at temperature 1 with one seed; the change is its difference to strength 0, concept by concept. The control
    shifts the logit of a random other concept by as much and counts the same tokens. ValueError if no concept fires
    that often."""
    often = sorted((e for e in entries if e["rate"] >= 1e-3 and e["next"] and e["next"][0][2] >= 0.1),
                   key=lambda e: -e["next"][0][2] * math.log(e["next"][0][3]))
    chosen = list({e["next"][0][0]: e for e in reversed(often)}.values())[::-1]  # of equal followers the first stays
    chosen = sorted(chosen, key=often.index)[:concepts]
    if not chosen:
        raise ValueError("no concept of this dictionary fires on 1 token in 1000: describe the SAE on more text")
    draw, unit = random.Random(seed), model.concept_max.abs().clamp(min=1e-6).tolist()
    others = [draw.choice([e["id"] for e in often if e is not entry] or [entry["id"]]) for entry in chosen]

    def rates(steered, strength):  # (concepts,)
        found = []
        for entry, concept in zip(chosen, steered):
            progress()
            steer = {concept: strength * unit[entry["id"]] / unit[concept]}
            generator = torch.Generator(prompts.device).manual_seed(seed)
            new = model.generate(prompts, tokens, steer=steer, generator=generator)[:, prompts.size(1):]
            followers = torch.tensor([i for i, _, share, _ in entry["next"] if share >= 0.1], device=new.device)
            found.append(torch.isin(new, followers).float().mean().item())
        return torch.tensor(found)
    own, table = [entry["id"] for entry in chosen], {}
    unsteered = rates(own, 0)
    for strength in strengths:
        steered = rates(own, strength)
        change = steered - unsteered
        error = change.std(correction=0) / max(1, len(chosen) - 1) ** 0.5
        table[strength] = tuple(x.item() for x in (steered.mean(), change.mean(), error, rates(others, strength).mean()))
    return table


def main():
    from data import Windows, World, get_tokenizer, load_checkpoint, parse
    settings = parse(GenerateSettings, positional=["ckpt"])
    world, steer = World(settings.device), parse_steer(settings.steer)
    ckpt = load_checkpoint(settings.ckpt, "model", world.device)
    model, encoding = CoCoMix.from_checkpoint(ckpt).to(world.device).eval(), get_tokenizer(ckpt["tokenizer"])
    T, C, trained = model.config.block_size, model.config.n_concepts, ckpt["log"][0]["settings"]
    if (steer or settings.inspect is not None or settings.study) and model.config.mix != "concept":
        raise ValueError(f"{settings.ckpt} is a model of mix={model.config.mix!r} and has no concepts to inspect or "
                         "steer: train one that has with `python train.py`")
    if steer or settings.study:
        model.check_steerable()
    if bool(steer) + (settings.inspect is not None) + settings.study > 1:
        raise ValueError("--steer, --inspect and --study are three questions: ask one at a time")
    for concept in [*steer, *([] if settings.inspect in (None, -1) else [settings.inspect])]:
        if not 0 <= concept < C:
            raise ValueError(f"there is no concept {concept}: this model has 0 to {C - 1}")

    if settings.study:
        entries = load_dictionary(settings.concepts, ckpt)
        val = Windows(settings.data or trained["data"], "val", T, vocab_size=model.config.vocab_size)
        prompts = torch.stack([val.window(n)[:max(1, T // 4)] for n in val.spread(32 * T)]).to(world.device)
        with world.bar(None, "study") as bar:
            table = steering_study(model, prompts, entries, seed=settings.seed, progress=bar.update)
        print("| strength | rate of typical tokens | change | a random concept's logit shifted |\n|---|---|---|---|")
        for strength, (rate, change, error, control) in table.items():
            print(f"| {strength:+} | {rate:.4f} | {change:+.4f} ± {error:.4f} | {control:.4f} |")
        return

    ids = encoding.encode_ordinary(settings.prompt)  # special tokens in it are plain text
    if not ids:
        raise ValueError("the prompt is empty: give some text with --prompt TEXT")
    if len(ids) > T:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model sees {T} at once: shorten it")
    idx = torch.tensor([ids], device=world.device)
    if settings.inspect is not None:
        entries, words = load_dictionary(settings.concepts, ckpt), [encoding.decode([i]) for i in ids]
        with torch.no_grad():
            z = model(idx).concept_logits[0].cpu()  # (T,C)
        if settings.inspect >= 0:
            return show_concept(model, z[:, settings.inspect], words, settings.inspect, entries[settings.inspect])
        return show_concepts(model, z, words, entries, ckpt)

    def pieces(steer):  # of text; a token may be part of a character
        generator = torch.Generator(world.device).manual_seed(settings.seed)
        text = codecs.getincrementaldecoder("utf-8")("replace")
        for new in model.stream(idx, settings.tokens, settings.temperature, settings.top_k or None, steer, generator,
                                settings.slide):
            yield text.decode(encoding.decode_single_token_bytes(new.item()))
        yield text.decode(b"", final=True)
    if steer:  # two columns, same seed
        width = (shutil.get_terminal_size((100, 24)).columns - 3) // 2
        columns = [["without steering", ""], ["steered " + " ".join(settings.steer), ""]]
        for column, change in zip(columns, (None, steer)):
            for line in (settings.prompt + "".join(pieces(change))).splitlines():
                column += [line[i:i + width] for i in range(0, len(line), width)] or [""]
        for left, right in zip_longest(*columns, fillvalue=""):
            print(f"{left:<{width}} | {right}".rstrip())
        return
    print(settings.prompt, end="", flush=True)
    start, made = time.perf_counter(), -1  # the last piece is no token
    for piece in pieces(None):
        print(piece, end="", flush=True)
        made += 1
    print(flush=True)
    print(f"[{made / (time.perf_counter() - start):,.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    from data import run
    run(main)
