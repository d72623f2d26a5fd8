"""The parts of .ci/release_check.py that need no new environment: what it runs in one."""

import json
import runpy

import pytest
from native_tools import ROOT
from processes import run_python

from vllm_expert_prefetch.native.library import host_library, why_not_host

SCRIPTS = runpy.run_path(str(ROOT / ".ci" / "release_check.py"))


def test_doctor_says_what_a_release_is_judged_by():
    report = json.loads(run_python(SCRIPTS["IMPORTS"]).splitlines()[-1])
    assert report["tvm_ffi"]
    assert report["host"].keys() >= {"usable", "reason"} <= report["cuda"].keys()


@pytest.mark.skipif(host_library() is None, reason=f"no native library: {why_not_host()}")
def test_an_installed_library_would_be_seen_to_plan():
    run_python(SCRIPTS["PLAN"])
