"""Text to ids and back; above all, text that grows without ever showing half a character."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from flashmoe.errors import ArgumentError, ModelFileError, TokenizerError
from flashmoe.tokenizer import Tokenizer

TEXTS = [
    "", " ", "Hello, world!", "naïve café", "日本語のテキスト", "👩‍👩‍👧‍👦 family",
    "a\u0301 combining", "tabs\tand\r\nlines\n\n", "\x00\x7f control", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "مرحبا", "12345 67",
]  # fmt: skip


@pytest.fixture(scope="module")
def byte_level(noise_model):
    return Tokenizer(noise_model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A byte-level BPE with merges and odd added tokens, trained on the spot."""
    t = Backend(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    t.train_from_iterator(TEXTS * 20, trainer)
    t.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<ünïcode tag>")])
    return _save(t, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    """Like the tokenizers of Llama and Mixtral: pieces with ▁ and <0xXX> for other bytes."""
    words = ["▁Hello", "▁world", "▁", "a", "b", ",", "!", "▁caf"]
    vocab = {f"<0x{b:02X}>": b for b in range(256)} | {w: 256 + i for i, w in enumerate(words)}
    t = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    t.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _save(t, tmp_path_factory.mktemp("fallback"))


def _save(backend, folder) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def grow(tokenizer, ids, **options):
    stream = tokenizer.detokenizer(**options)
    pieces = [stream.feed(i) for i in ids]
    return pieces, stream.flush()


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text, byte_level, trained):
    for tokenizer in (byte_level, trained):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        pieces, rest = grow(tokenizer, ids)
        assert rest == ""
        assert "".join(pieces) == text
        assert not any("�" in p for p in pieces)


def test_pieces_end_on_whole_characters(byte_level):
    ids = byte_level.encode("é日👩")
    pieces, _ = grow(byte_level, ids)
    assert pieces == ["", "é", "", "", "日", "", "", "", "👩"]


def test_growing_equals_the_library_on_random_ids(byte_level, trained):
    """Ids in no sensible order: broken bytes, cut characters, added tokens in between."""
    rng = random.Random(1)
    for tokenizer in (byte_level, trained):
        backend = Backend.from_file(str(tokenizer.path / "tokenizer.json"))
        for _ in range(300):
            ids = [rng.randrange(tokenizer.n_vocab) for _ in range(rng.randrange(1, 20))]
            pieces, rest = grow(tokenizer, ids, skip_special_tokens=False)
            assert "".join(pieces) + rest == backend.decode(ids, skip_special_tokens=False)


def test_broken_bytes_do_not_hold_text_back(byte_level):
    pieces, rest = grow(byte_level, [0xC3, 0x41, 0xFF, 0x42, 0xE6, 0x97])
    assert pieces == ["", "�A", "�", "B", "", ""]
    assert rest == "�"


def test_flush_starts_anew(byte_level):
    stream = byte_level.detokenizer()
    assert (stream.feed(0xC3), stream.flush(), stream.feed(0x41)) == ("", "�", "A")


def test_special_tokens_are_left_out_added_ones_stay(trained):
    ids = trained.encode("a<|end|><think>b<ünïcode tag>")
    assert trained.decode(ids) == "a<think>b<ünïcode tag>"
    assert trained.decode(ids, skip_special_tokens=False) == "a<|end|><think>b<ünïcode tag>"


def test_byte_fallback_decoder(byte_fallback):
    vocab = {w: byte_fallback.token_to_id(w) for w in ("▁Hello", ",", "▁world", "!", "▁caf")}
    ids = [vocab["▁Hello"], vocab[","], vocab["▁world"], vocab["!"], vocab["▁caf"], 0xC3, 0xA9]
    pieces, rest = grow(byte_fallback, ids)
    assert pieces[:5] == ["Hello", ",", " world", "!", " caf"]
    assert "".join(pieces) + rest == "Hello, world! café"
    pieces, rest = grow(byte_fallback, [0xFF] * 20)  # never a character: shown all the same
    assert set("".join(pieces) + rest) == {"�"}


def test_padding_ids_have_no_text(byte_level):
    assert byte_level.n_vocab == 259
    assert byte_level.decode([65, 300, 66]) == "AB"
    assert byte_level.id_to_token(300) is None


def test_end_token(byte_level, tmp_path, noise_model):
    assert byte_level.eos_ids == {258}
    (tmp_path / "tokenizer.json").write_text((noise_model / "tokenizer.json").read_text())
    assert Tokenizer(tmp_path).eos_ids == frozenset()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert Tokenizer(tmp_path).eos_ids == {258}


def test_special_tokens_by_post_processor(noise_model, tmp_path):
    """What the checkpoint adds by itself (a BOS) comes with text, not with template output."""
    spec = json.loads((noise_model / "tokenizer.json").read_text())
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [257],
                                            "tokens": ["<|im_start|>"]}},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("A") == [257, 65]
    assert tokenizer.encode("A", add_special_tokens=False) == [65]


def test_refusals(tmp_path, byte_level):
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    with pytest.raises(ArgumentError, match="str"):
        byte_level.encode(b"bytes")
    with pytest.raises(ArgumentError, match="not valid Unicode"):
        byte_level.encode("\ud800")
