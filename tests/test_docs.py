"""The documentation site: built from the notebooks in a temporary folder, with every link working and nothing loaded
from outside."""
import importlib.util, json, re, shutil, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scripts import script

pytest.importorskip('smalldocs', reason="smalldocs builds the docs; it needs Python 3.11")
pytest.importorskip('latex2mathml')
root = Path(__file__).resolve().parents[1]
docs = script('tools/docs.py')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp('site')/'_docs'
    made, wrong = docs.build(out)
    assert not wrong, '\n'.join(wrong)
    return out, made


def text(site, page): return (site[0]/page).read_text(encoding='utf-8')


def test_a_page_for_every_notebook(site):
    out, made = site
    written = {root/'nbs'/f'{n}.ipynb' for n in ('presets', 'views')}
    assert {root / 'nbs' / rel for rel in made} - written == {
        p for p in (root / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts
    }
    for page, _ in made.values(): assert (out/page).stat().st_size > 2000, page


def test_docstrings_point_to_pages_that_exist(site):
    for py in (root/'alf_nb').rglob('*.py'):
        for page in re.findall(rf'{re.escape(docs.SITE)}/(\S+?\.html\.md)', py.read_text(encoding='utf-8')):
            assert (site[0]/page).exists(), f"{py.name} says its docs are at {page}"


def test_public_names_are_documented(site):
    for place, names in (
        ('01_core/records', ('UnitInfo', 'Scores', 'Selection')),
        ('01_core/policies', ('ThresholdPolicy', 'step_cost')),
        ('06_train/trainer', ('ALFCallback',)),
        ('01_core/runlog', ('RunLog.series',)),
    ):
        page = text(site, f'{place}.html')
        for n in names: assert re.search(rf'<h3[^>]*>\s*{re.escape(n)}', page), f"{n} has no entry on {place}.html"
    assert 'exact name, unique in the model' in text(site, '01_core/records.html'), "what a docment says of a parameter"


def test_the_sidebar_leads_everywhere_in_order(site):
    _, made = site
    nav = re.search(r'<nav id="quarto-sidebar".*?</nav>', text(site, 'index.html'), re.S)[0]
    links = re.findall(r'href="\.?/?([\w./-]+\.html)"', nav)
    assert set(links) >= {p.as_posix() for p, _ in made.values()}
    tutorials = [
        p.as_posix() for _, p in sorted((int(rel.name.split('_')[0]), p) for rel, (p, _) in made.items()
                                        if rel.parts[0] == 'tutorials')
    ]
    assert [l for l in links if l.startswith('tutorials/')] == tutorials
    start, how_to = ('index.html', 'install.html', tutorials[0]), (tutorials[2], 'presets.html')
    rest = 'views.html', 'evidence.html', 'api.html', '01_core/records.html'
    places = [links.index(l) for l in (*start, *how_to, *rest)]
    assert places == sorted(places)


def test_it_starts_with_start_how_to_views_and_api(site):
    sections = re.findall(r'sidebar-item-section.*?menu-text">(.*?)</span>', text(site, 'index.html'))
    assert [s for s in sections if s[0].isupper()] == ['Start', 'How-to', 'Views', 'Evidence', 'API']
    bar = re.search(r'navbar-nav-scroll me-auto">(.*?)</ul>', text(site, '01_core/records.html'), re.S)[1]
    assert re.findall(r'menu-text">(.*?)<', bar) == ['Start', 'How-to', 'Views', 'Evidence', 'API']


def test_links_to_sources_lead_to_the_line(site):
    links = [
        m
        for f in site[0].rglob('*.html')
        for m in re.findall(r'href="[^"]*/blob/\w+/(alf_nb/[\w/]+\.py)(#[^"]*)?"', f.read_text(encoding='utf-8'))
    ]
    lines = {f: (root/f).read_text(encoding='utf-8').split('\n') for f, _ in links}
    assert sum(bool(place) for _, place in links) > 900
    for f, place in links:
        if place: assert re.match(r'\s*(@|def |class |async def )', lines[f][int(place[2:]) - 1]), f'{f}{place}'


def test_every_preset_is_listed_with_what_it_does(site):
    from alf_nb.core.config import PRESETS
    found = docs.pages.presets((root/'alf_nb'/'core'/'config.py').read_text(encoding='utf-8'))
    assert list(found) == list(PRESETS) and all(len(does) > 20 for does, _ in found.values())
    page = text(site, 'presets.html')
    for name in PRESETS: assert f'<td><code>{name}</code></td>' in page, name


def test_every_view_has_its_picture(site):
    from alf_nb.widgets.base import View
    for f in (root/'alf_nb'/'widgets').glob('[a-z]*.py'): importlib.import_module(f'alf_nb.widgets.{f.stem}')
    page = text(site, 'views.html')
    assert {v.__name__ for v in View.__subclasses__() if v.__module__.startswith('alf_nb')} == set(docs.pages.VIEWS)
    for name in docs.pages.VIEWS:
        section = re.search(rf'<h2[^>]*>{name}</h2>(.*?)(<h2|</main>)', page, re.S)
        assert section and re.search(PICTURED.get(name, '<svg|<img|<table'), section[1]), name


def test_the_evidence_begins_with_the_answer_and_folds_the_rest(site):
    page = text(site, 'evidence.html')
    body = page[page.index('<main'):]
    heads = re.findall(r'<section id="([^"]+)" class="level2">', body)
    assert heads[0] == 'the-answer' and '<table' in body[body.index(heads[0]):body.index(heads[1])]
    shown = re.sub(r'<details class="fold">.*?</details>', '', body, flags=re.S)
    assert shown.count('<table') <= 9
    assert shown.count('<svg') == shown.count(': learnt</h4>') >= 4, "what is gained, and what is lost, task by task"
    assert body.count('<table') > 20, "nothing is lost"


PICTURED = {'Steering': '<p class="sample">'}       # of text alone

SEARCHES = {
    'checkpoint': 'tutorials/your_own.html#when-it-is-killed',
    'chat template': '02_sources/templates.html',
    'out of memory': 'tutorials/big_model.html#will-it-fit',
    'resume': 'tutorials/your_own.html#when-it-is-killed',
    'freeze layers': 'tutorials/choose_live.html#before-what-would-it-mean',
    'lora': 'tutorials/compare.html',
    '4 bit': 'tutorials/big_model.html#bits-for-what-stays',
    'install': 'install.html',
}


def found_first(lab, url):
    "What people ask for → where the first answer of the page's own search leads"
    with lab.browser() as context:
        page = context.new_page()
        page.goto(url)
        box, first, found = page.locator('#quarto-search input'), page.locator('.search-result').first, {}
        for asked in SEARCHES:
            box.fill(asked)
            page.wait_for_timeout(150)          # it waits that long before it looks
            first.wait_for()
            found[asked] = first.get_attribute('href').removeprefix('./')
            box.fill('')
            first.wait_for(state='hidden')
    return found


def test_the_search_knows_the_words_that_people_use(site):
    "Opened from disk; in a thread of its own, as browser tests may keep their Playwright open in this process"
    lab = script('tests/browser/lab.py')
    if not lab.CHROMIUM or not importlib.util.find_spec('playwright'): pytest.skip("needs Playwright and Chromium")
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(found_first, lab, (site[0]/'index.html').as_uri()).result() == SEARCHES


def test_outputs_and_maths_are_shown(site):
    assert '<math' in text(site, '05_signals/tracker.html') and 'katex' not in text(site, '05_signals/tracker.html')
    assert r'\mathrm' not in re.sub(r'<code.*?</code>', '', text(site, '05_signals/tracker.html'), flags=re.S)
    assert '<svg' in text(site, '07_report/lines.html')


def test_the_search_index_can_be_loaded_from_disk(site):
    js = text(site, 'search.json.js')
    assert json.loads(js.removeprefix('window.searchIndex=')) == json.loads(text(site, 'search.json'))


@pytest.mark.parametrize(
    'page, said',
    [
        ('<a href="nowhere.html">x</a>', 'broken link nowhere.html'),
        ('<a href="index.html#nowhere">x</a>', 'no such place index.html#nowhere'),
        ('<img src="https://example.com/a.png">', 'loads https://example.com/a.png'),
        ('<script src="//cdn.example.com/a.js"></script>', 'loads //cdn.example.com/a.js'),
        ('<link rel="stylesheet" href="https://example.com/a.css">', 'loads https://example.com/a.css'),
        (
            '<style>@import "https://example.com/b.css"; p { background: url(https://example.com/c.png) }</style>',
            'loads https://example.com/c.png',
        ),
    ],
)
def test_what_is_wrong_is_found(tmp_path, page, said):
    (tmp_path / 'index.html').write_text(
        '<h1 id="here">x</h1><a href="#here">y</a><a href="https://example.com">may be linked</a>', encoding='utf-8'
    )
    assert docs.problems(tmp_path) == []
    (tmp_path/'other.html').write_text(page, encoding='utf-8')
    found = docs.problems(tmp_path)
    assert any(said in f for f in found), found


def test_a_broken_link_in_a_notebook_is_an_error_and_leaves_the_old_site(tmp_path):
    shutil.copytree(
        root / 'nbs', tmp_path / 'nbs', ignore=shutil.ignore_patterns('[0-9]*', 'speed.ipynb', '.ipynb_checkpoints')
    )
    index = tmp_path/'nbs'/'index.ipynb'
    nb = json.loads(index.read_text(encoding='utf-8'))
    nb['cells'] = [
        *nb['cells'][:1],
        dict(cell_type='markdown', id='aa', metadata={}, source='See [this](tutorials/0_gone.ipynb).'),
    ]
    index.write_text(json.dumps(nb), encoding='utf-8')
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'old').write_text('')
    _, wrong = docs.build(tmp_path/'out', tmp_path/'nbs')
    assert any('0_gone' in w for w in wrong), wrong
    assert (tmp_path/'out'/'old').exists()
