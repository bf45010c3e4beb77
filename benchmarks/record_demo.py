"""Append a run of `make demo` to benchmarks/results/demo.jsonl, the row that README quotes.

    make demo && python benchmarks/record_demo.py [runs/demo]
"""
import json, sys
from pathlib import Path

run = Path(sys.argv[1] if len(sys.argv) > 1 else 'runs/demo')
row = json.loads((run/'summary.json').read_text(encoding='utf-8'))
results = Path(__file__).parent/'results'/'demo.jsonl'
with open(results, 'a', encoding='utf-8') as f: f.write(json.dumps(row)+'\n')
print(f"{results.name}: {row['domain_loss_before']:.3f} -> {row['domain_loss_after']:.3f}, appended")
