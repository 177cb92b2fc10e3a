import json
import platform
import re

from cai_runtime.cli import main


def test_json_has_versions_devices_kernels_and_cache(capsys, home):
    import torch

    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["python"] == platform.python_version()
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert {"cai_runtime", "transformers", "triton", "tvm-ffi", "openai"} <= set(found["versions"])
    assert 1 <= found["machine"]["usable_threads"] <= found["machine"]["cpu_threads"]
    assert found["machine"]["memory_bytes"] > 2**30
    assert {"reference", "cpu", "triton", "cuda"} == set(found["kernels"])
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["cache"] == str(home)


def test_text_names_instruction_sets_and_settings_but_no_secret(capsys, monkeypatch):
    from cai_runtime.kernels import cpu_library

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("CAI_CUDA_ARCHS", "9.0a")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert cpu_library.instruction_set() in text
    assert re.search(r"CAI_CUDA_ARCHS +9\.0a\n", text)
    assert "HF_TOKEN" in text
    assert "hf_secret" not in text
