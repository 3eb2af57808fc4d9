"""The pure-Python parts behind the demo model: text generators, chat format, judging, the 5-gram baseline."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flashmoe.chat import ChatTemplate
from tools.demo_model import chatformat, tokenizer
from tools.demo_model.cases import judge, make_cases, parse_call
from tools.demo_model.config import ModelConfig
from tools.demo_model.ngram import KneserNey
from tools.demo_model.synth import HELD_OUT_SEED, KINDS, MORE_KINDS, generate, tools
from tools.demo_model.synth.grammar import article, choose, expand, fill
from tools.demo_model.synth.story import COMMON, PLOTS, world
from tools.demo_model.tokens import split_document


def test_grammar():
    rng = random.Random(0)
    assert {choose(rng, "[a|[b|c]]d") for _ in range(50)} == {"ad", "bd", "cd"}
    assert fill("{^x} and {x.y}", {"x": "one", "x.y": "two"}) == "One and two"
    assert expand(rng, " a  [|] b ") == "a b"
    assert article("otter") == "an otter" and article("fox") == "a fox"
    with pytest.raises(KeyError):
        fill("{nobody}", {})


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
def test_generators_are_deterministic_and_varied(kind):
    docs = [generate(kind, seed) for seed in range(200)]
    assert docs == [generate(kind, seed) for seed in range(200)]
    assert len(set(docs)) > (150 if kind in ("qa", "opening") else 195)
    for doc in docs:
        assert doc == doc.strip() and "{a" not in doc
        assert kind == "json" or "  " not in doc
        assert doc.count(chatformat.IM_START) == doc.count(chatformat.IM_END)
        doc.encode("ascii")


def test_every_story_line_expands():
    rng = random.Random(1)
    for lines in [*PLOTS.values(), COMMON["intro"], COMMON["close"]]:
        for line in lines:
            for _ in range(30):
                text = expand(rng, line, world(rng))
                assert "[" not in text and "|" not in text and "{" not in text


def test_held_out_cases_are_not_training_documents():
    held_out = {generate("tool", HELD_OUT_SEED + i) for i in range(100)}
    assert held_out.isdisjoint(generate("tool", i) for i in range(2000))


def conversations():
    schema = tools.instance(random.Random(3), tools.FAMILIES["event"])[0]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "x é", "n": 3, "l": ["p"], "b": True}}}
    user = {"role": "user", "content": " Hello  "}
    yield [user], None
    yield [{"role": "system", "content": "Be kind."}, user], None
    yield [{"role": "system", "content": "Be kind."}, user], [schema, schema]
    yield [user, {"role": "assistant", "content": "", "tool_calls": [call]},
           {"role": "tool", "content": "{}"}, {"role": "tool", "content": "[1]"}], [schema]
    yield [user, {"role": "assistant", "content": "So:", "tool_calls": [call, call]}, {"role": "tool", "content": "1"},
           {"role": "assistant", "content": "Done."}, user], [schema]


@pytest.mark.parametrize(("messages", "offered"), list(conversations()))
@pytest.mark.parametrize("prompt", [False, True])
def test_template_equals_training_format(messages, offered, prompt):
    template = ChatTemplate(chatformat.CHAT_TEMPLATE, "demo", {})
    text = template.render(messages, tools=offered, add_generation_prompt=prompt)
    assert text == chatformat.render_chat(messages, offered, prompt)
    assert "<think>" not in text


def test_template_drops_old_thoughts():
    template = ChatTemplate(chatformat.CHAT_TEMPLATE, "demo", {})
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nr\n</think>\n\na"},
                {"role": "user", "content": "q"}]
    assert "<|im_start|>assistant\na<|im_end|>" in template.render(messages, add_generation_prompt=True)


@pytest.mark.parametrize("kind", ["tool", "unseen tool", "json", "qa"])
def test_gold_answers_are_judged_exact(kind):
    for case in make_cases(kind, 100):
        assert judge(case, case.answer + chatformat.IM_END) == (True, True)
        assert judge(case, "No.")[1] is False
        assert case.prompt.endswith("<|im_start|>assistant\n")


def test_calls_are_typed_by_the_schema():
    text = chatformat.render_call("f", {"n": 3, "s": "3", "l": ["a", "b"], "b": True})
    schema = {"n": {"type": "integer"}, "s": {"type": "string"}, "l": {"type": "array"}, "b": {"type": "boolean"}}
    assert parse_call(text, schema) == ("f", {"n": 3, "s": "3", "l": ["a", "b"], "b": True})
    assert parse_call(text.replace("</function>", "")) is None
    assert parse_call(text.replace("3", "x", 1), schema) is None


def test_unseen_families_share_no_name_with_training():
    def names(families):
        return {name for family in families.values() for name in family[0].split("|")}

    assert names(tools.UNSEEN).isdisjoint(names(tools.FAMILIES))


def test_kneser_ney_sums_to_one_and_uses_context():
    rng = np.random.default_rng(0)
    text = np.tile(rng.integers(0, 9, 60), 5)
    model = KneserNey([text[:200], text[200:]], order=4, vocab=9)
    for context in ([1, 2, 3], [5], text[3:7].tolist()):
        assert sum(model.probability([*context, w])[-1] for w in range(9)) == pytest.approx(1)
    assert model.perplexity(text) < 1.6 < 6 < model.perplexity(rng.integers(0, 9, 300))


def test_split_document():
    text = "\n\n".join(["x" * 90] * 10)
    pieces = split_document(text, 200)
    assert "\n\n".join(pieces) == text and max(map(len, pieces)) <= 200


def test_config_round_trip():
    config = ModelConfig(hidden_size=64, num_experts=8)
    stored = json.loads(json.dumps(config.checkpoint_config()))
    assert ModelConfig.from_checkpoint(stored) == config
    assert stored["text_config"]["layer_types"].count("full_attention") == 2
    assert stored["text_config"]["rope_parameters"]["mrope_section"] == [11, 11, 10]


def test_only_conversation_tokens_are_special():
    added = [{"content": t, "special": True} for t in tokenizer.SPECIAL + tokenizer.MARKERS]
    out = tokenizer.unmark_special({"added_tokens": added})["added_tokens"]
    assert [t["content"] for t in out if t["special"]] == tokenizer.SPECIAL


# ---- the shipped model itself ----

ROOT = Path(__file__).resolve().parent.parent
BF16 = ROOT / "assets" / "demo-bf16"
PACKED = ROOT / "flashmoe" / "demo"
GOLDEN = ROOT / "tests" / "golden" / "demo"
needs_bf16 = pytest.mark.skipif(not (BF16 / "config.json").is_file(), reason="the BF16 original is not in this tree")


@pytest.fixture(scope="module")
def engines():
    """Open engines by folder, each once."""
    from flashmoe import Engine

    opened = {}

    def get(path):
        if path not in opened:
            opened[path] = Engine(path, memory="2GiB", context=512, threads=2)
        return opened[path]

    yield get
    for engine in opened.values():
        engine.close()


@needs_bf16
@pytest.mark.parametrize("prompt", ["story", "chat", "prose"])
def test_engine_equals_float64_on_the_trained_model(engines, prompt):
    golden = np.load(GOLDEN / "golden.npz")
    ids, greedy = golden[f"{prompt}.ids"].tolist(), golden[f"{prompt}.greedy_tokens"].tolist()
    logits = engines(BF16).logits(ids + greedy)
    # bound: logits reach 33, transformers in float32 differs by 2.5e-5
    assert np.abs(logits - golden[f"{prompt}.logits_f64"]).max() < 1e-3
    assert logits.argmax(-1)[len(ids) - 1:-1].tolist() == greedy


def test_packed_model_answers(engines):
    messages = [{"role": "user", "content": "What is the capital of Italy?"}]
    answer = engines(PACKED).generate(messages, max_tokens=20, temperature=0)
    assert (answer.text.strip(), answer.finish_reason) == ("The capital of Italy is Rome.", "stop")


@pytest.mark.parametrize("kind", ["tool", "json"])
def test_packed_model_is_exact_on_held_out_cases(engines, kind):
    engine, n = engines(PACKED), 8
    encode = engine.tokenizer.encode
    exact = 0
    for case in make_cases(kind, n):
        out = engine.generate(list(encode(case.prompt)), max_tokens=120, temperature=0)
        exact += judge(case, out.text)[1]
    assert exact >= 0.75 * n


def test_packed_model_stays_small():
    files = [f for f in PACKED.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 25e6
    assert {"MODEL_CARD.md", "LICENSES.md", "flashmoe.json", "tokenizer.json"} <= {f.name for f in files}
