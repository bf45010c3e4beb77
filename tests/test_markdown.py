"""Text from data is text: every class that shows itself in a notebook, with payloads in every text, through real
Markdown renderers and an HTML parser."""
import re
from collections import Counter
from html.parser import HTMLParser

import mistune
import pytest
from alf_nb.app.publish import card_text
from alf_nb.model.delta import save_delta
from alf_nb.model.fingerprint import fingerprint
from alf_nb.core.foreign import escape, md_code, md_text, visible
from alf_nb.report.results_page import write_comparison
from alf_nb.report.summary import summarize, summary_table
from markdown_it import MarkdownIt
from nbconvert.filters.markdown_mistune import markdown2html_mistune

import json
import torch

from hostile_text import MAKERS, PAYLOADS, RAN, a_run, classes, each_its_own, results, the_same

IDS = [f"{i}-{re.sub('[^a-z]+', '-', p.lower())[:20]}" for i, p in enumerate(PAYLOADS)]
_plugins = [
    "strikethrough",
    "footnotes",
    "table",
    "url",
    "task_lists",
    "def_list",
    "abbr",
    "mark",
    "insert",
    "superscript",
    "subscript",
    "math",
    "ruby",
    "spoiler",
]
RENDERERS = dict(
    markdown_it=MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render,
    mistune=mistune.create_markdown(escape=False, plugins=_plugins),
    nbconvert=markdown2html_mistune,
)
# every element that our own Markdown makes; what `evil` text could add is not among them
OURS = {"p", "table", "thead", "tbody", "tr", "th", "td", "strong", "em", "code", "ul", "li", "h1", "h2"}


class Page(HTMLParser):
    "Elements, attributes and text of HTML"
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = Counter(), [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag == "a" and attrs[0] == ("class", "anchor-link") and attrs[1][1].startswith("#") and len(attrs) == 2:
            # nbconvert's own, at headings
            return
        self.tags[tag] += 1
        self.attributes += [a for a in attrs if not (tag in ("h1", "h2") and a[0] == "id")]

    def handle_data(self, data): self.text.append(data)
    def handle_comment(self, data): self.tags["!--"] += 1
    def handle_decl(self, data): self.tags["!"] += 1
    def handle_pi(self, data): self.tags["?"] += 1
    def unknown_decl(self, data): self.tags["!["] += 1

    @property
    def active(self):
        "What could run, fetch or lead elsewhere"
        tags = [
            t
            for t in self.tags
            if t in (
                "script",
                "iframe",
                "object",
                "embed",
                "link",
                "meta",
                "base",
                "form",
                "input",
                "svg",
                "math",
                "a",
                "img",
                "!--",
                "!",
                "?",
                "![",
            )
        ]
        return tags + [
            a
            for a in self.attributes
            if a[0].startswith("on") or a[0] in ("src", "href", "srcdoc", "action", "formaction", "data", "id")
        ]


def counted(pages):
    "Elements of pages, but for the places where a long name may break: one for each of its underscores"
    return Counter({t: n for t, n in sum((p.tags for p in pages), Counter()).items() if t != "wbr"})


def plain(text): return "".join(text.split())


def sight(obj):
    "(kind, source) of everything that the object shows"
    from alf_nb.widgets.base import View, still_bundle
    from alf_nb.widgets.parts import all_widgets
    if isinstance(obj, View):
        return [
            ("html", obj.static_html()),
            ("html", still_bundle(obj)["text/html"]),
            *(("html", w.value) for w in all_widgets(obj.box) if type(w).__name__ == "HTML"),
        ]
    return [(k, getattr(obj, f"_repr_{k}_")()) for k in ("markdown", "html") if hasattr(obj, f"_repr_{k}_")]


def test_every_class_that_shows_itself_is_tried():
    assert set(MAKERS) == set(classes()), "tests/hostile_text.py makes one of each"


@pytest.mark.parametrize("payload", PAYLOADS, ids=IDS)
@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_name_is_a_name(renderer, payload):
    "In a paragraph, in bold, in a list and in a table, at the start of a line and inside"
    bare = lambda t: RENDERERS[renderer](
        f"{t}\n\n**{t}** end\n\n- {t}\n- x {t} y\n\n| head | b |\n|---|---|\n| {t} | {t} |\n"
    )
    for show in (md_text, md_code):
        page, tame = Page(bare(show(payload))), Page(bare("tame"))
        assert not page.active and page.tags - Counter(code=page.tags["code"]) == tame.tags, (page.active, page.tags)
        assert plain("".join(page.text)).count(plain(visible(payload))) == 6       # nothing of it is lost


@pytest.mark.parametrize("payload", PAYLOADS, ids=IDS)
@pytest.mark.parametrize("name", [n for n, c in classes().items() if hasattr(c, "_repr_markdown_")])
def test_markdown_of_every_class_holds_no_element_of_the_payload(tmp_path, name, payload):
    make = MAKERS[name]
    (evil := tmp_path/"evil").mkdir()
    (tame := tmp_path/"tame").mkdir()
    source = make(evil, the_same(payload))._repr_markdown_()
    usual = make(tame, the_same("tame"))._repr_markdown_()
    source.encode()
    for n, render in RENDERERS.items():
        page, as_usual = Page(render(source)), Page(render(usual))
        assert set(page.tags) <= OURS and not page.active, (n, page.tags, page.active)
        assert page.tags - Counter(code=page.tags["code"]) == as_usual.tags - Counter(code=as_usual.tags["code"]), n
        assert plain(visible(payload).replace("/", "∕"))[:20] in plain("".join(page.text)).replace("/", "∕"), n


ALL_IN_ONE = f"'\"><script>{RAN}</script><img src=x onerror={RAN}><b>\u202e{{0.__class__}} {{no}} tracker.invalid"


@pytest.mark.parametrize(
    "evil",
    [each_its_own(PAYLOADS), each_its_own(PAYLOADS[::-1]), the_same(ALL_IN_ONE)],
    ids=["one each", "another each", "all in one"],
)
@pytest.mark.parametrize(
    "name", [n for n, c in classes().items() if not hasattr(c, "_repr_markdown_") or hasattr(c, "_repr_html_")]
)
def test_html_of_every_class_holds_no_element_of_any_payload(tmp_path, name, evil):
    seen = {}
    for kind, evil in (("evil", evil), ("tame", the_same("tame"))):
        (folder := tmp_path/kind).mkdir()
        obj = MAKERS[name](folder, evil)
        try: found = [h for k, h in sight(obj) if k == "html"]
        finally: getattr(obj, "close", lambda: None)()
        for h in found:
            h.encode()
            assert 'role="alert"' not in h or name == "View", "the view failed"
        assert all(
            "mathjax_ignore" in h
            for h in found
            if "<style>" in h and 'class="alf' in h and "alf-still" not in h.partition("</style>")[0]
        )
        seen[kind] = list(map(Page, found))
    assert seen["evil"]
    for page in seen["evil"]:
        assert not [
            a
            for a in page.attributes
            if a[0].startswith("on")
            or a[0] in ("srcdoc", "action", "formaction", "data")
            or a[0] in ("src", "href")
            and not a[1].startswith(("data:image/png;base64,", "#"))
        ]
        assert not set(page.tags) & {"script", "iframe", "object", "embed", "link", "meta", "base", "form", "!--"}
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b\x00]", "".join(page.text))
    assert not counted(seen["evil"]) - counted(seen["tame"])        # no more of each than without: none comes from data
    shown = plain("".join(t for p in seen["evil"] for t in p.text + [v or "" for _, v in p.attributes]))
    assert any(plain(visible(p))[:12] in shown for p in (*PAYLOADS, ALL_IN_ONE))       # and the payloads were there


@pytest.mark.parametrize("payload", PAYLOADS, ids=IDS)
def test_files_in_markdown_hold_no_element_of_the_payload(tmp_path, payload):
    "The model card and `comparison.md`"
    model = torch.nn.Linear(2, 2)
    base = fingerprint(model, name="base" + payload)
    with torch.no_grad(): model.weight += 1
    save_delta(model, base, tmp_path/"delta")
    card = card_text(tmp_path/"delta", a_run(tmp_path, the_same(payload))).partition("\n---\n")[2]
    (tmp_path/"r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results(the_same(payload))), encoding="utf-8")
    write_comparison(tmp_path/"r.jsonl")
    for text in (card, (tmp_path/"comparison.md").read_text(encoding="utf-8")):
        for render in RENDERERS.values():
            page = Page(render(text))
            assert set(page.tags) <= OURS | {"pre", "div", "span"} and not page.active, (page.tags, page.active)
            assert plain(visible(payload))[:20] in plain("".join(page.text))


@pytest.mark.parametrize(
    "name", ["ThresholdPicker", "SelectionMap", "TrainingDashboard", "AttentionViewer", "CompareView"]
)
def test_what_a_view_sends_to_the_browser_can_be_encoded_and_hides_nothing(tmp_path, name):
    from alf_nb.widgets.parts import all_widgets
    view = MAKERS[name](tmp_path, the_same("\ud800\u202e\x1b x"))
    try: sent = json.dumps([w.get_state() for w in all_widgets(view.box)], ensure_ascii=False, default=str)
    finally: view.close()
    sent.encode()
    assert not re.search("[\u202e\x1b]", sent) and "u202e" in sent


def test_what_is_printed_does_not_command_the_terminal(tmp_path):
    said = summary_table(summarize(a_run(tmp_path, the_same("\x1b]0;owned\x07\x1b[2J\r\u202eevil"))))
    assert r"\x1b]0;owned\x07\x1b[2J\x0d\u202eevil" in said and not re.search(
        "[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said
    )


@pytest.mark.parametrize(
    "name",
    [
        "block.3.self_attn.k_proj",
        "layers_0",
        "gpt2-medium",
        "HuggingFaceTB/SmolLM2-135M",
        "budget 0.25: top 8 by gain per parameter (k=8, −3.5 … 2)",
        "1/n_params",
        "Größe ≥ 1",
        "次のモデル",
        "bloom-7b1",
    ],
)
def test_an_ordinary_name_looks_the_same_in_the_source(name):
    assert md_text(name) == name and md_code(name) == f"`{name}`" and visible(name) == escape(name) == name
