import sys, torch
sys.path[:0]=['.','benchmarks']
import ops as bench
from kvzip import ops
import kvzip.ops.triton.select as S
from kvzip.ops.select import select_count_reference
scores = torch.randn(32, 8, 131072, device="cuda").mul_(3).exp_()
flag = torch.zeros(1, dtype=torch.int32, device="cuda")
ref = select_count_reference(scores, count=int(.3*scores.numel()))
def show(n, v):
    for k, f in bench.time_variants(v, rounds=12).items(): print(n, k, f['median_us'], f['p10_us'], f['p90_us'], f['mode'], flush=True)
for b, w in [(4096,8),(2048,4),(8192,16),(4096,16)]:
    S.BLOCK, S.WARPS = b, w
    ok = torch.equal(ops.select(scores, ratio=.3, nan=flag), ref)
    show(f'select {b} {w} {ok}', {'kvzip':[lambda: ops.select(scores, ratio=.3, nan=flag)]})
S.BLOCK, S.WARPS = 4096, 8
from torch.profiler import profile, ProfilerActivity
with profile(activities=[ProfilerActivity.CUDA]) as p:
    ops.select(scores, ratio=.3, nan=flag)
    torch.cuda.synchronize()
for e in p.events():
    if e.device_type == torch.autograd.DeviceType.CUDA: print(f'{e.name[:60]:60} {e.device_time:9.1f}')
