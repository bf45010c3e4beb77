"What a picture of a view may not say: that a run begins and is over, one number two ways, two shares for the same."
import html, json, re

BEGINS = r'\b(?:Starting|Loading|Probing|Metering|Measuring)\b'
BYTES = r'(\d[\d.]* [kKMGT]?i?B)'


def words(shown):
    "Text of a piece of HTML, with what it says to a screen reader"
    said = re.findall(r'aria-label="([^"]*)"', shown)
    shown = re.sub(r'<(style|title|desc|script)\b.*?</\1>', ' ', shown, flags=re.S)
    return ' '.join(html.unescape(' '.join([re.sub(r'<[^>]+>', ' ', shown), *said])).split())


def stills(path):
    "Pictures of views that a notebook keeps, as text: what stands for them where no HTML is shown comes first"
    nb = json.loads(path.read_text(encoding='utf-8'))
    data = [o['data'] for c in nb['cells'] for o in c.get('outputs', []) if 'text/html' in o.get('data', {})]
    return [f"{''.join(d.get('text/plain', ''))} {words(''.join(d['text/html']))}" for d in data]


def _counts(text):
    "Numbers of units that would train, and shares of the parameters"
    units = re.findall(r'would train (\d+) of \d+ units', text) + re.findall(r'\b(\d+) would train\b', text)
    units += re.findall(r'Picker: [^,]*, (\d+) units', text)
    shares = re.findall(r'share of weights ([\d.]+) %', text) + re.findall(r'would train, ([\d.]+) ?%', text)
    return {'units': {int(u) for u in units}, 'share': {float(s) for s in shares}}


def contradictions(text):
    "Sentences; none if nothing in the text contradicts anything else in it"
    found = []
    if m := re.search(rf'{BEGINS}.{{0,250}}?\b100 %', text): found.append(f'begins, and is over: {m[0]}')
    for at, of in re.findall(r': starting, step (\d+) of (\d+)', text):
        if at == of: found.append(f'starts at step {at} of {of}')
    for at, of, percent in re.findall(r'step (\d+) of (\d+) (\d+) %', text):
        if abs(int(percent) - 100*int(at)/int(of)) > 1: found.append(f'step {at} of {of} is not {percent} %')
    for what, numbers in _counts(text).items():
        if len(numbers) > 1: found.append(f"{what}: {', '.join(map(str, sorted(numbers)))}")
    shares = {}
    for size, share in re.findall(rf'training state {BYTES}\D{{0,40}}?(\d\.\d\d) of full', text):
        shares.setdefault(size, set()).add(share)
    return found + [f"{b} are {' and '.join(sorted(s))} of full" for b, s in shares.items() if len(s) > 1]
