"""Is a checkpoint there after a power cut? A small run trains on an ext4 file system in a file (a loop device); right
before and right behind each seal the file is copied as it is, without what the
system has not written yet; the copy is mounted, which replays its journal, and the checkpoints in it are checked.

    python benchmarks/power_cut.py            # as root, where loop devices may be mounted; a minute. --out appends the
    rows to a file
    python benchmarks/power_cut.py --dry      # copies nothing: only what the flushes cost

Each cut is taken twice: with the flushes of `write_manifest`, and with the seal alone flushed. One row of JSON is
printed for each."""
import argparse, json, platform, re, shutil, subprocess, sys, tempfile, time, warnings
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from alf_nb.core import checkpoints
from alf_nb.demo import demo_dataset, demo_model
from alf_nb.train.trainer import ALFCallback

MIB = 1 << 20


def call(*words): subprocess.run([str(w) for w in words], check=True, capture_output=True, text=True)


@contextmanager
def mounted(image, folder):
    "`image` as a file system in `folder`"
    folder.mkdir(exist_ok=True)
    call('mount', '-o', 'loop', image, folder)
    try: yield folder
    finally: call('umount', folder)


def may_mount(tmp):
    "Why loop devices cannot be mounted here; empty: they can"
    try:
        make_image(tmp/'try.img', 16)
        with mounted(tmp/'try.img', tmp/'try'): return ''
    except FileNotFoundError as e: return f"there is no {e.filename}"
    except subprocess.CalledProcessError as e: return f"{e.cmd[0]}: {e.stderr.strip() or e.returncode}"


def make_image(path, mib):
    "An empty ext4 file system in a file"
    with open(path, 'wb') as f: f.truncate(mib*MIB)
    call('mkfs.ext4', '-q', '-F', path)


class Cut(ALFCallback):
    "Copies the disk as it is before and behind each seal"
    def __init__(self, copy, **kw):
        super().__init__(**kw)
        self.copy, self.ms = copy, []

    def on_save(self, args, state, control, **kw):
        self.copy(state.global_step, 'before')
        begun = time.perf_counter()
        super().on_save(args, state, control, **kw)
        self.ms.append(1000*(time.perf_counter() - begun))
        self.copy(state.global_step, 'behind')


def train(folder, copy, cuts):
    "A run of the demo model with as many checkpoints as cuts; milliseconds that each `on_save` took"
    torch.manual_seed(0)
    alf = Cut(copy, budget=.3, interval=4, offload='full', out=str(folder))
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=2 * cuts,
        save_strategy='steps',
        save_steps=2,
        save_total_limit=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(demo_model(blocks=4), args, train_dataset=demo_dataset(), callbacks=[alf])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return alf.ms


def whole(image, tmp):
    "Steps of the whole checkpoints in a copy of the disk"
    with mounted(image, tmp/'after') as after:
        return [int(p.name[11:]) for p in (after/'run').glob('checkpoint-*') if not checkpoints.verify_checkpoint(p)]


def flushed(yes):
    return nullcontext() if yes else patch.multiple(checkpoints, sync_tree=lambda path: None, sync=lambda path: None)


def cut_power(tmp, cuts, yes):
    "One row: behind how many seals the new checkpoint was whole, and before how many an older one, from the second on"
    image, copies = tmp/'disk.img', {}
    make_image(image, 128)
    with mounted(image, tmp/'disk') as disk:
        def copy(step, when):
            if when == 'behind' or step > 2:
                shutil.copyfile(image, copies.setdefault((step, when), tmp/f'{when}-{step}.img'))
        with flushed(yes): ms = train(disk/'run', copy, cuts)
    left = dict(before=0, behind=0)
    for (step, when), path in copies.items():
        good = whole(path, tmp)
        left[when] += step in good if when == 'behind' else bool(good)
        path.unlink()
    return row(
        yes,
        ms,
        fs='ext4',
        cuts_behind_the_seal=cuts,
        new_one_whole=left['behind'],
        cuts_before_it=cuts - 1,
        older_one_whole=left['before'],
    )


def row(yes, ms, **more):
    return dict(
        date=datetime.now(timezone.utc).strftime('%Y-%m-%d'),
        kernel=re.match(r'[\d.]*\d', platform.release())[0],
        flushed='all' if yes else 'seal',
        **more,
        save_ms=round(sorted(ms)[len(ms) // 2], 1)
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('--cuts', type=int, default=6, help="checkpoints, each with a cut behind it")
    p.add_argument('--dry', action='store_true', help="only the time of on_save, in the temporary folder")
    p.add_argument('--out', help="a file that the rows are appended to")
    a = p.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter('ignore')
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        if not a.dry and (why := may_mount(tmp)):
            sys.exit(
                f"no loop device can be mounted here ({why}): nothing was cut. Try as root, or --dry for the cost alone"
            )
        for yes in (False, True):
            if a.dry:
                with flushed(yes):
                    found = row(
                        yes,
                        train(tmp / f'run-{yes}', lambda step, when: None, a.cuts),
                        fs='the temporary folder',
                        cuts_behind_the_seal=0,
                    )
            else: found = cut_power(tmp, a.cuts, yes)
            print(json.dumps(found))
            if a.out:
                with open(a.out, 'a', encoding='utf-8') as f: f.write(json.dumps(found) + '\n')
    return 0


if __name__ == '__main__': sys.exit(main())
