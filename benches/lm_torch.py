#!/usr/bin/env python3
"""Trains a Qwen3 with plain PyTorch, as fast as we know how on a CPU: the peer of `scripts/bench lm-speed`.

Samples are packed end to end; norms, products and the loss never see padding. Only attention unpacks them into a padded
batch, where PyTorch's fused causal attention is faster than any mask over the packed row. AdamW is the fused one.

    lm_torch.py SETTINGS.json SAMPLES.json WEIGHTS    prints {"tokens_per_s": …, "losses": […]}

The weights that it begins with are written to WEIGHTS first, as little-endian f32 in the order of a Qwen3's tensors, for the
other side to begin with the same.
"""
import json
import sys
import time

import torch
import torch.nn.functional as F

settings = json.load(open(sys.argv[1]))
samples = json.load(open(sys.argv[2]))
torch.set_num_threads(settings["threads"])
torch.manual_seed(1)
H, L, V = settings["hidden"], settings["layers"], settings["vocabulary"]
NH, NK, D, I = settings["heads"], settings["kv_heads"], settings["head_dim"], settings["intermediate"]


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        linear = lambda i, o: torch.nn.Linear(i, o, bias=False)
        self.n1, self.n2 = torch.nn.RMSNorm(H, eps=1e-6), torch.nn.RMSNorm(H, eps=1e-6)
        self.qn, self.kn = torch.nn.RMSNorm(D, eps=1e-6), torch.nn.RMSNorm(D, eps=1e-6)
        self.qkv, self.o = linear(H, (NH + 2 * NK) * D), linear(NH * D, H)
        self.gate_up, self.down = linear(H, 2 * I), linear(I, H)

    def forward(self, x, rope, places, padded):
        t = x.shape[0]
        q, k, v = self.qkv(self.n1(x)).split([NH * D, NK * D, NK * D], dim=-1)
        q, k, v = self.qn(q.view(t, NH, D)), self.kn(k.view(t, NK, D)), v.view(t, NK, D)
        q, k = rotate(q, rope), rotate(k, rope)
        if NK != NH:
            k, v = (a.repeat_interleave(NH // NK, dim=1) for a in (k, v))
        b, longest = padded
        out = []
        for a in (q, k, v):
            wide = a.new_zeros(b * longest, NH, D).index_copy(0, places, a)
            out.append(wide.view(b, longest, NH, D).transpose(1, 2))
        a = F.scaled_dot_product_attention(*out, is_causal=True)
        a = a.transpose(1, 2).reshape(b * longest, NH * D)[places]
        x = x + self.o(a)
        gate, up = self.gate_up(self.n2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x, rope):
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(V, H)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(L))
        self.norm = torch.nn.RMSNorm(H, eps=1e-6)
        for p in self.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, 0, 0.02)

    def forward(self, tokens, positions, places, padded, rows):
        angles = positions[:, None, None] / 10000.0 ** (torch.arange(0, D, 2) / D)
        rope = (angles.cos(), angles.sin())
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, rope, places, padded)
        return F.linear(self.norm(x)[rows], self.embed.weight)


model = Model()
with open(sys.argv[3], "wb") as f:
    in_order = [model.embed.weight]
    for l in model.layers:
        in_order += [l.n1.weight, l.qkv.weight, l.o.weight, l.qn.weight, l.kn.weight, l.n2.weight, l.gate_up.weight, l.down.weight]
    for p in in_order + [model.norm.weight]:
        f.write(p.detach().numpy().astype("<f4").tobytes())
matrices = [p for p in model.parameters() if p.dim() > 1]
vectors = [p for p in model.parameters() if p.dim() == 1]
optimizer = torch.optim.AdamW(
    [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
    lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
losses, spent, seen = [], 0.0, 0
B = settings["batch"]
for step in range(settings["warmup"] + settings["steps"]):
    batch = samples[step * B:(step + 1) * B]
    start = time.perf_counter()
    longest = max(map(len, batch))
    tokens = torch.tensor([t for s in batch for t in s])
    positions = torch.tensor([i for s in batch for i in range(len(s))], dtype=torch.float32)
    places = torch.tensor([b * longest + i for b, s in enumerate(batch) for i in range(len(s))])
    rows, targets, at = [], [], 0
    for s in batch:
        rows.extend(range(at, at + len(s) - 1))
        targets.extend(s[1:])
        at += len(s)
    logits = model(tokens, positions, places, (len(batch), longest), torch.tensor(rows))
    loss = F.cross_entropy(logits, torch.tensor(targets))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
    if step >= settings["warmup"]:
        spent += time.perf_counter() - start
        seen += len(tokens)
print(json.dumps({"tokens_per_s": seen / spent, "losses": losses}))
