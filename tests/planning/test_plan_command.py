"""`vllm-expert-prefetch plan` as a user calls it."""

import json
import shutil
from types import SimpleNamespace

import pytest
from engines import TINY_MODEL
from processes import run_python

from vllm_expert_prefetch.cli import doctor_gpu
from vllm_expert_prefetch.cli.main import main
from vllm_expert_prefetch.memory import host_limit
from vllm_expert_prefetch.planning.facts import load_facts

RECORD = 3 * 128 * 64 * 2
"""Bytes of an expert of the tiny model."""


def planned(capsys, *arguments):
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
    assert main(["plan", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_qwen3_30b_on_a_card_of_24_gb(capsys):
    found = planned(capsys, "Qwen3-30B-A3B", "--gpu-memory", 24)
    assert (found["record_bytes"], found["experts_bytes"]) == (9_437_184, 57_982_058_496)
    assert {form: own["record_bytes"] for form, own in found["formats"].items()} == {
        "bf16": 9_437_184,
        "fp8": 4_719_744,
        "gptq-int4": 2_451_456,
    }
    assert found["hit_rate"]["low"] < found["hit_rate"]["expected"] <= found["hit_rate"]["high"]
    assert sum("assumed" in note for note in found["notes"]) == 2
    assert found["command"] == (
        "vllm serve Qwen/Qwen3-30B-A3B --plugin expert_prefetch --gpu-memory-utilization 0.9 --max-model-len 8192 "
        "--max-num-seqs 1 --additional-config.expert_prefetch.kv_cache_tokens 8192"
    )


@pytest.mark.parametrize(("memory", "areas"), [(24, 1), (44, 2)])
def test_it_says_how_many_areas_of_overflow_rows_there_are(capsys, memory, areas):
    assert planned(capsys, "Qwen3-30B-A3B", "--gpu-memory", memory)["areas"] == areas
    assert main(["plan", "Qwen3-30B-A3B", "--gpu-memory", str(memory)]) == 0
    assert ("overflow rows in two areas" in capsys.readouterr().out) == (areas == 2)


def test_flags_reach_the_command(capsys):
    given = ("--gpu", "H100", "--tp", 2, "--kv-cache-dtype", "fp8", "--quantization", "int8", "--concurrency", 4)
    command = planned(capsys, "Qwen3-235B-A22B", *given)["command"]
    for part in (
        "vllm serve Qwen/Qwen3-235B-A22B ",
        "--tensor-parallel-size 2",
        "--kv-cache-dtype fp8",
        "--quantization int8_per_channel_weight_only",
        "kv_cache_tokens 32768",
    ):
        assert part in command
    assert "cache_gb 12" in planned(capsys, "Qwen3-30B-A3B", "--gpu", "RTX 4090", "--cache-gb", 12)["command"]


def test_a_quantised_repository_is_that_model_in_that_format(capsys):
    found = planned(capsys, "qwen/qwen3-30b-a3b-fp8", "--gpu", "RTX 4090")
    assert (found["format"], found["record_bytes"]) == ("fp8", 4_719_744)


def test_a_model_that_fits_is_served_by_plain_vllm(capsys):
    found = planned(capsys, "OLMoE-1B-7B-0924", "--gpu", "RTX 4090")
    assert "--plugin" not in found["command"]
    assert any("every expert has a slot" in note for note in found["notes"])


@pytest.mark.parametrize("what", ["", "config.json", "model.safetensors"])
def test_a_folder_and_a_configuration_tell_the_same(capsys, tmp_path, what):
    for file in ("config.json", what):
        if file:
            shutil.copy(TINY_MODEL / file, tmp_path)
    found = planned(capsys, tmp_path / what if what == "config.json" else tmp_path, "--gpu-memory", 24)
    assert (found["record_bytes"], found["moe_layers"], found["experts_per_layer"]) == (RECORD, 8, 16)
    total = (TINY_MODEL / "model.safetensors").stat().st_size
    experts = 8 * 16 * RECORD
    if what == "model.safetensors":
        assert found["weights_bytes"] == total - experts
    assert found["weights_bytes"] == pytest.approx(total - experts, rel=0.05)


def test_an_index_says_how_much_there_is_beside_experts(capsys, tmp_path):
    shutil.copy(TINY_MODEL / "config.json", tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 8 * 16 * RECORD + 12345}, "weight_map": {}}))
    assert planned(capsys, index, "--gpu-memory", 24)["weights_bytes"] == 12345


def test_text_says_what_json_says(capsys):
    assert main(["plan", "gpt-oss-120b", "--gpu", "RTX 4090", "--host-memory", "128"]) == 0
    text = capsys.readouterr().out
    for part in (
        "14,431,744 bytes each",
        "RTX 4090 with 25.8 GB",
        "hit rate",
        "TPOT",
        "TTFT",
        "vllm serve openai/gpt-oss",
    ):
        assert part in text
    assert "assumed" not in text


def test_the_list_names_every_model_and_gpu(capsys):
    assert main(["plan", "--list"]) == 0
    listed = capsys.readouterr().out
    for known in (*load_facts().models, *load_facts().gpus):
        assert known.name in listed


def test_a_picture(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    planned(capsys, "Qwen3-30B-A3B", "--gpu", "RTX 4090", "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["Qwen3-30B", "--gpu", "L4"], ["Qwen3-30B is not known", "Qwen3-30B-A3B", "config.json"]),
        (["Qwen3-30B-A3B"], ["--gpu NAME", "--gpu-memory"]),
        ([], ["MODEL", "--list"]),
        (["Qwen3-30B-A3B", "--gpu", "L5"], ["L5 is not known", "L4"]),
        (["Qwen3-30B-A3B", "--gpu", "L4", "--quantization", "int3"], ["int3 is not known", "gptq-int4"]),
        (["Qwen3-30B-A3B", "--gpu", "L4", "--quantization", "mxfp4"], ["no mxfp4 checkpoint", "bf16, fp8, gptq-int4"]),
        (["Qwen3-30B-A3B", "--gpu", "L4", "--host-memory", "32"], ["58.0 GB", "32.0 GB", "--quantization fp8"]),
        (["Qwen3-30B-A3B", "--gpu", "L4", "--host-memory", "2"], ["--host-memory 58"]),
        (["Qwen3-30B-A3B", "--gpu", "L4", "--context", "99999"], ["99999", "40960"]),
        (["Qwen3-30B-A3B", "--gpu", "L4", "--concurrency", "0"], ["--concurrency must be above 0"]),
        (["Qwen3-30B-A3B", "--gpu", "L4", "--tp", "0"], ["--tp must be at least 1"]),
        (["Qwen3-30B-A3B", "--gpu", "L4", "--gpus", "4", "--tp", "2"], ["--gpus 4", "--tp 2"]),
        (["Qwen3-30B-A3B", "--gpu", "L4", "--ep", "2", "--tp", "4"], ["--ep 2", "Drop --tp"]),
        (["Qwen3-30B-A3B", "--gpu", "L4", "--measure"], ["--measure", "drop the flags"]),
        (["Qwen3-30B-A3B", "--gpu", "L4", "--cache-gb", "3"], ["cache_gb = 3", "cache_gb = 4.76"]),
        (["missing/config.json", "--gpu", "L4"], ["missing/config.json", "is missing"]),
    ],
)
def test_what_cannot_work_is_one_message_with_the_remedy(capsys, arguments, says):
    message = refused(capsys, *arguments)
    for part in says:
        assert part in message


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose GPU has 25 GB, whose link reaches 21.5 GB/s with the records of a model, and 50 GB of host
    memory. Its name can be set; None is no GPU."""
    found = SimpleNamespace(name="NVIDIA GeForce RTX 4090")
    cuda = SimpleNamespace(
        is_available=lambda: found.name is not None,
        get_device_name=lambda: found.name,
        current_device=lambda: 3,
        get_device_properties=lambda device: SimpleNamespace(total_memory={3: 25 * 10**9}[device]),
    )
    monkeypatch.setattr(doctor_gpu, "_torch", lambda: SimpleNamespace(cuda=cuda))
    speeds = {64 << 10: 9.5, 1 << 20: 17.5, 9 << 20: 21.5, 50 << 20: 22.5}
    monkeypatch.setattr(doctor_gpu, "_measure", lambda torch, size: {"gather_gbps": speeds[size]})
    monkeypatch.setattr(host_limit, "host_limit", lambda: host_limit.HostLimit(50 * 10**9, "this host"))
    return found


def test_measured_are_memory_and_link_and_the_rest_is_that_of_the_known_gpu(capsys, gpu):
    model, given = "Qwen3-30B-A3B-FP8", ("--gpu-memory", 25, "--link-gbps", 21.5, "--host-memory", 50)
    found = planned(capsys, model, "--measure")
    assert found["machine"] == "RTX 4090 with 25.0 GB, link 21.5 GB/s"
    assert found == planned(capsys, model, "--gpu", "RTX 4090", *given)
    other = planned(capsys, model, "--gpu", "L4", *given)
    assert found["tpot_bound_ms"]["compute"] < other["tpot_bound_ms"]["compute"], "of a slower GPU"
    assert "there are 50.0 GB" in refused(capsys, "Qwen3-30B-A3B", "--measure")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("NVIDIA RTX 4091", ["RTX 4091 is not known", "did you mean RTX 4090", "--gpu-memory and --link-gbps"]),
        (None, ["no NVIDIA GPU here to measure", "name one with --gpu, or give --gpu-memory"]),
    ],
)
def test_what_cannot_be_measured_is_one_message_with_the_remedy(capsys, gpu, name, says):
    gpu.name = name
    message = refused(capsys, "Qwen3-30B-A3B", "--measure")
    for part in says:
        assert part in message


def test_damaged_files_are_named(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(capsys, tmp_path, "--gpu", "L4")
    (tmp_path / "config.json").write_text("[]")
    assert "config.json holds no JSON object" in refused(capsys, tmp_path, "--gpu", "L4")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 1}')
    assert "has no routed experts" in refused(capsys, tmp_path, "--gpu", "L4")


def test_it_loads_neither_torch_nor_vllm_asks_no_network_and_is_quick():
    output = run_python("""
        import resource, socket, sys
        socket.socket.connect = None
        from vllm_expert_prefetch.cli.main import main
        assert main(["plan", "Qwen3-30B-A3B", "--gpu-memory", "24", "--json"]) == 0
        print()
        print(sorted({"torch", "vllm", "transformers", "matplotlib"} & sys.modules.keys()))
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(used.ru_utime + used.ru_stime)
    """)
    *_, loaded, seconds = output.splitlines()
    assert loaded == "[]"
    assert float(seconds) < 3, "of a processor; half a second on an idle machine"
