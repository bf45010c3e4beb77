"""At 5 % and 10 % of the parameters: whole matrices, or some columns of every matrix?

    python benchmarks/bench_columns.py [--out FOLDER] [--seconds N] [--claims FOLDER]

SmolLM2-135M, 120 steps of 2 × 192 tokens, bf16 autocast where there is a GPU. *matrices*: whole matrices by lot, every
role in every third of the depth with its share; *columns*: the same share of the input columns of every linear layer of
a block, by lot; *rows*: of its output rows; *top-columns*: those columns whose gradient over four batches is largest.
Columns and rows are masks on gradients: Adam's state is 0 elsewhere, so nothing else moves.
"""
import argparse

from equal_steps import Run, add_options, main

RATES = (8e-4, 1.6e-3)
WAYS = {'matrices': dict(freeze_bottom=0.), 'columns': dict(what='masked', by='columns'),
        'top-columns': dict(what='masked', by='top-columns'), 'rows': dict(what='masked', by='rows')}


def runs(data, seeds, ways=('matrices', 'columns'), rates=RATES):
    return [
        Run('columns', way, data, lr, seed, how=WAYS[way] | dict(budget=budget))
        for seed in seeds for budget in (.05, .1) for lr in rates for way in ways
    ]


def plan():
    found = [r for data in ('gsm8k', 'python') for r in runs(data, (0, 1, 2))]
    return found + [r for data in ('gsm8k', 'python') for r in runs(data, (0, 1, 2), ('top-columns', 'rows'))]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    main(plan(), add_options(parser))
