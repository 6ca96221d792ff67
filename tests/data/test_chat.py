import json

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jft.data import sandbox
from jft.data.chat import ChatTemplate, check_messages
from jft.data.errors import DataError
from tests.data.chats import CHATML, INST, MARKED, TALK, THINKING

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}


def spoken(template, loss="responses", talk=TALK):
    text, spans = ChatTemplate(template, SPECIALS).spans(talk, loss)
    return [text[a:b] for a, b in spans]


def test_spans_without_generation_marks():
    assert spoken(CHATML) == ["Hello!<|im_end|>\n", "Four, naïvely.<|im_end|>\n"]
    assert spoken(INST) == [" Hello!</s>", " Four, naïvely.</s>"]
    assert spoken(CHATML, "last") == ["Four, naïvely.<|im_end|>\n"]


def test_spans_with_generation_marks():
    assert spoken(MARKED) == ["Hello!<|im_end|>", "Four, naïvely.<|im_end|>"]
    assert spoken(MARKED, "last") == ["Four, naïvely.<|im_end|>"]
    assert ChatTemplate(MARKED).render(TALK) == ChatTemplate(CHATML).render(TALK)


def test_a_template_that_rewrites_history_is_refused_with_the_way_out():
    with pytest.raises(DataError, match=r"rewrites message 1 .*'<think>.* loss: 'last'"):
        spoken(THINKING)
    assert spoken(THINKING, "last") == ["<think>\n\n</think>\n\nFour, naïvely.<|im_end|>\n"]


def test_a_generation_prompt_that_answers_do_not_start_with_is_refused():
    opened = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
    assert opened != CHATML
    with pytest.raises(DataError, match=r"opens an answer one way .*generation prompt is"):
        spoken(opened)


def test_all_means_every_character():
    text, spans = ChatTemplate(CHATML).spans(TALK, "all")
    assert spans == [(0, len(text))]


def test_refusals():
    with pytest.raises(DataError, match="no assistant message"):
        spoken(CHATML, talk=TALK[:1])
    with pytest.raises(DataError, match="roles must alternate"):
        spoken(INST, talk=[{"role": "system", "content": "x"}, *TALK])
    with pytest.raises(DataError, match="does not parse: line 1"):
        ChatTemplate("{% for %}")
    with pytest.raises(DataError, match=r"set `date`"):
        ChatTemplate("{{ strftime_now('%Y') }}").render(TALK)
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}", date="2024-07-26").render(TALK) == "26 Jul 2024"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        (["hello"], "message 0 must be an object"),
        ([{"role": "user"}], "content must be text, got None"),
        ([{"role": "user", "content": "\ue1f0"}], "U\\+E1F0"),
    ],
)
def test_wrong_messages(messages, message):
    with pytest.raises(DataError, match=message):
        check_messages(messages)


@pytest.mark.peers
@pytest.mark.parametrize("template", [CHATML, INST, MARKED, THINKING])
def test_renders_as_transformers(template, tmp_path):
    transformers = pytest.importorskip("transformers")
    from jft.data.tokenizer import byte_tokenizer

    byte_tokenizer().with_template(template).save(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = ChatTemplate(template, {"bos_token": "<bos>", "eos_token": "<eos>"})
    for prompt in (False, True):
        talk = TALK[:3] if prompt else TALK
        assert ours.render(talk, prompt) == peer.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)


@pytest.mark.peers
def test_marks_mask_as_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from jft.data.language import PromptResponse
    from jft.data.tokenizer import byte_tokenizer, load

    byte_tokenizer().with_template(MARKED).save(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = peer.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    from jft.data.source import Source

    class One(Source):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"messages": TALK}

    example = PromptResponse(One(), load(tmp_path), messages="messages").example(0, None)
    assert example["tokens"].tolist() == list(theirs["input_ids"])
    assert example["loss_mask"].astype(int).tolist() == list(theirs["assistant_masks"])


MUTATIONS = [
    ("jft/data/sandbox.py", "        if self.left < 0:", "        if self.left < -(10**9):"),
    (
        "jft/data/sandbox.py",
        "        if time.monotonic() > self.until:",
        "        if time.monotonic() > self.until + 9:",
    ),
    ("jft/data/sandbox.py", "optimized=False", "optimized=True"),
    ("jft/data/sandbox.py", "        self.finalize = _printed\n", ""),
    ("jft/data/chat.py", "        compiled.environment.budget.start()\n", ""),
]
SAME = [
    "{{ 'a' ~ 1 ~ messages[0]['content'][1:-1] }}{{ messages[-1]['content'][::-1] }}",
    "{% for m in messages %}{{ m.role|upper }}: {{ m['content']|trim }}{% if loop.last %}.{% endif %}{% endfor %}",
    "{% set n = namespace(x=2) %}{% for i in range(3) %}{% set n.x = n.x * 3 + i %}{% endfor %}{{ n.x ** 2 }}",
    "{% macro f(a, b='y') %}<{{ a }}{{ b }}>{% endmacro %}{{ f('x') }}{{ f(1, b=2) }}{{ ['p', 'q']|join('-') }}",
    "{% set t %}{{ 'in' }}side{% endset %}{{ t|length }}{{ '%s of %03d' % ('a', 7) }}{{ '{:>5}'.format('r') }}",
    "{{ messages|map(attribute='role')|list|tojson }}{{ 'a-b'.split('-')[0] }}{{ 'ab'.replace('b', 'c') }}{{ ' x'|indent(2) }}",
    "{{ [1, 2] + [3] }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ {'a': 1}.items()|list }}",
]


@pytest.mark.parametrize("template", SAME)
def test_the_budget_changes_no_text(template):
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = json.dumps
    assert ChatTemplate(template).render(TALK) == plain.from_string(template).render(messages=TALK)


def test_every_rendering_has_a_budget_of_its_own(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_CHARACTERS", 2000)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    short, long = ([{"role": "user", "content": "x" * n}] for n in (1500, 2500))
    for _ in range(3):
        assert template.render(short) == "x" * 1500
        with pytest.raises(DataError, match="makes more than 2,000 characters"):
            template.render(long)
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.0)
    with pytest.raises(DataError, match="takes more than 0 s"):
        template.render(short)


def test_nothing_runs_while_a_template_is_compiled():
    # What would be folded: a filter and an operator of constants.
    template = ChatTemplate("{{ 'a'|upper }}{{ 'b' * 3 }}{% if 'c'|upper == 'C' %}{{ 'd' ~ 'e' }}{% endif %}")
    code = sandbox.Environment().compile(template.template, raw=True)
    for folded in ("'A'", "'bbb'", "'C' == 'C'", "'de'"):
        assert folded not in code
    assert template.render(TALK) == "Abbbde"
