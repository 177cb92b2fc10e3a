"""Images and audio in conversations: what is malformed is named by its place, what the model lacks by its capability."""

import base64
import os
from dataclasses import replace

import pytest

from cai_runtime import BadRequestError
from cai_runtime.engine.output import TextOutput
from cai_runtime.errors import ConversationError
from cai_runtime.formats import media
from cai_runtime.formats.base import Capabilities
from cai_runtime.formats.conversation import Prepared
from cai_runtime.formats.media import Media, RemoteMedia
from cai_runtime.formats.messages import Message, parse_messages

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
JPEG, GIF, WEBP = b"\xff\xd8\xff\xe0", b"GIF89a..", b"RIFF\0\0\0\0WEBPVP8 "
WAV, MP3, TAGGED_MP3 = b"RIFF\0\0\0\0WAVEfmt ", b"\xff\xfb\x90\x00", b"ID3\x04"


def uri(content=PNG, media_type="image/png"):
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def image(url, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def audio(data, format="wav"):
    return {"type": "input_audio", "input_audio": {"data": data, "format": format}}


def encoded(content):
    return base64.b64encode(content).decode()


def user(*parts):
    return [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, *parts]}]


def parts_of(*parts):
    return parse_messages(user(*parts))[0].content[1:]


def test_what_is_taken(tmp_path):
    (tmp_path / "a b.png").write_bytes(PNG)
    (tmp_path / "ä.wav").write_bytes(WAV)
    path = tmp_path / "a b.png"
    assert parts_of(
        image(uri()),
        image(uri(JPEG, "image/jpg"), detail="low"),
        image(uri(GIF, "image/GIF").replace("data", "DATA")),
        image(uri(WEBP, "image/webp")),
        image(f"file:{path}"),
        image(path.as_uri()),
        audio(encoded(WAV)),
        audio(encoded(MP3), "mp3"),
        audio(uri(TAGGED_MP3, "audio/mp3"), "mp3"),
        audio(f"file:{tmp_path / 'ä.wav'}"),
        image("HTTPS://example.com/a.png"),
        audio("http://example.com/a", "mp3"),
    ) == (
        Media("image", PNG, "image/png"),
        Media("image", JPEG, "image/jpeg", "low"),
        Media("image", GIF, "image/gif"),
        Media("image", WEBP, "image/webp"),
        Media("image", PNG, "image/png"),
        Media("image", PNG, "image/png"),
        Media("audio", WAV, "audio/wav"),
        Media("audio", MP3, "audio/mpeg"),
        Media("audio", TAGGED_MP3, "audio/mpeg"),
        Media("audio", WAV, "audio/wav"),
        RemoteMedia("image", "HTTPS://example.com/a.png"),
        RemoteMedia("audio", "http://example.com/a", "audio/mpeg"),
    )


URL, DATA = "image_url.url", "input_audio.data"


@pytest.mark.parametrize(
    ("part", "place"),
    [
        ({"type": "image_url"}, "image_url"),
        ({"type": "image_url", "image_url": uri()}, "image_url"),
        ({"type": "image_url", "image_url": {"detail": "low"}}, URL),
        ({**image(uri()), "extra": 1}, "extra"),
        (image(uri(), size=3), "image_url.size"),
        (image(uri(), detail="best"), "image_url.detail"),
        (image(uri(), detail=[1]), "image_url.detail"),
        (image(3), URL),
        (image(b"file:x"), URL),
        (image(""), URL),
        (image("picture.png"), URL),
        (image("ftp://example.com/a.png"), URL),
        (image("http:a.png"), URL),
        (image("data:"), URL),
        (image("data:image/png;base64,"), URL),
        (image("data:image/png," + encoded(PNG)), URL),
        (image("data:image/png;charset=utf-8," + encoded(PNG)), URL),
        (image(uri()[:-1]), URL),
        (image(uri() + "AAAA"), URL),
        (image(uri().replace("base64,", "base64,\n")), URL),
        (image(uri() + "é"), URL),
        (image(uri(media_type="image/jpeg")), URL),
        (image(uri(media_type="image/svg+xml")), URL),
        (image(uri(media_type="text/plain")), URL),
        (image(uri(b"<svg></svg>")), URL),
        (image(uri(WAV, "audio/wav")), URL),
        (image("file:"), URL),
        (image("file:/no/such/file"), URL),
        (image("file://elsewhere/a.png"), URL),
        (image("file:///tmp/%00"), URL),
        (image("file:///tmp/%ff"), URL),
        ({"type": "input_audio"}, "input_audio"),
        ({"type": "input_audio", "input_audio": {"data": encoded(WAV)}}, "input_audio.format"),
        (audio(encoded(WAV), "flac"), "input_audio.format"),
        (audio(encoded(WAV), ["wav"]), "input_audio.format"),
        (audio(""), DATA),
        (audio(encoded(WAV)[:-1]), DATA),
        (audio(encoded(MP3)), DATA),
        (audio(encoded(WAV), "mp3"), DATA),
        (audio(uri(WAV, "audio/wav"), "mp3"), DATA),
        (audio(uri()), DATA),
        (audio(encoded(b"\xff\xe8\x90\x00"), "mp3"), DATA),
    ],
)  # fmt: skip
def test_malformed_parts_are_named_before_a_model_opens(client, factory, part, place):
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(messages=user(part))
    assert caught.value.param == f"messages[0].content[1].{place}" and factory.opened == []


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    for name in ("", "pipe", "empty.png", "text.png"):
        with pytest.raises(ConversationError, match="no file|empty|first bytes") as caught:
            parts_of(image(f"file:{tmp_path / name}"))
        assert caught.value.param == "messages[0].content[1].image_url.url"


def test_sizes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setitem(media.MAX_BYTES, "image", len(PNG))
    assert parts_of(image(uri()))
    (tmp_path / "large.png").write_bytes(PNG + b"!")
    for source in (uri(PNG + b"!"), uri(PNG + bytes(9)), f"file:{tmp_path / 'large.png'}"):
        with pytest.raises(ConversationError, match="is larger than"):
            parts_of(image(source))


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "tool"])
def test_other_roles_have_text_alone(role):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    before = [{"role": "assistant", "tool_calls": [call]}] if role == "tool" else []
    message = {"role": role, "content": [image(uri())], **({"tool_call_id": "c"} if role == "tool" else {})}
    with pytest.raises(ConversationError, match=f"role '{role}' can't have image_url") as caught:
        parse_messages([*before, message])
    assert caught.value.param == f"messages[{len(before)}].content[0]"


@pytest.mark.parametrize(
    ("part", "capability", "code"),
    [
        (image(uri()), "supports_image", "image_not_supported"),
        (audio(encoded(WAV)), "supports_audio", "audio_not_supported"),
    ],
)
def test_a_model_refuses_by_the_capability(client, part, capability, code):
    assert client.models.retrieve("abc").model_dump()["capabilities"][capability] is False
    with pytest.raises(BadRequestError, match=f"'{capability}'") as caught:
        client.chat.completions.create(messages=user(part))
    assert (caught.value.param, caught.value.code) == ("messages[0].content[1]", code)
    assert client.engine().stats().prompt_tokens == 0


@pytest.mark.parametrize(
    ("part", "place", "code"),
    [
        ({"type": "input_image", "image_url": uri()}, "", "image_not_supported"),
        ({"type": "input_image", "image_url": uri()[:-1], "detail": "low"}, ".image_url", "invalid_value"),
        ({"type": "input_image", "image_url": uri(), "detail": "best"}, ".detail", "invalid_value"),
        ({"type": "input_image", "image_url": "https://example.com/a.png"}, "", "invalid_value"),
        (audio(encoded(WAV)), "", "audio_not_supported"),
        (audio(encoded(MP3)), ".input_audio.data", "invalid_value"),
    ],
)
@pytest.mark.parametrize("truncation", ["auto", "disabled"])
def test_responses_refuse_the_same_by_their_own_places(client, part, place, code, truncation):
    content = [{"type": "input_text", "text": "a"}, part]
    given = [{"role": "system", "content": "x"}, {"role": "user", "content": content}]
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(input=given, instructions="be brief", truncation=truncation)
    assert (caught.value.param, caught.value.code) == (f"input[1].content[1]{place}", code)


class SeeingFormat:
    """Takes images; a prompt is the alphabet's first letter."""

    name = "seeing"
    capabilities = Capabilities(media=frozenset({"image"}))

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.seen = []

    def prepare(self, conversation):
        self.seen += [part for message in conversation.messages for part in message.media]
        return Prepared(self._tokenizer.encode("a"), TextOutput)


@pytest.fixture
def seeing(new_client, model_dir, tokenizer):
    """(client, format) of a model that takes images, with a fetcher."""

    def make(fetcher):
        client = new_client("abc", models={"abc": model_dir}, fetcher=fetcher)
        format = SeeingFormat(tokenizer)
        client._host.open(client._host.resolve(None)).__dict__["format"] = format
        return client, format

    return make


def test_a_model_that_takes_images_gets_them(seeing):
    fetched = []
    client, format = seeing(lambda url: fetched.append(url) or JPEG)
    remote = image("https://example.com/a", detail="high")
    client.chat.completions.create(messages=user(image(uri()), remote, remote), max_tokens=1)
    picture = Media("image", JPEG, "image/jpeg", "high")
    assert format.seen == [Media("image", PNG, "image/png"), picture, picture]
    assert fetched == ["https://example.com/a"]


@pytest.mark.parametrize(
    ("fetcher", "message"),
    [
        (lambda url: 1 / 0, "ZeroDivisionError"),
        (lambda url: "text", "must return bytes, got str"),
        (lambda url: b"", "is empty"),
        (lambda url: WAV, "must be of the type image/png"),
    ],
)
def test_what_a_fetcher_does_wrong(seeing, fetcher, message):
    client, _ = seeing(fetcher)
    with pytest.raises(BadRequestError, match=message) as caught:
        client.chat.completions.create(messages=user(image("https://example.com/a")))
    assert caught.value.param == "messages[0].content[1]"


def test_nothing_is_fetched_for_a_model_that_can_not_take_it(seeing):
    client, _ = seeing(pytest.fail)
    with pytest.raises(BadRequestError, match="supports_audio"):
        client.chat.completions.create(messages=user(image("https://example.com/a"), audio("https://example.com/b")))


def test_without_a_fetcher_addresses_are_refused(client):
    with pytest.raises(BadRequestError, match=r"Client\(fetcher=\.\.\.\)"):
        client.chat.completions.create(messages=user(image("https://example.com/a")))


def test_a_fetcher_must_be_callable(new_client):
    with pytest.raises(TypeError, match="fetcher must be callable"):
        new_client(fetcher="curl")


def test_texts_of_a_message_leave_media_out():
    message = Message("user", ("a", Media("image", PNG, "image/png"), "b"))
    assert (message.text, message.characters) == ("a\nb", 2)
    assert replace(message, content="a").media == ()
