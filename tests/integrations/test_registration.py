"""`import cai_runtime` registers the format, in either order; without it transformers stops instead of loading garbage."""

import json
import sys

import pytest

LOAD = "import sys; model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(type(model.lm_head).__name__)"


@pytest.mark.parametrize(
    "imports",
    [
        "import cai_runtime; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import cai_runtime",
        "import transformers, cai_runtime; from transformers import AutoModelForCausalLM",
        "import transformers.quantizers.auto, cai_runtime; from transformers import AutoModelForCausalLM",
    ],
)
def test_either_order_of_imports(python, slim, imports):
    done = python(f"{imports}; {LOAD}", slim)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["TiedLinear"]


def test_import_is_light_and_leaves_one_finder_until_it_is_used(python):
    done = python(
        "import sys; before = list(sys.meta_path)\n"
        "import cai_runtime\n"
        "added = [f for f in sys.meta_path if f not in before]\n"
        "assert len(added) == 1 and 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "from cai_runtime.integrations import registration\n"
        "registration.install(); registration.install()\n"
        "assert [f for f in sys.meta_path if f not in before] == added\n"
        "import transformers.quantizers.auto as auto\n"
        "assert sys.meta_path == before\n"
        "assert auto.__spec__.loader is auto.__loader__ and type(auto.__loader__).__name__ == 'SourceFileLoader'\n"
        "assert 'cai' in auto.AUTO_QUANTIZER_MAPPING and 'cai' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "registration.install()\n"
        "assert sys.meta_path == before\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_failure_to_register_is_a_warning(monkeypatch):
    import transformers.quantizers.auto  # noqa: F401

    from cai_runtime.integrations import registration

    monkeypatch.setitem(sys.modules, "cai_runtime.integrations.quantizer", None)
    with pytest.warns(RuntimeWarning, match="can't register"):
        registration.install()


FAILS = """
import sys
from transformers import {what}
try:
    {call}
except OSError as e:
    print("stopped:", e)
assert "cai_runtime" not in sys.modules
"""


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("AutoModelForCausalLM", "AutoModelForCausalLM.from_pretrained(sys.argv[1])"),
        ("AutoModel", "AutoModel.from_pretrained(sys.argv[1], dtype='bfloat16', device_map='cpu')"),
        ("pipeline", "pipeline('text-generation', model=sys.argv[1])"),
    ],
)
def test_without_the_import_transformers_stops_and_says_what_to_do(python, slim, what, call):
    done = python(FAILS.format(what=what, call=call), slim)
    assert done.returncode == 0, done.stderr
    assert "stopped" in done.stdout and "import-cai_runtime-to-load-this-slim-checkpoint" in done.stdout


def test_without_the_import_a_saved_copy_stops_too(python, slim, tmp_path):
    from transformers import AutoModelForCausalLM

    import cai_runtime  # noqa: F401

    AutoModelForCausalLM.from_pretrained(slim).save_pretrained(tmp_path / "copy", max_shard_size="8KB")
    done = python(
        FAILS.format(what="AutoModelForCausalLM", call="AutoModelForCausalLM.from_pretrained(sys.argv[1])"),
        tmp_path / "copy",
    )
    assert done.returncode == 0, done.stderr
    assert "import-cai_runtime-to-load-this-slim-checkpoint" in done.stdout


def test_the_guard_is_what_stops_it(python, slim, tmp_path):
    """Without it, transformers goes on with a warning: the reason for the guard, and the day it is needed no more."""
    import shutil

    bare = shutil.copytree(slim, tmp_path / "bare")
    config = json.loads((bare / "config.json").read_text())
    del config["transformers_weights"]
    (bare / "config.json").write_text(json.dumps(config))
    done = python(f"from transformers import AutoModelForCausalLM; {LOAD}", bare)
    assert done.returncode == 0 and "Unknown quantization type, got cai" in done.stderr


def test_pipeline_with_the_import(slim):
    from transformers import pipeline

    import cai_runtime  # noqa: F401

    reply = pipeline("text-generation", model=str(slim))("w1 w2", max_new_tokens=3, do_sample=False)
    assert reply[0]["generated_text"].startswith("w1 w2")
