"""FlashAttention-2 and cuDNN attention through PyTorch, causal, bfloat16, at the shapes of hstu_attention_h200.case.ts."""
import torch, torch.nn.functional as F
from torch.nn.attention import sdpa_kernel, SDPBackend
def t(f,n=20):
    for _ in range(4): f()
    torch.cuda.synchronize(); ts=[]
    for _ in range(n):
        a=torch.cuda.Event(enable_timing=True); b=torch.cuda.Event(enable_timing=True)
        a.record(); f(); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b))
    ts.sort(); return ts[len(ts)//2]
for D in (64,128):
    for N in (1024,4096):
        B=131072//N; H=4
        q,k,v=[torch.randn(B,H,N,D,device='cuda',dtype=torch.bfloat16,requires_grad=True) for _ in range(3)]
        do=torch.randn_like(q)
        for name,be in (('fa2',SDPBackend.FLASH_ATTENTION),('cudnn',SDPBackend.CUDNN_ATTENTION)):
            with sdpa_kernel(be):
                f=lambda: F.scaled_dot_product_attention(q,k,v,is_causal=True)
                fwd=t(f); o=f()
                bwd=t(lambda: torch.autograd.grad(o,(q,k,v),do,retain_graph=True))
                fl=4*H*D*B*N*N/2
                print(name,'D',D,'N',N,'fwd %.0f bwd %.0f TFLOP/s'%(fl/fwd/1e9,2.5*fl/bwd/1e9))
