"""The LLM: conventions, and answers that are the engine's own however they are asked for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from llama_index.core import PromptTemplate, Settings
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock, ThinkingBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.llms.cacheclip import CacheClipLLM
from transformers import AutoModelForCausalLM

from cacheclip_rag import Backbone, ConfigurationError, Engine, PromptError
from cacheclip_rag.frameworks.options import ENGINES_OWN
from cacheclip_rag.weights.pull import resolve


def test_class() -> None:
    assert BaseLLM.__name__ in [base.__name__ for base in CacheClipLLM.__mro__]
    assert CacheClipLLM.class_name() == "CacheClipLLM"


async def test_every_way_of_asking_gives_the_answer_of_the_engine(smollm2: Engine, prompt: str) -> None:
    llm = CacheClipLLM.from_engine(smollm2, max_new_tokens=6)
    messages = [ChatMessage(prompt)]
    template = smollm2.backbone.chat([{"role": "user", "content": prompt}])
    expected = smollm2.generate(template, max_new_tokens=6)
    assert expected.text.strip() and len(expected.report.chunks) == 3

    responses = [
        llm.complete(prompt),
        llm.complete(template, formatted=True),
        await llm.acomplete(prompt),
        list(llm.stream_complete(prompt))[-1],
        [r async for r in await llm.astream_complete(prompt)][-1],
    ]
    chats = [
        llm.chat(messages),
        await llm.achat(messages),
        list(llm.stream_chat(messages))[-1],
        [r async for r in await llm.astream_chat(messages)][-1],
    ]
    assert {r.text for r in responses} == {expected.text}
    assert {c.message.content for c in chats} == {expected.text}
    assert {c.message.role for c in chats} == {MessageRole.ASSISTANT}
    for response in [*responses, *chats]:
        # prefix is what an earlier call left behind, so only the sum is the same
        assert response.raw["usage"]["prompt_tokens"] == expected.report.prompt_tokens
        assert response.raw["usage"]["completion_tokens"] == expected.report.completion_tokens
        assert [c["key"] for c in response.raw["cacheclip"]["chunks"]] == [c.key for c in expected.report.chunks]


def test_predict_uses_the_chat_template_once(llm: CacheClipLLM, engine: Engine, recorder: Any) -> None:
    calls = recorder(engine)
    llm.predict(PromptTemplate("Say {word}."), word="hello")
    assert calls.prompts == [engine.backbone.chat([{"role": "user", "content": "Say hello."}])]


@pytest.mark.behaviour("LlamaIndex", "own prompt functions")
def test_own_prompt_functions_are_respected(engine: Engine, recorder: Any) -> None:
    llm = CacheClipLLM.from_engine(
        engine,
        max_new_tokens=2,
        messages_to_prompt=lambda messages: "M:" + str(messages[0].content),
        completion_to_prompt=lambda text: "C:" + text,
    )
    calls = recorder(engine)
    llm.complete("a")
    llm.complete("b", formatted=True)
    llm.chat([ChatMessage("c")])
    assert calls.prompts == ["C:a", "b", "M:c"]


def test_stream_pieces(llm: CacheClipLLM) -> None:
    pieces = list(llm.stream_complete("Tell me."))
    assert "".join(p.delta or "" for p in pieces) == pieces[-1].text == llm.complete("Tell me.").text
    assert [p.text for p in pieces] == ["".join(q.delta or "" for q in pieces[: i + 1]) for i in range(len(pieces))]
    assert all(p.raw["usage"]["prompt_tokens"] for p in pieces)
    assert pieces[-1].raw["cacheclip"]["finish_reason"] == "length"


@pytest.mark.behaviour("LlamaIndex", "ratio 1 is plain transformers, token for token")
def test_full_recompute_is_plain_transformers(smollm2: Engine, prompt: str) -> None:
    text = smollm2.backbone.chat([{"role": "user", "content": prompt}])
    model = AutoModelForCausalLM.from_pretrained(resolve("smollm2-135m-instruct"), dtype=torch.float32)
    ids = smollm2.backbone.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected = smollm2.backbone.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    llm = CacheClipLLM.from_engine(smollm2, max_new_tokens=12)
    answer = llm.complete(prompt, recompute_ratio=1)
    assert answer.text == expected
    assert answer.raw["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_reuse_is_what_happens_otherwise(smollm2: Engine, prompt: str) -> None:
    report = CacheClipLLM.from_engine(smollm2, max_new_tokens=1, recompute_ratio=0.1).complete(prompt).raw["cacheclip"]
    assert report["reused"] > report["recomputed"] > 0 and report["ratio"] == pytest.approx(0.1, abs=0.01)
    assert not report["fallbacks"]


def test_options_reach_the_engine(informed: Engine, prompt: str) -> None:
    llm = CacheClipLLM.from_engine(informed, max_new_tokens=12, recompute_ratio=0.3)
    plain = llm.complete(prompt)
    assert plain.raw["cacheclip"]["requested_ratio"] == 0.3
    assert llm.complete(prompt, max_tokens=2).raw["usage"]["completion_tokens"] == 2
    naive = llm.complete(prompt, method="naive").raw["cacheclip"]
    assert naive["method"] == "naive" and naive["recomputed"] == 0
    assert naive["requested_ratio"] == 0  # the fields' ratio belongs to the fields' method
    stop = plain.text[9:12]
    assert llm.complete(prompt, stop=[stop]).text == plain.text[: plain.text.index(stop)]
    torch.manual_seed(1)
    assert len({llm.complete(prompt, temperature=5.0, top_k=0).text for _ in range(3)}) > 1
    assert llm.complete(prompt, top_p=0.5).text == plain.text  # greedy stays greedy


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "hot"},
        {"temperature": -1},
        {"temperature": True},
        {"top_p": 2},
        {"max_new_tokens": 0},
        {"max_tokens": "many"},
        {"stop": 3},
        {"recompute_ratio": 1.5},
        {"method": "magic"},
        {"temprature": 0.5},
        {"recompute_ration": 0.5},
    ],
)
@pytest.mark.parametrize("ask", ["complete", "stream_complete"])
def test_nonsense_is_refused_at_once(llm: CacheClipLLM, ask: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        getattr(llm, ask)("Hello.", **options)


def test_foreign_keywords_are_left_out(llm: CacheClipLLM) -> None:
    assert llm.complete("Hello.", tools=[], response_format={"type": "text"}).text == llm.complete("Hello.").text


@pytest.mark.parametrize(
    "fields", [{"method": "magic"}, {"recompute_ratio": 7}, {"recompute_ration": 0.5}, {"kv_dtype": "int8"}]
)
def test_nonsense_fields_are_refused_before_weights_are_loaded(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        CacheClipLLM(model_name="there-is-no-such-model", **fields)


def test_options_that_only_an_engine_has_are_refused_by_name() -> None:
    """Every option of an engine is a field, goes by another name, or is refused: none is left out in silence."""
    options = set(inspect.signature(Engine).parameters) - {"model", "store"}
    assert options == ENGINES_OWN - {"store"} | options & CacheClipLLM.model_fields.keys()
    with pytest.raises(ConfigurationError, match=r'"kv_dtype" is an option of the engine: .* from_engine'):
        CacheClipLLM("there-is-no-such-model", kv_dtype="int8")


def test_options_of_the_engines_decoding_reach_it(llm: CacheClipLLM) -> None:
    plain = llm.complete("Hello.", max_tokens=4).text
    first = llm.engine.generate(llm.engine.backbone.chat([{"role": "user", "content": "Hello."}])).ids[0]
    banned = llm.complete("Hello.", max_tokens=4, bad_words_ids=[[first]]).text
    assert banned != plain
    for refused in ({"num_beams": 3}, {"max_length": 9}, {"num_return_sequences": 2}):
        with pytest.raises(ConfigurationError, match="not possible here"):
            llm.complete("Hello.", **refused)


@pytest.mark.parametrize(
    ("field", "message"),
    [({"min_p": 0.5}, "is an option of a call"), ({"stop_sequences": ["."]}, 'did you mean "stop"')],
)
def test_options_of_a_call_are_no_fields(field: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CacheClipLLM("there-is-no-such-model", **field)


def test_the_other_frameworks_names_of_fields() -> None:
    llm = CacheClipLLM(model="there-is-no-such-model", max_tokens=5, temperature="0.5")
    assert (llm.model_name, llm.max_new_tokens, llm.temperature) == ("there-is-no-such-model", 5, 0.5)


def test_the_temperature_of_the_fields_holds_for_a_call_that_samples(llm: CacheClipLLM) -> None:
    assert llm.model_copy(update={"temperature": 0.3})._options({"do_sample": True})["temperature"] == 0.3
    assert "temperature" not in llm.model_copy(update={"temperature": 0.0})._options({"do_sample": True})


def test_a_conversation_that_the_template_refuses_is_told(llm: CacheClipLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(llm.engine.backbone.tokenizer, "chat_template", template)
    with pytest.raises(PromptError, match="roles must alternate"):
        llm.chat([ChatMessage("Hello.")])


def test_what_an_answer_holds_beside_its_text_is_not_said_again(llm: CacheClipLLM) -> None:
    history = [ChatMessage("Hello."), ChatMessage("Good day.", role="assistant"), ChatMessage("Who are you?")]
    thought = ChatMessage(role="assistant", blocks=[ThinkingBlock(content="Hm."), TextBlock(text="Good day.")])
    assert llm.messages_to_prompt([history[0], thought, history[2]]) == llm.messages_to_prompt(history)


def test_images_are_refused(llm: CacheClipLLM) -> None:
    with pytest.raises(PromptError, match="image"):
        llm.chat([ChatMessage(blocks=[ImageBlock(image=b"0")])])


def test_metadata(llm: CacheClipLLM, engine: Engine) -> None:
    assert llm.metadata.context_window == engine.backbone.context_length == 4096
    assert llm.metadata.num_output == 6 and llm.metadata.is_chat_model
    assert CacheClipLLM.from_engine(engine, context_window=1000).metadata.context_window == 1000
    assert llm.tokenizer_fn("two words") == engine.backbone.tokenizer("two words", add_special_tokens=False).input_ids


def test_a_model_without_chat_template_gets_the_bare_text(tiny_backbone: Backbone, recorder: Any) -> None:
    tokenizer = type(tiny_backbone.tokenizer).from_pretrained(resolve("smollm2-135m-instruct"))
    tokenizer.chat_template = None
    with Engine(Backbone(tiny_backbone.model, tokenizer), method="query_guided") as engine:
        calls = recorder(engine)
        llm = CacheClipLLM.from_engine(engine, max_new_tokens=2)
        assert not llm.metadata.is_chat_model
        llm.complete("Once upon a time")
        assert calls.prompts == ["Once upon a time"]


@pytest.mark.behaviour("LlamaIndex", "callbacks and usage: every call is counted once, streamed or not")
async def test_one_event_and_the_right_count_per_call(llm: CacheClipLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = TokenCountingHandler(tokenizer=lambda text: pytest.fail("counted by hand"))
    monkeypatch.setattr(Settings, "_callback_manager", CallbackManager([handler]))
    llm.callback_manager = CallbackManager([handler])
    message = [ChatMessage("Count me.")]

    async def drained(stream: Any) -> None:
        async for _ in stream:
            pass

    for ask in [
        lambda: llm.complete("Count me."),
        lambda: llm.chat(message),
        lambda: list(llm.stream_complete("Count me.")),
        lambda: list(llm.stream_chat(message)),
        lambda: llm.acomplete("Count me."),
        lambda: llm.achat(message),
        lambda: llm.astream_complete("Count me."),
        lambda: llm.astream_chat(message),
    ]:
        handler.reset_counts()
        result = ask()
        if hasattr(result, "__await__"):
            result = await result
        if hasattr(result, "__aiter__"):
            await drained(result)
        report = llm.last_report()
        assert report is not None and len(handler.llm_token_counts) == 1
        assert handler.prompt_llm_token_count == report.prompt_tokens
        assert handler.completion_llm_token_count == report.completion_tokens == 6


@pytest.mark.behaviour("LlamaIndex", "prompts longer than the window: a clear error, and the next request is served")
async def test_a_prompt_beyond_the_window_is_an_error_and_the_next_one_is_served(narrow_backbone: Backbone) -> None:
    with Engine(narrow_backbone, method="query_guided") as engine:
        llm, long = CacheClipLLM.from_engine(engine, max_new_tokens=4), "word " * 200
        expected = llm.complete("Hello.").text
        with pytest.raises(PromptError, match="context length"):
            llm.complete(long)
        with pytest.raises(PromptError, match="context length"):
            list(llm.stream_complete(long))
        with pytest.raises(PromptError, match="context length"):
            await llm.acomplete(long)
        with pytest.raises(PromptError, match="context length"):
            [_ async for _ in await llm.astream_complete(long)]
        assert llm.complete("Hello.").text == expected
