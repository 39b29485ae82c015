"""A Transformer on FlashAttention-2 in PyTorch, the peer of the encoder bench: ms [forward, forward and backward].

Pre-norm blocks, GELU, a feed-forward layer of 4 d, bfloat16, compiled by torch.compile. Sequences stand one after the other, as
FlashAttention-2's variable-length call takes them: padded to N they are B sequences of N, unpadded they have their own lengths.
"""
import torch
import torch.nn.functional as F
from torch import nn

from cuda_timing import milliseconds


def attention(q, k, v, offsets, longest):
    """Causal FlashAttention-2 of packed sequences, [T, H, D]."""
    return torch.ops.aten._flash_attention_forward(q, k, v, offsets, offsets, longest, longest, 0.0, True, False)[0]


class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.hidden, self.output = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x, offsets, longest):
        q, k, v = self.qkv(self.norm1(x)).view(x.shape[0], 3, self.heads, -1).unbind(1)
        x = x + self.out(attention(q, k, v, offsets, longest).flatten(1))
        return x + self.output(F.gelu(self.hidden(self.norm2(x)), approximate="tanh"))


class Encoder(nn.Module):
    def __init__(self, layers, d, heads):
        super().__init__()
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(layers))

    def forward(self, x, offsets, longest):
        for block in self.blocks:
            x = block(x, offsets, longest)
        return x


def measure(model, d, lengths):
    offsets = torch.tensor([0, *lengths], device="cuda", dtype=torch.int32).cumsum(0, dtype=torch.int32)
    x = torch.randn(sum(lengths), d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)

    def forward():
        with torch.no_grad():
            return model(x, offsets, max(lengths))

    def step():
        inputs = [x, *model.parameters()]
        torch.autograd.grad(model(x, offsets, max(lengths)), inputs, dy)

    return [round(milliseconds(fn), 3) for fn in (forward, step)]


def encoder(case):
    """The row of {case: "encoder", N, layers, d, H, lengths}: the sequences padded to N, and as they are."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = torch.compile(Encoder(case["layers"], case["d"], case["H"]).to("cuda", torch.bfloat16), dynamic=False)
    row = {key: value for key, value in case.items() if key != "lengths"}
    padded = [case["N"]] * len(case["lengths"])
    for name, lengths in (("transformer_fa2", padded), ("transformer_fa2_unpadded", case["lengths"])):
        row[name] = measure(model, case["d"], lengths)
    return row
