"""FlashAttention-2 and cuDNN attention through PyTorch: causal, bfloat16, TFLOP/s [forward, backward] as JSON lines; cuBLAS; an encoder.

Reads a JSON list of cases {case, D, N, B, H, lengths?}, {case: "gemm", M, N, K} or {case: "encoder", ...} (torch_encoder.py) on stdin; the
first line written is cuBLAS on 8192^3.
FLOPs of attention are 4 H D sum(L^2) / 2 forward, 2.5 times that backward; median of 20 timings by CUDA events after 4 warm-ups. Cases
with lengths are `fa2_nested`: nested tensors, whose conversions cost more than FlashAttention-2's own variable-length call.
"""
import json
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cuda_timing import milliseconds
from torch_encoder import encoder

BACKENDS = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def tensors(case):
    """q, k, v: [B, H, N, D], or nested over the lengths."""
    H, D = case["H"], case["D"]

    def make():
        if "lengths" not in case:
            return torch.randn(case["B"], H, case["N"], D, device="cuda", dtype=torch.bfloat16)
        values = torch.randn(sum(case["lengths"]), H, D, device="cuda", dtype=torch.bfloat16)
        offsets = torch.tensor([0, *case["lengths"]], device="cuda").cumsum(0)
        return torch.nested.nested_tensor_from_jagged(values, offsets, max_seqlen=case["N"]).transpose(1, 2)

    return [make().detach().requires_grad_() for _ in range(3)]


def measure(case, backend):
    lengths = case.get("lengths", [case["N"]] * case["B"])
    flops = 2 * case["H"] * case["D"] * sum(length**2 for length in lengths)
    q, k, v = tensors(case)
    with sdpa_kernel(backend):
        forward = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = forward()
        dout = torch.randn_like(out)
        times = [
            milliseconds(forward),
            milliseconds(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)),
        ]
    return [round(flops / times[0] / 1e9, 1), round(2.5 * flops / times[1] / 1e9, 1)]


def gemm(m, n, k):
    a, b = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
    return round(2 * m * n * k / milliseconds(lambda: a @ b) / 1e9, 1)


def main():
    n = 8192
    print(json.dumps({"case": "ceiling.gemm", "M": n, "N": n, "K": n, "cublas": gemm(n, n, n), "torch": torch.__version__}))
    for case in json.load(sys.stdin):
        if case["case"] == "gemm":
            print(json.dumps({**case, "cublas": gemm(case["M"], case["N"], case["K"])}))
            continue
        if case["case"] == "encoder":
            print(json.dumps(encoder(case)), flush=True)
            continue
        row = {key: value for key, value in case.items() if key != "lengths"}
        for name, backend in BACKENDS.items():
            if "lengths" in case and name == "cudnn":
                continue
            try:
                row[name + ("_nested" if "lengths" in case else "")] = measure(case, backend)
            except Exception as error:  # one back end less is no reason to lose the others
                row["error"] = f"{name}: {type(error).__name__}: {error}"[:500]
            torch.cuda.empty_cache()
        print(json.dumps(row), flush=True)


main()
