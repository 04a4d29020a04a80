"""CoCoMix in one file: a GPT that predicts concepts half-way up and lets its upper half attend to them.

Method: Tack et al., "LLM Pretraining with Continuous Concepts", arXiv 2502.08524. This file is the model and
nothing else: concept labels come from sae.py, the training loop is train.py. It reads in the order in which a
token travels.

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

Dimensions: B batch, T tokens, D width, C concepts, K active concepts, V vocabulary.
"""
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class CoCoMixConfig:
    """Sizes of the model. Defaults: GPT-2 124M with the paper's concepts."""
    block_size: int = 1024  # T: longest context, in tokens
    vocab_size: int = 50257  # V
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # D
    mix: Literal["none", "pause", "concept"] = "concept"  # after each token: nothing, a learned vector, its concept
    insert_layer: int = 5  # that vector enters before this block (0-based); unused by mix none
    n_concepts: int = 32768  # C: latents of the SAE that labels the tokens
    k_concepts: int = 32  # K: concepts kept in TopK(z)
    concept_weight: float = 0.1  # weight of the concept loss in equation (5)
    concept_residual: bool = False  # our variant, not the paper's: h + c stands at the concept position, not c

    def __post_init__(self):
        if self.mix not in ("none", "pause", "concept"):
            raise ValueError(f"mix={self.mix!r} is none of none, pause, concept")
        if min(self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd) < 1:
            raise ValueError(f"a size below 1 in {self}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads: "
                             f"take n_embd={max(1, round(self.n_embd / self.n_head)) * self.n_head}")
        if self.mix != "none" and not 0 <= self.insert_layer < self.n_layer:
            raise ValueError(f"insert_layer={self.insert_layer} names no block of {self.n_layer}: "
                             f"take 0 to {self.n_layer - 1}")
        if self.mix == "concept" and not 1 <= self.k_concepts <= self.n_concepts:
            raise ValueError(f"k_concepts={self.k_concepts} must lie between 1 and n_concepts={self.n_concepts}")


class Output(NamedTuple):
    """What a forward pass gives. A part that was not asked for, or that this mix does not have, is None."""
    loss: Optional[torch.Tensor]  # () equation (5), or the token loss alone when there are no labels
    ntp_loss: Optional[torch.Tensor]  # () mean next-token cross-entropy in nats, over targets that are not -1
    concept_loss: Optional[torch.Tensor]  # () L_concept in nats; 0 if no label is valid
    logits: torch.Tensor  # (B,T,V) of the token after each position
    concept_logits: Optional[torch.Tensor]  # (B,T,C) z, fp32


# ---- the transformer: GPT-2's block ------------------------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, only_concepts=False):
        B, S, D = x.shape  # S positions: T below the insertion, 2T above
        q, k, v = self.c_attn(x).view(B, S, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, S, D/heads)
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

    def forward(self, x, only_concepts=False):
        """(B,S,D) -> (B,S,D), or with `only_concepts` (B,S/2,D): after the last block nothing reads the rest."""
        y = self.attn(self.ln_1(x), only_concepts)
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


def concept_loss(z, labels):
    """L_concept of equation (5): z (B,T,C), labels (B,T,n) int64, -1 = none -> () in nats, 0 if none is valid.

    One log-sum-exp serves all n labels of a token. The mean is over valid labels."""
    valid = labels >= 0
    chosen = z.gather(-1, labels.clamp(min=0)).float()
    nll = torch.logsumexp(z.float(), -1, keepdim=True) - chosen  # (B,T,n)
    return nll.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)


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
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head (tied)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        if config.mix == "concept":
            self.pre_bias = nn.Parameter(torch.zeros(config.n_embd))  # b_pre
            self.concept_predictor = nn.Linear(config.n_embd, config.n_concepts)  # W_p, b_p
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

    def embed(self, idx):
        """(B,T) int64 -> (B,T,D), token plus position. ValueError if T is larger than block_size."""
        if idx.size(1) > self.config.block_size:
            raise ValueError(f"{idx.size(1)} tokens do not fit block_size={self.config.block_size}: shorten the input")
        return self.wte(idx) + self.wpe.weight[:idx.size(1)]

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
        return F.linear(self.ln_f(x), self.wte.weight)

    def forward(self, idx, targets=None, concept_labels=None, steer=None):
        """idx, targets (B,T), concept_labels (B,T,n), all int64 -> Output. Targets and labels of -1 do not count.

        `steer`, broadcastable to (B,T,C), is added to the concept logits before the top-k. ValueError if T is
        larger than block_size, or if labels or steering come to a model without concepts."""
        config = self.config
        if config.mix != "concept" and (concept_labels is not None or steer is not None):
            raise ValueError(f"a model of mix={config.mix!r} has no concepts to label or steer: take one of mix='concept'")
        h, z = self.embed(idx), None
        for i, block in enumerate(self.h):
            if config.mix != "none" and i == config.insert_layer:
                if config.mix == "concept":
                    z, mu, std = self.predict_concepts(h)
                    c = self.mix_concepts(z if steer is None else z + steer, mu, std)
                else:
                    c = self.pause.expand_as(h)
                if config.concept_residual:
                    c = h + c
                h = interleave(h, c.to(h.dtype))  # (B,2T,D): no new positions, the usual causal mask over 2T
            h = block(h, only_concepts=config.mix != "none" and i == config.n_layer - 1)
        logits = self.head(h)

        loss = ntp_loss = l_concept = None
        if targets is not None:
            nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1, reduction="sum")
            loss = ntp_loss = nll / (targets >= 0).sum().clamp(min=1)
        if concept_labels is not None:
            l_concept = concept_loss(z, concept_labels)
            loss = config.concept_weight * l_concept + (0 if ntp_loss is None else ntp_loss)
        return Output(loss, ntp_loss, l_concept, logits, z)

    # ---- around the architecture: sampling, steering, optimiser, bookkeeping -------------------------------

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, steer=None, generator=None):
        """Continue idx (B,T) by max_new_tokens sampled tokens -> (B, T + max_new_tokens) int64.

        temperature 0 is greedy; top_k keeps the likeliest tokens; past block_size the window slides. `steer`
        {concept: strength} changes the concepts of each position that generates (see `steering`). Each step
        runs the whole window. ValueError on an empty prompt, a negative temperature or a top_k below 1."""
        if idx.size(1) == 0:
            raise ValueError("the prompt is empty: give at least one token (<|endoftext|> starts a document)")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature={temperature} must be 0 or more, top_k={top_k} 1 or more")
        prompt = idx.size(1)
        for _ in range(max_new_tokens):
            window = idx[:, -self.config.block_size:]
            start = max(0, prompt - 1 - (idx.size(1) - window.size(1)))  # the first position that generates
            delta = None if steer is None else self.steering(steer, window.size(1), start)
            logits = self(window, steer=delta).logits[:, -1].float()
            if temperature == 0:
                chosen = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -math.inf)
                chosen = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
            idx = torch.cat([idx, chosen], 1)
        return idx

    def steering(self, steer, length, start):
        """{concept: strength} -> (length, C) to add to z: from position `start` on strength * |concept_max|, else 0.

        The absolute value, since the largest logit of a rare concept can be negative: plus must mean more.

        ValueError for a model without concepts, a concept it lacks, or a strength that is no finite number."""
        if self.config.mix != "concept":
            raise ValueError(f"a model of mix={self.config.mix!r} has no concepts to steer: take one of mix='concept'")
        delta = torch.zeros(length, self.config.n_concepts, device=self.concept_max.device)
        for concept, strength in steer.items():
            if not 0 <= concept < self.config.n_concepts:
                raise ValueError(f"there is no concept {concept}: this model has 0 to {self.config.n_concepts - 1}")
            if not math.isfinite(strength):
                raise ValueError(f"the strength {strength!r} of concept {concept} is no finite number")
            delta[start:, concept] = strength * self.concept_max[concept].abs()
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
        Above the insertion a token has two positions that attend to 2T. Making labels is not counted."""
        c = self.config
        D, T, inserted = c.n_embd, c.block_size, c.mix != "none"
        below, above = (c.insert_layer, c.n_layer - c.insert_layer) if inserted else (c.n_layer, 0)
        forward = below * (24 * D * D + 4 * T * D) + above * 2 * (24 * D * D + 4 * 2 * T * D) + 2 * D * c.vocab_size
        if inserted:
            forward -= 18 * D * D  # the last block's c_proj (2 D^2) and MLP (16 D^2) at the token positions
        if c.mix == "concept":
            forward += 2 * D * c.n_concepts + 2 * D * c.k_concepts
        return 3 * forward
