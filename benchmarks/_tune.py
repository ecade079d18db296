import sys, itertools, torch
sys.path[:0]=['.','benchmarks']
import ops as bench
from kvzip import ops
import kvzip.ops.triton.select as S, kvzip.ops.triton.prune as P, kvzip.ops.triton.quantize as Q
from kvzip.ops.select import select_count_reference
scores = torch.randn(32, 8, 131072, device="cuda").mul_(3).exp_()
flag = torch.zeros(1, dtype=torch.int32, device="cuda")
ref = select_count_reference(scores, count=int(.3*scores.numel()))
def show(n, v):
    for k, f in bench.time_variants(v, rounds=12).items(): print(n, k, f['median_us'], f['p10_us'], f['p90_us'], f['mode'], flush=True)
for b, w in [(8192,8),(4096,4),(4096,8),(8192,16),(16384,16),(2048,4)]:
    S.BLOCK, S.WARPS = b, w
    ok = torch.equal(ops.select(scores, ratio=.3, nan=flag), ref)
    show(f'select {b} {w} {ok}', {'kvzip':[lambda: ops.select(scores, ratio=.3, nan=flag)]})
S.BLOCK, S.WARPS = 4096, 8
for name, s in (('equal', torch.full_like(scores,.5)), ('bf16', scores.bfloat16().float())):
    show(name, {'kvzip':[lambda: ops.select(s, ratio=.3, nan=flag)]})
show('uniform', {'kvzip':[lambda: ops.select_uniform(scores, ratio=.3, nan=flag)]})
k, v = (torch.randn(8, 131072, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
keep = torch.rand(8, 131072, device="cuda") < .3
total = int(keep.sum())
for n, w in [(64,4),(32,4),(128,4),(128,8),(64,8),(16,4)]:
    P.launch_config = lambda D, n=n, w=w: (n, w)
    show(f'prune {n} {w}', {'kvzip':[lambda: ops.prune(k, v, keep, total=total)]})
x = torch.randn(314570, 128, device="cuda", dtype=torch.bfloat16)
for n, w in [(32,4),(16,4),(64,4),(64,8),(16,2)]:
    Q.launch_config = lambda D, n=n, w=w: (n, w)
    q8, q4 = ops.quantize(x, bits=8), ops.quantize(x, bits=4)
    show(f'quantize {n} {w}', {'kvzip':[lambda: ops.quantize(x, bits=8)], 'q4':[lambda: ops.quantize(x, bits=4)], 'd8':[lambda: ops.dequantize(q8, dtype=torch.bfloat16)], 'd4':[lambda: ops.dequantize(q4, dtype=torch.bfloat16)]})
from torch.profiler import profile, ProfilerActivity
with profile(activities=[ProfilerActivity.CUDA]) as p:
    for _ in range(3):
        ops.select(scores, ratio=.3, nan=flag); ops.prune(k, v, keep, total=total); ops.quantize(x, bits=8)
    torch.cuda.synchronize()
for e in p.events():
    if e.device_type == torch.autograd.DeviceType.CUDA: print(f'{e.name[:60]:60} {e.device_time:9.1f}')
