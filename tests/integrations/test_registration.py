"""`import cai_runtime` registers the format, in either order; without it transformers stops instead of loading garbage."""

import json
import shutil
import sys

import pytest

LOAD = "import sys; model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(type(model.lm_head).__name__)"


@pytest.mark.parametrize(
    "imports",
    [
        "import cai_runtime; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import cai_runtime",
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
        "assert added[0] not in sys.meta_path\n"
        "assert auto.__spec__.loader is auto.__loader__ and type(auto.__loader__).__name__ == 'SourceFileLoader'\n"
        "assert 'cai' in auto.AUTO_QUANTIZER_MAPPING and 'cai' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "now = list(sys.meta_path)\n"
        "registration.install()\n"
        "assert sys.meta_path == now\n"
    )
    assert done.returncode == 0, done.stderr


def test_our_quantizer_may_be_imported_first(python):
    done = python(
        "import warnings; warnings.simplefilter('error')\n"
        "import cai_runtime.integrations.quantizer\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'cai' in AUTO_QUANTIZER_MAPPING\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_failure_to_register_is_a_warning(monkeypatch):
    import transformers.quantizers.auto  # noqa: F401

    from cai_runtime.integrations import registration

    monkeypatch.setitem(sys.modules, "cai_runtime.integrations.quantizer", None)
    with pytest.warns(RuntimeWarning, match="can't register"):
        registration.install()


WITHOUT = """
import json, sys
from transformers import AutoModel, AutoModelForCausalLM, pipeline
slim, copy, bare = sys.argv[1:]
calls = {
    "model": lambda: AutoModelForCausalLM.from_pretrained(slim),
    "base": lambda: AutoModel.from_pretrained(slim, dtype="bfloat16", device_map="cpu"),
    "pipeline": lambda: pipeline("text-generation", model=slim),
    "copy": lambda: AutoModelForCausalLM.from_pretrained(copy),
    "bare": lambda: AutoModelForCausalLM.from_pretrained(bare),
}
found = {}
for name, call in calls.items():
    try:
        call()
        found[name] = "loaded"
    except (OSError, ValueError) as e:  # a pipeline's is a ValueError that quotes the OSError
        found[name] = str(e)
assert "cai_runtime" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def without(python, slim, tmp_path_factory):
    """What stock transformers does with a slim checkpoint: name -> "loaded", or its error. And its stderr."""
    from transformers import AutoModelForCausalLM

    import cai_runtime  # noqa: F401

    copy, bare = (tmp_path_factory.mktemp("without") / name for name in ("copy", "bare"))
    AutoModelForCausalLM.from_pretrained(slim).save_pretrained(copy, max_shard_size="8KB")
    shutil.copytree(slim, bare)
    config = json.loads((bare / "config.json").read_text())
    del config["transformers_weights"]
    (bare / "config.json").write_text(json.dumps(config))
    done = python(WITHOUT, slim, copy, bare)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("what", ["model", "base", "pipeline", "copy"])
def test_without_the_import_transformers_stops_and_says_what_to_do(without, what):
    assert "import-cai_runtime-to-load-this-slim-checkpoint" in without[0][what]


def test_the_guard_is_what_stops_it(without):
    """Without it, transformers goes on with a warning: the reason for the guard, and how we learn that it can go."""
    assert without[0]["bare"] == "loaded" and "Unknown quantization type, got cai" in without[1]


def test_pipeline_with_the_import(slim):
    from transformers import pipeline

    import cai_runtime  # noqa: F401

    reply = pipeline("text-generation", model=str(slim))("w1 w2", max_new_tokens=3, do_sample=False)
    assert reply[0]["generated_text"].startswith("w1 w2")
