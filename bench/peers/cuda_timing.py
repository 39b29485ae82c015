"""Time by CUDA events."""
import torch


def milliseconds(fn, samples=20):
    """The median of `samples` calls, after 4 that do not count."""
    for _ in range(4):
        fn()
    times = []
    for _ in range(samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[samples // 2]
