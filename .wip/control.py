import sys, json
sys.path[:0] = ["benchmarks/gpu", "benchmarks"]
import exact
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from exactness import compare
from harness import run_in_process, TINY_MODEL
from shapes import ServingPlan
plan = ServingPlan.of(True, False)
subject = exact.Subject(str(TINY_MODEL), 0.5)
def job(with_plugin, mode="full graphs", res=None, prefetch=None):
    j = exact._job(exact.Subject(str(TINY_MODEL), res or 0.5), mode, with_plugin, [1, 5, 32], 32, True)
    if prefetch: j["engine"]["config"]["prefetch"] = prefetch
    return j
jobs = {"stock a": job(False), "stock b": job(False), "stock c": job(False), "plugin on": job(True), "plugin off": job(True, prefetch="off"), "plugin all": job(True, res=1.0), "plugin off b": job(True, prefetch="off")}
with ThreadPoolExecutor(7) as pool:
    found = dict(zip(jobs, pool.map(lambda j: run_in_process("benchmarks/gpu/exact.py", j), jobs.values())))
for name in jobs:
    for other in ("stock a", "plugin off"):
        print(name, "against", other, [(b, vars(compare(found[other][b]["sequences"], found[name][b]["sequences"]))) for b in ("1", "5", "32")], flush=True)
