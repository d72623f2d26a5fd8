"""The seam to vLLM: the only package that imports it.

`activation` turns the plugin on, `refusals` says what it does not do, `layer` replaces vLLM's routed experts,
`takeover` moves their tensors, `worker` sizes, verifies and reports, `sources` finds what look-ahead needs,
`termination` ends a server in time, and `compat` holds every name of vLLM that is not public.
"""
