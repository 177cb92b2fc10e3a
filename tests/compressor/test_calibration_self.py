"""Text that a model writes itself, on tiny random models: its form, its seed, and who runs the model."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoTokenizer

from cai_runtime.compressor.data import self_text
from cai_runtime.compressor.data.calibration import calibration_sequences
from cai_runtime.compressor.data.conversation import chat_frame
from cai_runtime.compressor.data.repetition import WINDOW, distinct_share, loops, repeated_share
from cai_runtime.compressor.data.self_text import SelfSampling, document_marks, write_self_text
from cai_runtime.errors import CompressionError
from cai_runtime.stock import next_token
from cai_runtime.stock.next_token import EngineLanes, Feed, TransformersLanes

EOS = 1
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def chat_tokenizer(path, bos=None):
    """60 words, two roles, and the marks of ChatML."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"]
    vocabulary = {w: k for k, w in enumerate([*special, "user", "assistant", *(f"w{k}" for k in range(60))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        bos_token=bos,
        additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
    )
    fast.chat_template = CHATML
    fast.save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def chat_model(make_tiny):
    path = make_tiny(vocab_size=70)  # four more than the tokenizer has
    return path, chat_tokenizer(path, bos="<|im_start|>")


def write(path, tokenizer, **options):
    sampling = options.pop("sampling", SelfSampling(temperature=1.0, top_p=1.0))
    settings = {"samples": 6, "length": 48, "seed": 0, "progress": False}
    return write_self_text(path, tokenizer, sampling=sampling, **{**settings, **options})


def olmo(path, **overrides):
    """A random model of an architecture that the engine has no definition of; returns its directory."""
    from transformers import OlmoConfig, OlmoForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OlmoConfig(vocab_size=62, num_key_value_heads=2, **(sizes | overrides), initializer_range=0.3)
    OlmoForCausalLM(config).save_pretrained(path)
    return path


def test_documents_fill_the_sequences(tiny, tokenizer):
    found = write(tiny, tokenizer)
    assert [len(s) for s in found.sequences] == [48] * 6
    assert found.chats == 0 and found.writer == "cai_runtime's engine"
    for sequence in found.sequences:
        assert sequence[0] == EOS and 0 not in sequence  # begins as a document does; <unk> is never written
        ends = [k for k, token in enumerate(sequence) if token == EOS]
        assert all(b - a > self_text.LEAST_WORDS for a, b in pairwise(ends))
    assert any(s.count(EOS) > 1 for s in found.sequences)  # a text that ended was followed by another
    assert len({tuple(s) for s in found.sequences}) == 6


def test_the_seed_alone_decides(tiny, tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = write(tiny, tokenizer, seed=7).sequences
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert write(tiny, tokenizer, seed=7).sequences == first
    assert write(tiny, tokenizer, seed=8).sequences != first
    # Neither how many are written at once nor how many there are changes a sequence.
    for lanes, samples in [(1, 6), (4, 6), (6, 3)]:
        sampling = SelfSampling(temperature=1.0, top_p=1.0, lanes=lanes)
        assert write(tiny, tokenizer, seed=7, sampling=sampling, samples=samples).sequences == first[:samples]


def test_tokens_follow_the_models_distribution(tiny, tokenizer):
    """The second token of many documents, against the probabilities that transformers gives."""
    from cai_runtime.stock.load import dense_reference

    logits = dense_reference(tiny)(input_ids=torch.tensor([[EOS]])).logits[0, -1].detach()
    logits[[0, EOS]] = -torch.inf
    sampling = SelfSampling(temperature=0.5, start_temperature=2.0, start_tokens=1, top_p=1.0, lanes=400)
    found = write(tiny, tokenizer, sampling=sampling, samples=400, length=2)
    counts = torch.bincount(torch.tensor([s[1] for s in found.sequences]), minlength=62) / 400
    # The first token is hot. Total variation of 400 draws from 60 tokens is about 0.15.
    assert float((counts - (logits / 2.0).softmax(-1)).abs().sum()) / 2 < 0.25
    assert float((counts - (logits / 0.5).softmax(-1)).abs().sum()) / 2 > 0.4


def test_the_heat_falls_to_the_temperature():
    sampling = SelfSampling(temperature=0.8, start_temperature=1.6, start_tokens=4)
    heated = [sampling.params(step, True).temperature for step in range(6)]
    assert heated == pytest.approx([1.6, 1.4, 1.2, 1.0, 0.8, 0.8])
    assert sampling.params(0, False).temperature == 0.8


def test_conversations_take_the_templates_form(chat_model):
    path, tokenizer = chat_model
    sampling = SelfSampling(temperature=1.0, top_p=1.0, chat_share=0.5, turns=2)
    found = write(path, tokenizer, sampling=sampling, samples=8, length=120)
    assert found.chats == 4
    frame = chat_frame(tokenizer)
    words = tokenizer.convert_ids_to_tokens
    assert words(frame.opening) == ["<|im_start|>", "user"]
    assert words(frame.answer) == ["<|im_end|>", "<|im_start|>", "assistant"]
    assert words(frame.next) == ["<|im_end|>", "<|im_start|>", "user"]
    for k, sequence in enumerate(found.sequences):
        assert max(sequence) < len(tokenizer)
        text = tokenizer.decode(sequence)
        if k % 2 == 0:  # documents
            assert text.startswith("<|endoftext|>") and "<|im_start|>" not in text and "<|im_end|>" not in text
            continue
        turns = text.split("<|im_start|> ")[1:]
        roles = [turn.split()[0] for turn in turns]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2)
        for turn in turns[:-1]:
            assert turn.count("<|im_end|>") == 1 and turn.endswith("<|im_end|> ")
            assert len(turn.split()) - 2 >= self_text.LEAST_WORDS


def test_turns_that_end_by_words(chat_model, monkeypatch):
    path, _ = chat_model
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}w50 {{ m.content }} w51 {% else %}{{ m.content }} w52 {% endif %}"
        "{% endfor %}"
    )
    script = "w1 w2 w3 w4 w51 w6 w7 w8 w9 w52 w50 w1 w2 w3 w4 <|im_end|> w10 w11 w12 w13"
    written = iter(tokenizer.tokenize(script))

    class Script:
        name, lanes, vocab_size, max_context, max_feed = "script", 1, 70, 64, 64

        def begin_wave(self): ...
        def close(self): ...
        def logits(self, feeds):
            row = torch.full((1, 70), -50.0)
            row[0, tokenizer.convert_tokens_to_ids(next(written))] = 50
            return row.numpy()

    monkeypatch.setattr(self_text, "open_next_token", lambda *_, **__: Script())
    found = write(path, tokenizer, sampling=SelfSampling(chat_share=1.0), samples=1, length=21)
    expected = "w50 w1 w2 w3 w4 w51 w6 w7 w8 w9 w52 w50 w1 w2 w3 w4 w51 w10 w11 w12 w13"
    assert tokenizer.decode(found.sequences[0]) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% if %}",
    ],
)
def test_a_template_without_a_frame_gives_documents(chat_model, template):
    path, _ = chat_model
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = template
    assert chat_frame(tokenizer) is None
    assert write(path, tokenizer, samples=2, length=16).chats == 0


def test_a_template_that_states_the_date_gives_the_same_frame_every_day(chat_model):
    path, _ = chat_model
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = "w1 {{ strftime_now('%d %b %Y') }} " + CHATML
    first = chat_frame(tokenizer)
    assert first.opening == tuple(tokenizer("w1 01 Jan 2025 <|im_start|> user")["input_ids"])


def test_marks_of_documents(chat_model, tiny):
    _, tokenizer = chat_model
    ids = tokenizer.convert_tokens_to_ids
    marks = document_marks(tokenizer, chat_frame(tokenizer), 70)
    assert marks.start == ids("<|endoftext|>") and marks.end is None  # the bos token begins a chat's turn
    assert marks.ends == {ids("<|endoftext|>"), ids("<|im_end|>")}
    assert set(marks.banned) == {ids("<unk>"), ids("<|im_start|>"), *range(len(tokenizer), 70)}
    bare = AutoTokenizer.from_pretrained(tiny)
    assert document_marks(bare, None, 62).start == EOS and document_marks(bare, None, 62).end is None
    bare.bos_token = "w5"
    marks = document_marks(bare, None, 62)
    assert (marks.start, marks.end) == (bare.convert_tokens_to_ids("w5"), EOS)
    bare.bos_token = bare.eos_token = None
    marks = document_marks(bare, None, 62)
    assert (marks.start, marks.end, marks.ends) == (None, None, frozenset())


def test_without_any_mark_the_first_token_is_drawn(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.eos_token = None
    found = write(tiny, tokenizer, samples=12, length=20)
    assert len({s[0] for s in found.sequences}) > 6


def test_a_document_that_loops_is_cut_and_another_begun(tiny, tokenizer):
    # Nearly greedy, a random model falls into a loop at once.
    sampling = SelfSampling(temperature=0.01, start_temperature=3.0, start_tokens=2, top_p=1.0)
    found = write(tiny, tokenizer, sampling=sampling, samples=2, length=400)
    assert found.loops > 0
    assert all(len(s) == 400 and s.count(EOS) > 1 for s in found.sequences)
    # A model that can do nothing else comes to an end as well.
    assert found.loops <= 2 * (400 // WINDOW)


def test_repetition():
    assert distinct_share([1, 2, 3, 4, 5, 6]) == 1 and distinct_share([1, 2]) == 1
    assert distinct_share([1, 1, 1, 1, 1, 1]) == pytest.approx(1 / 3)
    assert loops([1, 2, 3] * WINDOW) and not loops(list(range(2 * WINDOW))) and not loops([1] * (WINDOW - 1))
    assert repeated_share([list(range(20)), list(range(20))]) == 0.5 and repeated_share([[1]]) == 0


def test_an_architecture_without_a_definition_is_run_by_transformers(add_tokenizer, tmp_path):
    path = olmo(tmp_path / "olmo", max_position_embeddings=64)
    add_tokenizer(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = calibration_sequences("self", tokenizer=tokenizer, model_path=path, samples=3, sequence_length=80, seed=1)
    assert found.sequences.shape == (3, 80) and found.provenance["writer"] == "transformers"
    assert found.provenance["sampling"]["temperature"] == SelfSampling().temperature
    assert found.source == "the model's own text: 3 sequences of documents, 0 of conversations"
    again = calibration_sequences("self", tokenizer=tokenizer, model_path=path, samples=3, sequence_length=80, seed=1)
    assert torch.equal(found.sequences, again.sequences)


@pytest.mark.parametrize("lanes_of", [EngineLanes, TransformersLanes])
def test_lanes_are_separate_texts(tiny, lanes_of):
    """Every lane's logits are those of its own text alone: texts of different lengths, one begun anew, one lane idle."""
    from cai_runtime.stock.load import dense_reference

    options = {"context": 32, "progress": False} if lanes_of is EngineLanes else {}
    model = lanes_of(tiny, lanes=3, device="cpu", **options)
    reference = dense_reference(tiny)
    texts = {0: [5, 6, 7, 8, 9, 10], 1: [20, 21], 2: [30, 31, 32, 33]}
    plan = [(0, 1, 2), (0, 1, 2), (0, 2), (0, 2), (0,), (0,)]
    try:
        for _ in range(2):
            model.begin_wave()
            at = dict.fromkeys(texts, 0)
            for step in [*plan, (1, 2), (1, 2)]:
                for lane in step:
                    at[lane] %= len(texts[lane])  # past its end a text begins anew in its lane
                got = model.logits([Feed(lane, [texts[lane][at[lane]]], at[lane]) for lane in step])
                for lane, row in zip(step, got, strict=True):
                    ids = torch.tensor([texts[lane][: at[lane] + 1]])
                    want = reference(input_ids=ids).logits[0, -1].detach()
                    torch.testing.assert_close(torch.from_numpy(row), want, rtol=1e-4, atol=1e-4)
                    at[lane] += 1
    finally:
        model.close()


def test_a_model_that_does_not_fit_is_refused(tiny, tokenizer, monkeypatch):
    monkeypatch.setattr("cai_runtime.engine.memory.available_memory", lambda kind: 1 << 10)
    with pytest.raises(CompressionError, match="MiB to write its own calibration text.*give a text file"):
        write(tiny, tokenizer)


def test_a_model_without_a_mask_is_refused(tiny, monkeypatch):
    class Bare(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    monkeypatch.setattr("cai_runtime.stock.load.dense_reference", lambda *_, **__: Bare())
    with pytest.raises(CompressionError, match="Bare takes no KV cache, no attention_mask, no position_ids"):
        next_token.TransformersLanes(tiny, lanes=2, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be above 0"),
        ({"start_temperature": -1}, "start_temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"chat_share": 2}, "chat_share"),
        ({"turns": 0}, "turns"),
        ({"lanes": 0}, "lanes"),
        ({"start_tokens": 0}, "start_tokens"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(CompressionError, match=message):
        SelfSampling(**options)
