"""What the documentation site has beside the notebooks' own pages: groups, two pages that are made from the code and
its pictures, the words that people search for, and parts that open by a click. `tools/docs.py` builds it.
"""
import ast, html, re
from pathlib import Path

from fastcore.nbio import read_nb
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

# ---- groups

HOW_TO = ('presets', 'several_gpus', 'faults')
EVIDENCE = ('evidence', 'costs', 'speed')


def page_of(rel):
    "Where the page of a notebook goes: without its number, so that a link survives a new order"
    return rel.with_name(re.sub(r'^\d+[a-z]?_', '', rel.name)).with_suffix('.html')


def number(rel):
    "A notebook's own number, for its place among its neighbours"
    found = re.match(r'(\d+)_', rel.name)
    return int(found[1]) if found else 0


def sidebar(made):
    "Start, how to, views, evidence, and the folders of the package in the order in which they are read"
    def entry(rel, text=None):
        return dict(text=text or made[rel][1], href=made[rel][0].with_suffix('.ipynb').as_posix())
    def named(*names): return [entry(r) for n in names for r in made if r.as_posix() == f'{n}.ipynb']
    own = {f'08_widgets/{place}.ipynb' for place, *_ in VIEWS.values()}
    folders = sorted({r.parts[0] for r in made if r.parts[0][0].isdigit()})
    of = {f.partition('_')[2]: [entry(r) for r in made if r.parts[0] == f and r.as_posix() not in own] for f in folders}
    tutorials = sorted((r for r in made if r.parts[0] == 'tutorials'), key=number)
    steps = [entry(r, f'{number(r)} · {made[r][1]}') for r in tutorials]
    sections = {
        'Start': [dict(text='What it is', href='index.ipynb'), *named('install'), *steps[:2]],
        'How-to': [*steps[2:], *named(*HOW_TO)],
        'Views': named('views', *(f'08_widgets/{place}' for place, *_ in VIEWS.values())),
        'Evidence': named(*EVIDENCE),
        'API': [*named('api'), *(dict(section=k, contents=v) for k, v in of.items())],
    }
    return [dict(section=k, contents=v) for k, v in sections.items() if v]


def navbar(made):
    "The first page of each group"
    first = {
        'Start': 'index', 'How-to': 'tutorials/3_what_moves', 'Views': 'views', 'Evidence': 'evidence', 'API': 'api'
    }
    there = {r.as_posix().removesuffix('.ipynb'): page for r, (page, _) in made.items()}
    return [
        dict(text=k, href=there[n].with_suffix('.ipynb').as_posix()) for k, n in first.items() if n in there
    ]


# ---- pages that are made

def page(title, promise, *cells):
    "A notebook with a title, ready to lay out"
    front = f'---\ntitle: {title}\ndescription: {promise!r}\n---'
    return new_notebook(cells=[new_raw_cell(front), *cells])


def presets(source):
    "Name, description and arguments of each preset, from the dicts in a module and the comments above their keys"
    lines, found = source.split('\n'), {}
    for node in ast.parse(source).body:
        target = getattr(node, 'target', None) or (getattr(node, 'targets', None) or [None])[0]
        if getattr(target, 'id', None) != 'PRESETS': continue
        for key, value in zip(node.value.keys, node.value.values):
            above, i = [], key.lineno - 2
            while lines[i].strip().startswith('#'):
                above.insert(0, lines[i].strip('# '))
                i -= 1
            found[key.value] = ' '.join(above), ', '.join(ast.unparse(k) for k in value.keywords)
    return found


def presets_page(package):
    "Every preset, what it does and what it sets"
    rows = [
        (f'`{name}`', re.sub(r'(https://\S+?)(?=[:,]?\s)', r'[\1](\1)', does[:1].upper() + does[1:]), f'`{sets}`')
        for name, (does, sets) in presets((package/'core'/'config.py').read_text(encoding='utf-8')).items()
    ]
    head = [('preset', 'what it does', 'what it sets'), ('---',)*3]
    table = '\n'.join('| ' + ' | '.join(r) + ' |' for r in head + rows)
    use = (
        "A preset is a set of arguments of [`ALFConfig.from_args`](01_core/config.ipynb); what is given beside it wins."
        "\n\n```python\nALFCallback(preset='probe', budget=.3)\n```"
        "\n\n```sh\nalf finetune --preset probe --budget 0.3\n```"
    )
    return page('Presets', 'Which way of choosing layers has which name, what it does and what it sets.',
                new_markdown_cell(use), new_markdown_cell(table))


# ---- views with their pictures

# views in the order in which one meets them: page, where a still of it is kept, and when it is of use
VIEWS = {
    'ThresholdPicker': ('06_picker', 'tutorials/2_choose_live', 'Which units train, by threshold, budget and click.'),
    'TrainingDashboard': (
        '09_dashboard', 'tutorials/2_choose_live', 'Loss, memory and layers of a run that trains, with its buttons.'
    ),
    'Steering': (
        '08_steering', '08_widgets/08_steering', 'A prompt, another learning rate, an end without saving.'
    ),
    'SelectionMap': ('07_map', 'tutorials/2_choose_live', 'Layers by time: what trained when.'),
    'CompareView': ('12_compare', 'tutorials/4_compare', 'Several runs side by side, live or over.'),
    'AttentionViewer': (
        '11_attention', 'tutorials/1_quickstart', 'What every head looks at, before and after training.'
    ),
    'PlanView': ('13_plan', '08_widgets/13_plan', 'Which ways of training fit into a memory.'),
}


def picture(path, name, made_here):
    "The last still of a view that a notebook keeps; where the view is made, stills need no name"
    if not path.exists(): return None
    stills = [o.data for c in read_nb(path).cells for o in c.get('outputs', []) if 'text/html' in o.get('data', {})]
    names = (name, '<Picture', '<Html') if made_here else name
    own = [d for d in stills if ''.join(d.get('text/plain', '')).startswith(names)]
    return ''.join(own[-1]['text/html']) if own else None


def views_page(nbs):
    "Every view with its picture"
    cells = []
    for name, (place, kept, use) in VIEWS.items():
        page_here = f'08_widgets/{place}'
        stills = (picture(nbs/f'{p}.ipynb', name, p == page_here) for p in (kept, page_here))
        still = next(filter(None, stills), None)
        if not still: continue
        text = f'## {name}\n\n{use} [More](08_widgets/{page_of(Path(place)).stem}.ipynb)'
        shown = new_output('display_data', {'text/html': still})
        cells += [new_markdown_cell(text), new_code_cell('#| echo: false', outputs=[shown])]
    return page('Views', 'Each view with its picture: a still, as it stays in a saved notebook.', *cells)


# ---- sections that unfold

# these do not
OPEN = 'the-answer', 'differences', 'what-is-gained-and-what-is-lost', 'when-does-choosing-pay'

def fold(text):
    "A page on which each section shows its heading and first paragraph, and the rest by a click"
    starts = [m.start() for m in re.finditer(r'<section id="[^"]+" class="level2">', text)]
    for a, b in reversed(list(zip(starts, [*starts[1:], text.find('</main>')]))):
        end = text.rfind('</section>', a, b)
        head = re.match(r'<section[^>]*>\s*<h2.*?</h2>\s*(?:<p>.*?</p>)?', text[a:end], re.S)
        rest = text[a + head.end():end] if head else ''
        if any(f'id="{n}"' in text[a:a+60] for n in OPEN) or len(words(rest)) < 300: continue
        said = '<details class="fold"><summary>' + contents(rest) + '</summary>'
        text = text[:a + head.end()] + said + rest + '</details>' + text[end:]
    return text


def words(part): return html.unescape(re.sub(r'<style.*?</style>|<[^>]+>', '', part, flags=re.S)).strip()


def contents(part):
    "What is folded, in words"
    counts = [(part.count('<table'), 'table'), (len(re.findall(r'<div class="alf[ "]', part)), 'chart')]
    found = [f"{n} {what}{'s'*(n > 1)}" for n, what in counts if n]
    return 'Show ' + (' and '.join(found) or 'the rest')


# ---- words that people search for

# what they type → the page, and the place on it
SEARCHED = {
    'install, pip, requirements, Python version': 'install.html',
    'Colab, Google Colab, T4': 'install.html#colab',
    'offline, no internet, air-gapped': 'install.html#without-a-network',
    'preset, default settings, LISA, BAdam, GRASS': 'presets.html',
    'chat template, apply_chat_template, answers only, completion only loss': '02_sources/templates.html',
    'packing, packed sequences, padding free': '02_sources/templates.html#packing',
    'chat, messages, ShareGPT, alpaca, instruction data, prompt and completion': 'tutorials/your_own.html#chats',
    'custom dataset, my own data, csv, tsv, jsonl, text file': 'tutorials/your_own.html#your-data',
    'out of memory, OOM, CUDA out of memory, VRAM, does it fit': 'tutorials/big_model.html#will-it-fit',
    '4 bit, 8 bit, quantize, QLoRA, bitsandbytes': 'tutorials/big_model.html#bits-for-what-stays',
    'bf16, fp16, mixed precision, master weights': 'tutorials/big_model.html#bits-for-what-stays-32-for-what-trains',
    'freeze layers, unfreeze, choose layers by hand, pin, ban': 'tutorials/choose_live.html#before-what-would-it-mean',
    'threshold, budget, slider': 'tutorials/choose_live.html',
    'pause, stop, steer while it trains, prompt while it trains': '08_widgets/steering.html',
    'resume, checkpoint, killed, continue training, power cut': 'tutorials/your_own.html#when-it-is-killed',
    'save model, delta, load the result, adapter file': 'tutorials/your_own.html#keep-just-what-changed',
    'merge, merged model, GGUF, llama.cpp, Ollama': '10_app/merge.html',
    'forgetting, catastrophic forgetting, KL, WiSE-FT, scale of a change': '10_app/tradeoff.html',
    'push to hub, upload, model card': '10_app/publish.html',
    'LoRA, PEFT, compare methods, full fine-tuning': 'tutorials/compare.html',
    'learning rate, lr': '01_core/rates.html',
    'multi GPU, several GPUs, DDP, FSDP, DeepSpeed, torchrun': 'several_gpus.html',
    'command line, CLI, alf finetune, config yaml': '10_app/cli.html',
    'NaN, loss is nan, disk full, crash, error': 'faults.html',
    'classification, BERT, encoder': 'tutorials/classifier.html',
    'vision, ViT, image model': 'tutorials/images.html',
    'wandb, tensorboard, report_to, tracker': '06_train/tracking.html',
    'speed, slow, seconds per step, memory': 'costs.html',
    'attention maps, heads, visualize attention': '08_widgets/attention.html',
    'Trainer callback, SFTTrainer, TRL': '06_train/trainer.html',
    'gradient checkpointing, accumulation': '06_train/trainer.html',
}


def search_entries(titles):
    "An entry of the search for each phrase, with the title of the page it leads to"
    return [
        dict(objectID=f'{href}?{n}', href=href, title=titles[href.partition('#')[0]], section=phrase.strip(),
             text=phrase.strip())
        for n, (phrases, href) in enumerate(SEARCHED.items())
        if href.partition('#')[0] in titles
        for phrase in phrases.split(',')
    ]
