"""Build the documentation site from the notebooks, offline: `python tools/docs.py [folder]`, default `_docs`.

nbdev turns each notebook into a page, smalldocs lays the pages out as Quarto would, and this script does what neither
does: it documents exported names without running notebooks, writes maths as MathML, and lets a page load nothing from
outside; `tools/pages.py` says which pages and words there are beside. Any broken link is an error. Notebooks are not
run: their stored outputs are shown.
"""
import configparser, html, importlib, inspect, json, os, re, shutil, sys, tempfile
from functools import reduce
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat, yaml
from fastcore import docments
from fastcore.nbio import mk_cell, read_nb, write_nb
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, exec_show_docs
from nbdev.showdoc import show_doc
from nbformat.v4 import new_output

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools'))
import pages
from pages import page_of
settings = configparser.ConfigParser(delimiters=['='])
settings.read(root/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']
SITE = settings['doc_host']+settings['doc_baseurl']
BLOB = f"{settings['git_url']}/blob/{settings['branch']}/{settings['nbs_path']}"
# pictures of ours follow the theme that is switched on; a page opened from disk may not fetch the search index, but may
# load it as a script; a link to what is folded opens it
HEAD = """<script>\
(f=>{f();new MutationObserver(f).observe(document.documentElement,{attributeFilter:['class']})})\
(()=>document.documentElement.setAttribute('theme',\
document.documentElement.classList.contains('quarto-dark')?'dark':'light'));
if(location.protocol==='file:'){const get=window.fetch;\
window.fetch=(u,...a)=>!String(u).endsWith('search.json')?get(u,...a):\
new Promise(r=>{const s=document.createElement('script');s.src=u+'.js';\
s.onload=()=>r(new Response(JSON.stringify(window.searchIndex)));document.head.append(s)})}
const unfold=()=>{const to=location.hash&&document.getElementById(decodeURIComponent(location.hash.slice(1)));
if(to)for(let d=to.querySelector('details.fold')||to;d=d.closest('details.fold');d=d.parentElement)d.open=true;
if(to)to.scrollIntoView()};
addEventListener('hashchange',unfold);addEventListener('DOMContentLoaded',unfold)</script>"""
FOLDED = 'evidence.html', 'costs.html'        # pages whose tables and charts open by a click
BADGE = 'https://colab.research.google.com/assets/colab-badge.svg'


# ---- notebooks to pages

def notebooks(folder):
    "Notebooks of the project, in order"
    return sorted(
        p for p in folder.rglob('*.ipynb') if not any(s.startswith(('.', '_')) for s in p.relative_to(folder).parts)
    )


def line_of(obj):
    "Where a name is defined, as the end of a link to its file; empty for what has no line, such as a number"
    try: return f'#L{inspect.getsourcelines(obj)[1]}'
    except (TypeError, OSError): return ''


def _signature(f, **how):
    "Annotations as they are written, where one of them has a meaning for type checkers alone"
    try: return inspect.signature(f, **how)
    except NameError: return inspect.signature(f)


docments.signature = _signature


class document_exports(Processor):
    "`show_doc` of exported names, taken from the exported module: no cell is run"
    def begin(self):
        name = next(
            (d['default_exp'] for c in self.nb.cells if 'default_exp' in (d := getattr(c, 'directives_', None) or {})),
            None,
        )
        self.module = name and importlib.import_module(f"{settings['lib_path']}.{name}")

    def cell(self, cell):
        if cell.cell_type != 'code' or not (m := re.search(r'^show_doc\(([\w.]+)\)$', cell.source, re.M)): return
        obj = reduce(getattr, m[1].split('.'), self.module)
        obj = obj.fget if isinstance(obj, property) else obj
        doc = show_doc(obj, name=m[1])._repr_markdown_().replace('#LNone', line_of(obj))
        cell.outputs = [new_output('display_data', {'text/markdown': doc})]


class Pages(FilterDefaults):
    def base_procs(self): return [document_exports if p is exec_show_docs else p for p in super().base_procs()]


def keep_introduction(nb):
    "nbdev keeps title and promise of the first cell and drops what follows: give that a cell of its own"
    for i,c in enumerate(nb.cells):
        if c.cell_type == 'markdown' and (m := re.match(r'# .+\n+(?:> .+(?:\n|$))?', c.source)):
            head, rest = c.source[:m.end()], c.source[m.end():]
            c.source = head.strip()
            if rest.strip(): nb.cells.insert(i+1, mk_cell(rest.strip(), 'markdown'))
            return


def stage(nbs, folder):
    "Pages as notebooks in `folder`; returns notebook → (page, title)"
    made = {}
    for src in notebooks(nbs):
        rel = src.relative_to(nbs)
        nb = read_nb(src)
        keep_introduction(nb)
        Pages()(nb)
        nb.metadata.pop('widgets', None)
        for c in nb.cells:
            if c.cell_type == 'markdown':
                c.source = re.sub(rf'\[!\[([^\]]*)\]\({re.escape(BADGE)}\)\]\(([^)]*)\)', r'[\1](\2){.colab}', c.source)
        dst = folder/page_of(rel).with_suffix('.ipynb')
        if dst.exists(): sys.exit(f"two notebooks would be the page {page_of(rel)}: rename {rel}")
        dst.parent.mkdir(parents=True, exist_ok=True)
        front = next((c for c in nb.cells if c.cell_type == 'raw' and c.source.lstrip().startswith('---')), None)
        fields = yaml.safe_load(front.source.strip().strip('-')) if front else {}
        if front: front.source = '---\n'+yaml.safe_dump({k: v for k,v in fields.items() if k != 'output-file'})+'---'
        write_nb(nb, dst)
        made[rel] = page_of(rel), fields.get('title', rel.stem)
    return made


def write_pages(nbs, folder, made):
    "Pages that are no notebooks of ours"
    for name, nb in (('presets', pages.presets_page(root/settings['lib_path'])), ('views', pages.views_page(nbs))):
        rel = Path(f'{name}.ipynb')
        if rel in made: sys.exit(f"{rel} is a notebook, and a page that is made")
        nbformat.write(nb, folder/rel)
        made[rel] = page_of(rel), name.capitalize()


def configure(nbs, folder, made):
    "The site's settings: `_quarto.yml` as committed, and what nbdev would write beside it"
    for f in ('_quarto.yml', 'styles.css'): shutil.copy(nbs/f, folder)
    if (nbs/'images').is_dir(): shutil.copytree(nbs/'images', folder/'images')
    site = {
        'title': settings['title'],
        'site-url': SITE,
        'description': settings['description'],
        'repo-branch': settings['branch'],
        'repo-url': settings['git_url'],
        'llms-txt': True,
        'navbar': dict(search=True, left=pages.navbar(made)),
    }
    page = {'include-in-header': [dict(text=HEAD)]}
    (folder / 'nbdev.yml').write_text(
        yaml.safe_dump(dict(project={'output-dir': '_docs'}, website=site, format=dict(html=page))), encoding='utf-8'
    )
    (folder / 'sidebar.yml').write_text(
        yaml.safe_dump(
            dict(website=dict(sidebar=dict(contents=pages.sidebar(made)))), sort_keys=False, allow_unicode=True
        ),
        encoding='utf-8',
    )


def render(folder):
    "Lay the pages out; returns the site's folder and what smalldocs has to say"
    try:
        from smalldocs.config import load
        from smalldocs.site import Site
    except ImportError:
        sys.exit("building the docs needs the package smalldocs, which needs Python 3.11: pip install -e '.[dev]'")
    site = Site(load(folder), quiet=True)
    site.build()
    return site.out, list(site.warnings)


# ---- nothing from outside

def mathml(m):
    "One formula, from LaTeX to MathML"
    from latex2mathml.converter import convert
    tex, block = html.unescape(m[2]).strip(), m[1] == 'display'
    return convert(tex[2:-2], display='block' if block else 'inline')


def offline(out, made):
    "Let the pages load nothing from outside, and let links to this project's own pages be relative"
    urls = {f'{BLOB}/{rel.as_posix()}': page for rel, (page, _) in made.items()} | {
        f'{SITE}/{page.as_posix()}': page for page, _ in made.values()
    }
    for css in (out/'site_libs').rglob('*.css'):
        css.write_text(
            re.sub(r'@import\s*(url\([^)]*\)|"[^"]*"|\'[^\']*\')\s*;', '', css.read_text(encoding='utf-8')),
            encoding='utf-8',
        )
    for f in sorted(out.rglob('*.html')):
        here, text = f.relative_to(out), f.read_text(encoding='utf-8')
        def link(m):
            url, _, anchor = html.unescape(m[1]).partition('#')
            if url not in urls: return m[0]
            # nbdev links private names too, which have no place on a page
            place = f'#{anchor}' if anchor and not anchor.startswith('_') else ''
            return f'href="{Path(os.path.relpath(urls[url], here.parent)).as_posix()}{place}"'
        text = re.sub(r'<span class="math (inline|display)">(.*?)</span>', mathml, text, flags=re.S)
        text = re.sub(r'<(link|script)[^>]*cdn\.jsdelivr\.net/npm/katex[^>]*>(</script>)?', '', text)
        if here.as_posix() in FOLDED: text = pages.fold(text)
        f.write_text(re.sub(r'href="([^"]*)"', link, text), encoding='utf-8')
    index = json.loads((out/'search.json').read_text(encoding='utf-8'))
    index = json.dumps(pages.search_entries({p.as_posix(): t for p, t in made.values()}) + index, ensure_ascii=False)
    (out/'search.json').write_text(index, encoding='utf-8')
    (out/'search.json.js').write_text(f'window.searchIndex={index}\n', encoding='utf-8')
    for f in sorted(out.rglob('*.llms.md')):      # where the modules' docstrings say it is
        f.rename(f.with_name(f.name.replace('.llms.md', '.html.md')))
    for f in [*out.rglob('*.html.md'), out/'llms.txt']:
        f.write_text(f.read_text(encoding='utf-8').replace('.llms.md', '.html.md'), encoding='utf-8')


# ---- what is wrong

class _Tags(HTMLParser):
    "Ids, links and loads of a page"
    def __init__(self):
        super().__init__()
        self.ids,self.links,self.loads = set(),[],[]
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get('id'): self.ids.add(a['id'])
        if tag == 'a' and a.get('name'): self.ids.add(a['name'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        self.loads += [a[k] for k in ('src', 'poster', 'data') if a.get(k) and tag != 'a']
        self.loads += [part.split()[0] for part in a.get('srcset', '').split(',') if part.strip()]
        if tag == 'link' and a.get('href') and a.get('rel') not in ('canonical', 'alternate', 'license'):
            self.loads.append(a['href'])
        self.loads += _css_urls(a.get('style') or '')


def _css_urls(css): return re.findall(r'url\(\s*[\'"]?([^\'")]+)', css) + re.findall(r'@import\s+[\'"]([^\'"]+)', css)


def unfound(out, ids):
    "Results of the search that lead nowhere"
    index = out/'search.json'
    hits = [e['href'].partition('#') for e in json.loads(index.read_text(encoding='utf-8'))] if index.exists() else []
    return [
        f'the search leads to {p}{hash}{i}, which is not there'
        for p,hash,i in hits
        if p not in ids or i and i not in ids[p]
    ]


def problems(out):
    "Broken links and anchors inside the site, and everything a page would load from outside"
    parsed = {}
    for f in out.rglob('*.html'):
        parsed[f] = t = _Tags()
        text = f.read_text(encoding='utf-8')
        t.feed(text)
        t.loads += [u for css in re.findall(r'<style[^>]*>(.*?)</style>', text, re.S) for u in _css_urls(css)]
    found = unfound(out, {f.relative_to(out).as_posix(): t.ids for f,t in parsed.items()})
    for f,t in sorted(parsed.items()):
        where = f.relative_to(out).as_posix()
        for url in t.links + t.loads:
            parts = urlsplit(url)
            if parts.scheme in ('http', 'https') or parts.netloc:
                if url in t.loads: found.append(f'{where} loads {url}')
            elif not parts.scheme:
                to = (f.parent/unquote(parts.path)).resolve() if parts.path else f
                if to.is_dir(): to = to/'index.html'
                if not to.exists(): found.append(f'{where}: broken link {url}')
                elif parts.fragment and to in parsed and unquote(parts.fragment) not in parsed[to].ids:
                    found.append(f'{where}: no such place {url}')
    for f in out.rglob('*.css'):
        found += [
            f'{f.relative_to(out).as_posix()} loads {u}'
            for u in _css_urls(f.read_text(encoding='utf-8'))
            if re.match(r'(https?:)?//', u)
        ]
    return found


def build(out, nbs=root/'nbs'):
    "The site in `out`, whole or not at all; returns its pages and what is wrong"
    with tempfile.TemporaryDirectory(prefix='docs-') as tmp:
        folder = Path(tmp)
        made = stage(nbs, folder)
        write_pages(nbs, folder, made)
        configure(nbs, folder, made)
        site, wrong = render(folder)
        if (folder/'images').is_dir(): shutil.copytree(folder/'images', site/'images', dirs_exist_ok=True)
        offline(site, made)
        wrong += problems(site)
        if not wrong:
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(site, out)
        return made, wrong


def main():
    out = Path(sys.argv[1] if len(sys.argv) > 1 else root/'_docs')
    made, wrong = build(out)
    if wrong: sys.exit('\n'.join(wrong))
    print(f"{len(made)} pages: {out/'index.html'}")


if __name__ == '__main__': main()
