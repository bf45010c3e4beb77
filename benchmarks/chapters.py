"A classification task made from the Python language reference: from which part is this paragraph?"
from pydoc_data.topics import topics
import torch
from transformers import AutoModelForSequenceClassification
from alf_nb.sources.models import load_encoder

CHAPTERS = dict(
    statements=(
        'assert assignment async augassign break class compound continue del exceptions for function global if import'
        ' in nonlocal pass raise return try while with yield'
    ),
    expressions=(
        'atom-identifiers atom-literals attribute-references await binary bitwise booleans calls comparisons'
        ' conversions dict exprlists lambda lists numeric-types power shifting slicings subscriptions unary'
    ),
    types=(
        'bltin-code-objects bltin-ellipsis-object bltin-null-object bltin-type-objects string-methods typesfunctions'
        ' typesmapping typesmethods typesmodules typesseq typesseq-mutable'
    ),
)


def paragraphs():
    "Paragraphs of the reference with their chapter; those that stand in two are left out"
    found = {}
    for i,names in enumerate(CHAPTERS.values()):
        for name in names.split():
            for p in topics.get(name, '').split('\n\n'):
                if len(words := p.split()) >= 12: found.setdefault(' '.join(words), set()).add(i)
    return [dict(text=t, labels=next(iter(s))) for t,s in sorted(found.items()) if len(s) == 1]


def with_head(encoder, n_labels, seed=0):
    "A classifier with a new head on an encoder"
    encoder.config.num_labels = n_labels
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(encoder.config)
    setattr(model, model.base_model_prefix, encoder)
    return model


def new_classifier(seed, length):
    "MiniLM with a new head, its tokenizer, and the paragraphs as rows of at most `length` tokens"
    encoder, tok = load_encoder(progress=False)
    return (
        with_head(encoder, len(CHAPTERS), seed),
        tok,
        [dict(tok(r['text'], truncation=True, max_length=length), labels=r['labels']) for r in paragraphs()],
    )
