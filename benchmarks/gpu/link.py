"""The link's peak: page-locked host-to-device copies by the copy engine, alone and with copies the other way."""

from typing import Any

import torch
from shapes import MB, Plan
from timing import gbps, median_ms


def measure(plan: Plan) -> dict[str, Any]:
    """GB/s by size in MB; `peak_gbps` is the best, which everything else is compared with."""
    largest = max(plan.link_bytes)
    host = torch.empty(largest, dtype=torch.uint8, pin_memory=True).random_()
    device = torch.empty(largest, dtype=torch.uint8, device="cuda")
    to_device = {}
    for size in plan.link_bytes:
        copies = max(1, 64 * MB // size)
        ms = median_ms(lambda n=size: device[:n].copy_(host[:n], non_blocking=True), plan.repeats, copies)  # type: ignore[misc]
        to_device[f"{size / MB:g}"] = gbps(size, ms)
    return {"host_to_device_gbps": to_device, "peak_gbps": max(to_device.values()), **_both_ways(host, device, plan)}


def _both_ways(host: torch.Tensor, device: torch.Tensor, plan: Plan) -> dict[str, Any]:
    back, source = torch.empty_like(host, pin_memory=True), torch.empty_like(device)
    other = torch.cuda.Stream()

    def copy_both() -> None:
        other.wait_stream(torch.cuda.current_stream())
        device.copy_(host, non_blocking=True)
        with torch.cuda.stream(other):
            back.copy_(source, non_blocking=True)
        torch.cuda.current_stream().wait_stream(other)

    return {"each_way_when_both_gbps": gbps(len(host), median_ms(copy_both, plan.repeats))}
