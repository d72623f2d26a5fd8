"""Every metric declared once, counted in the workers, shown by the API server.

`definitions` declares, `counters` writes in a worker, `collector` reads in the API server, `runtime_dir` is where the
two meet. No torch, no vLLM.
"""
