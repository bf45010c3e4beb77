"""The tasks of the evidence: parts that share no row, metrics that are what they are called, a bootstrap that tells."""
import json
import math
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1]/'benchmarks'
sys.path.insert(0, str(BENCHMARKS))
import race_table       # noqa: E402
import scales_table     # noqa: E402
import suite            # noqa: E402
import suite_table      # noqa: E402


class Words:
    "A tokenizer: a word, a token"
    known = {}
    def __call__(self, text): return dict(input_ids=[self.known.setdefault(w, len(self.known)) for w in text.split()])


def test_f1_and_matthews():
    labels, said = [1, 1, 1, 0, 0, 0, 1, 0], [1, 0, 1, 0, 1, 0, 1, 1]
    tp, fp, fn, tn = 3, 2, 1, 2
    assert suite.f1(labels, said) == 2*tp/(2*tp+fp+fn)
    below = math.sqrt((tp+fp)*(tp+fn)*(tn+fp)*(tn+fn))
    assert suite.matthews(labels, said) == pytest.approx((tp*tn-fp*fn)/below)
    assert suite.matthews(labels, labels) == 1 and suite.matthews(labels, [1-v for v in labels]) == -1
    assert suite.matthews(labels, [1]*8) == 0 == suite.f1(labels, [0]*8)


def test_parts_of_a_folder_share_no_row(tmp_path):
    row = lambda i: dict(text=f'text {i}', label=i % 2)
    (tmp_path/'TREC').mkdir()
    for name, rows in (('train', range(80)), ('test', range(70, 90))):
        (tmp_path/'TREC'/f'{name}.jsonl').write_text('\n'.join(json.dumps(row(i)) for i in rows), encoding='utf-8')
    train, dev, test = suite.parts('TREC', tmp_path, 50)
    found = [{r['text'] for r in part} for part in (train, dev, test)]
    assert [len(f) for f in found] == [50, 20, 20] == [len(p) for p in (train, dev, test)]
    assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]


def test_shipped_questions_are_whole():
    for name, n, k in (('arc-easy-train', 2251, 3), ('arc-easy-test', 2376, 3), ('piqa', 1838, 2)):
        rows = suite.lines(suite.DATA/f'{name}.jsonl')
        assert len(rows) == n
        for r in rows:
            assert len(r['choices']) >= k and 0 <= r['label'] < len(r['choices']) and r['question'].strip()
            assert all(c.strip() and 'Answer format' not in c for c in r['choices'])
    labels = [r['label'] for r in suite.lines(suite.DATA/'arc-easy-test.jsonl')]
    assert min(labels.count(i) for i in range(4)) > 400, "the right answer stands in every place"


def test_arc_s_parts_share_no_question_and_only_answers_are_learnt():
    learnt, dev, test = suite.arc(Words(), 200, 300)
    asked = lambda rows: {tuple(r['input_ids']) for r in rows}
    assert (len(dev), len(test)) == (200, 300) and not asked(dev) & asked(test)
    begins = {tuple(t for t, l in zip(r['input_ids'], r['labels']) if l == -100) for r in learnt}
    assert not begins & (asked(dev) | asked(test))
    r = learnt[0]
    assert [l for l in r['labels'] if l != -100] == [t for t, l in zip(r['input_ids'], r['labels']) if l != -100]
    for name in ('MAWPS', 'SVAMP', 'GSM8K'):
        train, dev, test = suite.solved(name, Words(), *suite.DECODER[name])
        assert len(train) > 500 and not asked(train) & asked(test) and not asked(train) & asked(dev)


def test_a_bootstrap_over_tasks_and_seeds_tells_a_gain_from_noise():
    mean, error, low, high = suite_table.bootstrap(dict(a=[1., 1.2, .9], b=[1.1, .8, 1.]))
    assert mean == pytest.approx(1.) and 0 < error < .2 and 0 < low < 1 < high
    _, wide, low, high = suite_table.bootstrap(dict(a=[2., 2., 2.], b=[-2., -2., -2.]))
    assert wide > 1 and low == -2 and high == 2


def made(method, lr, seed, loss, texts):
    "A row of a decoder"
    return dict(
        key=f'{method}{lr}{seed}', method=method, settings='{}', selects=False, task='t', model='m', data='sums',
        goal='loss', rule='steps', amount=4, steps=4, lr=lr, seed=seed, task_loss=loss, task_loss_before=2.,
        general=dict(C4=texts, WikiText=texts+1, PIQA=.5), general_before=dict(C4=3., WikiText=4., PIQA=.6),
    )


def test_what_is_learnt_and_forgotten_is_said_as_it_is(tmp_path, monkeypatch):
    known = ('alf', 1.4, 3.1), ('lora', 1.6, 3.5), ('full', 1.2, 3.2), ('random-stratified', 1.4, 3.1)
    rows = [made(m, 1e-3, seed, loss + .01*seed, texts) for m, loss, texts in known for seed in (0, 1)]
    rows.append(made('alf', 2e-3, 0, 1.5, 3.4))
    file = tmp_path/'rows.jsonl'
    file.write_text(''.join(json.dumps(r)+'\n' for r in rows))
    monkeypatch.setattr(suite_table, 'tasks', lambda: suite_table.in_file(file))
    alf = suite_table.runs_of(suite_table.decoders()['sums'], 'alf')[0]
    assert suite_table.gained(alf) == pytest.approx(.6) and suite_table.forgot(alf) == pytest.approx(.1)
    by_rate = suite_table.rates_of(suite_table.decoders()['sums'], 'alf')
    assert [round(x, 3) for pair in by_rate for x in pair] == [.1, .6, .4, .5]
    told = suite_table.answer().data
    assert 'is ahead of LoRA, behind full fine-tuning and level with a quarter drawn by lot**' in told
    assert '+20.0 (+20.0 to +20.0) less LoRA' in told
    assert "its loss changes by +10.0 hundredths of a nat per token, LoRA's by +50.0" in told
    level = suite_table.standing(['level with']*2 + ['ahead of'])
    assert level == 'level with LoRA and full fine-tuning, and ahead of a quarter drawn by lot'
    assert suite_table.standing(['level with']*3) == 'level with LoRA, full fine-tuning and a quarter drawn by lot'
    tables = [t.data.replace('\N{NO-BREAK SPACE}', ' ') for t in (suite_table.learnt(), suite_table.forgotten())]
    for table, figure in zip(tables, ('59.5 ± 0.7', '10.0 ± 0.0')):
        assert f'| **alf**, the default | {figure} |' in table
    assert suite_table.frontiers().count('sums: learnt') == 1
    said = suite_table.edges().data
    assert said.startswith('1 of 4 best rates is the lowest or highest')
    assert said.endswith(': alf, the default on sums.')
    lines = [json.dumps(made('alf', 5e-4, 0, 1.6, 3.4))+'\n', *file.read_text().splitlines(True)]
    file.write_text(''.join(lines))
    assert suite_table.edges().data == 'Every best rate has a lower and a higher one beside it, both tried.'


def test_the_rate_that_suits_a_share_lies_between_those_that_were_tried(tmp_path, monkeypatch):
    def tried(method, share, best):
        "A parabola over log lr, with its bottom at `best`; and a second seed"
        rates = best/2*1.1, best*1.1, best*2.2
        rows = [made(method, lr, 0, 1.5, 3.) | dict(choice=math.log(lr/best)**2) for lr in rates]
        rows.append(made(method, rates[1], 1, 1.5, 3.) | dict(choice=0.))
        return [r | dict(trainable_share_mean=share) for r in rows]
    file = tmp_path/'rows.jsonl'
    rows = tried('full', 1., 1e-4) + tried('alf', .25, 3e-4) + tried('lora', .03, 2e-3)
    file.write_text(''.join(json.dumps(r)+'\n' for r in rows))
    monkeypatch.setattr(suite_table, 'tasks', lambda: suite_table.in_file(file))
    (share, lr), (part, higher) = suite_table.shares_and_rates()['sums']
    assert (share, part) == (1., .25) and lr == pytest.approx(1e-4) and higher == pytest.approx(3e-4)


def test_a_picture_s_axis_is_what_it_says():
    "Of the committed runs: what stands beside evenly spaced lines differs by the same"
    for drawn in suite_table.frontiers(), scales_table.frontiers():
        axes = re.findall(r'<div class="alf-y">(.*?)</div>', drawn)
        assert axes
        for inside in axes:
            shown = list(map(float, re.findall(r'>([^<]+)</span>', inside)))
            steps = [b-a for a, b in zip(shown, shown[1:])]
            assert len(steps) > 1 and steps == pytest.approx([steps[0]]*len(steps)), shown


def test_a_part_of_a_change_is_measured_beside_the_whole(tmp_path, monkeypatch):
    whole = made('alf', 1e-3, 0, 1.2, 3.4)      # learns 0.8 and forgets 0.4
    part = lambda loss, texts: dict(task_loss=loss, general=dict(C4=texts, WikiText=texts+1, PIQA=.5))
    whole['scales'] = [[.25, part(1.7, 3.)], [.5, part(1.4, 3.1)], [.75, part(1.2, 3.2)]]
    other = made('lora', 1e-3, 0, 1.6, 3.01)
    other['scales'] = [[.25, part(1.9, 3.)], [.5, part(1.9, 3.)], [.75, part(1.8, 3.)]]
    file = tmp_path/'rows.jsonl'
    file.write_text(''.join(json.dumps(r)+'\n' for r in (whole, other)))
    monkeypatch.setattr(scales_table, 'RESULTS', file)
    scales_table.rows.cache_clear()
    along = scales_table.along(scales_table.rows()['sums']['alf'])
    assert [round(x, 3) for pair in along for x in pair] == [0, 0, 0, .3, .1, .6, .2, .8, .4, .8]
    assert '| **alf**, the default | 60.0 | 10.0 | 80.0 | 20.0 | 80.0 | 40.0 |' in scales_table.parts().data
    said = scales_table.answer().data
    assert 'With half of a change 25 % to 75 % of what is learnt stays, and 25 % of what is forgotten.' in said
    assert said.startswith('With three quarters of a change 50 % to 100 % of what is learnt stays, and 50 % of what is')
    assert scales_table.frontiers().count('sums: learnt') == 1
    scales_table.rows.cache_clear()


def test_a_race_stands_beside_the_grid_and_a_miss_is_said(tmp_path, monkeypatch):
    row = dict(task='TREC', best=[.25, 4e-4], chosen=[.5, 2e-4], gap=[.01, -.01, .03], race_s=24., grid_s=96.)
    missed = row | dict(task='sums', gap=[.01, .005, .015], race_s=30.)
    file = tmp_path/'rows.jsonl'
    file.write_text(''.join(json.dumps(r)+'\n' for r in (row, missed)))
    monkeypatch.setattr(race_table, 'RESULTS', file)
    race_table.rows.cache_clear()
    said, table = race_table.answer().data, race_table.races().data
    assert '1 of 2 tasks' in said and '25 % to 31 % of the time' in said
    assert '| TREC | 25 % at 0.0004 | 50 % at 0.0002 | +1.0 (-1.0 to +3.0) | 24 | 96 | 25 % |' in table
    same = row | dict(chosen=row['best'], gap=[0., 0., 0.])
    file.write_text(json.dumps(same)+'\n')
    race_table.rows.cache_clear()
    assert '| the same setting |' in race_table.races().data and '1 of 1 tasks' in race_table.answer().data
    race_table.rows.cache_clear()
